"""What other text-to-3D code does wrong on the way from a scene to its teacher, each tried on this library's way.

The scene, a pipeline that was loaded and the loop are the real ones; only the pipeline's networks are tiny. What
is tested beside the function it belongs to is not repeated here.
"""

import pytest
import tiny_pipelines
import torch
from safetensors.torch import load_file

from scorefield.exact import GaussianMixture
from scorefield.guidance import guided
from scorefield.models.teacher import load_teacher
from scorefield.randomness import Rng
from scorefield.schedule import RectifiedFlow
from scorefield.times import constant
from scorefield.training.checkpoint import save
from scorefield.training.loop import train
from sds.canvas import Canvas
from sds.editing import DDS
from sds.field import DenseGrid, Field, cone_blob, scaled_softplus
from sds.learning import SceneDistillation
from sds.looks import Backdrop, CanvasLooks, SceneLooks
from sds.lora import low_rank_denoiser
from sds.losses import csd, sds, x0_reconstruction
from sds.probe import Probe
from sds.regularisers import Penalties
from sds.scene import Scene
from sds.views import WORDS, CameraDistribution
from sds.vsd import VSD

close = torch.testing.assert_close
METHODS = ("SDS", "CSD", "VSD", "x0-reconstruction", "DDS")
VIEWS, STEPS = 2, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd")
    tiny_pipelines.sd().save_pretrained(path / "latent")
    tiny_pipelines.pixels().save_pretrained(path / "pixels")
    return path


@pytest.fixture
def load(folder):
    return lambda kind="latent", **options: load_teacher(folder / kind, cache=folder / "prompts", **options)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def looks(teacher, scene, colours=((1.0, 1.0, 1.0),), **settings):
    conditions = teacher.prompts(list(WORDS)) if teacher.texts else {}
    return SceneLooks(
        scene=scene, encode=teacher.encode, size=teacher.size,
        cameras=lambda step: [(CameraDistribution(), VIEWS)], resolution=lambda step: 8,
        backdrops=[Backdrop(conditions=conditions, colour=colour) for colour in colours], **settings,
    )  # fmt: skip


def scene():
    field = Field(DenseGrid((2, 4)), half_size=0.9, blob=cone_blob(), activation=scaled_softplus())
    return Scene(field, num_samples=16)


def make_method(name, teacher):
    denoiser, negative = teacher.denoiser, teacher.negative()
    guide = guided(denoiser, 7.5, negative)
    if name == "VSD":
        return VSD(teacher=guide, phi=low_rank_denoiser(denoiser, generator=seeded()))
    if name == "DDS":
        source = torch.randn(1, *teacher.shape, generator=seeded(1))
        return DDS(teacher=guide, source=source, source_cond=teacher.prompts(["a blue chair"]))
    return {
        "SDS": lambda: sds(guide),
        "CSD": lambda: csd(denoiser, negative, scale=7.5),
        "x0-reconstruction": lambda: x0_reconstruction(guided(denoiser, 50, negative, rescale=0.5)),
    }[name]()


def make_run(name, teacher):
    subject, method = looks(teacher, scene(), tell_camera=name == "VSD"), make_method(name, teacher)
    task = SceneDistillation(subject=subject, method=lambda step: method)
    phi = torch.optim.AdamW(method.phi.network.parameters(), 1e-3) if name == "VSD" else None
    return task, task.phases(torch.optim.Adam(subject.network.parameters(), 0.05), phi=phi)


def run(task, phases, accelerator):
    return list(train(phases, task.batches, accelerator, rollout=task.rollout, steps=STEPS))


@pytest.mark.parametrize("name", METHODS)
def test_no_step_decodes_and_the_teacher_has_neither_graph_nor_gradient(name, load, accelerator):
    """threestudio decodes in every step, nerfstudio does not freeze, PDS keeps the network's activations.

    That each loss runs to its end on a pipeline that was loaded is part of it: MVDream's and PDS's do not all.
    """
    teacher = load()
    task, phases = make_run(name, teacher)
    vae, passes, graphs = teacher.codec.vae, [], []
    for part in ("encoder", "decoder"):
        getattr(vae, part).register_forward_hook(lambda m, x, y, part=part: passes.append((part, len(x[0]))))
    teacher.denoiser.network.register_forward_pre_hook(
        lambda m, x: graphs.append(torch.is_grad_enabled() or x[0].requires_grad)
    )
    before = {id(p): p.detach().clone() for p in vae.parameters()}
    start = [p.detach().clone() for p in task.subject.network.parameters()]
    run(task, phases, accelerator)
    assert passes == [("encoder", VIEWS)] * STEPS
    assert graphs == [False] * STEPS
    for network in (vae, teacher.denoiser.network):
        assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    assert all(torch.equal(before[id(p)], p) for p in vae.parameters())
    for old, now in zip(start, task.subject.network.parameters(), strict=True):
        assert now.isfinite().all()
        assert not torch.equal(old, now)


@pytest.mark.parametrize("name", ["SDS", "VSD"])
def test_no_checkpoint_holds_the_teacher(name, load, accelerator, tmp_path):
    """nerfstudio's hold the whole diffusion model, every 200 steps."""
    teacher = load()
    task, phases = make_run(name, teacher)
    run(task, phases, accelerator)
    path = save(tmp_path, STEPS, phases, {})
    stored = {file.stem: load_file(file).keys() for file in path.glob("*.safetensors")}
    names = {phase.name: phase.network.state_dict().keys() for phase in phases}
    assert stored.keys() == names.keys()
    assert all(stored[phase] == names[phase] for phase in names)
    assert names["scene"] == scene().state_dict().keys()
    learned = sum(p.numel() for phase in phases for p in phase.network.parameters())
    taught = sum(p.numel() for p in teacher.denoiser.network.parameters())
    of_the_scene = sum(p.numel() for p in scene().parameters())
    assert learned - of_the_scene < taught / 4
    bytes_stored = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert bytes_stored < 3 * 4 * learned + 60_000  # weights and Adam's two moments, with their headers


def test_latent_teachers_are_shown_renders_from_minus_one_to_one(load):
    """An empty scene before black and white; nerfstudio's DeepFloyd is shown [0, 1]."""
    teacher, seen = load(), []
    teacher.codec.vae.encoder.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    for colour in (-1.0, 1.0):
        looks(teacher, empty(), colours=((colour,) * 3,)).look(Rng(0, 0))
    black, white = seen
    assert black.shape == white.shape == (VIEWS, 3, *teacher.size)
    close(black, -torch.ones_like(black))
    close(white, torch.ones_like(white))


def test_pixel_teachers_are_shown_renders_from_minus_one_to_one(load):
    """At the lowest noise, where x_t is the image, all but a hundredth of its variance."""
    teacher, seen = load("pixels"), []
    teacher.denoiser.network.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    for colour in (-1.0, 1.0):
        look = looks(teacher, empty(), colours=((colour,) * 3,)).look(Rng(0, 0))
        sds(teacher.denoiser, times=constant(0.0)).gradient(look.x0, look.cond, generator=seeded())
    for x_t, colour in zip(seen, (-1.0, 1.0), strict=True):
        assert abs(x_t.mean() - colour) < 0.01
        assert x_t.std() < 0.1


def empty():
    return Scene(Field(DenseGrid((2,)), activation=lambda raw: 0 * raw), num_samples=4)


def test_the_orientation_penalty_teaches_geometry(load):
    """Its weights are constants: without normals that have a gradient, as nerfstudio's, nothing would move."""
    subject = looks(load(), scene(), penalties=lambda step: Penalties(orientation=1.0))
    look = subject.look(Rng(0, 0))
    assert look.penalty > 0
    gradients = torch.autograd.grad(look.penalty, list(subject.scene.parameters()))
    assert all(gradient[:, 0].abs().max() > 0 for gradient in gradients)
    assert not any(gradient[:, 1:].any() for gradient in gradients)


def test_timesteps_survive_half_precision_on_their_way_to_teacher_and_phi(load):
    """bf16 would make 979 of 980; phi is asked for a gradient, and learns, at the same kind of times."""
    teacher = load(dtype=torch.bfloat16)
    method, batch, seen = make_method("VSD", teacher), 64, {"teacher": [], "phi": []}
    networks = {"teacher": teacher.denoiser.network, "phi": method.phi.network.backbone}
    for name, network in networks.items():
        network.model.register_forward_pre_hook(
            lambda m, given, named, name=name: seen[name].append(named["timestep"]), with_kwargs=True
        )
    x0, camera = torch.randn(batch, *teacher.shape, generator=seeded()), torch.zeros(batch, 12)
    cond = {**teacher.prompts(["a"] * batch), "camera": camera}
    with torch.autocast("cpu", torch.bfloat16):
        method.gradient(x0, cond, generator=seeded())
        method.phi_loss({"x0": x0, "cond": cond}, Rng(0, 0))["loss"].backward()
    assert [len(times) for times in seen.values()] == [1, 2]
    for t in (time for times in seen.values() for time in times):
        assert t.dtype == torch.float32
        assert torch.equal(t, t.round())
        assert bool((t != t.bfloat16().float()).any())


def test_a_curve_falls_when_training_works():
    """The "loss" of all others is the size of a gradient, which does not."""
    mean = torch.tensor([[1.0, -0.5, 0.3]])
    teacher = GaussianMixture(mean, torch.tensor([0.1]), torch.ones(1), RectifiedFlow())
    subject = CanvasLooks(canvas=Canvas(torch.zeros(4, 3)), conditions={})
    method = sds(teacher)
    probe = Probe(
        looks=[lambda step: subject.look(Rng(0, step))], target=teacher, decode=lambda x0: x0,
        network=subject.network,
    )  # fmt: skip
    optimizer = torch.optim.Adam(subject.network.parameters(), 0.05)
    task = SceneDistillation(subject=subject, method=lambda step: method)
    residuals = [probe(0, method)[0]["probe/residual"]]
    for step in range(100):
        rng = Rng(0, step)
        optimizer.zero_grad()
        task.loss(task.rollout({}, ("scene",), rng), rng)["loss"].backward()
        optimizer.step()
        if step % 50 == 49:
            residuals.append(probe(step, method)[0]["probe/residual"])
    assert residuals[1] < 0.3 * residuals[0]
    assert residuals[2] < 0.3 * residuals[0]
