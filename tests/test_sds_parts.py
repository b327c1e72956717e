"""The parts of a scene's training: presets, schedules, losses, and what a resumed run must have in common."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

import sds.options as scene_options
import sds.parts as scenes
import sds.recipe as train_sds
from scorefield import Conditioned, guided
from scorefield.times import constant
from scorefield.training.checkpoint import differences
from scorefield.training.identity import identity
from sds import recovery
from sds.inversion import ism, sdi
from sds.losses import ScoreDistillation, unit
from sds.options import PRESETS
from sds.runs import build_scene
from sds.vsd import VSD, WithoutConditions, low_rank_denoiser

CPU = torch.device("cpu")
MUG = replace(scene_options.toyworld(), prompt="a red mug", steps=100, guidance=(5.0, 3.0))


@pytest.fixture(scope="module")
def teacher():
    return scenes.frozen_teacher(MUG, CPU)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_sound(name, tmp_path):
    config = replace(PRESETS[name](), prompt="a corgi", out=tmp_path / "run")
    assert config.preset == name
    train_sds.check_scene(config)
    recovery.check_opacity(recovery.opacity_all_round(build_scene(config), size=8), 0)
    for step in (0, config.steps // 2, config.steps):
        assert sum(number for _, number in scenes.cameras_at(config, step)) == config.batch_size
        scenes.penalties_at(config, step)


def test_values_go_from_first_to_last_within_their_shares_and_penalties_of_dreamfusion_are_threestudios():
    """Its reductions are ours; the paper's weights would be some 1e-8 of the score."""
    config = replace(MUG, anneal=(0.2, 0.6))
    values = [scenes.along(config, (1.0, 3.0), step) for step in (0, 20, 40, 60, 100)]
    assert values == pytest.approx([1.0, 1.0, 2.0, 3.0, 3.0])
    seen = [scenes.penalties_at(scene_options.dreamfusion(), step) for step in (0, 2500, 5000, 15_000)]
    assert [penalty.opacity for penalty in seen] == [1.0] * 4
    assert [penalty.orientation for penalty in seen] == pytest.approx([10.0, 505.0, 1000.0, 1000.0])


def test_the_loss_is_what_the_flags_say(teacher):
    first, last = (scenes.build_method(MUG, teacher)(step) for step in (0, 100))
    assert isinstance(first, ScoreDistillation)
    assert (first.teacher.scale, last.teacher.scale) == (5.0, 3.0)
    schedule = teacher.denoiser.schedule
    drawn = last.times(2000, schedule, torch.Generator().manual_seed(0))
    low, high = (float(schedule.at(torch.tensor(pair[1]))) for pair in (MUG.t_low, MUG.t_high))
    assert low - 1 <= float(drawn.min()) <= float(drawn.max()) <= high + 1
    vsd = scenes.build_method(replace(MUG, method="vsd"), teacher)
    assert isinstance(vsd(0), VSD)
    assert vsd(0).phi is vsd(50).phi
    assert vsd(0).phi.network.camera is not None
    again = low_rank_denoiser(teacher.denoiser, generator=torch.Generator().manual_seed(0), camera_at=None)
    assert "camera" not in dict(again.network.named_children())


def test_losses_along_inverted_paths_are_what_the_flags_say(teacher):
    options = {"t_low": (0.6, 0.6), "t_high": (0.6, 0.6), "inversion_stride": 0.25, "inversion_guidance": -3.0}
    config = replace(MUG, weight="unit", interval=0.1, negative_prompt="a blue cube", **options)
    denoiser, negative = teacher.denoiser, teacher.negative("a blue cube")
    times = constant(float(denoiser.schedule.at(torch.tensor(0.6))))
    settings = {"stride": 0.25, "times": times, "w": unit}
    by_hand = {
        "ism": ism(guided(denoiser, 5.0, negative), Conditioned(denoiser, negative), interval=0.1, **settings),
        "sdi": sdi(guided(denoiser, 5.0, negative), guided(denoiser, -3.0, negative), **settings),
    }
    x0 = torch.randn(1, *teacher.shape, generator=torch.Generator().manual_seed(0))
    cond = teacher.prompts(["a red mug"])
    for name, wanted in by_hand.items():
        method = scenes.build_method(replace(config, method=name), teacher)(0)
        got, expected = (one.gradient(x0, cond, generator=torch.Generator()).value for one in (method, wanted))
        assert torch.equal(got, expected)


def test_what_changes_no_number_does_not_bind_a_resume():
    free = {"max_rollbacks": 9, "turntable_size": 64, "probe_every": 7, "mesh_resolution": 9}
    first, *others = (
        identity(replace(MUG, **changes), Accelerator(cpu=True), {})
        for changes in ({}, free, {"steps": 9}, {"draws": 9}, {"learning_rate": (0.05, 0.05)})
    )
    assert [differences(first, own) for own in others] == [[], [], ["draws"], ["learning_rate"]]
    assert differences(first, others[1], going_on=False) == ["steps"]
    constant = [{**others[3], "learning_rate": [rate, rate]} for rate in (0.05, 0.01)]
    assert not differences(*constant)


def test_all_that_is_read_of_a_teacher_binds_a_resume(teacher):
    words = scenes.read_prompts(MUG, teacher)

    def hashes(teacher, words):
        return {**scenes.fingerprints(teacher), **scenes.fingerprint_of_words(words)}

    first = hashes(teacher, words)
    assert first == hashes(teacher, scenes.read_prompts(MUG, teacher))
    scaled = replace(teacher, codec=replace(teacher.codec, scaling=2 * teacher.codec.scaling))
    others = hashes(scaled, words), hashes(teacher, words[1:])
    different = [[name for name in first if first[name] != other[name]] for other in others]
    assert different == [["codec"], ["conditions"]]


def test_the_probe_asks_the_teacher_as_the_loss_does(teacher):
    config = replace(MUG, method="vsd", rescale=0.5)
    task = train_sds.build_task(config, teacher, Accelerator(cpu=True))
    target = scenes.build_probe(config, task, teacher).target
    assert isinstance(target, WithoutConditions)
    assert target.names == task.method(0).phi_only
    assert (target.denoiser.scale, target.denoiser.rescale) == (3.0, 0.5)


def test_pictures_of_a_step_are_made_once_and_of_that_step():
    made = []

    class Eye:
        def __call__(self, step, method):
            made.append(("all", step))
            return {"probe/residual": 1.0}, torch.ones(1)

        def pictures(self, step):
            made.append(("pictures", step))
            return torch.zeros(1)

    config = replace(MUG, probe_every=2, log_every=3, steps=7)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    watcher = train_sds.Watcher(config, SimpleNamespace(method=lambda step: None), Eye(), optimizer)
    seen = [(sorted(watcher.figures(step)), float(watcher.pictures())) for step in range(1, 8)]
    logged, shown = zip(*seen, strict=True)
    rate, probed = ["scene/rollbacks"], ["probe/residual"]
    assert list(logged) == [[], probed, rate, probed, [], [*probed, *rate], [*probed, *rate]]
    assert shown == (0, 1, 0, 1, 0, 1, 1)
    assert made == [
        ("pictures", 0), ("all", 1), ("pictures", 2), ("all", 3), ("pictures", 4), ("all", 5), ("all", 6)
    ]  # fmt: skip
