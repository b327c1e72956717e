"""What ``--dry-run`` accepts starts, what it refuses has a remedy, and a student is never taken for a teacher."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from accelerate.state import AcceleratorState
from diffusers import FlowMatchLCMScheduler, StableDiffusionPipeline
from folders import edit, pickle_weights
from refusals import refused
from safetensors.torch import load_file, save_file
from trainers import TRAINERS, make_places

import distill.text_recipe as text_recipe
import scorefield.commands.sample as sample
import toyworld.evaluate as evaluate_toyworld
import toyworld.students as evaluate_students
from distill.export import export_pipeline, lcm_times
from distill.student import Student
from scorefield.commands.options import Sample
from scorefield.models.pretrained import read_student_times
from scorefield.models.prompts import PromptEncoder
from scorefield.models.teacher import load_teacher
from toyworld.options import EvaluatePipeline, EvaluateStudents

SCHEDULER = "scheduler/scheduler_config.json"
BRIEF = {"steps": 2, "batch_size": 2, "save_every": 2, "log_every": 1}
TRAINED = ("texts", "canvas", "control")


@pytest.fixture(scope="module")
def places(tmp_path_factory, sd):
    return make_places(tmp_path_factory.mktemp("dry"), sd)


def train(name, places, model, out, **changes):
    AcceleratorState._reset_state(True)
    brief = {**BRIEF, "warmup_steps": 1} if name == "texts" else BRIEF
    options = TRAINERS[name].options(replace(places, sd=model))
    return TRAINERS[name].main(replace(options, out=out, **{**brief, **changes}))


def draw(model, out, **changes):
    own = {"teacher": str(model), "prompts": ("a mug",), "out": out, "num_images": 2, "steps": 2}
    return sample.main(Sample(**{**own, **changes}))


def only_fp16(folder):
    for file in folder.rglob("*.safetensors"):
        weights = {name: x.half() if x.is_floating_point() else x for name, x in load_file(file).items()}
        save_file(weights, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()


def few_steps(folder):
    edit(folder / SCHEDULER, _class_name="LCMScheduler", original_inference_steps=50)


# A change of the model, what is said of it, and the options with which the same command starts; None: with none.
MODELS = {
    "nonsquare": (lambda folder: edit(folder / "unet" / "config.json", sample_size=[8, 12]), None, {}),
    "zero terminal SNR": (lambda folder: edit(folder / SCHEDULER, rescale_betas_zero_snr=True),
                          "set rescale_betas_zero_snr to false", None),
    "no size": (lambda folder: edit(folder / "unet" / "config.json", sample_size=None), "Pass --size",
                {"size": 16}),
    "fp16": (only_fp16, r"variant fp16 only; got no --variant. Pass --variant", {"variant": "fp16"}),
    "pickles": (pickle_weights, "or pass --allow-pickle", {"allow_pickle": True}),
    "few steps": (few_steps, "few steps", None),
}  # fmt: skip

LONG = {
    ("texts", "no size"),
    ("texts", "fp16"),
    ("control", "pickles"),
    ("control", "no size"),
    ("texts", "pickles"),
}


@pytest.mark.parametrize(("model", "command"), [
    # Two of the models are tried with a training of texts; what refuses or opens the others is the same reader.
    pytest.param(model, command, marks=pytest.mark.slow if (command, model) in LONG else ())
    for model in MODELS for command in (*TRAINED, "sample")
])  # fmt: skip
def test_what_a_dry_run_accepts_starts_and_what_it_refuses_has_a_remedy(
    places, folder, tmp_path, monkeypatch, model, command
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    change, said, options = MODELS[model]
    change(folder)

    def start(dry_run, **given):
        if command == "sample":
            return draw(folder, tmp_path / "out" / "run", **given) if not dry_run else None
        return train(command, places, folder, tmp_path / "out" / "run", dry_run=dry_run, **given)

    if said is not None:
        for dry_run in (True, False)[command == "sample" :]:
            with refused(said):
                start(dry_run)
        assert not (tmp_path / "out").exists()
    if options is not None:
        start(True, **options)
        assert not (tmp_path / "out" / "run").exists()
        assert start(False, **options).exists()


@pytest.mark.parametrize(("changes", "said"), [
    ({"precision": "bf16", "student_ratio": 0.0}, "rounding of bf16"), ({"bottleneck": "nowhere"}, "--bottleneck"),
    ({"warmup_steps": 2}, r"belongs to another config \(warmup_steps: 1 there, 2 now\)"),
    ({"prompts": "others"}, r"belongs to another config \(prompts: "),
    ({"prompts": "long"}, "1 of 3 prompts of .* are longer than the text encoders read"),
])  # fmt: skip
def test_nothing_is_refused_behind_the_encoding_of_prompts(places, tmp_path, monkeypatch, changes, said):
    model, plain, changes = places.sd, {"gan_weight": 0.0}, dict(changes)
    if "precision" in changes:
        model = tmp_path / "plain"
        tiny.sd(beta_schedule="linear", beta_start=1e-4, beta_end=0.02).save_pretrained(model)
    elif "warmup_steps" in changes:
        train("texts", places, model, tmp_path / "run", **plain)
    elif changes.get("prompts") == "others":
        train("texts", places, model, tmp_path / "run", **plain)
        changes["prompts"] = str(tmp_path / "prompts.txt")
        (tmp_path / "prompts.txt").write_text("a mug\na cone\n")
    elif "prompts" in changes:
        changes["prompts"] = str(tmp_path / "prompts.txt")
        (tmp_path / "prompts.txt").write_text("a mug\na cone\n" + "far too long for this\n")
    encoded, encode = set(), PromptEncoder._encode
    monkeypatch.setattr(PromptEncoder, "_encode", lambda self, some: encoded.update(some) or encode(self, some))
    for dry_run in (True, False) if "longer" in said else (False,):
        with refused(said):
            train("texts", places, model, tmp_path / "run", **plain, **{"dry_run": dry_run, **changes})
    assert encoded <= {""}, "the negative prompt alone tells the shape of all conditions"


def test_the_check_of_a_teacher_encodes_a_few_prompts(places, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("\n".join(f"mug {number}" for number in range(200)))
    encoded, encode = set(), PromptEncoder._encode
    monkeypatch.setattr(PromptEncoder, "_encode", lambda self, some: encoded.update(some) or encode(self, some))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def failing(teacher, x0, labels, **options):
        raise ValueError("it fails the check")

    monkeypatch.setattr(text_recipe, "check_teacher", failing)
    changes = {"prompts": str(tmp_path / "prompts.txt"), "gan_weight": 0.0, "skip_teacher_check": False}
    with refused("it fails the check"):
        train("texts", places, places.sd, tmp_path / "run", **changes)
    assert 1 < len(encoded) <= 65
    assert not (tmp_path / "run").exists()


def times_of(folder):
    index, settings = folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"
    known = json.loads(index.read_text()) if index.is_file() else {}
    return read_student_times(known, json.loads(settings.read_text()), folder)


def saved_again(folder, out, steps):
    """A student's folder as stock diffusers leaves it: its keys are gone, its scheduler stays."""
    teacher = load_teacher(folder)
    times = lcm_times(teacher.denoiser.schedule, steps, highest=3.5 if steps == 1 else 1e9)
    export_pipeline(Student(teacher.denoiser, times), folder, out / "student")
    pipe = StableDiffusionPipeline.from_pretrained(out / "student", local_files_only=True)
    pipe.save_pretrained(out / "again")
    assert torch.tensor(times_of(out / "student")).tolist() == list(times)
    assert not any("dmd2" in name for name in json.loads((out / "again" / "model_index.json").read_text()))
    return out / "student", out / "again", times


@pytest.mark.parametrize("steps", [1, 4])
def test_a_student_that_diffusers_saved_again_is_still_a_student(places, tmp_path, steps):
    student, again, times = saved_again(places.sd, tmp_path, steps)
    assert times_of(again) == times
    drawn = [np.load(draw(folder, tmp_path / f"{folder.name}.npz"))["images"] for folder in (student, again)]
    assert np.array_equal(*drawn), "drawn at its own times, not in the steps of a teacher"
    out, cpu = tmp_path / "run", {"device": "cpu", "out": tmp_path / "run"}
    for folder in (student, again):
        for use in (
            *(lambda name=name: train(name, places, folder, out, dry_run=True) for name in TRAINED),
            lambda: evaluate_toyworld.main(EvaluatePipeline(teacher=str(folder), **cpu)),
            lambda: evaluate_students.main(EvaluateStudents(students=(student,), teacher=folder, **cpu)),
        ):
            with refused("is a student"):
                use()
    with refused("another program has saved it again"):
        evaluate_students.main(EvaluateStudents(students=(again,), **cpu))
    with refused("guidance must be 1 here, since a student has it built in"):
        draw(again, tmp_path / "out.npz", guidance=3.0)
    assert not out.exists()


def test_a_student_of_flows_that_diffusers_saved_again_is_still_a_student(tmp_path):
    (tmp_path / "scheduler").mkdir()
    for number, times in ((1, (1000.0,)), (2, (1000.0, 500.0)), (4, (1000.0, 750.0, 500.0, 250.0))):
        last = {} if number == 1 else {"shift_terminal": 1 / number}
        FlowMatchLCMScheduler(shift=1.0, **last).save_pretrained(tmp_path / "scheduler")
        assert times_of(tmp_path) == pytest.approx(times)
    FlowMatchLCMScheduler(shift=3.0).save_pretrained(tmp_path / "scheduler")
    with refused("does not say which"):
        times_of(tmp_path)


def test_a_model_of_pixels_under_a_scheduler_of_few_steps_is_no_teacher(tmp_path):
    tiny.pixels().save_pretrained(tmp_path)
    assert load_teacher(str(tmp_path)).shape == (3, 8, 8)
    few_steps(tmp_path)
    with refused("is a student"):
        load_teacher(str(tmp_path))
