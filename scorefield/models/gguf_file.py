"""Networks in .gguf files: the header is walked first, since the package gguf trusts every length in it."""

import mmap
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scorefield.files import open_regular

GGUF = ".gguf"

VERSIONS = (2, 3)
"""Of the format that are read."""

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
"""Types of values in the header; all numbers are little-endian."""

MOST_ENTRIES = 2**16
"""Tensors, values and entries of lists: the package makes objects of each. Qwen-Image has 1,933 tensors."""

MOST_DIMS = 8
"""Sides of a tensor: ggml has four, and files of videos have five."""


def check_gguf(file: Path) -> None:
    """Raise ``ValueError`` where the package is missing, or the header names more than the file holds.

    A list of 2^60 numbers in a file of a kilobyte would otherwise be read until the memory is full.
    """
    if find_spec("gguf") is None:
        raise ValueError(f"{file} needs the package gguf: pip install gguf.")
    try:
        with open_regular(file) as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Header(data).walk()
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is no whole .gguf file: {str(error).rstrip('.')}. Download it again.") from error


class _Header:
    # What lies before the tensors, read from the front.
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place, self.entries = data, 0, 0

    def walk(self) -> None:
        if self.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self.number("I")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}, and {' and '.join(map(str, VERSIONS))} are read")
        tensors, values = self.count(), self.count()
        for _ in range(values):
            self.take(self.number("Q"))
            self.value(self.number("I"))
        for _ in range(tensors):
            self.tensor()

    def value(self, kind: int) -> None:
        if kind == STRING:
            self.take(self.number("Q"))
        elif kind != ARRAY:
            self.take(self.width(kind))
        else:
            inner, count = self.number("I"), self.count()
            if inner != STRING:
                self.take(count * self.width(inner))
            for _ in range(count if inner == STRING else 0):
                self.take(self.number("Q"))

    def tensor(self) -> None:
        name = self.take(self.number("Q")).decode(errors="replace")
        if not 0 < (dims := self.number("I")) <= MOST_DIMS:
            raise ValueError(f"{name[:80]} has {dims} sides; expected 1 to {MOST_DIMS}")
        self.take(8 * dims)
        self.number("I")
        if (offset := self.number("Q")) >= len(self.data):
            raise ValueError(f"{name[:80]} begins at byte {offset:,} of its data, beyond the end")

    def count(self) -> int:
        found = self.number("Q")
        self.entries += found
        if self.entries > MOST_ENTRIES:
            raise ValueError(f"its header names {self.entries:,} entries; expected at most {MOST_ENTRIES:,}")
        return found

    def width(self, kind: int) -> int:
        if kind not in NUMBERS:
            raise ValueError(f"a value has the unknown type {kind}")
        return struct.calcsize("<" + NUMBERS[kind])

    def number(self, form: str) -> int:
        found: int = struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]
        return found

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.place:
            raise ValueError(f"it ends within its header, which wants {count:,} more bytes at {self.place:,}")
        self.place += count
        return self.data[self.place - count : self.place]


def dequantized(network: Any) -> nn.Module:
    """Return a network of diffusers that was read from a .gguf file with plain weights, which can learn.

    The package gguf computes them in float32, where diffusers multiplies in float16 and rounds once more.
    """
    import gguf

    dtype = network.hf_quantizer.compute_dtype
    for module in network.modules():
        parameters: dict[str, Any] = module._parameters
        for name, parameter in parameters.items():
            if hasattr(parameter, "quant_type"):  # diffusers' GGUFParameter
                values = gguf.dequantize(parameter.as_tensor().numpy(), parameter.quant_type)
                module._parameters[name] = nn.Parameter(torch.from_numpy(values).to(dtype))
    plain: nn.Module = network.dequantize()  # linear layers in place of those that dequantise
    network.hf_quantizer = None  # or save_pretrained refuses it
    return plain
