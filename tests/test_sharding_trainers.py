"""Every trainer of whole networks under --shard: results as of DDP, other numbers of ranks, kills."""

import os
import random
import shutil
import signal
import sys
import threading
from dataclasses import replace
from functools import partial

import pytest
import tiny_transformers
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from folders import assert_same, contents, tensors
from mortal import Clock
from ranks import run_on_ranks
from safetensors.torch import load_file, save_model
from trainers import TRAINERS, Trainer, make_places, texts

import distill.recipe
import scorefield.training.run as running
from scorefield.training.sharding import whole

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("KILLS", "40"))


@pytest.fixture(scope="module")
def places(tmp_path_factory, sd):
    tiny_transformers.sd35().save_pretrained(sd.parent / "sd35")
    return make_places(tmp_path_factory.mktemp("places"), sd)


def run(name, places, out, ranks, before=lambda rank: None, **changes):
    """A trainer on so many ranks."""
    trainer = Trainer(distill.recipe.main, transformer, "student", {}) if name == "transformer" else TRAINERS[name]
    config = replace(trainer.options(places), out=out, report_to=("none",), **changes)
    notes = out.parent / f"{out.name} on {ranks} {random.random()}"
    notes.mkdir()

    def work(accelerator):
        before(accelerator.process_index)
        AcceleratorState._reset_state()  # which knows no precision but its first
        trainer.main(config)

    run_on_ranks(work, notes, num_ranks=ranks, timeout=500)


def transformer(places):
    prompts = {"prompts": str(places.prompts), "gan_weight": 0.0}
    return texts(places, teacher=str(places.sd.parent / "sd35"), **prompts)


@pytest.mark.parametrize(("name", "changes", "tolerance"), [
    ("teacher", {}, 1e-6),
    ("student", {"gan_weight": 0.01}, 1e-6),
    ("texts", {"gradient_checkpointing": True}, 1e-4),  # AdamW takes rounding for a sign at the first step
    ("texts", {"precision": "bf16"}, 2e-2),
    ("transformer", {}, 1e-4),
    ("control", {"eval_every": 3}, 1e-4),
])  # fmt: skip
def test_two_ranks_of_pieces_leave_what_two_ranks_of_whole_networks_do(places, tmp_path, name, changes, tolerance):
    for shard in (1, 2):
        run(name, places, tmp_path / str(shard), 2, shard=shard, **changes)
    expected, pieces = (tensors(tmp_path / shard) for shard in "12")
    assert expected.keys() == pieces.keys()
    assert {path.relative_to(tmp_path / "1") for path in contents(tmp_path / "1")} == {
        path.relative_to(tmp_path / "2") for path in contents(tmp_path / "2")
    }
    worst = max(float((expected[key].double() - pieces[key].double()).abs().max()) for key in expected)
    assert worst < tolerance, worst
    if name == "texts":
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "2" / "student")
        saved = load_file(tmp_path / "2" / "checkpoints" / "step-000000006" / "student.ema.safetensors")
        exported = pipeline.unet.state_dict()
        assert all(torch.equal(saved[f"model.{key}"], value) for key, value in exported.items())


@pytest.mark.parametrize(("ranks", "shard"), [(4, 4), (4, 2)])
def test_what_four_ranks_saved_goes_on_on_two_and_on_one(places, tmp_path, ranks, shard):
    run("student", places, tmp_path / "four", ranks, shard=shard, steps=3)
    saved = tensors(tmp_path / "four" / "checkpoints" / "step-000000003")
    for fewer, pieces in ((2, 2), (2, 1), (1, 1)):
        out = tmp_path / f"{fewer} {pieces}"
        shutil.copytree(tmp_path / "four", out)
        shutil.rmtree(out / "student")
        seen = tmp_path / f"seen {fewer} {pieces}"
        run("student", places, out, fewer, before=partial(note_start, seen=seen), shard=pieces)
        assert (out / "student" / "model.safetensors").is_file()
        assert_same(tensors(seen), {key: x for key, x in saved.items() if "student." in key[0]})


def note_start(rank, seen):
    """Write what the first rank has, whole, when the training begins at step 3."""
    begin = running.train

    def train(phases, *arguments, start=0, **settings):
        if start == 3:
            networks = {name: whole(network) for name, network in phases[0].networks().items()}
            if rank == 0:
                seen.mkdir()
                for name, network in networks.items():
                    save_model(network, str(seen / f"{name}.safetensors"))
        return begin(phases, *arguments, start=start, **settings)

    running.train = train


def dies(rank, how, seed, out):
    """Note where this run begins, and let one rank end without a word: at one of its writes, or at any time."""
    begin, chance = running.train, random.Random(seed)

    def train(phases, *arguments, start=0, **settings):
        if rank == 0:
            with (out.parent / "starts.txt").open("a") as file:
                print(start, file=file)
        return begin(phases, *arguments, start=start, **settings)

    running.train = train
    if how == "writing" and rank == 0:
        sys.addaudithook(Clock(str(out), chance.randint(30, 400)))
    if how == "any time" and rank == 1:
        threading.Timer(chance.uniform(0.5, 6), os.kill, (os.getpid(), signal.SIGKILL)).start()


def test_killed_ranks_of_pieces_end_in_the_same_bytes(places, tmp_path):
    """One rank dies, in the middle of a save or anywhere, and the launcher ends all; until a run gets through."""
    options = {"shard": 2, "save_every": 1}
    run("student", places, tmp_path / "whole", 2, **options)
    expected, chance, kills, lives = tensors(tmp_path / "whole"), random.Random(0), 0, 0
    while kills < KILLS:
        out, alive = tmp_path / f"life {lives}", True
        while alive:
            how, seed = (chance.choice(["writing", "any time"]) if kills < KILLS else "never"), chance.random()
            try:
                run("student", places, out, 2, before=partial(dies, how=how, seed=seed, out=out), **options)
                alive = False
            except AssertionError as end:
                said = str(end)
                kills += 1
                if "Traceback" in said and "onnection" not in said:
                    raise
        found = tensors(out)
        assert_same({key: found[key] for key in expected}, expected)
        shutil.rmtree(out)
        lives += 1
        print(f"{kills} kills in {lives} lives", flush=True)
    starts = (tmp_path / "starts.txt").read_text().split()
    assert len(set(starts)) > 3, "runs went on from where they had been killed"
