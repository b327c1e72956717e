"""--init-from: a run starts from the weights of a finished one, which fit, and says so for good."""

import dataclasses
import json
import shutil

import pytest
import tiny_pipelines as tiny
import torch
from accelerate.state import AcceleratorState
from diffusers import ControlNetModel
from safetensors.torch import load_file
from test_controlnet_recipe import SIZE, write_samples

import controlnet.initial as control_initial
import controlnet.options as control_options
import controlnet.recipe as train_controlnet
import distill.options as distill_options
import distill.recipe as train_dmd
import scorefield.commands.teacher as train_teacher
from distill.export import LORA
from distill.student import Student, save_student
from scorefield.commands.options import TrainTeacher
from scorefield.models.lora import LoRA, adapter_weights, load_adapter_weights
from scorefield.models.networks import DiffusersNetwork
from scorefield.models.teacher import load_teacher
from scorefield.training import checkpoint

TINY = {"steps": 2, "batch_size": 8, "save_every": 2, "log_every": 1}
# Nothing moves: what a run started from is what it ends with.
STILL = {"student_lr": 1e-30, "fake_lr": 1e-30, "warmup_lr": 1e-30}
SHORT = {
    "student_every": 1, "pair_steps": 2, "num_pairs": 8, "fake_warmup": 0, "guard_images": 0,
    "skip_teacher_check": True, "regression_weight": 0.0, "gan_weight": 0.0, **STILL,
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def teacher_config(out, **changes):
    return TrainTeacher(out=out, **{**TINY, "width": 32, "depth": 1, **changes})


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A teacher, and a student of it that has other weights."""
    root = tmp_path_factory.mktemp("images")
    folder = train_teacher.main(teacher_config(root / "teacher"))
    teacher = load_teacher(str(folder))
    torch.manual_seed(1)
    for parameter in teacher.denoiser.network.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape)
    save_student(Student(teacher.denoiser, (3.5,)), root / "student", teacher.facts)
    return root


def weights(folder, name="model.safetensors"):
    return load_file(folder / name)


def close(a, b):
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def files_of(folder):
    return {path: path.is_dir() or path.stat().st_mtime_ns for path in folder.rglob("*")}


def distil(root, out, **changes):
    config = {**TINY, **SHORT, "teacher": str(root / "teacher" / "teacher"), "out": out, **changes}
    return train_dmd.main(dataclasses.replace(distill_options.auto(), **config))


def test_a_student_starts_from_another_one_without_a_warm_up(images, tmp_path, capsys):
    made = distil(images, tmp_path / "run", init_from=str(images / "student"))
    assert close(weights(made), weights(images / "student"))
    assert not close(weights(made), weights(images / "teacher" / "teacher"))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["warmup_steps"] == 0
    distil(images, tmp_path / "run", init_from=str(images / "student"), steps=3)
    assert "resumed from step 2" in capsys.readouterr().out


def test_a_run_that_began_otherwise_is_not_resumed(images, tmp_path):
    plain, from_student = tmp_path / "plain", tmp_path / "other"
    distil(images, plain, warmup_steps=0)
    distil(images, from_student, init_from=str(images / "student"))
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=r"belongs to another config .*init_from: None there, '"):
        distil(images, plain, init_from=str(images / "student"), warmup_steps=0)
    with pytest.raises(ValueError, match=r"belongs to another config .*init_from: '.*' there, None now"):
        distil(images, from_student, warmup_steps=0)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(("name", "said"), [
    ("teacher/teacher", "is no finished student"), ("nothing", "--init-from: .* is no folder here"),
    ("teacher", "is the folder of a run"), ("wide/teacher", "is another network than --teacher"),
    ("loud", "does not mean what --teacher means"), ("out/best", "lies in --out"),
    ("lora", "is a LoRA. Pass --lora"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(images, tmp_path, name, said):
    root = tmp_path / "root"
    shutil.copytree(images, root)
    if name == "wide/teacher":
        wide = load_teacher(str(train_teacher.main(teacher_config(root / "wide", width=48))))
        save_student(Student(wide.denoiser, (3.5,)), root / name, wide.facts)
    if name == "loud":
        teacher = load_teacher(str(root / "teacher" / "teacher"))
        other = dataclasses.replace(teacher.denoiser, kind="eps")
        save_student(Student(other, (3.5,)), root / name, teacher.facts)
    if name == "lora":
        (root / name).mkdir()
        (root / name / LORA).write_bytes(b"")
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=said):
        distil(root, root / "out", init_from=str(root / name))
    assert files_of(tmp_path) == before


def test_a_teacher_starts_from_another_one_and_keeps_its_preconditioning(images, tmp_path, capsys):
    first = images / "teacher" / "teacher"
    started = {"init_from": str(first), "learning_rate": 1e-30, "dropout": 0.5, "seed": 7}
    made = train_teacher.main(teacher_config(tmp_path / "run", **started))
    assert close(weights(made), weights(first))
    facts = [load_teacher(str(folder)).facts for folder in (first, made)]
    assert facts[0]["sigma_data"] == facts[1]["sigma_data"]
    with pytest.raises(ValueError, match=r"init_from: '.*' there, None now"):
        train_teacher.main(teacher_config(tmp_path / "run", **{**started, "init_from": ""}))
    for changes, said in (
        ({"width": 48}, "its options is"), ({"sigma_data": 0.9}, r"its sigma_data is .*; here it is 0\.9"),
        ({"init_from": str(images / "student")}, "is a student"),
        ({"init_from": "nothing"}, "not a denoiser's folder"),
        ({"init_from": str(tmp_path / "new" / "teacher")}, "lies in --out"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            train_teacher.main(teacher_config(tmp_path / "new", **{**started, **changes}))
        assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A pipeline and prompts."""
    root = tmp_path_factory.mktemp("texts")
    tiny.sd().save_pretrained(root / "sd")
    (root / "prompts.txt").write_text("a red mug\na blue chair\ncone\ntwo mugs")
    return root


def distil_texts(root, out, **changes):
    AcceleratorState._reset_state(reset_partial_state=True)
    own = {"preset": "text", "teacher": str(root / "sd"), "prompts": str(root / "prompts.txt"), "out": out}
    given = {"guidance": 3.0, "batch_size": 4, "warmup_steps": 0}
    return train_dmd.main(distill_options.Config(**{**own, **TINY, **SHORT, **given, **changes}))


UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.slow
def test_a_text_to_image_student_starts_from_a_pipeline_or_a_lora(texts, tmp_path):
    moving = {"student_lr": 1e-2, "fake_lr": 1e-3}
    first = distil_texts(texts, tmp_path / "first", **moving)
    assert not close(weights(first, UNET), weights(texts / "sd", UNET))
    made = distil_texts(texts, tmp_path / "made", init_from=str(first), seed=5)
    assert close(weights(made, UNET), weights(first, UNET))
    lora = {"lora": True, "lora_rank": 2, "lora_alpha": 1.0}
    small = distil_texts(texts, tmp_path / "small", **lora, **moving)
    again = distil_texts(texts, tmp_path / "again", **{**lora, "lora_alpha": 3.0}, init_from=str(small), seed=5)
    assert close(weights(again, LORA), weights(small, LORA)), "whatever the scale is"
    assert max(float(x.abs().max()) for name, x in weights(again, LORA).items() if "lora_B" in name) > 1e-4
    for changes, said in (
        ({"init_from": str(small)}, "is a LoRA. Pass --lora"), ({**lora, "init_from": str(first)}, "is no LoRA"),
        ({**lora, "lora_rank": 4, "init_from": str(small)}, "has the rank 2, --lora-rank 4"),
        ({"init_from": str(texts / "sd")}, "is no finished student"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            distil_texts(texts, tmp_path / "new", **changes)
        assert not (tmp_path / "new").exists()


def test_the_changes_of_a_twin_are_those_that_were_written():
    torch.manual_seed(0)
    network = DiffusersNetwork(tiny.text_unet()).requires_grad_(False)
    settings = {"rank": 2, "targets": ["to_q", "to_out.0"], "generator": torch.Generator().manual_seed(0)}
    one, other = (LoRA(network, scale=scale, **settings) for scale in (1.0, 0.25))
    for parameter in one.changes.values():
        parameter.data.normal_()
    load_adapter_weights(other, adapter_weights(one))
    assert close(adapter_weights(other), adapter_weights(one))
    written = adapter_weights(one)
    name, value = written.popitem()
    for wrong, said in (
        (written, "is missing"), ({**written, name: value, "up.to_q.lora_A.weight": value}, "not changed here"),
        ({**written, name: value[:1]}, "here it is"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            load_adapter_weights(other, wrong)


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    """A pipeline, samples with outlines, and an adapter that was trained for grey hints."""
    root = tmp_path_factory.mktemp("control")
    tiny.sd().save_pretrained(root / "model")
    write_samples(root / "data", 8)
    teach(root, root / "first", learning_rate=1e-2)
    return root


def teach(root, out, **changes):
    settings = {
        "teacher": str(root / "model"), "data": str(root / "data"), "size": SIZE, "steps": 2, "batch_size": 2,
        "eval_every": 0, "eval_samples": 2, "sampling_steps": 1, "save_every": 2, "learning_rate": 1e-30,
        "cache": root / "cache", "ema_decay": 0.5, "log_every": 1, "long_prompts": "cut",
    }  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    return train_controlnet.main(control_options.Config(out=out, **{**settings, **changes}))


ADAPTER = "diffusion_pytorch_model.safetensors"


def test_an_adapter_starts_from_another_one_uncalibrated(control, tmp_path, monkeypatch):
    """It was saved for hints of three channels, and takes grey ones again."""
    monkeypatch.setattr(train_controlnet, "calibrate", lambda *args: pytest.fail("calibrated"))
    first = control / "first" / "controlnet"
    made = teach(control, tmp_path / "run", init_from=str(first), seed=3)
    assert close(weights(made, ADAPTER), weights(first, ADAPTER))
    saved = checkpoint.described(tmp_path / "run" / "checkpoints")
    assert len(saved["init_from"]) == 16
    teach(control, tmp_path / "run", init_from=str(first), seed=3, dry_run=True)
    with pytest.raises(ValueError, match=r"init_from: '.*' there, None now"):
        teach(control, tmp_path / "run", seed=3, calibrate=False)


def test_adapters_that_do_not_fit_are_refused(control, tmp_path):
    wide = tiny.text_unet(block_out_channels=(16, 32))
    ControlNetModel.from_unet(wide, conditioning_embedding_out_channels=(16, 32, 96, 256)[:2]).save_pretrained(
        tmp_path / "wide"
    )
    unlocked = teach(control, tmp_path / "unlocked", unlocked=True, learning_rate=1e-3)
    for changes, said in (
        ({"init_from": str(tmp_path / "wide")}, "is an adapter of another base"),
        ({"init_from": str(unlocked)}, "was trained with a decoder of its own. Pass --unlocked"),
        ({"init_from": str(control / "model")}, "--init-from: "),
        ({"init_from": str(tmp_path / "new" / "controlnet")}, "lies in --out"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            teach(control, tmp_path / "new", **changes)
        assert not (tmp_path / "new").exists()


def test_an_unlocked_decoder_goes_on_too(control, tmp_path):
    first = teach(control, tmp_path / "first", unlocked=True, learning_rate=1e-3)
    made = teach(control, tmp_path / "second", unlocked=True, init_from=str(first))
    for name in (ADAPTER, f"unet/{ADAPTER}"):
        assert close(weights(made, name), weights(first, name))
    assert not close(weights(made, f"unet/{ADAPTER}"), weights(control / "model" / "unet", ADAPTER))


def test_hints_of_other_channels_are_refused(control):
    adapters = []
    for channels in (5, 3):
        teacher = load_teacher(str(control / "model"))
        adapters.append(train_controlnet.copy_encoder(teacher.denoiser, hint_channels=channels, factor=2))
    with pytest.raises(ValueError, match="is an adapter of hints of other channels"):
        control_initial._usable("x", adapters[0], adapters[1])
