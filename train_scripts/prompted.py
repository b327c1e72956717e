"""Text-to-image teachers for the scripts: a teacher of ``scorefield.models.hub`` whose classes are prompts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill.export import read_student_times
from scorefield import Cond, Denoiser, NetworkDenoiser, guided
from scorefield.files import load_json
from scorefield.models import hub
from scorefield.models.prompts import LongPrompts


@dataclass(frozen=True, eq=False)
class PromptedTeacher:
    """What ``networks.Teacher`` is for classes; class i is prompt i.

    Attributes:
        source: the model, its text encoders dropped.
        conds: of the prompts, batch ``num_classes``; empty for a model of classes or of nothing at all.
        negative: batch 1, what guidance moves away from; None where there is no such thing.
        num_classes: prompts, or entries of the class table.
    """

    source: hub.Teacher
    conds: Cond
    negative: Cond | None
    num_classes: int
    times: tuple[float, ...] = ()
    """Conditioning times, for a student that ``distill.export`` wrote; empty for a teacher."""

    @property
    def denoiser(self) -> NetworkDenoiser:
        """Network, schedule and prediction kind."""
        return self.source.denoiser

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of x0, latent or pixel."""
        return self.source.shape

    @property
    def shift(self) -> float:
        """Of the noise levels of a sampling grid."""
        return self.source.shift

    def guided(self, scale: float) -> Denoiser:
        """The denoiser under classifier-free guidance, 1 for none. Raises ``ValueError`` without prompts."""
        if scale == 1:
            return self.denoiser
        if self.times:
            raise ValueError(f"--guidance must be 1 here, since a student has it built in; got {scale}.")
        if self.negative is None:
            raise ValueError(f"--guidance must be 1 here, since this model takes no prompts; got {scale}.")
        return guided(self.denoiser, scale, self.negative)

    def cond(self, labels: Tensor) -> Cond:
        """The condition of the prompts, or of the classes, with these numbers."""
        if self.conds:
            device = self.source.device
            return {name: value[labels.to(value.device)].to(device) for name, value in self.conds.items()}
        return self.source.classes(labels) if self.num_classes else {}

    def decode(self, x0: Tensor) -> Tensor:
        """x0 to images."""
        return self.source.decode(x0)


def is_hub_model(name: str) -> bool:
    """Whether ``name`` is a pipeline with text encoders, or no local path but the name of a model online."""
    index = Path(name) / "model_index.json"
    if index.is_file():
        try:
            return any(part.startswith("text_encoder") for part in load_json(index))
        except (OSError, ValueError, TypeError, AttributeError):
            return False
    # Within a folder that exists it is a local path with a slip of the pen.
    return not Path(name).parent.is_dir() and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name))


def load_prompted(
    name: str, prompts: Sequence[str], *, negative: str = "", size: int = 0, allow_pickle: bool = False,
    long_prompts: LongPrompts = "stop",
    variant: str = "", dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
) -> PromptedTeacher:  # fmt: skip
    """A teacher by name or folder, asked for ``prompts``; its text encoders are freed.

    Raises ``ValueError`` for what ``hub.load_teacher`` refuses, and for prompts that are missing, empty, or
    given to a model that takes none.
    """
    if any(not prompt.strip() for prompt in prompts):
        raise ValueError(f"--prompts must say something; got {list(prompts)}.")
    try:
        teacher = hub.load_teacher(
            name, dtype=dtype, device=device, size=size or None, allow_pickle=allow_pickle,
            variant=variant or None, few_steps=True,
        )  # fmt: skip
        asked = read_student_times(hub.pipeline_folder(name, variant=variant or None))
    except ValueError as error:
        raise ValueError(f"--model {name}, asked by --prompts: {error}") from error
    if teacher.texts is None:
        if prompts:
            raise ValueError(f"{name} takes no prompts; leave out --prompts.")
        return PromptedTeacher(teacher, {}, None, teacher.num_classes)
    if not prompts:
        raise ValueError(f'{name} draws what --prompts ask for, such as "a red mug"; got none.')
    prompts = [prompts[number] for number in teacher.texts.fitting(prompts, long_prompts, "--prompts")]
    conds, away = teacher.prompts(prompts), teacher.negative(negative)
    times = tuple(t / teacher.denoiser.time_scale for t in asked)
    return PromptedTeacher(teacher.without_text_encoders(), conds, away, len(prompts), times)
