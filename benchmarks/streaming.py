"""An epoch of a data set that is larger than memory: how much memory, and is each sample drawn once?

    python benchmarks/streaming.py --shards /tmp/shards --gigabytes 20 --out runs/streaming

Writes shards of webdataset whose pictures of 64 x 64 pixels are numbered in their first pixel, and trains
``scorefield teacher`` on them for an epoch: with one process, which is killed in the middle and started again,
with two and with four. Each process writes down the numbers of the pictures that reach its loss, and its peak
memory. Pictures are files of 100 kB, of which 88 kB are a chunk of zeros: holes, for which no disk is needed.
"""

import io
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from torch import Tensor

SIDE, PER_SHARD = 64, 10_240
PADDING = 88_000
BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure memory and draws of an epoch."""

    shards: Path = Path("/tmp/shards")
    """Folder for the data set; one that is there is used."""
    gigabytes: float = 20.0
    """Size of its files."""
    out: Path = Path("runs/streaming")
    """Folder for the runs, and figures.json."""
    ranks: tuple[int, ...] = (1, 2, 4)
    """Numbers of processes; the first run is killed in the middle and started again."""


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def numbered_png(number: int, noise: bytes) -> tuple[bytes, bytes]:
    """What stands before and behind the zeros of a PNG file whose first pixel is ``number``."""
    rows = bytearray(noise)
    rows[1:4] = number.to_bytes(3, "big")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0))
    start = b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", PADDING) + b"scOr"
    return start, PADDING_SUM + chunk(b"IDAT", zlib.compress(bytes(rows), 0)) + chunk(b"IEND", b"")


PADDING_SUM = struct.pack(">I", zlib.crc32(b"scOr" + bytes(PADDING)))


def number_of(images: Tensor) -> list[int]:
    """The numbers of some pictures in [-1, 1]."""
    first = ((images[:, :, 0, 0] + 1) * 127.5).round().long()
    return (first[:, 0] * 65536 + first[:, 1] * 256 + first[:, 2]).tolist()


def write_shards(folder: Path, num_samples: int) -> int:
    """Write the data set; the bytes of its files."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (97, SIDE, 1 + 3 * SIDE), np.uint8)
    noise[:, :, 0] = 0  # no filter
    for shard in range(-(-num_samples // PER_SHARD)):
        path = folder / f"{shard:05}.tar"
        if path.exists():
            continue
        with open(path.with_suffix(".part"), "wb") as file:
            for number in range(shard * PER_SHARD, min(num_samples, (shard + 1) * PER_SHARD)):
                start, end = numbered_png(number, noise[number % len(noise)].tobytes())
                info = tarfile.TarInfo(f"{number:08}.png")
                info.size = len(start) + PADDING + len(end)
                file.write(info.tobuf() + start)
                file.seek(PADDING, io.SEEK_CUR)
                file.write(end)
                file.seek(-info.size % 512, io.SEEK_CUR)
            file.truncate(file.tell() + 1024)
        path.with_suffix(".part").rename(path)
    return sum(path.stat().st_size for path in folder.glob("*.tar"))


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
        *("--data", str(config.shards), "--out", str(out / "run"), "--steps", str(steps)),
        *("--batch-size", str(BATCH_SIZE), "--resolution", str(SIDE), "--width", "16", "--depth", "1"),
        *("--save-every", str(max(1, steps // 5)), "--log-every", str(max(1, steps // 20))),
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


def verdict(batches: dict[int, list[int]], num_samples: int) -> dict[str, int]:
    """How many samples were drawn more than once, and how many not at all."""
    drawn = np.bincount([number for numbers in batches.values() for number in numbers], minlength=num_samples)
    return {"repeated": int((drawn > 1).sum()), "lost": int((drawn == 0).sum())}


def main(config: Config) -> None:
    """Write the data set, run the epochs, print and keep the figures."""
    largest = max(config.ranks) * BATCH_SIZE
    start, end = numbered_png(0, bytes(SIDE * (1 + 3 * SIDE)))
    size = 512 + -(-(len(start) + PADDING + len(end)) // 512) * 512
    num_samples = round(config.gigabytes * 1e9 / size / largest) * largest
    num_bytes = write_shards(config.shards, num_samples)
    print(f"{num_samples:,} samples, {num_bytes / 1e9:.1f} GB in {config.shards}", flush=True)
    figures, first = [], None
    for place, num_ranks in enumerate(config.ranks):
        found = run(config, num_ranks, num_samples, killed=place == 0)
        batches: dict[int, list[int]] = found.pop("batches")  # type: ignore[assignment]
        first = first or batches
        found |= {**verdict(batches, num_samples), "same_batches": batches == first}
        figures.append({"samples": num_samples, "gigabytes": round(num_bytes / 1e9, 1), **found})
        print(json.dumps(figures[-1]), flush=True)
    (config.out / "figures.json").write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(sys.argv[3:], Path(sys.argv[2]))
    else:
        main(tyro.cli(Config, description=__doc__))
