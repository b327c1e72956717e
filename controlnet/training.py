"""What an adapter learns by: the base's own denoising loss, with the hint; and what makes that cheap.

In this order, so that the copy is made of the base's full precision:

    adapter = copy_encoder(base, hint_channels=1, factor=codec.factor)  # float32, before the base is cast
    freeze(base.network, torch.bfloat16)
    for network in (base.network, adapter):
        lighten(network)
    phase = control_phase(ControlledDenoiser(base, adapter), adamw(adapter, 1e-5), ema=EMA(adapter))
    for report in train([phase], batches, accelerator, steps=10_000): ...

The adapter's weights stay float32 and compute in bf16 under autocast (``Accelerator(mixed_precision="bf16")``).
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.checkpoint import checkpoint

from controlnet.adapter import ControlledDenoiser, unet_of
from scorefield.denoiser import NetworkDenoiser
from scorefield.gradient import TIME_NOT_FINITE, TimeWeight, denoising_errors, prediction_weight, time_not_finite
from scorefield.models.networks import DiffusersNetwork
from scorefield.randomness import Rng
from scorefield.times import TimeSampler, uniform
from scorefield.training.loop import EMA, Phase

ALL_TIMES = uniform(0.0, 1.0)

DECODER = ("up_blocks", "conv_norm_out", "conv_out")
"""What :func:`unlock` trains beside the adapter: the parts of a UNet behind its middle block."""


NEW = ("controlnet_", "pos_embed_input", "input_block", "before_proj", "after_proj")
"""How the names begin of layers that a ControlNet does not copy: of UNets and FLUX, SD3, Sana, Z-Image."""


def control_phase(
    denoiser: ControlledDenoiser, optimizer: Optimizer, *, network: nn.Module | None = None,
    times: TimeSampler = ALL_TIMES, weight: TimeWeight | None = None, ema: EMA | None = None,
    lr_schedule: LRScheduler | None = None,
) -> Phase:  # fmt: skip
    """Return the phase in which the adapter learns, for :func:`scorefield.training.loop.train`.

    A batch is {"x0": latents or pixels, "hint": (b, c, h, w) in [0, 1], "cond": Cond}. Prompts and hints are
    dropped where batches are made, for base and adapter alike (half of the prompts in arXiv 2302.05543, 3.4).

    Args:
        denoiser: its adapter wrapped in DDP for several ranks.
        optimizer: of ``network``; :func:`adamw`.
        network: what learns: the adapter by default, or what :func:`unlock` returned.
        times: uniform over the base's timesteps, as ControlNet trains.
        weight: of the loss by t; by default that of the base's prediction kind, that is no weight of its own
            loss. ``scorefield.gradient.min_snr_weight`` is another.
        ema: of ``network``.
        lr_schedule: stepped after each update.

    Raises:
        ValueError: weights that would learn but are not part of ``network``, or in less than float32.
    """
    network = denoiser.adapter if network is None else network
    _check_trainable(denoiser, network)
    weight = prediction_weight(denoiser.base.kind) if weight is None else weight

    def loss(batch: Mapping[str, Any], rng: Rng) -> dict[str, Tensor]:
        errors, t = denoising_errors(
            denoiser.with_hint(batch["hint"]), batch["x0"], batch["cond"], times=times, weight=weight,
            generator=rng("noise"),
        )  # fmt: skip
        return {"loss": errors.mean(), TIME_NOT_FINITE: time_not_finite(errors, t)}

    return Phase(name="control", network=network, optimizer=optimizer, loss=loss, ema=ema, lr_schedule=lr_schedule)


def adamw(
    network: nn.Module, learning_rate: float, *, new_factor: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.01, eight_bit: bool = False,
) -> Optimizer:  # fmt: skip
    """AdamW in its fused form, with ControlNet's settings.

    Args:
        network: an adapter, or what :func:`unlock` returned.
        learning_rate: 1e-5 for Stable Diffusion, 2e-6 unlocked; small models want far more.
        new_factor: times the learning rate for what is no copy: zero convolutions and hint embedding. The hint
            reaches the copied encoder only with the third update, by gradients many orders smaller.
        betas: of the moments.
        weight_decay: decoupled.
        eight_bit: moments in 8 bits, by bitsandbytes.

    Raises:
        ValueError: nothing to train, or eight_bit without bitsandbytes.
    """
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups[any(part.startswith(NEW) for part in name.split("."))].append(parameter)
    settings: list[dict[str, Any]] = [
        {"params": parameters, "lr": learning_rate * (new_factor if new else 1.0)}
        for new, parameters in groups.items()
        if parameters
    ]
    if not settings:
        raise ValueError("the network has no parameter that requires a gradient; was it frozen?")
    if not eight_bit:
        return AdamW(settings, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError("8-bit AdamW needs bitsandbytes: pip install bitsandbytes, or pass False.") from error
    small: Optimizer = AdamW8bit(settings, lr=learning_rate, betas=betas, weight_decay=weight_decay)
    return small


def lighten(
    network: nn.Module, *, recompute: bool = True, levels: int | None = None, channels_last: bool = True
) -> None:
    """Let a base or an adapter use less memory and time, in place; its results stay the same up to rounding.

    Both need it: a frozen decoder keeps as much for the way back as the adapter does (its encoder keeps nothing).

    Args:
        network: a diffusers model, or a module that holds one.
        recompute: block by block in the backward pass, what then need not be kept.
        levels: of resolution, from the finest, whose blocks are recomputed, beside the embedding of the hint; all
            by default. The finest hold most of the memory and little of the work: for Stable Diffusion 1.5 one
            level halves the memory for 9 % more work, all make it a sixth for 26 %.
        channels_last: the order of memory that convolutions are fastest in.

    Raises:
        ValueError: recompute for a network that cannot, a negative number of levels, or levels for a transformer.
    """
    if channels_last:
        network.to(memory_format=torch.channels_last)
    if not recompute:
        return
    able: list[Any] = [part for part in network.modules() if hasattr(part, "enable_gradient_checkpointing")]
    if not able:
        raise ValueError(f"a {type(network).__name__} cannot recompute activations. Pass recompute=False.")
    model = able[0]
    model.enable_gradient_checkpointing(_recomputed)
    if levels is None:
        return
    if levels < 0:
        raise ValueError(f"levels must be at least 0; got {levels}. None means all.")
    if not hasattr(model, "down_blocks"):
        raise ValueError(f"a {type(model).__name__} has no levels of resolution. Leave out --recompute-levels.")
    up = list(getattr(model, "up_blocks", ()))  # coarsest first, and none in a ControlNet
    for block in (*model.down_blocks[levels:], model.mid_block, *up[: max(len(up) - levels, 0)]):
        for part in block.modules():
            if hasattr(part, "gradient_checkpointing"):
                part.gradient_checkpointing = False


def compile_lightly(network: nn.Module, activation_budget: float = 1.0) -> None:
    """Compile a base or an adapter in place; names of weights stay as they are.

    Compiled code fuses what is cheap, so that little of it is kept for the way back, and below a budget of 1 torch
    chooses what else to compute again, by its cost: a better bargain than recomputing whole blocks.

    Args:
        network: what :func:`lighten` got, with ``recompute=False``.
        activation_budget: share, in (0, 1], of the activations that compiled code would keep. The setting is
            torch's own and global (``torch._functorch.config.activation_memory_budget``).

    Raises:
        ValueError: a budget outside (0, 1].
    """
    if not 0 < activation_budget <= 1:
        raise ValueError(f"activation_budget must lie in (0, 1]; got {activation_budget}.")
    functorch.activation_memory_budget = activation_budget
    network.compile()


def unlock(denoiser: ControlledDenoiser) -> nn.Module:
    """Let the base's decoder learn, too (``sd_locked=False``); what learns, for optimiser, EMA and phase.

    Use a learning rate some five times lower. Do not wrap the result in DDP: the loop averages its gradients.
    """
    unet = unet_of(denoiser.base)
    parts = {name: getattr(unet, name) for name in DECODER}
    for part in parts.values():
        part.requires_grad_(True)
    return nn.ModuleDict({"adapter": denoiser.unwrapped().adapter, **parts})


def with_weights(denoiser: ControlledDenoiser, network: nn.Module) -> ControlledDenoiser:
    """``denoiser`` with ``network`` for what learns: an average of the adapter, or of what :func:`unlock` gave."""
    if not isinstance(network, nn.ModuleDict):
        return replace(denoiser, adapter=network)
    unet = copy.copy(unet_of(denoiser.base))  # shares its encoder with the base
    unet._modules = {**unet._modules, **{name: network[name] for name in DECODER}}
    base: NetworkDenoiser = replace(denoiser.base, network=DiffusersNetwork(unet))
    return replace(denoiser, base=base, adapter=network["adapter"])


def _recomputed(module: nn.Module, *arguments: Any) -> Any:
    # Neither a base in eval mode nor a ControlNet draws random numbers, so no state of a generator is kept.
    return checkpoint(module.__call__, *arguments, use_reentrant=False, preserve_rng_state=False)


def _check_trainable(denoiser: ControlledDenoiser, network: nn.Module) -> None:
    learning = {id(p): p for p in network.parameters() if p.requires_grad}
    if coarse := {str(p.dtype) for p in learning.values() if torch.finfo(p.dtype).bits < 32}:
        raise ValueError(
            f"weights that learn must be float32, or small updates are rounded away; got {', '.join(coarse)}. "
            "Copy the encoder before the base is cast, and compute in bf16 by autocast."
        )
    outside = [p for p in (*denoiser.base.network.parameters(), *denoiser.adapter.parameters()) if p.requires_grad]
    if stray := sum(id(p) not in learning for p in outside):
        raise ValueError(
            f"{stray} weights beside the phase's network require gradients. Freeze the base "
            "(scorefield.denoiser.freeze), or pass network=unlock(denoiser)."
        )
