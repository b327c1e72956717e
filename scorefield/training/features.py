"""Feature networks for Fréchet distance and KID: a classifier of the user's own classes, or InceptionV3."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional

from scorefield.atomic import whole_folder
from scorefield.data.images import ImageSet
from scorefield.files import check_regular, check_small, read_text
from scorefield.models.weights import check_finite, check_fit
from scorefield.progress import progress
from scorefield.randomness import Rng, shuffled

FORMAT = "scorefield-features-1"


@dataclass(frozen=True)
class Facts:
    """How a classifier is built, and what it knows.

    Attributes:
        channels: of its images.
        resolution: of its images.
        num_classes: that it tells apart.
        num_features: width of the feature space.
        accuracy: on the images it was not trained on.
        class_names: in the order of their numbers; empty in folders of earlier versions.
    """

    channels: int
    resolution: int
    num_classes: int
    num_features: int = 128
    accuracy: float = float("nan")
    class_names: tuple[str, ...] = ()


class Classifier(nn.Module):
    """A small convolutional classifier; the activations before its last layer are the feature space."""

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self.facts = facts
        layers: list[nn.Module] = []
        width, size, before = 32, facts.resolution, facts.channels
        while True:
            for after in (width, width):
                layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
                before = after
            if size <= 7 or width >= 256:
                break
            layers += [nn.MaxPool2d(2)]
            size, width = size // 2, width * 2
        pooled = min(size, 4)
        layers += [nn.AdaptiveAvgPool2d(pooled), nn.Flatten(), nn.Dropout(0.2)]
        self.features = nn.Sequential(*layers, nn.Linear(before * pooled**2, facts.num_features), nn.ReLU())
        self.logits = nn.Linear(facts.num_features, facts.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (b, num_classes)."""
        logits: Tensor = self.logits(self.features(images))
        return logits


def train_classifier(
    data: ImageSet, *, steps: int, batch_size: int, learning_rate: float, seed: int, device: torch.device | str
) -> Classifier:
    """Train on nine tenths of the images, with shifts of up to one eighth; the last tenth gives the accuracy."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    held_out, used = order.tensor_split([max(1, len(data) // 10)])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        facts = Facts(data.shape[0], data.resolution, data.num_classes, class_names=data.class_names)
        network = Classifier(facts).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=0.05)
        decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
        for step in progress(range(steps), "steps of the classifier", unit="step"):
            rng = Rng(seed, step, index=step)
            batch = data.batch(used[shuffled(len(used), batch_size, rng)], rng("augment"))
            images = _moved(batch.images, data.resolution // 8, rng("shift")).to(device)
            loss = functional.cross_entropy(network(images), batch.labels.to(device), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    network.eval().requires_grad_(False)
    right = []
    for part in held_out.split(512):
        batch = data.batch(part, torch.Generator().manual_seed(seed), device)
        right.append(network(batch.images).argmax(1) == batch.labels)
    network.facts = replace(facts, accuracy=float(torch.cat(right).double().mean()))
    return network


def _moved(images: Tensor, room: int, generator: torch.Generator) -> Tensor:
    padded = functional.pad(images, (room,) * 4, mode="replicate")
    corner = torch.randint(0, 2 * room + 1, (len(images), 2), generator=generator)
    rows, columns = (corner[:, axis, None] + torch.arange(images.shape[-1]) for axis in (0, 1))
    every = torch.arange(len(images))[:, None, None]
    return padded[every, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def save_classifier(network: Classifier, folder: Path) -> Path:
    """Write weights and facts; load with :func:`load_classifier`."""
    with whole_folder(folder) as temporary:
        save_model(network, str(temporary / "model.safetensors"))
        description = {"format": FORMAT, **asdict(network.facts)}
        (temporary / "features.json").write_text(json.dumps(description, indent=2))
    return folder


def load_classifier(folder: Path) -> Classifier:
    """Return the classifier in ``folder``. Raises ``ValueError`` if there is none."""
    try:
        check_small(folder / "features.json")
        description = json.loads(read_text(folder / "features.json"))  # an accuracy may be unknown, NaN
        if description.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        names = tuple(description.pop("class_names", ()))
        facts = Facts(**description, class_names=names)
        if not all(isinstance(name, str) for name in names) or len(names) not in (0, facts.num_classes):
            raise ValueError(f"class_names must be the names of its {facts.num_classes} classes; got {names}")
        with torch.device("meta"):
            planned = Classifier(facts)
        check_fit(folder / "model.safetensors", planned)
        network = Classifier(facts)
        load_model(network, str(folder / "model.safetensors"))
        check_finite(network.state_dict(), folder / "model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no classifier of `scorefield features`: {error}") from error
    return network.eval().requires_grad_(False)


def inception(weights: Path, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
    """InceptionV3 as FID uses it, 2,048 features of RGB images in [-1, 1], from torch-fidelity's weights file.

    Raises ``ValueError`` where torch-fidelity or the file is missing, or the file holds anything else.
    """
    try:
        # Tensors alone, first: torch-fidelity itself would run any code that a pickle holds.
        check_regular(weights)
        held = torch.load(weights, map_location="cpu", weights_only=True)
        if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
            raise TypeError("no state dict of tensors")
        from torchmetrics.image.fid import NoTrainInceptionV3

        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights)).to(device)
    except ImportError as error:
        raise ValueError("InceptionV3 features need: pip install torch-fidelity") from error
    except Exception as error:  # unpickling junk raises whatever its bytes happen to mean
        raise ValueError(
            f"{weights} is no file of InceptionV3 weights, torch-fidelity's weights-inception-2015-12-05: "
            f"{type(error).__name__}: {str(error)[:200]}"
        ) from error

    def features(images: Tensor) -> Tensor:
        large = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        result: Tensor = network(large.expand(-1, 3, -1, -1)).flatten(1)
        return result

    return features
