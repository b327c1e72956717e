"""Train a class-conditional diffusion teacher: EDM preconditioning, log-normal noise levels, EMA.

    scorefield teacher --out runs/teacher
    accelerate launch -m scorefield teacher --out runs/teacher    # several GPUs

Without --data it learns scikit-learn's 8 x 8 digits in about a minute on a CPU. Stopped runs resume: run the
same command again. The folder --out/teacher is what `scorefield distill` takes as --teacher.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scorefield import Karras, NetworkDenoiser, freeze
from scorefield.cache import fingerprint
from scorefield.commands.options import TrainTeacher, check_teacher
from scorefield.data.images import ImageSet, Labelled, load_images
from scorefield.gradient import TIME_NOT_FINITE, denoising_errors, karras_weight, time_not_finite
from scorefield.models.networks import build_network
from scorefield.models.storage import TIMES, load_denoiser, read_facts, save_denoiser
from scorefield.models.teacher import Teacher
from scorefield.randomness import Rng
from scorefield.report.write import add_page
from scorefield.sampling import grid, initial_noise, sample
from scorefield.times import log_normal
from scorefield.training.evaluate import check_evaluation, watcher
from scorefield.training.identity import identity
from scorefield.training.loop import EMA, Phase
from scorefield.training.micro_batch import Trial, settle, unforeseen
from scorefield.training.options import images_per_pass
from scorefield.training.run import adamw, cosine, fit, prepare, resume, show_plan, start
from scorefield.training.sharding import whole_denoiser


def main(config: TrainTeacher) -> Path:
    """Train and return the folder of the finished teacher."""
    check_teacher(config)
    data = load_images(config)
    facts = describe(config, data)
    check_evaluation(config, data)
    torch.manual_seed(config.seed)
    schedule = Karras(config.sigma_min, config.sigma_max)
    network, begun_from = make_network(config, facts)
    if config.dry_run:
        networks = {"teacher": network, "its average": freeze(copy.deepcopy(network))}
        config, said = unforeseen(config)
        show_plan(config, networks, {"teacher": config.steps}, said=said)
        return config.out
    accelerator = start(config)

    def batches_of(config: TrainTeacher) -> Callable[[Rng], Labelled]:
        return data.batches(images_per_pass(config), accelerator.device, accelerator.num_processes)

    network = prepare(network, config, accelerator)
    phase = teacher_phase(config, NetworkDenoiser(network, schedule, "x0"), facts)
    assert phase.ema is not None
    config = settle(config, accelerator, lambda one: Trial([phase], batches_of(one)))
    own = identity(config, accelerator, {"data": data.identity(), "init_from": begun_from})
    first = resume(config, [phase], accelerator, own)
    batches = batches_of(config)
    model = Teacher(NetworkDenoiser(phase.ema.network, schedule, "x0"), data.shape, facts["num_classes"], facts)
    folder = config.out / "teacher"

    def save(to: Path = folder) -> None:
        average = whole_denoiser(model.denoiser)
        if accelerator.is_main_process:
            save_denoiser(average, to, facts)

    fit(
        config, [phase], batches, accelerator, own=own, first=first, columns=min(10, data.num_classes),
        preview=lambda: preview(model), watch=watcher(config, model, data, teacher=None, save=save), at_end=save,
    )  # fmt: skip
    if accelerator.is_main_process:
        print(f"teacher: {folder}")
        add_page(config.out)
    return folder


def describe(config: TrainTeacher, data: ImageSet) -> dict[str, Any]:
    """Return how the network is built: what is saved beside the weights."""
    mlp = {"width": config.width, "depth": config.depth, "dropout": config.dropout}
    unet = {
        "channels": list(config.unet_channels), "layers": config.unet_layers, "patch": config.unet_patch,
        "dropout": config.dropout,
    }  # fmt: skip
    sigma_data = config.sigma_data or round(data.spread(), 2)
    if not sigma_data > 0:
        raise ValueError(
            f"--sigma-data must be above 0; got {sigma_data}: the images of --data are all of one grey."
        )
    return {
        "network": config.network, "options": mlp if config.network == "mlp" else unet, "shape": list(data.shape),
        "num_classes": data.num_classes if data.num_classes > 1 else 0, "class_names": list(data.class_names),
        "sigma_data": sigma_data, "null_class": config.label_dropout > 0,
    }  # fmt: skip


def make_network(config: TrainTeacher, facts: dict[str, Any]) -> tuple[nn.Module, str | None]:
    """Return a network to train, and a hash of the weights that it starts from, if --init-from names any.

    It is preconditioned for the data that those weights learned, unless --sigma-data says otherwise: ``facts`` are
    changed. Raises ``ValueError`` for a folder of another network, or of a student.
    """
    if not config.init_from:
        return build_network(facts).train(), None
    folder = Path(config.init_from)
    given = read_facts(folder)
    if TIMES in given:
        raise ValueError(f"--init-from {folder} is a student, which knows no other noise level. Pass a teacher.")
    if config.sigma_data is None:
        facts["sigma_data"] = given.get("sigma_data")
    for name in ("network", "options", "shape", "num_classes", "sigma_data"):
        there, here = (_without_dropout(one.get(name)) for one in (given, facts))
        if there != here:
            raise ValueError(f"--init-from {folder} is built otherwise: its {name} is {there}; here it is {here}.")
    network = build_network(facts)
    load_denoiser(folder, network)
    return network.train(), fingerprint(network.state_dict().values())


def _without_dropout(value: Any) -> Any:
    return {key: x for key, x in value.items() if key != "dropout"} if isinstance(value, dict) else value


def teacher_phase(config: TrainTeacher, denoiser: NetworkDenoiser, facts: dict[str, Any]) -> Phase:
    """Denoising under EDM's weight, with some labels dropped."""
    times, weight = log_normal(config.noise_mean, config.noise_std), karras_weight(facts["sigma_data"])
    num_classes = facts["num_classes"]

    def loss(batch: Labelled, rng: Rng) -> dict[str, torch.Tensor]:
        dropped = torch.rand(len(batch.labels), generator=rng("labels")) < config.label_dropout
        labels = batch.labels.masked_fill(dropped.to(batch.labels.device), num_classes)
        cond = {"class_labels": labels} if num_classes else {}
        errors, t = denoising_errors(
            denoiser, batch.images, cond, times=times, weight=weight, generator=rng("noise")
        )
        return {"loss": errors.mean(), TIME_NOT_FINITE: time_not_finite(errors, t)}

    optimizer = adamw(denoiser.network, config.learning_rate, kind=config.optimizer)
    return Phase(
        name="teacher", network=denoiser.network, optimizer=optimizer, loss=loss,
        ema=EMA(denoiser.network, config.ema_decay), lr_schedule=cosine(optimizer, config.steps),
    )  # fmt: skip


@torch.no_grad()
def preview(teacher: Teacher, rows: int = 4) -> torch.Tensor:
    """Return a few samples of the first ten classes in 18 steps, always from the same noise."""
    labels = torch.arange(min(10, max(1, teacher.num_classes))).repeat(rows).to(teacher.device)
    noise = torch.randn(len(labels), *teacher.shape, generator=torch.Generator().manual_seed(0)).to(labels.device)
    times = grid(teacher.denoiser.schedule, 18)
    x_t = initial_noise(teacher.denoiser.schedule, noise, float(times[0]))
    return sample(teacher.denoiser, x_t, teacher.cond(labels), times=times)
