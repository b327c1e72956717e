"""Concept Sliders: the algebra of their target, scales, sums, and the same images in stock diffusers."""

import pytest
import tiny_pipelines as tiny
import torch
from denoisers import normal, seeded
from refusals import refused
from safetensors.torch import load_file, save_file

from edit.sliders import (
    load_slider,
    make_slider,
    pair_loss,
    partly_denoised,
    prompt_loss,
    save_slider,
    together,
    train,
)
from scorefield.denoiser import NetworkDenoiser, freeze
from scorefield.grids import grid
from scorefield.models.lora import LORA_FILE, merged
from scorefield.models.networks import DiffusersNetwork
from scorefield.sampling import sample
from scorefield.schedule import VariancePreserving
from scorefield.times import uniform

close = torch.testing.assert_close
SD = VariancePreserving.scaled_linear()


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return NetworkDenoiser(freeze(DiffusersNetwork(tiny.text_unet())), SD)


def prompts(batch=2, seed=1):
    return {"encoder_hidden_states": normal(batch, 6, 32, seed=seed, dtype=torch.float32)}


def images(batch=2, seed=0):
    return normal(batch, 4, 8, 8, seed=seed, dtype=torch.float32)


def awake(base, seed=0):
    """A slider whose change is not zero."""
    slider = make_slider(base, rank=2, generator=seeded(seed))
    with torch.no_grad():
        for name, parameter in slider.adapted.changes.items():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=seeded(seed + 1))
    return slider


T = torch.full((2,), 500.0)


@torch.no_grad()
def test_a_scale_of_zero_is_the_base_bit_for_bit_and_a_block_leaves_the_slider_as_it_was(base):
    slider, x_t, cond = awake(base), images(), prompts()
    plain, full = base(x_t, T, cond), slider.denoiser(x_t, T, cond)
    with slider.scaled(0.0) as denoiser:
        assert torch.equal(denoiser(x_t, T, cond), plain)
    with slider.scaled(2.0) as denoiser:
        double = denoiser(x_t, T, cond)
    with pytest.raises(RuntimeError), slider.scaled(3.0):
        raise RuntimeError
    assert torch.equal(slider.denoiser(x_t, T, cond), full)
    assert torch.equal(base(x_t, T, cond), plain)
    assert (double - plain).norm() > 1.2 * (full - plain).norm() > 0
    with slider.scaled(1.0) as denoiser:
        assert torch.equal(denoiser(x_t, T, cond), full)


def test_the_target_of_a_slider_of_prompts_is_the_base_plus_eta_times_what_the_prompts_differ_in(base):
    """A fresh slider is the base, so that its loss is the size of what is added, in the eps that it predicts."""
    slider, x_t, cond = make_slider(base, generator=seeded()), images(), prompts()
    pairs = [(prompts(seed=2), prompts(seed=3)), (prompts(seed=4), prompts(seed=5))]
    loss = prompt_loss(slider, x_t, T, cond, pairs, eta=3.0)
    with torch.no_grad():
        eps = [[SD.from_x0(base(x_t, T, one), x_t, T, "eps") for one in pair] for pair in pairs]
    added = 3.0 * sum(more - less for more, less in eps)
    close(loss, added.square().flatten(1).mean(1), rtol=1e-4, atol=1e-6)
    loss.sum().backward()
    assert any(p.grad.abs().max() > 0 for p in slider.adapted.parameters())
    assert all(p.grad is None for p in base.network.parameters())
    assert prompt_loss(slider, x_t, T, cond, [(pairs[0][0], pairs[0][0])]).max() < 1e-8


def test_a_slider_of_pairs_learns_one_image_at_each_end_of_its_scale(base):
    more, less, cond = images(seed=3) + 0.5, images(seed=3) - 0.5, prompts()
    slider = make_slider(base, rank=4, targets=("conv_out",), generator=seeded())

    def loss(generator):
        return pair_loss(slider, more, less, cond, times=uniform(0.5, 0.5), generator=generator)

    assert len(list(train(slider, loss, num_steps=40, learning_rate=1e-2, generator=seeded()))) == 40
    x_t, means = SD.diffuse(images(seed=3), images(seed=4), T), []
    with torch.no_grad():
        for scale in (-1.0, 0.0, 1.0):
            with slider.scaled(scale) as denoiser:
                means.append(float(denoiser(x_t, T, cond).mean()))
    assert means == sorted(means)
    assert means[2] - means[0] > 0.05
    with refused("images must come in pairs of one shape; got"):
        pair_loss(slider, more, less[:1], cond, generator=seeded())
    with pytest.raises(FloatingPointError, match="the loss is not finite at step 0"):
        list(train(slider, lambda generator: torch.full((2,), float("nan")), num_steps=1, generator=seeded()))


@torch.no_grad()
def test_noisy_images_are_made_with_the_slider_on(base):
    slider, noise, cond, times = awake(base), images(), prompts(), grid(SD, 5)
    x_t, t = partly_denoised(slider, noise, cond, prompts(1, seed=9), times=times, number=0)
    assert torch.equal(x_t, noise)
    assert t.tolist() == [times[0]] * 2
    x_t, t = partly_denoised(slider, noise, cond, prompts(1, seed=9), times=times, number=3, scale=1.0)
    assert t.tolist() == [times[3]] * 2
    close(sample(slider.denoiser, x_t, cond, times=times[3:]), sample(slider.denoiser, noise, cond, times=times))
    with refused(r"number must lie in \[0, 5\); got 5"):
        partly_denoised(slider, noise, cond, prompts(1), times=times, number=5)


@torch.no_grad()
def test_sliders_add_up(base):
    first, second, x_t, cond = awake(base), awake(base, seed=5), images(), prompts()
    both = together([(first, 2.0), (second, -1.0)])
    plain = {name: p.clone() for name, p in DiffusersNetwork.state_dict(base.network).items()}
    wanted = merged(both.network).state_dict()
    for slider, scale in ((first, 2.0), (second, -1.0)):
        for name, value in merged(slider.adapted).state_dict().items():
            plain[name] = plain[name] + scale * (value - base.network.state_dict()[name])
    for name, value in wanted.items():
        close(value, plain[name], rtol=1e-4, atol=1e-5)
    with first.scaled(2.0) as denoiser:
        close(together([(first, 2.0)])(x_t, T, cond), denoiser(x_t, T, cond), rtol=1e-4, atol=1e-5)
    with refused("together needs at least one slider"):
        together([])
    other = make_slider(base, targets=("to_q",), generator=seeded())
    with refused("changes of the same layers can be added, at least one; got 2 that differ"):
        together([(first, 1.0), (other, 1.0)])


@torch.no_grad()
def test_stock_diffusers_draws_the_same_with_set_adapters(tmp_path):
    from scorefield.models.teacher import load_teacher

    pipeline = tiny.sd()
    pipeline.save_pretrained(tmp_path / "model")
    teacher = load_teacher(tmp_path / "model", cache=tmp_path / "cache")
    sliders = {name: awake(teacher.denoiser, seed) for seed, name in enumerate(("size", "age"))}
    cond, x_t = teacher.prompts(["a mug", "a cup"]), images()
    for name, slider in sliders.items():
        save_slider(slider, tmp_path / name)
        again = load_slider(teacher.denoiser, tmp_path / name)
        close(again.denoiser(x_t, T, cond), slider.denoiser(x_t, T, cond))
        pipeline.load_lora_weights(str(tmp_path / name), adapter_name=name)
    for scales in ((2.0, -1.0), (0.5, 0.0)):
        pipeline.set_adapters(list(sliders), list(scales))
        theirs = pipeline.unet(x_t, T, encoder_hidden_states=cond["encoder_hidden_states"]).sample
        ours = together(list(zip(sliders.values(), scales, strict=True)))(x_t, T, cond)
        close(ours, SD.to_x0(theirs, x_t, T, "eps"), rtol=1e-3, atol=1e-3)


def test_a_folder_that_holds_no_slider_of_the_network_is_refused(base, tmp_path):
    folder = save_slider(awake(base), tmp_path / "good")
    weights = load_file(folder / LORA_FILE)
    first = next(name for name in weights if ".lora_A." in name)
    for number, (change, said) in enumerate((
        (None, "cannot read the weights"), ({}, "its layers must have one rank; got none"),
        ({**weights, first: torch.zeros(3, weights[first].shape[1])}, r"must have one rank; got \[2, 3\]"),
        ({**weights, first: weights[first] * torch.nan}, "hold nan or inf, in unet"),
        ({**weights, "unet.elsewhere.lora_A.weight": torch.zeros(2, 4)}, "elsewhere.lora_A.weight is of a layer"),
        ({name: value for name, value in weights.items() if name != first.replace("_A", "_B")}, "is missing"),
    )):  # fmt: skip
        bad = tmp_path / str(number)
        bad.mkdir()
        if change is not None:
            save_file(change, bad / LORA_FILE)
        with refused(said):
            load_slider(base, bad)
    (folder / "slider.json").write_text('{"rank": 1e9, "layers": "x"}')  # what the weights say counts
    load_slider(base, folder)
