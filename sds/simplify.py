"""A mesh within a budget of triangles, closed as before."""

import numpy as np
import torch

from sds.mesh import Mesh, Query
from sds.topology import topology

PACES = (5.0, 3.0)
"""How fast fast-simplification may raise its threshold of error (its ``agg``). At its own 7 a mug once had an edge
with four triangles."""


def simplified(mesh: Mesh, num_faces: int, colours: Query) -> Mesh:
    """Return a mesh of about ``num_faces`` triangles, merged where that moves the surface least.

    Triangles are merged by their quadric error (Garland and Heckbert, SIGGRAPH 1997). A mesh that has no more
    triangles than that is returned as it is. Of two ways to merge, the first one counts that leaves it closed.

    Args:
        mesh: A mesh without a texture.
        num_faces: Triangles to keep, at least 4.
        colours: Vertices (v, 3) -> colours (v, 3).

    Raises ``ValueError`` for fewer than 4 triangles.
    """
    from fast_simplification import simplify

    if num_faces < 4:
        raise ValueError(f"a closed mesh has at least 4 triangles; got {num_faces}.")
    if len(mesh.faces) <= num_faces:
        return mesh
    tried = []
    for pace in PACES:
        vertices, faces = simplify(mesh.vertices.numpy(), mesh.faces.numpy(), target_count=num_faces, agg=pace)
        kept = torch.from_numpy(np.ascontiguousarray(vertices)).float()
        tried.append(Mesh(kept, torch.from_numpy(faces.astype(np.int64)), torch.zeros_like(kept)))
        if len(faces) <= num_faces and topology(tried[-1]).closed:
            break
    else:
        tried = tried[:1]
    return Mesh(tried[-1].vertices, tried[-1].faces, colours(tried[-1].vertices))
