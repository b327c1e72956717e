"""A scene from its options, and a finished run read again without its teacher: its scene and its export."""

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from scorefield.cache import fingerprint
from scorefield.commands.configuration import read_config
from scorefield.files import load_json
from scorefield.randomness import derived_generator
from sds.export import export, summary
from sds.export_options import Export, ExportRun, check_export
from sds.field import Field, cone_blob, scaled_softplus
from sds.options import Config
from sds.radiance import RadianceField, radiance_field
from sds.scene import (
    Scene,
    background_network,
    check_nerfstudio,
    frequency_network,
    grid_scene,
    hash_network,
    load_scene,
    triplane_network,
)
from sds.starts import facts_of_starts
from sds.words import doubts_of_words


def load_run(folder: Path | str) -> Scene:
    """Return the scene of a finished run of ``scorefield sds``, on the CPU.

    Args:
        folder: The run's ``--out``.

    Raises:
        ValueError: The folder holds no finished scene, or one of its files is damaged.
        ImportError: nerfstudio is missing.
    """
    folder = Path(folder)
    scene = build_scene(read_options(folder))
    load_scene(scene, folder / "scene.safetensors")
    return scene.eval()


def build_scene(config: Config) -> Scene:
    """Return the scene at the start: a blob in empty space."""
    seeded = derived_generator("scene", config.seed)
    background = None if config.backdrops else background_network(generator=seeded)
    blob = cone_blob(*config.blob)
    if config.field == "grid":
        return grid_scene(
            half_size=config.half_size, background=background, num_samples=config.num_samples, blob=blob,
            initial=config.initial,
        )  # fmt: skip
    build: dict[str, Callable[..., nn.Module]] = {
        "triplane": triplane_network, "hash": hash_network, "frequency": frequency_network,
    }  # fmt: skip
    network = build[config.field](generator=seeded)
    field = Field(network, half_size=config.half_size, blob=blob, activation=scaled_softplus())
    return Scene(field, background=background, num_samples=config.num_samples)


def first_scene(config: Config) -> Scene:
    """Return the scene that a run starts from: that of ``--init-from``, or a blob in empty space.

    Raises ``ValueError`` for a run whose scene is of another kind.
    """
    scene = build_scene(config)
    if config.init_from:
        check_same_kind(config, Path(config.init_from))
        load_scene(scene, Path(config.init_from) / "scene.safetensors")
    return scene


def check_same_kind(config: Config, folder: Path) -> None:
    """Raise ``ValueError`` unless the scene of the finished run in ``folder`` can be where this run starts."""
    there = read_options(folder)
    if not (folder / "scene.safetensors").is_file():
        raise ValueError(f"--init-from {folder} is not finished: it holds no scene.safetensors. Finish it first.")
    for name in ("field", "half_size", "blob"):
        theirs, ours = getattr(there, name), getattr(config, name)
        if theirs != ours:
            theirs, ours = (" ".join(map(str, x)) if isinstance(x, tuple) else x for x in (theirs, ours))
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"--init-from {folder} has {flag} {theirs}, and this run {ours}. Pass {flag} {theirs}."
            )
    if bool(there.backdrops) != bool(config.backdrops):
        raise ValueError(
            f"--init-from {folder} was trained with{'' if there.backdrops else 'out'} --backdrops, and this run "
            "is otherwise: one of them lacks a background network. Pass the same kind."
        )


def fingerprint_of_scene(config: Config) -> str | None:
    """Return a hash of the scene that ``--init-from`` names, for the run's identity; None without one."""
    if not config.init_from:
        return None
    return fingerprint(value for _, value in sorted(load_run(config.init_from).state_dict().items()))


def read_options(folder: Path) -> Config:
    """Return the options of a run, from its ``config.json``. Options that it did not have yet have their defaults.

    Raises ``ValueError`` for a folder that is no run, or that of a canvas, and for values that are no options.
    """
    check_nerfstudio()
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no run of `scorefield sds`: it holds no config.json.")
    try:
        content = load_json(path)
        if not isinstance(content, Mapping) or not {"prompt", "field", "half_size"} <= content.keys():
            raise ValueError("it is of another command")
        config = Config(**read_config(path, Config))
    except (ValueError, OSError) as error:
        why = str(error).removeprefix("--config ").rstrip(".")
        raise ValueError(f"{path} is not of a run of `scorefield sds`: {why}.") from error
    if config.canvas:
        raise ValueError(f"{folder} is the run of a canvas; only scenes are exported.")
    return config


def field_of(config: Config, scene: Scene) -> RadianceField:
    """Return the scene as the export sees it: over white, with the mean focal length of the run's cameras."""
    field_of_view = 2 * math.degrees(math.atan(0.5 / (sum(config.focal) / 2)))
    # Far enough away for the whole cube to be in the picture.
    distance = max(
        sum(config.distance) / 2, config.half_size * (1 + 1 / math.tan(math.radians(field_of_view) / 2))
    )
    return radiance_field(scene, distance=distance, field_of_view=field_of_view)


def export_choices(config: Config) -> Export:
    """Return the options of a run's export."""
    return Export(
        resolution=config.mesh_resolution, size=config.turntable_size, elevation=sum(config.elevation) / 2,
        faces=config.faces, texture=config.texture,
    )  # fmt: skip


def facts_of(config: Config, folder: Path) -> dict[str, Any]:
    """Return what the report says of the run in a folder."""
    names = ("prompt", "preset", "method", "steps", "seed")
    facts = {name: getattr(config, name) for name in names}
    return {**facts, **facts_of_starts(replace(config, out=folder)), "doubts": doubts_of_words(config)}


def main(config: ExportRun) -> Path:
    """Export the scene of a finished run, and return the folder of the export."""
    check_export(config)
    options = read_options(config.run)
    wanted = {
        "level": config.level, "faces": config.faces, "texture": config.texture,
        "resolution": config.mesh_resolution, "size": config.turntable_size,
    }  # fmt: skip
    choices = export_choices(options)
    values = {**vars(choices), **{name: value for name, value in wanted.items() if value is not None}}
    scene = field_of(options, load_run(config.run))
    report = export(scene, config.folder, Export(**values), facts=facts_of(options, config.run))
    tell(report, config.folder)
    return config.folder


def tell(report: Mapping[str, Any], folder: Path) -> None:
    """Print what the report says of the mesh, and warn of what is wrong with it."""
    print(f"{summary(report)}; export: {folder}")
    tell_all(report["warnings"])


def tell_all(warnings: Iterable[str]) -> None:
    """Print warnings, one a line."""
    for text in warnings:
        tqdm.write(f"warning: {text}", file=sys.stderr)
