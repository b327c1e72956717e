"""The untrained parts of the toy world's pipeline, and the script that trains them, on a handful of renders."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_toyworld
from safetensors.torch import load_file

from score.hub import load_teacher
from toyworld.captions import WORDS
from toyworld.parts import (
    LENGTH,
    TextToLatent,
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


def test_each_word_of_the_captions_is_one_token(tokenizer):
    for word in set(WORDS):
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    assert len(set(tokenizer(" ".join(sorted(set(WORDS)))).input_ids)) == len(set(WORDS)) + 2


def test_other_words_are_spelled_and_capitals_do_not_matter(tokenizer):
    assert "".join(tokenizer.tokenize("shiny")) == "shiny</w>"
    assert tokenizer("A Red Mug").input_ids == tokenizer("a red mug").input_ids
    start, end = tokenizer("").input_ids
    assert tokenizer.convert_ids_to_tokens([start, end]) == ["<|startoftext|>", "<|endoftext|>"]


def test_prompts_are_padded_and_cut_to_one_length(tokenizer):
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


def test_a_process_that_imports_only_diffusers_draws_with_it(pipeline, tmp_path):
    program = (
        "import sys, diffusers; p = diffusers.StableDiffusionPipeline.from_pretrained(sys.argv[1]);"
        "p('a red mug', num_inference_steps=2).images[0].save(sys.argv[2])"
    )
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program, str(pipeline[0]), str(tmp_path / "mug.png")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "mug.png").is_file()


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


def test_latents_are_scaled_to_unit_variance(trained):
    teacher = load_teacher(trained, cache=trained.parent / "cache")
    assert teacher.codec is not None
    kept = next(iter(load_file(trained.parent / "latents.safetensors").values()))
    assert float(kept.std()) == pytest.approx(1, abs=1e-3)


def test_the_same_command_finds_its_stages_done(trained, capsys):
    before = weights(trained)
    again = train_toyworld.main(train_toyworld.Config(out=trained.parent, **SMALL))
    assert capsys.readouterr().out.count("resumed from step 2") == 2
    after = weights(again)
    assert all(torch.equal(before[part][name], after[part][name]) for part in before for name in before[part])


def test_from_nothing_it_learns_the_same_again(trained, tmp_path):
    again, before = weights(train_toyworld.main(train_toyworld.Config(out=tmp_path, **SMALL))), weights(trained)
    assert all(torch.equal(before[part][name], again[part][name]) for part in before for name in before[part])
