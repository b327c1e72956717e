"""``scorefield robust``: a classifier that holds against attacks, on real and generated images.

    scorefield robust digits --out runs/robust
    scorefield robust --classifier mine:network --data images/ --generated made.npz --mix 0.7

Stopped runs resume: run the same command again. The folder --out/classifier is what `scorefield attack` takes as
--classifier.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attack.autoattack import FEWEST
from attack.networks import FUNCTION, Facts, build_classifier
from attack.recipe import asked, check_gradient, load_classifier
from attack.robust import Losses, Mixture, part_of, pgd_loss, trades_loss
from attack.robust_options import Robust, check
from attack.robust_report import Judge, changed, pgd_of, write_results
from scorefield import freeze
from scorefield.cache import fingerprint
from scorefield.data.arrays import check_values
from scorefield.data.images import ImageSet, Labelled, load_images
from scorefield.models.user_code import call
from scorefield.progress import working
from scorefield.randomness import Rng
from scorefield.report.write import add_page
from scorefield.shipped import shipped
from scorefield.training.identity import identity
from scorefield.training.launcher import is_first_rank
from scorefield.training.loop import EMA, Phase
from scorefield.training.run import adamw, cosine, fit, prepare, resume, show_plan, start

ASKED = 64
"""Images that a classifier is asked about before it learns."""


@dataclass(frozen=True, eq=False)
class Parts:
    """What a run is made of: images to learn from and to measure with, and the network."""

    mixture: Mixture
    held_out: ImageSet
    network: nn.Module
    facts: Facts


def main(config: Robust) -> Path:
    """Train, measure, and return the folder of the finished classifier."""
    check(config)
    parts = load(config)
    if config.dry_run:
        describe(config, parts)
        return config.out
    accelerator = start(config)
    inputs = inputs_of(config, parts)
    network = prepare(parts.network, config, accelerator)
    phase = robust_phase(config, network)
    assert phase.ema is not None
    own = identity(config, accelerator, inputs)
    first = resume(config, [phase], accelerator, own)
    average = phase.ema.network
    shown = parts.held_out.some(max(10, config.eval_images))
    judge = judge_of(config, parts, average, shown, accelerator.device)

    def report_and_export() -> None:
        if accelerator.is_main_process:
            every = torch.arange(len(parts.held_out))
            whole = judge_of(config, parts, average, every, accelerator.device)
            write_results(config, parts.facts, whole)

    batches = parts.mixture.batches(config.batch_size, accelerator.device, accelerator.num_processes)
    fit(
        config, [phase], batches, accelerator, own=own, first=first, columns=min(10, len(judge.images)),
        preview=lambda: preview(config, judge), watch=watch_of(config, judge), at_end=report_and_export,
    )  # fmt: skip
    folder = config.out / "classifier"
    if accelerator.is_main_process:
        print(f"classifier: {folder}")
        add_page(config.out)
    return folder


def load(config: Robust) -> Parts:
    """Return all parts. Raises ``ValueError`` for those that cannot be read, or do not fit each other."""
    data = load_images(config)
    if data.num_classes < 2:
        raise ValueError(
            f"--data {config.data} has no classes, and a classifier learns them. Label the images, by class "
            "folders or a column."
        )
    real, held_out = split(config, data)
    torch.manual_seed(config.seed)  # of the first weights
    network, facts = make_network(config, data, real)
    generated = None
    if config.generated:
        with working("the generated images"):
            generated = load_generated(config, data)
    return Parts(Mixture(real, generated, config.mix), held_out, network, facts)


def split(config: Robust, data: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Return images to learn from and to measure with: other images, the digits' own, or a tenth."""
    if config.held_out:
        beside = load_beside(config, config.held_out, "--held-out", data)
        return data, relabelled(beside, data, config, "--held-out")
    if config.data is None:
        part: Labelled = shipped("held-out digits")()
        images = torch.tensor(check_values(part.images.numpy(), "digits"))
        if data.images.shape[1:] != images.shape[1:]:
            raise ValueError(
                "the digits are 8 x 8 and grey: --size, --channels and --crop need images to measure with. Pass "
                "--held-out, or leave them out."
            )
        return data, replace(data, images=images, labels=part.labels, flip=False)
    if len(data) < 20:
        raise ValueError(
            f"--data has {len(data)} images, and a tenth of them measures nothing. Pass --held-out, or 20 images."
        )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    held, used = order.tensor_split([len(data) // 10])
    return part_of(data, used), replace(part_of(data, held), flip=False)


def load_beside(config: Robust, source: str, option: str, data: ImageSet) -> ImageSet:
    """Return further images, of the size and colours of ``data``."""
    options = replace(
        config, data=source, size=data.resolution, channels="grey" if data.shape[0] == 1 else "rgb",
        crop="center" if option == "--held-out" else config.crop,
        flip=config.flip if option != "--held-out" else False,
    )  # fmt: skip
    return load_images(options, option)


def relabelled(beside: ImageSet, data: ImageSet, config: Robust, option: str) -> ImageSet:
    """Return further images with the class numbers of ``data``: numbers stay, as samples have them; names are
    looked up.

    Raises ``ValueError`` for images without classes, and for a class that ``data`` does not have.
    """
    if beside.num_classes < 2:
        fix = "Label them, or pass --pseudo-label." if option == "--generated" else "Label them."
        raise ValueError(f"{option} {getattr(config, _name(option))} has no labels. {fix}")
    numbered = all(name.isdigit() for name in beside.class_names)
    names = tuple(map(str, range(data.num_classes))) if numbered else data.class_names
    known = {name: number for number, name in enumerate(names)}
    missing = [name for name in beside.class_names if name not in known]
    if missing:
        shown = f"{data.num_classes} classes, from 0" if numbered else ", ".join(names[:10])
        raise ValueError(f"{option} has the class {missing[0]!r}, and --data has {shown}. Label both alike.")
    places = torch.tensor([known[name] for name in beside.class_names])
    return replace(beside, labels=places[beside.labels], class_names=data.class_names)


def _name(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def load_generated(config: Robust, data: ImageSet) -> ImageSet:
    """Return the generated images with labels: theirs, or the answers of --pseudo-label."""
    made = load_beside(config, config.generated, "--generated", data)
    if not config.pseudo_label:
        return relabelled(made, data, config, "--generated")
    name = f"--pseudo-label {config.pseudo_label}"
    classifier = load_classifier(config.pseudo_label, "cpu")
    found = list[Tensor]()
    for rows in torch.arange(len(made)).split(256):
        images = ((made.batch(rows, torch.Generator().manual_seed(0)).images + 1) / 2).clamp(0, 1)
        found.append(asked(classifier, images, name))
    logits = torch.cat(found)
    if logits.shape[1] != data.num_classes:
        raise ValueError(f"{name} answers {logits.shape[1]} classes, and --data has {data.num_classes}.")
    return replace(made, labels=logits.argmax(1), class_names=data.class_names)


def make_network(config: Robust, data: ImageSet, real: ImageSet) -> tuple[nn.Module, Facts]:
    """Return the network that learns, and how it is built.

    Raises ``ValueError`` for a function of the user that returns no network, or one that cannot be attacked.
    """
    facts = Facts(
        network=FUNCTION if config.classifier else config.network, channels=data.shape[0],
        resolution=data.resolution, num_classes=data.num_classes, width=config.width, depth=config.depth,
        class_names=data.class_names if any(not name.isdigit() for name in data.class_names) else (),
        training={name: getattr(config, name) for name in ("loss", "epsilon", "norm", "steps", "seed")},
    )  # fmt: skip
    if not config.classifier:
        network = build_classifier(facts)
    else:
        network = call(config.classifier)
        if not isinstance(network, nn.Module) or not any(p.requires_grad for p in network.parameters()):
            raise ValueError(
                f"--classifier {config.classifier} must return a torch.nn.Module with parameters that learn; got "
                f"a {type(network).__name__}."
            )
    batch = real.batch(real.some(ASKED), torch.Generator().manual_seed(0))
    images = ((batch.images + 1) / 2).clamp(0, 1)
    name = f"--classifier {config.classifier}" if config.classifier else f"--network {config.network}"
    network.eval()
    answers = asked(network, images, name)
    if answers.shape[1] != data.num_classes:
        raise ValueError(
            f"{name} answers {answers.shape[1]} classes, and --data has {data.num_classes}. Let its last layer "
            f"have {data.num_classes}."
        )
    check_gradient(network, images, name)
    able = any(hasattr(part, "enable_gradient_checkpointing") for part in network.modules())
    if config.gradient_checkpointing and not able:
        raise ValueError(f"--gradient-checkpointing: {name} cannot recompute its activations. Leave it out.")
    if config.autoattack and data.num_classes < FEWEST:
        raise ValueError(f"--autoattack needs at least {FEWEST} classes; --data has {data.num_classes}.")
    return network.train(), facts


def robust_phase(config: Robust, network: nn.Module) -> Phase:
    """Return the phase that learns against the attack."""
    attack = pgd_of(config, config.epsilon, config.attack_steps, step=config.attack_step_size)
    if attack is not None:
        attack = replace(attack, random_start=config.random_start)

    def loss(batch: Labelled, rng: Rng) -> Losses:
        if config.loss == "trades" and attack is not None:
            return trades_loss(
                network, batch.images, batch.labels, attack=attack, generator=rng("attack"), beta=config.beta,
                mode=config.attack_mode,
            )  # fmt: skip
        return pgd_loss(
            network, batch.images, batch.labels, attack=attack, generator=rng("attack"), mode=config.attack_mode
        )

    optimizer = adamw(network, config.learning_rate, kind=config.optimizer)
    return Phase(
        name="classifier", network=network, optimizer=optimizer, loss=loss, ema=EMA(network, config.ema_decay),
        lr_schedule=cosine(optimizer, config.steps),
    )  # fmt: skip


def inputs_of(config: Robust, parts: Parts) -> dict[str, str | None]:
    """Return fingerprints of what the run reads, and of the weights that it starts from."""
    generated = parts.mixture.generated
    return {
        "data": parts.mixture.real.identity(), "held_out": parts.held_out.identity(),
        "generated": None if generated is None else generated.identity(),
        "pseudo_label": fingerprint([generated.labels]) if generated and config.pseudo_label else None,
        "classifier": fingerprint(parts.network.state_dict().values()),
    }  # fmt: skip


def judge_of(config: Robust, parts: Parts, network: nn.Module, rows: Tensor, device: Any) -> Judge:
    """Return what measures the network on some held-out images."""
    batch = parts.held_out.batch(rows, torch.Generator().manual_seed(0), device)
    images = ((batch.images + 1) / 2).clamp(0, 1)
    return Judge(network, images, batch.labels, config.norm, config.seed, config.batch_size)


def watch_of(config: Robust, judge: Judge) -> Callable[[int], Mapping[str, float]]:
    """Return what is measured on the way: accuracy, clean and attacked as in training."""
    if not config.eval_every or not is_first_rank():
        return lambda step: {}
    attack = pgd_of(config, config.epsilon, config.attack_steps, step=config.attack_step_size)

    def watch(step: int) -> dict[str, float]:
        if step % config.eval_every and step != config.steps:
            return {}
        figures = {"eval/accuracy": judge.accuracy(None)}
        return figures if attack is None else {**figures, "eval/accuracy_attacked": judge.accuracy(attack)}

    return watch


def preview(config: Robust, judge: Judge) -> Tensor:
    """Return held-out images, attacked ones under them, and the changes, in [-1, 1]."""
    few = replace(judge, images=judge.images[:10], labels=judge.labels[:10])
    attack = pgd_of(config, config.epsilon, config.attack_steps, step=config.attack_step_size)
    made = few.attacked(attack)
    return 2 * torch.cat([few.images, made, changed(few.images, made)]) - 1


def describe(config: Robust, parts: Parts) -> None:
    """Print what a run would do."""
    average = freeze(copy.deepcopy(parts.network))
    show_plan(config, {"classifier": parts.network, "its average": average}, {"classifier": config.steps})
    real, made = parts.mixture.counts(config.batch_size)
    generated = parts.mixture.generated
    if is_first_rank():
        print(
            f"images: {len(parts.mixture.real):,} real, {0 if generated is None else len(generated):,} generated, "
            f"{len(parts.held_out):,} to measure with; each batch has {real} real and {made} generated ones, "
            f"attacked in {config.attack_steps if config.epsilon else 0} steps"
        )
