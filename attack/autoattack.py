"""AutoAttack (Croce & Hein 2020, arXiv 2003.01690) of a package that is installed beside, and which one it was.

The official package and torchattacks' version differ by about half a point, so that a figure says whose it is.
Neither is a requirement.
"""

import importlib
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from attack.options import AUTOATTACK_PACKAGES, AUTOATTACK_WANTED
from attack.pgd import Classifier, Labels, logits_of
from attack.threat import Threat, check_images
from scorefield.schedule import Images

FEWEST = 4
"""Classes that its targeted losses need."""

NORMS = {"linf": "Linf", "l2": "L2"}


@dataclass(frozen=True, eq=False)
class Attacked:
    """What AutoAttack made.

    Attributes:
        images: adversarial where it found one, in [0, 1].
        package: whose it was; see :func:`package`.
    """

    images: Tensor
    package: str


def available() -> str:
    """Return the package that is used: the official one where both are there.

    Raises ``ImportError``, with what to install, where neither is.
    """
    for name in AUTOATTACK_PACKAGES:
        if find_spec(name) is not None:
            return name
    raise ImportError(AUTOATTACK_WANTED)


def package() -> str:
    """Return whose AutoAttack is used, with its version, such as "torchattacks 3.5.1".

    Raises ``ImportError`` as :func:`available` does.
    """
    name = available()
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:  # a clone on the path
        return name


def autoattack(
    classifier: Classifier, images: Images, labels: Labels, *, threat: Threat, seed: int = 0, batch_size: int = 256
) -> Attacked:
    """Return the images of AutoAttack's standard version: APGD-CE, targeted APGD, FAB and Square.

    Args:
        classifier: without randomness; nothing of it is changed.
        images: in [0, 1].
        labels: the true ones.
        threat: ball and norm.
        seed: of the package's own draws; torch's global generator is as before afterwards.
        batch_size: images at a time.

    Raises:
        ImportError: no such package.
        ValueError: fewer than four classes, a radius of 0, images outside [0, 1].
    """
    name = available()
    check_images(images)
    with torch.no_grad():
        num_classes = logits_of(classifier, images[:1]).shape[1]
    if num_classes < FEWEST:
        raise ValueError(f"AutoAttack needs at least {FEWEST} classes; the classifier has {num_classes}. Use PGD.")
    if threat.radius == 0:
        raise ValueError("AutoAttack needs a radius above 0.")
    network, norm = _Network(classifier, images), NORMS[threat.norm]
    module: Any = importlib.import_module(name)
    with torch.random.fork_rng(), torch.enable_grad():
        if name == "autoattack":
            theirs = module.AutoAttack(
                network, norm=norm, eps=threat.radius, version="standard", seed=seed, device=str(images.device),
                verbose=False,
            )  # fmt: skip
            for part in ("apgd_targeted", "fab"):  # they aim at nine classes, however many there are
                if hasattr(theirs, part):
                    getattr(theirs, part).n_target_classes = min(9, num_classes - 1)
            made = theirs.run_standard_evaluation(images, labels, bs=batch_size)
        else:
            theirs = module.AutoAttack(
                network, norm=norm, eps=threat.radius, version="standard", n_classes=num_classes, seed=seed
            )
            pairs = zip(images.split(batch_size), labels.split(batch_size), strict=True)
            made = torch.cat([theirs(part, answers) for part, answers in pairs])
    return Attacked(made.detach().clamp(0, 1), package())


class _Network(nn.Module):
    # The packages ask a module for a parameter, to learn its device, and torchattacks sets its mode.
    def __init__(self, classifier: Classifier, images: Images) -> None:
        super().__init__()
        object.__setattr__(self, "classifier", classifier)  # no part of this one: its mode stays its own
        self.where = nn.Parameter(images.new_zeros(1), requires_grad=False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(images)  # type: ignore[operator]
        return logits
