import pytest
import torch

from scorefield.denoiser import NetworkDenoiser
from scorefield.exact import GaussianMixture
from scorefield.guidance import guided
from scorefield.schedule import RectifiedFlow
from sds.canvas import Canvas
from sds.editing import DDS
from sds.losses import sds, unit
from sds.renders import distillation_loss

close = torch.testing.assert_close
N = 7


def labels(*values):
    return {"class_labels": torch.tensor(values)}


@pytest.fixture
def problem(generator):
    x0, source = torch.randn(2, N, 2, generator=generator, dtype=torch.float64)
    return x0, source, labels(0, 1, 0, 1, 0, 1, 0), labels(1, 1, 0, 0, 1, 1, 0)


def drawn(method, x0, cond, seed=0):
    return method.gradient(x0, cond, generator=torch.Generator().manual_seed(seed)).value


def test_it_is_sds_of_the_image_less_sds_of_the_source(mixture, problem):
    """At the same t and noise, draw by draw (arXiv 2304.07090)."""
    x0, source, target_prompt, source_prompt = problem
    teacher = guided(mixture, 7.5, labels(2))
    dds = DDS(teacher=teacher, source=source, source_cond=source_prompt)
    plain = sds(teacher, times=dds.times, w=unit)
    expected = drawn(plain, x0, target_prompt) - drawn(plain, source, source_prompt)
    close(drawn(dds, x0, target_prompt), expected, rtol=1e-9, atol=1e-9)


def test_nothing_changes_where_image_and_prompt_are_the_sources(mixture, problem):
    _, source, _, prompt = problem
    dds = DDS(teacher=guided(mixture, 7.5, labels(2)), source=source, source_cond=prompt)
    assert drawn(dds, source, prompt).abs().max() == 0
    assert drawn(dds, source + 0.1, prompt).abs().min() > 0


def test_one_source_and_one_prompt_serve_the_whole_batch(mixture, problem):
    x0, source, target_prompt, _ = problem
    one = DDS(teacher=mixture, source=source[:1], source_cond=labels(1))
    each = DDS(teacher=mixture, source=source[:1].repeat(N, 1), source_cond=labels(*[1] * N))
    close(drawn(one, x0, target_prompt), drawn(each, x0, target_prompt))


def test_both_images_are_one_call(mixture, schedule, problem, exact_network):
    x0, source, target_prompt, source_prompt = problem
    denoiser = NetworkDenoiser(exact_network(mixture, "eps"), schedule)
    drawn(
        DDS(teacher=guided(denoiser, 7.5, labels(2)), source=source, source_cond=source_prompt), x0, target_prompt
    )
    assert [len(x) for x, _, _ in denoiser.network.calls] == [4 * N]


def test_an_edit_takes_what_the_prompts_differ_in_and_leaves_the_rest():
    """Both prompts allow any second coordinate round 0. SDS forgets the source's own one; DDS keeps it."""
    schedule = RectifiedFlow()
    means = torch.tensor([[-1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    teacher = GaussianMixture(means, torch.full((2,), 0.5), torch.ones(2), schedule, torch.arange(2))
    source = torch.tensor([[-0.8, 0.7]], dtype=torch.float64)

    def optimise(method):
        canvas, generator = Canvas(source), torch.Generator().manual_seed(0)
        optimizer = torch.optim.SGD(canvas.parameters(), 0.3)
        for _ in range(150):
            optimizer.zero_grad()
            distillation_loss(method, canvas(), labels(1), num_draws=8, generator=generator)["loss"].backward()
            optimizer.step()
        return canvas().detach()

    edited = optimise(DDS(teacher=teacher, source=source, source_cond=labels(0)))
    close(edited, source + means[1] - means[0], rtol=0, atol=1e-3)
    assert (optimise(sds(teacher)) - means[1]).abs().max() < 0.2


def test_a_source_of_another_shape_raises(mixture, problem):
    x0, source, target_prompt, source_prompt = problem
    dds = DDS(teacher=mixture, source=source[:, :1], source_cond=source_prompt)
    with pytest.raises(ValueError, match=r"source must be images like x0 \(7, 2\); got \(7, 1\)"):
        drawn(dds, x0, target_prompt)
    dds = DDS(teacher=mixture, source=source[:3], source_cond=source_prompt)
    with pytest.raises(ValueError, match=r"cond\['source'\] must have batch 1 or 7; got \(3, 2\)"):
        drawn(dds, x0, target_prompt)


def test_a_source_prompt_with_other_keys_raises(mixture, problem):
    x0, source, target_prompt, _ = problem
    dds = DDS(teacher=mixture, source=source, source_cond={"text": torch.zeros(1, 4)})
    with pytest.raises(
        ValueError, match=r"source_cond must have the keys of cond \['class_labels'\]; got \['text'\]"
    ):
        drawn(dds, x0, target_prompt)
