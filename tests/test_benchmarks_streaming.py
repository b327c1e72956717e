"""The benchmark of streaming: its numbered pictures take no disk, and what was drawn twice or never is counted."""

import json

import pytest
import streaming
import torch

from scorefield.data.images import load_images
from scorefield.data.options import DataOptions


@pytest.mark.parametrize("kind", ["shards", "folder", "parquet"])
def test_each_picture_is_a_large_file_that_shows_its_number(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(streaming, "PER_FILE", 5)
    config = streaming.Config(data=tmp_path / "data", kind=kind, picture_bytes=200_000)
    config.data.mkdir()
    num_bytes = streaming.write_data(config, 12)
    assert num_bytes == pytest.approx(12 * 200_000, rel=0.02)
    on_disk = sum(512 * path.stat().st_blocks for path in config.data.iterdir())
    assert kind == "parquet" or on_disk < num_bytes / 5, "holes"
    images = load_images(DataOptions(data=str(config.data), memory_limit=0.0))
    batch = images.batch(torch.arange(12), torch.Generator())
    assert streaming.number_of(batch.images) == list(range(12))


def test_what_was_drawn_twice_or_never_is_counted(tmp_path):
    assert streaming.miscounted({0: [3, 1], 1: [0, 2]}, 4) == {"repeated": 0, "lost": 0}
    assert streaming.miscounted({0: [3, 1], 1: [1, 1]}, 4) == {"repeated": 1, "lost": 2}
    log = tmp_path / "drawn.jsonl"
    lines = [[0, [3, 1], 50], [1, [0, 2], 70], [1, [0, 2], 60]]  # a step that was done again after a kill
    log.write_text("\n".join(map(json.dumps, lines)))
    assert streaming.read([log]) == {"batches": {0: [3, 1], 1: [0, 2]}, "peak_bytes": 70}
    log.write_text("\n".join(map(json.dumps, [*lines, [1, [2, 0], 60]])))
    with pytest.raises(ValueError, match="batch 1 is another one after the restart"):
        streaming.read([log])


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        streaming.main(streaming.Config(data=tmp_path / "mine"))
    assert (tmp_path / "mine" / "a.txt").read_text() == "mine"
