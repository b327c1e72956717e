"""Any diffusion model of diffusers, by name or folder, as a frozen teacher.

    teacher = load_teacher("stable-diffusion-v1-5/stable-diffusion-v1-5", dtype=torch.bfloat16, device="cuda")
    denoiser = guided(teacher.denoiser, 7.5, teacher.negative())
    x0 = denoiser(x_t, t, teacher.prompts(["a red mug"]))  # latents; teacher.decode(x0) are pixels

Families: Stable Diffusion 1.x (eps) and 2.x (v), SDXL, Stable Diffusion 3 (flow), and UNet2DModel on pixels. Only
safetensors are read, and no code that a model brings along is run.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from scorefield.denoiser import Cond, NetworkDenoiser, freeze
from scorefield.files import read_json
from scorefield.models.codec import Codec, load_codec, read_codec_config
from scorefield.models.components import check_index, check_part
from scorefield.models.families import DiffusersNetwork, Family, Parts, family_of, has_part, parts_of
from scorefield.models.preflight import (
    check_device,
    check_dtype,
    check_last_time,
    check_many_steps,
    check_network,
    check_options,
    check_shift,
    check_tokenizer,
    latent_shape,
    tokenizer_class,
)
from scorefield.models.pretrained import (
    INDEX,
    PartReader,
    find_model,
    find_pipeline,
    fingerprint,
    part_folder,
    read_config,
    read_schedule,
)
from scorefield.models.prompts import Encode, PromptEncoder, default_cache_folder
from scorefield.randomness import Generators
from scorefield.schedule import Images, Kind, Schedule


@dataclass(frozen=True, eq=False, kw_only=True)
class Teacher:
    """A frozen diffusion model with what turns images into its x0 and prompts into its conditions.

    Attributes:
        denoiser: on latents, or on pixels if there is no codec.
        shape: (c, h, w) of x0.
        codec: pixels to latents and back; None for models of pixels.
        texts: prompts to conditions; None for models without prompts.
        shift: of the noise levels of a sampling grid (SD3: 3); 1 is none. ``sampling.grid`` takes it.
        num_classes: entries of the network's class table; 0 means that it takes no labels.
        sized: the network is told the size of the image (SDXL).
        zero_negative: the empty negative prompt is zeros instead of the encoded empty string (SDXL).
    """

    denoiser: NetworkDenoiser
    shape: tuple[int, int, int]
    codec: Codec | None = None
    texts: PromptEncoder | None = None
    shift: float = 1.0
    num_classes: int = 0
    sized: bool = False
    zero_negative: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        factor = self.codec.factor if self.codec else 1
        return self.shape[1] * factor, self.shape[2] * factor

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.denoiser.network.parameters()).device

    def encode(self, images: Images, *, generator: Generators | None = None) -> Tensor:
        """Images in [-1, 1] to x0, differentiable: ``Codec.encode``, or the images themselves."""
        return images if self.codec is None else self.codec.encode(images, generator=generator)

    def decode(self, x0: Images) -> Tensor:
        """x0 to images in about [-1, 1], differentiable: ``Codec.decode``, or x0 itself."""
        return x0 if self.codec is None else self.codec.decode(x0)

    def prompts(self, prompts: Sequence[str]) -> Cond:
        """The conditions of n prompts, batch n; each prompt is encoded once and then read from the disk.

        Raises ``ValueError`` for a model without prompts, and for new prompts once text encoders were dropped.
        """
        if self.texts is None:
            raise ValueError("this teacher takes no prompts: it is unconditional, or takes classes(labels).")
        cond = {name: value.to(self.device) for name, value in self.texts(prompts).items()}
        return {**cond, **self._time_ids(len(prompts))}

    def negative(self, prompt: str = "") -> Cond:
        """The condition that guidance moves away from, batch 1, as the family's own pipeline makes it."""
        cond = self.prompts([prompt])
        if prompt or not self.zero_negative:
            return cond
        return {name: value if name == "time_ids" else torch.zeros_like(value) for name, value in cond.items()}

    def classes(self, labels: Tensor) -> Cond:
        """The conditions of (n,) integer class labels; one of them may be the null class of the model's training.

        Raises ``ValueError`` for a model without classes and for labels it does not have.
        """
        if not self.num_classes:
            raise ValueError("this teacher takes no class labels: it is unconditional, or takes prompts([...]).")
        if not bool(((labels >= 0) & (labels < self.num_classes)).all()):
            raise ValueError(f"labels must lie in [0, {self.num_classes - 1}]; got {labels.tolist()}.")
        return {"class_labels": labels.to(self.device)}

    def without_text_encoders(self) -> "Teacher":
        """The same teacher for prompts it has encoded before; the encoders are freed once ``self`` is gone."""
        if self.texts is None:
            return self
        if self.zero_negative:
            self.negative()  # puts the empty prompt into the cache: its zeros have that shape
        return replace(self, texts=self.texts.dropped())

    def _time_ids(self, n: int) -> Cond:
        # Original size, offset of the crop, target size (SDXL, arXiv 2307.01952, section 2.2).
        ids = torch.tensor([[*self.size, 0, 0, *self.size]], dtype=torch.float32, device=self.device)
        return {"time_ids": ids.repeat(n, 1)} if self.sized else {}


def load_teacher(
    name: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    size: int | tuple[int, int] | None = None, tiny_vae: str | Path | None = None, slicing: bool = False,
    tiling: bool = False, cache: Path | str | None = None, allow_pickle: bool = False, variant: str | None = None,
    revision: str | None = None, vae_dtype: torch.dtype | None = None, few_steps: bool = False,
) -> Teacher:  # fmt: skip
    """A frozen teacher from a folder that ``save_pretrained`` wrote, or from a model's name.

    Text encoders are loaded with the first prompt that is not in the cache.

    Args:
        name: folder of a pipeline, or of a UNet2DModel with its scheduler; or a model's name, downloaded once.
        dtype: of all weights. SDXL's autoencoder overflows in float16 and then stays float32.
        device: of all weights.
        size: of the images in pixels, (height, width) or one number; the model's own by default.
        tiny_vae: an AutoencoderTiny in place of the model's autoencoder: rough, but its gradients are cheap.
        slicing: encode and decode one image at a time, for memory.
        tiling: encode and decode in blended tiles, for memory at large sizes; changes the result slightly.
        cache: folder of encoded prompts; ``~/.cache/scorefield/prompts`` by default.
        allow_pickle: read pickled weights if there are no safetensors, with torch's restricted unpickler.
        variant: of the weight files, such as "fp16".
        revision: branch, tag or commit of a model that is downloaded.
        vae_dtype: of the autoencoder alone, as for images that are encoded once and learned from; else ``dtype``.
        few_steps: take a distilled model, too, which its scheduler tells: its denoiser is right at few times only.

    Raises:
        ValueError: for a name that is neither, a pipeline of another class, weights that are missing, pickled,
            damaged or do not fit, a distilled model, and a dtype or size that cannot be.
    """
    for one in (dtype, vae_dtype or dtype):
        check_dtype(one)
    reader = PartReader(dtype, check_device(device), allow_pickle, variant)
    folder = find_pipeline(name, _weights_of, reader, revision)
    index = _read_index(folder)
    family = family_of(index)
    parts = {part: part_folder(folder, part) for part in (family.part, *_text_parts(family, index, folder))}
    if family.texts:
        parts["vae"] = folder / "vae" if tiny_vae is None else find_model(tiny_vae)
    settings = read_json(part_folder(folder, "scheduler") / "scheduler_config.json")
    if not few_steps:
        check_many_steps(settings, folder)
    schedule, kind = _check_schedule(settings, family)
    check_last_time(schedule, kind, folder)
    shift = check_shift(settings) if family.flow else 1.0
    shape = _check_parts(reader, family, index, folder, parts, size, tiling)
    check_options(bool(family.texts), tiny_vae=tiny_vae, slicing=slicing, tiling=tiling)
    model: Any = reader.read(family.network, parts[family.part])
    # Flow networks are asked at t in [0, 1000], whose schedule has it in [0, 1].
    scale = float(settings.get("num_train_timesteps", 1000)) if family.flow else 1.0
    codec = None
    if family.texts:
        own = reader if vae_dtype is None else replace(reader, dtype=vae_dtype)
        codec = load_codec(own, parts["vae"], upcast=family.upcast, slicing=slicing, tiling=tiling)
    return Teacher(
        denoiser=NetworkDenoiser(freeze(DiffusersNetwork(model)), schedule, kind, scale),
        shape=shape,
        codec=codec,
        texts=_prompt_encoder(reader, family, index, folder, model, cache) if family.texts else None,
        shift=shift,
        num_classes=0 if family.texts else int(model.config.num_class_embeds or 0),
        sized=model.config.get("addition_embed_type") == "text_time",
        zero_negative=bool(index.get("force_zeros_for_empty_prompt", family.zero_negative)),
    )


def pipeline_folder(name: str | Path, revision: str | None = None, variant: str | None = None) -> Path:
    """The local folder of a pipeline that :func:`load_teacher` loaded. Raises ``ValueError`` as it does."""
    reader = PartReader(torch.float32, torch.device("cpu"), allow_pickle=True, variant=variant)
    return find_pipeline(name, _weights_of, reader, revision)


def _check_parts(
    reader: PartReader, family: Family, index: Mapping[str, Any], folder: Path, parts: Mapping[str, Path],
    size: int | tuple[int, int] | None, tiling: bool,
) -> tuple[int, int, int]:  # fmt: skip
    """The shape of x0, if all parts are there and fit together."""
    for part in _text_parts(family, index, folder):
        tokenizer_class(index, _tokenizer_of(part))
        check_tokenizer(folder / _tokenizer_of(part))
    for place in parts.values():
        check_part(place)
        reader.find_variant(place)
    config = read_config(family.network, parts[family.part])
    check_network(config, parts[family.part])
    channels, factor = config["in_channels"], 1
    if family.texts:
        _, channels, factor = read_codec_config(parts["vae"], tiling=tiling)
    return latent_shape(config, channels, factor, size)


def _read_index(folder: Path) -> dict[str, Any]:
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        check_index(index, folder / INDEX, parts_of(index))
        return index
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if config.get("_class_name") == "UNet2DModel":
        return {"_class_name": "DDPMPipeline"}
    held = f"a {config['_class_name']} alone" if "_class_name" in config else f"no {INDEX}"
    raise ValueError(f"{folder} is not a pipeline's folder: it holds {held}. Pass what save_pretrained wrote.")


def _weights_of(index: Mapping[str, Any]) -> list[str]:
    family = family_of(index)
    return [family.part, *_text_parts(family, index, Path()), *(["vae"] if family.texts else [])]


def _text_parts(family: Family, index: Mapping[str, Any], folder: Path) -> dict[str, type]:
    present = {part: kind for part, kind in family.texts.items() if has_part(index, part)}
    if missing := family.texts.keys() - present.keys() - set(family.optional):
        raise ValueError(
            f"{folder / INDEX} lacks {', '.join(sorted(missing))}, without which there are no prompts."
        )
    return present


def _check_schedule(settings: Mapping[str, Any], family: Family) -> tuple[Schedule, Kind]:
    schedule, kind = read_schedule(settings)
    if (kind == "flow") != family.flow:
        expected = "a flow-matching" if family.flow else "a DDPM-like"
        raise ValueError(f"this model needs {expected} scheduler; got {settings.get('_class_name')}.")
    return schedule, kind


def _prompt_encoder(
    reader: PartReader,
    family: Family,
    index: Mapping[str, Any],
    folder: Path,
    network: Any,
    cache: Path | str | None,
) -> PromptEncoder:
    kinds = _text_parts(family, index, folder)
    tokenizers = {_tokenizer_of(part): tokenizer_class(index, _tokenizer_of(part)) for part in kinds}
    files = [file for part in (*kinds, *tokenizers) for file in reader.files(folder / part)]
    width = network.config.get("joint_attention_dim")  # SD3 fills up to it
    classes = [kind.__name__ for kind in tokenizers.values()]
    facts = (index["_class_name"], str(reader.dtype), reader.variant, width, *classes, transformers.__version__)

    def load() -> Encode:
        parts: Parts = {
            **{part: reader.read(kind, folder / part) for part, kind in kinds.items()},
            **{part: reader.read_tokenizer(kind, folder / part) for part, kind in tokenizers.items()},
        }
        assert family.encoder is not None
        return family.encoder(parts, network, reader.device)

    return PromptEncoder(
        folder=default_cache_folder() if cache is None else Path(cache),
        identify=functools.cache(functools.partial(fingerprint, files, facts)),
        load=functools.cache(load),
    )


def _tokenizer_of(part: str) -> str:
    return part.replace("text_encoder", "tokenizer")
