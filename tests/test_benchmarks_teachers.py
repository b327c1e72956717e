"""The counts of the teachers: against weights that exist, products counted by hand, and published sizes."""

import json

import pytest
import teachers
import tiny_pipelines as tiny
import torch
from teachers import Config
from torch import nn
from transformers import T5EncoderModel

PARTS = {
    "sd15_unet": tiny.sd, "sd21_unet": tiny.sd, "sdxl_unet": tiny.sdxl, "sd3_medium_transformer": tiny.sd3,
    "sd_vae": tiny.sd, "sdxl_vae": tiny.sdxl, "sd3_vae": tiny.sd3,
}  # fmt: skip


@pytest.fixture(scope="module")
def networks():
    pipelines = {maker: maker() for maker in (tiny.sd, tiny.sdxl, tiny.sd3)}
    found = {
        name: pipelines[maker].components["vae" if "vae" in name else name.split("_")[-1]]
        for name, maker in PARTS.items()
    }
    return {**found, "taesd": tiny.tiny_vae()}


@pytest.fixture
def configs(tmp_path, networks, monkeypatch):
    for name, network in networks.items():
        settings = {"_class_name": type(network).__name__, **network.config}
        (tmp_path / f"{name}.json").write_text(json.dumps(settings))
    monkeypatch.setattr(teachers, "TEXTS", dict.fromkeys(teachers.TEXTS, tiny.clip))
    return tmp_path


@pytest.mark.slow
def test_it_counts_the_weights_and_the_work_that_the_models_have(configs, networks):
    for model in teachers.MODELS.values():
        count = teachers.count(Config(configs=configs), model)
        assert count.network == networks[model.network].num_parameters()
        assert count.vae == networks[model.vae].num_parameters()
        assert count.texts == len(model.texts) * tiny.clip().num_parameters()
        assert count.latents == (networks[model.network].config.in_channels, 8, 8)
        assert count.pixels == 16
        assert count.guided == 2 * count.plain > 0
        assert teachers.count(Config(configs=configs, scale=1), model).guided == count.plain
        assert count.decode > count.encode > 0


def test_a_multiplication_with_addition_is_two_operations():
    linear, conv = nn.Linear(3, 5, device="meta"), nn.Conv2d(2, 4, 3, padding=1, device="meta")
    assert teachers.operations(lambda: linear(torch.zeros(7, 3, device="meta"))) == 2 * 7 * 3 * 5
    assert teachers.operations(lambda: conv(torch.zeros(1, 2, 8, 8, device="meta"))) == 2 * 64 * 4 * 2 * 9
    q = torch.zeros(1, 2, 6, 4, device="meta")
    attention = nn.functional.scaled_dot_product_attention
    assert teachers.operations(lambda: attention(q, q, q)) == 2 * 2 * 2 * 6 * 6 * 4


@pytest.mark.slow
def test_the_tables_are_printed_and_written_and_missing_parts_are_named(configs, tmp_path, capsys):
    tables = teachers.main(Config(configs=configs, out=tmp_path / "new" / "teachers.md"))
    assert (tmp_path / "new" / "teachers.md").read_text() == tables + "\n" == capsys.readouterr().out
    rows = [line.split(" | ") for line in tables.splitlines() if line.startswith("| S")]
    assert [len(row) for row in rows] == [8] * 4 + [7] * 4
    assert rows[7][:2] == ["| SD3 medium, 16 px", "8 x 8 x 8"]
    (configs / "sd_vae.json").write_text(json.dumps({"_class_name": "VQModel"}))
    with pytest.raises(ValueError, match=r"sd_vae\.json: _class_name must be one of UNet2DCond.*VQModel"):
        teachers.main(Config(configs=configs))
    (configs / "sd_vae.json").unlink()
    with pytest.raises(ValueError, match=r"lacks sd_vae\.json"):
        teachers.main(Config(configs=configs))


def test_what_stays_in_float32_is_counted(tmp_path):
    """SDXL's autoencoder and T5's last layers, in half precision."""
    counts = {
        name: teachers.Count(
            model, 10**9, 10**9, 10**9, 10**8 if "T5-XXL" in model.texts else 0, (4, 8, 8), 16, 2, 1, 1, 1
        )
        for name, model in teachers.MODELS.items()
    }
    rows = [line.split(" | ") for line in teachers.memory_table(counts, {}) if line.startswith("| S")]
    assert [row[6] for row in rows] == ["6.00 GB", "6.00 GB", "8.00 GB", "6.20 GB"]
    encoder = tiny.t5()
    encoder.save_pretrained(tmp_path)
    half = T5EncoderModel.from_pretrained(tmp_path, dtype=torch.float16)
    whole = sum(p.numel() for p in half.parameters() if p.dtype == torch.float32)
    assert teachers.kept_whole(encoder) == whole > 0
    assert teachers.kept_whole(tiny.clip()) == 0
    sizes = {"CLIP-L": 123_060_480, "CLIP-H, 23 layers": 340_387_840, "T5-XXL": 4_762_310_656}
    with torch.device("meta"):
        assert teachers.kept_whole(teachers.TEXTS["T5-XXL"]()) == 1_006_632_960
        assert {name: teachers.parameters(teachers.TEXTS[name]()) for name in sizes} == sizes
