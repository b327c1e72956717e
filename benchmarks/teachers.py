"""Bytes of weights and floating-point operations of public teachers, counted without weights on the meta device.

    python benchmarks/teachers.py --configs configs --out teachers.md

``--configs`` holds the constructor arguments of diffusers' classes as JSON (sd15_unet.json and so on, as in their
config.json). Text encoders are built from the settings below. A multiplication with addition is two operations.
Only matrix products, convolutions and attention are counted.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import AutoencoderKL, AutoencoderTiny, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from scorefield.denoiser import Cond, NetworkDenoiser
from scorefield.guidance import guided
from scorefield.models.codec import Codec
from scorefield.models.networks import DiffusersNetwork
from scorefield.schedule import RectifiedFlow, VariancePreserving

CLASSES = {c.__name__: c for c in (UNet2DConditionModel, SD3Transformer2DModel, AutoencoderKL, AutoencoderTiny)}

CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
CLIP_H: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "intermediate_size": 5120,
}
T5_XXL: dict[str, Any] = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
}

TEXTS: dict[str, Callable[[], nn.Module]] = {
    "CLIP-L": lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L)),
    "CLIP-H, 23 layers": lambda: CLIPTextModel(CLIPTextConfig(**CLIP_H)),
    "CLIP-L, projected": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_L, projection_dim=768)),
    "CLIP-bigG, projected": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G, projection_dim=1280)),
    "T5-XXL": lambda: T5EncoderModel(T5Config(**T5_XXL, feed_forward_proj="gated-gelu")),
}


@dataclass(frozen=True)
class Model:
    """Config files of a public model's parts, and its text encoders."""

    network: str
    vae: str
    texts: tuple[str, ...]
    tokens: int = 77
    upcast: bool = False  # the autoencoder stays float32 in float16


MODELS = {
    "SD 1.5": Model("sd15_unet", "sd_vae", ("CLIP-L",)),
    "SD 2.1": Model("sd21_unet", "sd_vae", ("CLIP-H, 23 layers",)),
    "SDXL": Model("sdxl_unet", "sdxl_vae", ("CLIP-L", "CLIP-bigG, projected"), upcast=True),
    "SD3 medium": Model(
        "sd3_medium_transformer", "sd3_vae", ("CLIP-L, projected", "CLIP-bigG, projected", "T5-XXL"), 77 + 256
    ),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Count bytes and operations of SD 1.5, SD 2.1, SDXL and SD3."""

    configs: Path
    """Folder of JSON files with the constructor arguments of the parts."""
    scale: float = 7.5
    """Scale of guidance. Any but 1 needs two predictions, in one network call."""
    out: Path | None = None
    """File for the tables, in Markdown."""


def main(config: Config) -> str:
    """Count, print and return the tables; also write them to ``--out``."""
    rows = {name: count(config, model) for name, model in MODELS.items()}
    tiny = build(config.configs, "taesd")
    with torch.device("meta"):
        texts = {name: parameters(make()) for name, make in TEXTS.items()}
    tables = "\n".join([*memory_table(rows, texts), "", *operations_table(rows, tiny)])
    print(tables)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(tables + "\n")
    return tables


@dataclass(frozen=True)
class Count:
    """Cost of one model: sizes in parameters, work in operations for one image.

    ``kept`` is the number of the text encoders' parameters that stay float32 in float16. ``latents`` is the shape
    of x_t, ``pixels`` the height and width of the image.
    """

    model: Model
    network: int
    vae: int
    texts: int
    kept: int
    latents: tuple[int, int, int]
    pixels: int
    guided: int
    plain: int
    encode: int
    decode: int


def build(folder: Path, name: str) -> Any:
    """Return a network of diffusers on the meta device. Raises ``ValueError`` for a missing or unknown file."""
    file = folder / f"{name}.json"
    if not file.is_file():
        raise ValueError(f"--configs {folder} lacks {file.name}: the config.json of that part of the model.")
    settings = json.loads(file.read_text())
    kind = CLASSES.get(settings.get("_class_name"))
    if kind is None:
        raise ValueError(
            f"{file}: _class_name must be one of {', '.join(CLASSES)}; got {settings.get('_class_name')}."
        )
    with torch.device("meta"):
        return kind.from_config(settings).eval().requires_grad_(False)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def kept_whole(network: nn.Module) -> int:
    """Return the number of parameters that transformers keeps in float32: T5's ``wo``, which overflows in half."""
    modules = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    return sum(p.numel() for name, p in network.named_parameters() if modules & set(name.split(".")))


def count(config: Config, model: Model) -> Count:
    """Return sizes and work of one model, batch 1 at its own image size."""
    network, vae = build(config.configs, model.network), build(config.configs, model.vae)
    flow = isinstance(network, SD3Transformer2DModel)
    denoiser = NetworkDenoiser(
        DiffusersNetwork(network), RectifiedFlow() if flow else VariancePreserving.scaled_linear(),
        "flow" if flow else "eps", 1000.0 if flow else 1.0,
    )  # fmt: skip
    side = network.config.sample_size
    latents, cond = (network.config.in_channels, side, side), meta_cond(network.config, model.tokens)
    x_t, t = torch.zeros(1, *latents, device="meta"), torch.full((1,), denoiser.schedule.t_max / 2, device="meta")
    codec = as_codec(vae)
    images = torch.zeros(1, 3, side * codec.factor, side * codec.factor, device="meta")
    with torch.device("meta"):
        encoders = [TEXTS[name]() for name in model.texts]
    return Count(
        model=model, network=parameters(network), vae=parameters(vae), latents=latents,
        texts=sum(map(parameters, encoders)), kept=sum(map(kept_whole, encoders)),
        pixels=side * codec.factor,
        guided=operations(lambda: guided(denoiser, config.scale, cond)(x_t, t, cond)),
        plain=operations(lambda: denoiser(x_t, t, cond)),
        encode=operations(lambda: codec.encode(images)), decode=operations(lambda: codec.decode(x_t)),
    )  # fmt: skip


def as_codec(vae: Any) -> Codec:
    factor, config = 2 ** (len(vae.config.block_out_channels) - 1), vae.config
    return Codec(vae, config.scaling_factor, config.shift_factor or 0.0, factor, config.latent_channels)


def meta_cond(config: Any, tokens: int) -> Cond:
    """Return the conditions of one prompt, as shapes without data."""
    shapes: dict[str, tuple[int, ...]] = {}
    if "joint_attention_dim" in config:
        shapes["encoder_hidden_states"] = (1, tokens, config.joint_attention_dim)
        shapes["pooled_projections"] = (1, config.pooled_projection_dim)
    else:
        shapes["encoder_hidden_states"] = (1, tokens, config.cross_attention_dim)
    if config.get("addition_embed_type") == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        shapes |= {"text_embeds": (1, pooled), "time_ids": (1, 6)}
    return {name: torch.zeros(shape, device="meta") for name, shape in shapes.items()}


def operations(work: Callable[[], Tensor]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def memory_table(rows: Mapping[str, Count], texts: Mapping[str, int]) -> list[str]:
    """Return a table of the parts' parameters, and of the bytes of all weights by precision, in 10^9."""
    lines = table_head(
        "weights", "network", "autoencoder", "text encoders", "fp32", "bf16", "fp16", "bf16, no texts"
    )
    for name, row in rows.items():
        whole, kept = row.network + row.vae + row.texts, row.network + row.vae
        half = 2 * whole + 2 * row.kept + (2 * row.vae if row.model.upcast else 0)
        sizes = [f"{size / 1e6:,.1f} M" for size in (row.network, row.vae, row.texts)]
        sizes += [f"{size / 1e9:.2f} GB" for size in (4 * whole, 2 * whole, half, 2 * kept)]
        lines.append(f"| {name} | {' | '.join(sizes)} |")
    listed = "; ".join(f"{name} {size / 1e6:,.1f} M" for name, size in texts.items())
    return [*lines, "", f"Text encoders: {listed}."]


def operations_table(rows: Mapping[str, Count], tiny: Any) -> list[str]:
    """Return a table of the work for one image, in 10^12 operations."""
    lines = table_head("work for one image", "x_t", "guided", "not guided", "encode", "decode", "decode, TAESD")
    small = as_codec(tiny)
    for name, row in rows.items():
        x0 = torch.zeros(1, small.channels, *row.latents[1:], device="meta")
        rough = operations(lambda x0=x0: small.decode(x0))  # type: ignore[misc]
        work = [f"{value / 1e12:.2f} T" for value in (row.guided, row.plain, row.encode, row.decode, rough)]
        shape = " x ".join(map(str, row.latents))
        lines.append(f"| {name}, {row.pixels} px | {shape} | {' | '.join(work)} |")
    return lines


def table_head(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
