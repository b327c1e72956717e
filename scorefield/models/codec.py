"""Images to the latents a diffusion model works on and back, both differentiable."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from scorefield.cache import content_key
from scorefield.files import read_json
from scorefield.models.pretrained import PartReader, read_config
from scorefield.randomness import Generators, normal_like
from scorefield.schedule import Images

KINDS: dict[str, type] = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


@dataclass(frozen=True, eq=False)
class Codec:
    """A variational autoencoder and the affine map that gives its latents unit variance.

    latents = (z - shift) scaling, z = latents / scaling + shift (SD3's form; earlier families have shift 0). It
    computes in the precision of its weights and returns float32 or better.

    Attributes:
        vae: AutoencoderKL or AutoencoderTiny of diffusers.
        scaling: ``scaling_factor`` of its config.
        shift: ``shift_factor`` of its config.
        factor: pixels per latent along a side.
        channels: of the latents.
    """

    vae: nn.Module
    scaling: float
    shift: float
    factor: int
    channels: int

    def encode(self, images: Images, *, generator: Generators | None = None) -> Tensor:
        """(b, 3, h, w) images in [-1, 1] to (b, channels, h / factor, w / factor) latents.

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
        output: Any = self.vae.encode(images.to(self._dtype()))  # type: ignore[operator]
        if hasattr(output, "latents"):
            z: Tensor = output.latents
            mean, std = z.to(_precise(z)), torch.zeros_like(z, dtype=_precise(z))
        else:
            z = output.latent_dist.mean
            mean, std = z.to(_precise(z)), output.latent_dist.std.to(_precise(z))
        return (mean - self.shift) * self.scaling, std * self.scaling

    def decode(self, latents: Images) -> Tensor:
        """(b, channels, h, w) latents to (b, 3, h factor, w factor) images, about [-1, 1], not clamped.

        Raises ``ValueError`` for latents of another shape.
        """
        self._check(latents, "latents", self.channels, 1)
        z = latents.to(_precise(latents)) / self.scaling + self.shift
        images: Tensor = self.vae.decode(z.to(self._dtype())).sample  # type: ignore[operator]
        return images.to(_precise(images))

    def identity(self) -> str:
        """A hash of weights and scaling: latents kept under it are those of this autoencoder."""
        weights = [part for item in sorted(self.vae.state_dict().items()) for part in item]
        return content_key(type(self.vae).__name__, repr((self.scaling, self.shift)), *weights)

    def _dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype

    def _check(self, x: Tensor, what: str, channels: int, factor: int) -> None:
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % factor or x.shape[3] % factor:
            sides = f" with sides divisible by {factor}" if factor > 1 else ""
            raise ValueError(f"{what} must be (b, {channels}, h, w){sides}; got {tuple(x.shape)}.")


@dataclass(frozen=True)
class Patches:
    """Pixels in patches that become channels, exactly: a network is four times as fast on patches of 2 x 2.

    Attributes:
        factor: pixels per patch along a side.
    """

    factor: int = 2

    def encode(self, images: Images, *, generator: Generators | None = None) -> Tensor:
        """(b, 3, h, w) images to (b, 3 factor^2, h / factor, w / factor)."""
        del generator
        return nn.functional.pixel_unshuffle(images, self.factor)

    def posterior(self, images: Images) -> tuple[Tensor, Tensor]:
        """What :meth:`encode` returns, and a standard deviation of zero."""
        x0 = self.encode(images)
        return x0, torch.zeros_like(x0)

    def decode(self, latents: Images) -> Tensor:
        """The inverse of :meth:`encode`."""
        return nn.functional.pixel_shuffle(latents, self.factor)


def load_codec(
    reader: PartReader, part: Path, *, upcast: bool = False, slicing: bool = False, tiling: bool = False
) -> Codec:
    """The autoencoder in the folder ``part``: the ``vae`` of a pipeline, or an AutoencoderTiny.

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
    scaling, shift = vae.config.scaling_factor, vae.config.shift_factor
    if not isinstance(scaling, int | float) or not scaling > 0:
        raise ValueError(f"{part / 'config.json'}: scaling_factor must be a number above 0; got {scaling!r}.")
    return Codec(vae, scaling=float(scaling), shift=float(shift or 0), factor=factor, channels=channels)


def read_codec_config(part: Path, *, tiling: bool = False) -> tuple[dict[str, Any], int, int]:
    """Config of the autoencoder in the folder ``part``, channels of its latents, and pixels per latent.

    Raises:
        ValueError: another class of autoencoder, one whose latents are normalised per channel, or tiling of an
            AutoencoderTiny.
    """
    name = read_json(part / "config.json").get("_class_name")
    kind = KINDS.get(name) if isinstance(name, str) else None
    config = read_config(kind, part) if kind else {}
    if kind is None or config.get("latents_mean") is not None:
        what = name if kind is None else "latents normalised per channel"
        raise ValueError(f"unsupported autoencoder in {part}: {what}; expected AutoencoderKL or AutoencoderTiny.")
    if tiling and kind is AutoencoderTiny:
        raise ValueError("tiling is for AutoencoderKL; an AutoencoderTiny is small enough without.")
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    if not isinstance(blocks, list | tuple):
        raise ValueError(f"{part / 'config.json'}: block_out_channels must be a list; got {blocks!r}.")
    return config, config["latent_channels"], 2 ** (len(blocks) - 1)


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
