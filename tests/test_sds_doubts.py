"""What a run says of a scene that will not be, or is not, what its prompt says."""

from dataclasses import replace

import pytest
import torch

from sds.doubts import doubts, unsettled
from sds.field import cone_blob
from sds.options import check, toyworld
from sds.scene import grid_scene

MUG = replace(toyworld(), prompt="a red mug")
BLOB = grid_scene(num_samples=16, blob=cone_blob(3.0, 0.5), initial=-4.0)


def test_a_usual_start_gives_no_cause_for_doubt():
    assert doubts(MUG, BLOB) == []
    assert doubts(replace(MUG, negative_prompt="grey"), BLOB) == []  # guidance falls from 2 to 1


def test_a_negative_prompt_without_guidance_has_no_effect():
    (said,) = doubts(replace(MUG, negative_prompt="grey", guidance=(1.0, 1.0)), torch.nn.Linear(1, 1))
    assert said.startswith("--negative-prompt 'grey' has no effect at --guidance 1.")


@pytest.mark.parametrize(("scene", "kind"), [
    (grid_scene(num_samples=16, blob=cone_blob(0.0, 0.5), initial=-20.0), "empty"),
    (grid_scene(num_samples=16, blob=cone_blob(0.0, 0.5), initial=20.0), "full"),
])  # fmt: skip
def test_an_empty_or_full_start_is_said(scene, kind):
    (said,) = doubts(MUG, scene)
    assert said.startswith(f"the scene starts {kind}: its mean opacity is ")


def test_words_that_the_toy_worlds_teacher_never_saw_are_named():
    (said,) = doubts(replace(MUG, prompt="a Corgi and a red mug", negative_prompt="blurry"), BLOB)
    assert said.startswith("--teacher toyworld was never shown the words Corgi, and, blurry; it will make")
    assert doubts(replace(MUG, prompt="a corgi", teacher="runs/pipeline"), BLOB) == []
    assert doubts(replace(MUG, prompt="a letter L on a grey background, side view"), BLOB) == []


@pytest.mark.parametrize("method", ["csd", "ism", "sdi"])
def test_losses_that_use_the_negative_prompt_without_guidance_are_not_doubted(method):
    config = replace(MUG, negative_prompt="grey", guidance=(1.0, 1.0), method=method)
    assert doubts(config, torch.nn.Linear(1, 1)) == []


def test_a_residual_that_rises_is_said_and_one_that_falls_or_is_alone_is_not():
    assert unsettled([0.58, 0.61, 0.62]) == [
        "the residual at high noise rose from 0.58 to 0.62: the teacher does not see the prompt in this scene. "
        "Look at it, and try another --seed."
    ]
    assert unsettled([0.45, 0.5, 0.36]) == []
    assert unsettled([0.456, 0.48, 0.473]) == []
    assert unsettled([0.5]) == unsettled([]) == []


@pytest.mark.parametrize(("changes", "message"), [
    ({"learning_rate": (1e30, 1e30)}, r"--learning-rate must be at most 10; got 1e\+30"),
    ({"learning_rate": (0.1, 11.0)}, "--learning-rate must be at most 10; got 0.1:11"),
    ({"opacity": (0.0, 1e9)}, "--opacity must be at most 1,000,000; got 0:1e"),
    ({"distance": (2.0, 1e9)}, "--distance must be at most 1,000; got 2:1e"),
    ({"guidance": (1e5, 1.0)}, "--guidance must be at most 10,000; got 100000:1"),
])  # fmt: skip
def test_absurd_weights_are_refused(changes, message):
    check(MUG)
    with pytest.raises(ValueError, match=message):
        check(replace(MUG, **changes))
