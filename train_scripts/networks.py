"""The networks of the scripts, and teachers from anywhere: our folders, diffusers' folders, a user's function."""

import importlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from distill.student import TIMES
from score import KarrasPreconditioning, NetworkDenoiser, VariancePreserving
from score.network import ResidualMLP
from score.schedule import Kind
from score.storage import load_denoiser, read_facts

KINDS: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


class UNet(nn.Module):
    """diffusers' UNet2DModel with the calling convention of this package, on patches of the image.

    Args:
        shape: (c, h, w) of an image.
        num_classes: label ``num_classes`` is the null class; 0 means unconditional.
        channels: of each resolution, halving from one to the next.
        layers: residual blocks at each resolution.
        patch: pixels that become channels first: 2 makes a network four times as fast on large images.
        attention: at the lowest resolution.
        dropout: in each block, while training.
    """

    bottleneck = "unet.mid_block"

    def __init__(
        self, shape: tuple[int, int, int], num_classes: int = 0, channels: tuple[int, ...] = (64, 128),
        layers: int = 1, patch: int = 2, attention: bool = True, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        scale = patch * 2 ** (len(channels) - 1)
        if shape[1] % scale or shape[2] % scale:
            raise ValueError(
                f"a UNet of {len(channels)} resolutions on {patch} x {patch} patches needs sides divisible by "
                f"{scale}; got {shape[1]} x {shape[2]}. Pass another --resolution, or fewer channels."
            )
        self.shape, self.num_classes, self.patch = tuple(shape), num_classes, patch
        inner, plain = shape[0] * patch**2, len(channels) - 1
        unet: Any = UNet2DModel(
            sample_size=(shape[1] // patch, shape[2] // patch), in_channels=inner, out_channels=inner,
            block_out_channels=tuple(channels), layers_per_block=layers, norm_num_groups=8, dropout=dropout,
            down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D" if attention else "DownBlock2D",),
            up_block_types=("AttnUpBlock2D" if attention else "UpBlock2D",) + ("UpBlock2D",) * plain,
            attention_head_dim=16, add_attention=attention,
            num_class_embeds=num_classes + 1 if num_classes else None,
        )  # fmt: skip
        nn.init.zeros_(unet.conv_out.weight)
        nn.init.zeros_(unet.conv_out.bias)
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The prediction, shape of x_t; t of order one, as EDM's log(sigma) / 4 and a flow's t are."""
        patches = nn.functional.pixel_unshuffle(x_t, self.patch)
        # The embedding of diffusers' UNets is made for timesteps up to 1,000.
        prediction: Tensor = self.unet(patches, 1000 * t, class_labels).sample
        return nn.functional.pixel_shuffle(prediction, self.patch)


@dataclass(frozen=True, eq=False)
class Teacher:
    """A frozen denoiser and what one has to know to sample it or to distil it.

    Attributes:
        denoiser: network, schedule and prediction kind.
        shape: (c, h, w) of an image.
        num_classes: label ``num_classes`` is the null class; 0 means that the network takes no labels.
        facts: how :func:`build_network` makes another network like it; JSON-able, saved beside every student.
        times: conditioning times, for a student; empty for a teacher.
    """

    denoiser: NetworkDenoiser
    shape: tuple[int, int, int]
    num_classes: int
    facts: Mapping[str, Any]
    times: tuple[float, ...] = ()

    def cond(self, labels: Tensor) -> dict[str, Tensor]:
        """The condition under which the network is asked for these labels."""
        return {"class_labels": labels} if self.num_classes else {}


def build_network(facts: Mapping[str, Any], num_steps: int = 0) -> nn.Module:
    """The network that ``facts`` of a saved teacher or student describe, with fresh weights.

    ``num_steps`` lets an MLP be told the step of a few-step student. Raises ``ValueError`` for facts that describe
    no network, or one so large that building it would not end.
    """
    options = facts.get("options", {})
    if not isinstance(options, dict):
        raise ValueError(f"a network's options must be a dictionary; got {options!r}.")
    for name, value in options.items():
        most = 1000 if name in ("depth", "layers", "layers_per_block") else 65536
        if any(isinstance(size, int) and size > most for size in (value if isinstance(value, list) else [value])):
            raise ValueError(f"a network's {name} must be at most {most}; got {value}.")
    try:
        return _build(facts, num_steps)
    except (TypeError, KeyError, AttributeError, IndexError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"no network can be built of {dict(facts)}: {error!r}") from error


def _build(facts: Mapping[str, Any], num_steps: int) -> nn.Module:
    family, options = facts.get("network"), dict(facts.get("options", {}))
    network: nn.Module
    if family == "mlp":
        network = ResidualMLP(tuple(facts["shape"]), facts["num_classes"], num_steps=num_steps, **options)
    elif family == "unet":
        network = UNet(tuple(facts["shape"]), facts["num_classes"], **options)
    elif family == "diffusers":
        network = UNet2DModel.from_config(options)
    elif family == "function":
        network = from_function(options["name"]).denoiser.network
    else:
        raise ValueError(f"the saved denoiser does not say how its network is built; got network={family!r}.")
    sigma_data = facts.get("sigma_data")
    return network if sigma_data is None else KarrasPreconditioning(network, sigma_data)


def load_teacher(name: str) -> Teacher:
    """A teacher by name: a folder of train_teacher.py, a folder of diffusers, or ``module:function``.

    Raises ``ValueError`` for anything else.
    """
    folder = Path(name)
    if not folder.exists() and ":" in name:
        return from_function(name)
    if (folder / "unet" / "config.json").is_file() or (folder / "config.json").is_file():
        return from_diffusers(folder)
    facts = read_facts(folder)
    missing = sorted({"shape", "num_classes", "network"} - facts.keys())
    if missing:
        raise ValueError(f"{folder} does not say its {', '.join(missing)}; was it written by train_teacher.py?")
    denoiser = load_denoiser(folder, build_network(facts))
    return Teacher(denoiser, tuple(facts["shape"]), facts["num_classes"], facts, tuple(facts.get(TIMES, ())))


def probe_bottleneck(teacher: Teacher, name: str | None) -> tuple[str, int, int]:
    """Name, channels and side of the activations a critic reads; side 1 means no space.

    Raises ``ValueError`` where there is no such submodule, or none is known and none is named.
    """
    network = teacher.denoiser.network
    modules = dict(network.named_modules())
    if name is None:
        owners = [(prefix, module) for prefix, module in modules.items() if hasattr(module, "bottleneck")]
        known = [f"{prefix}.{module.bottleneck}".lstrip(".") for prefix, module in owners]
        name = next(iter([*known, *(key for key in modules if key.split(".")[-1] == "mid_block")]), None)
    if name is None or name not in modules:
        raise ValueError(
            f"the GAN term needs a submodule to listen to; got --bottleneck {name}. The network has "
            f"{', '.join(list(modules)[1:8])}, ... Or pass --gan-weight 0."
        )
    kept: list[Tensor] = []
    hook = modules[name].register_forward_hook(
        lambda module, inputs, output: kept.append(output if isinstance(output, Tensor) else output[0])
    )
    t = torch.full((1,), teacher.denoiser.schedule.t_max)
    with torch.no_grad():
        teacher.denoiser(torch.zeros(1, *teacher.shape), t, teacher.cond(torch.zeros(1, dtype=torch.long)))
    hook.remove()
    return name, kept[0].shape[1], kept[0].shape[-1] if kept[0].ndim == 4 else 1


def from_function(name: str) -> Teacher:
    """What ``module:function`` returns when it is called without arguments: a :class:`Teacher`.

    The current folder is searched first. Its facts are replaced, so that a student of it can be built again.
    """
    module_name, _, function_name = name.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--teacher {name}: no such function ({error}). Expected module:function.") from error
    teacher = function()
    if not isinstance(teacher, Teacher):
        raise ValueError(
            f"--teacher {name} must return a networks.Teacher(denoiser, shape, num_classes, facts); got "
            f"{type(teacher).__name__}."
        )
    facts = {
        "network": "function", "options": {"name": name}, "shape": list(teacher.shape),
        "num_classes": teacher.num_classes,
    }  # fmt: skip
    return Teacher(teacher.denoiser, teacher.shape, teacher.num_classes, facts)


def diffusers_schedule(settings: Mapping[str, Any]) -> VariancePreserving:
    """The noise schedule of a DDPM-like scheduler's config.

    Raises ``ValueError`` for EDM and flow-matching schedulers, which are not what UNet2DModel pipelines use.
    """
    name = str(settings.get("_class_name", ""))
    if "EDM" in name or "Flow" in name or "beta_schedule" not in settings:
        raise ValueError(
            f"the scheduler {name or settings} is not of the DDPM family; wrap it in module:function."
        )
    known = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
    )
    own = {name: settings[name] for name in known if settings.get(name) is not None}
    scheduler: Any = DDPMScheduler(**own)
    return VariancePreserving(scheduler.alphas_cumprod)


def from_diffusers(folder: Path) -> Teacher:
    """A ``UNet2DModel`` and its scheduler: a pipeline's folder, or a model's folder with the scheduler beside.

    Raises ``ValueError`` for weights that are not safetensors, a learned variance, or a scheduler that is missing.
    """
    model = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler = next(
        (
            file
            for file in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
            if file.is_file()
        ),
        None,
    )
    if scheduler is None:
        raise ValueError(f"{folder} has no scheduler/scheduler_config.json, so its noise schedule is unknown.")
    try:
        network = UNet2DModel.from_pretrained(model, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{model} is no UNet2DModel with safetensors weights: {error}") from error
    config = network.config
    if config.out_channels != config.in_channels:
        raise ValueError(
            f"{model} predicts {config.out_channels} channels of {config.in_channels}; split off its variance."
        )
    settings = json.loads(scheduler.read_text())
    schedule = diffusers_schedule(settings)
    kind = KINDS.get(settings.get("prediction_type", "epsilon"))
    if kind is None:
        raise ValueError(
            f"{scheduler}: unknown prediction_type {settings['prediction_type']!r}; expected {', '.join(KINDS)}."
        )
    size = config.sample_size if isinstance(config.sample_size, (tuple, list)) else (config.sample_size,) * 2
    shape = (config.in_channels, int(size[0]), int(size[1]))
    num_classes = int(config.num_class_embeds or 0)
    options = {name: value for name, value in config.items() if not name.startswith("_")}
    facts = {"network": "diffusers", "options": options, "shape": list(shape), "num_classes": num_classes}
    return Teacher(NetworkDenoiser(network.eval(), schedule, kind), shape, num_classes, facts)
