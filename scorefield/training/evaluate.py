"""What is watched while a model learns: brightness and spread of its samples, and distances if asked for."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from scorefield.atomic import remove_folder, whole_file
from scorefield.data.images import ImageSet
from scorefield.metrics import extract_features, frechet_distance, kernel_distance
from scorefield.models.draw import draw
from scorefield.models.teacher import Teacher
from scorefield.progress import progress
from scorefield.training.features import Classifier, load_classifier
from scorefield.training.launcher import is_first_rank
from scorefield.training.options import EvalOptions, check_numbers
from scorefield.training.ranks import first_says

Watch = Callable[[int], Mapping[str, float]]


@dataclass(frozen=True)
class Look:
    """Two numbers that go wrong before anything else does.

    Attributes:
        brightness: mean pixel, in [-1, 1].
        spread: standard deviation between images, averaged over pixels; 0 means that all are alike.
    """

    brightness: float
    spread: float


def look(images: Tensor) -> Look:
    """Brightness and spread of some images (n, c, h, w), clamped as a picture would be."""
    images = images.clamp(-1, 1).float()
    return Look(float(images.mean()), float(images.std(0).mean()))


def alarms(seen: Look, wanted: Look) -> list[str]:
    """Return what is wrong with the look of some images, in words; empty if nothing is."""
    said = []
    if not abs(seen.brightness - wanted.brightness) <= 0.1:  # so that nan is an alarm too
        said.append(f"brightness {seen.brightness:.2f}, expected {wanted.brightness:.2f}")
    if not 0.75 * wanted.spread < seen.spread < 1.25 * wanted.spread:
        said.append(f"spread between images {seen.spread:.2f}, expected {wanted.spread:.2f}")
    return said


def check_evaluation(options: EvalOptions, data: ImageSet | None) -> None:
    """Raise ``ValueError`` for options that cannot work with these images."""
    check_numbers(options, not_negative=("eval_every",))
    if options.eval_images < 2:
        raise ValueError(f"--eval-images must be at least 2; got {options.eval_images}.")
    if options.features is not None:
        if data is None:
            raise ValueError("--features compare with images: pass --data, too.")
        load_features(options.features, data)
        if not options.eval_every:
            raise ValueError(
                "--features are for evaluation, which --eval-every 0 turns off. Pass --eval-every 500."
            )


def watcher(
    config: Any, model: Teacher, data: ImageSet | None, *, teacher: Teacher | None, save: Callable[[Path], Any]
) -> Watch:
    """Return what to do after each step: figures of the average every ``--eval-every`` steps and at the end.

    Args:
        config: :class:`EvalOptions` of a script, with its steps, seed, guidance if any, and out.
        model: the averaged weights as something to sample.
        data: training data: the mark of the figures; None where nothing is compared with them.
        teacher: whose samples are the mark of the alarms; None: the training data.
        save: writes the averaged weights into ``--out/best`` when their Fréchet distance is the smallest so far.

    The first rank does this alone. Under ``--shard`` all ranks draw, and call ``save``.
    """
    sharded = getattr(config, "shard", 1) > 1
    if not config.eval_every or not (is_first_rank() or sharded):
        return lambda step: {}
    parts = torch.arange(config.eval_images).split(250)
    real, labels = marks(data, config.eval_images, max(1, model.num_classes))
    drawn = partial(draw, labels=labels, seed=config.seed, guidance=getattr(config, "guidance", 1.0))
    wanted = look(real if teacher is None else drawn(teacher, progress(parts, "samples of the teacher")))
    network = None
    if config.features is not None and data is not None:
        network = load_features(config.features, data).to(model.device)
    best = config.out / "best"

    def watch(step: int) -> dict[str, float]:
        if step % config.eval_every and step != config.steps:
            return {}
        images = drawn(model, progress(parts, "samples to evaluate"))
        seen = look(images)
        for alarm in alarms(seen, wanted) if is_first_rank() else ():
            tqdm.write(f"alarm at step {step}: {alarm}", file=sys.stderr)
        figures = {"eval/brightness": seen.brightness, "eval/spread": seen.spread}
        if network is not None:
            distances = compare(network, images, real)
            figures |= {f"eval/{name}": value for name, value in distances.items()}
            better = is_best(best, distances)
            if sharded:  # all of them save, and one writes what the others look at
                better = first_says(better)
            if better:
                save(best)
            if better and is_first_rank():
                with whole_file(config.out / "best.json") as temporary:
                    temporary.write_text(json.dumps({"step": step, **distances}))
        return figures

    return watch


def marks(data: ImageSet | None, num_images: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Real images to compare with, and labels as frequent as theirs: others would look, and measure, different.

    Without data no images, and all classes alike.
    """
    if data is None:
        return torch.zeros(0), torch.arange(num_images) % num_classes
    times = -(-num_images // len(data))
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).repeat(times)
    batch = data.batch(chosen[:num_images], torch.Generator().manual_seed(0))
    return batch.images, batch.labels % num_classes


def compare(network: Classifier, images: Tensor, real: Tensor) -> dict[str, float]:
    """Fréchet distance and KID of images in [-1, 1]."""
    device = network.logits.weight.device
    # Features are measured in float32 whatever the training computes in, as `scorefield evaluate` does.
    with torch.autocast(device.type, enabled=False):
        made, wanted = (
            torch.cat(
                [extract_features(network.features, part.clamp(-1, 1).to(device)) for part in many.split(500)]
            )
            for many in (images, real)
        )
    return {"frechet_distance": frechet_distance(made, wanted), "kid": kernel_distance(made, wanted)}


def load_features(folder: Path, data: ImageSet) -> Classifier:
    """Return a feature network. Raises ``ValueError`` if it is of images of another shape."""
    network = load_classifier(folder)
    if (network.facts.channels, network.facts.resolution) != data.shape[:2]:
        raise ValueError(
            f"--features {folder} are of {network.facts.channels} channels at {network.facts.resolution}; "
            f"the images are {data.shape}. Train features on the same --data and --size."
        )
    return network


def is_best(best: Path, distances: Mapping[str, float]) -> bool:
    """Return whether the weights kept in ``best`` have a larger Fréchet distance, or there are none."""
    try:
        kept = json.loads(best.with_suffix(".json").read_text())["frechet_distance"]
    except (OSError, ValueError, KeyError):
        return True
    return bool(distances["frechet_distance"] < kept or not best.is_dir())


def forget_best(out: Path) -> None:
    """Remove what an earlier run of the same folder kept. Raises ``ValueError`` for files of someone else."""
    remove_folder(out / "best")
    (out / "best.json").unlink(missing_ok=True)
