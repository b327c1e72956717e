"""The untrained parts of the toy world's pipeline, and the script that trains them, on a handful of renders."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import train_toyworld
from diffusers import StableDiffusionPipeline
from folders import edit
from refusals import refused
from safetensors.torch import load_file

import toyworld.evaluate as evaluate_toyworld
import toyworld.renders as captioned
from scorefield import NetworkDenoiser
from scorefield.models.teacher import load_teacher
from scorefield.randomness import Rng
from toyworld.captions import WORDS, caption, describe
from toyworld.data import draw_scene
from toyworld.options import EvaluatePipeline
from toyworld.parts import (
    LENGTH,
    TextToLatent,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    make_vae,
    save_pipeline,
    tokens_of,
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_each_word_of_the_captions_is_one_token_and_prompts_have_one_length(tokenizer):
    for word in set(WORDS):
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    assert len(set(tokenizer(" ".join(sorted(set(WORDS)))).input_ids)) == len(set(WORDS)) + 2
    assert "".join(tokenizer.tokenize("shiny")) == "shiny</w>", "other words are spelled"
    assert tokenizer("A Red Mug").input_ids == tokenizer("a red mug").input_ids
    assert tokenizer.convert_ids_to_tokens(tokenizer("").input_ids) == ["<|startoftext|>", "<|endoftext|>"]
    tokens = tokens_of(["a red mug", "a red mug " * 20, ""], tokenizer)
    assert tokens.shape == (3, LENGTH)
    assert bool((tokens < len(tokenizer)).all())


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, tokenizer):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipeline") / "pipeline"
    parts = make_vae(), make_text_encoder(len(tokenizer)), make_unet()
    return save_pipeline(folder, *parts, card="# Card"), parts


def test_the_folder_is_small_safe_and_in_the_precisions_that_load(pipeline):
    folder, _ = pipeline
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 16e6
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    dtypes = {
        part.parent.name: {x.dtype for x in load_file(part).values()} for part in folder.rglob("*.safetensors")
    }
    assert dtypes["unet"] == dtypes["vae"] == {torch.float16}
    assert dtypes["text_encoder"] == {torch.float32}


def test_the_network_that_is_trained_is_the_one_that_is_loaded(pipeline, tokenizer):
    """v of the training's module equals v of the teacher that the hub makes of the folder."""
    folder, (_, text_encoder, unet) = pipeline
    network = TextToLatent(text_encoder, unet.float()).eval()
    teacher = load_teacher(folder, cache=folder.parent / "cache")
    z_t, t = torch.randn(2, 4, 16, 16), torch.tensor([100.0, 700.0])
    prompts = ["a red mug", "a blue chair on a grey background, side view"]
    with torch.no_grad():
        velocity = network(z_t, t, tokens_of(prompts, tokenizer))
        expected = teacher.denoiser.schedule.to_x0(velocity, z_t, t, "v")
        actual = teacher.denoiser(z_t, t, teacher.prompts(prompts))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


SMALL = {
    "num_images": 20, "vae_steps": 2, "steps": 2, "batch_size": 4, "vae_batch_size": 4, "save_every": 1,
    "precision": "no",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("toyworld")
    return train_toyworld.main(train_toyworld.Config(out=out, **SMALL))


def weights(folder: Path):
    return {path.parent.name: load_file(path) for path in folder.rglob("*.safetensors")}


@pytest.mark.slow
def test_latents_are_scaled_to_unit_variance(trained):
    teacher = load_teacher(trained, cache=trained.parent / "cache")
    assert teacher.codec is not None
    (file,) = (trained.parent / "latents").rglob("*.safetensors")
    kept = load_file(file)["latents"]
    assert float(kept.std()) == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_what_is_saved_is_the_average_which_the_same_command_finds_done(trained, tmp_path, capsys, monkeypatch):
    before = weights(trained)
    run = trained.parent / "text-to-image" / "checkpoints"
    average = load_file(sorted(run.glob("step-*"))[-1] / "text-to-image.ema.safetensors")
    unet = load_file(trained / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, average[f"unet.{name}"].half()) for name, value in unet.items())
    for out, times in ((trained.parent, 2), (tmp_path / "anew", 0)):
        after = weights(train_toyworld.main(train_toyworld.Config(out=out, **SMALL)))
        assert capsys.readouterr().out.count("resumed from step 2") == times
        assert all(torch.equal(before[part][name], after[part][name]) for part in before for name in before[part])
    with pytest.raises(ValueError, match="text-to-image"):
        train_toyworld.main(train_toyworld.Config(out=trained.parent, **SMALL, learning_rate=5e-4))
    assert capsys.readouterr().out.count("resumed from step 2") == 1, "the autoencoder stays"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="a single process"):
        train_toyworld.main(train_toyworld.Config(out=tmp_path / "x", **SMALL))
    assert not (tmp_path / "x").exists()


class Blurred(torch.nn.Module):
    """Stands for an autoencoder: half the image, and a divergence of 5 per sample."""

    def forward(self, images, noise):
        assert noise.shape == (len(images), 4, 16, 16)
        return images / 2, torch.full((len(images),), 5.0)


def test_the_autoencoder_minimises_error_and_divergence():
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    losses = train_toyworld.vae_loss(Blurred(), images, 0.1, Rng(0, 0))
    error = (images / 2).square().mean()
    assert float(losses["loss"]) == pytest.approx(float(error) + 0.5, rel=1e-6)
    assert float(losses["psnr"]) == pytest.approx(10 * math.log10(4 / float(error)), rel=1e-6)


def test_the_unet_minimises_the_error_of_v_on_the_alphas_of_its_scheduler():
    seen = {}

    def network(x_t, t, tokens):
        seen.update(x_t=x_t, t=t, tokens=tokens)
        return torch.zeros_like(x_t)

    z = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = {"latents": z, "tokens": torch.arange(6)}
    denoiser = NetworkDenoiser(network, train_toyworld.VariancePreserving.scaled_linear(), "v")
    loss = train_toyworld.latent_loss(denoiser, batch, Rng(0, 0))["loss"]
    alphas_bar = make_scheduler().alphas_cumprod[seen["t"].long()].double().view(-1, 1, 1, 1)
    alpha, sigma = alphas_bar.sqrt(), (1 - alphas_bar).sqrt()
    noise = (seen["x_t"].double() - alpha * z) / sigma
    assert noise.std() == pytest.approx(1, abs=0.05)
    assert float(loss) == pytest.approx(float((alpha * noise - sigma * z).square().mean()), rel=1e-3)
    assert seen["tokens"] is batch["tokens"]


def test_captions_lose_view_background_or_everything_as_often_as_asked(tokenizer):
    kinds = [
        "a red mug on a white background, side view",
        "a red mug on a white background",
        "a red mug, side view",
    ]
    kinds = [*kinds, "a red mug", ""]
    tokens = tokens_of(kinds, tokenizer)
    world = captioned.World(torch.zeros(1), tokens[None, :4], tokens[4])
    drawn = captioned.draw_captions(world, torch.zeros(20_000, dtype=torch.long), 0.2, 0.1, Rng(0, 0))
    shares = [float((drawn == one).all(1).double().mean()) for one in tokens]
    # full, without view, without background, without both, nothing
    for share, expected in zip(shares, (0.576, 0.144, 0.144, 0.036, 0.1), strict=True):
        assert share == pytest.approx(expected, abs=5 * (expected / 20_000) ** 0.5)


def test_the_four_captions_of_a_render_are_in_that_order(tmp_path, tokenizer):
    world = captioned.make_world(tmp_path, 3, 0)
    one = describe(draw_scene(1))
    lacking = [
        one,
        replace(one, view=None),
        replace(one, background=None),
        replace(one, view=None, background=None),
    ]
    assert torch.equal(world.tokens[1], tokens_of([caption(kind) for kind in lacking], tokenizer))
    assert torch.equal(world.empty, tokens_of([""], tokenizer)[0])


def test_renders_that_are_damaged_or_of_another_renderer_are_made_again(tmp_path, monkeypatch):
    first = captioned.rendered(tmp_path, 0, 2, 0)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:200] + bytes(path.stat().st_size - 200))
    with pytest.warns(UserWarning, match="is damaged .*; it is made again"):
        assert torch.equal(captioned.rendered(tmp_path, 0, 2, 0), first)
    assert torch.equal(captioned.rendered(tmp_path, 0, 1, 0), first[:1])
    captioned._renderer.cache_clear()
    draw = captioned.render
    monkeypatch.setattr(captioned, "render", lambda scenes: replace(draw(scenes), rgb=-draw(scenes).rgb))
    assert not torch.equal(captioned.rendered(tmp_path, 0, 2, 0), first)
    captioned._renderer.cache_clear()


def test_the_evaluation_refuses_pipelines_of_another_world_before_it_draws(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", None)
    config = EvaluatePipeline(teacher=str(folder), out=tmp_path / "x", num_prompts=2, num_renders=2, device="cpu")
    with refused("draws pictures of 16 x 16 pixels, and the judge of the toy world sees 64 x 64"):
        evaluate_toyworld.main(config)
    edit(folder / "unet" / "config.json", sample_size=None)
    with refused("captions of the toy world are longer than this pipeline's text encoder reads, .* tokens of 16"):
        evaluate_toyworld.main(config)
    edit(folder / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    with refused("zero terminal SNR"):
        evaluate_toyworld.main(config)


@pytest.mark.slow
def test_the_evaluation_refuses_what_it_cannot_measure(trained, tmp_path):
    for changes, message in (
        ({"teacher": Path("nosuch")}, "no model_index.json"), ({"device": "gpu"}, "--device gpu"),
        ({"num_prompts": 1}, "at least 2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            evaluate_toyworld.main(EvaluatePipeline(**{"teacher": trained, "out": tmp_path / "x", **changes}))
