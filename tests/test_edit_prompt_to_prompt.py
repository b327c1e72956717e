"""Prompt-to-Prompt: alignment of words, the formula of the maps, windows, local blend, and nothing changed at
zero."""

import pytest
import tiny_pipelines as tiny
import torch
from denoisers import normal
from refusals import refused

from edit.inversion import invert, pinned
from edit.prompt_to_prompt import NEVER, LocalBlend, PromptToPrompt, Window, early, late, prompt_to_prompt
from edit.words import align, pairs_of, tokens_of
from scorefield.denoiser import NetworkDenoiser
from scorefield.grids import grid
from scorefield.guidance import guided
from scorefield.models.attention import Layer, Recorder
from scorefield.models.networks import DiffusersNetwork
from scorefield.models.prompts import Words
from scorefield.sampling import ddim, sample
from scorefield.schedule import VariancePreserving
from toyworld.parts import make_tokenizer

SD = VariancePreserving.scaled_linear()
ALWAYS = Window(0.0)


def words(prompt, length=12, split=()):
    """One token a word, or two for those of ``split``, between a start and an end."""
    tokens, at = [], 1
    for word in prompt.split():
        tokens.append(tuple(range(at, at + 1 + (word in split))))
        at = tokens[-1][-1] + 1
    return Words(tuple(prompt.split()), tuple(tokens), at, length)


@pytest.fixture(scope="module")
def denoiser():
    torch.manual_seed(0)
    return NetworkDenoiser(DiffusersNetwork(tiny.text_unet()), SD)


def prompts(rows, seed=1, length=12):
    return {"encoder_hidden_states": normal(rows, length, 32, seed=seed, dtype=torch.float32)}


# Alignment -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target", "pairs"), [
    ("a red mug", "a blue mug", [(0, 0), (1, 1), (2, 2)]),
    ("an orange mug on ice", "a red mug on ice", [(i, i) for i in range(5)]),
    ("a mug", "a red mug on ice", [(0, 0), (1, 2)]),
    ("a red mug on ice", "a red mug", [(0, 0), (1, 1), (2, 2)]),
    ("a mug on ice", "a big red mug on ice", [(0, 0), (1, 3), (2, 4), (3, 5)]),
    ("a red mug", "a very blue mug", [(0, 0), (2, 3)]),
])  # fmt: skip
def test_words_that_stay_or_take_a_place_belong_together(source, target, pairs):
    assert pairs_of(source.split(), target.split()) == pairs


def test_a_swap_is_the_identity_and_an_addition_keeps_its_own_attention():
    swap = align(words("a red mug"), words("a blue mug"))
    assert torch.equal(swap.mapper, torch.eye(12)), "only the values differ: the maps are the source's"
    assert not swap.is_identity
    refine = align(words("a mug"), words("a mug on ice"))
    assert refine.keep.nonzero().flatten().tolist() == [3, 4], "on, ice"
    assert refine.mapper[[1, 2, 3], [1, 2, 5]].tolist() == [1, 1, 1], "a, mug, end"
    assert torch.equal(refine.mapper[6:, 6:], torch.eye(6)), "padding to itself"
    assert not refine.is_identity
    back = align(words("a mug on ice"), words("a mug"))
    assert back.keep.nonzero().flatten().tolist() == [4, 5], "padding where the source has a word or its end"


def test_words_that_split_share_the_attention_of_their_source():
    split = align(words("a red mug"), words("a crimson mug", split=("crimson",)))
    assert split.mapper[2, [2, 3]].tolist() == [0.5, 0.5]
    assert split.mapper[3, 4] == split.mapper[4, 5] == 1, "mug, end"
    joined = align(words("a crimson mug", split=("crimson",)), words("a red mug"))
    assert joined.mapper[[2, 3], 2].tolist() == [1, 1]
    assert joined.mapper[:, :5].sum() == 6, "no attention to a word is lost"


def test_weights_are_of_words_and_phrases_of_the_target():
    one = words("a red mug on red ice")
    weighted = align(one, one, {"red": 3.0, "mug on": 0.5})
    assert weighted.weight[:7].tolist() == [1, 1, 3, 0.5, 0.5, 3, 1]
    assert not weighted.is_identity
    assert align(one, one, {"red": 1.0}).is_identity
    assert tokens_of(one, "Red Ice") == [5, 6]
    shirt = words("a t - shirt on 1 0 shelves")
    assert tokens_of(shirt, "T-shirt") == [2, 3, 4]
    assert tokens_of(shirt, "on 10") == [5, 6, 7]
    assert tokens_of(words("a a a"), "a a") == [1, 2, 3]
    for absent in ("blue", "mug red", "", "re", "dmug"):
        with refused("the prompt has no word"):
            tokens_of(one, absent)


def test_captions_of_the_toy_world_are_read_word_by_word():
    from scorefield.models.pipeline import read_words

    read = read_words(make_tokenizer(), "a red letter L on a white background, side view")
    assert read.words[-3:] == (",", "side", "view")
    assert read.tokens == tuple((i,) for i in range(1, 12))
    assert (read.end, read.length) == (12, 24)


# The maps ------------------------------------------------------------------------------------------------------


def maps_of(rows, keys=12, queries=4):
    return normal(rows, 2, queries, keys).softmax(-1)


def test_maps_are_the_sources_mapped_kept_and_weighted():
    """By loops over tokens, for two images with an alignment each, and two targets."""
    source = [words("a red mug"), words("a blue cup", split=("cup",))]
    swap = tuple(
        align(one, other) for one, other in zip(source, [words("a blue mug"), words("a red jar")], strict=True)
    )
    refine = (
        align(source[0], words("a red mug on ice"), {"ice": -2.0}),
        align(source[1], words("a blue cup on ice")),
    )
    edit, maps = PromptToPrompt((swap, refine), 2, ALWAYS, NEVER), maps_of(6)
    made = edit(maps, Layer("x", True, 4), 500.0)
    assert torch.equal(made[:2], maps[:2])
    for row, one in enumerate((*swap, *refine)):
        mine, own = maps[row % 2], maps[2 + row]
        for j in range(12):
            wanted = (
                sum(float(one.mapper[i, j]) * mine[..., i] for i in range(12)) + float(one.keep[j]) * own[..., j]
            )
            torch.testing.assert_close(made[2 + row][..., j], float(one.weight[j]) * wanted)
    assert edit.changed.tolist() == [False, False, True, True, True, True]
    same = align(source[0], source[0], {"red": -2.0})
    weighted = PromptToPrompt(((same,),), 1, ALWAYS, NEVER)(maps[:2], Layer("x", True, 4), 500.0)
    torch.testing.assert_close(weighted[1].sum(-1), 1 - 3 * maps[0][..., 2])
    with refused("needs one alignment, or one for each of 3 images; got 2"):
        PromptToPrompt((swap,), 3, ALWAYS, NEVER)


def test_windows_are_early_and_self_attention_is_the_sources_where_it_is_coarse():
    times = grid(SD, 10)
    for share, number in ((0.0, 0), (0.4, 4), (1.0, 10)):
        assert [t in early(times, share) for t in times.tolist()] == [i < number for i in range(10)]
        assert [t in late(times, share) for t in times.tolist()] == [i >= number for i in range(10)]
    with refused(r"a share of the steps in \[0, 1\]; got 1.5"):
        early(times, 1.5)
    swap = (align(words("a red mug"), words("a red mug on ice")),)
    edit = PromptToPrompt((swap,), 1, early(times, 0.4), early(times, 0.2), largest=16)
    early_t, middle_t, late_t = float(times[0]), float(times[3]), float(times[4])
    cross, coarse, fine = Layer("x", True, 64), Layer("x", False, 16), Layer("x", False, 64)
    assert [edit.wants(cross, t) for t in (early_t, middle_t, late_t)] == [True, True, False]
    assert [edit.wants(coarse, t) for t in (early_t, middle_t)] == [True, False]
    assert not edit.wants(fine, early_t)
    maps = maps_of(2, keys=16, queries=16)
    assert torch.equal(edit(maps, coarse, early_t)[1], maps[0])
    assert edit(maps, fine, early_t) is None


# Sampling ------------------------------------------------------------------------------------------------------


def edit_of(targets, windows, num_images=2, **changes):
    return PromptToPrompt(
        tuple((align(words("a red mug"), one),) for one in targets), num_images, *windows, **changes
    )


@torch.no_grad()
def test_windows_of_zero_and_prompts_that_are_the_source_equal_plain_sampling(denoiser):
    times, x_t = grid(SD, 5), normal(2, 4, 8, 8, dtype=torch.float32)
    conds = [prompts(1), prompts(1, seed=2), prompts(1)]
    joined = {"encoder_hidden_states": torch.cat([c["encoder_hidden_states"].repeat(2, 1, 1) for c in conds])}

    def guide(inner):
        return guided(inner, 3.0, prompts(1, seed=3))

    plain = sample(guide(denoiser), x_t.repeat(3, 1, 1, 1), joined, times=times).split(2)
    targets = [words("a blue mug on ice"), words("a red mug")]
    zero = prompt_to_prompt(denoiser, x_t, conds, edit_of(targets, (NEVER, NEVER)), times=times, guide=guide)
    assert all(map(torch.equal, zero, plain))
    windows = (early(times, 0.8), early(times, 0.4))
    made = prompt_to_prompt(denoiser, x_t, conds, edit_of(targets, windows), times=times, guide=guide)
    assert torch.equal(made[0], plain[0])
    assert torch.equal(made[2], plain[2]), "its prompt is the source's"
    assert (made[1] - plain[1]).abs().max() > 1e-3
    again = sample(guide(denoiser), x_t.repeat(3, 1, 1, 1), joined, times=times).split(2)
    assert all(map(torch.equal, again, plain)), "the network is as before"
    with refused("an edit of 2 images to 2 targets needs 3 conditions and as many images; got 2 and 2"):
        prompt_to_prompt(denoiser, x_t, conds[:2], edit_of(targets, windows), times=times)


@torch.no_grad()
def test_a_swap_under_full_windows_differs_by_its_values_alone(denoiser):
    """With the source's prompt for its values, too, the target is the source; without control it is not."""
    times, x_t = grid(SD, 4), normal(2, 4, 8, 8, dtype=torch.float32)
    refine = edit_of([words("a red mug on ice")], (ALWAYS, ALWAYS))
    conds = [prompts(1), prompts(1, seed=2)]
    free = prompt_to_prompt(
        denoiser, x_t, conds, edit_of([words("a red mug on ice")], (NEVER, NEVER)), times=times
    )
    held = prompt_to_prompt(denoiser, x_t, conds, refine, times=times)
    assert (held[1] - held[0]).norm() < (free[1] - free[0]).norm()
    same = PromptToPrompt(((align(words("a b"), words("a b"), {"a": 1.0 + 1e-7}),),), 2, ALWAYS, ALWAYS)
    torch.testing.assert_close(
        *prompt_to_prompt(denoiser, x_t, [prompts(1)] * 2, same, times=times), rtol=0, atol=1e-3
    )


@torch.no_grad()
def test_an_image_whose_path_is_pinned_is_its_own_source(denoiser):
    times, image, conds = grid(SD, 4), normal(2, 4, 8, 8, dtype=torch.float32), [prompts(1), prompts(1, seed=2)]
    path = invert(denoiser, image, {"encoder_hidden_states": prompts(1)["encoder_hidden_states"].repeat(2, 1, 1)},
                  times=times).path  # fmt: skip
    made = prompt_to_prompt(
        denoiser, path.points[0], conds, edit_of([words("a blue mug on ice")], (ALWAYS, NEVER)), times=times,
        step=pinned(ddim(), path),
    )  # fmt: skip
    assert torch.equal(made[0], image)
    assert not torch.equal(made[1], image)


@torch.no_grad()
def test_a_local_blend_leaves_what_its_words_do_not_look_at(denoiser):
    times, x_t, conds = grid(SD, 4), normal(2, 4, 8, 8, dtype=torch.float32), [prompts(1), prompts(1, seed=2)]
    tokens = torch.zeros(4, 12)
    tokens[:, 3] = 1.0
    edit = edit_of([words("a blue mug")], (NEVER, NEVER), recorder=Recorder(rows=4))
    blend = LocalBlend(tokens, 2, threshold=0.9)
    made = prompt_to_prompt(denoiser, x_t, conds, edit, times=times, blend=blend)
    mask = blend.masks(edit.recorder, (8, 8))[2:].expand(2, 4, 8, 8)
    assert 0 < mask.float().mean() < 1
    assert torch.equal(made[1][~mask], made[0][~mask])
    assert (made[1][mask] - made[0][mask]).abs().max() > 1e-3
    maps = torch.zeros(4, 12, 8, 8)
    maps[0, 3, 2, 2], maps[2, 3, 5, 5] = 1.0, 0.5
    recorder = Recorder(rows=4, sums={64: maps.flatten(2).transpose(1, 2)}, counts={64: 1})
    places = LocalBlend(tokens, 2).masks(recorder, (8, 8))
    assert places[0].sum() == 9, "a maximum over 3 x 3"
    assert places[2].sum() == 18, "its own places and its source's"
    assert places[3].sum() == 0
    with refused("a local blend reads attention maps: give the edit a recorder"):
        prompt_to_prompt(
            denoiser, x_t, conds, edit_of([words("a blue mug")], (NEVER, NEVER)), times=times, blend=blend
        )
