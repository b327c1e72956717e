"""How much of the Janus problem is due to the prompt? One scene, and three teachers that know more or less.

    python benchmarks/view_words.py --out runs/janus --picture docs/janus.png

A scene with two faces is blamed on the optimiser, on the guidance, or on a teacher that prefers front views. Here
the teacher is exact and has no preference. It is a mixture of narrow Gaussians around true pictures of a chair
from a bank of cameras, conditioned on

    exact view      the one picture from the current camera,
    view words      all pictures of its view word: front, side, back or overhead, as in view-dependent prompts,
    no view words   all pictures.

Cameras, noises and steps are the same for all three, so the gap is due to what a condition leaves open. All
cameras have about the same height and distance, so only the azimuth is open, and no view is overhead. As in
``scorefield sds``, scenes begin as a faint cloud, with cameras in the middle of their quarters, where view words
are unambiguous.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from geometry import CAMERAS as ALL_CAMERAS
from geometry import STD, learn
from PIL import Image, ImageDraw
from torch import Generator, Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_pil_image
from yardsticks import DISTANCE, HALF_SIZE, crop_psnr, measured, ring, shown, truth

from scorefield.denoiser import Cond
from scorefield.exact import LABELS, GaussianMixture
from scorefield.randomness import Rng, derived_generator
from scorefield.schedule import Schedule, VariancePreserving
from scorefield.times import ramp, uniform
from sds.cameras import Views, word_bins
from sds.field import cone_blob
from sds.scene import Scene, grid_scene, save_scene
from sds.turntable import contact_sheet

KNOWLEDGE = ("exact view", "view words", "no view words")
"""What the teachers know of the camera, from all to nothing."""

ELEVATION = 20.0
"""Elevation, in degrees, of the views that scenes are measured and shown from."""

CAMERAS = replace(ALL_CAMERAS, distance=(DISTANCE, DISTANCE), elevation=(ELEVATION - 5, ELEVATION + 5))

TIMES = uniform(0.02, 0.5)
"""At larger times a mixture of views from all around expects their mean, which a scene need not become."""

PICTURE_SIZE = 64
"""Height and width of the scenes in the picture, in pixels, before they are enlarged."""


@dataclass(frozen=True)
class Config:
    """Scenes to learn, and the picture to draw of them."""

    out: Path = Path("runs/janus")
    """Folder of the scenes and ``measures.json``."""
    picture: Path | None = None
    """Picture to write: truth and scenes of the first seed from eight sides. None draws nothing."""
    shape: str = "chair"
    """Solid of the toy world, one whose four sides differ."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds; each has a bank of cameras and three scenes."""
    steps: int = 200
    """Steps per scene, each of four views of 32 x 32 pixels."""
    num_bank: int = 256
    """Number of cameras in the bank."""


@dataclass(frozen=True)
class Gap:
    """A scene compared with the truth, over 12 views between those of the bank; PSNR in dB on the object's crop.

    Attributes:
        psnr: Without turning the scene.
        turned: After the best of 12 turns about the vertical axis. A teacher without view words cannot know where
            the front should be, and one with view words hardly can, since outlines from front and back are alike.
            A turned scene is no error in itself.
        iou: IoU of interior-filled voxels, without turning the scene.
    """

    psnr: float
    turned: float
    iou: float

    def __str__(self) -> str:
        return f"{self.psnr:5.2f} dB, turned {self.turned:5.2f} dB, IoU {self.iou:.3f}"


def view_labels(views: Views, knowledge: str) -> Tensor:
    """Return labels (b,); views with the same label are the same to the teacher.

    Raises ``ValueError`` for knowledge that is not in ``KNOWLEDGE``.
    """
    if knowledge == "exact view":
        return torch.arange(len(views))
    if knowledge == "view words":
        # Mixtures need labels 0, 1, ... without gaps; a small bank may lack a view word.
        return word_bins(views).argmax(1).unique(return_inverse=True)[1]
    if knowledge == "no view words":
        return torch.zeros(len(views), dtype=torch.long)
    raise ValueError(f"knowledge must be one of {', '.join(KNOWLEDGE)}; got {knowledge!r}.")


def bank_teacher(images: Tensor, labels: Tensor, schedule: Schedule, std: float = STD) -> GaussianMixture:
    """Return equal Gaussians around the images; a label in ``cond`` selects those that carry it."""
    num = len(images)
    return GaussianMixture(images, torch.full((num,), std), torch.ones(num), schedule, labels)


def learn_with(knowledge: str, shape: str, bank: Views, *, seed: int, steps: int, size: int = 32) -> Scene:
    """Return a scene learned through the cameras of the bank, four per step."""
    labels = view_labels(bank, knowledge)
    teacher = bank_teacher(truth(shape, bank, size).rgb, labels, VariancePreserving.scaled_linear())

    def draw(rng: Rng) -> tuple[Views, Cond]:
        chosen = one_of_each_quarter(bank, ramp(rng.step, 0, 0.2, 1.0, steps / 2), rng("views"))
        return Views(*(value[chosen] for value in vars(bank).values())), {LABELS: labels[chosen]}

    scene = grid_scene(half_size=HALF_SIZE, blob=cone_blob(3.0), initial=-4.0)
    return learn(teacher, draw, seed=seed, steps=steps, size=size, times=TIMES, scene=scene)


def one_of_each_quarter(bank: Views, spread: float, generator: Generator) -> Tensor:
    """Return numbers (4,) of a front, left, back and right camera, each within ``spread`` times 45 degrees."""
    chosen = []
    for middle in (0, 90, 180, 270):
        off = ((bank.azimuth - middle + 180) % 360 - 180).abs()
        near = (off <= max(45 * spread, float(off.min()))).nonzero()[:, 0]
        chosen.append(near[torch.randint(len(near), (1,), generator=generator)])
    return torch.cat(chosen)


def gap(shape: str, scene: Scene, size: int = 32, num_turns: int = 12) -> Gap:
    """Return the scene compared with the truth, without and with turns."""
    views = ring(torch.arange(12) * 30.0 + 15, torch.full((12,), ELEVATION))
    true = truth(shape, views, size)
    turns = torch.arange(num_turns) * 360 / num_turns
    turned = [crop_psnr(shown(scene, ring(views.azimuth + turn, views.elevation), size), true) for turn in turns]
    found = measured(shape, scene, size)
    return Gap(turned[0], max(turned), found.iou)


def picture(rows: dict[str, Tensor], side: int = 96, margin: int = 110) -> Image.Image:
    """Return rows of pictures in [-1, 1], enlarged, with their names at the left."""
    frames = [
        interpolate((images + 1) / 2, (side, side), mode="bilinear", antialias=True).clamp(0, 1)
        for images in rows.values()
    ]
    sheet = to_pil_image(contact_sheet(frames))
    whole = Image.new("RGB", (margin + sheet.width, sheet.height), "white")
    whole.paste(sheet, (margin, 0))
    draw = ImageDraw.Draw(whole)
    for number, name in enumerate(rows):
        draw.text((8, (number + 0.5) * sheet.height / len(rows)), name, fill="black", anchor="lm", font_size=14)
    return whole


def main(config: Config) -> dict[str, list[Gap]]:
    """Learn all scenes, print their gaps, and write the picture if asked."""
    around = ring(torch.arange(8) * 45.0, torch.full((8,), ELEVATION))
    rows = {"truth": truth(config.shape, around, PICTURE_SIZE).rgb}
    gaps: dict[str, list[Gap]] = {knowledge: [] for knowledge in KNOWLEDGE}
    config.out.mkdir(parents=True, exist_ok=True)
    for seed in config.seeds:
        bank = CAMERAS.draw(config.num_bank, derived_generator(seed, "bank"))
        for knowledge, found in gaps.items():
            scene = learn_with(knowledge, config.shape, bank, seed=seed, steps=config.steps)
            save_scene(scene, config.out / f"{knowledge.replace(' ', '-')}-{seed}.safetensors")
            found.append(gap(config.shape, scene))
            print(f"{knowledge:14} seed {seed}  {found[-1]}", flush=True)
            rows.setdefault(knowledge, shown(scene, around, PICTURE_SIZE))
    written = {name: [vars(one) for one in found] for name, found in gaps.items()}
    (config.out / "measures.json").write_text(json.dumps(written, indent=2) + "\n")
    if config.picture is not None:
        picture(rows).save(config.picture)
    return gaps


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
