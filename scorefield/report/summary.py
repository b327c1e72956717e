"""What a page says of one run, before it is drawn: what was asked for, what came out, whether it worked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from scorefield.report.curves import Points
from scorefield.report.folder import figure, number
from scorefield.report.pictures import Shown


@dataclass(frozen=True)
class Figure:
    """A measured number, and what it is read beside.

    Attributes:
        name: what was measured.
        value: the number, in words.
        floor: what nothing could be better than, or chance; see the note of the column.
        ceiling: the other end.
        note: what the three mean, in a few words.
    """

    name: str
    value: str
    floor: str = ""
    ceiling: str = ""
    note: str = ""


@dataclass(frozen=True)
class Gallery:
    """Pictures that belong together.

    Attributes:
        title: above them.
        caption: what is to be seen in them.
        shown: the pictures.
        sort: slider: one at a time, by a slider; row: all beside each other; turntable: one, which holds
            ``frames`` frames side by side.
        frames: of a turntable.
    """

    title: str
    caption: str
    shown: Sequence[Shown]
    sort: str = "row"
    frames: int = 1


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        conclusion: one sentence, from the files of results alone.
        works: True, False, or None where the files do not say.
        figures: measured numbers.
        warnings: what the reader should know.
        next_steps: what to do now, each a sentence and a command, which may be empty.
        process: figures of this start alone, such as seconds, which a resumed run has otherwise.
    """

    conclusion: str
    works: bool | None = None
    figures: Sequence[Figure] = ()
    warnings: Sequence[str] = ()
    next_steps: Sequence[tuple[str, str]] = ()
    process: Sequence[Figure] = ()


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All that a page says of one run.

    Attributes:
        name: of the folder.
        place: its path, as it was given.
        kind: the command that made it, in words; "run" where no file says.
        outcome: what it came to.
        command: what repeats it.
        facts: what it was made from, (name, value): teacher, data, hashes, versions.
        options: all options, (name, value), and whether they differ from what is usual.
        galleries: its pictures.
        curves: scalars by name.
        signs: what the curves say, in words.
        damaged: what of the logs could not be read.
    """

    name: str
    place: str
    kind: str
    outcome: Outcome
    command: str = ""
    facts: Sequence[tuple[str, str]] = ()
    options: Sequence[tuple[str, str, bool]] = ()
    galleries: Sequence[Gallery] = ()
    curves: Mapping[str, Points] = field(default_factory=dict)
    signs: Sequence[str] = ()
    damaged: Sequence[str] = ()


def ratio(value: object, to: object) -> float | None:
    """Return the quotient of two values of a file, or None where it says nothing."""
    above, below = number(value), number(to)
    if above is None or below is None or not below > 0:
        return None
    found = above / below
    return found if found == found and abs(found) < 1e12 else None


def measured(name: str, content: Mapping[str, object], key: str, note: str = "") -> list[Figure]:
    """Return the figure that a file has under a key, in a list that is empty where it has none."""
    value = number(content.get(key))
    return [] if value is None else [Figure(name, figure(value), note=note)]
