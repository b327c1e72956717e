"""Concept Sliders: a LoRA whose scale moves an attribute of what a frozen model draws (Gandikota et al. 2023).

arXiv 2311.12092. From prompts, a slider learns at scale 1

    x0(x_t, c) + eta sum over p of (x0(x_t, (c+, p)) - x0(x_t, (c-, p)))       of the frozen model

at noisy images that it has partly denoised itself; from pairs of images it learns, under one noise, the one
image at scale 1 and the other at scale -1. The scale is a number of the caller's afterwards, and sliders add up.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from scorefield.atomic import whole_folder
from scorefield.denoiser import Cond, NetworkDenoiser
from scorefield.gradient import prediction_weight, standard_normal, weighted_error
from scorefield.guidance import guided
from scorefield.models.lora import (
    ATTENTION,
    LORA_FILE,
    LoRA,
    adaptable,
    adapter_weights,
    load_adapter_weights,
    scaled,
    stacked,
)
from scorefield.models.weights import check_finite, read_shapes
from scorefield.sampling import Step, ddim
from scorefield.schedule import Images, PerSample
from scorefield.times import TimeSampler, uniform

FACTS = "slider.json"
"""File beside the weights: rank and layers, for whoever reads it."""

PREFIX = "unet."
"""Before the names of layers, for ``load_lora_weights`` of diffusers."""


@dataclass(frozen=True, eq=False)
class Slider:
    """A frozen model with a change that can be scaled.

    Attributes:
        base: the frozen model.
        denoiser: the same with the change, on a :class:`scorefield.models.lora.LoRA`.
    """

    base: NetworkDenoiser
    denoiser: NetworkDenoiser

    @property
    def adapted(self) -> LoRA:
        """The network with the change; its parameters are what learns."""
        adapted: Any = self.denoiser.network
        return adapted

    @contextmanager
    def scaled(self, scale: float) -> Iterator[NetworkDenoiser]:
        """Return the model at a scale, within the block; at 0 it is the base, bit for bit."""
        with scaled(self.adapted, scale):
            yield self.denoiser


def make_slider(
    base: NetworkDenoiser, *, rank: int = 4, targets: Sequence[str] = ATTENTION, generator: Generator
) -> Slider:
    """Return a slider that does nothing yet.

    Args:
        base: frozen, without guidance.
        rank: of the change.
        targets: names, or ends of names, of the layers to change.
        generator: draws the first weights.

    Raises:
        ValueError: as :class:`scorefield.models.lora.LoRA` does.
    """
    layers = adaptable(base.network, targets) or list(targets)
    adapted = LoRA(base.network, rank=rank, targets=layers, generator=generator)
    return Slider(base, replace(base, network=adapted))


def prompt_loss(
    slider: Slider, x_t: Images, t: PerSample, cond: Cond, pairs: Sequence[tuple[Cond, Cond]], *, eta: float = 4.0
) -> PerSample:
    """Return the mean squared error at scale 1 in what the network predicts, per sample.

    Args:
        slider: learns.
        x_t: noisy images; :func:`partly_denoised`.
        t: their times.
        cond: of the prompt that the slider is for, batch b.
        pairs: of a more and a less of the attribute, each with a thing to preserve; batch b.
        eta: how far.
    """
    with torch.no_grad():
        target = slider.base(x_t, t, cond)
        for more, less in pairs:
            target = target + eta * (slider.base(x_t, t, more) - slider.base(x_t, t, less))
    with slider.scaled(1.0) as denoiser:
        made = denoiser(x_t, t, cond)
    return weighted_error(made, target, t, slider.base.schedule, prediction_weight(slider.base.kind))


def pair_loss(
    slider: Slider,
    more: Images,
    less: Images,
    cond: Cond,
    *,
    times: TimeSampler | None = None,
    generator: Generator,
) -> PerSample:
    """Return the mean squared errors of ``more`` at scale 1 and of ``less`` at scale -1, under one noise and time.

    Args:
        slider: learns.
        more: clean images with much of the attribute.
        less: the same images with little of it.
        cond: of the prompt of both.
        times: how t is drawn; all of the schedule but its ends by default.
        generator: draws times and noise.

    Raises:
        ValueError: images that are no pairs.
    """
    if more.shape != less.shape:
        raise ValueError(
            f"images must come in pairs of one shape; got {tuple(more.shape)} and {tuple(less.shape)}."
        )
    base = slider.base
    t = (times or uniform(0.02, 0.98))(len(more), base.schedule, generator).to(more.device)
    noise, weight = standard_normal(more, cond, t, generator), prediction_weight(base.kind)
    losses = []
    for scale, image in ((1.0, more), (-1.0, less)):
        with slider.scaled(scale) as denoiser:
            made = denoiser(base.schedule.diffuse(image, noise, t), t, cond)
        losses.append(weighted_error(made, image, t, base.schedule, weight))
    return (losses[0] + losses[1]) / 2


@torch.no_grad()
def partly_denoised(
    slider: Slider, noise: Images, cond: Cond, negative: Cond, *, times: Float[Tensor, " n"], number: int,
    scale: float = 3.0, step: Step | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return noisy images after ``number`` guided steps with the slider on, and their time (b,).

    Raises ``ValueError`` unless number lies in [0, n).
    """
    if not 0 <= number < len(times):
        raise ValueError(f"number must lie in [0, {len(times)}); got {number}.")
    step, x_t = ddim() if step is None else step, noise
    with slider.scaled(1.0) as denoiser:
        guide = guided(denoiser, scale, negative)
        for t, s in pairwise(times[: number + 1]):
            x_t = step(guide, x_t, t.expand(len(x_t)), s.expand(len(x_t)), cond, None)
    return x_t, times[number].expand(len(x_t))


def train(
    slider: Slider, loss: Callable[[Generator], PerSample], *, num_steps: int, learning_rate: float = 2e-4,
    generator: Generator,
) -> Iterator[float]:  # fmt: skip
    """Yield the mean loss of each of ``num_steps`` updates by AdamW; ``loss`` draws a batch of its own.

    Raises ``FloatingPointError`` for a loss that is not finite.
    """
    optimizer = torch.optim.AdamW(slider.adapted.parameters(), learning_rate)
    for number in range(num_steps):
        value = loss(generator).mean()
        if not bool(value.isfinite()):
            raise FloatingPointError(f"the loss is not finite at step {number}; lower the learning rate.")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        yield float(value.detach())


def together(sliders: Sequence[tuple[Slider, float]]) -> NetworkDenoiser:
    """Return the base under several sliders at once, each at its scale.

    Raises ``ValueError`` for none, and for sliders of other layers.
    """
    if not sliders:
        raise ValueError("together needs at least one slider.")
    base = sliders[0][0].base
    parts = [(adapter_weights(slider.adapted), scale) for slider, scale in sliders]
    return replace(base, network=stacked(base.network, parts))


def save_slider(slider: Slider, folder: Path) -> Path:
    """Write the slider's weights as diffusers reads them, and its facts.

    ``pipeline.load_lora_weights(folder, adapter_name="size")``, then
    ``pipeline.set_adapters(["size"], [scale])`` draw what ``slider.scaled(scale)`` does.
    """
    weights = adapter_weights(slider.adapted)
    with whole_folder(folder) as temporary:
        save_file({PREFIX + name: value for name, value in weights.items()}, temporary / LORA_FILE)
        layers = sorted({name.partition(".lora_")[0] for name in weights})
        (temporary / FACTS).write_text(json.dumps({"rank": slider.adapted.rank, "layers": layers}, indent=1))
    return folder


def load_slider(base: NetworkDenoiser, folder: Path) -> Slider:
    """Return a slider that :func:`save_slider` wrote; its rank and layers are those of its weights.

    Raises ``ValueError`` for one of another network, and for weights that are missing, damaged or not finite.
    """
    file = folder / LORA_FILE
    shapes = {name.removeprefix(PREFIX): shape for name, shape in read_shapes(file).items()}
    ranks = {shape[0] for name, shape in shapes.items() if ".lora_A." in name and shape}
    if len(ranks) != 1:
        raise ValueError(f"{file} holds no slider: its layers must have one rank; got {sorted(ranks) or 'none'}.")
    layers = sorted({name.partition(".lora_")[0] for name in shapes})
    slider = make_slider(base, rank=ranks.pop(), targets=layers, generator=Generator().manual_seed(0))
    held = load_file(file)
    check_finite(held, file)
    load_adapter_weights(slider.adapted, {name.removeprefix(PREFIX): value for name, value in held.items()})
    return slider
