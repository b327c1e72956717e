"""Options of commands that read images. Importing this module imports no torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from scorefield.choices import OnBadData


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the training images come from and how they are cut."""

    free: ClassVar[tuple[str, ...]] = ("on_bad_data", "memory_limit")
    """Options that bind no checkpoint: what is left of the data has a fingerprint."""

    data: str | None = None
    """Folder of images (class subfolders, metadata.jsonl or .csv with file_name and label, or neither; of train/
    and test/ the former), npz file with images and labels, idx file or folder of them (MNIST family), webdataset
    .tar, jsonl, csv or parquet file, or a Hugging Face dataset. None: the digits. Classes that are all numbers
    keep them, other names are numbered in alphabetical order."""
    resolution: int | None = None
    """Height and width to train at. None: that of the first image."""
    channels: Literal["auto", "grey", "rgb"] = "auto"
    """Of the images; auto takes those of the first one."""
    crop: Literal["center", "random"] = "center"
    """The square taken of each image: its centre, or a random one of 8/9 of the shorter side each time."""
    flip: bool = False
    """Mirror every image with probability one half."""
    memory_limit: float = 0.5
    """GiB of decoded images that each process keeps. The others of a larger set are decoded whenever they are
    drawn, a batch ahead of the training. Changes no result."""
    on_bad_data: OnBadData = "stop"
    """What to do about samples that cannot be used: corrupt, smaller than half the resolution, without a label or
    an image that others have, no UTF-8."""
