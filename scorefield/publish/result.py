"""What of a run is published: the folder it made, and of that only the files that it wrote."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scorefield.atomic import MARKER, foreign
from scorefield.report.folder import Folder

RESULTS = ("student", "controlnet")
"""Folders of a run that hold what it made."""

CARD, MOST_CARD = "README.md", 2**20
PICTURES = ("samples.png", "beside_teacher.png")
"""Pictures beside a result that show what it draws; else the newest of ``samples/``."""

SHOWN = "samples.png"
"""Name of the picture in what is published."""


@dataclass(frozen=True)
class Result:
    """What is published.

    Attributes:
        folder: where the files are.
        run: folder of the run that made it, or None.
        files: names in ``folder``, the card not among them.
        card: text of the card that lies there; empty without one.
        edited: whether somebody changed the card.
        picture: shows what the result draws, or None; it is among ``files`` already if ``folder`` holds it.
        left: names in ``folder`` that are not published, since no run wrote them.
    """

    folder: Path
    run: Path | None
    files: tuple[str, ...]
    card: str
    edited: bool
    picture: Path | None
    left: tuple[str, ...]


def find_result(place: Path) -> Result:
    """Return what is published of a run, or of a folder that it made.

    The card may have been edited; nothing else may. Files that no run wrote stay at home.

    Raises:
        ValueError: no such folder, a run that is not at its end, no weights, or weights that were changed.
    """
    if not place.is_dir():
        raise ValueError(f"{place} is no folder. Pass the --out of a training, such as runs/student.")
    run, folder = None, place
    if not (place / MARKER).is_file():
        folder = next((place / name for name in RESULTS if (place / name / MARKER).is_file()), place)
        run = place
    elif place.name in RESULTS and (place.parent / "config.json").is_file():
        run = place.parent
    if not (folder / MARKER).is_file():
        wants = " or ".join(f"{name}/" for name in RESULTS)
        raise ValueError(
            f"{place} holds no result: there is no {wants} that a run wrote. Let the run come to its end, or pass "
            "a folder of save_slider or save_student."
        )
    others = dict(foreign(folder))
    # A link is never followed, whatever the folder's own list says of it: it may lead to a key of the user's.
    others |= {path.relative_to(folder).as_posix(): "is a link" for path in folder.rglob("*") if path.is_symlink()}
    changed = [name for name, why in others.items() if "changed" in why and name != CARD]
    if changed:
        raise ValueError(
            f"{folder / changed[0]} was changed since the run wrote it. Put it back, or export again."
        )
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = tuple(name for name in names if name not in {*others, MARKER, CARD})
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(f"{folder} holds no weights (*.safetensors), so there is nothing to publish.")
    card = (Folder(folder.resolve(), str(folder)).read(CARD, MOST_CARD) or b"").decode(errors="replace")
    left = tuple(name for name in others if name != CARD)
    return Result(folder, run, files, card, CARD in others, _picture(run, files), left)


def _picture(run: Path | None, files: Sequence[str]) -> Path | None:
    if run is None or SHOWN in files:
        return None
    held = Folder(run.resolve(), str(run))
    drawn = [*PICTURES, *reversed(held.names("samples", r"step-\d{9}\.png"))]
    return next((found for name in drawn if (found := held.file(name)) is not None), None)
