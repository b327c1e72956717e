"""How much faster n processes take the steps of one scene: `scorefield sds --split-views`.

    python benchmarks/scene_ranks.py --ranks 1 2

The views are rendered, the loss is scored, gradients are averaged over gloo ranks and Adam steps as in a run. The
teacher's compute is scaled: for each batch of views its passes are a sleep of --seconds, as of a device that works
while this process waits, so that ranks need no core each. Rendering and everything else run on the CPU, whose
seconds are said beside; ranks that share a core do these in turn, which is part of the figure. A step is the same
on any number of ranks: the scenes at the end are compared. Efficiency is time of one process / (n x time of n).
"""

import json
import os
import socket
import statistics
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from torch.multiprocessing.spawn import spawn

BAR = 0.8
"""Efficiency that was asked for."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure the steps of a scene on several processes."""

    ranks: tuple[int, ...] = (1, 2)
    """Numbers of processes, the first of them 1."""
    batches: int = 4
    """Batches of views of a step, which the processes share: a multiple of each of --ranks."""
    views: int = 2
    """Views of a batch."""
    seconds: float = 0.25
    """Sleep in place of the teacher's passes over a batch."""
    steps: int = 12
    """Steps of each measurement, of which the first two do not count."""
    rounds: int = 3
    """Measurements of each number of processes, in turns."""
    render_size: int = 16
    """Height and width of the renders in pixels."""


class Sleeping:
    """A teacher that expects grey and takes its time."""

    def __init__(self, schedule: Any, seconds: float) -> None:
        self.schedule, self.seconds = schedule, seconds

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        """Return the expected image."""
        time.sleep(self.seconds)
        return 0.1 * x_t


def measure(config: Config) -> dict[str, Any]:
    """Return the median seconds and CPU seconds of a step of this process, and a sum of the scene's weights."""
    from accelerate import Accelerator

    from scorefield.schedule import VariancePreserving
    from scorefield.training.loop import train
    from sds.cameras import CameraDistribution
    from sds.losses import sds
    from sds.scene import grid_scene
    from sds.training import Backdrop, SceneDistillation, SceneSubject

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    cameras = CameraDistribution(distance=(2.7, 3.0), elevation=(0.0, 45.0), focal=(1.37, 1.37))
    size = config.render_size
    subject = SceneSubject(
        scene=grid_scene(), encode=lambda images: images, size=(size, size), resolution=lambda step: size,
        cameras=lambda step: [(cameras, config.views)],
        backdrops=[Backdrop({"level": torch.zeros(4, 1)}, (1.0, 1.0, 1.0))],
    )  # fmt: skip
    teacher = Sleeping(VariancePreserving.scaled_linear(), config.seconds)
    task = SceneDistillation(subject=subject, method=lambda step: sds(teacher))
    phases = task.phases(torch.optim.Adam(subject.scene.parameters(), lr=0.01))
    reports = train(
        phases, task.batches, accelerator, rollout=task.rollout, steps=config.steps, split=True,
        accumulate=config.batches // accelerator.num_processes,
    )  # fmt: skip
    ends = [(time.perf_counter(), time.process_time()) for _ in reports]
    wall, cpu = (
        statistics.median(after[clock] - before[clock] for before, after in pairwise(ends[1:])) for clock in (0, 1)
    )
    weights = sum(float(p.detach().double().sum()) for p in subject.scene.parameters())
    return {"seconds": wall, "cpu_seconds": cpu, "weights": weights}


def rank(number: int, config: Config, ranks: int, port: int, folder: str) -> None:
    """Measure as one of several processes."""
    told = {
        "RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": 1,
    }  # fmt: skip
    os.environ.update({name: str(value) for name, value in told.items()})
    (Path(folder) / f"{number}.json").write_text(json.dumps(measure(config)))


def measured_on(config: Config, ranks: int) -> list[dict[str, Any]]:
    """Return what each of so many processes measures."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        spawn(rank, (config, ranks, port, folder), nprocs=ranks)
        return [json.loads((Path(folder) / f"{number}.json").read_text()) for number in range(ranks)]


def table(found: dict[int, list[list[dict[str, Any]]]]) -> str:
    """Return the figures of all numbers of processes; ``found`` holds rounds of what each process measured."""
    seconds = {ranks: statistics.median(max(one["seconds"] for one in each) for each in rounds)
               for ranks, rounds in found.items()}  # fmt: skip
    rows = ["| processes | seconds a step | CPU seconds of it, a process | times as fast | efficiency |",
            "|---|---|---|---|---|"]  # fmt: skip
    for ranks, rounds in found.items():
        cpu = statistics.median(one["cpu_seconds"] for each in rounds for one in each)
        gain = seconds[1] / seconds[ranks]
        rows.append(f"| {ranks} | {seconds[ranks]:.3f} | {cpu:.3f} | {gain:.2f} | {gain / ranks:.2f} |")
    return "\n".join(rows)


def main(config: Config) -> None:
    """Measure in turns and print the figures."""
    if 1 not in config.ranks or any(config.batches % ranks for ranks in config.ranks):
        raise ValueError(f"--ranks {config.ranks} must name 1 and divide --batches {config.batches}.")
    found: dict[int, list[list[dict[str, Any]]]] = {ranks: [] for ranks in config.ranks}
    for _ in range(config.rounds):
        for ranks, rounds in found.items():
            rounds.append(measured_on(config, ranks))
    print(table(found))
    sums = [one["weights"] for rounds in found.values() for each in rounds for one in each]
    print(f"scenes at the end: sums of weights differ by {max(sums) - min(sums):.2g} of {abs(sums[0]):.2g}")
    print(f"bar: efficiency {BAR}")


if __name__ == "__main__":
    main(tyro.cli(Config))
