"""Small classifiers that ``scorefield robust`` trains, and the folder that holds one: weights, and numbers beside.

A folder names its network by a word of :data:`NETWORKS`, never by code, and its numbers are compared with the
header of the weights before a network is built. Images are in [0, 1]; normalisation is inside.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from scorefield.atomic import whole_folder
from scorefield.files import check_regular, load_json
from scorefield.models.weights import check_finite, check_fit

FORMAT = "scorefield-classifier-1"
WEIGHTS, DESCRIPTION = "model.safetensors", "classifier.json"

MOST = {"channels": 3, "resolution": 4096, "num_classes": 100_000, "width": 16_384, "depth": 64}
"""Largest numbers of a network: a folder may come from anywhere, and even planning a huge one would not end."""

FUNCTION = "function"
"""Word for a network that the user's own code builds: a folder keeps its weights, and cannot build it."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """How a classifier is built, and what it knows.

    Attributes:
        network: a word of :data:`NETWORKS`, or :data:`FUNCTION`.
        channels: of its images.
        resolution: height and width of its images, in pixels.
        num_classes: that it tells apart.
        width: of the mlp's hidden layers; channels of the cnn at full resolution, doubled at each further one.
        depth: hidden layers of the mlp; resolutions of the cnn, each half of the one before.
        class_names: in the order of their numbers; empty if they have none.
        training: how it was trained, for whoever reads it; nothing depends on it.
    """

    network: str
    channels: int
    resolution: int
    num_classes: int
    width: int = 32
    depth: int = 2
    class_names: tuple[str, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.network not in (*NETWORKS, FUNCTION):
            known = ", ".join((*NETWORKS, FUNCTION))
            raise ValueError(f"network must be one of {known}; got {str(self.network)[:80]!r}.")
        for name, most in MOST.items():
            value = getattr(self, name)
            least = 2 if name == "num_classes" else 1
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{name} must be a whole number in [{least}, {most}]; got {value!r:.80}.")
        if self.network == "cnn" and self.resolution < 2 ** (self.depth - 1):
            raise ValueError(
                f"a cnn of depth {self.depth} halves images {self.depth - 1} times; {self.resolution} pixels are "
                f"too few. Lower the depth."
            )
        names = self.class_names
        if len(names) not in (0, self.num_classes) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"class_names must be {self.num_classes} names, or none; got {str(names)[:80]}.")


class ConvNet(nn.Module):
    """Two 3 x 3 convolutions at each resolution, normalised within an image, then one hidden layer.

    Group normalisation, not batch normalisation: an image's logits do not depend on its batch, so that they are
    the same in train and eval mode, and attacks on one image at a time are attacks on the batch.
    """

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self.shape = (facts.channels, facts.resolution, facts.resolution)
        layers, before, size = list[nn.Module](), facts.channels, facts.resolution
        for level in range(facts.depth):
            after = facts.width * 2**level
            for _ in range(2):
                groups = next(number for number in (8, 4, 2, 1) if after % number == 0)
                layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(groups, after), nn.SiLU()]
                before = after
            if level < facts.depth - 1:
                layers.append(nn.AvgPool2d(2))
                size //= 2
        pooled = min(size, 4)
        layers += [nn.AdaptiveAvgPool2d(pooled), nn.Flatten(), nn.Linear(before * pooled**2, 128), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.logits = nn.Linear(128, facts.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (b, classes) of images (b, c, h, w) in [0, 1]. Raises ``ValueError`` for another shape."""
        logits: Tensor = self.logits(self.body(_centred(images, self.shape)))
        return logits


class MLP(nn.Module):
    """Hidden layers of equal width on the pixels."""

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self.shape = (facts.channels, facts.resolution, facts.resolution)
        layers, before = list[nn.Module](), facts.channels * facts.resolution**2
        for _ in range(facts.depth):
            layers += [nn.Linear(before, facts.width), nn.SiLU()]
            before = facts.width
        self.body = nn.Sequential(nn.Flatten(), *layers)
        self.logits = nn.Linear(before, facts.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (b, classes) of images (b, c, h, w) in [0, 1]. Raises ``ValueError`` for another shape."""
        logits: Tensor = self.logits(self.body(_centred(images, self.shape)))
        return logits


NETWORKS: dict[str, Callable[[Facts], nn.Module]] = {"cnn": ConvNet, "mlp": MLP}
"""The networks that a folder can name."""


def _centred(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(images.shape[1:]) != shape:
        raise ValueError(f"this classifier sees images {shape}; got {tuple(images.shape[1:])}. Resize them.")
    return 2 * images - 1


def build_classifier(facts: Facts) -> nn.Module:
    """Return the network with weights drawn from torch's global generator.

    Raises ``ValueError`` for one that the user's code builds.
    """
    if facts.network == FUNCTION:
        raise ValueError("a network of a module:function is built by its function.")
    return NETWORKS[facts.network](facts)


def save_classifier(network: nn.Module, facts: Facts, folder: Path) -> Path:
    """Write weights and facts; :func:`load_classifier` reads them. A folder of ours is replaced as a whole."""
    with whole_folder(folder) as temporary:
        save_model(network, str(temporary / WEIGHTS))
        (temporary / DESCRIPTION).write_text(json.dumps({"format": FORMAT, **asdict(facts)}, indent=2) + "\n")
    return folder


def read_facts(folder: Path) -> Facts:
    """Return how the classifier in a folder is built. Raises ``ValueError`` if the folder holds none."""
    try:
        held = load_json(folder / DESCRIPTION)
        if not isinstance(held, dict) or held.get("format") != FORMAT:
            got = held.get("format") if isinstance(held, dict) else type(held).__name__
            raise ValueError(f"its format must be {FORMAT!r}; got {str(got)[:80]!r}")
        known = {one.name for one in fields(Facts)}
        if unknown := sorted(held.keys() - known - {"format"}):
            raise ValueError(f"{str(unknown[0])[:80]!r} is no fact of a classifier")
        held["class_names"] = tuple(held.get("class_names", ()))
        return Facts(**{name: value for name, value in held.items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder} holds no classifier of `scorefield robust`: {DESCRIPTION}: {str(error).rstrip('.')}. Pass "
            "the folder classifier/ in the --out of such a run."
        ) from error


def load_classifier(folder: Path, device: torch.device | str = "cpu") -> nn.Module:
    """Return the classifier in a folder, in eval mode, its parameters without gradients.

    Raises ``ValueError`` if there is none, if the weights do not fit or are not finite, and for a network that its
    owner's code builds: what a folder names is never run.
    """
    facts = read_facts(folder)
    if facts.network == FUNCTION:
        raise ValueError(
            f"{folder} holds the weights of a network that its owner's code builds, which no folder can name. "
            f"Load them in a function of yours, safetensors.torch.load_model(network, {str(folder / WEIGHTS)!r}), "
            "and pass that as module:function."
        )
    with torch.device("meta"):
        planned = build_classifier(facts)
    check_fit(folder / WEIGHTS, planned)
    network = build_classifier(facts)
    try:
        check_regular(folder / WEIGHTS)
        load_model(network, str(folder / WEIGHTS))
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"the weights in {folder} do not fit its {DESCRIPTION}: {error}") from error
    check_finite(network.state_dict(), folder / WEIGHTS)
    return network.to(device).eval().requires_grad_(False)
