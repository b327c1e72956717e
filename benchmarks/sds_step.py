"""Seconds and operations of one text-to-3D step: this library against the practice of other trainers.

    python benchmarks/sds_step.py --out runs/step.json
    python benchmarks/sds_step.py --rounds 0 --configs configs

A step is an iteration with the toy world's pipeline as the teacher: cameras, renders, encoder, guided prediction,
backward, Adam. The contenders take turns. Ratios are medians over the rounds, both of whole iterations and of the
part after rendering. They are printed only if all contenders start from the same gradients, which is checked in
float64. ``--configs`` also counts operations at the size of Stable Diffusion, from sd21_unet.json, sd_vae.json and
taesd.json; RESULTS.md says how to get them.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sds_operations
import torch
import tyro
from measure import Ratio, ratio, take_turns
from sds_contenders import (
    Guide,
    Loss,
    conditions,
    generfacto,
    new_scene,
    observe,
    ours,
    scoring,
    threestudio,
    training,
)
from torch import Tensor

from scorefield.denoiser import Cond
from scorefield.models.teacher import load_teacher
from scorefield.randomness import Rng
from toyworld import pipeline_folder

TOLERANCE = 1e-5
PEERS = ("threestudio", "generfacto", "generfacto, two calls")
DRAWS = (2, 4)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Time one iteration of text-to-3D against the practice of other trainers, and count its operations."""

    num_views: int = 4
    """Renders per iteration."""
    size: int = 32
    """Height and width of the renders in pixels; the teacher sees 64."""
    prompt: str = "a red mug"
    """Prompt of the teacher."""
    scale: float = 8.0
    """Scale of guidance, in every contender."""
    iterations: int = 2
    """Iterations of each contender per round."""
    rounds: int = 9
    """Measured rounds. 0 times nothing."""
    warmup: int = 1
    """Rounds before the measured ones."""
    clock: Literal["wall", "process"] = "wall"
    """process counts seconds of processor time, for one thread on a machine that is shared."""
    configs: Path | None = None
    """Folder of JSON files; also count operations at the size of Stable Diffusion."""
    out: Path | None = None
    """File for the result as JSON."""


def main(config: Config) -> dict[str, Any]:
    """Check, measure and print; also write the result to ``--out``."""
    if config.rounds < 0 or config.warmup < 0 or config.num_views < 1 or config.size < 1 or config.iterations < 1:
        raise ValueError(
            "--num-views, --size and --iterations must be at least 1, --rounds and --warmup at least 0; got "
            f"{config.num_views}, {config.size}, {config.iterations}, {config.rounds} and {config.warmup}."
        )
    if not config.rounds and config.configs is None:
        raise ValueError("--rounds 0 without --configs measures nothing. Pass more rounds, or --configs.")
    tables = [] if config.configs is None else sds_operations.tables(config.configs)
    result: dict[str, Any] = {
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "operations": tables,
    }
    if config.rounds:
        errors = gradient_errors(config)
        if not max(errors.values()) <= TOLERANCE:
            raise ValueError(f"the contenders do not compute the same gradients, relative errors {errors}.")
        result |= {"gradient_errors": errors, **measure(config)}
        show(result)
    print("\n".join(tables))
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(result, indent=2))
    return result


def make_guide(config: Config, dtype: torch.dtype = torch.float32) -> tuple[Guide, Cond]:
    """Return the toy world's pipeline, and its conditions with the four view words."""
    with tempfile.TemporaryDirectory() as cache:
        teacher = load_teacher(pipeline_folder(), dtype=dtype, cache=cache)
        prompts, negative = conditions(teacher, config.prompt), teacher.negative()
    return Guide(teacher=teacher, negative=negative, scale=config.scale), prompts


def contenders(guide: Guide) -> dict[str, Loss]:
    """Return all losses by name."""
    peers = (threestudio(guide), generfacto(guide), generfacto(guide, two_calls=True))
    several = {f"ours, K = {k}": ours(guide, k) for k in DRAWS}
    return {"ours": ours(guide), **several, **dict(zip(PEERS, peers, strict=True))}


def gradient_errors(config: Config) -> dict[str, float]:
    """Return the relative distance of each contender's first gradient of the scene from ours, in float64."""
    guide, prompts = make_guide(config, torch.float64)
    losses = contenders(guide)
    expected = first_gradient(losses["ours"], prompts, config)
    found = {name: first_gradient(losses[name], prompts, config) for name in PEERS}
    return {name: float((gradient - expected).norm() / expected.norm()) for name, gradient in found.items()}


def first_gradient(loss: Loss, prompts: Cond, config: Config) -> Tensor:
    """Return the first gradient of a fresh scene's parameters, in float64."""
    scene, rng = new_scene(torch.float64), Rng(0, 0)
    inputs = observe(scene, prompts, rng, num_views=config.num_views, size=config.size)
    gradients = torch.autograd.grad(loss(*inputs, rng("score")), list(scene.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def measure(config: Config) -> dict[str, Any]:
    """Return seconds of iterations, seconds of their part after rendering, and ratios of both."""
    guide, prompts = make_guide(config)
    losses, frame = contenders(guide), {"num_views": config.num_views, "size": config.size}
    with torch.no_grad():
        images, cond = observe(new_scene(), prompts, Rng(0, 0), **frame)
    clock: Callable[[], float] = time.perf_counter if config.clock == "wall" else time.process_time
    whole = {name: training(loss, new_scene(), prompts, **frame) for name, loss in losses.items()}
    after = {name: scoring(loss, images, cond) for name, loss in losses.items()}
    result: dict[str, Any] = {}
    for name, running in {"iteration": whole, "after rendering": after}.items():
        seconds = take_turns(
            running, iterations=config.iterations, rounds=config.rounds, warmup=config.warmup,
            device=torch.device("cpu"), clock=clock,
        )  # fmt: skip
        each = {who: [spent / config.iterations for spent in values] for who, values in seconds.items()}
        result[name] = {"seconds": each, "ratios": ratios(each)}
    return result


def ratios(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return ratios of the others' time to ours, and of K of our iterations to one with K draws."""
    found = {f"{name} / ours": ratio(seconds[name], seconds["ours"]) for name in PEERS}
    for k in DRAWS:
        found[f"{k} x ours / ours, K = {k}"] = ratio([k * s for s in seconds["ours"]], seconds[f"ours, K = {k}"])
    return {name: dataclasses.asdict(value) for name, value in found.items()}


def show(result: dict[str, Any]) -> None:
    """Print both tables."""
    print(f"largest relative error of a first gradient: {max(result['gradient_errors'].values()):.1e}")
    whole, after = result["iteration"], result["after rendering"]
    print(f"threads: {result['threads']}\n\n{'ms':28} {'iteration':>10} {'after rendering':>16}")
    for name, seconds in whole["seconds"].items():
        first, second = (1e3 * statistics.median(values) for values in (seconds, after["seconds"][name]))
        print(f"{name:28} {first:10.1f} {second:16.1f}")
    print(f"\n{'ratio':28} {'iteration':>18} {'after rendering':>22}")
    for name in whole["ratios"]:
        cells = [Ratio(**part["ratios"][name]) for part in (whole, after)]
        shown = [f"{cell.median:.2f} ({cell.low:.2f} to {cell.high:.2f})" for cell in cells]
        print(f"{name:28} {shown[0]:>18} {shown[1]:>22}")
    print()


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
