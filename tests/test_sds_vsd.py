"""VSD with a phi that learns: what each of the two follows, what phi alone is told, both as phases of a run."""

import copy
from dataclasses import replace

import pytest
import torch

from scorefield.denoiser import Conditioned, NetworkDenoiser, freeze
from scorefield.gradient import denoising_loss, prediction_weight
from scorefield.guidance import guided
from scorefield.models.networks import ResidualMLP
from scorefield.randomness import Rng
from scorefield.schedule import Karras, RectifiedFlow, VariancePreserving
from scorefield.times import constant, uniform
from scorefield.training.checkpoint import load, save
from scorefield.training.loop import Phase, train
from sds.canvas import Canvas
from sds.losses import distillation_loss, unit, vsd
from sds.vsd import VSD, low_rank_denoiser

B = 6
NULL = {"class_labels": torch.tensor([2])}
KINDS = {Karras: "x0", RectifiedFlow: "flow", VariancePreserving: "eps"}
RNG = Rng(seed=3, step=2)


def make_teacher(schedule=None, dtype=torch.float32):
    schedule = schedule or VariancePreserving.scaled_linear()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ResidualMLP((2,), num_classes=2, width=16, depth=2, embedding=8).to(dtype)
        for parameter in network.parameters():
            parameter.data.normal_(0, 0.3)
    scale = 1e-3 if isinstance(schedule, VariancePreserving) else 1.0
    return NetworkDenoiser(freeze(network), schedule, KINDS[type(schedule)], scale)


def make_vsd(schedule=None, dtype=torch.float32, trained=True, **settings):
    teacher = make_teacher(schedule, dtype)
    phi = low_rank_denoiser(
        teacher, rank=2, targets=("first", "second"), camera_at="time", generator=torch.Generator().manual_seed(0)
    )
    if trained:
        for parameter in phi.network.parameters():
            parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return VSD(teacher=guided(teacher, 7.5, NULL), phi=phi, **settings)


def make_batch(dtype=torch.float32, grad=False):
    generator = torch.Generator().manual_seed(5)
    x0 = torch.randn(B, 2, generator=generator, dtype=dtype).requires_grad_(grad)
    camera = torch.randn(B, 12, generator=generator)
    return {"x0": x0, "cond": {"class_labels": torch.arange(B) % 2, "camera": camera}}


def weights(phi):
    return torch.cat([p.detach().flatten() for p in phi.network.parameters()])


def test_the_scene_follows_teacher_less_phi_and_phi_alone_knows_the_camera(schedule):
    method, batch = make_vsd(schedule, torch.float64, w=unit), make_batch(torch.float64)
    cond = {"class_labels": batch["cond"]["class_labels"]}
    phi = Conditioned(method.phi, {"camera": batch["cond"]["camera"]})
    expected = vsd(method.teacher, phi, w=unit).gradient(batch["x0"], cond, generator=RNG("x")).value
    value = method.gradient(batch["x0"], batch["cond"], generator=RNG("x")).value
    assert value.abs().min() > 0
    assert torch.equal(value, expected)
    moved = {**batch["cond"], "camera": batch["cond"]["camera"] + 1}
    assert not torch.isclose(method.gradient(batch["x0"], moved, generator=RNG("x")).value, value).any()


def test_a_teacher_that_knows_cameras_is_told(exact_network, mixture, schedule):
    network = exact_network(mixture, "eps")
    denoiser, batch = NetworkDenoiser(network, schedule), make_batch(torch.float64)
    for phi_only, told in (("camera",), [False, True]), ((), [True, True]):
        network.calls.clear()
        method = VSD(teacher=denoiser, phi=replace(denoiser), phi_only=phi_only)
        method.gradient(batch["x0"], batch["cond"], generator=RNG("x"))
        assert sorted("camera" in cond for _, _, cond in network.calls) == told


def test_the_gradient_of_a_fresh_phi_is_that_of_guidance_alone_and_touches_no_network():
    """Phi starts as the teacher, to the last bit: at scale 1 nothing would move."""
    method, batch = make_vsd(trained=False), make_batch(grad=True)
    unguided = replace(method, teacher=make_teacher())
    assert not unguided.gradient(batch["x0"], batch["cond"], generator=RNG("x")).value.any()
    terms = distillation_loss(method, batch["x0"], batch["cond"], num_draws=3, generator=RNG("x"))
    terms["loss"].backward()
    assert batch["x0"].grad.abs().min() > 0
    assert all(p.grad is None and p.requires_grad for p in method.phi.network.parameters())


@pytest.mark.parametrize("own_settings", [False, True])
def test_phi_learns_to_denoise_the_renders_from_their_cameras(schedule, own_settings):
    """By hand: denoising_loss of its own kind, or as it is set, at the same draws; cameras dropped by none."""
    times, weight = uniform(0, 1), prediction_weight(KINDS[type(schedule)])
    settings = {}
    if own_settings:
        times, weight = constant(schedule.at(torch.tensor(0.4)).item()), unit
        settings = {"phi_times": times, "phi_weight": weight}
    method = make_vsd(schedule, torch.float64, camera_dropout=0.0, **settings)
    batch = make_batch(torch.float64, grad=True)
    expected = denoising_loss(
        method.phi, batch["x0"].detach(), batch["cond"], times=times, weight=weight, generator=RNG("phi")
    )
    loss = method.phi_loss(batch, RNG)["loss"]
    assert torch.equal(loss, expected.mean())
    assert loss != method.phi_loss(batch, Rng(seed=3, step=2, rank=1))["loss"], "ranks draw their own noise"
    loss.backward()
    assert batch["x0"].grad is None
    assert all(p.grad.any() for p in method.phi.network.parameters())


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_cameras_are_dropped_whole_and_as_often_as_asked(share, exact_network, mixture, schedule):
    network = exact_network(mixture, "eps")
    method = VSD(teacher=mixture, phi=NetworkDenoiser(network, schedule), camera_dropout=share)
    camera = 1 + torch.rand(4000, 4, 4)
    cond = {"class_labels": torch.zeros(4000, dtype=torch.long), "camera": camera}
    method.phi_loss({"x0": torch.zeros(4000, 2), "cond": cond}, RNG)
    told = network.calls[0][2]["camera"]
    kept = (told != 0).flatten(1).all(1)
    assert torch.equal(told[kept], camera[kept])
    assert not told[~kept].any()
    assert abs((~kept).float().mean() - share) < 0.02
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValueError, match=rf"camera_dropout must lie in \[0, 1\]; got {wrong}"):
            replace(method, camera_dropout=wrong)


def test_phi_learns_in_the_autocast_in_which_it_was_asked_without_gradient():
    """A cast of its weights that is cached without a graph would leave nothing to learn by."""
    method, batch = make_vsd(), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        value = method.gradient(batch["x0"], batch["cond"], generator=RNG("x")).value
        loss = method.phi_loss(batch, RNG)["loss"]
    assert value.dtype == loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in method.phi.network.parameters())


def make_run(every=1):
    scene = Canvas(torch.randn(B, 2, generator=torch.Generator().manual_seed(2)))
    method, cond = make_vsd(trained=False), make_batch()["cond"]

    def scene_loss(batch, rng):
        return distillation_loss(method, batch["x0"], batch["cond"], num_draws=2, generator=rng("gradient"))

    optimizer = torch.optim.AdamW(scene.parameters(), 1e-2)
    phases = [
        Phase(name="scene", network=scene, optimizer=optimizer, loss=scene_loss),
        method.phase(torch.optim.AdamW(method.phi.network.parameters(), 1e-2), every=every),
    ]
    return method, phases, lambda batch, due, rng: {"x0": scene(), "cond": cond}


def run(accelerator, method, phases, rollout, steps, start=0, **settings):
    return list(
        train(phases, lambda rng: None, accelerator, steps=steps, start=start, rollout=rollout, **settings)
    )


def test_both_phases_learn_and_the_teacher_does_not(accelerator):
    method, phases, rollout = make_run(every=2)
    scene, phi = phases[0].network, method.phi
    before = [weights(phi), scene.pixels.detach().clone()]
    teacher = copy.deepcopy(method.teacher.denoiser.network.state_dict())
    reports = run(accelerator, method, phases, rollout, 4, accumulate=2)
    assert [report.phases for report in reports] == [("scene",), ("scene", "phi")] * 2
    assert {"scene/gradient_rms", "scene/grad_norm", "phi/loss", "phi/grad_norm"} <= reports[-1].metrics.keys()
    assert not torch.equal(weights(phi), before[0])
    assert not torch.isclose(scene.pixels, before[1]).any()
    after = method.teacher.denoiser.network.state_dict()
    assert all(torch.equal(after[name], teacher[name]) for name in teacher)


def test_a_checkpoint_holds_scene_and_changes_and_resumes_bitwise(accelerator, tmp_path):
    whole, first, second = make_run(), make_run(), make_run()
    run(accelerator, *whole, 6)
    run(accelerator, *first, 3)
    path = save(tmp_path, 3, first[1], {})
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) < 6000
    assert load(tmp_path, second[1], {}) == 3
    run(accelerator, *second, 6, start=3)
    assert torch.equal(second[1][0].network.pixels, whole[1][0].network.pixels)
    assert torch.equal(weights(second[0].phi), weights(whole[0].phi))
