"""Watching a run: what is logged, what raises an alarm, which weights are kept."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from folders import assert_same, tensors
from refusals import refused
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import distill.options as distill_options
import distill.recipe as train_dmd
import scorefield.commands.teacher as train_teacher
import scorefield.training.evaluate as monitoring
from scorefield.commands.options import TrainTeacher
from scorefield.data.images import load_images
from scorefield.data.options import DataOptions
from scorefield.metrics import frechet_distance, kernel_distance
from scorefield.models.teacher import load_teacher
from scorefield.training.evaluate import Look, alarms, check_evaluation, is_best, look
from scorefield.training.features import Classifier, Facts, save_classifier
from scorefield.training.options import EvalOptions

TINY = {"steps": 6, "batch_size": 16, "save_every": 3, "log_every": 2}


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    torch.manual_seed(0)
    return save_classifier(Classifier(Facts(1, 8, 10)), tmp_path_factory.mktemp("features") / "features")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    return train_teacher.main(TrainTeacher(out=out, width=32, depth=2, **TINY))


def distil(out, teacher, **changes):
    config = {**TINY, "warmup_steps": 2, "num_pairs": 20, "eval_images": 20, "skip_teacher_check": True, **changes}
    return train_dmd.main(replace(distill_options.digits(), out=out, teacher=str(teacher), **config))


def scalars(out):
    events = EventAccumulator(str(out / "logs")).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_the_look_of_images_is_their_mean_and_the_spread_between_them():
    a, b = torch.full((1, 1, 2, 2), 0.5), torch.full((1, 1, 2, 2), -0.5)
    assert look(torch.cat([a, b])) == Look(0.0, pytest.approx(2**-0.5))
    assert look(torch.cat([a, a])) == Look(0.5, 0.0), "alike"
    assert look(torch.cat([4 * a, -4 * b])).brightness == 1.0, "clamped as a picture is"


def test_alarms_name_what_is_wrong_and_nothing_else():
    assert alarms(Look(0.0, 0.5), Look(0.05, 0.55)) == []
    (dark,) = alarms(Look(-0.5, 0.5), Look(0.0, 0.5))
    assert "brightness -0.50" in dark
    (alike,) = alarms(Look(0.0, 0.1), Look(0.0, 0.5))
    assert "spread" in alike
    assert "0.10" in alike
    (noisy,) = alarms(Look(0.0, 0.9), Look(0.0, 0.5))
    assert "spread" in noisy
    assert len(alarms(Look(0.9, 0.0), Look(0.0, 0.5))) == 2
    assert len(alarms(look(torch.full((2, 1, 2, 2), torch.nan)), Look(0.0, 0.5))) == 2


@pytest.fixture(scope="module")
def watched(tmp_path_factory, teacher, features):
    out = tmp_path_factory.mktemp("watched")
    student = distil(out, teacher, eval_every=2, features=features)
    return out, student


def test_the_last_figures_are_those_of_the_saved_student(watched, features):
    """Made again here from the saved average: what is evaluated is what is kept, not the raw weights."""
    out, student = watched
    model, data = load_teacher(str(student)), load_images(DataOptions())
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:20]
    real = data.batch(chosen, torch.Generator()).images
    labels = data.labels[chosen]  # as frequent as in the data
    images = monitoring.draw(model, [torch.arange(20)], labels)
    network = monitoring.load_features(features, data).features
    made, wanted = network(images.clamp(-1, 1)), network(real)
    values = scalars(out)
    for name in ("brightness", "spread", "frechet_distance", "kid"):
        assert list(values[f"eval/{name}"]) == [2, 4, 6]
    assert values["eval/frechet_distance"][6] == pytest.approx(frechet_distance(made, wanted), rel=1e-5)
    assert values["eval/kid"][6] == pytest.approx(kernel_distance(made, wanted), rel=1e-4)
    assert values["eval/brightness"][6] == pytest.approx(float(images.clamp(-1, 1).mean()), rel=1e-5)


def test_the_best_is_kept_and_can_be_sampled(watched):
    out, _ = watched
    note, curve = json.loads((out / "best.json").read_text()), scalars(out)["eval/frechet_distance"]
    assert note["step"] == min(curve, key=curve.get)
    assert note["frechet_distance"] == pytest.approx(min(curve.values()), rel=1e-6)
    assert load_teacher(str(out / "best")).times


def test_a_worse_one_does_not_replace_it(tmp_path):
    best = tmp_path / "best"
    assert is_best(best, {"frechet_distance": 2.0}), "there is none yet"
    best.mkdir()
    note = best.with_suffix(".json")
    whole, torn = '{"frechet_distance": 1.0}', '{"frechet_dis'  # cut off by a kill
    for text, distance, better in ((whole, 2.0, False), (whole, 0.5, True), (torn, 2.0, True)):
        note.write_text(text)
        assert is_best(best, {"frechet_distance": distance}) is better


class Killed(BaseException):
    pass


def test_the_best_of_a_run_killed_in_an_evaluation_is_that_of_an_undisturbed_one(tmp_path, features, monkeypatch):
    """The checkpoint of the step is there by then, and the run goes on behind it."""
    looks = iter([])

    def compare(network, images, real):
        if (distance := next(looks)) is None:
            raise Killed
        return {"frechet_distance": distance, "kid": 0.0}

    monkeypatch.setattr(monitoring, "compare", compare)
    config = TrainTeacher(
        out=tmp_path / "whole", width=32, depth=1, eval_every=3, eval_images=20, features=features, **TINY
    )
    found = {}
    for name, distances in (("whole", [1.0, 2.0]), ("cut", [None, 1.0, 2.0])):
        looks, run = iter(distances), replace(config, out=tmp_path / name)
        if distances[0] is None:
            with pytest.raises(Killed):
                train_teacher.main(run)
            assert (run.out / "checkpoints" / "step-000000003").is_dir()
        train_teacher.main(run)
        found[name] = (json.loads((run.out / "best.json").read_text()), tensors(run.out / "best"))
    assert found["whole"][0] == found["cut"][0] == {"step": 3, "frechet_distance": 1.0, "kid": 0.0}
    assert_same(found["whole"][1], found["cut"][1])


@pytest.mark.parametrize("guard_images", [0, 64])
def test_a_student_killed_in_its_last_evaluation_is_looked_at_again(
    tmp_path, teacher, features, monkeypatch, guard_images
):
    found = iter([None, 1.0])

    def compare(network, images, real):
        if (distance := next(found)) is None:
            raise Killed
        return {"frechet_distance": distance, "kid": 0.0}

    monkeypatch.setattr(monitoring, "compare", compare)
    options = {"eval_every": 6, "features": features, "guard_images": guard_images, "guard_every": 3}
    with pytest.raises(Killed):
        distil(tmp_path, teacher, **options)
    picture = tmp_path / "samples" / "step-000000006.png"
    assert (tmp_path / "checkpoints" / "step-000000006").is_dir()
    assert not picture.exists()
    distil(tmp_path, teacher, **options)
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 6
    assert picture.exists()


def test_a_new_run_forgets_the_best_of_the_one_before(tmp_path, teacher, features):
    distil(tmp_path, teacher, eval_every=3, features=features)
    (tmp_path / "best.json").write_text('{"frechet_distance": -1.0, "step": 9}')
    shutil.rmtree(tmp_path / "checkpoints")
    distil(tmp_path, teacher, eval_every=3, features=features)
    assert json.loads((tmp_path / "best.json").read_text())["step"] in (3, 6)


def test_watching_does_not_change_the_run(tmp_path, teacher, watched):
    assert_same(tensors(distil(tmp_path, teacher)), tensors(watched[1]))


def test_alarms_are_printed_with_their_step(tmp_path, teacher, capsys, monkeypatch):
    monkeypatch.setattr(monitoring, "alarms", lambda seen, wanted: ["all grey"])
    distil(tmp_path, teacher, eval_every=4)
    assert capsys.readouterr().err.count("alarm at step 4: all grey") == 1


def test_a_teacher_is_watched_beside_its_data(tmp_path, features):
    config = TrainTeacher(out=tmp_path, width=32, depth=2, **TINY, eval_every=3, eval_images=20, features=features)
    train_teacher.main(config)
    assert list(scalars(tmp_path)["eval/kid"]) == [3, 6]
    assert not load_teacher(str(tmp_path / "best")).times


@pytest.mark.parametrize(("changes", "said"), [
    ({"eval_every": -1}, "--eval-every"), ({"eval_every": 2, "eval_images": 1}, "--eval-images"),
    ({"features": "features"}, "--eval-every 0"), ({"eval_every": 2, "features": "none"}, "holds no classifier"),
    ({"eval_every": 2, "features": "large"}, "Train features on the same"),
])  # fmt: skip
def test_options_that_cannot_work_are_refused(tmp_path, features, changes, said):
    save_classifier(Classifier(Facts(3, 16, 10)), tmp_path / "large")
    if "features" in changes:
        changes = {**changes, "features": features if changes["features"] == "features" else tmp_path / "large"}
    if said == "holds no classifier":
        changes["features"] = tmp_path / "none"
    with refused(said):
        check_evaluation(EvalOptions(**changes), load_images(DataOptions()))
