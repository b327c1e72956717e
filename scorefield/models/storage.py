"""Denoisers on disk: weights as safetensors beside what they mean, so that neither is used without the other."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from scorefield.atomic import whole_folder
from scorefield.denoiser import NetworkDenoiser
from scorefield.files import check_regular, load_json
from scorefield.models.weights import check_finite, read_shapes
from scorefield.schedule import Karras, RectifiedFlow, Schedule, VariancePreserving, check_kind

FORMAT = "scorefield-denoiser-1"
WEIGHTS, DESCRIPTION = "model.safetensors", "denoiser.json"

TIMES = "conditioning_times"
"""The fact that tells a student's denoiser from a teacher's."""


def save_denoiser(denoiser: NetworkDenoiser, folder: Path, facts: Mapping[str, Any] | None = None) -> Path:
    """Write weights, schedule and prediction kind; load with :func:`load_denoiser`.

    Args:
        denoiser: its network may be wrapped in DDP.
        folder: replaced as a whole, from a temporary name.
        facts: JSON-able facts to keep beside, such as the network's constructor arguments.
    """
    inner = denoiser.unwrapped()
    description = {
        "format": FORMAT,
        "schedule": describe_schedule(inner.schedule),
        "kind": inner.kind,
        "time_scale": inner.time_scale,
        "facts": dict(facts or {}),
    }
    with whole_folder(folder) as temporary:
        save_model(inner.network, str(temporary / WEIGHTS))
        (temporary / DESCRIPTION).write_text(json.dumps(description, indent=2))
    return folder


def load_denoiser(folder: Path, network: nn.Module) -> NetworkDenoiser:
    """Return the denoiser in ``folder``, its weights loaded into ``network``, in eval mode.

    Raises:
        ValueError: not a denoiser's folder, or weights that do not fit the network or are not finite.
    """
    description = _read(folder)
    try:
        check_regular(folder / WEIGHTS)
        load_model(network, str(folder / WEIGHTS))
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        why = _misfit(folder / WEIGHTS, network) or str(error)
        raise ValueError(f"the weights in {folder} do not fit {type(network).__name__}: {why}") from error
    check_finite(network.state_dict(), folder / WEIGHTS)
    try:
        schedule = restore_schedule(description["schedule"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / DESCRIPTION} names no schedule that this version knows: {error!r}") from error
    return NetworkDenoiser(network.eval(), schedule, description["kind"], description["time_scale"])


def _misfit(file: Path, network: nn.Module) -> str:
    """Return in words which names of weights differ, or nothing where the file cannot be read or none do."""
    try:
        stored, expected = set(read_shapes(file)), set(network.state_dict())
    except (OSError, ValueError):
        return ""
    inner = {name.removeprefix("network.") for name in stored if name.startswith("network.")}
    if inner and inner == expected:
        return (
            "they are of such a network inside another, as rescaled_data and the like make one. Pass the function "
            "that wraps it, such as the one that made the teacher."
        )
    faults = [
        f"{len(names):,} {what}, such as {min(names)}"
        for what, names in (("are missing", expected - stored), ("have no place there", stored - expected))
        if names
    ]
    return "; ".join(faults) + ("." if faults else "")


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the facts saved beside a denoiser. Raises ``ValueError`` if the folder holds none."""
    return dict(_read(folder)["facts"])


def _read(folder: Path) -> dict[str, Any]:
    try:
        description = load_json(folder / DESCRIPTION)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} is not a denoiser's folder: no readable {DESCRIPTION} ({error}). Pass a folder that "
            "`scorefield teacher` or `scorefield distill` wrote."
        ) from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else type(description).__name__
        raise ValueError(f"{folder / DESCRIPTION} must have format {FORMAT!r}; got {found!r}.")
    if missing := sorted({"schedule", "kind", "time_scale", "facts"} - description.keys()):
        raise ValueError(f"{folder / DESCRIPTION} lacks {', '.join(missing)}: it was edited. Save it again.")
    check_kind(description["kind"])
    for name, wanted in (("schedule", dict), ("time_scale", float | int), ("facts", dict)):
        if not isinstance(description[name], wanted):
            got = type(description[name]).__name__
            raise ValueError(f"{folder / DESCRIPTION}: {name} must be {wanted}; got {got}. It was edited.")
    if not description["time_scale"] > 0:
        got = description["time_scale"]
        raise ValueError(f"{folder / DESCRIPTION}: time_scale must be above 0; got {got}. It was edited.")
    return description


def describe_schedule(schedule: Schedule) -> dict[str, Any]:
    """Return a schedule as JSON; :func:`restore_schedule` is the inverse."""
    if isinstance(schedule, VariancePreserving):
        numbers = schedule.alphas_cumprod.tolist()
        return {"family": "VariancePreserving", "alphas_cumprod": numbers, "integer": schedule.integer}
    if isinstance(schedule, Karras | RectifiedFlow):
        return {"family": type(schedule).__name__, **asdict(schedule)}
    raise ValueError(f"cannot store a {type(schedule).__name__}; expected one of scorefield.schedule's families.")


def restore_schedule(description: Mapping[str, Any]) -> Schedule:
    """Return the schedule that :func:`describe_schedule` wrote. Raises ``ValueError`` for an unknown family."""
    arguments = {name: value for name, value in description.items() if name != "family"}
    for name, value in arguments.items():
        if name != "alphas_cumprod" and not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(f"a schedule's {name} must be a finite number; got {value!r}.")
    match description["family"]:
        case "Karras":
            return Karras(**arguments)
        case "RectifiedFlow":
            return RectifiedFlow(**arguments)
        case "VariancePreserving":
            table = torch.tensor(arguments["alphas_cumprod"], dtype=torch.float64)
            return VariancePreserving(table, integer=arguments["integer"])
        case family:
            raise ValueError(f"unknown schedule {family!r}; expected Karras, RectifiedFlow or VariancePreserving.")
