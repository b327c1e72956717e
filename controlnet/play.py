"""What a page in the browser asks of control: an adapter beside its teacher, edges, and a picture that follows."""

from pathlib import Path

import torch
from torch import Tensor

from controlnet.adapter import ControlledDenoiser
from controlnet.canny import canny
from controlnet.export import load_adapter
from scorefield.denoiser import Conditioned, Denoiser
from scorefield.guidance import guided
from scorefield.models.lora import LORA_FILE
from scorefield.models.teacher import Teacher
from scorefield.randomness import derived_generator
from scorefield.sampling import initial_noise, sample
from scorefield.schedule import Images
from scorefield.solvers import plan


def load_controller(folder: Path, teacher: Teacher) -> ControlledDenoiser:
    """Return a teacher under the ControlNet in ``folder``, which has drawn once.

    Raises ``ValueError`` for an adapter that cannot be read, one of another teacher or of a transformer, and one
    that was trained with a decoder of its own.
    """
    if (folder / LORA_FILE).is_file() or (folder / "unet").is_dir():
        what = "is a control LoRA" if (folder / LORA_FILE).is_file() else "was trained with a decoder of its own"
        raise ValueError(f"--control {folder} {what}. Pass the folder of a ControlNet of a UNet.")
    if teacher.texts is None:
        raise ValueError("--control is for a text-to-image teacher, and --teacher takes no prompts. Leave it out.")
    try:
        adapter = load_adapter(folder, device=teacher.device)
        controller = ControlledDenoiser(teacher.denoiser, adapter)
        hint = torch.zeros(1, adapter.channels, *teacher.size, device=teacher.device)
        with torch.no_grad():
            x_t, t = torch.zeros(1, *teacher.shape, device=teacher.device), torch.zeros(1, device=teacher.device)
            controller.with_hint(hint)(x_t, t, teacher.negative())
    except (ValueError, RuntimeError, KeyError) as error:
        told = str(error).strip().partition("\n")[0]
        raise ValueError(f"--control {folder} does not fit --teacher: {told}") from error
    return controller


def edges(images: Images, low: float = 100.0, high: float = 200.0) -> Tensor:
    """Return Canny edges (b, 1, h, w), 0 or 1, of images in [-1, 1]; thresholds as of :class:`canny.Canny`."""
    low, high = min(low, high), max(low, high)
    return canny(images, torch.tensor(low), torch.tensor(high))


@torch.no_grad()
def draw_controlled(
    teacher: Teacher, controller: ControlledDenoiser, hint: Tensor, prompt: str, *, seed: int, steps: int,
    guidance: float,
) -> Tensor:  # fmt: skip
    """Return the picture (3, h, w) of a seed, in about [-1, 1], from the noise that ``models.draw`` begins with.

    Args:
        teacher: of prompts, for conditions and the autoencoder.
        controller: the same teacher under an adapter.
        hint: (1, 1 or 3, h, w) in [0, 1].
        prompt: what the picture shows.
        seed: of the noise.
        steps: network calls.
        guidance: scale of classifier-free guidance, or what the network is told.
    """
    cond = teacher.prompts([prompt])
    chosen = plan(teacher.denoiser.schedule, steps, shift=teacher.shift)
    noise = torch.randn(teacher.shape, generator=derived_generator(seed, "sample", 0))[None].to(teacher.device)
    x_t = initial_noise(teacher.denoiser.schedule, noise, float(chosen.times[0]))
    if hint.shape[1] == 3 and getattr(controller.adapter, "channels", 3) == 1:
        hint = hint.mean(1, keepdim=True)
    hinted = controller.with_hint(hint.to(teacher.device))
    denoiser: Denoiser = hinted
    if teacher.embedded is not None:
        denoiser = Conditioned(hinted, {"guidance": torch.tensor([guidance], device=teacher.device)})
    else:
        denoiser = guided(hinted, guidance, teacher.negative(), norm=teacher.norm)
    x0 = sample(denoiser, x_t, cond, times=chosen.times, step=chosen.step)
    return teacher.decode(x0)[0].float().cpu()
