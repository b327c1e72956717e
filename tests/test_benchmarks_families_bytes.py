"""The table of bytes: counts are those of the networks that train, and the page holds what the code counts."""

from pathlib import Path

import families_bytes as counted
import pytest
import tiny_transformers as tiny
import torch
from families_bytes import Model, count

from controlnet.transformers import control_lora
from scorefield.models.families import family_of
from scorefield.models.teacher import load_teacher


def test_small_models_are_counted_as_they_train(tmp_path):
    """A control LoRA, whose first layer is wider, and the bytes of each role."""
    tiny.flux().save_pretrained(tmp_path / "flux")
    teacher = load_teacher(tmp_path / "flux", size=32)
    model = teacher.denoiser.network.model
    settings = {name: value for name, value in model.config.items() if name[0] != "_"}
    found = count(Model("tiny", "FluxPipeline", settings=settings), rank=4)
    adapter = control_lora(teacher, rank=4, generator=torch.Generator())
    assert found.control_lora == sum(p.numel() for p in adapter.parameters())
    assert found.teacher == sum(p.numel() for p in model.parameters())
    assert found.control == sum(p.numel() for p in teacher.denoiser.network.control.make(model).parameters())
    assert found.copies == found.teacher * 34
    assert found.shared == found.teacher * 2 + found.lora * 32
    assert found.controlled(10) == found.teacher * 2 + 200


@pytest.mark.parametrize(
    ("name", "millions"), [("SDXL", 2567.5), ("FLUX.1-dev", 11901.4), ("Stable Diffusion 3 medium", 2028.3)]
)
def test_public_sizes_are_those_of_the_models(name, millions):
    model = next(one for one in counted.MODELS if one.name == name)
    family, network = counted.build(model)
    assert counted.parameters(network) / 1e6 == pytest.approx(millions, abs=0.05)
    assert family.pipeline == model.pipeline
    assert all(parameter.is_meta for parameter in network.parameters())


@pytest.mark.slow
def test_all_families_are_in_the_table_and_in_the_page():
    """UNet2DModel apart, which has no one size."""
    modules = Path(counted.CONFIGS.parent.parent / "scorefield" / "models" / "families").glob("[a-z]*.py")
    named = {model.pipeline for model in counted.MODELS}
    assert all(family_of({"_class_name": pipeline}) for pipeline in named)
    assert len(named) == len([path for path in modules if path.stem not in ("ddim", "ddpm")])
    page = counted.PAGE.read_text()
    assert counted.BEGIN in page
    rows = page.partition(counted.BEGIN)[2].partition(counted.END)[0].splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == [model.name for model in counted.MODELS]
    first = counted.table(counted.MODELS[:1]).splitlines()
    assert rows[:3] == first, "run the command above the table again"
