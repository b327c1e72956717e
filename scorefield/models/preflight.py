"""What is wrong with a model as far as its JSON files tell: checked before the first weights are read."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from scorefield.files import read_json
from scorefield.models.components import check_part
from scorefield.schedule import Kind, Schedule

FEW_STEPS = ("LCMScheduler", "FlowMatchLCMScheduler", "TCDScheduler")
"""Schedulers of distilled models, which know few noise levels."""

VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",), ("tokenizer.model",))
"""Files that hold all tokens of a tokenizer, either of them."""


def check_device(device: torch.device | str) -> torch.device:
    """Return the device. Raises ``ValueError`` for one that torch does not know, or that is not here."""
    try:
        found = torch.device(device)
        if found.type != "meta":
            torch.empty(0, device=found).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"device must be one that is here, such as cpu; got {device!r} ({reason}).") from error
    return found


def check_dtype(*dtypes: object) -> None:
    """Raise ``ValueError`` for precisions that networks do not compute in."""
    allowed = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for dtype in dtypes:
        if dtype not in allowed:
            raise ValueError(f"dtype must be one of {', '.join(map(str, allowed))}; got {dtype!r}.")


def check_options(has_codec: bool, **options: object) -> None:
    """Raise ``ValueError`` for options of the autoencoder of a model that has none."""
    given = [name for name, value in options.items() if value]
    if given and not has_codec:
        raise ValueError(f"this model works on pixels, without an autoencoder; leave out {', '.join(given)}.")


def is_few_step(settings: Mapping[str, Any]) -> bool:
    """Return True for the ``scheduler_config.json`` of a distilled model.

    A student that was saved again by diffusers has lost all else that tells it from a teacher.
    """
    return settings.get("_class_name") in FEW_STEPS


def check_many_steps(settings: Mapping[str, Any], source: Path | str) -> None:
    """Raise ``ValueError`` for the scheduler of a distilled model, where all noise levels must be known."""
    if is_few_step(settings):
        raise ValueError(
            f"{source} is a student, or another model of few steps: its scheduler is a {settings['_class_name']}, "
            "and other noise levels it does not know. Pass its teacher, the model it was distilled from."
        )


def check_last_time(schedule: Schedule, kind: Kind, source: Path | str) -> None:
    """Raise ``ValueError`` for a network of eps on a schedule whose noisiest timestep holds no image."""
    if kind == "eps" and not float(schedule.alpha(torch.tensor(schedule.t_max, dtype=torch.float64))) > 0:
        raise ValueError(
            f"{source}: the scheduler rescales its betas to zero terminal SNR, and the network predicts epsilon, "
            "which then says nothing of the image. Pass a model of v_prediction, or set rescale_betas_zero_snr to "
            "false in its scheduler_config.json if it was trained so."
        )


def check_network(config: Mapping[str, Any], part: Path, *, packing: int = 1, variance: bool = False) -> None:
    """Raise ``ValueError`` for a network that needs more than noise, time, prompt and class, or predicts more.

    Args:
        config: of the network.
        part: its folder.
        packing: latents along a side of a token, where the config may count the channels of tokens.
        variance: its call leaves a predicted variance out.
    """
    given, made = config["in_channels"], config.get("out_channels") or config["in_channels"]
    if made not in (given, given / packing**2) and not (variance and made == 2 * given):
        raise ValueError(
            f"{part} maps {given} channels to {made}: it learned its variance, "
            "or takes an image beside the noise. Pass a model that predicts the shape of x_t."
        )
    if config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"{part} is a distilled model that is told the guidance scale; pass the model it came from."
        )
    if (embedding := config.get("class_embed_type")) is not None:
        raise ValueError(f"{part} embeds its classes as {embedding!r}; expected class numbers (null).")


def check_shift(settings: Mapping[str, Any]) -> float:
    """Shift of the noise levels of a flow-matching scheduler. Raises ``ValueError`` unless it is above 0."""
    shift = settings.get("shift", 1.0)
    if not isinstance(shift, int | float) or not 0 < shift < math.inf:
        raise ValueError(f"the scheduler's shift must be a number above 0, such as 3; got {shift!r}.")
    return float(shift)


def flow_shift(settings: Mapping[str, Any], num_tokens: int) -> float:
    """Return the shift of the noise levels of a flow-matching scheduler for an image of some tokens.

    A dynamic shift mu is a straight line of the number of tokens: exp(mu), or mu itself where the scheduler shifts
    linearly (diffusers' ``calculate_shift`` and ``FlowMatchEulerDiscreteScheduler.time_shift``).

    Raises ``ValueError`` for settings that are no numbers above 0.
    """
    if not settings.get("use_dynamic_shifting"):
        if "flow_shift" in settings:  # of multistep schedulers
            return check_shift({"shift": settings["flow_shift"]})
        return check_shift(settings)
    names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    values: list[Any] = [settings.get(name, usual) for name, usual in names.items()]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise ValueError(f"the scheduler's {', '.join(names)} must be numbers; got {values}.")
    few, many, low, high = (float(value) for value in values)
    if few == many:
        raise ValueError(
            f"the scheduler's base_image_seq_len and max_image_seq_len must differ; got {few:g} twice."
        )
    mu = low + (high - low) * (num_tokens - few) / (many - few)
    return check_shift({"shift": mu if settings.get("time_shift_type") == "linear" else math.exp(min(mu, 50))})


def latent_shape(
    config: Mapping[str, Any], channels: int, factor: int, size: int | tuple[int, int] | None, *,
    packing: int = 1, side: int = 1, usual: tuple[int, int] | None = None,
) -> tuple[int, int, int]:  # fmt: skip
    """Return (c, h, w) of x0.

    Args:
        config: of the network.
        channels: of the autoencoder.
        factor: pixels per latent along a side.
        size: of the images in pixels; None is the network's own.
        packing: latents along a side of a token, where the config counts the channels of tokens.
        side: latents along a side of a token.
        usual: (height, width) of the images in pixels, where the config has no sample_size.

    Raises:
        ValueError: channels that do not fit, a size that is unknown or that the network cannot take.
    """
    if channels * packing**2 != config["in_channels"]:
        raise ValueError(
            f"the autoencoder has {channels * packing**2} channels, the network {config['in_channels']}."
        )
    sample = config.get("sample_size")
    if size is None and sample is None and usual is None:
        raise ValueError("the model does not say the size of its images. Pass --size, in pixels.")
    if size is None and sample is not None:
        height, width = (factor * side for side in _pair(sample))
    else:
        height, width = _pair(usual if size is None else size)
    step = factor * side
    if factor == 1:  # a UNet2DModel halves the sides in every block but its last, and must come back
        step = 2 ** (len(config["down_block_types"]) - 1)
    if height < 1 or width < 1 or height % step or width % step:
        raise ValueError(f"size must be in multiples of {step} pixels; got {height} x {width}.")
    if (places := config.get("rope_max_seq_len")) is not None and max(height, width) > places * step:
        raise ValueError(f"size must be at most {places * step} pixels here; got {height} x {width}.")
    most = config.get("pos_embed_max_size")
    if most is not None and max(height, width) > most * step:
        raise ValueError(f"size must be at most {most * step} pixels here; got {height} x {width}.")
    return channels, height // factor, width // factor


def _pair(size: Any) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(pair) != 2 or not all(isinstance(side, int) for side in pair):
        raise ValueError(f"size must be a whole number of pixels, or (height, width); got {size!r}.")
    height, width = pair
    return height, width


def check_tokenizer(part: Path, *, bounded: bool = True) -> None:
    """Raise ``ValueError`` unless the folder ``part`` holds a vocabulary and says how long a prompt may be.

    transformers makes an empty tokenizer of a folder without one, and then all prompts are alike. Where it is not
    ``bounded``, its length has no use.
    """
    check_part(part)
    held = {path.name for path in part.iterdir() if path.stat().st_size} if part.is_dir() else set()
    if not any(held.issuperset(names) for names in VOCABULARIES):
        expected = ", or ".join(" and ".join(names) for names in VOCABULARIES)
        found = ", ".join(sorted(held)) or "nothing"
        raise ValueError(f"{part} holds no vocabulary: expected {expected}; got {found}. Download it again.")
    for name in held & {"tokenizer.json", "vocab.json"}:
        read_json(part / name)
    length = read_json(part / "tokenizer_config.json").get("model_max_length")
    if not bounded:
        return
    if not isinstance(length, int) or not 0 < length < 100_000:  # transformers writes 10^30 for none
        raise ValueError(
            f"{part / 'tokenizer_config.json'}: model_max_length must be the most tokens of a prompt, such as 77; "
            f"got {length!r}."
        )


def tokenizer_class(index: Mapping[str, Any], part: str) -> Any:
    """Return the class that ``model_index.json`` names for ``part``: a tokenizer, or a processor (FLUX.2).

    Raises ``ValueError`` unless transformers has it.
    """
    library, name = index.get(part) or (None, None)
    kind = getattr(transformers, name, None) if library == "transformers" and isinstance(name, str) else None
    kinds = (transformers.PreTrainedTokenizerBase, transformers.ProcessorMixin)
    if not (isinstance(kind, type) and issubclass(kind, kinds)):
        raise ValueError(f"unsupported {part}: {library}.{name}; expected a tokenizer of transformers.")
    return kind
