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
from folders import edit
from refusals import refused
from safetensors.torch import load_file

import distill.data as student_data
import distill.parts as parts
import distill.recipe as train_dmd
import scorefield.commands.sample as sample
import scorefield.commands.teacher as train_teacher
from scorefield import Karras, NetworkDenoiser, VariancePreserving
from scorefield.commands.options import Sample, TrainTeacher
from scorefield.data.images import ImageSet
from scorefield.models import user_code
from scorefield.models.networks import build_network
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


def diffusers_folder(folder, scheduler=None, **changes):
    settings = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "layers_per_block": 1, "add_attention": False, **changes,
    }  # fmt: skip
    torch.manual_seed(0)
    unet, scheduler = UNet2DModel(**settings).eval(), scheduler or DDPMScheduler()
    DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return folder, unet


def brief_teacher(folder, **changes):
    """A teacher of one step."""
    return train_teacher.main(TrainTeacher(out=folder, steps=1, batch_size=8, width=8, depth=1, **changes))


def test_a_diffusers_pipeline_folder_is_a_teacher(tmp_path):
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    folder, unet = diffusers_folder(tmp_path, scheduler, sample_size=16)
    teacher = load_teacher(str(folder))
    assert (teacher.shape, teacher.num_classes, teacher.denoiser.kind) == ((1, 16, 16), 0, "v")
    table, t, x_t = (
        VariancePreserving(scheduler.alphas_cumprod),
        torch.tensor([10.0, 700.0]),
        torch.randn(2, 1, 16, 16),
    )
    assert torch.equal(teacher.denoiser.schedule.alpha(t), table.alpha(t))
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
        with refused(message):
            load_teacher(str(folder), network)


@pytest.mark.parametrize(("name", "said"), [
    ("sys:exit", "sys:exit ends the program"), ("leaves:make", "leaves:make: its module ends the program"),
    ("json:loads", "json:loads must be a function that is called without arguments"), (".x:f", "expected"),
    ("os:getcwd", "os:getcwd must return a Teacher"), ("mine:missing", "no such function"),
])  # fmt: skip
def test_a_function_that_makes_no_teacher_is_refused(own_module, tmp_path, name, said):
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)")
    with refused(said):
        load_teacher(name)


def hostile(folder, name):
    """A teacher's folder that names code in the current folder, which leaves a mark when it is run."""
    place = brief_teacher(folder / "run") / "denoiser.json"
    facts = json.loads(place.read_text())["facts"]
    edit(place, facts={**facts, "network": "function", "options": {"name": name}})
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
        with refused("'payload:make'"):
            tried()
    assert not (tmp_path / "ran").exists()
    with refused("must return a network"):
        load_teacher(str(folder), "payload:make")  # typed: it is run
    assert (tmp_path / "ran").exists()
    assert not any("weights" in name for name in sys.modules if name.startswith(str(folder)))


def test_a_name_in_a_folder_cannot_forge_lines(tmp_path):
    with refused(r"it names '\\x1b\[2J\\nok: a+'") as caught:
        load_teacher(str(hostile(tmp_path, "\x1b[2J\nok: " + "a" * 10_000)))
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_network_is_refused_where_it_has_no_use(own_module, tmp_path):
    plain, _ = diffusers_folder(tmp_path / "plain")
    for name in (own_module, str(brief_teacher(tmp_path / "run")), str(plain)):
        with refused("--network is for students of a module:function"):
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
    with refused("expected module:function"):
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
    student, fake = parts.build_networks(config, teacher)
    method = parts.build_method(config, teacher, student, fake)
    t = torch.tensor([0.5, 2.0])
    wanted = (t**2 + sigma_data**2) / (t * sigma_data) ** 2
    torch.testing.assert_close(method.fake_weight(t, teacher.denoiser.schedule).float(), wanted)
    x_t = torch.randn(2, 1, 8, 8)
    assert torch.equal(method.fake(x_t, t, {}), teacher.denoiser(x_t, t, {}))
    assert not {id(p) for p in fake.parameters()} & {id(p) for p in teacher.denoiser.network.parameters()}
    with refused("sigma_data must be a number above 0; got nan"):
        load_teacher("edm:wrong")


def test_labels_are_ignored_by_a_teacher_without_classes(own_module, tmp_path):
    np.savez(tmp_path / "data.npz", images=np.zeros((20, 1, 8, 8), np.float32), labels=np.arange(20) % 3)
    common = {**SHORT, "warmup_steps": 0, "eval_every": 2, "eval_images": 4, "data": str(tmp_path / "data.npz")}
    folder = train_dmd.main(train_dmd.Config(**common, teacher=own_module, out=tmp_path / "run"))
    assert load_teacher(str(folder), "mine:bare").num_classes == 0


def test_no_data_are_asked_for_where_nothing_uses_them(own_module, tmp_path, monkeypatch):
    monkeypatch.setattr(student_data, "load_images", lambda options: pytest.fail("loaded images"))
    common = {**SHORT, "teacher": own_module, "warmup_steps": 0, "out": tmp_path / "run"}
    folder = train_dmd.main(train_dmd.Config(**common, eval_every=2, eval_images=4))
    assert load_teacher(str(folder), "mine:bare").times == (pytest.approx(3.5 / 4.5),)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["gan_weight"] == 0.0
    with refused(r"the GAN term needs images.*--data names none.*--gan-weight 0"):
        train_dmd.main(train_dmd.Config(**common, gan_weight=0.01, dry_run=True))
    with refused("the GAN term and --features need images"):
        train_dmd.main(train_dmd.Config(**common, gan_weight=0.01, features=tmp_path, dry_run=True))
    with refused(r"^--features needs? images"):
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
    with refused("of 3 classes; --data holds"):
        student_data.check_data(labelled, teacher)


@pytest.mark.parametrize(("name", "message"), [
    ("mine:absent", "no such function"), ("absent:teacher", "no such function"), ("mine:nothing", "got int"),
    ("absent", "is no folder here"), ("mine:", "expected module:function"), ("mine:torch", "a module"),
])  # fmt: skip
def test_what_is_no_teacher_is_refused(own_module, name, message):
    with refused(message):
        load_teacher(name)


@pytest.fixture(params=["no", pytest.param("bf16", marks=pytest.mark.slow)])
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
    assert parts.probe(loaded, None) == ("network.unet.mid_block", 16, 4)
    assert loaded.facts["sigma_data"] > 0
    student = train_dmd.main(train_dmd.Config(
        **{**SHORT, **common, "guard_images": 64}, out=tmp_path / "student", teacher=str(teacher), warmup_steps=1,
        gradient_checkpointing=precision == "no",
    ))  # fmt: skip
    assert load_teacher(str(student)).times == pytest.approx((3.5,))


def test_networks_that_cannot_recompute_say_so(tmp_path):
    with refused("--gradient-checkpointing: a KarrasPreconditioning cannot"):
        train_teacher.main(TrainTeacher(out=tmp_path / "run", steps=2, gradient_checkpointing=True))


def test_guidance_needs_a_class_that_means_none(tmp_path):
    """Nothing in a diffusers folder says that its last class is one: guiding by it would pass unseen."""
    labelled = load_teacher(str(diffusers_folder(tmp_path / "labelled", num_class_embeds=10)[0]))
    assert labelled.num_classes == 10
    assert labelled.guided(1.0) is labelled.denoiser
    for teacher in (labelled, load_teacher(str(diffusers_folder(tmp_path / "plain")[0]))):
        with refused(r"--guidance must be 1 here.*not trained without labels; got 2"):
            teacher.guided(2.0)


@pytest.mark.parametrize(("dropout", "guidable"), [(0.1, True), (0.0, False)])
def test_a_teacher_that_never_went_without_labels_is_not_guided(tmp_path, dropout, guidable):
    teacher = load_teacher(str(brief_teacher(tmp_path, label_dropout=dropout)))
    assert teacher.null_class is guidable
    if guidable:
        null, labels = torch.full((3,), 10), torch.arange(3)
        x_t, t = torch.randn(3, 1, 8, 8), torch.full((3,), 2.0)
        asked, without = (teacher.denoiser(x_t, t, teacher.cond(which)) for which in (labels, null))
        guided = teacher.guided(3.0)(x_t, t, teacher.cond(labels))
        torch.testing.assert_close(guided, without + 3 * (asked - without))
    else:
        with refused("--guidance must be 1 here"):
            teacher.guided(3.0)


def test_a_teacher_is_more_than_its_weights(tmp_path):
    """A resumed run must not meet another schedule, kind, or null class under the same weights."""
    folder = brief_teacher(tmp_path)
    with refused(r"is the folder of a run; its result is .*teacher\. Pass that"):
        load_teacher(str(tmp_path))
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
