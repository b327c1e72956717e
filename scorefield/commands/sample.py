"""Images from a teacher or a student: as PNG files or one npz file, and a grid to look at; videos as GIF files.

    scorefield sample --teacher runs/student/student --out samples --num-images 1000
    scorefield sample --teacher toyworld --prompts "a red mug" "a blue chair" --guidance 3
    accelerate launch -m scorefield sample --teacher runs/teacher/teacher --steps 10 --out ten.npz

Image i depends on the seed and i alone: not on the batch size, nor on the number of processes.
"""

import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from scorefield.atomic import foreign, whole_file, whole_folder
from scorefield.commands.options import Sample, check_sample
from scorefield.data.tables import TABLES
from scorefield.data.texts import read_texts
from scorefield.models.draw import draw as draw_images
from scorefield.models.teacher import Teacher, load_teacher
from scorefield.progress import Progress, working
from scorefield.schedule import Schedule
from scorefield.solvers import Plan, caution, plan
from scorefield.training.identity import check_ranks
from scorefield.training.launcher import check_drawing
from scorefield.training.options import check_out
from scorefield.training.ranks import check_launch, check_told_device
from scorefield.training.report import as_rows

COMMENT = b"scorefield samples"
"""Of an npz file that :func:`write` wrote: only such a one is replaced."""

GRID = ".grid.png"
"""What the name of the picture ends in that lies beside the samples."""

FPS = 16
"""Frames a second of videos whose model does not say."""


def main(config: Sample) -> Path:
    """Sample, write, and return the folder or file."""
    check_sample(config)
    check_samples_out(config.out)
    check_drawing(config.precision)
    check_told_device()
    accelerator = Accelerator(mixed_precision=config.precision)
    check_launch(accelerator)
    check_ranks(config, accelerator)
    with working("loading the model"):
        teacher = load(config, accelerator.device)
    teacher.guided(config.guidance)  # or it says why not
    labels = asked_labels(config, teacher)
    if not teacher.times and accelerator.is_main_process:
        report_plan(teacher.denoiser.schedule, plan_of(config, teacher))
    # With fewer images than ranks some have none.
    own = torch.arange(len(labels))[accelerator.process_index :: accelerator.num_processes]
    parts = own.split(config.batch_size or batch_size_for(teacher.size, teacher.num_frames))
    with accelerator.autocast():
        made = draw(config, teacher, counted(parts), labels)
    whole = join(made, len(labels), accelerator)
    if accelerator.is_main_process:
        with working("writing the images"):
            picture = write(
                whole, labels, config.out, columns=columns(teacher.num_classes if config.prompts else 0),
                facts=facts_of(config, teacher), fps=teacher.fps or FPS,
            )  # fmt: skip
        what = "videos" if whole.ndim == 5 else "images"
        print(f"{len(whole):,} {what} in {config.out}, the first {min(len(whole), most(whole))} in {picture}")
    accelerator.wait_for_everyone()
    return config.out


def batch_size_for(size: tuple[int, int], num_frames: int = 1) -> int:
    """Return how many images of (height, width) are drawn at a time by default: a megapixel, at most 250.

    >>> [batch_size_for((side, side)) for side in (8, 64, 256, 512, 1024, 2048)]
    [250, 250, 16, 4, 1, 1]
    """
    return max(1, min(250, 2**20 // (size[0] * size[1] * num_frames)))


def counted(parts: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the batches, and show how many of their images are done."""
    with Progress("images", sum(map(len, parts)), unit="image") as bar:
        for part in parts:
            yield part
            bar.update(len(part))


def facts_of(config: Sample, teacher: Teacher) -> Callable[[int], dict[str, Any]]:
    """Return what metadata.jsonl says of the images of a label: prompt or class, seed and network calls."""
    steps = len(teacher.times) or config.steps
    prompts = () if teacher.listed is None else teacher.listed.prompts
    video = {"num_frames": teacher.num_frames} if teacher.num_frames > 1 else {}

    def facts(label: int) -> dict[str, Any]:
        text = {"text": prompts[label]} if prompts else {}
        return {**text, "label": label, "seed": config.seed, "steps": steps, **video}

    return facts


def load(config: Sample, device: torch.device) -> Teacher:
    """Return the teacher or student; one of prompts is asked for those of ``--prompts``.

    Raises ``ValueError`` for a model that cannot be read, or that the other options are not for.
    """
    if any(not prompt.strip() for prompt in config.prompts):
        raise ValueError(f"--prompts must say something; got {list(config.prompts)}.")
    teacher = load_teacher(
        config.teacher, config.network, device=device, size=config.size or None, allow_pickle=config.allow_pickle,
        variant=config.variant or None, dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
        few_steps=True, rounding=config.quantize, num_frames=config.num_frames,
    )  # fmt: skip
    if teacher.texts is not None:
        if not config.prompts:
            raise ValueError(f'{config.teacher} draws what --prompts ask for, such as "a red mug"; got none.')
        prompts = read_prompts(config)
        kept = teacher.usable(prompts, config.long_prompts, "--prompts")
        return teacher.asked([prompts[number] for number in kept], config.negative_prompt)
    for name in ("prompts", "negative_prompt"):
        if getattr(config, name):
            raise ValueError(f"{config.teacher} takes no prompts; leave out --{name.replace('_', '-')}.")
    return teacher


def read_prompts(config: Sample) -> tuple[str, ...]:
    """Return the prompts of ``--prompts``; names of files and folders stand for the prompts in them.

    Raises ``ValueError`` for one that cannot be read, and for a name of a file that is not there.
    """
    prompts: list[str] = []
    for prompt in config.prompts:
        held = [prompt]
        if names_a_source(prompt):
            held = list(read_texts(prompt, on_bad_data=config.on_bad_data).prompts)
        prompts += held
    return tuple(prompts)


def names_a_source(prompt: str) -> bool:
    """Return True for a prompt that names a file or a folder of prompts.

    A folder is named with a slash: the word cat is a prompt beside a folder of cats. Raises ``ValueError`` for one
    word with the ending of such a file where there is none: nobody wants a picture of prompts.txt.
    """
    path, ending = Path(prompt), Path(prompt).suffix.lower() in (*TABLES, ".tar")
    try:
        if (ending and path.exists()) or ("/" in prompt and path.is_dir()):
            return True
    except (OSError, ValueError):  # a prompt may be longer than names are
        return False
    if ending and len(prompt.split()) == 1:
        raise ValueError(f"--prompts {prompt}: no such file. Correct its name.")
    return False


def columns(count: int) -> int:
    """Return the grid's number of columns, about ten, so that each shows one of ``count`` prompts."""
    return 10 if not count or count > 10 else 10 // count * count


def check_samples_out(out: Path) -> None:
    """Raise ``ValueError`` unless ``out`` can be written: a new file or folder, or one of older samples.

    Older samples are what :func:`write` left, unchanged, and nothing else.
    """
    try:
        place = out.resolve()
        place.with_name(f"{place.name}{GRID}").exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"--out {out} cannot be written: {error}. Choose another --out.") from error
    check_out(place.parent)
    if out.suffix == ".npz":
        if out.is_dir():
            raise ValueError(f"--out {out} is a folder; expected a file to write. Choose another --out.")
        if place.exists() and not is_own_npz(place):
            raise ValueError(f"--out {out} is a file that no earlier sampling wrote. Choose another --out.")
        return
    if place.exists() and (not place.is_dir() or os.path.ismount(place)):
        raise ValueError(f"--out {out} is a file or a mounted disk; expected a folder that can be replaced.")
    if others := foreign(place):
        raise ValueError(
            f"--out {out} holds {others[0][0]}, which is no earlier sample, or was changed since. Choose another "
            "--out."
        )


def is_own_npz(path: Path) -> bool:
    """Return True for an npz file as :func:`write` left it; one that numpy saved again has lost its comment."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment == COMMENT
    except (OSError, zipfile.BadZipFile):
        return False


def asked_labels(config: Sample, teacher: Teacher) -> Tensor:
    """One label per image. Raises ``ValueError`` for classes that the model does not know."""
    classes = config.classes or tuple(range(max(1, teacher.num_classes)))
    if not all(0 <= label < max(1, teacher.num_classes) for label in classes):
        raise ValueError(f"--classes must lie in [0, {max(1, teacher.num_classes) - 1}]; got {classes}.")
    number = config.num_images or (len(classes) if teacher.listed is not None else 100)
    return torch.tensor(classes)[torch.arange(number) % len(classes)]


def draw(config: Sample, teacher: Teacher, parts: Iterable[Tensor], labels: Tensor) -> Tensor:
    """Return the images of some numbers, given batch by batch; see :func:`scorefield.models.draw.draw`."""
    chosen = None if teacher.times else plan_of(config, teacher)
    return draw_images(teacher, parts, labels, seed=config.seed, guidance=config.guidance, chosen=chosen)


def plan_of(config: Sample, teacher: Teacher) -> Plan:
    """Return how a teacher is sampled under these options. Raises ``ValueError`` for more calls than timesteps."""
    return plan(teacher.denoiser.schedule, config.steps, config.sampler, config.grid, shift=teacher.shift)


def report_plan(schedule: Schedule, chosen: Plan) -> None:
    """Print which sampler draws, and warn where DDIM would draw better at the same cost."""
    print(f"sampler: {chosen.solver} on a {chosen.spacing} grid, {chosen.num_calls} network calls an image")
    if warning := caution(schedule, chosen):
        print(f"warning: {warning}", file=sys.stderr)


def join(own: Tensor, num_images: int, accelerator: Accelerator) -> Tensor:
    """Return all ranks' images in order; rank r holds numbers r, r + ranks, ..."""
    if accelerator.num_processes == 1:
        return own
    most = -(-num_images // accelerator.num_processes)
    padded = torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])]).to(accelerator.device)
    every = accelerator.gather(padded).view(accelerator.num_processes, most, *own.shape[1:])
    return every.transpose(0, 1).flatten(0, 1)[:num_images].cpu()


def write(
    images: Tensor, labels: Tensor, out: Path, columns: int = 10,
    facts: Callable[[int], Mapping[str, Any]] = lambda label: {"label": label}, fps: int = FPS,
) -> Path:  # fmt: skip
    """Write PNG files named by number and class, and a metadata.jsonl; or one npz file of bytes.

    Videos (n, c, frames, h, w) become GIF files of ``fps`` frames a second. All of it is there whole or not at
    all. Returns the picture of the first hundred, or of the first videos' frames, which lies beside: within the
    folder it would be one of the images. ``facts`` are those of an image of some label.
    """
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    place = out.resolve()
    if out.suffix == ".npz":
        with whole_file(place) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, images=pixels.numpy(), labels=labels.numpy())
            file.flush()
            with zipfile.ZipFile(temporary, "a") as archive:
                archive.comment = COMMENT
    else:
        with whole_folder(place) as folder:
            rows = []
            for number, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
                name = f"{label:04d}/{number:06d}.{'gif' if image.ndim == 4 else 'png'}"
                (folder / name).parent.mkdir(exist_ok=True)
                save_picture(image, folder / name, fps)
                rows.append(json.dumps({"file_name": name, **facts(label)}) + "\n")
            (folder / "metadata.jsonl").write_text("".join(rows))
    shown, columns = as_rows(pixels[: most(pixels)], columns)
    overview = make_grid(shown, nrow=columns, padding=1, pad_value=128)[: pixels.shape[1]]
    picture = place.with_name(f"{place.name}{GRID}")
    with whole_file(picture) as temporary:
        to_picture(overview).save(temporary)
    return picture


def most(images: Tensor) -> int:
    """Return how many images, or videos (n, c, frames, h, w), the grid shows at most."""
    return 10 if images.ndim == 5 else 100


def save_picture(pixels: Tensor, path: Path, fps: int) -> None:
    """Write bytes (c, h, w) as a picture, or (c, frames, h, w) as a GIF that repeats endlessly."""
    if pixels.ndim == 3:
        to_picture(pixels).save(path)
        return
    first, *others = map(to_picture, pixels.unbind(1))
    # In hundredths of a second, and players show at most fifty frames in one.
    hundredths = max(2, round(100 / fps))
    first.save(path, save_all=True, append_images=others, duration=10 * hundredths, loop=0)


def to_picture(pixels: Tensor) -> Image.Image:
    """Return (1 or 3, h, w) bytes as a picture."""
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
