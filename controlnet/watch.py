"""What is watched while an adapter learns, and reported when it has: evidence, validation images, causes."""

import math
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from controlnet.adapter import ControlledDenoiser
from controlnet.data import ControlBatches
from controlnet.evidence import BoundedScore, Validation, paired_gap
from controlnet.evidence_log import Evidence, EvidenceLog, learned_at, likely_causes, told
from controlnet.export import contact_sheet
from controlnet.judges import make_judge, make_probe
from controlnet.tasks import Task
from scorefield.cache import content_key
from scorefield.denoiser import NetworkDenoiser
from scorefield.models.teacher import Teacher
from scorefield.progress import working
from scorefield.training.ranks import shared_rows
from scorefield.training.report import log


def fingerprint_of(config: Any, task: Task, indices: range) -> str:
    """Return a hash of what two evaluations must share to be compared, beside what binds a checkpoint."""
    samples = [part for i in indices for part in (task.held_out.identity(i), task.held_out.caption(i))]
    return content_key(repr(task.hint), f"{config.guidance} {config.sampling_steps}", *samples)[:16]


def make_validation(
    config: Any, teacher: Teacher, task: Task, batches: ControlBatches, indices: range, accelerator: Accelerator
) -> Validation:
    """Held-out samples with their judge, drawn as the options say by all ranks together.

    Autoencoder and judge compute in full precision whatever the networks do: floor and ceiling are of one ruler.
    """
    full = torch.autocast(accelerator.device.type, enabled=False)
    return Validation(
        probe=make_probe(batches, task, indices), judge=full(make_judge(task)), decode=full(teacher.decode),
        encode=full(teacher.encode), guidance=config.guidance, negative=teacher.negative(),
        num_steps=config.sampling_steps, batch_size=config.eval_batch_size, shift=teacher.shift,
        norm=teacher.norm, told=teacher.embedded is not None,
        share=partial(shared_rows, accelerator=accelerator),
    )  # fmt: skip


@dataclass(eq=False, kw_only=True)
class ControlWatch:
    """A look at the averaged weights every ``--eval-every`` steps and at the end; called on every rank.

    Attributes:
        config: steps, what is watched and out.
        validation: what is judged.
        denoiser: with the averaged adapter.
        accelerator: the ranks, which share the images.
        images_per_step: that the adapter sees.
        log: of all looks.
        first: the step resumed from, whose look may have been taken already.
    """

    config: Any
    validation: Validation
    denoiser: ControlledDenoiser
    accelerator: Accelerator
    images_per_step: int
    log: EvidenceLog
    first: int = 0
    warned: bool = field(default=False, init=False)

    def __call__(self, step: int) -> dict[str, float]:
        """Take a look if one is due: its figures and picture are logged, the event or a warning is said.

        Returns nothing more to log.
        """
        every = self.config.eval_every
        if step != self.config.steps and (not every or step % every):
            return {}
        if step == self.first and any(look.step == step for look in self.log.read()):
            return {}
        look, images = take_look(step, self.validation, self.denoiser, self.accelerator)
        if not self.accelerator.is_main_process:
            return {}
        earlier = self.log.read(before=step)
        before, learned = learned_at(earlier), learned_at([*earlier, look])
        figures = look.figures()
        if learned is not None:
            figures["control/learned_at"] = learned
        log(self.accelerator, step, figures, contact_sheet(self.validation.probe, images, most=32, side=128))
        self._say(look, learned, new=before is None)
        self.log.append(look)  # last: a run that is killed before takes the whole look again
        return {}

    def _say(self, look: Evidence, learned: int | None, new: bool) -> None:
        name, bounded = next(iter(look.bounded_scores.items()))
        said = [
            f"step {look.step}: {name} {bounded.value:.3f}, floor {bounded.floor:.3f}, ceiling "
            f"{bounded.ceiling:.3f}; loss gap {look.gap.value:.2g} +- {look.gap.error:.1g}"
        ]
        if learned is not None and new:
            said.append(f"control learned at step {learned}")
        due = self.config.warn_after or self.config.steps // 2
        if learned is None and not look.shows() and look.step >= due and not self.warned:
            self.warned = True
            seen = look.step * self.images_per_step
            causes = likely_causes(look, self.validation.probe.hint, images_seen=seen)
            said += [f"warning: control has not come by step {look.step}; likely causes:", *causes]
        tqdm.write("\n  ".join(said), file=sys.stderr)


def take_look(
    step: int, validation: Validation, denoiser: ControlledDenoiser, accelerator: Accelerator
) -> tuple[Evidence, Tensor]:
    """Return the evidence and the images it was read off, in the training's precision, on all ranks."""
    with working("loss gap of the hints"), accelerator.autocast():
        gap = paired_gap(denoiser, validation.probe, batch_size=validation.batch_size, share=validation.share)
        images = validation.images(denoiser)
        return Evidence(step, gap, validation.bounded_scores(images)), images


def make_report(
    task: Task, validation: Validation, denoiser: ControlledDenoiser, base: NetworkDenoiser, log: EvidenceLog,
    indices: range, step: int, accelerator: Accelerator,
) -> tuple[dict[str, Any], Evidence, Tensor]:  # fmt: skip
    """Return the final figures, beside those of the base without control on the same prompts and noise.

    Args:
        task: what was learned.
        validation: samples of the report.
        denoiser: with the averaged adapter.
        base: as it was before anything was trained.
        log: of all looks.
        indices: of those samples among the held-out ones.
        step: the last.
        accelerator: the ranks.

    Returns:
        The report, its evidence, and the images.
    """
    look, images = take_look(step, validation, denoiser, accelerator)
    with accelerator.autocast():
        free_images = validation.images(base)
    free = validation.bounded_scores(free_images)
    history = log.read()
    report = {
        "step": step, "learned_at": learned_at(history), "event": told(history),
        "num_samples": len(validation.probe), "guidance": validation.guidance,
        "sampling_steps": validation.num_steps,
        "scores": {name: in_full(bounded) for name, bounded in look.bounded_scores.items()},
        "scores_without_control": {name: in_full(bounded) for name, bounded in free.items()},
        "gap": {**asdict(look.gap), "value": look.gap.value},
    }  # fmt: skip
    if task.made is not None and (shown := task.made.accuracies(images, indices)):
        without = task.made.accuracies(free_images, indices)
        report |= {"accuracy": dict(shown), "accuracy_without_control": dict(without)}
    return report, look, images


def in_full(bounded: BoundedScore) -> dict[str, float | None]:
    """Return value, floor, ceiling, and where the value stands between them; None if that says nothing."""
    relative = None if math.isnan(bounded.relative) else bounded.relative
    return {"value": bounded.value, "floor": bounded.floor, "ceiling": bounded.ceiling, "relative": relative}
