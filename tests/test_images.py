"""Images from everywhere, and what is said about those that cannot be used."""

import gzip
import json
import struct

import numpy as np
import pytest
import torch
from images import DataOptions, ImageSet, load_images
from PIL import Image

RNG = np.random.RandomState(0)


def picture(path, size=(16, 16), mode="RGB", value=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], *([len(mode)] if len(mode) > 1 else []))
    pixels = RNG.randint(0, 256, shape) if value is None else np.full(shape, value)
    Image.fromarray(pixels.astype(np.uint8), mode).save(path)
    return path


def load(path, **options):
    return load_images(DataOptions(data=str(path), **options))


def batch(images, chosen=None, seed=0):
    chosen = torch.arange(len(images)) if chosen is None else chosen
    return images.batch(chosen, torch.Generator().manual_seed(seed))


@pytest.fixture
def classes(tmp_path):
    for name in ("cat", "dog"):
        for number in range(3):
            picture(tmp_path / name / f"{number}.png")
    return tmp_path


def test_class_folders(classes):
    images = load(classes)
    assert images.class_names == ("cat", "dog")
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.shape == (3, 16, 16)
    first = np.asarray(Image.open(classes / "cat" / "0.png")).transpose(2, 0, 1)
    assert torch.equal(batch(images).images[0], torch.tensor(first).float() / 127.5 - 1)


def test_a_flat_folder_has_one_class(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.jpg")
    images = load(tmp_path)
    assert images.num_classes == 1
    assert len(images) == 2


@pytest.mark.parametrize(("labels", "names", "numbers"), [
    (["b", "a", "b"], ("a", "b"), [1, 0, 1]), ([2, 0, 1], ("0", "1", "2"), [2, 0, 1]),
    ([None, None, None], ("image",), [0, 0, 0]),
])  # fmt: skip
def test_metadata(tmp_path, labels, names, numbers):
    rows = [{"file_name": picture(tmp_path / f"{n}.png").name, "label": label} for n, label in enumerate(labels)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    images = load(tmp_path)
    assert images.class_names == names
    assert images.labels.tolist() == numbers


@pytest.mark.parametrize("line", ["{", "[]", '{"label": 1}', '{"file_name": 3}'])
def test_broken_metadata_is_named_with_its_line(tmp_path, line):
    name = picture(tmp_path / "a.png").name
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name}) + "\n" + line)
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2: expected"):
        load(tmp_path)


@pytest.mark.parametrize("labels", [[1, "a"], [1, None], [-1, 0], [0, 10**9], [0.5, 1.5], [True, False]])
def test_labels_of_no_class_are_refused(tmp_path, labels):
    rows = [{"file_name": picture(tmp_path / f"{n}.png").name, "label": label} for n, label in enumerate(labels)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ValueError, match=r"labels must be|class numbers must be"):
        load(tmp_path)


def idx(path, array, magic=None, pack=lambda content: content):
    header = struct.pack(f">{array.ndim + 1}I", magic or 0x800 + array.ndim, *array.shape)
    path.write_bytes(pack(header + array.astype(np.uint8).tobytes()))


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_of_the_mnist_family(tmp_path, packed):
    end, pack = (".gz", gzip.compress) if packed else ("", lambda content: content)
    pixels, labels = RNG.randint(0, 256, (5, 28, 28)), np.array([0, 1, 2, 1, 0])
    for part in ("train", "t10k"):
        idx(tmp_path / f"{part}-images-idx3-ubyte{end}", pixels if part == "train" else 255 - pixels, pack=pack)
        idx(tmp_path / f"{part}-labels-idx1-ubyte{end}", labels, pack=pack)
    images = load(tmp_path)
    assert images.labels.tolist() == labels.tolist()
    assert torch.equal(images.images[:, 0], torch.tensor(pixels, dtype=torch.uint8))
    other = load(tmp_path / f"t10k-images-idx3-ubyte{end}", resolution=32)
    assert other.shape == (1, 32, 32)


@pytest.mark.parametrize("spoil", ["cut", "magic", "labels", "empty", "gzip"])
def test_spoilt_idx_files_are_refused(tmp_path, spoil):
    path = tmp_path / "train-images-idx3-ubyte"
    idx(path, RNG.randint(0, 256, (5, 4, 4)), magic=7 if spoil == "magic" else None)
    idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(4 if spoil == "labels" else 5))
    if spoil in ("cut", "empty"):
        path.write_bytes(path.read_bytes()[: 50 if spoil == "cut" else 0])
    if spoil == "gzip":
        path.rename(path.with_name(path.name + ".gz"))
    with pytest.raises(ValueError, match="train-images-idx3-ubyte"):
        load(tmp_path)


def test_a_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [str(picture(tmp_path / f"{n}.png")) for n in range(4)], "label": [0, 1, 1, 0]}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["no", "yes"]))
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    images = load(tmp_path / "saved")
    assert images.class_names == ("no", "yes")
    assert images.labels.tolist() == [0, 1, 1, 0]


def test_transparency_is_laid_on_white_and_sixteen_bits_become_eight(tmp_path):
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:, :4] = (10, 20, 30, 255)
    Image.fromarray(clear, "RGBA").save(tmp_path / "a.png")
    images = load(tmp_path).images
    assert images[0, :, 0, 0].tolist() == [10, 20, 30]
    assert images[0, :, 0, 7].tolist() == [255, 255, 255]
    deep = tmp_path / "deep"
    deep.mkdir()
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(deep / "a.png")
    assert load(deep).images.unique().tolist() == [128]


def test_colours_follow_the_first_image_or_the_option(tmp_path):
    picture(tmp_path / "a.png", mode="L")
    picture(tmp_path / "b.png")
    assert load(tmp_path).shape[0] == 1
    assert load(tmp_path, channels="rgb").shape[0] == 3


def test_the_central_square_is_taken_and_resized(tmp_path):
    wide = np.zeros((10, 30), np.uint8)
    wide[:, 10:20] = 200
    Image.fromarray(wide, "L").save(tmp_path / "a.png")
    assert load(tmp_path).images.unique().tolist() == [200]
    assert load(tmp_path, resolution=5).images.unique().tolist() == [200]


@pytest.mark.parametrize("spoil", ["cut", "text", "tiny", "missing"])
@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_bad_images_stop_the_run_or_are_left_out_and_named(tmp_path, capsys, spoil, choice):
    rows = [{"file_name": picture(tmp_path / f"{n}.png").name, "label": n % 2} for n in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    bad = tmp_path / "1.png"
    if spoil == "cut":
        bad.write_bytes(bad.read_bytes()[:100])
    elif spoil == "text":
        bad.write_text("not a picture")
    elif spoil == "tiny":
        picture(bad, size=(3, 16))
    else:
        bad.unlink()
    if choice == "stop":
        with pytest.raises(ValueError, match=r"1\.png.*--on-bad-data skip"):
            load(tmp_path)
        return
    images = load(tmp_path, on_bad_data="skip")
    assert images.labels.tolist() == [0, 0]
    assert "left out 1 unusable" in capsys.readouterr().out


def test_nothing_usable_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("no")
    with pytest.raises(ValueError, match="no usable image among 1"):
        load(tmp_path, on_bad_data="skip")


def test_random_crops_and_flips_come_from_the_generator():
    pixels = (torch.arange(36 * 36) / (36 * 36)).view(36, 36).expand(64, 1, 36, 36)
    images = ImageSet(pixels, torch.zeros(64, dtype=torch.long), ("image",), 32, flip=True)
    one, same, other = (batch(images, seed=seed).images for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    rising = (one[:, 0, 0].diff(dim=1) > 0).all(1)
    assert 10 < rising.sum() < 54
    corners = torch.where(rising, one[:, 0, 0, 0], one[:, 0, 0, -1]) * 36 * 36
    assert set((corners.round() % 36).tolist()) == {0, 1, 2, 3, 4}
    assert set((corners.round() // 36).tolist()) == {0, 1, 2, 3, 4}
