"""What an adapter is taught: samples, and the hint that is made of them."""

import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

import torch
import tyro
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from controlnet.canny import Canny
from controlnet.circles import HELD_OUT, Circles
from controlnet.degraded import Blur, Inpaint, LowResolution, Palette, Tile
from controlnet.geometry import Depth, Segmentation
from controlnet.hints import Hint, Precomputed, check_source
from controlnet.lines import LineArt, Scribble, SoftEdge
from controlnet.samples import Pictures, Samples, load_pictures
from scorefield.cache import content_key
from scorefield.data.pictures import PLAIN, Kind
from scorefield.data.rows import OnBadData
from scorefield.models.prompts import LongPrompts
from toyworld import data as toyworld
from toyworld.circles import PALETTE
from toyworld.render import render
from toyworld.scene import BACKGROUNDS, COLOURS, SHAPES, Scene

ANNOTATORS: Mapping[str, Hint] = {
    "canny": Canny(), "softedge": SoftEdge(), "lineart": LineArt(), "scribble": Scribble(Canny()), "tile": Tile(),
    "lowres": LowResolution(), "blur": Blur(), "inpaint": Inpaint(), "palette": Palette(),
}  # fmt: skip
"""Hints that are made of the image, by the names of --hint."""

MADE = ("toyworld", "circles")
"""Data that are made here, by the names of --data: the truth about each sample is known."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What is learned, from what."""

    data: str = ""
    """Folder of images with .txt captions, metadata.jsonl or .csv; jsonl, csv or parquet file, webdataset .tar, or
    Hugging Face data set or its name; "toyworld" or "circles"."""
    hint: str = "canny"
    """canny, softedge, lineart, scribble, tile, lowres, blur, inpaint or palette, made of the image; or a map of
    the samples: column depth_file_name for depth, or depth, normals, mask, edges (toyworld), outline (circles)."""
    hint_kind: Kind | None = None
    """What the maps of own data mean: how they are resized and mirrored. None: as their name is, or image."""
    hint_channels: int = 0
    """Of maps of own data, 1 or 3; 0: 3 for kinds image and normals, else 1. Of labels: how many there are."""
    image_column: str = ""
    """Of own data; empty: file_name, or the first column of images that is no map."""
    text_column: str = "text"
    """Of own data; empty: no captions."""
    size: Annotated[int, tyro.conf.arg(aliases=("--teacher-size",))] = 0
    """Pixels of a side to train at; 0: the teacher's own."""
    num_samples: int = 50_000
    """Of toyworld and circles."""
    crop: Literal["center", "random"] = "center"
    """Which part of an image that is not square; latents of random crops cannot be kept."""
    flip: bool = False
    """Mirror half of the samples."""
    latents: Literal["auto", "sampled", "mean"] = "auto"
    """Of the autoencoder's posterior: draw from it, or take its mean; auto: as the teacher was trained, which
    is on means for toyworld. Draws teach nothing to a model of means."""
    prompt_drop: float = 0.5
    """Share of samples whose prompt is dropped, drawn anew in each epoch."""
    hint_drop: float = 0.0
    """Share of samples whose hint is dropped."""
    on_bad_data: OnBadData = "stop"
    """What to do about samples that cannot be used: corrupt, too small, without caption or map, no UTF-8."""
    long_prompts: LongPrompts = "stop"
    """What to do about captions that are longer than the text encoders read."""
    convert: bool = False
    """Take pictures with transparency, of 16 bits, or grey ones among coloured."""
    cache: Path | None = None
    """Folder of latents, prompts and what was checked; None: ~/.cache/scorefield."""


@dataclass(frozen=True, eq=False)
class ToyWorld:
    """Rendered solids as ``controlnet.samples.Samples``; see :func:`render_world`.

    Attributes:
        scenes: what the pictures show; see :func:`choose_scenes`.
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


def is_held_out(scene: Scene) -> bool:
    """Whether no adapter learns what the scene's caption says: one solid of nine of each colour and ground."""
    solid, colour, ground = (
        list(words).index(word)
        for words, word in ((SHAPES, scene.shape), (COLOURS, scene.colour), (BACKGROUNDS, scene.background))
    )
    return (solid + colour + len(BACKGROUNDS) * ground) % len(SHAPES) == 0


def choose_scenes(num_samples: int, *, held_out: bool) -> list[Scene]:
    """Scenes to learn from, or to judge by: they share neither pictures nor what captions say beside the view."""
    drawn = map(toyworld.draw_scene, itertools.count(toyworld.HELD_OUT if held_out else 0))
    return list(itertools.islice((scene for scene in drawn if is_held_out(scene) == held_out), num_samples))


def render_world(scenes: Sequence[Scene]) -> ToyWorld:
    """Scenes with their pictures: a minute for 5,000, and 40 kB each."""
    parts = []
    for first in tqdm(range(0, len(scenes), 100), "renders", leave=False, disable=None):
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
    """

    training: Samples
    held_out: Samples
    hint: Hint
    source: str

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
                parts.append(self.training.rows[index].maps[maps].read())
        return content_key(*parts)[:16]


def kind_of(options: TaskOptions) -> Kind:
    """What a map of own data means, unless --hint-kind says it: depth are distances, mask is a mask, and so on."""
    named: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}
    return options.hint_kind or named.get(options.hint, "image")


def make_hint(options: TaskOptions) -> Hint:
    """The hint that --hint names. Raises ``ValueError`` for channels that it cannot have."""
    if options.hint in ANNOTATORS:
        return ANNOTATORS[options.hint]
    if options.data in MADE:
        return Precomputed(options.hint, 3 if options.hint == "normals" else 1)
    kind, channels = kind_of(options), options.hint_channels
    if kind == "depth":
        return Depth(source=options.hint)
    if kind == "labels":
        if not channels:
            raise ValueError("--hint-channels is missing: how many labels are there, from 0 up?")
        # 255 usually means none, unless so many are there.
        return Segmentation(channels, ignore=max(255, channels), source=options.hint)
    if channels not in (0, 1, 3):
        raise ValueError(f"--hint-channels must be 1 or 3 for a map of kind {kind}; got {channels}.")
    if kind == "normals":
        return Precomputed(options.hint, 3)
    return Precomputed(options.hint, channels or (3 if kind == "image" else 1))  # colour is lost on demand only


def load_task(
    options: TaskOptions,
    size: tuple[int, int],
    num_held_out: int,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    fitting: Callable[[Sequence[str]], Sequence[int]] | None = None,
) -> Task:
    """Samples for training and, apart from them, ``num_held_out`` for judging; all files are checked.

    ``fitting`` says which captions are not too long.

    Raises ``ValueError`` for data that are not there, unusable, of another size than the toy world's pictures, or
    too few, and for a hint that they do not hold.
    """
    hint = make_hint(options)
    if options.data == "circles":
        check_source(hint, Circles.kinds)
        circles = Circles(size[0], options.num_samples, colours=PALETTE, distinct=True)
        held_out = replace(circles, start=HELD_OUT, num_samples=num_held_out)
        return Task(training=circles, held_out=held_out, hint=hint, source=options.data)
    if options.data == "toyworld":
        check_source(hint, ToyWorld.kinds)
        if size != (64, 64):
            raise ValueError(f"the toy world's pictures are 64 x 64; --teacher draws {size[1]} x {size[0]}.")
        world = render_world(choose_scenes(options.num_samples, held_out=False))
        held = render_world(choose_scenes(num_held_out, held_out=True))
        return Task(training=world, held_out=held, hint=hint, source=options.data)
    if not options.data:
        raise ValueError("--data is missing: a folder, a file, a data set, toyworld or circles.")
    maps: dict[str, Kind] = {} if options.hint in ANNOTATORS else {options.hint: kind_of(options)}
    pictures = load_pictures(
        options.data, size, text=options.text_column or None, image=options.image_column or None, maps=maps,
        crop=options.crop, convert=options.convert, on_bad_data=options.on_bad_data, cache=options.cache,
        rank=rank, num_ranks=num_ranks, gather=gather_object,
    )  # fmt: skip
    if fitting is not None:
        pictures = pictures.some(fitting([pictures.caption(index) for index in range(len(pictures))]))
    if isinstance(hint, Depth) and options.hint_kind is None:
        check_distances(pictures, hint.source)
    training, held_out_ = split(pictures, num_held_out)
    return Task(training=training, held_out=held_out_, hint=hint, source=options.data)


def check_distances(pictures: Pictures, name: str) -> None:
    """Raise ``ValueError`` for a map of 8 bits: distances, or a picture of them in which near is white?"""
    picture = pictures.rows[0].maps[name]
    with Image.open(io.BytesIO(picture.read())) as file:
        if file.mode in PLAIN[1]:
            raise ValueError(
                f"{picture.name} has 8 bits, so it may be a picture of distances. Say --hint-kind image to show "
                "it as it is, or --hint-kind depth if larger numbers are farther."
            )


def split(pictures: Pictures, num_held_out: int) -> tuple[Pictures, Pictures]:
    """Samples to learn from, and to judge by.

    The latter are those of the smallest hashes of images, so in no order of their file; of an image that has
    several captions, the first is judged and none is learned. Raises ``ValueError`` if nothing is left to learn.
    """
    first = {digest: row for row, digest in reversed(list(enumerate(pictures.digests)))}
    if len(first) <= num_held_out:
        raise ValueError(
            f"the data have {len(first)} usable images, and {num_held_out} are held out: none is left. Lower "
            "--eval-samples and --test-samples."
        )
    held_out = set(sorted(first)[:num_held_out])
    training = [row for row, digest in enumerate(pictures.digests) if digest not in held_out]
    return pictures.some(training), pictures.some([first[digest] for digest in sorted(held_out)])
