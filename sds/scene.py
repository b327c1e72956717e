"""3D scenes, rendered differentiably with nerfstudio's rays, samplers, encodings and renderers.

nerfstudio's models and fields are not used: they detach normals, composite a learned background twice and render
pictures one by one. Wherever another part of it is avoided, a comment there says why, and a test shows it.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Generator, Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from scorefield.atomic import whole_file
from sds.cameras import Views
from sds.field import Blob, DenseGrid, Field, cone_blob, normalised, scaled_softplus
from sds.penalties import ray_distortion, ray_orientation
from sds.shading import Shading, shaded

EMPTY = 1e-3
"""Pixels below this opacity have neither depth nor normal."""


def check_nerfstudio() -> None:
    """Raise ``ImportError`` if nerfstudio is missing. The message says how to install it."""
    if importlib.util.find_spec("nerfstudio") is None:
        raise ImportError(
            "scenes in 3D need nerfstudio, which is not installed. Install it: pip install 'scorefield[nerf]'."
        )


@dataclass(frozen=True, eq=False)
class Render:
    """Differentiable pictures of b views, rows from the top.

    Attributes:
        rgb: (b, 3, h, w) in [-1, 1], matter over the background.
        opacity: (b, 1, h, w) in [0, 1]: the share of the background that is hidden.
        depth: (b, 1, h, w) mean distance of the matter from the camera along the ray, in world units; 0 where
            there is none.
        normals: (b, 3, h, w) unit vectors in world coordinates, 0 where there is no matter; None if not asked for.
        distortion: (b, 1, h, w); see :func:`sds.penalties.ray_distortion`.
        orientation: (b, 1, h, w); see :func:`sds.penalties.ray_orientation`. None without normals.
    """

    rgb: Float[Tensor, "b 3 h w"]
    opacity: Float[Tensor, "b 1 h w"]
    depth: Float[Tensor, "b 1 h w"]
    normals: Float[Tensor, "b 3 h w"] | None
    distortion: Float[Tensor, "b 1 h w"]
    orientation: Float[Tensor, "b 1 h w"] | None


class Scene(nn.Module):
    """A field in its cube, over a background.

    Args:
        field: Density and colour in the cube.
        background: Unit directions (n, 3) -> colours (n, 3) in [0, 1], such as :func:`background_network`. Without
            one, every call needs a colour.
        num_samples: Points on each ray, evenly spaced between where it enters and where it leaves the cube.
        chunk: Points evaluated at a time. A larger number is evaluated in chunks, and again in the backward pass,
            so that the memory is that of one chunk. Results and gradients stay the same.

    Raises ``ImportError`` without nerfstudio, and ``ValueError`` for numbers that are too small.
    """

    def __init__(
        self, field: Field, *, background: nn.Module | None = None, num_samples: int = 48, chunk: int = 2**18
    ) -> None:
        super().__init__()
        check_nerfstudio()
        if num_samples < 1 or chunk < num_samples:
            raise ValueError(f"expected num_samples >= 1 and chunk >= num_samples; got {num_samples} and {chunk}.")
        self.field, self.background, self.num_samples, self.chunk = field, background, num_samples, chunk

    def forward(
        self, views: Views, *, height: int, width: int, background: Tensor | None = None,
        shading: Shading | None = None, normals: bool = False, generator: Generator | None = None,
    ) -> Render:  # fmt: skip
        """Render all views.

        Args:
            views: b cameras.
            height: Height of the pictures in pixels.
            width: Width of the pictures in pixels.
            background: (3,) or (b, 3) in [-1, 1]; None for the scene's own.
            shading: Light of the b views; None shows albedo.
            normals: Return normals and orientation even if the shading needs none.
            generator: For training: shifts the points of each ray by up to half their spacing. With None, the same
                views always give the same pictures.

        Raises ``ValueError`` for a background that is missing or of another shape.
        """
        bundle, view = self._rays(views, height, width, generator)
        backdrop = self._backdrop(background, bundle.directions, len(views))
        normals = normals or (shading is not None and shading.needs_normals)
        # Rays that miss the cube show the backdrop; nothing is evaluated for them.
        hit = (bundle.nears < bundle.fars)[:, 0].nonzero()[:, 0]
        parts = []
        chunks = hit.split(self.chunk // self.num_samples)
        twice = len(chunks) > 1 and torch.is_grad_enabled()
        for rows in chunks:
            light = None if shading is None else shading.at(view[rows])
            inputs = (bundle[rows], backdrop[rows], light, normals)
            parts.append(checkpoint(self._march, *inputs, use_reentrant=False) if twice else self._march(*inputs))
        pixels = torch.cat(parts)
        pixels = pad(backdrop, (0, pixels.shape[1] - 3)).index_copy(0, hit, pixels)
        image = pixels.view(len(views), height, width, -1).permute(0, 3, 1, 2)
        rgb, opacity, depth, distortion = image[:, :6].split((3, 1, 1, 1), dim=1)
        slopes, orientation = (image[:, 6:9], image[:, 9:]) if normals else (None, None)
        return Render(rgb * 2 - 1, opacity, depth, slopes, distortion, orientation)

    def _rays(self, views: Views, height: int, width: int, generator: Generator | None) -> tuple[Any, Tensor]:
        """Return the ``RayBundle`` of all pixels, view by view, and the number of each pixel's view."""
        from nerfstudio.cameras.rays import RayBundle
        from nerfstudio.utils.math import intersect_aabb

        some = next(self.field.parameters(), views.camera_to_world)
        directions = views.directions(height, width).to(some).view(-1, 3)
        view = torch.arange(len(views), device=some.device).repeat_interleave(height * width)
        origins = views.position.to(some)[view]
        corners = self.field.half_size * torch.tensor([-1, -1, -1, 1, 1, 1], device=some.device)
        nears, fars = (end[:, None] for end in intersect_aabb(origins, directions, corners))
        if generator is not None:
            # nerfstudio's samplers draw from the global generator; shifting the ends shifts their points, too.
            shift = torch.rand(nears.shape, generator=generator, device=generator.device).to(some) - 0.5
            step = shift * (fars - nears) / self.num_samples
            nears, fars = nears + step, fars + step
        # Only fields that integrate over pixels use the area; those here do not.
        return RayBundle(origins, directions, torch.zeros_like(nears), nears=nears, fars=fars), view

    def _backdrop(self, background: Tensor | None, directions: Tensor, num_views: int) -> Tensor:
        """Return the colour (n, 3) in [0, 1] behind each ray, view by view."""
        if background is None:
            if self.background is None:
                raise ValueError("the scene has no background of its own; pass one, (3,) or (b, 3) in [-1, 1].")
            return self.background(directions)
        if background.shape not in ((3,), (num_views, 3)):
            raise ValueError(f"background must be (3,) or ({num_views}, 3); got {tuple(background.shape)}.")
        colours = ((background.to(directions) + 1) / 2).expand(num_views, 3)
        return colours.repeat_interleave(len(directions) // num_views, dim=0)

    def _march(self, rays: Any, backdrop: Tensor, shading: Shading | None, normals: bool) -> Tensor:
        """Return values (n, 6) of each ray: rgb, opacity, depth, distortion. With normals (n, 10).

        The four more are the normals and the orientation.
        """
        from nerfstudio.model_components.ray_samplers import UniformSampler
        from nerfstudio.model_components.renderers import AccumulationRenderer, NormalsRenderer, RGBRenderer

        samples = UniformSampler(self.num_samples, train_stratified=False)(rays)
        starts, ends, points = samples.frustums.starts, samples.frustums.ends, samples.frustums.get_positions()
        matter = self.field(points.reshape(-1, 3), normals=normals)
        weights = ray_weights(matter.density.view(points.shape[:2]), samples.deltas[..., 0])[..., None]
        colour = matter.albedo.view_as(points)
        slopes = None if matter.normals is None else matter.normals.view_as(points)
        if shading is not None:
            colour = shaded(colour, slopes, points, shading)
        # The only place where matter is composited over the background.
        rgb = RGBRenderer.combine_rgb(colour, weights, background_color=backdrop)
        opacity = AccumulationRenderer.forward(weights)
        # nerfstudio clips depth to the range of the other rays of the chunk.
        depth = (weights * (starts + ends) / 2).sum(-2) / opacity.clamp(min=EMPTY)
        there = opacity > EMPTY
        edges = torch.cat([starts[..., 0], ends[:, -1:, 0]], dim=1)
        parts = [rgb, opacity, depth * there, ray_distortion(weights[..., 0], edges)[:, None]]
        if slopes is not None:
            facing = (slopes * rays.directions[:, None]).sum(-1)
            mean = normalised(NormalsRenderer.forward(slopes, weights, normalize=False))
            parts += [mean * there, ray_orientation(weights[..., 0], facing)[:, None]]
        return torch.cat(parts, dim=1)


def grid_scene(
    *, half_size: float = 0.9, resolutions: Sequence[int] = (10, 20, 40), background: nn.Module | None = None,
    num_samples: int = 48, blob: Blob | None = None, initial: float = 0.0,
) -> Scene:  # fmt: skip
    """Return a scene for a CPU, with a blob of matter in its middle. A learning rate of 0.05 with Adam suits it.

    A step with 4 views of 32 x 32 pixels takes about 0.1 s on one core, two to three times as long with normals.

    Args:
        half_size: Half the side of the cube.
        resolutions: Corners along an edge of each grid; see :class:`sds.field.DenseGrid`.
        background: As for :class:`Scene`.
        num_samples: Points on each ray.
        blob: By default :func:`sds.field.cone_blob`, which is opaque.
        initial: Raw density everywhere at the start.
    """
    grid = DenseGrid(resolutions, initial=initial)
    field = Field(grid, half_size=half_size, blob=blob or cone_blob(), activation=scaled_softplus())
    return Scene(field, background=background, num_samples=num_samples)


def ray_weights(density: Float[Tensor, "n s"], length: Float[Tensor, "n s"]) -> Float[Tensor, "n s"]:
    """Return the share of each of s intervals in what the camera sees, nan where a density is nan.

    nerfstudio's ``RaySamples.get_weights`` would return 0 there, so a scene that has diverged would look empty.
    """
    optical = density * length
    before = pad(optical[:, :-1].cumsum(-1), (1, 0))
    return -torch.expm1(-optical) * torch.exp(-before)


def triplane_network(
    *, generator: Generator, resolution: int = 128, num_components: int = 32, width: int = 64
) -> nn.Module:
    """Return three planes of features, multiplied, and a small MLP: more detail than a grid for the memory.

    nerfstudio's ``TriplaneEncoding`` and ``TensorVMEncoding`` detach the coordinates and so allow no normals.
    ``KPlanesEncoding`` with three axes computes the same and allows them.
    """
    check_nerfstudio()
    from nerfstudio.field_components.encodings import KPlanesEncoding

    with _seeded(generator):
        return _decoded(KPlanesEncoding((resolution,) * 3, num_components, reduce="product"), width, 2)


def hash_network(
    *, generator: Generator, num_levels: int = 16, finest: int = 2048, log2_table: int = 19, width: int = 64
) -> nn.Module:
    """Return Instant NGP's hash table and a small MLP; on a CPU an order of magnitude slower than a grid."""
    check_nerfstudio()
    from nerfstudio.field_components.encodings import HashEncoding, ScalingAndOffset

    with _seeded(generator):
        table = HashEncoding(num_levels, max_res=finest, log2_hashmap_size=log2_table, implementation="torch")
        return nn.Sequential(ScalingAndOffset(3, 0.5, 0.5), *_decoded(table, width, 2))


def frequency_network(
    *, generator: Generator, num_frequencies: int = 6, num_layers: int = 4, width: int = 64
) -> nn.Module:
    """Return sines of the position and an MLP, as in the first NeRF: smooth and small."""
    check_nerfstudio()
    from nerfstudio.field_components.encodings import NeRFEncoding, ScalingAndOffset

    with _seeded(generator):
        waves = NeRFEncoding(3, num_frequencies, 0, num_frequencies - 1, include_input=True)
        return nn.Sequential(ScalingAndOffset(3, 0.5, 0.5), *_decoded(waves, width, num_layers))


def background_network(*, generator: Generator, num_frequencies: int = 2, width: int = 32) -> nn.Module:
    """Return a network from directions (n, 3) to colours (n, 3) in [0, 1], DreamFusion's background."""
    check_nerfstudio()
    from nerfstudio.field_components.encodings import NeRFEncoding
    from nerfstudio.field_components.mlp import MLP

    with _seeded(generator):
        # The sines alone would be the same in opposite directions.
        waves = NeRFEncoding(3, num_frequencies, 0, num_frequencies - 1, include_input=True)
        return nn.Sequential(waves, MLP(waves.get_out_dim(), 2, width, 3, out_activation=nn.Sigmoid()))


def _decoded(encoding: Any, width: int, num_layers: int) -> nn.Sequential:
    from nerfstudio.field_components.mlp import MLP

    # Normals are optimised through second derivatives, which a ReLU does not have.
    return nn.Sequential(encoding, MLP(encoding.get_out_dim(), num_layers, width, 4, activation=nn.SiLU()))


@contextmanager
def _seeded(generator: Generator) -> Iterator[None]:
    """Seed the global generator, with which nerfstudio initialises, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield


def save_scene(scene: nn.Module, path: Path) -> None:
    """Write the weights of a scene, or of a canvas, as safetensors. The file appears whole or not at all."""
    with whole_file(path) as temporary:
        save_model(scene, str(temporary))


def load_scene(scene: nn.Module, path: Path) -> None:
    """Read the weights of a scene with the same architecture.

    Raises ``ValueError`` if the file is missing, damaged, or holds another kind of scene.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected the scene.safetensors of a finished run.")
    try:
        load_model(scene, str(path))
    except (RuntimeError, OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is damaged or holds another kind of scene: {str(error).splitlines()[0]}"
        ) from error
