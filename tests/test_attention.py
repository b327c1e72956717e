"""Attention control: what is not edited stays equal bit for bit, and the network is as before afterwards."""

from dataclasses import dataclass

import pytest
import tiny_pipelines as tiny
import torch
from denoisers import normal
from diffusers.models.attention_processor import Attention
from refusals import refused

from scorefield.denoiser import NetworkDenoiser
from scorefield.guidance import guided
from scorefield.models.attention import (
    Recorder,
    attention_layers,
    attention_maps,
    coarsest,
    controlled,
    level_size,
)
from scorefield.models.networks import DiffusersNetwork
from scorefield.models.pipeline import read_words
from scorefield.schedule import VariancePreserving

SD = VariancePreserving.scaled_linear()


@pytest.fixture(scope="module")
def denoiser():
    torch.manual_seed(0)
    return NetworkDenoiser(DiffusersNetwork(tiny.text_unet()), SD)


def asked(rows=4, t=500.0):
    """x_t, t and a condition of as many different prompts."""
    return normal(rows, 4, 8, 8, dtype=torch.float32), torch.full((rows,), t), prompts(rows)


def prompts(rows, seed=1):
    return {"encoder_hidden_states": normal(rows, 6, 32, seed=seed, dtype=torch.float32)}


@dataclass(frozen=True, eq=False)
class Everywhere:
    """Wants all layers and applies a function to all rows, or to some."""

    function: object
    rows: int = 4
    rows_changed: tuple = (True,) * 4

    @property
    def changed(self):
        return torch.tensor(self.rows_changed)

    def wants(self, layer, t):
        return True

    def __call__(self, maps, layer, t):
        return self.function(maps)


@torch.no_grad()
def test_explicit_attention_is_the_networks_own_and_the_network_stays_as_it_was(denoiser):
    x_t, t, cond = asked()
    before = {name: one.processor for name, one in attention_layers(denoiser.network).items()}
    plain = denoiser(x_t, t, cond)
    with controlled(denoiser, Everywhere(lambda maps: maps)) as inside:
        torch.testing.assert_close(inside(x_t, t, cond), plain, rtol=1e-5, atol=1e-5)
    with controlled(denoiser, Everywhere(lambda maps: maps.roll(1, -1))) as inside:
        assert (inside(x_t, t, cond) - plain).abs().max() > 1e-3
    with controlled(
        denoiser, Everywhere(lambda maps: maps.roll(1, -1), rows_changed=(False, False, False, True))
    ) as one:
        changed = one(x_t, t, cond)
    assert torch.equal(changed[:3], plain[:3])
    assert not torch.equal(changed[3], plain[3])
    with pytest.raises(RuntimeError), controlled(denoiser, Everywhere(lambda maps: 1 / 0)):
        raise RuntimeError
    assert before == {name: one.processor for name, one in attention_layers(denoiser.network).items()}
    assert torch.equal(denoiser(x_t, t, cond), plain)
    with refused("the block of controlled.* has ended"):
        one(x_t, t, cond)


@torch.no_grad()
def test_an_edit_that_only_looks_changes_no_bit_and_sees_the_prompts_rows_only(denoiser):
    x_t, t, cond = asked()
    guide = guided(denoiser, 3.0, prompts(1, seed=2))
    plain, recorder = guide(x_t, t, cond), Recorder(rows=4)
    with controlled(denoiser, recorder) as inside:
        assert torch.equal(guided(inside, 3.0, prompts(1, seed=2))(x_t, t, cond), plain)
    alone = Recorder(rows=4)
    with controlled(denoiser, alone) as inside:
        inside(x_t, t, cond)
    assert recorder.finest().shape == (4, 6, 8, 8)
    torch.testing.assert_close(recorder.finest(), alone.finest())
    torch.testing.assert_close(recorder.finest().sum(1), torch.ones(4, 8, 8))
    assert alone.counts == {64: 3, 16: 1}, "layers of attention to the prompt"
    with controlled(denoiser, Recorder(rows=4, largest=15)) as inside:
        assert torch.equal(inside(x_t, t, cond), denoiser(x_t, t, cond))
    with refused("no layer of at most 15 tokens was read"):
        Recorder(rows=4, largest=15).finest()


@pytest.mark.parametrize("size", [(8, 8), (12, 8), (7, 10)])
@torch.no_grad()
def test_the_coarsest_layers_are_known_before_a_call_and_maps_have_the_proportions_of_the_image(denoiser, size):
    unet = denoiser.network.model
    deep = tiny.text_unet(
        block_out_channels=(8, 8, 16), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), mid_block_type=None,
    )  # fmt: skip
    for model in (unet, deep):
        every = Recorder(rows=2, largest=10**6, size=size)
        with controlled(NetworkDenoiser(DiffusersNetwork(model), SD), every) as inside:
            inside(normal(2, 4, *size, dtype=torch.float32), torch.full((2,), 500.0), prompts(2))
        assert min(every.sums) == coarsest(model, size)
        finest = every.finest()
        assert finest.shape == (2, 6, *level_size(size, 0 if model is unet else 1))
        torch.testing.assert_close(finest.sum(1), torch.ones(2, *finest.shape[2:]))
    with refused("must be images of equal sides; got 6 tokens"):
        Recorder(rows=1, sums={6: torch.ones(1, 6, 2)}, counts={6: 1}).finest()
    with refused(r"must be images of \(4, 4\); got 6 tokens"):
        Recorder(rows=1, size=(4, 4), sums={6: torch.ones(1, 6, 2)}, counts={6: 1}).finest()


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_network_is_edited_and_compiled_again_behind(denoiser):
    x_t, t, cond = asked()
    edit = Everywhere(lambda maps: maps.roll(1, -1))
    with controlled(denoiser, edit) as inside:
        wanted = inside(x_t, t, cond)
    compiled = NetworkDenoiser(torch.compile(denoiser.network, backend="eager"), SD)
    before = compiled(x_t, t, cond)
    with controlled(compiled, edit) as inside:
        torch.testing.assert_close(inside(x_t, t, cond), wanted)
    assert torch.equal(compiled(x_t, t, cond), before)


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_unets_of_both_families_are_edited(tmp_path, make):
    from scorefield.models.teacher import load_teacher

    make().save_pretrained(tmp_path / "model")
    teacher = load_teacher(tmp_path / "model", cache=tmp_path / "cache")
    cond, x_t, t = teacher.prompts(["a mug", "a cup"]), normal(2, *teacher.shape).float(), torch.full((2,), 500.0)
    plain, recorder = teacher.denoiser(x_t, t, cond), Recorder(rows=2)
    with controlled(teacher.denoiser, recorder) as inside:
        assert torch.equal(inside(x_t, t, cond), plain)
    assert recorder.finest().shape[:2] == (2, 16)


def test_transformers_and_networks_without_prompts_are_refused_by_name():
    text = tiny.text_unet()
    text.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(lambda *args, **kwargs: None)
    for model, why in (
        (tiny.sd3().transformer, "SD3Transformer2DModel is no UNet2DConditionModel"),
        (tiny.pixel_unet(), "UNet2DModel is no UNet2DConditionModel"),
        (text, "model.mid_block.* has a function; expected one of AttnProcessor"),
    ):
        with (
            refused(f"attention cannot be edited here: {why}"),
            controlled(NetworkDenoiser(DiffusersNetwork(model), SD), Recorder(1)),
        ):
            pass


@torch.no_grad()
def test_batches_that_the_edit_does_not_fit_are_refused(denoiser):
    x_t, t, cond = asked()
    with controlled(denoiser, Recorder(rows=3)) as inside, refused("of 3 rows; got a batch of 4"):
        inside(x_t, t, cond)
    with controlled(denoiser, Recorder(rows=4)) as inside, refused("at one time for all rows; got t ="):
        inside(x_t, torch.tensor([1.0, 2.0, 2.0, 2.0]), cond)


@torch.no_grad()
def test_products_that_overflow_in_half_precision_are_computed_in_single_where_the_network_says_so():
    layer = Attention(query_dim=8, heads=1, dim_head=8, upcast_attention=True)
    tokens = normal(1, 4, 8, dtype=torch.float32)
    for part in (layer.to_q, layer.to_k):
        part.weight.copy_(300 * torch.eye(8))
    wanted, _ = attention_maps(layer, tokens.half().float(), None)
    found, _ = attention_maps(layer.half(), tokens.half(), None)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-2)


def test_gradients_pass_through_edited_attention(denoiser):
    x_t, t, cond = asked()
    x_t.requires_grad_()
    with controlled(denoiser, Everywhere(lambda maps: 0.5 * maps)) as inside:
        inside(x_t, t, cond).sum().backward()
    assert x_t.grad.isfinite().all()
    assert x_t.grad.abs().max() > 0


def test_words_know_their_tokens():
    read = read_words(tiny.clip_tokenizer(12), "a red mug")  # a token for each letter
    assert read.words == ("a", "red", "mug")
    assert read.tokens == ((1,), (2, 3, 4), (5, 6, 7))
    assert (read.end, read.length) == (8, 12)
    cut = read_words(tiny.clip_tokenizer(6), "a red mug")
    assert cut.tokens == ((1,), (2, 3, 4))
    assert cut.end == 5
