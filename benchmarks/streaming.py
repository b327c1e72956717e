"""An epoch of a data set that is larger than memory: how much memory, and is each sample drawn once?

    python benchmarks/streaming.py --data /tmp/streamed --gigabytes 20 --out runs/streaming

Writes a data set whose pictures of 64 x 64 pixels are numbered in their first pixel, and trains ``scorefield
teacher`` on it for an epoch: with one process, which is killed in the middle and started again, with two and with
four. Each process writes down the numbers of the pictures that reach its loss, and its peak memory. A picture is a
file of a megabyte, nearly all of it a chunk of zeros: holes, for which no disk is needed. Parquet files have no
holes, and are unpacked in the cache: they need their size on the disk. The data set is deleted in the end.
"""

import io
import itertools
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from torch import Tensor

SIDE = 64
BATCH_SIZE = 64
PER_FILE = 1024
"""Pictures in a shard or a parquet file."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure memory and draws of an epoch."""

    data: Path = Path("/tmp/streamed")
    """Folder for the data set, which must not be there."""
    kind: Literal["shards", "folder", "parquet"] = "shards"
    """Shards of webdataset, a folder of pictures, or parquet files."""
    gigabytes: float = 20.0
    """Size of its files."""
    picture_bytes: int = 1_000_000
    """Size of a picture's file."""
    memory_limit: float = 0.05
    """GiB of decoded pictures that a process may keep; the others are decoded when they are drawn."""
    out: Path = Path("runs/streaming")
    """Folder for the runs, and figures.json."""
    ranks: tuple[int, ...] = (1, 2, 4)
    """Numbers of processes; the first run is killed in the middle and started again."""


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@dataclass(frozen=True)
class Png:
    """A PNG file: what stands before and behind a number of zeros."""

    start: bytes
    zeros: int
    end: bytes

    def __len__(self) -> int:
        return len(self.start) + self.zeros + len(self.end)

    def write(self, file: io.BufferedWriter) -> None:
        """Write it, its zeros as a hole."""
        file.write(self.start)
        file.seek(self.zeros, io.SEEK_CUR)
        file.write(self.end)


def numbered_pngs(num_samples: int, size: int) -> Iterator[Png]:
    """Pictures of noise whose first pixel is their number, in files of about ``size`` bytes."""
    noise = np.random.default_rng(0).integers(0, 256, (97, SIDE, 1 + 3 * SIDE), np.uint8)
    noise[:, :, 0] = 0  # no filter
    zeros = max(0, size - SIDE * (1 + 3 * SIDE) - 100)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0))
    start = b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", zeros) + b"scOr"
    check = struct.pack(">I", zlib.crc32(b"scOr" + bytes(zeros)))
    for number in range(num_samples):
        rows = bytearray(noise[number % len(noise)].tobytes())
        rows[1:4] = number.to_bytes(3, "big")
        yield Png(start, zeros, check + chunk(b"IDAT", zlib.compress(bytes(rows), 0)) + chunk(b"IEND", b""))


def number_of(images: Tensor) -> list[int]:
    """The numbers of some pictures in [-1, 1]."""
    first = ((images[:, :, 0, 0] + 1) * 127.5).round().long()
    return (first[:, 0] * 65536 + first[:, 1] * 256 + first[:, 2]).tolist()


def write_data(config: Config, num_samples: int) -> int:
    """Write the data set; the bytes of its files."""
    pictures, write = numbered_pngs(num_samples, config.picture_bytes), {"shards": put_shard, "parquet": put_table}
    for first in range(0, num_samples, PER_FILE):
        part = enumerate(itertools.islice(pictures, PER_FILE), first)
        if config.kind == "folder":
            for number, picture in part:
                with open(config.data / f"{number:08}.png", "wb") as file:
                    picture.write(file)
        else:
            write[config.kind](config.data / f"{first:08}", part)
    return sum(path.stat().st_size for path in config.data.iterdir())


def put_shard(path: Path, pictures: Iterator[tuple[int, Png]]) -> None:
    """Write a shard of webdataset."""
    with open(path.with_suffix(".tar"), "wb") as file:
        for number, picture in pictures:
            info = tarfile.TarInfo(f"{number:08}.png")
            info.size = len(picture)
            file.write(info.tobuf())
            picture.write(file)
            file.seek(-len(picture) % 512, io.SEEK_CUR)
        file.truncate(file.tell() + 1024)


def put_table(path: Path, pictures: Iterator[tuple[int, Png]]) -> None:
    """Write a parquet file in groups of 100 rows, uncompressed."""
    import pyarrow as pa
    import pyarrow.parquet

    files = [{"bytes": one.start + bytes(one.zeros) + one.end, "path": None} for _, one in pictures]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"image": pa.array(files, kind)})
    pyarrow.parquet.write_table(table, path.with_suffix(".parquet"), 100, compression="none")


def work(arguments: list[str], log: Path) -> None:
    """Train as the command line says, and write down what each loss sees; one process of a run."""
    from scorefield import cli
    from scorefield.commands import teacher

    phase_of = teacher.teacher_phase
    file = open(f"{log}-{os.environ.get('RANK', '0')}.jsonl", "a", buffering=1)  # noqa: SIM115

    def watched(*given):  # type: ignore[no-untyped-def]
        phase = phase_of(*given)
        loss = phase.loss

        def logged(batch, rng):  # type: ignore[no-untyped-def]
            peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
            print(json.dumps([rng.index, number_of(batch.images), int(peak) * 1024]), file=file)
            return loss(batch, rng)

        object.__setattr__(phase, "loss", logged)
        return phase

    teacher.teacher_phase = watched
    cli.main(["teacher", *arguments])


def run(config: Config, num_ranks: int, num_samples: int, killed: bool) -> dict[str, object]:
    """One epoch; what was drawn, and the largest memory of a process."""
    out = config.out / f"ranks-{num_ranks}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    steps = num_samples // (BATCH_SIZE * num_ranks)
    words = [
        *("--data", str(config.data), "--out", str(out / "run"), "--steps", str(steps), "--width", "8"),
        *("--batch-size", str(BATCH_SIZE), "--size", str(SIDE), "--depth", "1"),
        *("--memory-limit", str(config.memory_limit), "--save-every", str(max(1, steps // 5))),
    ]
    launcher = [sys.executable]
    if num_ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(num_ranks), "--master_port", "29577"]
    command = [*launcher, __file__, "work", str(out / "drawn"), *words]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1"}
    began, logs = time.perf_counter(), [Path(f"{out / 'drawn'}-{rank}.jsonl") for rank in range(num_ranks)]
    lines = 0
    if killed:
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        while process.poll() is None and lines < 0.5 * steps:
            time.sleep(0.2)
            lines = logs[0].read_bytes().count(b"\n") if logs[0].exists() else 0
        if process.poll() is not None:
            raise RuntimeError(f"the run ended by itself, after {lines} of {steps} steps.")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True)
    return {"ranks": num_ranks, "killed_after": lines, "seconds": round(time.perf_counter() - began), **read(logs)}


def read(logs: list[Path]) -> dict[str, object]:
    """The drawn numbers by batch, and the largest memory. Raises ``ValueError`` for a batch drawn in two ways."""
    batches, peak = dict[int, list[int]](), 0
    for log in logs:
        for line in log.read_text().splitlines():
            index, numbers, memory = json.loads(line)
            if batches.setdefault(index, numbers) != numbers:
                raise ValueError(f"batch {index} is another one after the restart.")
            peak = max(peak, memory)
    return {"batches": batches, "peak_bytes": peak}


def miscounted(batches: dict[int, list[int]], num_samples: int) -> dict[str, int]:
    """Return how many samples were drawn more than once, and how many not at all."""
    drawn = np.bincount([number for numbers in batches.values() for number in numbers], minlength=num_samples)
    return {"repeated": int((drawn > 1).sum()), "lost": int((drawn == 0).sum())}


def main(config: Config) -> None:
    """Write the data set, measure, and delete it."""
    largest = max(config.ranks) * BATCH_SIZE
    num_samples = max(1, round(config.gigabytes * 1e9 / config.picture_bytes / largest)) * largest
    config.data.mkdir(parents=True)  # never one that is there: it is deleted
    try:
        num_bytes = write_data(config, num_samples)
        print(f"{num_samples:,} samples, {num_bytes / 1e9:.1f} GB in {config.data}", flush=True)
        measure(config, num_samples, num_bytes)
    finally:
        shutil.rmtree(config.data)


def measure(config: Config, num_samples: int, num_bytes: int) -> None:
    """Run the epochs, print and keep the figures."""
    figures, first = [], None
    for place, num_ranks in enumerate(config.ranks):
        found = run(config, num_ranks, num_samples, killed=place == 0)
        batches: dict[int, list[int]] = found.pop("batches")  # type: ignore[assignment]
        first = first or batches
        found |= {**miscounted(batches, num_samples), "same_batches": batches == first}
        size = round(num_bytes / 1e9, 1)
        figures.append({"kind": config.kind, "samples": num_samples, "gigabytes": size, **found})
        print(json.dumps(figures[-1]), flush=True)
    (config.out / "figures.json").write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(sys.argv[3:], Path(sys.argv[2]))
    else:
        main(tyro.cli(Config, description=__doc__))
