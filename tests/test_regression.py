"""Teacher pairs and the distances to them: what pairs depend on, each distance's formula, LPIPS."""

import math
from types import SimpleNamespace

import pytest
import torch
from denoisers import random_denoiser
from refusals import refused
from safetensors.torch import save_file

from distill import regression
from distill.regression import (
    Pairs,
    Regression,
    absolute_error,
    lpips,
    make_pairs,
    pseudo_huber,
    squared_error,
    teacher_batch,
)
from distill.student import Student
from scorefield.guidance import guided
from scorefield.randomness import Rng, shuffled
from scorefield.sampling import grid, heun, sample
from scorefield.schedule import Karras, RectifiedFlow

close = torch.testing.assert_close
LABELS = {"class_labels": torch.arange(11) % 2}


@pytest.fixture
def recipe(mixture):
    """What make_pairs needs for a set of 11, from an exact teacher on every schedule."""
    return {"teacher": mixture, "cond": LABELS, "shape": (2,), "times": grid(mixture.schedule, 4, low=0.1)}


def assert_bitwise(left, right):
    assert torch.equal(left.noise, right.noise)
    assert torch.equal(left.x0, right.x0)
    assert left.cond.keys() == right.cond.keys()
    assert all(torch.equal(left.cond[name], right.cond[name]) for name in left.cond)


@pytest.mark.parametrize("step", [None, heun()])
def test_pairs_are_what_the_teacher_samples_from_standard_normal_noise(recipe, step):
    pairs = make_pairs(**recipe, step=step)
    teacher, times = recipe["teacher"], recipe["times"]
    std = 80.0 if isinstance(teacher.schedule, Karras) else 1.0
    close(pairs.x0, sample(teacher, std * pairs.noise, LABELS, times=times, step=step))
    assert torch.equal(pairs.cond["class_labels"], LABELS["class_labels"])
    assert (pairs.noise.shape, pairs.noise.unique().numel()) == ((11, 2), 22)
    assert not pairs.x0.requires_grad
    cond = {"class_labels": torch.zeros(2000, dtype=torch.long)}
    noise = make_pairs(**{**recipe, "cond": cond, "times": times[:1]}).noise
    close(noise.mean(), torch.tensor(0.0), rtol=0, atol=0.05)
    close(noise.std(), torch.tensor(1.0), rtol=0, atol=0.05)


def joined(shards, order=slice(None)):
    fields = [torch.cat([getattr(shard, name) for shard in shards])[order] for name in ("noise", "x0")]
    return Pairs(*fields, {"class_labels": torch.cat([shard.cond["class_labels"] for shard in shards])[order]})


def test_an_item_depends_on_the_seed_and_its_number_alone(recipe):
    whole = make_pairs(**recipe)
    for num_ranks in (2, 3, 4):
        shards = [make_pairs(**recipe, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
        order = torch.cat([torch.arange(rank, 11, num_ranks) for rank in range(num_ranks)]).argsort()
        assert_bitwise(joined(shards, order), whole)
    for batch in (1, 3, 11):
        assert_bitwise(make_pairs(**recipe, batch=batch), whole)
    shorter = make_pairs(**{**recipe, "cond": {"class_labels": LABELS["class_labels"][:5]}})
    assert torch.equal(whole.noise[:5], shorter.noise)
    assert torch.equal(whole.x0[:5], shorter.x0)
    assert not bool((whole.noise == make_pairs(**recipe, seed=2).noise).any())


def test_a_guided_teacher_makes_guided_pairs(recipe):
    teacher = guided(recipe["teacher"], 3.0, {"class_labels": torch.tensor([2])})
    pairs = make_pairs(**{**recipe, "teacher": teacher})
    plain = make_pairs(**recipe)
    assert torch.equal(pairs.noise, plain.noise)
    assert (pairs.x0 - plain.x0).abs().max() > 0.1


def test_an_unconditional_teacher_says_how_many(make_mixture, schedule):
    teacher, times = make_mixture(schedule, labelled=False), grid(schedule, 4, low=0.1)
    pairs = make_pairs(teacher, {}, shape=(2,), times=times, num=7)
    assert (pairs.noise.shape, pairs.x0.shape, dict(pairs.cond)) == ((7, 2), (7, 2), {})
    shards = [make_pairs(teacher, {}, shape=(2,), times=times, num=7, rank=rank, num_ranks=2) for rank in (0, 1)]
    assert torch.equal(shards[0].x0, pairs.x0[::2])
    assert torch.equal(shards[1].x0, pairs.x0[1::2])


@pytest.mark.parametrize(("changes", "message"), [
    ({"cond": {}}, "must agree on the number of pairs"), ({"num": 5}, "must agree on the number of pairs"),
    ({"cond": {**LABELS, "other": torch.ones(3)}}, "must agree on the number of pairs"),
    *(({"rank": rank, "num_ranks": number}, r"rank must lie in") for rank, number in ((2, 2), (-1, 2), (0, 0))),
])  # fmt: skip
def test_sizes_and_ranks_that_cannot_be_are_refused(recipe, changes, message):
    with refused(message):
        make_pairs(**{**recipe, **changes})


def test_shards_survive_the_disk_and_join(recipe, tmp_path):
    shards = [make_pairs(**recipe, rank=rank, num_ranks=2) for rank in range(2)]
    paths = [tmp_path / "pairs" / f"{rank}.safetensors" for rank in range(2)]
    for shard, path in zip(shards, paths, strict=True):
        shard.save(path)
    assert sorted(path.name for path in (tmp_path / "pairs").iterdir()) == ["0.safetensors", "1.safetensors"]
    assert_bitwise(Pairs.load(paths[:1]), shards[0])
    assert_bitwise(Pairs.load(paths), joined(shards))
    Pairs(torch.ones(2, 2), torch.ones(2, 2), {}).save(paths[1])
    for some in ([], paths):
        with refused("need shards of one set"):
            Pairs.load(some)


def test_a_failure_while_saving_leaves_no_shard_under_its_name(recipe, tmp_path, monkeypatch):
    pairs, path = make_pairs(**recipe), tmp_path / "0.safetensors"
    pairs.save(path)

    def half(tensors, name):
        with open(name, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(regression, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        pairs.save(path)
    assert_bitwise(Pairs.load([path]), pairs)
    assert len(list(tmp_path.glob("*.safetensors"))) - len(list(tmp_path.glob(".*"))) == 1


@pytest.fixture
def images(generator):
    return torch.randn(2, 4, 1, 3, 3, generator=generator, dtype=torch.float64).unbind()


@pytest.mark.parametrize(("distance", "formula"), [
    (squared_error, lambda x, y: ((x - y) ** 2).mean()), (absolute_error, lambda x, y: (x - y).abs().mean()),
    *((pseudo_huber(c), lambda x, y, c=c: (((x - y) ** 2).mean() + c * c).sqrt() - c) for c in (0.03, 1.0)),
], ids=["l2", "l1", "huber", "huber of 1"])  # fmt: skip
def test_distances_are_their_formulas_per_sample(images, distance, formula):
    a, b = images[0].requires_grad_(), images[1]
    found, expected = distance(a, b), torch.stack([formula(x, y) for x, y in zip(a, b, strict=True)])
    close(found, expected)
    close(*(torch.autograd.grad(value.sum(), a)[0] for value in (found, expected)))


def test_pseudo_huber_is_quadratic_near_linear_far_and_smooth_at_zero(images):
    a, b = images
    near, far = b + 1e-4 * (a - b), b + 1e4 * (a - b)
    close(pseudo_huber(0.5)(near, b), squared_error(near, b) / (2 * 0.5), rtol=1e-6, atol=0)
    close(pseudo_huber(0.5)(far, b), squared_error(far, b).sqrt() - 0.5, rtol=1e-6, atol=0)
    distance = pseudo_huber()(a.requires_grad_(), a.detach())
    (gradient,) = torch.autograd.grad(distance.sum(), a)
    assert distance.abs().max() < 1e-15
    assert torch.equal(gradient, torch.zeros_like(a))


@pytest.fixture(scope="module")
def vgg_features():
    from torchvision.models import vgg

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return vgg.make_layers(vgg.cfgs["D"])


@pytest.fixture(scope="module")
def vgg_weights(vgg_features, tmp_path_factory):
    """torchvision's vgg16 state dict, without the classifier that nobody reads here."""
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file({f"features.{name}": value for name, value in vgg_features.state_dict().items()}, str(path))
    return path


@pytest.fixture(scope="module")
def light_vgg():
    """vgg16 without its classifier, whose 124 million weights take seconds to initialise."""
    import torchvision
    from torchvision.models import vgg

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torchvision.models, "vgg16", lambda weights: SimpleNamespace(features=vgg.make_layers(vgg.cfgs["D"]))
        )
        yield


@pytest.fixture(scope="module")
def distance(vgg_weights, light_vgg):
    return lpips(vgg_weights, size=32)


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(2, 3, 3, 32, 32, generator=generator) * 2 - 1).unbind()


def test_lpips_without_weights_is_refused_before_anything_loads(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.functional.image.lpips", None)
    (tmp_path / "vgg16.pth").write_bytes(b"x")
    for name in ("missing.safetensors", "vgg16.pth", "."):
        with refused(r"needs torchvision's vgg16 weights as a \.safetensors file"):
            lpips(tmp_path / name)


def test_lpips_is_torchmetrics_zero_for_equal_images_and_resizes_grey_ones(
    distance, pictures, vgg_features, monkeypatch
):
    import torchvision
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as reference

    monkeypatch.setattr(torchvision.models, "vgg16", lambda weights: SimpleNamespace(features=vgg_features))
    a, b = pictures
    assert torch.equal(distance(a, a), torch.zeros(3))
    assert (distance(a, b).shape, bool(distance(a, b).min() > 0)) == ((3,), True)
    close(distance(a, b).mean(), reference(a, b, net_type="vgg"))
    small, other = (x[:, :1, :8, :8] for x in pictures)
    large = [torch.nn.functional.interpolate(x, (32, 32), mode="bilinear") for x in (small, other)]
    close(distance(small, other), distance(*(x.repeat(1, 3, 1, 1) for x in large)))


def test_lpips_has_a_gradient_that_lowers_it(distance, pictures):
    a, b = pictures[0].clone().requires_grad_(), pictures[1]
    before = distance(a, b)
    (gradient,) = torch.autograd.grad(before.sum(), a)
    assert gradient.abs().amax((1, 2, 3)).min() > 0
    after = distance(a.detach() - 0.01 * gradient / gradient.abs().max(), b)
    assert bool((after < before).all())


def test_lpips_refuses_weights_of_another_network(tmp_path, vgg_features, light_vgg):
    state = {f"features.{name}": value for name, value in vgg_features.state_dict().items()}
    for wrong in ({**state, "features.0.weight": torch.zeros(1)},
                  {k: v for k, v in state.items() if k != "features.0.weight"}):  # fmt: skip
        save_file(wrong, str(tmp_path / "wrong.safetensors"))
        with refused(r"is not torchvision's vgg16: features\.0\.weight missing"):
            lpips(tmp_path / "wrong.safetensors")


@pytest.fixture
def student():
    return Student(random_denoiser(RectifiedFlow()), (1.0,))


@pytest.fixture
def pairs(generator):
    noise, x0 = torch.randn(2, 11, 2, generator=generator).unbind()
    return Pairs(noise, x0, LABELS)


@pytest.mark.parametrize("measure", [squared_error, absolute_error, pseudo_huber(0.1)])
def test_the_loss_is_the_mean_distance_of_the_chosen_pairs(student, pairs, measure):
    rng = Rng(0, 3, index=5)
    loss = Regression(pairs=pairs, distance=measure, batch=4).loss(student, rng)
    chosen = shuffled(11, 4, rng)
    made = student.sample(pairs.noise[chosen], {"class_labels": LABELS["class_labels"][chosen]})
    close(loss, measure(made, pairs.x0[chosen]).mean())
    loss.backward()
    assert all(p.grad is not None and math.isfinite(p.grad.sum()) for p in student.denoiser.network.parameters())
    assert student.denoiser.network.enter.weight.grad.abs().max() > 0


def test_an_epoch_of_the_loss_visits_every_pair(student, pairs):
    seen = []

    def spy(made, x0):
        seen.append(x0)
        return squared_error(made, x0)

    for index in range(11):
        Regression(pairs=pairs, distance=spy, batch=1).loss(student, Rng(0, index, index=index))
    assert torch.equal(torch.cat(seen).sort(0).values, pairs.x0.sort(0).values)


def test_a_few_step_student_needs_states_and_as_many_shares(student, pairs):
    few = Student(student.denoiser, (1.0, 0.5, 0.25))
    with refused(r"with states at its later times 0\.5, 0\.25; 0\.5, 0\.25 missing"):
        Regression(pairs=pairs).loss(few, Rng(0, 0))
    with refused("needs 3 shares, one a step; got 2"):
        Regression(pairs=pairs, shares=(1, 1)).loss(few, Rng(0, 0))


def test_teacher_batches_are_the_teachers_images_under_their_own_conditions(pairs):
    """An epoch holds every image once, and each still has the label that it was made under."""
    label_of = {tuple(x.tolist()): int(label) for x, label in zip(pairs.x0, LABELS["class_labels"], strict=True)}
    batches = [teacher_batch(pairs, 3, Rng(5, 0, index=index)) for index in range(11)]
    seen = torch.cat([batch["real"] for batch in batches])
    labels = torch.cat([batch["cond"]["class_labels"] for batch in batches])
    assert [label_of[tuple(x.tolist())] for x in seen] == labels.tolist()
    assert torch.equal(seen[:11].sort(0).values, pairs.x0.sort(0).values)
    assert {batch["size"] for batch in batches} == {3}
    again = teacher_batch(pairs, 3, Rng(5, 0, index=4))
    assert torch.equal(again["real"], batches[4]["real"])
    assert not torch.equal(teacher_batch(pairs, 3, Rng(6, 0, index=4))["real"], batches[4]["real"])
    unlabelled = teacher_batch(Pairs(pairs.noise, pairs.x0, {}), 3, Rng(5, 0))
    assert (unlabelled["cond"], unlabelled["size"]) == ({}, 3)
