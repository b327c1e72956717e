"""The benchmark of scenes over ranks: what it computes from seconds, and what it refuses."""

import pytest
import scene_ranks


def measured(seconds, cpu=0.1):
    return {"seconds": seconds, "cpu_seconds": cpu, "weights": 1.0}


def test_efficiency_is_the_gain_for_each_process_and_the_slowest_one_counts():
    found = {1: [[measured(1.0)], [measured(1.2)], [measured(0.9)]], 2: [[measured(0.5), measured(0.625)]] * 3}
    assert scene_ranks.table(found).splitlines()[2:] == [
        "| 1 | 1.000 | 0.100 | 1.00 | 1.00 |", "| 2 | 0.625 | 0.100 | 1.60 | 0.80 |",
    ]  # fmt: skip


def test_numbers_that_do_not_share_equally_are_refused():
    for ranks in ((2,), (1, 3)):
        with pytest.raises(ValueError, match="must name 1 and divide --batches 4"):
            scene_ranks.main(scene_ranks.Config(ranks=ranks))


def test_a_process_measures_its_steps():
    config = scene_ranks.Config(seconds=0.02, batches=1, steps=4, render_size=8)
    assert scene_ranks.measure(config)["seconds"] > 0.02
