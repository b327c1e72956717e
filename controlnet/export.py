"""A finished adapter as a folder that stock diffusers loads, with a card that says what it can and cannot do."""

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image

from controlnet.adapter import EncoderCopy
from controlnet.evidence import BoundedScore, Probe
from controlnet.evidence_log import Evidence
from controlnet.transformers import ControlLoRA, TransformerCopy
from scorefield.atomic import whole_folder
from scorefield.denoiser import unwrap
from scorefield.models.lora import LORA_FILE, adapter_weights
from scorefield.models.pretrained import PartReader, find_model

SAMPLES = "samples.png"


def save_adapter(
    adapter: nn.Module, folder: Path, card: str, *, samples: Tensor | None = None, unet: Any = None,
    report: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write an adapter so that stock diffusers loads it, without loss.

    ``from_pretrained(folder)`` of ControlNetModel or of the family's own class loads a ControlNet, and
    ``load_lora_weights(folder)`` a control LoRA.

    A ControlNet of a UNet that takes hints of one channel is written for three, as published ones are and
    pipelines of diffusers want them: a third of its first weights for each. To a grey image, red = green = blue,
    that is the same function.

    Args:
        adapter: or its average, wrapped in DDP or not.
        folder: replaced as a whole, from a temporary name.
        card: Markdown, kept as README.md; :func:`model_card`.
        samples: (1, 3, h, w) in [0, 1], kept as samples.png; :func:`contact_sheet`.
        unet: what an unlocked decoder belongs to, kept in the folder ``unet``: the adapter is of no use without.
        report: JSON-able figures, kept as report.json.

    Raises:
        ValueError: another adapter, which diffusers has no class for; a folder with files of someone else.
        FloatingPointError: a weight is not finite; nothing is written.
    """
    inner = unwrap(adapter)
    if not isinstance(inner, EncoderCopy | TransformerCopy | ControlLoRA):
        raise ValueError(
            f"diffusers' ControlNetModel is the form of an EncoderCopy; got {type(inner).__name__}. Save "
            "its state_dict with safetensors."
        )
    parts: list[Any] = [] if unet is None else [unet]
    if not isinstance(inner, ControlLoRA):
        parts = [_of_three_channels(inner.model) if inner.channels == 1 else inner.model, *parts]
    if not all(bool(p.isfinite().all()) for part in (*parts, inner) for p in part.parameters()):
        raise FloatingPointError("the adapter has weights that are not finite. Save an earlier checkpoint.")
    with whole_folder(folder) as temporary:
        if isinstance(inner, ControlLoRA):
            save_file(lora_weights(inner), temporary / LORA_FILE, metadata={"format": "pt"})
        for part, place in zip(parts, (temporary, temporary / "unet"), strict=False):
            part.save_pretrained(place, safe_serialization=True)
        (temporary / "README.md").write_text(card)
        if report is not None:
            (temporary / "report.json").write_text(json.dumps(report, indent=2))
        if samples is not None:
            save_image(samples, temporary / SAMPLES)
    return folder


def lora_weights(adapter: ControlLoRA) -> dict[str, Tensor]:
    """Return the changes of a control LoRA by the names that ``load_lora_weights`` reads."""
    return {f"transformer.{name}": value for name, value in adapter_weights(adapter.adapted).items()}


def _of_three_channels(model: Any) -> Any:
    # A copy that shares all weights but the first of the hint's embedding.
    embedding = copy.copy(model.controlnet_cond_embedding)
    conv = copy.deepcopy(embedding.conv_in)
    conv.weight, conv.in_channels = nn.Parameter(conv.weight.detach().repeat(1, 3, 1, 1) / 3), 3
    embedding._modules = {**embedding._modules, "conv_in": conv}
    model = copy.copy(model)
    model._modules = {**model._modules, "controlnet_cond_embedding": embedding}
    model.register_to_config(conditioning_channels=3)
    return model


def load_adapter(
    name: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> EncoderCopy:
    """Return a frozen adapter from a folder of ``save_adapter`` or diffusers, or a model's name (downloaded once).

    One of three channels takes hints of one, too. To train it on, ``requires_grad_(True)``. Raises ``ValueError``
    for weights that are missing, pickled, damaged or of another class.
    """
    reader = PartReader(dtype, torch.device(device))
    return EncoderCopy(reader.read(ControlNetModel, find_model(name)))


def model_card(
    *, base: str, hint: str, look: Evidence | None, event: str, training: Mapping[str, Any],
    limits: str, licence: str | None = None, hint_channels: int = 3, pipeline: bool = True, unlocked: bool = False,
    usage: str = "",
) -> str:  # fmt: skip
    """Return the README of an exported folder, in the form of model hubs.

    Args:
        base: the pipeline that the adapter belongs to.
        hint: what it follows, and how hints are made.
        look: the last evidence; None if none was taken.
        event: whether control was learned: :func:`controlnet.evidence_log.told`.
        training: JSON-able facts: data, steps, batch, learning rate, seed.
        limits: what the figures do not show.
        licence: of the weights, for the hub's header; they are a copy of the base's, whose licence may bind them.
            None states none.
        hint_channels: of the adapter: 1 and 3 are pictures to a pipeline.
        pipeline: whether ``base`` is one of diffusers.
        unlocked: whether the folder ``unet`` goes along.
        usage: how diffusers draws with it, :func:`usage_of`; empty for the ControlNet of a UNet.
    """
    header = f"library_name: diffusers\nbase_model: {json.dumps(base)}\ntags: [controlnet]"
    header = header if licence is None else f"license: {licence}\n{header}"
    facts = "\n".join(f"- {name}: {value}" for name, value in training.items())
    return f"""---
{header}
---
# ControlNet: {hint}

{(usage or _usage(base, hint_channels, unlocked)) if pipeline else USAGE_OF_NO_PIPELINE}

For {base}. Control {event} (half-way from floor to ceiling in two looks running).

{_table(look)}

![hints, real images, samples]({SAMPLES})

## Training

{facts}

## Limits

{limits}
"""


USAGE_OF_NO_PIPELINE = """\
    from controlnet.adapter import ControlledDenoiser
    from controlnet.export import load_adapter
    controlled = ControlledDenoiser(base, load_adapter("path/of/this/folder"))"""


def usage_of(adapter: nn.Module, base: str) -> str:
    """Return how diffusers draws with the adapter of a transformer; empty for other adapters.

    A ControlNet of a transformer keeps hints as pictures of three channels: the pipeline encodes them.
    """
    if isinstance(adapter, TransformerCopy):
        kind, pipeline = type(adapter.model).__name__, adapter.control.pipeline
        lines = [
            f"from diffusers import {kind}, {pipeline}",
            f"pipe = {pipeline}.from_pretrained(",
            f'    {json.dumps(base)}, controlnet={kind}.from_pretrained("path/of/this/folder")',
            ")",
            'image = pipe("a prompt", control_image=hint, controlnet_conditioning_scale=1.0).images[0]',
        ]
    elif isinstance(adapter, ControlLoRA):
        network: Any = adapter.backbone
        pipeline = network.control.lora_pipeline
        lines = [
            f"from diffusers import {pipeline}",
            f"pipe = {pipeline}.from_pretrained({json.dumps(base)})",
            'pipe.load_lora_weights("path/of/this/folder")',
            'image = pipe("a prompt", control_image=hint).images[0]',
        ]
    else:
        return ""
    opened = 'hint = Image.open("hint.png").convert("RGB")'
    lines = ["from PIL import Image", lines[0], "", *lines[1:-1], opened, lines[-1]]
    return "\n".join(f"    {line}".rstrip() for line in lines)


def _usage(base: str, hint_channels: int, unlocked: bool) -> str:
    # What a card shows of diffusers; the two sorts of pipeline have one door.
    picture = hint_channels in (1, 3)
    names = "AutoPipelineForText2Image, ControlNetModel" + ", UNet2DConditionModel" * unlocked
    lines = [
        "import torch" if not picture else "from PIL import Image",
        f"from diffusers import {names}",
        "",
        'folder = "path/of/this/folder"',
        'parts = {"controlnet": ControlNetModel.from_pretrained(folder)}',
        *['parts["unet"] = UNet2DConditionModel.from_pretrained(folder + "/unet")'] * unlocked,
        f"pipe = AutoPipelineForText2Image.from_pretrained({json.dumps(base)}, **parts)",
        'hint = Image.open("hint.png").convert("RGB")'
        if picture
        else f"hint = torch.zeros(1, {hint_channels}, height, width)  # in [0, 1], yours",
        'image = pipe("a prompt", image=hint).images[0]',
    ]
    said = ["The decoder was trained too: the adapter needs the folder `unet` beside it.", ""] * unlocked
    return "\n".join([*said, *(f"    {line}".rstrip() for line in lines)])


def _table(look: Evidence | None) -> str:
    if look is None:
        return "No evidence was taken."
    rows = [
        f"| {name} | {one.value:.4f} | {one.floor:.4f} | {one.ceiling:.4f} | {_relative(one)} |"
        for name, one in look.bounded_scores.items()
    ]
    gap = look.gap
    return "\n".join(
        [
            f"| step {look.step:,} | samples | floor: hints of other samples | ceiling: real images | relative |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"Loss under the right hint {gap.right:.5f}, under another sample's {gap.shuffled:.5f} "
            f"(difference {gap.value:.5f} +- {gap.error:.5f}).",
        ]
    )


def _relative(bounded: BoundedScore) -> str:
    return "cannot tell" if math.isnan(bounded.relative) else f"{bounded.relative:.2f}"


def contact_sheet(probe: Probe, images: Tensor, columns: int = 16, *, most: int = 64, side: int = 256) -> Tensor:
    """Return (1, 3, H, W) in [0, 1]: rows of hints, real images and samples, in turn.

    Args:
        probe: of n samples.
        images: (n, 3, h, w) in [-1, 1].
        columns: samples in a row.
        most: samples that are shown, the first ones.
        side: pixels that a larger image is shrunk to; without these two, 64 images of 1024 pixels would make
            200 million.
    """
    hints, real, made = (many[:most].cpu().float() for many in (probe.hint, probe.images, images))
    colours = nn.functional.interpolate(_as_colours(hints), images.shape[2:], mode="nearest")
    rows = [_shrunk(colours, side), *(_shrunk((many.clamp(-1, 1) + 1) / 2, side) for many in (real, made))]
    parts = [many for start in range(0, len(hints), columns) for many in _padded(rows, start, columns)]
    return make_grid(torch.cat(parts), nrow=min(columns, len(hints)), padding=1, pad_value=0.5)[None]


def _shrunk(images: Tensor, side: int) -> Tensor:
    height, width = images.shape[2:]
    factor = min(1.0, side / max(height, width))
    size = (max(1, round(factor * height)), max(1, round(factor * width)))
    return nn.functional.interpolate(images, size, mode="area") if factor < 1 else images


def _padded(rows: list[Tensor], start: int, columns: int) -> list[Tensor]:
    # Only a last row that is not the first can be shorter than the others; it is filled up with grey.
    width = min(columns, len(rows[0]))
    parts = [many[start : start + width] for many in rows]
    return [
        torch.cat([part, torch.full((width - len(part), *part.shape[1:]), 0.5)]) if len(part) < width else part
        for part in parts
    ]


def _as_colours(hint: Tensor) -> Tensor:
    # One channel is grey, three are colours, any other number are classes, shown as shades.
    if hint.shape[1] not in (1, 3):
        hint = hint.argmax(1, keepdim=True) / (hint.shape[1] - 1)
    return hint.expand(-1, 3, -1, -1)
