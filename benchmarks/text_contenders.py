"""Contenders of a text-to-image DMD2 training: three copies of the teacher's weights, or a shared backbone.

All contenders start from the same weights and draw the same numbers, so that their losses can be compared.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from teachers import build, meta_cond
from torch import Generator, Tensor, nn
from torch.optim import AdamW, Optimizer

from distill.dmd import DMD
from distill.student import Student
from scorefield.denoiser import Cond, Denoiser, NetworkDenoiser, expand_cond, freeze
from scorefield.guidance import guided
from scorefield.models.lora import LoRA, recompute_activations, shared_backbone
from scorefield.models.networks import DiffusersNetwork
from scorefield.schedule import Images, Kind, PerSample, Schedule, VariancePreserving
from scorefield.training.loop import Report, train
from toyworld.parts import LENGTH, make_unet

COPIES, SHARED, TWO_CALLS = "three copies", "shared backbone", "shared backbone, two calls"
NAMES = (COPIES, SHARED, TWO_CALLS)
COMPILED = (f"{COPIES}, compiled", f"{SHARED}, compiled")
LEARNING_RATE, CLIP_NORM = 1e-5, 10.0


@dataclass(frozen=True)
class Shape:
    """Size of a teacher: config file of its network, usual LoRA rank, tokens of a prompt, what it predicts."""

    file: str
    rank: int
    tokens: int
    kind: Kind


SHAPES = {
    "toy": Shape("", 8, LENGTH, "v"),
    "sd15": Shape("sd15_unet", 64, 77, "eps"),
    "sdxl": Shape("sdxl_unet", 64, 77, "eps"),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Options that all contenders of one comparison share."""

    shape: Literal["toy", "sd15", "sdxl"] = "toy"
    """Size of the teacher: the toy world's, Stable Diffusion 1.5 at 512 px, SDXL at 1024 px."""
    configs: Path | None = None
    """Folder of JSON files with the constructor arguments of the networks. The toy world's needs none."""
    rank: int | None = None
    """Rank of both adapters. By default 8 for the toy world, 64 for the others."""
    precision: Literal["no", "bf16"] = "no"
    """bf16 applies to frozen weights and to autocast. Trained weights are float32."""
    batch: int = 4
    """Images per iteration."""
    guidance: float = 3.0
    """Scale of the teacher's guidance."""
    student_every: int = 5
    """Iterations per cycle: fake-score updates per student update."""
    gradient_checkpointing: bool = False
    """Recompute activations of student and fake score in the backward pass, in all contenders."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the cycles run."""


@dataclass(frozen=True, eq=False)
class TwoCalls:
    """Classifier-free guidance as many trainers implement it: one network call per condition."""

    denoiser: Denoiser
    scale: float
    negative: Cond

    @property
    def schedule(self) -> Schedule:
        """The denoiser's schedule."""
        return self.denoiser.schedule

    def __call__(self, x_t: Images, t: PerSample, cond: Cond) -> Tensor:
        """Return the guided clean image."""
        neg = self.denoiser(x_t, t, expand_cond(self.negative, len(x_t)))
        return neg + self.scale * (self.denoiser(x_t, t, cond) - neg)


def rank_of(case: Case) -> int:
    """Return the rank of the adapters: as given, or the usual one of the shape."""
    return SHAPES[case.shape].rank if case.rank is None else case.rank


def make_network(case: Case, device: torch.device) -> Any:
    """Return the teacher's network with random weights, the same at each call; on the meta device without data."""
    if case.configs is not None and SHAPES[case.shape].file:
        network = build(case.configs, SHAPES[case.shape].file)
    else:
        with torch.device("meta"):
            network = make_unet()
    if device.type != "meta":
        torch.manual_seed(0)
        for module in network.to_empty(device=device).modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return network


def make_teacher(case: Case, device: torch.device, dtype: torch.dtype | None = None) -> NetworkDenoiser:
    """Return the frozen teacher, in ``dtype`` or that of ``--precision``."""
    usual = torch.bfloat16 if case.precision == "bf16" else torch.float32
    network = freeze(DiffusersNetwork(make_network(case, device)), dtype or usual)
    return NetworkDenoiser(network, VariancePreserving.scaled_linear(), SHAPES[case.shape].kind)


def make_student_and_fake(
    case: Case, name: str, teacher: NetworkDenoiser
) -> tuple[NetworkDenoiser, NetworkDenoiser]:
    """Return student and fake score of a contender; both start as the teacher."""
    if name.startswith(SHARED):
        return shared_backbone(
            teacher, rank=rank_of(case), checkpointing=case.gradient_checkpointing,
            generator=Generator().manual_seed(0),
        )  # fmt: skip
    dtype = torch.promote_types(next(teacher.network.parameters()).dtype, torch.float32)
    copies = [copy.deepcopy(teacher.network).to(dtype).requires_grad_(True) for _ in range(2)]
    for network in copies if case.gradient_checkpointing else ():
        recompute_activations(network)
    return replace(teacher, network=copies[0]), replace(teacher, network=copies[1])


def start(
    case: Case, name: str, accelerator: Accelerator, dtype: torch.dtype | None = None
) -> tuple[Iterator[Report], list[nn.Module]]:
    """Return the contender's training at its first iteration, and its networks."""
    device = torch.device(case.device)
    teacher = make_teacher(case, device, dtype)
    student, fake = make_student_and_fake(case, name, teacher)
    if name in COMPILED:
        for network in (teacher.network, student.network, fake.network):
            (network.backbone if isinstance(network, LoRA) else network).compile()
    model: Any = teacher.network.model
    shape = (model.config.in_channels, model.config.sample_size, model.config.sample_size)
    generator = Generator().manual_seed(1)
    negative, cond = (random_cond(case, model.config, batch, generator) for batch in (1, case.batch))
    guide = TwoCalls if name == TWO_CALLS else guided
    method = DMD(
        teacher=guide(teacher, case.guidance, negative), student=Student(student, (teacher.schedule.t_max,)),
        fake=fake, shape=shape, student_every=case.student_every,
    )  # fmt: skip
    phases = method.phases(*(adamw(one.network) for one in (student, fake)))
    running = train(
        phases, lambda rng: {"cond": cond}, accelerator, rollout=method.rollout, steps=10**9, clip_norm=CLIP_NORM
    )
    return running, [denoiser.network for denoiser in (teacher, student, fake)]


def random_cond(case: Case, settings: Any, batch: int, generator: Generator) -> dict[str, Tensor]:
    """Return random numbers in place of encoded prompts."""
    return {
        name: torch.randn(batch, *value.shape[1:], generator=generator).to(case.device)
        for name, value in meta_cond(settings, SHAPES[case.shape].tokens).items()
    }


def adamw(network: nn.Module) -> Optimizer:
    """Return AdamW for the network's trainable parameters."""
    learned = [p for p in network.parameters() if p.requires_grad]
    return AdamW(learned, LEARNING_RATE, fused=not learned[0].is_meta)


# Bytes.


def tensors_of(networks: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> list[Tensor]:
    """Return all distinct parameters, gradients and optimiser states, including the backbones of LoRAs."""
    loras = [part for network in networks for part in network.modules() if isinstance(part, LoRA)]
    modules = [*networks, *(adapted.backbone for adapted in loras)]
    parameters = list({id(p): p for module in modules for p in module.parameters()}.values())
    gradients = [p.grad for p in parameters if p.grad is not None]
    state = [value for optimizer in optimizers for own in optimizer.state.values() for value in own.values()]
    return [*parameters, *gradients, *(value for value in state if torch.is_tensor(value))]


def bytes_of(networks: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> int:
    """Return the bytes of :func:`tensors_of`, each tensor once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(networks, optimizers))


def after_one_update(*networks: nn.Module) -> list[Optimizer]:
    """Return optimisers of the networks' trainable parameters after one step; the gradients are kept."""
    optimizers = [adamw(network) for network in networks]
    for optimizer in optimizers:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return optimizers


def count_bytes(case: Case) -> dict[str, int]:
    """Return bytes of parameters, gradients and optimiser state after one update of student and fake score."""
    counted = {}
    for name in (COPIES, SHARED):
        teacher = make_teacher(case, torch.device("meta"))
        learning = [denoiser.network for denoiser in make_student_and_fake(case, name, teacher)]
        counted[name] = bytes_of([teacher.network, *learning], after_one_update(*learning))
    return counted
