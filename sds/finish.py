"""A learned scene as what ``sds.export`` takes."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from scorefield.atomic import whole_file
from sds.exportable import Colour, Exportable
from sds.scene import Render, Scene
from sds.views import Views


def exportable(
    scene: Scene, *, distance: float, field_of_view: float, background: Colour = (1.0, 1.0, 1.0)
) -> Exportable:
    """The scene in its albedo before one colour: what a mesh with vertex colours can show.

    Args:
        scene: on any device.
        distance: of the cameras from the origin.
        field_of_view: of the cameras, vertical, in degrees.
        background: RGB in [0, 1].
    """
    device = next(scene.parameters()).device
    focal = 0.5 / math.tan(math.radians(field_of_view) / 2)
    backdrop = torch.tensor(background, device=device) * 2 - 1

    def render(camera_to_world: Tensor, size: int) -> Render:
        camera = camera_to_world.float()
        angles = camera.new_zeros(len(camera))
        views = Views(camera, angles + focal, angles, angles)
        # Slopes need a graph of their own; one of the parameters is not kept.
        pictures = scene(views, height=size, width=size, background=backdrop, normals=True)
        # Faint matter in front of nothing has normals too, and would be seen in a picture of normals.
        return replace(pictures, normals=pictures.normals * (pictures.opacity > 0.5))

    half = scene.field.half_size
    return Exportable(
        density=lambda points: scene.field(points).density, colour=lambda points: scene.field(points).albedo,
        render=render, lower=(-half,) * 3, upper=(half,) * 3, field_of_view=field_of_view, distance=distance,
        background=background, device=device,
    )  # fmt: skip


def save_scene(scene: nn.Module, path: Path) -> None:
    """Write the weights of a scene, or of a canvas, as safetensors; the file appears whole or not at all."""
    with whole_file(path) as temporary:
        save_model(scene, str(temporary))


def load_scene(scene: nn.Module, path: Path) -> None:
    """Read the weights of a scene that was built alike.

    Raises ``ValueError`` where there is no such file, or it is damaged or of another kind of scene.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected the scene.safetensors of a finished run.")
    try:
        load_model(scene, str(path))
    except (RuntimeError, OSError, SafetensorError) as error:
        raise ValueError(f"{path} holds no weights of such a scene: {str(error).splitlines()[0]}") from error
