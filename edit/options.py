"""Options of ``scorefield edit``, its presets, and which values are possible. Importing it imports no torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from scorefield.atomic import check_replaceable
from scorefield.choices import OnBadData
from scorefield.training.launcher import check_alone, default_device
from scorefield.training.options import LoadOptions, check_numbers, check_out

Method = Literal["prompt-to-prompt", "edit-friendly", "sdedit", "dds", "pds", "flow-edit"]
Inverted = Literal["direct", "ddim", "null-text", "negative-prompt"]

OF_PICTURES = ("edit-friendly", "sdedit", "dds", "pds", "flow-edit")
"""Methods that need a picture to begin with."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What is edited, and to what."""

    image: str = ""
    """Picture to edit: PNG, JPEG or another file that Pillow reads. Its central part is taken at the teacher's
    size. Without one the source is drawn from its prompt."""
    source: str = ""
    """Prompt that describes the picture as it is."""
    target: str = ""
    """Prompt that describes it as it shall be."""
    edits: str = ""
    """A jsonl file of many edits in place of these three: in each line source, target, and image, whose path
    begins where the file lies."""
    on_bad_data: OnBadData = "stop"
    """What to do about lines of --edits, and their pictures, that cannot be used: stop, or skip them."""


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Attention of the target follows the source's: --method prompt-to-prompt and edit-friendly, with UNets."""

    cross_window: float = 0.8
    """Share of the steps, the noisiest, in which attention to the prompt is the source's. A colour keeps its
    shape at 1; a new shape needs 0.4 or less."""
    self_window: float = 0.4
    """Share of the steps in which attention of the image to itself is the source's. 0.8 for a colour, 0 for a new
    shape."""
    weights: tuple[str, ...] = ()
    """Factors on the attention to words of the target, such as red=2 soft=-1."""
    blend: tuple[str, ...] = ()
    """Words of source or target, such as mug; what they do not look at stays as in the source."""
    blend_threshold: float = 0.3
    """Share of the largest attention from which a place belongs to these words."""


@dataclass(frozen=True, kw_only=True)
class InversionOptions:
    """How the noise of a picture is found, and how the way back to it holds under guidance."""

    inversion: Inverted = "direct"
    """direct: the source is put back onto its path at every step. null-text: what guidance moves away from is
    optimised; slow. negative-prompt: guidance moves away from the source's prompt. ddim: none of these."""
    refinements: int = 3
    """Refinements of each step of the inversion; each costs a network call a step."""
    inner: int = 10
    """Updates of null-text inversion at each time. With 20 steps 10 are too few."""
    eta: float = 1.0
    """Noise of the sampler of --method edit-friendly, in (0, 1]."""
    skip: float = 0.36
    """Share of the steps, the noisiest, that edit-friendly and flow-edit leave out. More keeps more."""


@dataclass(frozen=True, kw_only=True)
class OtherOptions:
    """SDEdit, delta denoising and FlowEdit."""

    strength: float = 0.5
    """Of SDEdit: share of the steps that are drawn anew, to the nearest step. 0 returns the picture."""
    iterations: int = 40
    """Gradients of dds and pds."""
    learning_rate: float = 0.1
    """Factor on these gradients. pds needs less: its preset has 0.02."""
    source_guidance: float = 1.5
    """Scale of guidance of FlowEdit's source; --guidance is the target's."""


@dataclass(frozen=True, kw_only=True)
class Config(Pictures, AttentionOptions, InversionOptions, OtherOptions, LoadOptions):
    """Edit pictures with a frozen text-to-image model."""

    preset: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress] = ""
    teacher: str = "toyworld"
    """The frozen model: name or folder of a diffusers text-to-image pipeline, toyworld, the one that ships, or
    module:function, whose code is run."""
    method: Method = "prompt-to-prompt"
    """How to edit. prompt-to-prompt draws source and target side by side; edit-friendly finds noise that
    rebuilds the picture exactly; sdedit noises and denoises it; dds and pds follow a gradient; flow-edit follows
    the difference of two flows."""
    steps: int = 50
    """Steps of sampling and inversion."""
    guidance: float = 7.5
    """Scale of classifier-free guidance. 1 means none; toyworld wants 3."""
    negative_prompt: str = ""
    """What guidance moves away from."""
    size: int = 0
    """Height and width in pixels. 0 means the model's own."""
    seed: int = 0
    """Seed of all noise. Edit i of a seed is always the same."""
    batch_size: int = 8
    """Edits at a time."""
    out: Path = Path("edits")
    """Folder for the pictures, report.json and report.html. Earlier edits there are replaced."""
    report: bool = False
    """Show more in report.html: what changed, attention to each word, and a strip over windows or strengths, which
    costs five more edits of each picture."""
    device: str = default_device()
    """Where to compute, such as cpu or cuda."""
    dry_run: bool = False
    """Check everything, print the resolved options and the number of edits, and stop."""


def prompt_to_prompt() -> Config:
    """Windows 0.8 and 0.4: a background, a material, a phrase that is added."""
    return Config(preset="prompt-to-prompt")


def recolour() -> Config:
    """Prompt-to-Prompt that keeps every shape: windows 1 and 0.8."""
    return Config(preset="recolour", cross_window=1.0, self_window=0.8)


def reshape() -> Config:
    """Prompt-to-Prompt for another object: windows 0.4 and 0."""
    return Config(preset="reshape", cross_window=0.4, self_window=0.0)


def null_text() -> Config:
    """Prompt-to-Prompt behind null-text inversion, the authors' way to edit photographs."""
    return Config(preset="null-text", inversion="null-text")


def negative_prompt() -> Config:
    """The same without optimisation: guidance away from the source's prompt."""
    return Config(preset="negative-prompt", inversion="negative-prompt")


def edit_friendly() -> Config:
    """Edit-friendly DDPM inversion, without attention control."""
    return Config(preset="edit-friendly", method="edit-friendly", cross_window=0.0, self_window=0.0)


def sdedit() -> Config:
    """SDEdit at half of the steps."""
    return Config(preset="sdedit", method="sdedit")


def dds() -> Config:
    """Delta denoising score: 40 gradients."""
    return Config(preset="dds", method="dds")


def pds() -> Config:
    """Posterior distillation sampling, which is drawn back to the source."""
    return Config(preset="pds", method="pds", learning_rate=0.02)


def flow_edit() -> Config:
    """FlowEdit, for flow models; any other model is asked on straight paths."""
    return Config(preset="flow-edit", method="flow-edit", skip=0.33)


PRESETS: Mapping[str, Callable[[], Config]] = {
    "prompt-to-prompt": prompt_to_prompt, "recolour": recolour, "reshape": reshape, "null-text": null_text,
    "negative-prompt": negative_prompt, "edit-friendly": edit_friendly, "sdedit": sdedit, "dds": dds, "pds": pds,
    "flow-edit": flow_edit,
}  # fmt: skip


def check(config: Config) -> None:
    """Raise ``ValueError`` for options that are out of range, missing, or of another method."""
    check_numbers(
        config, positive=("steps", "batch_size", "learning_rate"),
        not_negative=("size", "refinements", "inner", "iterations", "guidance", "source_guidance"),
    )  # fmt: skip
    for name in ("cross_window", "self_window", "strength", "blend_threshold"):
        if not 0 <= (value := getattr(config, name)) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} must lie in [0, 1]; got {value}.")
    if not 0 < config.eta <= 1:
        raise ValueError(
            f"--eta must lie in (0, 1]; got {config.eta}. At 0 there is no noise to hold the picture."
        )
    if not 0 <= config.skip < 1:
        raise ValueError(f"--skip must lie in [0, 1); got {config.skip}.")
    if config.method in ("edit-friendly", "flow-edit") and not steps_left(config.steps, config.skip):
        raise ValueError(
            f"--skip {config.skip} of --steps {config.steps} leaves none. Lower it, or raise --steps."
        )
    check_asked(config)
    check_method(config)
    parse_weights(config.weights)
    check_out(config.out)
    check_replaceable(config.out)
    check_alone("edit")


def steps_left(steps: int, skip: float) -> int:
    """Return how many of the steps are made where the share ``skip`` of them, the noisiest, is left out."""
    return steps - round(skip * steps)


def check_asked(config: Config) -> None:
    """Raise ``ValueError`` unless one edit, or a file of edits, is asked for."""
    alone = [f"--{name}" for name in ("image", "source", "target") if getattr(config, name)]
    if config.edits:
        if alone:
            raise ValueError(f"--edits {config.edits} takes the place of {', '.join(alone)}. Leave them out.")
        if Path(config.edits).suffix.lower() not in (".jsonl", ".json"):
            raise ValueError(f"--edits must be a jsonl file; got {config.edits}.")
        return
    missing = [f"--{name}" for name in ("source", "target") if not getattr(config, name).strip()]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} must say what the picture shows; got nothing. Pass --source "
            '"a red mug" --target "a blue mug", or --edits with a file of edits.'
        )
    if config.method in OF_PICTURES and not config.image:
        raise ValueError(f"--method {config.method} edits a picture; got no --image. Use prompt-to-prompt.")


def check_method(config: Config) -> None:
    """Raise ``ValueError`` for options that the method would not look at."""
    controls = config.method in ("prompt-to-prompt", "edit-friendly")
    if not controls and (config.weights or config.blend):
        raise ValueError(
            f"--weights and --blend change attention, which --method {config.method} leaves alone. Leave them "
            "out, or use prompt-to-prompt."
        )
    if config.weights and not round(config.cross_window * config.steps):
        raise ValueError(
            f"--weights act within --cross-window, which has no step; got {config.cross_window}. Pass "
            "--cross-window 0.8, or leave them out."
        )
    if config.negative_prompt and config.inversion == "negative-prompt":
        raise ValueError(
            "--inversion negative-prompt guides away from the source's prompt. Leave out --negative-prompt, or "
            "use direct."
        )
    guides = config.guidance != 1 or (config.method == "flow-edit" and config.source_guidance != 1)
    if config.negative_prompt and not guides:
        raise ValueError("--negative-prompt is what guidance moves away from: pass --guidance above 1, too.")
    if config.method != "prompt-to-prompt" and config.inversion != Config.inversion:
        raise ValueError(
            f"--inversion {config.inversion} is of --method prompt-to-prompt; got {config.method}. Leave it out."
        )
    if config.inversion in ("null-text", "negative-prompt") and config.guidance == 1:
        raise ValueError(f"--inversion {config.inversion} is for guidance; got --guidance 1. Use direct.")
    if config.inversion not in get_args(Inverted):
        raise ValueError(f"--inversion must be one of {', '.join(get_args(Inverted))}; got {config.inversion}.")


def parse_weights(weights: tuple[str, ...]) -> dict[str, float]:
    """Return the factor of each word. Raises ``ValueError`` for what is not word=number."""
    found = {}
    for text in weights:
        word, sign, number = text.rpartition("=")
        try:
            factor = float(number)
        except ValueError:
            factor = float("nan")
        if not sign or not word.strip() or not abs(factor) <= 1000:
            raise ValueError(f"--weights must be word=factor, such as red=2; got {text!r}.")
        found[word.strip()] = factor
    return found
