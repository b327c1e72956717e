"""What a teacher is shown in a step, the loss that comes of it, and the phases of a run, on any ranks."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import tiny_pipelines
import torch
from accelerate import Accelerator
from ranks import run_on_ranks
from torch import nn
from torch.nn.functional import interpolate
from workers import scene_ranks as worker

from edit.delta import DDS
from scorefield.denoiser import NetworkDenoiser, freeze
from scorefield.exact import GaussianMixture
from scorefield.guidance import guided, perpendicular
from scorefield.models.teacher import load_teacher
from scorefield.randomness import Rng
from scorefield.schedule import RectifiedFlow, Schedule, VariancePreserving
from scorefield.times import constant
from scorefield.training.checkpoint import save
from scorefield.training.loop import train
from sds.cameras import WORDS, CameraDistribution
from sds.canvas import Canvas
from sds.losses import averaged_gradient, csd, distillation_loss, sds, vsd, x0_reconstruction
from sds.penalties import Penalties, distortion_loss, entropy_loss, opacity_loss, orientation_loss
from sds.scene import background_network, grid_scene
from sds.shading import ShadingSchedule
from sds.training import Backdrop, CanvasSubject, Observation, SceneDistillation, SceneSubject, encoded
from sds.vsd import CAMERA, VSD, low_rank_denoiser

close = torch.testing.assert_close
COLOURS = ((1.0, 1.0, 1.0), (-1.0, 0.0, 0.5))
NULL = {"class_labels": torch.tensor([2])}
VP = VariancePreserving.scaled_linear()
B, K = 3, 4


def still_cameras(**changes):
    settings = {"distance": (2.7, 3.0), "elevation": (0.0, 45.0), "focal": (1.37, 1.37)}
    return CameraDistribution(position_jitter=0, target_jitter=0, up_jitter=0, **{**settings, **changes})


AROUND = still_cameras()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# What a teacher is shown.


def small_scene(**settings):
    return grid_scene(resolutions=(6,), num_samples=8, **settings)


def empty(scene):
    for parameter in scene.field.network.parameters():
        nn.init.constant_(parameter, -1e4)
    return scene


def numbered(offset):
    """Conditions whose number says which word they are of, and whose tens which backdrop."""
    return {"prompt": offset + torch.arange(4.0).view(4, 1)}


WHITE = [Backdrop(numbered(0.0), COLOURS[0])]


def make_subject(**changes):
    options = {
        "scene": small_scene(), "encode": lambda images: images, "size": (8, 8),
        "cameras": lambda step: [(AROUND, 4)], "resolution": lambda step: 8,
        "backdrops": [*WHITE, Backdrop(numbered(10.0), COLOURS[1])],
    }  # fmt: skip
    return SceneSubject(**{**options, **changes})


def test_what_is_seen_is_that_of_its_step_and_rank():
    subject = make_subject()
    first, again = subject.observe(Rng(0, 3)), subject.observe(Rng(0, 3))
    close(first.x0, again.x0, rtol=0, atol=0)
    close(first.cond, again.cond)
    for other in (Rng(0, 4), Rng(1, 3)):
        assert not torch.equal(first.x0, subject.observe(other).x0)
    two = make_subject(num_ranks=2)
    assert not torch.equal(two.observe(Rng(0, 3)).x0, two.observe(Rng(0, 3, rank=1)).x0)
    assert first.x0.requires_grad


def test_every_view_has_the_words_of_its_backdrop_and_azimuth_and_stands_before_its_colour():
    subject, seen = make_subject(scene=empty(small_scene())), set()
    for step in range(30):
        view = subject.observe(Rng(0, step))
        for image, number in zip(view.x0, view.cond["prompt"][:, 0].tolist(), strict=True):
            backdrop, word = divmod(number, 10)
            close(image.mean((1, 2)), torch.tensor(COLOURS[int(backdrop)]), rtol=0, atol=1e-3)
            seen.add((backdrop, word))
    # Elevations of at most 45 degrees are never overhead.
    assert seen == {(backdrop, word) for backdrop in (0, 1) for word in range(3)}
    views = AROUND.draw(8, seeded())
    off = views.azimuth.abs()
    expected = torch.where(off <= 45, 0.0, torch.where(off >= 135, 2.0, 1.0))
    close(subject.conditions(views, torch.zeros(8, dtype=torch.long))["prompt"][:, 0], expected)
    assert WORDS[:3] == ("front", "side", "back")


def test_cameras_of_several_distributions_make_one_batch_and_ranks_share_the_sectors():
    asked, above = [], still_cameras(elevation=(80.0, 90.0))
    subject = make_subject(
        cameras=lambda step: asked.append(step) or [(AROUND, 3), (above, 1)], num_ranks=2, backdrops=WHITE,
        tell_camera=True,
    )  # fmt: skip
    for rank in (0, 1):
        cond = subject.observe(Rng(0, 7, rank=rank)).cond
        assert cond["prompt"][3, 0] == 3, "overhead"
        views = AROUND.draw(3, Rng(0, 7, rank=rank)("views"), rank=rank, num_ranks=2)
        close(cond[CAMERA][:3], views.camera_to_world)
        assert ((views.azimuth + 180) / 60).floor().long().tolist() == [rank, rank + 2, rank + 4]
    assert asked == [7, 7]
    assert CAMERA not in make_subject().observe(Rng(0, 0)).cond


def test_renders_have_the_resolution_of_the_step_and_the_teachers_proportions():
    subject = make_subject(resolution=lambda step: 4 if step < 2 else 8, size=(8, 16))
    views, chosen = AROUND.draw(2, seeded()), torch.zeros(2, dtype=torch.long)
    assert subject.render(views, chosen, 1, None, None).rgb.shape == (2, 3, 4, 8)
    assert subject.render(views, chosen, 2, None, None).rgb.shape == (2, 3, 8, 16)
    assert subject.observe(Rng(0, 0)).x0.shape == (4, 3, 8, 16)  # the teacher's size, whatever was rendered


def test_a_scene_stands_before_its_own_background_or_a_random_colour(generator):
    scene, plain = (
        empty(small_scene(background=background_network(generator=generator))),
        [Backdrop(numbered(0.0))],
    )
    own, coloured = (
        make_subject(scene=scene, backdrops=plain, own_background=share).observe(Rng(0, 0)).x0[0].flatten(1).std(1)
        for share in (1.0, 0.0)
    )
    assert own.min() > 0  # a network of directions
    assert coloured.max() < 1e-3
    with pytest.raises(ValueError, match="background of its own"):
        make_subject(backdrops=plain).observe(Rng(0, 0))
    for backdrops in ([], [Backdrop({}), Backdrop({})], [Backdrop({}), Backdrop({}, (0.0, 0.0, 0.0))]):
        with pytest.raises(ValueError, match="all have a colour, or be a single one without"):
            make_subject(backdrops=backdrops)


def test_light_is_drawn_for_every_view_of_a_step():
    scene, schedule = small_scene(), ShadingSchedule(albedo_until=5, lit=1.0, textureless=0.0)
    plain, lit = make_subject(scene=scene), make_subject(scene=scene, shading=schedule.draw)
    close(plain.observe(Rng(0, 4)).x0, lit.observe(Rng(0, 4)).x0)
    assert (plain.observe(Rng(0, 5)).x0 - lit.observe(Rng(0, 5)).x0).abs().max() > 0.05


def test_penalties_are_the_weighted_means_of_their_views(generator):
    opacity = torch.rand(2, 1, 4, 4, generator=generator, dtype=torch.float64)
    distortion, orientation = torch.rand(2, 2, 1, 4, 4, generator=generator, dtype=torch.float64)
    render = SimpleNamespace(opacity=opacity, distortion=distortion, orientation=orientation)
    losses = {
        "opacity": opacity_loss(opacity), "entropy": entropy_loss(opacity),
        "orientation": orientation_loss(orientation), "distortion": distortion_loss(distortion),
    }  # fmt: skip
    for name, loss in losses.items():
        close(Penalties(**{name: 3.0})(render), 3 * loss.mean())
    close(
        Penalties(opacity=2.0, orientation=5.0)(render), (2 * losses["opacity"] + 5 * losses["orientation"]).mean()
    )
    assert Penalties()(render) == 0
    with pytest.raises(ValueError, match="normals=True"):
        Penalties(orientation=1.0)(SimpleNamespace(opacity=opacity, orientation=None))
    with pytest.raises(ValueError, match="weight of entropy"):
        Penalties(entropy=-1.0)


def test_the_orientation_penalty_of_a_step_teaches_geometry():
    """Its weights are constants: without normals that have a gradient, as nerfstudio's, nothing would move."""
    subject = make_subject(penalties=lambda step: Penalties(orientation=float(step)))
    assert subject.observe(Rng(0, 0)).penalty == 0
    seen = subject.observe(Rng(0, 1))
    assert seen.penalty > 0
    gradients = torch.autograd.grad(seen.penalty, list(subject.scene.parameters()))
    assert all(gradient[:, 0].abs().max() > 0 for gradient in gradients)
    assert not any(gradient[:, 1:].any() for gradient in gradients)


# From renders to a loss.


@pytest.fixture
def problem(generator):
    x0 = torch.randn(B, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(K, B, 2, generator=generator, dtype=torch.float64)
    ratios = torch.logspace(-1, 1, K * B, dtype=torch.float64).view(K, B)
    return x0, {"class_labels": torch.tensor([0, 1, 0])}, noise, ratios


def methods(mixture, phi, cond):
    """Every loss, with a negative of each sample's own: what repeats must repeat in the order of the batch."""
    own = {"class_labels": 1 - cond["class_labels"]}
    weights, source = torch.tensor([[0.5], [1.0], [2.0]]), torch.eye(3, 2, dtype=torch.float64)
    guide = guided(mixture, 7.5, own)
    return {
        "SDS": lambda **k: sds(guide, **k), "CSD": lambda **k: csd(mixture, own, **k),
        "Perp-Neg": lambda **k: sds(perpendicular(mixture, 7.5, NULL, [own], weights), **k),
        "VSD": lambda **k: vsd(guide, phi, **k),
        "x0-reconstruction": lambda **k: x0_reconstruction(guided(mixture, 50, own, rescale=0.5), **k),
        "DDS": lambda **k: DDS(teacher=guide, source=source, source_cond=own, **k),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["SDS", "Perp-Neg", "CSD", "VSD", "x0-reconstruction", "DDS"])
def test_several_draws_are_the_mean_of_single_ones(name, mixture, make_mixture, schedule, problem):
    x0, cond, noise, ratios = problem
    build = methods(mixture, make_mixture(schedule, 0.3), cond)[name]

    def gradient(k, num_draws):
        """Of the draws in the slice k, as one batch."""
        times, eps = schedule.time(ratios[k]).flatten(), noise[k].flatten(0, 1)
        method = build(times=lambda n, s, g: times, noise=lambda *_: eps)
        return averaged_gradient(method, x0, cond, num_draws=num_draws, generator=torch.Generator()).value

    singles = torch.stack([gradient(slice(k, k + 1), 1) for k in range(K)])
    assert singles.std(0).min() > 1e-3
    close(gradient(slice(None), K), singles.mean(0), rtol=1e-9, atol=1e-9)


def test_the_loss_has_the_averaged_gradient_over_the_batch_size(mixture, problem):
    x0, cond, _, _ = problem
    x0.requires_grad_()
    method = sds(guided(mixture, 7.5, NULL))
    terms = distillation_loss(method, x0, cond, num_draws=K, generator=seeded(3))
    expected = averaged_gradient(method, x0, cond, num_draws=K, generator=seeded(3))
    terms["loss"].backward()
    close(x0.grad, expected.value / B)
    close(terms["gradient_rms"].double(), expected.value.square().mean().sqrt(), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="num_draws must be at least 1; got 0"):
        distillation_loss(method, x0, cond, num_draws=0, generator=seeded())
    for batch in (4, 5):  # also one of 4, which would repeat to the 12 samples that the network sees
        cond = {"class_labels": torch.zeros(batch, dtype=torch.long)}
        with pytest.raises(ValueError, match=rf"cond\['class_labels'\] must have batch 1 or 3; got \({batch},\)"):
            averaged_gradient(method, x0, cond, num_draws=K, generator=seeded())


def test_renders_are_resized_to_the_teachers_size_by_averaging():
    """Without antialiasing three of four pixels would have no gradient."""
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    assert torch.equal(encoded(images, lambda x: x, (16, 16)), images)
    assert encoded(images, lambda x: x, (32, 8)).shape == (2, 3, 32, 8)
    encoded(images, lambda x: x, (4, 4)).sum().backward()
    assert images.grad.min() > 0
    for shape in ((3, 8, 8), (2, 2, 3, 8, 8)):
        with pytest.raises(ValueError, match=r"images must be \(b, c, h, w\) in \[-1, 1\]; got"):
            encoded(torch.zeros(shape), lambda x: x, (8, 8))


def test_a_pixel_teacher_sees_images_between_minus_one_and_one():
    """A scene in [0, 1] that is not rescaled would settle on another picture than the teacher's."""
    picture = torch.linspace(-0.9, 0.9, 48).view(1, 3, 4, 4)
    teacher = GaussianMixture(picture, torch.tensor([0.1]), torch.ones(1), RectifiedFlow())
    canvas = Canvas.noise((3, 4, 4), std=0.3, bounded=True, generator=seeded())
    optimizer, generator = torch.optim.Adam(canvas.parameters(), 0.05), seeded(1)
    for _ in range(200):
        optimizer.zero_grad()
        x0 = encoded(canvas(), lambda images: images, (4, 4))
        distillation_loss(sds(teacher), x0, {}, num_draws=2, generator=generator)["loss"].backward()
        optimizer.step()
    close(canvas().detach(), picture, rtol=0, atol=0.03)


# A latent teacher that was loaded: what other text-to-3D code does wrong on the way to it.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd")
    tiny_pipelines.sd().save_pretrained(path / "pipeline")
    return path


@pytest.fixture
def teacher(folder):
    return load_teacher(folder / "pipeline", cache=folder / "prompts")


def scene_of(teacher, scene=None, **settings):
    backdrops = [Backdrop(teacher.prompts(list(WORDS)), colour) for colour in settings.pop("colours", COLOURS[:1])]
    return make_subject(
        scene=scene or small_scene(), encode=teacher.encode, size=teacher.size, backdrops=backdrops,
        cameras=lambda step: [(CameraDistribution(), 2)], **settings,
    )  # fmt: skip


def make_run(name, teacher):
    guide = guided(teacher.denoiser, 7.5, teacher.negative())
    source = {"source": torch.randn(1, *teacher.shape, generator=seeded(1)), "source_cond": teacher.prompts(["a"])}
    method = {
        "SDS": lambda: sds(guide), "DDS": lambda: DDS(teacher=guide, **source),
        "VSD": lambda: VSD(teacher=guide, phi=low_rank_denoiser(teacher.denoiser, generator=seeded())),
    }[name]()  # fmt: skip
    subject = scene_of(teacher, tell_camera=name == "VSD")
    task = SceneDistillation(subject=subject, method=lambda step: method, num_draws=2)
    phi = torch.optim.AdamW(method.phi.network.parameters(), 1e-3) if name == "VSD" else None
    return task, task.phases(torch.optim.Adam(subject.network.parameters(), 0.05), phi=phi)


@pytest.mark.parametrize("name", ["SDS", "VSD", "DDS"])
def test_no_step_decodes_and_the_teacher_has_neither_graph_nor_gradient_nor_place_in_a_checkpoint(
    name, teacher, accelerator, tmp_path
):
    """threestudio decodes in every step; nerfstudio does not freeze, and saves the whole diffusion model."""
    task, phases = make_run(name, teacher)
    vae, passes, calls = teacher.codec.vae, [], []
    for part in ("encoder", "decoder"):
        getattr(vae, part).register_forward_hook(lambda m, x, y, part=part: passes.append((part, len(x[0]))))
    teacher.denoiser.network.register_forward_pre_hook(
        lambda m, x: calls.append((len(x[0]), torch.is_grad_enabled() or x[0].requires_grad))
    )
    start = [p.detach().clone() for p in task.subject.network.parameters()]
    for _ in train(phases, task.batches, accelerator, rollout=task.rollout, steps=2):
        pass
    assert passes == [("encoder", 2)] * 2
    assert calls == [((8 if name == "DDS" else 4) * 2, False)] * 2, "both draws, guided, in one call"
    for network in (vae, teacher.denoiser.network):
        assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    for old, now in zip(start, task.subject.network.parameters(), strict=True):
        assert now.isfinite().all()
        assert not torch.equal(old, now)
    path = save(tmp_path, 2, phases, {})
    learned = sum(p.numel() for phase in phases for p in phase.network.parameters())
    assert {file.stem for file in path.glob("*.safetensors")} == {phase.name for phase in phases}
    bytes_stored = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert bytes_stored < 3 * 4 * learned + 60_000  # weights and Adam's two moments, with their headers


def test_the_encoder_is_shown_renders_from_minus_one_to_one(teacher):
    """An empty scene before black and white; nerfstudio's DeepFloyd is shown [0, 1]."""
    seen = []
    teacher.codec.vae.encoder.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    for colour in (-1.0, 1.0):
        scene_of(teacher, empty(small_scene()), colours=((colour,) * 3,)).observe(Rng(0, 0))
        close(seen[-1], torch.full((2, 3, *teacher.size), colour))


def test_the_gradient_at_the_pixels_is_the_encoders_of_the_latents(teacher):
    canvas = Canvas.noise((3, 10, 12), num_particles=2, std=0.5, bounded=True, generator=seeded(1))
    cond, method = teacher.prompts(["a mug", "a cone"]), sds(guided(teacher.denoiser, 7.5, teacher.negative()))
    x0 = encoded(canvas(), teacher.encode, teacher.size)
    distillation_loss(method, x0, cond, generator=seeded())["loss"].backward()
    images = canvas().detach().requires_grad_()
    latents = teacher.encode(interpolate(images, (16, 16), mode="bilinear", antialias=True))
    value = method.gradient(latents, cond, generator=seeded()).value
    by_pixel = torch.autograd.grad(latents, images, value)[0] / 2
    close(canvas.pixels.grad, by_pixel * (1 - images.detach() ** 2))


def test_timesteps_survive_half_precision_on_their_way_to_teacher_and_phi(folder):
    """bf16 would make 979 of 980; phi is asked for a gradient, and learns, at the same kind of times."""
    teacher = load_teacher(folder / "pipeline", cache=folder / "prompts", dtype=torch.bfloat16)
    method, seen = make_run("VSD", teacher)[0].method(0), []
    for network in (teacher.denoiser.network, method.phi.network.backbone):
        network.model.register_forward_pre_hook(
            lambda m, given, named: seen.append(named["timestep"]), with_kwargs=True
        )
    x0 = torch.randn(64, *teacher.shape, generator=seeded())
    cond = {**teacher.prompts(["a"] * 64), CAMERA: torch.zeros(64, 12)}
    with torch.autocast("cpu", torch.bfloat16):
        method.gradient(x0, cond, generator=seeded())
        method.phi_loss({"x0": x0, "cond": cond}, Rng(0, 0))["loss"].backward()
    assert len(seen) == 3
    for t in seen:
        assert t.dtype == torch.float32
        assert torch.equal(t, t.round())
        assert bool((t != t.bfloat16().float()).any())


# The phases of a run.


@dataclass(frozen=True)
class Point:
    """Expects the image of its prompt, whatever it is shown; counts its calls."""

    schedule: Schedule
    calls: list = field(default_factory=list)

    def __call__(self, x_t, t, cond):
        self.calls.append(len(x_t))
        return torch.zeros_like(x_t) + cond["prompt"].view(-1, 1, 1, 1)


@pytest.fixture
def canvas(generator):
    return Canvas(torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64))


def make_task(canvas, teacher, **changes):
    subject = CanvasSubject(canvas=canvas, conditions={"prompt": torch.tensor([[0.5]], dtype=torch.float64)})
    return SceneDistillation(**{"subject": subject, "method": lambda step: sds(teacher), **changes})


def test_the_loss_of_a_step_pulls_by_the_closed_form_over_the_batch_with_its_penalty_added(canvas):
    """w (eps_s - eps) = sigma^2 (alpha / sigma) (x0 - mean) for a teacher that always expects the mean."""
    t, asked, rng = torch.tensor([400.0]), [], Rng(0, 11)
    method = lambda step: asked.append(step) or sds(Point(VP), times=constant(400.0))  # noqa: E731
    task = make_task(canvas, Point(VP), method=method)
    without = task.loss(task.rollout({}, ("scene",), rng), rng)
    without["loss"].backward()
    factor = float(VP.alpha(t) * VP.sigma(t))
    close(canvas.pixels.grad, factor * (canvas.pixels.detach() - 0.5) / 3, rtol=1e-6, atol=0)
    assert asked == [11]

    class Tidy(CanvasSubject):
        def observe(self, rng):
            seen = super().observe(rng)
            return Observation(seen.x0, seen.cond, 2 * seen.x0.square().sum(), {"opacity": torch.tensor(0.25)})

    tidy = make_task(canvas, None, subject=Tidy(**vars(task.subject)), method=task.method)
    values = tidy.loss(tidy.rollout({}, ("scene",), rng), rng)
    close(values["penalty"], 2 * canvas.pixels.square().sum())
    close(values["loss"], without["loss"] + values["penalty"])
    assert values["opacity"] == 0.25


def test_the_scene_is_rendered_once_for_all_draws_of_a_step(canvas):
    teacher, renders = Point(VP), []
    task = make_task(canvas, teacher, num_draws=4)
    canvas.register_forward_hook(lambda *_: renders.append(1))
    optimizer = torch.optim.SGD(canvas.parameters(), lr=0.1)
    for _ in train(task.phases(optimizer), task.batches, Accelerator(cpu=True), rollout=task.rollout, steps=2):
        pass
    assert renders == [1, 1]
    assert teacher.calls == [12, 12]


class Net(nn.Module):
    """A small network on (x_t, t, camera, prompt)."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(2, 2, 1)

    def forward(self, x_t, t, prompt, camera=None):
        return self.mix(x_t) + prompt.view(-1, 1, 1, 1)


def test_phi_learns_from_the_renders_of_the_scenes_step_and_only_vsd_has_one(canvas):
    canvas = canvas.float()
    teacher_net, phi_net = freeze(Net()), Net()
    teacher = NetworkDenoiser(teacher_net, VP, "x0")
    method = VSD(teacher=teacher, phi=NetworkDenoiser(phi_net, VP, "x0"))
    subject = CanvasSubject(canvas=canvas, conditions={"prompt": torch.zeros(1, 1)})
    task = SceneDistillation(subject=subject, method=lambda step: method)
    scene, phi = (torch.optim.SGD(net.parameters(), lr=0.1) for net in (canvas, phi_net))
    phases = task.phases(scene, phi=phi)
    assert [phase.name for phase in phases] == ["scene", "phi"]
    before = [p.detach().clone() for p in (canvas.pixels, phi_net.mix.weight, teacher_net.mix.weight)]
    for report in train(phases, task.batches, Accelerator(cpu=True), rollout=task.rollout, steps=1):
        assert report.metrics["phi/loss"] > 0
    after = canvas.pixels, phi_net.mix.weight, teacher_net.mix.weight
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, False, True]
    assert set(phases[0].networks()) | set(phases[1].networks()) == {"scene", "phi"}
    for wrong, given in ((task, None), (make_task(canvas, teacher), phi)):
        with pytest.raises(ValueError, match="VSD needs an optimizer for its phi"):
            wrong.phases(scene, phi=given)


def test_two_ranks_take_the_mean_of_their_gradients_from_different_sides_and_go_back_together(tmp_path):
    """One process computes what each rank does, with its cameras and noise; both ranks then step by the mean.

    In the rollback, the first writes the lowered rates over what the second, which is slower, has yet to read.
    """
    answers = run_on_ranks(lambda accelerator: worker.main(accelerator, tmp_path), tmp_path)
    task = worker.make_task(2)
    gradients = [worker.gradient_of(task, Rng(0, 0, 0, rank, rank)) for rank in range(2)]
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[0].norm()
    for answer in answers:
        close(answer["step"], (gradients[0] + gradients[1]) / 2, rtol=1e-4, atol=1e-6)
    sectors = [((answer["azimuth"] + 180) / 90).floor().long().tolist() for answer in answers]
    assert sectors == [[0, 2], [1, 3]]
    assert [(answer["rate"], answer["rollbacks"]) for answer in answers] == [(0.05, 1)] * 2


SPLIT = [("sds", torch.float32, 1e-6), ("sds", torch.float64, 1e-12), ("vsd", torch.float64, 1e-12)]


def test_ranks_that_share_the_views_of_a_step_take_the_step_of_one_process(tmp_path):
    """Four batches of two views: four in one process, two on each of two ranks, which draw what the one drew."""
    alone = Accelerator(cpu=True)
    expected = [worker.split_steps(alone, method, dtype, 4) for method, dtype, _ in SPLIT]
    other = worker.split_steps(alone, "sds", torch.float64, 2)
    assert (other - expected[1]).abs().max() > 1e-4, "other views would be another step"

    def work(two):
        return [worker.split_steps(two, method, dtype, 4) for method, dtype, _ in SPLIT]

    for answers in run_on_ranks(work, tmp_path):
        for found, wanted, (_, _, tolerance) in zip(answers, expected, SPLIT, strict=True):
            close(found, wanted, rtol=0, atol=tolerance)
