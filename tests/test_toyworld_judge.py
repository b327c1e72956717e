"""The judge: what it is asked, what it learns, and that the shipped one is as right as its facts say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import train_judge as script

import toyworld
from scorefield.metrics import frechet_distance, kernel_distance
from toyworld import judge as module
from toyworld.captions import Attributes, describe
from toyworld.data import HELD_OUT, draw_scenes
from toyworld.judge import (
    ANSWERS,
    NOT_ASKED,
    Judge,
    accuracies,
    augmented,
    labels_of,
    load_judge,
    save_judge,
    train_judge,
)  # fmt: skip
from toyworld.render import render
from toyworld.solids import VIEWED_SHAPES

PACKAGE = Path(toyworld.__file__).parent
TINIEST = {"steps": 3, "batch_size": 8, "num_images": 16, "num_held_out": 12}


@pytest.fixture(scope="module")
def shipped():
    return load_judge()


@pytest.fixture(scope="module")
def held_out():
    """Renders that even the shipped facts were not measured on."""
    scenes = draw_scenes(range(HELD_OUT + 10**6, HELD_OUT + 10**6 + 400))
    return render(scenes).rgb, [describe(scene) for scene in scenes]


def test_the_shipped_judge_is_small_and_as_right_as_its_facts_say(shipped, held_out):
    assert sum(p.numel() for p in shipped.parameters()) <= 400_000
    assert (PACKAGE / "judge.safetensors").stat().st_size <= 1_500_000
    assert not any(p.requires_grad for p in shipped.parameters())
    assert not shipped.training
    facts = shipped.facts
    assert facts.num_held_out >= 4000
    assert min(facts.accuracies["shape"], facts.accuracies["colour"], facts.accuracies["background"]) >= 0.98
    assert facts.accuracies["view"] >= 0.97
    assert min(facts.augmented_accuracies.values()) >= 0.95
    measured = accuracies(shipped, *held_out)
    for question, share in facts.accuracies.items():
        # Five standard deviations of 400 answers, at least half an answer in a hundred.
        assert measured[question] >= share - max(0.005, 5 * (share * (1 - share) / 400) ** 0.5), question


def test_the_shipped_judge_sees_through_mild_damage(shipped, held_out, generator):
    """What decoding a latent does, and worse, is not to cost the right answers."""
    images, attributes = held_out
    damage = (augmented(images, generator) - images).square().mean((1, 2, 3)).sqrt()
    assert 0.005 < damage.min() < damage.max() < 0.35
    assert damage.std() > 0.01
    for share in accuracies(shipped, augmented(images, generator), attributes).values():
        assert share > 0.94
    as_asked = accuracies(shipped, images, [replace(one, colour="red") for one in attributes])
    assert 0.05 < as_asked["colour"] < 0.25


def test_features_tell_worlds_apart(shipped, held_out):
    """Fréchet distances: far above that of renders to renders for pictures upside down or without colour."""
    images = held_out[0]
    features = shipped.features(images)
    assert features.shape == (400, 96)
    floor = frechet_distance(features[::2], features[1::2])
    grey = images.mean(1, keepdim=True).expand_as(images)
    for other in (images.flip(2), grey):
        assert frechet_distance(shipped.features(other[::2]), features[1::2]) > 3 * floor
    red = torch.tensor([one.colour == "red" for one in held_out[1]])
    assert kernel_distance(features[red], features[~red]) > 20 * abs(
        kernel_distance(features[::2], features[1::2])
    )


def test_a_question_is_asked_only_where_it_has_an_answer():
    attributes = [
        Attributes("mug", "red", "white", "side"),
        Attributes("sphere", "blue", "grey", "side"),
        Attributes("chair", "pink", None, None),
    ]
    labels = labels_of(attributes)
    assert {question: tuple(answers) for question, answers in labels.items()} == {
        "shape": (5, 0, 6), "colour": (0, 5, 7),
        "background": (0, 1, NOT_ASKED), "view": (1, NOT_ASKED, NOT_ASKED),
    }  # fmt: skip
    assert {
        shape
        for shape in ANSWERS["shape"]
        if int(labels_of([Attributes(shape, "red", None, "back")])["view"]) >= 0
    } == set(VIEWED_SHAPES)


class Echo(Judge):
    """Answers all questions as it is told to."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def forward(self, images):
        return {q: torch.nn.functional.one_hot(a, len(ANSWERS[q])).float() for q, a in self.answers.items()}


def test_accuracies_count_right_answers_to_asked_questions():
    attributes = [Attributes("mug", "red", "white", "side"), Attributes("sphere", "red", None, "back")]
    answers = {"shape": [5, 1], "colour": [0, 0], "background": [1, 2], "view": [1, 0]}
    judge = Echo({question: torch.tensor(answer) for question, answer in answers.items()})
    measured = accuracies(judge, torch.zeros(2, 3, 64, 64), attributes)
    assert measured == {"shape": 0.5, "colour": 1.0, "background": 0.0, "view": 1.0}
    silent = accuracies(judge, torch.zeros(2, 3, 64, 64), [Attributes("cone", "red")] * 2)
    assert torch.tensor([silent["background"], silent["view"]]).isnan().all()


@pytest.mark.slow
def test_training_is_deterministic_and_measures_what_is_stored(tmp_path):
    first, again = train_judge(**TINIEST), train_judge(**TINIEST)
    (tmp_path / "thesis.txt").write_text("precious")
    folder = save_judge(first, tmp_path)
    assert {path.name for path in folder.iterdir()} == {"thesis.txt", "judge.json", "judge.safetensors"}
    loaded = load_judge(folder)
    images = render(draw_scenes(range(8))).rgb
    for question, logits in first(images).items():
        assert torch.equal(again(images)[question], logits)
        assert torch.equal(loaded(images)[question], logits)
    assert loaded.facts == first.facts == again.facts
    assert loaded.facts.num_images == 16


def test_the_script_writes_a_judge(tmp_path, capsys):
    folder = script.main(script.Config(out=tmp_path / "judge", device="cpu", **TINIEST))
    assert "accuracy on 12 held-out renders" in capsys.readouterr().out
    assert json.loads((folder / "judge.json").read_text())["steps"] == 3
    assert load_judge(folder).facts.num_held_out == 12
    with pytest.raises(ValueError, match="--steps must be above 0"):
        script.main(script.Config(out=tmp_path / "other", steps=0))


def test_what_is_no_judge_is_refused(shipped, tmp_path):
    with pytest.raises(ValueError, match=r"holds no judge that train_judge\.py wrote"):
        load_judge(tmp_path)
    folder = save_judge(shipped, tmp_path / "judge")
    description = (folder / "judge.json").read_text()
    for broken in (description.replace(module.FORMAT, "other"), description.replace('"seed": 0,', ""), "[]"):
        (folder / "judge.json").write_text(broken)
        with pytest.raises(ValueError, match=r"holds no judge that train_judge\.py wrote"):
            load_judge(folder)
    with pytest.raises(ValueError, match="the judge has no facts"):
        save_judge(Judge(), tmp_path / "untrained")
    with pytest.raises(ValueError, match=r"the judge sees pictures \(b, 3, 64, 64\); got \(1, 3, 32, 32\)"):
        shipped(torch.zeros(1, 3, 32, 32))
