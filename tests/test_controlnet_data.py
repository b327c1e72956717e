"""Batches for an adapter: what is drawn and when, pictures that stay together, caches that change nothing."""

import json
import math
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from PIL import Image

from controlnet.canny import Canny
from controlnet.circles import Circles
from controlnet.data import ControlBatches, replace_rows
from controlnet.degraded import Blur
from controlnet.geometry import Depth, Segmentation
from controlnet.hints import Precomputed
from controlnet.samples import load_pictures
from scorefield.cache import TensorCache
from scorefield.models.prompts import PromptEncoder, share_prompts, share_work
from scorefield.models.teacher import load_teacher
from scorefield.randomness import Rng
from scorefield.training.latents import Latents, Memory


def letters(prompts):
    """A text encoder: counts of letters, and the length."""
    counts = [[prompt.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for prompt in prompts]
    lengths = torch.tensor([[len(prompt)] for prompt in prompts])
    return {"encoder_hidden_states": torch.tensor(counts).float(), "length": lengths}


class Posterior:
    """An autoencoder's posterior: means of 2 x 2 pixels, a deviation that depends on them; counts its images."""

    def __init__(self):
        self.batches = []

    def __call__(self, images):
        self.batches.append(len(images))
        mean = torch.nn.functional.avg_pool2d(images, 2)
        return {"mean": mean, "std": 0.1 + mean.square()}


halve = Posterior()
HINTS = [Canny((20, 200), (200, 400))]
RANDOM = {"hints": HINTS, "flip": True, "prompt_drop": 0.5, "hint_drop": 0.3, "latents": Latents(halve)}


def batches(samples=None, **changes):
    settings = {
        "samples": samples or Circles(16, 20), "hints": [Precomputed("outline")], "size": (16, 16),
        "batch_size": 4, "prompts": letters, "null": letters([""]),
    }  # fmt: skip
    return ControlBatches(**settings | changes)


def equal(a, b):
    """Whether two batches hold the same, bit by bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    return torch.equal(a, b)


def rng(index, seed=0):
    return Rng(seed, step=index, index=index)


KINDS = {"x": "image", **{name: name for name in ("lines", "mask", "labels", "depth", "normals")}}


@dataclass
class Numbered:
    """Samples whose pictures all tell where each of their pixels lies in the sample."""

    number: int = 12
    height: int = 24
    width: int = 40
    kinds: dict = field(default_factory=lambda: {"image": "image", **KINDS})

    def __len__(self):
        return self.number

    def caption(self, index):
        return f"{'abcdefghijkl'[index]} sample"

    def identity(self, index):
        return f"numbered {index}"

    def load(self, index):
        rows, columns = torch.meshgrid(torch.arange(self.height), torch.arange(self.width), indexing="ij")
        place = torch.stack([rows, columns, torch.full_like(rows, index)])
        types = {"labels": torch.int64, "depth": torch.float32}
        return {name: place.to(types.get(name, torch.uint8)) for name in self.kinds}


def constant_samples(**pictures):
    """Samples of 16 x 16 pixels that all hold the same pictures."""
    samples = Numbered(height=16, width=16, kinds={name: KINDS.get(name, "image") for name in pictures})
    samples.load = lambda index: dict(pictures)
    return samples


# What a batch is


def test_a_batch_holds_what_the_samples_hold():
    samples = Circles(16, 20)
    batch = batches(samples)(rng(0))
    assert batch["x0"].shape == (4, 3, 16, 16)
    assert batch["prompt_dropped"].tolist() == [False] * 4
    assert batch["hint_dropped"].tolist() == [[False]] * 4
    images = {tuple((samples.load(i)["image"] / 127.5 - 1).flatten().tolist()): i for i in range(20)}
    chosen = [images[tuple(x0.flatten().tolist())] for x0 in batch["x0"]]
    assert torch.equal(batch["hint"], torch.stack([samples.load(index)["outline"] / 255 for index in chosen]))
    assert equal(batch["cond"], letters([samples.caption(index) for index in chosen]))


def test_an_epoch_visits_every_sample_once_and_ranks_share_it():
    loader = batches(Numbered(), hints=[Precomputed("mask", 3)], size=(24, 40))
    seen, orders = [Counter() for _ in range(2)], [[], []]
    for index in range(6):
        loaded = loader.load(index, 0)
        orders[index // 3] += loaded.indices
        for epoch, number in zip(loaded.epochs, loaded.indices, strict=True):
            seen[epoch][number] += 1
        assert loaded.pictures["image"][:, 2, 0, 0].tolist() == loaded.indices
    assert seen == [Counter(range(12)), Counter(range(12))]
    assert orders[0] != orders[1]
    assert loader.load(0, 1).indices != loader.load(0, 0).indices
    loaded = batches(Circles(16, 3), batch_size=8).load(0, 0)
    assert loaded.epochs == [0, 0, 0, 1, 1, 1, 2, 2]
    assert sorted(loaded.indices[:3]) == sorted(loaded.indices[3:6]) == [0, 1, 2]


def test_a_batch_follows_from_its_number_and_a_sample_from_itself():
    """In any order, after a restart, and as two ranks with batches of 2 or one with batches of 4."""
    one, other, two = batches(**RANDOM), batches(**RANDOM), batches(**RANDOM, batch_size=2)
    forward = [one(rng(i)) for i in range(6)]
    backward = [other(rng(i)) for i in reversed(range(6))][::-1]
    assert all(equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not equal(forward[0], one(rng(0, seed=1)))
    for index, whole in enumerate(forward):
        halves = [two(rng(2 * index + rank)) for rank in range(2)]
        for name in ("x0", "hint", "prompt_dropped", "hint_dropped"):
            assert torch.equal(whole[name], torch.cat([half[name] for half in halves])), name


def test_epochs_differ_in_what_is_drawn():
    loader = batches(Circles(16, 1), batch_size=1, latents=Latents(halve), hints=[Blur((16.0, 160.0))])
    drawn = [loader(rng(epoch)) for epoch in range(30)]
    for name in ("x0", "hint"):
        assert len({tuple(batch[name].flatten().tolist()) for batch in drawn}) == 30


# Views


@pytest.mark.parametrize(("crop", "flip"), [("center", True), ("random", False), ("random", True)])
def test_image_and_maps_show_the_same_place(crop, flip):
    loader = batches(Numbered(), hints=[Precomputed("mask", 3)], size=(16, 20), crop=crop, flip=flip)
    steps, corners = Counter(), set()
    for index in range(24):
        pictures = {name: picture.float() for name, picture in loader.load(index, 0).pictures.items()}
        image = pictures.pop("image")
        turned = image[:, 1, 0, 0] > image[:, 1, 0, 1]
        pictures["normals"][turned, 0] = 255 - pictures["normals"][turned, 0]  # red to the right: turned over
        assert all(torch.equal(image, picture) for picture in pictures.values())
        for row in image:
            assert torch.equal(row[0] - row[0, 0, 0], torch.arange(16.0)[:, None].expand(16, 20))
            step = float(row[1, 0, 1] - row[1, 0, 0])
            assert torch.equal(row[1] - row[1, 0, 0], (step * torch.arange(20.0)).expand(16, 20))
            steps[step] += 1
            corners.add((float(row[0].min()), float(row[1].min())))
    assert set(steps) == ({1.0, -1.0} if flip else {1.0})
    assert not flip or abs(steps[1.0] - 48) < 5 * math.sqrt(96) / 2
    if crop == "center":
        assert corners == {(4, 10)}
    else:
        assert len(corners) > 50
        assert {0, 8} <= {top for top, _ in corners}
        assert max(left for _, left in corners) <= 20


def test_hints_are_made_of_the_mirrored_sample_and_of_maps_as_they_are():
    """Closed form on a ramp of colour and of depth, and on labels."""
    hints = [Blur((0.0, 0.0), channels=3), Depth()]
    image = torch.arange(16, dtype=torch.uint8).expand(3, 16, 16) * 16
    samples = constant_samples(image=image, depth=1.0 + 6 * torch.arange(16.0).expand(1, 16, 16))
    batch = batches(samples, hints=hints, flip=True, batch_size=12)(rng(0))
    rising = (batch["x0"][:, 1, 0, 1] > batch["x0"][:, 1, 0, 0]).tolist()
    assert set(rising) == {True, False}
    for hint, up in zip(batch["hint"], rising, strict=True):
        assert (hint[1, 0, 1] > hint[1, 0, 0]) == up
        assert (hint[3, 0, 1] < hint[3, 0, 0]) == up  # farther is darker
    samples = constant_samples(image=image, labels=torch.tensor([0, 1, 2, 255]).repeat(4).expand(1, 16, 16))
    assert torch.equal(batches(samples, hints=[Segmentation(3)])(rng(0))["hint"][0, :, 0, :4], torch.eye(3, 4))


def write_folder(folder, captions, seeds):
    """Pictures of random pixels; equal seeds are equal pictures."""
    folder.mkdir(exist_ok=True)
    lines = []
    for n, (caption, seed) in enumerate(zip(captions, seeds, strict=True)):
        pixels = np.random.RandomState(seed).randint(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        Image.fromarray(np.full((16, 16, 3) if n % 2 else (16, 16), 51, np.uint8)).save(folder / f"{n}_h.png")
        lines.append(json.dumps({"file_name": f"{n}.png", "text": caption, "hint_file_name": f"{n}_h.png"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_grey_and_coloured_hint_images_may_be_mixed(tmp_path):
    samples = load_pictures(write_folder(tmp_path, "ab", (1, 2)), (16, 16), maps={"hint": "image"})
    hint = batches(samples, hints=[Precomputed("hint", 3)], batch_size=2)(rng(0))["hint"]
    assert torch.allclose(hint, torch.full((2, 3, 16, 16), 0.2))


def test_examples_are_plain_always_the_same_and_made_a_batch_at_a_time():
    """At full size all of them at once would not fit, where training does."""
    encode = Posterior()
    settings = RANDOM | {"hints": [Precomputed("mask", 3)], "size": (16, 20), "crop": "random", "prompt_drop": 1.0}
    loader = batches(Numbered(), **settings | {"latents": Latents(encode), "batch_size": 2})
    made = loader.examples([3, 7, 8])
    assert encode.batches == [2, 1]
    assert equal(made, loader.examples([3, 7, 8]))
    assert equal(made, batches(Numbered(), **settings, batch_size=8).examples([3, 7, 8]))
    images = Numbered().load(3)["image"][:, 4:20, 10:30] / 127.5 - 1
    assert torch.allclose(made["images"][0], images, atol=1e-6)
    assert torch.allclose(made["hint"][0], (images + 1) / 2, atol=1e-6)
    assert equal(made["cond"], letters(["d sample", "h sample", "i sample"]))
    mean, std = halve(images[None]).values()
    assert ((made["x0"][0] - mean).abs() / std).max() < 6
    encode.batches.clear()
    batches(Numbered(), **settings | {"latents": Latents(encode, batch_size=3)}, batch_size=8).examples(range(5))
    assert encode.batches == [3, 2]


# What is dropped


def visits_dropped(loader, num_samples, num_epochs):
    """(epochs, samples) of prompts and of hints that were dropped."""
    tables = {name: torch.zeros(num_epochs, num_samples) for name in ("prompt_dropped", "hint_dropped")}
    for index in range(num_epochs * num_samples // loader.batch_size):
        loaded = loader.load(index, 0)
        batch = loader.complete(loaded, 0)
        for name, table in tables.items():
            table[loaded.epochs, loaded.indices] = batch[name].float().reshape(-1)
        assert torch.equal(batch["hint"].flatten(1).abs().amax(1) == 0, batch["hint_dropped"][:, 0])
        whole = [len(loader.samples.caption(number)) for number in loaded.indices]
        kept = [0 if gone else length for gone, length in zip(batch["prompt_dropped"], whole, strict=True)]
        assert batch["cond"]["length"][:, 0].tolist() == kept
    return tables.values()


def check_binomial(table, probability):
    """Counts over epochs and over samples have mean and variance of independent draws."""
    epochs, samples = table.shape
    deviation = math.sqrt(probability * (1 - probability))
    assert abs(float(table.mean()) - probability) < 4 * deviation / math.sqrt(table.numel())
    for counts, number in ((table.sum(0), epochs), (table.sum(1), samples)):
        assert 0 < counts.min() <= counts.max() < number  # frozen in a cache, it would be 0 or all of them
        ratio = float(counts.var()) / (number * probability * (1 - probability))
        assert abs(ratio - 1) < 4 * math.sqrt(2 / (len(counts) - 1))


@pytest.mark.parametrize("cached", [False, True])
def test_prompts_and_hints_are_dropped_anew_in_every_epoch_and_apart(tmp_path, cached):
    encoder = PromptEncoder(tmp_path, lambda: "letters", lambda: letters)
    if cached:
        share_prompts(encoder, [Circles(16, 40).caption(i) for i in range(40)])
        encoder = encoder.dropped()
    prompts = encoder if cached else letters
    loader = batches(Circles(16, 40), batch_size=40, prompts=prompts, prompt_drop=0.5, hint_drop=0.25)
    prompts, hints = visits_dropped(loader, 40, 40)
    check_binomial(prompts, 0.5)
    check_binomial(hints, 0.25)
    both = float((prompts * hints).mean())
    assert abs(both - 0.125) < 4 * math.sqrt(0.125 * 0.875 / hints.numel())
    assert not torch.equal(prompts[0], prompts[1])


def test_damaged_prompts_are_made_again_before_the_encoder_is_dropped(tmp_path):
    encoder, captions = PromptEncoder(tmp_path, lambda: "letters", lambda: letters), ["a mug", "a cone"]
    share_prompts(encoder, captions)
    path = TensorCache(tmp_path, "letters").path("a cone")
    path.write_bytes(path.read_bytes()[:-112] + bytes(112))
    with pytest.warns(UserWarning, match="is damaged .*; it is made again"):
        assert share_prompts(encoder, captions) == 1
    assert equal(encoder.dropped()(captions), letters(captions))


def test_of_several_hints_each_is_dropped_by_itself():
    hints = [Precomputed("mask", 3), Precomputed("outline")]
    loader, seen = batches(Circles(16, 40), hints=hints, batch_size=40, hint_drop=0.5), Counter()
    for index in range(10):
        batch = loader(rng(index))
        for hint, dropped in zip(batch["hint"], batch["hint_dropped"].tolist(), strict=True):
            assert [bool(hint[:3].any()), bool(hint[3:].any())] == [not gone for gone in dropped]
            seen[tuple(dropped)] += 1
    assert len(seen) == 4
    assert min(seen.values()) > 60


def test_dropping_changes_nothing_else():
    plain, dropping = batches(**RANDOM | {"prompt_drop": 0.0, "hint_drop": 0.0}), batches(**RANDOM)
    for index in range(8):
        a, b = plain(rng(index)), dropping(rng(index))
        assert torch.equal(a["x0"], b["x0"])
        kept = ~b["hint_dropped"][:, 0]
        assert torch.equal(a["hint"][kept], b["hint"][kept])
        kept = ~b["prompt_dropped"]
        assert equal({k: v[kept] for k, v in a["cond"].items()}, {k: v[kept] for k, v in b["cond"].items()})


def test_rows_of_the_null_condition_keep_type_and_place():
    cond = {"a": torch.rand(3, 2, 4, dtype=torch.float16), "n": torch.tensor([1, 2, 3])}
    null = {"a": torch.zeros(1, 2, 4), "n": torch.tensor([9])}
    made = replace_rows(cond, null, torch.tensor([False, True, False]))
    assert made["n"].tolist() == [1, 9, 3]
    assert made["a"].dtype == torch.float16
    assert made["a"][1].abs().max() == 0
    assert torch.equal(made["a"][::2], cond["a"][::2])
    with pytest.raises(ValueError, match=r"null must hold what prompts do: \['a', 'n'\]; got \['a'\]"):
        replace_rows(cond, {"a": null["a"]}, torch.tensor([False, True, False]))


# Caches


def test_cached_latents_are_those_made_on_the_way(tmp_path):
    encode = Posterior()
    plain = batches(**RANDOM)
    cached = batches(**RANDOM | {"latents": Latents(encode, TensorCache(tmp_path, "halve"))})
    for round_ in range(2):
        for index in range(15):
            assert equal(cached(rng(index)), plain(rng(index)))
        if round_ == 0:
            seen = sum(encode.batches)
            assert 20 < seen <= 40  # 20 samples, mirrored or not
    assert sum(encode.batches) == seen


def test_what_is_kept_is_the_posterior_not_a_sample_and_means_may_be_asked_for(tmp_path):
    one = Circles(16, 1)
    loader = batches(one, batch_size=1, latents=Latents(halve, TensorCache(tmp_path, "halve")))
    x0 = torch.cat([loader(rng(epoch))["x0"] for epoch in range(400)])
    mean, std = halve(one.load(0)["image"][None] / 127.5 - 1).values()
    standard = (x0 - mean) / std
    assert abs(float(standard.mean())) < 4 / math.sqrt(standard.numel())
    assert abs(float(standard.std()) - 1) < 0.02
    assert (standard.mean(0).abs() < 5 / 20).all()  # independent in every pixel and epoch
    loader = batches(one, batch_size=1, latents=Latents(halve), sampled=False)
    assert torch.equal(loader(rng(0))["x0"], mean)
    assert torch.equal(loader(rng(7))["x0"], mean)


def test_what_is_drawn_first_is_encoded_by_its_rank_and_read_by_all(tmp_path):
    """Two ranks that share an epoch encode each image once; then, with the batches exchanged, none at all."""
    cache, encoders = TensorCache(tmp_path, "halve"), [Posterior(), Posterior()]
    ranks = [batches(latents=Latents(encode, cache)) for encode in encoders]
    for step in range(2):
        for rank in range(2):
            ranks[rank](rng(2 * step + rank))
    assert [sum(encode.batches) for encode in encoders] == [8, 8], "two batches of four each, of twenty samples"
    ranks[0](rng(4))
    for number in range(5):
        ranks[1](rng(number))
    assert [sum(encode.batches) for encode in encoders] == [12, 8]


def test_an_encoder_computes_in_its_own_precision_whatever_asks_for_latents(tmp_path):
    """What is kept stays: entries that the first step asks for under autocast would be coarse for ever."""
    network, name = torch.nn.Conv2d(3, 4, 2), ["x"]
    latents = Latents(lambda images: {"mean": network(images)}, TensorCache(tmp_path, "conv"))
    pixels = torch.arange(48, dtype=torch.uint8).reshape(1, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        made = latents(name, lambda places: pixels[places])["mean"]
    assert made.dtype == torch.float32
    assert torch.equal(made, network(pixels / 127.5 - 1).detach())


def test_an_edited_image_or_caption_is_another_entry_and_nothing_else_is(tmp_path):
    def made(captions, seeds, batch_size=4, prompt_drop=0.0):
        """Images and prompts that had to be encoded."""
        encode, asked = Posterior(), []
        encoder = PromptEncoder(tmp_path / "texts", lambda: "e", lambda: lambda p: asked.extend(p) or letters(p))
        folder = write_folder(tmp_path / "images", captions, seeds)
        samples = load_pictures(folder, (16, 16), cache=tmp_path / "cache")
        settings = {"hints": HINTS, "batch_size": batch_size, "prompt_drop": prompt_drop}
        latents = Latents(encode, TensorCache(tmp_path / "latents", "halve"))
        loader = batches(samples, prompts=encoder, latents=latents, **settings)
        share_prompts(encoder, [samples.caption(n) for n in range(4)])
        expected = batches(samples, latents=Latents(halve), **settings)
        for index in range(4 // batch_size):
            assert equal(loader(rng(index)), expected(rng(index)))
        return sum(encode.batches), asked

    first = ["a b", "c", "d", "e"]
    assert made(first, (1, 2, 3, 4)) == (4, first)
    assert made(first, (1, 2, 3, 4), batch_size=2, prompt_drop=0.5) == (0, [])  # these are in no name
    assert made(["a b", "c", "changed", "e"], (1, 2, 3, 4)) == (0, ["changed"])
    assert made(["a b", "c", "changed", "e"], (1, 9, 3, 4)) == (1, [])
    assert made(["c", "a b", "d", "e"], (2, 1, 4, 3)) == (0, [])  # the same in another order


def test_another_autoencoder_size_or_conversion_is_another_entry(tmp_path):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}')

    def name(size, **options):
        samples = load_pictures(tmp_path, size, **options)
        return batches(samples, hints=HINTS, size=size, latents=Latents(halve)).load(0, 0).names[0]

    assert len({name((16, 16)), name((32, 32)), name((16, 32)), name((16, 16), convert=True)}) == 4
    assert len({TensorCache(tmp_path, identity).path("a") for identity in ("first", "second")}) == 2


def test_memory_takes_what_fits_and_keeps_it():
    memory = Memory(100)
    for key in ("a", "b", "c", "a"):
        memory.keep(key, {"x": torch.zeros(10)})
    memory.keep("d", {"x": torch.zeros(5)})
    assert [memory.get(name) is not None for name in "abcd"] == [True, True, False, True]
    assert memory.used == 100


def test_samples_and_latents_are_read_once_while_they_fit(tmp_path):
    loads = Counter()

    class Watched(Circles):
        def load(self, index):
            loads[index] += 1
            return super().load(index)

    latents = Latents(halve, TensorCache(tmp_path, "halve"), Memory(2**20))
    loader, forgetful = batches(Watched(16, 8), latents=latents), batches(Watched(16, 8), memory=Memory(0))
    for index in range(6):
        loader(rng(index))
    assert set(loads.values()) == {1}
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    loader(rng(6))
    assert not list(tmp_path.rglob("*.safetensors")), "they are in memory"
    loads.clear()
    for index in range(4):
        forgetful(rng(index))
    assert set(loads.values()) == {2}


# Work that ranks share


def test_a_rank_does_its_share_and_then_what_others_have_not_come_to():
    """Rank 1 of 2; the other, which is slower, has stored all of its own but 4 and 8 by the time."""
    stored, calls = set(), []

    def do(some):
        calls.append(some)
        stored.update(some, {0, 2, 6})

    assert share_work(range(10), done=stored.__contains__, do=do, rank=1, num_ranks=2, batch_size=3) == 7
    assert calls[:2] == [[1, 3, 5], [7, 9]]
    assert sorted(calls[2]) == [4, 8]
    assert share_work(range(10), done=stored.__contains__, do=do, num_ranks=2) == 0


def test_one_rank_does_all_in_batches_and_nothing_twice():
    calls = []
    assert share_work(range(10), done={3, 4}.__contains__, do=calls.append, batch_size=3) == 8
    assert calls == [[0, 1, 2], [5, 6, 7], [8, 9]]
    calls.clear()
    share_work(range(4), done={3}.__contains__, do=calls.append, batch_size=10)
    assert calls == [[0, 1, 2]], "what is last was done already"
    assert share_work([], done=bool, do=calls.append) == 0


# Reading ahead


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_reading_ahead_changes_nothing(num_ranks):
    plain, ahead = batches(**RANDOM), batches(**RANDOM).ahead(num_ranks)
    for index in (0, num_ranks, 2 * num_ranks, 7, 7 + num_ranks, 1, 1):  # a restart in between
        assert equal(ahead(rng(index)), plain(rng(index)))
    assert equal(ahead(rng(1, seed=5)), plain(rng(1, seed=5)))


def test_the_next_batch_is_loaded_meanwhile(monkeypatch):
    load, asked = ControlBatches.load, []
    monkeypatch.setattr(ControlBatches, "load", lambda self, *which: asked.append(which) or load(self, *which))
    ahead = batches().ahead()
    ahead(rng(0))
    for _ in range(100):
        if len(asked) == 2:
            break
        time.sleep(0.02)
    assert sorted(asked) == [(0, 0), (1, 0)]
    ahead(rng(1))
    assert asked.count((1, 0)) == 1


def test_a_fault_met_while_reading_ahead_is_raised_with_its_batch():
    bad = batches(Circles(16, 8)).load(1, 0).indices[0]

    class Failing(Circles):
        def load(self, index):
            if index == bad:
                raise ValueError("5.png cannot be read")
            return super().load(index)

    ahead = batches(Failing(16, 8)).ahead()
    ahead(rng(0))
    with pytest.raises(ValueError, match=r"5\.png cannot be read"):
        ahead(rng(1))


@pytest.mark.parametrize(("changes", "message"), [
    ({"hints": []}, "need a hint and batch_size >= 1"), ({"batch_size": 0}, "need a hint and batch_size >= 1"),
    ({"prompt_drop": 1.5}, r"prompt_drop and hint_drop must lie in \[0, 1\]"),
    ({"hint_drop": -0.1}, r"prompt_drop and hint_drop must lie in \[0, 1\]"),
    ({"hints": [Depth()]}, "Depth is made of 'depth', but the samples hold image, outline, mask only"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        batches(**changes)


def test_random_crops_have_no_cache_and_crops_fit(tmp_path):
    with pytest.raises(ValueError, match="latents of random crops cannot be kept"):
        batches(crop="random", latents=Latents(halve, TensorCache(tmp_path, "halve")))
    with pytest.raises(ValueError, match="16 x 16 has no part of 16 x 24"):
        batches(size=(16, 24), hints=[Blur()])(rng(0))


def test_prompts_and_latents_of_a_family_of_diffusers_in_batches(tmp_path):
    """Its null, its pooled embeddings, and no encoder left in the end."""
    tiny.sdxl().save_pretrained(tmp_path / "model")
    teacher = load_teacher(tmp_path / "model", size=16, cache=tmp_path / "texts")
    cache, samples = TensorCache(tmp_path / "latents", teacher.codec.identity()), Circles(16, 6)
    share_prompts(teacher.texts, [samples.caption(n) for n in range(6)])
    settings = {"hints": HINTS, "batch_size": 6, "flip": True, "null": teacher.negative(), "prompt_drop": 0.5}

    def encode(images):
        return dict(zip(("mean", "std"), teacher.codec.posterior(images), strict=True))

    plain = batches(samples, prompts=teacher.prompts, latents=Latents(encode), **settings)
    filled = batches(samples, prompts=teacher.prompts, latents=Latents(encode, cache), **settings)
    for epoch in range(4):
        filled(rng(epoch))
    without = teacher.without_text_encoders().prompts
    forgotten = Latents(lambda images: pytest.fail("the autoencoder is not needed any more"), cache)
    cached = batches(samples, prompts=without, latents=forgotten, **settings)
    for epoch in range(4):
        a, b = plain(rng(epoch)), cached(rng(epoch))
        assert torch.allclose(a["x0"], b["x0"], atol=1e-5)
        assert torch.equal(a["hint"], b["hint"])
        assert a["cond"].keys() == b["cond"].keys() == teacher.negative().keys()
        for name, value in a["cond"].items():
            assert torch.allclose(value, b["cond"][name], atol=1e-5)
            for row, dropped in zip(value, a["prompt_dropped"].tolist(), strict=True):
                assert torch.equal(row, teacher.negative()[name][0]) == (dropped or name == "time_ids")
        assert teacher.denoiser(a["x0"], torch.full((6,), 500.0), a["cond"]).isfinite().all()
