"""Images to the latents a diffusion model works on and back, both differentiable."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    AutoencoderTiny,
)
from torch import Tensor, nn

from scorefield.cache import content_key
from scorefield.files import read_json
from scorefield.models.pretrained import PartReader, read_config
from scorefield.randomness import Generators, normal_like
from scorefield.schedule import Images

KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        AutoencoderKL, AutoencoderTiny, AutoencoderDC, AutoencoderKLFlux2, AutoencoderKLQwenImage,
        AutoencoderKLWan,
    )
}  # fmt: skip
"""Autoencoders that are understood."""

VIDEO = ("AutoencoderKLQwenImage", "AutoencoderKLWan")
"""Autoencoders of videos, (b, c, frames, h, w); an image is one frame."""

BATCH_NORM_EPS = 1e-4
"""What FLUX.2's pipeline adds to the variance, where the autoencoder's config does not say."""


@dataclass(frozen=True, eq=False)
class Codec:
    """An autoencoder and the affine map that gives its latents unit variance.

    latents = (z - shift) scaling, z = latents / scaling + shift (SD3's form; earlier families have shift 0). It
    computes in the precision of its weights and returns float32 or better.

    Attributes:
        vae: an autoencoder of diffusers, one of :data:`KINDS`.
        scaling: ``scaling_factor`` of its config, or (1, channels, 1, 1), one for each channel.
        shift: ``shift_factor`` of its config, or likewise.
        factor: pixels per latent along a side.
        channels: of the latents.
        patch: latents of the autoencoder along a side that become channels of one (FLUX.2: 2).
        frames: of a video in a latent behind its first, which is one frame; 0: it is one of images.
        waits: the device where the autoencoder is between two calls without gradients; None: where it is used.
    """

    vae: nn.Module
    scaling: float | Tensor
    shift: float | Tensor
    factor: int
    channels: int
    patch: int = 1
    frames: int = 0
    waits: torch.device | None = None

    def waiting(self, device: torch.device | str = "cpu") -> "Codec":
        """Return the same codec, whose autoencoder waits on another device, and move it there.

        It comes to the device of the images or latents, and leaves again unless the result has a gradient.
        """
        self.vae.to(device)
        return replace(self, waits=torch.device(device))

    @contextmanager
    def _at_hand(self, x: Tensor) -> Iterator[None]:
        if self.waits is not None:
            self.vae.to(x.device)
        yield
        if self.waits is not None and not (torch.is_grad_enabled() and x.requires_grad):
            self.vae.to(self.waits)

    def encode(self, images: Images, *, generator: Generators | None = None) -> Tensor:
        """Return (b, 3, h, w) images in [-1, 1] to (b, channels, h / factor, w / factor) latents.

        Videos (b, 3, 1 + n frames, h, w) become (b, channels, 1 + n, ...).

        Args:
            images: sides divisible by ``factor``.
            generator: draws a sample of the encoder's Gaussian, as diffusion models are trained on; None returns
                its mean. An AutoencoderTiny has no Gaussian and ignores it.

        Raises:
            ValueError: images of another shape.
        """
        mean, std = self.posterior(images)
        return mean if generator is None else mean + std * normal_like(mean, generator)

    def posterior(self, images: Images) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of ``images``, for :meth:`encode` without the autoencoder.

        A latent is mean + std noise. An AutoencoderTiny has std 0. Raises as :meth:`encode` does.
        """
        self._check(images, "images", 3, self.factor)
        still = self._is_still(images)
        pixels = images.to(self._dtype())
        with self._at_hand(pixels):
            output: Any = self.vae.encode(pixels[:, :, None] if still else pixels)  # type: ignore[operator]
        if hasattr(output, "latent_dist"):
            z, spread = output.latent_dist.mean, output.latent_dist.std
        else:  # AutoencoderTiny, AutoencoderDC
            z = output.latents if hasattr(output, "latents") else output.latent
            spread = torch.zeros_like(z)
        mean, std = (self._packed(part[:, :, 0] if still else part).to(_precise(z)) for part in (z, spread))
        scaling, shift = self._affine(mean)
        return (mean - shift) * scaling, std * scaling

    def decode(self, latents: Images) -> Tensor:
        """Return (b, channels, h, w) latents to (b, 3, h factor, w factor) images, about [-1, 1], not clamped.

        Those of videos, (b, channels, 1 + n, h, w), become (b, 3, 1 + n frames, ...).

        Raises ``ValueError`` for latents of another shape.
        """
        self._check(latents, "latents", self.channels, 1)
        still, precise = self._is_still(latents), latents.to(_precise(latents))
        scaling, shift = self._affine(precise)
        z = (precise / scaling + shift).to(self._dtype())
        z = nn.functional.pixel_shuffle(z, self.patch) if self.patch > 1 else z
        with self._at_hand(z):
            images: Tensor = self.vae.decode(z[:, :, None] if still else z).sample  # type: ignore[operator]
        images = images[:, :, 0] if still else images
        return images.to(_precise(images))

    def identity(self) -> str:
        """Return a hash of weights and scaling: latents kept under it are those of this autoencoder."""
        weights = [part for item in sorted(self.vae.state_dict().items()) for part in item]
        tensors = [part for part in (self.scaling, self.shift) if isinstance(part, Tensor)]
        numbers = () if tensors else (self.scaling, self.shift)
        return content_key(type(self.vae).__name__, repr(numbers), *tensors, *weights)

    @property
    def numbers(self) -> Tensor:
        """Scaling and shift in one row, float32, for fingerprints."""
        return torch.cat(
            [torch.as_tensor(part, dtype=torch.float32).flatten() for part in (self.scaling, self.shift)]
        )

    def _affine(self, x: Tensor) -> tuple[float | Tensor, float | Tensor]:
        both = (part.to(x) if isinstance(part, Tensor) else part for part in (self.scaling, self.shift))
        scaling, shift = (part[:, :, None] if isinstance(part, Tensor) and x.ndim == 5 else part for part in both)
        return scaling, shift

    def _packed(self, z: Tensor) -> Tensor:
        return nn.functional.pixel_unshuffle(z, self.patch) if self.patch > 1 else z

    def _is_still(self, x: Tensor) -> bool:
        # An image for an autoencoder of videos.
        return type(self.vae).__name__ in VIDEO and x.ndim == 4

    def _dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype

    def _check(self, x: Tensor, what: str, channels: int, factor: int) -> None:
        known = (4, 5) if self.frames else (4,)
        if x.ndim not in known or x.shape[1] != channels or x.shape[-2] % factor or x.shape[-1] % factor:
            sides = f" with sides divisible by {factor}" if factor > 1 else ""
            video = f", or (b, {channels}, f, h, w)" if self.frames else ""
            raise ValueError(f"{what} must be (b, {channels}, h, w){video}{sides}; got {tuple(x.shape)}.")
        if what == "images" and x.ndim == 5:
            latent_frames(x.shape[2], self.frames)


@dataclass(frozen=True)
class Patches:
    """Pixels in patches that become channels, exactly: a network is four times as fast on patches of 2 x 2.

    Attributes:
        factor: pixels per patch along a side.
    """

    factor: int = 2

    def encode(self, images: Images, *, generator: Generators | None = None) -> Tensor:
        """Return (b, 3, h, w) images to (b, 3 factor^2, h / factor, w / factor)."""
        del generator
        return nn.functional.pixel_unshuffle(images, self.factor)

    def posterior(self, images: Images) -> tuple[Tensor, Tensor]:
        """Return what :meth:`encode` returns, and a standard deviation of zero."""
        x0 = self.encode(images)
        return x0, torch.zeros_like(x0)

    def decode(self, latents: Images) -> Tensor:
        """Return the inverse of :meth:`encode`."""
        return nn.functional.pixel_shuffle(latents, self.factor)


def load_codec(
    reader: PartReader, part: Path, *, upcast: bool = False, slicing: bool = False, tiling: bool = False
) -> Codec:
    """Return the autoencoder in the folder ``part``: the ``vae`` of a pipeline, or an AutoencoderTiny.

    Args:
        reader: its dtype and device.
        part: folder with config and weights.
        upcast: keep float32 in place of float16 if the config asks for it, as SDXL's pipeline does.
        slicing: one image at a time.
        tiling: in blended tiles.

    Raises ``ValueError`` for what :func:`read_codec_config` and ``PartReader.read`` refuse.
    """
    config, channels, factor = read_codec_config(part, tiling=tiling)
    kind = KINDS[config["_class_name"]]
    keep = upcast and reader.dtype == torch.float16 and config.get("force_upcast", kind is AutoencoderKL)
    vae: Any = reader.read(kind, part, torch.float32 if keep else None)
    if slicing:
        vae.enable_slicing()
    if tiling:
        vae.enable_tiling()
    patch = _patch(config)
    scaling, shift = _statistics(vae, config, part)
    return Codec(
        vae, scaling=scaling, shift=shift, factor=factor, channels=channels, patch=patch,
        frames=frames_per_latent(config),
    )  # fmt: skip


def frames_per_latent(config: Mapping[str, Any]) -> int:
    """Return how many frames of a video become one latent behind the first; 0 for an autoencoder of images.

    Raises ``ValueError`` for a config that does not say where it halves their number.
    """
    if config["_class_name"] not in VIDEO:
        return 0
    halves = config.get("temperal_downsample")
    if not isinstance(halves, list | tuple) or not all(isinstance(one, bool) for one in halves):
        got = str(halves)[:80]
        raise ValueError(f"temperal_downsample of the autoencoder must be a list of true and false; got {got}.")
    return int(2 ** sum(halves))


def latent_frames(number: int, frames: int) -> int:
    """Return the latents of a video of some frames.

    Raises ``ValueError`` for a number that the autoencoder cannot take, naming the nearest that it can.

    >>> latent_frames(81, 4)
    21
    """
    if number < 1 or (number - 1) % frames:
        below = (max(number, 1) - 1) // frames * frames + 1
        raise ValueError(
            f"num_frames must be 1 more than a multiple of {frames}; got {number}. Nearest are {below} and "
            f"{below + frames}."
        )
    return 1 + (number - 1) // frames


def _patch(config: Mapping[str, Any]) -> int:
    return 2 if config["_class_name"] == "AutoencoderKLFlux2" else 1


def _statistics(vae: Any, config: Mapping[str, Any], part: Path) -> tuple[float | Tensor, float | Tensor]:
    """Return scaling and shift: one number each, or one for each channel."""
    if config["_class_name"] == "AutoencoderKLFlux2":
        eps = config.get("batch_norm_eps") or BATCH_NORM_EPS
        return (vae.bn.running_var + eps).rsqrt()[None, :, None, None], vae.bn.running_mean[None, :, None, None]
    if config["_class_name"] in VIDEO:
        lists = [config.get(name) for name in ("latents_mean", "latents_std")]
        for numbers in lists:
            if not isinstance(numbers, list | tuple) or len(numbers) != config["z_dim"]:
                raise ValueError(
                    f"{part / 'config.json'}: latents_mean and latents_std must be lists of z_dim = "
                    f"{config['z_dim']} numbers; got {str(numbers)[:80]}."
                )
        mean, std = (torch.tensor(numbers, dtype=torch.float64)[None, :, None, None] for numbers in lists)
        if not bool((std > 0).all()):
            raise ValueError(f"{part / 'config.json'}: latents_std must be above 0.")
        return 1 / std, mean
    scaling, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None)
    if not isinstance(scaling, int | float) or not scaling > 0:
        raise ValueError(f"{part / 'config.json'}: scaling_factor must be a number above 0; got {scaling!r}.")
    return float(scaling), float(shift or 0)


def read_codec_config(part: Path, *, tiling: bool = False) -> tuple[dict[str, Any], int, int]:
    """Config of the autoencoder in the folder ``part``, channels of its latents, and pixels per latent.

    Raises:
        ValueError: another class of autoencoder, one whose latents are normalised per channel, or tiling of an
            AutoencoderTiny.
    """
    name = read_json(part / "config.json").get("_class_name")
    kind = KINDS.get(name) if isinstance(name, str) else None
    config = read_config(kind, part) if kind else {}
    normalised = name not in VIDEO and config.get("latents_mean") is not None
    if kind is None or normalised:
        what = "latents normalised per channel" if normalised else name
        raise ValueError(f"unsupported autoencoder in {part}: {what}; expected one of {', '.join(KINDS)}.")
    if tiling and kind is AutoencoderTiny:
        raise ValueError("tiling is for AutoencoderKL; an AutoencoderTiny is small enough without.")
    names = ("dim_mult",) if name in VIDEO else ("block_out_channels", "encoder_block_out_channels")
    blocks = next((config[one] for one in names if config.get(one)), None)
    if not isinstance(blocks, list | tuple):
        raise ValueError(f"{part / 'config.json'}: {names[0]} must be a list; got {blocks!r}.")
    patch = _patch(config)
    channels = config["z_dim"] if name in VIDEO else config["latent_channels"]
    return config, channels * patch**2, 2 ** (len(blocks) - 1) * patch


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
