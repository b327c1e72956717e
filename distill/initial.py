"""Weights that a student starts from in place of its teacher's: those of a finished student, by --init-from.

DMD2 trains Stable Diffusion 1.5 in two such stages, the second with a GAN term. The fake score starts from the
teacher in any case, and has --fake-warmup updates to get to know the student.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.export import LORA
from distill.options import Config
from scorefield.cache import fingerprint
from scorefield.files import read_json
from scorefield.models.families import family_of
from scorefield.models.lora import LoRA, load_adapter_weights
from scorefield.models.lora_keys import read_lora
from scorefield.models.pretrained import INDEX
from scorefield.models.teacher import Teacher, load_teacher
from scorefield.schedule import VariancePreserving


@dataclass(frozen=True, eq=False)
class Initial:
    """The weights of a finished student, which fit.

    Attributes:
        source: its folder.
        weights: by the names that the student's network has for them; those of a LoRA as its file names them.
    """

    source: str
    weights: Mapping[str, Tensor]

    def identity(self) -> str:
        """Return a hash of the weights."""
        return fingerprint(self.weights[name] for name in sorted(self.weights))

    def give(self, student: nn.Module) -> None:
        """Let the student start from them. Raises ``ValueError`` for a LoRA of other layers or another rank."""
        if not isinstance(student, LoRA):
            student.load_state_dict(dict(self.weights))
            return
        try:
            load_adapter_weights(student, self.weights)
        except ValueError as error:
            raise ValueError(f"--init-from {self.source} does not fit --lora: {error}") from error


def initial_weights(config: Config, teacher: Teacher) -> Initial | None:
    """Return what ``--init-from`` names, if it names anything.

    Raises ``ValueError`` for a folder that holds no student, or one of another kind of model than ``teacher``.
    """
    source = config.init_from
    if not source:
        return None
    is_lora = (Path(source) / LORA).is_file() or Path(source).is_file()
    if is_lora != config.lora:
        kind, fix = ("a LoRA", "Pass --lora, too") if is_lora else ("no LoRA", "Leave out --lora")
        raise ValueError(f"--init-from {source} is {kind}. {fix}, or the folder of another student.")
    if is_lora:
        return Initial(source, _lora(config, teacher))
    # The student of a module:function does not say how its network is built; the teacher does.
    code = (config.network or config.teacher) if teacher.facts.get("network") == "function" else ""
    try:
        student = load_teacher(source, code, few_steps=True, num_frames=0)
    except ValueError as error:
        raise ValueError(f"--init-from: {error}") from error
    if not student.times:
        raise ValueError(
            f"--init-from {source} is no finished student. Pass the folder that a distillation wrote."
        )
    _check_fit(source, student, teacher)
    state = student.denoiser.network.state_dict()
    return Initial(source, {name: value for name, value in state.items() if isinstance(value, Tensor)})


def _lora(config: Config, teacher: Teacher) -> dict[str, Tensor]:
    file = Path(config.init_from)
    file = file if file.is_file() else file / LORA
    assert teacher.source is not None
    family = family_of(read_json(teacher.source / INDEX))
    try:
        weights = read_lora(file, family.pipeline, family.part)
    except ValueError as error:
        raise ValueError(f"--init-from: {error}") from error
    ranks = {value.shape[0] for name, value in weights.items() if ".lora_A." in name}
    if ranks != {config.lora_rank}:
        there = ", ".join(map(str, sorted(ranks)))
        raise ValueError(f"--init-from {config.init_from} has the rank {there}, --lora-rank {config.lora_rank}.")
    return weights


def _check_fit(source: str, student: Teacher, teacher: Teacher) -> None:
    theirs, ours = (one.denoiser.network.state_dict() for one in (student, teacher))
    shapes = [{name: tuple(x.shape) for name, x in one.items() if isinstance(x, Tensor)} for one in (theirs, ours)]
    if names := sorted(name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name)):
        there, here = (one.get(names[0], "not there") for one in shapes)
        raise ValueError(
            f"--init-from {source} is another network than --teacher: {names[0]} is {there}, the teacher's {here}."
        )
    meanings = [
        (one.denoiser.kind, one.denoiser.time_scale, one.facts.get("sigma_data")) for one in (student, teacher)
    ]
    if meanings[0] != meanings[1] or not _same_noise(student, teacher):
        raise ValueError(
            f"--init-from {source} does not mean what --teacher means: it predicts {student.denoiser.kind} on "
            f"{student.denoiser.schedule}, the teacher {teacher.denoiser.kind} on {teacher.denoiser.schedule}."
        )


def _same_noise(student: Teacher, teacher: Teacher) -> bool:
    ours, theirs = teacher.denoiser.schedule, student.denoiser.schedule
    if not isinstance(ours, VariancePreserving) or not isinstance(theirs, VariancePreserving):
        return type(ours) is type(theirs)
    # That of an exported student ends at its first timestep.
    number = min(len(ours.alphas_cumprod), len(theirs.alphas_cumprod))
    return torch.allclose(ours.alphas_cumprod[:number], theirs.alphas_cumprod[:number], rtol=1e-4)
