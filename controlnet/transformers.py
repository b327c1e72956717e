"""Adapters of transformers, whose hints are latents: diffusers' ControlNet of the family, and a control LoRA.

    adapter = copy_transformer(teacher)  # zero at first: the teacher draws what it draws alone
    adapter = control_lora(teacher, rank=64, generator=generator)  # low-rank changes and a wider first layer
    controlled = ControlledDenoiser(teacher.denoiser, adapter).with_hint(hint)  # (b, 1 or 3, h, w) in [0, 1]

Stock pipelines draw a sample of the Gaussian that the autoencoder makes of a hint. Here it is its mean, from which
samples of the published autoencoders hardly differ.
"""

import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Generator, Tensor, nn

from scorefield.denoiser import NetworkDenoiser
from scorefield.models.codec import Codec
from scorefield.models.controls import Control
from scorefield.models.lora import LAYERS, LoRA, adaptable
from scorefield.models.networks import DiffusersNetwork, model_arguments
from scorefield.models.teacher import Teacher


@dataclass(frozen=True, eq=False)
class Shared:
    """Frozen parts that an adapter uses and that are not its own: copies of it share them.

    Attributes:
        codec: of the teacher.
        transformer: the model that is controlled.
    """

    codec: Codec
    transformer: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    @torch.no_grad()
    def latents(self, hint: Tensor) -> Tensor:
        """Return hints (b, 1 or 3, h, w) in [0, 1] as latents, in full precision.

        Raises ``ValueError`` for hints of other channels.
        """
        if hint.ndim != 4 or hint.shape[1] not in (1, 3):
            raise ValueError(f"a transformer's hints are pictures of 1 or 3 channels; got {tuple(hint.shape)}.")
        pixels = 2 * hint.to(next(self.codec.vae.parameters()).device).expand(-1, 3, -1, -1) - 1
        with torch.autocast(pixels.device.type, enabled=False):
            return self.codec.encode(pixels)


class TransformerCopy(nn.Module):
    """A ControlNet of diffusers for a transformer: a trained copy of some blocks behind layers that start at zero.

    Attributes:
        model: diffusers' model.
        control: how it is asked.
        channels: of the hint.
    """

    channels = 3

    def __init__(self, model: Any, control: Control, shared: Shared) -> None:
        super().__init__()
        self.model, self.control, self.shared = model, control, shared

    @property
    def prompt_only(self) -> bool:
        """Return whether its pipeline asks it for the prompt alone under classifier-free guidance."""
        return self.control.prompt_only

    def prepare(self, hint: Tensor) -> Tensor:
        """Return the hint's latents; see :meth:`Shared.latents`."""
        return self.shared.latents(hint)

    def forward(self, x_t: Tensor, t: Tensor, hint: Tensor, **cond: Tensor) -> dict[str, Tensor]:
        """Return what is added to the blocks; ``hint`` is of :meth:`prepare`.

        Raises ``ValueError`` for a hint of another shape than x_t.
        """
        if hint.shape != x_t.shape:
            raise ValueError(
                f"the hint's latents must be {tuple(x_t.shape)}, as x_t is; got {tuple(hint.shape)}. Give hints "
                "by controlled.with_hint(hint), which encodes them."
            )
        dtype, transformer = next(self.model.parameters()).dtype, self.shared.transformer
        held = {name: getattr(transformer, name) for name in self.control.borrowed}
        # Assigned, a module would become part of this one, of its state and of its copies.
        self.model.__dict__.update(held)
        try:
            given = model_arguments(cond, dtype)
            return self.control.call(self.model, transformer, x_t.to(dtype), t, hint.to(dtype), given)
        finally:
            self.model.__dict__.update(dict.fromkeys(held))


class ControlLoRA(nn.Module):
    """Low-rank changes of a transformer whose first layer takes the hint's latents as further channels.

    It answers in place of the transformer. What it keeps and learns are the changes alone; it starts as the
    transformer itself, whatever the hint.

    Attributes:
        LoRA: the changed transformer, on the weights of the teacher.
    """

    channels = 3

    def __init__(self, adapted: LoRA, shared: Shared) -> None:
        super().__init__()
        self.adapted, self.shared = adapted, shared

    @property
    def backbone(self) -> nn.Module:
        """The changed transformer, to switch gradient checkpointing on."""
        return self.adapted.backbone

    def prepare(self, hint: Tensor) -> Tensor:
        """Return the hint's latents; see :meth:`Shared.latents`."""
        return self.shared.latents(hint)

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Any:
        """Return the prediction, as the transformer's network does; ``cond`` holds the hint's latents too."""
        return self.adapted(x_t, t, **cond)


def controlled_network(base: NetworkDenoiser) -> tuple[DiffusersNetwork, Control]:
    """Return the network of a transformer, and how it is controlled.

    Raises ``ValueError`` for a network without a ControlNet in diffusers.
    """
    network = base.network
    if not isinstance(network, DiffusersNetwork) or network.control is None:
        found = type(network.model if isinstance(network, DiffusersNetwork) else network).__name__
        raise ValueError(
            f"diffusers has no ControlNet for a {found}. docs/families.md lists the pipelines that have one."
        )
    return network, network.control


def is_of_tokens(base: NetworkDenoiser) -> bool:
    """Return True for a transformer of diffusers, whether or not it has a ControlNet."""
    network = base.network
    return isinstance(network, DiffusersNetwork) and "Transformer" in type(network.model).__name__


def has_control(base: NetworkDenoiser) -> bool:
    """Return True for a transformer that diffusers has a ControlNet for."""
    return isinstance(base.network, DiffusersNetwork) and base.network.control is not None


def copy_transformer(teacher: Teacher, source: NetworkDenoiser | None = None) -> TransformerCopy:
    """Return a fresh ControlNet for a transformer, float32, on its device; copy before it is cast to bf16.

    Args:
        teacher: that is controlled.
        source: the same with weights that are not rounded, which are copied; None: those of ``teacher``.

    Raises:
        ValueError: a network that has none, or one that diffusers' class cannot copy.
    """
    network, control = controlled_network(teacher.denoiser)
    assert isinstance(teacher.codec, Codec)
    model: Any = control.make(network.model if source is None else controlled_network(source)[0].model)
    return TransformerCopy(model.requires_grad_(True).train(), control, Shared(teacher.codec, network.model))


def control_lora(teacher: Teacher, *, rank: int, generator: Generator) -> ControlLoRA:
    """Return a fresh control LoRA for a frozen transformer.

    Args:
        teacher: of a family whose control LoRAs a pipeline of diffusers loads.
        rank: of the changes.
        generator: draws their first weights.

    Raises:
        ValueError: another family, or a rank below 1.
    """
    network, control = controlled_network(teacher.denoiser)
    if not control.widened:
        raise ValueError(
            f"diffusers draws with no control LoRA of a {type(network.model).__name__}. Pass --adapter controlnet."
        )
    assert isinstance(teacher.codec, Codec)
    wide = _widened(network, control.widened)
    targets = [*adaptable(wide, network.layers or LAYERS), f"model.{control.widened}"]
    adapted = LoRA(wide, rank=rank, targets=targets, generator=generator)
    return ControlLoRA(adapted, Shared(teacher.codec, network.model))


def _widened(network: DiffusersNetwork, name: str) -> DiffusersNetwork:
    """Return a network of the same weights whose first layer takes twice the channels; the new ones weigh zero."""
    model: Any = copy.copy(network.model)
    narrow: nn.Linear = getattr(model, name)
    # Empty, lest drawing weights moves the global generator.
    wide = nn.utils.skip_init(
        nn.Linear, 2 * narrow.in_features, narrow.out_features, bias=narrow.bias is not None,
        device=narrow.weight.device, dtype=narrow.weight.dtype,
    )  # fmt: skip
    with torch.no_grad():
        wide.weight.copy_(torch.cat([narrow.weight, torch.zeros_like(narrow.weight)], 1))
    if narrow.bias is not None:
        wide.bias = narrow.bias
    wide.requires_grad_(False)
    model._modules = {**model._modules, name: wide}
    widened = copy.copy(network)
    widened._modules = {**network._modules, "model": model}
    return widened
