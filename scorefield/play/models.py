"""The models behind the page: loaded once, asked once, and left as they are by every request."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from scorefield.cli import found
from scorefield.files import open_regular, printable
from scorefield.models.lora_student import is_lora_student, load_lora_student
from scorefield.models.prompts import PromptEncoder
from scorefield.models.teacher import Teacher, Texts, load_teacher
from scorefield.play.options import Play
from scorefield.shipped import shipped, ships

MESH = Path("export") / "scene.glb"
"""Where a run of ``scorefield sds`` keeps its mesh."""

MOST_MESH = 2**26
"""Bytes of the largest mesh that is shown."""

NO_STUDENT = (
    "No student is loaded. `scorefield distill toyworld-1step --out runs/toy` makes one in half an hour of a "
    "core, and `scorefield play --student runs/toy/student` shows it beside its teacher."
)
NO_CONTROL = (
    "No adapter is loaded. `scorefield control` makes one, and `scorefield play --control FOLDER` shows it."
)
NO_SCENE = (
    'No scene is loaded. `scorefield sds toyworld "a red mug" --out runs/mug` makes one in minutes, and '
    "`scorefield play --scene runs/mug` shows it."
)


@dataclass(frozen=True, eq=False)
class Models:
    """What the tabs use.

    Attributes:
        name: of the teacher, as it was given.
        teacher: frozen, its text encoders in memory.
        students: by name, each drawn from the teacher's noise.
        controller: the teacher under an adapter, a ``ControlledDenoiser``; None: there is none.
        edits: whether the teacher's attention can be edited.
        mesh: a glb file; None: there is none.
        steps: network calls of the teacher, at first.
        guidance: its scale, at first.
        notes: for each tab where it comes from, or why it has nothing to show.
    """

    name: str
    teacher: Teacher
    students: dict[str, Teacher]
    controller: Any
    edits: bool
    mesh: Path | None
    steps: int
    guidance: float
    notes: dict[str, str]

    def told(self) -> list[str]:
        """Return what each tab uses, a line each."""
        return [f"{tab:8} {note}" for tab, note in self.notes.items()]


def load_models(config: Play) -> Models:
    """Load all that the options name, and ask each once.

    Raises ``ValueError`` for a teacher that is a student, students and adapters that are none of this teacher,
    and a scene without a mesh.
    """
    mesh = None if config.scene is None else check_mesh(config.scene)
    teacher = load_teacher(
        config.teacher, device=config.device, size=config.size or None, allow_pickle=config.allow_pickle,
        variant=config.variant or None,
    )  # fmt: skip
    if teacher.times:
        raise ValueError(f"--teacher {config.teacher} is a student. Pass its teacher, and this one as --student.")
    teacher = with_encoders(teacher)
    height, width = teacher.size
    students = load_students(config, teacher)
    beside = ", ".join(students) or NO_STUDENT
    notes = {"draw": f"{config.teacher}, {height} x {width} pixels. Beside it: {beside}"}
    controller, notes["control"] = load_controller(config, teacher)
    fault: str = found("edit.play:unfit")(teacher)
    notes["edit"] = fault or f"{config.teacher}, by Prompt-to-Prompt"
    notes["scene"] = NO_SCENE if mesh is None else printable(str(mesh))
    return Models(
        config.teacher, teacher, students, controller, not fault, mesh, config.steps, config.guidance, notes
    )


def load_students(config: Play, teacher: Teacher) -> dict[str, Teacher]:
    """Return the students by what the page calls them; the one that ships where none is named.

    Raises ``ValueError`` for a folder that is no student, or one that draws other pictures than the teacher.
    """
    folders = [(printable(str(folder)), folder) for folder in config.student]
    if not folders and not config.size and ships("student", config.teacher):
        folders = [("the student that ships", shipped(f"student {config.teacher}")())]
    students = {}
    for name, folder in folders:
        if is_lora_student(folder):
            student = load_lora_student(folder, teacher)
        else:
            student = load_teacher(
                folder, device=config.device, size=config.size or None, few_steps=True,
                allow_pickle=config.allow_pickle,
            )  # fmt: skip
            student = with_encoders(student)
        if not student.times:
            raise ValueError(f"--student {folder} is no student of few steps. Pass it as --teacher.")
        if (student.shape, student.num_classes) != (teacher.shape, teacher.num_classes):
            raise ValueError(
                f"--student {folder} draws {student.shape} of {student.num_classes} classes, and --teacher "
                f"{teacher.shape} of {teacher.num_classes}. Pass a student of this teacher."
            )
        number = len(student.times)
        students[f"{name}, {number} step{'s' * (number > 1)}"] = student
    return students


def load_controller(config: Play, teacher: Teacher) -> tuple[Any, str]:
    """Return the teacher under the adapter, or None, and what the page says of it.

    Raises ``ValueError`` for an adapter that cannot be read, or that is of another teacher.
    """
    folder = config.control
    if folder is None and ships("adapter", config.teacher):
        folder = shipped(f"adapter {config.teacher}")()
        return found("controlnet.play:load_controller")(folder, teacher), "the canny adapter that ships"
    if folder is None:
        return None, NO_CONTROL
    return found("controlnet.play:load_controller")(folder, teacher), printable(str(folder))


def check_mesh(run: Path) -> Path:
    """Return the mesh of a run. Raises ``ValueError`` where there is none, or none that can be shown."""
    path = run / MESH
    if not path.is_file():
        raise ValueError(f"--scene {run} holds no {MESH}. Pass the --out of a finished `scorefield sds`.")
    with open_regular(path) as file:
        start, size = file.read(4), path.stat().st_size
    if start != b"glTF" or size > MOST_MESH:
        raise ValueError(f"--scene: {path} is no glb file of at most {MOST_MESH:,} bytes. Export the scene again.")
    return path


def with_encoders(teacher: Teacher) -> Teacher:
    """Return the teacher with its text encoders loaded, for good: a prompt shall not wait for a file."""
    return replace(teacher, texts=_held(teacher.texts), negatives=_held(teacher.negatives))


def _held(texts: Texts | None) -> Texts | None:
    if not isinstance(texts, PromptEncoder) or texts.load is None:
        return texts
    encode = texts.load()
    return replace(texts, load=lambda: encode)


@contextmanager
def forgetful(teacher: Teacher) -> Iterator[Teacher]:
    """Give a teacher for one request: prompts that it encodes are gone from memory and disk at the end."""
    with TemporaryDirectory() as folder:

        def fresh(texts: Texts | None) -> Texts | None:
            if not isinstance(texts, PromptEncoder):
                return texts
            return replace(texts, folder=Path(folder), told=set(), kept={})

        with torch.no_grad():
            yield replace(teacher, texts=fresh(teacher.texts), negatives=fresh(teacher.negatives))
