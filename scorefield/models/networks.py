"""Networks of our own, those of diffusers as ``network(x_t, t, **cond)``, and all of them by a description."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from scorefield.data_scale import RescaledData
from scorefield.denoiser import Cond, KarrasPreconditioning
from scorefield.models.controls import Control
from scorefield.schedule import Images, PerSample

Labels = Int[Tensor, " b"]


class ResidualMLP(nn.Module):
    """Predicts a tensor of the shape of its input from that input, a time and an optional class.

    Each block is modulated by the embedding of time and class. A fresh network outputs zeros.

    Args:
        shape: of one sample, for example (2,) or (1, 8, 8).
        num_classes: number of classes; label ``num_classes`` is the null class. 0 means unconditional.
        num_steps: number of student steps it can be told apart by ``step``; its embedding starts at zero.
        width: of the hidden layer.
        depth: number of blocks; ``bottleneck`` is the middle one, where a critic may listen.
        embedding: width of the embedding of time and class, even.
        dropout: in each block, while training.
    """

    frequencies: Tensor

    def __init__(
        self, shape: Sequence[int], num_classes: int = 0, width: int = 512, depth: int = 6, embedding: int = 128,
        num_steps: int = 0, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if depth < 1 or width < 1 or embedding % 2:
            raise ValueError(f"need depth, width >= 1 and an even embedding; got {depth}, {width}, {embedding}.")
        self.shape, self.num_classes = tuple(shape), num_classes
        size = math.prod(self.shape)
        # Periods for times of order one: c_noise of EDM, t of a flow, t / 1000 of DDPM (time_scale = 1e-3).
        self.register_buffer("frequencies", torch.logspace(0, 5, 16, base=2))
        self.time = nn.Sequential(nn.Linear(32, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label = nn.Embedding(num_classes + 1, embedding) if num_classes else None
        self.step = nn.Embedding(num_steps, embedding) if num_steps else None
        if self.step is not None:
            nn.init.zeros_(self.step.weight)
        self.enter = nn.Linear(size, width)
        self.blocks = nn.ModuleList(_Block(width, embedding, dropout) for _ in range(depth))
        last = nn.Linear(width, size)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), last)

    @property
    def bottleneck(self) -> str:
        """Name of the middle block, for :class:`distill.adversarial.Critic`."""
        return f"blocks.{(len(self.blocks) - 1) // 2}"

    def forward(
        self, x_t: Images, t: PerSample, class_labels: Labels | None = None, step: Labels | None = None
    ) -> Float[Tensor, "b *shape"]:
        """Return the prediction, shape of x_t. Raises ``ValueError`` for another shape or labels out of range."""
        if tuple(x_t.shape[1:]) != self.shape:
            raise ValueError(f"x_t must have samples of shape {self.shape}; got {tuple(x_t.shape[1:])}.")
        angles = t[:, None] * self.frequencies
        code = self.time(torch.cat([angles.sin(), angles.cos()], 1).to(self.enter.weight.dtype))
        if self.label is not None:
            if class_labels is None:
                raise ValueError(
                    f"class_labels are missing; pass cond={{'class_labels': ...}} ({self.num_classes} is null)."
                )
            code = code + _embed("class_labels", self.label, class_labels)
        if self.step is not None and step is not None:
            code = code + _embed("step", self.step, step)
        code = nn.functional.silu(code)
        hidden = self.enter(x_t.flatten(1).to(code.dtype))
        for block in self.blocks:
            hidden = block(hidden, code)
        prediction: Tensor = self.leave(hidden)
        return prediction.view_as(x_t)


def _embed(name: str, table: nn.Embedding, numbers: Tensor) -> Tensor:
    # On a GPU the comparison would wait for the device in every call; there the embedding itself complains.
    if numbers.device.type == "cpu" and not bool(((numbers >= 0) & (numbers < table.num_embeddings)).all()):
        raise ValueError(
            f"{name} must lie in [0, {table.num_embeddings - 1}]; got [{numbers.min()}, {numbers.max()}]."
        )
    code: Tensor = table(numbers)
    return code


class _Block(nn.Module):
    def __init__(self, width: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(embedding, 2 * width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, hidden: Tensor, code: Tensor) -> Tensor:
        scale, shift = self.modulate(code).chunk(2, 1)
        inner = nn.functional.silu(self.first(self.norm(hidden) * (1 + scale) + shift))
        return hidden + self.second(self.dropout(inner))


class UNet(nn.Module):
    """diffusers' UNet2DModel with the calling convention of this package, on patches of the image.

    Args:
        shape: (c, h, w) of an image.
        num_classes: label ``num_classes`` is the null class; 0 means unconditional.
        channels: of each resolution, halving from one to the next.
        layers: residual blocks at each resolution.
        patch: pixels that become channels first: 2 makes a network four times as fast on large images.
        attention: at the lowest resolution.
        dropout: in each block, while training.
    """

    bottleneck = "unet.mid_block"

    def __init__(
        self, shape: tuple[int, int, int], num_classes: int = 0, channels: tuple[int, ...] = (64, 128),
        layers: int = 1, patch: int = 2, attention: bool = True, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        from diffusers import UNet2DModel

        super().__init__()
        scale = patch * 2 ** (len(channels) - 1)
        if shape[1] % scale or shape[2] % scale:
            raise ValueError(
                f"a UNet of {len(channels)} resolutions on {patch} x {patch} patches needs sides divisible by "
                f"{scale}; got {shape[1]} x {shape[2]}. Take images of another size, or fewer channels."
            )
        self.shape, self.num_classes, self.patch = tuple(shape), num_classes, patch
        if any(width % 8 for width in channels):
            raise ValueError(f"a UNet's channels must be divisible by 8, for group norm; got {channels}.")
        inner, plain = shape[0] * patch**2, len(channels) - 1
        unet: Any = UNet2DModel(
            sample_size=(shape[1] // patch, shape[2] // patch), in_channels=inner, out_channels=inner,
            block_out_channels=tuple(channels), layers_per_block=layers, norm_num_groups=8, dropout=dropout,
            down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D" if attention else "DownBlock2D",),
            up_block_types=("AttnUpBlock2D" if attention else "UpBlock2D",) + ("UpBlock2D",) * plain,
            attention_head_dim=16, add_attention=attention,
            num_class_embeds=num_classes + 1 if num_classes else None,
        )  # fmt: skip
        nn.init.zeros_(unet.conv_out.weight)
        nn.init.zeros_(unet.conv_out.bias)
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Return the prediction, shape of x_t; t of order one, as EDM's log(sigma) / 4 and a flow's t are."""
        patches = nn.functional.pixel_unshuffle(x_t, self.patch)
        # The embedding of diffusers' UNets is made for timesteps up to 1,000.
        prediction: Tensor = self.unet(patches, 1000 * t, class_labels).sample
        return nn.functional.pixel_shuffle(prediction, self.patch)


Call = Callable[[Any, Tensor, Tensor, dict[str, Any]], Tensor]
"""(model, x_t, t, conditions) -> the prediction, shape of x_t: how a family's network is asked.

x_t is (b, c, h, w) in the dtype of the model, of videos (b, c, f, h, w); t (b,) in float32, in timesteps up to
1,000.
"""


@dataclass(frozen=True)
class Tokens:
    """Where a transformer of images keeps them, for whoever reads its activations.

    Attributes:
        blocks: name of the list of its blocks.
        side: latents along a side of a token.
        first: the image's tokens come before those of the text where a block joins both; else behind them.
        mask: name of the condition that marks the tokens of a text, where the image's follow right behind them
            and padding comes last; empty: they end the sequence, or begin it.
    """

    blocks: str
    side: int = 2
    first: bool = False
    mask: str = ""

    def image(self, output: Any, x_t: Tensor, cond: Cond) -> Tensor:
        """Return the image's part of a block's output, (b, d, h / side, w / side), or (b, d, f, ...) of a video's.

        A block of two streams returns both; the text's would be taken for the image's without complaint.

        Args:
            output: a tensor (b, tokens, d), or a tuple that holds one.
            x_t: what the network was asked about, (b, c, h, w) or (b, c, f, h, w).
            cond: under which conditions.

        Raises:
            ValueError: no part of the output has as many tokens as the image.
        """
        sides = (*x_t.shape[2:-2], x_t.shape[-2] // self.side, x_t.shape[-1] // self.side)
        number = math.prod(sides)
        parts = [part for part in (output if isinstance(output, tuple | list) else (output,)) if part is not None]
        tokens = [part for part in parts if isinstance(part, Tensor) and part.ndim == 3]
        own = [part for part in tokens if part.shape[1] == number]
        # Of two streams of one length the image's is the last, in all families of diffusers.
        longer = [part for part in tokens if part.shape[1] > number]
        if not own and not longer:
            expected = " x ".join(map(str, sides))
            raise ValueError(
                f"a block returns {[tuple(part.shape) for part in parts]}; expected {expected} tokens."
            )
        whole = own[-1] if own else longer[-1]
        image: Tensor = whole[:, :number] if self.first else whole[:, -number:]
        if self.mask and not own:
            starts = cond[self.mask].to(whole.device).long().sum(1, keepdim=True)
            places = starts + torch.arange(number, device=whole.device)
            image = whole.gather(1, places[..., None].expand(-1, -1, whole.shape[2]))
        return image.transpose(1, 2).unflatten(2, sides)


def plain_call(model: Any, x_t: Tensor, t: Tensor, given: dict[str, Any]) -> Tensor:
    """Ask a network that takes images as they are: UNets, Stable Diffusion 3."""
    prediction: Tensor = model(x_t, timestep=t, return_dict=False, **given)[0]
    return prediction


class DiffusersNetwork(nn.Module):
    """A model of diffusers called as ``network(x_t, t, **cond)``, computed in the precision of its weights.

    ``cond`` is flat, so that guidance can join conditions; :func:`model_arguments` gives it diffusers' form. Times
    stay float32, since bf16 cannot tell timestep 998 from 1000.

    Attributes:
        model: a UNet or a transformer.
        call: how it is asked; packed tokens and position ids stay inside of it.
        tokens: of a transformer; None for a UNet.
        layers: names, or ends of names, of the layers that LoRAs of its kind change; none: ``lora.LAYERS``.
        control: the ControlNet of a transformer, where diffusers has one.
    """

    def __init__(
        self, model: nn.Module, call: Call = plain_call, tokens: Tokens | None = None,
        layers: tuple[str, ...] = (), control: Control | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.call, self.tokens, self.layers, self.control = model, call, tokens, layers, control

    @property
    def bottleneck(self) -> str:
        """Name of the middle block of a transformer. Raises ``AttributeError`` for other networks."""
        if self.tokens is None:
            raise AttributeError("a UNet has a mid_block")
        blocks = getattr(self.model, self.tokens.blocks)
        return f"model.{self.tokens.blocks}.{len(blocks) // 2}"

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        """Return the prediction, shape of x_t. Raises ``TypeError`` for a condition that the model lacks."""
        model: Any = self.model
        dtype: torch.dtype = model.dtype  # some parts may be kept in float32
        return self.call(self.model, x_t.to(dtype), t, model_arguments(cond, dtype))


def image_activations(network: nn.Module, output: Any, x_t: Tensor, cond: Cond) -> Tensor:
    """Return what a submodule of ``network``, asked about x_t under ``cond``, returned: the image's activations.

    Outputs of a transformer's block become (b, d, h, w), of videos (b, d, f, h, w); the first tensor of any other
    output is taken as it is. The last block of Stable Diffusion 3 returns None in the place of its text.
    """
    known = (getattr(part, "tokens", None) for part in (network, *network.modules()))
    tokens = next((one for one in known if isinstance(one, Tokens)), None)
    first: Tensor = output if isinstance(output, Tensor) else next(x for x in output if isinstance(x, Tensor))
    if tokens is None or first.ndim != 3:
        return first
    return tokens.image(output, x_t, cond)


def model_arguments(cond: Cond, dtype: torch.dtype) -> dict[str, Any]:
    """Flat conditions as keywords of a diffusers model, floats in ``dtype``.

    SDXL's ``text_embeds`` and ``time_ids`` go into ``added_cond_kwargs``. ``mid_residual`` and
    ``down_residual_0`` to n, finest first, are what a ControlNet adds to middle block and skip connections.
    """
    given: dict[str, Any] = {
        name: value.to(dtype) if value.is_floating_point() and name != "time_ids" else value
        for name, value in cond.items()
    }
    if added := {name: given.pop(name) for name in ("text_embeds", "time_ids") if name in given}:
        given["added_cond_kwargs"] = added
    if "mid_residual" in given:
        given["mid_block_additional_residual"] = given.pop("mid_residual")
        names = itertools.takewhile(given.__contains__, map("down_residual_{}".format, itertools.count()))
        given["down_block_additional_residuals"] = tuple(map(given.pop, list(names)))
    return given


def build_network(facts: Mapping[str, Any], num_steps: int = 0) -> nn.Module:
    """Return the network that ``facts`` of a saved teacher or student describe, with fresh weights.

    ``num_steps`` lets an MLP be told the step of a few-step student. Raises ``ValueError`` for facts that describe
    no network, one so large that building it would not end, or one that a function of a user builds.
    """
    options = facts.get("options", {})
    if not isinstance(options, dict):
        raise ValueError(f"a network's options must be a dictionary; got {options!r}.")
    for name, value in options.items():
        most = 1000 if name in ("depth", "layers", "layers_per_block") else 65536
        if any(isinstance(size, int) and size > most for size in (value if isinstance(value, list) else [value])):
            raise ValueError(f"a network's {name} must be at most {most}; got {value}.")
    try:
        return _build(facts, num_steps)
    except (TypeError, KeyError, AttributeError, IndexError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"no network can be built of {dict(facts)}: {error!r}") from error


def _build(facts: Mapping[str, Any], num_steps: int) -> nn.Module:
    kind, options = facts.get("network"), dict(facts.get("options", {}))
    network: nn.Module
    if kind == "mlp":
        network = ResidualMLP(tuple(facts["shape"]), facts["num_classes"], num_steps=num_steps, **options)
    elif kind == "unet":
        network = UNet(tuple(facts["shape"]), facts["num_classes"], **options)
    elif kind == "diffusers":
        from diffusers import UNet2DModel

        network = UNet2DModel.from_config(options)
    elif kind == "function":
        raise ValueError(f"a user's function builds this network ({str(options.get('name'))[:80]!r}).")
    else:
        raise ValueError(f"the saved denoiser does not say how its network is built; got network={kind!r}.")
    sigma_data = facts.get("sigma_data")
    return network if sigma_data is None else KarrasPreconditioning(network, check_sigma_data(sigma_data))


def check_sigma_data(value: object) -> float:
    """``value`` as a number. Raises ``ValueError`` unless it is finite and above 0."""
    if not (isinstance(value, int | float) and 0 < value < math.inf):
        raise ValueError(f"sigma_data must be a number above 0; got {value!r}.")
    return float(value)


def preconditioned(network: nn.Module) -> float | None:
    """sigma_data of the images in [-1, 1] if a network is under EDM's preconditioning, None if it is not."""
    if isinstance(network, RescaledData):
        inner = preconditioned(network.network)
        return None if inner is None else inner / network.scale
    return network.sigma_data if isinstance(network, KarrasPreconditioning) else None
