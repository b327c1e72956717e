"""A step of a scene, and a rollback, on each of two ranks."""

import time
from dataclasses import dataclass, replace

import torch

from scorefield.denoiser import NetworkDenoiser
from scorefield.randomness import Rng
from scorefield.schedule import Schedule, VariancePreserving
from scorefield.training import checkpoint
from scorefield.training.loop import Phase, train
from sds.cameras import CameraDistribution
from sds.losses import sds
from sds.penalties import Penalties
from sds.recovery import num_rollbacks, roll_back
from sds.scene import grid_scene
from sds.training import Backdrop, SceneDistillation, SceneSubject
from sds.vsd import VSD

CAMERAS = CameraDistribution(distance=(2.7, 3.0), elevation=(0.0, 45.0), focal=(1.37, 1.37))


@dataclass(frozen=True)
class Grey:
    """A teacher that expects grey, brighter before the second backdrop."""

    schedule: Schedule

    def __call__(self, x_t, t, cond):
        return 0.1 * x_t + cond["level"].view(-1, 1, 1, 1).to(x_t)


def make_task(num_ranks):
    backdrops = [Backdrop({"level": torch.full((4, 1), level)}, (level,) * 3) for level in (0.0, 0.5)]
    subject = SceneSubject(
        scene=grid_scene(resolutions=(4, 8), num_samples=8), encode=lambda images: images, size=(8, 8),
        cameras=lambda step: [(CAMERAS, 2)], backdrops=backdrops, resolution=lambda step: 8,
        penalties=lambda step: Penalties(entropy=1.0), num_ranks=num_ranks,
    )  # fmt: skip
    teacher = Grey(VariancePreserving.scaled_linear())
    return SceneDistillation(subject=subject, method=lambda step: sds(teacher), num_draws=2)


def gradient_of(task, rng):
    """The gradient of one rank's step, without a loop."""
    network = task.subject.network
    network.zero_grad()
    task.loss(task.rollout({}, ("scene",), rng), rng)["loss"].backward()
    return torch.cat([p.grad.reshape(-1) for p in network.parameters()])


def one_step(accelerator):
    """Weights before and after a step of plain descent with rate 1, and the azimuths that were seen."""
    task = make_task(accelerator.num_processes)
    network = task.subject.network
    before = torch.cat([p.detach().clone().reshape(-1) for p in network.parameters()])
    phases = task.phases(torch.optim.SGD(network.parameters(), lr=1.0))
    for _ in train(phases, task.batches, accelerator, rollout=task.rollout, steps=1, verify_every=1):
        pass
    after = torch.cat([p.detach().reshape(-1) for p in network.parameters()])
    rng = Rng(0, 0, 0, accelerator.process_index, accelerator.process_index)
    azimuth = CAMERAS.draw(
        2, rng("views"), rank=accelerator.process_index, num_ranks=accelerator.num_processes
    ).azimuth
    return {"step": before - after, "azimuth": azimuth}


def one_rollback(accelerator, folder):
    """Learning rate and count after a rollback in which the second rank is slow to read."""
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    phases = [Phase(name="scene", network=network, optimizer=optimizer, loss=lambda batch, rng: {})]
    if accelerator.is_main_process:
        checkpoint.save(folder, 0, phases, {})
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        time.sleep(1)
    roll_back(folder, phases, {}, write=accelerator.is_main_process, wait=accelerator.wait_for_everyone)
    return {"rate": optimizer.param_groups[0]["lr"], "rollbacks": num_rollbacks(optimizer)}


def main(accelerator, folder):
    return {**one_step(accelerator), **one_rollback(accelerator, folder / "checkpoints")}


class Told(torch.nn.Module):
    """A small network on (x_t, t, level, camera)."""

    def __init__(self, dtype):
        super().__init__()
        self.mix = torch.nn.Conv2d(3, 3, 1, dtype=dtype)

    def forward(self, x_t, t, level, camera=None):
        told = 0 if camera is None else camera.to(x_t).flatten(1).mean(1).view(-1, 1, 1, 1)
        return self.mix(x_t) + level.to(x_t).view(-1, 1, 1, 1) + told


def split_steps(accelerator, method, dtype, batches):
    """Weights after three steps whose batches of views all ranks share: of a scene, and with VSD of phi, too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        phi = Told(dtype)
    task = make_task(1)
    network, teacher = task.subject.network.to(dtype), Grey(VariancePreserving.scaled_linear())
    with_phi = VSD(teacher=teacher, phi=NetworkDenoiser(phi, teacher.schedule, "x0"))
    subject = replace(task.subject, tell_camera=method == "vsd")
    task = replace(task, subject=subject, method=lambda step: with_phi if method == "vsd" else sds(teacher))
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.5) for one in (network, phi)]
    phases = task.phases(optimizers[0], phi=optimizers[1] if method == "vsd" else None)
    reports = train(
        phases, task.batches, accelerator, rollout=task.rollout, steps=3, verify_every=1, split=True,
        accumulate=batches // accelerator.num_processes,
    )  # fmt: skip
    for _ in reports:
        pass
    return torch.cat([p.detach().reshape(-1) for phase in phases for p in phase.network.parameters()])
