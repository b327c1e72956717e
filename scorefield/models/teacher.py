"""A frozen diffusion model, from wherever it comes.

teacher = load_teacher("stable-diffusion-v1-5/stable-diffusion-v1-5", dtype=torch.bfloat16, device="cuda")
denoiser = guided(teacher.denoiser, 7.5, teacher.negative())
x0 = denoiser(x_t, t, teacher.prompts(["a red mug"]))  # latents; teacher.decode(x0) are pixels
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scorefield.cache import fingerprint
from scorefield.choices import Quantize
from scorefield.denoiser import Cond, Conditioned, Denoiser, NetworkDenoiser, freeze
from scorefield.guidance import Norm, guided
from scorefield.models.codec import Codec, Patches
from scorefield.models.components import readable, reading
from scorefield.models.networks import DiffusersNetwork, Tokens, check_sigma_data, preconditioned
from scorefield.models.pipeline import Pipeline, open_pipeline
from scorefield.models.places import FOLDERS, check_name, named_folder
from scorefield.models.preflight import check_device, check_dtype, check_last_time, check_many_steps, check_options
from scorefield.models.pretrained import PartReader, read_num_frames, read_student_times
from scorefield.models.prompts import LongPrompts, PromptEncoder, size_ids
from scorefield.models.quantize import stored
from scorefield.models.saved_network import network_of
from scorefield.models.storage import DESCRIPTION, TIMES, describe_schedule, load_denoiser, read_facts
from scorefield.models.user_code import call, code_of
from scorefield.progress import progress
from scorefield.randomness import Generators
from scorefield.schedule import Images
from scorefield.shipped import shipped

IN_MEMORY = 2**30
"""Bytes of encoded prompts up to which all are kept in memory; more are read from the disk."""

Texts = PromptEncoder | Callable[[Sequence[str]], Cond]
"""n prompts -> their conditions, batch n."""


@dataclass(frozen=True, eq=False)
class Listed:
    """Prompts that are numbered like classes.

    Attributes:
        prompts: all of them.
        conds: theirs, in the same order, on the CPU; empty where they are read from the cache on disk.
        negative: batch 1, what guidance moves away from.
    """

    prompts: tuple[str, ...]
    conds: Cond
    negative: Cond


@dataclass(frozen=True, eq=False)
class Teacher:
    """A frozen diffusion model with what turns images into its x0, and labels or prompts into its conditions.

    A student is one, too: it has ``times``.

    Attributes:
        denoiser: on latents, or on pixels if there is no codec.
        shape: (c, h, w) of x0, or (c, f, h, w) of videos.
        num_classes: of the network's labels, or of the prompts of :meth:`asked`; 0 means that it takes no labels.
        facts: how :func:`build_network` makes another network like it; JSON-able, saved beside every student. The
            function of a user has to say nothing here, or sigma_data, the spread of the images in [-1, 1] if its
            network has the preconditioning of EDM in itself.
        times: conditioning times of a student, noisiest first; empty for a teacher.
        null_class: whether label ``num_classes`` was trained to mean no label, which guidance needs.
        codec: pixels to x0 and back; None for models of pixels.
        texts: prompts to conditions; None for models without prompts.
        shift: of the noise levels of a sampling grid (SD3: 3); 1 is none. ``sampling.grid`` takes it.
        sized: the network is told the size of the image (SDXL).
        zero_negative: the empty negative prompt is zeros instead of the encoded empty string (SDXL).
        negatives: negative prompts to conditions, where they are encoded otherwise (Sana, Lumina 2).
        norm: how guidance keeps the length of predictions; see ``guidance.Norm``.
        embedded: the scale of guidance that the network is told where no other is asked for; None: none.
        fps: frames a second of its videos; 0: it draws images alone.
        source: the folder it was read from, if it was.
        listed: prompts whose numbers are its labels; see :meth:`asked`.
    """

    denoiser: NetworkDenoiser
    shape: tuple[int, ...]
    num_classes: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    times: tuple[float, ...] = ()
    null_class: bool = True
    codec: Codec | Patches | None = None
    texts: Texts | None = None
    shift: float = 1.0
    sized: bool = False
    zero_negative: bool = False
    source: Path | None = None
    listed: Listed | None = None
    negatives: Texts | None = None
    norm: Norm = "none"
    embedded: float | None = None
    fps: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        factor = self.codec.factor if self.codec else 1
        return self.shape[-2] * factor, self.shape[-1] * factor

    @property
    def num_frames(self) -> int:
        """Frames of its videos; 1 where it draws images."""
        frames = self.codec.frames if isinstance(self.codec, Codec) else 1
        return 1 + (self.shape[1] - 1) * frames if len(self.shape) == 4 else 1

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(c, h, w) in pixels, or (c, frames, h, w) of videos."""
        frames = (self.num_frames,) if len(self.shape) == 4 else ()
        return (3, *frames, *self.size) if self.codec else self.shape

    @property
    def device(self) -> torch.device:
        """Return the device that the network is on."""
        return next(self.denoiser.network.parameters(), torch.empty(0)).device

    def encode(self, images: Images, *, generator: Generators | None = None) -> Tensor:
        """Return images in [-1, 1] to x0, differentiable: ``Codec.encode``, or the images themselves."""
        return images if self.codec is None else self.codec.encode(images, generator=generator)

    def decode(self, x0: Images) -> Tensor:
        """x0 to images in about [-1, 1], differentiable: ``Codec.decode``, or x0 itself."""
        return x0 if self.codec is None else self.codec.decode(x0)

    def prompts(self, prompts: Sequence[str]) -> Cond:
        """Return the conditions of n prompts, batch n; each prompt is encoded once and then read from the disk.

        Raises ``ValueError`` for a model without prompts, and for new prompts once text encoders were dropped.
        """
        if self.texts is None:
            raise ValueError("this teacher takes no prompts: it is unconditional, or takes cond(labels).")
        return self._told(self.texts(prompts))

    def _told(self, encoded: Cond) -> Cond:
        """Return encoded prompts with what the network is told beside them, on its device."""
        cond = {name: value.to(self.device) for name, value in encoded.items()}
        number = len(next(iter(cond.values())))
        if self.embedded is not None:
            cond["guidance"] = torch.full((number,), self.embedded, device=self.device)
        if self.sized:
            cond["time_ids"] = size_ids(self.size).to(self.device).repeat(number, 1)
        return cond

    def negative(self, prompt: str = "") -> Cond:
        """Return the condition that guidance moves away from, batch 1, as the family's own pipeline makes it."""
        cond = self.prompts([prompt]) if self.negatives is None else self._told(self.negatives([prompt]))
        if prompt or not self.zero_negative:
            return cond
        told = ("time_ids", "guidance")
        return {name: value if name in told else torch.zeros_like(value) for name, value in cond.items()}

    def usable(self, prompts: Sequence[str], long_prompts: LongPrompts, source: str) -> list[int]:
        """Return numbers of the prompts to use under ``--long-prompts``, as ``PromptEncoder.usable`` has it."""
        if isinstance(self.texts, PromptEncoder):
            return self.texts.usable(prompts, long_prompts, source)
        return list(range(len(prompts)))

    def asked(self, prompts: Sequence[str], negative: str = "") -> "Teacher":
        """Return the same teacher of these prompts: label i stands for prompt i.

        The text encoders are freed once ``self`` is gone. More than a GiB of conditions is read from the cache.
        Raises as :meth:`prompts` does.
        """
        away, conds = self.negative(negative), {}
        if sum(value.nbytes for value in away.values()) * len(prompts) <= IN_MEMORY:
            starts = progress(range(0, len(prompts), 250), "prompts read, in batches of 250")
            parts = [self.prompts(prompts[start : start + 250]) for start in starts]
            conds = {name: torch.cat([part[name].cpu() for part in parts]) for name in away}
        elif isinstance(self.texts, PromptEncoder):
            self.texts.encode(prompts)
        listed = Listed(tuple(prompts), conds, away)
        return replace(self.without_text_encoders(), num_classes=len(prompts), listed=listed)

    def cond(self, labels: Tensor) -> Cond:
        """Return the condition of (n,) numbers of classes, or of prompts that were :meth:`asked`.

        Empty for an unconditional model. Raises ``ValueError`` for labels that it does not have, looked at on the
        CPU only, and for a model of prompts that was asked none.
        """
        if self.listed is not None:
            if not self.listed.conds:
                return self.prompts([self.listed.prompts[number] for number in labels.tolist()])
            return {name: x[labels.to(x.device)].to(self.device) for name, x in self.listed.conds.items()}
        if self.texts is not None:
            raise ValueError("this teacher takes no class labels, but prompts([...]).")
        if not self.num_classes:
            return {}
        most = self.num_classes - (not self.null_class)
        if labels.device.type == "cpu" and not bool(((labels >= 0) & (labels <= most)).all()):
            raise ValueError(f"labels must lie in [0, {most}]; got {labels.tolist()}.")
        return {"class_labels": labels.to(self.device)}

    def guided(self, scale: float) -> Denoiser:
        """Return the denoiser under guidance, 1 for none beyond what it has built in.

        A network that is told a scale (FLUX.1-dev) is told this one; others get classifier-free guidance.

        Raises ``ValueError`` for a student, and where there is neither null class nor prompt.
        """
        if scale == 1:
            return self.denoiser
        if self.times:
            raise ValueError(f"--guidance must be 1 here, since a student has it built in; got {scale}.")
        if self.embedded is not None:
            return Conditioned(self.denoiser, {"guidance": torch.tensor([scale], device=self.device)})
        if self.listed is not None:
            return guided(self.denoiser, scale, self.listed.negative, norm=self.norm)
        if not self.num_classes or not self.null_class:
            raise ValueError(
                f"--guidance must be 1 here, since this teacher was not trained without labels; got {scale}."
            )
        return guided(self.denoiser, scale, self.cond(torch.tensor([self.num_classes])))

    def identity(self) -> str:
        """Return a hash of weights and meaning: two teachers of one identity give the same answers.

        Prompts themselves are left out, the negative one is not.
        """
        if self.listed is not None:
            away = [value for _, value in sorted(self.listed.negative.items())]
            return identity_of(self.denoiser, list(self.shape), fingerprint(away))
        # The same weights in other code are another teacher: a wrapper that is mended wants no pairs of the old.
        code = [self.facts["code"]] if "code" in self.facts else []
        return identity_of(self.denoiser, list(self.shape), self.num_classes, self.null_class, *code)

    def free_text_encoders(self) -> None:
        """Let go of the text encoders until a prompt has to be encoded again."""
        for texts in (self.texts, self.negatives):
            if isinstance(texts, PromptEncoder):
                texts.free()

    def without_text_encoders(self) -> "Teacher":
        """Return the teacher for prompts it has encoded before; the encoders are freed once ``self`` is gone."""
        if not isinstance(self.texts, PromptEncoder):
            return self
        if self.zero_negative:
            self.negative()  # puts the empty prompt into the cache: its zeros have that shape
        negatives = self.negatives.dropped() if isinstance(self.negatives, PromptEncoder) else self.negatives
        return replace(self, texts=self.texts.dropped(), negatives=negatives)


def identity_of(denoiser: NetworkDenoiser, *facts: Any) -> str:
    """Return a hash of a denoiser's weights, of what they mean, and of JSON-able ``facts`` beside them."""
    state = denoiser.network.state_dict().values()
    meaning = [describe_schedule(denoiser.schedule), denoiser.kind, denoiser.time_scale, *facts]
    words = torch.frombuffer(bytearray(json.dumps(meaning).encode()), dtype=torch.uint8)
    held = [part for tensor in state if isinstance(tensor, Tensor) for part in stored(tensor)]
    return fingerprint([words, *held])


def load_teacher(
    name: str | Path, network: str = "", *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    size: int | tuple[int, int] | None = None, tiny_vae: str | Path | None = None, slicing: bool = False,
    tiling: bool = False, cache: Path | str | None = None, allow_pickle: bool = False, variant: str | None = None,
    revision: str | None = None, vae_dtype: torch.dtype | None = None, few_steps: bool = False,
    rounding: Quantize = "no", num_frames: int | None = None,
) -> Teacher:  # fmt: skip
    """Return a frozen teacher or student, from one of

    - "toyworld", the model that ships;
    - a folder that ``scorefield teacher``, ``scorefield distill`` or ``train_circles.py`` wrote;
    - a folder that ``save_pretrained`` wrote, of a family in docs/families.md or a UNet2DModel with its scheduler;
    - the name of such a model online, downloaded once;
    - "module:function": the user's function, whose code is run. Nothing that a folder holds or names is run.

    Args:
        name: one of these.
        network: for the student of a module:function, the module:function that builds its network.
        dtype: of all weights of a pipeline; SDXL's autoencoder overflows in float16 and stays float32.
        device: of all weights.
        size: of the images in pixels, (height, width) or one number; the model's own by default.
        tiny_vae: an AutoencoderTiny in place of the model's autoencoder: rough, but its gradients are cheap.
        slicing: encode and decode one image at a time, for memory.
        tiling: encode and decode in blended tiles, for memory at large sizes; changes the result slightly.
        cache: folder of encoded prompts; text encoders are loaded with the first prompt that is not in it.
        allow_pickle: read pickled weights if there are no safetensors, with torch's restricted unpickler.
        variant: of the weight files, such as "fp16".
        revision: branch, tag or commit of a download.
        vae_dtype: of the autoencoder alone, as for images that are encoded once and learned from; else ``dtype``.
        few_steps: take a distilled pipeline, too, which its scheduler tells: it is right at few times only.
        rounding: of the weights of a pipeline's network, which then cannot be copied into one that learns.
        num_frames: of videos; 1 draws images, 0 as many as a student learned; None refuses students of videos.

    Raises ``ValueError`` for anything else, weights that are missing, pickled, damaged or do not fit, a folder
    that needs ``network``, and options that cannot be or that the model has no use for.
    """
    check_dtype(dtype, vae_dtype or dtype)
    name, device = named_folder(name), check_device(device)
    folder, is_function = Path(name), ":" in str(name) and not Path(name).exists()
    file = next((file for file in (DESCRIPTION, *FOLDERS) if (folder / file).is_file()), None)
    if network and file != DESCRIPTION:
        raise ValueError(f"--network is for students of a module:function; {name} says how its network is built.")
    if file is None and not is_function:
        check_name(name)
        reader = PartReader(dtype, device, allow_pickle, variant)
        with reading(name):
            pipeline = open_pipeline(name, reader, revision=revision, tiny_vae=tiny_vae)
            check_options(pipeline.family.latent, tiny_vae=tiny_vae, slicing=slicing, tiling=tiling)
            return _from_pipeline(
                pipeline, size, vae_dtype, cache, few_steps, slicing=slicing, tiling=tiling, rounding=rounding,
                num_frames=read_num_frames(pipeline.index, num_frames, pipeline.folder),
            )  # fmt: skip
    teacher = _from_function(str(name)) if is_function else _from_folder(folder, str(file), network)
    num_frames, other_size = num_frames or 1, size is not None and teacher.size not in (size, (size, size))
    _check_unused(
        teacher, name, tiny_vae=tiny_vae, slicing=slicing, tiling=tiling, allow_pickle=allow_pickle,
        variant=variant, revision=revision, size=other_size, quantize=rounding != "no", num_frames=num_frames != 1,
    )  # fmt: skip
    freeze(teacher.denoiser.network).to(device)
    return teacher


def _check_unused(teacher: Teacher, name: str | Path, **options: object) -> None:
    if given := [f"--{option.replace('_', '-')}" for option, value in options.items() if value]:
        height, width = teacher.size
        raise ValueError(
            f"{name} is no model of diffusers, and draws {height} x {width} pixels; leave out {', '.join(given)}."
        )


def _from_pipeline(
    pipeline: Pipeline, size: int | tuple[int, int] | None, vae_dtype: torch.dtype | None,
    cache: Path | str | None, few_steps: bool, *, slicing: bool, tiling: bool, rounding: Quantize = "no",
    num_frames: int = 1,
) -> Teacher:  # fmt: skip
    family, settings, index = pipeline.family, pipeline.scheduler, pipeline.index
    if not few_steps:
        check_many_steps(settings, pipeline.folder)
    schedule, kind = pipeline.schedule()
    check_last_time(schedule, kind, pipeline.folder)
    shape = pipeline.check(size, tiling=tiling, num_frames=num_frames)
    side = pipeline.token_side()
    num_tokens = math.prod(shape[1:-2]) * (shape[-2] // side) * (shape[-1] // side)
    shift = family.shift(settings, num_tokens) if family.flow else 1.0
    model: Any = pipeline.network(rounding)
    # Flow networks are asked at t in [0, 1000], whose schedule has it in [0, 1].
    scale = float(settings.get("num_train_timesteps", 1000)) if family.flow else 1.0
    times = tuple(t / scale for t in read_student_times(index, settings, pipeline.folder))
    if not family.latent:
        return _of_pixels(pipeline, model, NetworkDenoiser(model, schedule, kind), shape, times)
    tokens = Tokens(family.blocks, side, family.image_first, family.text_mask) if family.blocks else None
    network = freeze(DiffusersNetwork(model, family.call, tokens, family.lora, family.control))
    texts, negatives = None, None
    if family.encoder is not None:
        texts = pipeline.prompts(model, cache)
        negatives = pipeline.prompts(model, cache, negative=True) if family.negative else None
    return Teacher(
        NetworkDenoiser(network, schedule, kind, scale), shape, times=times,
        num_classes=int(model.config.get(family.classes) or 0) if family.classes else 0,
        shift=shift,
        codec=pipeline.codec(vae_dtype, slicing=slicing, tiling=tiling), texts=texts, negatives=negatives,
        sized=model.config.get("addition_embed_type") == "text_time",
        zero_negative=bool(index.get("force_zeros_for_empty_prompt", family.zero_negative)),
        source=pipeline.folder, norm=family.norm, fps=family.fps,
        embedded=family.embedded if model.config.get("guidance_embeds") else None,
    )  # fmt: skip


def _of_pixels(
    pipeline: Pipeline, model: Any, denoiser: NetworkDenoiser, shape: tuple[int, ...], times: tuple[float, ...]
) -> Teacher:
    num_classes = int(model.config.num_class_embeds or 0)
    options = {name: value for name, value in model.config.items() if not name.startswith("_")}
    facts = {"network": "diffusers", "options": options, "shape": list(shape), "num_classes": num_classes}
    # As it is, it is called as ours are, and its students are saved under its names.
    if model.dtype != torch.float32:
        denoiser = replace(denoiser, network=freeze(DiffusersNetwork(model)))
    # Nothing in the folder says whether its last class stands for no label.
    return Teacher(
        denoiser, shape, num_classes, {**facts, "null_class": False}, times, null_class=False,
        source=pipeline.folder,
    )  # fmt: skip


@readable
def _from_folder(folder: Path, file: str, network: str) -> Teacher:
    if file in FOLDERS:
        teacher: Teacher = shipped(f"teacher {file}")(folder)
        return teacher
    facts = read_facts(folder)
    if missing := sorted({"shape", "num_classes", "network"} - facts.keys()):
        raise ValueError(
            f"{folder} does not say its {', '.join(missing)}; was it written by `scorefield teacher`?"
        )
    return Teacher(
        load_denoiser(folder, network_of(folder, facts, network)), tuple(facts["shape"]), facts["num_classes"],
        facts, tuple(facts.get(TIMES, ())), bool(facts.get("null_class", True)), source=folder,
    )  # fmt: skip


def _from_function(name: str) -> Teacher:
    teacher = call(name)
    if not isinstance(teacher, Teacher):
        got = type(teacher).__name__
        raise ValueError(f"{name} must return a Teacher(denoiser, shape, num_classes) of scorefield; got {got}.")
    # With what is saved beside a student, the name is only a hint.
    facts = {
        "network": "function", "options": {"name": name}, "shape": list(teacher.shape),
        "num_classes": teacher.num_classes, "null_class": teacher.null_class, "code": code_of(name),
    }  # fmt: skip
    sigma_data = teacher.facts.get("sigma_data", preconditioned(teacher.denoiser.network))
    if sigma_data is not None:
        facts["sigma_data"] = check_sigma_data(sigma_data)
    return replace(teacher, facts=facts)
