"""Images from a teacher or a student: as PNG files or one npz file, and a grid to look at.

    python train_scripts/sample.py --teacher runs/student/student --out samples --num-images 1000
    python train_scripts/sample.py --teacher toyworld --prompts "a red mug" "a blue chair" --guidance 3
    accelerate launch train_scripts/sample.py --teacher runs/teacher/teacher --steps 10 --out ten.npz

Image i depends on the seed and i alone: not on the batch size, nor on the number of processes.
"""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from command import check_numbers, check_out, run
from PIL import Image
from texts import read_texts
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from distill.student import Student
from scorefield.atomic import foreign, whole_file, whole_folder
from scorefield.data.rows import OnBadData
from scorefield.data.tables import TABLES
from scorefield.grids import Spacing
from scorefield.models.prompts import LongPrompts
from scorefield.models.teacher import Teacher, load_teacher
from scorefield.randomness import derived_generator
from scorefield.sampling import initial_noise, sample
from scorefield.schedule import Schedule
from scorefield.solvers import Plan, Solver, caution, plan
from scorefield.training.ranks import check_launch


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sample a teacher or a student."""

    teacher: str
    """What draws, teacher or student: a folder of train_teacher.py, train_dmd.py or train_circles.py, a diffusers
    folder, the name of a diffusers model online, toyworld, which ships, or module:function, whose code is run."""
    network: str = ""
    """For the student of a module:function: the module:function that builds its network, whose code is run. What a
    folder names is never run."""
    prompts: tuple[str, ...] = ()
    """What a text-to-image model is asked for, in turn: image i shows prompt i modulo their number, its class. One
    that names a .txt, .jsonl, .csv, .parquet or .tar file stands for the prompts in it."""
    long_prompts: LongPrompts = "stop"
    """What to do about prompts that are longer than the text encoders read."""
    on_bad_data: OnBadData = "stop"
    """Lines of a file of prompts that cannot be used: stop, or leave them out."""
    negative_prompt: str = ""
    """What guidance moves away from."""
    out: Path = Path("samples")
    """Folder for PNG files, in a subfolder per class number, or a file that ends in .npz. Earlier samples are
    replaced. The first hundred are shown in the picture <out>.grid.png, which lies beside."""
    num_images: int = 100
    """Images in all."""
    classes: tuple[int, ...] = ()
    """Classes to make, in turn; none means all of them."""
    steps: int = 50
    """Network calls per image of a teacher, whatever the sampler. Heun pays two a step: 17 calls are 9 steps. A
    student knows its own."""
    sampler: Literal["auto", Solver] = "auto"
    """Of a teacher. auto is unipc, or ddim in up to four calls of a plain DDPM. ddim beats heun below 15 calls of
    EDM or a plain DDPM, and heun, dpm++ and unipc below 50 calls on the uniform grid. ddpm adds noise and wants
    many calls."""
    grid: Literal["auto", Spacing] = "auto"
    """Times of a teacher's calls. trailing: even timesteps, as diffusers has it; karras, log-snr: even in a power,
    or in the logarithm, of the noise level; uniform: even timesteps whose last is the nearly clean image, a wasted
    call. auto suits the sampler: log-snr for unipc and dpm++, karras for ddim; trailing for flows."""
    guidance: float = 1.0
    """Scale of classifier-free guidance of a teacher; 1 means none, 7.5 is usual for Stable Diffusion. A student
    has it built in."""
    size: Annotated[int, tyro.conf.arg(aliases=("--teacher-size",))] = 0
    """Height and width of a text-to-image model's pictures in pixels; 0 means its own."""
    allow_pickle: bool = False
    """Read pickled weights of a diffusers model that has no safetensors. Only if you trust where it comes from."""
    variant: str = ""
    """Of the weight files of a diffusers model that has no plain ones, such as fp16."""
    batch_size: int = 250
    """Images at a time and process."""
    precision: Literal["no", "bf16"] = "no"
    """Autocast precision of the network; bf16 also loads the weights of a text-to-image model as such."""
    seed: int = 0
    """Of all images: image i of a seed is always the same."""


def main(config: Config) -> Path:
    """Sample, write, and return the folder or file."""
    check_numbers(config, positive=("num_images", "steps", "batch_size"), not_negative=("guidance", "size"))
    check_samples_out(config.out)
    accelerator = Accelerator(mixed_precision=config.precision)
    check_launch(accelerator)
    teacher = load(config, accelerator.device)
    teacher.guided(config.guidance)  # or it says why not
    labels = asked_labels(config, teacher)
    if not teacher.times and accelerator.is_main_process:
        report_plan(teacher.denoiser.schedule, plan_of(config, teacher))
    # With fewer images than ranks some have none.
    own = torch.arange(config.num_images)[accelerator.process_index :: accelerator.num_processes]
    parts = tqdm(own.split(config.batch_size), desc="images", disable=None)
    with accelerator.autocast():
        made = draw(config, teacher, parts, labels)
    whole = join(made, config.num_images, accelerator)
    if accelerator.is_main_process:
        picture = write(whole, labels, config.out, columns=columns(teacher.num_classes if config.prompts else 0))
        print(f"{len(whole):,} images in {config.out}, the first {len(whole[:100])} in {picture}")
    accelerator.wait_for_everyone()
    return config.out


def load(config: Config, device: torch.device) -> Teacher:
    """The teacher or student; one of prompts is asked for those of ``--prompts``.

    Raises ``ValueError`` for a model that cannot be read, or that the other options are not for.
    """
    if any(not prompt.strip() for prompt in config.prompts):
        raise ValueError(f"--prompts must say something; got {list(config.prompts)}.")
    teacher = load_teacher(
        config.teacher, config.network, device=device, size=config.size or None, allow_pickle=config.allow_pickle,
        variant=config.variant or None, dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
        few_steps=True,
    )  # fmt: skip
    if teacher.texts is not None:
        if not config.prompts:
            raise ValueError(f'{config.teacher} draws what --prompts ask for, such as "a red mug"; got none.')
        prompts = read_prompts(config)
        kept = teacher.fitting(prompts, config.long_prompts, "--prompts")
        return teacher.asked([prompts[number] for number in kept], config.negative_prompt)
    for name in ("prompts", "negative_prompt"):
        if getattr(config, name):
            raise ValueError(f"{config.teacher} takes no prompts; leave out --{name.replace('_', '-')}.")
    return teacher


def read_prompts(config: Config) -> tuple[str, ...]:
    """What ``--prompts`` say, or what the one file holds that they name. Raises ``ValueError`` for a bad one."""
    file = Path(config.prompts[0]) if len(config.prompts) == 1 else Path()
    if file.suffix.lower() not in (*TABLES, ".tar") or not file.exists():
        return config.prompts
    return read_texts(str(file), on_bad_data=config.on_bad_data).prompts


def columns(count: int) -> int:
    """Of the grid: as many as make each column show one of ``count`` prompts, about ten."""
    return 10 if not count or count > 10 else 10 // count * count


def check_samples_out(out: Path) -> None:
    """Raise ``ValueError`` unless ``out`` can be written: a new file or folder, or one of older samples.

    Older samples are what :func:`write` left, unchanged, and nothing else.
    """
    place = out.resolve()
    check_out(place.parent)
    if out.suffix == ".npz":
        if out.is_dir():
            raise ValueError(f"--out {out} is a folder; expected a file to write. Choose another --out.")
        return
    if place.exists() and (not place.is_dir() or os.path.ismount(place)):
        raise ValueError(f"--out {out} is a file or a mounted disk; expected a folder that can be replaced.")
    if others := foreign(place):
        raise ValueError(
            f"--out {out} holds {others[0][0]}, which is no earlier sample, or was changed since. Choose another "
            "--out."
        )


def asked_labels(config: Config, teacher: Teacher) -> Tensor:
    """One label per image. Raises ``ValueError`` for classes that the model does not know."""
    classes = config.classes or tuple(range(max(1, teacher.num_classes)))
    if not all(0 <= label < max(1, teacher.num_classes) for label in classes):
        raise ValueError(f"--classes must lie in [0, {max(1, teacher.num_classes) - 1}]; got {classes}.")
    return torch.tensor(classes)[torch.arange(config.num_images) % len(classes)]


@torch.no_grad()
def draw(config: Config, teacher: Teacher, parts: Iterable[Tensor], labels: Tensor) -> Tensor:
    """The images of some numbers, given batch by batch, on the CPU; image i is of ``labels[i]``."""
    made = [make(config, teacher, part, labels[part]) for part in parts if len(part)]
    return torch.cat(made) if made else torch.zeros(0, *teacher.image_shape)


def make(config: Config, teacher: Teacher, part: Tensor, labels: Tensor) -> Tensor:
    """One batch of images, each from generators of its own."""
    generators = [derived_generator(config.seed, "sample", int(number)) for number in part]
    noise = torch.stack([torch.randn(teacher.shape, generator=generator) for generator in generators])
    noise = noise.to(teacher.device)
    cond = teacher.cond(labels.to(teacher.device))
    if teacher.times:
        return teacher.decode(
            Student(teacher.denoiser, teacher.times).sample(noise, cond, generator=generators)
        ).cpu()
    denoiser = teacher.guided(config.guidance)
    chosen = plan_of(config, teacher)
    x_t = initial_noise(denoiser.schedule, noise, float(chosen.times[0]))
    x0 = sample(denoiser, x_t, cond, times=chosen.times, step=chosen.step, generator=generators)
    return teacher.decode(x0).float().cpu()


def plan_of(config: Config, teacher: Teacher) -> Plan:
    """How a teacher is sampled under these options. Raises ``ValueError`` for more calls than timesteps."""
    return plan(teacher.denoiser.schedule, config.steps, config.sampler, config.grid, shift=teacher.shift)


def report_plan(schedule: Schedule, chosen: Plan) -> None:
    """Print which sampler draws, and warn where DDIM would draw better at the same cost."""
    print(f"sampler: {chosen.solver} on a {chosen.spacing} grid, {chosen.num_calls} network calls an image")
    if warning := caution(schedule, chosen):
        print(f"warning: {warning}", file=sys.stderr)


def join(own: Tensor, num_images: int, accelerator: Accelerator) -> Tensor:
    """All ranks' images in order; rank r holds numbers r, r + ranks, ..."""
    if accelerator.num_processes == 1:
        return own
    most = -(-num_images // accelerator.num_processes)
    padded = torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])]).to(accelerator.device)
    every = accelerator.gather(padded).view(accelerator.num_processes, most, *own.shape[1:])
    return every.transpose(0, 1).flatten(0, 1)[:num_images].cpu()


def write(images: Tensor, labels: Tensor, out: Path, columns: int = 10) -> Path:
    """PNG files named by number and class, or one npz file of bytes: whole or not at all.

    Returns the picture of the first hundred, which lies beside: within the folder it would be one of the images.
    """
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    place = out.resolve()
    if out.suffix == ".npz":
        with whole_file(place) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, images=pixels.numpy(), labels=labels.numpy())
    else:
        with whole_folder(place) as folder:
            for number, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
                (folder / f"{label:04d}").mkdir(exist_ok=True)
                to_picture(image).save(folder / f"{label:04d}" / f"{number:06d}.png")
    overview = make_grid(pixels[:100], nrow=columns, padding=1, pad_value=128)[: pixels.shape[1]]
    picture = place.with_name(f"{place.name}.grid.png")
    with whole_file(picture) as temporary:
        to_picture(overview).save(temporary)
    return picture


def to_picture(pixels: Tensor) -> Image.Image:
    """(1 or 3, h, w) bytes as a picture."""
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


if __name__ == "__main__":
    run(main, Config, __doc__)
