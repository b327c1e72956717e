"""The script that trains a flow transformer on the toy world: its parts, its loss, and two steps of it."""

import json

import pytest
import torch
import train_flow_toyworld as script
from diffusers import ZImagePipeline
from refusals import refused
from safetensors.torch import load_file

import toyworld.evaluate as evaluate_toyworld
from scorefield import NetworkDenoiser, RectifiedFlow
from scorefield.guidance import guided
from scorefield.models.families import z_image
from scorefield.models.teacher import load_teacher
from scorefield.randomness import Rng, derived_generator
from scorefield.sampling import sample
from toyworld.captions import Attributes, caption
from toyworld.options import EvaluatePipeline
from toyworld.renders import World, draw_captions

SMALL = {
    "num_images": 20, "steps": 2, "batch_size": 4, "width": 64, "layers": 1, "save_every": 1, "precision": "no",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return script.main(script.Config(out=tmp_path_factory.mktemp("flow"), **SMALL))


def test_each_word_of_the_captions_is_one_token_with_a_vector_of_its_own():
    tokenizer = script.make_tokenizer()
    assert tokenizer.tokenize("a yellow letter L") == ["a", "Ġyellow", "Ġletter", "ĠL"]
    assert "".join(tokenizer.tokenize("a shiny mug")) == "aĠshinyĠmug", "other words are spelled"
    used = {number for text in script.all_captions() for number in tokenizer(text).input_ids}
    torch.manual_seed(0)
    encoder = script.make_text_encoder(len(tokenizer))
    assert torch.linalg.matrix_rank(encoder.embed_tokens.weight[sorted(used)]) == len(used)
    encode = z_image.encoder({"text_encoder": encoder, "tokenizer": tokenizer}, None, torch.device("cpu"))
    conds = encode(["a red mug", ""])
    start, *words, end = tokenizer(f"{script.START}a red mug{script.END}").input_ids
    assert conds["mask"].sum(1).tolist() == [5, 2], "an empty caption still says that it begins and ends"
    assert torch.equal(conds["texts"][0, :5], encoder.embed_tokens.weight[[start, *words, end]])


def test_captions_of_renders_have_the_numbers_of_what_they_say():
    numbers, captions = script.number_captions(3, 0)
    full, no_view, no_background, neither = (captions[number] for number in numbers[1])
    assert full.startswith(neither)
    assert no_view == full.partition(",")[0]
    assert no_background == f"{neither},{full.partition(',')[2]}"
    assert captions[-1] == ""
    assert len(set(captions)) == len(captions) == len(numbers.unique()) + 1
    assert len(script.all_captions()) == 9 * 8 * 4 * 5 + 1
    world = World(torch.zeros(3), numbers[:, :, None], torch.tensor([len(captions) - 1]))
    drawn = draw_captions(world, torch.zeros(4000, dtype=torch.long), 0.2, 0.1, Rng(0, 0))
    assert (drawn == len(captions) - 1).double().mean() == pytest.approx(0.1, abs=0.03)


def test_the_untrained_transformer_predicts_nothing():
    torch.manual_seed(0)
    transformer = script.make_transformer(64, 1)
    assert all(value.isfinite().all() for value in transformer.parameters())
    cond = {"texts": torch.randn(2, 32, script.TEXT_WIDTH), "mask": torch.ones(2, 32, dtype=torch.long)}
    t = torch.tensor([100.0, 900.0])
    with torch.no_grad():
        made = z_image.call(transformer, torch.randn(2, 4, 16, 16), t, cond)
    assert made.shape == (2, 4, 16, 16)
    assert not made.any()


def test_the_loss_is_that_of_the_velocity_at_times_about_a_half():
    seen = {}

    def network(x_t, t, texts):
        seen.update(x_t=x_t, t=t, texts=texts)
        return torch.zeros_like(x_t)

    z = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    denoiser = NetworkDenoiser(network, RectifiedFlow(), "flow", 1000.0)
    loss = script.flow_loss(denoiser, {"latents": z, "texts": z}, Rng(0, 0))["loss"]
    t = seen["t"].view(-1, 1, 1, 1) / 1000
    noise = (seen["x_t"] - (1 - t) * z) / t
    assert seen["texts"] is z
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    assert float(loss) == pytest.approx(float((noise - z).square().mean()), rel=1e-3)
    assert float(t.logit().mean()) == pytest.approx(0, abs=0.1)
    assert float(t.logit().std()) == pytest.approx(1, abs=0.1)


@pytest.mark.slow
def test_what_is_saved_is_the_average_which_the_same_command_finds_done(trained, capsys):
    file = trained / "transformer" / "diffusion_pytorch_model.safetensors"
    before = file.read_bytes()
    last = trained.parent / "checkpoints" / "step-000000002" / "transformer.ema.safetensors"
    average, saved = load_file(last), load_file(file)
    assert all(torch.equal(value, average[f"model.{name}"].half()) for name, value in saved.items())
    (latents,) = (trained.parent / "latents").rglob("*.safetensors")
    assert float(load_file(latents)["latents"].std()) == pytest.approx(1, abs=0.2)
    script.main(script.Config(out=trained.parent, **SMALL))
    assert "resumed from step 2\n" in capsys.readouterr().out
    assert file.read_bytes() == before
    with refused("belongs to another config .*part_dropout"):
        script.main(script.Config(out=trained.parent, **SMALL, part_dropout=0.5))
    assert json.loads((trained / "vae" / "config.json").read_text())["shift_factor"] == 0


def test_what_cannot_be_trained_is_refused(tmp_path, monkeypatch):
    for changes, said in (
        ({"width": 96}, "--width must be a multiple of 64"), ({"width": 1024}, "up to 512"),
        ({"layers": 25}, "--layers must be at most 24"), ({"layers": 0}, "--layers must be above 0"),
    ):  # fmt: skip
        with refused(said):
            script.main(script.Config(out=tmp_path / "x", dry_run=True, **changes))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("one process"):
        script.main(script.Config(out=tmp_path / "x"))
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_evaluation_draws_what_our_sampler_draws_under_our_guidance(trained, tmp_path):
    """Z-Image's pipeline counts guidance from 0, and draws 1024 pixels unless it is told."""
    torch.manual_seed(1)
    pipeline = ZImagePipeline.from_pretrained(trained)
    with torch.no_grad():
        for value in pipeline.transformer.parameters():
            value.normal_(0, 0.1)
    pipeline.save_pretrained(tmp_path / "awake")
    prompts = [caption(Attributes("mug", "red", "white", "side")), caption(Attributes("cone", "blue"))]
    teacher = load_teacher(tmp_path / "awake", size=64, cache=tmp_path / "cache")
    noise = torch.cat([
        torch.randn(1, *teacher.shape, generator=derived_generator(0, "picture", row)) for row in range(2)
    ])  # fmt: skip
    drawn = {}
    for scale in (1.0, 3.0):
        config = EvaluatePipeline(steps=3, guidance=scale, device="cpu")
        loaded = evaluate_toyworld.load_pipeline(tmp_path / "awake", "cpu")
        drawn[scale] = evaluate_toyworld.draw(config, loaded, prompts)
        model = guided(teacher.denoiser, scale, teacher.negative())
        times = torch.tensor([*loaded.scheduler.timesteps.tolist(), 0.0]) / 1000
        wanted = teacher.decode(sample(model, noise, teacher.prompts(prompts), times=times)).clamp(-1, 1)
        assert drawn[scale].shape == (2, 3, 64, 64)
        assert float((drawn[scale] - wanted).abs().max()) <= 2 / 255
    assert float((drawn[1.0] - drawn[3.0]).abs().max()) > 0.05
