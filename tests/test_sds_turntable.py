"""The turntable: where its cameras are, and how colours, distances and normals become frames."""

import math

import pytest
import torch

from sds.radiance import Rendered
from sds.turntable import colour_frames, contact_sheet, depth_frames, normal_frames, turntable_cameras
from toyworld.camera import orbit

close = torch.testing.assert_close


def test_cameras_go_round_once_with_elevations_in_turn():
    cameras = turntable_cameras(6, elevations=(10.0, -40.0), distance=2.5)
    expected = torch.stack([orbit(60 * i, (10.0, -40.0)[i % 2], 2.5) for i in range(6)])
    close(cameras, expected.float(), atol=1e-6, rtol=0)
    wrong = (
        {"num_views": 0},
        {"elevations": ()},
        {"elevations": (91.0,)},
        {"distance": 0.0},
        {"distance": math.inf},
    )
    for bad in wrong:
        with pytest.raises(ValueError, match="a turntable needs num_views >= 1"):
            turntable_cameras(**{"num_views": 4, **bad})


def pictures(rgb, opacity, depth=None, normals=None):
    """One row of pixels: a picture of height 1."""
    opacity = torch.tensor(opacity).view(1, 1, 1, -1)
    rgb = torch.tensor(rgb).T.reshape(1, 3, 1, -1)
    depth = torch.zeros_like(opacity) if depth is None else torch.tensor(depth).view(1, 1, 1, -1)
    normals = torch.zeros_like(rgb) if normals is None else torch.tensor(normals).T.reshape(1, 3, 1, -1)
    return Rendered(rgb * 2 - 1, depth, normals, opacity)


def test_a_background_is_exchanged_exactly():
    colour, old, new = torch.tensor([[0.2, 0.4, 0.9], [1.0, 0.5, 0.0], [0.0, 0.25, 1.0]])
    opacity = [0.0, 0.3, 1.0]
    over_old, over_new = (torch.stack([a * colour + (1 - a) * behind for a in opacity]) for behind in (old, new))
    seen = pictures(over_old.tolist(), opacity)
    close(colour_frames(seen, tuple(old.tolist()), tuple(new.tolist()))[0, :, 0].T, over_new)
    close(colour_frames(seen, tuple(old.tolist()))[0, :, 0].T, over_old)


def test_distances_are_bright_near_and_dark_far_and_normals_are_colours_of_the_worlds_axes():
    """On the scale of what is opaque."""
    seen = pictures([[0.0] * 3] * 4, [1.0, 1.0, 0.25, 0.0], depth=[2.0, 4.0, 9.0, 0.0])
    expected = [[0.85] * 3, [0.15] * 3, [0.7875, 0.7875, 0.0375], [1.0, 1.0, 0.0]]
    close(depth_frames(seen, (1.0, 1.0, 0.0))[0, :, 0].T, torch.tensor(expected))
    assert depth_frames(pictures([[0.0] * 3] * 2, [0.0, 0.1], depth=[0.0, 3.0])).isfinite().all()
    normals = [[0.5, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.6, 0.8], [0.0, 0.0, 1.0]]
    seen = pictures([[0.0] * 3] * 4, [1.0, 1.0, 1.0, 0.5], normals=normals)
    expected = [[1.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.8, 0.9], [0.25, 0.25, 0.5]]
    close(normal_frames(seen, (0.0, 0.0, 0.0))[0, :, 0].T, torch.tensor(expected))


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
    close(sheet[:, left], torch.tensor([0.1, 0.2, 0.3])[:, None].expand(-1, int(left.sum())))
    for rows in ([], [torch.zeros(0, 3, 4, 4)], [torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4)]):
        with pytest.raises(ValueError, match="rows must be pictures of one shape"):
            contact_sheet(rows)
