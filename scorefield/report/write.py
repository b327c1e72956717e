"""Writing a page: beside the run that it shows, never over someone else's file, and never at the run's cost."""

from collections.abc import Sequence
from pathlib import Path

from scorefield.atomic import note_written, whole_file
from scorefield.files import warn
from scorefield.progress import working
from scorefield.report.folder import Folder
from scorefield.report.page import GENERATOR, draw, read_run

NAME = "report.html"
"""The page in a run's folder."""


def check_page(path: Path) -> None:
    """Raise ``ValueError`` unless a page may be written there: nothing is, or an earlier page."""
    if path.is_symlink() or (path.exists() and not is_page(path)):
        raise ValueError(f"{path} would be replaced, but no report is in it. Move it, or pass another --out.")


def is_page(path: Path) -> bool:
    """Return True for a file that holds a page of ours."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return f'<meta name="generator" content="{GENERATOR}">'.encode() in file.read(1000)


def save_page(text: str, path: Path) -> None:
    """Write a page whole or not at all. A folder that lists its files, as that of an edit does, lists it, too."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    note_written(path)


def add_page(out: Path, path: Path | None = None, *, shown: Path | None = None, file: str = "") -> None:
    """Write the page of a run that has ended; a run is worth more than its page, so no failure ends it.

    Args:
        out: the run's folder.
        path: of the page; by default ``out/report.html``.
        shown: the folder as the page shall name it, where ``out`` is not its last place.
        file: the one file of figures that the page is about, in ``out``.
    """
    try:
        with working("the report"):
            path = out / NAME if path is None else path
            check_page(path)
            save_page(draw([read_run(Folder(out.resolve(), str(shown or out)), file)]), path)
    except Exception as error:  # of any kind: nothing of it may cost the run
        why = str(error).rstrip(".") or type(error).__name__
        warn(f"no page in {shown or out}: {why}. `scorefield report` makes one later.")


def pages_of(runs: Sequence[Path], out: Path | None) -> Path:
    """Return where the page of some runs goes: as asked for, into the only run's folder, or here for several."""
    if out is not None:
        return out
    if len(runs) > 1:
        return Path(NAME)
    return runs[0] / NAME if runs[0].is_dir() else runs[0].with_suffix(".html")
