"""Batches for an adapter: samples cut, mirrored, annotated, and robbed of prompt or hint, each time as drawn.

    batches = ControlBatches(
        samples=load_pictures("images/", (512, 512)), hints=[Canny()], size=(512, 512), batch_size=16,
        prompts=teacher.prompts, null=teacher.negative(), latents=latents, prompt_drop=0.5, device="cuda",
    )
    for report in train([phase], batches.ahead(accelerator.num_processes), accelerator, steps=10_000): ...

What happens to a sample follows from (seed, sample, epoch): on other ranks or after a restart it is the same.
Prompts and hints are dropped here, when a batch is read, and never in a cache: a sample that lost its prompt in
this epoch has it in another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from controlnet.hints import Hint, annotate, check_source, hint_generators
from controlnet.samples import Samples
from scorefield.data.ahead import read_ahead
from scorefield.data.buckets import Buckets, Shape
from scorefield.data.pictures import as_floats, as_values, choose_view
from scorefield.data.threads import in_threads
from scorefield.denoiser import Cond
from scorefield.models.prompts import told_size
from scorefield.randomness import Rng, normal_like, shuffled
from scorefield.training.latents import Latents, Memory


@dataclass(frozen=True)
class Loaded:
    """A batch as it comes from disk.

    Attributes:
        indices: of the samples.
        epochs: how often each was seen before.
        names: what identifies each image as it was cut; empty for models of pixels.
        pictures: (b, c, h, w) on the CPU, by name.
    """

    indices: list[int]
    epochs: list[int]
    names: list[str]
    pictures: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlBatches:
    """A function of ``scorefield.randomness.Rng`` that makes batches for ``scorefield.training.loop.train``.

    Attributes:
        samples: images, captions and maps.
        hints: one, or several above each other.
        size: height and width of a batch, in pixels.
        batch_size: of a micro-batch.
        prompts: captions -> condition, batch n: ``Teacher.prompts``.
        null: the condition of a dropped prompt, batch 1: ``Teacher.negative()``.
        latents: images to "mean" and "std" of their x0, of which one is drawn anew each time; None for a model of
            pixels.
        sampled: False for a base that was trained on the means: a weak KL term leaves large deviations in what the
            decoder does not look at, and such a base has never seen them.
        prompt_drop: probability that a sample is trained on without its prompt (ControlNet: 0.5).
        hint_drop: probability that a hint is all zeros, for each hint by itself.
        flip: mirror half of the samples.
        crop: the middle of each sample, or a random part.
        device: of the batches.
        memory: for samples that were read.
        buckets: shapes of the samples, in place of ``size``.
    """

    samples: Samples
    hints: Sequence[Hint]
    size: tuple[int, int]
    batch_size: int
    prompts: Callable[[Sequence[str]], Cond]
    null: Cond
    latents: Latents | None = None
    sampled: bool = True
    prompt_drop: float = 0.0
    hint_drop: float = 0.0
    flip: bool = False
    crop: Literal["center", "random"] = "center"
    device: torch.device | str = "cpu"
    memory: Memory[int] = field(default_factory=Memory)
    buckets: Buckets | None = None

    def __post_init__(self) -> None:
        for hint in self.hints:
            check_source(hint, self.samples.kinds)
        if not self.hints or self.batch_size < 1:
            raise ValueError(f"need a hint and batch_size >= 1; got {list(self.hints)} and {self.batch_size}.")
        if not (0 <= self.prompt_drop <= 1 and 0 <= self.hint_drop <= 1):
            raise ValueError(
                f"prompt_drop and hint_drop must lie in [0, 1]; got {self.prompt_drop} and {self.hint_drop}."
            )
        if self.crop == "random" and self.latents is not None and self.latents.cache is not None:
            raise ValueError(
                "latents of random crops cannot be kept. Crop the center, or use Latents without one."
            )

    def __call__(self, rng: Rng) -> dict[str, Any]:
        """Batch ``rng.index`` of shuffled epochs, end to end.

        "x0" (b, c, h, w), "hint" (b, k, height, width) in [0, 1], "cond", and what was dropped: "prompt_dropped"
        (b,) and "hint_dropped" (b, number of hints), bools.
        """
        return self.complete(self.load(rng.index, rng.seed), rng.seed)

    def ahead(self, num_ranks: int = 1) -> Callable[[Rng], dict[str, Any]]:
        """Return the same batches, the next of which is loaded in a thread meanwhile; see :func:`read_ahead`."""
        return read_ahead(self.load, lambda loaded, rng: self.complete(loaded, rng.seed), num_ranks)

    def load(self, number: int, seed: int) -> Loaded:
        """Batch ``number`` from disk, cut and mirrored; on the CPU, and the slow part."""
        if self.buckets is None:
            position = number * self.batch_size + torch.arange(self.batch_size)
            drawn = shuffled(len(self.samples), self.batch_size, Rng(seed, step=0, index=number))
            indices, epochs = drawn.tolist(), (position // len(self.samples)).tolist()
        else:
            indices, epochs = (some.tolist() for some in self.buckets.draw(number, seed))
        generators = hint_generators(seed, indices, epochs, "view")
        mirrored = [self.flip and bool(torch.rand((), generator=generator) < 0.5) for generator in generators]
        return self._load(indices, epochs, mirrored, generators if self.crop == "random" else None)

    @torch.no_grad()
    def complete(self, loaded: Loaded, seed: int) -> dict[str, Any]:
        """Return what :meth:`__call__` returns, made of a loaded batch on the device."""
        batch = self._undropped(loaded, seed)
        batch.pop("images")

        def dropped(purpose: str, probability: float) -> Tensor:
            generators = hint_generators(seed, loaded.indices, loaded.epochs, purpose)
            draws = torch.tensor([float(torch.rand((), generator=generator)) for generator in generators])
            return (draws < probability).to(self.device)

        prompts = dropped("drop prompt", self.prompt_drop)
        hints = [dropped(f"drop hint {n}", self.hint_drop)[:, None] for n in range(len(self.hints))]
        gone = torch.cat([drop.expand(-1, hint.channels) for drop, hint in zip(hints, self.hints, strict=True)], 1)
        cond = replace_rows(batch["cond"], self.null, prompts)
        return {
            **batch,
            "hint": batch["hint"].masked_fill(gone[:, :, None, None], 0.0),
            "cond": told_size(cond, self.size_of(loaded.indices[0])) if self.buckets else cond,
            "prompt_dropped": prompts,
            "hint_dropped": torch.cat(hints, 1),
        }

    @torch.no_grad()
    def examples(self, indices: Sequence[int], seed: int = 0) -> dict[str, Any]:
        """These samples, all of one shape, for looking at: their middle, not mirrored, nothing dropped.

        "x0", "hint" and "cond" as in training, and "images" (b, 3, height, width) in [-1, 1], which stay on the
        CPU; the same at each call. Made ``batch_size`` at a time.
        """
        parts = []
        for start in range(0, len(indices), self.batch_size):
            some = list(indices[start : start + self.batch_size])
            part = self._undropped(self._load(some, [0] * len(some), [False] * len(some)), seed)
            parts.append({**part, "images": part["images"].cpu()})
        made = {name: torch.cat([part[name] for part in parts]) for name in ("x0", "hint", "images")}
        cond = {name: torch.cat([part["cond"][name] for part in parts]) for name in parts[0]["cond"]}
        return {**made, "cond": cond}

    def _undropped(self, loaded: Loaded, seed: int) -> dict[str, Any]:
        def generators(purpose: str) -> list[Generator]:
            return hint_generators(seed, loaded.indices, loaded.epochs, purpose)

        pictures = {name: picture.to(self.device) for name, picture in loaded.pictures.items()}
        maps = {name: as_values(picture, self.samples.kinds[name]) for name, picture in pictures.items()}
        maps["image"] = images = as_floats(pictures["image"])
        hint = annotate(self.hints, maps, [generators(f"hint {n}") for n in range(len(self.hints))])
        x0 = images
        if self.latents is not None:
            kept = self.latents(loaded.names, lambda some: pictures["image"][some], self.device)
            noise = normal_like(kept["mean"], generators("latent")) if self.sampled else None
            x0 = kept["mean"] if noise is None else kept["mean"] + kept["std"] * noise
        cond = self.prompts([self.samples.caption(index) for index in loaded.indices])
        return {"x0": x0, "hint": hint, "cond": dict(cond), "images": images}

    def _load(
        self, indices: list[int], epochs: list[int], mirrored: list[bool],
        generators: Sequence[Generator] | None = None,
    ) -> Loaded:  # fmt: skip
        chance: Sequence[Generator | None] = generators or [None] * len(indices)
        cuts = zip(indices, mirrored, chance, strict=True)
        parts = list(in_threads(lambda cut: self._cut(*cut), cuts))
        names = [
            self._name(index, turned) for index, turned in zip(indices, mirrored, strict=True) if self.latents
        ]
        return Loaded(
            indices, epochs, names, {name: _stacked([part[name] for part in parts]) for name in parts[0]}
        )

    def _cut(self, index: int, mirrored: bool, generator: Generator | None = None) -> dict[str, Tensor]:
        if (sample := self.memory.get(index)) is None:
            sample = self.samples.load(index)
            self.memory.keep(index, sample)
        height, width = sample["image"].shape[1:]
        view = choose_view(height, width, self.size_of(index), mirrored=mirrored, generator=generator)
        return {name: view.cut(picture, self.samples.kinds[name]) for name, picture in sample.items()}

    def _name(self, index: int, mirrored: bool) -> str:
        height, width = self.size_of(index)
        return f"{self.samples.identity(index)} {height}x{width} mirrored={mirrored}"

    def size_of(self, index: int) -> Shape:
        """Height and width at which a sample is trained on."""
        return self.size if self.buckets is None else self.buckets.shape(index)

    def alike(self, number: int) -> list[int]:
        """Return the first few samples of one shape, the most frequent one."""
        alike = torch.arange(len(self.samples)) if self.buckets is None else max(self.buckets.members, key=len)
        return alike[:number].tolist()


def replace_rows(cond: Cond, null: Cond, chosen: Tensor) -> dict[str, Tensor]:
    """Return the condition ``null``, batch 1, in place of the (b,) ``chosen`` rows of ``cond``.

    Raises ``ValueError`` if they hold different things.
    """
    if cond.keys() != null.keys():
        raise ValueError(f"null must hold what prompts do: {sorted(cond)}; got {sorted(null)}.")
    return {
        name: torch.where(
            chosen.to(value.device).reshape(-1, *[1] * (value.ndim - 1)), null[name].to(value), value
        )
        for name, value in cond.items()
    }


def _stacked(pictures: list[Tensor]) -> Tensor:
    # Hint images of a folder may be grey here and coloured there.
    channels = max(len(picture) for picture in pictures)
    return torch.stack([picture.expand(channels, -1, -1) for picture in pictures])
