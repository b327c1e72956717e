"""A finished run, read again without its teacher: its scene, and its export with other choices."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import trimesh
from safetensors.torch import load_file

import scorefield.cli as cli
import sds
import sds.options as scene_options
from scorefield.training.identity import resolved
from sds import runs
from sds.export_options import ExportRun, check_export
from sds.scene import save_scene


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run at its start, as a run leaves it: the initial blob is a ball of matter."""
    folder = tmp_path_factory.mktemp("run") / "ball"
    config = replace(
        scene_options.toyworld(), prompt="a red mug", out=folder, blob=(30.0, 0.5), mesh_resolution=16,
        turntable_size=16, num_samples=8, faces=200, texture=32,
    )  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(resolved(config)))
    save_scene(runs.build_scene(config), folder / "scene.safetensors")
    return folder


def test_a_run_is_a_scene(finished):
    scene = sds.load_run(finished)
    weights = load_file(finished / "scene.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in scene.state_dict().items())
    centre, corner = scene.field(torch.tensor([[0.0, 0, 0], [0.8, 0.8, 0.8]])).density.tolist()
    assert centre > 100 > 1 > corner
    assert not scene.training


def test_an_older_run_has_no_faces_and_another_command_is_no_scene(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    known = {name: value for name, value in config.items() if name not in ("faces", "texture")}
    (folder / "config.json").write_text(json.dumps({**known, "negative": ""}))  # as of the first version
    options = runs.read_options(folder)
    assert (options.faces, options.texture, options.mesh_resolution) == (5000, 512, 16)
    for content, message in (
        ("{", r"config\.json is not of a run of `scorefield sds`: "), ('{"steps": 3}', "it is of another command"),
        (json.dumps({**config, "field": "cloud"}), r"config\.json: field must be"),
        (json.dumps({**config, "secret": 1}), "secret is no option"),
        (json.dumps({**config, "canvas": True}), "is the run of a canvas"),
    ):  # fmt: skip
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            sds.load_run(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        sds.load_run(folder)
    with pytest.raises(AttributeError, match="load_walk"):
        sds.load_walk  # noqa: B018


def test_the_command_exports_it_again_as_told(finished, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    words = [
        "--level",
        "30",
        "--faces",
        "120",
        "--texture",
        "64",
        "--mesh-resolution",
        "20",
        "--turntable-size",
        "24",
    ]
    cli.main(["export", str(finished), *words, "--out", str(tmp_path / "a")])
    said = capsys.readouterr()
    assert "mesh versus renders: " in said.out
    assert "genus 0" in said.out
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["level"] == 30.0
    assert 80 < report["mesh"]["faces"] <= 120
    assert report["facts"]["prompt"] == "a red mug"
    (mesh,) = trimesh.load_scene(tmp_path / "a" / "scene.glb").geometry.values()
    assert mesh.visual.material.baseColorTexture.size == (64, 64)
    assert mesh.is_watertight or len(mesh.faces) == report["mesh"]["faces"]  # seams cut it open
    assert {path.name: path.read_bytes() for path in finished.iterdir() if path.name in before} == before


def test_without_a_word_it_is_as_the_run_had_it_and_lies_in_the_run(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    cli.main(["export", str(folder)])
    report = json.loads((folder / "export" / "report.json").read_text())
    assert report["mesh"]["faces"] <= 200
    assert len(report["levels_tried"]) > 9
    report["warnings"] = ["it is in 2 parts"]
    runs.tell(report, folder)
    assert "warning: it is in 2 parts\n" in capsys.readouterr().err


@pytest.mark.parametrize(("changes", "message"), [
    ({"run": "nowhere"}, r"nowhere is no finished scene: it holds no config\.json"),
    ({"level": -1.0}, "--level must be a positive density; got -1"), ({"level": float("nan")}, "--level"),
    ({"faces": 99}, "--faces must be 0, for all of them, or at least 100 triangles; got 99"),
    ({"texture": 8}, r"--texture must be 0, .* or lie in \[16, 8192\] texels; got 8"),
    ({"mesh_resolution": 1}, "--mesh-resolution must lie between 2 and 65,535; got 1"),
    ({"turntable_size": 0}, "--turntable-size must lie between 1"),
])  # fmt: skip
def test_what_cannot_be_is_refused_and_nothing_is_written(finished, tmp_path, changes, message, capsys):
    config = ExportRun(**{"run": finished, "out": tmp_path / "a", **changes})
    if isinstance(config.run, str):
        config = replace(config, run=tmp_path / config.run)
    with pytest.raises(ValueError, match=message):
        check_export(config)
    flags = [
        word for name, value in changes.items() if name != "run"
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", str(config.run), "--out", str(tmp_path / "a"), *flags])
    assert stopped.value.code == 2
    assert not list(tmp_path.iterdir())


def test_a_run_that_has_not_ended_is_refused(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "scene.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"holds no scene\.safetensors\. Expected --out of a `scorefield sds` that"
    ):
        check_export(ExportRun(run=folder))
