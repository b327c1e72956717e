"""Pictures and videos as files, whole or not at all. Frames are (n, 3, h, w) in [0, 1]."""

import errno
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from scorefield.atomic import whole_file
from sds.extra import check_extra
from sds.turntable import Frames

# Players guess the matrix of colours by the size of a picture unless it is named; and with the index in front, a
# browser plays before it has loaded the whole file.
OUTPUT = ["-vf", "scale=out_color_matrix=bt709:out_range=tv", "-colorspace", "bt709", "-movflags", "+faststart"]


def check_encoder(folder: Path) -> None:
    """Try to write in ``folder``, and to encode two small frames there.

    Raises:
        ValueError: there is no encoder, or it does not work.
        OSError: nothing can be written.
    """
    check_extra("imageio_ffmpeg")
    trial = folder / "trial.mp4"
    try:
        trial.write_bytes(bytes(1 << 16))  # a full disk is not the encoder's fault
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
    """An H.264 video that browsers play; an odd height or width gets one more row or column, the last one again.

    Raises:
        ValueError: no frames, or a missing imageio-ffmpeg.
        OSError: the encoder failed or the disk is full; nothing is left.
    """
    check_extra("imageio_ffmpeg")
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
    # The encoder's own exit code is not looked at: on a full disk it leaves a torso and says nothing.
    from imageio_ffmpeg import count_frames_and_secs

    try:
        found = count_frames_and_secs(path)[0]
    except RuntimeError:
        found = 0
    if found != num_frames:
        raise OSError(errno.EIO, f"the video encoder wrote {found} of {num_frames} frames: the disk may be full")


def write_gif(frames: Frames, path: Path, *, fps: float = 24.0) -> Path:
    """An endless gif. Durations are in hundredths of a second; equal frames in a row become one longer frame.

    Raises ``ValueError`` for no frames.
    """
    _check(frames, fps)
    first, *others = [Image.fromarray(frame).quantize() for frame in as_pixels(frames)]
    with whole_file(path) as temporary:
        first.save(temporary, save_all=True, append_images=others, duration=max(round(100 / fps), 2) * 10, loop=0)
    return path


def write_png(picture: Tensor, path: Path) -> Path:
    """One picture (3, h, w) in [0, 1]."""
    with whole_file(path) as temporary:
        Image.fromarray(as_pixels(picture[None])[0]).save(temporary)
    return path


def as_pixels(frames: Frames) -> Any:
    """Frames as a numpy array (n, h, w, 3) of bytes."""
    return (frames.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _check(frames: Frames, fps: float) -> None:
    shape = tuple(frames.shape)
    if len(shape) != 4 or shape[0] < 1 or shape[1] != 3 or not 0 < fps <= 100:
        raise ValueError(f"a video needs frames (n, 3, h, w), n >= 1, and fps in (0, 100]; got {shape} and {fps}.")
