"""The card of what is published: the run's own, with its figures, a picture, and the licence of its base."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from scorefield.publish.result import CARD, MOST_CARD, SHOWN, Result
from scorefield.report.folder import Folder
from scorefield.report.page import read_run
from scorefield.report.summary import Figure
from scorefield.shipped import shipped


def finished_card(result: Result, name: str, licence: str = "") -> str:
    """Return the card: header and text of the one that lies there, figures of the run and a picture behind it.

    A card that somebody edited is left as it is. Its licence is ``licence``, or that of the base's card where the
    base lies on this machine. A base that only this machine has is not named in the header, which would refuse it.

    Args:
        result: what is published.
        name: owner/name there.
        licence: such as apache-2.0.

    Raises:
        ValueError: a header that is no YAML, or of a form that the hub refuses.
    """
    text = result.card or _plain_card(name)
    try:
        card = ModelCard(text, ignore_metadata_errors=False)
    except Exception as error:  # of whatever parser the library has
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{result.folder / CARD}: its header cannot be read ({said}). Mend it.") from error
    data: Any = card.data  # of a model, which has fields that other cards have not
    if not result.edited or licence:
        _set_licence(data, licence or _licence_of(result))
    bases = data.base_model if isinstance(data.base_model, list) else [data.base_model]
    if any(isinstance(base, str) and _is_here(base) for base in bases):
        data.base_model = None
    if result.edited:
        if found := next((place for place in _places(result) if place in str(card)), None):
            raise ValueError(f"{result.folder / CARD} names {found}, which is on this machine. Take it out.")
        return str(card)
    parts = [card.text.rstrip(), *_measured(result)]
    if result.picture is not None:
        parts.append(f"## Samples\n\n![what it draws]({SHOWN})")
    card.text = "\n\n".join(parts) + "\n"
    told = str(card)
    for place in _places(result):  # such as that of the data; what it is called says enough
        told = told.replace(place, Path(place).name)
    return told


def _plain_card(name: str) -> str:
    data = ModelCardData(library_name="scorefield", tags=["diffusion", "distillation"])
    usage = f"""# {name.rpartition("/")[2]}

```bash
hf download {name} --local-dir {name.rpartition("/")[2]}
scorefield sample --teacher {name.rpartition("/")[2]} --num-images 16
```"""
    return f"---\n{data}\n---\n{usage}\n"


def _is_here(base: str) -> bool:
    return base.count("/") != 1 or base.startswith((".", "/", "~")) or _place_of(base) is not None


def _places(result: Result) -> list[str]:
    """Return paths that a card must not hold: those that the run was told, and the user's home; longest first."""
    places = {str(Path.home()), str(result.folder.resolve().parent)}
    if result.run is not None:
        options = Folder(result.run.resolve(), str(result.run)).object("config.json")
        told = (value for value in options.values() if isinstance(value, str))
        places |= {value for value in told if "/" in value and Path(value).exists()}
    return sorted(places - {"/"}, key=len, reverse=True)


def _set_licence(data: Any, licence: str) -> None:
    if licence:
        data.license, data.license_name = licence, None


def _licence_of(result: Result) -> str:
    """Return the licence that the base's own card names, or nothing."""
    if result.run is None:
        return ""
    config = Folder(result.run.resolve(), str(result.run)).object("config.json")
    place = _place_of(str(config.get("teacher", "")))
    if place is None or (text := Folder(place.resolve(), str(place)).read(CARD, MOST_CARD)) is None:
        return ""
    try:
        data: Any = ModelCard(text.decode(), ignore_metadata_errors=True).data
    except Exception:  # a stranger's card: without a licence that can be read, ours says that it has the base's
        return ""
    return data.license if isinstance(data.license, str) and data.license != "other" else ""


def _place_of(base: str) -> Path | None:
    """Return the folder of a base on this machine: one that was named, or that ships."""
    if base in ("toyworld", "toyworld/pipeline"):
        return Path(shipped("teacher toyworld")())
    return Path(base) if base and Path(base).is_dir() else None


def _measured(result: Result) -> list[str]:
    if result.run is None:
        return []
    # Under the name of its folder: where that lies on this machine is nobody's business.
    outcome = read_run(Folder(result.run.resolve(), result.run.name)).outcome
    figures = "\n".join(f"- {_line(one)}" for one in outcome.figures)
    return [f"## Measured\n\n{outcome.conclusion}\n\n{figures}"] if figures else []


def _line(figure: Figure) -> str:
    ends = [f"{word} {value}" for word, value in (("floor", figure.floor), ("ceiling", figure.ceiling)) if value]
    beside = "; ".join([*ends, *([figure.note] if figure.note else [])])
    return f"{figure.name}: {figure.value}" + (f" ({beside})" if beside else "")
