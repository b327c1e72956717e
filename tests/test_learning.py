"""The phases of score distillation: what reaches the scene, what reaches phi, what never happens, on any ranks."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from scorefield.denoiser import NetworkDenoiser, freeze
from scorefield.randomness import Rng
from scorefield.schedule import Schedule, VariancePreserving
from scorefield.times import constant
from scorefield.training.loop import train
from sds.canvas import Canvas
from sds.learning import SceneDistillation
from sds.looks import CanvasLooks, Look
from sds.losses import sds, sigma_squared
from sds.vsd import VSD

close = torch.testing.assert_close
WORKER = Path(__file__).parent / "workers" / "scene_ranks.py"


@dataclass(frozen=True)
class Point:
    """Expects the image of its prompt, whatever it is shown; counts its calls."""

    schedule: Schedule
    calls: list = field(default_factory=list)

    def __call__(self, x_t, t, cond):
        self.calls.append(len(x_t))
        return torch.zeros_like(x_t) + cond["prompt"].view(-1, 1, 1, 1)


@pytest.fixture
def canvas(generator):
    return Canvas(torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64))


def make_task(canvas, teacher, **changes):
    looks = CanvasLooks(canvas=canvas, conditions={"prompt": torch.tensor([[0.5]], dtype=torch.float64)})
    return SceneDistillation(**{"subject": looks, "method": lambda step: sds(teacher), **changes})


def test_the_loss_pulls_by_the_closed_form_over_the_batch(canvas):
    """w (eps_s - eps) = sigma^2 (alpha / sigma) (x0 - mean) for a teacher that always expects the mean."""
    schedule = VariancePreserving.scaled_linear()
    t = torch.tensor([400.0])
    task = make_task(canvas, Point(schedule), method=lambda step: sds(Point(schedule), times=constant(400.0)))
    rng = Rng(0, 0)
    task.loss(task.rollout({}, ("scene",), rng), rng)["loss"].backward()
    factor = float(schedule.alpha(t) * schedule.sigma(t))
    close(canvas.pixels.grad, factor * (canvas.pixels.detach() - 0.5) / 3, rtol=1e-6, atol=0)


def test_penalties_are_added_and_reported(canvas):
    task = make_task(canvas, Point(VariancePreserving.scaled_linear()))
    plain = Rng(0, 0)
    without = task.loss(task.rollout({}, ("scene",), plain), plain)

    @dataclass(frozen=True)
    class Tidy:
        network: nn.Module

        def look(self, rng):
            look = task.subject.look(rng)
            return Look(look.x0, look.cond, 2 * look.x0.square().sum(), {"opacity": torch.tensor(0.25)})

    tidy = SceneDistillation(subject=Tidy(canvas), method=task.method)
    values = tidy.loss(tidy.rollout({}, ("scene",), plain), plain)
    close(values["penalty"], 2 * canvas.pixels.square().sum())
    close(values["loss"], without["loss"] + values["penalty"])
    assert values["opacity"] == 0.25


def test_the_method_is_that_of_its_step(canvas):
    teacher, asked = Point(VariancePreserving.scaled_linear()), []

    def method(step):
        asked.append(step)
        return sds(teacher)

    task = make_task(canvas, teacher, method=method)
    task.loss(task.rollout({}, ("scene",), Rng(0, 11)), Rng(0, 11))
    assert asked == [11]


def test_the_encoder_runs_once_for_all_draws(canvas):
    """K noises and times are one batch to the teacher and one pass through what lies before."""
    teacher, looks = Point(VariancePreserving.scaled_linear()), []
    task = make_task(canvas, teacher, num_draws=4)
    watched = canvas.register_forward_hook(lambda *_: looks.append(1))
    optimizer = torch.optim.SGD(canvas.parameters(), lr=0.1)
    for _ in train(task.phases(optimizer), task.batches, Accelerator(cpu=True), rollout=task.rollout, steps=2):
        pass
    watched.remove()
    assert looks == [1, 1]
    assert teacher.calls == [12, 12]


class Net(nn.Module):
    """A small network on (x_t, t, camera, prompt)."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(2, 2, 1)

    def forward(self, x_t, t, prompt, camera=None):
        return self.mix(x_t) + prompt.view(-1, 1, 1, 1)


def test_phi_learns_from_the_renders_of_the_scenes_step(generator):
    schedule = VariancePreserving.scaled_linear()
    canvas = Canvas(torch.randn(2, 2, 4, 4, generator=generator))
    teacher_net, phi_net = freeze(Net()), Net()
    teacher = NetworkDenoiser(teacher_net, schedule, "x0")
    vsd = VSD(teacher=teacher, phi=NetworkDenoiser(phi_net, schedule, "x0"), w=sigma_squared)
    looks = CanvasLooks(canvas=canvas, conditions={"prompt": torch.zeros(1, 1)})
    task = SceneDistillation(subject=looks, method=lambda step: vsd)
    scene, phi = (torch.optim.SGD(net.parameters(), lr=0.1) for net in (canvas, phi_net))
    phases = task.phases(scene, phi=phi)
    assert [phase.name for phase in phases] == ["scene", "phi"]
    before = [p.detach().clone() for p in (canvas.pixels, phi_net.mix.weight, teacher_net.mix.weight)]
    for report in train(phases, task.batches, Accelerator(cpu=True), rollout=task.rollout, steps=1):
        assert report.metrics["phi/loss"] > 0
    after = canvas.pixels, phi_net.mix.weight, teacher_net.mix.weight
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, False, True]
    assert all(p.grad is None for p in teacher_net.parameters())
    assert set(phases[0].networks()) | set(phases[1].networks()) == {"scene", "phi"}  # no teacher in a checkpoint


def test_only_vsd_has_a_phi(canvas):
    teacher = Point(VariancePreserving.scaled_linear())
    optimizer = torch.optim.SGD(canvas.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="VSD, and no other loss"):
        make_task(canvas, teacher).phases(optimizer, phi=optimizer)
    phi = NetworkDenoiser(Net(), teacher.schedule, "x0")
    task = make_task(canvas, teacher, method=lambda step: VSD(teacher=teacher, phi=phi))
    with pytest.raises(ValueError, match="VSD, and no other loss"):
        task.phases(optimizer)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene-ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(WORKER), str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_ranks_take_the_mean_of_their_gradients(two_ranks):
    """One process computes what each rank does, with its cameras and noise; both ranks then step by the mean."""
    spec = importlib.util.spec_from_file_location("scene_ranks_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    task = worker.make_task(2)
    gradients = [worker.gradient_of(task, Rng(0, 0, 0, rank, rank)) for rank in range(2)]
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[0].norm()
    for answer in two_ranks:
        close(answer["step"], (gradients[0] + gradients[1]) / 2, rtol=1e-4, atol=1e-6)


def test_two_ranks_look_from_different_sides(two_ranks):
    sectors = [((answer["azimuth"] + 180) / 90).floor().long().tolist() for answer in two_ranks]
    assert sectors == [[0, 2], [1, 3]]


def test_two_ranks_go_back_to_the_same_state(two_ranks):
    """The first writes the lowered rates over what the second, which is slower, has yet to read."""
    assert [(answer["rate"], answer["rollbacks"]) for answer in two_ranks] == [(0.05, 1)] * 2
