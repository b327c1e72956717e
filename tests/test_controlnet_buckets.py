"""``scorefield control --buckets`` for a latent model: shapes, latents made when drawn, resume, ranks."""

import json
import os
from collections import Counter

import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from accelerate.state import AcceleratorState
from diffusers import ControlNetModel
from folders import assert_same, tensors
from PIL import Image
from ranks import run_on_ranks
from refusals import refused

import controlnet.recipe as recipe
import scorefield.cli as cli
from controlnet.options import Config
from scorefield.models.codec import Codec

SIDES = [(40, 40), (36, 60), (60, 36)]
"""Width and height of pictures; at --size 16 they are trained on as 16 x 16, 12 x 20 and 20 x 12."""


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module", params=["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def place(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("buckets")
    getattr(tiny, request.param)().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for number in range(17):
        width, height = SIDES[number % 3]
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "data" / f"{number:02}.png")
        (folder / "data" / f"{number:02}.txt").write_text(f"picture {number % 5}")
    return folder


def settings(place, out, **changes):
    return {
        "teacher": str(place / "model"), "data": str(place / "data"), "hint": "canny", "size": 16, "out": out,
        "steps": 8, "batch_size": 2, "eval_every": 0, "eval_samples": 2, "test_samples": 0, "sampling_steps": 1,
        "guidance": 1.0, "save_every": 2, "cache": place / "cache", "log_every": 1, "long_prompts": "cut",
        "buckets": True, "calibrate": False, **changes,
    }  # fmt: skip


def config_of(place, out, **changes):
    return Config(**settings(place, out, **changes))


def words_of(place, out, **changes):
    flags = {name.replace("_", "-"): value for name, value in settings(place, out, **changes).items()}
    told = {name: [f"--{name}", str(value)] for name, value in flags.items() if not isinstance(value, bool)}
    switches = [f"--{'' if value else 'no-'}{name}" for name, value in flags.items() if isinstance(value, bool)]
    return ["control", *switches, *(word for words in told.values() for word in words)]


def noting(monkeypatch, note, most=100):
    """Call ``note`` with the batch number and what each loss sees, until ``most`` losses were computed."""
    real = recipe.control_phase
    count = [0]

    def watched(*arguments, **options):
        phase = real(*arguments, **options)
        loss = phase.loss

        def noted(batch, rng):
            if count[0] == most:
                raise KeyboardInterrupt
            count[0] += 1
            note(rng.index, batch)
            return loss(batch, rng)

        object.__setattr__(phase, "loss", noted)
        return phase

    monkeypatch.setattr(recipe, "control_phase", watched)


def numbers(batch):
    cond = batch["cond"]
    return [list(batch["x0"].shape[2:]), *(float(x.double().sum()) for x in (batch["x0"], batch["hint"])),
            *(float(value.double().sum()) for _, value in sorted(cond.items()))]  # fmt: skip


def run(words):
    AcceleratorState._reset_state(reset_partial_state=True)
    cli.main(words)


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """A run that nobody disturbed, what its losses saw, and how many latents were kept at each of them."""
    out, seen, kept = tmp_path_factory.mktemp("runs") / "whole", {}, []
    with pytest.MonkeyPatch.context() as patch:

        def note(index, batch):
            seen[index] = numbers(batch)
            kept.append(len(list((place / "cache" / "latents").rglob("*.safetensors"))))

        noting(patch, note)
        run(words_of(place, out))
    return out, seen, kept


def test_batches_have_the_shapes_of_their_pictures_and_the_model_is_told(place, whole):
    out, seen, _ = whole
    shapes = Counter(tuple(shape) for shape, *_ in seen.values())
    assert set(shapes) == {(8, 8), (6, 10), (10, 6)}
    ControlNetModel.from_pretrained(out / "controlnet")
    card = (out / "controlnet" / "README.md").read_text()
    assert "15 samples of 16 x 16 pixels, in buckets of that area" in card


def test_training_begins_before_all_latents_are_made(whole):
    _, seen, kept = whole
    assert kept[0] <= 2 + 2, "those of the first batch, and of the two samples that judge"
    assert len(seen) == 8
    assert kept == sorted(kept)
    assert kept[-1] >= 14, "each of an epoch once"


def test_a_run_of_the_same_pictures_encodes_none_again(place, whole, tmp_path, monkeypatch):
    calls, real = [], Codec.posterior
    monkeypatch.setattr(Codec, "posterior", lambda self, x: calls.append(len(x)) or real(self, x))
    words = words_of(place, tmp_path / "again", learning_rate=3e-4)
    before, seen = whole[1], {}
    noting(monkeypatch, lambda index, batch: seen.setdefault(index, numbers(batch)))
    run(words)
    assert seen == before
    assert sum(calls) <= 2, "of the samples that are reported"


@pytest.mark.parametrize("kill_at", [3, 6])
def test_a_killed_run_sees_the_same_numbers_and_ends_in_the_same_weights(
    place, whole, tmp_path, monkeypatch, kill_at
):
    out, before, _ = whole
    seen = {}

    def note(index, batch):
        assert seen.setdefault(index, numbers(batch)) == numbers(batch)

    with monkeypatch.context() as patch:
        noting(patch, note, most=kill_at)
        with pytest.raises(KeyboardInterrupt):
            recipe.main(config_of(place, tmp_path / "cut"))
    noting(monkeypatch, note)
    run(words_of(place, tmp_path / "cut"))
    assert seen == before
    assert_same(tensors(out / "controlnet"), tensors(tmp_path / "cut" / "controlnet"))


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_on_any_number_of_ranks_the_same_batches_are_drawn(place, whole, tmp_path, monkeypatch, num_ranks):
    noting(monkeypatch, lambda index, batch: log(tmp_path, index, numbers(batch)))
    config = config_of(place, tmp_path / "ranks", steps=8 // num_ranks)
    run_on_ranks(lambda accelerator: bool(recipe.main(config)), tmp_path, num_ranks=num_ranks, timeout=600)
    lines = [line for file in tmp_path.glob("seen-*") for line in file.read_text().splitlines()]
    seen = dict(map(json.loads, lines))
    assert len(lines) == 8
    assert {index: found[0] for index, found in seen.items()} == {i: found[0] for i, found in whole[1].items()}
    for index, found in seen.items():
        assert found[1:] == pytest.approx(whole[1][index][1:], rel=1e-5)


def log(folder, index, found):
    with open(folder / f"seen-{os.getpid()}", "a") as file:
        print(json.dumps([index, found]), file=file)


def test_what_buckets_cannot_do_is_refused(place, tmp_path):
    with refused(r"--buckets needs a square --size, a multiple of 4; got 18 x 18"):
        recipe.main(config_of(place, tmp_path / "a", size=18))
    with refused(r"--buckets is for pictures of several shapes; those of --data circles are square"):
        recipe.main(config_of(place, tmp_path / "b", data="circles"))
    assert not list(tmp_path.iterdir())


def test_sdxl_is_told_the_shape_of_a_batch():
    from scorefield.models.prompts import told_size

    cond = {"time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]]).repeat(2, 1), "x": torch.ones(2, 1)}
    told = told_size(cond, (12, 20))
    assert told["time_ids"].tolist() == [[12, 20, 0, 0, 12, 20]] * 2
    assert told["x"] is cond["x"]
    assert told_size({"x": torch.ones(1)}, (12, 20)) == {"x": torch.ones(1)}
