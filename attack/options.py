"""Options of ``scorefield attack``, its presets, and which values are possible. Imports no torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from scorefield.atomic import check_replaceable
from scorefield.choices import OnBadData
from scorefield.training.launcher import check_alone, default_device
from scorefield.training.options import LoadOptions, check_numbers, check_out

Method = Literal["fgsm", "pgd", "diff-pgd", "autoattack"]
"""fgsm: one step. pgd: the classifier alone. diff-pgd: through the purifier, for a realistic result, too.
autoattack: that of a package that is installed beside."""

AUTOATTACK_PACKAGES = ("autoattack", "torchattacks")
"""Packages with an AutoAttack, the official one first. They differ by half a point."""

AUTOATTACK_WANTED = (
    "AutoAttack needs a package: pip install git+https://github.com/fra31/auto-attack, the official one, or pip "
    "install torchattacks."
)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the attack may change, and how it searches."""

    methods: tuple[Method, ...] = ("pgd", "diff-pgd")
    """Attacks to compare. fgsm: one step. pgd: against the classifier alone. diff-pgd: PGD through the teacher's
    purification, which also gives a realistic result that is not bound by --epsilon. autoattack: of the package
    autoattack or torchattacks, with settings of its own."""
    epsilon: tuple[float, ...] = (8.0,)
    """Radius of the ball in grey values, of 255; several make a curve."""
    norm: Literal["linf", "l2"] = "linf"
    """linf: no pixel changes by more than --epsilon. l2: nor does the root of the sum of squares."""
    steps: int = 10
    """Steps of PGD."""
    step_size: float = 0.0
    """Length of a step, in grey values. 0 means a quarter of --epsilon."""
    restarts: int = 1
    """Random starts, of which the best is kept."""
    draws: int = 5
    """Draws of the purification for each gradient of diff-pgd (expectation over transformations)."""
    target: str = ""
    """Name or number of the class that all images shall be taken for. By default any wrong one."""
    region: tuple[float, ...] = ()
    """Left, top, right and bottom of the part that may change, as shares of the image, such as 0.5 0.5 1 1.
    Outside it not a bit changes. By default all."""


@dataclass(frozen=True, kw_only=True)
class Purification:
    """The teacher that purifies images: it noises and denoises them."""

    teacher: str = ""
    """Name or folder of a diffusion model, toyworld, or module:function, whose code is run; its images have the
    size of the classifier's. By default none: plain attacks only."""
    purify_prompt: str = ""
    """What a text-to-image teacher is told of all images."""
    strength: float = 0.1
    """Share of the noise schedule up to which images are noised."""
    purify_steps: int = 2
    """Denoising steps of the purification."""
    sampler: Literal["ddim", "ddpm"] = "ddim"
    """Sampler of the purification. ddpm adds noise in each step, as DiffPure does."""
    gradient: Literal["full", "straight-through"] = "full"
    """full: through all steps. straight-through: as if the purification did nothing, which is cheap, and fails
    with teachers of latents."""
    evaluations: int = 10
    """Draws of the purification on every finished image, for the figures; at least 2."""


@dataclass(frozen=True, kw_only=True)
class Attack(Budget, Purification, LoadOptions):
    """Attack an image classifier, and measure it with and without purification by a diffusion model."""

    classifier: str = ""
    """toyworld, the shape head of the judge that ships; the folder classifier/ of `scorefield robust`; or
    module:function, whose code is run: a function without arguments that returns a function from images (b, c, h,
    w) in [0, 1] to logits."""
    transfer: tuple[str, ...] = ()
    """Further classifiers, which are not attacked but measured on the results, in the same forms."""
    data: str = ""
    """Images, in all forms of `scorefield teacher --data`, whose labels are the classifier's numbers; or toyworld,
    or digits: those that `scorefield robust digits` measures with. Images without labels have the classifier's own
    answers."""
    size: int = 0
    """Height and width of the images, in pixels. 0 means the teacher's, or those of the first image."""
    num_images: int = 32
    """Number of images, drawn at random from a fixed seed if there are more."""
    batch_size: int = 16
    """Images at a time. Results do not depend on it, but for rounding."""
    seed: int = 0
    """Seed of all draws. Each image has draws of its own."""
    out: Path = Path("runs/attack")
    """Folder for figures.json, the adversarial images in adversarial.npz and a picture. An earlier one is
    replaced."""
    on_bad_data: OnBadData = "stop"
    """What to do about images that cannot be used: stop, or skip them."""
    device: str = default_device()
    """Where to compute, such as cpu or cuda."""
    dry_run: bool = False
    """Check everything, load all parts, print the resolved options and the number of images, and stop."""


def toyworld() -> Attack:
    """The judge of the toy world, purified by the pipeline that ships: no download."""
    return Attack(classifier="toyworld", data="toyworld", teacher="toyworld")


PRESETS: Mapping[str, Callable[[], Attack]] = {"": Attack, "toyworld": toyworld}
"""Settings by name."""


def check(config: Attack) -> None:
    """Raise ``ValueError`` for options that are out of range, missing, or that contradict each other."""
    check_numbers(
        config, positive=("steps", "restarts", "draws", "purify_steps", "num_images", "batch_size"),
        not_negative=("step_size", "size"),
    )  # fmt: skip
    if not config.classifier:
        raise ValueError("--classifier is missing. Pass module:function, a folder, or toyworld.")
    if not config.data:
        raise ValueError("--data is missing. Pass a folder of images, or toyworld.")
    if not config.methods:
        raise ValueError("--methods names none; expected fgsm, pgd, diff-pgd or autoattack.")
    check_autoattack(config)
    if not config.epsilon or not all(0 < value <= 255 * 255 for value in config.epsilon):
        raise ValueError(
            f"--epsilon must be above 0, in grey values of 255; got {list(config.epsilon)}. 8 is usual."
        )
    if len(set(config.epsilon)) < len(config.epsilon) or len(set(config.methods)) < len(config.methods):
        raise ValueError("--epsilon and --methods must not repeat a value. Leave the second one out.")
    check_region(config.region)
    check_purification(config)
    check_out(config.out.absolute().parent)
    check_replaceable(config.out)
    check_alone("attack")


def check_autoattack(config: Attack) -> None:
    """Raise ``ValueError`` where AutoAttack is asked for what it cannot do, or no package has it."""
    if "autoattack" not in config.methods:
        return
    if config.region or config.target:
        raise ValueError(
            "--methods autoattack has neither --region nor --target: it changes all of an image, for any wrong "
            "answer. Leave them out."
        )
    if not any(find_spec(name) for name in AUTOATTACK_PACKAGES):
        raise ValueError(f"--methods autoattack: {AUTOATTACK_WANTED}")


def check_region(region: tuple[float, ...]) -> None:
    """Raise ``ValueError`` unless ``region`` is empty, or a box within the image."""
    if region and not (len(region) == 4 and 0 <= region[0] < region[2] <= 1 and 0 <= region[1] < region[3] <= 1):
        raise ValueError(
            f"--region must be left, top, right and bottom, in [0, 1], such as 0.5 0.5 1 1; got {list(region)}."
        )


def check_purification(config: Attack) -> None:
    """Raise ``ValueError`` for a purification that cannot be, or cannot be measured."""
    if not 0 < config.strength <= 1:
        raise ValueError(f"--strength must lie in (0, 1]; got {config.strength}. 0.1 purifies small changes.")
    if config.evaluations < 2:
        raise ValueError(
            f"--evaluations must be at least 2, since purification is random; got {config.evaluations}."
        )
    if not config.teacher and "diff-pgd" in config.methods:
        raise ValueError("--methods diff-pgd goes through a purification. Pass --teacher, or --methods pgd.")
    if not config.teacher and config.purify_prompt:
        raise ValueError("--purify-prompt is for a text-to-image --teacher; got none. Leave it out.")
