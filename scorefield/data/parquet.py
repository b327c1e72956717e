"""Parquet files, unpacked: rows are drawn in any order, and a parquet file is read in groups of rows only.

So each file is unpacked once, a few rows at a time, into an Arrow file in the cache, where every picture lies at a
known place. No network is asked for anything. Memory holds a page of the file twice: a group of rows at most, and
about 1,024 rows where a group is larger and pyarrow wrote it.
"""

import fcntl
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from scorefield.atomic import whole_file
from scorefield.cache import cache_folder, content_key
from scorefield.files import open_regular
from scorefield.progress import Progress

AT_A_TIME = 2**24
"""Bytes of rows that are unpacked together, and at least one row."""


def read_parquet(files: Sequence[Path]) -> Any:
    """Return the rows of parquet files as a ``datasets.Dataset``, whose pictures stay on the disk.

    Raises ``ValueError`` where the disk of the cache has no room for them, and whatever the libraries raise of a
    damaged file, or of one that has other columns than the first.
    """
    import datasets
    import pyarrow.parquet

    with open_regular(files[0]) as source:
        features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(source))
    parts = [datasets.Dataset.from_file(os.fspath(_unpacked(file, features))) for file in files]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _unpacked(file: Path, features: Any) -> Path:
    # The Arrow file of a parquet file: another one after each change of it.
    status, folder = file.stat(), cache_folder() / "tables"
    facts = os.path.realpath(file), status.st_size, status.st_mtime_ns, status.st_ino, features
    kept = folder / f"{content_key(repr(facts))[:32]}.arrow"
    with open_regular(file) as source:
        with suppress(OSError):  # a file system without locks: ranks then do the work each for itself
            fcntl.flock(source, fcntl.LOCK_EX)
        if not kept.exists():
            with whole_file(kept) as temporary:
                _unpack(source, file, temporary, features)
    return kept


def _unpack(source: Any, file: Path, target: Path, features: Any) -> None:
    import pyarrow as pa
    from datasets.table import table_cast
    from pyarrow.parquet import ParquetFile

    packed = ParquetFile(source, buffer_size=2**20, pre_buffer=False)
    about, schema = packed.metadata, features.arrow_schema
    groups = [about.row_group(number) for number in range(about.num_row_groups)]
    size, free = sum(group.total_byte_size for group in groups), shutil.disk_usage(target.parent).free
    if size > free:
        raise ValueError(
            f"{file} has {size:,} bytes unpacked; {target.parent} has {free:,} free. Free some, or name a folder "
            "on a larger disk in the environment variable XDG_CACHE_HOME."
        )
    largest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    number = max(1, min(1000, AT_A_TIME // max(1, largest)))

    with (
        Progress("rows of parquet unpacked", about.num_rows, unit="row") as bar,
        pa.OSFile(os.fspath(target), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        for batch in packed.iter_batches(number, use_threads=False):
            bar.update(batch.num_rows)
            writer.write_table(table_cast(pa.Table.from_batches([batch]), schema))
