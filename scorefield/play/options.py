"""Options of ``scorefield play``, and which values are possible. Importing it imports neither torch nor gradio."""

import socket
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from scorefield.training.launcher import check_alone, default_device
from scorefield.training.options import LoadOptions, check_numbers

MOST_STUDENTS = 4
"""Students beside a teacher on one page."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Addresses that only this machine reaches."""


@dataclass(frozen=True, kw_only=True)
class Play(LoadOptions):
    """Play with a teacher, its students and its adapter in the browser: draw, control, edit, turn a scene."""

    teacher: str = "toyworld"
    """The frozen model: toyworld, the one that ships, folder of `scorefield teacher`, name or folder of a
    diffusers model, or module:function, whose code is run."""
    student: tuple[Path, ...] = ()
    """Folders of its students, pipelines or LoRAs, which are drawn beside it. By default the one that ships, for
    toyworld at its own size."""
    control: Path | None = None
    """Folder of an adapter for it, a ControlNet of `scorefield control`. By default the one that ships, for
    toyworld."""
    scene: Path | None = None
    """Folder of a finished run of `scorefield sds`, whose mesh is shown."""
    steps: int = 50
    """Network calls of the teacher per image, at first; the page has a slider."""
    guidance: float = 3.0
    """Scale of the teacher's classifier-free guidance, at first. 7.5 is usual for Stable Diffusion."""
    size: int = 0
    """Height and width of a text-to-image model's images, in pixels. 0 means the model's own."""
    host: str = "127.0.0.1"
    """Address to serve at. At any other than this machine's own, everyone on the network can use the page: it asks
    no password."""
    port: int = 7860
    """Port to serve at. 0 takes a free one."""
    device: str = default_device()
    """Where to compute, such as cpu or cuda."""
    dry_run: bool = False
    """Load everything, say what each tab will use, and stop."""


def check_play(config: Play) -> None:
    """Raise ``ValueError`` for options that cannot work, a port that is taken, and without gradio."""
    check_alone("play")
    if find_spec("gradio") is None:
        raise ValueError(
            "scorefield play needs gradio, which is not installed. Install it: pip install 'scorefield[play]'."
        )
    check_numbers(config, positive=("steps",), not_negative=("guidance", "size"))
    if len(config.student) > MOST_STUDENTS:
        raise ValueError(f"--student takes at most {MOST_STUDENTS} folders; got {len(config.student)}.")
    given = [("--student", folder) for folder in config.student]
    given += [(f"--{name}", folder) for name in ("control", "scene") if (folder := getattr(config, name))]
    for flag, folder in given:
        if not folder.is_dir():
            raise ValueError(f"{flag} {folder} is no folder. Correct its name.")
    if not 0 <= config.port < 2**16:
        raise ValueError(f"--port must lie in [0, 65535]; got {config.port}.")
    if not config.dry_run:
        check_free(config.host, config.port)


def check_free(host: str, port: int) -> None:
    """Raise ``ValueError`` for an address that cannot be served at. Nothing stays bound."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"cannot serve at --host {host} --port {port}: {error}. Pass another --port, or leave out --host."
        ) from error
