"""Cameras of a scene: random views, and the view words that a text-to-image teacher is told about them.

In the world z is up, and the object lies in about [-1, 1]^3. ``camera_to_world`` (3, 4) follows nerfstudio and
OpenGL: its columns are the camera's x axis (right), y axis (up), z axis (backwards: the camera looks along -z) and
position. All angles are in degrees. Azimuth 0 is on +x, which is the front, and grows counter-clockwise seen from
above. Elevation 90 is straight above.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from scorefield.denoiser import Cond

Range = tuple[float, float]

WORDS = ("front", "side", "back", "overhead")
"""View words of prompts; all weights and conditions here are in this order."""


@dataclass(frozen=True, eq=False)
class Views:
    """Poses and focal lengths of b cameras; the resolution is chosen when they render.

    Attributes:
        camera_to_world: (b, 3, 4).
        focal: (b,) focal length in picture heights: 0.5 / tan(vertical field of view / 2).
        azimuth: (b,) in degrees, before any jitter of the position; view words are chosen by it.
        elevation: (b,) in degrees, likewise before jitter.
    """

    camera_to_world: Float[Tensor, "b 3 4"]
    focal: Float[Tensor, " b"]
    azimuth: Float[Tensor, " b"]
    elevation: Float[Tensor, " b"]

    def __len__(self) -> int:
        return len(self.focal)

    def __getitem__(self, chosen: slice) -> "Views":
        return Views(*(value[chosen] for value in vars(self).values()))

    @property
    def position(self) -> Float[Tensor, "b 3"]:
        """Positions of the cameras in the world."""
        return self.camera_to_world[:, :, 3]

    def directions(self, height: int, width: int) -> Float[Tensor, "b h w 3"]:
        """Return the unit directions, in the world, of rays through the centres of all pixels.

        Pixels are square and the principal point is the centre of the picture. The directions equal those of
        nerfstudio's ``Cameras``, which computes them in float32 by an indexing that torch has announced it will
        change.

        Raises ``ValueError`` for a height or width below 1.
        """
        if height < 1 or width < 1:
            raise ValueError(f"height and width must be at least 1 pixel; got {height} and {width}.")
        row, column = (torch.arange(n).to(self.focal) + 0.5 for n in (height, width))
        up, right = torch.meshgrid(height / 2 - row, column - width / 2, indexing="ij")
        pixels = torch.stack([right, up], dim=-1) / (self.focal * height)[:, None, None, None]
        towards = torch.nn.functional.pad(pixels, (0, 1), value=-1)
        axes = self.camera_to_world[:, None, None, :, :3]
        return torch.nn.functional.normalize((axes * towards[..., None, :]).sum(-1), dim=-1)


def concatenated(views: Sequence[Views]) -> Views:
    """Return all views in one batch."""
    return Views(*(torch.cat(values) for values in zip(*(vars(view).values() for view in views), strict=True)))


def orbit(azimuth: Tensor, elevation: Tensor, distance: Tensor, focal: Tensor) -> Views:
    """Return views (b,) of the world's origin from a sphere around it; the camera's right axis is horizontal.

    Straight above is no special case: at azimuth 0, the camera's up axis is -x there.

    Args:
        azimuth: (b,) in degrees.
        elevation: (b,) in degrees.
        distance: (b,) from the origin.
        focal: (b,) in picture heights.
    """
    position, up = _sphere(azimuth, elevation)
    pose = look_at(position * distance[:, None], torch.zeros_like(position), up)
    return Views(pose, focal, azimuth, elevation)


def look_at(
    position: Float[Tensor, "b 3"], target: Float[Tensor, "b 3"], up: Float[Tensor, "b 3"]
) -> Float[Tensor, "b 3 4"]:
    """Return ``camera_to_world`` of cameras at ``position`` that look at ``target``.

    ``up`` must not be parallel to the line of sight.
    """
    back = torch.nn.functional.normalize(position - target, dim=1)
    right = torch.nn.functional.normalize(torch.linalg.cross(up, back), dim=1)
    return torch.stack([right, torch.linalg.cross(back, right), back, position], dim=2)


@dataclass(frozen=True, kw_only=True)
class CameraDistribution:
    """Random cameras; the defaults are DreamFusion's (arXiv 2209.14988, section 3.2 and Appendix A.2).

    DreamFusion's scene fills a sphere of radius 1.4, inside which the cameras move. To show the whole scene, use a
    larger distance: 2.6 to 3.1 at focal length 1.37, which is a field of view of 40 degrees.

    Attributes:
        distance: Range of distances from the origin, uniform.
        azimuth: Range in degrees, uniform and stratified; see :meth:`draw`.
        elevation: Range in degrees. With probability ``uniform_angle`` it is uniform in the angle, otherwise in
            the area of the sphere. The first favours the pole, the second the horizon.
        uniform_angle: Probability of an elevation that is uniform in the angle.
        focal: Range of focal lengths in picture heights, uniform. The paper gives multiples of the width.
        position_jitter: The camera's position is shifted uniformly within a cube whose edge is twice this value.
        target_jitter: Standard deviation, on each axis, of the point that the camera looks at. If the paper's N(0,
            0.2 I) meant a variance, cameras would often miss the object; implementations take 0.2 as the standard
            deviation.
        up_jitter: Standard deviation, on each axis, of what is added to the up direction; likewise.

    Raises ``ValueError`` for ranges that are reversed or out of bounds.
    """

    distance: Range = (1.0, 1.5)
    azimuth: Range = (-180.0, 180.0)
    elevation: Range = (-10.0, 90.0)
    uniform_angle: float = 0.5
    focal: Range = (0.7, 1.35)
    position_jitter: float = 0.1
    target_jitter: float = 0.2
    up_jitter: float = 0.02

    def __post_init__(self) -> None:
        for name in ("distance", "azimuth", "elevation", "focal"):
            low, high = getattr(self, name)
            if not low <= high:
                raise ValueError(f"{name} must be a range from low to high; got ({low}, {high}).")
        if not (self.distance[0] > 0 and self.focal[0] > 0):
            raise ValueError(f"distance and focal must be above 0; got {self.distance} and {self.focal}.")
        if not -90 <= self.elevation[0] <= self.elevation[1] <= 90:
            raise ValueError(f"elevation must lie in [-90, 90] degrees; got {self.elevation}.")
        if not 0 <= self.uniform_angle <= 1:
            raise ValueError(f"uniform_angle is a probability in [0, 1]; got {self.uniform_angle}.")

    def draw(self, num_views: int, generator: Generator, *, rank: int = 0, num_ranks: int = 1) -> Views:
        """Return random views. All but their azimuths are independent.

        The azimuth range is divided into ``num_ranks * num_views`` equal sectors with one view in each. Ranks take
        turns at the sectors, so that on every rank the views go all round the scene. Each rank passes a generator
        of its own.

        Raises ``ValueError`` for ``num_views`` below 1, or a rank outside 0 to ``num_ranks`` - 1.
        """
        if num_views < 1 or not 0 <= rank < num_ranks:
            raise ValueError(
                f"draw needs num_views >= 1 and 0 <= rank < num_ranks; got {num_views}, {rank} and {num_ranks}."
            )
        device = generator.device
        sector = rank + num_ranks * torch.arange(num_views, device=device)
        turn = (sector + _uniform(num_views, (0, 1), generator)) / (num_views * num_ranks)
        azimuth = self.azimuth[0] + (self.azimuth[1] - self.azimuth[0]) * turn
        elevation = self._elevations(num_views, generator)
        direction, up = _sphere(azimuth, elevation)
        distance = _uniform(num_views, self.distance, generator)[:, None]
        cube = _uniform((num_views, 3), (-1, 1), generator)
        target, tilt = torch.randn(2, num_views, 3, generator=generator, device=device, dtype=torch.float64)
        position = direction * distance + self.position_jitter * cube
        pose = look_at(position, self.target_jitter * target, up + self.up_jitter * tilt)
        focal = _uniform(num_views, self.focal, generator)
        return Views(*(value.float() for value in (pose, focal, azimuth, elevation)))

    def widened(self, progress: float, *, azimuth: float = 0.0, elevation: float = 15.0) -> "CameraDistribution":
        """Return a distribution that is one direction at progress 0 and the whole range at 1, linear between.

        Args:
            progress: Progress in [0, 1].
            azimuth: Azimuth of the first direction in degrees.
            elevation: Elevation of the first direction in degrees.

        Raises ``ValueError`` unless 0 <= progress <= 1.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must lie in [0, 1]; got {progress}. Pass min(1, step / until).")

        def between(centre: float, ends: Range) -> Range:
            low, high = (centre + progress * (end - centre) for end in ends)
            return low, high

        return replace(self, azimuth=between(azimuth, self.azimuth), elevation=between(elevation, self.elevation))

    def quarters(self, spread: float) -> list["CameraDistribution"]:
        """Return distributions of front, left, back and right views, each within ``spread`` times 45 degrees.

        At spread 1 they cover all azimuths. View words are ambiguous near the borders of the quarters; a scene
        that starts with such views may turn any way. Raises ``ValueError`` unless 0 <= spread <= 1.
        """
        if not 0 <= spread <= 1:
            raise ValueError(f"spread must lie in [0, 1]; got {spread}.")
        return [
            replace(self, azimuth=(middle - 45 * spread, middle + 45 * spread)) for middle in range(0, 360, 90)
        ]

    def _elevations(self, num_views: int, generator: Generator) -> Tensor:
        low, high = (math.sin(math.radians(end)) for end in self.elevation)
        by_angle = _uniform(num_views, self.elevation, generator)
        by_area = torch.rad2deg(_uniform(num_views, (low, high), generator).clamp(-1, 1).asin())
        return torch.where(_uniform(num_views, (0, 1), generator) < self.uniform_angle, by_angle, by_area)


def view_prompts(prompt: str) -> list[str]:
    """Return the prompt for each of ``WORDS``: "a red mug" gives "a red mug, front view" and so on.

    Raises ``ValueError`` for an empty prompt.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; say what the scene should show, for example 'a red mug'.")
    return [f"{prompt.strip()}, {word} view" for word in WORDS]


def word_bins(views: Views, *, front_within: float = 45.0, overhead_above: float = 60.0) -> Float[Tensor, "b 4"]:
    """Return one-hot weights of ``WORDS``: DreamFusion's discrete view prompts (arXiv 2209.14988, section 3.2).

    Args:
        views: b views.
        front_within: Azimuths at most this far from 0 are the front, from 180 the back; all others are a side. In
            degrees.
        overhead_above: Views above this elevation, in degrees, are overhead whatever their azimuth.
    """
    off_front = _off_front(views.azimuth)
    word = torch.where(off_front <= front_within, 0, torch.where(off_front >= 180 - front_within, 2, 1))
    word = torch.where(views.elevation > overhead_above, 3, word)
    return torch.nn.functional.one_hot(word, len(WORDS)).to(views.focal.dtype)


def word_weights(views: Views, *, overhead: Range = (30.0, 90.0)) -> Float[Tensor, "b 4"]:
    """Return weights of ``WORDS`` that change linearly with the angles and sum to 1, to interpolate conditions.

    Front, side and back have weight 1 at azimuths 0, +-90 and 180, and are equal half-way between, where the bins
    change. The weight of overhead rises from 0 to 1 between the two elevations of ``overhead``.
    """
    turn = _off_front(views.azimuth) / 90
    around = torch.stack([(1 - turn).clamp(min=0), 1 - (turn - 1).abs(), (turn - 1).clamp(min=0)], dim=1)
    above = ((views.elevation - overhead[0]) / (overhead[1] - overhead[0])).clamp(0, 1)[:, None]
    return torch.cat([around * (1 - above), above], dim=1)


def view_conditions(conditions: Cond, weights: Float[Tensor, "b 4"]) -> Cond:
    """Return the condition of each view, mixed from the conditions of the four ``view_prompts``, in their order.

    Embeddings are averaged with the weights. Integer tensors, such as a mask of tokens, are those of the heaviest
    word. Raises ``ValueError`` for conditions of a batch other than four.
    """
    for name, value in conditions.items():
        if len(value) != len(WORDS):
            raise ValueError(
                f"conditions[{name!r}] must have batch {len(WORDS)}, one for each of {', '.join(WORDS)}; got "
                f"{tuple(value.shape)}. Encode view_prompts(prompt)."
            )

    def chosen(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value[weights.argmax(1).to(value.device)]
        return torch.einsum("bw,w...->b...", weights.to(value), value)

    return {name: chosen(value) for name, value in conditions.items()}


def _off_front(azimuth: Tensor) -> Tensor:
    """Return the angles, in [0, 180] degrees, between azimuths and the front."""
    return ((azimuth + 180) % 360 - 180).abs()


def _sphere(azimuth: Tensor, elevation: Tensor) -> tuple[Tensor, Tensor]:
    """Return points (b, 3) on the unit sphere, and the up directions (b, 3) of cameras there that look inwards."""
    (sin_a, cos_a), (sin_e, cos_e) = ((x.deg2rad().sin(), x.deg2rad().cos()) for x in (azimuth, elevation))
    return (
        torch.stack([cos_e * cos_a, cos_e * sin_a, sin_e], dim=1),
        torch.stack([-sin_e * cos_a, -sin_e * sin_a, cos_e], dim=1),
    )


def _uniform(size: int | tuple[int, ...], ends: Range, generator: Generator) -> Tensor:
    share = torch.rand(size, generator=generator, device=generator.device, dtype=torch.float64)
    return ends[0] + (ends[1] - ends[0]) * share
