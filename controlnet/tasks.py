"""What an adapter is taught: samples, and the hint that is made of them."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from controlnet.canny import Canny
from controlnet.degraded import Blur, Inpaint, LowResolution, Palette, Tile
from controlnet.evidence import Judge
from controlnet.geometry import Depth, Segmentation
from controlnet.hints import Hint, Precomputed
from controlnet.lines import LineArt, Scribble, SoftEdge
from controlnet.options import TaskOptions
from controlnet.samples import Pictures, Samples, load_pictures
from scorefield.cache import Content, hash_of
from scorefield.data.buckets import Shape
from scorefield.data.pictures import FORMATS, PLAIN, Kind
from scorefield.shipped import shipped, ships

ANNOTATORS: Mapping[str, Hint] = {
    "canny": Canny(), "softedge": SoftEdge(), "lineart": LineArt(), "scribble": Scribble(Canny()), "tile": Tile(),
    "lowres": LowResolution(), "blur": Blur(), "inpaint": Inpaint(), "palette": Palette(),
}  # fmt: skip
"""Hints that are made of the image, by the names of --hint."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Made:
    """Samples that are made here, about each of which the truth is known: ``--data toyworld`` or ``circles``.

    Attributes:
        training: samples to learn from.
        held_out: samples to judge by; each holds a "mask" of its object.
        truth: numbers of held-out samples -> what a judge is told about them beside the mask, one row each.
        judge: the name of a map, such as "depth" -> the judge of hints that are that map.
        accuracies: images, numbers of held-out samples -> shares of images that show what their captions say.
    """

    training: Samples
    held_out: Samples
    truth: Callable[[Sequence[int]], Mapping[str, Tensor]]
    judge: Callable[[str], Judge]
    accuracies: Callable[[Tensor, Sequence[int]], Mapping[str, float]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """What an adapter is taught.

    Attributes:
        training: samples to learn from.
        held_out: samples to judge by, none of which is trained on.
        hint: what the adapter sees.
        source: the data as --data names them.
        made: what is known about data that are made here.
    """

    training: Samples
    held_out: Samples
    hint: Hint
    source: str
    made: Made | None = None

    def captions(self) -> list[str]:
        """Return all prompts."""
        return [some.caption(index) for some in (self.training, self.held_out) for index in range(len(some))]

    def identity(self) -> str:
        """Hash of what is trained on: images, captions, and the files of a map."""
        maps = self.hint.source if isinstance(self.training, Pictures) and self.hint.source != "image" else ""

        def parts() -> Iterator[Content]:
            yield repr(self.hint)
            for index in range(len(self.training)):
                yield self.training.identity(index)
                yield self.training.caption(index)
                if maps and isinstance(self.training, Pictures):
                    yield self.training.rows[index].maps[maps].read()

        return hash_of(parts())[:16]


def kind_of(options: TaskOptions) -> Kind:
    """Return what a map of own data means, unless --hint-kind says it: depth are distances, and so on."""
    named: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}
    return options.hint_kind or named.get(options.hint, "image")


def make_hint(options: TaskOptions) -> Hint:
    """Return the hint that --hint names. Raises ``ValueError`` for channels that it cannot have."""
    if options.hint in ANNOTATORS:
        return ANNOTATORS[options.hint]
    if ships("control", options.data):
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
    buckets: Sequence[Shape] = (),
    rank: int = 0,
    num_ranks: int = 1,
    usable: Callable[[Sequence[str]], Sequence[int]] | None = None,
) -> Task:
    """Samples for training and, apart from them, ``num_held_out`` for judging; all files are checked.

    ``fitting`` says which captions are not too long, ``buckets`` in which shapes pictures are trained on; they are
    judged in ``size``.

    Raises ``ValueError`` for data that are not there, unusable, of another size than the toy world's pictures, or
    too few, and for a hint that they do not hold.
    """
    hint = make_hint(options)
    if ships("control", options.data):
        if buckets:
            raise ValueError(
                f"--buckets is for pictures of several shapes; those of --data {options.data} are square."
            )
        made: Made = shipped(f"control {options.data}")(hint, size, options.num_samples, num_held_out)
        return Task(training=made.training, held_out=made.held_out, hint=hint, source=options.data, made=made)
    if not options.data:
        raise ValueError("--data is missing: a folder, a file, a data set, toyworld or circles.")
    maps: dict[str, Kind] = {} if options.hint in ANNOTATORS else {options.hint: kind_of(options)}
    pictures = load_pictures(
        options.data, size, text=options.text_column or None, image=options.image_column or None, maps=maps,
        crop=options.crop, convert=options.convert, on_bad_data=options.on_bad_data, cache=options.cache,
        buckets=buckets, rank=rank, num_ranks=num_ranks, gather=gather_object,
    )  # fmt: skip
    if usable is not None:
        pictures = pictures.some(usable([pictures.caption(index) for index in range(len(pictures))]))
    if isinstance(hint, Depth) and options.hint_kind is None:
        check_distances(pictures, hint.source)
    training, held_out_ = split(pictures, num_held_out)
    return Task(training=training, held_out=held_out_, hint=hint, source=options.data)


def check_distances(pictures: Pictures, name: str) -> None:
    """Raise ``ValueError`` for a map of 8 bits: distances, or a picture of them in which near is white?"""
    picture = pictures.rows[0].maps[name]
    with Image.open(io.BytesIO(picture.read()), formats=FORMATS) as file:
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
    return pictures.some(training), pictures.some([first[digest] for digest in sorted(held_out)]).in_one_shape()
