"""Cameras of a turntable, what is made of pictures, and videos read again frame by frame."""

import math
import sys

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from sds.exportable import Rendered
from sds.turntable import colour_frames, contact_sheet, depth_frames, normal_frames, turntable_cameras
from sds.video import check_encoder, write_gif, write_mp4, write_png
from toyworld.camera import orbit

WHITE = (1.0, 1.0, 1.0)


def test_cameras_go_round_once_with_elevations_in_turn():
    cameras = turntable_cameras(6, elevations=(10.0, -40.0), distance=2.5)
    expected = torch.stack([orbit(60 * i, (10.0, -40.0)[i % 2], 2.5) for i in range(6)])
    torch.testing.assert_close(cameras, expected.float(), atol=1e-6, rtol=0)
    # The first stands in front of the object (+x), the second to the left of the one who looks from it (+y).
    assert cameras[0, 0, 3] > 2
    assert cameras[1, 1, 3] > 1


@pytest.mark.parametrize(
    "bad",
    [{"num_views": 0}, {"elevations": ()}, {"elevations": (91.0,)}, {"distance": 0.0}, {"distance": math.inf}],
)
def test_a_turntable_that_cannot_be_is_refused(bad):
    with pytest.raises(ValueError, match="a turntable needs num_views >= 1"):
        turntable_cameras(**{"num_views": 4, **bad})


def pictures(rgb, opacity, depth=None, normals=None):
    """One row of pixels: b pictures of height 1."""
    opacity = torch.tensor(opacity).view(1, 1, 1, -1)
    rgb = torch.tensor(rgb).T.reshape(1, 3, 1, -1)
    depth = torch.zeros_like(opacity) if depth is None else torch.tensor(depth).view(1, 1, 1, -1)
    normals = torch.zeros_like(rgb) if normals is None else torch.tensor(normals).T.reshape(1, 3, 1, -1)
    return Rendered(rgb * 2 - 1, depth, normals, opacity)


def test_a_background_is_exchanged_exactly():
    colour, old, new = torch.tensor([0.2, 0.4, 0.9]), torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.0, 0.25, 1.0])
    opacity = [0.0, 0.3, 1.0]
    over_old = [(a * colour + (1 - a) * old).tolist() for a in opacity]
    over_new = torch.stack([a * colour + (1 - a) * new for a in opacity])
    seen = pictures(over_old, opacity)
    frames = colour_frames(seen, tuple(old.tolist()), tuple(new.tolist()))
    torch.testing.assert_close(frames[0, :, 0].T, over_new)
    torch.testing.assert_close(colour_frames(seen, tuple(old.tolist()))[0, :, 0].T, torch.tensor(over_old))


def test_distances_are_bright_near_and_dark_far_on_the_scale_of_what_is_opaque():
    seen = pictures([[0.0] * 3] * 4, [1.0, 1.0, 0.25, 0.0], depth=[2.0, 4.0, 9.0, 0.0])
    frames = depth_frames(seen, (1.0, 1.0, 0.0))[0, :, 0].T
    expected = torch.tensor([[0.85] * 3, [0.15] * 3, [0.7875, 0.7875, 0.0375], [1.0, 1.0, 0.0]])
    torch.testing.assert_close(frames, expected)
    nothing = pictures([[0.0] * 3] * 2, [0.0, 0.1], depth=[0.0, 3.0])
    assert depth_frames(nothing).isfinite().all()


def test_normals_are_colours_of_the_world_s_axes():
    seen = pictures([[0.0] * 3] * 4, [1.0, 1.0, 1.0, 0.5],
                    normals=[[0.5, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.6, 0.8], [0.0, 0.0, 1.0]])  # fmt: skip
    frames = normal_frames(seen, (0.0, 0.0, 0.0))[0, :, 0].T
    expected = [[1.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.8, 0.9], [0.25, 0.25, 0.5]]
    torch.testing.assert_close(frames, torch.tensor(expected))


def test_a_contact_sheet_has_every_picture_in_its_row_and_column():
    rows = [torch.rand(3, 3, 4, 5, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    sheet = contact_sheet(rows, gap=2, background=(0.1, 0.2, 0.3))
    assert sheet.shape == (3, 2 * 4 + 3 * 2, 3 * 5 + 4 * 2)
    left = torch.ones(sheet.shape[1:], dtype=torch.bool)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            window = slice(2 + 6 * i, 6 + 6 * i), slice(2 + 7 * j, 7 + 7 * j)
            assert torch.equal(sheet[:, *window], picture)
            left[window] = False
    torch.testing.assert_close(sheet[:, left], torch.tensor([0.1, 0.2, 0.3])[:, None].expand(-1, int(left.sum())))


def test_a_contact_sheet_of_unequal_rows_is_refused():
    for rows in ([], [torch.zeros(0, 3, 4, 4)], [torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4)]):
        with pytest.raises(ValueError, match="rows must be pictures of one shape"):
            contact_sheet(rows)


# Videos. A coloured square moves over grey, so that every frame differs and its place in time can be told.


def moving(num, height=32, width=48):
    frames = torch.full((num, 3, height, width), 0.5)
    for i in range(num):
        frames[i, :, 8:24, 3 * i : 3 * i + 8] = torch.tensor([0.9, 0.2, 0.1])[:, None, None]
    return frames


def read_mp4(path):
    reader = imageio_ffmpeg.read_frames(path)
    facts = next(reader)
    width, height = facts["size"]
    return facts, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


@pytest.mark.parametrize(("height", "width"), [(32, 48), (33, 47), (24, 46)])
def test_an_mp4_has_its_frames_in_order_in_their_size_and_colours(tmp_path, height, width):
    frames = moving(12, height, width)
    facts, found = read_mp4(write_mp4(frames, tmp_path / "a.mp4", fps=12))
    assert found.shape == (12, height + height % 2, width + width % 2, 3)
    assert facts["codec"] == "h264"
    assert facts["fps"] == pytest.approx(12)
    assert facts["duration"] == pytest.approx(1.0, abs=0.01)
    for i, frame in enumerate(found):
        expected = frames[i].permute(1, 2, 0).numpy() * 255
        inner = np.s_[10:18, 3 * i + 2 : 3 * i + 6]
        assert np.abs(frame[inner] - expected[inner]).mean() < 4
        assert np.abs(frame[:height, :width] - expected).mean() < 4
    if height % 2:
        assert np.abs(found[:, -1].astype(int) - found[:, -2]).mean() < 4


def test_a_gif_has_its_frames_and_repeats(tmp_path):
    frames = moving(10)
    with Image.open(write_gif(frames, tmp_path / "a.gif", fps=20)) as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"], gif.info["duration"]) == (10, (48, 32), 0, 50)
        for i in range(10):
            gif.seek(i)
            found = torch.tensor(np.asarray(gif.convert("RGB"))).permute(2, 0, 1) / 255
            assert (found - frames[i]).abs().max() < 0.02


def test_a_png_is_the_picture(tmp_path):
    picture = moving(1)[0]
    picture[:, 0, 0] = torch.tensor([1.2, -0.1, 0.5])
    found = np.asarray(Image.open(write_png(picture, tmp_path / "a.png")))
    np.testing.assert_array_equal(found, (picture.clamp(0, 1) * 255).round().permute(1, 2, 0))


@pytest.mark.parametrize("write", [write_mp4, write_gif])
def test_no_frames_are_no_video(write, tmp_path):
    for frames, fps in (
        (torch.zeros(0, 3, 8, 8), 24),
        (torch.zeros(3, 8, 8), 24),
        (moving(2), 0),
        (moving(2), 1000),
    ):
        with pytest.raises(ValueError, match="a video needs frames"):
            write(frames, tmp_path / "a", fps=fps)
    assert not list(tmp_path.iterdir())


def test_an_encoder_that_stops_half_way_leaves_nothing(tmp_path, monkeypatch):
    """On a full disk ffmpeg leaves a torso and imageio-ffmpeg ignores its exit code."""

    def torso(path, *_, **__):
        yield
        path.write_bytes(b"torso")
        while True:
            try:
                yield
            except GeneratorExit:
                return

    monkeypatch.setattr(imageio_ffmpeg, "write_frames", torso)
    with pytest.raises(OSError, match="wrote 0 of 5 frames"):
        write_mp4(moving(5), tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


def test_frames_that_went_missing_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(imageio_ffmpeg, "count_frames_and_secs", lambda path: (4, 0.2))
    with pytest.raises(OSError, match="wrote 4 of 5 frames"):
        write_mp4(moving(5), tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


def test_a_missing_or_broken_encoder_is_said_before_any_work(tmp_path, monkeypatch):
    check_encoder(tmp_path)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/bin/false")
    with pytest.raises(ValueError, match=r'no video can be encoded here.*pip install "scorefield\[nerf\]"'):
        check_encoder(tmp_path)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ValueError, match=r'this needs imageio-ffmpeg\. Install: pip install "scorefield\[nerf\]"'):
        check_encoder(tmp_path)
    assert not list(tmp_path.iterdir())
