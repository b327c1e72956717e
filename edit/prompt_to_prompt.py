"""Prompt-to-Prompt: targets drawn with the attention of their source (Hertz et al. 2022, arXiv 2208.01626).

One batch holds the sources, then the sources again for each target, under the targets' prompts. While a window
lasts, a target's attention to the prompt follows from its source's, and so does the attention of its image to
itself:

    M = (M_source mapper + M_target keep) weight       swap, refine and re-weight, see :mod:`edit.words`

Maps are not normalised again: rows under a weight do not add up to 1, as in the authors' code. Windows are the
early, noisy times: the layout is settled there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from edit.words import Alignment
from scorefield.denoiser import Cond, Denoiser, NetworkDenoiser, expand_cond
from scorefield.models.attention import Layer, Maps, Recorder, controlled
from scorefield.randomness import Generators
from scorefield.sampling import Step, ddim, sample
from scorefield.schedule import Images


@dataclass(frozen=True)
class Window:
    """Times from ``low`` to ``high``, both included; none where low is above high."""

    low: float
    high: float = float("inf")

    def __contains__(self, t: float) -> bool:
        return self.low <= t <= self.high


NEVER = Window(1.0, 0.0)


def early(times: Float[Tensor, " n"], share: float) -> Window:
    """Return the window of the first ``share`` of the steps, the noisiest: 0 is none, 1 is all.

    Raises ``ValueError`` for a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a window is a share of the steps in [0, 1]; got {share}.")
    number = round(share * len(times))
    return Window(float(times[number - 1])) if number else NEVER


def late(times: Float[Tensor, " n"], share: float) -> Window:
    """Return the window of all steps but the first ``share`` of them; errors are those of :func:`early`."""
    first = early(times, share)
    rest = [t for t in times.tolist() if t not in first]
    return Window(rest[-1], rest[0]) if rest else NEVER


@dataclass(frozen=True, eq=False)
class PromptToPrompt:
    """The edit that ``controlled`` puts into a UNet.

    Attributes:
        alignments: for each target, one for each of the n images, or a single one for all.
        num_images: n.
        cross: times at which attention to the prompt follows the source.
        own: times at which attention of the image to itself is the source's.
        largest: most tokens of the image for which ``own`` holds: finer attention is texture, and costs memory.
        recorder: reads attention to the prompt on the way, for :class:`LocalBlend`.
    """

    alignments: tuple[tuple[Alignment, ...], ...]
    num_images: int
    cross: Window
    own: Window
    largest: int = 32**2
    recorder: Recorder | None = None

    def __post_init__(self) -> None:
        for target in self.alignments:
            if len(target) not in (1, self.num_images):
                raise ValueError(
                    f"a target needs one alignment, or one for each of {self.num_images} images; got "
                    f"{len(target)}."
                )

    @property
    def rows(self) -> int:
        """Sources and targets."""
        return (1 + len(self.alignments)) * self.num_images

    @property
    def changed(self) -> Bool[Tensor, " rows"]:
        """Targets that differ from their source at all."""
        differs = [not one.is_identity for target in self._each() for one in target]
        return torch.tensor([False] * self.num_images + differs)

    def wants(self, layer: Layer, t: float) -> bool:
        """Return whether a window of the layer's kind is open, or its maps are recorded."""
        if self.recorder is not None and self.recorder.wants(layer, t):
            return True
        return self._edits(layer, t)

    def __call__(self, maps: Maps, layer: Layer, t: float) -> Maps | None:
        """Return the maps with those of the targets replaced."""
        if self.recorder is not None and self.recorder.wants(layer, t):
            self.recorder(maps, layer, t)
        if not self._edits(layer, t):
            return None
        source = maps[: self.num_images]
        if not layer.cross:
            return source.repeat(1 + len(self.alignments), 1, 1, 1)
        made = [source]
        for target, own in zip(self._each(), maps[self.num_images :].split(self.num_images), strict=True):
            mapper, keep, weight = (
                torch.stack([getattr(one, name) for one in target]).to(maps)
                for name in ("mapper", "keep", "weight")
            )
            moved = source @ mapper[:, None] + own * keep[:, None, None]
            made.append(moved * weight[:, None, None])
        return torch.cat(made)

    def _edits(self, layer: Layer, t: float) -> bool:
        if layer.cross:
            return t in self.cross
        return t in self.own and layer.queries <= self.largest

    def _each(self) -> list[tuple[Alignment, ...]]:
        return [target * (self.num_images // len(target)) for target in self.alignments]


@dataclass(frozen=True, eq=False)
class LocalBlend:
    """Where targets may differ from their sources: where the attention of either to some words is high.

    Attributes:
        tokens: (rows, tokens) 1 for the tokens of those words, in sources and targets.
        threshold: share of the largest attention from which a place belongs to the words.
        num_images: n.
        window: times at which targets are blended; maps of the first steps say little, see :func:`late`.
    """

    tokens: Float[Tensor, "rows tokens"]
    num_images: int
    threshold: float = 0.3
    window: Window = Window(0.0)

    def masks(self, recorder: Recorder, size: Sequence[int]) -> Bool[Tensor, "rows 1 height width"]:
        """Return, for each row, its own places and those of its source, at the size of the latents."""
        maps = recorder.finest()
        seen = (maps * self.tokens.to(maps)[:, :, None, None]).sum(1, keepdim=True)
        seen = interpolate(max_pool2d(seen, 3, 1, 1), size=tuple(size))
        largest = seen.flatten(1).amax(1).clamp(min=1e-12)[:, None, None, None]
        own = seen / largest > self.threshold
        return own | own[: self.num_images].repeat(len(own) // self.num_images, 1, 1, 1)


def blended(step: Step, blend: LocalBlend, recorder: Recorder) -> Step:
    """Return a step behind which targets equal their sources outside of the masks, bit for bit."""

    def local(
        denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor | None, cond: Cond, generator: Generators | None
    ) -> Tensor:
        x_s = step(denoiser, x_t, t, s, cond, generator)
        if float(t[0]) not in blend.window:
            return x_s
        masks = blend.masks(recorder, x_s.shape[2:]).to(x_s.device)
        source = x_s[: blend.num_images].repeat(len(x_s) // blend.num_images, 1, 1, 1)
        return torch.where(masks, x_s, source)

    return local


def prompt_to_prompt(
    denoiser: NetworkDenoiser, x_t: Images, conds: Sequence[Cond], edit: PromptToPrompt, *,
    times: Float[Tensor, " n"], guide: Callable[[Denoiser], Denoiser] = lambda inner: inner,
    step: Step | None = None, blend: LocalBlend | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Draw sources and targets in one batch, and return (n, *shape) of each, sources first.

    With windows of zero, and without a blend, every row equals plain sampling of that batch bit for bit.

    Args:
        denoiser: of a UNet, without guidance; the network is as before when this returns.
        x_t: (n, *shape) noise of the sources: drawn, or of an inversion. The targets start from the same.
        conds: of the sources and of each target, batch 1 or n.
        edit: alignments and windows.
        times: the sampling grid.
        guide: puts guidance round the denoiser.
        step: a sampler without noise of its own: ``ddim()`` by default; ``pinned(ddim(), path)`` for an image
            whose path is known, ``noise_step(noise)`` for edit-friendly noise.
        blend: see :class:`LocalBlend`; it needs ``edit.recorder``.

    Raises:
        ValueError: another number of conditions than the edit has targets, or a blend without a recorder.
    """
    n = len(x_t)
    if len(conds) != 1 + len(edit.alignments) or n != edit.num_images:
        raise ValueError(
            f"an edit of {edit.num_images} images to {len(edit.alignments)} targets needs "
            f"{1 + len(edit.alignments)} "
            f"conditions and as many images; got {len(conds)} and {n}."
        )
    step = ddim() if step is None else step
    if blend is not None:
        if edit.recorder is None:
            raise ValueError("a local blend reads attention maps: give the edit a recorder.")
        step = blended(step, blend, edit.recorder)
    each = [expand_cond(cond, n) for cond in conds]
    joined = {name: torch.cat([cond[name] for cond in each]) for name in each[0]}
    start = x_t.repeat(len(conds), *[1] * (x_t.ndim - 1))
    with controlled(denoiser, edit) as inner:
        made = sample(guide(inner), start, joined, times=times, step=step)
    return made.split(n)
