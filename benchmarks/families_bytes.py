"""Parameters and bytes of every family at public sizes: three copies, one shared backbone, an adapter for control.

    python benchmarks/families_bytes.py                # print the table
    python benchmarks/families_bytes.py --write        # and put it into docs/families.md

Networks are built on the meta device, without a weight, and counted by the code that trains them: LoRAs by
``shared_backbone``, adapters by ``scorefield control``. Settings are those of ``benchmarks/configs`` and of
:data:`MODELS`; where a model names none, they are the defaults of its class in diffusers, as published.

Bytes: weights that learn are float32 with gradient and two moments of AdamW, 16 a parameter, and 4 more where
their average is kept; frozen weights are bfloat16, 2. Activations, texts and autoencoder come on top.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import UNet2DConditionModel

from controlnet.adapter import copy_encoder
from scorefield.denoiser import NetworkDenoiser, freeze
from scorefield.models.families import Family, family_of
from scorefield.models.lora import LAYERS, shared_backbone
from scorefield.models.networks import DiffusersNetwork
from scorefield.schedule import RectifiedFlow

CONFIGS = Path(__file__).resolve().parent / "configs"
PAGE = CONFIGS.parent.parent / "docs" / "families.md"
RANK = 64
FROZEN, LEARNED, AVERAGED = 2, 16, 4
"""Bytes of a parameter: in bfloat16; in float32 with gradient and two moments; of an average beside it."""


@dataclass(frozen=True)
class Model:
    """A public model.

    Attributes:
        name: of the model.
        pipeline: class of diffusers.
        file: of its settings in ``configs``; empty: the defaults of the class.
        settings: that differ from those.
    """

    name: str
    pipeline: str
    file: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


MODELS = (
    Model("Stable Diffusion 1.5", "StableDiffusionPipeline", "sd15_unet.json"),
    Model("Stable Diffusion 2.1", "StableDiffusionPipeline", "sd21_unet.json"),
    Model("SDXL", "StableDiffusionXLPipeline", "sdxl_unet.json"),
    Model("Stable Diffusion 3 medium", "StableDiffusion3Pipeline", "sd3_medium_transformer.json"),
    Model(
        "Stable Diffusion 3.5 medium", "StableDiffusion3Pipeline", "sd3_medium_transformer.json",
        {"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13)), "pos_embed_max_size": 384},
    ),
    Model("FLUX.1-dev", "FluxPipeline", "flux_dev_transformer.json"),
    Model(
        "FLUX.2-klein 4B", "Flux2KleinPipeline",
        settings={
            "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
    ),
    Model("FLUX.2-dev", "Flux2Pipeline"),
    Model("Z-Image", "ZImagePipeline"),
    Model("Qwen-Image", "QwenImagePipeline"),
    Model("Sana 1.6B", "SanaPipeline"),
    Model("PixArt-Sigma XL", "PixArtSigmaPipeline", settings={
        "sample_size": 128, "caption_channels": 4096, "cross_attention_dim": 1152, "in_channels": 4,
        "out_channels": 8, "use_additional_conditions": False, "num_embeds_ada_norm": 1000,
    }),
    Model("DiT-XL/2", "DiTPipeline", settings={"in_channels": 4, "out_channels": 8, "sample_size": 32}),
    Model("Lumina 2", "Lumina2Pipeline"),
    Model("Wan 2.1 14B", "WanPipeline"),
)  # fmt: skip
"""Every family once, and those of one family that differ."""


@dataclass(frozen=True)
class Count:
    """Parameters of a model and of what learns beside it; 0 where there is no such adapter."""

    teacher: int
    lora: int
    control: int
    control_lora: int

    @property
    def copies(self) -> int:
        """Bytes of student, fake score and teacher as three copies, after an update."""
        return self.teacher * (2 * LEARNED + FROZEN)

    @property
    def shared(self) -> int:
        """Bytes of one copy of the weights with two LoRAs."""
        return self.teacher * FROZEN + 2 * self.lora * LEARNED

    def controlled(self, adapter: int) -> int:
        """Bytes of a frozen teacher, an adapter that learns, and its average."""
        return self.teacher * FROZEN + adapter * (LEARNED + AVERAGED)


def build(model: Model) -> tuple[Family, Any]:
    """Return the family of a model and its network, frozen, on the meta device."""
    family = family_of({"_class_name": model.pipeline})
    own = json.loads((CONFIGS / model.file).read_text()) if model.file else {}
    with torch.device("meta"):
        kind: Any = family.network
        network = kind(**{name: value for name, value in {**own, **model.settings}.items() if name[0] != "_"})
    return family, freeze(network)


def count(model: Model, rank: int = RANK) -> Count:
    """Return the parameters of a model, of its LoRA, and of its adapters for control."""
    family, network = build(model)
    wrapped = DiffusersNetwork(network, family.call, layers=family.lora, control=family.control)
    denoiser = NetworkDenoiser(wrapped, RectifiedFlow(), "flow")
    generator = torch.Generator()
    student, _ = shared_backbone(denoiser, rank=rank, targets=family.lora or LAYERS, generator=generator)
    control, wide = 0, 0
    if isinstance(network, UNet2DConditionModel):
        control = parameters(copy_encoder(denoiser))
    elif family.control is not None:
        control = parameters(family.control.make(network))
        if family.control.widened:
            # The first layer sees twice its channels; all others are those of a LoRA.
            first = getattr(network, family.control.widened)
            wide = parameters(student.network) + rank * (2 * first.in_features + first.out_features)
    return Count(parameters(network), parameters(student.network), control, wide)


def parameters(network: torch.nn.Module) -> int:
    """Return how many numbers a network has, or a LoRA changes."""
    return sum(parameter.numel() for parameter in network.parameters())


def table(models: tuple[Model, ...] = MODELS) -> str:
    """Return the table in Markdown."""
    head = [
        "model", "parameters, M", f"LoRA, rank {RANK}, M", "three copies, GiB", "shared backbone, GiB", "share",
        "ControlNet, M", "with its teacher, GiB", "control LoRA, M", "with its teacher, GiB",
    ]  # fmt: skip
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for model in models:
        found = count(model)
        adapters = [
            text
            for adapter in (found.control, found.control_lora)
            for text in ((millions(adapter), gib(found.controlled(adapter))) if adapter else ("-", "-"))
        ]
        rows.append([
            model.name, millions(found.teacher), millions(found.lora), gib(found.copies), gib(found.shared),
            f"{found.shared / found.copies:.2f}", *adapters,
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def millions(number: int) -> str:
    return f"{number / 1e6:,.1f}"


def gib(number: int) -> str:
    return f"{number / 2**30:,.1f}"


BEGIN, END = "<!-- bytes: python benchmarks/families_bytes.py --write -->\n", "\n<!-- end of bytes -->"


def write(text: str) -> None:
    """Put the table between its marks in docs/families.md."""
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + text + END + after)


def main(write_page: bool) -> None:
    """Print the table, and write it into docs/families.md if asked to."""
    text = table()
    print(text)
    if write_page:
        write(text)


if __name__ == "__main__":

    @dataclass(frozen=True)
    class Config:
        """Count the parameters and bytes of every family."""

        write: bool = False
        """Put the table into docs/families.md."""

    main(tyro.cli(Config, description=__doc__, args=sys.argv[1:]).write)
