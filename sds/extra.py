"""Libraries that only the export needs, asked for before any work starts."""

from importlib.util import find_spec

PACKAGES = {"skimage": "scikit-image", "trimesh": "trimesh", "imageio_ffmpeg": "imageio-ffmpeg"}
"""By the name they are imported under."""


def check_extra(*modules: str) -> None:
    """Raise ``ValueError``, naming what to install, for modules of the extra ``nerf`` that are missing."""
    missing = [PACKAGES[module] for module in modules if find_spec(module) is None]
    if missing:
        raise ValueError(f'this needs {" and ".join(missing)}. Install: pip install "scorefield[nerf]"')
