"""Own samples: folders and data sets, what cannot be used and how it is named, pictures made to fit."""

import io
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from controlnet import samples as module
from controlnet.samples import load_pictures
from scorefield.data.pictures import View, as_values, choose_view, covering, read_picture, resized

SIZE = (16, 16)


def pixels(height=24, width=20, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def write(folder, rows, arrays=()):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in dict(arrays).items():
        Image.fromarray(array).save(folder / name)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def folder(tmp_path):
    arrays = {f"{n}.png": pixels(seed=n) for n in range(4)} | {f"{n}_e.png": pixels(channels=1) for n in range(4)}
    rows = [{"file_name": f"{n}.png", "text": f"picture {n}", "edges_file_name": f"{n}_e.png"} for n in range(4)]
    return write(tmp_path / "images", rows, arrays)


def edit(folder, number, **changes):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[number] = {name: value for name, value in (rows[number] | changes).items() if value is not ...}
    write(folder, rows)


def test_a_folder_is_read_as_it_is(folder):
    samples = load_pictures(folder, (24, 20), maps={"edges": "lines"})
    assert len(samples) == 4
    assert samples.kinds == {"image": "image", "edges": "lines"}
    assert [samples.caption(n) for n in range(4)] == [f"picture {n}" for n in range(4)]
    sample = samples.load(2)
    assert np.array_equal(sample["image"].permute(1, 2, 0), pixels(seed=2))
    assert np.array_equal(sample["edges"][0], pixels(channels=1))


def test_data_sets_of_the_hub_library_are_read_too(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {
        "text": [f"picture {n}" for n in range(4)],
        "picture": [str(folder / f"{n}.png") for n in range(4)],
        "edges": [str(folder / f"{n}_e.png") for n in range(4)],
    }
    data = datasets.Dataset.from_dict(rows)
    for column in ("picture", "edges"):
        data = data.cast_column(column, datasets.Image())
    expected = load_pictures(folder, SIZE, maps={"edges": "lines"})
    data.save_to_disk(tmp_path / "saved")
    for source in (data, tmp_path / "saved"):
        samples = load_pictures(source, SIZE, maps={"edges": "lines"})
        assert [samples.caption(n) for n in range(4)] == rows["text"]
        for n in range(4):
            ours, theirs = samples.load(n), expected.load(n)
            assert all(torch.equal(ours[name], theirs[name]) for name in ("image", "edges"))
            assert samples.identity(n) == expected.identity(n)
    with pytest.raises(
        ValueError, match=r"has no column depth of pictures; it has \['text', 'picture', 'edges'\]"
    ):
        load_pictures(data, SIZE, maps={"depth": "depth"})
    with pytest.raises(ValueError, match="has no column 'caption' of captions; it has"):
        load_pictures(data, SIZE, text="caption")
    holes = datasets.Dataset.from_dict({"text": ["a", "b"], "image": [str(folder / "0.png"), None]})
    holes = holes.cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match=r"data set\[1\] names no picture"):
        load_pictures(holes, SIZE)


def test_the_toy_worlds_export_is_read_with_its_hints(tmp_path):
    from toyworld.data import export_folder

    maps = {"depth": "image", "normals": "normals", "mask": "mask", "edges": "lines"}
    samples = load_pictures(export_folder(tmp_path / "world", 3, size=32), (32, 32), maps=maps)
    sample = samples.load(1)
    assert {name: tuple(picture.shape) for name, picture in sample.items()} == {
        "image": (3, 32, 32), "depth": (1, 32, 32), "normals": (3, 32, 32), "mask": (1, 32, 32),
        "edges": (1, 32, 32),
    }  # fmt: skip
    assert set(sample["edges"].unique().tolist()) == {0, 255}


def save(array, path, **options):
    Image.fromarray(array).save(path, **options)


def corrupt(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD = {
    "transparent": (lambda path: save(pixels(channels=4), path), r"0\.png is partly transparent \(RGBA\)"),
    "grey": (lambda path: save(pixels(channels=1), path), r"0\.png is greyscale; expected 8 bits in colour"),
    "16 bits": (
        lambda path: save(pixels(channels=1).astype(np.uint16) * 257, path),
        r"0\.png is of 16 bits; expected 8 bits in colour",
    ),
    "cut": (corrupt, r"0\.png cannot be read as a picture: "),
    "empty": (lambda path: path.write_bytes(b""), r"0\.png cannot be read as a picture: it is empty\."),
    "text": (
        lambda path: path.write_text("not found"),
        r"0\.png cannot be read as a picture: it begins with b'not found', as no format",
    ),
    "missing": (lambda path: path.unlink(), r"0\.png cannot be read: No such file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), r"0\.png is a folder; expected a regular file"),
    "small": (
        lambda path: (save(pixels(7, 20), path), save(pixels(7, 20, 1), path.with_name("0_e.png"))),
        r"0\.png is 20 x 7, less than half of the 16 x 16",
    ),
}
BAD_MAPS = {
    "another size": (
        lambda path: save(pixels(20, 24, 1), path),
        r"0_e\.png is 24 x 20, but its image .*0\.png is 20 x 24",
    ),
    "transparent": (
        lambda path: save(pixels(channels=4), path),
        r"0_e\.png is partly transparent .* pass --convert\.",
    ),
    "16 bits": (
        lambda path: save(pixels(channels=1).astype(np.uint16) * 257, path),
        r"0_e\.png is of 16 bits; .* pass --convert, or read it as numbers: kind depth\.",
    ),
    "missing": (lambda path: path.unlink(), r"0_e\.png cannot be read: No such file"),
}
BAD_CAPTIONS = {
    "empty": ("", r"0\.png has an empty caption"),
    "blank": (" \n", r"0\.png has an empty caption"),
    "null": (None, r"0\.png has no caption"),
    "absent": (..., r"0\.png has no caption"),
    "a number": (3, r"0\.png has the caption 3, not a text"),
}


def spoil(folder, what):
    group, name = what
    if group == "caption":
        caption, message = BAD_CAPTIONS[name]
        edit(folder, 0, text=caption)
        return message
    damage, message = (BAD if group == "image" else BAD_MAPS)[name]
    damage(folder / ("0.png" if group == "image" else "0_e.png"))
    return message


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    "what",
    [("image", name) for name in BAD]
    + [("map", name) for name in BAD_MAPS]
    + [("caption", n) for n in BAD_CAPTIONS],
    ids=lambda what: f"{what[0]}: {what[1]}",
)
def test_bad_data_is_named_and_stopped_or_skipped(folder, tmp_path, capsys, what, cached):
    cache = tmp_path / "cache" if cached else None
    if cached:
        load_pictures(folder, SIZE, maps={"edges": "lines"}, cache=cache)
    message = spoil(folder, what)
    with pytest.raises(ValueError, match=r"1 of 4 samples of .* cannot be used: .*" + message):
        load_pictures(folder, SIZE, maps={"edges": "lines"}, cache=cache)
    for _ in range(2):
        samples = load_pictures(folder, SIZE, maps={"edges": "lines"}, on_bad_data="skip", cache=cache)
        assert len(samples) == len(samples.digests) == 3
        assert samples.caption(0) == "picture 1"
        assert np.array_equal(
            samples.load(0)["image"], resized(torch.from_numpy(pixels(seed=1)).permute(2, 0, 1), "image", (19, 16))
        )
        assert str(folder / "0") in capsys.readouterr().err


def test_all_bad_files_are_counted_and_the_first_ones_named(folder):
    for n in range(4):
        (folder / f"{n}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"4 of 4 samples.*0\.png.*1\.png.*3\.png.*None is left\. Repair them\.$"):
        load_pictures(folder, SIZE, on_bad_data="skip")


@pytest.mark.parametrize("name", ["transparent", "grey", "16 bits"])
def test_unusual_modes_can_be_converted(folder, name):
    BAD[name][0](folder / "0.png")
    samples = load_pictures(folder, SIZE, convert=True)
    assert samples.load(0)["image"].shape == (3, 19, 16)
    assert samples.load(0)["image"].float().std() > 20


def test_grey_models_take_grey_images(folder):
    for n in range(4):
        save(pixels(channels=1, seed=n), folder / f"{n}.png")
    samples = load_pictures(folder, (24, 20), channels=1)
    assert np.array_equal(samples.load(1)["image"][0], pixels(channels=1, seed=1))
    save(pixels(), folder / "0.png")
    with pytest.raises(ValueError, match=r"0\.png is in colour; expected 8 bits in grey"):
        load_pictures(folder, SIZE, channels=1)


def test_without_captions_all_are_empty(folder):
    for n in range(4):
        edit(folder, n, text=...)
    assert load_pictures(folder, SIZE, text=None).caption(1) == ""


def test_an_image_lies_as_its_exif_tag_says(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(pixels(20, 24), folder / "0.png", exif=exif)
    sample = load_pictures(folder, (24, 20), maps={"edges": "lines"}).load(0)
    assert np.array_equal(sample["image"].permute(1, 2, 0), np.rot90(pixels(20, 24), -1))


def test_only_line_feeds_end_a_line_and_a_byte_order_mark_is_no_part_of_it(folder):
    text = "a\u2028red\u0085mug"
    rows = [{"file_name": f"{n}.png", "text": text} for n in range(2)]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    samples = load_pictures(folder, SIZE)
    assert [samples.caption(n) for n in range(len(samples))] == [text, text]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing/here/at/all", "no such file or folder"),
        ("./nothing", "no such file or folder"),
        ("images.zip/", "no such file or folder"),
        (3, r"expected a folder, or a datasets.Dataset of one split; got int"),
    ],
)
def test_sources_that_are_not_there_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        load_pictures(source, SIZE)


def test_a_map_that_nobody_names_is_missed(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r'0\.png has no depth: expected it under "depth_file_name"; .*line 1 has file_name,'
    ):
        load_pictures(folder, SIZE, maps={"depth": "depth"})
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"0\.png has no depth, which a metadata\.jsonl must name"):
        load_pictures(folder, SIZE, maps={"depth": "depth"}, text=None)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"holds no samples.* Expected are pictures in a folder"):
        load_pictures(empty, SIZE)


@pytest.mark.parametrize(("tag", "map_tag", "said"), [(6, 1, True), (6, 6, False), (1, 1, False), (1, 3, True)])
def test_a_turned_image_beside_an_untagged_map_is_told_of(tmp_path, capsys, tag, map_tag, said):
    rows = []
    for n in range(2):
        for name, orientation in ((f"{n}.png", tag if n else 1), (f"{n}_e.png", map_tag if n else 1)):
            exif = Image.Exif()
            exif[0x0112] = orientation
            save(pixels(20, 20), tmp_path / name, exif=exif)
        rows.append({"file_name": f"{n}.png", "text": "a", "edges_file_name": f"{n}_e.png"})
    for _ in range(2):  # the second time it was checked before
        load_pictures(write(tmp_path, rows), SIZE, maps={"edges": "image"}, cache=tmp_path / ".cache")
        assert ("1 of 2 images, such as" in capsys.readouterr().err) == said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maps": {"edges": "outlines"}}, "unknown kind of picture 'outlines'"),
        ({"maps": {"image": "image"}}, "a map cannot be called image"),
        ({"channels": 4}, "1 or 3 channels"),
        ({"on_bad_data": "ignore"}, "on_bad_data must be stop or skip"),
    ],
)
def test_options_that_cannot_be_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_pictures(folder, SIZE, **options)


@pytest.fixture
def judged(monkeypatch):
    """Names of the images that are decoded."""
    names, facts = [], module._facts
    monkeypatch.setattr(module, "_facts", lambda row, *rest: names.append(row.name[-5:]) or facts(row, *rest))
    return names


def test_verdicts_are_kept_until_the_content_of_a_file_changes(folder, tmp_path, judged):
    def load(**options):
        judged.clear()
        samples = load_pictures(folder, SIZE, maps={"edges": "lines"}, cache=tmp_path / "cache", **options)
        return samples, sorted(judged)

    first, names = load()
    assert names == ["0.png", "1.png", "2.png", "3.png"]
    again, names = load()
    assert not names
    assert again.digests == first.digests
    before = (folder / "2.png").stat()
    save(pixels(seed=77), folder / "2.png")
    os.utime(folder / "2.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    changed, names = load()
    assert names == ["2.png"]
    assert [a == b for a, b in zip(first.digests, changed.digests, strict=True)] == [True, True, False, True]
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
    assert [verdict.digest for verdict in handed] == list(alone.digests)


# Pictures


def png(array, **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png", **options)
    return file.getvalue()


def test_numbers_are_read_as_they_are():
    values = (np.arange(480).reshape(24, 20) * 100).astype(np.uint16)
    assert torch.equal(read_picture(png(values), "depth")[0], torch.from_numpy(values.astype(np.float32)))
    labels = pixels(channels=1) % 21
    assert np.array_equal(read_picture(png(labels), "labels")[0], labels)
    palette = Image.fromarray(labels)
    palette.putpalette([0, 0, 0, 128, 0, 0] + [7] * 750)
    file = io.BytesIO()
    palette.save(file, "png")
    assert np.array_equal(read_picture(file.getvalue(), "labels")[0], labels)
    file = io.BytesIO()
    Image.fromarray(np.float32([[1.5, 2.25]])).save(file, "tiff")
    assert read_picture(file.getvalue(), "depth").tolist() == [[[1.5, 2.25]]]
    with pytest.raises(ValueError, match="not whole; expected labels"):
        read_picture(file.getvalue(), "labels")
    with pytest.raises(ValueError, match="is in colour; expected one channel of numbers for depth"):
        read_picture(png(pixels()), "depth")
    file = io.BytesIO()
    Image.fromarray(np.float32([[1.5, np.nan]])).save(file, "tiff")
    with pytest.raises(ValueError, match="holds nan or inf"):
        read_picture(file.getvalue(), "depth")


def test_a_transparent_palette_is_no_plain_picture():
    palette = Image.fromarray(pixels(channels=1)).convert("P")
    file = io.BytesIO()
    palette.save(file, "png", transparency=3)
    with pytest.raises(ValueError, match=r"partly transparent \(P\)"):
        read_picture(file.getvalue(), "image", 3)
    file = io.BytesIO()
    palette.save(file, "png")
    assert read_picture(file.getvalue(), "image", 3).shape == (3, 24, 20)


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
@pytest.mark.parametrize("size", [(20, 27), (100, 130)])
def test_no_values_are_mixed_where_mixtures_mean_nothing(kind, size):
    dtype = {"labels": torch.int64, "depth": torch.float32}.get(kind, torch.uint8)
    values = (torch.randint(0, 2, (1, 64, 64), generator=torch.Generator().manual_seed(0)) * 200).to(dtype)
    made = resized(values, kind, size)
    assert made.dtype == dtype
    assert made.unique().tolist() == [0, 200]
    rows = ((torch.arange(size[0]) + 0.5) * 64 / size[0]).long()
    columns = ((torch.arange(size[1]) + 0.5) * 64 / size[1]).long()
    assert torch.equal(made[0], values[0][rows][:, columns])


def test_resizing_moves_nothing():
    # A square keeps its place, to half a pixel, whatever the kind.
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
    made = View(0, 0, (1, 2), mirrored=True).cut(normals, "normals")
    assert made.tolist() == [[[225, 55]], [[20, 10]], [[240, 250]]]
    normals[:, :, 1] = 0  # a background without normals
    made = View(0, 0, (1, 2), mirrored=True).cut(normals, "normals")
    assert made.tolist() == [[[0, 55]], [[0, 10]], [[0, 250]]]
    assert View(0, 0, (1, 2)).cut(normals, "normals").tolist() == normals.tolist()
    assert View(0, 1, (1, 1), mirrored=True).cut(normals, "image").tolist() == normals[:, :, 1:].tolist()


def test_values_of_each_kind():
    picture = torch.tensor([[[0, 51, 255]]], dtype=torch.uint8)
    for kind in ("image", "lines", "mask", "normals"):
        assert torch.allclose(as_values(picture, kind), torch.tensor([[[0, 0.2, 1]]]))
    assert as_values(picture, "labels") is as_values(picture, "depth") is picture
