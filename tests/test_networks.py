"""Teachers from anywhere, and networks that are built again from what is saved beside them."""

import importlib
import json
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

import distill.data as student_data
import distill.recipe as train_dmd
import distill.roles as roles
import scorefield.commands.sample as sample
import scorefield.commands.teacher as train_teacher
from scorefield import Karras, NetworkDenoiser, VariancePreserving
from scorefield.commands.options import Sample, TrainTeacher
from scorefield.data.images import ImageSet
from scorefield.models import user_code
from scorefield.models.networks import UNet, build_network
from scorefield.models.teacher import Teacher, load_teacher
from scorefield.randomness import Rng

OWN = """
import torch
from scorefield.models.teacher import Teacher
from scorefield import NetworkDenoiser, RectifiedFlow
from scorefield.models.networks import ResidualMLP

def bare():
    return ResidualMLP((1, 8, 8), num_classes=0, width=16, depth=2)

def teacher():
    torch.manual_seed(0)
    network = ResidualMLP((1, 8, 8), num_classes=0, width=16, depth=2)
    torch.nn.init.normal_(network.leave[2].weight)
    return Teacher(NetworkDenoiser(network, RectifiedFlow(), "flow"), (1, 8, 8), 0, {})

def nothing():
    return 3

def other():
    return torch.nn.Linear(2, 2)
"""


SHORT = {
    "steps": 2, "batch_size": 8, "student_every": 1, "num_pairs": 10, "pair_steps": 2, "guard_images": 0,
    "fake_warmup": 1, "student_lr": 1e-4, "fake_lr": 1e-4, "warmup_lr": 1e-3, "skip_teacher_check": True,
}  # fmt: skip
"""A distillation of moments."""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "mine:teacher"


def small_unet(**changes):
    torch.manual_seed(0)
    settings = {
        "sample_size": 16, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4, "add_attention": False,
    }  # fmt: skip
    return UNet2DModel(**{**settings, **changes}).eval()


def test_a_diffusers_pipeline_folder_is_a_teacher(tmp_path):
    unet, scheduler = (
        small_unet(),
        DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
    )
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    assert (teacher.shape, teacher.num_classes, teacher.denoiser.kind) == ((1, 16, 16), 0, "v")
    table = VariancePreserving(scheduler.alphas_cumprod)
    t = torch.tensor([10.0, 700.0])
    assert torch.equal(teacher.denoiser.schedule.alpha(t), table.alpha(t))
    x_t = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        want = table.to_x0(unet(x_t, t).sample, x_t, t, "v")
        torch.testing.assert_close(teacher.denoiser(x_t, t, {}), want)
    again = build_network(json.loads(json.dumps(teacher.facts)))
    again.load_state_dict(unet.state_dict())


def test_a_function_of_the_user_is_a_teacher_and_its_student_is_found_again(own_module, tmp_path):
    np.savez(tmp_path / "data.npz", images=np.zeros((20, 1, 8, 8), np.float32))
    config = train_dmd.Config(
        **SHORT, teacher=own_module, data=str(tmp_path / "data.npz"), out=tmp_path / "run", warmup_steps=2,
    )  # fmt: skip
    folder = train_dmd.main(config)
    saved = load_file(folder / "model.safetensors")
    for network in ("mine:bare", "mine:teacher"):
        student = load_teacher(str(folder), network)
        assert student.times == (pytest.approx(3.5 / 4.5),)
        state = student.denoiser.network.state_dict()
        assert all(torch.equal(saved[name], value) for name, value in state.items())
    for network, message in (
        ("", "it names 'mine:teacher', and what a folder names is not run.*pass --network"),
        ("mine:nothing", "must return a network, .*got int"), ("mine:other", "do not fit Linear"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_teacher(str(folder), network)


def hostile(folder, name):
    """A teacher's folder that names code in the current folder, which leaves a mark when it is run."""
    config = TrainTeacher(out=folder / "run", steps=1, batch_size=8, width=8, depth=1)
    place = train_teacher.main(config) / "denoiser.json"
    description = json.loads(place.read_text())
    description["facts"] |= {"network": "function", "options": {"name": name}}
    place.write_text(json.dumps(description))
    return place.parent


def test_what_a_folder_names_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    marks = "open('ran', 'w')\ndef make():\n    pass\n"
    (tmp_path / "payload.py").write_text(marks)
    folder = hostile(tmp_path, "payload:make")
    (folder / "weights.py").write_text(marks)
    for tried in (
        lambda: load_teacher(str(folder)),
        lambda: sample.main(Sample(teacher=str(folder), out=tmp_path / "samples")),
        lambda: train_dmd.main(train_dmd.Config(teacher=str(folder), out=tmp_path / "out", dry_run=True)),
        lambda: build_network(json.loads((folder / "denoiser.json").read_text())["facts"]),
    ):
        with pytest.raises(ValueError, match="'payload:make'"):
            tried()
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="must return a network"):
        load_teacher(str(folder), "payload:make")  # typed: it is run
    assert (tmp_path / "ran").exists()
    assert not any("weights" in name for name in sys.modules if name.startswith(str(folder)))


def test_a_name_in_a_folder_cannot_forge_lines(tmp_path):
    with pytest.raises(ValueError, match=r"it names '\\x1b\[2J\\nok: a+'") as caught:
        load_teacher(str(hostile(tmp_path, "\x1b[2J\nok: " + "a" * 10_000)))
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_network_is_refused_where_it_has_no_use(own_module, tmp_path):
    config = TrainTeacher(out=tmp_path / "run", steps=1, batch_size=8, width=8, depth=1)
    for name in (own_module, str(train_teacher.main(config)), str(diffusers_folder(tmp_path / "plain"))):
        with pytest.raises(ValueError, match="--network is for students of a module:function"):
            load_teacher(name, "mine:bare")


def test_a_users_module_neither_loses_to_another_nor_replaces_it(tmp_path, monkeypatch):
    """A module of that name is loaded already; the user's imports its neighbour."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    ours = sys.modules["sample"] = types.ModuleType("sample")
    (tmp_path / "neighbour.py").write_text("value = 7")
    (tmp_path / "sample.py").write_text("import neighbour\ndef mine():\n    return neighbour.value\n")
    assert user_code.call("sample:mine") == 7
    assert sys.modules["sample"] is ours
    assert importlib.import_module("sample") is ours
    assert user_code.user_function("json:dumps") is json.dumps
    with pytest.raises(ValueError, match="expected module:function"):
        user_code.call("../sample:mine")


EDM = """
import torch
from scorefield.models.teacher import Teacher
from scorefield import Karras, NetworkDenoiser, karras_denoiser, rescaled_data
from scorefield.models.networks import ResidualMLP

def plain():
    return karras_denoiser(ResidualMLP((1, 8, 8), num_classes=0, width=16, depth=2), Karras(), 0.3)

def wrapped():
    return Teacher(plain(), (1, 8, 8), 0)

def half():
    return Teacher(rescaled_data(plain(), 0.5, 0.5), (1, 8, 8), 0)

def told():
    return Teacher(NetworkDenoiser(plain().network.network, Karras(), "x0"), (1, 8, 8), 0, {"sigma_data": 0.7})

def wrong():
    return Teacher(plain(), (1, 8, 8), 0, {"sigma_data": float("nan")})
"""


@pytest.mark.parametrize(("name", "sigma_data"), [("wrapped", 0.3), ("half", 0.6), ("told", 0.7)])
def test_sigma_data_of_a_users_teacher_weights_the_fake_score(tmp_path, monkeypatch, name, sigma_data):
    """In the units of [-1, 1]: data shown at half their size have twice the spread."""
    (tmp_path / "edm.py").write_text(EDM)
    monkeypatch.chdir(tmp_path)
    teacher = load_teacher(f"edm:{name}")
    config = train_dmd.Config(gan_weight=0.0)
    student, fake = roles.build_roles(config, teacher)
    method = roles.build_method(config, teacher, student, fake)
    t = torch.tensor([0.5, 2.0])
    wanted = (t**2 + sigma_data**2) / (t * sigma_data) ** 2
    torch.testing.assert_close(method.fake_weight(t, teacher.denoiser.schedule).float(), wanted)
    x_t = torch.randn(2, 1, 8, 8)
    assert torch.equal(method.fake(x_t, t, {}), teacher.denoiser(x_t, t, {}))
    assert not {id(p) for p in fake.parameters()} & {id(p) for p in teacher.denoiser.network.parameters()}
    with pytest.raises(ValueError, match="sigma_data must be a number above 0; got nan"):
        load_teacher("edm:wrong")


def test_labels_are_ignored_by_a_teacher_without_classes(own_module, tmp_path):
    images, labels = np.zeros((20, 1, 8, 8), np.float32), np.arange(20) % 3
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    common = {**SHORT, "warmup_steps": 0, "eval_every": 2, "eval_images": 4}
    folder = train_dmd.main(train_dmd.Config(
        **common, teacher=own_module, data=str(tmp_path / "data.npz"), out=tmp_path / "run",
    ))  # fmt: skip
    assert load_teacher(str(folder), "mine:bare").num_classes == 0


def test_no_data_are_asked_for_where_nothing_uses_them(own_module, tmp_path, monkeypatch):
    monkeypatch.setattr(student_data, "load_images", lambda options: pytest.fail("loaded images"))
    common = {**SHORT, "teacher": own_module, "warmup_steps": 0, "out": tmp_path / "run"}
    folder = train_dmd.main(train_dmd.Config(**common, eval_every=2, eval_images=4))
    assert load_teacher(str(folder), "mine:bare").times == (pytest.approx(3.5 / 4.5),)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["gan_weight"] == 0.0
    with pytest.raises(ValueError, match=r"the GAN term needs images.*--data names none.*--gan-weight 0"):
        train_dmd.main(train_dmd.Config(**common, gan_weight=0.01, dry_run=True))
    with pytest.raises(ValueError, match="the GAN term and --features need images"):
        train_dmd.main(train_dmd.Config(**common, gan_weight=0.01, features=tmp_path, dry_run=True))
    with pytest.raises(ValueError, match=r"^--features needs? images"):
        train_dmd.main(train_dmd.Config(**common, features=tmp_path, dry_run=True))


def test_classes_are_drawn_alike_where_there_are_no_images():
    facts = {"network": "mlp", "shape": [1, 8, 8], "num_classes": 3, "options": {"width": 8, "depth": 1}}
    teacher = Teacher(NetworkDenoiser(build_network(facts), Karras(), "x0"), (1, 8, 8), 3, facts)
    config = train_dmd.Config(batch_size=3000, gan_weight=0.0)
    batch = student_data.student_batches(config, teacher, None, torch.device("cpu"))(Rng(0, 0))
    counts = torch.bincount(batch["cond"]["class_labels"], minlength=3)
    assert len(counts) == 3
    assert counts.min() > 900
    assert (batch["size"], "real" in batch) == (3000, False)
    labelled = ImageSet(torch.zeros(4, 1, 8, 8), torch.arange(4), ("a", "b", "c", "d"), 8)
    with pytest.raises(ValueError, match="of 3 classes; --data holds"):
        student_data.check_data(labelled, teacher)


@pytest.mark.parametrize(("name", "message"), [
    ("mine:absent", "no such function"), ("absent:teacher", "no such function"), ("mine:nothing", "got int"),
    ("absent", "is no folder here"), ("mine:", "expected module:function"), ("mine:torch", "a module"),
])  # fmt: skip
def test_what_is_no_teacher_is_refused(own_module, name, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(name)


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("patch", [1, 2])
def test_a_unet_starts_at_zero_and_learns_its_condition(num_classes, patch):
    torch.manual_seed(0)
    unet = UNet((1, 16, 16), num_classes, channels=(8, 16), patch=patch)
    labels = torch.tensor([0, num_classes]) if num_classes else None
    x_t, t = torch.randn(2, 1, 16, 16), torch.tensor([-0.5, 0.7])
    assert torch.equal(unet(x_t, t, labels), torch.zeros_like(x_t))
    unet(x_t, t, labels).sub(1).square().mean().backward()
    assert unet.unet.conv_out.weight.grad.abs().max() > 0
    torch.nn.init.normal_(unet.unet.conv_out.weight)
    assert not torch.allclose(unet(x_t, t, labels), unet(x_t, t.flip(0), labels))


def test_sides_that_do_not_halve_are_refused():
    with pytest.raises(ValueError, match="divisible by 4; got 10 x 10"):
        UNet((1, 10, 10), channels=(8, 16))


@pytest.fixture(params=["no", "bf16"])
def precision(request):
    AcceleratorState._reset_state(True)  # a process knows one
    yield request.param
    AcceleratorState._reset_state(True)


def test_a_unet_teacher_is_trained_distilled_and_loaded(tmp_path, precision):
    data = tmp_path / "data.npz"
    np.savez(data, images=np.arange(7680, dtype=np.uint8).reshape(30, 1, 16, 16), labels=np.arange(30) % 3)
    common = {"data": str(data), "steps": 2, "batch_size": 8, "precision": precision}
    teacher = train_teacher.main(
        TrainTeacher(**common, out=tmp_path / "teacher", network="unet", unet_channels=(8, 16))
    )
    loaded = load_teacher(str(teacher))
    assert roles.probe(loaded, None) == ("network.unet.mid_block", 16, 4)
    assert loaded.facts["sigma_data"] > 0
    student = train_dmd.main(train_dmd.Config(
        **{**SHORT, **common, "guard_images": 64}, out=tmp_path / "student", teacher=str(teacher), warmup_steps=1,
        gradient_checkpointing=precision == "no",
    ))  # fmt: skip
    assert load_teacher(str(student)).times == pytest.approx((3.5,))


def test_networks_that_cannot_recompute_say_so(tmp_path):
    with pytest.raises(ValueError, match="--gradient-checkpointing: a KarrasPreconditioning cannot"):
        train_teacher.main(TrainTeacher(out=tmp_path / "run", steps=2, gradient_checkpointing=True))


def diffusers_folder(folder, **changes):
    settings = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "layers_per_block": 1, **changes,
    }  # fmt: skip
    UNet2DModel(**settings).save_pretrained(folder / "unet")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    return folder


def test_guidance_needs_a_class_that_means_none(tmp_path):
    """Nothing in a diffusers folder says that its last class is one: guiding by it would pass unseen."""
    labelled = load_teacher(str(diffusers_folder(tmp_path / "labelled", num_class_embeds=10)))
    assert labelled.num_classes == 10
    assert labelled.guided(1.0) is labelled.denoiser
    for teacher in (labelled, load_teacher(str(diffusers_folder(tmp_path / "plain")))):
        with pytest.raises(ValueError, match=r"--guidance must be 1 here.*not trained without labels; got 2"):
            teacher.guided(2.0)
    with pytest.raises(ValueError, match="'timestep'; expected class numbers"):
        load_teacher(str(diffusers_folder(tmp_path / "odd", class_embed_type="timestep")))


@pytest.mark.parametrize(("dropout", "guidable"), [(0.1, True), (0.0, False)])
def test_a_teacher_that_never_went_without_labels_is_not_guided(tmp_path, dropout, guidable):
    config = TrainTeacher(out=tmp_path, steps=1, batch_size=8, width=8, depth=1, label_dropout=dropout)
    teacher = load_teacher(str(train_teacher.main(config)))
    assert teacher.null_class is guidable
    if guidable:
        null, labels = torch.full((3,), 10), torch.arange(3)
        x_t, t = torch.randn(3, 1, 8, 8), torch.full((3,), 2.0)
        asked, without = (teacher.denoiser(x_t, t, teacher.cond(which)) for which in (labels, null))
        guided = teacher.guided(3.0)(x_t, t, teacher.cond(labels))
        torch.testing.assert_close(guided, without + 3 * (asked - without))
    else:
        with pytest.raises(ValueError, match="--guidance must be 1 here"):
            teacher.guided(3.0)


def test_the_folder_of_a_run_is_told_from_its_result(tmp_path):
    train_teacher.main(TrainTeacher(out=tmp_path, steps=1, batch_size=8, width=8, depth=1))
    with pytest.raises(ValueError, match=r"is the folder of a run; its result is .*teacher\. Pass that"):
        load_teacher(str(tmp_path))


def test_a_teacher_is_more_than_its_weights(tmp_path):
    """A resumed run must not meet another schedule, kind, or null class under the same weights."""
    config = TrainTeacher(out=tmp_path, steps=1, batch_size=8, width=8, depth=1)
    folder = train_teacher.main(config)
    teacher = load_teacher(str(folder))
    assert load_teacher(str(folder)).identity() == teacher.identity()
    others = [
        replace(teacher, denoiser=replace(teacher.denoiser, schedule=Karras(0.02, 5.0))),
        replace(teacher, denoiser=replace(teacher.denoiser, kind="v")),
        replace(teacher, denoiser=replace(teacher.denoiser, time_scale=0.5)),
        replace(teacher, null_class=False),
    ]
    assert len({other.identity() for other in [teacher, *others]}) == 5
    teacher.denoiser.network.network.enter.bias.data[0] += 1
    assert teacher.identity() != load_teacher(str(folder)).identity()
