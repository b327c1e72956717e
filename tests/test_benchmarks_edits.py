"""The truth that edits are measured against, and the scripts that measure them."""

import edit_attention
import edit_inversion
import edits
import pytest
import torch
from edit_scenes import KINDS, figures, make_edits, overlap, psnr, recoloured

from toyworld.captions import parse
from toyworld.judge import load_judge


@pytest.mark.slow
def test_the_truth_reaches_every_edit_and_keeps_the_rest():
    judge = load_judge()
    for kind in KINDS:
        made = make_edits(kind, 6, seed=1)
        for before, after in zip(*map(list, made.prompts), strict=True):
            changed = {name for name in KINDS if getattr(parse(before), name) != getattr(parse(after), name)}
            assert changed == {kind}
        row = figures(judge, made.truth, made)
        assert row["reached"] == row["kept"] == row["iou"] == 1.0
        assert row["psnr"] > 90 or row["psnr"] == float("inf")
        assert figures(judge, made.source, made)["reached"] < 0.7
        assert figures(judge, made.source, made)["psnr"] < 40


def test_a_render_is_recoloured_exactly():
    made = make_edits("colour", 6, seed=0)
    for image, truth, before, after in zip(made.source, made.truth, made.before, made.after, strict=True):
        found = recoloured(image, before.colour, after.colour)
        assert psnr(found[None], truth[None]) > 40
    assert overlap(made.source, made.truth) > 0.97, "a recolouring keeps the silhouette"
    torch.testing.assert_close(recoloured(made.source[0], "red", "red"), made.source[0], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_every_method_of_the_table_runs(tmp_path):
    brief = {"num_images": 1, "steps": 3, "inner": 1}
    config = edits.Config(kinds=("colour",), methods=tuple(edits.METHODS), out=tmp_path / "a.json", **brief)
    table = edits.main(config)
    assert set(table["colour"]) == set(edits.METHODS)
    assert table["colour"]["SDEdit 0.2"]["psnr"] > table["colour"]["fresh noise"]["psnr"]
    assert list(edits.chosen(edits.Config(methods=("SDEdit",)))) == [
        name for name in edits.METHODS if name.startswith("SDEdit")
    ]


@pytest.mark.slow
def test_inversion_and_attention_are_measured(tmp_path):
    rows = edit_inversion.main(edit_inversion.Config(num_images=1, steps=6, inner=2, sweeps=1))
    ceiling = rows["autoencoder"]["psnr"]
    assert rows["ddim, guidance 1, 10 refinements"]["psnr"] > ceiling - 3
    assert rows["pivot alone, guidance 7.5"]["psnr"] < rows["ddim, guidance 1, 3 refinements"]["psnr"]
    made = edit_attention.main(edit_attention.Config(num_images=2, steps=4))
    assert made["untouched"] == {"zero_windows_equal": 1.0, "network_equal": 1.0}
    assert made["colour's word times 1"]["equal_to_source"] == 1.0
