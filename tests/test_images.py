"""Images from everywhere, and what is said about those that cannot be used."""

import gzip
import io
import json
import struct
import time

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, UnidentifiedImageError

import scorefield.commands.teacher as train_teacher
from scorefield.commands.options import TrainTeacher
from scorefield.data.images import ImageSet, load_images
from scorefield.data.options import DataOptions
from scorefield.data.pictures import is_turned, open_image, size_of

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


def test_subfolders_that_are_numbers_keep_them(tmp_path):
    for name in ("0", "2", "0010", "11"):
        picture(tmp_path / name / "a.png")
    images = load(tmp_path)
    assert images.labels.tolist() == [0, 10, 11, 2], "in the order of the files"
    assert images.class_names == tuple(str(number) for number in range(12))
    picture(tmp_path / "999" / "a.png")
    assert load(tmp_path).labels.max() == 999, "samples of one class of many are a set"
    picture(tmp_path / "1000" / "a.png")
    with pytest.raises(ValueError, match=r"fewer than there are images.*from 0 to 1000 of 6"):
        load(tmp_path)


def test_names_beside_numbers_are_all_names(tmp_path):
    for name in ("10", "2", "x"):
        picture(tmp_path / name / "a.png")
    assert load(tmp_path).class_names == ("10", "2", "x")


def test_images_beside_class_folders_are_named_and_hidden_files_are_not_seen(classes):
    for hidden in (".a.png", ".thumbnails/a.png", "cat/.b.png"):
        picture(classes / hidden)
    assert load(classes).class_names == ("cat", "dog")
    assert len(load(classes)) == 6
    picture(classes / "grid.png")
    with pytest.raises(ValueError, match=r"class subfolders such as cat: grid\.png, for one\. Move"):
        load(classes)


@pytest.mark.parametrize("name", [
    "./pictures", "/nowhere/pictures", "~/pictures", "pictures.npy", "a/b/c", "some name", "../x", "owner/set.PNG",
    "train-labels-idx1-ubyte", "here/pictures", "-x", "pictures/", "",
])  # fmt: skip
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(tmp_path, monkeypatch, name):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **named: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    start = time.monotonic()
    with pytest.raises(ValueError, match="no such file or folder, and no data set: those of the Hugging Face Hub"):
        load(name)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["mnist", "owner/some_set-v1.5"])
def test_names_of_the_hub_are_asked_for(monkeypatch, name):
    datasets = pytest.importorskip("datasets")

    def load_dataset(asked, split):
        raise ConnectionError(f"{asked} {split}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=f"ConnectionError: {name} train"):
        load(name)


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


def test_metadata_with_a_byte_order_mark_and_a_line_separator_in_a_name(tmp_path):
    rows = [{"file_name": picture(tmp_path / name).name, "label": 0} for name in ("a\u2028b.png", "c.png")]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert len(load(tmp_path)) == 2


@pytest.mark.parametrize(("line", "message"), [
    ("{", "line 2 is no JSON"), ("[]", "line 2 must be an object"), ('{"label": 1}', "line 2 names no picture"),
    ('{"file_name": 3}', "line 2 has no image: expected the path of one; got 3"),
    ("[" * 100_000, "line 2 is JSON that is nested too deep"),
    (b'{"file_name": "a.png", "text": "the cat\x92s"}', r"line 2 is not UTF-8: byte 0x92 .*iconv -f WINDOWS-1252"),
    ('{"file_name": "a.png", "label": null}', r"a\.png has no label, and others have one"),
    ('{"file_name": "a.png", "label": 1.0}', r"a\.png has label 1\.0, a float; expected a class number"),
    ('{"file_name": "a.png", "label": true}', r"a\.png has label True, a bool"),
    ('{"file_name": "a.png", "label": -1}', r"a\.png has label -1; expected a class number from 0"),
    ('{"file_name": "gone.png", "label": 1}', r"gone\.png cannot be read: No such file"),
])  # fmt: skip
def test_a_line_that_cannot_be_used_is_named_or_left_out(tmp_path, capsys, line, message):
    name = picture(tmp_path / "a.png").name
    first = json.dumps({"file_name": name, "label": 0}).encode() + b"\n"
    (tmp_path / "metadata.jsonl").write_bytes(first + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(ValueError, match=rf"1 of 2 samples of .* cannot be used: .*{message}.*--on-bad-data skip"):
        load(tmp_path)
    assert len(load(tmp_path, on_bad_data="skip")) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "left out 1 of 2 samples" in said


@pytest.mark.parametrize("labels", [[1, "a"], [0, 10**9]])
def test_labels_that_do_not_belong_together_are_refused(tmp_path, labels):
    rows = [{"file_name": picture(tmp_path / f"{n}.png").name, "label": label} for n, label in enumerate(labels)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ValueError, match=r"labels must be .*class numbers from 0.*got (1 beside 'a'|num)"):
        load(tmp_path)


def test_classes_without_an_image_are_named(tmp_path, capsys):
    for name in ("0", "2", "5"):
        picture(tmp_path / name / "a.png")
    load(tmp_path)
    assert capsys.readouterr().err == f"warning: {tmp_path} holds no image of 3 of its 6 classes: 1, 3, 4\n"
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 1, 8, 8), np.uint8), labels=np.array([0, 9]))
    load(tmp_path / "a.npz")
    assert "a.npz holds no image of 8 of its 10 classes: 1, 2, 3, 4, 5, ...\n" in capsys.readouterr().err


def test_two_folders_of_one_number_are_refused(tmp_path):
    for name in ("7", "07", "1"):
        picture(tmp_path / name / "a.png")
    with pytest.raises(ValueError, match=r"the classes 07 and 7 are one number\. Rename one of them"):
        load(tmp_path)


@pytest.mark.parametrize(("place", "value"), [(8, b"\x63\0"), (6, b"\1\0")])
def test_an_npz_that_is_packed_strangely_or_encrypted_is_refused(tmp_path, place, value):
    """zipfile raises NotImplementedError and RuntimeError for them."""
    path = tmp_path / "a.npz"
    np.savez(path, images=np.zeros((2, 1, 8, 8), np.uint8))
    data, central = bytearray(path.read_bytes()), path.read_bytes().index(b"PK\1\2")
    data[place : place + 2] = data[central + place + 2 : central + place + 4] = value
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"a\.npz must be an npz file"):
        load(path)


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
    other = load(tmp_path / f"t10k-images-idx3-ubyte{end}", size=32)
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


@pytest.fixture
def saved(tmp_path):
    """A saved dataset of pictures with some labels out of three classes, whose names are not sorted."""
    datasets = pytest.importorskip("datasets")

    def save(labels):
        rows = {"image": [str(picture(tmp_path / f"{n}.png")) for n in range(len(labels))], "label": labels}
        kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["yes", "no", "rare"]))
        datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(tmp_path / "saved")
        return tmp_path / "saved"

    return save


def test_a_saved_dataset_keeps_its_class_numbers_and_names(saved):
    images = load(saved([0, 1, 1, 0]))
    assert images.class_names == ("yes", "no", "rare")
    assert images.labels.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("label", [-1, None])
def test_an_item_of_a_dataset_without_a_label_is_bad(saved, label):
    path = saved([2, label, 1])
    with pytest.raises(ValueError, match=rf"saved\[1\] 'image' has label {label}, none of its 3.*--on-bad"):
        load(path)
    assert load(path, on_bad_data="skip").labels.tolist() == [2, 1]


def test_transparency_is_laid_on_white(tmp_path):
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:, :4] = (10, 20, 30, 255)
    Image.fromarray(clear, "RGBA").save(tmp_path / "a.png")
    images = load(tmp_path).images
    assert images[0, :, 0, 0].tolist() == [10, 20, 30]
    assert images[0, :, 0, 7].tolist() == [255, 255, 255]


def encoded(array, kind):
    content = io.BytesIO()
    Image.fromarray(array).save(content, kind)
    return content.getvalue()


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
@pytest.mark.parametrize("value", [0, 200, 1000, 32768, 65535])
def test_sixteen_bits_become_eight_whatever_the_brightest_pixel_is(kind, value):
    """A dark image stays dark: 200 of 65,535 is 1 of 255."""
    image = open_image(encoded(np.full((8, 8), value, np.uint16), kind))
    assert image.mode == "L"
    assert np.unique(np.asarray(image)).tolist() == [round(value / 257)]


def test_floats_are_taken_from_0_to_1_and_nothing_else():
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    assert np.array_equal(np.asarray(open_image(encoded(values, "tiff"))), np.round(values * 255.0))
    for bad in (values * 255, values - 0.5, values * np.nan):
        with pytest.raises(ValueError, match=r"holds floats from .* expected \[0, 1\]"):
            open_image(encoded(bad.astype(np.float32), "tiff"))
    with pytest.raises(ValueError, match="32-bit integers"):
        open_image(encoded(np.full((8, 8), 7, np.int32), "tiff"))


def test_some_images_are_always_the_same_and_of_every_class():
    images = ImageSet(torch.zeros(100, 1, 2, 2), torch.arange(100) // 50, ("a", "b"), 2)
    few = images.some(20)
    assert torch.equal(few, images.some(20))
    assert len(few.unique()) == 20
    assert 4 < images.labels[few].sum() < 16
    assert torch.equal(images.some(100), torch.arange(100)), "all of them in order"


def test_the_spread_of_the_data_is_measured_over_all_classes():
    """Sorted by class, the first 10,000 images are all of one grey."""
    pixels = torch.cat([torch.full((10_000, 1, 1, 1), -0.5), torch.full((10_000, 1, 1, 1), 0.5)])
    images = ImageSet(pixels, torch.arange(20_000) // 10_000, ("a", "b"), 1)
    assert train_teacher.describe(TrainTeacher(), images)["sigma_data"] == 0.5


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
    assert load(tmp_path, size=5).images.unique().tolist() == [200]


def broken_exif():
    content = io.BytesIO()
    Image.new("RGB", (16, 16)).save(content, "jpeg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    return content.getvalue()


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_bytes(path.read_bytes()[:100]), lambda path: path.write_text("not a picture"),
    lambda path: picture(path, size=(3, 16)),
])  # fmt: skip
def test_bad_images_stop_the_run_or_are_left_out_and_named(tmp_path, capsys, spoil):
    rows = [{"file_name": picture(tmp_path / f"{n}.png").name, "label": n % 2} for n in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    spoil(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"1\.png.*--on-bad-data skip"):
        load(tmp_path)
    assert load(tmp_path, on_bad_data="skip").labels.tolist() == [0, 0]
    assert "1.png" in capsys.readouterr().err


def test_nothing_usable_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("no")
    with pytest.raises(ValueError, match=r"1 of 1 samples .* None is left"):
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


@pytest.mark.parametrize("name", ["0.png", "0.jpg"])
def test_a_format_that_starts_another_program_is_no_picture(tmp_path, monkeypatch, name):
    """PostScript is drawn by Ghostscript, whatever its file is named as."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("a program was started"))
    for number in range(1, 4):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{number}.png")
    header = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / name).write_bytes(header)
    assert Image.open(tmp_path / name).format == "EPS"
    with pytest.raises(ValueError, match=rf"{name} cannot be read as a picture: it begins with b'%!PS-Adobe-"):
        load(tmp_path, size=16)
    for read in (open_image, size_of, is_turned):
        with pytest.raises((ValueError, UnidentifiedImageError)):
            read(header)
