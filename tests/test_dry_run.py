"""What ``--dry-run`` accepts starts, what it refuses has a remedy, and a student is never taken for a teacher."""

import json
import shutil

import numpy as np
import pytest
import tiny_pipelines as tiny
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file

import controlnet.options as control_options
import controlnet.recipe as train_controlnet
import distill.options as distill_options
import distill.recipe as train_dmd
import scorefield.commands.sample as sample
import sds.options as scene_options
import sds.recipe as train_sds
import toyworld.evaluate as evaluate_toyworld
import toyworld.students as evaluate_students
from scorefield.commands.options import Sample
from scorefield.models.pretrained import read_student_times
from scorefield.models.prompts import PromptEncoder
from scorefield.models.teacher import load_teacher
from toyworld.options import EvaluatePipeline, EvaluateStudents

BRIEF = {"steps": 2, "batch_size": 2, "save_every": 2, "log_every": 1}
DMD = {
    "preset": "text", "student_every": 1, "warmup_steps": 1, "num_pairs": 4, "pair_steps": 2, "guidance": 3.0,
    "regression_weight": 0.0, "guard_images": 0, "fake_warmup": 0, "student_lr": 1e-4, "fake_lr": 1e-4,
    "warmup_lr": 1e-3, "skip_teacher_check": True, **BRIEF,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny pipeline, and six captioned pictures."""
    root = tmp_path_factory.mktemp("dry")
    tiny.sd().save_pretrained(root / "sd")
    (root / "data").mkdir()
    rows = []
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 44, 3), np.uint8)
        Image.fromarray(pixels).save(root / "data" / f"{number}.png")
        rows.append(json.dumps({"text": "mug " + "ab" * number, "file_name": f"{number}.png"}))
    (root / "data" / "metadata.jsonl").write_text("\n".join(rows))
    return root


def distil(root, model, out, **changes):
    data = root / "data" / "metadata.jsonl"
    own = {"teacher": str(model), "prompts": str(data), "out": out, "gan_weight": 0.01}
    return train_dmd.main(distill_options.Config(**{**DMD, **own, **changes}))


def learn_canvas(root, model, out, **changes):
    own = {"prompt": "a mug", "teacher": str(model), "out": out, "canvas": True, "probe_every": 2, **BRIEF}
    return train_sds.main(scene_options.Config(**{**own, **changes}))


def teach_control(root, model, out, **changes):
    own = {
        "teacher": str(model), "data": str(root / "data"), "out": out, "hint": "canny", "eval_samples": 2,
        "test_samples": 0, "sampling_steps": 2, **BRIEF,
    }  # fmt: skip
    if "teacher_size" in changes:
        own["size"] = changes.pop("teacher_size")
    return train_controlnet.main(control_options.Config(**{**own, **changes}))


def draw(root, model, out, **changes):
    changes.pop("dry_run")
    if "teacher_size" in changes:
        changes["size"] = changes.pop("teacher_size")
    own = {"teacher": str(model), "prompts": ("a mug",), "out": out, "num_images": 2, "steps": 2}
    return sample.main(Sample(**{**own, **changes}))


COMMANDS = {"train_dmd": distil, "train_sds": learn_canvas, "train_controlnet": teach_control, "sample": draw}


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def nonsquare(folder):
    edit(folder / "unet" / "config.json", sample_size=[8, 12])


def end_without_signal(folder):
    edit(folder / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)


def no_size(folder):
    edit(folder / "unet" / "config.json", sample_size=None)


def only_fp16(folder):
    for file in folder.rglob("*.safetensors"):
        weights = {name: x.half() if x.is_floating_point() else x for name, x in load_file(file).items()}
        save_file(weights, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()


def only_pickles(folder):
    import torch

    for file in folder.rglob("*.safetensors"):
        name = "pytorch_model.bin" if file.stem == "model" else f"{file.stem}.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()


def few_steps(folder):
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="LCMScheduler", original_inference_steps=50)


# A change of the model, what is said of it, and the options with which the same command starts; None: with none.
MODELS = {
    "nonsquare": (nonsquare, None, {}),
    "zero terminal SNR": (end_without_signal, "set rescale_betas_zero_snr to false", None),
    "no size": (no_size, "Pass --teacher-size", {"teacher_size": 16}),
    "fp16": (only_fp16, r"variant fp16 only; got no --variant. Pass --variant", {"variant": "fp16"}),
    "pickles": (only_pickles, "or pass --allow-pickle", {"allow_pickle": True}),
    "few steps": (few_steps, "few steps", None),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("model", MODELS)
def test_what_a_dry_run_accepts_starts_and_what_it_refuses_has_a_remedy(
    root, tmp_path, monkeypatch, capsys, model, command
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    change, said, options = MODELS[model]
    change(shutil.copytree(root / "sd", tmp_path / "model"))

    def start(**given):
        AcceleratorState._reset_state(True)
        return COMMANDS[command](root, tmp_path / "model", tmp_path / "out" / "run", **given)

    if said is not None:
        for dry_run in (True, False):
            with pytest.raises(ValueError, match=said):
                start(dry_run=dry_run)
        assert not (tmp_path / "out").exists()
    if options is not None:
        start(dry_run=True, **options) if command != "sample" else None
        assert not (tmp_path / "out" / "run").exists()
        assert start(dry_run=False, **options).exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": "bf16", "student_ratio": 0.0, "teacher": "plain"}, "rounding of bf16"),
        ({"warmup_steps": 2}, r"belongs to another config \(warmup_steps: 1 there, 2 now\)"),
        ({"bottleneck": "nowhere"}, "--bottleneck nowhere"),
        ({"prompts": "long"}, "1 of 3 prompts of .* are longer than the text encoders read"),
    ],
)
def test_nothing_is_refused_behind_the_encoding_of_prompts(root, tmp_path, monkeypatch, changes, said):
    if "teacher" in changes:
        tiny.sd(beta_schedule="linear", beta_start=1e-4, beta_end=0.02).save_pretrained(tmp_path / "plain")
        changes["teacher"] = str(tmp_path / "plain")
    elif "warmup_steps" in changes:
        AcceleratorState._reset_state(True)
        distil(root, root / "sd", tmp_path / "run", gan_weight=0.0)
    elif "prompts" in changes:
        changes["prompts"] = str(tmp_path / "prompts.txt")
        (tmp_path / "prompts.txt").write_text("a mug\na cone\n" + "far too long for this\n")
    AcceleratorState._reset_state(True)
    encoded, encode = set(), PromptEncoder._encode
    monkeypatch.setattr(PromptEncoder, "_encode", lambda self, some: encoded.update(some) or encode(self, some))
    for dry_run in (True, False) if "prompts" in changes else (False,):
        with pytest.raises(ValueError, match=said):
            distil(root, root / "sd", tmp_path / "run", **{"gan_weight": 0.0, "dry_run": dry_run, **changes})
    assert encoded <= {""}, "the negative prompt alone tells the shape of all conditions"


def times_of(folder):
    index, settings = folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"
    known = json.loads(index.read_text()) if index.is_file() else {}
    return read_student_times(known, json.loads(settings.read_text()), folder)


def saved_again(folder, out, steps):
    """A student's folder as stock diffusers leaves it: its keys are gone, its scheduler stays."""
    import torch
    from diffusers import StableDiffusionPipeline

    from distill.export import export_pipeline, lcm_times
    from distill.student import Student

    teacher = load_teacher(folder)
    times = lcm_times(teacher.denoiser.schedule, steps, highest=3.5 if steps == 1 else 1e9)
    export_pipeline(Student(teacher.denoiser, times), folder, out / "student")
    pipe = StableDiffusionPipeline.from_pretrained(out / "student", local_files_only=True)
    pipe.save_pretrained(out / "again")
    assert torch.tensor(times_of(out / "student")).tolist() == list(times)
    assert not any("dmd2" in name for name in json.loads((out / "again" / "model_index.json").read_text()))
    return out / "student", out / "again", times


@pytest.mark.parametrize("steps", [1, 4])
def test_a_student_that_diffusers_saved_again_is_still_a_student(root, tmp_path, steps):
    student, again, times = saved_again(root / "sd", tmp_path, steps)
    assert times_of(again) == times
    drawn = [
        np.load(draw(root, folder, tmp_path / f"{folder.name}.npz", dry_run=False))["images"]
        for folder in (student, again)
    ]
    assert np.array_equal(*drawn), "drawn at its own times, not in the steps of a teacher"
    for command in (distil, learn_canvas, teach_control):
        for folder in (student, again):
            with pytest.raises(ValueError, match="is a student"):
                command(root, folder, tmp_path / "run", dry_run=True)
    for folder in (student, again):
        with pytest.raises(ValueError, match="is a student"):
            evaluate_toyworld.main(EvaluatePipeline(teacher=str(folder), out=tmp_path / "run", device="cpu"))
        with pytest.raises(ValueError, match="is a student"):
            evaluate_students.main(
                EvaluateStudents(students=(student,), teacher=folder, out=tmp_path / "run", device="cpu")
            )
    with pytest.raises(ValueError, match="another program saved it again"):
        evaluate_students.main(EvaluateStudents(students=(again,), out=tmp_path / "run", device="cpu"))
    with pytest.raises(ValueError, match="guidance must be 1 here, since a student has it built in"):
        draw(root, again, tmp_path / "out.npz", dry_run=False, guidance=3.0)
    assert not (tmp_path / "run").exists()


def test_a_student_of_flows_that_diffusers_saved_again_is_still_a_student(tmp_path):
    from diffusers import FlowMatchLCMScheduler

    (tmp_path / "scheduler").mkdir()
    for number, times in ((1, (1000.0,)), (2, (1000.0, 500.0)), (4, (1000.0, 750.0, 500.0, 250.0))):
        last = {} if number == 1 else {"shift_terminal": 1 / number}
        FlowMatchLCMScheduler(shift=1.0, **last).save_pretrained(tmp_path / "scheduler")
        assert times_of(tmp_path) == pytest.approx(times)
    FlowMatchLCMScheduler(shift=3.0).save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match="does not say which"):
        times_of(tmp_path)


def test_a_model_of_pixels_under_a_scheduler_of_few_steps_is_no_teacher(tmp_path):
    tiny.pixels().save_pretrained(tmp_path)
    assert load_teacher(str(tmp_path)).shape == (3, 8, 8)
    few_steps(tmp_path)
    with pytest.raises(ValueError, match="is a student"):
        load_teacher(str(tmp_path))
