"""The networks of the scripts, and teachers from anywhere: our folders, diffusers' folders, a user's function."""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from command import fingerprint
from diffusers import UNet2DModel
from torch import Tensor, nn
from unet import UNet
from user_code import call, code_of

from distill.student import TIMES
from scorefield import Cond, Denoiser, KarrasPreconditioning, NetworkDenoiser, guided
from scorefield.data_scale import RescaledData
from scorefield.files import load_json, read_json
from scorefield.models.network import ResidualMLP
from scorefield.models.preflight import check_last_time, check_many_steps
from scorefield.models.pretrained import PartReader, read_schedule
from scorefield.models.storage import WEIGHTS, describe_schedule, load_denoiser, read_facts
from scorefield.models.weights import check_fit


class Probed(Protocol):
    """What a teacher of classes and one of prompts have in common: see :class:`Teacher`."""

    @property
    def denoiser(self) -> NetworkDenoiser:
        """Network, schedule and prediction kind."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of x0."""

    def cond(self, labels: Tensor) -> Cond:
        """The condition of labels."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """A frozen denoiser and what one has to know to sample it or to distil it.

    Attributes:
        denoiser: network, schedule and prediction kind.
        shape: (c, h, w) of an image.
        num_classes: label ``num_classes`` is the null class; 0 means that the network takes no labels.
        facts: how :func:`build_network` makes another network like it; JSON-able, saved beside every student. The
            function of a user has to say nothing here, or sigma_data, the spread of the images in [-1, 1] if its
            network has the preconditioning of EDM in itself.
        times: conditioning times, for a student; empty for a teacher.
        null_class: whether label ``num_classes`` was trained to mean no label, which guidance needs.
    """

    denoiser: NetworkDenoiser
    shape: tuple[int, int, int]
    num_classes: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    times: tuple[float, ...] = ()
    null_class: bool = True
    shift: ClassVar[float] = 1.0
    """Of the noise levels of a sampling grid."""

    def guided(self, scale: float) -> Denoiser:
        """The denoiser under classifier-free guidance, 1 for none. Raises ``ValueError`` without a null class."""
        if scale == 1:
            return self.denoiser
        if not self.num_classes or not self.null_class or self.times:
            why = "a student has it built in" if self.times else "this teacher was not trained without labels"
            raise ValueError(f"--guidance must be 1 here, since {why}; got {scale}.")
        return guided(self.denoiser, scale, self.cond(torch.tensor([self.num_classes])))

    def identity(self) -> str:
        """A hash of weights and meaning: two teachers of one identity give the same answers."""
        # The same weights in other code are another teacher: a wrapper that is mended wants no pairs of the old.
        code = [self.facts["code"]] if "code" in self.facts else []
        return identity_of(self.denoiser, list(self.shape), self.num_classes, self.null_class, *code)

    def cond(self, labels: Tensor) -> dict[str, Tensor]:
        """The condition under which the network is asked for these labels."""
        return {"class_labels": labels} if self.num_classes else {}

    def decode(self, x0: Tensor) -> Tensor:
        """x0 to images: it works on pixels."""
        return x0


def identity_of(denoiser: NetworkDenoiser, *facts: Any) -> str:
    """A hash of a denoiser's weights, of what they mean, and of JSON-able ``facts`` beside them."""
    state = denoiser.network.state_dict().values()
    meaning = [describe_schedule(denoiser.schedule), denoiser.kind, denoiser.time_scale, *facts]
    words = torch.frombuffer(bytearray(json.dumps(meaning).encode()), dtype=torch.uint8)
    return fingerprint([words, *(tensor for tensor in state if isinstance(tensor, Tensor))])


def build_network(facts: Mapping[str, Any], num_steps: int = 0) -> nn.Module:
    """The network that ``facts`` of a saved teacher or student describe, with fresh weights.

    ``num_steps`` lets an MLP be told the step of a few-step student. Raises ``ValueError`` for facts that describe
    no network, one so large that building it would not end, or one that a function of a user builds.
    """
    options = facts.get("options", {})
    if not isinstance(options, dict):
        raise ValueError(f"a network's options must be a dictionary; got {options!r}.")
    for name, value in options.items():
        most = 1000 if name in ("depth", "layers", "layers_per_block") else 65536
        if any(isinstance(size, int) and size > most for size in (value if isinstance(value, list) else [value])):
            raise ValueError(f"a network's {name} must be at most {most}; got {value}.")
    try:
        return _build(facts, num_steps)
    except (TypeError, KeyError, AttributeError, IndexError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"no network can be built of {dict(facts)}: {error!r}") from error


def _build(facts: Mapping[str, Any], num_steps: int) -> nn.Module:
    family, options = facts.get("network"), dict(facts.get("options", {}))
    network: nn.Module
    if family == "mlp":
        network = ResidualMLP(tuple(facts["shape"]), facts["num_classes"], num_steps=num_steps, **options)
    elif family == "unet":
        network = UNet(tuple(facts["shape"]), facts["num_classes"], **options)
    elif family == "diffusers":
        network = UNet2DModel.from_config(options)
    elif family == "function":
        raise ValueError(f"a user's function builds this network ({str(options.get('name'))[:80]!r}).")
    else:
        raise ValueError(f"the saved denoiser does not say how its network is built; got network={family!r}.")
    sigma_data = facts.get("sigma_data")
    return network if sigma_data is None else KarrasPreconditioning(network, check_sigma_data(sigma_data))


def another_network(teacher: Teacher, num_steps: int = 0) -> nn.Module:
    """A second network like a loaded teacher's, such as the fake score's: a copy where no facts describe it."""
    if teacher.facts.get("network") == "function":
        return copy.deepcopy(teacher.denoiser.network)
    return build_network(teacher.facts, num_steps)


def load_teacher(name: str, network: str = "", *, allow_pickle: bool = False, variant: str = "") -> Teacher:
    """A teacher or student by name: a folder of our scripts, a folder of diffusers, or ``module:function``.

    Args:
        name: module:function runs that code. Nothing that a folder holds is run or names what is.
        network: for the student of a module:function, the module:function that builds its network.
        allow_pickle: read the pickles of a model of diffusers, where there are no safetensors.
        variant: of a diffusers model's weights, such as "fp16".

    Raises:
        ValueError: anything else, a folder that needs ``network``, or one that has no use for an option.
    """
    folder = Path(name)
    diffusers = (folder / "unet" / "config.json").is_file() or _is_diffusers(folder / "config.json")
    if not diffusers and (allow_pickle or variant):
        raise ValueError(f"--allow-pickle and --variant are for models of diffusers. Leave them out for {name}.")
    if not folder.exists() and ":" in name:
        _check_unused(network, name)
        return from_function(name)
    if diffusers:
        _check_unused(network, name)
        reader = PartReader(torch.float32, torch.device("cpu"), allow_pickle, variant or None)
        return from_diffusers(folder, reader)
    for inner in ("teacher", "student"):
        if (folder / inner / "denoiser.json").is_file():
            raise ValueError(f"{folder} is the folder of a run; its result is {folder / inner}. Pass that.")
    facts = read_facts(folder)
    missing = sorted({"shape", "num_classes", "network"} - facts.keys())
    if missing:
        raise ValueError(f"{folder} does not say its {', '.join(missing)}; was it written by train_teacher.py?")
    denoiser = load_denoiser(folder, _network_of(folder, facts, network))
    times, null_class = tuple(facts.get(TIMES, ())), bool(facts.get("null_class", True))
    return Teacher(denoiser, tuple(facts["shape"]), facts["num_classes"], facts, times, null_class)


def _check_unused(network: str, name: str) -> None:
    if network:
        raise ValueError(f"--network is for students of a module:function; {name} says how its network is built.")


def _network_of(folder: Path, facts: Mapping[str, Any], network: str) -> nn.Module:
    if facts["network"] != "function":
        _check_unused(network, str(folder))
        # Facts and weights may come from anywhere. A network that would fill the memory costs none on "meta".
        with torch.device("meta"):
            planned = build_network(facts)
        check_fit(folder / WEIGHTS, planned)
        return build_network(facts)
    if network:
        return own_network(network)
    # A folder may come from anywhere. Its word for the function is repeated here, and never imported.
    options = facts.get("options")
    hint = str(options.get("name") if isinstance(options, dict) else None)[:80]
    raise ValueError(
        f"{folder} holds the weights of a network that its owner's code builds; it names {hint!r}, and what a "
        "folder names is not run. If you have that code and trust it, pass --network module:function: a function "
        "that returns the network, or the teacher, with weights of any kind."
    )


def _is_diffusers(config: Path) -> bool:
    try:
        return "_class_name" in load_json(config)
    except (OSError, ValueError, TypeError):
        return False


LISTENS = "the GAN term listens to activations (b, c) or (b, c, h, w)"


def find_bottleneck(network: nn.Module, name: str | None) -> str:
    """Name of the submodule a critic reads: ``name``, the network's own choice, or its mid_block.

    Raises ``ValueError`` where there is no such submodule, or none is known and none is named: a transformer has
    none.
    """
    modules = dict(network.named_modules())
    if name is None:
        owners = [(prefix, module) for prefix, module in modules.items() if hasattr(module, "bottleneck")]
        known = [f"{prefix}.{module.bottleneck}".lstrip(".") for prefix, module in owners]
        name = next(iter([*known, *(key for key in modules if key.split(".")[-1] == "mid_block")]), None)
    if name is None and any(key.split(".")[-1] == "transformer_blocks" for key in modules):
        raise ValueError(
            f"{LISTENS}, such as a UNet's mid_block has; a transformer has none. Pass --gan-weight 0."
        )
    if name is None or name not in modules:
        raise ValueError(
            f"the GAN term needs a submodule to listen to; got --bottleneck {name}. The network has "
            f"{', '.join(list(modules)[1:8])}, ... Or pass --gan-weight 0."
        )
    return name


def probe_bottleneck(teacher: "Probed", name: str | None) -> tuple[str, int, int]:
    """Name, channels and shorter side of the activations of :func:`find_bottleneck`; 1 means no space.

    Raises ``ValueError`` for those that no critic can read, such as a transformer's tokens.
    """
    network = teacher.denoiser.network
    name = find_bottleneck(network, name)
    kept: list[Tensor] = []
    hook = network.get_submodule(name).register_forward_hook(
        lambda module, inputs, output: kept.append(output if isinstance(output, Tensor) else output[0])
    )
    device = next(network.parameters()).device
    t = torch.full((1,), teacher.denoiser.schedule.t_max, device=device)
    labels = torch.zeros(1, dtype=torch.long, device=device)
    with torch.no_grad():
        teacher.denoiser(torch.zeros(1, *teacher.shape, device=device), t, teacher.cond(labels))
    hook.remove()
    found = tuple(kept[0].shape)
    if len(found) not in (2, 4):
        raise ValueError(f"{LISTENS}; those of --bottleneck {name} are {found}. Pass --gan-weight 0.")
    sides = found[2:]
    return name, found[1], max(min(sides), 2) if any(side > 1 for side in sides) else 1


def from_function(name: str) -> Teacher:
    """The :class:`Teacher` that ``module:function`` returns when it is called without arguments; runs that code.

    Its facts are replaced, except for sigma_data: with what is saved beside a student, ``name`` is only a hint.
    """
    teacher = call(name)
    if not isinstance(teacher, Teacher):
        raise ValueError(
            f"{name} must return a networks.Teacher(denoiser, shape, num_classes); got {type(teacher).__name__}."
        )
    facts = {
        "network": "function", "options": {"name": name}, "shape": list(teacher.shape),
        "num_classes": teacher.num_classes, "null_class": teacher.null_class, "code": code_of(name),
    }  # fmt: skip
    sigma_data = teacher.facts.get("sigma_data", preconditioned(teacher.denoiser.network))
    if sigma_data is not None:
        facts["sigma_data"] = check_sigma_data(sigma_data)
    return Teacher(teacher.denoiser, teacher.shape, teacher.num_classes, facts, null_class=teacher.null_class)


def own_network(name: str) -> nn.Module:
    """The network that the user's ``module:function`` builds: returned as such, in a denoiser, or in a teacher.

    Raises ``ValueError`` for a function that fails, or returns anything else.
    """
    built = call(name)
    built = built.denoiser if isinstance(built, Teacher) else built
    built = built.network if isinstance(built, NetworkDenoiser) else built
    if not isinstance(built, nn.Module):
        raise ValueError(
            f"--network {name} must return a network, a NetworkDenoiser or a networks.Teacher; got "
            f"{type(built).__name__}."
        )
    return built


def preconditioned(network: nn.Module) -> float | None:
    """sigma_data of the images in [-1, 1] if a network is under EDM's preconditioning, None if it is not."""
    if isinstance(network, RescaledData):
        inner = preconditioned(network.network)
        return None if inner is None else inner / network.scale
    return network.sigma_data if isinstance(network, KarrasPreconditioning) else None


def check_sigma_data(value: object) -> float:
    """``value`` as a number. Raises ``ValueError`` unless it is finite and above 0."""
    if not (isinstance(value, int | float) and 0 < value < math.inf):
        raise ValueError(f"sigma_data must be a number above 0; got {value!r}.")
    return float(value)


def from_diffusers(folder: Path, reader: PartReader) -> Teacher:
    """A ``UNet2DModel`` and its scheduler: a pipeline's folder, or a model's folder with the scheduler beside.

    Raises ``ValueError`` for weights that ``reader`` refuses, a learned variance, and a scheduler that is missing
    or that of a distilled model.
    """
    model = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler = next(
        (
            file
            for file in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
            if file.is_file()
        ),
        None,
    )
    if scheduler is None:
        raise ValueError(f"{folder} has no scheduler/scheduler_config.json, so its noise schedule is unknown.")
    settings = read_json(scheduler)
    check_many_steps(settings, folder)
    network: Any = reader.read(UNet2DModel, model)
    config = network.config
    if config.out_channels != config.in_channels:
        raise ValueError(
            f"{model} predicts {config.out_channels} channels of {config.in_channels}; split off its variance."
        )
    if config.class_embed_type is not None:
        raise ValueError(
            f"{model} embeds its classes as {config.class_embed_type!r}; expected class numbers (null). Wrap it "
            "in module:function."
        )
    try:
        schedule, kind = read_schedule(settings)
    except ValueError as error:
        raise ValueError(f"{scheduler}: {error} Or wrap the model in module:function.") from error
    check_last_time(schedule, kind, folder)
    size = config.sample_size if isinstance(config.sample_size, (tuple, list)) else (config.sample_size,) * 2
    shape = (config.in_channels, int(size[0]), int(size[1]))
    num_classes = int(config.num_class_embeds or 0)
    options = {name: value for name, value in config.items() if not name.startswith("_")}
    facts = {"network": "diffusers", "options": options, "shape": list(shape), "num_classes": num_classes}
    # Nothing in the folder says whether its last class stands for no label.
    facts["null_class"] = False
    return Teacher(NetworkDenoiser(network, schedule, kind), shape, num_classes, facts, null_class=False)
