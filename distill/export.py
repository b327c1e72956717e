"""A student as what diffusers loads: a pipeline's folder, or a LoRA, with the scheduler that its times need.

A distilled network asked at another timestep, or under guidance, gives poor images and no error. So the scheduler
is exported with the weights, such that a plain ``pipe(prompt, num_inference_steps=n, guidance_scale=1)`` asks at
exactly the student's times, and :func:`scheduler_for` refuses times for which there is no such scheduler.
"""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchLCMScheduler, LCMScheduler
from safetensors.torch import save_file
from torch import nn

from distill.student import Student, even_times
from score.atomic import whole_folder
from score.families import DiffusersNetwork, family_of
from score.lora import Twin, adapter_weights, merged
from score.pretrained import INDEX, NOISE_SETTINGS, part_folder, read_json
from score.schedule import Schedule, VariancePreserving

LORA = "pytorch_lora_weights.safetensors"
"""Name of the file that ``load_lora_weights`` looks for."""

FACTS = "dmd2.json"
"""Beside a LoRA, what a pipeline's folder says in its ``model_index.json``."""

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


def lcm_times(schedule: Schedule, num_steps: int) -> tuple[float, ...]:
    """The times of :func:`scheduler_for`: DMD2's 999, 749, 499, 249; for flows 1, 0.75, 0.5, 0.25.

    Raises ``ValueError`` for fewer than one step, and more steps than timesteps.
    """
    if not isinstance(schedule, VariancePreserving):
        return even_times(schedule, num_steps)
    total = len(schedule.alphas_cumprod)
    if not 1 <= num_steps <= total:
        raise ValueError(f"a student takes 1 to {total} steps; got {num_steps}.")
    return tuple(float(total // num_steps * left - 1) for left in range(num_steps, 0, -1))


def scheduler_for(student: Student, settings: Mapping[str, Any]) -> Any:
    """The scheduler of diffusers that asks at the student's times, in as many steps as it has.

    LCMScheduler for variance-preserving teachers, FlowMatchLCMScheduler for flows: between two steps both draw new
    noise on the clean image, as :meth:`distill.student.Student.sample` does. SD3's pipeline does not hand its
    ``generator`` on to the scheduler: there that noise is of torch's global generator.

    Args:
        student: times and schedule are read of it.
        settings: of the teacher's scheduler, as its ``scheduler_config.json`` has them.

    Raises:
        ValueError: times that no setting of that scheduler gives; those that one gives are named.
    """
    number, scale = student.num_steps, student.denoiser.time_scale
    if isinstance(student.denoiser.schedule, VariancePreserving):
        own = {name: settings[name] for name in NOISE_SETTINGS if settings.get(name) is not None}
        kind = {"prediction_type": settings.get("prediction_type", "epsilon"), "clip_sample": False}
        scheduler: Any = LCMScheduler(**own, **kind, original_inference_steps=number)
    else:
        # The last noise level stretches all those between it and 1, which are evenly spaced without a shift.
        last = {"shift_terminal": student.times[-1]} if number > 1 else {}
        total = int(settings.get("num_train_timesteps", 1000))
        scheduler = FlowMatchLCMScheduler(num_train_timesteps=total, shift=1.0, **last)
    scheduler.set_timesteps(number)
    times = [scale * t for t in student.times]
    if not torch.allclose(
        scheduler.timesteps.double(), torch.tensor(times, dtype=torch.float64), atol=1e-3 * scale
    ):
        possible = ", ".join(f"{t / scale:g}" for t in scheduler.timesteps.tolist())
        raise ValueError(
            f"no {type(scheduler).__name__} asks at the times {', '.join(f'{t:g}' for t in student.times)} in "
            f"{number} step(s); expected {possible}, which distill.export.lcm_times gives."
        )
    return scheduler


def export_pipeline(student: Student, pipeline: Path, folder: Path, *, card: str = "") -> Path:
    """Write the student's pipeline; ``DiffusionPipeline.from_pretrained(folder)`` loads it.

    Args:
        student: its network is a :class:`score.families.DiffusersNetwork`, or a twin of one, whose changes are
            added to the weights. Stored in the precision it has.
        pipeline: folder of the teacher's, whose autoencoder, text encoders and tokenizers are copied.
        folder: replaced as a whole.
        card: text of the model card, above how to use it.

    Raises:
        ValueError: another network, or times that the scheduler cannot be asked at.
    """
    index = read_json(pipeline / INDEX)
    family = family_of(index)
    scheduler = scheduler_for(student, _scheduler_settings(pipeline))
    model = _model(student.unwrapped().denoiser.network)
    facts = _facts(student, scheduler)
    with whole_folder(folder) as temporary:
        for part, value in index.items():
            if (
                isinstance(value, list)
                and value[0] is not None
                and part not in (family.part, "scheduler", *UNUSED)
            ):
                shutil.copytree(pipeline / part, temporary / part)
        model.save_pretrained(temporary / family.part, safe_serialization=True)
        scheduler.save_pretrained(temporary / "scheduler")
        index = {name: value for name, value in index.items() if name not in UNUSED}
        index |= {"scheduler": ["diffusers", type(scheduler).__name__], **facts}
        index |= {name: [None, None] for name in UNUSED} | {"requires_safety_checker": False}
        if family.texts and index["_class_name"] != "StableDiffusionPipeline":
            index = {
                name: value for name, value in index.items() if name not in (*UNUSED, "requires_safety_checker")
            }
        (temporary / INDEX).write_text(json.dumps(index, indent=2))
        (temporary / "README.md").write_text(_card(card, _PIPELINE_USE, facts, index["_class_name"]))
    return folder


def export_lora(student: Student, pipeline: Path, folder: Path, *, card: str = "") -> Path:
    """Write the changes of a :class:`score.lora.Twin` as a LoRA; ``pipe.load_lora_weights(folder)`` loads it.

    Args:
        student: its network is a twin.
        pipeline: folder of the teacher's.
        folder: replaced as a whole; its scheduler has to be given to the pipeline, too, as its card says.
        card: text of the model card, above how to use it.

    Raises:
        ValueError: another network, or times that the scheduler cannot be asked at.
    """
    twin = student.unwrapped().denoiser.network
    if not isinstance(twin, Twin):
        raise ValueError(f"a LoRA is made of a score.lora.Twin; got {type(twin).__name__}. Use export_pipeline.")
    index = read_json(pipeline / INDEX)
    scheduler = scheduler_for(student, _scheduler_settings(pipeline))
    facts = _facts(student, scheduler)
    part = family_of(index).part
    with whole_folder(folder) as temporary:
        weights = {f"{part}.{name}": value for name, value in adapter_weights(twin).items()}
        save_file(weights, temporary / LORA, metadata={"format": "pt"})
        scheduler.save_pretrained(temporary / "scheduler")
        (temporary / FACTS).write_text(json.dumps(facts, indent=2))
        use = _LORA_USE.replace("SCHEDULER", type(scheduler).__name__)
        (temporary / "README.md").write_text(_card(card, use, facts, index["_class_name"]))
    return folder


def read_student_facts(folder: Path) -> dict[str, Any]:
    """The ``dmd2_*`` entries of an exported folder, empty for any other."""
    file = folder / (FACTS if (folder / FACTS).is_file() else INDEX)
    if not file.is_file():
        return {}
    return {name: value for name, value in read_json(file).items() if name.startswith("dmd2_")}


def _facts(student: Student, scheduler: Any) -> dict[str, Any]:
    facts = {
        "dmd2_denoising_timesteps": [t * student.denoiser.time_scale for t in student.times],
        "dmd2_num_inference_steps": student.num_steps,
        "dmd2_guidance_scale": 1.0,
    }  # fmt: skip
    shift = scheduler.config.get("shift")
    return facts if shift is None else {**facts, "dmd2_scheduler_shift": shift}


def _scheduler_settings(pipeline: Path) -> dict[str, Any]:
    return read_json(part_folder(pipeline, "scheduler") / "scheduler_config.json")


def _model(network: nn.Module) -> Any:
    whole = merged(network) if isinstance(network, Twin) else network
    if not isinstance(whole, DiffusersNetwork):
        raise ValueError(f"a pipeline holds a network of diffusers; got a {type(whole).__name__}.")
    return copy.copy(whole.model)


_PIPELINE_USE = """```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("this folder")
pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=1).images[0]
```
"""

_LORA_USE = """```python
from diffusers import DiffusionPipeline, SCHEDULER

pipe = DiffusionPipeline.from_pretrained("the teacher")
pipe.load_lora_weights("this folder")
pipe.scheduler = SCHEDULER.from_pretrained("this folder", subfolder="scheduler")
pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=1).images[0]
```
"""


def _card(text: str, use: str, facts: Mapping[str, Any], pipeline: str) -> str:
    steps = facts["dmd2_num_inference_steps"]
    times = ", ".join(f"{t:g}" for t in facts["dmd2_denoising_timesteps"])
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, diffusion, distillation, dmd2]
---
# A student of {steps} step{"s" if steps > 1 else ""}

{text or "Distilled by distribution matching (DMD2, arXiv 2405.14867)."}

{use.replace("PROMPT", '"a prompt"').replace("STEPS", str(steps))}
A {pipeline} asked at timestep{"s" if steps > 1 else ""} {times}. Guidance is built in: `guidance_scale` must be 1,
and `num_inference_steps` {steps}; other values give poor images and no error.
"""
