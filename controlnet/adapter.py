"""A frozen model with control: an adapter beside it looks at a hint and adds to its skip connections.

    adapter = copy_encoder(teacher.denoiser, hint_channels=1, factor=teacher.codec.factor)
    controlled = ControlledDenoiser(teacher.denoiser, adapter).with_hint(hint)  # (b, 1, h, w) in [0, 1]
    x0 = guided(controlled, 7.5, teacher.negative())(x_t, t, cond)  # latents of images that follow the hint

An adapter is any module called as ``adapter(x_t, t, hint, **cond)`` that returns further conditions for the base:
``down_residual_0`` to n, finest first, and ``mid_residual``. ControlNet (Zhang et al. 2023, arXiv 2302.05543) is
one such; a lighter one need not know anything else. Those of transformers are in
:mod:`controlnet.transformers`.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch import Tensor, nn
from torch.nn.functional import silu

from controlnet.transformers import ControlLoRA, TransformerCopy
from scorefield.denoiser import Cond, NetworkDenoiser, unwrap
from scorefield.models.controls import HINT
from scorefield.models.networks import DiffusersNetwork, model_arguments
from scorefield.schedule import Images, PerSample, Schedule

WIDTHS = (16, 32, 96, 256)
"""Channels of ControlNet's hint embedding, halving the resolution from each to the next."""

UNKNOWN_TO_CONTROLNET = (
    "center_input_sample", "time_cond_proj_dim", "timestep_post_act", "class_embeddings_concat",
    "mid_block_only_cross_attention", "dual_cross_attention",
)  # fmt: skip


class HintEmbedding(ControlNetConditioningEmbedding):
    """diffusers' embedding of the hint, which can also be recomputed in the backward pass as its blocks can.

    It works at the hint's full size: for Stable Diffusion it keeps more than a quarter of what is left to keep
    when all else is recomputed, for 0.4 % of the work.
    """

    gradient_checkpointing = False  # diffusers sets this, and the function, where it sees the attribute
    _gradient_checkpointing_func: Any = None

    def forward(self, conditioning: Tensor) -> Tensor:
        """Return (b, channels, h, w) to the features of x_t."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            embedded: Tensor = self._gradient_checkpointing_func(super().forward, conditioning)
            return embedded
        return super().forward(conditioning)


class EncoderCopy(nn.Module):
    """ControlNet: a trained copy of the encoder behind convolutions that start at zero.

    The hint is embedded and added to the first features; the features of all levels and of the middle block leave
    through zero convolutions. So a fresh copy returns zeros, and the base is unchanged to the last bit. It
    computes in the precision of its weights.

    Attributes:
        model: diffusers' ControlNetModel.
        channels: of the hint.
        factor: pixels of the hint per pixel of x_t along a side.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        model.controlnet_cond_embedding.__class__ = HintEmbedding  # the same weights under the same names
        self.model = model
        self.channels = int(model.config.conditioning_channels)
        self.factor = 2 ** (len(model.config.conditioning_embedding_out_channels) - 1)

    def forward(self, x_t: Tensor, t: Tensor, hint: Tensor, **cond: Tensor) -> dict[str, Tensor]:
        """Return the residuals, finest first, the middle block's last; ``hint`` (b, channels, h, w) lies in [0,
        1].

        A hint of one channel serves a model of three, as the grey image that it is. Raises ``ValueError`` for a
        hint of another shape.
        """
        if self.channels == 3 and hint.ndim == 4:
            hint = hint.expand(-1, 3, -1, -1) if hint.shape[1] == 1 else hint
        expected = (len(x_t), self.channels, x_t.shape[2] * self.factor, x_t.shape[3] * self.factor)
        if tuple(hint.shape) != expected:
            raise ValueError(
                f"the hint for x_t {tuple(x_t.shape)} must be {expected}: {self.channels} channels at "
                f"{self.factor} times its size; got {tuple(hint.shape)}."
            )
        dtype = next(self.model.parameters()).dtype
        down, mid = self.model(
            x_t.to(dtype), timestep=t, controlnet_cond=hint.to(dtype), return_dict=False,
            **model_arguments(cond, dtype),
        )  # fmt: skip
        return {**{f"down_residual_{i}": value for i, value in enumerate(down)}, "mid_residual": mid}


def copy_encoder(
    base: NetworkDenoiser, *, hint_channels: int = 3, factor: int = 8, widths: tuple[int, ...] | None = None
) -> EncoderCopy:
    """Return a fresh ControlNet for ``base``, in float32 on its device; copy before the base is cast to bf16.

    Args:
        base: a UNet2DConditionModel of latents or of pixels: Stable Diffusion 1.x and 2.x, SDXL, or one's own.
        hint_channels: 1 for edges or depth, 3 for normals or colours, the number of classes for segmentation.
        factor: pixels of the hint per pixel of x_t along a side: ``codec.factor``, 1 for a model of pixels.
        widths: channels of the hint embedding, one more than the times it halves; by default ControlNet's.

    Raises:
        ValueError: another network, a factor that is no power of two, or widths that do not fit it.
    """
    unet = unet_of(base)
    if unknown := [name for name in UNKNOWN_TO_CONTROLNET if unet.config.get(name)]:
        raise ValueError(f"diffusers' ControlNetModel cannot copy a UNet with {', '.join(unknown)}.")
    halvings = factor.bit_length() - 1
    if hint_channels < 1 or factor < 1 or factor != 2**halvings:
        raise ValueError(
            f"need hint_channels >= 1 and a factor that is a power of two; got {hint_channels}, {factor}."
        )
    if widths is None:
        widths = (WIDTHS + WIDTHS[-1:] * halvings)[: halvings + 1]
    if len(widths) != halvings + 1:
        raise ValueError(f"a hint {factor} times as large needs {halvings + 1} widths; got {widths}.")
    weight = unet.conv_in.weight
    with torch.device(weight.device):
        model = ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=widths, conditioning_channels=hint_channels,
            load_weights_from_unet=not weight.is_meta,
        )  # fmt: skip
    return EncoderCopy(model.float().requires_grad_(True).train())


@torch.no_grad()
def calibrate(adapter: EncoderCopy, hints: Tensor) -> None:
    """Start the hint's embedding at unit strength, so that control comes early; in place, before training.

    By the usual initialisation of its convolutions hints differ far less in front of the embedding's last one,
    which is zero, than the features that they are added to (outlines of circles a hundred times less), and its
    gradient is as small.
    Here the outputs of each convolution but the last get mean 0 and a root mean square of 1 over these hints, as
    in layer-sequential unit-variance initialisation (arXiv 1511.06422). A fresh copy still returns zeros.

    Args:
        adapter: a fresh copy.
        hints: (n, channels, h, w) in [0, 1], some tens of those to be trained on.

    Raises:
        ValueError: hints that are all alike, of which nothing could be learned.
    """
    if hints.amax() == hints.amin():
        raise ValueError(f"{len(hints)} hints to calibrate by are all plain; are they what was asked for?")
    embedding = adapter.model.controlnet_cond_embedding
    features = hints.to(embedding.conv_in.weight)
    for convolution in (embedding.conv_in, *embedding.blocks):
        convolution.weight /= convolution(features).var((0, 2, 3)).mean().sqrt()
        convolution.bias.zero_()
        convolution.bias -= convolution(features).mean((0, 2, 3))
        features = silu(convolution(features))


def unet_of(base: NetworkDenoiser) -> Any:
    """Return the UNet2DConditionModel of ``base``. Raises ``ValueError`` for any other network."""
    network = base.network
    model = network.model if isinstance(network, DiffusersNetwork) else None
    if not isinstance(model, UNet2DConditionModel):
        found = type(network if model is None else model).__name__
        raise ValueError(
            f"a ControlNet needs a base with a DiffusersNetwork(UNet2DConditionModel); got {found}. Train a model "
            "of pixels as a UNet2DConditionModel with in_channels=3 (UNet2DModel takes no residuals)."
        )
    return model


@dataclass(frozen=True, eq=False)
class ControlledDenoiser:
    """A base under the control of an adapter, as a :class:`score.Denoiser`; residuals are conditions of the base.

    Attributes:
        base: the frozen model.
        adapter: such as :class:`EncoderCopy`, wrapped in DDP or not.
        hint: (n, c, h, w) in [0, 1] for batches of n samples, or of a multiple, in which it is repeated as
            ``guided`` repeats the samples; None until it is known.
        scale: of the residuals; 1 as in training, 0 is the base alone.
        guess: diffusers' guess mode, for images without prompts: no control of the negatives that ``guided`` puts
            first, and residuals scaled by 0.1 at the finest to 1 at the middle block. Only for a batch of n or 2n.
    """

    base: NetworkDenoiser
    adapter: nn.Module
    hint: Tensor | None = None
    scale: float = 1.0
    guess: bool = False

    @property
    def schedule(self) -> Schedule:
        """The base's."""
        return self.base.schedule

    def with_hint(self, hint: Tensor) -> Self:
        """Return the same for other hints, which adapters of transformers encode."""
        adapter = unwrap(self.adapter)
        if isinstance(adapter, TransformerCopy | ControlLoRA):
            hint = adapter.prepare(hint)
        return replace(self, hint=hint)

    def __call__(self, x_t: Images, t: PerSample, cond: Cond) -> Tensor:
        """Return the expected clean image.

        Raises ``ValueError`` without a hint, or if it does not fit the batch.
        """
        return self.with_residuals(x_t, t, cond)[0]

    def with_residuals(self, x_t: Images, t: PerSample, cond: Cond) -> tuple[Tensor, Cond]:
        """Return the expected clean image, and what the adapter added to the base's layers: nothing, if it is a
        LoRA.
        """
        if not isinstance(unwrap(self.adapter), ControlLoRA):
            residuals = self.residuals(x_t, t, cond)
            return self.base(x_t, t, {**cond, **residuals}), residuals
        if self.guess or self.scale != 1:
            raise ValueError("a control LoRA has neither guess mode nor a scale other than 1.")
        hint, _ = self._hint_and_first(len(x_t))
        return replace(self.base, network=self.adapter)(x_t, t, {**cond, HINT: hint.to(x_t.device)}), {}

    def residuals(self, x_t: Images, t: PerSample, cond: Cond) -> Cond:
        """Return what the adapter adds to the base, scaled."""
        hint, first = self._hint_and_first(len(x_t))
        if first == 0 and self._is_guided(x_t):
            # As its pipeline does: asked for the prompts, which come last, and added under the negative ones too.
            n = len(x_t) // 2
            positive = {name: value[n:] for name, value in cond.items()}
            added = self.residuals(x_t[n:], t[n:], positive)
            return {name: torch.cat([value, value]) for name, value in added.items()}
        time = self.base.time_scale * t.to(torch.promote_types(x_t.dtype, torch.float32))
        own = {name: value[first:] for name, value in cond.items()}
        values = self.adapter(x_t[first:], time[first:], hint.to(x_t.device), **own)
        last = max(len(values) - 1, 1)
        # diffusers' logspace(-1, 0) over the depth (controlnet.py, "scaling").
        depths = [10 ** (i / last - 1) if self.guess else 1.0 for i in range(len(values))]
        scaled = {name: self.scale * d * value for d, (name, value) in zip(depths, values.items(), strict=True)}
        if first == 0:
            return scaled
        return {
            name: torch.cat([torch.zeros_like(value[:1]).expand(first, *value.shape[1:]), value])
            for name, value in scaled.items()
        }

    def _is_guided(self, x_t: Tensor) -> bool:
        """Return whether a batch is that of guidance, the same images twice, and the adapter wants the prompts
        alone.
        """
        n = 0 if self.hint is None else len(self.hint)
        adapter = unwrap(self.adapter)
        wants = isinstance(adapter, TransformerCopy) and adapter.prompt_only
        return wants and len(x_t) == 2 * n and torch.equal(x_t[:n], x_t[n:])

    def unwrapped(self) -> Self:
        """Return the same without DDP wrappers, for calls that are not part of the adapter's own training step."""
        return replace(self, base=self.base.unwrapped(), adapter=unwrap(self.adapter))

    def _hint_and_first(self, batch: int) -> tuple[Tensor, int]:
        # The hint of the samples from ``first`` on, which are those that are controlled.
        if self.hint is None:
            raise ValueError("this denoiser has no hint yet: call controlled.with_hint(hint) first.")
        n = len(self.hint)
        if n == 0 or batch % n or (self.guess and batch not in (n, 2 * n)):
            multiple = f"{n} or {2 * n} (guess mode)" if self.guess else f"a multiple of {n}"
            raise ValueError(f"{n} hints serve a batch of {multiple}; got {batch}.")
        if self.guess:
            return self.hint, batch - n
        return self.hint.repeat(batch // n, 1, 1, 1), 0
