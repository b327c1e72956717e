"""Teachers from anywhere, and networks that are built again from what is saved beside them."""

import json

import numpy as np
import pytest
import torch
import train_dmd
import train_teacher
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from networks import UNet, build_network, load_teacher, probe_bottleneck
from safetensors.torch import load_file

from score import VariancePreserving

OWN = """
import torch
from networks import Teacher
from score import NetworkDenoiser, RectifiedFlow
from score.network import ResidualMLP

def teacher():
    torch.manual_seed(0)
    network = ResidualMLP((1, 8, 8), num_classes=0, width=16, depth=2)
    torch.nn.init.normal_(network.leave[2].weight)
    return Teacher(NetworkDenoiser(network, RectifiedFlow(), "flow"), (1, 8, 8), 0, {})

def nothing():
    return 3
"""


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


def test_diffusers_folders_that_cannot_teach_are_refused(tmp_path):
    small_unet().save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match=r"no scheduler/scheduler_config\.json"):
        load_teacher(str(tmp_path / "alone"))
    DDPMPipeline(small_unet(out_channels=2), DDPMScheduler()).save_pretrained(tmp_path / "variance")
    with pytest.raises(ValueError, match="predicts 2 channels of 1"):
        load_teacher(str(tmp_path / "variance"))
    small_unet().save_pretrained(tmp_path / "pickled", safe_serialization=False)
    DDPMScheduler().save_pretrained(tmp_path / "pickled")
    with pytest.raises(ValueError, match="safetensors"):
        load_teacher(str(tmp_path / "pickled"))


def test_a_function_of_the_user_is_a_teacher_and_its_student_is_found_again(own_module, tmp_path):
    np.savez(tmp_path / "data.npz", images=np.zeros((20, 1, 8, 8), np.float32))
    config = train_dmd.Config(
        teacher=own_module, data=str(tmp_path / "data.npz"), out=tmp_path / "run", steps=2, batch_size=8,
        warmup_steps=2, num_pairs=10,
    )  # fmt: skip
    folder = train_dmd.main(config)
    student = load_teacher(str(folder))
    assert student.times == (1.0,)
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in student.denoiser.network.state_dict().items())


@pytest.mark.parametrize(("name", "message"), [
    ("mine:absent", "no such function"), ("absent:teacher", "no such function"), ("mine:nothing", "got int"),
    ("absent", "is not a denoiser's folder"),
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
        train_teacher.Config(**common, out=tmp_path / "teacher", network="unet", unet_channels=(8, 16))
    )
    loaded = load_teacher(str(teacher))
    assert probe_bottleneck(loaded, None) == ("network.unet.mid_block", 16, 4)
    assert loaded.facts["sigma_data"] > 0
    student = train_dmd.main(train_dmd.Config(
        **common, out=tmp_path / "student", teacher=str(teacher), warmup_steps=1, num_pairs=6,
        gradient_checkpointing=precision == "no",
    ))  # fmt: skip
    assert load_teacher(str(student)).times == pytest.approx((20.0,))


def test_networks_that_cannot_recompute_say_so(tmp_path):
    with pytest.raises(ValueError, match="--gradient-checkpointing: a KarrasPreconditioning cannot"):
        train_teacher.main(train_teacher.Config(out=tmp_path / "run", steps=2, gradient_checkpointing=True))
