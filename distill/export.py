"""A student as what diffusers loads: a pipeline's folder, or a LoRA, with the scheduler that its times need.

A distilled network asked at another timestep, or under guidance, gives poor images and seldom an error. So the
scheduler is exported with the weights, such that a plain ``pipe(prompt, num_inference_steps=n, guidance_scale=1)``
asks at exactly the student's times, and :func:`scheduler_for` refuses times for which there is none.
"""

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchLCMScheduler, LCMScheduler
from safetensors.torch import save_file
from torch import nn

from distill.student import Student, even_times
from scorefield.atomic import whole_folder
from scorefield.files import read_json
from scorefield.models.codec import read_codec_config
from scorefield.models.components import LABELS, UNUSED, check_copyable, check_index, copy_part
from scorefield.models.families import Family, family_of, has_part, parts_of
from scorefield.models.lora import LORA_FILE, LoRA, adapter_weights, merged
from scorefield.models.lora_keys import KOHYA, kohya_weights, layers_of
from scorefield.models.networks import DiffusersNetwork
from scorefield.models.pretrained import INDEX, LORA_FACTS, NOISE_SETTINGS, NUM_FRAMES, STUDENT_TIMES, part_folder
from scorefield.schedule import Schedule, VariancePreserving

LORA = LORA_FILE
"""Name of the file that ``load_lora_weights`` looks for."""


def lcm_times(schedule: Schedule, num_steps: int, highest: float = math.inf) -> tuple[float, ...]:
    """Return the times of :func:`scheduler_for`: DMD2's 999, 749, 499, 249; for flows 1, 0.75, 0.5, 0.25.

    Flows are asked at unshifted times, whatever shift the teacher's own scheduler has (SD3: 3), and always from 1.

    Args:
        schedule: of the student.
        num_steps: of the student.
        highest: largest noise level sigma / alpha: the times are then evenly spaced below it. For Stable
            Diffusion 3.5 gives 712 in one step.

    Raises ``ValueError`` for fewer than one step, and more steps than timesteps.
    """
    if not isinstance(schedule, VariancePreserving):
        return even_times(schedule, num_steps)
    level = torch.tensor(highest, dtype=torch.float64).clamp(
        max=float(schedule.ratio(torch.tensor(schedule.t_max)))
    )
    total = int(schedule.snap(schedule.time(level))) + 1
    if not 1 <= num_steps <= total:
        raise ValueError(f"a student takes 1 to {total} steps; got {num_steps}.")
    return tuple(float(total // num_steps * left - 1) for left in range(num_steps, 0, -1))


def scheduler_for(student: Student, settings: Mapping[str, Any]) -> Any:
    """Return the scheduler of diffusers that asks at the student's times, in as many steps as it has.

    LCMScheduler for variance-preserving teachers, FlowMatchLCMScheduler for flows: between two steps both draw new
    noise on the clean image, as :meth:`distill.student.Student.sample` does. SD3's pipeline does not hand its
    ``generator`` on to the scheduler: there that noise is of torch's global generator.

    Args:
        student: times and schedule are read of it.
        settings: of the teacher's scheduler, as its ``scheduler_config.json`` has them.

    Raises:
        ValueError: times that no setting of that scheduler gives, naming those that one gives; a last time so
            small that LCMScheduler's boundary condition would show; a beta_schedule that it does not have.
    """
    number, scale = student.num_steps, student.denoiser.time_scale
    if isinstance(student.denoiser.schedule, VariancePreserving):
        scheduler = _lcm_scheduler(settings, number)
        if not _asks_at(scheduler, student):
            scheduler = _lcm_scheduler(_cut_off(settings, student), number)
    else:
        # The last noise level stretches all those between it and 1, which are evenly spaced without a shift.
        last = {"shift_terminal": student.times[-1]} if number > 1 else {}
        total = int(settings.get("num_train_timesteps", 1000))
        scheduler = FlowMatchLCMScheduler(num_train_timesteps=total, shift=1.0, **last)
    if not _asks_at(scheduler, student):
        possible = ", ".join(f"{t / scale:g}" for t in scheduler.timesteps.tolist())
        # For flows these depend on the last time, of which lcm_times has its own.
        source = ", which distill.export.lcm_times gives" if isinstance(scheduler, LCMScheduler) else ""
        raise ValueError(
            f"no {type(scheduler).__name__} asks at the times {', '.join(f'{t:g}' for t in student.times)} in "
            f"{number} step(s); expected {possible}{source}."
        )
    if isinstance(scheduler, LCMScheduler):
        _check_boundary(scheduler)
    return scheduler


def _asks_at(scheduler: Any, student: Student) -> bool:
    scale = student.denoiser.time_scale
    scheduler.set_timesteps(student.num_steps)
    times = torch.tensor([scale * t for t in student.times], dtype=torch.float64)
    return torch.allclose(scheduler.timesteps.double(), times, atol=1e-3 * scale)


def _cut_off(settings: Mapping[str, Any], student: Student) -> dict[str, Any]:
    # LCMScheduler begins at its last timestep. One whose betas end at the student's first time begins there.
    schedule = student.denoiser.schedule
    assert isinstance(schedule, VariancePreserving)
    kept = schedule.alphas_cumprod[: int(student.times[0]) + 1]
    betas = 1 - kept / torch.cat([torch.ones_like(kept[:1]), kept[:-1]])
    own = {"num_train_timesteps": len(kept), "trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}
    return {**settings, **own}


def _lcm_scheduler(settings: Mapping[str, Any], number: int) -> Any:
    own = {name: settings[name] for name in NOISE_SETTINGS if settings.get(name) is not None}
    kind = {"prediction_type": settings.get("prediction_type", "epsilon"), "clip_sample": False}
    try:
        # steps_offset changes none of its times; stock pipelines complain of any but 1.
        return LCMScheduler(**own, **kind, original_inference_steps=number, steps_offset=1)
    except NotImplementedError as error:
        raise ValueError(
            f"LCMScheduler has no beta_schedule {settings.get('beta_schedule')!r}; expected linear, scaled_linear "
            "or squaredcos_cap_v2. Write the teacher's betas into its scheduler_config.json, as trained_betas."
        ) from error


def _check_boundary(scheduler: Any) -> None:
    # It returns c_skip x_t + c_out x0, where the student returns x0: at t = 0 the noisy image itself.
    last = scheduler.timesteps[-1]
    c_skip, c_out = (float(c) for c in scheduler.get_scalings_for_boundary_condition_discrete(last))
    if max(abs(c_skip), abs(1 - c_out)) > 1e-3:
        raise ValueError(
            f"at its last time {last:g} an LCMScheduler returns {c_skip:.2g} x_t + {c_out:.2g} x0 in place of x0; "
            "expected a last time of at least 2. Take fewer steps."
        )


def export_student(
    student: Student, pipeline: Path, folder: Path, *, card: str = "", base_model: str = "",
    size: tuple[int, int] | None = None, num_frames: int = 0, variant: str | None = None, kohya: bool = False,
) -> Path:  # fmt: skip
    """Write what diffusers loads: a LoRA where the network is a :class:`LoRA`, else a whole pipeline.

    Pipelines that load no LoRAs (PixArt-Sigma) are written whole, with the changes added to the weights.

    The arguments are those of :func:`export_lora` and :func:`export_pipeline`.
    """
    kind = getattr(diffusers, family_of(read_json(pipeline / INDEX)).pipeline)
    if hasattr(kind, "load_lora_weights") and isinstance(student.unwrapped().denoiser.network, LoRA):
        return export_lora(
            student, pipeline, folder, card=card, base_model=base_model, size=size, num_frames=num_frames,
            kohya=kohya,
        )  # fmt: skip
    return export_pipeline(
        student, pipeline, folder, card=card, base_model=base_model, size=size, num_frames=num_frames,
        variant=variant,
    )  # fmt: skip


def export_pipeline(
    student: Student, pipeline: Path, folder: Path, *, card: str = "", base_model: str = "",
    size: tuple[int, int] | None = None, num_frames: int = 0, variant: str | None = None,
) -> Path:  # fmt: skip
    """Write the student's pipeline; ``DiffusionPipeline.from_pretrained(folder)`` loads it.

    Args:
        student: its network is a :class:`networks.DiffusersNetwork`, or a LoRA of one, whose changes are
            added to the weights. Stored in the precision it has.
        pipeline: folder of the teacher's, whose autoencoder, text encoders and tokenizers are copied: the files
            of :func:`components.copied_files` and nothing else. Text encoders in half precision become
            float32, else the folder would not run when it is loaded plainly.
        folder: replaced as a whole.
        card: text of the model card, above how to use it.
        base_model: name or folder of the teacher's pipeline, for the card.
        size: height and width in pixels that the student learned, if they are not the teacher's own.
        num_frames: of the videos that it learned, 1 of images; 0: its pipeline is one of images.
        variant: of the teacher's weights that are copied, such as "fp16"; where there is none, the plain ones.

    Raises:
        ValueError: another network, times that the scheduler cannot be asked at, or a folder that
            :func:`copied_parts` refuses.
    """
    index, copied = read_json(pipeline / INDEX), copied_parts(pipeline, variant)
    family = family_of(index)
    scheduler = scheduler_for(student, _scheduler_settings(pipeline))
    model = _model(student.unwrapped().denoiser.network)
    facts = _facts(student, scheduler, size, num_frames, _told_scale(family, model))
    if size is not None:
        _, _, factor = read_codec_config(part_folder(pipeline, "vae"))
        height, width = (side // factor for side in size)
        if "sample_size" in model.config:  # others say it in their cards alone
            model.register_to_config(sample_size=height if height == width else [height, width])
    text = card + (" The teacher's safety checker is not part of it." if _checks_safety(index) else "")
    with whole_folder(folder) as temporary:
        for part in copied:
            copy_part(pipeline, part, temporary / part, variant)
        model.save_pretrained(temporary / family.part, safe_serialization=True)
        scheduler.save_pretrained(temporary / "scheduler")
        index = _student_index(index, scheduler, facts)
        (temporary / INDEX).write_text(json.dumps(index, indent=2))
        asked = "[207]" if family.classes else '"a prompt"'
        use = _card(text, _PIPELINE_USE.replace("PROMPT", asked), facts, index["_class_name"], base_model, "")
        (temporary / "README.md").write_text(use)
    return folder


def export_lora(
    student: Student, pipeline: Path, folder: Path, *, card: str = "", base_model: str = "",
    size: tuple[int, int] | None = None, num_frames: int = 0, kohya: bool = False,
) -> Path:  # fmt: skip
    """Write the changes of a :class:`lora.LoRA` as a LoRA; ``pipe.load_lora_weights(folder)`` loads it.

    Args:
        student: its network is a LoRA.
        pipeline: folder of the teacher's.
        folder: replaced as a whole; its scheduler has to be given to the pipeline, too, as its card says.
        card: text of the model card, above how to use it.
        base_model: name or folder of the teacher's pipeline, for the card.
        size: height and width in pixels that the student learned, for the card.
        num_frames: of the videos that it learned, 1 of images; 0: its pipeline is one of images.
        kohya: write a second file, in kohya's keys.

    Raises:
        ValueError: another network, times that the scheduler cannot be asked at, or layers without kohya's keys.
    """
    adapted = student.unwrapped().denoiser.network
    if not isinstance(adapted, LoRA):
        raise ValueError(
            f"a LoRA is made of a scorefield.models.lora.LoRA; got {type(adapted).__name__}. Use export_pipeline."
        )
    index = read_json(pipeline / INDEX)
    scheduler = scheduler_for(student, _scheduler_settings(pipeline))
    family, model = family_of(index), adapted.backbone
    facts = _facts(student, scheduler, size, num_frames, _told_scale(family, getattr(model, "model", model)))
    part = family.part
    with whole_folder(folder) as temporary:
        weights = {f"{part}.{name}": value for name, value in adapter_weights(adapted).items()}
        save_file(weights, temporary / LORA, metadata={"format": "pt"})
        if kohya:
            assert family.kohya is not None
            named = kohya_weights(adapted, family.kohya(layers_of(adapted)))
            save_file(named, temporary / KOHYA, metadata={"format": "pt"})
        scheduler.save_pretrained(temporary / "scheduler")
        (temporary / LORA_FACTS).write_text(json.dumps(facts, indent=2))
        use = _LORA_USE.replace("SCHEDULER", type(scheduler).__name__)
        use = _card(card, use, facts, index["_class_name"], base_model, "lora")
        (temporary / "README.md").write_text(use)
    return folder


def copied_parts(pipeline: Path, variant: str | None = None) -> list[str]:
    """Folders of a teacher's pipeline that belong into its student's, too.

    Call it before a training, too: else its student could not be exported. Raises ``ValueError`` for an index that
    ``components.check_index`` refuses, and for parts whose files are missing or links out of the folder.
    """
    index = read_json(pipeline / INDEX)
    check_index(index, pipeline / INDEX, parts_of(index))
    parts = [part for part in parts_of(index) if part not in (family_of(index).part, "scheduler")]
    check_copyable(pipeline, parts, variant)
    return parts


def read_student_facts(folder: Path) -> dict[str, Any]:
    """Return the ``dmd2_*`` entries of an exported folder, empty for any other."""
    file = folder / (LORA_FACTS if (folder / LORA_FACTS).is_file() else INDEX)
    if not file.is_file():
        return {}
    return {name: value for name, value in read_json(file).items() if name.startswith("dmd2_")}


def _told_scale(family: Family, model: Any) -> float:
    """Return the guidance scale that the student's network is told (FLUX.1-dev, FLUX.2-dev); else 1, for none."""
    return family.embedded if model.config.get("guidance_embeds") else 1.0


def _facts(
    student: Student, scheduler: Any, size: tuple[int, int] | None, num_frames: int, scale: float
) -> dict[str, Any]:
    facts = {
        STUDENT_TIMES: [t * student.denoiser.time_scale for t in student.times],
        "dmd2_num_inference_steps": student.num_steps,
        "dmd2_guidance_scale": scale,
    }  # fmt: skip
    facts |= {} if size is None else {"dmd2_height": size[0], "dmd2_width": size[1]}
    facts |= {NUM_FRAMES: num_frames} if num_frames else {}
    shift = scheduler.config.get("shift")
    return facts if shift is None else {**facts, "dmd2_scheduler_shift": shift}


def _student_index(index: Mapping[str, Any], scheduler: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
    # Parts that this family has not are not copied, so they are not named either.
    known = {*parts_of(index), *(name for name, value in index.items() if not has_part(index, name))}
    dropped = {*UNUSED, "requires_safety_checker"}
    own = {name: value for name, value in index.items() if name in {*known, LABELS} - dropped}
    own |= {"scheduler": ["diffusers", type(scheduler).__name__], **facts}
    if index["_class_name"] == "StableDiffusionPipeline":  # which asks for them by name
        own |= {name: [None, None] for name in UNUSED} | {"requires_safety_checker": False}
    return own


def _checks_safety(index: Mapping[str, Any]) -> bool:
    return has_part(index, "safety_checker")


def _scheduler_settings(pipeline: Path) -> dict[str, Any]:
    return read_json(part_folder(pipeline, "scheduler") / "scheduler_config.json")


def _model(network: nn.Module) -> Any:
    whole = merged(network) if isinstance(network, LoRA) else network
    if not isinstance(whole, DiffusersNetwork):
        raise ValueError(f"a pipeline holds a network of diffusers; got a {type(whole).__name__}.")
    return copy.copy(whole.model)


_PIPELINE_USE = """```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("this folder")
pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=SCALESIZE).images[0]
```
"""

_LORA_USE = """```python
from diffusers import DiffusionPipeline, SCHEDULER

pipe = DiffusionPipeline.from_pretrained("BASE")
pipe.load_lora_weights("this folder")
pipe.scheduler = SCHEDULER.from_pretrained("this folder", subfolder="scheduler")
pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=SCALESIZE).images[0]
```
"""


def _card(text: str, use: str, facts: Mapping[str, Any], pipeline: str, base_model: str, tag: str) -> str:
    steps = facts["dmd2_num_inference_steps"]
    times = ", ".join(f"{t:g}" for t in facts[STUDENT_TIMES])
    size = f", height={facts['dmd2_height']}, width={facts['dmd2_width']}" if "dmd2_height" in facts else ""
    frames = facts.get(NUM_FRAMES, 0)  # 0 of a pipeline of images
    size += f", num_frames={frames}" if frames else ""
    use = use.replace(".images[0]", ".frames[0]") if frames else use
    task = "text-to-video" if frames > 1 else "text-to-image"
    task = "unconditional-image-generation" if "[207]" in use else task
    scale = f"{facts['dmd2_guidance_scale']:g}"
    use = (
        use.replace("PROMPT", '"a prompt"')
        .replace("SCALE", scale)
        .replace("STEPS", str(steps))
        .replace("SIZE", size)
    )
    base = f"base_model: {base_model}\n" if base_model else ""
    return f"""---
library_name: diffusers
pipeline_tag: {task}
{base}license: other
license_name: that-of-the-base-model
tags: [{task}, diffusion, distillation, dmd2{f", {tag}" if tag else ""}]
---
# A student of {steps} step{"s" if steps > 1 else ""}

{text or "Distilled by `scorefield distill`."}

{use.replace("BASE", base_model or "the teacher's folder or name")}
A {pipeline} asked at timestep{"s" if steps > 1 else ""} {times}. Guidance is built in: `guidance_scale` must be
{scale}, and `num_inference_steps` {steps}. Other values give an error at best, and else poor images. Its license
is that of the base model.
"""
