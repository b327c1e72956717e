"""Which options of ``scorefield distill`` cannot work. Importing this module imports no torch."""

import math
from collections.abc import Sequence

from distill.options import ALONG_PATHS, IMAGE_PRESETS, PRESETS, Config
from scorefield.training.options import (
    check_init_from,
    check_micro_batch,
    check_numbers,
    check_quantize,
    check_run,
)

TEXT_ONLY = (
    "num_prompts", "long_prompts", "negative_prompt", "lora", "lora_rank", "lora_alpha",
    "validation_prompts", "kohya_keys", "quantize", "num_frames",
)  # fmt: skip
IMAGES_ONLY = ("network", "data", "channels", "crop", "flip", "memory_limit", "features")
MIN_GUARD = 64
FAKE_SCORE_ONLY = (
    "student_every", "ratio_range", "fake_lr", "fake_warmup", "alpha_in_gradient", "separate_guidance",
)  # fmt: skip
LORA_ONLY = ("lora_rank", "lora_alpha", "kohya_keys", "quantize")


def check(config: Config) -> None:
    """Raise ``ValueError`` for options that are out of range or contradict each other."""
    check_run(config)
    check_micro_batch(config, smallest_pass(config.method))
    check_init_from(config.init_from, config.out)
    check_numbers(
        config,
        positive=("student_every", "num_steps", "points", "pair_steps", "lora_rank", "guard_every", "num_frames"),
        not_negative=(
            "guidance", "critic_weight", "regression_weight", "num_prompts", "size", "lora_alpha",
            "eval_every", "num_pairs", "student_ratio", "fake_warmup", "guard_images", "max_setbacks",
            "student_lr", "fake_lr", "warmup_lr",
        ),
        shares=("ema_decay",),
    )  # fmt: skip
    if config.method not in ALONG_PATHS and config.steps < config.student_every:
        raise ValueError(
            f"--steps {config.steps} end before the student's first update, which comes at --student-every "
            f"{config.student_every}."
        )
    for name in ("student_lr", "fake_lr", "warmup_lr"):
        if getattr(config, name) > 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at most 1; got {getattr(config, name)}.")
    for name in ("gan_weight", "warmup_steps"):
        if (value := getattr(config, name)) is not None and not 0 <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 0; got {value}.")
    low, high = config.ratio_range
    if not (low == high == 0 or 0 < low < high < math.inf):
        raise ValueError(f"--ratio-range needs 0 < first < last, or 0 0; got {low:g} {high:g}.")
    if 0 < config.guard_images < MIN_GUARD:
        raise ValueError(f"--guard-images must be 0 or at least {MIN_GUARD}; got {config.guard_images}.")
    if config.times and len(config.times) != config.num_steps:
        raise ValueError(f"--times must be --num-steps {config.num_steps} numbers; got {len(config.times)}.")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise ValueError(f"--betas must lie in [0, 1); got {config.betas}.")
    check_method(config)
    makes_pairs = config.method in ALONG_PATHS or config.warmup_steps != 0 or config.regression_weight
    if config.reals == "teacher" and not makes_pairs:
        raise ValueError(
            "--reals teacher takes the images of the teacher pairs, of which --warmup-steps 0 and "
            "--regression-weight 0 make none. Pass one of them above 0, or --reals data."
        )
    if config.gan_weight and not config.critic_weight:
        raise ValueError("--critic-weight 0 trains no critic for the GAN term. Pass 0.01, or --gan-weight 0.")
    if config.prompts:
        check_texts(config)
    else:
        check_no_texts(config)


def smallest_pass(method: str) -> int:
    """Return how many images a method needs in a pass: f-distill divides by a mean over them."""
    return 2 if method == "f-distill" else 1


def check_method(config: Config) -> None:
    """Raise ``ValueError`` for options that the method has no use for, or lacks."""
    method = config.method
    if method in ALONG_PATHS:
        why = f"is of the fake score, and --method {method} has none: leave it out."
        refuse_given(config, FAKE_SCORE_ONLY, why)
        if config.gan_weight:
            raise ValueError(f"--gan-weight is for a fake score's critic, and --method {method} has none. Pass 0.")
        if method == "progressive":
            check_progressive(config)
        if config.points < 2:
            raise ValueError(f"--points must be at least 2; got {config.points}. 18 to 50 are usual.")
        return
    if method != "dmd" and config.separate_guidance:
        raise ValueError(f"--separate-guidance is for --method dmd; got {method}. Leave it out.")
    if method == "f-distill" and config.gan_weight == 0:
        raise ValueError(
            "--method f-distill reads its weights off the critic, which --gan-weight 0 trains none of. Pass 0.03."
        )


def check_progressive(config: Config) -> None:
    """Raise ``ValueError`` for what progressive distillation cannot do."""
    if config.num_steps != 1:
        raise ValueError(
            f"--method progressive ends in one step; got --num-steps {config.num_steps}. Its students of several "
            "steps walk without new noise between, which no student here does. Pass --num-steps 1."
        )
    if config.regression_weight or config.warmup_steps != 0:
        raise ValueError(
            "--method progressive learns no pairs: in all stages but the last one they are another target. Take "
            "the preset progressive, or pass --regression-weight 0 --warmup-steps 0."
        )
    if config.points < 2 or config.points & (config.points - 1):
        raise ValueError(
            f"--points must be a power of two for --method progressive; got {config.points}. Pass 16."
        )
    if config.steps < (stages := config.points.bit_length() - 1):
        raise ValueError(
            f"--steps {config.steps} are fewer than the {stages} halvings of --points {config.points}."
        )


def check_texts(config: Config) -> None:
    """Raise ``ValueError`` for options that contradict ``--prompts``."""
    if config.preset in IMAGE_PRESETS:
        raise ValueError(
            f"preset {config.preset} is for teachers of images. With --prompts take text, or name no preset."
        )
    refuse_given(config, IMAGES_ONLY, "is for teachers of images: leave it out with --prompts.")
    if not config.lora:
        refuse_given(config, LORA_ONLY, "is for LoRAs: pass --lora, too.")
    if config.quantize != "no" and config.compile:
        raise ValueError("--compile was not made to work with rounded weights. Leave out --compile or --quantize.")
    check_quantize(config.quantize)
    if any(not prompt.strip() for prompt in config.validation_prompts):
        raise ValueError(f"--validation-prompts must say something; got {list(config.validation_prompts)}.")
    if config.negative_prompt and config.guidance == 1:
        raise ValueError("--negative-prompt is what guidance moves away from: pass --guidance above 1, too.")
    if config.eval_every and config.eval_images < 2:
        raise ValueError(f"--eval-images must be at least 2; got {config.eval_images}.")
    if config.num_frames > 1:
        check_videos(config)


def check_videos(config: Config) -> None:
    """Raise ``ValueError`` for what needs images, where videos are distilled."""
    what = f"--num-frames {config.num_frames} makes videos"
    if config.method != "dmd":
        raise ValueError(f"{what}, which --method {config.method} does not learn from. Pass --method dmd.")
    if config.gan_weight:
        raise ValueError(f"{what}, and the critic of --gan-weight reads images. Pass --gan-weight 0.")
    if config.reals == "teacher":
        raise ValueError(f"{what}, and --reals teacher is for a critic of images. Leave it out.")
    if config.eval_every:
        raise ValueError(f"{what}, and the judge of --eval-every sees pictures. Pass --eval-every 0.")


def check_no_texts(config: Config) -> None:
    """Raise ``ValueError`` for options that need ``--prompts``."""
    if config.preset not in IMAGE_PRESETS:
        raise ValueError(f"preset {config.preset} is for text-to-image teachers: pass --prompts, too.")
    refuse_given(config, TEXT_ONLY, "is for text-to-image teachers: pass --prompts, too.")


def refuse_given(config: Config, names: Sequence[str], why: str) -> None:
    """Raise ``ValueError`` for the first of some options that is not as the preset has it."""
    usual = PRESETS[config.preset]()
    for name in names:
        if getattr(config, name) != getattr(usual, name):
            raise ValueError(f"--{name.replace('_', '-')} {why}")
