"""Prompts to distil with, and the real images that belong to them: files, ``datasets``, the toy world."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arrays import square
from captioned import rendered
from command import fingerprint
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from score import hub
from score.cache import Content, TensorCache
from score.prompts import default_cache_folder
from score.randomness import derived_generator
from toyworld.captions import Attributes, caption, describe
from toyworld.data import draw_scenes

PROMPT_KEYS = ("prompt", "text", "caption")
IMAGE_KEYS = ("image", "file_name")
WORLD_SIZE = 4000
CHUNK = 250
"""Images per entry of the latent cache."""

PART_DROPOUT = 0.2
"""Share of the toy world's captions without view, and of those without background, as its pipeline was trained."""


@dataclass(frozen=True, eq=False)
class Texts:
    """Prompts, and an image for each of them or for none.

    Attributes:
        prompts: at least one, none of them empty.
        images: paths, pictures of Pillow, or bytes (n, 3, h, w); empty if there are none.
    """

    prompts: tuple[str, ...]
    images: Sequence[Any] | Tensor = ()


def read_texts(source: str, num: int = 0, seed: int = 0) -> Texts:
    """What ``--prompts`` names, the first ``num`` of them, or all.

    Raises ``ValueError`` for a source that is not there, holds no prompts, or images for some of them only.
    """
    if source == "toyworld":
        return world_texts(num or WORLD_SIZE, seed)
    path = Path(source)
    if path.suffix == ".jsonl":
        rows: Iterable[Any] = read_lines(path)
    elif path.is_file():
        texts = [line.strip() for line in read_text(path).splitlines()]
        rows = [{"prompt": text} for text in texts if text]
    else:
        rows = load_rows(source)
    prompts, images = [], []
    for number, row in enumerate(rows):
        if num and number >= num:
            break
        prompt, image = read_row(row, f"{source}, row {number + 1}", path.parent)
        prompts.append(prompt)
        images += [] if image is None else [image]
    if not prompts:
        raise ValueError(f"--prompts {source} holds no prompt; expected one a line, such as: a red mug.")
    if images and len(images) != len(prompts):
        raise ValueError(f"--prompts {source}: {len(images)} of {len(prompts)} prompts have an image; all must.")
    return Texts(tuple(prompts), images)


def read_row(row: Any, place: str, folder: Path) -> tuple[str, Any]:
    """Prompt and image, or None, of a row. Raises ``ValueError`` where there is no prompt, or it is empty."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{place} must be an object with {' or '.join(PROMPT_KEYS)}; got {row!r}.")
    prompt = next((row[key] for key in PROMPT_KEYS if key in row), None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{place} has no prompt: expected text under {' or '.join(PROMPT_KEYS)}; got {prompt!r}.")
    image = next((row[key] for key in IMAGE_KEYS if row.get(key) is not None), None)
    return prompt.strip(), folder / image if isinstance(image, str) else image


def read_text(path: Path) -> str:
    """Text of a file. Raises ``ValueError`` for one that is none."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {path} cannot be read as text: {error}") from error


def read_lines(path: Path) -> Iterator[Any]:
    """Objects of a jsonl file. Raises ``ValueError`` naming the line that is none."""
    for number, line in enumerate(read_text(path).splitlines()):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number + 1}, is no JSON: {error}") from error


def load_rows(source: str) -> Any:
    """A data set of ``datasets``: its "train" part. Raises ``ValueError`` if there is none."""
    import datasets

    is_file = Path(source).suffix in (".txt", ".jsonl", ".json", ".csv")
    if not Path(source).exists() and (is_file or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)):
        raise ValueError(f"--prompts {source}: no such file; expected a text or jsonl file, or a data set.")
    try:
        return datasets.load_dataset(source, split="train")
    except Exception as error:  # of its many libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--prompts {source}: no such file, and no data set ({reason}).") from error


def world_texts(num: int, seed: int) -> Texts:
    """Captions of the toy world's training scenes, some without view or background, and their renders."""
    described = [describe(scene) for scene in draw_scenes(range(num))]
    prompts = tuple(caption(thinned(one, number, seed)) for number, one in enumerate(described))
    folder = default_cache_folder().parent / "toyworld"
    starts = tqdm(range(0, num, 1000), "renders", disable=None)
    return Texts(prompts, torch.cat([rendered(folder, start, min(start + 1000, num), 0) for start in starts]))


def thinned(attributes: Attributes, number: int, seed: int) -> Attributes:
    """A caption's attributes without some of those that may be left out."""
    view, background = (
        torch.rand(2, generator=derived_generator(seed, "caption", number)) < PART_DROPOUT
    ).tolist()
    return Attributes(
        attributes.shape, attributes.colour, None if background else attributes.background,
        None if view else attributes.view,
    )  # fmt: skip


def encode_images(texts: Texts, teacher: hub.Teacher) -> Tensor | None:
    """Latents (n, c, h, w) of all images, float32 on the CPU, or None where there are none; encoded once.

    Raises ``ValueError`` naming an image that cannot be read or is smaller than half of the teacher's size.
    """
    if not len(texts.images):
        return None
    assert teacher.codec is not None
    codec = teacher.codec
    facts = torch.tensor([codec.scaling, codec.shift, *teacher.size])
    identity = fingerprint([*codec.vae.state_dict().values(), facts])
    cache = TensorCache(default_cache_folder().parent / "latents", identity)

    def encode(contents: list[Content]) -> list[dict[str, Tensor]]:
        made = []
        for images in contents:
            assert isinstance(images, Tensor)
            parts = (part.to(teacher.device).float() / 127.5 - 1 for part in images.split(50))
            with torch.no_grad():
                made.append({"latents": torch.cat([teacher.encode(part).cpu() for part in parts])})
        return made

    latents = []
    for start in tqdm(range(0, len(texts.images), CHUNK), "latents", disable=None):
        pixels = as_bytes(texts.images[start : start + CHUNK], teacher.size)
        latents.append(cache.fetch([pixels], encode)[0]["latents"])
    return torch.cat(latents)


def as_bytes(images: Sequence[Any] | Tensor, size: tuple[int, int]) -> Tensor:
    """Images as bytes (n, 3, h, w), their central square resized. Raises ``ValueError`` naming a bad one."""
    if isinstance(images, Tensor):
        if tuple(images.shape[2:]) != size:
            raise ValueError(f"the images are {tuple(images.shape[2:])}, the teacher's {size}.")
        return images
    made = []
    for image in images:
        try:
            picture = image if isinstance(image, Image.Image) else Image.open(image)
            pixels = square(picture.convert("RGB"), size[0], size[0])
        except (OSError, ValueError) as error:
            raise ValueError(f"the image {image} cannot be used: {error}") from error
        made.append(torch.from_numpy(np.array(pixels)).permute(2, 0, 1))
    return torch.stack(made)
