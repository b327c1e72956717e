"""``scorefield distill --method``: every method trains and resumes, and refuses what it has no use for."""

from dataclasses import replace

import folders
import pytest
import tiny_pipelines as tiny
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from refusals import refused
from safetensors.torch import load_file

import distill.recipe
import scorefield.commands.teacher
from distill.checks import check
from distill.consistency import Consistency, ContinuousConsistency
from distill.dmd import DMD
from distill.f_distill import FDistill
from distill.options import PRESETS
from distill.parts import build_method, build_networks, settled
from distill.progressive import Progressive, StageTeacher
from distill.sid import SiD
from scorefield.commands.options import TrainTeacher
from scorefield.models.teacher import load_teacher

TINY = {
    "steps": 6, "batch_size": 16, "student_every": 2, "warmup_steps": 2, "num_pairs": 40, "pair_steps": 2,
    "fake_warmup": 1, "guard_images": 64, "guard_every": 3, "student_lr": 1e-4, "fake_lr": 1e-4, "warmup_lr": 1e-3,
    "save_every": 3, "log_every": 2, "skip_teacher_check": True,
}  # fmt: skip
ALONG_PATHS = {
    name: value for name, value in TINY.items() if name not in ("student_every", "fake_warmup", "fake_lr")
} | {"points": 6, "gan_weight": None, "warmup_steps": 0, "student_lr": 0.0}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    return scorefield.commands.teacher.main(TrainTeacher(out=out, steps=4, batch_size=16, width=32, depth=2))


def config_of(teacher, out, method, **changes):
    along = method in ("consistency", "scm", "progressive")
    usual = PRESETS["consistency"]() if along else PRESETS["auto"]()
    settings = ALONG_PATHS if along else TINY
    return replace(usual, teacher=str(teacher), method=method, out=out, **{**settings, **changes})


CASES = {
    "sid": {}, "f-distill": {"gan_weight": 0.03}, "diff-instruct": {"gan_weight": 0.0}, "consistency": {},
    "scm": {"num_steps": 2, "reals": "teacher"}, "progressive": {"points": 4, "reals": "teacher"},
}  # fmt: skip


@pytest.mark.parametrize("method", CASES)
def test_a_student_of_each_method_learns(teacher, tmp_path, method):
    student = distill.recipe.main(config_of(teacher, tmp_path / "run", method, **CASES[method]))
    ours, before = (load_file(folder / "model.safetensors") for folder in (student, teacher))
    assert any(not torch.equal(ours[name], before[name]) for name in before)
    assert all(bool(value.isfinite().all()) for value in ours.values() if value.is_floating_point())


def test_a_run_that_was_stopped_within_a_stage_ends_in_the_same_weights(teacher, tmp_path, monkeypatch):
    """The student of the stage before lies in the checkpoint, and so does how far the stage has come."""
    settings = {"points": 8, "steps": 9, "save_every": 2, "reals": "teacher"}
    whole = distill.recipe.main(config_of(teacher, tmp_path / "whole", "progressive", **settings))
    update = StageTeacher.update

    def interrupted(self):
        update(self)
        if self.num_updates == 5:  # of stages that end at 3, 6 and 9
            raise KeyboardInterrupt

    config = config_of(teacher, tmp_path / "cut", "progressive", **settings)
    monkeypatch.setattr(StageTeacher, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill.recipe.main(config)
    monkeypatch.undo()
    again = distill.recipe.main(config)
    ours, expected = (load_file(folder / "model.safetensors") for folder in (again, whole))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("method", "kind"), [
    ("dmd", DMD), ("sid", SiD), ("f-distill", FDistill), ("diff-instruct", DMD), ("consistency", Consistency),
    ("scm", ContinuousConsistency), ("progressive", Progressive),
])  # fmt: skip
def test_a_name_stands_for_its_method(teacher, tmp_path, method, kind):
    known = load_teacher(str(teacher))
    changes = {"points": 8} if method == "progressive" else {}
    config = settled(config_of(teacher, tmp_path, method, reals="teacher", **changes), known, real=True)
    built = build_method(config, known, *build_networks(config, known))
    assert type(built) is kind
    if method == "diff-instruct":
        x0, t = torch.zeros(1, 1, 8, 8), torch.tensor([0.5])
        assert float(built.weight(x0, x0 + 3, t, known.denoiser.schedule)) == pytest.approx(4), "(alpha / sigma)^2"
    if isinstance(built, Consistency):
        assert len(built.path) == config.points
        assert float(built.path[0]) == built.student.times[0] == pytest.approx(20)


@pytest.mark.parametrize("changes", [{}, {"lora": True, "lora_rank": 2}, {"reals": "data"}])
def test_a_text_to_image_teacher_learns_lcm(sd, tmp_path, changes):
    prompts = folders.captioned(tmp_path, ("a red mug", "a blue chair", "cone", "a sea"), (24, 20))
    usual = PRESETS["lcm"]()
    config = replace(
        usual, teacher=str(sd), prompts=str(prompts), out=tmp_path / "run", steps=2, batch_size=2, points=4,
        num_pairs=4, pair_steps=2, guard_images=0, save_every=2, log_every=1, precision="no", student_lr=1e-4,
        skip_teacher_check=True, **changes,
    )  # fmt: skip
    folder = distill.recipe.main(config)
    if not config.lora:
        pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
        assert isinstance(pipe.scheduler, LCMScheduler)
        pipe.scheduler.set_timesteps(4)
        assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert not list((tmp_path / "run" / "checkpoints").rglob("fake*")), "there is no fake score"


def test_a_dry_run_counts_no_fake_score(teacher, tmp_path, capsys):
    distill.recipe.main(config_of(teacher, tmp_path / "run", "consistency", dry_run=True))
    said = capsys.readouterr().out
    assert not [line for line in said.splitlines() if line.startswith("fake")]
    assert "student: " in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("method", "changes", "message"), [
    ("consistency", {"student_every": 3}, "--student-every is of the fake score, and --method consistency has no"),
    ("scm", {"gan_weight": 0.1}, "--gan-weight is for a fake score's critic, and --method scm has none. Pass 0."),
    ("consistency", {"points": 1}, "--points must be at least 2; got 1. 18 to 50 are usual."),
    ("progressive", {"points": 4, "regression_weight": 1.0}, "--method progressive learns no pairs"),
    ("progressive", {"points": 4, "warmup_steps": None}, "--method progressive learns no pairs"),
    ("progressive", {"points": 12}, "--points must be a power of two for --method progressive; got 12. Pass 16."),
    ("progressive", {"points": 4, "num_steps": 2}, "--method progressive ends in one step; got --num-steps 2."),
    ("progressive", {"points": 4, "steps": 1}, "--steps 1 are fewer than the 2 halvings of --points 4."),
    ("sid", {"separate_guidance": True}, "--separate-guidance is for --method dmd; got sid. Leave it out."),
    ("f-distill", {"gan_weight": 0.0}, "--method f-distill reads its weights off the critic"),
])  # fmt: skip
def test_what_a_method_has_no_use_for_is_refused(teacher, tmp_path, method, changes, message):
    with refused(message):
        check(config_of(teacher, tmp_path, method, **changes))


def test_f_distill_and_consistency_without_images_say_where_to_get_them(tmp_path):
    tiny.pixels().save_pretrained(tmp_path / "pixels")
    for method, message in (
        ("f-distill", "--method f-distill needs a critic, so real images: pass --data, or --reals teacher."),
        (
            "consistency",
            "--method consistency needs images such as .* Pass --data, or do without: --reals teacher",
        ),
    ):
        config = config_of(tmp_path / "pixels", tmp_path / "run", method)
        with refused(message):
            distill.recipe.main(config)
