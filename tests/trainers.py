"""Every trainer on a few steps of a tiny model, for what all of them promise."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folders

import attack.robust_options
import attack.robust_recipe
import controlnet.options
import controlnet.recipe
import distill.options
import distill.recipe
import scorefield.commands.teacher
import scorefield.training.run as running
import sds.options
import sds.recipe
from scorefield.commands.options import TrainTeacher

TINY = {"steps": 6, "batch_size": 4, "save_every": 3, "log_every": 2}
TEACHER = {**TINY, "batch_size": 16, "width": 32, "depth": 2}
STUDENT = {
    **TINY, "batch_size": 16, "student_every": 2, "warmup_steps": 4, "num_pairs": 20, "pair_steps": 2,
    "fake_warmup": 1, "guard_images": 64, "guard_every": 3, "student_lr": 1e-4, "fake_lr": 1e-4, "warmup_lr": 1e-3,
    "skip_teacher_check": True,
}  # fmt: skip
TEXTS = {**STUDENT, "batch_size": 4, "num_pairs": 4, "guidance": 3.0, "regression_weight": 0.0, "guard_images": 0,
         "fake_warmup": 0, "warmup_steps": 2}  # fmt: skip
PROMPTS = ("a red mug", "a blue chair", "cone", "two mugs", "a sea", "a tree")


@dataclass(frozen=True)
class Places:
    """What trainers read: a teacher of digits, a tiny pipeline, captioned pictures, prompts without pictures."""

    teacher: Path
    sd: Path
    data: Path
    prompts: Path


@dataclass(frozen=True)
class Trainer:
    """A trainer: its main, its options, what it leaves, and an option that binds its checkpoints, changed."""

    main: Callable[[Any], Path | None]
    options: Callable[[Places], Any]
    result: str
    bound: dict[str, Any]


def teacher(places):
    return TrainTeacher(**TEACHER)


def student(places):
    return dataclasses.replace(distill.options.auto(), teacher=str(places.teacher), **STUDENT)


def paths(places):
    own = {**TINY, "batch_size": 16, "points": 6, "guard_images": 64, "guard_every": 3, "skip_teacher_check": True}
    return dataclasses.replace(distill.options.consistency(), teacher=str(places.teacher), **own)


def texts(places, **changes):
    reads = {"preset": "text", "teacher": str(places.sd), "prompts": str(places.data / "metadata.jsonl")}
    return distill.options.Config(**{**reads, **TEXTS, "gan_weight": 0.01, **changes})


def lora(places):
    prompts = {"prompts": str(places.prompts), "gan_weight": 0.0}
    return texts(places, lora=True, lora_rank=2, gradient_checkpointing=True, offload=True, **prompts)


def canvas(places):
    reads = {"prompt": "a mug", "teacher": str(places.sd), "canvas": True, "probe_every": 2}
    return sds.options.Config(**TINY, **reads)


def control(places):
    reads = {"teacher": str(places.sd), "data": str(places.data), "hint": "canny"}
    return controlnet.options.Config(**TINY, **reads, eval_samples=2, test_samples=0, sampling_steps=2)


def robust(places):
    own = {**TINY, "batch_size": 16, "width": 4, "attack_steps": 2, "test_steps": 2, "epsilon": 25.5}
    return attack.robust_options.Robust(**own, loss="trades", eval_every=2, eval_images=20)


TRAINERS = {
    "teacher": Trainer(scorefield.commands.teacher.main, teacher, "teacher", {"learning_rate": 0.5}),
    "student": Trainer(distill.recipe.main, student, "student", {"ema_decay": 0.5}),
    "paths": Trainer(distill.recipe.main, paths, "student", {"points": 7}),
    "texts": Trainer(distill.recipe.main, texts, "student", {"student_lr": 0.5}),
    "lora": Trainer(distill.recipe.main, lora, "student", {"lora_alpha": 1.0}),
    "canvas": Trainer(sds.recipe.main, canvas, "canvas.png", {"draws": 3}),
    "control": Trainer(controlnet.recipe.main, control, "controlnet", {"ema_decay": 0.5}),
    "robust": Trainer(attack.robust_recipe.main, robust, "classifier", {"beta": 0.5}),
}


def make_places(root, sd):
    """Write them below a folder; ``sd`` is there already."""
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    made = scorefield.commands.teacher.main(TrainTeacher(out=root / "run", **TEACHER))
    return Places(made, sd, folders.captioned(root / "data", PROMPTS).parent, root / "prompts.txt")


class Killed(BaseException):
    pass


def stop(monkeypatch, step, how):
    """Let something happen in a step of a run's main stage."""
    whole = running.follow

    def follow(reports, accelerator, **options):
        for report in whole(reports, accelerator, **options):
            if report.step == step and not any(key.startswith("warm-up/") for key in report.metrics):
                how()
            yield report

    monkeypatch.setattr(running, "follow", follow)


def kill():
    raise Killed
