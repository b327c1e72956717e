"""What a name that ``--teacher`` gives may stand for, as far as the file system tells."""

import re
from pathlib import Path

from scorefield.models.pretrained import INDEX, LORA_FACTS
from scorefield.models.storage import DESCRIPTION
from scorefield.shipped import shipped, ships

FOLDERS = ("circles.json",)
"""Files by which folders are known that a shipped function reads: folder -> Teacher."""


def named_folder(name: str | Path) -> str | Path:
    """Return the folder of the shipped model of that name; any other name as it is."""
    if not (isinstance(name, str) and ships("teacher", name)):
        return name
    folder: Path = shipped(f"teacher {name}")()
    return folder


def check_name(name: str | Path) -> None:
    """Raise ``ValueError`` unless a pipeline may be found there: in a folder, or online."""
    folder = Path(name)
    if not folder.is_dir():
        # Within a folder that exists it is a local path with a slip of the pen.
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not folder.parent.is_dir():
            return
        if folder.is_file() and folder.suffix in (".safetensors", ".gguf"):
            raise ValueError(
                f"{name} is a single file. Pass a pipeline's folder, with this file in its folder transformer or "
                "unet in place of the weights there, beside their config.json."
            )
        raise ValueError(
            f"{str(name)!r} is no folder here, and no name of a model online. Pass the folder of a teacher, a "
            f"model's full name, such as stable-diffusion-v1-5/stable-diffusion-v1-5, toyworld, or "
            "module:function."
        )
    if (folder / LORA_FACTS).is_file():
        raise ValueError(
            f"{folder} is a LoRA, which needs its teacher: load it in diffusers, as its README.md says."
        )
    for inner in ("teacher", "student", "base", "pipeline"):
        held = any((folder / inner / file).is_file() for file in (DESCRIPTION, INDEX, LORA_FACTS, *FOLDERS))
        if held and not (folder / INDEX).is_file():
            raise ValueError(f"{folder} is the folder of a run; its result is {folder / inner}. Pass that.")
