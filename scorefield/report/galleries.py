"""The pictures that a page shows of each kind of run."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image

from scorefield.report.folder import Folder, shortened, told
from scorefield.report.pictures import Shown, evenly, load, load_frames, strip, within
from scorefield.report.summary import Gallery

PIXELS = 8_000_000
"""Pixels of all steps of a slider together, before they are made smaller."""

MOST_STEPS = 16
"""Pictures of a slider."""

MOST_FRAMES = 24
"""Frames of a turntable."""

MOST_EDITS = 12
"""Edits whose pictures are shown."""

SINGLE = {
    "distill": (
        ("beside_teacher.png", "Teacher and student",
         "Above the teacher's pictures, below the student's of the same noise."),
        ("teacher_check.png", "The teacher, before it was distilled",
         "Data, if there were any, then samples of few steps."),
    ),
    "sds": (
        ("export/contact.png", "The scene all round", "From above: renders, the mesh, depth, normals."),
        ("canvas.png", "The pictures at the end", "One for each particle."),
    ),
    "control": (
        ("samples.png", "Hints, real images, samples",
         "In turn: a row of hints, the real images they were made of, and what the model draws from the hints."),
    ),
    "attack": (
        ("images.png", "Images and what was changed", "Above the clean images; then each attack, and under it its "
         "change, magnified, round grey."),
    ),
    "robust": (
        ("images.png", "Held-out images and what was changed", "Above clean, then attacked, then the change, "
         "magnified, round grey."),
    ),
    "toyworld students": (("contact_sheet.png", "Teacher and students", "A row each, from the same noise."),),
    "toyworld evaluate": (
        ("contact_sheet.png", "Renders and answers", "Renders above, answers to their captions below."),
    ),
    "demo": (("samples.png", "Teacher and student", "From the same noise."),),
}  # fmt: skip
"""Pictures by kind: file, title, caption."""

STEPS = {
    "sds": "A column for each view: the render above, then what the teacher expects of it at five noise levels.",
    "control": "In turn: a row of hints, the real images, and what the model drew at that step.",
    "distill": "The student's pictures, always from the same noise.",
    "robust": "Held-out images, the same attacked at that step, and the changes, magnified, round grey.",
    "teacher": "The averaged weights, always from the same noise.",
}
"""What is to be seen in the pictures over training."""


def galleries(folder: Folder, kind: str, content: Mapping[str, Any], room: int) -> list[Gallery]:
    """Return the pictures of a run in at most ``room`` characters."""
    found = list[Gallery]()
    for make in (_singles, _turntable, _edits, _steps):
        for gallery in make(folder, kind, content, room // 2):
            found.append(gallery)
            room -= sum(len(one.uri) for one in gallery.shown)
    return found


def _singles(folder: Folder, kind: str, content: Mapping[str, Any], room: int) -> Iterator[Gallery]:
    for name, title, caption in SINGLE.get(kind, ()):
        if (image := load(folder, name)) is not None and (shown := within([(name, image)], room)):
            room -= len(shown[0].uri)
            yield Gallery(title, caption, shown)


def _turntable(folder: Folder, kind: str, content: Mapping[str, Any], room: int) -> Iterator[Gallery]:
    frames = load_frames(folder, "export/turntable.gif", MOST_FRAMES) if kind == "sds" else []
    if frames and (found := strip(frames, "turntable", room)) is not None:
        yield Gallery("Turntable", "Drag it, or use the slider.", [found[0]], "turntable", found[1])


def _steps(folder: Folder, kind: str, content: Mapping[str, Any], room: int) -> Iterator[Gallery]:
    names = folder.names("samples", r"step-\d{9}\.png")
    if not names or (first := load(folder, names[-1])) is None:
        return
    most = max(2, min(MOST_STEPS, PIXELS // (first.width * first.height)))
    chosen = evenly(names, most)
    images = [(_step(name), image) for name in chosen[:-1] if (image := load(folder, name)) is not None]
    shown = within([*images, (_step(names[-1]), first)], room)
    while not shown and len(images) > 1:
        images = images[::2]
        shown = within([*images, (_step(names[-1]), first)], room)
    if shown:
        yield Gallery("Over training", STEPS.get(kind, ""), shown, "slider")


def _step(name: str) -> str:
    return f"step {int(re.findall(r'[0-9]{9}', name)[0]):,}"


def _edits(folder: Folder, kind: str, content: Mapping[str, Any], room: int) -> Iterator[Gallery]:
    listed = content.get("edits", ()) if kind == "edit" else ()
    rows = [row for row in listed if isinstance(row, dict)][:MOST_EDITS]
    labels = content.get("strips")
    labels = "; ".join(told(one) for one in labels[:20]) if isinstance(labels, list) else ""
    labels = f"; under other options: {labels}" if labels else ""
    for number, row in enumerate(rows):
        words = row.get("attention")
        names = {"source": f"{number:06d}.source.png", "edit": f"{number:06d}.png"}
        names |= {
            "what changed, in white": f"{number:06d}.changed.png",
            "other options": f"{number:06d}.strip.png",
        }
        names[f"attention to: {told(words)}" if words else "attention"] = f"{number:06d}.attention.png"
        there = [(label, name) for label, name in names.items() if folder.holds(name)]
        images: list[tuple[str, Image.Image]] = [
            (label, image) for label, name in there if (image := load(folder, name)) is not None
        ]
        shown: list[Shown] = within(images, room // len(rows), side=600)
        if shown:
            title = f"{told(row.get('source', ''))} → {told(row.get('target', ''))}"
            yield Gallery(shortened(title, 200), f"Edit {number}{labels}", shown)
