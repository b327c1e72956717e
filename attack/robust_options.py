"""Options of ``scorefield robust``, its presets, and which values are possible. Imports no torch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

from attack.options import AUTOATTACK_PACKAGES, AUTOATTACK_WANTED
from scorefield.data.options import DataOptions
from scorefield.training.options import RunOptions, check_numbers, check_run


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """The attack that the classifier learns against."""

    loss: Literal["pgd", "trades"] = "pgd"
    """pgd: the cross-entropy of attacked images (Madry et al.). trades: that of clean images, plus --beta times
    the divergence of the answers about attacked ones."""
    beta: float = 6.0
    """Weight of the divergence in trades. Larger is more robust and less accurate."""
    epsilon: float = 8.0
    """Radius of the ball in grey values, of 255. 0 is plain training."""
    norm: Literal["linf", "l2"] = "linf"
    """linf: no pixel changes by more than --epsilon. l2: nor does the root of the sum of squares."""
    attack_steps: int = 10
    """Steps of the attack on each batch; a step of the training costs so many passes more."""
    attack_step_size: float = 0.0
    """Length of a step of the attack, in grey values. 0 means 2.5 x --epsilon / --attack-steps."""
    random_start: bool = True
    """Begin the attack at a random point of the ball. trades needs it: at the image itself it has no gradient."""
    attack_mode: Literal["eval", "train"] = "eval"
    """Mode of the network while it is attacked: eval, without dropout and with kept statistics, or train."""


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Generated images beside the real ones."""

    generated: str = ""
    """Generated images, in all forms of --data, such as what `scorefield sample --out made.npz` draws. By default
    none."""
    mix: float = 0.5
    """Share of each batch that is generated; exactly so many images, rounded. 1 leaves the real ones out."""
    pseudo_label: str = ""
    """Classifier whose answers are the labels of --generated, in place of theirs: a folder of `scorefield robust`,
    or module:function, whose code is run. Needed where they have none."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How robustness is measured, on images that were not learned from."""

    free: ClassVar[tuple[str, ...]] = (
        "eval_every", "eval_images", "test_steps", "test_restarts", "test_epsilon", "autoattack"
    )  # fmt: skip
    """Options that bind no checkpoint: with others, a finished run is measured again."""

    held_out: str = ""
    """Images to measure with, in all forms of --data. By default the digits' own 597, or a tenth of --data, always
    the same, which is then not learned from."""
    test_steps: int = 40
    """Steps of PGD in the measurement, each of 2.5 x the radius / --test-steps."""
    test_restarts: int = 2
    """Random starts, of which the worst counts for each image."""
    test_epsilon: tuple[float, ...] = ()
    """Further radii of the curve, in grey values. By default a half, 1.5 and 2 times --epsilon."""
    autoattack: bool = False
    """Measure AutoAttack at --epsilon, too; needs the package autoattack or torchattacks. Slow."""
    eval_every: int = 0
    """Iterations between two measurements on the way, of the averaged weights, with --attack-steps and one start.
    0 means never. They are of the held-out images: choose nothing by them, or measure on others."""
    eval_images: int = 200
    """Held-out images of a measurement on the way."""


@dataclass(frozen=True, kw_only=True)
class Learner:
    """The network that learns."""

    classifier: str = ""
    """module:function, whose code is run: a function without arguments that returns a torch.nn.Module from images
    (b, c, h, w) in [0, 1] to logits, with its normalisation inside. By default --network."""
    network: Literal["cnn", "mlp"] = "cnn"
    """cnn: convolutions with group normalisation. mlp: hidden layers on the pixels."""
    width: int = 32
    """Channels of the cnn at full resolution, doubled at each further one; hidden width of the mlp."""
    depth: int = 2
    """Resolutions of the cnn, or hidden layers of the mlp."""
    ema_decay: float = 0.995
    """Decay of the moving average of the weights, which is what is measured and saved."""


@dataclass(frozen=True, kw_only=True)
class Robust(Adversary, Generated, Measure, Learner, DataOptions, RunOptions):
    """Train an image classifier that holds against attacks, on real and generated images."""

    results: ClassVar[tuple[str, ...]] = ("classifier", "report.json", "images.png")

    out: Path = Path("runs/robust")
    """Folder for checkpoints, logs, report.json, pictures and the finished classifier."""
    steps: int = 5000
    """Number of optimizer steps."""
    batch_size: int = 128
    """Images per micro-batch and process, real and generated ones together."""
    learning_rate: float = 1e-3
    """Peak learning rate: 100 steps of warm-up, then a cosine to zero."""


def digits() -> Robust:
    """scikit-learn's 8 x 8 digits at a radius of a tenth: minutes on a CPU, no download."""
    return Robust(
        epsilon=25.5, width=16, steps=1000, batch_size=64, attack_steps=5, learning_rate=3e-3, save_every=500
    )


PRESETS: Mapping[str, Callable[[], Robust]] = {"": Robust, "digits": digits}
"""Settings by name."""


def check(config: Robust) -> None:
    """Raise ``ValueError`` for options that are out of range, or that contradict each other."""
    check_run(config)
    check_numbers(
        config,
        positive=("attack_steps", "test_steps", "test_restarts", "eval_images", "width", "depth", "beta"),
        not_negative=("epsilon", "attack_step_size", "eval_every"), rates=("learning_rate",),
        shares=("ema_decay",),
    )  # fmt: skip
    if not all(0 < value < math.inf for value in config.test_epsilon):
        raise ValueError(f"--test-epsilon must be above 0, in grey values; got {list(config.test_epsilon)}.")
    if config.loss == "trades" and not (config.random_start and config.epsilon):
        raise ValueError(
            "--loss trades needs a random start and an --epsilon above 0: its attack has no gradient at the image "
            "itself. Leave out --no-random-start, or pass --loss pgd."
        )
    if config.shard > 1:
        raise ValueError(
            "--shard is not for robust: the attack asks for gradients of images, which a network in pieces does "
            "not give. Leave it out; several processes share the batch (DDP)."
        )
    if config.autoattack and not config.epsilon:
        raise ValueError("--autoattack measures at --epsilon, which is 0. Pass one, or leave it out.")
    if config.autoattack and not any(find_spec(name) for name in AUTOATTACK_PACKAGES):
        raise ValueError(f"--autoattack: {AUTOATTACK_WANTED}")
    check_generated(config)


def check_generated(config: Robust) -> None:
    """Raise ``ValueError`` for a mixture that cannot be."""
    if not config.generated:
        if config.pseudo_label:
            raise ValueError("--pseudo-label labels generated images; got none. Pass --generated.")
        return
    if not 0 < config.mix <= 1:
        raise ValueError(f"--mix must lie in (0, 1]; got {config.mix}. 0.5 is one half of each batch.")
    if not round(config.mix * config.batch_size):
        raise ValueError(f"--mix {config.mix} of --batch-size {config.batch_size} is no image. Raise one of them.")
