"""train_dmd.py with text-to-image teachers: what it writes, resumes, caches and refuses."""

import gc
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import tiny_pipelines as tiny
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from folders import assert_same, captioned, edit, tensors
from PIL import Image
from refusals import refused
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import CLIPTextModel

import distill.options as distill_options
import distill.parts as parts
import distill.recipe as train_dmd
import distill.stages as stages
import distill.text_recipe as text_recipe
import scorefield.cli as cli
import scorefield.commands.sample as sample
import toyworld
import toyworld.students as evaluate_students
from distill.export import export_student, read_student_facts
from distill.options import Config
from distill.student import Student
from scorefield.atomic import MARKER
from scorefield.commands.options import Sample
from scorefield.models import teacher as teachers
from scorefield.models.codec import Codec
from scorefield.models.lora import shared_backbone
from scorefield.randomness import derived_generator
from scorefield.training.latents import Memory
from scorefield.training.run import start
from toyworld.options import EvaluateStudents

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "steps": 4, "batch_size": 4, "student_every": 2, "save_every": 2, "log_every": 1, "warmup_steps": 2,
    "num_pairs": 4, "pair_steps": 2, "guidance": 3.0, "regression_weight": 0.0, "guard_images": 0,
    "fake_warmup": 0, "student_lr": 1e-4, "fake_lr": 1e-4, "warmup_lr": 1e-3, "skip_teacher_check": True,
}  # fmt: skip
PLAIN = {"gan_weight": 0.0}
PROMPTS = ("a red mug", "a blue chair", "cone", "two mugs", "a sea", "a tree")


@pytest.fixture(scope="module")
def root(tmp_path_factory, sd):
    """Tiny models, prompts with and without images."""
    root = tmp_path_factory.mktemp("texts")
    shutil.copytree(sd, root / "sd")
    tiny.sdxl().save_pretrained(root / "sdxl")
    tiny.sd3(with_t5=False).save_pretrained(root / "sd3")
    tiny.pixels().save_pretrained(root / "pixels")
    (root / "foreign").mkdir()
    (root / "foreign" / "model_index.json").write_text(json.dumps({"_class_name": "KolorsPipeline"}))
    (root / "prompts.txt").write_text("\n".join([*PROMPTS, "", "  "]))
    captioned(root, PROMPTS, (24, 20)).rename(root / "pairs.jsonl")
    return root


def config_of(root, out, **changes):
    prompts = "pairs.jsonl" if changes.get("gan_weight", 0.01) else "prompts.txt"
    own = {"preset": "text", "teacher": str(root / "sd"), "prompts": str(root / prompts), "out": out}
    return Config(**{**own, **TINY, **changes})


KINDS = {
    "full": {}, "four": {"num_steps": 4, "warmup_steps": 0, "gan_weight": 0.0, "student_ratio": 0.0},
    "lora": {"lora": True, "lora_rank": 2, "lora_alpha": 1.0, "gradient_checkpointing": True, "offload": True},
    "no_average": {"ema_decay": 0.0, "gan_weight": 0.0},
    # The default recipe in two steps: a guard, a warm-up on the teacher's paths, rates by that of the warm-up.
    "guarded": {
        "num_steps": 2, "gan_weight": 0.0, "warmup_steps": 4, "regression_weight": 0.25, "guard_images": 64,
        "guard_every": 4, "fake_warmup": 1, "student_lr": 0.0, "fake_lr": 0.0, "batch_size": 16,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """A run of each kind without interruption."""
    folder = tmp_path_factory.mktemp("runs")
    return {kind: train_dmd.main(config_of(root, folder / kind, **changes)) for kind, changes in KINDS.items()}


def test_a_run_writes_what_diffusers_loads(finished):
    for kind, times in (("full", [712]), ("guarded", [711, 355]), ("four", [999, 749, 499, 249])):
        pipe = StableDiffusionPipeline.from_pretrained(finished[kind], local_files_only=True)
        assert isinstance(pipe.scheduler, LCMScheduler)
        pipe.scheduler.set_timesteps(len(times))
        assert pipe.scheduler.timesteps.tolist() == times
        assert read_student_facts(finished[kind])["dmd2_denoising_timesteps"] == times
    names = {path.name for path in finished["lora"].iterdir()}
    assert names == {"pytorch_lora_weights.safetensors", "scheduler", "dmd2.json", "README.md", MARKER}


def test_the_average_is_what_is_exported_and_it_learned(root, finished):
    """Without an average there is no second copy, and the student itself is exported."""
    before = load_file(root / "sd" / "unet" / WEIGHTS)
    for kind, name in (("full", "student.ema"), ("four", "student.ema"), ("no_average", "student")):
        saved = finished[kind].parent / "checkpoints" / "step-000000004"
        kept = {"student", "fake"} | ({"student.ema"} if kind != "no_average" else set())
        assert {path.stem for path in saved.glob("*.safetensors")} == kept
        learned, exported = load_file(saved / f"{name}.safetensors"), load_file(finished[kind] / "unet" / WEIGHTS)
        assert exported.keys() == before.keys()
        assert all(torch.equal(exported[name], learned[f"model.{name}"]) for name in exported)
        assert sum(not torch.equal(exported[name], before[name]) for name in exported) > 0.9 * len(exported)
    average = load_file(finished["lora"].parent / "checkpoints" / "step-000000004" / "student.ema.safetensors")
    exported = load_file(finished["lora"] / "pytorch_lora_weights.safetensors")
    assert len(exported) == len(average)
    name = next(name for name in average if name.endswith("to_q/lora_B/default/weight"))
    place = name.removeprefix("changes.model/").replace("/default/", ".").replace("/", ".")
    assert torch.equal(exported[f"unet.{place}"], average[name] * 0.5)  # alpha 1 of rank 2
    assert average[name].abs().max() > 0
    assert sum(p.numel() for p in average.values()) < 0.5 * sum(x.numel() for x in before.values())


WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_tensorboard_shows_losses_and_the_validation_pictures(finished):
    events = EventAccumulator(str(finished["full"].parent / "logs")).Reload()
    names = set(events.Tags()["scalars"])
    assert {"student/gradient_rms", "student/adversarial", "fake/denoising", "fake/critic_accuracy"} <= names
    (tag,) = events.Tags()["images"]
    assert [event.step for event in events.Images(tag)] == [2, 4]


def test_validation_prompts_are_what_is_drawn(root, tmp_path, monkeypatch):
    """Decoded one by one: an autoencoder's activations are large."""
    shown, sizes, decode = [], [], teachers.Teacher.decode
    monkeypatch.setattr(teachers.Teacher, "decode", lambda self, x0: sizes.append(len(x0)) or decode(self, x0))
    monkeypatch.setattr(stages, "fit", lambda *args, **options: shown.append(options["preview"]()))
    train_dmd.main(config_of(root, tmp_path / "run", validation_prompts=("x", "y", "a red mug"), warmup_steps=0))
    assert shown[0].shape == (3, 3, 16, 16)
    assert sizes == [1, 1, 1]
    teacher = teachers.load_teacher(root / "sd")
    noise = torch.randn(3, *teacher.shape, generator=torch.Generator().manual_seed(0))
    x0 = teacher.denoiser(noise, torch.full((3,), 712.0), teacher.prompts(["x", "y", "a red mug"]))
    torch.testing.assert_close(shown[0], teacher.decode(x0).detach(), rtol=1e-4, atol=1e-4)


def test_sdxl_teaches_a_lora(root, tmp_path):
    changes = {"teacher": str(root / "sdxl"), "lora": True, "lora_rank": 2, "steps": 2}
    assert read_student_facts(train_dmd.main(config_of(root, tmp_path / "run", **changes)))


def test_text_encoders_are_gone_before_the_training(root, tmp_path, monkeypatch):
    """New prompts, so that they were there."""
    (tmp_path / "new.txt").write_text("never seen\nnor this\n")
    alive = []

    def spy(*args, **options):
        gc.collect()
        alive.append(sum(isinstance(thing, CLIPTextModel) for thing in gc.get_objects()))

    monkeypatch.setattr(stages, "fit", spy)
    encoded = count_calls(monkeypatch, "diffusers.StableDiffusionPipeline.encode_prompt")
    config = config_of(root, tmp_path / "run", prompts=str(tmp_path / "new.txt"), gan_weight=0.0, warmup_steps=0)
    gc.collect()
    before = sum(isinstance(thing, CLIPTextModel) for thing in gc.get_objects())
    train_dmd.main(config)
    assert encoded
    assert alive == [before]


@pytest.mark.slow
def test_a_size_of_its_own_is_exported(root, tmp_path):
    """At 24 x 24 in place of 16 x 16; here the rates are measured, without pairs."""
    changes = {"size": 24, "steps": 2, "warmup_steps": 0, "accumulate": 3, **PLAIN}
    changes |= {"student_lr": 0.0, "fake_lr": 0.0, "warmup_lr": 0.0}
    out = train_dmd.main(config_of(root, tmp_path / "run", **changes))
    facts = read_student_facts(out)
    assert (facts["dmd2_height"], facts["dmd2_width"]) == (24, 24)
    assert json.loads((out / "unet" / "config.json").read_text())["sample_size"] == 12
    assert teachers.load_teacher(out, few_steps=True).size == (24, 24)
    assert "2 iterations of batch 12, 1 updates" in (out / "README.md").read_text()


# Prompts and caches.


def test_what_was_encoded_is_read_from_the_disk_and_gives_the_same_student(root, finished, tmp_path, monkeypatch):
    """Prompts and latents one by one where they do not fit into memory; what is drawn changes nothing."""

    def refuse(*args, **options):
        raise AssertionError("encoded, or decoded, again")

    monkeypatch.setattr("scorefield.models.codec.Codec.encode", refuse)
    monkeypatch.setattr("diffusers.StableDiffusionPipeline.encode_prompt", refuse)
    monkeypatch.setattr("distill.data.read_central", refuse)
    monkeypatch.setattr("scorefield.models.teacher.IN_MEMORY", 0)
    monkeypatch.setattr("distill.data.Memory", lambda: Memory(0))
    shown = {"validation_prompts": ("a red mug", "cone")}
    stored = train_dmd.main(config_of(root, tmp_path / "run", **shown))
    assert_same(tensors(stored), tensors(finished["full"]))


def test_training_begins_before_all_latents_are_made(root, tmp_path, monkeypatch):
    """A picture is encoded when it is first drawn, and once: six of them, four to a batch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    events, encode, drawn = [], Codec.encode, text_recipe.shuffled
    monkeypatch.setattr(Codec, "encode", lambda self, x: events.append(["encoded"] * len(x)) or encode(self, x))
    monkeypatch.setattr(text_recipe, "shuffled", lambda *how: events.append(["drawn"]) or drawn(*how))
    train_dmd.main(config_of(root, tmp_path / "run", seed=3))
    said = [event for some in events for event in some]
    assert said.count("encoded") == 6
    assert said[:5] == ["drawn", *["encoded"] * 4]
    assert said.index("drawn", 5) < len(said) - 1 - said[::-1].index("encoded"), "the others while it trained"


def test_long_prompts_are_skipped_or_cut_if_asked(root, tmp_path, capsys, make_accelerator):
    path = tmp_path / "long.txt"
    path.write_text("a mug\n" + "far too long for this\n" + "cone\n")
    config = config_of(root, tmp_path / "run", prompts=str(path), steps=2, warmup_steps=0, **PLAIN)
    with refused(r"1 of 3 prompts .* are longer .* 'far too long for this' by \d+ tokens"):
        train_dmd.main(config)
    assert not (tmp_path / "run").exists()
    train_dmd.main(replace(config, long_prompts="skip"))
    assert capsys.readouterr().err.count("by 3 tokens: skipped") == 1
    load = text_recipe.load_inputs
    kept = load(replace(config, long_prompts="cut", out=tmp_path / "cut"), make_accelerator())
    assert kept.teacher.num_classes == len(kept.texts.prompts) == 3
    path.write_text("far too long for this\n")
    with refused("none is left"):
        train_dmd.main(replace(config, long_prompts="skip"))


# Resuming.


def options_of(config):
    """A command line that means a config; what it does not say is the preset's."""
    for name, usual in vars(distill_options.text()).items():
        flag, value = name.replace("_", "-"), getattr(config, name)
        if value != usual:
            yield from (
                (f"--{'' if value else 'no-'}{flag}",)
                if isinstance(value, bool)
                else (f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,)))
            )


def test_a_process_is_told_the_same_config(root, tmp_path, monkeypatch):
    """So that what is compared below is one run in two ways."""
    config, seen = config_of(root, tmp_path / "run", lora=True, lora_rank=2), []
    words = list(options_of(config))
    monkeypatch.setattr("distill.recipe.main", seen.append)
    cli.main(["distill", *words])
    assert seen == [config]


NOTING = """
import json, os, sys
from distill import text_recipe
from scorefield.cli import main
from scorefield.randomness import derived_generator
from scorefield.training.run import start

shuffled = text_recipe.shuffled

def noted(*args):
    chosen = shuffled(*args)
    with open(__file__ + os.environ["RANK"], "a") as file:
        print(json.dumps(chosen.tolist()), file=file)
    return chosen

text_recipe.shuffled = noted
main(["distill", *sys.argv[1:]])
"""
"""The script, noting beside itself which prompts each rank is handed."""


class Run:
    """The script, or another program, as a process of its own, on one or two ranks."""

    def __init__(self, config, ranks=1, program=ROOT / "train_scripts" / "train_dmd.py"):
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        self.command = [*launcher, str(program), *options_of(config)]
        self.log = config.out.with_suffix(".log")
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "TQDM_DISABLE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "train_scripts"))),
        }  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def kill(self):
        processes = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for process in processes:
            process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=60)


def killed_after_its_first_checkpoint(run, config):
    """The newest checkpoint's step."""
    deadline = time.monotonic() + 240
    while not any(config.out.glob("checkpoints/step-00000000[1-9]")):  # that of step 0 is written before the first
        assert run.process.poll() is None, run.log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    run.kill()
    return max(int(path.name[5:]) for path in config.out.glob("checkpoints/step-*"))


def count_calls(monkeypatch, name):
    """Replace a function by itself and a note of each call."""
    module, _, attribute = name.rpartition(".")
    owner = pkgutil.resolve_name(module)
    function, calls = getattr(owner, attribute), []

    def noted(*args, **options):
        calls.append(1)  # arguments would keep what they hold
        return function(*args, **options)

    monkeypatch.setattr(owner, attribute, noted)
    return calls


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_student(root, finished, tmp_path, capsys):
    config = config_of(root, tmp_path / "cut")
    newest = killed_after_its_first_checkpoint(Run(config), config)
    capsys.readouterr()
    student = train_dmd.main(config)
    assert f"resumed from step {newest}" in capsys.readouterr().out
    assert_same(tensors(student), tensors(finished["full"]))


def test_a_run_resumes_from_its_checkpoint_after_its_warm_up(root, finished, tmp_path, monkeypatch, capsys):
    class StopError(Exception):
        pass

    config = config_of(root, tmp_path / "cut", **KINDS["guarded"])
    fit = stages.fit

    def stopping(config, *args, **options):
        def check(step, saving):
            if step == 3:
                raise StopError

        fit(config, *args, **options, check=check)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "fit", stopping)
        with pytest.raises(StopError):
            train_dmd.main(config)
    student = train_dmd.main(config)
    printed = capsys.readouterr()
    assert printed.out.count("resumed from step 2") == 1
    assert "learning rates: " in printed.err, "it was in its warm-up"
    assert_same(tensors(student), tensors(finished["guarded"]))


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False])
def test_two_ranks_learn_one_student_and_resume_it(root, tmp_path, lora):
    """With GAN term and warm-up. That gradients are averaged is asked in test_backbone and test_training; here,
    that each rank is handed prompts of its own."""
    changes = {"lora": True, "lora_rank": 2} if lora else {}
    whole, cut = (config_of(root, tmp_path / name, **changes) for name in ("whole", "cut"))
    program = tmp_path / "noting.py"
    program.write_text(NOTING)
    run = Run(whole, ranks=2, program=program)
    assert run.process.wait(timeout=300) == 0, run.log.read_text()
    assert run.log.read_text().count("student: ") == 1
    assert "iterations of batch 8, " in (whole.out / "student" / "README.md").read_text()
    notes = [Path(f"{program}{rank}").read_text().splitlines() for rank in (0, 1)]
    handed = [[json.loads(line) for line in lines[1:]] for lines in notes]  # the first is the check's
    assert [len(steps) for steps in handed] == [whole.steps] * 2
    in_turn = torch.tensor(handed).transpose(0, 1).flatten()
    epochs = in_turn[: len(in_turn) // len(PROMPTS) * len(PROMPTS)].view(-1, len(PROMPTS))
    assert (epochs.sort(1).values == torch.arange(len(PROMPTS))).all(), "each rank has prompts of its own"
    killed_after_its_first_checkpoint(Run(cut, ranks=2), cut)
    run = Run(cut, ranks=2)
    assert run.process.wait(timeout=300) == 0, run.log.read_text()
    assert "resumed from step " in run.log.read_text()
    assert_same(tensors(cut.out / "student"), tensors(whole.out / "student"))


def test_other_prompts_and_weights_that_mean_something_else_are_another_run(root, finished, tmp_path):
    shutil.copytree(root, tmp_path / "root")
    other = tmp_path / "root" / "pairs.jsonl"
    other.write_text(other.read_text().replace("a red mug", "a red cup"))
    with refused(r"belongs to another config .*prompts"):
        train_dmd.main(config_of(root, finished["full"].parent, prompts=str(other)))
    sd, schedule = tmp_path / "root" / "sd", "scheduler/scheduler_config.json"
    for file, change in ((schedule, {"prediction_type": "v_prediction"}), (schedule, {"beta_end": 0.02}),
                         ("unet/config.json", {"sample_size": 12})):  # fmt: skip
        edit(sd / file, **change)
        with refused(r"belongs to another config \(teacher: "):
            train_dmd.main(config_of(root, finished["four"].parent, **KINDS["four"], teacher=str(sd)))
        shutil.copy(root / "sd" / file, sd / file)


# Refusals.


@pytest.mark.parametrize(("changes", "message"), [
    ({"prompts": "{root}/gone.txt"}, "no such file"),
    ({"prompts": "{root}/prompts.txt", "gan_weight": 0.01}, "holds no images, which the GAN term needs"),
    ({"teacher": "{root}/foreign"}, "unsupported pipeline class 'KolorsPipeline'; expected one of"),
    ({"teacher": "{root}/pixels"}, "takes no prompts"), ({"teacher": "nowhere/at/all"}, "nowhere/at/all"),
    ({"teacher": "{student}"}, "is a student"),
    ({"lora": True, "lora_rank": 0}, "--lora-rank must be above 0; got 0"),
    ({"lora": True, "lora_alpha": -1.0}, "--lora-alpha must be at least 0"),
    ({"times": (399.5,)}, "no LCMScheduler asks at the times 399.5 in 1 step"),
    ({"times": (1200.0,)}, r"times must lie in \["), ({"times": (999.0, 499.0)}, "--times must be --num-steps 1"),
    ({"num_steps": 1001, "warmup_steps": 0}, "takes 1 to 713 steps; got 1001"),
    ({"num_steps": 1001, "warmup_steps": 0, "student_ratio": 0.0}, "takes 1 to 1000 steps; got 1001"),
    ({"num_steps": 600, "warmup_steps": 0}, "at its last time 0 an LCMScheduler returns 1 x_t"),
    ({"num_prompts": -1}, "--num-prompts must be at least 0"),
    ({"bottleneck": "nowhere"}, "--bottleneck nowhere"), ({"size": 15}, "multiples of"),
    ({"eval_every": 2}, r"sees pictures of \(64, 64\); .* draws \(16, 16\)"),
    ({"num_prompts": 7}, "holds 6 prompts; got --num-prompts 7"),
])  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(root, finished, tmp_path, changes, message):
    places = {"{root}": str(root), "{student}": str(finished["full"])}
    for place, path in places.items():
        changes = {k: v.replace(place, path) if isinstance(v, str) else v for k, v in changes.items()}
    with refused(message):
        train_dmd.main(replace(config_of(root, tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()


def test_a_bottleneck_that_no_critic_reads_is_refused_before_the_prompts_are_encoded(root, tmp_path, monkeypatch):
    monkeypatch.delattr("scorefield.models.prompts.PromptEncoder.num_cut")
    tokens = "model.down_blocks.0.attentions.0.transformer_blocks.0"
    config = config_of(root, tmp_path / "run", gan_weight=0.01, bottleneck=tokens)
    with refused(r"activations \(b, c\) or \(b, c, h, w\); those of .* are \(1, \d+, \d+\). Pass --gan-weight 0"):
        train_dmd.main(config)


def test_prompts_are_read_before_the_teacher(root, tmp_path, monkeypatch):
    monkeypatch.delattr("distill.text_recipe.load_source")
    with refused("no such file"):
        train_dmd.main(config_of(root, tmp_path / "run", prompts=str(root / "gone.txt")))


def test_bad_pictures_of_prompts_are_met_before_anything_is_encoded(root, tmp_path, monkeypatch, capsys):
    lines = [json.loads(line) for line in (root / "pairs.jsonl").read_text().splitlines()]
    rows = [{**row, "file_name": str(root / row["file_name"])} for row in lines]
    rows[2]["file_name"] = str(tmp_path / "gone.png")
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    config = config_of(root, tmp_path / "run", prompts=str(tmp_path / "pairs.jsonl"))
    with monkeypatch.context() as patch:
        patch.delattr("scorefield.models.prompts.PromptEncoder.encode")
        for dry in (True, False):
            with refused(r"1 of 6 samples of .*gone\.png cannot be read"):
                train_dmd.main(replace(config, dry_run=dry))
    inputs = text_recipe.load_inputs(replace(config, on_bad_data="skip"), start(config))
    assert inputs.texts.prompts == tuple(prompt for prompt in PROMPTS if prompt != "cone")
    assert len(inputs.latents.digests) == inputs.teacher.num_classes == 5
    assert "left out 1 of 6 samples" in capsys.readouterr().err


def test_all_is_checked_before_pairs_are_made(root, tmp_path, monkeypatch):
    checked = count_calls(monkeypatch, "distill.dmd.DMD.check")
    make_pairs, before = parts.make_pairs, []

    def noted(*args, **options):
        before.append(len(checked))
        return make_pairs(*args, **options)

    monkeypatch.setattr(parts, "make_pairs", noted)
    train_dmd.main(config_of(root, tmp_path / "run", steps=2, regression_weight=0.1, seed=5))
    assert before == [1]  # the warm-up learns from the same


def test_the_autoencoder_of_a_teacher_in_half_precision_is_not(root, monkeypatch):
    """Real images are encoded once; a GPU that is not there is only named."""
    load = teachers.load_teacher
    monkeypatch.setattr(
        "distill.text_recipe.load_teacher", lambda *args, **options: load(*args, **{**options, "device": "cpu"})
    )
    config = replace(distill_options.text(), teacher=str(root / "sd"), precision="bf16")
    source = text_recipe.load_source(config, torch.device("cuda"))
    assert next(source.denoiser.network.parameters()).dtype == torch.bfloat16
    assert next(source.codec.vae.parameters()).dtype == torch.float32


def test_prompts_without_images_need_no_option_more(root, make_accelerator):
    found = replace(
        distill_options.text(),
        teacher=str(root / "sd"),
        prompts=str(root / "prompts.txt"),
        skip_teacher_check=True,
    )
    inputs = text_recipe.load_inputs(found, make_accelerator())
    assert inputs.teacher.num_classes == 6
    assert (inputs.config.gan_weight, inputs.latents) == (0.0, None)


def test_pictures_that_nothing_reads_are_counted(root, tmp_path, capsys):
    """Of a folder of captioned pictures a run without the GAN term reads the captions alone."""
    train_dmd.main(replace(config_of(root, tmp_path / "run", gan_weight=0.01, dry_run=True), gan_weight=0.0))
    assert f"passed over: {len(PROMPTS)} pictures beside the prompts" in capsys.readouterr().err
    train_dmd.main(config_of(root, tmp_path / "run", gan_weight=0.01, dry_run=True))
    train_dmd.main(config_of(root, tmp_path / "run", gan_weight=0.0, dry_run=True))
    assert "passed over" not in capsys.readouterr().err


def test_dry_run_shows_that_a_lora_shares_the_teacher(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for changes in ({}, {"lora": True, "lora_rank": 1}):
        train_dmd.main(config_of(root, tmp_path / "run", dry_run=True, gan_weight=0.01, **changes))
    assert not (tmp_path / "cache").exists()
    said = capsys.readouterr().out.split('"preset"')
    size = sum(p.numel() for p in teachers.load_teacher(root / "sd").denoiser.network.parameters())
    assert (
        f"student: {size:,} parameters, {4 * size:,} bytes of weights, {12 * size:,} bytes of gradients" in said[1]
    )
    learned = [
        int(line.split()[1].replace(",", "")) for line in said[2].splitlines() if line.startswith("student:")
    ]
    assert 0 < learned[0] < size / 2
    for words in ("update of the student: ", "update of the fake score: ", "decoding a picture: "):
        assert said[1].count(f"activations, {words}") == said[2].count(f"activations, {words}") == 1
    assert "at most on each process" in said[1]
    assert not (tmp_path / "run").exists()


# What reads the result.


def test_sample_draws_a_student_at_its_own_times_and_no_lora_alone(finished, tmp_path):
    config = Sample(teacher=str(finished["four"]), prompts=PROMPTS[:2], num_images=2, out=tmp_path / "a.npz")
    images = np.load(sample.main(config))["images"]
    teacher = teachers.load_teacher(finished["four"], few_steps=True)
    pipe = StableDiffusionPipeline.from_pretrained(finished["four"], local_files_only=True)
    generators = [derived_generator(0, "sample", number) for number in range(2)]
    noise = torch.stack([torch.randn(teacher.shape, generator=generator) for generator in generators])
    asked = {"num_inference_steps": 4, "guidance_scale": 1, "output_type": "np"}
    expected = pipe(list(PROMPTS[:2]), latents=noise, generator=generators, **asked).images
    assert np.abs(images - (255 * expected).round().transpose(0, 3, 1, 2)).max() <= 2
    with refused("--guidance must be 1 here, since a student has it built in"):
        sample.main(replace(config, guidance=2.0))
    with refused("is a LoRA, which needs its teacher: load it in diffusers"):
        sample.main(replace(config, teacher=str(finished["lora"])))


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """Of the toy world's pipeline, since the judge sees 64 x 64 pixels: a trained one, and a LoRA as it begins."""
    root = tmp_path_factory.mktemp("students")
    patch = pytest.MonkeyPatch()
    patch.setattr("toyworld.bench.NUM_RENDERS", 20)
    settings = {**TINY, **PLAIN, "teacher": "toyworld", "prompts": "toyworld", "num_prompts": 8, "warmup_steps": 0}
    watched = {"steps": 2, "eval_every": 2, "eval_images": 4}
    full = train_dmd.main(Config(preset="text", out=root / "full", **{**settings, **watched}))
    patch.undo()
    teacher = teachers.load_teacher(toyworld.pipeline_folder())
    adapted = shared_backbone(teacher.denoiser, rank=2, generator=torch.Generator().manual_seed(0))[0]
    for parameter in adapted.network.parameters():
        parameter.data += 0.05
    return full, export_student(Student(adapted, (999.0,)), toyworld.pipeline_folder(), root / "lora")


def test_a_judge_that_cannot_start_is_met_before_anything_is_written(tmp_path, monkeypatch):
    """What he asks for is encoded by the text encoders, loaded as the teacher was."""
    settings = {**TINY, **PLAIN, "teacher": "toyworld", "prompts": "toyworld", "num_prompts": 2, "eval_every": 2}
    config = Config(preset="text", out=tmp_path / "run", **settings, allow_pickle=True)
    monkeypatch.setattr("toyworld.bench.NUM_RENDERS", 2)
    loaded, load = [], teachers.load_teacher

    def noted(*args, **options):
        loaded.append(options.get("allow_pickle"))
        if len(loaded) == 2:
            raise ValueError("no memory left")
        return load(*args, **options)

    for module in ("distill.text_recipe", "toyworld.bench"):
        monkeypatch.setattr(f"{module}.load_teacher", noted)
    with refused("no memory left"):
        train_dmd.main(config)
    assert loaded == [True, True]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_students_are_measured_beside_their_teacher(students, tmp_path):
    events = EventAccumulator(str(students[0].parent / "logs")).Reload()
    assert {"eval/frechet_distance", "eval/shape"} <= set(events.Tags()["scalars"])
    config = EvaluateStudents(
        students=students, out=tmp_path / "figures", num_prompts=4, num_renders=20, steps=2, device="cpu"
    )
    figures = json.loads((evaluate_students.main(config) / "figures.json").read_text())
    assert figures["teacher"]["frechet_distance"] > 0
    for folder in students:
        own = figures[str(folder)]
        assert own["frechet_ratio"] == own["frechet_distance"] / figures["teacher"]["frechet_distance"]
    assert figures[str(students[0])]["frechet_distance"] != figures[str(students[1])]["frechet_distance"]
    with Image.open(tmp_path / "figures" / "contact_sheet.png") as sheet:
        assert sheet.size[1] >= 3 * 64
    with refused(r"is not a folder that .*distill.* wrote"):
        evaluate_students.main(replace(config, students=(tmp_path,)))
