"""The page: four tabs over the functions of :mod:`scorefield.play.drawing`, one request after the other.

Importing this imports gradio, which reads its settings from the environment then.
"""

import html
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from torch import Tensor

from scorefield.cli import found
from scorefield.play.drawing import (
    MOST_STEPS,
    choices_of,
    controlled_picture,
    draw_picture,
    edited_pictures,
    note_on,
)
from scorefield.play.models import NO_STUDENT, Models
from scorefield.play.sketch import CANVAS, CANVAS_STYLE, ON_LOAD, SEND
from scorefield.play.uploads import read_drawing, read_map, read_upload

Make = Callable[..., Iterator[Any]]
"""A generator of what a tab shows, step by step."""

MOST_WAITING = 16
"""Requests that wait; more are refused, with a message."""

KEPT = (60, 600)
"""Seconds between two looks at old pictures and uploads, and the age at which they are deleted."""

ONE: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1}
"""All tabs share one worker: an edit changes what the network's layers do while it draws."""

EDGES, AS_IS = "edges of the picture (Canny)", "the picture itself: white lines, depth, ..."

SMALL = 128
"""Pixels along a side, up to which pictures are enlarged."""

PROMPT = "a red mug on a white background, side view"


def build_page(models: Models, folder: Path) -> gr.Blocks:
    """Return the page. ``folder`` is gradio's own, which the mesh is copied into: no other file is ever served."""
    with gr.Blocks(title="scorefield", analytics_enabled=False, delete_cache=KEPT) as page:
        gr.Markdown(f"# scorefield\nA frozen teacher, {html.escape(models.name)}, and what learned from it.")
        with gr.Tab("Draw"):
            draw_tab(models)
        with gr.Tab("Control"):
            control_tab(models)
        with gr.Tab("Edit"):
            edit_tab(models)
        with gr.Tab("Scene"):
            scene_tab(models, folder)
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=1, api_open=False)
    return page


def draw_tab(models: Models) -> None:
    """Teacher and students, from the same noise."""
    gr.Markdown("The teacher beside its students, from the same noise. A student has guidance built in.")
    with gr.Row():
        with gr.Column(scale=2):
            words = words_of(models)
            button = gr.Button("Draw", variant="primary")
        settings = numbers(models, models.steps)
    shown: list[Any] = []
    with gr.Row():
        for name in (f"{models.name}, the teacher", *models.students):
            with gr.Column(min_width=200):
                shown += [picture(models, name), gr.Markdown()]
    if not models.students:
        gr.Markdown(NO_STUDENT)

    def draw(prompt: Any, seed: Any, steps: Any, guidance: Any) -> Iterator[list[Any]]:
        asked = {"seed": seed, "steps": steps, "guidance": guidance}
        blank: list[Any] = [gr.skip()] * len(shown)
        for place, student in enumerate(models.students.values(), 1):  # first: they take no time
            drawn = draw_picture(student, prompt, **asked)
            blank[2 * place : 2 * place + 2] = drawn.pixels, drawn.cost()
            yield blank
        drawn = draw_picture(models.teacher, prompt, **asked)
        yield [drawn.pixels, " ".join([drawn.cost(), note_on(models.teacher, prompt)]), *blank[2:]]

    wire(button, draw, [words, *settings], shown, "draw", also=words)


def control_tab(models: Models) -> None:
    """A drawing, or a picture and its edges, and what is drawn under their control."""
    if models.controller is None:
        gr.Markdown(models.notes["control"])
        return
    gr.Markdown(
        "Draw white lines, or upload a picture, whose edges are found here. The adapter makes the teacher follow."
    )
    with gr.Row():
        with gr.Column(min_width=280):
            gr.HTML(html_template=CANVAS, css_template=CANVAS_STYLE, js_on_load=ON_LOAD, elem_id="sketch")
            drawing = gr.Textbox(visible="hidden", elem_id="drawing")
        with gr.Column(min_width=280):
            upload: Any = gr.Image(
                label="or a picture, in place of the drawing", sources=["upload"], type="filepath", height=280,
                buttons=[], interactive=True,
            )  # fmt: skip
            kind = gr.Radio([EDGES, AS_IS], value=EDGES, label="What to take from the upload")
            low = gr.Slider(0, 1000, 100, step=10, label="Canny's lower threshold")
            high = gr.Slider(0, 1000, 200, step=10, label="Canny's higher threshold")
        with gr.Column(min_width=280):
            prompt = gr.Textbox(PROMPT, label="Prompt", lines=2, max_lines=4)
            settings = numbers(models, min(20, models.steps))
            button = gr.Button("Draw under control", variant="primary")
    upload.preprocess = path_of  # gradio would decode it first
    with gr.Row():
        shown = [picture(models, name) for name in ("What it follows", "What the teacher draws then")]
    cost = gr.Markdown()

    def control(
        drawing: Any, path: Any, kind: Any, low: Any, high: Any, prompt: Any, *numbers: Any
    ) -> Iterator[list[Any]]:
        hint = hint_of(models, drawing, path, kind, low, high)
        seen = np.asarray((hint[0].mean(0) * 255).round().byte())
        yield [seen, gr.skip(), gr.skip()]
        asked = dict(zip(("seed", "steps", "guidance"), numbers, strict=True))
        drawn = controlled_picture(models.teacher, models.controller, hint, prompt, **asked)
        yield [seen, drawn.pixels, " ".join([drawn.cost(), note_on(models.teacher, prompt)])]

    inputs = [drawing, upload, kind, low, high, prompt, *settings]
    wire(button, control, inputs, [*shown, cost], "control", js=SEND)


def hint_of(models: Models, drawing: Any, path: Any, kind: Any, low: Any, high: Any) -> Tensor:
    """Return the hint of a request, (1, c, h, w) in [0, 1]: of an uploaded picture, else of what was drawn.

    Raises ``ValueError`` for neither, and for what :mod:`scorefield.play.uploads` refuses.
    """
    size = models.teacher.size
    if not path:
        return read_drawing(drawing, size)
    if kind == AS_IS:
        return read_map(path, size)
    if not all(type(one) in (int, float) and 0 <= one <= 2000 for one in (low, high)):
        raise ValueError("Canny's thresholds must lie in [0, 2000].")
    edges: Tensor = found("controlnet.play:edges")(read_upload(path, size), float(low), float(high))
    return edges


def edit_tab(models: Models) -> None:
    """One picture under two prompts."""
    if not models.edits:
        gr.Markdown(models.notes["edit"])
        return
    gr.Markdown(
        "Change a word: both pictures are drawn together, and the second takes over the first one's attention "
        "(Prompt-to-Prompt)."
    )
    with gr.Row():
        with gr.Column():
            source = gr.Textbox(PROMPT, label="Prompt of the picture", lines=2, max_lines=4)
            target = gr.Textbox(PROMPT.replace("red", "blue"), label="Prompt of the edit", lines=2, max_lines=4)
        with gr.Column():
            keep = gr.Slider(
                0, 1, 1.0, step=0.05, label="How much stays", info="1: a new colour. 0.8: a background. 0.4: a "
                "shape. 0: the same noise, no control.",
            )  # fmt: skip
            button = gr.Button("Edit", variant="primary")
        settings = numbers(models, min(20, models.steps))
    with gr.Row():
        shown = [picture(models, name) for name in ("The picture", "The edit")]
    cost = gr.Markdown()

    def edit(source: Any, target: Any, keep: Any, seed: Any, steps: Any, guidance: Any) -> Iterator[list[Any]]:
        before, after = edited_pictures(
            models.teacher, source, target, keep=keep, seed=seed, steps=steps, guidance=guidance
        )
        told = [f"{after.cost()} for both.", note_on(models.teacher, source), note_on(models.teacher, target)]
        yield [before.pixels, after.pixels, " ".join(told)]

    wire(button, edit, [source, target, keep, *settings], [*shown, cost], "edit", also=target)


def scene_tab(models: Models, folder: Path) -> None:
    """The mesh of a run."""
    if models.mesh is None:
        gr.Markdown(models.notes["scene"])
        return
    own = folder / "scene.glb"
    shutil.copyfile(models.mesh, own)
    gr.Markdown("Drag to turn, scroll to zoom.")
    gr.Model3D(str(own), label=models.notes["scene"], height=520, interactive=False, buttons=[])


def words_of(models: Models) -> Any:
    """Return the field for what a picture shall show: a prompt, a class, or nothing."""
    if models.teacher.texts is not None:
        return gr.Textbox(PROMPT, label="Prompt", lines=2, max_lines=4)
    classes = choices_of(models.teacher)
    if not classes:
        return gr.Textbox("", label="This model takes no prompt", interactive=False)
    return gr.Dropdown(classes, value=classes[0][1], label="Class")


def numbers(models: Models, steps: int) -> list[Any]:
    """Return the fields for seed, steps and guidance."""
    with gr.Column(min_width=240):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        calls = gr.Slider(1, MOST_STEPS, min(steps, MOST_STEPS), step=1, label="Steps of the teacher")
        guidance = gr.Slider(0, max(15.0, models.guidance), models.guidance, step=0.5, label="Guidance")
    return [seed, calls, guidance]


def picture(models: Models, label: str) -> gr.Image:
    """Return a place for a picture; small ones are enlarged, pixel by pixel."""
    small = max(models.teacher.size) <= SMALL
    return gr.Image(
        label=label, format="png", height=320, interactive=False, buttons=["download"],
        elem_classes=["made", "small"] if small else ["made"],
    )  # fmt: skip


def path_of(payload: Any) -> str | None:
    """Return where gradio keeps an upload, undecoded."""
    return None if payload is None else payload.path


def wire(
    button: gr.Button, make: Make, inputs: list[Any], outputs: list[Any], name: str, *, js: str | None = None,
    also: Any = None,
) -> None:  # fmt: skip
    """Let a button, and the return key in ``also``, show what ``make`` yields; its errors are messages."""

    def handler(*given: Any) -> Iterator[Any]:
        try:
            yield from make(*given)
        except Exception as error:
            raise gr.Error(explained(error), print_exception=False) from None

    places = [one for one in outputs if isinstance(one, gr.Image)]
    shared: dict[str, Any] = {"js": js, "show_progress_on": places, **ONE}
    button.click(handler, inputs, outputs, api_name=name, **shared)
    if isinstance(also, gr.Textbox):
        also.submit(handler, inputs, outputs, api_visibility="private", **shared)


def explained(error: Exception) -> str:
    """Return one line for the page; a fault of the program is told in full on the terminal alone."""
    if isinstance(error, ValueError | FloatingPointError):
        return html.escape(str(error).partition("\n")[0])
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "There is not enough memory for this. Start scorefield play with a smaller --size."
    traceback.print_exception(error, file=sys.stderr)
    return "Something went wrong here. The terminal that serves this page says what."
