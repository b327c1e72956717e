"""What ships under a name: functions of the toy world, found when they are asked for.

Nothing below the toy world imports it. A name such as ``--data toyworld`` stands for one of these functions, as
``module:function`` stands for a user's own.
"""

import importlib
from typing import Any

FUNCTIONS = {
    "teacher toyworld": "toyworld:pipeline_folder",
    "adapter toyworld": "toyworld:adapter_folder",
    "student toyworld": "toyworld:student_folder",
    "teacher circles.json": "toyworld.circles:load_circles",
    "images digits": "toyworld.digits:training_images",
    "held-out digits": "toyworld.digits:held_out_images",
    "prompts toyworld": "toyworld.renders:world_texts",
    "words toyworld": "toyworld.captions:unknown_words",
    "judge toyworld": "toyworld.bench:text_watch",
    "classifier toyworld": "toyworld.attacked:shape_classifier",
    "attacked toyworld": "toyworld.attacked:shape_images",
    "shapes toyworld": "toyworld.attacked:shape_names",
    "control toyworld": "toyworld.control:solids",
    "control circles": "toyworld.control:circles",
}
"""What a function gives, and under which name: its module and its name."""


def shipped(what: str) -> Any:
    """Return the function that :data:`FUNCTIONS` names, such as ``prompts toyworld``."""
    module, _, function = FUNCTIONS[what].partition(":")
    return getattr(importlib.import_module(module), function)


def ships(kind: str, name: str) -> bool:
    """Return True where something of this kind, such as ``control``, ships under the name."""
    return f"{kind} {name}" in FUNCTIONS
