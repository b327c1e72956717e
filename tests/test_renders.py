"""Latent distillation: the encoder runs once for several noises; and the path through a teacher of the hub."""

import pytest
import tiny_pipelines
import torch
from torch.nn.functional import interpolate

from scorefield.exact import GaussianMixture
from scorefield.guidance import guided, perpendicular
from scorefield.models.teacher import load_teacher
from scorefield.schedule import RectifiedFlow
from sds.canvas import Canvas
from sds.editing import DDS
from sds.losses import csd, sds, vsd, x0_reconstruction
from sds.renders import averaged_gradient, distillation_loss, encoded

close = torch.testing.assert_close
NULL = {"class_labels": torch.tensor([2])}
B, K = 3, 4


@pytest.fixture
def problem(generator):
    x0 = torch.randn(B, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(K, B, 2, generator=generator, dtype=torch.float64)
    ratios = torch.logspace(-1, 1, K * B, dtype=torch.float64).view(K, B)
    return x0, {"class_labels": torch.tensor([0, 1, 0])}, noise, ratios


def methods(mixture, phi, cond):
    """Every loss, with a negative of each sample's own: what repeats must repeat in the order of the batch."""
    own = {"class_labels": 1 - cond["class_labels"]}
    weights = torch.tensor([[0.5], [1.0], [2.0]])
    return {
        "SDS": lambda **k: sds(guided(mixture, 7.5, own), **k),
        "Perp-Neg": lambda **k: sds(perpendicular(mixture, 7.5, NULL, [own], weights), **k),
        "CSD": lambda **k: csd(mixture, own, **k),
        "VSD": lambda **k: vsd(guided(mixture, 7.5, own), phi, **k),
        "x0-reconstruction": lambda **k: x0_reconstruction(guided(mixture, 50, own, rescale=0.5), **k),
        "DDS": lambda **k: DDS(
            teacher=guided(mixture, 7.5, own), source=torch.eye(3, 2, dtype=torch.float64), source_cond=own, **k
        ),
    }


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
    terms = distillation_loss(method, x0, cond, num_draws=K, generator=torch.Generator().manual_seed(3))
    expected = averaged_gradient(method, x0, cond, num_draws=K, generator=torch.Generator().manual_seed(3))
    assert all(value.shape == () for value in terms.values())
    assert not expected.value.requires_grad
    terms["loss"].backward()
    close(x0.grad, expected.value / B)
    close(terms["gradient_rms"].double(), expected.value.square().mean().sqrt(), rtol=1e-6, atol=0)


def test_more_draws_have_less_variance(mixture, problem):
    x0 = problem[0]
    method, generator = sds(mixture), torch.Generator().manual_seed(0)

    def variance(num_draws):
        x, c = x0[:1].repeat(2000, 1), {"class_labels": torch.zeros(2000, dtype=torch.long)}
        return averaged_gradient(method, x, c, num_draws=num_draws, generator=generator).value.var(0).sum()

    ratio = variance(1) / variance(4)
    assert 3.3 < ratio < 4.8, ratio


@pytest.mark.parametrize("num_draws", [0, -1])
def test_no_draw_raises(mixture, problem, num_draws):
    x0, cond, _, _ = problem
    with pytest.raises(ValueError, match=f"num_draws must be at least 1; got {num_draws}"):
        distillation_loss(sds(mixture), x0, cond, num_draws=num_draws, generator=torch.Generator())


@pytest.mark.parametrize("batch", [4, 5])
def test_a_condition_of_another_batch_raises(mixture, problem, batch):
    """Also one of 4, which would repeat to the 12 samples that the network sees."""
    cond = {"class_labels": torch.zeros(batch, dtype=torch.long)}
    with pytest.raises(ValueError, match=rf"cond\['class_labels'\] must have batch 1 or 3; got \({batch},\)"):
        averaged_gradient(sds(mixture), problem[0], cond, num_draws=K, generator=torch.Generator())


# The path of a latent teacher.


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    tiny_pipelines.sd().save_pretrained(folder / "pipeline")
    return load_teacher(folder / "pipeline", cache=folder / "prompts")


class Calls:
    """Counts the passes through parts of a teacher, and their batches."""

    def __init__(self, teacher):
        vae = teacher.codec.vae
        self.batches = {"encoder": [], "decoder": [], "network": []}
        parts = {"encoder": vae.encoder, "decoder": vae.decoder, "network": teacher.denoiser.network}
        self.hooks = [
            part.register_forward_hook(lambda m, x, y, name=name: self.batches[name].append(len(x[0])))
            for name, part in parts.items()
        ]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def scene_loss(teacher, canvas, num_draws=1):
    cond = teacher.prompts(["a red mug", "a blue chair"])
    guide = guided(teacher.denoiser, 7.5, teacher.negative())
    x0 = encoded(canvas(), teacher.encode, teacher.size)
    return distillation_loss(sds(guide), x0, cond, num_draws=num_draws, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def canvas():
    return Canvas.noise(
        (3, 10, 12), num_particles=2, std=0.5, bounded=True, generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize("num_draws", [1, 4])
def test_renders_are_encoded_once_and_nothing_is_decoded(teacher, canvas, num_draws):
    with Calls(teacher) as calls:
        scene_loss(teacher, canvas, num_draws)["loss"].backward()
    assert calls.batches == {"encoder": [2], "decoder": [], "network": [2 * 2 * num_draws]}


def test_the_gradient_reaches_the_scene_and_no_weight_of_the_teacher(teacher, canvas):
    """Weights that are not frozen would cost half as much again, in FLOPs and in checkpoints."""
    scene_loss(teacher, canvas, 4)["loss"].backward()
    assert canvas.pixels.grad.abs().min() > 0
    for network in (teacher.denoiser.network, teacher.codec.vae):
        assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    assert set(canvas.state_dict()) == {"pixels"}


def test_the_gradient_at_the_pixels_is_the_encoders_of_the_latents(teacher, canvas):
    scene_loss(teacher, canvas)["loss"].backward()
    images = canvas().detach().requires_grad_()
    latents = teacher.encode(interpolate(images, (16, 16), mode="bilinear", antialias=True))
    cond = teacher.prompts(["a red mug", "a blue chair"])
    guide = guided(teacher.denoiser, 7.5, teacher.negative())
    value = sds(guide).gradient(latents, cond, generator=torch.Generator().manual_seed(0)).value
    by_pixel = torch.autograd.grad(latents, images, value)[0] / 2
    close(canvas.pixels.grad, by_pixel * (1 - images.detach() ** 2))


def test_renders_of_the_teachers_size_are_not_touched():
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(encoded(images, lambda x: x, (8, 8)), images)
    assert encoded(images, lambda x: x, (16, 4)).shape == (2, 3, 16, 4)


def test_shrinking_averages():
    """Without antialiasing three of four pixels would have no gradient."""
    images = torch.randn(1, 1, 16, 16, requires_grad=True)
    encoded(images, lambda x: x, (4, 4)).sum().backward()
    assert images.grad.min() > 0


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 2, 3, 8, 8)])
def test_renders_that_are_no_batch_of_images_raise(shape):
    with pytest.raises(ValueError, match=r"images must be \(b, c, h, w\) in \[-1, 1\]; got"):
        encoded(torch.zeros(shape), lambda x: x, (8, 8))


def test_a_pixel_teacher_sees_images_between_minus_one_and_one():
    """A scene in [0, 1] that is not rescaled would settle on another picture than the teacher's."""
    picture = torch.linspace(-0.9, 0.9, 48).view(1, 3, 4, 4)
    teacher = GaussianMixture(picture, torch.tensor([0.1]), torch.ones(1), RectifiedFlow())
    canvas = Canvas.noise((3, 4, 4), std=0.3, bounded=True, generator=torch.Generator().manual_seed(0))
    optimizer, generator = torch.optim.Adam(canvas.parameters(), 0.05), torch.Generator().manual_seed(1)
    for _ in range(200):
        optimizer.zero_grad()
        x0 = encoded(canvas(), lambda images: images, (4, 4))
        distillation_loss(sds(teacher), x0, {}, num_draws=2, generator=generator)["loss"].backward()
        optimizer.step()
    close(canvas().detach(), picture, rtol=0, atol=0.03)
