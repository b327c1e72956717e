"""Evaluation of few-step students of the toy world's pipeline against their teacher.

    scorefield toyworld students --students runs/text-1step/student runs/text-4step/student

Writes the judge's answers, Fréchet distances and a contact sheet. Teacher and students are called like any
diffusers pipeline. The teacher's pictures are made once and kept in the cache. Scenes, noise and figures are those
of `scorefield toyworld evaluate`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torchvision.utils import make_grid

from distill.export import LORA, read_student_facts
from scorefield.atomic import whole_file
from scorefield.cache import Content, Entry, TensorCache, fingerprint
from scorefield.files import check_regular
from scorefield.models.places import named_folder
from scorefield.models.pretrained import LORA_FACTS
from scorefield.models.prompts import default_cache_folder
from scorefield.models.weights import check_finite
from scorefield.report.write import add_page
from scorefield.training.options import check_device
from toyworld.bench import Bench, make_bench
from toyworld.evaluate import check_size, check_teacher, draw, load_pipeline, load_scheduler, network_of
from toyworld.options import EvaluatePipeline, EvaluateStudents, check_students


def main(config: EvaluateStudents) -> Path:
    """Measure teacher and students, print and write the figures, and return their folder."""
    check(config)
    bench = make_bench(config.num_prompts, config.num_renders, config.seed)
    drawn = {"teacher": teacher_pictures(config, bench)}
    drawn |= {str(folder): student_pictures(config, folder, bench) for folder in config.students}
    figures: dict[str, Any] = {name: bench.figures(pictures) for name, pictures in drawn.items()}
    teacher = figures["teacher"]
    for folder in config.students:
        own = figures[str(folder)]
        own["frechet_ratio"] = own["frechet_distance"] / teacher["frechet_distance"]
        own["shape_gap"] = own["shape"] - teacher["shape"]
        own["num_steps"] = read_student_facts(folder)["dmd2_num_inference_steps"]
    settings = {
        name: getattr(config, name) for name in ("num_prompts", "num_renders", "guidance", "steps", "seed")
    }
    figures["settings"] = settings
    print(json.dumps(figures, indent=2))
    with whole_file(config.out / "figures.json") as temporary:
        temporary.write_text(json.dumps(figures, indent=2))
    columns = min(16, config.num_prompts)
    sheet = make_grid(torch.cat([pictures[:columns] for pictures in drawn.values()]), nrow=columns, padding=2)
    pixels = ((sheet.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    with whole_file(config.out / "contact_sheet.png") as temporary:
        Image.fromarray(pixels).save(temporary)
    add_page(config.out)
    print(f"figures and contact sheet (a row each: {', '.join(drawn)}) in {config.out}")
    return config.out


def check(config: EvaluateStudents) -> None:
    """Raise ``ValueError`` for options that cannot work, before anything is drawn."""
    check_students(config)
    check_device(config.device)
    for folder in config.students:
        if not read_student_facts(folder):
            raise ValueError(
                f"--students {folder} is not a folder that `scorefield distill` wrote for a text-to-image model, "
                "or another program has saved it again. Pass the folder of the student as it was written."
            )
    check_teacher(Path(named_folder(config.teacher)))


def teacher_pictures(config: EvaluateStudents, bench: Bench) -> Tensor:
    """Return the teacher's pictures (n, 3, 64, 64), from the cache if they were drawn before."""
    pipeline = load_teacher(config)
    check_size(pipeline, config.teacher)
    weights = fingerprint([*network_of(pipeline).parameters(), *pipeline.vae.parameters()])
    cache = TensorCache(default_cache_folder().parent / "toyworld" / "pictures", weights)
    key = json.dumps([config.guidance, config.steps, config.seed, bench.prompts])

    def make(keys: list[Content]) -> list[Entry]:
        made = draw(drawing(config, config.steps, config.guidance), pipeline, bench.prompts)
        return [{"pictures": ((made + 1) * 127.5).round().to(torch.uint8)}]

    return cache.fetch([key], make)[0]["pictures"].float() / 127.5 - 1


def load_teacher(config: EvaluateStudents) -> Any:
    """Return the teacher's pipeline."""
    return load_pipeline(config.teacher, config.device, allow_pickle=config.allow_pickle, variant=config.variant)


def student_pictures(config: EvaluateStudents, folder: Path, bench: Bench) -> Tensor:
    """Return a student's pictures, drawn with its own number of steps."""
    facts = read_student_facts(folder)
    pipeline = load_student(config, folder)
    steps, guidance = facts["dmd2_num_inference_steps"], facts["dmd2_guidance_scale"]
    return draw(drawing(config, steps, guidance), pipeline, bench.prompts)


def load_student(config: EvaluateStudents, folder: Path) -> Any:
    """Return the student's own pipeline, or the teacher's with the student's LoRA and scheduler.

    Raises ``ValueError`` for weights that cannot be read.
    """
    if not (folder / LORA_FACTS).is_file():
        return load_pipeline(folder, config.device)
    pipeline = load_teacher(config)
    try:
        check_regular(folder / LORA)
        weights = load_file(folder / LORA)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"--students {folder}: its weights {LORA} cannot be read: {error}") from error
    check_finite(weights, folder / LORA)
    pipeline.load_lora_weights(weights)  # not the folder, from which diffusers would also load a pickle
    pipeline.scheduler = load_scheduler(folder)
    return pipeline


def drawing(config: EvaluateStudents, steps: int, guidance: float) -> EvaluatePipeline:
    """Return options with which teacher and students draw each prompt from the same noise."""
    return EvaluatePipeline(steps=steps, guidance=guidance, batch_size=config.batch_size, seed=config.seed)
