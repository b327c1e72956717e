"""Parts of a downloaded pipeline: its index names no paths, its folders no code; only known files are copied."""

import functools
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scorefield.files import check_regular, check_small, printable, read_json

P = ParamSpec("P")
T = TypeVar("T")

LIBRARIES = ("diffusers", "transformers")
"""Where the classes of parts come from."""

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that are neither read nor copied."""

LABELS, MOST_LETTERS = "id2label", 1000
"""Entry of an index that names classes, and the length of a name."""

VOCABULARY = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "spiece.model", "added_tokens.json",
    "special_tokens_map.json", "tokenizer.model", "chat_template.jinja", "chat_template.json",
    "processor_config.json", "preprocessor_config.json",
)  # fmt: skip
"""Files of a tokenizer."""

CONFIGS = ("config.json", "generation_config.json")
"""Files beside the weights of a network."""

TEXTS = (".json", ".txt", ".model", ".jinja")
"""Endings of configs and vocabularies, which libraries read whole."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?", re.ASCII)
_VARIANT = re.compile(r"(model|diffusion_pytorch_model)\.(\w+)(-\d+-of-\d+)?\.safetensors", re.ASCII)
_OLD_WEIGHTS = re.compile(r"(pytorch_model|diffusion_pytorch_model)(-\d+-of-\d+)?\.bin", re.ASCII)


@contextmanager
def reading(place: Path | str) -> Iterator[None]:
    """Turn whatever a library makes of a hostile or damaged folder into a ``ValueError`` that names it.

    Libraries trust their files: a list in the place of a number ends as an ``AttributeError`` anywhere in them.
    """
    try:
        yield
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "allocate memory" in str(error):  # torch has no class of its own for it on a CPU
            raise
        reason = printable(f"{type(error).__name__}: {str(error)[:200]}")
        raise ValueError(f"{place} is damaged, or no model of this kind ({reason}). Download it again.") from error


def readable(load: Callable[P, T]) -> Callable[P, T]:
    """Let a function, whose first argument is a folder or a name, raise as :func:`reading` does."""

    @functools.wraps(load)
    def loaded(*arguments: P.args, **options: P.kwargs) -> T:
        with reading(str(next(iter([*arguments, *options.values()])))):
            return load(*arguments, **options)

    return loaded


def check_index(index: Mapping[str, Any], file: Path, used: Iterable[str]) -> None:
    """Raise ``ValueError`` for a ``model_index.json`` that names anything but classes of known parts.

    Args:
        index: its content.
        file: where it was read, for the message.
        used: parts that are read; each must have a class of diffusers or transformers.
    """
    for name, value in index.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"{file}: {name[:80]!r} is no name of a part; expected letters, digits and _.")
        known = _is_pair(value) or _is_numbers(value) or (name == LABELS and _is_words(value))
        if isinstance(value, list | dict) and not known:
            raise ValueError(f"{file}: {name} must be [library, class] or [null, null]; got {str(value)[:80]!r}.")
    for name in used:
        library, _ = index[name] if _is_pair(index.get(name)) else (None, None)
        if library not in LIBRARIES:
            wanted = "a tokenizer of transformers" if name.startswith("tokenizer") else "a class of diffusers"
            got = printable(str(index.get(name))[:80])
            raise ValueError(f"{file} names an unsupported {name}: {got}; expected {wanted}.")


def _is_pair(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    plain = all(isinstance(word, str) and re.fullmatch(r"\w+(\.\w+)*", word, re.ASCII) for word in value)
    return plain or value == [None, None]


def _is_words(value: object) -> bool:
    # The names of classes by their numbers, which DiT has in its index.
    return isinstance(value, dict) and all(
        key.isdecimal() and isinstance(word, str) and len(word) <= MOST_LETTERS for key, word in value.items()
    )


def _is_numbers(value: object) -> bool:
    # Such as the times of an exported student.
    return isinstance(value, list) and all(type(number) in (int, float) for number in value)


def check_part(part: Path) -> None:
    """Raise ``ValueError`` for a folder of weights whose files name others, fill the memory, or are no files.

    Refused are adapters (transformers reads them unasked, and then does not say which weights are missing),
    weights that are stored quantised, texts too large to read, pipes and devices, and shards outside the folder.
    """
    for file in sorted(part.iterdir()) if part.is_dir() else ():
        if file.name == "adapter_config.json":
            raise ValueError(
                f"{part} holds an adapter (adapter_config.json), with which missing weights go unnoticed. Merge "
                "the adapter into the weights, or remove its files."
            )
        if not file.is_dir():
            try:
                check_regular(file)
                if file.suffix in TEXTS:
                    check_small(file)
            except (OSError, ValueError) as error:
                raise ValueError(f"{file} {error}") from error
        if file.name == "config.json":
            _check_plain(read_json(file), file)
        if file.name.endswith(".index.json") or ".index." in file.name:
            _check_shards(file)


def _check_plain(config: Mapping[str, Any], file: Path) -> None:
    # Libraries would look for the quantiser, and its kernels, that the file names. Configs nest others.
    left: list[Any] = [config]
    while left:
        inner = left.pop()
        left += [value for value in inner.values() if isinstance(value, dict)]
        for name in ("quantization_config", "compression_config"):
            if (value := inner.get(name)) is not None:
                method = value.get("quant_method") if isinstance(value, dict) else value
                raise ValueError(
                    f"{file}: the weights are quantised ({printable(str(method)[:40])}), and only plain ones are "
                    "read. Pass the model in float32, float16 or bfloat16."
                )


def _check_shards(file: Path) -> None:
    shards = read_json(file).get("weight_map")
    for name in set(shards.values()) if isinstance(shards, dict) else [shards]:
        if not isinstance(name, str) or name in (".", "..") or "/" in name or "\\" in name:
            raise ValueError(f"{file}: shards must be names of files beside it; got {str(name)[:80]!r}.")


def check_copyable(folder: Path, parts: Iterable[str], variant: str | None = None) -> None:
    """Raise ``ValueError`` for a part of which nothing may be copied, or a file that leads out of ``folder``."""
    for part in parts:
        files = copied_files(folder, part, variant)
        if not (files if part.startswith("tokenizer") else [file for file in files if file.name not in CONFIGS]):
            raise ValueError(f"{folder / part} holds no file that belongs to a {part}. Download it again.")


def copied_files(folder: Path, part: str, variant: str | None = None) -> list[Path]:
    """Return the files of a part that a copy needs, by list: configs, vocabulary, one set of weights.

    Those are the weights of ``variant`` where there are any, and pickles where there are no safetensors. Raises
    ``ValueError`` for one that is no regular file, or that is a link out of ``folder``; links of a download's
    cache into its own blobs are none.
    """
    files = sorted((folder / part).iterdir()) if (folder / part).is_dir() else []
    if part.startswith("tokenizer"):
        kept = [file for file in files if file.name in VOCABULARY]
    else:
        safe = [file for file in files if _WEIGHTS.fullmatch(file.name)]
        old = [file for file in files if _OLD_WEIGHTS.fullmatch(file.name)]
        own = [file for file in files if variant is not None and _variant_of(file) == variant]
        kept = [file for file in files if file.name in CONFIGS] + (own or safe or old)
    for file in kept:
        _check_inside(file, folder.resolve())
    return kept


def _variant_of(file: Path) -> str | None:
    found = _VARIANT.fullmatch(file.name)
    return None if found is None else found[2]


def _check_inside(file: Path, root: Path) -> None:
    blobs = root.parent.parent / "blobs"
    real = file.resolve()
    cached = root.parent.name == "snapshots" and real.is_relative_to(blobs)
    if not (cached or real.is_relative_to(root)):
        raise ValueError(f"{file} is a link out of {root}, to {real}, and not copied. Put the file in its place.")
    try:
        check_regular(real)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} {error}") from error


def copy_part(folder: Path, part: str, target: Path, variant: str | None = None) -> None:
    """Copy the files of :func:`copied_files` into the new folder ``target``.

    Links become files, pickles safetensors, text encoders in half precision float32, and the weights of a variant
    lose its name.
    """
    target.mkdir()
    files = copied_files(folder, part, variant)
    rewritten = [file for file in files if file.suffix in PICKLES or _variant_of(file) is not None]
    for file in files:
        if file not in rewritten:
            shutil.copyfile(file, target / file.name)
    if rewritten:
        stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
        read = [_unpickled(file) if file.suffix in PICKLES else load_file(file) for file in rewritten]
        weights = {name: value for one in read for name, value in one.items()}
        save_file(weights, target / f"{stem}.safetensors", metadata={"format": "pt"})
    if part.startswith("text_encoder"):
        _to_float32(target)


def _to_float32(part: Path) -> None:
    for file in part.glob("*.safetensors"):
        weights = load_file(file)
        if any(value.dtype in (torch.float16, torch.bfloat16) for value in weights.values()):
            whole = {name: x.float() if x.is_floating_point() else x for name, x in weights.items()}
            save_file(whole, file, metadata={"format": "pt"})
    config = read_json(part / "config.json")
    stored = {name: "float32" for name in ("dtype", "torch_dtype") if name in config}
    (part / "config.json").write_text(json.dumps({**config, **stored}, indent=2))


def _unpickled(file: Path) -> dict[str, Tensor]:
    held = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise ValueError(f"{file} holds no weights by name. Save it again with save_pretrained.")
    return {str(name): value.clone(memory_format=torch.contiguous_format) for name, value in held.items()}
