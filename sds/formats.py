"""Writers of meshes (glb, obj with mtl and png), points (ply), videos (mp4, gif) and pictures (png).

Each file appears whole or not at all. In the world z is up and the front is +x. In glb and obj files y is up and
the front is +z, as glTF 2.0 (section 3.4) has it; Blender turns that into its own front view. A point cloud keeps
the world's coordinates. Frames of videos are (n, 3, h, w) in [0, 1].
"""

import errno
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from scorefield.atomic import whole_file
from sds.mesh import Mesh
from sds.turntable import Frames

PACKAGES = {
    "skimage": "scikit-image", "trimesh": "trimesh", "imageio_ffmpeg": "imageio-ffmpeg", "xatlas": "xatlas",
    "fast_simplification": "fast-simplification",
}  # fmt: skip
"""Name on PyPI of each module."""

WITHOUT = {"fast-simplification": "--faces 0", "xatlas": "--texture 0"}
"""Option with which a package is not needed."""


def check_installed(*modules: str) -> None:
    """Raise ``ValueError`` if any of these modules is missing. The message says what to install."""
    missing = [PACKAGES[module] for module in modules if find_spec(module) is None]
    if missing:
        raise ValueError(
            f"the export needs packages that are not installed: {', '.join(missing)}. Install them: "
            'pip install "scorefield[nerf]".'
            + "".join(f" Or do without: {WITHOUT[name]}." for name in WITHOUT if name in missing)
        )


MATERIAL: dict[str, Any] = {
    "pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0}, "doubleSided": True,
}  # fmt: skip
"""Material of an exported mesh. Without one, viewers use glTF's default: metal, which is black where nothing is
reflected."""

SAMPLER = {"magFilter": 9729, "minFilter": 9987, "wrapS": 33071, "wrapT": 33071}
"""Sampler of a texture: LINEAR, LINEAR_MIPMAP_LINEAR and CLAMP_TO_EDGE, since its sides are no neighbours."""


def y_up(vectors: Tensor) -> Tensor:
    """Return world coordinates (n, 3) rotated to glTF's axes: +z (up) becomes +y and +x (front) becomes +z."""
    return vectors[:, [1, 2, 0]]


def linear(colours: Tensor) -> Tensor:
    """Return display values in [0, 1] as linear light: the inverse of sRGB's transfer function (IEC 61966-2-1)."""
    return torch.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)


def write_glb(mesh: Mesh, path: Path) -> Path:
    """Write a binary glTF 2.0 file with normals and a rough, non-metallic material; y is up.

    A texture is written as a PNG, in display values, as the standard wants it. Without one, COLOR_0 holds linear
    light (section 3.7.2.1), in float32: 8 bits would show bands in dark colours.
    """
    check_installed("trimesh")
    from trimesh.exchange.gltf import export_glb

    found = _trimesh(mesh)
    if mesh.texture is None:
        found.vertex_attributes["_LINEAR"] = linear(mesh.colours).numpy()
    return _write(path, export_glb(found, include_normals=True, tree_postprocessor=_completed))


def _completed(tree: dict[str, Any]) -> None:
    primitive = tree["meshes"][0]["primitives"][0]
    material = {"name": "vertex colours", **MATERIAL}
    if "_LINEAR" in primitive["attributes"]:
        # trimesh stores colours in 8 bits, but attributes of any other name as they are.
        primitive["attributes"]["COLOR_0"] = primitive["attributes"].pop("_LINEAR")
    else:
        factors = {**MATERIAL["pbrMetallicRoughness"], "baseColorTexture": {"index": 0}}
        material = {**material, "name": "texture", "pbrMetallicRoughness": factors}
        tree["samplers"], tree["textures"] = [SAMPLER], [{"sampler": 0, "source": 0}]
    primitive["material"] = 0
    tree["materials"] = [material]
    for accessor in (primitive["indices"], *primitive["attributes"].values()):
        view = tree["bufferViews"][tree["accessors"][accessor]["bufferView"]]
        view["target"] = 34963 if accessor == primitive["indices"] else 34962  # ELEMENT_ARRAY_BUFFER, ARRAY_BUFFER


def write_obj(mesh: Mesh, path: Path) -> Path:
    """Write a Wavefront obj file with normals, y up.

    A texture is written beside it, as a ``.png`` and a ``.mtl`` of the same name. Without one, each vertex line
    ends with its colour, in display values, which not every program reads.
    """
    check_installed("trimesh")
    from trimesh.exchange.obj import export_obj

    found = _trimesh(mesh, path.stem)
    if mesh.texture is None:
        found.visual.vertex_colors = _bytes(mesh.colours)
    text, others = export_obj(
        found, include_normals=True, return_texture=True, mtl_name=f"{path.stem}.mtl", header="scorefield: y is up"
    )
    for name, content in others.items():  # the material, and the picture
        _write(path.with_name(name), content)
    return _write(path, text.encode())


def write_ply(points: Tensor, colours: Tensor, path: Path) -> Path:
    """Write a binary ply of points (n, 3) in world coordinates (z up), with colours (n, 3) in [0, 1] as bytes."""
    check_installed("trimesh")
    from trimesh import PointCloud

    return _write(path, PointCloud(points.numpy(), colors=_bytes(colours)).export(file_type="ply"))


def _trimesh(mesh: Mesh, name: str = "scene") -> Any:
    from trimesh import Trimesh

    normals = None if mesh.normals is None else y_up(mesh.normals).numpy()
    found = Trimesh(y_up(mesh.vertices).numpy(), mesh.faces.numpy(), vertex_normals=normals, process=False)
    if mesh.texture is not None:
        from trimesh.visual import TextureVisuals
        from trimesh.visual.material import SimpleMaterial

        right, down = mesh.texture.places.unbind(1)
        picture = Image.fromarray(as_pixels(mesh.texture.picture[None])[0])
        white, black = (255, 255, 255, 255), (0, 0, 0, 255)
        material = SimpleMaterial(name=name, image=picture, diffuse=white, ambient=white, specular=black)
        # trimesh counts upwards from the lower left corner, as obj does, and turns that round for glTF.
        found.visual = TextureVisuals(torch.stack([right, 1 - down], dim=1).numpy(), material=material)
    return found


def _bytes(colours: Tensor) -> Any:
    return (colours * 255).round().to(torch.uint8).numpy()


def _write(path: Path, content: bytes) -> Path:
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
    return path


# Players guess the colour matrix from the size of the picture unless the file names it. With the index in front, a
# browser starts to play before it has loaded the whole file.
OUTPUT = ["-vf", "scale=out_color_matrix=bt709:out_range=tv", "-colorspace", "bt709", "-movflags", "+faststart"]


def check_encoder(folder: Path) -> None:
    """Check that files can be written in ``folder``, and that a video of two small frames can be encoded there.

    Raises:
        ValueError: There is no encoder, or it does not work.
        OSError: Nothing can be written.
    """
    check_installed("imageio_ffmpeg")
    trial = folder / "trial.mp4"
    try:
        trial.write_bytes(bytes(1 << 16))  # a full disk raises here, and is not blamed on the encoder
        _try_encoder(trial)
    finally:
        trial.unlink(missing_ok=True)


def _try_encoder(path: Path) -> None:
    try:
        write_mp4(torch.zeros(2, 3, 16, 16), path)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"no video can be encoded here ({str(error).splitlines()[0]}). An ffmpeg with libx264 is needed: "
            'pip install "scorefield[nerf]" brings one; IMAGEIO_FFMPEG_EXE, if set, names another.'
        ) from error


def write_mp4(frames: Frames, path: Path, *, fps: float = 24.0) -> Path:
    """Write an H.264 video that browsers play.

    An odd height or width grows by one: the last row or column is repeated.

    Raises:
        ValueError: There are no frames, or imageio-ffmpeg is missing.
        OSError: The encoder failed or the disk is full; no file is left.
    """
    check_installed("imageio_ffmpeg")
    from imageio_ffmpeg import write_frames

    _check(frames, fps)
    height, width = frames.shape[-2:]
    even = torch.nn.functional.pad(frames, (0, width % 2, 0, height % 2), mode="replicate")
    pixels = as_pixels(even)
    with whole_file(path) as temporary:
        writer = write_frames(
            temporary, (pixels.shape[2], pixels.shape[1]), fps=fps, codec="libx264", quality=8, macro_block_size=2,
            ffmpeg_log_level="error", output_params=OUTPUT,
        )  # fmt: skip
        writer.send(None)
        for frame in pixels:
            writer.send(frame.tobytes())
        writer.close()
        _check_whole(temporary, len(pixels))
    return path


def _check_whole(path: Path, num_frames: int) -> None:
    # imageio-ffmpeg ignores the encoder's exit code: on a full disk the file is cut off, and nothing is raised.
    from imageio_ffmpeg import count_frames_and_secs

    try:
        found = count_frames_and_secs(path)[0]
    except RuntimeError:
        found = 0
    if found != num_frames:
        raise OSError(errno.EIO, f"the video encoder wrote {found} of {num_frames} frames: the disk may be full")


def write_gif(frames: Frames, path: Path, *, fps: float = 24.0) -> Path:
    """Write a gif that repeats endlessly.

    Frames last whole hundredths of a second. Equal frames in a row become one longer frame.

    Raises ``ValueError`` if there are no frames.
    """
    _check(frames, fps)
    first, *others = [Image.fromarray(frame).quantize() for frame in as_pixels(frames)]
    with whole_file(path) as temporary:
        first.save(temporary, save_all=True, append_images=others, duration=max(round(100 / fps), 2) * 10, loop=0)
    return path


def write_png(picture: Tensor, path: Path) -> Path:
    """Write one picture (3, h, w) in [0, 1]."""
    with whole_file(path) as temporary:
        Image.fromarray(as_pixels(picture[None])[0]).save(temporary)
    return path


def as_pixels(frames: Frames) -> Any:
    """Return frames as a numpy array (n, h, w, 3) of bytes."""
    return (frames.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _check(frames: Frames, fps: float) -> None:
    shape = tuple(frames.shape)
    if len(shape) != 4 or shape[0] < 1 or shape[1] != 3 or not 0 < fps <= 100:
        raise ValueError(f"a video needs frames (n, 3, h, w), n >= 1, and fps in (0, 100]; got {shape} and {fps}.")
