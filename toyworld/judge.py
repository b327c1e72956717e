"""The judge: a small classifier that says what a picture of the toy world shows, and how surely it knows.

Its answers about generated pictures are read beside its own accuracy on renders, which ``judge.json`` states; its
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
"""What is judged, and the answers in the order of their logits."""

NOT_ASKED = -1
"""Label of a question that a picture does not answer."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """How a judge was trained, and how often it is right about renders it was not trained on.

    Attributes:
        seed: of the scenes, the weights and the augmentation.
        steps: optimiser steps.
        batch_size: pictures per step.
        num_images: different renders seen.
        num_held_out: renders that the accuracies are measured on.
        accuracies: share of right answers to each question; view only of mug, chair, arrow and letter L.
        augmented_accuracies: the same after the blur, noise and contrast of the training.
    """

    seed: int
    steps: int
    batch_size: int
    num_images: int
    num_held_out: int
    accuracies: dict[str, float]
    augmented_accuracies: dict[str, float]


class Judge(nn.Module):
    """Pictures (b, 3, 64, 64) to logits of every question in ``ANSWERS``; ``facts`` once it is trained."""

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
        """Features (b, 96) of pictures, which are clamped to [-1, 1], as they would be to be looked at."""
        if images.shape[1:] != (3, 64, 64):
            raise ValueError(f"the judge sees pictures (b, 3, 64, 64); got {tuple(images.shape)}. Resize them.")
        result: Tensor = self.body(images.clamp(-1, 1))
        return result

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits (b, answers) of each question."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}


def labels_of(attributes: Sequence[Attributes]) -> dict[str, Tensor]:
    """Numbers (b,) of the right answers; ``NOT_ASKED`` where a caption is silent or all views look alike."""

    def label(one: Attributes, question: str) -> int:
        word = getattr(one, question)
        silent = word is None or (question == "view" and one.shape not in VIEWED_SHAPES)
        return NOT_ASKED if silent else ANSWERS[question].index(word)

    return {question: torch.tensor([label(one, question) for one in attributes]) for question in ANSWERS}


@torch.no_grad()
def right_answers(judge: Judge, images: Tensor, attributes: Sequence[Attributes]) -> dict[str, Tensor]:
    """Whether each asked question is answered as ``attributes`` say: (number asked,), bool."""
    labels = labels_of(attributes)
    parts = [judge(part) for part in images.split(256)]
    right = {}
    for question, label in labels.items():
        answer = torch.cat([part[question] for part in parts]).argmax(1).cpu()
        right[question] = (answer == label)[label != NOT_ASKED]
    return right


def accuracies(judge: Judge, images: Tensor, attributes: Sequence[Attributes]) -> dict[str, float]:
    """Share of asked questions that are answered as ``attributes`` say; nan where none was asked."""
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
    """Train on renders, some blurred, noisy or of another contrast, so that decoded latents are judged fairly.

    AdamW under a one-cycle schedule; the weights end rounded to float16, as they are stored, and are measured so.
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
    """Pictures (n, 3, 64, 64), as bytes, and what they show."""
    scenes = draw_scenes(indices, seed)
    starts = progress(range(0, len(scenes), 500), "renders, in batches of 500")
    images = [as_bytes((render(scenes[start : start + 500]).rgb + 1) / 2) for start in starts]
    return torch.cat(images), [describe(scene) for scene in scenes]


def as_pictures(images: Tensor) -> Tensor:
    """0 to 255 to [-1, 1]."""
    return images.float() / 127.5 - 1


def augmented(images: Tensor, generator: Generator) -> Tensor:
    """Pictures (b, 3, h, w) with blur, contrast, brightness and noise of strengths drawn for each."""
    strength = torch.rand(5, len(images), 1, 1, 1, generator=generator)
    binomial = torch.tensor([0.25, 0.5, 0.25])
    kernel = (binomial[:, None] * binomial).expand(3, 1, 3, 3)
    for passes in strength[:2]:
        padded = functional.pad(images, (1, 1, 1, 1), mode="replicate")
        images = torch.lerp(images, functional.conv2d(padded, kernel, groups=3), passes)
    images = images * (0.85 + 0.3 * strength[2]) + 0.1 * (2 * strength[3] - 1)
    return images + 0.1 * strength[4] * torch.randn(images.shape, generator=generator)


def save_judge(judge: Judge, folder: Path) -> Path:
    """Write a trained judge's weights, float16, and facts into a folder; load them with :func:`load_judge`."""
    if judge.facts is None:
        raise ValueError("only a judge with facts is saved: train_judge measures them.")
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: x.half() if x.is_floating_point() else x for name, x in judge.state_dict().items()}
    with whole_file(folder / "judge.safetensors") as temporary:
        save_file({name: x.cpu().contiguous() for name, x in weights.items()}, temporary)
    with whole_file(folder / "judge.json") as temporary:
        temporary.write_text(json.dumps({"format": FORMAT, **asdict(judge.facts)}, indent=2) + "\n")
    return folder


def load_judge(folder: Path | None = None, *, device: torch.device | str = "cpu") -> Judge:
    """The judge in ``folder``, or the one that ships, frozen. Raises ``ValueError`` if there is none."""
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
        raise ValueError(f"{folder} holds no judge of train_judge.py: {error}") from error
    return judge.to(device).eval().requires_grad_(False)
