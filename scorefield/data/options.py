"""Options of commands that read images. Importing this module imports no torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from scorefield.choices import OnBadData


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Training images, and how they are cropped and resized."""

    free: ClassVar[tuple[str, ...]] = ("on_bad_data", "memory_limit")
    """Options that bind no checkpoint: what is left of the data has a fingerprint."""

    data: str | None = None
    """A folder of images, with class folders or with metadata.jsonl or .csv (columns file_name, label); an npz
    file (images, labels); an idx file of the MNIST family, or their folder; a webdataset .tar; a jsonl, csv or
    parquet file; or a Hugging Face dataset. By default handwritten digits. Class names are numbered in
    alphabetical order, unless all of them are numbers."""
    size: int = 0
    """Height and width to train at, in pixels. 0 means those of the first image."""
    channels: Literal["auto", "grey", "rgb"] = "auto"
    """Colours of the images. auto takes those of the first image."""
    crop: Literal["center", "random"] = "center"
    """Which square of an image is used: the one in the center, or a random one of 8/9 of the shorter side."""
    flip: bool = False
    """Mirror each image with probability 1/2."""
    memory_limit: float = 0.5
    """GiB of decoded images that each process keeps. Further ones are decoded whenever they are drawn, a batch
    ahead of the training. This changes no result."""
    on_bad_data: OnBadData = "stop"
    """What to do about samples that cannot be used (damaged, too small, without a label or picture, not UTF-8):
    stop, or skip them."""
