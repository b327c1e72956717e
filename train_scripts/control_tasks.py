"""What an adapter is taught: samples, and the hint that is made of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from control_bases import PALETTE
from torch import Tensor
from tqdm import tqdm

from controlnet.canny import Canny
from controlnet.circles import HELD_OUT, Circles
from controlnet.degraded import Blur, Inpaint, LowResolution, Palette, Tile
from controlnet.geometry import Depth, Segmentation
from controlnet.hints import Hint, Precomputed
from controlnet.lines import LineArt, Scribble, SoftEdge
from controlnet.pictures import Kind
from controlnet.samples import OnBadData, Pictures, Samples, load_pictures
from score.cache import content_key
from toyworld import data as toyworld
from toyworld.render import render
from toyworld.scene import Scene

ANNOTATORS: Mapping[str, Hint] = {
    "canny": Canny(), "softedge": SoftEdge(), "lineart": LineArt(), "scribble": Scribble(Canny()), "tile": Tile(),
    "lowres": LowResolution(), "blur": Blur(), "inpaint": Inpaint(), "palette": Palette(),
}  # fmt: skip
"""Hints that are made of the image, by the names of --hint."""

OWN = ("toyworld", "circles")
"""Data that are made here, by the names of --data: the truth about each sample is known."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What is learned, from what."""

    data: str = ""
    """Folder with metadata.jsonl, Hugging Face data set or its name, "toyworld" or "circles"."""
    hint: str = "canny"
    """canny, softedge, lineart, scribble, tile, lowres, blur, inpaint or palette, made of the image; or a map of
    the samples: column depth_file_name for depth, or depth, normals, mask, edges (toyworld), outline (circles)."""
    hint_kind: Kind = "image"
    """What the pictures of a map mean: it decides how they are resized and mirrored."""
    hint_channels: int = 1
    """Of a map that is an image; classes of a map of labels."""
    size: int = 0
    """Pixels of a side to train at; 0: the base's own."""
    num_samples: int = 50_000
    """Of toyworld and circles."""
    crop: Literal["center", "random"] = "center"
    """Which part of an image that is not square; latents of random crops cannot be kept."""
    flip: bool = False
    """Mirror half of the samples."""
    latents: Literal["sampled", "mean"] = "sampled"
    """Of the autoencoder's posterior: draw from it, or take its mean if the base was trained so (toyworld)."""
    prompt_drop: float = 0.5
    """Share of samples whose prompt is dropped, drawn anew in each epoch."""
    hint_drop: float = 0.0
    """Share of samples whose hint is dropped."""
    on_bad_data: OnBadData = "stop"
    """Unusable samples of a folder: stop, or skip them."""
    convert: bool = False
    """Take pictures with transparency, of 16 bits, or grey ones among coloured."""
    cache: Path | None = None
    """Folder of latents, prompts and what was checked; None: ~/.cache/scorefield."""


@dataclass(frozen=True, eq=False)
class ToyWorld:
    """Rendered solids as ``controlnet.samples.Samples``; see :func:`render_world`.

    Attributes:
        scenes: what the pictures show.
        pictures: image and maps by name, (n, c, 64, 64) of bytes.
    """

    scenes: Sequence[Scene]
    pictures: Mapping[str, Tensor]
    kinds: ClassVar[Mapping[str, Kind]] = {
        "image": "image", "depth": "image", "normals": "normals", "mask": "mask", "edges": "lines",
    }  # fmt: skip

    def __len__(self) -> int:
        return len(self.scenes)

    def caption(self, index: int) -> str:
        """The prompt."""
        return toyworld.captions_of([self.scenes[index]])[0]

    def identity(self, index: int) -> str:
        """Hash of the picture."""
        return content_key(self.pictures["image"][index])

    def load(self, index: int) -> dict[str, Tensor]:
        """Picture and maps of a sample."""
        return {name: part[index] for name, part in self.pictures.items()}


def render_world(num_samples: int, start: int = 0, seed: int = 0) -> ToyWorld:
    """Scenes ``start`` to ``start + num_samples`` with their pictures: a minute for 5,000, and 40 kB each."""
    scenes = toyworld.draw_scenes(range(start, start + num_samples), seed)
    parts = []
    for first in tqdm(range(0, num_samples, 100), "renders", leave=False, disable=None):
        rendering = render(scenes[first : first + 100])
        image = toyworld.as_bytes((rendering.rgb + 1) / 2)
        parts.append({"image": image, **toyworld.hint_images(rendering)})
    return ToyWorld(scenes, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """What an adapter is taught.

    Attributes:
        training: samples to learn from.
        held_out: samples to judge by, none of which is trained on.
        hint: what the adapter sees.
        source: the data as --data names them.
        bad: what was left out, and why.
    """

    training: Samples
    held_out: Samples
    hint: Hint
    source: str
    bad: Sequence[str] = field(default=())

    def captions(self) -> list[str]:
        """All prompts."""
        return [some.caption(index) for some in (self.training, self.held_out) for index in range(len(some))]

    def identity(self) -> str:
        """Hash of what is trained on: images, captions, and the files of a map."""
        maps = self.hint.source if isinstance(self.training, Pictures) and self.hint.source != "image" else ""
        parts: list[str | bytes] = [repr(self.hint)]
        for index in range(len(self.training)):
            parts += [self.training.identity(index), self.training.caption(index)]
            if maps and isinstance(self.training, Pictures):
                parts.append(self.training.rows[index].read(maps))
        return content_key(*parts)[:16]


def make_hint(options: TaskOptions) -> Hint:
    """The hint that --hint names."""
    if options.hint in ANNOTATORS:
        return ANNOTATORS[options.hint]
    if options.hint_kind == "labels":
        return Segmentation(options.hint_channels, source=options.hint)
    if options.hint_kind == "depth":
        return Depth(source=options.hint)
    own = options.data in OWN
    channels = 3 if "normals" in (options.hint_kind, options.hint if own else "") else options.hint_channels
    return Precomputed(options.hint, channels)


def load_task(
    options: TaskOptions, size: tuple[int, int], num_held_out: int, rank: int = 0, num_ranks: int = 1
) -> Task:
    """Samples for training and, apart from them, ``num_held_out`` for judging; all files are checked.

    Raises ``ValueError`` for data that are not there, unusable, of another size than the toy world's pictures, or
    too few, and for a hint that they do not hold.
    """
    hint = make_hint(options)
    if options.data == "circles":
        circles = Circles(size[0], options.num_samples, colours=PALETTE, distinct=True)
        held_out = replace(circles, start=HELD_OUT, num_samples=num_held_out)
        return Task(training=circles, held_out=held_out, hint=hint, source=options.data)
    if options.data == "toyworld":
        if size != (64, 64):
            raise ValueError(f"the toy world's pictures are 64 x 64; --base draws {size[1]} x {size[0]}.")
        world = render_world(options.num_samples)
        held = render_world(num_held_out, toyworld.HELD_OUT)
        return Task(training=world, held_out=held, hint=hint, source=options.data)
    if not options.data:
        raise ValueError("--data is missing: a folder with metadata.jsonl, a data set, toyworld or circles.")
    maps: dict[str, Kind] = {} if options.hint in ANNOTATORS else {options.hint: options.hint_kind}
    pictures = load_pictures(
        options.data, size, maps=maps, crop=options.crop, convert=options.convert,
        on_bad_data=options.on_bad_data, cache=options.cache, rank=rank, num_ranks=num_ranks,
    )  # fmt: skip
    first = len(pictures) - num_held_out
    if first < 1:
        raise ValueError(
            f"{options.data} has {len(pictures)} usable samples, {num_held_out} of which are held out: none is "
            "left. Lower --eval-samples and --test-samples."
        )
    parts = (slice(0, first), slice(first, None))
    training, held_out_ = (
        replace(pictures, rows=pictures.rows[part], digests=pictures.digests[part]) for part in parts
    )
    return Task(training=training, held_out=held_out_, hint=hint, source=options.data, bad=pictures.bad)
