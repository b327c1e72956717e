"""A z-buffer rasteriser of unlit meshes with vertex colours or a texture, to compare them with renders of a scene.

Homogeneous rasterisation (Olano and Greer, Graphics Hardware 1997). A ray from the camera along d meets the
triangle with corners v_0, v_1, v_2 (in the camera's frame) if all e_i = d . (v_j x v_k), (i, j, k) cyclic, have
the same sign. Then e_i / (e_0 + e_1 + e_2) are its barycentric coordinates, correct in perspective, and the point
is d times v_0 . (v_1 x v_2) / (e_0 + e_1 + e_2). Nothing is divided by a corner's depth, so nothing has to be
clipped. The two triangles at an edge have exactly opposite e, so no ray passes between them.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample

from sds.mesh import Mesh
from sds.radiance import Colour, Rendered, check_colour

PAIRS = 1 << 21
"""Pairs of a triangle and a ray tested at once. It bounds the memory and changes no result."""


@torch.no_grad()
def rasterise(
    mesh: Mesh,
    camera_to_world: Float[Tensor, "b 3 4"],
    size: int,
    *,
    field_of_view: float = 40.0,
    background: Colour = (1.0, 1.0, 1.0),
    num_samples: int = 2,
) -> Rendered:
    """Return pictures of the mesh, as :class:`sds.radiance.Pictures` defines them; triangles have two sides.

    Args:
        mesh: The mesh.
        camera_to_world: Cameras as in nerfstudio and OpenGL.
        size: Height and width in pixels.
        field_of_view: Vertical, in degrees.
        background: Colour behind the mesh.
        num_samples: Rays per pixel along each axis, evenly spaced; colours are their means. 1 uses the pixel's
            centre.

    Raises:
        ValueError: ``size`` or ``num_samples`` is below 1, or the field of view or background is out of range.
    """
    if size < 1 or num_samples < 1 or not 0 < field_of_view < 180:
        raise ValueError(
            "rasterise needs size >= 1, num_samples >= 1 and a field_of_view in (0, 180) degrees; got "
            f"{size}, {num_samples} and {field_of_view}."
        )
    check_colour("background", background)
    fine = size * num_samples
    focal = fine / 2 / math.tan(math.radians(field_of_view) / 2)
    layers = torch.stack([_layers(mesh, camera.double().cpu(), fine, focal) for camera in camera_to_world])
    rgb, depth, normals, opacity = avg_pool2d(layers, num_samples).float().split((3, 1, 3, 1), dim=1)
    behind = torch.tensor(background).view(1, 3, 1, 1)
    return Rendered(
        rgb=(rgb + (1 - opacity) * behind) * 2 - 1,
        depth=depth / opacity.clamp(min=1e-6),
        normals=torch.nn.functional.normalize(normals, dim=1),
        opacity=opacity,
    )


def _layers(mesh: Mesh, camera: Tensor, size: int, focal: float) -> Tensor:
    """Return colour, depth, normal and mask (8, size, size), 0 where the mesh is not visible."""
    axes, position = camera[:, :3], camera[:, 3]
    corners = ((mesh.vertices.double() - position) @ axes)[mesh.faces]
    edges = torch.stack([_cross(corners[:, 1], corners[:, 2]), _cross(corners[:, 2], corners[:, 0]),
                         _cross(corners[:, 0], corners[:, 1])], dim=1)  # fmt: skip
    pixel, face = _visible(corners, edges, size, focal)
    ray = _rays(pixel, size, focal)
    weights = _along(edges[face], ray)
    total = weights.sum(1, keepdim=True)
    depth = (corners[face, 0] * edges[face, 0]).sum(1, keepdim=True) / total * ray.norm(dim=1, keepdim=True)
    colour = _colours(mesh, mesh.faces[face], weights / total)
    # The camera's axes turn the normal of the triangle back into the world.
    normal = torch.nn.functional.normalize(edges.sum(1), dim=1)[face] @ axes.T
    layers = torch.zeros(8, size * size, dtype=torch.float64)
    layers[:, pixel] = torch.cat([colour, depth, normal, torch.ones_like(depth)], dim=1).T
    return layers.view(8, size, size)


def _colours(mesh: Mesh, corners: Tensor, weights: Tensor) -> Tensor:
    """Return colours (n, 3) at points with these barycentric weights (n, 3) of these corners (n, 3)."""
    if mesh.texture is None:
        return (weights[..., None] * mesh.colours.double()[corners]).sum(1)
    places = (weights[..., None] * mesh.texture.places.double()[corners]).sum(1)
    picture = mesh.texture.picture.double()[None]
    found = grid_sample(picture, (places * 2 - 1)[None, None], padding_mode="border", align_corners=False)
    return found[0, :, 0].T


def _visible(corners: Tensor, edges: Tensor, size: int, focal: float) -> tuple[Tensor, Tensor]:
    """Return the pixels (n,) that see a triangle, and which triangle (n,): the nearest, among equals the first."""
    low, high = _boxes(corners, size, focal)
    extent = (high - low + 1).clamp(min=0)
    counts = extent.prod(1)
    volume = (corners[:, 0] * edges[:, 0]).sum(1)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for faces in pieces(counts):
        face = torch.repeat_interleave(faces, counts[faces])
        first = torch.repeat_interleave(counts[faces].cumsum(0) - counts[faces], counts[faces])
        number = torch.arange(len(face)) - first
        column = low[face, 0] + number % extent[face, 0]
        row = low[face, 1] + number // extent[face, 0]
        pixel = row * size + column
        weights = _along(edges[face], _rays(pixel, size, focal))
        total = weights.sum(1)
        depth = volume[face] / total
        hit = ((weights >= 0).all(1) | (weights <= 0).all(1)) & (total != 0) & (depth > 0)
        found.append((pixel[hit], face[hit], depth[hit]))
    pixel, face, depth = (torch.cat(parts) for parts in zip(*found, strict=True))
    nearest = torch.full((size * size,), math.inf, dtype=depth.dtype).scatter_reduce(0, pixel, depth, "amin")
    seen = depth == nearest[pixel]
    winner = torch.full((size * size,), len(corners)).scatter_reduce(0, pixel[seen], face[seen], "amin")
    pixel = (winner < len(corners)).nonzero()[:, 0]
    return pixel, winner[pixel]


def _boxes(corners: Tensor, size: int, focal: float) -> tuple[Tensor, Tensor]:
    """Return the first and the last column and row (f, 2) whose pixel centres a triangle may cover."""
    x, y, ahead = corners[..., 0], corners[..., 1], -corners[..., 2]
    place = torch.stack([x, -y], dim=-1) * focal / ahead.clamp(min=1e-9)[..., None] + size / 2
    # A corner beside or behind the camera has no projection, so the whole picture is tried.
    crossing = (ahead < 1e-6).any(1) & (ahead > 0).any(1)
    low, high = place.amin(1), place.amax(1)
    low[crossing], high[crossing] = 0, size
    high[(ahead <= 0).all(1)] = -1
    # The margin is far above rounding errors, so no ray is left out; a few are tried in vain.
    low, high = (low - 0.5 - 1e-6).ceil().clamp(0, size), (high - 0.5 + 1e-6).floor().clamp(-1, size - 1)
    return low.long(), high.long()


def pieces(counts: Tensor) -> list[Tensor]:
    """Return the numbers of the faces with a count (f,) of pixels above 0, in pieces of about ``PAIRS`` pixels."""
    faces = counts.nonzero()[:, 0]
    piece = counts[faces].cumsum(0) // PAIRS
    return list(faces.split(torch.bincount(piece).tolist())) if len(faces) else [faces]


def _rays(pixel: Tensor, size: int, focal: float) -> Tensor:
    """Return directions (n, 3) through the centres of pixels, in the camera's frame, of length 1 on its axis."""
    column, row = (pixel % size).double() + 0.5, (pixel // size).double() + 0.5
    x, y = (column - size / 2) / focal, (size / 2 - row) / focal
    return torch.stack([x, y, -torch.ones_like(x)], dim=1)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    # Term by term: with fused products and sums, swapping a and b would not flip the sign exactly.
    ax, ay, az = a.unbind(-1)
    bx, by, bz = b.unbind(-1)
    return torch.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], dim=-1)


def _along(edges: Tensor, ray: Tensor) -> Tensor:
    x, y, z = (edges * ray[:, None]).unbind(-1)
    return x + y + z
