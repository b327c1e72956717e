"""Which options of ``scorefield sds`` cannot work: said before anything is loaded or written."""

from pathlib import Path
from tempfile import TemporaryDirectory

from sds.export import Export
from sds.extra import check_extra
from sds.options import Config, check
from sds.parts import cameras_at, colour_of
from sds.video import check_encoder
from sds.views import check_nerfstudio


def check_scene(config: Config) -> None:
    """Raise ``ValueError`` for options that cannot work, or that need a library which is not there."""
    check(config)
    if config.canvas:
        return
    try:
        check_nerfstudio()
    except ImportError as error:
        raise ValueError(str(error)) from error
    cameras_at(config, 0)  # which refuses what cameras cannot be
    for name in config.backdrops:
        colour_of(name)
    check_extra("skimage", "trimesh", "imageio_ffmpeg")
    with TemporaryDirectory() as folder:
        check_encoder(Path(folder))
    export_choices(config)


def export_choices(config: Config) -> Export:
    """How finely, and from how high, the scene is exported."""
    return Export(
        resolution=config.mesh_resolution, size=config.turntable_size, elevation=sum(config.elevation) / 2
    )
