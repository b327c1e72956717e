"""Many prompts in one process, and a scene that starts from another run's."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import scorefield.cli as cli
import sds.options as scene_options
import sds.recipe as train_sds
from scorefield.training.identity import resolved
from scorefield.training.lock import FolderLock
from sds import runs
from sds.queue import is_finished, runs_of, slug
from sds.scene import save_scene

PICTURES = replace(
    scene_options.toyworld(), canvas=True, overhead=0, quarters=1.0, batch_size=1, draws=1, steps=2,
    probe_every=0, save_every=1, log_every=1,
)  # fmt: skip


def queue(tmp_path, *lines, **changes):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(lines) + "\n")
    return replace(PICTURES, prompts=str(file), out=tmp_path / "out", **changes)


# What there is to do.


def test_each_prompt_has_a_folder_of_its_own(tmp_path):
    config = queue(tmp_path, "a red mug", "", "a blue cube", seed=3)
    found = runs_of(config)
    assert [(one.prompt, one.out.name, one.prompts) for one in found] == [
        ("a red mug", "a-red-mug-3", ""), ("a blue cube", "a-blue-cube-3", ""),
    ]  # fmt: skip
    assert {one.out.parent for one in found} == {tmp_path / "out"}
    single = replace(PICTURES, prompt="a red mug")
    assert runs_of(single) == [single]


def test_a_table_has_its_prompts_in_a_column(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red mug"}\n{"prompt": "a cyan torus"}\n')
    found = runs_of(replace(PICTURES, prompts=str(tmp_path / "p.jsonl"), out=tmp_path / "out"))
    assert [one.prompt for one in found] == ["a red mug", "a cyan torus"]


def test_two_prompts_never_share_a_folder():
    prompts = ("a red mug", "A red mug", "a red, mug", "a  red mug", "\u7ea2", "\u7eff", 70 * "a", 80 * "a")
    names = [slug(prompt) for prompt in prompts]
    assert len({slug(prompt) for prompt in ("a red mug", "a-red mug", "a-red-mug")}) == 3
    assert len(set(names)) == len(names)
    assert names[0] == "a-red-mug"
    assert all(name and len(name) <= 67 and not name.startswith("-") for name in names)
    assert all(character in "abcdefghijklmnopqrstuvwxyz0123456789-" for name in names for character in name)


@pytest.mark.parametrize(("lines", "changes", "message"), [
    (("a red mug", "a red mug"), {}, r"holds 'a red mug' twice, and both runs would be a-red-mug-0"),
    (("a red mug",), {"prompt": "a cube"}, "a run has one prompt, and --prompts .* many; got 'a cube'"),
    (("",), {}, "--prompts .*prompts.txt"), (("a " + 40 * "red ",), {}, "longer than the text encoders read"),
])  # fmt: skip
def test_bad_queues_are_refused_before_anything_is_written(lines, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_sds.main(queue(tmp_path, *lines, **changes))
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"--prompts .*none\.txt"):
        train_sds.main(replace(PICTURES, prompts=str(tmp_path / "none.txt"), out=tmp_path / "out"))


# Doing it.


def test_a_failed_prompt_does_not_lose_the_others_and_is_tried_again(tmp_path, monkeypatch, capsys):
    config = queue(tmp_path, "a red mug", "a blue cube", "a green cone")
    loaded, load, learn = [], train_sds.frozen_teacher, train_sds.learn

    def learn_or_fail(config, *args, **options):
        if "cube" in config.prompt:
            raise FloatingPointError("the scene is empty in step 2")
        return learn(config, *args, **options)

    monkeypatch.setattr(train_sds, "frozen_teacher", lambda *args: loaded.append(1) or load(*args))
    monkeypatch.setattr(train_sds, "learn", learn_or_fail)
    words = ["sds", "--config", str(tmp_path / "config.json")]
    (tmp_path / "config.json").write_text(json.dumps(resolved(config)))
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 1
    said = capsys.readouterr()
    assert "error: 1 of 3 prompts failed: a-blue-cube-0." in said.err
    assert "a-blue-cube-0: the scene is empty in step 2" in said.err
    assert "prompt 3 of 3: a green cone" in said.out
    assert loaded == [1], "all runs share the teacher"
    mug, cone = (config.out / name for name in ("a-red-mug-0", "a-green-cone-0"))
    assert (mug / "canvas.png").is_file()
    assert (cone / "report.html").is_file()
    assert not list(config.out.rglob(".lock"))
    written = (mug / "canvas.png").stat().st_mtime_ns
    monkeypatch.setattr(train_sds, "learn", learn)
    cli.main(words)
    assert (config.out / "a-blue-cube-0" / "canvas.png").is_file()
    assert (mug / "canvas.png").stat().st_mtime_ns == written, "it was finished"
    # One prompt alone is the same run.
    one = replace(PICTURES, prompt="a green cone", out=tmp_path / "alone")
    train_sds.main(one)
    assert (cone / "scene.safetensors").read_bytes() == (one.out / "scene.safetensors").read_bytes()
    train_sds.main(replace(one, out=cone))
    assert is_finished(replace(one, out=cone))
    assert not is_finished(replace(one, out=cone, log_every=2))
    assert not is_finished(replace(one, out=tmp_path / "nowhere"))


def test_a_folder_that_another_run_holds_costs_one_prompt(tmp_path, capsys):
    config = queue(tmp_path, "a red mug", "a blue cube")
    lock = FolderLock(config.out / "a-red-mug-0")
    lock.acquire()
    try:
        with pytest.raises(ValueError, match="1 of 2 prompts failed: a-red-mug-0"):
            train_sds.main(config)
    finally:
        lock.release()
    assert "is in use by another run" in capsys.readouterr().err
    assert (config.out / "a-blue-cube-0" / "canvas.png").is_file()


def test_a_dry_run_lists_the_runs(tmp_path, capsys):
    train_sds.main(queue(tmp_path, "a red mug", "a blue cube", dry_run=True))
    said = capsys.readouterr().out
    assert "2 prompts, each so many steps:" in said
    assert "a-blue-cube-0" in said
    assert not (tmp_path / "out").exists()


# A start from another scene.


@pytest.fixture(scope="module")
def ball(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "ball"
    config = replace(scene_options.toyworld(), prompt="a red sphere", out=folder)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(resolved(config)))
    scene = runs.build_scene(config)
    with torch.no_grad():
        for parameter in scene.parameters():
            parameter += 0.25
    save_scene(scene, folder / "scene.safetensors")
    return folder


def test_a_run_starts_from_the_scene_of_another(ball):
    config = replace(scene_options.toyworld(), prompt="a red mug", teacher="another", init_from=str(ball))
    weights = load_file(ball / "scene.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in runs.first_scene(config).state_dict().items())
    plain = runs.first_scene(replace(config, init_from=""))
    assert not any(torch.equal(value, weights[name]) for name, value in plain.state_dict().items())
    assert runs.fingerprint_of_scene(config)
    assert runs.fingerprint_of_scene(replace(config, init_from="")) is None


@pytest.mark.parametrize(("changes", "message"), [
    ({"half_size": 1.0}, r"has --half-size 0\.9, and this run 1\.0\. Pass --half-size 0\.9"),
    ({"blob": (10.0, 0.5)}, r"has --blob 3\.0 0\.5, and this run 10\.0 0\.5"),
    ({"field": "hash"}, "has --field grid, and this run hash"),
    ({"backdrops": ()}, "was trained with --backdrops, and this run is otherwise"),
    ({"init_from": "/nowhere"}, "/nowhere is no run of `scorefield sds`"),
    ({"canvas": True, "overhead": 0}, "is for scenes; --canvas starts from noise"),
])  # fmt: skip
def test_a_scene_of_another_kind_is_refused_before_the_teacher_is_loaded(changes, message, ball, tmp_path):
    options = {"prompt": "a red mug", "teacher": "nowhere/at/all", "init_from": str(ball), "out": tmp_path / "run"}
    with pytest.raises(ValueError, match=message):
        train_sds.main(replace(scene_options.toyworld(), **{**options, **changes}))
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_begun_from_a_folder_in_its_out(ball):
    config = replace(scene_options.toyworld(), prompt="a red mug", init_from=str(ball), out=ball.parent)
    with pytest.raises(ValueError, match="lies in --out"):
        train_sds.main(config)
