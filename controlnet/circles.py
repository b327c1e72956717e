"""A filled circle on a plain background, its outline as the hint, both colours in the caption: control, exactly.

The data set fill50k with which ControlNet's tutorial begins, from its description: 50,000 pictures of 512 pixels,
"{colour} circle with {colour} background", both of 140 named colours and drawn independently, so that some
circles can hardly be seen; centres within 96 to 416 pixels, radii 64 to 256, so that some leave the picture; hints
are white outlines of 5 pixels on black, without grey. Here lengths scale with the size, and each sample follows
from (seed, index) alone. Mask, centre, radius and colours are known exactly: no annotator stands between a
picture and its score.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from PIL import ImageColor
from torch import Tensor

from scorefield.data.pictures import Kind
from scorefield.randomness import derived_generator

COLOURS = tuple(
    """
    alice blue, antique white, aqua, aquamarine, azure, beige, bisque, black, blanched almond, blue, blue violet,
    brown, burly wood, cadet blue, chartreuse, chocolate, coral, cornflower blue, corn silk, crimson, cyan,
    dark blue, dark cyan, dark golden rod, dark gray, dark green, dark khaki, dark magenta, dark olive green,
    dark orange, dark orchid, dark red, dark salmon, dark sea green, dark slate blue, dark slate gray,
    dark turquoise, dark violet, deep pink, deep sky blue, dim gray, dodger blue, fire brick, floral white,
    forest green, fuchsia, gainsboro, ghost white, gold, golden rod, gray, green, green yellow, honey dew,
    hot pink, indian red, indigo, ivory, khaki, lavender, lavender blush, lawn green, lemon chiffon, light blue,
    light coral, light cyan, light golden rod yellow, light gray, light green, light pink, light salmon,
    light sea green, light sky blue, light slate gray, light steel blue, light yellow, lime, lime green, linen,
    magenta, maroon, medium aqua marine, medium blue, medium orchid, medium purple, medium sea green,
    medium slate blue, medium spring green, medium turquoise, medium violet red, midnight blue, mint cream,
    misty rose, moccasin, navajo white, navy, old lace, olive, olive drab, orange, orange red, orchid,
    pale golden rod, pale green, pale turquoise, pale violet red, papaya whip, peach puff, peru, pink, plum,
    powder blue, purple, red, rosy brown, royal blue, saddle brown, salmon, sandy brown, sea green, sea shell,
    sienna, silver, sky blue, slate blue, slate gray, snow, spring green, steel blue, tan, teal, thistle, tomato,
    turquoise, violet, wheat, white, white smoke, yellow, yellow green
    """.replace("\n    ", " ").strip().split(", ")
)  # fmt: skip
"""CSS names, split into words; aqua and cyan, fuchsia and magenta are the same colours."""

_BYTES = {name: ImageColor.getrgb(name.replace(" ", "")) for name in COLOURS}

CENTRES, RADII, STROKE = (96 / 512, 416 / 512), (64 / 512, 256 / 512), 5 / 512
"""Ranges, uniform, and the outline's width, in units of the picture's side."""

HELD_OUT = 10**9
"""Samples of this index and above are for tests: nothing is trained on them."""


@dataclass(frozen=True)
class Circle:
    """What one picture shows; lengths in units of its side, x to the right and y down from its corner.

    Attributes:
        x: of the centre.
        y: of the centre.
        radius: may reach beyond the picture.
        colour: one of :data:`COLOURS`.
        background: one of :data:`COLOURS`.
    """

    x: float
    y: float
    radius: float
    colour: str
    background: str

    @property
    def caption(self) -> str:
        """Such as "pale golden rod circle with old lace background"."""
        return f"{self.colour} circle with {self.background} background"


def draw_circle(index: int, seed: int = 0, colours: Sequence[str] = COLOURS, *, distinct: bool = False) -> Circle:
    """Circle number ``index`` >= 0 of the data set ``seed``, on every machine.

    Args:
        index: of the sample.
        seed: of the data set.
        colours: drawn from, names of :data:`COLOURS`.
        distinct: the background never has the name of the circle's colour.
    """
    generator = derived_generator("circles", seed, index)
    shares = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    x, y, radius = (
        low + (high - low) * share for (low, high), share in zip((CENTRES, CENTRES, RADII), shares, strict=True)
    )
    colour = colours[int(torch.randint(len(colours), (), generator=generator))]
    others = [name for name in colours if name != colour] if distinct else colours
    return Circle(x, y, radius, colour, others[int(torch.randint(len(others), (), generator=generator))])


def colour_values(names: Iterable[str]) -> Float[Tensor, "n 3"]:
    """Colours of :data:`COLOURS`, in [-1, 1]."""
    return torch.tensor([_BYTES[name] for name in names]).reshape(-1, 3) / 127.5 - 1


def masks(circles: Sequence[Circle], size: int) -> Float[Tensor, "b 1 size size"]:
    """1 at pixels whose centre lies in the circle, else 0."""
    return torch.stack([_inside(circle, size)[None] for circle in circles]).float()


def outlines(circles: Sequence[Circle], size: int) -> Float[Tensor, "b 1 size size"]:
    """1 at pixels whose centre is within half a stroke of the circle's line, else 0; no stroke below one pixel."""
    half = max(1.0, STROKE * size) / size / 2
    return torch.stack([(_inside(c, size, half) ^ _inside(c, size, -half))[None] for c in circles]).float()


def pictures(circles: Sequence[Circle], size: int) -> Float[Tensor, "b 3 size size"]:
    """Return the circles in their colours, in [-1, 1]."""
    colour, background = (
        colour_values(getattr(circle, name) for circle in circles)[:, :, None, None]
        for name in ("colour", "background")
    )
    return torch.where(masks(circles, size) > 0, colour, background)


def _inside(circle: Circle, size: int, wider: float = 0.0) -> Tensor:
    middle = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    radius = max(0.0, circle.radius + wider)
    return (middle - circle.x).square() + (middle - circle.y).square()[:, None] <= radius**2


@dataclass(frozen=True)
class Circles:
    """The data set, as ``controlnet.samples.Samples``; nothing is stored.

    Attributes:
        size: of the pictures' sides.
        num_samples: 50,000 in the tutorial.
        seed: of the draws.
        start: number of the first; ``HELD_OUT`` for tests.
        colours: all, or a few for a small model.
        distinct: circle and background never have one name; the tutorial's may.
    """

    size: int = 512
    num_samples: int = 50_000
    seed: int = 0
    start: int = 0
    colours: tuple[str, ...] = COLOURS
    distinct: bool = False
    kinds: ClassVar[Mapping[str, Kind]] = {"image": "image", "outline": "lines", "mask": "mask"}

    def __post_init__(self) -> None:
        if self.size < 8 or self.num_samples < 1 or self.start < 0:
            raise ValueError(
                f"need size >= 8, num_samples >= 1 and start >= 0; got {self.size}, {self.num_samples} and "
                f"{self.start}."
            )
        if len(set(self.colours)) < 2 or set(self.colours) - set(COLOURS):
            raise ValueError(f"need at least 2 colours, all of COLOURS; got {self.colours}.")

    def __len__(self) -> int:
        return self.num_samples

    def circle(self, index: int) -> Circle:
        """Return the truth about a sample. Raises ``IndexError`` beyond the last."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        return draw_circle(self.start + index, self.seed, self.colours, distinct=self.distinct)

    def caption(self, index: int) -> str:
        """Return the prompt."""
        return self.circle(index).caption

    def identity(self, index: int) -> str:
        """Return all that the picture follows from."""
        return f"circles {self.size} {self.circle(index)}"

    def load(self, index: int) -> dict[str, Tensor]:
        """Picture, outline (the hint) and mask, (c, size, size) of bytes."""
        circles = [self.circle(index)]
        image = (pictures(circles, self.size) + 1) / 2
        parts = {"image": image, "outline": outlines(circles, self.size), "mask": masks(circles, self.size)}
        return {name: (255 * part[0]).round().to(torch.uint8) for name, part in parts.items()}
