"""How the scripts run a training: prepare, resume, follow, log, save, stop."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from scorefield.choices import Quantize
from scorefield.progress import Progress
from scorefield.randomness import Rng
from scorefield.training import checkpoint
from scorefield.training.compiling import compile_network
from scorefield.training.evaluate import Watch, forget_best
from scorefield.training.identity import LAYOUT, check_earlier, check_ranks, note_identity, resolved
from scorefield.training.launcher import is_first_rank
from scorefield.training.loop import Phase, Report, train
from scorefield.training.memory import Activations, Role, most_bytes, role_of
from scorefield.training.options import RunOptions, images_per_pass, passes_per_iteration
from scorefield.training.ranks import (
    check_launch,
    check_same,
    check_same_fields,
    check_shared,
    check_told_device,
    first_says,
    meeting,
)
from scorefield.training.report import as_grid, close_log, forget_samples, has_samples, log, start_logging
from scorefield.training.sharding import make_mesh, shard, sharding_of
from scorefield.training.stopping import stop_signals


def start(config: RunOptions) -> Accelerator:
    """Return an Accelerator that will log to the trackers of ``--report-to``; writes nothing yet.

    Raises ``ValueError`` for a launch that cannot work, see :func:`ranks.check_launch`, and for ranks that
    were given other options.
    """
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    check_told_device()
    # The first rank evaluates alone while the others wait; NCCL would give up after ten minutes.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=2), **meeting())
    trackers = [kind for kind in config.report_to if kind != "none"]
    accelerator = Accelerator(
        mixed_precision=config.precision, log_with=trackers or None, project_dir=str(config.out),
        kwargs_handlers=[patience], gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )  # fmt: skip
    check_launch(accelerator)
    check_ranks(config, accelerator)
    if not config.dry_run:
        check_shared(config.out, accelerator)
    return accelerator


def prepare(network: nn.Module, config: RunOptions, accelerator: Accelerator) -> nn.Module:
    """Return the network on its device, checkpointed, compiled and wrapped for several ranks as the options say.

    Raises ``ValueError`` where a network that cannot recompute its activations is asked to.
    """
    if config.gradient_checkpointing:
        able: list[Any] = [part for part in network.modules() if hasattr(part, "enable_gradient_checkpointing")]
        if not able:
            raise ValueError(f"--gradient-checkpointing: a {type(network).__name__} cannot; only UNets can.")
        able[0].enable_gradient_checkpointing()
    if config.compile:
        compile_network(network)
    if config.shard > 1:
        # For its autocast alone, without DDP.
        network = accelerator.prepare_model(network, device_placement=False, evaluation_mode=True)
        return cut(network, config, accelerator)
    prepared: nn.Module = accelerator.prepare(network)
    return prepared


def cut(network: nn.Module, config: RunOptions, accelerator: Accelerator) -> nn.Module:
    """Return a network on its device, in pieces under ``--shard``: :func:`prepare` for one that is frozen.

    Weights that learn under bf16 are gathered in bf16; frozen ones as they are kept.
    """
    if config.shard == 1:
        return network.to(accelerator.device)
    mesh = make_mesh(accelerator.device.type, accelerator.num_processes, config.shard)
    learns = any(p.requires_grad for p in network.parameters())
    return shard(network, mesh, torch.bfloat16 if learns and config.precision == "bf16" else None)


def resume(config: RunOptions, phases: Sequence[Phase], accelerator: Accelerator, own: Mapping[str, Any]) -> int:
    """Load the newest checkpoint of the same :func:`identity`, say so, open the log; return the first step.

    Raises ``ValueError`` where ``--out`` belongs to another run or is past ``--steps``, or the ranks read other
    inputs.
    """
    saved = check_identity(config, own, accelerator)
    first = checkpoint.load(config.out / "checkpoints", phases, own)
    fix = "Let --out be a folder that all machines share."
    check_same("the step to resume from", first, fix, accelerator)
    if accelerator.is_main_process:
        if first:
            checkpoint.prune(config.out / "checkpoints", first)
            print("\n".join([f"resumed from step {first}", *changes(saved, own, phases)]))
        else:
            forget_best(config.out)
            forget_samples(config.out)
        note_identity(config.out, own)
    start_logging(accelerator, config, config.out, first)
    return first


def check_identity(config: RunOptions, own: Mapping[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    """Return the config of the checkpoint in ``--out``, if there is one.

    :func:`resume` does so; call it before work that is long.

    Raises ``ValueError`` where ``--out`` belongs to another run or is past ``--steps``, or the ranks read other
    inputs.
    """
    check_same_fields(own, "Let all of them read the same files.", accelerator)
    check_earlier(config.out, config.results, own)
    newest = checkpoint.check_config(config.out / "checkpoints", own)
    if newest is None:
        return {}
    if (step := int(newest.name.removeprefix("step-"))) > config.steps:
        raise ValueError(
            f"--steps {config.steps:,} ends before step {step:,}, which the run in {config.out} has reached. Pass "
            f"--steps {step} or more, or another --out."
        )
    return checkpoint.compare(newest, own)


def changes(saved: Mapping[str, Any], own: Mapping[str, Any], phases: Sequence[Phase]) -> list[str]:
    """Return in words what is otherwise than when a checkpoint was written: processes, steps, and rates."""
    said = []
    layouts = [layout_of(one) for one in (saved, own)]
    if layouts[0] != layouts[1]:
        old, new = (
            f"{ranks} process(es) with --accumulate {micro}{f' in passes of {images} images' if images else ''}"
            for ranks, micro, images in layouts
        )
        said.append(f"{old} before, {new} now: batches and their noise are drawn otherwise from here on")
    before, now = saved.get("steps", 0), own.get("steps", 0)
    if before != now:
        said.append(f"{before:,} steps before, {now:,} now: from here on all schedules are those of {now:,} steps")
    for phase in phases:
        for name in checkpoint.changed_rates(phase, saved, own):
            said.append(f"--{name.replace('_', '-')} was {saved.get(name)}, and is {own[name]} from here on")
    return said


def layout_of(own: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return processes, --accumulate and --micro-batch of an identity, by which its draws differ.

    The last is 0 where a pass has --batch-size images, the first 1 where processes share the steps of one.
    """
    ranks, accumulate, images = (own.get(name, usual) for name, usual in zip(LAYOUT, (1, 1, 0), strict=True))
    ranks = 1 if own.get("split_views") else ranks
    return ranks, accumulate, 0 if images == own.get("batch_size") else images


def fit(
    config: RunOptions, phases: Sequence[Phase], batches: Callable[[Rng], Any], accelerator: Accelerator, *,
    own: Mapping[str, Any], first: int, preview: Callable[[], Tensor] | None = None, columns: int = 10,
    rollout: Callable[..., Any] | None = None, watch: Watch = lambda step: {}, all_watch: bool = False,
    check: Callable[[int, bool], None] = lambda step, saving: None, at_end: Callable[[], None] = lambda: None,
    keep: Callable[[int], Collection[int]] = lambda step: (), last: bool = True, split: bool = False,
) -> None:  # fmt: skip
    """Train to the end behind a progress bar; sample grids, if any, and checkpoints every ``save_every`` steps.

    The main process calls ``watch`` after each step, when that is saved, and logs what it returns, and draws
    ``preview``. With ``all_watch`` every rank calls both, to share the work, and so it is where a network is in
    pieces, which compute together. ``watch`` may take long, so it is not called when the run has to stop, and is
    called again for the step resumed from, since a kill may have cut it off: two looks at the same weights must
    leave what one does. All call ``check`` with the step and whether it is about to be saved, which may raise, as
    do weights that are not finite. All call ``keep``, which returns the steps whose checkpoints must stay; such a
    step is saved at once. All call ``at_end`` after the last step, while they still speak to each other. ``split``
    shares the micro-batches of one process. SIGTERM, Ctrl-C, SIGHUP save a checkpoint first: exit 143, 130, 129.
    """
    together = accelerator.is_main_process or all_watch or in_pieces(phases)

    def draw(step: int) -> None:
        if preview is not None and together:
            log(accelerator, step, {}, as_grid(preview(), columns))

    def look(step: int) -> None:
        with accelerator.autocast():
            figures = watch(step) if together else {}
        if figures and accelerator.is_main_process:
            log(accelerator, step, figures)

    passes = passes_per_iteration(config) // (accelerator.num_processes if split else 1)
    reports = train(
        phases, batches, accelerator, rollout=rollout, steps=config.steps, start=first, clip_norm=config.clip_norm,
        accumulate=passes, seed=config.seed, split=split,
    )  # fmt: skip
    stop = 0
    with stop_signals(accelerator) as asked_to_stop:
        if first:  # a kill after its checkpoint would have left out the look, or the picture
            look(first)
        if first and preview is not None and not first_says(has_samples(config.out, first)):
            draw(first)
        for report in follow(reports, accelerator, start=first, steps=config.steps, log_every=config.log_every):
            stop = asked_to_stop(report.step)
            kept = keep(report.step)
            due = report.step % config.save_every == 0 or report.step in (config.steps, *kept) or bool(stop)
            check(report.step, due)
            if due:
                checkpoint.check_finite(report.step, phases)
                save(config.out / "checkpoints", report.step, phases, own, accelerator, also=kept)
            if not (stop and all_watch):
                look(report.step)
            if due:
                draw(report.step)
            if not stop and report.step == config.steps:
                stop = asked_to_stop(0)  # while the last step was saved and looked at
            if stop:
                break
    if not stop:
        at_end()
    _end(stop, last, accelerator)


def _end(stop: int, last: bool, accelerator: Accelerator) -> None:
    with suppress(OSError):
        if stop or last:
            accelerator.end_training()  # which parts the ranks, too
        else:
            close_log(accelerator)
    if stop:
        sys.exit(128 + stop)


def save(
    folder: Path, step: int, phases: Sequence[Phase], own: Mapping[str, Any], accelerator: Accelerator, *,
    also: Collection[int] = (),
) -> None:  # fmt: skip
    """Let the first rank write a checkpoint, with the pieces of the others where a network is in pieces."""
    if (writes := accelerator.is_main_process) or in_pieces(phases):
        checkpoint.save(folder, step, phases, own, also=also, writes=writes)


def in_pieces(phases: Sequence[Phase]) -> bool:
    """Return True where a network that learns is sharded, so that all ranks have to be asked for it."""
    return any(sharding_of(phase.network) is not None for phase in phases)


def follow(
    reports: Iterable[Report], accelerator: Accelerator, *, start: int, steps: int, log_every: int
) -> Iterator[Report]:
    """Pass reports on, and show how far they are; log scalars, rates and seconds a step every ``log_every``."""
    latest: dict[str, Tensor] = {}
    rates: dict[str, float] = {}
    last, before = start, time.monotonic()
    with Progress("steps", steps, start=start, unit="step") as bar:
        for report in reports:
            bar.update()
            latest |= report.metrics
            rates |= report.learning_rates
            if report.step % log_every == 0 or report.step == steps:
                values, now = Report(report.step, (), latest).read(), time.monotonic()
                pace = {"run/seconds_per_step": (now - before) / max(1, report.step - last)}
                log(accelerator, report.step, values | rates | pace)
                losses = {key: value for key, value in values.items() if key.endswith("/loss")}
                bar.note(", ".join(f"{key} {value:.3g}" for key, value in losses.items()))
                last, before = report.step, now
            yield report


def cosine(optimizer: Optimizer, updates: int, warmup: int = 100, floor: float = 0.0) -> LambdaLR:
    """Linear warm-up, over at most a tenth, and a half cosine down to ``floor`` times the learning rate."""
    warmup = max(1, min(warmup, updates // 10))

    def factor(update: int) -> float:
        fall = 0.5 * (1 + math.cos(math.pi * min(update / updates, 1)))
        return min(1, (update + 1) / warmup) * (floor + (1 - floor) * fall)

    return LambdaLR(optimizer, factor)


def adamw(
    network: nn.Module, learning_rate: float, betas: tuple[float, float] = (0.9, 0.999), kind: str = "adamw"
) -> Optimizer:
    """AdamW in its fused form, or with 8-bit moments; weight decay 0.01."""
    if kind == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        small: Optimizer = AdamW8bit(network.parameters(), lr=learning_rate, betas=betas, weight_decay=0.01)
        return small
    return torch.optim.AdamW(network.parameters(), lr=learning_rate, betas=betas, weight_decay=0.01, fused=True)


def show_plan(
    config: RunOptions, networks: Mapping[str, nn.Module], updates: Mapping[str, int], before: str = "", *,
    passes: Mapping[str, Activations] | None = None, rounded: Mapping[str, Quantize] | None = None, said: str = "",
) -> None:  # fmt: skip
    """Print the resolved config, each role's parameters and bytes, and the steps: what ``--dry-run`` shows.

    Args:
        config: of the run.
        networks: the networks, which may be on the meta device.
        updates: how many optimiser steps each trained role takes.
        before: what happens before the first of them.
        passes: predicted activations; None where none were predicted.
        rounded: how the weights of networks will be rounded that are not yet.
        said: of ``--micro-batch auto``.
    """
    if not is_first_rank():
        return
    print(json.dumps(resolved(config), indent=2))
    held = roles_of(config, networks, rounded)
    for role, found in held.items():
        learned = found.gradients + found.states
        state = f", {learned:,} bytes of gradients and optimiser state" if learned else ""
        print(f"{role}: {found.number:,} parameters, {found.weights:,} bytes of weights{state}")
    for name, one in (passes or {}).items():
        print(f"activations, {name}: {one.kept:,} bytes kept for the way back, {one.most:,} at most")
    if passes is not None and not passes:
        print("activations: not predicted, since the shapes in this network depend on numbers")
    if passes:
        most = most_bytes(held, passes, offload=getattr(config, "offload", False))
        print(
            f"at most on each process: {most:,} bytes ({most / 2**30:.2f} GiB), without what kernels and "
            "allocator take"
        )
    if config.shard > 1:
        print(f"--shard {config.shard}: each rank holds a part in {config.shard} of these bytes")
    if before:
        print(f"before the first step: {before}")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    shares = 1 if getattr(config, "split_views", False) else ranks
    images = config.steps * config.batch_size * config.accumulate * shares
    steps = ", ".join(f"{count:,} of the {role}" for role, count in updates.items())
    if (number := images_per_pass(config)) != config.batch_size:
        print(f"passes: {passes_per_iteration(config)} of {number} images in each iteration")
    if said:
        print(said)
    print(f"steps: {config.steps:,} iterations, {images:,} images on {ranks} process(es); updates: {steps}")


def roles_of(
    config: RunOptions, networks: Mapping[str, nn.Module], rounded: Mapping[str, Quantize] | None = None
) -> dict[str, Role]:
    """Return the bytes of each network of a run; the arguments are those of :func:`show_plan`."""
    return {
        role: role_of(network, config.optimizer, (rounded or {}).get(role, "no"))
        for role, network in networks.items()
    }
