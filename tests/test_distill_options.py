"""Options and presets of train_dmd.py, and the parts that are built of them."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import command
import distill_options
import pytest
import roles
import torch
from distill_options import PRESETS, Config, presets_for
from prompted import PromptedTeacher

from distill.dmd import DMD
from distill.student import Student
from score.denoiser import NetworkDenoiser
from score.schedule import RectifiedFlow


def parsed(monkeypatch, *arguments):
    """The config of a command line."""
    seen = []
    monkeypatch.setattr(sys, "argv", ["train_dmd.py", *arguments])
    command.run(seen.append, Config, "", presets=presets_for(arguments))
    return seen[0]


def test_a_preset_is_where_values_come_from_and_flags_override_it(monkeypatch):
    found = parsed(monkeypatch, "--preset", "sdxl-4step-lora", "--prompts", "x", "--steps", "9")
    assert found == replace(distill_options.sdxl_4step_lora(), prompts="x", steps=9)
    assert parsed(monkeypatch) == Config()
    assert all(PRESETS[name]().preset == name for name in PRESETS)


def test_prompts_have_numbers_of_their_own(monkeypatch):
    found = parsed(monkeypatch, "--teacher", "x", "--prompts", "y")
    assert found == replace(distill_options.text(), teacher="x", prompts="y")
    assert parsed(monkeypatch, "--teacher", "x", "--prompts=y") == found
    assert (found.student_lr, found.gan_weight, found.warmup_steps) == (1e-5, 0.0, 0)
    assert found.guidance > 1
    distill_options.check(found)


def test_every_preset_passes_its_own_checks():
    for name, preset in PRESETS.items():
        config = preset()
        distill_options.check(config if config.prompts or name == "digits" else replace(config, prompts="x"))


@pytest.mark.parametrize(("changes", "message"), [
    ({"preset": "digits"}, "--preset digits has numbers for small images"),
    ({"preset": "sd15-1step", "prompts": ""}, "--preset sd15-1step is for .*: pass --prompts"),
    ({"preset": "digits", "prompts": "", "lora": True}, "--lora is for text-to-image teachers"),
    ({"preset": "digits", "prompts": "", "long_prompts": "cut"}, "--long-prompts is for text-to-image"),
    ({"preset": "digits", "prompts": "", "lora_rank": 3}, "--lora-rank is for text-to-image"),
    ({"data": "nowhere"}, "--data is for teachers of images"),
    ({"flip": True}, "--flip is for teachers of images"),
    ({"resolution": 7}, "--resolution is for"), ({"features": Path("gone")}, "--features is for"),
    ({"lora_rank": 3}, "--lora-rank is for LoRAs"), ({"lora_alpha": 3.0}, "--lora-alpha is for LoRAs"),
    ({"negative": "dull", "guidance": 1.0}, "--negative is what guidance moves away from"),
    ({"gan_weight": 0.1, "critic_weight": 0.0}, "--critic-weight 0 trains no critic"),
    ({"eval_every": -1}, "--eval-every must be at least 0"), ({"betas": (0.9, 1.0)}, "--betas must lie"),
    ({"eval_every": 2, "eval_images": 1}, "--eval-images must be at least 2"),
    ({"validation_prompts": ("a", " ")}, "--validation-prompts must say something"),
    ({"lora": True, "compile": True}, "--compile is not for --lora"),
])  # fmt: skip
def test_options_that_contradict_are_refused_before_anything_is_read(tmp_path, changes, message):
    config = Config(**{"preset": "text", "prompts": "x", "out": tmp_path, "warmup_steps": 0, **changes})
    with pytest.raises(ValueError, match=message):
        distill_options.check(config)


def test_conditions_of_pairs_are_fetched_in_parts(monkeypatch):
    """A teacher of many prompts puts what it is asked for on the GPU."""
    sizes = []

    class Many:
        num_classes, shape = 700, (2,)
        denoiser = NetworkDenoiser(torch.nn.Linear(2, 2), RectifiedFlow(), "flow")

        def cond(self, labels):
            sizes.append(len(labels))
            return {"embeds": labels.float()[:, None]}

    monkeypatch.setattr(roles, "make_pairs", lambda target, cond, **options: cond)
    found = roles.teacher_pairs(Config(num_pairs=800), Many.denoiser, Many()).pairs["embeds"]
    assert max(sizes) <= 250
    assert torch.equal(found[:, 0], torch.arange(800.0) % 700)


@pytest.mark.parametrize(("batch_size", "wanted"), [(2, 16), (32, 256), (512, 256)])
def test_pairs_are_made_in_batches_that_fit_where_the_training_does(monkeypatch, batch_size, wanted):
    seen = []
    teacher = SimpleNamespace(
        num_classes=2, shape=(2,), cond=lambda labels: {"embeds": labels.float()[:, None]},
        denoiser=NetworkDenoiser(torch.nn.Linear(2, 2), RectifiedFlow(), "flow"),
    )  # fmt: skip
    monkeypatch.setattr(roles, "make_pairs", lambda *args, **options: seen.append(options["batch"]))
    roles.teacher_pairs(Config(batch_size=batch_size), teacher.denoiser, teacher)
    assert seen == [wanted]


def test_only_the_conditions_of_a_batch_go_to_the_teachers_device():
    source = SimpleNamespace(device=torch.device("meta"))
    teacher = PromptedTeacher(source, {"embeds": torch.zeros(5, 3)}, None, 5)
    found = teacher.cond(torch.tensor([4, 1]))["embeds"]
    assert (found.device.type, found.shape) == ("meta", (2, 3))


@pytest.mark.parametrize(("schedule", "last"), [("cosine", (0.0, 0.1)), ("constant", (1.0, 1.0))])
def test_the_learning_rates_fall_or_stay(schedule, last):
    denoiser = NetworkDenoiser(torch.nn.Linear(2, 2), RectifiedFlow(), "flow")
    config = Config(steps=400, student_every=2, lr_schedule=schedule, betas=(0.9, 0.999), student_lr=1e-5)
    method = DMD(teacher=denoiser, student=Student(denoiser, (1.0,)), fake=denoiser, shape=(2,), student_every=2)
    student, fake = roles.build_phases(config, method)
    for phase, end, updates in ((student, last[0], 200), (fake, last[1], 400)):
        assert phase.optimizer.param_groups[0]["betas"] == (0.9, 0.999)
        factor = phase.lr_schedule.lr_lambdas[0]
        assert factor(updates) == pytest.approx(end)
        assert factor(0) < 0.1
