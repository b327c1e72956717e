"""A rendered world of nine solids with captions, so that teachers, scenes and judges mean something offline.

Conventions:

- The world has z up, and the front of a solid points to +x; azimuth 0 looks at it, azimuth 90 from +y. Degrees.
- ``camera_to_world`` is nerfstudio's and OpenGL's: x right, y up, z backwards.
- Pictures are in [-1, 1], (b, 3, h, w), in display values; ``toyworld.render`` states how they are lit.
"""

from pathlib import Path


def pipeline_folder() -> Path:
    """The trained text-to-image pipeline that ships: a ``StableDiffusionPipeline`` of diffusers, 64 x 64 pixels.

        StableDiffusionPipeline.from_pretrained(pipeline_folder())
        scorefield.models.teacher.load_teacher("toyworld")

    Its README says how it was made and what it can draw.
    """
    return Path(__file__).parent / "pipeline"
