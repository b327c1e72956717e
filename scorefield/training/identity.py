"""What has to be true before a run begins: its ranks agree, and what it will replace in --out is its own."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from scorefield.atomic import whole_file
from scorefield.training import checkpoint
from scorefield.training.options import AUTO, RunOptions, free_options
from scorefield.training.ranks import check_same_fields

IDENTITY = "identity.json"
"""In ``--out``: what the run there is made from. Without a checkpoint, the proof that it is the same run."""

PLACES = ("out", "data", "teacher", "prompts", "features", "cache", "init_from", "generated", "held_out")
"""Options whose value may be another on each machine; what lies there is compared later, by its fingerprint."""

PROCESSES = "num_processes"
"""Entry of an identity: how many ranks there are."""

LAYOUT = (PROCESSES, "accumulate", "micro_batch")
"""How a step is laid out, which may change when a run goes on: fewer ranks, and more micro-batches on each."""

LATER = {"micro_batch": 0, "split_views": False, "num_frames": 1}
"""Options that older checkpoints lack, with the value under which a run is as it was then; that is left out."""

PACKAGES = ("scorefield", "distill", "sds", "controlnet", "edit", "attack", "toyworld")


def check_ranks(config: Any, accelerator: Accelerator) -> None:
    """Raise ``ValueError`` on every rank where their options or their code differ; before any of them waits."""
    if accelerator.num_processes == 1:
        return
    paths = {name for name, value in vars(config).items() if isinstance(value, Path)}
    options = {name: value for name, value in resolved(config).items() if name not in {*PLACES, *paths}}
    check_same_fields({**options, "code": code_hash()}, "Start all of them with one command.", accelerator)


def code_hash() -> str:
    """Return short hash of the packages and scripts, as they lie on this machine."""
    found = [find_spec(name) for name in PACKAGES]
    roots = [Path(place) for spec in found if spec for place in spec.submodule_search_locations or ()]
    digest = hashlib.sha256()
    for root in (*roots, Path(__file__).parent):
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def check_earlier(
    out: Path, results: Sequence[str], own: Mapping[str, Any], checkpoints: Path | None = None
) -> None:
    """Raise ``ValueError`` where ``out`` holds results of another run, and no checkpoint to go on from.

    With a checkpoint, :func:`checkpoint.load` compares; one that was removed must not let another run
    replace what the first one made.
    """
    if checkpoint.steps(out / "checkpoints" if checkpoints is None else checkpoints):
        return
    known = (out / IDENTITY).exists()  # a run says what it is before it writes its config.json
    held = [name for name in (*results, *([] if known else ["config.json"])) if (out / name).exists()]
    if not held:
        return
    try:
        made_from = json.loads((out / IDENTITY).read_text())
    except (OSError, ValueError, RecursionError):
        made_from = None
    if not isinstance(made_from, dict) or checkpoint.differences(made_from, own, going_on=False):
        raise ValueError(
            f"--out {out} holds {', '.join(held)} of another run, and no checkpoint: they would be replaced. Move "
            "them elsewhere, or choose another --out."
        )


def check_options(out: Path, own: Mapping[str, Any], inputs: Sequence[str]) -> None:
    """Raise ``ValueError`` where the newest checkpoint in ``out`` has other options, ``inputs`` left out.

    For what can be known before the long work of reading the inputs, whose fingerprints are compared later.
    """
    for newest in checkpoint.steps(out / "checkpoints")[-1:]:
        try:
            saved = json.loads((newest / "config.json").read_text())
        except (OSError, ValueError):  # a damaged checkpoint is passed over later
            return
        checkpoint.compare(newest, {**own, **{name: saved.get(name) for name in inputs}})


def note_identity(out: Path, own: Mapping[str, Any]) -> None:
    """Write what the run in ``out`` is made from; :func:`check_earlier` reads it."""
    with whole_file(out / IDENTITY) as temporary:
        temporary.write_text(json.dumps(own, indent=2, default=str))


def resolved(config: Any) -> dict[str, Any]:
    """Return a config as JSON-able fields."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config), default=str)))


def identity(config: RunOptions, accelerator: Accelerator, inputs: Mapping[str, str | None]) -> dict[str, Any]:
    """Return what determines the numbers of a run: a checkpoint resumes only under the same.

    Options that are free, or that may change on the way, are in it, and named as such; see
    :func:`checkpoint.differences`. ``inputs`` are fingerprints of what the run reads; they stand for the paths,
    which can be written in many ways.
    """
    return {**binding(config, inputs), **inputs, PROCESSES: accelerator.num_processes}


def binding(config: RunOptions, inputs: Collection[str] = ()) -> dict[str, Any]:
    """Return the options but for ``inputs`` and free paths, and which of them bind no checkpoint."""
    free = free_options(config)
    places = {*PLACES, *(name for name, value in vars(config).items() if isinstance(value, Path))}
    fields = {name: x for name, x in resolved(config).items() if name not in inputs and name not in free & places}
    if fields.get("micro_batch") in (AUTO, config.batch_size):  # the whole batch, or not decided yet
        fields["micro_batch"] = LATER["micro_batch"]
    fields = {name: x for name, x in fields.items() if name not in LATER or x != LATER[name]}
    return {**fields, checkpoint.FREE: sorted(free), checkpoint.MAY_CHANGE: sorted({*config.may_change, *LAYOUT})}
