"""Passes of a distillation, for the bytes that ``--dry-run`` predicts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.adversarial import logits_alone
from distill.options import Config
from distill.parts import pairs_at_a_time, uses_pairs
from scorefield.models.codec import Codec
from scorefield.models.teacher import Teacher
from scorefield.training.memory import Activations, Pass, predicted
from scorefield.training.options import images_per_pass


def predicted_passes(
    config: Config, teacher: Teacher, student: nn.Module, fake: nn.Module | None = None, *, gpu: bool
) -> dict[str, Activations]:
    """Return the activations of what a run does one after the other, by name; none where numbers decide shapes.

    In the student's update its graph is held while teacher and fake score answer without one, and together with
    those of the critic's pass and of the regression. In the fake score's update its own is held, with the critic's
    pass over real images.

    Args:
        config: settled.
        teacher: of the prompts; its network on the meta device.
        student: on the meta device, as it is trained.
        fake: likewise; none where the student learns along paths of the teacher.
        gpu: count as a GPU computes.
    """
    networks = [teacher.denoiser.network, student, *([] if fake is None else [fake])]
    asked = _Asked(config, teacher)
    runs = {"update of the student": Pass(lambda: asked.ask(student), lambda x0: asked.student(x0, student, fake))}
    if fake is not None:
        runs["update of the fake score"] = Pass(lambda: asked.fake(fake))
    if uses_pairs(config):
        runs["teacher pairs"] = Pass(lambda: asked.pairs(pairs_at_a_time(config)))
    if isinstance(teacher.codec, Codec):
        networks.append(teacher.codec.vae)
        runs["decoding a picture"] = Pass(asked.decode)
    return predicted(runs, networks, precision=config.precision, gpu=gpu)


class _Asked:
    # Networks asked about a batch without numbers.
    def __init__(self, config: Config, teacher: Teacher) -> None:
        self.config, self.teacher = config, teacher
        number = images_per_pass(config)
        self.cond = teacher.cond(torch.zeros(number, dtype=torch.long))
        self.x_t = torch.zeros(number, *teacher.shape, device="meta")
        self.guided = config.guidance != 1 and teacher.embedded is None

    def ask(self, network: nn.Module, times: int = 1) -> Any:
        x_t, cond = self.x_t, self.cond
        if times > 1:
            x_t = x_t.repeat(times, *[1] * (x_t.ndim - 1))
            cond = {name: torch.cat([value] * times) for name, value in cond.items()}
        output: Any = network(x_t, torch.full((len(x_t),), 500.0, device="meta"), **cond)
        return output

    def student(self, x0: Tensor, student: nn.Module, fake: nn.Module | None) -> Tensor:
        with torch.no_grad():
            self.ask(self.teacher.denoiser.network, 2 if self.guided else 1)
            self.ask(student if fake is None else fake)
        loss: Tensor = x0.float().sum()
        if self.config.gan_weight and fake is not None:
            with _frozen(fake):
                loss = loss + self.logits(fake, x0).sum()
        if self.config.regression_weight:
            loss = loss + self.ask(student).float().sum()
        return loss

    def fake(self, fake: nn.Module) -> Tensor:
        output = self.ask(fake)
        parts = output if isinstance(output, tuple) else (output,)
        loss: Tensor = torch.stack([part.float().sum() for part in parts]).sum()
        return loss + self.logits(fake, self.x_t).sum() if self.config.gan_weight else loss

    def logits(self, fake: nn.Module, x0: Tensor) -> Tensor:
        denoiser = replace(self.teacher.denoiser, network=fake)
        return logits_alone(denoiser, x0, torch.full((len(x0),), 0.5, device="meta"), self.cond)

    def pairs(self, number: int) -> Tensor:
        times = number * (2 if self.guided else 1) // len(self.x_t)
        with torch.no_grad():
            answer: Tensor = self.ask(self.teacher.denoiser.network, times)
        return answer

    def decode(self) -> Tensor:
        with torch.no_grad():
            return self.teacher.decode(self.x_t[:1])


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    # As the loop freezes the networks of other phases.
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    yield
    for parameter in learned:
        parameter.requires_grad_(True)
