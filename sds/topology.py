"""Topology of a triangle mesh: its parts, its inner voids and its handles, which pictures do not show."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sds.mesh import Mesh


@dataclass(frozen=True)
class Topology:
    """Topology of a mesh.

    Attributes:
        closed: Whether each edge has exactly two triangles, which run along it in opposite directions.
        components: Number of surfaces that face outwards.
        voids: Number of surfaces that face inwards: each bounds a hollow within a component.
        genus: Number of handles of all surfaces together: 0 for balls, 1 for a torus. None unless closed.
    """

    closed: bool
    components: int
    voids: int
    genus: int | None


def topology(mesh: Mesh) -> Topology:
    """Return the topology of a mesh.

    Surfaces that touch at a corner or along an edge without sharing a triangle's side count as separate. The genus
    follows from Euler's formula: corners - edges + triangles = 2 surfaces - 2 genus.
    """
    faces = mesh.faces.numpy()
    if not len(faces):
        return Topology(closed=True, components=0, voids=0, genus=0)
    partner = _partners(faces, len(mesh.vertices))
    matched = partner >= 0
    closed = bool(matched.all())
    side = np.arange(3 * len(faces))
    following = side - side % 3 + (side + 1) % 3
    surface, num_surfaces = _connected(side[matched] // 3, partner[matched] // 3, len(faces))
    volumes = np.bincount(surface, _signed_volumes(mesh).numpy(), minlength=num_surfaces)
    voids = int((volumes < 0).sum())
    if not closed:
        return Topology(closed=False, components=num_surfaces - voids, voids=voids, genus=None)
    # A side starts at the corner of its own number, where its partner ends, and the other way round.
    ends = np.concatenate([side, following]), np.concatenate([following[partner], partner])
    _, num_corners = _connected(*ends, 3 * len(faces))
    euler = num_corners - 3 * len(faces) // 2 + len(faces)
    return Topology(closed=True, components=num_surfaces - voids, voids=voids, genus=num_surfaces - euler // 2)


def _partners(faces: np.ndarray, num_vertices: int) -> np.ndarray:
    """Return, for each side of each triangle, the one side that runs along it the other way; -1 if there is none.

    Side 3 f + i runs from corner i of triangle f to the next. A side that occurs more than once has no partner.
    """
    start, end = faces.reshape(-1), np.roll(faces, -1, axis=1).reshape(-1)
    key, back = start * num_vertices + end, end * num_vertices + start
    found, first, count = np.unique(key, return_index=True, return_counts=True)
    place = np.minimum(np.searchsorted(found, back), len(found) - 1)
    alone = (found[place] == back) & (count[place] == 1) & (count[np.searchsorted(found, key)] == 1)
    return np.where(alone, first[place], -1)


def _connected(a: np.ndarray, b: np.ndarray, num: int) -> tuple[np.ndarray, int]:
    """Return the number of each node's component, and how many there are, of a graph with edges a[i] - b[i]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(num, num))
    count, labels = connected_components(graph, directed=False)
    return labels, int(count)


def _signed_volumes(mesh: Mesh) -> Tensor:
    a, b, c = mesh.vertices.double()[mesh.faces].unbind(1)
    return (a * torch.linalg.cross(b, c)).sum(1) / 6
