"""Distil a teacher into a one-step or few-step generator by distribution matching (DMD2).

    scorefield distill --teacher runs/teacher/teacher --out runs/student
    accelerate launch -m scorefield distill --teacher ... --out ...    # several GPUs
    accelerate launch -m scorefield distill --teacher <name or folder> --prompts prompts.txt

The student and the fake score start from the teacher. In each step the fake score learns the student's images; in
every --student-every-th the student follows the difference of teacher and fake score first. With --prompts the
teacher is a text-to-image pipeline of diffusers, and --out/student is what diffusers loads: a pipeline, or a LoRA
with --lora. Stopped runs resume: run the same command again.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from distill.checks import check, smallest_pass
from distill.data import student_batches, student_data
from distill.export import copied_parts, export_student, scheduler_for
from distill.initial import initial_weights
from distill.options import Config
from distill.parts import (
    build_method,
    build_networks,
    folders_of,
    plan_of_pairs,
    planned_networks,
    planned_updates,
    settled,
    student_times,
    teacher_pairs,
)
from distill.stages import Stages, distil
from distill.student import Student, save_student
from distill.text_recipe import distil_texts
from distill.trial import settle_passes
from scorefield.data.images import ImageSet
from scorefield.diagnosis.check import Diagnosis
from scorefield.files import read_json
from scorefield.models.codec import Codec
from scorefield.models.teacher import Teacher, load_teacher
from scorefield.progress import working
from scorefield.randomness import Rng
from scorefield.report.write import add_page
from scorefield.training import checkpoint
from scorefield.training.evaluate import Watch, check_evaluation, watcher
from scorefield.training.identity import identity
from scorefield.training.micro_batch import unforeseen
from scorefield.training.options import images_per_pass
from scorefield.training.run import cut, prepare, show_plan, start
from scorefield.training.sharding import whole_denoiser
from scorefield.training.teacher_check import PICTURE, check_teacher, draw_check, num_checked

__all__ = ["Config", "main", "teacher_pairs"]


def main(config: Config) -> Path:
    """Distil and return the folder of the finished student."""
    check(config)
    return distil_texts(config) if config.prompts else distil_images(config)


def distil_images(config: Config) -> Path:
    """Distil a teacher of images, of classes or of nothing in particular."""
    teacher = teacher_of_images(config)
    initial = initial_weights(config, teacher)
    data = student_data(config, teacher)
    check_evaluation(config, data)
    found = None
    if not config.skip_teacher_check and checkpoint.newest(config.out / "checkpoints") is None:
        found = ask_teacher(config, teacher, data)
    config = settled(config, teacher, real=data is not None)
    torch.manual_seed(config.seed)
    student_net, *rest = build_networks(config, teacher)
    if initial is not None:
        initial.give(student_net)
    if config.dry_run:
        held = planned_networks(config, teacher.denoiser.network, student_net, *rest)
        config, said = unforeseen(config, smallest=smallest_pass(config.method), folders=folders_of(config))
        show_plan(config, held, planned_updates(config), before=plan_of_pairs(config), said=said)
        return config.out
    accelerator = start(config)
    known = teacher.identity()  # of whole weights
    cut(teacher.denoiser.network, config, accelerator)
    if isinstance(teacher.codec, Codec):
        teacher.codec.vae.to(accelerator.device)
    networks = (prepare(network, config, accelerator) for network in (student_net, *rest))
    method = build_method(config, teacher, *networks)
    make_batches = partial(
        student_batches, teacher=teacher, data=data, device=accelerator.device, num_ranks=accelerator.num_processes
    )
    config = settle_passes(config, method, teacher, accelerator, make_batches)
    batches = make_batches(config)

    def watch(student: Student) -> Watch:
        sampled = replace(teacher, denoiser=student.denoiser, times=student.times)
        with accelerator.autocast():
            save = partial(keep, student, teacher, accelerator.is_main_process)
            return watcher(config, sampled, data, teacher=teacher, save=save)

    with accelerator.autocast():
        method.check(batches(Rng(config.seed, 0)))
    begun_from = None if initial is None else initial.identity()
    inputs = {"data": "none" if data is None else data.identity(), "teacher": known, "init_from": begun_from}
    stages = Stages(
        config=config, method=method, teacher=teacher, accelerator=accelerator, batches=batches,
        own=identity(config, accelerator, inputs),
    )  # fmt: skip
    if found is not None and found.samples and accelerator.is_main_process:
        config.out.mkdir(parents=True, exist_ok=True)
        draw_check(teacher, found, config.out / PICTURE)
    columns = min(10, max(1, teacher.num_classes))
    student = distil(stages, columns=columns, preview=lambda student: preview(student, teacher), watch=watch)
    if accelerator.is_main_process:
        save_result(config, student, teacher)
    return config.out / "student"


def save_result(config: Config, student: Student, teacher: Teacher) -> None:
    """Write the student, as a pipeline where its teacher is one of latents, and the page of the run."""
    folder = config.out / "student"
    with working("saving the student"):
        if teacher.codec is not None and teacher.source is not None:
            export_student(student, teacher.source, folder, base_model=config.teacher)
        else:
            save_student(student, folder, teacher.facts)
    print(f"student: {folder}")
    add_page(config.out)


def keep(student: Student, teacher: Teacher, writes: bool, to: Path) -> None:
    """Write the best student so far; under ``--shard`` every rank calls it, for its pieces."""
    found = replace(student, denoiser=whole_denoiser(student.denoiser))
    if writes:
        save_student(found, to, teacher.facts)


def teacher_of_images(config: Config) -> Teacher:
    """Return the teacher. Raises ``ValueError`` for a student, a model of prompts, and guidance it cannot have."""
    with working("loading the teacher"):
        teacher = load_teacher(
            config.teacher, config.network, allow_pickle=config.allow_pickle, variant=config.variant
        )
    if teacher.times:
        raise ValueError(
            f"--teacher {config.teacher} is a student, which knows no other noise level. Pass its teacher."
        )
    if teacher.texts is not None:
        raise ValueError(f"--teacher {config.teacher} draws prompts: pass --prompts.")
    teacher.guided(config.guidance)
    if teacher.codec is not None:
        check_of_latents(config, teacher)
    return teacher


def check_of_latents(config: Config, teacher: Teacher) -> None:
    """Raise ``ValueError`` for what a teacher of classes in latents (DiT) cannot do; its student is a pipeline."""
    if teacher.source is None:
        raise ValueError(f"--teacher {config.teacher} works on latents, but is no pipeline of diffusers.")
    if config.data is not None:
        raise ValueError(
            f"--teacher {config.teacher} works on latents, and images for it are not encoded. Leave out --data; "
            "for a GAN term pass --reals teacher."
        )
    copied_parts(teacher.source, config.variant or None)
    student = Student(teacher.denoiser, student_times(config, teacher.denoiser.schedule, latent=True))
    scheduler_for(student, read_json(teacher.source / "scheduler" / "scheduler_config.json"))


def ask_teacher(config: Config, teacher: Teacher, data: ImageSet | None) -> Diagnosis:
    """Check the teacher on a few images of the data, or on its own. Raises ``ValueError`` for one that fails."""
    number, generator = num_checked(teacher.shape), torch.Generator().manual_seed(0)
    x0, labels = None, torch.arange(number) % max(1, teacher.num_classes)
    if data is not None:
        batch = data.batch(torch.randperm(len(data), generator=generator)[:number], generator)
        x0, labels = batch.images, batch.labels
    null = teacher.cond(torch.tensor([teacher.num_classes])) if config.guidance != 1 else None
    bounded = teacher.codec is None
    return check_teacher(teacher, x0, labels, null=null, bounded=bounded, batch_size=images_per_pass(config))


def preview(student: Student, teacher: Teacher, rows: int = 4) -> torch.Tensor:
    """Return a few samples of the first ten classes, always from the same noise."""
    labels = torch.arange(min(10, max(1, teacher.num_classes))).repeat(rows)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(labels), *teacher.shape, generator=generator).to(teacher.device)
    x0 = student.sample(noise, teacher.cond(labels.to(teacher.device)), generator=generator)
    return teacher.decode(x0)
