"""Small folders as the commands leave them, for what reads them: configs of the real options, logs, pictures."""

import json

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import attack.robust_options
import controlnet.options
import distill.options
import scorefield.commands.options
import sds.options
from scorefield.training.identity import resolved

OPTIONS = {
    "teacher": scorefield.commands.options.TrainTeacher, "distill": distill.options.Config,
    "sds": sds.options.Config, "control": controlnet.options.Config, "robust": attack.robust_options.Robust,
}  # fmt: skip
RESULTS = {"teacher": "teacher/denoiser.json", "distill": "student/model.json", "sds": "export/report.json",
           "control": "controlnet/config.json", "robust": "classifier/classifier.json"}  # fmt: skip
LOOKS = {"value": 0.6, "floor": 0.1, "ceiling": 0.9, "relative": 0.625}
REPORTS = {
    "teacher": ("best.json", {"step": 40, "frechet_distance": 1.25, "kid": 0.5}),
    "distill": ("report.json", {"steps": 60, "num_steps": 1, "step": 40, "distance": 0.25, "kernel": 0.5,
                                "error": 0.125, "brightness": 0.0, "num_images": 64, "setbacks": 1,
                                "ended_early": False, "distance_of_halves": 0.125}),
    "sds": ("export/report.json", {"facts": {"prompt": "a red mug", "rollbacks": 0},
                                   "mesh_versus_render": {"psnr": 25.5}, "mesh": {"vertices": 10}}),
    "control": ("report.json", {"step": 60, "learned_at": 50, "event": "was learned at step 50",
                                "scores": {"f1": LOOKS}, "scores_without_control": {"f1": LOOKS},
                                "gap": {"value": 0.5, "error": 0.25}, "seconds": 3.5, "resumed": False}),
    "robust": ("report.json", {"accuracy": 0.975, "robust_accuracy": 0.85, "epsilon": 25.5, "norm": "linf",
                               "attack": "PGD-40 x 2", "num_images": 597, "flags": [], "cross_entropy": 0.25,
                               "curve": [{"epsilon": 0.0, "accuracy": 0.975}, {"epsilon": 25.5, "accuracy": 0.85}],
                               "autoattack": {"accuracy": 0.84, "package": "torchattacks 3.5.1"}}),
}  # fmt: skip


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def picture(path, size=(24, 16), colour=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def log(out, curves, first=0):
    """Events as a run writes them, one start of it; ``curves`` are lists of values by name."""
    with SummaryWriter(str(out / "logs"), purge_step=first + 1) as writer:
        for tag, values in curves.items():
            for step, value in enumerate(values, first + 1):
                writer.add_scalar(tag, value, step)
        writer.add_image("samples", np.zeros((3, 300, 300), np.float32), first + 1)


def finished(out, kind, steps=60, **options):
    """A finished run of a command, without its log."""
    config = {**resolved(OPTIONS[kind]()), "steps": steps, "out": str(out), **options}
    write(out / "config.json", config)
    write(out / "about.json", {"set": ["steps", *options], "versions": {"scorefield": "0.2.0", "torch": "2.15"}})
    write(out / "identity.json", {**config, "teacher": "0123abcd", "data": "4567cdef", "num_processes": 1})
    write(out / "checkpoints" / f"step-{steps:09d}" / "manifest.json", {})
    write(out / RESULTS[kind], {})
    name, content = REPORTS[kind]
    write(out / name, content)
    for step in (20, 40, 60):
        picture(out / "samples" / f"step-{step:09d}.png", colour=(step, 4 * step, 30))
    return out
