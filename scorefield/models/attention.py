"""Attention maps of a frozen network, read and changed while it draws, and left as they were.

    with controlled(teacher.denoiser, edit) as denoiser:
        x0 = sample(guided(denoiser, 7.5, negative), x_t, cond, times=times)

An edit says which layers it wants at which time, and returns new maps. A layer that is not wanted computes as
before, bit for bit, and of one that is wanted only the rows that the edit changes. Behind the block the network
is as it was.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from scorefield.denoiser import Cond, NetworkDenoiser
from scorefield.schedule import Images, PerSample, Schedule

UNET = "UNet2DConditionModel"
"""The network of diffusers whose attention can be edited: it attends to the prompt and to the image in turn."""

PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")
"""Processors that compute the same softmax attention, each in its way."""

Maps = Float[Tensor, "rows heads queries keys"]
"""Attention of each query to each key; over the keys they add up to 1."""


@dataclass(frozen=True)
class Layer:
    """A layer of attention at one call.

    Attributes:
        name: of the module in its network.
        cross: whether it attends to the prompt; else to the image itself.
        queries: number of tokens of the image.
    """

    name: str
    cross: bool
    queries: int


class AttentionEdit(Protocol):
    """What :func:`controlled` asks at every layer.

    A batch has ``rows`` rows, or, under guidance, several times as many: then the last ones are those of the
    prompts, and only they are edited.
    """

    @property
    def rows(self) -> int:
        """Number of rows, sources and targets together."""

    @property
    def changed(self) -> Bool[Tensor, " rows"]:
        """Rows that may come out changed; the others stay equal bit for bit."""

    def wants(self, layer: Layer, t: float) -> bool:
        """Return whether the maps of a layer are needed at time t. What is not needed is never computed."""

    def __call__(self, maps: Maps, layer: Layer, t: float) -> Maps | None:
        """Return new maps, or None to leave them: an edit that only looks."""


@dataclass(frozen=True, eq=False)
class Controlled:
    """The denoiser of :func:`controlled`: it tells the layers what time it is."""

    denoiser: NetworkDenoiser
    edit: AttentionEdit
    clock: "_Clock"

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's."""
        return self.denoiser.schedule

    def __call__(self, x_t: Images, t: PerSample, cond: Cond) -> Tensor:
        """Return the expected clean image.

        Raises ``ValueError`` for a batch that does not hold whole sets of rows, for several times in one batch,
        and outside of the block of :func:`controlled`.
        """
        if len(x_t) % self.edit.rows:
            raise ValueError(
                f"the edit is of {self.edit.rows} rows; got a batch of {len(x_t)}, no multiple of it."
            )
        if not bool((t == t[0]).all()):
            raise ValueError(f"attention is edited at one time for all rows; got t = {t.tolist()}.")
        if not self.clock.open:
            raise ValueError("the block of controlled(...) has ended; call its denoiser inside of it.")
        self.clock.t = float(t[0])
        # A compiled network would compute what it was compiled from.
        with torch.compiler.set_stance("force_eager"):
            return self.denoiser(x_t, t, cond)


@dataclass
class _Clock:
    t: float = 0.0
    open: bool = True


@contextmanager
def controlled(denoiser: NetworkDenoiser, edit: AttentionEdit) -> Iterator[Controlled]:
    """Put ``edit`` into every layer of attention of a UNet, and take it out again, also after an error.

    Args:
        denoiser: without guidance, which goes round the result; compiled or not.
        edit: see :class:`AttentionEdit`.

    Raises:
        ValueError: a network without such layers: transformers join prompt and image in one attention.
    """
    inner, clock = denoiser.unwrapped(), _Clock()
    layers = attention_layers(inner.network)
    before = {name: layer.processor for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.set_processor(_Processor(before[name], name, edit, clock))
        yield Controlled(inner, edit, clock)
    finally:
        clock.open = False
        for name, layer in layers.items():
            layer.set_processor(before[name])


def attention_layers(network: nn.Module) -> dict[str, Any]:
    """Return the layers of attention of a UNet of prompts by name, in the order of the network.

    Raises ``ValueError`` for any other network, and for layers that compute something else than softmax attention.
    """
    if not any(type(one).__name__ == UNET for one in network.modules()):
        name = type(getattr(network, "model", network)).__name__
        raise ValueError(
            f"attention cannot be edited here: {name} is no {UNET}, as Stable Diffusion 1, 2 and XL have. Use a "
            "method that edits without attention."
        )
    layers: dict[str, Any] = {name: one for name, one in network.named_modules() if hasattr(one, "set_processor")}
    for name, layer in layers.items():
        if (kind := type(layer.processor).__name__) not in PROCESSORS:
            raise ValueError(
                f"attention cannot be edited here: {name} has a {kind}; expected one of "
                f"{', '.join(PROCESSORS)}. Load the model without adapters of images."
            )
    return layers


def level_size(size: tuple[int, int], level: int) -> tuple[int, int]:
    """Return height and width after ``level`` halvings, each rounded up as a UNet's are."""
    return -(-size[0] // 2**level), -(-size[1] // 2**level)


def coarsest(network: nn.Module, size: tuple[int, int]) -> int:
    """Return the fewest tokens of the image in any layer that attends to the prompt.

    Args:
        network: a UNet of prompts.
        size: (height, width) of what it is given.

    Raises:
        ValueError: another network.
    """
    attention_layers(network)
    unet: Any = next(one for one in network.modules() if type(one).__name__ == UNET)
    last = len(unet.down_blocks) - 1
    levels = {"mid_block": last}
    levels |= {f"down_blocks.{number}": number for number in range(last + 1)}
    levels |= {f"up_blocks.{number}": last - number for number in range(last + 1)}
    crossing = {name for name, _ in unet.named_modules() if name.split(".")[-1] == "attn2"}
    used = [level for block, level in levels.items() if any(name.startswith(f"{block}.") for name in crossing)]
    return math.prod(level_size(size, max(used, default=last)))


@dataclass(frozen=True, eq=False)
class _Processor:
    """A layer's own processor, behind which an edit may replace some rows."""

    before: Any
    name: str
    edit: AttentionEdit
    clock: _Clock

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        output: Tensor = self.before(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        layer = Layer(self.name, encoder_hidden_states is not None, hidden_states.shape[1])
        if hidden_states.ndim != 3 or not self.edit.wants(layer, self.clock.t):
            return output
        if attention_mask is not None:
            raise ValueError(f"attention with a mask cannot be edited; {self.name} got one.")
        rows = self.edit.rows
        text = None if encoder_hidden_states is None else encoder_hidden_states[-rows:]
        maps, values = attention_maps(attn, hidden_states[-rows:], text)
        edited = self.edit(maps, layer, self.clock.t)
        if edited is None:
            return output
        changed = self.edit.changed.to(output.device)
        made = attended(attn, edited[changed].to(values.dtype), values[changed], hidden_states[-rows:][changed])
        result = output.clone()
        result[-rows:][changed] = made.to(result.dtype)
        return result


def attention_maps(attn: Any, hidden: Tensor, text: Tensor | None) -> tuple[Maps, Tensor]:
    """Return softmax(q k / sqrt(d)) in float32 or better, and the values (rows, heads, keys, d).

    Args:
        attn: an Attention of diffusers.
        hidden: (rows, queries, channels) tokens of the image.
        text: (rows, keys, channels) tokens of the prompt; None: the image attends to itself.
    """
    hidden = _normed(attn, hidden)
    if text is not None and attn.norm_cross:
        text = attn.norm_encoder_hidden_states(text)
    source = hidden if text is None else text
    query, key, value = (
        part.unflatten(2, (attn.heads, -1)).transpose(1, 2)
        for part in (attn.to_q(hidden), attn.to_k(source), attn.to_v(source))
    )
    query = query if attn.norm_q is None else attn.norm_q(query)
    key = key if attn.norm_k is None else attn.norm_k(key)
    if attn.upcast_attention:  # Stable Diffusion 2.1, whose products overflow in half precision
        query, key = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key))
    scores = (query @ key.transpose(2, 3)) * query.shape[-1] ** -0.5
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1), value


def attended(attn: Any, maps: Maps, values: Tensor, hidden: Tensor) -> Tensor:
    """Return the output of a layer under these maps: values, output projection, and what diffusers adds.

    Args:
        attn: an Attention of diffusers.
        maps: (rows, heads, queries, keys).
        values: (rows, heads, keys, d).
        hidden: (rows, queries, channels) what went into the layer.
    """
    mixed = (maps @ values).transpose(1, 2).flatten(2)
    made: Tensor = attn.to_out[1](attn.to_out[0](mixed))
    made = made + hidden if attn.residual_connection else made
    result: Tensor = made / attn.rescale_output_factor
    return result


def _normed(attn: Any, hidden: Tensor) -> Tensor:
    if attn.group_norm is None:
        return hidden
    result: Tensor = attn.group_norm(hidden.transpose(1, 2)).transpose(1, 2)
    return result


@dataclass(frozen=True, eq=False)
class Recorder:
    """An edit that only looks: the mean over times and heads of attention to the prompt.

    Attributes:
        rows: of a batch, without guidance.
        largest: most tokens of the image in the layers that are read; finer ones cost memory. Some networks have
            no layer as coarse as the default (SDXL at 1024 pixels): see :func:`coarsest`.
        size: (height, width) of what the network is given; None: it is square.
        sums: by number of tokens of the image, (rows, queries, keys) in float32.
        counts: how many maps were added up.
    """

    rows: int
    largest: int = 16**2
    size: tuple[int, int] | None = None
    sums: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)

    @property
    def changed(self) -> Tensor:
        """No row."""
        return torch.zeros(self.rows, dtype=torch.bool)

    def wants(self, layer: Layer, t: float) -> bool:
        """Return whether a layer attends to the prompt and is coarse enough."""
        del t
        return layer.cross and layer.queries <= self.largest

    def __call__(self, maps: Maps, layer: Layer, t: float) -> None:
        """Add the maps up, and change nothing."""
        del t
        mean = maps.detach().float().mean(1)
        number = layer.queries
        self.sums[number] = self.sums[number] + mean if number in self.sums else mean
        self.counts[number] = self.counts.get(number, 0) + 1

    def finest(self) -> Float[Tensor, "rows keys height width"]:
        """Return the mean maps of the finest layers that were read, images of the attention to each token.

        Raises ``ValueError`` where nothing was read, and for layers in other proportions than ``size``.
        """
        if not self.sums:
            raise ValueError(f"no layer of at most {self.largest} tokens was read; sample first, or allow more.")
        number = max(self.sums)
        mean = self.sums[number] / self.counts[number]
        return mean.transpose(1, 2).unflatten(2, self._sides(number))

    def _sides(self, number: int) -> tuple[int, int]:
        if self.size is None and (side := math.isqrt(number)) ** 2 == number:
            return side, side
        if self.size is not None:
            levels = (level_size(self.size, level) for level in range(max(self.size).bit_length() + 1))
            if (found := next((one for one in levels if math.prod(one) == number), None)) is not None:
                return found
        raise ValueError(f"attention maps must be images of {self.size or 'equal sides'}; got {number} tokens.")
