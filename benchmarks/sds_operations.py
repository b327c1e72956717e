"""Floating-point operations of a text-to-3D step at the size of Stable Diffusion, counted on the meta device.

The functions that ``sds_step.py`` times are counted on tensors without data, from the image back to the image,
with all gradients that autograd computes on the way. A multiplication with addition is two operations. Matrix
products, convolutions and attention are counted. Rendering is not.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sds_contenders import Guide, Loss, generfacto, ours, threestudio
from teachers import as_codec, build, meta_cond, table_head
from torch import Generator, Tensor
from torch.utils.flop_counter import FlopCounterMode

from scorefield.denoiser import NetworkDenoiser
from scorefield.guidance import guided
from scorefield.models.codec import Codec
from scorefield.models.networks import DiffusersNetwork
from scorefield.models.teacher import Teacher
from scorefield.schedule import VariancePreserving

NETWORK, ENCODERS = "sd21_unet", {"AutoencoderKL": "sd_vae", "AutoencoderTiny": "taesd"}
TOKENS, SCALE = 77, 101.0
DRAWS = (1, 2, 4)
GOALS = {"ours": 3.9e12, "ours, AutoencoderTiny": 1.9e12}


def tables(folder: Path, size: int = 512) -> list[str]:
    """Return Markdown tables of what one image of a step costs: its parts, and all contenders."""
    full, tiny = (meta_guide(folder, NETWORK, file, size) for file in ENCODERS.values())
    return [*parts_table(full, tiny, size), "", *totals_table(full, tiny, size)]


def meta_guide(folder: Path, network: str, vae: str, size: int) -> Guide:
    """Return a guided teacher for images of size x size pixels. Raises ``ValueError`` for a missing file."""
    unet, codec = build(folder, network), as_codec(build(folder, vae))
    denoiser = NetworkDenoiser(DiffusersNetwork(unet), VariancePreserving.scaled_linear())
    shape = (codec.channels, size // codec.factor, size // codec.factor)
    teacher = Teacher(denoiser=denoiser, shape=shape, codec=codec)
    return Guide(teacher=teacher, negative=meta_cond(unet.config, TOKENS), scale=SCALE)


def step_operations(loss: Loss, guide: Guide) -> int:
    """Return the operations for one image, from the image to its gradient."""
    image = torch.zeros(1, 3, *guide.teacher.size, device="meta", requires_grad=True)
    return operations(lambda: loss(image, guide.negative, Generator()).backward())


def operations(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def parts(guide: Guide) -> dict[str, int]:
    """Return the operations of the parts of a step for one image.

    They are a guided prediction, the decoder, the encoder with its backward pass, and the same with weights that
    learn.
    """
    teacher, t = guide.teacher, torch.full((1,), 500.0, device="meta")
    x_t = torch.zeros(1, *teacher.shape, device="meta")
    denoiser = guided(teacher.denoiser, guide.scale, guide.negative)

    def there_and_back() -> None:
        image = torch.zeros(1, 3, *teacher.size, device="meta", requires_grad=True)
        latents: Tensor = teacher.encode(image)
        latents.sum().backward()

    with torch.no_grad():
        counted = {"network": operations(lambda: denoiser(x_t, t, guide.negative))}
        counted["decoder"] = operations(lambda: teacher.decode(x_t))
    counted["encoder"] = operations(there_and_back)
    assert isinstance(teacher.codec, Codec)
    teacher.codec.vae.requires_grad_(True)
    counted["learning encoder"] = operations(there_and_back)
    teacher.codec.vae.requires_grad_(False)
    return counted


def totals(full: Guide, tiny: Guide) -> dict[str, dict[int, int]]:
    """Return operations for one image with K noises and times, by contender and K; only ours needs no K steps."""
    counted = {
        "ours": {k: step_operations(ours(full, k), full) for k in DRAWS},
        "ours, AutoencoderTiny": {k: step_operations(ours(tiny, k), tiny) for k in DRAWS},
    }
    for name, loss in {"threestudio": threestudio(full), "generfacto": generfacto(full)}.items():
        one = step_operations(loss, full)
        counted[f"{name}, K steps"] = {k: k * one for k in DRAWS}
    return counted


def parts_table(full: Guide, tiny: Guide, size: int) -> list[str]:
    """Return a table of the parts, in 10^12 operations."""
    lines = table_head(f"part, one image of {size} px", *ENCODERS)
    names = {
        "network": "guided prediction",
        "encoder": "encoder, forward and back to the image",
        "learning encoder": "the same, weights not frozen",
        "decoder": "decoder",
    }
    counted = [parts(guide) for guide in (full, tiny)]
    return lines + [f"| {label} | {' | '.join(tera(c[name]) for c in counted)} |" for name, label in names.items()]


def totals_table(full: Guide, tiny: Guide, size: int) -> list[str]:
    """Return a table of all contenders, in 10^12 operations, and relative to ours with as many draws."""
    counted = totals(full, tiny)
    lines = table_head(f"step, one image of {size} px", "goal", *(f"K = {k}" for k in DRAWS))
    for name, row in counted.items():
        goal = f"<= {GOALS[name] / 1e12:.1f} T" if name in GOALS else ""
        cells = [f"{tera(row[k])} ({row[k] / counted['ours'][k]:.2f} x)" for k in DRAWS]
        lines.append(f"| {name} | {goal} | {' | '.join(cells)} |")
    return lines


def tera(count: int) -> str:
    return f"{count / 1e12:.3f} T"
