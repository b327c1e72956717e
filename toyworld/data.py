"""The toy world as an endless data set: a seed and an index determine the same scene on every machine.

Shapes, colours, backgrounds and views are drawn uniformly and independently. Cameras stay ``MARGIN`` degrees of
azimuth away from where the view word changes, and within ``ELEVATIONS``, so that no picture lies between two view
words.
"""

import json
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torch import Generator, Tensor

from scorefield.atomic import whole_folder
from scorefield.randomness import derived_generator
from toyworld.camera import FRONT_WITHIN, VIEWS
from toyworld.captions import caption, describe
from toyworld.render import Rendering, render
from toyworld.scene import BACKGROUNDS, COLOURS, SHAPES, Scene

MARGIN = 10.0
"""Smallest distance, in degrees, between a camera's azimuth and those at which the view word changes."""

ELEVATIONS = {"overhead": (65.0, 90.0), "other": (15.0, 45.0)}
"""Ranges of elevation in degrees, uniform; the view word changes at 60."""

DISTANCES = (2.6, 3.1)
"""Range of the camera's distance from the origin, uniform. Every solid is then entirely in the picture."""

OFFSET = 0.1
"""Largest absolute coordinate of a solid's position, which is uniform in that cube."""

NEAREST, FARTHEST = 1.6, 4.1
"""Depths that hint images show as white and black."""


HELD_OUT = 10**9
"""Samples from this index on are for tests: nothing is trained on them."""


def draw_scene(index: int, seed: int = 0) -> Scene:
    """Return scene number ``index`` of the data set ``seed``.

    Raises ``ValueError`` for an index or seed below 0, ``TypeError`` for one that is not an integer.
    """
    index, seed = operator.index(index), operator.index(seed)
    if index < 0 or seed < 0:
        raise ValueError(f"index and seed of a scene must be at least 0; got {index} and {seed}.")
    generator = derived_generator("toyworld", seed, index)
    shape, colour, background, view = (
        words[int(torch.randint(len(words), (), generator=generator))]
        for words in (SHAPES, tuple(COLOURS), tuple(BACKGROUNDS), VIEWS)
    )
    low, high = ELEVATIONS["overhead" if view == "overhead" else "other"]
    x, y, z = ((2 * _uniform(generator) - 1) * OFFSET for _ in range(3))
    return Scene(
        shape=shape,
        colour=colour,
        background=background,
        azimuth=draw_azimuth(view, generator),
        elevation=low + (high - low) * _uniform(generator),
        distance=DISTANCES[0] + (DISTANCES[1] - DISTANCES[0]) * _uniform(generator),
        position=(x, y, z),
    )


def draw_azimuth(view: str, generator: Generator) -> float:
    """Return an azimuth in [-180, 180) of this view, at least ``MARGIN`` away from where another view begins."""
    if view == "overhead":
        return 360 * _uniform(generator) - 180
    centre = {"front": 0.0, "back": 180.0, "side": 90.0 if _uniform(generator) < 0.5 else -90.0}[view]
    half = (FRONT_WITHIN if view != "side" else 90 - FRONT_WITHIN) - MARGIN
    return (centre + half * (2 * _uniform(generator) - 1) + 180) % 360 - 180


def draw_scenes(indices: Iterable[int], seed: int = 0) -> list[Scene]:
    """Return the scenes with these indices."""
    return [draw_scene(index, seed) for index in indices]


def captions_of(scenes: Sequence[Scene]) -> list[str]:
    """Return the full caption of each scene."""
    return [caption(describe(scene)) for scene in scenes]


def _uniform(generator: Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def export_folder(folder: Path | str, num_samples: int, *, seed: int = 0, start: int = 0, size: int = 64) -> Path:
    """Write scenes ``start`` to ``start + num_samples`` as a folder that ``load_dataset("imagefolder")`` reads.

    Each line of ``metadata.jsonl`` has a picture and its caption (``text``), the caption's attributes (``shape``,
    ``colour``, ``background``, ``view``), the camera and position of the scene, and four hint images
    (``depth_file_name`` ..., columns ``depth``, ``normals``, ``mask`` and ``edges`` of the data set); see
    :func:`hint_images`. The folder appears whole or not at all, and replaces an older one of that name.

    Raises ``ValueError`` for fewer than one sample, or a negative start.
    """
    if num_samples < 1 or start < 0:
        raise ValueError(f"expected num_samples >= 1 and start >= 0; got {num_samples} and {start}.")
    folder = Path(folder)
    with whole_folder(folder) as temporary:
        lines = [
            json.dumps(row) for row in _write_samples(temporary, range(start, start + num_samples), seed, size)
        ]
        (temporary / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def hint_images(rendering: Rendering) -> dict[str, Tensor]:
    """Return images that a ControlNet may be conditioned on, as bytes (b, channels, size, size).

    depth is white at ``NEAREST``, falls linearly to black at ``FARTHEST``, and is black where the ray hits
    nothing. normals are in the camera's frame (right, up, backwards), -1 to 1 as 0 to 255, grey where the ray hits
    nothing. mask and edges are white or black.
    """
    nearness = (FARTHEST - rendering.depth) / (FARTHEST - NEAREST)
    axes = rendering.camera_to_world[:, :, :3]
    normals = (axes[:, :, :, None, None] * rendering.normals[:, :, None]).sum(1)
    return {
        "depth": as_bytes(nearness * rendering.mask),
        "normals": as_bytes((normals + 1) / 2),
        "mask": as_bytes(rendering.mask.float()),
        "edges": as_bytes(rendering.edges.float()),
    }


def as_bytes(images: Tensor) -> Tensor:
    """Return images in [0, 1] as bytes, 0 to 255."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def _write_samples(folder: Path, indices: range, seed: int, size: int) -> Iterator[dict[str, object]]:
    for start in range(0, len(indices), 256):
        chosen = indices[start : start + 256]
        scenes = draw_scenes(chosen, seed)
        rendering = render(scenes, size=size)
        hints = hint_images(rendering)
        rgb = as_bytes((rendering.rgb + 1) / 2)
        for row, (index, scene, text) in enumerate(zip(chosen, scenes, captions_of(scenes), strict=True)):
            name = f"{index:07d}.png"
            _save(rgb[row], folder / name)
            names = {f"{hint}_file_name": name.replace(".png", f"_{hint}.png") for hint in hints}
            for hint, file in zip(hints, names.values(), strict=True):
                _save(hints[hint][row], folder / file)
            yield {"file_name": name, "text": text, **asdict(describe(scene)), **_pose(scene), **names}


def _pose(scene: Scene) -> dict[str, object]:
    return {name: getattr(scene, name) for name in ("azimuth", "elevation", "distance", "position")}


def _save(image: Tensor, path: Path) -> None:
    array = image.permute(1, 2, 0).cpu().numpy()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(path)
