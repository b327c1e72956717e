"""Own samples: folders and data sets, what cannot be used and how it is named, pictures made to fit."""

import io
import json
import os

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from controlnet import samples as module
from controlnet.samples import load_pictures
from scorefield.data.pictures import View, as_values, choose_view, covering, read_picture, resized

SIZE, EDGES = (16, 16), {"edges": "lines"}


def pixels(height=24, width=20, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def save(array, path, orientation=1):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(array).save(path, exif=exif)


def write_rows(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "images"
    path.mkdir()
    for n in range(4):
        save(pixels(seed=n), path / f"{n}.png")
        save(pixels(channels=1), path / f"{n}_e.png")
    write_rows(path, [
        {"file_name": f"{n}.png", "text": f"picture {n}", "edges_file_name": f"{n}_e.png"} for n in range(4)
    ])  # fmt: skip
    return path


def edit(folder, number, **changes):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[number] = {name: value for name, value in (rows[number] | changes).items() if value is not ...}
    write_rows(folder, rows)


def test_a_folder_is_read_as_it_is(folder):
    samples = load_pictures(folder, (24, 20), maps=EDGES)
    assert samples.kinds == {"image": "image", "edges": "lines"}
    assert [samples.caption(n) for n in range(len(samples))] == [f"picture {n}" for n in range(4)]
    sample = samples.load(2)
    assert np.array_equal(sample["image"].permute(1, 2, 0), pixels(seed=2))
    assert np.array_equal(sample["edges"][0], pixels(channels=1))
    save(pixels(20, 24), folder / "0.png", orientation=6)  # lies as its Exif tag says
    edit(folder, 0, text=...)
    turned = load_pictures(folder, (24, 20), text=None)
    assert np.array_equal(turned.load(0)["image"].permute(1, 2, 0), np.rot90(pixels(20, 24), -1))
    assert turned.caption(0) == ""


def test_data_sets_of_the_hub_library_are_read_too(folder, tmp_path):
    columns = {"picture": "", "edges": "_e"}
    rows = {name: [str(folder / f"{n}{end}.png") for n in range(4)] for name, end in columns.items()}
    data = datasets.Dataset.from_dict({"text": [f"picture {n}" for n in range(4)], **rows})
    for column in columns:
        data = data.cast_column(column, datasets.Image())
    expected = load_pictures(folder, SIZE, maps=EDGES)
    data.save_to_disk(tmp_path / "saved")
    for source in (data, tmp_path / "saved"):
        samples = load_pictures(source, SIZE, maps=EDGES)
        for n in range(4):
            assert (samples.caption(n), samples.identity(n)) == (expected.caption(n), expected.identity(n))
            ours, theirs = samples.load(n), expected.load(n)
            assert all(torch.equal(ours[name], theirs[name]) for name in ("image", "edges"))
    holes = datasets.Dataset.from_dict({"text": ["a", "b"], "image": [str(folder / "0.png"), None]})
    for source, options, message in (
        (data, {"maps": {"depth": "depth"}}, r"no column depth of pictures; it has \['text', 'picture', 'edg"),
        (data, {"text": "caption"}, "has no column 'caption' of captions; it has"),
        (holes.cast_column("image", datasets.Image()), {}, r"data set\[1\] names no picture"),
    ):
        with pytest.raises(ValueError, match=message):
            load_pictures(source, SIZE, **options)


def test_the_toy_worlds_export_is_read_with_its_hints(tmp_path):
    from toyworld.data import export_folder

    maps = {"depth": "image", "normals": "normals", "mask": "mask", "edges": "lines"}
    sample = load_pictures(export_folder(tmp_path / "world", 3, size=32), (32, 32), maps=maps).load(1)
    assert {name: tuple(picture.shape) for name, picture in sample.items()} == {
        "image": (3, 32, 32), "depth": (1, 32, 32), "normals": (3, 32, 32), "mask": (1, 32, 32),
        "edges": (1, 32, 32),
    }  # fmt: skip
    assert set(sample["edges"].unique().tolist()) == {0, 255}


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DEEP = pixels(channels=1).astype(np.uint16) * 257
BAD = {
    "transparent": ("0.png", lambda p: save(pixels(channels=4), p), r"0\.png is partly transparent \(RGBA\)"),
    "grey": ("0.png", lambda p: save(pixels(channels=1), p), r"0\.png is greyscale; expected 8 bits in colour"),
    "16 bits": ("0.png", lambda p: save(DEEP, p), r"0\.png is of 16 bits; expected 8 bits in colour"),
    "cut": ("0.png", cut, r"0\.png cannot be read as a picture: "),
    "empty": ("0.png", lambda p: p.write_bytes(b""), r"0\.png cannot be read as a picture: it is empty\."),
    "text": ("0.png", lambda p: p.write_text("not found"), r"it begins with b'not found', as no format"),
    "missing": ("0.png", lambda p: p.unlink(), r"0\.png cannot be read: No such file"),
    "a folder": ("0.png", lambda p: (p.unlink(), p.mkdir()), r"0\.png is a folder; expected a regular file"),
    "small": (
        "0.png", lambda p: (save(pixels(7, 20), p), save(pixels(7, 20, 1), p.with_name("0_e.png"))),
        r"0\.png is 20 x 7, less than half of the 16 x 16",
    ),
    "map of another size": (
        "0_e.png", lambda p: save(pixels(20, 24, 1), p), r"0_e\.png is 24 x 20, but its image .*0\.png is 20 x 24",
    ),
    "transparent map": ("0_e.png", lambda p: save(pixels(channels=4), p), r"0_e\.png is partly .* --convert\."),
    "map of 16 bits": ("0_e.png", lambda p: save(DEEP, p), r"of 16 bits; .* or read it as numbers: kind depth\."),
    "missing map": ("0_e.png", lambda p: p.unlink(), r"0_e\.png cannot be read: No such file"),
    "empty caption": ("", {"text": " \n"}, r"0\.png has an empty caption"),
    "null caption": ("", {"text": None}, r"0\.png has no caption"),
    "no caption": ("", {"text": ...}, r"0\.png has no caption"),
    "a number": ("", {"text": 3}, r"0\.png has the caption 3, not a text"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_data_is_named_and_stopped_or_skipped(folder, tmp_path, capsys, what):
    """Also where the sample was checked before it went bad."""
    load_pictures(folder, SIZE, maps=EDGES, cache=tmp_path / "cache")
    name, damage, message = BAD[what]
    edit(folder, 0, **damage) if not name else damage(folder / name)
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(ValueError, match=r"1 of 4 samples of .* cannot be used: .*" + message):
            load_pictures(folder, SIZE, maps=EDGES, cache=cache)
        samples = load_pictures(folder, SIZE, maps=EDGES, on_bad_data="skip", cache=cache)
        assert len(samples) == len(samples.digests) == 3
        assert samples.caption(0) == "picture 1"
        expected = resized(torch.from_numpy(pixels(seed=1)).permute(2, 0, 1), "image", (19, 16))
        assert np.array_equal(samples.load(0)["image"], expected)
        assert str(folder / "0") in capsys.readouterr().err


def test_all_bad_files_are_counted_and_the_first_ones_named(folder):
    for n in range(4):
        (folder / f"{n}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"4 of 4 samples.*0\.png.*1\.png.*3\.png.*None is left\. Repair them\.$"):
        load_pictures(folder, SIZE, on_bad_data="skip")


@pytest.mark.parametrize("name", ["transparent", "grey", "16 bits"])
def test_unusual_modes_can_be_converted(folder, name):
    BAD[name][1](folder / "0.png")
    image = load_pictures(folder, SIZE, convert=True).load(0)["image"]
    assert image.shape == (3, 19, 16)
    assert image.float().std() > 20


def test_grey_models_take_grey_images(folder):
    for n in range(4):
        save(pixels(channels=1, seed=n), folder / f"{n}.png")
    assert np.array_equal(
        load_pictures(folder, (24, 20), channels=1).load(1)["image"][0], pixels(channels=1, seed=1)
    )
    save(pixels(), folder / "0.png")
    with pytest.raises(ValueError, match=r"0\.png is in colour; expected 8 bits in grey"):
        load_pictures(folder, SIZE, channels=1)


@pytest.mark.parametrize(("source", "options", "message"), [
    ("nothing/here/at/all", {}, "no such file or folder"),
    (3, {}, r"expected a folder, or a datasets.Dataset of one split; got int"),
    (None, {"maps": {"depth": "depth"}}, r'no depth: expected it under "depth_file_name"; .*line 1 has'),
    (None, {"maps": {"edges": "outlines"}}, "unknown kind of picture 'outlines'"),
    (None, {"maps": {"image": "image"}}, "a map cannot be called image"),
    (None, {"channels": 4}, "1 or 3 channels"),
    (None, {"on_bad_data": "ignore"}, "on_bad_data must be stop or skip"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused(folder, source, options, message):
    with pytest.raises(ValueError, match=message):
        load_pictures(source or folder, SIZE, **options)


def test_a_folder_without_maps_or_pictures_says_what_it_lacks(folder, tmp_path):
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"0\.png has no depth, which a metadata\.jsonl must name"):
        load_pictures(folder, SIZE, maps={"depth": "depth"}, text=None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no samples.* Expected are pictures in a folder"):
        load_pictures(tmp_path / "empty", SIZE)


@pytest.mark.parametrize(("tag", "map_tag", "said"), [(6, 1, True), (6, 6, False), (1, 3, True)])
def test_a_turned_image_beside_an_untagged_map_is_told_of(folder, tmp_path, capsys, tag, map_tag, said):
    save(pixels(20, 20), folder / "1.png", tag)
    save(pixels(20, 20), folder / "1_e.png", map_tag)
    for _ in range(2):  # the second time it was checked before
        load_pictures(folder, SIZE, maps={"edges": "image"}, cache=tmp_path / "cache")
        assert ("1 of 4 images, such as" in capsys.readouterr().err) == said


@pytest.fixture
def judged(monkeypatch):
    """Names of the images that are decoded."""
    names, facts = [], module._facts
    monkeypatch.setattr(module, "_facts", lambda row, *rest: names.append(row.name[-5:]) or facts(row, *rest))
    return names


def test_what_was_checked_is_kept_until_the_content_of_a_file_changes(folder, tmp_path, judged):
    def load(**options):
        judged.clear()
        samples = load_pictures(folder, SIZE, maps=EDGES, cache=tmp_path / "cache", **options)
        return samples.digests, sorted(judged)

    first, names = load()
    assert names == ["0.png", "1.png", "2.png", "3.png"]
    assert load() == (first, [])
    before = (folder / "2.png").stat()
    save(pixels(seed=77), folder / "2.png")
    os.utime(folder / "2.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    changed, names = load()
    assert names == ["2.png"]
    assert [a == b for a, b in zip(first, changed, strict=True)] == [True, True, False, True]
    save(pixels(channels=1, seed=78), folder / "1_e.png")
    assert load()[1] == ["1.png"]
    os.utime(folder / "3.png", ns=(1, 1))
    edit(folder, 0, text="another")
    assert load()[1] == []
    assert load(convert=True)[1] != []


def test_ranks_share_the_checks(folder, judged):
    alone, handed = load_pictures(folder, SIZE), []
    for rank in range(2):
        judged.clear()
        load_pictures(folder, SIZE, rank=rank, num_ranks=2, gather=lambda own: handed.extend(own) or own * 2)
        assert sorted(judged) == [["0.png", "1.png"], ["2.png", "3.png"]][rank]
    assert [found.digest for found in handed] == list(alone.digests)


# Pictures


def as_file(picture, kind="png", **options):
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, kind, **options)
    return file.getvalue()


def test_numbers_are_read_as_they_are():
    values = (np.arange(480).reshape(24, 20) * 100).astype(np.uint16)
    assert torch.equal(read_picture(as_file(values), "depth")[0], torch.from_numpy(values.astype(np.float32)))
    labels = pixels(channels=1) % 21
    palette = Image.fromarray(labels)
    palette.putpalette([0, 0, 0, 128, 0, 0] + [7] * 750)
    for file in (as_file(labels), as_file(palette)):
        assert np.array_equal(read_picture(file, "labels")[0], labels)
    floats = as_file(np.float32([[1.5, 2.25]]), "tiff")
    assert read_picture(floats, "depth").tolist() == [[[1.5, 2.25]]]
    for file, kind, message in (
        (floats, "labels", "not whole; expected labels"),
        (as_file(pixels()), "depth", "is in colour; expected one channel of numbers for depth"),
        (as_file(np.float32([[1.5, np.nan]]), "tiff"), "depth", "holds nan or inf"),
        (as_file(Image.fromarray(labels).convert("P"), transparency=3), "image", r"partly transparent \(P\)"),
    ):
        with pytest.raises(ValueError, match=message):
            read_picture(file, kind, 3 if kind == "image" else None)
    assert read_picture(as_file(Image.fromarray(labels).convert("P")), "image", 3).shape == (3, 24, 20)


@pytest.mark.parametrize("size", [(24, 24), (16, 40), (40, 16), (23, 37)])
def test_what_covers_is_the_smallest_of_its_proportions(size):
    height, width = covering(50, 30, size)
    assert height >= size[0]
    assert width >= size[1]
    assert height == size[0] or width == size[1]
    assert abs(height / width - 5 / 3) < 0.1


def test_images_are_resized_without_aliasing():
    fine = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255
    small = resized(fine.to(torch.uint8)[None], "image", (16, 16))[0]
    assert small.dtype == torch.uint8
    assert (small[2:-2, 2:-2].float() - 127.5).abs().max() < 3
    ramp = torch.arange(0, 256, 4).expand(64, 64).to(torch.uint8)[None]
    expected = torch.arange(6, 256, 16).float()
    assert (resized(ramp, "image", (16, 16))[0, 8].float() - expected)[1:-1].abs().max() <= 1


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (20, 27), (9, 9), (100, 100)])
def test_lines_do_not_vanish(size):
    lines = torch.zeros(1, 64, 64, dtype=torch.uint8)
    lines[:, 13] = lines[:, :, 40] = 255
    made = resized(lines, "lines", size)[0]
    assert set(made.unique().tolist()) == {0, 255}
    assert (made == 255).any(0).all()
    assert (made == 255).any(1).all()
    assert made.float().mean() < 255 * 0.3
    assert made[int(13.5 / 64 * size[0])].min() == 255


@pytest.mark.parametrize("kind", ["labels", "depth", "mask", "normals"])
def test_no_values_are_mixed_where_mixtures_mean_nothing(kind):
    dtype = {"labels": torch.int64, "depth": torch.float32}.get(kind, torch.uint8)
    values = (torch.randint(0, 2, (1, 64, 64), generator=torch.Generator().manual_seed(0)) * 200).to(dtype)
    for size in ((20, 27), (100, 130)):
        made = resized(values, kind, size)
        assert made.dtype == dtype
        rows, columns = (((torch.arange(side) + 0.5) * 64 / side).long() for side in size)
        assert torch.equal(made[0], values[0][rows][:, columns])


def test_resizing_moves_nothing():
    """A square keeps its place, to half a pixel, whatever the kind."""
    square = torch.zeros(1, 64, 64, dtype=torch.uint8)
    square[:, 16:32, 24:48] = 255
    for kind in ("image", "lines", "mask", "labels", "depth", "normals"):
        made = resized(square.to(torch.float32 if kind == "depth" else torch.uint8), kind, (32, 32))[0] > 127
        assert torch.equal(made.nonzero().amin(0), torch.tensor([8, 12])), kind
        assert torch.equal(made.nonzero().amax(0), torch.tensor([15, 23])), kind


def test_views_are_central_or_drawn_from_everywhere():
    assert choose_view(10, 21, (8, 8)) == View(1, 6, (8, 8))
    generator = torch.Generator().manual_seed(0)
    drawn = {choose_view(10, 21, (8, 20), generator=generator) for _ in range(200)}
    assert drawn == {View(top, left, (8, 20)) for top in range(3) for left in range(2)}
    with pytest.raises(ValueError, match="10 x 21 has no part of 11 x 8"):
        choose_view(10, 21, (11, 8))


def test_mirrored_normals_point_the_other_way():
    normals = torch.tensor([[[200, 30]], [[10, 20]], [[250, 240]]], dtype=torch.uint8)
    mirrored = View(0, 0, (1, 2), mirrored=True)
    assert mirrored.cut(normals, "normals").tolist() == [[[225, 55]], [[20, 10]], [[240, 250]]]
    normals[:, :, 1] = 0  # a background without normals
    assert mirrored.cut(normals, "normals").tolist() == [[[0, 55]], [[0, 10]], [[0, 250]]]
    assert View(0, 0, (1, 2)).cut(normals, "normals").tolist() == normals.tolist()
    assert View(0, 1, (1, 1), mirrored=True).cut(normals, "image").tolist() == normals[:, :, 1:].tolist()


def test_values_of_each_kind():
    picture = torch.tensor([[[0, 51, 255]]], dtype=torch.uint8)
    for kind in ("image", "lines", "mask", "normals"):
        assert torch.allclose(as_values(picture, kind), torch.tensor([[[0, 0.2, 1]]]))
    assert as_values(picture, "labels") is as_values(picture, "depth") is picture
