"""A rendered world of nine solids with captions, so that teachers, scenes and judges can be tested offline.

Conventions:

- In the world z is up, and the front of a solid faces +x. A camera at azimuth 0 sees the front, one at azimuth 90
stands on +y. Angles are in degrees.
- ``camera_to_world`` follows nerfstudio and OpenGL: x right, y up, z backwards.
- Pictures are (b, 3, h, w) in [-1, 1], in display values; :mod:`toyworld.render` says how they are lit.
"""

from pathlib import Path


def pipeline_folder() -> Path:
    """Return the folder of the shipped text-to-image pipeline, diffusers' ``StableDiffusionPipeline``, 64 x 64.

        StableDiffusionPipeline.from_pretrained(pipeline_folder())
        scorefield.models.teacher.load_teacher("toyworld")

    Its README says how it was made and what it can draw.
    """
    return Path(__file__).parent / "pipeline"


def student_folder() -> Path:
    """Return the folder of the shipped one-step student of this pipeline, a LoRA with a card."""
    return Path(__file__).parent / "student"


def adapter_folder() -> Path:
    """Return the folder of the shipped ControlNet of this pipeline, for canny edges, with a card."""
    return Path(__file__).parent / "canny"
