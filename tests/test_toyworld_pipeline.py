"""The pipeline that ships: stock diffusers loads it, and it draws what it is asked."""

import os
import subprocess
import sys
from configparser import ConfigParser
from glob import glob
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from scorefield.metrics import extract_features, frechet_distance
from scorefield.models.teacher import load_teacher
from toyworld import pipeline_folder
from toyworld.captions import Attributes, caption
from toyworld.data import HELD_OUT
from toyworld.judge import accuracies, as_pictures, load_judge, render_pictures
from toyworld.parts import without_spread

GUIDANCE = 3.0  # as its README says

DRAW = """
import json, sys
import numpy as np, torch
from diffusers import StableDiffusionPipeline
folder, prompts, out, steps, guidance = sys.argv[1:]
prompts = json.loads(prompts) if prompts.startswith("[") else open(prompts).read().splitlines()
pipeline = StableDiffusionPipeline.from_pretrained(folder)
pipeline.set_progress_bar_config(disable=True)
pictures = []
for start in range(0, len(prompts), 50):
    part = prompts[start : start + 50]
    generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
    pictures += pipeline(
        part, num_inference_steps=int(steps), guidance_scale=float(guidance), generator=generators
    ).images
assert not any(name.split(".")[0] in ("scorefield", "toyworld", "distill") for name in sys.modules)
np.savez(out, images=np.stack([np.asarray(picture) for picture in pictures]))
"""


def drawn_by_diffusers(prompts, folder, steps=50, guidance=GUIDANCE):
    """Pictures in [-1, 1] by a process that knows diffusers and nothing of this project."""
    (folder / "prompts.txt").write_text("\n".join(prompts))
    out = folder / "pictures.npz"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [
        sys.executable, "-c", DRAW, str(pipeline_folder()), str(folder / "prompts.txt"), str(out), str(steps),
        str(guidance),
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=folder, env=environment)
    return as_pictures(torch.from_numpy(np.load(out)["images"]).permute(0, 3, 1, 2))


def test_the_folder_is_small_safe_and_described():
    folder = pipeline_folder()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert {path.suffix for path in files} <= {".json", ".txt", ".md", ".safetensors"}
    card = (folder / "README.md").read_text()
    for word in ("train_toyworld.py", "seed", "hours", "guidance", "Fréchet"):
        assert word in card, word
    assert f"guidance {GUIDANCE:g}" in card


def test_what_training_scripts_sample_of_an_image_is_its_mean():
    """Stock scripts learn from samples of the posterior; the UNet was trained on the means."""
    vae = AutoencoderKL.from_pretrained(pipeline_folder() / "vae")
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    drawn = posterior.sample(torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn, posterior.mode(), rtol=0, atol=1e-5)
    assert posterior.mode().std() > 0.3
    free = AutoencoderKL(latent_channels=4, norm_num_groups=1, block_out_channels=(8,)).eval()
    pixels = images[..., :8, :8]
    with torch.no_grad():
        mean = free.encode(pixels).latent_dist.mode()
        told = without_spread(free).encode(pixels).latent_dist
    assert told.mode().equal(mean)
    assert told.std.max() < 1e-6


@pytest.mark.slow
def test_stock_diffusers_draws_what_it_is_asked(tmp_path):
    asked = [
        Attributes("cone", "green", "white", "side"), Attributes("torus", "yellow", "black", "front"),
        Attributes("mug", "red", "white", "side"), Attributes("cube", "orange", "white", "front"),
    ]  # fmt: skip
    pictures = drawn_by_diffusers([caption(one) for one in asked], tmp_path, steps=20)
    right = accuracies(load_judge(), pictures, asked)
    assert pictures.shape == (4, 3, 64, 64)
    assert right["shape"] >= 0.75
    assert right["colour"] >= 0.75


@pytest.mark.slow
def test_its_autoencoder_keeps_what_the_judge_looks_at(tmp_path):
    teacher = load_teacher(pipeline_folder(), cache=tmp_path)
    images, attributes = render_pictures(range(HELD_OUT, HELD_OUT + 100), seed=5)
    pictures = as_pictures(images)
    with torch.no_grad():
        latents = teacher.encode(pictures)
        decoded = teacher.decode(latents).clamp(-1, 1)
    assert float(latents.std()) == pytest.approx(1, abs=0.1)
    assert float(10 * (4 / (decoded - pictures).square().mean()).log10()) >= 28
    right = accuracies(load_judge(), decoded, attributes)
    assert min(right["shape"], right["colour"]) >= 0.97


@pytest.mark.slow
def test_500_prompts(tmp_path):
    judge = load_judge()
    images, attributes = render_pictures(range(HELD_OUT, HELD_OUT + 500), seed=0)
    pictures = drawn_by_diffusers([caption(one) for one in attributes], tmp_path)
    own, right = accuracies(judge, as_pictures(images), attributes), accuracies(judge, pictures, attributes)
    share = {question: right[question] / own[question] for question in own}
    reference, others = (
        extract_features(judge.features, as_pictures(render_pictures(range(start, start + 2000), seed=0)[0]))
        for start in (2 * HELD_OUT, 3 * HELD_OUT)
    )
    distance = frechet_distance(extract_features(judge.features, pictures), reference)
    print(share, {"frechet": distance, "floor": frechet_distance(others[:500], reference)})
    assert share["shape"] >= 0.90
    assert share["colour"] >= 0.95
    assert share["view"] >= 0.80


def test_the_folder_is_in_the_wheel():
    root = Path(__file__).parents[1] / "toyworld"
    settings = ConfigParser()
    settings.read(root.parent / "setup.cfg")
    patterns = settings["options.package_data"]["toyworld"].split()
    packed = {path for pattern in patterns for path in glob(pattern, root_dir=root, recursive=True)}
    needed = {path.relative_to(root).as_posix() for path in pipeline_folder().rglob("*") if path.is_file()}
    assert "pipeline/model_index.json" in needed
    assert needed <= packed
