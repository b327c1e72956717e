"""Batches made with real families of diffusers: prompts, their null, latents, and no encoder left in the end."""

import pytest
import tiny_pipelines as tiny
import torch

from controlnet.canny import Canny
from controlnet.circles import Circles
from controlnet.data import ControlBatches
from scorefield.cache import TensorCache
from scorefield.models.prompts import share_prompts
from scorefield.models.teacher import load_teacher
from scorefield.randomness import Rng
from scorefield.training.latents import Latents


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl], ids=["sd", "sdxl"])
def test_a_teachers_prompts_and_latents_in_batches(make, tmp_path):
    make().save_pretrained(tmp_path / "model")
    teacher = load_teacher(tmp_path / "model", size=16, cache=tmp_path / "texts")
    cache = TensorCache(tmp_path / "latents", teacher.codec.identity())
    samples = Circles(16, 6)

    def batches(prompts, encode, kept):
        return ControlBatches(
            samples=samples, hints=[Canny()], size=(16, 16), batch_size=6, prompts=prompts, flip=True,
            null=teacher.negative(), prompt_drop=0.5, latents=Latents(encode, kept),
        )  # fmt: skip

    def posterior(images):
        return dict(zip(("mean", "std"), teacher.codec.posterior(images), strict=True))

    def forgotten(images):
        raise AssertionError("the autoencoder is not needed any more")

    assert share_prompts(teacher.texts, [samples.caption(n) for n in range(6)]) == 6
    plain, first = (batches(teacher.prompts, posterior, kept) for kept in (None, cache))
    for epoch in range(4):
        first(Rng(0, step=epoch, index=epoch))
    cached = batches(teacher.without_text_encoders().prompts, forgotten, cache)
    for epoch in range(4):
        a, b = plain(Rng(0, step=epoch, index=epoch)), cached(Rng(0, step=epoch, index=epoch))
        assert torch.allclose(a["x0"], b["x0"], atol=1e-5)
        assert torch.equal(a["hint"], b["hint"])
        assert a["cond"].keys() == b["cond"].keys() == teacher.negative().keys()
        for name, value in a["cond"].items():
            assert torch.allclose(value, b["cond"][name], atol=1e-5)
            for row, dropped in zip(value, a["prompt_dropped"].tolist(), strict=True):
                assert torch.equal(row, teacher.negative()[name][0]) == (dropped or name == "time_ids")
        assert teacher.denoiser(a["x0"], torch.full((6,), 500.0), a["cond"]).isfinite().all()
