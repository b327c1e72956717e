"""Checkpoints of a training run: atomic, verified, never unpickled.

A checkpoint is a folder ``step-000001000`` with each phase's weights (and EMA) as safetensors, optimiser and
counters as ``torch.save`` of tensors and numbers, the run's config, and a manifest of sha256 sums. It is written
under a temporary name and renamed, and the last two are kept: a kill at any moment leaves a whole one.
"""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from scorefield.atomic import clear_unfinished, foreign, whole_folder
from scorefield.progress import working
from scorefield.training.loop import Phase
from scorefield.training.sharding import gather_state, load_pieces, local, scatter_state, sharding_of, whole

MANIFEST = "manifest.json"

FREE, MAY_CHANGE = "free", "may_change"
"""Entries of a run's config: the options that change no number of it, and those that may change on the way."""

_NAME = re.compile(r"step-\d{9}")


def steps(folder: Path) -> list[Path]:
    """Folders of checkpoints, oldest first, by their exact names: a copy of one under another name is not ours."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())


def is_own(name: str) -> bool:
    """Return whether a file in a checkpoint's folder is one that :func:`save` writes."""
    return "/" not in name and (name in (MANIFEST, "state.pt", "config.json") or name.endswith(".safetensors"))


def save(
    folder: Path, step: int, phases: Sequence[Phase], config: Mapping[str, Any], keep: int = 2,
    also: Collection[int] = (), writes: bool = True,
) -> Path:  # fmt: skip
    """Write a checkpoint of ``step`` finished iterations; call it on the main process only.

    Where a network is sharded every rank calls it, and the first one writes: whole weights, one network at a time,
    in the same files as of a run that is not sharded.

    Args:
        folder: holds this run's checkpoints.
        step: ``Report.step``.
        phases: as passed to ``train``.
        config: JSON-able; :func:`load` refuses another one, see :func:`differences`.
        keep: checkpoints to keep, this one and those before it. Later ones, of a run that was started again
            from an earlier step, are removed. One that holds a file of someone else stays as it is.
        also: earlier steps whose checkpoints are kept, too, such as the best one.
        writes: False on ranks that only hand over their pieces.

    Raises:
        ValueError: keep is below 1, or the checkpoint of that step holds a file of someone else.
        FloatingPointError: a weight is not finite; nothing is written.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1; got {keep}: this checkpoint would be thrown away.")
    check_finite(step, phases)
    final = folder / f"step-{step:09d}"
    if not writes:
        for _ in _contents(phases):
            pass
        return final
    if folder.is_dir():
        clear_unfinished(folder, _NAME.pattern)  # of a run that was killed at another step
    with working(f"checkpoint of step {step:,}"), whole_folder(final, is_own) as temporary:
        _write(temporary, step, phases, config, {"keep": keep, "also": sorted(also)})
    others = [path for path in steps(folder) if path != final]
    _remove(others, _kept([path for path in others if path < final], keep, also))
    return final


def prune(folder: Path, step: int) -> None:
    """Remove the earlier checkpoints that :func:`save` of ``step`` would have removed, had it not been killed.

    Call it on the main process only, when the run goes on from that step.
    """
    final = folder / f"step-{step:09d}"
    state = torch.load(final / "state.pt", weights_only=True, map_location="cpu", mmap=True)
    if "kept" in state:  # an older version did not say what it kept
        earlier = [path for path in steps(folder) if path < final]
        _remove(earlier, _kept(earlier, **state["kept"]))


def _kept(earlier: Sequence[Path], keep: int, also: Collection[int]) -> list[Path]:
    """Return those of the checkpoints before one, oldest first, that stay beside it."""
    last = earlier[len(earlier) - keep + 1 :] if keep > 1 else []
    names = {f"step-{step:09d}" for step in also}
    return [path for path in earlier if path in last or path.name in names]


def _remove(paths: Sequence[Path], kept: Collection[Path]) -> None:
    for path in paths:
        if path not in kept and not path.is_symlink() and not foreign(path, is_own):
            shutil.rmtree(path)


def check_finite(step: int, phases: Sequence[Phase]) -> None:
    """Raise ``FloatingPointError`` for weights that are not finite.

    :func:`save` does so on the one process that calls it. Where a run goes on after the error, all call this.
    """
    for phase in phases:
        if not all(bool(local(p.detach()).isfinite().all()) for p in phase.network.parameters()):
            raise FloatingPointError(f"phase {phase.name!r} has weights that are not finite at step {step}.")


def _write(
    folder: Path, step: int, phases: Sequence[Phase], config: Mapping[str, Any], kept: Mapping[str, Any]
) -> None:
    state: dict[str, Any] = {"step": step, "kept": dict(kept), "phases": {}}
    for name, content in _contents(phases):
        if isinstance(content, nn.Module):
            save_model(content, str(folder / f"{name}.safetensors"))
        else:
            state["phases"][name] = content
    torch.save(state, folder / "state.pt")
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str))
    sums = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(sums, indent=2))


def _contents(phases: Sequence[Phase]) -> Iterator[tuple[str, nn.Module | dict[str, Any]]]:
    # Networks, whole, and the states of the phases; of sharded ones all ranks ask for the next one together.
    for phase in phases:
        for name, network in phase.networks().items():
            yield name, whole(network)
        state = {
            "optimizer": gather_state(phase.optimizer.state_dict()),
            "lr_schedule": phase.lr_schedule.state_dict() if phase.lr_schedule else None,
            "ema_updates": phase.ema.num_updates if phase.ema else None,
        }
        yield phase.name, state


def newest(folder: Path, before: int | None = None) -> Path | None:
    """Return the newest whole checkpoint, of a step below ``before`` if that is given; None if there is none.

    A damaged checkpoint is named in a warning and the one before it used.
    """
    for path in reversed(steps(folder)):
        if before is not None and path.name >= f"step-{before:09d}":
            continue
        with working(f"checking the checkpoint {path.name}"):
            damage = _damage(path)
        if damage is None:
            return path
        warnings.warn(f"checkpoint {path} is damaged ({damage}); trying the one before it.", stacklevel=3)
    return None


def load(folder: Path, phases: Sequence[Phase], config: Mapping[str, Any], before: int | None = None) -> int:
    """Restore the :func:`newest` whole checkpoint into ``phases`` and return its step; 0 if there is none.

    A learning-rate schedule keeps its place, and gives the rate that the schedule of ``phases`` has there: that of
    the new total, where --steps has changed. A phase whose ``lr_options`` have other values than in the
    checkpoint goes on at the rates it was built with.

    Raises:
        ValueError: the checkpoint belongs to another config, naming the fields that differ, or to other phases.
    """
    path = newest(folder, before)
    if path is None:
        return 0
    saved = compare(path, config)
    _check_networks(path, phases)
    # Mapped: of a sharded run each rank reads its own rows.
    state = torch.load(path / "state.pt", weights_only=True, map_location="cpu", mmap=True)
    for phase in phases:
        for name, network in phase.networks().items():
            read = load_model if sharding_of(network) is None else load_pieces
            read(network, path / f"{name}.safetensors")
        own = state["phases"][phase.name]
        phase.optimizer.load_state_dict(scatter_state(phase.optimizer, own["optimizer"]))
        if phase.lr_schedule is not None:
            phase.lr_schedule.load_state_dict(own["lr_schedule"])
        if phase.ema is not None:
            phase.ema.num_updates = own["ema_updates"]
        _set_rates(phase, changed=bool(changed_rates(phase, saved, config)))
    return int(state["step"])


def changed_rates(phase: Phase, saved: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Return those ``lr_options`` of a phase whose values are not those of a checkpoint; 0 means as they were."""
    wanted = _as_json(config)
    return [name for name in phase.lr_options if wanted.get(name) and wanted[name] != saved.get(name)]


def _set_rates(phase: Phase, changed: bool) -> None:
    groups, schedule = phase.optimizer.param_groups, phase.lr_schedule
    if changed:
        for group, rate in zip(groups, phase.given_rates, strict=True):
            group.update({name: rate for name in ("lr", "initial_lr") if name in group})
        if schedule is not None:
            schedule.base_lrs = list(phase.given_rates)
    if isinstance(schedule, LambdaLR):
        for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = base * factor(schedule.last_epoch)


def check_config(folder: Path, config: Mapping[str, Any]) -> Path | None:
    """Return the :func:`newest` checkpoint, if any. Raises ``ValueError`` where it belongs to another config."""
    if (path := newest(folder)) is not None:
        compare(path, config)
    return path


def described(folder: Path) -> dict[str, Any]:
    """Return the config of the newest checkpoint, whether it is whole or not; empty where there is none."""
    for path in reversed(steps(folder)):
        try:
            return dict(json.loads((path / "config.json").read_text()))
        except (OSError, ValueError):  # a damaged checkpoint is named when it is loaded
            continue
    return {}


def _damage(path: Path) -> str | None:
    try:
        sums = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"manifest unreadable: {error}"
    if not isinstance(sums, dict) or not {"state.pt", "config.json"} <= sums.keys():
        return "manifest does not name its files"
    for name, expected in sums.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _sha256(path / name) != expected:
            return f"{name} has another sha256 than the manifest says"
    return None


def _check_networks(path: Path, phases: Sequence[Phase]) -> None:
    saved = {file.stem for file in path.glob("*.safetensors")}
    wanted = {name for phase in phases for name in phase.networks()}
    if saved != wanted:
        raise ValueError(
            f"checkpoint {path} holds the networks {sorted(saved)}; this run trains {sorted(wanted)}. Pass the "
            "phases (and averages) it was written with, or another output folder."
        )


def compare(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the checkpoint ``path``. Raises ``ValueError``, naming the fields, if it is another."""
    saved, wanted = dict(json.loads((path / "config.json").read_text())), _as_json(config)
    if fields := differences(saved, wanted):
        listing = "; ".join(f"{name}: {saved.get(name)!r} there, {wanted.get(name)!r} now" for name in fields)
        raise ValueError(
            f"checkpoint {path} belongs to another config ({listing}). Use that config, or another output folder."
        )
    return saved


def differences(saved: Mapping[str, Any], config: Mapping[str, Any], *, going_on: bool = True) -> list[str]:
    """Return the names of the entries by which two configs are of different runs, sorted.

    Args:
        saved: of a checkpoint. An older version may have written it, without :data:`FREE` and :data:`MAY_CHANGE`.
        config: of the run that is to begin or to go on.
        going_on: leave out what both say may change on the way; if False, what came of them would differ.
    """
    wanted = _as_json(config)
    ignored = {FREE, MAY_CHANGE, *wanted.get(FREE, ())}
    if going_on:
        may_change = wanted.get(MAY_CHANGE, ())
        ignored |= set(may_change) & set(saved.get(MAY_CHANGE, may_change))
    names = (saved.keys() | wanted.keys()) - ignored
    return sorted(name for name in names if saved.get(name) != wanted.get(name))


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(config, default=str)))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
