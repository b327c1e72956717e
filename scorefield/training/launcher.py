"""Settings of ``accelerate config`` and ``accelerate launch``: honoured, or refused before anything is written.

They arrive as variables ``ACCELERATE_...``, which an Accelerator follows without a word. A run follows its own
command line: what contradicts it would train something else than its config says.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from scorefield.progress import is_first_rank as is_first_rank

HONOURED = {
    *("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE", "ACCELERATE_NUM_PROCESSES", "ACCELERATE_CPU_AFFINITY"),
    *("ACCELERATE_LOG_LEVEL", "ACCELERATE_ENABLE_RICH", "ACCELERATE_DEBUG_MODE", "ACCELERATE_DEBUG_RDV_FILE"),
}
"""Where a run computes, and how loudly."""

IDLE = (
    *("ACCELERATE_DYNAMO_", "ACCELERATE_FP8_", "ACCELERATE_DEEPSPEED_", "ACCELERATE_SAGEMAKER_"),
    *("ACCELERATE_GRADIENT_CLIPPING", "ACCELERATE_CONFIG_DS_FIELDS", "ACCELERATE_ALLOW_CP_STANDALONE"),
    *("ACCELERATE_BYPASS_DEVICE_MAP", "ACCELERATE_INIT_INCLUDE_BUFFERS"),
)
"""Beginnings of settings that do nothing unless another one, which is refused, is on."""

OFF = ("", "0", "no", "off", "false", "n", "f", "none")
"""Values of a switch that is off, in lower case."""

PLACES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
    "MV2_COMM_WORLD_SIZE",
)
"""Whole numbers by which Accelerate, or torch, learns which process this is."""

WORLDS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""How many processes there are."""

SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


def check_launcher(precision: str, accumulate: int, settings: Mapping[str, str] | None = None) -> None:
    """Raise ``ValueError`` for a launcher's setting that would change the run behind its command line.

    Args:
        precision: ``--precision``. The launcher's "no" is its default, and gives way.
        accumulate: ``--accumulate``.
        settings: the environment; by default this process's.
    """
    for name, value in sorted((os.environ if settings is None else settings).items()):
        if name.startswith("ACCELERATE_") and (refusal := _refusal(name, value.strip(), precision, accumulate)):
            raise ValueError(f"the launcher sets {name}={value}: {refusal}")


def check_drawing(precision: str, settings: Mapping[str, str] | None = None) -> None:
    """Raise ``ValueError`` for a launcher's setting by which images would be drawn otherwise than asked for.

    Of those of a training most do nothing here: no network is prepared, compiled or stepped.
    """
    told = os.environ if settings is None else settings
    for name in ("ACCELERATE_MIXED_PRECISION", *SHARDING):
        value = told.get(name, "").strip()
        if value.lower() in (*OFF, precision):
            continue
        if name in SHARDING:
            raise ValueError(
                f"the launcher sets {name}={value}: it shards one network, which drawing does not do. Launch with "
                "--multi_gpu."
            )
        raise ValueError(f"the launcher sets {name}={value}: {_of_precision(value.lower(), precision)}")


def check_places(settings: Mapping[str, str] | None = None) -> None:
    """Raise ``ValueError`` for a launcher's word on this process's place among others that says nothing.

    Launchers set RANK and the like; so do machines of a queue, and leave them empty, or set half of them.
    """
    told = os.environ if settings is None else settings
    for name in PLACES:
        if name in told and not (told[name].isascii() and told[name].isdigit()):
            raise ValueError(
                f"{name} is {told[name]!r} in the environment; expected a whole number. Unset it, or start with "
                "torchrun or accelerate launch, which set it."
            )
    one = "Unset it for one process; start several with torchrun or accelerate launch."
    several = next((name for name in WORLDS if int(told.get(name, "1")) > 1), None)
    asks = "LOCAL_RANK" if "LOCAL_RANK" in told else several
    found = "RANK" in told and "WORLD_SIZE" in told and told.get("MASTER_ADDR") and told.get("MASTER_PORT", "")
    if asks is not None and not (found and found.isdigit()):
        raise ValueError(
            f"{asks} is {told[asks]} in the environment, without a RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, "
            f"by which processes find each other. {one}"
        )
    if int(told.get("RANK", "0")) >= (size := int(told.get("WORLD_SIZE", "1"))):
        raise ValueError(f"RANK is {told['RANK']} of {size} processes, which are numbered from 0. {one}")


def check_alone(command: str) -> None:
    """Raise ``ValueError`` where a launcher has started several processes of a command that works in one."""
    if (number := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(
            f"scorefield {command} works in one process, and a launcher has started {number}, which would all do "
            "the same and write to one place. Start it without a launcher."
        )


def _refusal(name: str, value: str, precision: str, accumulate: int) -> str | None:
    off = value.lower() in OFF
    if off or name in HONOURED:
        return None
    if name == "ACCELERATE_DYNAMO_BACKEND":
        return "networks compiled so cannot be saved. Launch with --dynamo_backend no, and pass --compile."
    if name == "ACCELERATE_MIXED_PRECISION":
        return None if value.lower() == precision else _of_precision(value.lower(), precision)
    if name == "ACCELERATE_GRADIENT_ACCUMULATION_STEPS":
        if value in ("1", str(accumulate)):
            return None
        return (
            f"it contradicts --accumulate {accumulate}. Pass --accumulate {value}, or launch with "
            "--gradient_accumulation_steps 1."
        )
    if name in SHARDING:
        return (
            "it shards one network; here several, each with its optimiser, share a step. Launch with --multi_gpu, "
            "and pass --shard N to cut each network into pieces on N ranks."
        )
    if name.startswith(IDLE):
        return None
    return "this program does not follow it. Unset it, or leave it out of `accelerate config`."


def _of_precision(wanted: str, precision: str) -> str:
    if wanted in ("no", "bf16"):
        return (
            f"it contradicts --precision {precision}. Pass --precision {wanted}, or launch with "
            f"--mixed_precision {precision}."
        )
    return f"this program computes in float32 or bf16 only. Launch with --mixed_precision {precision}."


def has_gpu() -> bool:
    """Return True where a driver shows a GPU. Torch knows better, and takes seconds to import."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    return not hidden and any(any(Path("/dev").glob(name)) for name in ("nvidia[0-9]*", "kfd", "dxg"))


def default_device() -> str:
    """Return ``cuda`` where there seems to be a GPU, else ``cpu``: the default of ``--device``."""
    return "cuda" if has_gpu() else "cpu"
