"""Batches for an adapter: what is drawn and when, pictures that stay together, caches that change nothing."""

import json
import math
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from PIL import Image

from controlnet.canny import Canny
from controlnet.circles import Circles
from controlnet.data import ControlBatches, replace_rows
from controlnet.degraded import Blur
from controlnet.geometry import Depth, Segmentation
from controlnet.hints import Custom, Precomputed
from controlnet.samples import load_pictures
from scorefield.cache import TensorCache
from scorefield.models.prompts import PromptEncoder, share_prompts, share_work
from scorefield.randomness import Rng
from scorefield.training.latents import Latents, Memory


def letters(prompts):
    """A text encoder: counts of letters, and the length."""
    counts = [[prompt.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for prompt in prompts]
    lengths = torch.tensor([[len(prompt)] for prompt in prompts])
    return {"encoder_hidden_states": torch.tensor(counts).float(), "length": lengths}


NULL = letters([""])


def halve(images):
    """An autoencoder's posterior: means of 2 x 2 pixels, a deviation that depends on them."""
    mean = torch.nn.functional.avg_pool2d(images, 2)
    return {"mean": mean, "std": 0.1 + mean.square()}


def batches(samples=None, **changes):
    settings = {
        "samples": samples or Circles(16, 20), "hints": [Precomputed("outline")], "size": (16, 16),
        "batch_size": 4, "prompts": letters, "null": NULL,
    }  # fmt: skip
    return ControlBatches(**settings | changes)


def equal(a, b):
    """Whether two batches hold the same, bit by bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    return torch.equal(a, b)


def rng(index, seed=0):
    return Rng(seed, step=index, index=index)


@dataclass
class Numbered:
    """Samples whose pictures all tell where each of their pixels lies in the sample."""

    number: int = 12
    height: int = 24
    width: int = 40
    kinds: dict = field(
        default_factory=lambda: {
            "image": "image", "x": "image", "lines": "lines", "mask": "mask", "labels": "labels", "depth": "depth",
            "normals": "normals",
        }
    )  # fmt: skip

    def __len__(self):
        return self.number

    def caption(self, index):
        return f"{'abcdefghijkl'[index]} sample"

    def identity(self, index):
        return f"numbered {index}"

    def load(self, index):
        rows, columns = torch.meshgrid(torch.arange(self.height), torch.arange(self.width), indexing="ij")
        place = torch.stack([rows, columns, torch.full_like(rows, index)])
        pictures = dict.fromkeys(self.kinds, place)
        return {
            name: picture.to({"labels": torch.int64, "depth": torch.float32}.get(name, torch.uint8))
            for name, picture in pictures.items()
        }


# What a batch is


def test_a_batch_holds_what_the_samples_hold():
    samples = Circles(16, 20)
    batch = batches(samples)(rng(0))
    assert batch["x0"].shape == (4, 3, 16, 16)
    assert batch["hint"].shape == (4, 1, 16, 16)
    assert batch["prompt_dropped"].tolist() == [False] * 4
    assert batch["hint_dropped"].tolist() == [[False]] * 4
    images = {tuple((samples.load(i)["image"] / 127.5 - 1).flatten().tolist()): i for i in range(20)}
    chosen = [images[tuple(x0.flatten().tolist())] for x0 in batch["x0"]]
    for row, index in enumerate(chosen):
        assert torch.equal(batch["hint"][row], samples.load(index)["outline"] / 255)
    expected = letters([samples.caption(index) for index in chosen])
    assert equal(batch["cond"], expected)


def test_an_epoch_visits_every_sample_once_and_ranks_share_it():
    samples = Numbered()
    loader = batches(samples, hints=[Precomputed("mask", 3)], size=(24, 40))
    seen = [Counter() for _ in range(2)]
    for index in range(6):
        loaded = loader.load(index, 0)
        for epoch, number in zip(loaded.epochs, loaded.indices, strict=True):
            seen[epoch][number] += 1
        assert loaded.pictures["image"][:, 2, 0, 0].tolist() == loaded.indices
    assert seen == [Counter(range(12)), Counter(range(12))]
    orders = [[n for i in range(3) for n in loader.load(i + 3 * epoch, 0).indices] for epoch in range(2)]
    assert orders[0] != orders[1]
    assert loader.load(0, 1).indices != loader.load(0, 0).indices


def test_batches_larger_than_the_data_know_their_epochs():
    loaded = batches(Circles(16, 3), batch_size=8).load(0, 0)
    assert loaded.epochs == [0, 0, 0, 1, 1, 1, 2, 2]
    assert sorted(loaded.indices[:3]) == sorted(loaded.indices[3:6]) == [0, 1, 2]


def test_a_batch_follows_from_its_number_alone():
    settings = {
        "hints": [Canny((20, 200), (200, 400)), Precomputed("mask")], "flip": True, "prompt_drop": 0.5,
        "hint_drop": 0.5, "latents": Latents(halve),
    }  # fmt: skip
    one, other = batches(**settings), batches(**settings)
    forward = [one(rng(i)) for i in range(6)]
    backward = [other(rng(i)) for i in reversed(range(6))][::-1]
    assert all(equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not equal(forward[0], one(rng(0, seed=1)))


def test_a_sample_is_treated_the_same_in_any_batch():
    # Two ranks with batches of 2, or one with batches of 4.
    settings = {"hints": [Canny((20, 200), (200, 400))], "flip": True, "prompt_drop": 0.5, "hint_drop": 0.3}
    four, two = (
        batches(**settings, latents=Latents(halve)),
        batches(**settings, latents=Latents(halve), batch_size=2),
    )
    for index in range(10):
        whole, halves = four(rng(index)), [two(rng(2 * index + rank)) for rank in range(2)]
        for name in ("x0", "hint", "prompt_dropped", "hint_dropped"):
            assert torch.equal(whole[name], torch.cat([half[name] for half in halves])), name


def test_epochs_differ_in_what_is_drawn():
    loader = batches(Circles(16, 1), batch_size=1, latents=Latents(halve), hints=[Blur((16.0, 160.0))])
    drawn = [loader(rng(epoch)) for epoch in range(30)]
    for name in ("x0", "hint"):
        assert len({tuple(batch[name].flatten().tolist()) for batch in drawn}) == 30


# Views


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("name", ["x", "lines", "mask", "labels", "depth", "normals"])
def test_image_and_map_show_the_same_place(crop, flip, name):
    samples = Numbered()
    loader = batches(samples, hints=[Precomputed("mask", 3)], size=(16, 20), crop=crop, flip=flip)
    mirrored = Counter()
    corners = set()
    for index in range(24):
        loaded = loader.load(index, 0)
        image, other = (loaded.pictures[key].float() for key in ("image", name))
        if name == "normals":  # red to the right: turned over where mirrored
            turned = image[:, 1, 0, 0] > image[:, 1, 0, 1]
            other[turned, 0] = 255 - other[turned, 0]
        assert torch.equal(image, other)
        for row in image:
            assert torch.equal(row[0] - row[0, 0, 0], torch.arange(16.0)[:, None].expand(16, 20))
            step = float(row[1, 0, 1] - row[1, 0, 0])
            assert torch.equal(row[1] - row[1, 0, 0], (step * torch.arange(20.0)).expand(16, 20))
            mirrored[step] += 1
            corners.add((float(row[0].min()), float(row[1].min())))
    assert set(mirrored) == ({1.0, -1.0} if flip else {1.0})
    if flip:
        assert abs(mirrored[1.0] - 48) < 5 * math.sqrt(96) / 2
    if crop == "center":
        assert corners == {(4, 10)}
    else:
        assert len(corners) > 50
        assert {0, 8} <= {top for top, _ in corners}
        assert max(left for _, left in corners) <= 20


def test_hints_made_of_a_mirrored_image_are_mirrored():
    # Closed form on a depth map and labels: what is made of the mirrored sample is the mirrored hint.
    samples = Numbered(height=16, width=16)
    hints = [Custom(lambda x, generators: (x[:, 1:2] + 1) / 2, 1), Depth(1.0, 99.0)]
    samples.kinds = {"image": "image", "depth": "depth"}
    samples.load = lambda index: {
        "image": torch.arange(16, dtype=torch.uint8).expand(3, 16, 16) * 16,
        "depth": 1.0 + 6 * torch.arange(16.0).expand(1, 16, 16),
    }
    batch = batches(samples, hints=hints, flip=True, batch_size=12)(rng(0))
    rising = (batch["x0"][:, 1, 0, 1] > batch["x0"][:, 1, 0, 0]).tolist()
    assert set(rising) == {True, False}
    for hint, up in zip(batch["hint"], rising, strict=True):
        assert (hint[0, 0, 1] > hint[0, 0, 0]) == up
        assert (hint[1, 0, 1] < hint[1, 0, 0]) == up  # farther is darker


def test_maps_reach_their_hints_as_they_are():
    samples = Numbered(height=16, width=16)
    samples.kinds = {"image": "image", "labels": "labels"}
    samples.load = lambda index: {
        "image": torch.zeros(3, 16, 16, dtype=torch.uint8),
        "labels": torch.tensor([0, 1, 2, 255]).repeat(4).expand(1, 16, 16),
    }
    hint = batches(samples, hints=[Segmentation(3)])(rng(0))["hint"]
    assert torch.equal(hint[0, :, 0, :4], torch.eye(3, 4))


def test_grey_and_coloured_hint_images_may_be_mixed(tmp_path):
    lines = []
    for n, channels in enumerate((1, 3)):
        Image.fromarray(np.full((16, 16, 3), 9, np.uint8)).save(tmp_path / f"{n}.png")
        shape = (16, 16, 3) if channels == 3 else (16, 16)
        Image.fromarray(np.full(shape, 51, np.uint8)).save(tmp_path / f"{n}_h.png")
        lines.append(json.dumps({"file_name": f"{n}.png", "text": "a", "hint_file_name": f"{n}_h.png"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    samples = load_pictures(tmp_path, (16, 16), maps={"hint": "image"})
    hint = batches(samples, hints=[Precomputed("hint", 3)], batch_size=2)(rng(0))["hint"]
    assert torch.allclose(hint, torch.full((2, 3, 16, 16), 0.2))


def test_examples_are_plain_and_always_the_same():
    samples = Numbered()
    loader = batches(
        samples, hints=[Precomputed("mask", 3)], size=(16, 20), crop="random", flip=True, prompt_drop=1.0,
        hint_drop=1.0, latents=Latents(halve),
    )  # fmt: skip
    made = loader.examples([3, 7])
    assert equal(made, loader.examples([3, 7]))
    images = samples.load(3)["image"][:, 4:20, 10:30] / 127.5 - 1
    assert torch.allclose(made["images"][0], images, atol=1e-6)
    assert torch.allclose(made["hint"][0], (images + 1) / 2, atol=1e-6)
    assert equal(made["cond"], letters(["d sample", "h sample"]))
    mean, std = halve(images[None]).values()
    assert ((made["x0"][0] - mean).abs() / std).max() < 6
    assert torch.equal(loader.examples([7])["x0"][0], made["x0"][1])


def test_examples_are_made_a_batch_at_a_time():
    """At full size all of them at once would not fit, where training does."""
    calls = []

    def encode(images):
        calls.append(len(images))
        return halve(images)

    settings = {"hints": [Blur((16.0, 160.0))], "latents": Latents(encode)}
    made = batches(Numbered(), **settings, batch_size=2).examples(range(5))
    assert calls == [2, 2, 1]
    assert equal(made, batches(Numbered(), **settings, batch_size=8).examples(range(5)))
    calls.clear()
    batches(Numbered(), **{**settings, "latents": Latents(encode, batch_size=3)}, batch_size=8).examples(range(5))
    assert calls == [3, 2]


# What is dropped


def visits_dropped(loader, num_samples, num_epochs, name="prompt_dropped"):
    """(epochs, samples) of what was dropped."""
    table = torch.zeros(num_epochs, num_samples)
    for index in range(num_epochs * num_samples // loader.batch_size):
        loaded = loader.load(index, 0)
        batch = loader.finish(loaded, 0)
        table[loaded.epochs, loaded.indices] = batch[name].float().reshape(-1)
        zero = batch["hint"].flatten(1).abs().amax(1) == 0
        assert torch.equal(zero, batch["hint_dropped"][:, 0])
        for row, dropped in enumerate(batch["prompt_dropped"].tolist()):
            length = int(batch["cond"]["length"][row])
            assert length == (0 if dropped else len(loader.samples.caption(loaded.indices[row])))
    return table


def check_binomial(table, probability):
    """Counts over epochs and over samples have mean and variance of independent draws."""
    epochs, samples = table.shape
    deviation = math.sqrt(probability * (1 - probability))
    assert abs(float(table.mean()) - probability) < 4 * deviation / math.sqrt(table.numel())
    for counts, number in ((table.sum(0), epochs), (table.sum(1), samples)):
        assert counts.min() > 0  # frozen in a cache, it would be 0 or all of them
        assert counts.max() < number
        ratio = float(counts.var()) / (number * probability * (1 - probability))
        assert abs(ratio - 1) < 4 * math.sqrt(2 / (len(counts) - 1))


@pytest.mark.parametrize("cached", [False, True])
def test_prompts_are_dropped_anew_in_every_epoch(tmp_path, cached):
    encoder = PromptEncoder(tmp_path, lambda: "letters", lambda: letters)
    if cached:
        share_prompts(encoder, [Circles(16, 40).caption(i) for i in range(40)])
        encoder = encoder.dropped()
    loader = batches(Circles(16, 40), batch_size=40, prompts=encoder if cached else letters, prompt_drop=0.3)
    table = visits_dropped(loader, 40, 40)
    check_binomial(table, 0.3)
    assert not torch.equal(table[0], table[1])


@pytest.mark.parametrize("spoil", [
    lambda data: b"", lambda data: data[:-7], lambda data: bytes(len(data)), lambda data: data[:-112] + bytes(112),
])  # fmt: skip
def test_damaged_prompts_are_made_again_before_the_encoder_is_dropped(tmp_path, spoil):
    encoder, captions = PromptEncoder(tmp_path, lambda: "letters", lambda: letters), ["a mug", "a cone"]
    share_prompts(encoder, captions)
    path = TensorCache(tmp_path, "letters").path("a cone")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.warns(UserWarning, match="is damaged .*; it is made again"):
        assert share_prompts(encoder, captions) == 1
    assert equal(encoder.dropped()(captions), letters(captions))


def test_hints_are_dropped_anew_and_apart_from_prompts():
    loader = batches(Circles(16, 40), batch_size=40, prompt_drop=0.5, hint_drop=0.25)
    prompts, hints = (visits_dropped(loader, 40, 40, name) for name in ("prompt_dropped", "hint_dropped"))
    check_binomial(hints, 0.25)
    both = float((prompts * hints).mean())
    assert abs(both - 0.125) < 4 * math.sqrt(0.125 * 0.875 / hints.numel())


def test_of_several_hints_each_is_dropped_by_itself():
    loader = batches(
        Circles(16, 40), hints=[Precomputed("mask", 3), Precomputed("outline")], batch_size=40, hint_drop=0.5
    )
    seen = Counter()
    for index in range(10):
        batch = loader(rng(index))
        for hint, dropped in zip(batch["hint"], batch["hint_dropped"].tolist(), strict=True):
            assert [bool(hint[:3].any()), bool(hint[3:].any())] == [not gone for gone in dropped]
            seen[tuple(dropped)] += 1
    assert len(seen) == 4
    assert min(seen.values()) > 60


def test_dropping_changes_nothing_else():
    plain = batches(hints=[Canny()], latents=Latents(halve), flip=True)
    dropping = batches(hints=[Canny()], latents=Latents(halve), flip=True, prompt_drop=0.5, hint_drop=0.5)
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


class Counting:
    """The posterior, and how many images it has seen."""

    def __init__(self, images=0):
        self.images = images

    def __call__(self, images):
        self.images += len(images)
        return halve(images)


def test_cached_latents_are_those_made_on_the_way(tmp_path):
    settings = {"flip": True, "prompt_drop": 0.5, "hints": [Canny()]}
    encode = Counting()
    plain = batches(**settings, latents=Latents(halve))
    cached = batches(**settings, latents=Latents(encode, TensorCache(tmp_path, "halve")))
    for round_ in range(2):
        for index in range(15):
            assert equal(cached(rng(index)), plain(rng(index)))
        if round_ == 0:
            seen = encode.images
            assert 20 < seen <= 40  # 20 samples, mirrored or not
    assert encode.images == seen


def test_what_is_kept_is_the_posterior_not_a_sample(tmp_path):
    latents = Latents(halve, TensorCache(tmp_path, "halve"))
    loader = batches(Circles(16, 1), batch_size=1, latents=latents)
    x0 = torch.cat([loader(rng(epoch))["x0"] for epoch in range(400)])
    mean, std = halve(Circles(16, 1).load(0)["image"][None] / 127.5 - 1).values()
    standard = (x0 - mean) / std
    assert abs(float(standard.mean())) < 4 / math.sqrt(standard.numel())
    assert abs(float(standard.std()) - 1) < 0.02
    assert (standard.mean(0).abs() < 5 / 20).all()  # independent in every pixel and epoch


def test_a_base_that_was_trained_on_means_gets_means():
    loader = batches(Circles(16, 1), batch_size=1, latents=Latents(halve), sampled=False)
    mean = halve(Circles(16, 1).load(0)["image"][None] / 127.5 - 1)["mean"]
    assert torch.equal(loader(rng(0))["x0"], mean)
    assert torch.equal(loader(rng(7))["x0"], mean)


def test_what_is_drawn_first_is_encoded_by_its_rank_and_read_by_all(tmp_path):
    """Two ranks that share an epoch encode each image once; then, with the batches exchanged, none at all."""
    cache, encoders = TensorCache(tmp_path, "halve"), [Counting(), Counting()]
    ranks = [batches(latents=Latents(encode, cache)) for encode in encoders]
    for step in range(2):
        for rank in range(2):
            ranks[rank](rng(2 * step + rank))
    assert [encode.images for encode in encoders] == [8, 8], "two batches of four each, of twenty samples"
    ranks[0](rng(4))
    for number in range(5):
        ranks[1](rng(number))
    assert [encode.images for encode in encoders] == [12, 8]


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
    folder = tmp_path / "images"
    folder.mkdir()

    def write(captions, seeds):
        lines = []
        for n, (caption, seed) in enumerate(zip(captions, seeds, strict=True)):
            pixels = np.random.RandomState(seed).randint(0, 256, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{n}.png")
            lines.append(json.dumps({"file_name": f"{n}.png", "text": caption}))
        (folder / "metadata.jsonl").write_text("\n".join(lines))

    def made(batch_size=4, prompt_drop=0.0):
        """Images and prompts that had to be encoded."""
        encode, asked = Counting(), []
        encoder = PromptEncoder(tmp_path / "texts", lambda: "e", lambda: lambda p: asked.extend(p) or letters(p))
        samples = load_pictures(folder, (16, 16), cache=tmp_path / "cache")
        loader = batches(
            samples, hints=[Canny()], prompts=encoder, batch_size=batch_size, prompt_drop=prompt_drop,
            latents=Latents(encode, TensorCache(tmp_path / "latents", "halve")),
        )  # fmt: skip
        share_prompts(encoder, [samples.caption(n) for n in range(4)])
        expected = batches(
            samples, hints=[Canny()], batch_size=batch_size, prompt_drop=prompt_drop, latents=Latents(halve)
        )
        for index in range(4 // batch_size):
            assert equal(loader(rng(index)), expected(rng(index)))
        return encode.images, asked

    write(["a b", "c", "d", "e"], [1, 2, 3, 4])
    assert made() == (4, ["a b", "c", "d", "e"])
    assert made() == (0, [])
    assert made(batch_size=2, prompt_drop=0.5) == (0, [])  # choices of the training are in no name
    write(["a b", "c", "changed", "e"], [1, 2, 3, 4])
    assert made() == (0, ["changed"])
    write(["a b", "c", "changed", "e"], [1, 9, 3, 4])
    assert made() == (1, [])
    write(["a b", "c", "d", "e"], [1, 2, 3, 4])
    assert made() == (0, [])
    write(["c", "a b", "d", "e"], [2, 1, 4, 3])  # the same in another order
    assert made() == (0, [])


def test_another_autoencoder_size_or_conversion_is_another_entry(tmp_path):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}')

    def name(size, **options):
        samples = load_pictures(tmp_path, size, **options)
        return batches(samples, hints=[Canny()], size=size, latents=Latents(halve)).load(0, 0).names[0]

    names = [name((16, 16)), name((32, 32)), name((16, 32)), name((16, 16), convert=True)]
    assert len(set(names)) == 4
    paths = {TensorCache(tmp_path, identity).path(names[0]) for identity in ("first", "second")}
    assert len(paths) == 2


def test_memory_takes_what_fits_and_keeps_it():
    memory = Memory(100)
    entry = {"x": torch.zeros(10)}
    memory.keep("a", entry)
    memory.keep("b", entry)
    memory.keep("c", entry)
    memory.keep("a", entry)
    assert [memory.get(name) is not None for name in "abc"] == [True, True, False]
    memory.keep("d", {"x": torch.zeros(5)})
    assert memory.get("d") is not None
    assert memory.used == 100


def test_samples_and_latents_are_read_once_while_they_fit(tmp_path):
    loads = Counter()

    class Watched(Circles):
        def load(self, index):
            loads[index] += 1
            return super().load(index)

    cache = TensorCache(tmp_path, "halve")
    samples = Watched(16, 8)
    loader = batches(samples, latents=Latents(halve, cache, Memory(2**20)))
    epochs = [[loader(rng(i + 2 * epoch))["hint"] for i in range(2)] for epoch in range(3)]
    assert len(epochs) == 3
    assert set(loads.values()) == {1}
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    loader(rng(6))
    assert not list(tmp_path.rglob("*.safetensors"))
    loads.clear()
    forgetful = batches(samples, memory=Memory(0))
    for i in range(4):
        forgetful(rng(i))
    assert set(loads.values()) == {2}


# Work that ranks share


def run_ranks(num_items, speeds):
    """Ranks as threads that take some time for each item: who stored what, who did what, who ended when."""
    stored, did = {}, [[] for _ in speeds]
    lock, ended = threading.Lock(), [0.0] * len(speeds)
    start = time.perf_counter()

    def work(rank):
        def do(some):
            time.sleep(speeds[rank] * len(some))
            with lock:
                stored.update(dict.fromkeys(some, rank))
                did[rank] += some

        share_work(
            range(num_items), done=stored.__contains__, do=do, rank=rank, num_ranks=len(speeds), batch_size=4
        )
        ended[rank] = time.perf_counter() - start

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(speeds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return stored, did, ended


def test_a_slow_ranks_share_is_taken_over_by_the_fast():
    stored, did, ended = run_ranks(60, [0.001, 0.001, 0.1])
    assert set(stored) == set(range(60))
    # Alone the slow rank would be busy with its 20 items for 2 s; a batch of 4 takes it 0.4 s.
    assert max(ended) - min(ended) < 1.2
    assert len(did[2]) < 16
    assert did[0][:20] == list(range(0, 60, 3))
    assert sum(map(len, did)) <= 60 + 3 * 2 * 4 + 12


def test_one_rank_does_all_in_batches_and_nothing_twice():
    calls = []
    stored = {3, 4}
    count = share_work(range(10), done=stored.__contains__, do=calls.append, batch_size=3)
    assert calls == [[0, 1, 2], [5, 6, 7], [8, 9]]
    assert count == 8
    assert share_work([], done=bool, do=calls.append) == 0
    assert share_work(range(3), done=lambda item: True, do=calls.append, num_ranks=2) == 0


def test_what_is_last_is_done_even_if_what_came_before_it_was_done():
    calls = []
    share_work(range(4), done={3}.__contains__, do=calls.append, batch_size=10)
    assert calls == [[0, 1, 2]]


# Reading ahead


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_reading_ahead_changes_nothing(num_ranks):
    settings = {"hints": [Canny()], "flip": True, "prompt_drop": 0.5, "latents": Latents(halve)}
    plain, ahead = batches(**settings), batches(**settings).ahead(num_ranks)
    for index in (0, num_ranks, 2 * num_ranks, 7, 7 + num_ranks, 1, 1):  # a restart in between
        assert equal(ahead(rng(index)), plain(rng(index)))
    assert equal(ahead(rng(1, seed=5)), plain(rng(1, seed=5)))


def test_the_next_batch_is_loaded_meanwhile(monkeypatch):
    loader = batches()
    load, asked = ControlBatches.load, []
    monkeypatch.setattr(ControlBatches, "load", lambda self, *which: asked.append(which) or load(self, *which))
    ahead = loader.ahead()
    ahead(rng(0))
    for _ in range(100):
        if len(asked) == 2:
            break
        time.sleep(0.02)
    assert sorted(asked) == [(0, 0), (1, 0)]
    ahead(rng(1))
    assert asked.count((1, 0)) == 1


def test_a_fault_met_while_reading_ahead_is_raised_with_its_batch():
    class Failing(Circles):
        def load(self, index):
            if index == 5:
                raise ValueError("5.png cannot be read")
            return super().load(index)

    ahead = batches(Failing(16, 8)).ahead()
    bad = next(n for n in range(2) if 5 in batches(Circles(16, 8)).load(n, 0).indices)
    if bad == 1:
        ahead(rng(0))
    with pytest.raises(ValueError, match=r"5\.png cannot be read"):
        ahead(rng(bad))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hints": []}, "need a hint and batch_size >= 1"),
        ({"batch_size": 0}, "need a hint and batch_size >= 1"),
        ({"prompt_drop": 1.5}, r"prompt_drop and hint_drop must lie in \[0, 1\]"),
        ({"hint_drop": -0.1}, r"prompt_drop and hint_drop must lie in \[0, 1\]"),
        ({"hints": [Depth()]}, "Depth is made of 'depth', but the samples hold image, outline, mask only"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        batches(**changes)


def test_random_crops_have_no_cache(tmp_path):
    latents = Latents(halve, TensorCache(tmp_path, "halve"))
    with pytest.raises(ValueError, match="latents of random crops cannot be kept"):
        batches(crop="random", latents=latents)


def test_samples_too_small_for_a_batch_say_so():
    with pytest.raises(ValueError, match="16 x 16 has no part of 16 x 24"):
        batches(size=(16, 24), hints=[Blur()])(rng(0))
