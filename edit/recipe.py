"""Edit pictures with a frozen text-to-image model.

    scorefield edit recolour --teacher toyworld --guidance 3 --source "a red mug" --target "a blue mug"
    scorefield edit --teacher <pipeline> --image photo.png --source "a red mug" --target "a blue mug"
    scorefield edit sdedit --edits edits.jsonl --strength 0.4

Edit i depends on the seed and on i alone, not on the batch size.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edit.methods import Made, blended, check_teacher, has_attention, make_batch, needs_attention, run
from edit.options import Config, check, parse_weights, steps_left
from edit.report import Edit, write
from edit.requests import Request, read_images, read_requests
from edit.words import tokens_of
from scorefield.models.prompts import PromptEncoder
from scorefield.models.teacher import Teacher, load_teacher
from scorefield.progress import Progress, working
from scorefield.report.words import plural
from scorefield.training.identity import resolved
from scorefield.training.options import check_device


def main(config: Config) -> Path | None:
    """Edit, write, and return the folder; None for a dry run."""
    check(config)
    check_device(config.device)
    requests = read_requests(config)
    with working("loading the model"):
        teacher = load_teacher(
            config.teacher, device=config.device, size=config.size or None, allow_pickle=config.allow_pickle,
            variant=config.variant or None,
        )  # fmt: skip
    check_teacher(teacher, config)
    check_words(teacher, config, requests)
    requests, images = read_images(requests, teacher.size, config.on_bad_data)
    if config.dry_run:
        print(json.dumps(resolved(config), indent=2))
        height, width = teacher.size
        print(f"{plural(len(requests), 'edit')} of {height} x {width} pixels by {config.method}")
        return None
    edits = make_edits(teacher, config, requests, images)
    strips = {
        label: [
            edit.target for edit in make_edits(teacher, replace(config, report=False, **changes), requests, images)
        ]
        for label, changes in (variants(config, teacher) if config.report else {}).items()
    }
    with working("writing the pictures"):
        write(edits, config, strips)
    print(f"{plural(len(edits), 'edit')} in {config.out}, side by side in {config.out / 'strip.png'}")
    return config.out


def variants(config: Config, teacher: Teacher) -> dict[str, dict[str, Any]]:
    """Return the changes of the options under which the report draws each edit again, by what it calls them.

    There are none where only windows of attention could change, and the model's attention cannot be edited.
    """
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    if config.method == "prompt-to-prompt":
        if not has_attention(teacher):
            return {}
        return {
            f"windows {share:g} {share / 2:g}": {"cross_window": share, "self_window": share / 2}
            for share in shares
        }
    if config.method == "sdedit":
        return {f"strength {share:g}": {"strength": share} for share in (0.2, 0.4, 0.6, 0.8, 1.0)}
    if config.method in ("dds", "pds"):
        return {
            f"{number} gradients": {"iterations": number}
            for number in sorted({max(1, round(config.iterations * factor)) for factor in (0.25, 0.5, 1, 2, 4)})
        }
    shares = (0.0, 0.2, 0.4, 0.6, 0.8)
    return {f"skip {share:g}": {"skip": share} for share in shares if steps_left(config.steps, share)}


def check_words(teacher: Teacher, config: Config, requests: tuple[Request, ...]) -> None:
    """Raise ``ValueError`` for words of --weights and --blend that a prompt lacks, before anything is computed.

    Also for a model that does not tell the words of a prompt, where attention to them is to be changed.
    """
    if not needs_attention(config):
        return
    if not isinstance(teacher.texts, PromptEncoder):
        raise ValueError(
            f"--teacher {config.teacher} does not tell the words of a prompt, which attention control needs. Take "
            "a diffusers model, or pass --cross-window 0 --self-window 0 without --weights and --blend."
        )
    for one in requests:
        source, target = teacher.texts.words(one.source), teacher.texts.words(one.target)
        for word in parse_weights(config.weights):
            try:
                tokens_of(target, word)
            except ValueError as error:
                raise ValueError(f"--weights {word}: {error} Name a word of the target.") from error
        for words in (source, target) if config.blend else ():
            blended(words, config.blend)


def make_edits(
    teacher: Teacher, config: Config, requests: tuple[Request, ...], images: Tensor | None
) -> list[Edit]:
    """Return all edits, a batch at a time. Raises ``FloatingPointError`` for pictures that are not finite."""
    edits = list[Edit]()
    with Progress("edits", len(requests), unit="edit") as bar:
        for start in range(0, len(requests), config.batch_size):
            part = requests[start : start + config.batch_size]
            numbers = tuple(range(start, start + len(part)))
            given = None if images is None else images[start : start + len(part)].to(teacher.device)
            began = time.perf_counter()
            with torch.no_grad():
                x0 = None if given is None else teacher.encode(given)
                batch = make_batch(teacher, config, part, numbers, x0)
                made = run(batch)
                source, target = (teacher.decode(x).clamp(-1, 1).float().cpu() for x in (made.source, made.target))
            if not bool(target.isfinite().all()):
                raise FloatingPointError(
                    f"an edit of {part[0].source!r} is not finite: lower --guidance or the learning rate."
                )
            seconds = (time.perf_counter() - began) / len(part)
            facts = {**made.facts, "seconds": seconds}
            for row, one in enumerate(part):
                before = source[row] if given is None else given[row].float().cpu()
                edits.append(_edit(one, before, source[row], target[row], facts, made, row, teacher))
            bar.update(len(part))
    return edits


def _edit(
    request: Request, image: Tensor, source: Tensor, target: Tensor, facts: dict[str, float], made: Made, row: int,
    teacher: Teacher,
) -> Edit:  # fmt: skip
    words, maps = (), None
    if made.recorder is not None and made.recorder.sums and isinstance(teacher.texts, PromptEncoder):
        read: Any = teacher.texts.words(request.target)
        own = made.recorder.finest()[len(made.source) + row]
        words, maps = read.words, torch.stack([own[list(tokens)].sum(0) for tokens in read.tokens]).cpu()
    return Edit(request, image, source, target, facts, words, maps)
