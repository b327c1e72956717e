"""Weights in safetensors, looked at before a network is made for them, and after they were read."""

import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from scorefield.files import check_regular


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors in a file of safetensors; only its header is read.

    Raises ``ValueError`` for a file that is missing, damaged or not regular.
    """
    try:
        check_regular(file)
        with safe_open(file, "pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"cannot read the weights {file}: {error}") from error


def check_fit(file: Path, planned: nn.Module) -> None:
    """Raise ``ValueError`` unless the tensors in ``file`` have the names and shapes of those of ``planned``.

    Of tensors that share their memory one is stored. A network on the device "meta" takes no memory, so that one
    that would fill it is refused before it is built.
    """
    stored, expected = read_shapes(file), planned.state_dict(keep_vars=True)
    kept = {id(value) for name, value in expected.items() if name in stored}
    faults = [f"they lack {name}" for name, x in expected.items() if name not in stored and id(x) not in kept]
    faults += [f"{name} has no place there" for name in stored if name not in expected]
    faults += [
        f"{name} is {stored[name]} in place of {tuple(x.shape)}"
        for name, x in expected.items()
        if name in stored and isinstance(x, Tensor) and tuple(x.shape) != stored[name]
    ]
    if faults:
        kind = type(planned).__name__
        raise ValueError(f"the weights in {file} do not fit the {kind} that is described beside: {faults[0]}.")


MOST_LAYERS = 1000
"""Layers or blocks in a row that a config may ask for: even planning a billion of them would not end."""


def check_counts(config: Mapping[str, object], part: Path) -> None:
    """Raise ``ValueError`` for the ``config.json`` of a part that asks for more than ``MOST_LAYERS`` layers."""
    for name, value in config.items():
        numbers = re.findall(r"\d+", str(value)) if "layers" in name else []
        if any(int(number[:9]) > MOST_LAYERS for number in numbers):
            got = str(value)[:80]
            raise ValueError(f"{part / 'config.json'}: {name} must be at most {MOST_LAYERS}; got {got}.")


def check_numbers(kind: type, config: Mapping[str, object], part: Path) -> None:
    """Raise ``ValueError`` where the ``config.json`` of a network of class ``kind`` has no number for one.

    Some are first used when the network is called, which may be long after it was loaded.
    """
    for name, option in inspect.signature(kind).parameters.items():
        wanted = type(option.default) if option.annotation is option.empty else option.annotation
        value = config.get(name, option.default)
        if wanted not in (int, float) or value is option.default or type(value) in (int, float):
            continue
        raise ValueError(f"{part / 'config.json'}: {name} must be a number; got {str(value)[:80]!r}.")


def check_size(part: Path, files: Iterable[Path], planned: nn.Module) -> None:
    """Raise ``ValueError`` for a network with far more numbers than the weights ``files`` of folder ``part`` hold.

    Libraries fill what is missing with random numbers, and the memory with it. Names are not compared: old
    versions stored others. ``planned`` is on the device "meta".
    """
    tensors = {id(x): x for x in (*planned.parameters(), *planned.buffers())}
    wanted = sum(x.numel() for x in tensors.values())
    weights = [file for file in files if file.suffix == ".safetensors"]
    stored = sum(torch.Size(shape).numel() for file in weights for shape in read_shapes(file).values())
    if wanted > 1.5 * stored + 1_000_000:
        raise ValueError(
            f"{part / 'config.json'} describes a network of {wanted:,} numbers, and the weights beside hold "
            f"{stored:,}. Download it again."
        )


def check_finite(tensors: Mapping[str, object], source: Path | str) -> None:
    """Raise ``ValueError`` naming the first tensor that holds nan or inf; ``source`` says where it was read."""
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(
                f"the weights in {source} hold nan or inf, in {name}. Download them again, or save them from an "
                "earlier checkpoint."
            )
