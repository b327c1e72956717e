"""``scorefield attack``: a classifier attacked, with and without purification, and how it was measured.

scorefield attack toyworld --epsilon 2 4 8 16
scorefield attack --classifier mine:network --data images/ --teacher runs/teacher/teacher
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torchvision.utils import make_grid

from attack.autoattack import autoattack, package
from attack.diff_pgd import Adversarial, diff_pgd
from attack.networks import load_classifier as load_folder
from attack.options import Attack, check
from attack.pgd import PGD, Classifier, fgsm, logits_of
from attack.purify import Purifier
from attack.report import Measured, attack_figures, clean_figures, parts_of
from attack.threat import Threat
from scorefield.atomic import whole_folder
from scorefield.data.images import Labelled, load_images
from scorefield.data.options import DataOptions
from scorefield.denoiser import Cond
from scorefield.models.teacher import Teacher, load_teacher
from scorefield.models.user_code import call
from scorefield.progress import progress, working
from scorefield.randomness import derived_generator
from scorefield.report.write import add_page
from scorefield.sampling import ddim, ddpm, grid
from scorefield.shipped import shipped
from scorefield.training.identity import resolved
from scorefield.training.options import check_device

SHOWN = 8
"""Images in the picture."""

MAGNIFIED = 10
"""Times a change is shown larger than it is, round grey."""


@dataclass(frozen=True, eq=False)
class Case:
    """What is attacked: images with labels, classifiers, and the purifier if there is one."""

    images: Tensor
    labels: Tensor
    own_answers: bool
    classifier: Classifier
    others: dict[str, Classifier]
    purifier: Purifier | None
    targets: Tensor | None


def main(config: Attack) -> Path | None:
    """Attack, measure, print and write the figures, and return their folder; None for a dry run."""
    check(config)
    check_device(config.device)
    with working("loading the models"):
        case = load(config)
    box(config.region, case.images)
    if config.dry_run:
        print(json.dumps(resolved(config), indent=2))
        number, attacks = len(case.images), len(config.methods) * len(config.epsilon)
        print(f"{number:,} images of {tuple(case.images.shape[1:])}, each attacked in {attacks:,} ways")
        return None
    measured = Measured(
        classifier=case.classifier, images=case.images, labels=case.labels, targets=case.targets,
        purifier=case.purifier, num_draws=config.evaluations, others=case.others,
        time=None if case.purifier is None else float(case.purifier.times[0]), batch_size=config.batch_size,
    )  # fmt: skip
    figures: dict[str, Any] = {"clean": clean_figures(measured, generators(config, len(case.images), "clean"))}
    made: dict[str, Tensor] = {}
    for method in config.methods:
        for epsilon in config.epsilon:
            name, threat = f"{method} {epsilon:g}", Threat(epsilon / 255, config.norm)
            found = run(config, case, method, threat, name)
            made[name] = found.iterate
            figures[name] = attack_figures(
                measured, found.iterate, generators(config, len(case.images), "measured"), threat
            )
            if method == "diff-pgd":
                made[f"{name} realistic"] = found.realistic
                figures[f"{name} realistic"] = attack_figures(
                    measured, found.realistic, generators(config, len(case.images), "measured")
                )
    figures["settings"] = settings(config, case)
    print(json.dumps(figures, indent=2))
    write(config.out, figures, case, made)
    print(f"figures, images and a picture in {config.out}")
    return config.out


def generators(config: Attack, number: int, purpose: str) -> list[Generator]:
    """Return a generator for each image, so that no result depends on the batch."""
    return [derived_generator(config.seed, "attack", purpose, row) for row in range(number)]


def run(config: Attack, case: Case, method: str, threat: Threat, name: str) -> Adversarial:
    """Return the adversarial images of one method, batch by batch."""
    step = (config.step_size or 255 * threat.radius / 4) / 255
    attack = PGD(
        threat=threat, step_size=step, num_steps=config.steps, num_restarts=config.restarts,
        num_draws=config.draws if method == "diff-pgd" else 1, targeted=case.targets is not None,
    )  # fmt: skip
    wanted = case.labels if case.targets is None else case.targets
    own = generators(config, len(case.images), name)
    found, start = list[Adversarial](), 0
    number = -(-len(case.images) // config.batch_size)
    for images, part in progress(parts_of(case.images, own, config.batch_size), name, number, unit="batch"):
        labels = wanted[start : start + len(images)]
        start += len(images)
        mask = box(config.region, images)
        found.append(attacked(attack, method, case, images, labels, part, mask, config.seed))
    return Adversarial(*(torch.cat([getattr(one, name) for one in found]) for name in ("iterate", "realistic")))


def attacked(
    attack: PGD, method: str, case: Case, images: Tensor, labels: Tensor, own: Any, mask: Tensor | None,
    seed: int = 0,
) -> Adversarial:  # fmt: skip
    """Return the result of one batch; without a purifier its realistic image is the iterate itself."""
    if method == "diff-pgd" and case.purifier is not None:
        return diff_pgd(attack, case.classifier, images, labels, purifier=case.purifier, generator=own, mask=mask)
    if method == "autoattack":
        made = autoattack(
            case.classifier, images, labels, threat=attack.threat, seed=seed, batch_size=len(images)
        ).images
    elif method == "fgsm":
        made = fgsm(
            case.classifier, images, labels, threat=attack.threat, generator=own, mask=mask,
            targeted=attack.targeted,
        )  # fmt: skip
    else:
        made = attack(case.classifier, images, labels, generator=own, mask=mask)
    return Adversarial(made, made)


def box(region: Sequence[float], images: Tensor) -> Tensor | None:
    """Return the mask (b, 1, h, w) of a box given by shares of the image; None for all of it.

    Raises ``ValueError`` for a box without a pixel.
    """
    if not region:
        return None
    height, width = images.shape[-2:]
    left, top, right, bottom = (
        round(share * side) for share, side in zip(region, (width, height) * 2, strict=True)
    )
    if left >= right or top >= bottom:
        raise ValueError(
            f"--region {' '.join(map(str, region))} holds no pixel of {height} x {width}. Enlarge it."
        )
    mask = torch.zeros(len(images), 1, height, width, dtype=torch.bool, device=images.device)
    mask[:, :, top:bottom, left:right] = True
    return mask


def load(config: Attack) -> Case:
    """Return what is attacked. Raises ``ValueError`` for parts that cannot be read, or do not fit each other."""
    teacher = None
    if config.teacher:
        teacher = load_teacher(
            config.teacher, device=config.device, size=config.size or None, allow_pickle=config.allow_pickle,
            variant=config.variant or None,
        )  # fmt: skip
    found, labelled = load_data(config, teacher)
    if teacher is not None and tuple(found.images.shape[1:]) != teacher.image_shape:
        raise ValueError(
            f"--data has images {tuple(found.images.shape[1:])}, and --teacher {config.teacher} knows "
            f"{teacher.image_shape}. Pass another --size, or a teacher of such images."
        )
    images = ((found.images + 1) / 2).clamp(0, 1).to(config.device)
    classifier = load_classifier(config.classifier, config.device)
    answers = asked(classifier, images, f"--classifier {config.classifier}")
    check_gradient(classifier, images, f"--classifier {config.classifier}")
    labels = found.labels.to(config.device) if labelled else answers.argmax(1)
    if int(labels.max()) >= answers.shape[1]:
        raise ValueError(
            f"--data has the label {int(labels.max())}, and --classifier {config.classifier} answers "
            f"{answers.shape[1]} classes, 0 to {answers.shape[1] - 1}. Number the labels as the classifier does."
        )
    others = {name: load_classifier(name, config.device) for name in config.transfer}
    for name, other in others.items():
        asked(other, images, f"--transfer {name}")
    purifier = None if teacher is None else make_purifier(config, teacher)
    targets = target_of(config, labels, answers.shape[1])
    if targets is not None:
        kept = labels != targets
        if not bool(kept.any()):
            raise ValueError(f"--target {config.target} is the label of all images. Choose another class.")
        images, labels, targets = images[kept], labels[kept], targets[kept]
    return Case(images, labels, not labelled, classifier, others, purifier, targets)


def load_data(config: Attack, teacher: Teacher | None) -> tuple[Labelled, bool]:
    """Return images in [-1, 1], and whether their labels are theirs."""
    if config.data == "toyworld":
        part: Labelled = shipped("attacked toyworld")(config.num_images, config.seed)
        return part, True
    if config.data == "digits":
        part = shipped("held-out digits")()
        return Labelled(part.images[: config.num_images], part.labels[: config.num_images]), True
    height = 0 if teacher is None else teacher.size[0]
    colour = teacher is not None and teacher.image_shape[0] == 3
    options = DataOptions(
        data=config.data, size=config.size or height, channels="rgb" if colour else "auto",
        on_bad_data=config.on_bad_data,
    )  # fmt: skip
    whole = load_images(options)
    return whole.batch(whole.some(config.num_images), Generator()), whole.num_classes > 1


def load_classifier(name: str, device: str) -> Classifier:
    """Return a classifier of images in [0, 1]: the toy world's, a folder's, or the user's, in eval mode.

    Its parameters have no gradients. Raises ``ValueError`` for a name that is none of these, a folder without a
    classifier, or a function that returns none.
    """
    classifier: Classifier
    if name == "toyworld":
        classifier = shipped("classifier toyworld")(device)
        return classifier
    if ":" not in name or Path(name).is_dir():
        return load_folder(Path(name), device)
    found = call(name)
    if not callable(found):
        raise ValueError(f"{name} must return a function from images to logits; got a {type(found).__name__}.")
    if isinstance(found, torch.nn.Module):
        found.to(device).eval().requires_grad_(False)
    classifier = found
    return classifier


@torch.no_grad()
def asked(classifier: Classifier, images: Tensor, name: str) -> Tensor:
    """Return a classifier's logits. Raises ``ValueError`` where it does not take the images, or gives none.

    Also for one that writes into them, as an in-place normalisation does: all figures would be of other images.
    ``name`` is the option that it was named by, and its name.
    """
    given = images.clone()
    try:
        logits = torch.cat([classifier(part) for part in given.split(64)])
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{name} does not take images {tuple(images.shape[1:])} in [0, 1]: {reason}. "
            "Pass --size, or wrap it so that it resizes them."
        ) from error
    if logits.ndim != 2 or logits.shape[1] < 2 or not bool(logits.isfinite().all()):
        raise ValueError(
            f"{name} must return finite logits (b, classes), at least two; got {tuple(logits.shape)}."
        )
    if not torch.equal(given, images):
        raise ValueError(f"{name} writes into its images. Let it work on a copy, such as (x - mean) / std.")
    return logits


def check_gradient(classifier: Classifier, images: Tensor, name: str) -> None:
    """Raise ``ValueError`` for a classifier that no gradient comes through, which cannot be attacked so."""
    leaf = images[:1].clone().requires_grad_()
    with torch.enable_grad():
        logits = logits_of(classifier, leaf)
        reaches = logits.is_floating_point() and logits.requires_grad
        found = torch.autograd.grad(logits.sum(), leaf, allow_unused=True)[0] if reaches else None
    if found is None:
        raise ValueError(
            f"{name} gives no gradient to its images: it works without one, or on copies. An attack needs logits "
            "that are differentiable."
        )


def make_purifier(config: Attack, teacher: Teacher) -> Purifier:
    """Return the teacher as a purifier. Raises ``ValueError`` for a student, or too many steps."""
    if teacher.times:
        raise ValueError(
            f"--teacher {config.teacher} is a student, which is right at few times only. Pass a teacher."
        )
    cond: Cond = {}
    if teacher.texts is not None:
        cond = teacher.prompts([config.purify_prompt])
    elif config.purify_prompt:
        raise ValueError(f"{config.teacher} takes no prompts; leave out --purify-prompt.")
    elif teacher.num_classes:
        if not teacher.null_class:
            raise ValueError(
                f"--teacher {config.teacher} has classes, and none that means no class. Pass another."
            )
        cond = teacher.cond(torch.tensor([teacher.num_classes]))
    try:
        times = grid(teacher.denoiser.schedule, config.purify_steps, high=config.strength)
    except ValueError as error:
        raise ValueError(
            f"--purify-steps {config.purify_steps} do not go into --strength {config.strength}: {error}"
        ) from error
    return Purifier(
        teacher.denoiser, times, cond, teacher.encode, teacher.decode,
        step=ddpm() if config.sampler == "ddpm" else ddim(), gradient=config.gradient,
    )  # fmt: skip


def target_of(config: Attack, labels: Tensor, num_classes: int) -> Tensor | None:
    """Return the wanted class of each image, or None. Raises ``ValueError`` for one that there is not."""
    if not config.target:
        return None
    names: Sequence[str] = shipped("shapes toyworld")() if config.classifier == "toyworld" else ()
    number = names.index(config.target) if config.target in names else config.target
    if isinstance(number, str) and not (number.isdecimal() and int(number) < num_classes):
        known = f"one of {', '.join(names)}" if names else f"a number below {num_classes}"
        raise ValueError(f"--target must be {known}; got {config.target!r}.")
    return torch.full_like(labels, int(number))


def settings(config: Attack, case: Case) -> dict[str, Any]:
    """Return what the figures depend on."""
    names = ("classifier", "data", "teacher", "norm", "steps", "step_size", "restarts", "seed", "region", "target")
    held: dict[str, Any] = {name: getattr(config, name) for name in names}
    if "autoattack" in config.methods:
        held["autoattack"] = package()
    held["labels"] = "the classifier's answers" if case.own_answers else "of the data"
    if case.purifier is not None:
        chosen = ("purify_prompt", "strength", "purify_steps", "sampler", "gradient", "draws", "evaluations")
        held |= {name: getattr(config, name) for name in chosen}
        held["times"] = case.purifier.times.tolist()
    return held


def write(out: Path, figures: dict[str, Any], case: Case, made: dict[str, Tensor]) -> None:
    """Write figures.json, adversarial.npz (floats in [0, 1], since bytes would change them) and images.png."""
    with whole_folder(out.resolve()) as folder:
        (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
        arrays: dict[str, Any] = {name.replace(" ", "_"): found.cpu().numpy() for name, found in made.items()}
        arrays |= {"images": case.images.cpu().numpy(), "labels": case.labels.cpu().numpy()}
        np.savez(folder / "adversarial.npz", **arrays)
        picture(case.images, made).save(folder / "images.png")
        add_page(folder, shown=out)


def picture(images: Tensor, made: dict[str, Tensor]) -> Image.Image:
    """Return the first images: clean ones above, then each result, and under it its change, magnified."""
    rows = [images[:SHOWN]]
    for found in made.values():
        rows += [found[:SHOWN], 0.5 + MAGNIFIED * (found - images)[:SHOWN]]
    sheet = make_grid(torch.cat(rows).clamp(0, 1).cpu(), nrow=len(rows[0]), padding=2)
    pixels = (sheet * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels)
