"""Adversarial training: a classifier learns from the worst images that an attack finds round its own.

PGD training (Madry et al. 2017, arXiv 1706.06083, Eq. 2.1) minimises the cross-entropy of adversarial images.
TRADES (Zhang et al. 2019, arXiv 1901.08573, Eq. 5) minimises that of clean images, plus beta times the divergence
of the answers about adversarial images from those about clean ones, and its attack climbs that divergence.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from attack.pgd import PGD, Labels, Probabilities, logits_of
from scorefield.data.images import ImageSet, Labelled
from scorefield.denoiser import unwrap
from scorefield.randomness import Generators, Rng, derived_generator
from scorefield.schedule import Images

Mode = Literal["eval", "train"]
"""In which mode the network is attacked: eval, as TRADES' own code has it, or train, as it learns."""

Losses = dict[str, Tensor]
""""loss" and further scalars, as :class:`scorefield.training.loop.Phase` wants them."""


@contextmanager
def in_mode(network: nn.Module, mode: Mode) -> Iterator[None]:
    """Let a network be in eval mode within the block; afterwards each of its parts is in the mode it had before.

    ``train`` changes nothing: a part that its owner keeps in eval mode, such as frozen statistics, stays so.
    """
    before = [(module, module.training) for module in network.modules()]
    if mode == "eval":
        network.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def worst(
    network: nn.Module, images: Images, answers: Labels | Probabilities, *, attack: PGD | None,
    generator: Generators, mode: Mode = "eval",
) -> Tensor:  # fmt: skip
    """Return the images that ``attack`` finds, without a graph; the images themselves where it is None.

    The network is attacked without its wrappers of DDP, and only gradients of the images are asked for: those of
    its parameters are left as they are.
    """
    if attack is None:
        return images
    inner = unwrap(network)
    with in_mode(inner, mode):
        return attack(inner, images, answers, generator=generator).detach()


def pgd_loss(
    network: nn.Module, images: Images, labels: Labels, *, attack: PGD | None, generator: Generators,
    mode: Mode = "eval",
) -> Losses:  # fmt: skip
    """Return the mean cross-entropy of adversarial images, and the share of them that is answered rightly.

    Args:
        network: learns; its logits are (b, classes).
        images: clean, in [0, 1].
        labels: their classes.
        attack: None is plain training.
        generator: of the attack's random start.
        mode: of the network while it is attacked.
    """
    seen = worst(network, images, labels, attack=attack, generator=generator, mode=mode)
    logits = logits_of(network, seen)
    return {"loss": functional.cross_entropy(logits, labels), "accuracy_attacked": _right(logits, labels)}


def trades_loss(
    network: nn.Module, images: Images, labels: Labels, *, attack: PGD, generator: Generators, beta: float = 6.0,
    mode: Mode = "eval",
) -> Losses:  # fmt: skip
    """Return CE(p(x), y) + beta KL(p(x) || p(x')), a mean over images, and its two parts.

    x' climbs the same divergence, with p(x) held; the loss itself has gradients through both sides, as in the
    authors' code. Clean and adversarial images pass the network in one call, as DDP wants it: batch normalisation
    sees the statistics of both together, where the authors call twice. The random start is uniform in the ball;
    theirs is normal, 0.001 wide. Arguments are those of :func:`pgd_loss`; ``beta`` is 1 / lambda of the paper.
    """
    inner = unwrap(network)
    with torch.no_grad(), in_mode(inner, mode):
        logits = logits_of(inner, images)
        held = logits.softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))
    seen = worst(network, images, held, attack=attack, generator=generator, mode=mode)
    clean, attacked = logits_of(network, torch.cat([images, seen])).chunk(2)
    natural = functional.cross_entropy(clean, labels)
    apart = divergence(clean, attacked)
    return {
        "loss": natural + beta * apart, "natural": natural.detach(), "divergence": apart.detach(),
        "accuracy_attacked": _right(attacked, labels),
    }  # fmt: skip


def divergence(clean: Tensor, attacked: Tensor) -> Tensor:
    """Return the mean KL(softmax(clean) || softmax(attacked)) of logits (b, classes), in nats."""
    return functional.kl_div(attacked.log_softmax(1), clean.log_softmax(1), reduction="batchmean", log_target=True)


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == labels).float().mean()


@dataclass(frozen=True, eq=False)
class Mixture:
    """Batches of real and generated images in a given proportion, the same in each batch.

    Attributes:
        real: images with labels.
        generated: images with labels; None for none.
        share: of a batch that is generated, in [0, 1].
    """

    real: ImageSet
    generated: ImageSet | None = None
    share: float = 0.0

    def counts(self, batch_size: int) -> tuple[int, int]:
        """Return how many images of a batch are real, and how many generated."""
        made = round(self.share * batch_size) if self.generated is not None else 0
        return batch_size - made, made

    def batches(
        self, batch_size: int, device: torch.device | str = "cpu", num_ranks: int = 1
    ) -> Callable[[Rng], Labelled]:
        """Return what makes batches in [0, 1] from an ``Rng``, the real images first.

        Each set has shuffled epochs of its own, end to end, which depend on seed and number of the batch alone.
        """
        sets = zip((self.real, self.generated), self.counts(batch_size), strict=True)
        used = [(one, number) for one, number in sets if one is not None and number]
        makers = [(one is self.real, one.batches(number, device, num_ranks)) for one, number in used]

        def batch(rng: Rng) -> Labelled:
            parts = [make(rng if real else _of_generated(rng)) for real, make in makers]
            images, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels"))
            return Labelled(((images + 1) / 2).clamp(0, 1), labels)

        return batch


def _of_generated(rng: Rng) -> Rng:
    # An order of their own: sets of one length would otherwise meet each other in the same pairs in every epoch.
    return replace(rng, seed=derived_generator(rng.seed, "generated").initial_seed())


def part_of(data: ImageSet, rows: Tensor) -> ImageSet:
    """Return the images with these numbers, in ascending order, as a set of their own."""
    rows = rows.sort().values
    held = rows < len(data.images)
    return replace(
        data, images=data.images[rows[held]], labels=data.labels[rows],
        unread=[data.unread[number - len(data.images)] for number in rows[~held].tolist()],
        pixel_hash=f"{data.pixel_hash} {len(rows)}" if data.pixel_hash else "",
    )  # fmt: skip
