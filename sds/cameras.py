"""Where a scene is looked at from, and the words a text teacher is told about it.

The world has z up, and the object in about [-1, 1]^3. ``camera_to_world`` (3, 4) is nerfstudio's and OpenGL's: its
columns are the camera's x axis (right), y axis (up), z axis (backwards: the camera looks along -z) and position.
All angles are in degrees. Azimuth 0 is on +x, which is the front, and grows counter-clockwise seen from above;
elevation 90 is straight above.
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
"""What view-dependent prompts call a view; the order of all weights and conditions here."""


@dataclass(frozen=True, eq=False)
class Views:
    """b cameras, of no particular resolution.

    Attributes:
        camera_to_world: (b, 3, 4).
        focal: (b,) focal length over the height of the picture: 0.5 / tan(vertical field of view / 2).
        azimuth: (b,) in degrees, before any jitter of the position: what prompts are chosen by.
        elevation: (b,) in degrees, likewise.
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
        """Of the cameras, in the world."""
        return self.camera_to_world[:, :, 3]

    def directions(self, height: int, width: int) -> Float[Tensor, "b h w 3"]:
        """Unit directions in the world of the rays through the centres of all pixels.

        Pixels are square and the principal point is the centre. They are those of nerfstudio's ``Cameras``, which
        computes them in float32 by an indexing that torch is to change.

        Raises ``ValueError`` for a picture without pixels.
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
    """All views in one batch."""
    return Views(*(torch.cat(values) for values in zip(*(vars(view).values() for view in views), strict=True)))


def orbit(azimuth: Tensor, elevation: Tensor, distance: Tensor, focal: Tensor) -> Views:
    """Views (b,) of the world's origin from a sphere round it; the camera's right is always horizontal.

    Straight above is no special case: there, up is where -x was in front.
    """
    position, up = _sphere(azimuth, elevation)
    pose = look_at(position * distance[:, None], torch.zeros_like(position), up)
    return Views(pose, focal, azimuth, elevation)


def look_at(
    position: Float[Tensor, "b 3"], target: Float[Tensor, "b 3"], up: Float[Tensor, "b 3"]
) -> Float[Tensor, "b 3 4"]:
    """``camera_to_world`` of cameras that look at ``target``; ``up`` must not point along the line of sight."""
    back = torch.nn.functional.normalize(position - target, dim=1)
    right = torch.nn.functional.normalize(torch.linalg.cross(up, back), dim=1)
    return torch.stack([right, torch.linalg.cross(back, right), back, position], dim=2)


@dataclass(frozen=True, kw_only=True)
class CameraDistribution:
    """Random cameras; the defaults are DreamFusion's (arXiv 2209.14988, section 3.2 and Appendix A.2).

    DreamFusion's scene fills a sphere of radius 1.4, in which the cameras move. A scene that is to be seen as a
    whole needs a larger distance: 2.6 to 3.1 at focal 1.37, which is a field of view of 40 degrees.

    Attributes:
        distance: of the camera from the origin, uniform.
        azimuth: in degrees, uniform and stratified: see :meth:`draw`.
        elevation: in degrees; with probability ``uniform_angle`` uniform in the angle, else in the area of the
            sphere. The first favours the pole, the second the horizon.
        uniform_angle: that probability.
        focal: over the height of the picture, uniform; the paper's multiple of the width.
        position_jitter: of the camera, uniform in a cube of twice this edge.
        target_jitter: standard deviation, on each axis, of the point that is looked at. The paper's N(0, 0.2 I)
            taken as a variance would often miss the object; implementations read a deviation.
        up_jitter: standard deviation, on each axis, of what is added to the upward vector; likewise.
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
            raise ValueError(f"uniform_angle is a probability; got {self.uniform_angle}.")

    def draw(self, num_views: int, generator: Generator, *, rank: int = 0, num_ranks: int = 1) -> Views:
        """Independent views, but for the azimuths: one in each of ``num_ranks * num_views`` equal sectors.

        Ranks take turns at the sectors, so that views go round the scene on every rank. Each rank passes a
        generator of its own. Raises ``ValueError`` for no views, or a rank that is none of ``num_ranks``.
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
        """Progressive views: at progress 0 all from one direction, at 1 from the whole range, linear between.

        Raises ``ValueError`` unless 0 <= progress <= 1.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must lie in [0, 1]; got {progress}. Pass min(1, step / until).")

        def between(centre: float, ends: Range) -> Range:
            low, high = (centre + progress * (end - centre) for end in ends)
            return low, high

        return replace(self, azimuth=between(azimuth, self.azimuth), elevation=between(elevation, self.elevation))

    def quarters(self, spread: float) -> list["CameraDistribution"]:
        """Front, left, back and right, each within ``spread`` times 45 degrees: at 1 they cover all azimuths.

        Away from the middle of their quarters view words are vague, and a scene that begins there turns as it
        likes. Raises ``ValueError`` unless 0 <= spread <= 1.
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
    """The prompt for each of ``WORDS``: "a red mug" gives "a red mug, front view" and so on.

    Raises ``ValueError`` for an empty prompt.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; say what the scene should show, for example 'a red mug'.")
    return [f"{prompt.strip()}, {word} view" for word in WORDS]


def word_bins(views: Views, *, front_within: float = 45.0, overhead_above: float = 60.0) -> Float[Tensor, "b 4"]:
    """One-hot weights of ``WORDS``: DreamFusion's discrete view prompts (arXiv 2209.14988, section 3.2).

    Args:
        views: b views.
        front_within: azimuths at most this far from 0 are the front, from 180 the back, all others a side.
        overhead_above: views from above this elevation are overhead, whatever the azimuth.
    """
    off_front = _off_front(views.azimuth)
    word = torch.where(off_front <= front_within, 0, torch.where(off_front >= 180 - front_within, 2, 1))
    word = torch.where(views.elevation > overhead_above, 3, word)
    return torch.nn.functional.one_hot(word, len(WORDS)).to(views.focal.dtype)


def word_weights(views: Views, *, overhead: Range = (30.0, 90.0)) -> Float[Tensor, "b 4"]:
    """Weights of ``WORDS`` that change linearly with the angles and sum to 1, for interpolated conditions.

    Front, side and back have weight 1 at azimuths 0, +-90 and 180, and cross half-way, as the bins do; overhead
    rises from 0 to 1 between the elevations ``overhead``.
    """
    turn = _off_front(views.azimuth) / 90
    around = torch.stack([(1 - turn).clamp(min=0), 1 - (turn - 1).abs(), (turn - 1).clamp(min=0)], dim=1)
    above = ((views.elevation - overhead[0]) / (overhead[1] - overhead[0])).clamp(0, 1)[:, None]
    return torch.cat([around * (1 - above), above], dim=1)


def view_conditions(conditions: Cond, weights: Float[Tensor, "b 4"]) -> Cond:
    """The condition of each view, from those of the four ``view_prompts`` in their order.

    Embeddings are averaged with the weights; whole numbers, such as a mask of tokens, are those of the heaviest
    word. Raises ``ValueError`` for conditions of another batch than four.
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
    """Degrees in [0, 180] between azimuths and the front."""
    return ((azimuth + 180) % 360 - 180).abs()


def _sphere(azimuth: Tensor, elevation: Tensor) -> tuple[Tensor, Tensor]:
    """Points (b, 3) on the unit sphere, and what is up (b, 3) for a camera there that looks at the centre."""
    (sin_a, cos_a), (sin_e, cos_e) = ((x.deg2rad().sin(), x.deg2rad().cos()) for x in (azimuth, elevation))
    return (
        torch.stack([cos_e * cos_a, cos_e * sin_a, sin_e], dim=1),
        torch.stack([-sin_e * cos_a, -sin_e * sin_a, cos_e], dim=1),
    )


def _uniform(size: int | tuple[int, ...], ends: Range, generator: Generator) -> Tensor:
    share = torch.rand(size, generator=generator, device=generator.device, dtype=torch.float64)
    return ends[0] + (ends[1] - ends[0]) * share
