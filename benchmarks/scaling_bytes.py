"""What fits on which card: bytes of distillations and adapters at public sizes, counted on the meta device.

    python benchmarks/scaling_bytes.py                # print the tables; some minutes of a CPU
    python benchmarks/scaling_bytes.py --write        # and put them into docs/scaling.md

Weights, gradients and optimiser states are counted of whole networks. Activations are those of one update at batch
1 in bf16 with gradient checkpointing, as a GPU's autocast has them: of UNets counted whole, of transformers, whose
blocks are alike, at two and three blocks of each kind and continued to all (``--whole`` counts all; that takes
long). Nothing of it was run at these sizes.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import tyro
from families_bytes import MODELS, Model, build

from controlnet.adapter import copy_encoder
from controlnet.transformers import Shared, TransformerCopy
from distill.options import Config
from distill.parts import build_text_networks
from distill.passes import predicted_passes
from scorefield.choices import Quantize
from scorefield.denoiser import NetworkDenoiser, freeze
from scorefield.models.lora import recompute_activations
from scorefield.models.networks import DiffusersNetwork, Tokens
from scorefield.models.teacher import Listed, Teacher
from scorefield.schedule import RectifiedFlow
from scorefield.training.memory import Activations, Role, most_bytes, role_of
from scorefield.training.sharding import blocks

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
RANK, GIB = 64, 2**30
CARDS = (8, 16, 24, 48, 80)
"""Memory of cards in GB as they are sold, which are GiB of torch's."""
SPARE = 1.0
"""GiB of a card that this counts as taken: the device's context, workspaces, what the allocator loses. A guess."""


@dataclass(frozen=True)
class Size:
    """What a model is asked about.

    Attributes:
        latents: (c, h, w), or (c, f, h, w) of a video.
        cond: shapes of its conditions, without the batch; of integers where the name begins with "mask".
        depths: settings of its class that count blocks of one kind; none: it is counted whole.
        bar: GiB that NF4, two LoRAs, their states and activations are to fit into; 0: none was set.
        guided: classifier-free guidance asks the teacher about twice the batch.
    """

    latents: tuple[int, ...]
    cond: Mapping[str, tuple[int, ...]]
    depths: tuple[str, ...] = ()
    bar: float = 0.0
    guided: bool = True


SIZES = {
    "Stable Diffusion 1.5": Size((4, 64, 64), {"encoder_hidden_states": (77, 768)}),
    "SDXL": Size(
        (4, 128, 128), {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)}, bar=9
    ),
    "Stable Diffusion 3 medium": Size(
        (16, 128, 128), {"encoder_hidden_states": (333, 4096), "pooled_projections": (2048,)}, ("num_layers",)
    ),
    "Z-Image": Size((16, 128, 128), {"texts": (512, 2560), "mask": (512,)}, ("n_layers",)),
    "FLUX.1-dev": Size(
        (16, 128, 128), {"encoder_hidden_states": (512, 4096), "pooled_projections": (768,), "guidance": ()},
        ("num_layers", "num_single_layers"), 22, guided=False,
    ),
    "Qwen-Image": Size((16, 128, 128), {"encoder_hidden_states": (512, 3584)}, ("num_layers",), 24),
    "Wan 2.1 14B": Size((16, 21, 60, 104), {"encoder_hidden_states": (512, 4096)}, ("num_layers",)),
}  # fmt: skip
"""Stable Diffusion 1.5 at 512 pixels, Wan at 81 frames of 480 x 832, the others at 1024."""


@dataclass(frozen=True)
class Counted:
    """Bytes of one training.

    Attributes:
        roles: by name; frozen weights are those of "teacher".
        passes: activations by name.
    """

    roles: Mapping[str, Role]
    passes: Mapping[str, Activations]

    def part(self, name: str) -> int:
        """Return one of weights, gradients and states, of all roles that learn."""
        return sum(getattr(role, name) for key, role in self.roles.items() if key != "teacher")

    @property
    def most(self) -> int:
        """Bytes of the activations, with the largest rounded layer, which is unpacked while it is used."""
        layer = max(role.unpacked for role in self.roles.values())
        return layer + max((found.most for found in self.passes.values()), default=0)

    @property
    def kept(self) -> int:
        """Bytes that autograd keeps of the pass that keeps most."""
        return max(found.kept for found in self.passes.values())

    def bytes(self, *, offload: bool = False) -> int:
        """Return all on one card; see ``memory.most_bytes``."""
        return most_bytes(self.roles, self.passes, offload=offload)


def settings_of(options: "Options", **changes: Any) -> Config:
    """Return the options of a distillation by matching alone: without GAN term, regression and average."""
    own = {"batch_size": 1, "gan_weight": 0.0, "regression_weight": 0.0, "warmup_steps": 0, "ema_decay": 0.0}
    return Config(
        prompts="-", lora_rank=options.rank, precision="bf16", gradient_checkpointing=True, **{**own, **changes}
    )


def teacher_of(model: Model, size: Size) -> Teacher:
    """Return a teacher on the meta device, frozen in bf16, that was asked one prompt."""
    family, network = build(model)
    freeze(network, torch.bfloat16)
    tokens = Tokens(family.blocks) if family.blocks else None
    wrapped = freeze(DiffusersNetwork(network, family.call, tokens, family.lora, family.control))
    cond = {
        name: torch.ones(1, *shape, dtype=torch.long if name == "mask" else torch.float32)
        for name, shape in size.cond.items()
    }
    denoiser = NetworkDenoiser(wrapped, RectifiedFlow(), "flow", 1000.0)
    listed = Listed(("",), cond, cond)
    embedded = None if size.guided else 3.5
    return Teacher(denoiser, size.latents, num_classes=1, listed=listed, embedded=embedded)


def text_networks_of(config: Config, teacher: Teacher) -> tuple[torch.nn.Module, ...]:
    """Return student and fake score on the meta device, with checkpointing."""
    roles = build_text_networks(config, teacher, ("", None))
    for role in () if config.lora else roles:
        recompute_activations(role)
    return roles


def held(
    teacher: Teacher, networks: Mapping[str, torch.nn.Module], how: Quantize, optimizer: str
) -> dict[str, Role]:  # fmt: skip
    """Return the bytes of all roles."""
    learned = {name: role_of(network, optimizer) for name, network in networks.items()}
    return {"teacher": role_of(teacher.denoiser.network, how=how), **learned}


def distilled(model: Model, config: Config) -> dict[str, Activations]:
    """Return the activations of a distillation."""
    teacher = teacher_of(model, SIZES[model.name])
    return predicted_passes(config, teacher, *text_networks_of(config, teacher), gpu=True)


def adapter_of(teacher: Teacher) -> Any:
    """Return the ControlNet of a teacher, on the meta device."""
    network: Any = teacher.denoiser.network
    if network.control is None:
        return copy_encoder(teacher.denoiser)
    codec: Any = None
    model = network.control.make(network.model)
    return TransformerCopy(model.requires_grad_(True).train(), network.control, Shared(codec, network.model))


def continued(model: Model, config: Config, whole: bool) -> dict[str, Activations]:
    """Return the activations of a distillation, continued from few blocks to all of them unless ``whole``."""
    depths = SIZES[model.name].depths
    if whole or not depths:
        return distilled(model, config)
    full = build(model)[1].config
    few = dict.fromkeys(depths, 2)

    def at(**changes: int) -> dict[str, Activations]:
        return distilled(replace(model, settings={**model.settings, **few, **changes}), config)

    start = at()
    total = {name: [one.kept, one.most] for name, one in start.items()}
    for depth in depths:
        for name, one in at(**{depth: 3}).items():
            more = full[depth] - 2
            total[name][0] += more * (one.kept - start[name].kept)
            total[name][1] += more * (one.most - start[name].most)
    return {name: Activations(*both) for name, both in total.items()}


@dataclass(frozen=True)
class Options:
    """Count what trainings hold at public sizes."""

    write: bool = False
    """Put the tables into docs/scaling.md."""
    whole: bool = False
    """Count the activations of transformers at full depth."""
    rank: int = RANK
    """Of the LoRAs."""


@cache
def count(name: str, method: str, how: Quantize, optimizer: str, options: Options) -> Counted:
    """Return the bytes of a method, with a teacher that is rounded so: "lora", "copies" or "controlnet".

    Of the last two without activations.
    """
    teacher, networks = networks_of(name, method, options)
    return Counted(held(teacher, networks, how, optimizer), passes_of(name, options) if method == "lora" else {})


@cache
def networks_of(name: str, method: str, options: Options) -> tuple[Teacher, dict[str, torch.nn.Module]]:
    """Return the teacher and what learns beside it, on the meta device."""
    model = next(one for one in MODELS if one.name == name)
    teacher = teacher_of(model, SIZES[name])
    if method == "controlnet":
        return teacher, {"adapter": adapter_of(teacher)}
    roles = text_networks_of(settings_of(options, lora=method == "lora"), teacher)
    return teacher, dict(zip(("student", "fake"), roles, strict=True))


@cache
def passes_of(name: str, options: Options) -> dict[str, Activations]:
    """Return the activations of a distillation by LoRAs, which neither rounding nor optimiser change."""
    model = next(one for one in MODELS if one.name == name)
    return continued(model, settings_of(options, lora=True, guidance=3.5), options.whole)


TERMS = ("SDXL", "Z-Image", "FLUX.1-dev", "Qwen-Image", "Wan 2.1 14B")
"""Models of the first table."""


def terms(options: Options, names: tuple[str, ...] = TERMS) -> str:
    """Return the table of an NF4 base with two LoRAs, term by term."""
    head = [
        "GiB", "base, NF4", "LoRAs", "gradients", "AdamW", "kept for the way back", "activations at most", "all",
        "all, 8-bit AdamW", "all, `--offload`", "bar",
    ]  # fmt: skip
    rows = []
    for name in names:
        plain, small = (count(name, "lora", "nf4", kind, options) for kind in ("adamw", "adamw8bit"))
        sums = plain.bytes(), small.bytes(), plain.bytes(offload=True)
        parts = [plain.roles["teacher"].weights, *map(plain.part, ("weights", "gradients", "states"))]
        cells = [gib(x) for x in (*parts, plain.kept, plain.most, *sums)]
        rows.append([name, *cells, beside_bar(*sums, bar=SIZES[name].bar)])
    return markdown(head, rows)


def beside_bar(plain: int, small: int, offloaded: int, *, bar: float) -> str:
    """Return the bar, and whether it is kept."""
    if not bar or plain <= bar * GIB:
        return f"{bar:g}: kept" if bar else "-"
    ways = {"8-bit AdamW": small, "`--offload`": offloaded}
    kept = " or ".join(way for way, size in ways.items() if size <= bar * GIB)
    return f"{bar:g}: **missed**" + (f", kept with {kept}" if kept else "")


METHODS: tuple[tuple[str, str, Quantize], ...] = (
    ("LoRA, NF4", "lora", "nf4"), ("LoRA, int8", "lora", "int8"), ("LoRA, bf16", "lora", "no"),
    ("ControlNet, NF4 \\*", "controlnet", "nf4"), ("ControlNet, bf16 \\*", "controlnet", "no"),
    ("three copies, bf16 teacher \\*", "copies", "no"),
)  # fmt: skip
"""Columns, with a star where activations are not in them."""

NUMBERS = (8, 64)
"""Cards that hold three copies together."""


def fits(options: Options) -> str:
    """Return the table of the smallest card for each model and method, and what it holds there."""
    rows = []
    for name in SIZES:
        cells = []
        for _, method, how in METHODS:
            if method == "controlnet" and not has_adapter(name):
                cells.append("-")
                continue
            plain, small = (count(name, method, how, kind, options).bytes() for kind in ("adamw", "adamw8bit"))
            cells.append(f"{gib(plain)} / {gib(small)}: {card(plain)} / {card(small)}")
        rows.append([name, *cells])
    return markdown(["GiB with AdamW / 8-bit AdamW: card", *(label for label, *_ in METHODS)], rows)


def largest_block(network: torch.nn.Module) -> int:
    """Return the most weights that a network in pieces gathers at a time."""
    taken, sizes = set[int](), list[int]()
    for block in [*blocks(network), network]:
        own = [weight for weight in block.parameters() if id(weight) not in taken]
        taken.update(map(id, own))
        sizes.append(sum(weight.numel() for weight in own))
    return max(sizes)


def in_pieces(name: str, number: int, options: Options) -> int:
    """Return the bytes of a rank where three copies are cut into ``number`` pieces, without activations.

    Beside its share it gathers, in bf16, the block that computes and the next one, and the first one's gradient is
    whole, in float32, until it is reduced.
    """
    shared = count(name, "copies", "no", "adamw", options).bytes() // number
    teacher, networks = networks_of(name, "copies", options)
    largest = max(map(largest_block, (teacher.denoiser.network, *networks.values())))
    return shared + (2 + 2 + 4) * largest


def pieces(options: Options) -> str:
    """Return the table of three copies on 8 and on 64 cards, and the smallest card of each."""
    rows = []
    for name in SIZES:
        found = (in_pieces(name, number, options) for number in NUMBERS)
        rows.append([name, *(f"{gib(size)}: {card(size)}" for size in found)])
    return markdown(["GiB a card: card", *(f"{number} cards" for number in NUMBERS)], rows)


def has_adapter(name: str) -> bool:
    """Return whether there is a ControlNet for a model."""
    family, network = build(next(one for one in MODELS if one.name == name))
    return family.control is not None or hasattr(network, "down_blocks")


def card(size: int) -> str:
    """Return the smallest card with room to spare."""
    return next((f"{gb}" for gb in CARDS if size / GIB + SPARE <= gb), "none")


def gib(size: int) -> str:
    return f"{size / GIB:.1f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


MARKS = {
    "terms": ("<!-- terms: python benchmarks/scaling_bytes.py --write -->\n", "\n<!-- end of terms -->"),
    "fits": ("<!-- fits: python benchmarks/scaling_bytes.py --write -->\n", "\n<!-- end of fits -->"),
    "pieces": ("<!-- pieces: python benchmarks/scaling_bytes.py --write -->\n", "\n<!-- end of pieces -->"),
}


def write(name: str, text: str) -> None:
    """Put a table between its marks in docs/scaling.md."""
    (begin, end), page = MARKS[name], PAGE.read_text()
    before, _, rest = page.partition(begin)
    PAGE.write_text(before + begin + text + end + rest.partition(end)[2])


def main(options: Options) -> None:
    """Print the tables, and write them into docs/scaling.md if asked to."""
    for name, make in (("terms", terms), ("fits", fits), ("pieces", pieces)):
        text = make(options)
        print(text + "\n", flush=True)
        if options.write:
            write(name, text)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, args=sys.argv[1:]))
