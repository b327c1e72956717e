"""What a teacher that knows less of the camera costs: the pieces of the experiment, and its outcome."""

import json
from types import SimpleNamespace

import pytest
import torch
import view_words
import yardsticks
from PIL import Image

from scorefield.exact import LABELS, GaussianMixture
from sds.cameras import WORDS, orbit
from toyworld.camera import view_word
from toyworld.solids import occupancy

close = torch.testing.assert_close

AZIMUTHS = torch.tensor([0.0, 40.0, 90.0, -90.0, 180.0, 170.0, 10.0, 100.0])
ELEVATIONS = torch.tensor([0.0, 30.0, 0.0, 30.0, 0.0, 30.0, 75.0, 75.0])


@pytest.fixture
def bank():
    return yardsticks.ring(AZIMUTHS, ELEVATIONS)


@pytest.fixture
def question(schedule, generator):
    """Pictures of the bank, and noisy ones, in float64."""
    images, x_t = torch.randn(2, 8, 3, 2, 2, generator=generator, dtype=torch.float64)
    return images, x_t, schedule.at(torch.linspace(0.3, 0.9, 8))


def alone(images, schedule):
    """The exact denoiser of some of the pictures, which no label chooses."""
    return GaussianMixture(images, torch.full((len(images),), 0.4), torch.ones(len(images)), schedule)


def test_a_word_admits_the_views_that_captions_call_by_it(bank):
    labels = view_words.view_labels(bank, "view words")
    words = [view_word(a, e) for a, e in zip(AZIMUTHS.tolist(), ELEVATIONS.tolist(), strict=True)]
    assert [WORDS[label] for label in labels] == words
    assert words == ["front", "front", "side", "side", "back", "back", "overhead", "overhead"]
    many = torch.ones(3)
    views = orbit(torch.tensor([0.0, 180.0, 0.0]), torch.tensor([10.0, 10.0, 80.0]), 3 * many, many)
    assert view_words.view_labels(views, "view words").tolist() == [0, 1, 2], "no gap where a bank lacks a word"
    with pytest.raises(ValueError, match="exact view, view words, no view words; got 'much'"):
        view_words.view_labels(bank, "much")


@pytest.mark.parametrize("knowledge", ["exact view", "view words", "no view words"])
def test_a_teacher_expects_the_pictures_that_its_knowledge_admits(question, schedule, bank, knowledge):
    images, x_t, t = question
    labels = view_words.view_labels(bank, knowledge)
    answer = view_words.bank_teacher(images, labels, schedule, std=0.4)(x_t, t, {LABELS: labels})
    for row in range(8):
        admitted = alone(images[labels == labels[row]], schedule)
        close(answer[row : row + 1], admitted(x_t[row : row + 1], t[row : row + 1], {}))


def test_views_come_one_from_each_quarter_within_its_spread(bank):
    many = view_words.CAMERAS.draw(64, torch.Generator().manual_seed(0))
    for spread in (0.2, 1.0):
        chosen = [
            view_words.one_of_each_quarter(many, spread, torch.Generator().manual_seed(n)) for n in range(20)
        ]
        azimuth = many.azimuth[torch.stack(chosen)]
        off = ((azimuth - torch.tensor([0.0, 90.0, 180.0, 270.0]) + 180) % 360 - 180).abs()
        assert float(off.max()) <= 45 * spread
        assert float(off.max()) > 30 * spread
    # A small bank may have nothing so near: then the nearest.
    assert len(view_words.one_of_each_quarter(bank, 0.0, torch.Generator().manual_seed(0))) == 4


def test_a_turn_is_told_from_a_fault():
    """A chair that is right but for where its front is: far off as it stands, perfect once turned."""

    def rendered(views, *, height, width, background):
        azimuth = views.azimuth - 45
        return yardsticks.truth("chair", yardsticks.ring(azimuth, views.elevation), height)

    def field(points):
        return SimpleNamespace(density=100.0 * occupancy("chair", points))

    class Turned:
        def __call__(self, views, **size):
            return rendered(views, **size)

    scene = Turned()
    scene.field = field
    found = view_words.gap("chair", scene, num_turns=8)
    assert found.psnr < 15
    assert found.turned > 60
    assert found.iou > 0.95


@pytest.mark.slow
def test_an_experiment_leaves_its_measures_and_a_picture(tmp_path):
    config = view_words.Config(
        out=tmp_path / "out", picture=tmp_path / "janus.png", seeds=(0,), steps=2, num_bank=8
    )
    gaps = view_words.main(config)
    assert list(gaps) == list(view_words.KNOWLEDGE)
    written = json.loads((tmp_path / "out" / "measures.json").read_text())
    assert written == {name: [vars(one) for one in found] for name, found in gaps.items()}
    assert {path.stem for path in (tmp_path / "out").glob("*.safetensors")} == {
        "exact-view-0", "view-words-0", "no-view-words-0",
    }  # fmt: skip
    assert Image.open(tmp_path / "janus.png").size == (110 + 8 * 98 + 2, 4 * 98 + 2)


@pytest.mark.slow
def test_the_less_a_teacher_knows_of_the_view_the_worse_the_chair(tmp_path):
    gaps = view_words.main(view_words.Config(out=tmp_path))
    for exact, words, nothing in zip(*gaps.values(), strict=True):
        assert exact.psnr >= 20
        assert exact.psnr > words.psnr > nothing.psnr
