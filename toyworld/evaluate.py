"""Evaluation of a toy-world pipeline: does it draw what its prompts say?

    scorefield toyworld evaluate --teacher runs/toyworld/pipeline --out runs/toyworld/figures

Writes the judge's answers, Fréchet distances and a contact sheet. The pipeline is called like any diffusers
pipeline; judge and renders see only its images. Its parts are read strictly: no pickles, no code, nothing missing.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid

from scorefield.atomic import whole_file
from scorefield.files import read_json
from scorefield.metrics import extract_features, frechet_distance, kernel_distance
from scorefield.models.components import readable
from scorefield.models.pipeline import open_pipeline
from scorefield.models.places import named_folder
from scorefield.models.preflight import check_last_time, check_many_steps
from scorefield.models.pretrained import INDEX, PartReader, read_schedule
from scorefield.progress import progress
from scorefield.randomness import derived_generator
from scorefield.report.write import add_page
from scorefield.training.options import check_device
from toyworld.captions import caption
from toyworld.data import HELD_OUT
from toyworld.judge import accuracies, as_pictures, load_judge, render_pictures
from toyworld.options import EvaluatePipeline, check_pipeline

SIDE = 64
"""Height and width of the pictures that the judge sees."""

PIPELINES = {"StableDiffusionPipeline": 0.0, "ZImagePipeline": 1.0}
"""Pipelines that the toy world's scripts train, and how much less than ours their scale of guidance is."""


def main(config: EvaluatePipeline) -> Path:
    """Measure the pipeline, print and write the figures, and return their folder."""
    check_pipeline(config)
    check_device(config.device)
    folder = Path(named_folder(config.teacher))
    check_teacher(folder)
    pipeline = load_pipeline(
        config.teacher, config.device, allow_pickle=config.allow_pickle, variant=config.variant
    )
    check_size(pipeline, config.teacher)
    judge = load_judge()
    asked = range(HELD_OUT, HELD_OUT + config.num_prompts)
    renders, attributes = render_pictures(asked, config.seed)
    made = draw(config, pipeline, [caption(one) for one in attributes])
    wanted, others = (
        as_pictures(render_pictures(range(start, start + config.num_renders), config.seed)[0])
        for start in (2 * HELD_OUT, 3 * HELD_OUT)
    )
    own = accuracies(judge, as_pictures(renders), attributes)
    drawn = accuracies(judge, made, attributes)
    unseen = others[: config.num_prompts]  # not those of the reference, which would be too near to themselves
    decoded = round_trip(pipeline, unseen)
    sets = {"pipeline": made, "renders": unseen, "vae_round_trip": decoded}
    reference = extract_features(judge.features, wanted)
    features = {name: extract_features(judge.features, images) for name, images in sets.items()}
    figures = {
        "accuracy": drawn, "accuracy_of_renders": own, "share": {name: drawn[name] / own[name] for name in own},
        "accuracy_of_round_trip": accuracies(judge, round_trip(pipeline, as_pictures(renders)), attributes),
        "psnr_of_round_trip": psnr(decoded, unseen),
        "frechet_distance": {name: frechet_distance(made, reference) for name, made in features.items()},
        "kid": {name: kernel_distance(made, reference) for name, made in features.items()},
        "num_prompts": config.num_prompts, "num_renders": config.num_renders, "guidance": config.guidance,
        "steps": config.steps, "seed": config.seed,
    }  # fmt: skip
    print(json.dumps(figures, indent=2))
    with whole_file(config.out / "figures.json") as temporary:
        temporary.write_text(json.dumps(figures, indent=2))
    sheet = make_grid(torch.cat([as_pictures(renders)[:32], made[:32]]).clamp(-1, 1), nrow=16, padding=2)
    pixels = ((sheet + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    with whole_file(config.out / "contact_sheet.png") as temporary:
        Image.fromarray(pixels).save(temporary)
    add_page(config.out)
    print(f"figures and contact sheet (renders above, answers to their captions below) in {config.out}")
    return config.out


@readable
def check_teacher(folder: Path) -> None:
    """Raise ``ValueError`` for a pipeline that knows few noise levels, or whose noisiest one says nothing."""
    if (folder / INDEX).is_file():
        settings = read_json(folder / "scheduler" / "scheduler_config.json")
        check_many_steps(settings, folder)
        check_last_time(*read_schedule(settings), folder)


@readable
def load_pipeline(name: str | Path, device: str, allow_pickle: bool = False, variant: str = "") -> Any:
    """Return a pipeline of diffusers in float32, one of :data:`PIPELINES`, read part by part as a teacher is.

    Its own scheduler draws, which may be a student's. Raises ``ValueError`` for another class of pipeline, and for
    weights that are missing, pickled or damaged, or that do not fit.
    """
    folder = Path(named_folder(name))
    if not (folder / INDEX).is_file():
        raise ValueError(f"--teacher {folder} is no folder of diffusers: it has no {INDEX}.")
    parts = open_pipeline(folder, PartReader(torch.float32, torch.device("cpu"), allow_pickle, variant or None))
    kind, part = parts.family.pipeline, parts.family.part
    if kind not in PIPELINES:
        raise ValueError(f"{folder} must be a {' or a '.join(PIPELINES)}; got {kind!r}.")
    parts.check((SIDE, SIDE))
    absent = dict.fromkeys(("safety_checker", "feature_extractor"), None) | {"requires_safety_checker": False}
    pipeline: Any = getattr(diffusers, kind)(
        **parts.read_texts(), **{part: parts.network()}, vae=parts.codec().vae, scheduler=load_scheduler(folder),
        **(absent if part == "unet" else {}),
    )  # fmt: skip
    return pipeline.to(device)


def network_of(pipeline: Any) -> Any:
    """Return the network of a pipeline of diffusers that predicts: its UNet or its transformer."""
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def check_size(pipeline: Any, folder: str | Path) -> None:
    """Raise ``ValueError`` for a pipeline that draws pictures of another size than the judge sees."""
    own = network_of(pipeline).config.get("sample_size")  # of latents; none: it draws any
    height, width = own if isinstance(own, list | tuple) else (own, own)
    if own is not None and {height, width} != {SIDE // pipeline.vae_scale_factor}:
        factor = pipeline.vae_scale_factor
        raise ValueError(
            f"--teacher {folder} draws pictures of {height * factor} x {width * factor} pixels, and the judge of "
            f"the toy world sees {SIDE} x {SIDE}. Pass a pipeline of that size."
        )


def check_captions(prompts: Sequence[str], tokenizer: Any) -> None:
    """Raise ``ValueError`` for a text encoder that reads less than the captions of the toy world."""
    lengths = [len(tokenizer(prompt, verbose=False).input_ids) for prompt in prompts]
    most = tokenizer.model_max_length
    if max(lengths) > most:
        first = prompts[lengths.index(max(lengths))]
        raise ValueError(
            f"the captions of the toy world are longer than this pipeline's text encoder reads, such as {first!r} "
            f"with {max(lengths)} tokens of {most}. Pass a pipeline that was trained on them."
        )


def load_scheduler(folder: Path) -> Any:
    """Return the scheduler in ``folder / "scheduler"``. Raises ``ValueError`` unless it is one of diffusers."""
    settings = read_json(folder / "scheduler" / "scheduler_config.json")
    name = settings.get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ValueError(f"{folder / 'scheduler'} must be a scheduler of diffusers; got {str(name)[:80]!r}.")
    return kind.from_config(settings)


def draw(config: EvaluatePipeline, pipeline: Any, prompts: list[str]) -> Tensor:
    """Pictures (n, 3, 64, 64) in [-1, 1]; each prompt has noise of its own."""
    made, scale = [], config.guidance - PIPELINES[type(pipeline).__name__]
    check_captions(prompts, pipeline.tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    for start in progress(range(0, len(prompts), config.batch_size), "pictures, in batches"):
        part = prompts[start : start + config.batch_size]
        generators = [derived_generator(config.seed, "picture", start + row) for row in range(len(part))]
        answer = pipeline(
            part, height=SIDE, width=SIDE, num_inference_steps=config.steps, guidance_scale=scale,
            generator=generators,
        )  # fmt: skip
        made += [pil_to_tensor(image) for image in answer.images]
    return as_pictures(torch.stack(made))


@torch.no_grad()
def round_trip(pipeline: Any, images: Tensor) -> Tensor:
    """Return images after a pass through the autoencoder and back: what perfect latents would look like."""
    parts = []
    for part in images.split(100):
        latents = pipeline.vae.encode(part.to(pipeline.device)).latent_dist.mean
        parts.append(pipeline.vae.decode(latents).sample.clamp(-1, 1).cpu())
    return torch.cat(parts)


def psnr(made: Tensor, wanted: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of images in [-1, 1], over all their pixels."""
    return float(10 * (4 / (made - wanted).square().mean()).log10())
