"""The judge: a small classifier of toy-world pictures by shape, colour, background and view.

Read its answers about generated pictures next to its own accuracy on renders, which ``judge.json`` states. Its
features, the 96 activations before the answers, are the space of Fréchet distances. Both ship with the package.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn import functional

from scorefield.atomic import whole_file
from scorefield.files import load_json
from scorefield.models.weights import check_finite
from scorefield.progress import progress
from scorefield.randomness import Rng, shuffled
from toyworld.camera import VIEWS
from toyworld.captions import Attributes, describe
from toyworld.data import HELD_OUT, as_bytes, draw_scenes
from toyworld.render import render
from toyworld.scene import BACKGROUNDS, COLOURS, SHAPES
from toyworld.solids import VIEWED_SHAPES

FORMAT = "scorefield-judge-1"

ANSWERS = {"shape": SHAPES, "colour": tuple(COLOURS), "background": tuple(BACKGROUNDS), "view": VIEWS}
"""The judge's questions, and the answers in the order of their logits."""

NOT_ASKED = -1
"""Label of a question that a picture does not answer."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """How a judge was trained, and its accuracy on renders it was not trained on.

    Attributes:
        seed: Seed of the scenes, the weights and the augmentation.
        steps: Optimiser steps.
        batch_size: Pictures per step.
        num_images: Different renders in the training data.
        num_held_out: Renders on which the accuracies are measured.
        accuracies: Share of right answers to each question. The view is asked only for mug, chair, arrow and
            letter L.
        augmented_accuracies: The same, with the blur, noise and contrast changes of the training.
    """

    seed: int
    steps: int
    batch_size: int
    num_images: int
    num_held_out: int
    accuracies: dict[str, float]
    augmented_accuracies: dict[str, float]


class Judge(nn.Module):
    """A network from pictures (b, 3, 64, 64) to logits for every question in ``ANSWERS``.

    Attributes:
        facts: How it was trained and how accurate it is; None before the training.
    """

    facts: Facts | None = None

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width, stride in ((24, 2), (48, 2), (48, 1), (96, 2), (96, 1), (96, 2)):
            layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 4 * 4, 96), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(96, len(words)) for name, words in ANSWERS.items()})

    def features(self, images: Tensor) -> Tensor:
        """Return features (b, 96) of pictures, which are first clamped to [-1, 1], as they would be for display.

        Raises ``ValueError`` for pictures of another shape.
        """
        if images.shape[1:] != (3, 64, 64):
            raise ValueError(f"the judge sees pictures (b, 3, 64, 64); got {tuple(images.shape)}. Resize them.")
        result: Tensor = self.body(images.clamp(-1, 1))
        return result

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits (b, answers) for each question."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}


def labels_of(attributes: Sequence[Attributes]) -> dict[str, Tensor]:
    """Return the numbers (b,) of the right answers to each question.

    ``NOT_ASKED`` marks what the caption does not state, and views of solids that look the same from all sides.
    """

    def label(one: Attributes, question: str) -> int:
        word = getattr(one, question)
        silent = word is None or (question == "view" and one.shape not in VIEWED_SHAPES)
        return NOT_ASKED if silent else ANSWERS[question].index(word)

    return {question: torch.tensor([label(one, question) for one in attributes]) for question in ANSWERS}


@torch.no_grad()
def right_answers(judge: Judge, images: Tensor, attributes: Sequence[Attributes]) -> dict[str, Tensor]:
    """Return, for each question, whether the answers agree with ``attributes``: (number asked,) bool."""
    labels = labels_of(attributes)
    parts = [judge(part) for part in images.split(256)]
    right = {}
    for question, label in labels.items():
        answer = torch.cat([part[question] for part in parts]).argmax(1).cpu()
        right[question] = (answer == label)[label != NOT_ASKED]
    return right


def accuracies(judge: Judge, images: Tensor, attributes: Sequence[Attributes]) -> dict[str, float]:
    """Return the share of right answers to each question, nan for a question that was never asked."""
    answers = right_answers(judge, images, attributes)
    return {question: float(right.double().mean()) for question, right in answers.items()}


def train_judge(
    *,
    seed: int = 0,
    steps: int = 3000,
    batch_size: int = 64,
    num_images: int = 24_000,
    num_held_out: int = 4000,
    learning_rate: float = 4e-3,
    device: torch.device | str = "cpu",
) -> Judge:
    """Train a judge on renders and return it. Blur, noise and contrast changes make it fair to decoded latents.

    The optimiser is AdamW under a one-cycle schedule. The final weights are rounded to float16, as they are
    stored, and the accuracies are those of the rounded weights.
    """
    images, attributes = render_pictures(range(num_images), seed)
    labels = labels_of(attributes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        judge = Judge().to(device)
    optimizer = torch.optim.AdamW(judge.parameters(), learning_rate, weight_decay=0.05)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for step in progress(range(steps), "steps of the judge", unit="step"):
        rng = Rng(seed, step, index=step)
        chosen = shuffled(num_images, batch_size, rng)
        logits = judge(augmented(as_pictures(images[chosen]), rng("augment")).to(device))
        loss = sum(_loss(logits[question], labels[question][chosen].to(device)) for question in ANSWERS)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
        decay.step()
    judge.half().float().eval().requires_grad_(False)
    images, attributes = render_pictures(range(HELD_OUT, HELD_OUT + num_held_out), seed)
    pictures = as_pictures(images)
    disturbed = augmented(pictures, Rng(seed, 0)("held out"))
    judge.facts = Facts(
        seed=seed, steps=steps, batch_size=batch_size, num_images=num_images, num_held_out=num_held_out,
        accuracies=accuracies(judge, pictures.to(device), attributes),
        augmented_accuracies=accuracies(judge, disturbed.to(device), attributes),
    )  # fmt: skip
    return judge


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    asked = labels != NOT_ASKED
    total = functional.cross_entropy(logits, labels, ignore_index=NOT_ASKED, label_smoothing=0.02, reduction="sum")
    return total / asked.sum().clamp(min=1)


def render_pictures(indices: range, seed: int) -> tuple[Tensor, list[Attributes]]:
    """Return pictures (n, 3, 64, 64), as bytes, and their attributes."""
    scenes = draw_scenes(indices, seed)
    starts = progress(range(0, len(scenes), 500), "renders, in batches of 500")
    images = [as_bytes((render(scenes[start : start + 500]).rgb + 1) / 2) for start in starts]
    return torch.cat(images), [describe(scene) for scene in scenes]


def as_pictures(images: Tensor) -> Tensor:
    """Return bytes, 0 to 255, as pictures in [-1, 1]."""
    return images.float() / 127.5 - 1


def augmented(images: Tensor, generator: Generator) -> Tensor:
    """Return pictures (b, 3, h, w) with random blur, contrast, brightness and noise, each of random strength."""
    strength = torch.rand(5, len(images), 1, 1, 1, generator=generator)
    binomial = torch.tensor([0.25, 0.5, 0.25])
    kernel = (binomial[:, None] * binomial).expand(3, 1, 3, 3)
    for passes in strength[:2]:
        padded = functional.pad(images, (1, 1, 1, 1), mode="replicate")
        images = torch.lerp(images, functional.conv2d(padded, kernel, groups=3), passes)
    images = images * (0.85 + 0.3 * strength[2]) + 0.1 * (2 * strength[3] - 1)
    return images + 0.1 * strength[4] * torch.randn(images.shape, generator=generator)


def save_judge(judge: Judge, folder: Path) -> Path:
    """Write a trained judge's weights (float16) and facts into a folder that :func:`load_judge` reads.

    Raises ``ValueError`` for a judge without facts.
    """
    if judge.facts is None:
        raise ValueError("the judge has no facts, which train_judge measures; save a judge that it returned.")
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: x.half() if x.is_floating_point() else x for name, x in judge.state_dict().items()}
    with whole_file(folder / "judge.safetensors") as temporary:
        save_file({name: x.cpu().contiguous() for name, x in weights.items()}, temporary)
    with whole_file(folder / "judge.json") as temporary:
        temporary.write_text(json.dumps({"format": FORMAT, **asdict(judge.facts)}, indent=2) + "\n")
    return folder


def load_judge(folder: Path | None = None, *, device: torch.device | str = "cpu") -> Judge:
    """Return the frozen judge in ``folder``, or the one that ships. Raises ``ValueError`` if there is none."""
    folder = Path(__file__).parent if folder is None else folder
    try:
        description = load_json(folder / "judge.json")
        if description.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        judge = Judge()
        judge.load_state_dict(load_file(folder / "judge.safetensors"))
        check_finite(judge.state_dict(), folder / "judge.safetensors")
        judge.facts = Facts(**description)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no judge that train_judge.py wrote: {error}") from error
    return judge.to(device).eval().requires_grad_(False)
