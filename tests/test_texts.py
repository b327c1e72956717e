"""What --prompts names: text, jsonl, data sets, the toy world; and the latents of the images beside them."""

import json

import latents
import numpy as np
import pytest
import texts
import tiny_pipelines as tiny
import torch
from PIL import Image

from scorefield.models import hub
from scorefield.models.prompts import PromptEncoder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.sd().save_pretrained(folder / "sd")
    return hub.load_teacher(folder / "sd").without_text_encoders()


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
    assert (found.prompts, list(found.images)) == (("a",), [tmp_path / "a.png"])


@pytest.mark.parametrize(("name", "content", "message"), [
    ("empty.txt", "\n \n", "holds no prompt"), ("bytes.txt", b"\xff\xfe\x00\x80", "be read as text"),
    ("cut.jsonl", '{"prompt": "a"}\n\n{"prompt": ', "line 3, is no JSON"),
    ("list.jsonl", "[1]\n", "line 1 must be an object"),
    ("blank.jsonl", '{"prompt": "  "}\n', "line 1 has no prompt"),
    ("none.jsonl", '{"label": 3}\n', "has no prompt"), ("nan.jsonl", '{"prompt": NaN}\n', "has no prompt"),
    ("some.jsonl", '{"prompt": "a", "image": "0.png"}\n{"prompt": "b"}\n', "1 of 2 prompts have an image"),
    ("a.csv", "prompt,image\na,b\n", "is no text"), ("a.JSON", '[{"prompt": "a"}]', "is no text"),
    ("number.jsonl", '{"prompt": "a", "image": 5}', "line 1 has no image: .* got 5"),
    ("list_image.jsonl", '{"prompt": "a", "image": ["a.png"]}', "has no image"),
    ("true.jsonl", '{"prompt": "a", "image": true}', "has no image"),
    ("blank_image.jsonl", '{"prompt": "a", "image": ""}', "has no image"),
])  # fmt: skip
def test_what_is_no_prompt_is_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, name, content)


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
    assert found.prompts == ("a mug", "a chair")
    assert [found.images[0], found.images[1]] == [tmp_path / "set" / "in.png"] * 2
    assert texts.read_texts(str(tmp_path / "set"), 1).prompts == ("a mug",)
    data = {"bytes": (tmp_path / "set" / "in.png").read_bytes(), "path": None}
    features = Features({"prompt": Value("string"), "image": Pictured()})
    for name, second in (("whole", data), ("half", None)):
        (tmp_path / name).mkdir()
        both = {"prompt": ["a", "b"], "image": [data, second]}
        Dataset.from_dict(both, features=features).to_parquet(tmp_path / name / "train.parquet")
    images = texts.read_texts(str(tmp_path / "whole")).images
    assert (len(images), images[1]) == (2, data["bytes"])
    with pytest.raises(ValueError, match="1 of 2 prompts have an image"):
        texts.read_texts(str(tmp_path / "half"))
    assert len(texts.read_texts(str(tmp_path / "half"), 1).images) == 1
    (tmp_path / "other").mkdir()
    Dataset.from_dict({"label": [3]}).to_parquet(tmp_path / "other" / "train.parquet")
    with pytest.raises(ValueError, match=r"must have a column prompt or text or caption; it has \['label'\]"):
        texts.read_texts(str(tmp_path / "other"))


def test_prompts_of_the_toy_world_have_their_renders():
    found = texts.read_texts("toyworld", 30)
    assert len(found.images) == 30
    assert (found.images[29].shape, found.images[29].dtype) == ((3, 64, 64), torch.uint8)
    assert not torch.equal(found.images[0], found.images[1])
    assert any("view" not in prompt for prompt in found.prompts)
    assert any("background" not in prompt for prompt in found.prompts)
    assert texts.read_texts("toyworld", 30, seed=1).prompts != found.prompts
    assert texts.read_texts("toyworld", 3).prompts == found.prompts[:3]


def test_tokens_are_counted_without_keeping_the_conditions(tmp_path):
    """Of many prompts at once they would not fit into memory."""

    def encode(prompts):
        return {"embeds": torch.zeros(len(prompts), 4), "num_tokens_cut": torch.arange(len(prompts))}

    encoder = PromptEncoder(tmp_path / "prompts", lambda: "x", lambda: encode)
    fetch, sizes = latents.TensorCache.fetch, []

    def noted(self, contents, *args):
        sizes.append(len(contents))
        return fetch(self, contents, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents.TensorCache, "fetch", noted)
        counts = encoder.num_cut([f"p{i}" for i in range(40)])
        assert counts == [*range(16), *range(16), *range(8)]
        assert max(sizes) == 16
        sizes.clear()
        # Of what is in the cache not even the conditions are read.
        assert encoder.dropped().num_cut([f"p{i}" for i in range(40)]) == counts
        assert not sizes
        assert encoder.num_cut(["p3", "new", "p3"]) == [3, 0, 3]
        assert sizes == [1]


# Latents.


def picture(path, number=0, size=(24, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def images(tmp_path):
    return [picture(tmp_path / f"{number}.png", number) for number in range(6)]


def test_the_latents_are_of_the_images_in_their_order(teacher, images, accelerator):
    found = latents.encode_images(images, teacher, accelerator)
    with Image.open(images[3]) as file:
        pixels = np.array(file.crop((2, 0, 22, 20)).resize((16, 16), Image.Resampling.LANCZOS))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    torch.testing.assert_close(found(torch.tensor([3])), teacher.encode(image).detach(), rtol=1e-4, atol=1e-4)
    assert found(torch.tensor([0, 3, 0])).shape == (3, 4, 8, 8)
    as_bytes = latents.encode_images([path.read_bytes() for path in images], teacher, accelerator)
    assert as_bytes.identity() == found.identity()


def test_each_image_is_an_entry_that_is_read_when_its_turn_comes(teacher, images, accelerator, monkeypatch, cache):
    """A start with all images in the cache decodes none; another one more, or one less, is that one's business."""
    whole = latents.encode_images(images[:5], teacher, accelerator)
    assert len(list(cache.rglob("*.safetensors"))) == 5
    opened, open_image = [], latents.open_image
    monkeypatch.setattr(latents, "open_image", lambda image: opened.append(image) or open_image(image))
    monkeypatch.setattr(latents, "IN_MEMORY", 0)
    stored = latents.encode_images([*images[1:5], images[5]], teacher, accelerator)
    assert opened == [images[5]]
    assert stored.kept is None
    chosen = torch.tensor([2, 0, 2])
    assert torch.equal(stored(chosen), whole(chosen + 1))
    assert stored.identity() != whole.identity()
    for file in cache.rglob("*.safetensors"):
        file.unlink()
    torch.testing.assert_close(stored(chosen), whole(chosen + 1), rtol=1e-4, atol=1e-5)


def test_the_autoencoder_sees_a_bounded_number_of_pixels(teacher, images, accelerator, monkeypatch):
    seen = []
    monkeypatch.setattr(hub.Teacher, "encode", lambda self, x: seen.append(len(x)) or torch.zeros(len(x), 4, 8, 8))
    monkeypatch.setattr(latents, "PIXELS", 2 * 16 * 16 + 5)
    latents.encode_images(images[:5], teacher, accelerator)
    assert seen == [2, 2, 1]


def test_ranks_share_the_work(teacher, images, accelerator, monkeypatch):
    """Three ranks of five images; what each of them hands to the others is put together in order."""

    class Rank:
        num_processes = 3

        def __init__(self, number):
            self.process_index = number

    alone = latents.encode_images(images[:5], teacher, accelerator)
    handed = []
    monkeypatch.setattr(latents, "gather_object", lambda own: handed.append(own) or list(alone.digests))
    for number in range(3):
        found = latents.encode_images(images[:5], teacher, Rank(number))
        assert found.identity() == alone.identity()
    assert [len(own) for own in handed] == [2, 2, 1]
    assert [digest for own in handed for digest in own] == list(alone.digests)


def test_images_that_cannot_be_used_are_named(teacher, tmp_path, accelerator, monkeypatch):
    (tmp_path / "no.png").write_text("hello")
    bad = {"lost.png": "lost.png cannot be used", "no.png": "no.png cannot be used", "0.png\0": "cannot be used"}
    small = picture(tmp_path / "small.png", size=(4, 4))
    for image, message in [*((tmp_path / name, text) for name, text in bad.items()), (small, "smaller than half"),
                           (b"hello", "the image of prompt 1 cannot be used")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            latents.encode_images([image], teacher, accelerator)
    with pytest.raises(ValueError, match=r"the images are \(20, 20\), the teacher's \(16, 16\)"):
        latents.encode_images([torch.zeros(3, 20, 20, dtype=torch.uint8)], teacher, accelerator)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="exceeds limit"):
        latents.encode_images([picture(tmp_path / "bomb.png", size=(40, 40))], teacher, accelerator)


def test_a_row_of_a_data_set_may_hold_bytes(tmp_path):
    row = json.dumps({"prompt": "a", "image": {"path": "ok.png", "bytes": None}})
    assert list(read(tmp_path, "a.jsonl", row).images) == [tmp_path / "ok.png"]
