"""The recipe of scenes: what it writes, resumes, refuses, and does when a scene is lost."""

import gc
import json
import os
import shutil
import signal
import time
import weakref
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
import trimesh
from ranks import run_on_ranks
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import scorefield.cli as cli
import sds.options as scene_options
import sds.parts as scenes
import sds.recipe as train_sds
from scorefield.atomic import MARKER
from scorefield.gradient import ScoreGradient
from scorefield.training.run import show_plan
from sds import recovery, scene

TINY = {
    "prompt": "a red mug", "steps": 6, "batch_size": 2, "draws": 1, "quarters": 1.0, "render_size": (8, 8),
    "num_samples": 8, "save_every": 2, "log_every": 1, "probe_every": 3, "mesh_resolution": 12,
    "turntable_size": 16, "faces": 400, "texture": 32,
}  # fmt: skip


def tiny(out, **changes):
    return replace(scene_options.toyworld(), out=out, **{**TINY, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run without interruption, and its configuration."""
    config = tiny(tmp_path_factory.mktemp("scene") / "run")
    train_sds.main(config)
    return config


def test_a_run_writes_what_can_be_opened(finished):
    export = finished.out / "export"
    names = {"scene.glb", "scene.obj", "scene.mtl", "scene.png", "points.ply", "turntable.mp4", "turntable.gif",
             "depth.mp4", "normals.mp4", "contact.png", "report.json", MARKER}  # fmt: skip
    assert {path.name for path in export.iterdir()} == names
    mesh = trimesh.load(export / "scene.glb", force="mesh")
    assert len(mesh.faces) > 0
    report = json.loads((export / "report.json").read_text())
    assert report["facts"]["prompt"] == "a red mug"
    assert report["facts"]["rollbacks"] == 0
    assert (finished.out / "config.json").is_file()
    steps = sorted(path.name for path in (finished.out / "checkpoints").iterdir())
    assert steps == ["step-000000004", "step-000000006"]
    weights = load_file(finished.out / "scene.safetensors")
    assert not any("unet" in name or "vae" in name for name in weights)
    assert sum(value.numel() for value in weights.values()) == 4 * (10**3 + 20**3 + 40**3)
    events = EventAccumulator(str(finished.out / "logs")).Reload()
    curves = {"probe/residual/t_0.5", "probe/gradient/t_0.5", "scene/opacity", "probe/score_to_penalty"}
    assert curves <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("probe/residual")] == [3, 6]
    assert events.Tags()["images"]


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_weights(finished, tmp_path, capfd):
    """SIGKILL of a copy of this process after a checkpoint; the next says from where it goes on."""
    config = replace(finished, out=tmp_path / "cut")
    if (child := os.fork()) == 0:
        with suppress(BaseException):
            train_sds.main(config)
        os._exit(1)
    deadline = time.monotonic() + 240
    while not any(config.out.glob("checkpoints/step-00000000[2-9]")):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "it ended before it was killed"
    newest = max(int(path.name[5:]) for path in config.out.glob("checkpoints/step-*"))
    capfd.readouterr()
    train_sds.main(config)
    assert f"resumed from step {newest}" in capfd.readouterr().out
    one, other = (load_file(run.out / "scene.safetensors") for run in (finished, config))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def failing_method(monkeypatch, when):
    """Make the gradient nan where ``when(step, times it was asked at before)``; returns the steps asked at."""
    asked, build = [], scenes.build_method

    def build_failing(config, teacher):
        method = build(config, teacher)

        class Failing:
            def __init__(self, step):
                self.inner, self.step = method(step), step

            def gradient(self, x0, cond, *, generator):
                asked.append(self.step)
                gradient = self.inner.gradient(x0, cond, generator=generator)
                bad = when(self.step, asked.count(self.step) - 1)
                return ScoreGradient(gradient.value * float("nan") if bad else gradient.value, gradient.metrics)

        return Failing

    monkeypatch.setattr(train_sds, "build_method", build_failing)
    return asked


def test_a_nan_rolls_back_once_and_the_run_goes_on(monkeypatch, tmp_path, capfd):
    config = tiny(tmp_path / "run", probe_every=0)
    asked = failing_method(monkeypatch, lambda step, before: step == 3 and before == 0)
    train_sds.main(config)
    said = capfd.readouterr().err
    assert "not finite in step 4" in said
    assert "rolled back to step 2" in said
    assert asked == [0, 1, 2, 3, 2, 3, 4, 5]  # and for no pictures, which are not wanted
    report = json.loads((config.out / "export" / "report.json").read_text())
    assert report["facts"]["rollbacks"] == 1
    state = torch.load(config.out / "checkpoints" / "step-000000006" / "state.pt", weights_only=True)
    rate = state["phases"]["scene"]["optimizer"]["param_groups"][0]["lr"]
    assert rate == pytest.approx(config.learning_rate[1] / 2)
    events = EventAccumulator(str(config.out / "logs")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("scene/rollbacks")] == [
        (1, 0), (2, 0), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1)
    ]  # fmt: skip
    rates = [e.value for e in events.Scalars("scene/learning_rate")]
    assert rates[2] < 0.6 * rates[1]
    assert "images" not in events.Tags() or not events.Tags()["images"]


def test_a_scene_that_is_lost_again_and_again_stops_with_the_reason(monkeypatch, tmp_path):
    asked = failing_method(monkeypatch, lambda step, before: step == 3)
    with pytest.raises(FloatingPointError, match="not finite in step 4"):
        train_sds.main(tiny(tmp_path / "run", probe_every=0, max_rollbacks=2))
    assert asked.count(3) == 3


def test_an_empty_scene_is_an_alarm(monkeypatch, tmp_path, capfd):
    """It is found in the step that is about to be saved, whether or not the opacity is otherwise due."""
    monkeypatch.setattr(recovery, "EMPTY", 0.9)
    with pytest.raises(recovery.LostSceneError, match="the scene is empty in step 2"):
        train_sds.main(tiny(tmp_path / "run", probe_every=0, max_rollbacks=1))
    assert "rolled back to step 0" in capfd.readouterr().err
    # The bad state was never saved.
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000000000"]


def test_an_exploding_canvas_stops_the_run_and_names_the_step(monkeypatch, tmp_path):
    monkeypatch.setattr(recovery, "LARGEST_WEIGHT", 0.5)
    config = tiny(tmp_path / "run", canvas=True, overhead=0, probe_every=0, max_rollbacks=0)
    with pytest.raises(recovery.LostSceneError, match="exploded in step 2: its largest weight is"):
        train_sds.main(config)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {"method": "csd"}, {"method": "vsd"}, {"method": "ism"}, {"method": "sdi"},
    {"method": "x0", "backdrops": (), "shading": "dreamfusion", "orientation": (0.0, 1e-2)},
])  # fmt: skip
def test_other_losses_and_a_background_of_its_own_train(changes, tmp_path):
    config = tiny(tmp_path / "run", steps=2, save_every=1, probe_every=2, **changes)
    train_sds.main(config)
    files = {path.name for path in (config.out / "checkpoints" / "step-000000002").iterdir()}
    assert ("phi.safetensors" in files) == (config.method == "vsd")
    names = load_file(config.out / "scene.safetensors").keys()
    assert any(name.startswith("background.") for name in names) == (not config.backdrops)


def test_a_canvas_becomes_a_picture(tmp_path):
    config = tiny(tmp_path / "run", canvas=True, overhead=0, steps=2, probe_every=2)
    assert train_sds.main(config) == config.out / "canvas.png"
    assert (config.out / "canvas.png").is_file()
    assert load_file(config.out / "scene.safetensors")["pixels"].shape == (2, 4, 16, 16)


@pytest.mark.parametrize("method", ["ism", pytest.param("sdi", marks=pytest.mark.slow)])
def test_a_picture_learns_along_inverted_paths(method, tmp_path):
    config = tiny(tmp_path / "run", canvas=True, overhead=0, steps=2, probe_every=2, method=method)
    assert train_sds.main(config) == config.out / "canvas.png"


BAD = [
    ({"prompt": "  "}, "the prompt is missing"),
    ({"prompt": __file__}, "is a file; a scene takes words"),
    ({"size": 62}, "multiples of"),
    ({"teacher": "nowhere/at/all"}, "nowhere/at/all"),
    ({"backdrops": ("whitish",)}, "names of colours"),
    ({"t_low": (0.5, 0.5), "t_high": (0.4, 0.4)}, "--t-low must not exceed --t-high"),
    ({"t_high": (1.2, 0.5)}, "--t-high must lie in"),
    ({"anneal": (0.5, 0.2)}, "--anneal must rise"),
    ({"guidance": (-1.0, 1.0)}, "--guidance must be at least 0"),
    ({"learning_rate": (0.0, 0.1)}, "--learning-rate"),
    ({"render_size": (4, 8)}, "--render-size must be whole numbers"),
    ({"render_size": (8.5, 8)}, "--render-size must be whole numbers"),
    ({"overhead": 2}, "--overhead 2 must be below --batch-size 2"),
    ({"draws": 0}, "--draws"),
    ({"quarters": 0.5}, "--quarters below 1 need"),
    ({"distance": (3.0, 2.0)}, "distance must be a range"),
    ({"elevation": (0.0, 100.0)}, "elevation must lie in"),
    ({"half_size": 0.0}, "--half-size"),
    ({"blob": (10.0, 0.0)}, "--blob needs a radius"),
    ({"blob": (float("nan"), 0.5)}, "--blob must be finite"),
    ({"distance": (1.0, float("inf"))}, "--distance must be finite"),
    ({"widen": 50.0}, "--widen must lie in"),
    ({"method": "csd", "rescale": 0.5}, "--rescale 0.5 is not for --method csd"),
    ({"compile": True}, "--compile is for networks"),
    ({"entropy": (0.0, float("nan"))}, "--entropy"),
    ({"gradient_checkpointing": True}, "--gradient-checkpointing is for networks"),
    ({"optimizer": "adamw8bit"}, "adamw8bit is not for scenes"),
    ({"rescale": 2.0}, "rescale must lie in"),
    ({"interval": 1.0}, "--interval must lie in"),
    ({"inversion_stride": 0.0}, "--inversion-stride must lie in"),
    ({"inversion_guidance": float("inf")}, "--inversion-guidance must be finite"),
    ({"mesh_resolution": 1}, "resolution must be at least 2"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[next(iter(changes)) for changes, _ in BAD])
def test_bad_input_is_refused_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_sds.main(tiny(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_what_would_fail_in_the_end_is_found_before_the_training(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
        with pytest.raises(ValueError, match="ffmpeg"):
            train_sds.main(tiny(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(scene.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"scorefield\[nerf\]"):
            train_sds.main(tiny(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "run" / "export" / ".DS_Store").touch()
    with pytest.raises(ValueError, match=r"holds \.DS_Store"):
        train_sds.main(tiny(tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_preset_is_where_values_come_from_and_flags_override_it(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("sds.recipe.main", seen.append)
    cli.main(["sds", "prolificdreamer", "a corgi", "--steps", "9"])
    assert seen == [replace(scene_options.prolificdreamer(), prompt="a corgi", steps=9)]
    monkeypatch.undo()
    for words, said in ((["unknown", "a corgi"], "unknown"), ([], "error: the prompt is missing")):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["sds", *words])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    train_sds.main(tiny(tmp_path / "run", dry_run=True))
    said = capsys.readouterr().out
    assert '"prompt": "a red mug"' in said
    assert "teacher:" in said
    assert "scene:" in said
    assert not (tmp_path / "run").exists()


def test_text_encoders_are_free_before_the_first_step(monkeypatch, tmp_path):
    loaded, load = [], train_sds.frozen_teacher

    def remembering(config, device):
        teacher = load(config, device)
        loaded.append(weakref.ref(teacher.texts))
        return teacher

    def fit(*args, **options):
        gc.collect()
        raise StopIteration(loaded[0]())

    monkeypatch.setattr(train_sds, "frozen_teacher", remembering)
    monkeypatch.setattr(train_sds, "fit", fit)
    with pytest.raises(StopIteration) as stopped:
        train_sds.main(tiny(tmp_path / "run", probe_every=0))
    assert stopped.value.value is None


def test_two_processes_that_share_the_views_leave_the_picture_of_one_and_go_on_as_one(tmp_path, capsys):
    still = {"learning_rate": (0.05, 0.05), "guidance": (2.0, 2.0), "t_high": (0.95, 0.95), "entropy": (0.0, 0.0)}
    config = tiny(tmp_path / "one", canvas=True, accumulate=2, split_views=True, steps=4, probe_every=0, **still)
    train_sds.main(config)
    expected = load_file(config.out / "scene.safetensors")["pixels"]
    two = replace(config, out=tmp_path / "two")
    run_on_ranks(lambda accelerator: bool(train_sds.main(replace(two, steps=2))), tmp_path)
    shutil.rmtree(two.out / "logs")
    capsys.readouterr()
    train_sds.main(two)
    assert "process(es)" not in capsys.readouterr().out, "batches and noise are those of before"
    torch.testing.assert_close(load_file(two.out / "scene.safetensors")["pixels"], expected, rtol=0, atol=1e-4)


def test_views_that_cannot_be_shared_equally_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"--split-views shares --accumulate 3 .* Pass a multiple of 2"):
        scene_options.check(tiny(tmp_path / "run", accumulate=3, split_views=True))
    scene_options.check(tiny(tmp_path / "run", accumulate=4, split_views=True))


def test_a_plan_counts_shared_views_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for split, number in ((False, 48), (True, 24)):
        config = tiny(tmp_path / "run", accumulate=2, split_views=split)
        show_plan(config, {"scene": torch.nn.Linear(1, 1)}, {"scene": 6})
        assert f"{number} images on 2 process(es)" in capsys.readouterr().out
