"""What an iteration of a distillation holds, for ``--micro-batch auto``."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from distill.checks import smallest_pass
from distill.options import Config
from distill.parts import DISTANCES, Method, build_phases, folders_of, pairs_at_a_time, uses_pairs
from distill.regression import Pairs, Regression
from scorefield.models.teacher import Teacher
from scorefield.randomness import Rng
from scorefield.training.micro_batch import Trial, settle
from scorefield.training.options import images_per_pass

MakeBatches = Callable[[Config], Callable[[Rng], Any]]
"""Options -> batches of the method, of so many images as go through the networks at a time."""


def trial_of(config: Config, method: Method, teacher: Teacher, make_batches: MakeBatches) -> Trial:
    """Return student and fake score as they learn, beside the regression on pairs that are not made yet.

    Args:
        config: with a number of images a pass.
        method: without its regression.
        teacher: of the pairs.
        make_batches: of the method.
    """
    if config.regression_weight:
        method = replace(method, regression=_stand_in(config, method, teacher))
    makes_pairs = uses_pairs(config) or config.guard_images
    return Trial(
        build_phases(config, method), make_batches(config), method.rollout, (teacher.denoiser.network,),
        also=partial(ask_for_pairs, config, method, teacher) if makes_pairs else None,
    )  # fmt: skip


@torch.no_grad()
def ask_for_pairs(config: Config, method: Method, teacher: Teacher) -> None:
    """Ask the teacher once about as many images as when its pairs are made, and keep nothing."""
    number, device = pairs_at_a_time(config), teacher.device
    x_t = torch.zeros(number, *teacher.shape, device=device)
    t = torch.full((number,), float(method.student.times[0]), device=device)
    cond = {name: value.to(device) for name, value in teacher.cond(torch.zeros(number).long()).items()}
    with torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext():
        method.teacher(x_t, t, cond)


def settle_passes(
    config: Config, method: Method, teacher: Teacher, accelerator: Accelerator, make_batches: MakeBatches
) -> Config:
    """Return the options with a number of images a pass; see :func:`scorefield.training.micro_batch.settle`."""
    return settle(
        config, accelerator, lambda one: trial_of(one, method, teacher, make_batches),
        smallest=smallest_pass(config.method), folders=folders_of(config),
    )  # fmt: skip


def _stand_in(config: Config, method: Method, teacher: Teacher) -> Regression:
    number = images_per_pass(config)
    empty = torch.zeros(number, *teacher.shape)
    cond = {name: value.cpu() for name, value in teacher.cond(torch.zeros(number).long()).items()}
    pairs = Pairs(empty, empty, cond, dict.fromkeys(method.student.times[1:], empty))
    weight, distance = config.regression_weight, DISTANCES[config.regression_loss]
    return Regression(pairs=pairs, weight=weight, distance=distance, batch=number)
