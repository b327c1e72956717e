"""A pipeline of diffusers as a folder: found, checked, and read part by part.

Only safetensors are read, and no code that a model brings along is run.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from scorefield.choices import Quantize
from scorefield.denoiser import Cond
from scorefield.files import read_json
from scorefield.models.codec import Codec, frames_per_latent, latent_frames, load_codec, read_codec_config
from scorefield.models.components import check_index, check_part, reading
from scorefield.models.families import Family, Parts, family_of, has_part, parts_of
from scorefield.models.preflight import check_network, check_tokenizer, latent_shape, tokenizer_class
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
from scorefield.models.prompts import Encode, PromptEncoder, Words, default_cache_folder
from scorefield.models.quantize import quantize
from scorefield.schedule import Kind, Schedule


@dataclass(frozen=True)
class Pipeline:
    """A folder that ``save_pretrained`` wrote, or the download of one.

    Attributes:
        folder: of the parts; a model without an index may have all of them at the top.
        index: its ``model_index.json``.
        family: what its class is made of.
        reader: dtype and device of its parts.
        tiny_vae: an AutoencoderTiny in place of its autoencoder.
    """

    folder: Path
    index: Mapping[str, Any]
    family: Family
    reader: PartReader
    tiny_vae: Path | None = None

    def part(self, name: str) -> Path:
        """Return the folder of a part."""
        if name == "vae":
            return self.tiny_vae or self.folder / "vae"
        return part_folder(self.folder, name)

    @property
    def texts(self) -> dict[str, type]:
        """Folders and classes of the text encoders that it has."""
        return _text_parts(self.family, self.index, self.folder)

    @property
    def tokenizers(self) -> dict[str, Any]:
        """Folders and classes of the tokenizers. Raises ``ValueError`` for classes that are none."""
        parts = [part.replace("text_encoder", "tokenizer") for part in self.texts]
        return {part: tokenizer_class(self.index, part) for part in parts}

    @property
    def scheduler(self) -> dict[str, Any]:
        """Its ``scheduler_config.json``. Raises ``ValueError`` where there is none."""
        file = self.part("scheduler") / "scheduler_config.json"
        if not file.is_file():
            raise ValueError(
                f"{self.folder} has no scheduler/scheduler_config.json, so its noise schedule is unknown."
            )
        return read_json(file)

    def schedule(self) -> tuple[Schedule, Kind]:
        """Noise schedule and prediction kind. Raises ``ValueError`` for those of another family."""
        schedule, kind = read_schedule(self.scheduler)
        if (kind == "flow") != self.family.flow:
            expected = "a flow-matching" if self.family.flow else "a DDPM-like"
            raise ValueError(f"this model needs {expected} scheduler; got {self.scheduler.get('_class_name')}.")
        return schedule, kind

    def check(
        self, size: int | tuple[int, int] | None = None, *, tiling: bool = False, num_frames: int = 1
    ) -> tuple[int, ...]:
        """Return the shape of x0 for pictures of ``size`` pixels, if all parts are there and fit together.

        It is (c, h, w), or (c, f, h, w) of videos of ``num_frames`` above 1. Reads no weights. Raises
        ``ValueError`` for what is missing or does not fit.
        """
        self._check_kind(num_frames)
        for part in self.tokenizers:
            check_tokenizer(self.folder / part, bounded=self.family.bounded)
        for part in _weight_parts(self.index, self.folder):
            check_part(self.part(part))
            self.reader.find_variant(self.part(part))
        config = read_config(self.family.network, self.part(self.family.part))
        family = self.family
        check_network(config, self.part(family.part), packing=family.packing, variance=family.variance)
        channels, factor, frames = config["in_channels"], 1, list[int]()
        if family.latent:
            codec, channels, factor = read_codec_config(self.part("vae"), tiling=tiling)
            if num_frames > 1:
                frames = [self._latent_frames(num_frames, codec, config)]
        channels, height, width = latent_shape(
            config, channels, factor, size, packing=family.packing, usual=family.size,
            side=family.token_side(config),
        )  # fmt: skip
        return channels, *frames, height, width

    def _check_kind(self, num_frames: int) -> None:
        """Raise ``ValueError`` for a kind of model that its family does not cover, and videos of one of images."""
        unlike = (None, False, [None, None])
        if other := [name for name in self.family.other if self.index.get(name) not in unlike]:
            raise ValueError(
                f"{self.folder} is a {self.family.pipeline} with {', '.join(other)}, which is not supported. Pass "
                "a model of one network, which is told one time for all frames."
            )
        if num_frames > 1 and not self.family.fps:
            kind = self.family.pipeline
            raise ValueError(f"num_frames is for models of videos, and {kind} draws images. Leave it out.")

    def _latent_frames(self, number: int, codec: Mapping[str, Any], config: Mapping[str, Any]) -> int:
        if not (frames := frames_per_latent(codec)):
            raise ValueError(f"a {codec['_class_name']} decodes images; leave out num_frames, which is {number}.")
        found, most = latent_frames(number, frames), config.get("rope_max_seq_len", math.inf)
        if found > most:
            raise ValueError(f"num_frames must be at most {1 + (most - 1) * frames} here; got {number}.")
        return found

    def token_side(self) -> int:
        """Return how many latents along a side the network takes as one token."""
        return self.family.token_side(read_config(self.family.network, self.part(self.family.part)))

    def network(self, rounding: Quantize = "no") -> Any:
        """Return the frozen network, a model of diffusers, with rounded weights if asked for.

        Raises as ``PartReader.read`` and :func:`scorefield.models.quantize.quantize` do.
        """
        part, kind = self.part(self.family.part), self.family.network
        if rounding == "no":
            return self.reader.read(kind, part)
        return quantize(
            replace(self.reader, device=torch.device("cpu")).read(kind, part), rounding, self.reader.device
        )

    def codec(self, dtype: torch.dtype | None = None, *, slicing: bool = False, tiling: bool = False) -> Codec:
        """Return the autoencoder, in the reader's dtype or another. Raises as :func:`load_codec` does."""
        reader = self.reader if dtype is None else replace(self.reader, dtype=dtype)
        return load_codec(reader, self.part("vae"), upcast=self.family.upcast, slicing=slicing, tiling=tiling)

    def read_texts(self) -> Parts:
        """Text encoders and tokenizers. Raises as ``PartReader`` does."""
        reader, folder = self.reader, self.folder
        encoders = {part: reader.read(kind, folder / part) for part, kind in self.texts.items()}
        return {**encoders, **{
            part: reader.read_tokenizer(kind, folder / part) for part, kind in self.tokenizers.items()
        }}  # fmt: skip

    def prompts(
        self, network: nn.Module, cache: Path | str | None = None, *, negative: bool = False
    ) -> PromptEncoder:
        """Return its text encoders, which are read with the first prompt that is not in the folder ``cache``.

        With ``negative`` of negative prompts, which some families encode otherwise.
        """
        reader, tokenizers = self.reader, self.tokenizers
        encoder = self.family.negative if negative else self.family.encoder
        files = [file for part in (*self.texts, *tokenizers) for file in reader.files(self.folder / part)]
        model: Any = network
        facts = (
            self.index["_class_name"], str(reader.dtype), reader.variant,
            model.config.get("joint_attention_dim"),  # SD3 fills up to it
            *(kind.__name__ for kind in tokenizers.values()), transformers.__version__,
            *(["negative"] if negative else []),
        )  # fmt: skip

        def load() -> Encode:
            assert encoder is not None
            encode = encoder(self.read_texts(), network, reader.device)

            def encode_here(prompts: list[str]) -> Cond:
                with reading(self.folder):
                    return encode(prompts)

            return encode_here

        def load_surplus() -> Callable[[str], int]:
            assert self.family.surplus is not None
            held = {part: reader.read_tokenizer(kind, self.folder / part) for part, kind in tokenizers.items()}
            count = self.family.surplus(held, negative)

            def counted(prompt: str) -> int:
                with reading(self.folder):
                    return count(prompt)

            return counted

        def load_words() -> Callable[[str], Words]:
            part, kind = next(iter(tokenizers.items()))
            tokenizer = reader.read_tokenizer(kind, self.folder / part)
            return lambda prompt: read_words(tokenizer, prompt)

        return PromptEncoder(
            folder=default_cache_folder() if cache is None else Path(cache),
            identify=functools.cache(functools.partial(fingerprint, files, facts)),
            load=load, load_surplus=functools.cache(load_surplus),
            load_words=functools.cache(load_words),
        )  # fmt: skip


def read_words(tokenizer: Any, prompt: str) -> Words:
    """Return the words of a prompt with their tokens, as a tokenizer of transformers pads and cuts it.

    Raises ``ValueError`` for a tokenizer that does not know where in the prompt a token comes from.
    """
    length = tokenizer.model_max_length
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} does not say which tokens belong to which word of a prompt.")
    read = tokenizer(
        prompt,
        return_offsets_mapping=True,
        truncation=True,
        max_length=length,
        padding="max_length",
        verbose=False,
    )
    tokens, spans = dict[int, list[int]](), dict[int, tuple[int, int]]()
    for token, (word, (start, end)) in enumerate(zip(read.word_ids(), read["offset_mapping"], strict=True)):
        if word is not None and end > start:
            tokens.setdefault(word, []).append(token)
            spans[word] = (min(start, spans.get(word, (start, end))[0]), end)
    words = tuple(prompt[start:end].strip().lower() for start, end in spans.values())
    behind = 1 + max((token for held in tokens.values() for token in held), default=0)
    end_token = behind if behind < length and read["input_ids"][behind] == tokenizer.eos_token_id else None
    return Words(words, tuple(map(tuple, tokens.values())), end_token, length)


def open_pipeline(
    name: str | Path, reader: PartReader, *, revision: str | None = None, tiny_vae: str | Path | None = None
) -> Pipeline:
    """Return the pipeline in a folder, or of a name, downloaded if need be.

    Raises ``ValueError`` for a name that is neither, a class without family, and an index that names other files.
    """
    folder = find_pipeline(name, _weight_parts, reader, revision)
    index = _read_index(folder)
    family = family_of(index)
    tiny = find_model(tiny_vae) if tiny_vae is not None and family.latent else None
    return Pipeline(folder, index, family, reader, tiny)


def _read_index(folder: Path) -> dict[str, Any]:
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        check_index(index, folder / INDEX, parts_of(index))
        return index
    file = part_folder(folder, "unet") / "config.json"
    config = read_json(file) if file.is_file() else {}
    if config.get("_class_name") == "UNet2DModel":
        return {"_class_name": "DDPMPipeline"}
    held = f"a {config['_class_name']} alone" if "_class_name" in config else f"no {INDEX}"
    raise ValueError(
        f"{folder} is not a pipeline's folder: it holds {held}. Pass what save_pretrained wrote, "
        "or a folder with denoiser.json: a result of `scorefield teacher` or `scorefield distill`."
    )


def _weight_parts(index: Mapping[str, Any], folder: Path = Path()) -> list[str]:
    family = family_of(index)
    return [family.part, *_text_parts(family, index, folder), *(["vae"] if family.latent else [])]


def _text_parts(family: Family, index: Mapping[str, Any], folder: Path) -> dict[str, type]:
    present = {part: kind for part, kind in family.texts.items() if has_part(index, part)}
    if missing := family.texts.keys() - present.keys() - set(family.optional):
        raise ValueError(
            f"{folder / INDEX} lacks {', '.join(sorted(missing))}, without which there are no prompts."
        )
    return present
