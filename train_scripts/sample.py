"""Images from a teacher or a student: as PNG files or one npz file, and a grid to look at.

    python train_scripts/sample.py --model runs/student/student --out samples --num-images 1000
    accelerate launch train_scripts/sample.py --model runs/teacher/teacher --steps 18 --sampler heun --out heun.npz

Image i depends on the seed and i alone: not on the batch size, nor on the number of processes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from command import check_numbers, check_out, run
from networks import Teacher, load_teacher
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from distill.student import Student
from score import guided
from score.randomness import derived_generator
from score.sampling import ddim, ddpm, grid, heun, initial_noise, sample

SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "heun": heun}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sample a teacher or a student."""

    model: str
    """Folder of train_teacher.py or train_dmd.py, a diffusers folder, or module:function."""
    out: Path = Path("samples")
    """Folder for PNG files and grid.png, or a file that ends in .npz."""
    num_images: int = 100
    """Images in all."""
    classes: tuple[int, ...] = ()
    """Classes to make, in turn; none means all of them."""
    steps: int = 50
    """Network calls per image of a teacher (nearly twice as many with heun). A student knows its own."""
    sampler: Literal["ddim", "ddpm", "heun"] = "ddim"
    """Of a teacher."""
    guidance: float = 1.0
    """Scale of classifier-free guidance of a teacher; 1 means none. A student has it built in."""
    batch_size: int = 250
    """Images at a time and process."""
    seed: int = 0
    """Of all images: image i of a seed is always the same."""


def main(config: Config) -> Path:
    """Sample, write, and return the folder or file."""
    check_numbers(config, positive=("num_images", "steps", "batch_size"), not_negative=("guidance",))
    check_out(config.out.parent if config.out.suffix == ".npz" else config.out)
    model = load_teacher(config.model)
    labels = asked_labels(config, model)
    accelerator = Accelerator()
    model.denoiser.network.to(accelerator.device)
    own = torch.arange(accelerator.process_index, config.num_images, accelerator.num_processes)
    parts = tqdm(own.split(config.batch_size), desc="images", disable=None)
    with accelerator.autocast():
        made = draw(config, model, parts, labels)
    whole = join(made, config.num_images, accelerator)
    if accelerator.is_main_process:
        write(whole, labels, config.out)
    accelerator.wait_for_everyone()
    return config.out


def asked_labels(config: Config, model: Teacher) -> Tensor:
    """One label per image. Raises ``ValueError`` for classes that the model does not know."""
    classes = config.classes or tuple(range(max(1, model.num_classes)))
    if not all(0 <= label < max(1, model.num_classes) for label in classes):
        raise ValueError(f"--classes must lie in [0, {max(1, model.num_classes) - 1}]; got {classes}.")
    return torch.tensor(classes)[torch.arange(config.num_images) % len(classes)]


@torch.no_grad()
def draw(config: Config, model: Teacher, parts: Iterable[Tensor], labels: Tensor) -> Tensor:
    """The images of some numbers, given batch by batch, on the CPU; image i is of ``labels[i]``."""
    made = [make(config, model, part, labels[part]) for part in parts]
    return torch.cat([torch.zeros(0, *model.shape), *made])


def make(config: Config, model: Teacher, part: Tensor, labels: Tensor) -> Tensor:
    """One batch of images, each from generators of its own."""
    device = next(model.denoiser.network.parameters()).device
    generators = [derived_generator(config.seed, "sample", int(number)) for number in part]
    noise = torch.stack([torch.randn(model.shape, generator=generator) for generator in generators]).to(device)
    cond = model.cond(labels.to(device))
    if model.times:
        return Student(model.denoiser, model.times).sample(noise, cond, generator=generators).cpu()
    denoiser = guided(model.denoiser, config.guidance, model.cond(torch.tensor([model.num_classes])))
    times = grid(denoiser.schedule, config.steps)
    x_t = initial_noise(denoiser.schedule, noise, float(times[0]))
    step = SAMPLERS[config.sampler]()
    return sample(denoiser, x_t, cond, times=times, step=step, generator=generators).cpu()


def join(own: Tensor, num_images: int, accelerator: Accelerator) -> Tensor:
    """All ranks' images in order; rank r holds numbers r, r + ranks, ..."""
    if accelerator.num_processes == 1:
        return own
    most = -(-num_images // accelerator.num_processes)
    padded = torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])]).to(accelerator.device)
    every = accelerator.gather(padded).view(accelerator.num_processes, most, *own.shape[1:])
    return every.transpose(0, 1).flatten(0, 1)[:num_images].cpu()


def write(images: Tensor, labels: Tensor, out: Path) -> None:
    """PNG files named by number and class, and a grid of the first hundred; or one npz file of bytes."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    if out.suffix == ".npz":
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".writing-{out.name}")
        np.savez_compressed(temporary, images=pixels.numpy(), labels=labels.numpy())
        temporary.rename(out)
        return
    for number, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        folder = out / f"{label:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        to_picture(image).save(folder / f"{number:06d}.png")
    overview = make_grid(pixels[:100], nrow=10, padding=1, pad_value=128)[: pixels.shape[1]]
    to_picture(overview).save(out / "grid.png")


def to_picture(pixels: Tensor) -> Image.Image:
    """(1 or 3, h, w) bytes as a picture."""
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


if __name__ == "__main__":
    run(main, Config, __doc__)
