"""What --prompts names: text, jsonl, data sets, the toy world; and the latents of the images beside them."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from PIL import Image

import distill.data as latents
import scorefield.data.texts as texts
from scorefield.cache import TensorCache, content_key, fingerprint
from scorefield.data.pictures import resized
from scorefield.data.rows import Cell, File
from scorefield.models import teacher as teachers
from scorefield.models.codec import Codec
from scorefield.models.prompts import PromptEncoder
from scorefield.training.latents import Memory


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.sd().save_pretrained(folder / "sd")
    return teachers.load_teacher(folder / "sd").without_text_encoders()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "scorefield" / "latents"


def read(tmp_path, name, content, num=0):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return texts.read_texts(str(tmp_path / name), num)


# Prompts.


@pytest.mark.parametrize(("name", "content", "prompts"), [
    ("a.txt", "a mug\n\n  a cone \n", ("a mug", "a cone")),
    ("windows.txt", "a mug\r\na cone\r\n", ("a mug", "a cone")),
    ("mark.txt", b"\xef\xbb\xbfa mug\n", ("a mug",)),
    ("mark.jsonl", b'\xef\xbb\xbf{"text": "a mug"}\n', ("a mug",)),
    ("line.txt", "a red\u2028mug\x0cand more\n", ("a red\u2028mug\x0cand more",)),
    ("line.jsonl", '{"prompt": "a red\u2028mug"}\n{"prompt": "b"}', ("a red\u2028mug", "b")),
    ("UP.JSONL", '{"prompt": "a"}', ("a",)), ("null.jsonl", '{"prompt": null, "caption": "a cone"}', ("a cone",)),
    ("prompts", "a mug", ("a mug",)),
])  # fmt: skip
def test_prompts_are_read_whole(tmp_path, name, content, prompts):
    assert read(tmp_path, name, content).prompts == prompts


def test_the_first_few(tmp_path):
    assert read(tmp_path, "a.txt", "a\nb\nc\n", num=2).prompts == ("a", "b")
    found = read(tmp_path, "a.jsonl", '{"text": "a", "image": "a.png"}\n{"text": "b", "image": "b.png"}', num=1)
    assert (found.prompts, list(found.images)) == (("a",), [File(str(tmp_path / "a.png"))])


@pytest.mark.parametrize(("name", "content", "message"), [
    ("empty.txt", "\n \n", "holds no samples"), ("bytes.txt", b"\xff\xfe\x00\x80", "is UTF-16.*iconv"),
    ("a.zip", "", "expected a folder of pictures, or a file that ends in"),
    ("a.csv", 'prompt\n"' + "a" * 200_000, "field larger than field limit"),
])  # fmt: skip
def test_what_holds_no_prompts_is_refused(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=rf"^--prompts .*{name}.*{message}"):
        read(tmp_path, name, content)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("windows.txt", b"a mug\nthe cat\x92s mug", r"line 2 is not UTF-8: byte 0x92 .*iconv -f WINDOWS"),
    ("cut.jsonl", '{"prompt": "a"}\n\n{"prompt": ', "line 3 is no JSON"),
    ("list.jsonl", '{"prompt": "a"}\n[1]\n', "line 2 must be an object"),
    ("deep.jsonl", '{"prompt": "a"}\n' + '{"a":' * 100_000, "line 2 is JSON that is nested too deep"),
    ("blank.jsonl", '{"prompt": "a"}\n{"prompt": "  "}\n', "line 2 has no prompt"),
    ("none.csv", 'prompt,label\na,1\n,3\n', "line 3 has no prompt"),
    ("nan.jsonl", '{"prompt": "a"}\n{"prompt": NaN}\n', "line 2 has no prompt.*got nan"),
    ("half.jsonl", '{"prompt": "a"}\n{"prompt": "\\ud800"}\n', "line 2 holds half of a character"),
    ("some.jsonl", '{"prompt": "a", "image": "0.png"}\n{"prompt": "b"}\n', "line 2 has no image, and other"),
    ("number.jsonl", '{"prompt": "a", "image": "0.png"}\n{"prompt": "a", "image": 5}', "line 2 has .*got 5"),
    ("true.jsonl", '{"prompt": "a"}\n{"prompt": "a", "image": true}', "line 2 has no image.*got True"),
    ("wide.csv", "prompt,label\na,1\na,b,c\n", "line 3 has more cells than the header, which has 2"),
])  # fmt: skip
def test_what_is_no_prompt_is_named_or_left_out(tmp_path, capsys, name, content, message):
    with pytest.raises(ValueError, match=rf"1 of 2 samples .*{name}, {message}.*--on-bad-data skip"):
        read(tmp_path, name, content)
    assert len(texts.read_texts(str(tmp_path / name), on_bad_data="skip").prompts) == 1
    said = capsys.readouterr().err
    assert (said.count("\n"), "left out 1 of 2 samples" in said) == (1, True)
    assert len(texts.read_texts(str(tmp_path / name), 1).prompts) == 1  # the second is not looked at


def test_more_prompts_than_there_are(tmp_path):
    with pytest.raises(ValueError, match="holds 1 prompts; got --num-prompts 2"):
        read(tmp_path, "a.txt", "a\n", num=2)


def test_data_sets_and_their_images_where_they_lie(tmp_path):
    """Paths are those of the folder; pictures in a column stay as bytes, undecoded."""
    from datasets import Dataset, Features, Value
    from datasets import Image as Pictured

    picture(tmp_path / "set" / "in.png")
    rows = {"caption": ["a mug", " a chair "], "image": ["in.png", "in.png"]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "set" / "train.parquet")
    found = texts.read_texts(str(tmp_path / "set"))
    content = (tmp_path / "set" / "in.png").read_bytes()
    assert found.prompts == ("a mug", "a chair")
    assert [found.images[0].read(), found.images[1].read()] == [content] * 2
    assert texts.read_texts(str(tmp_path / "set"), 1).prompts == ("a mug",)
    features = Features({"prompt": Value("string"), "image": Pictured()})
    for name, second in (("whole", {"bytes": content, "path": None}), ("half", None)):
        (tmp_path / name).mkdir()
        both = {"prompt": ["a", "b"], "image": [{"bytes": content, "path": None}, second]}
        Dataset.from_dict(both, features=features).to_parquet(tmp_path / name / "train.parquet")
    images = texts.read_texts(str(tmp_path / "whole")).images
    assert (len(images), images[1].read()) == (2, content)
    with pytest.raises(ValueError, match=r"half\[1\] has no image, and other prompts have one"):
        texts.read_texts(str(tmp_path / "half"))
    assert len(texts.read_texts(str(tmp_path / "half"), 1).images) == 1


def test_lists_of_prompts_that_read_alike_are_known_apart():
    lists = (("a\nb", "c"), ("a", "b\nc"), ("a", "b", "c"))
    assert len({texts.Texts(prompts).identity() for prompts in lists}) == 3


def test_prompts_of_the_toy_world_have_their_renders():
    found = texts.read_texts("toyworld", 30)
    assert len(found.images) == 30
    assert (found.images[29].shape, found.images[29].dtype) == ((3, 64, 64), torch.uint8)
    assert not torch.equal(found.images[0], found.images[1])
    assert any("view" not in prompt for prompt in found.prompts)
    assert any("background" not in prompt for prompt in found.prompts)
    assert texts.read_texts("toyworld", 30, seed=1).prompts != found.prompts
    assert texts.read_texts("toyworld", 3).prompts == found.prompts[:3]


def test_a_long_list_is_encoded_without_keeping_the_conditions(tmp_path):
    """Of many prompts at once they would not fit into memory."""
    encoded = []

    def encode(prompts):
        encoded.append(len(prompts))
        return {"embeds": torch.zeros(len(prompts), 4)}

    encoder = PromptEncoder(tmp_path / "prompts", lambda: "x", lambda: encode)
    encoder.encode([f"p{i}" for i in range(40)])
    assert encoded == [16, 16, 8]
    assert len(encoder.dropped()([f"p{i}" for i in range(40)])["embeds"]) == 40


def test_one_policy_for_long_prompts_and_one_line(tmp_path, capsys):
    """Prompts are counted by the tokenizers; no text encoder is loaded before all of them are."""

    def encode(prompts):
        return {"embeds": torch.zeros(len(prompts), 4)}

    loaded = []
    encoder = PromptEncoder(
        tmp_path / "prompts", lambda: "x", lambda: loaded.append("encoders") or encode,
        lambda: lambda prompt: max(0, len(prompt) - 5),
    )  # fmt: skip
    prompts = ["a mug", "a long one", "a cone, too"]
    with pytest.raises(ValueError, match=r"2 of 3 prompts of p\.txt .* 'a long one' by 5 tokens.*cut or skip"):
        encoder.usable(prompts, "stop", "p.txt")
    assert encoder.usable(prompts, "skip", "p.txt") == [0]
    assert encoder.usable(prompts, "cut", "p.txt") == [0, 1, 2]
    assert not loaded
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] + line[-7:] for line in said] == ["warningskipped", "warningns: cut"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(prompts)  # they have been told of
    with pytest.warns(UserWarning, match="1 of 2 prompts are too long and cut, such as 'another one'"):
        encoder(["another one", "a long one"])
    with pytest.raises(ValueError, match="none is left to use"):
        encoder.usable(prompts[1:], "skip", "p.txt")


# Latents.


def picture(path, number=0, size=(24, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def images(tmp_path):
    return [File(str(picture(tmp_path / f"{number}.png", number))) for number in range(6)]


def checked(images, teacher):
    found, faults = latents.check_images(images, teacher)
    assert not any(faults)
    return found


def test_the_latents_are_of_the_images_in_their_order(teacher, images):
    found = checked(images, teacher)
    with Image.open(images[3].name) as file:
        cut = torch.from_numpy(np.array(file.crop((2, 0, 22, 20)))).permute(2, 0, 1)
    image = resized(cut, "image", (16, 16))[None].float() / 127.5 - 1
    torch.testing.assert_close(found(torch.tensor([3])), teacher.encode(image).detach(), rtol=1e-4, atol=1e-4)
    assert found(torch.tensor([0, 3, 0])).shape == (3, 4, 8, 8)
    as_cells = checked([Cell([{"x": {"bytes": file.read()}}], 0, "x", "x") for file in images], teacher)
    assert as_cells.identity() == found.identity()


def test_each_image_is_an_entry_that_is_made_and_read_when_its_turn_comes(teacher, images, monkeypatch, cache):
    """A start with all images in the cache decodes none; another one more, or one less, is that one's business."""
    whole = checked(images[:5], teacher)
    assert not list(cache.rglob("*.safetensors")), "nothing is encoded before it is drawn"
    everything = whole(torch.arange(5))
    assert len(list(cache.rglob("*.safetensors"))) == 5
    opened, read = [], latents.read_central
    monkeypatch.setattr(latents, "read_central", lambda data, *how: opened.append(data) or read(data, *how))
    stored = checked([*images[1:5], images[5]], teacher)
    assert set(opened) == {images[5].read()}
    chosen = torch.tensor([2, 0, 2])
    assert torch.equal(stored(chosen), everything[chosen + 1])
    assert stored.identity() != whole.identity()
    for file in cache.rglob("*.safetensors"):
        file.unlink()
    assert torch.equal(whole(torch.arange(5)), everything), "they are in memory"
    assert len(opened) == 1
    again = replace(stored, latents=replace(stored.latents, memory=Memory(0)))
    torch.testing.assert_close(again(chosen), everything[chosen + 1], rtol=1e-4, atol=1e-5)
    assert len(opened) == 3


def test_the_autoencoder_sees_a_bounded_number_of_pixels(teacher, images, monkeypatch):
    seen = []
    monkeypatch.setattr(Codec, "encode", lambda self, x: seen.append(len(x)) or torch.zeros(len(x), 4, 8, 8))
    monkeypatch.setattr(latents, "PIXELS", 2 * 16 * 16 + 5)
    checked(images[:5], teacher)(torch.arange(5))
    assert seen == [2, 2, 1]


def test_entries_of_earlier_versions_are_read(teacher, images, cache):
    """Under the hash of a file and a fingerprint of autoencoder, scale and size, as they were always kept."""
    codec = teacher.codec
    facts = torch.tensor([codec.scaling, codec.shift, *teacher.size])
    earlier = TensorCache(cache, fingerprint([*codec.vae.state_dict().values(), facts]))
    earlier.store(content_key(images[0].read()), {"latents": torch.full((4, 8, 8), 7.0)})
    assert checked(images[:1], teacher)(torch.tensor([0])).unique().tolist() == [7.0]


def test_ranks_share_the_work(teacher, images):
    """Three ranks of five images; what each of them hands to the others is put together in order."""
    alone, handed = checked(images[:5], teacher), []
    judged = [(digest, "") for digest in alone.digests]
    for number in range(3):
        found, _ = latents.check_images(
            images[:5], teacher, rank=number, num_ranks=3, gather=lambda own: handed.append(own) or judged
        )
        assert found.identity() == alone.identity()
    assert [len(own) for own in handed] == [2, 2, 1]
    assert [one for own in handed for one in own] == judged


def test_images_that_cannot_be_used_are_named(teacher, images, tmp_path, monkeypatch):
    (tmp_path / "no.png").write_text("hello")
    small = picture(tmp_path / "small.png", size=(4, 4))
    bad = [*(File(str(tmp_path / name)) for name in ("lost.png", "no.png", "0.png\0")), File(str(small))]
    found, faults = latents.check_images([images[0], *bad, images[1]], teacher)
    said = ["", "lost.png cannot be read", "no.png cannot be read as", "null byte", "smaller than half", ""]
    for fault, message in zip(faults, said, strict=True):
        assert message in fault
        assert bool(message) == bool(fault)
    assert found.some([0, 5])(torch.tensor([0, 1])).shape == (2, 4, 8, 8)
    _, faults = latents.check_images([torch.zeros(3, 20, 20, dtype=torch.uint8)], teacher)
    assert "are (20, 20), the teacher's (16, 16)" in faults[0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    bomb = File(str(picture(tmp_path / "bomb.png", size=(40, 40))))
    assert "exceeds limit" in latents.check_images([bomb], teacher)[1][0]


def test_a_row_of_a_data_set_may_hold_bytes(tmp_path):
    row = json.dumps({"prompt": "a", "image": {"path": "ok.png", "bytes": None}})
    assert list(read(tmp_path, "a.jsonl", row).images) == [File(str(tmp_path / "ok.png"))]
