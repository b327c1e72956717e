"""What an adapter can be put on: any text-to-image UNet of diffusers, the toy world's, the painter of circles."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from controlnet.caching import share_prompts
from controlnet.circles import COLOURS
from scorefield import Cond, NetworkDenoiser, VariancePreserving, freeze
from scorefield.atomic import whole_folder
from scorefield.files import read_json
from scorefield.models import hub
from scorefield.models.families import DiffusersNetwork
from scorefield.models.pretrained import PartReader
from toyworld import pipeline_folder

FACTS = "circles.json"
"""The file by which a folder is known as one of train_circles.py."""

PATCH = 2
"""Pixels of a circle's picture that become channels, along a side: a network four times as fast."""

PALETTE = ("red", "lime", "blue", "yellow", "magenta", "cyan", "white", "black")
"""Colours of the small circles: the corners of the cube, which nobody confuses."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Base:
    """A frozen model with all that training and judging an adapter need of it.

    Attributes:
        name: as it is told to others.
        denoiser: on x0: latents, or pixels in patches.
        size: height and width of its images.
        factor: pixels of an image per pixel of x0 along a side.
        prompts: captions to conditions.
        null: the condition of no prompt, and what guidance moves away from.
        posterior: images to mean and standard deviation of their x0.
        decode: x0 to images.
        identity: of what ``posterior`` follows from.
        on_means: trained on means of the autoencoder's posterior, not on draws.
        teacher: where it comes from; None for a model that is not of diffusers' pipelines.
    """

    name: str
    denoiser: NetworkDenoiser
    size: tuple[int, int]
    factor: int
    prompts: Callable[[Sequence[str]], Cond]
    null: Cond
    posterior: Callable[[Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor], Tensor]
    identity: Callable[[], str]
    on_means: bool = False
    teacher: hub.Teacher | None = None

    def encode(self, images: Tensor) -> Tensor:
        """Images to the mean of their x0."""
        return self.posterior(images)[0]

    def without_text_encoders(
        self, captions: Callable[[], list[str]], rank: int = 0, num_ranks: int = 1
    ) -> "Base":
        """The same for these captions only, which are encoded with the other ranks; no text encoder is held."""
        if self.teacher is None or self.teacher.texts is None:
            return self
        share_prompts(self.teacher.texts, [*captions(), ""], rank=rank, num_ranks=num_ranks)
        teacher = self.teacher.without_text_encoders()
        return replace(self, prompts=teacher.prompts, teacher=teacher)


def load_base(
    name: str, *, size: int = 0, device: torch.device | str = "cpu", cache: Path | None = None,
    allow_pickle: bool = False, variant: str = "",
) -> Base:  # fmt: skip
    """A base by name, in float32: "toyworld", a folder of train_circles.py or of a pipeline, or a model online.

    Raises ``ValueError`` for anything else, and for models that take no prompts.
    """
    folder = pipeline_folder() if name == "toyworld" else Path(name)
    if (folder / FACTS).is_file():
        base = load_circles(folder, device)
        if size not in (0, base.size[0]):
            raise ValueError(f"--base {name} draws {base.size[0]} pixels a side; got --size {size}.")
        return base
    known = folder if folder.is_dir() else name
    teacher = hub.load_teacher(
        known, size=size or None, device=device, cache=cache, allow_pickle=allow_pickle, variant=variant or None
    )
    if teacher.codec is None or teacher.texts is None:
        raise ValueError(f"--base {name} takes no prompts; pass a text-to-image pipeline.")
    codec = teacher.codec
    return Base(
        name=name, denoiser=teacher.denoiser, size=teacher.size, factor=codec.factor, prompts=teacher.prompts,
        null=teacher.negative(), posterior=codec.posterior, decode=codec.decode, identity=codec.identity,
        on_means=folder.resolve() == pipeline_folder().resolve(), teacher=teacher,
    )  # fmt: skip


def make_circles_unet(size: int) -> UNet2DConditionModel:
    """A small network of v for pictures of ``size`` pixels in patches, told two colours."""
    return UNet2DConditionModel(
        sample_size=size // PATCH, in_channels=3 * PATCH**2, out_channels=3 * PATCH**2,
        block_out_channels=(48, 64, 96), layers_per_block=1, norm_num_groups=16, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * len(COLOURS),
    )  # fmt: skip


def circles_denoiser(network: nn.Module) -> NetworkDenoiser:
    """The network on Stable Diffusion's noise levels."""
    return NetworkDenoiser(network, VariancePreserving.scaled_linear(), "v")


def encode_captions(captions: Sequence[str]) -> Cond:
    """Captions such as "red circle with blue background" as two tokens of one colour each; zeros for none.

    Raises ``ValueError`` for any other caption.
    """
    states = torch.zeros(len(captions), 2, 2 * len(COLOURS))
    for row, caption in enumerate(captions):
        if not caption:
            continue
        colours = caption.removesuffix(" background").split(" circle with ")
        if len(colours) != 2 or not set(colours) <= set(COLOURS):
            raise ValueError(f'expected a caption such as "red circle with blue background"; got {caption!r}.')
        for token, colour in enumerate(colours):
            states[row, token, token * len(COLOURS) + COLOURS.index(colour)] = 1
    return {"encoder_hidden_states": states}


def in_patches(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (b, 3, h, w) as x0, exactly: mean, and a standard deviation of zero."""
    x0 = pixel_unshuffle(images, PATCH)
    return x0, torch.zeros_like(x0)


def save_circles(folder: Path, unet: Any, size: int, card: str) -> Path:
    """Write the painter of circles; :func:`load_base` reads it."""
    with whole_folder(folder) as temporary:
        unet.save_pretrained(temporary, safe_serialization=True)
        (temporary / FACTS).write_text(json.dumps({"size": size}))
        (temporary / "README.md").write_text(card)
    return folder


def load_circles(folder: Path, device: torch.device | str) -> Base:
    """A folder of :func:`save_circles`."""
    unet = PartReader(torch.float32, torch.device(device)).read(UNet2DConditionModel, folder)
    size = read_json(folder / FACTS).get("size")
    if not isinstance(size, int) or not 0 < size < 2**16 or size % PATCH:
        raise ValueError(
            f"{folder / FACTS}: size must be the pixels of a side; got {str(size)[:40]}. Was it edited?"
        )
    denoiser = circles_denoiser(freeze(DiffusersNetwork(unet)))

    def prompts(captions: Sequence[str]) -> Cond:
        return {name: value.to(device) for name, value in encode_captions(captions).items()}

    return Base(
        name=str(folder), denoiser=denoiser, size=(size, size), factor=PATCH, prompts=prompts, null=prompts([""]),
        posterior=in_patches, decode=lambda x0: pixel_shuffle(x0, PATCH), identity=lambda: "pixels",
    )  # fmt: skip
