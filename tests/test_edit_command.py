"""``scorefield edit``: every preset writes what it says, bad input is refused before anything is written."""

import dataclasses
import json

import pytest
import tiny_pipelines as tiny
import tiny_transformers as transformers
import torch
from PIL import Image
from refusals import refused
from torchvision.io import read_image

from edit.options import PRESETS, Config, check, parse_weights
from edit.recipe import main
from scorefield.models.teacher import load_teacher
from toyworld.captions import parse as parse_caption
from toyworld.judge import load_judge, right_answers

PROMPTS = {"source": "a mug", "target": "a cup"}
BRIEF = {"steps": 3, "refinements": 1, "inner": 2, "iterations": 2, "size": 16, "device": "cpu"}


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A photograph that is not square."""
    path = tmp_path_factory.mktemp("photos") / "photo.jpg"
    pixels = (torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0)) * 255).byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(path)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def config_of(sd, out, preset="prompt-to-prompt", **changes):
    given = {"teacher": str(sd), "out": out, **BRIEF, **PROMPTS, **changes}
    return dataclasses.replace(PRESETS[preset](), **given)


def pictures(folder):
    return torch.stack([read_image(str(path)) for path in sorted(folder.glob("??????.png"))])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_edits_a_photograph(sd, photo, tmp_path, preset):
    out = main(config_of(sd, tmp_path / "out", preset, image=str(photo)))
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert names == {"000000.png", "000000.source.png", "strip.png", "report.json", "report.html"}
    content = json.loads((out / "report.json").read_text())
    assert content["options"]["preset"] == preset
    (row,) = content["edits"]
    assert (row["source"], row["target"], row["image"]) == ("a mug", "a cup", str(photo))
    assert read_image(str(out / "000000.png")).shape == (3, 16, 16)
    assert row["psnr_to_source"] < 99, "something changed"
    pinned = preset in ("prompt-to-prompt", "recolour", "reshape", "edit-friendly")
    assert ("noise_std" in row) == (PRESETS[preset]().method == "prompt-to-prompt")
    if pinned:  # the source is the picture through the autoencoder, whatever the guidance
        again = json.loads(
            (main(config_of(sd, out, preset, image=str(photo), guidance=1.0)) / "report.json").read_text()
        )
        assert again["edits"][0]["psnr_of_rebuilt_source"] == pytest.approx(row["psnr_of_rebuilt_source"])


def test_an_edit_depends_on_the_seed_and_its_number_alone(sd, photo, tmp_path):
    lines = [{"source": "a mug", "target": target, "image": str(photo)} for target in ("a cup", "a pot", "a jug")]
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for preset in ("prompt-to-prompt", "edit-friendly", "sdedit", "dds", "flow-edit"):
        made = []
        for number, (batch_size, seed) in enumerate(((3, 0), (1, 0), (3, 1))):
            given = {"source": "", "target": "", "batch_size": batch_size}
            config = config_of(sd, tmp_path / f"{preset}{number}", preset, **given,
                               edits=str(tmp_path / "e.jsonl"), seed=seed)  # fmt: skip
            made.append(pictures(main(config)).int())
        assert (made[0] - made[1]).abs().max() <= 1
        if preset != "prompt-to-prompt":  # whose noise is the picture's own
            assert (made[0] - made[2]).abs().amax((1, 2, 3)).min() > 1
    drawn = [pictures(main(config_of(sd, tmp_path / f"drawn{seed}", seed=seed))).int() for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert (drawn[0] - drawn[2]).abs().max() > 1


def test_weights_and_words_to_blend_change_the_edit(sd, photo, tmp_path):
    made = [
        pictures(main(config_of(sd, tmp_path / str(number), image=str(photo), target="a mug", **changes)))
        for number, changes in enumerate(({}, {"weights": ("mug=1",)}, {"weights": ("mug=-3",)}))
    ]
    assert torch.equal(made[0], made[1]), "a factor of 1 and the source's own prompt"
    assert not torch.equal(made[0], made[2])
    blended = main(config_of(sd, tmp_path / "blend", image=str(photo), blend=("mug", "cup"), report=True))
    row = json.loads((blended / "report.json").read_text())["edits"][0]
    assert 0 <= row["changed"] <= 1
    content, page = json.loads((blended / "report.json").read_text()), (blended / "report.html").read_text()
    assert content["strips"][:2] == ["windows 0 0", "windows 0.25 0.125"]
    assert content["edits"][0]["attention"] == ["a", "cup"]
    assert "a mug → a cup" in page
    assert "windows 0 0; windows 0.25 0.125" in page
    for file in ("source", "changed", "attention", "strip"):
        assert (blended / f"000000.{file}.png").exists()
    assert page.count('<img src="data:image/') == 5


def test_an_image_of_many_tokens_is_blended_by_the_coarsest_layers_that_there_are(sd, tmp_path):
    """As of SDXL at 1024 pixels, whose attention to the prompt begins at 32 x 32."""
    out = main(config_of(sd, tmp_path / "out", size=72, blend=("a mug", "a cup"), report=True, steps=2))
    assert (out / "000000.attention.png").exists()


def test_a_report_with_few_steps_or_without_attention_shows_what_can_be_drawn(sd, photo, tmp_path):
    tiny.sd3().save_pretrained(tmp_path / "sd3")
    for name, preset, changes, skips in (
        ("few", "edit-friendly", {"steps": 2, "skip": 0.0}, "skip 0; skip 0.2; skip 0.4; skip 0.6"),
        ("flow", "flow-edit", {"steps": 1, "skip": 0.0}, "skip 0; skip 0.2; skip 0.4"),
        ("bare", "prompt-to-prompt",
         {"teacher": str(tmp_path / "sd3"), "size": 0, "cross_window": 0.0, "self_window": 0.0}, ""),
    ):  # fmt: skip
        out = main(config_of(sd, tmp_path / name, preset, image=str(photo), report=True, **changes))
        page = (out / "report.html").read_text()
        assert f"under other options: {skips}</p>" in page if skips else "other options" not in page
        assert (out / "000000.strip.png").exists() == bool(skips)


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(sd, photo, tmp_path, capsys):
    assert main(config_of(sd, tmp_path / "out" / "a", image=str(photo), dry_run=True)) is None
    assert not (tmp_path / "out").exists()
    assert "1 edit of 16 x 16 pixels by prompt-to-prompt" in capsys.readouterr().out


def test_edits_of_others_are_kept_and_ours_replaced(sd, photo, tmp_path):
    config = config_of(sd, tmp_path / "out", "sdedit", image=str(photo))
    main(config)
    main(dataclasses.replace(config, strength=1.0))
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with refused("would be replaced, but it holds mine.txt"):
        check(config)


@pytest.mark.parametrize(("changes", "said"), [
    ({"source": ""}, "--source must say what the picture shows; got nothing"),
    ({"source": " ", "target": ""}, "--source and --target must say"),
    ({"edits": "e.jsonl"}, "--edits e.jsonl takes the place of --source, --target"),
    ({"edits": "e.csv", "source": "", "target": ""}, "--edits must be a jsonl file; got e.csv"),
    ({"method": "sdedit"}, "--method sdedit edits a picture; got no --image"),
    ({"strength": 1.5}, r"--strength must lie in \[0, 1\]; got 1.5"),
    ({"cross_window": -0.1}, r"--cross-window must lie in \[0, 1\]; got -0.1"),
    ({"eta": 0.0}, r"--eta must lie in \(0, 1\]; got 0.0"), ({"skip": 1.0}, r"--skip must lie in \[0, 1\); got 1"),
    ({"steps": 0}, "--steps must be above 0; got 0"), ({"guidance": float("nan")}, "--guidance must be finite"),
    ({"weights": ("red",)}, "--weights must be word=factor, such as red=2; got 'red'"),
    ({"weights": ("red=x",)}, "--weights must be word=factor"),
    ({"weights": ("red=1",), "method": "dds", "image": "a.png"}, "--weights and --blend change attention"),
    ({"inversion": "ddim", "method": "dds", "image": "a.png"}, "--inversion ddim is of --method prompt-to-prompt"),
    ({"inversion": "null-text", "guidance": 1.0}, "--inversion null-text is for guidance; got --guidance 1"),
    ({"method": "edit-friendly", "image": "a.png", "skip": 0.99}, "--skip 0.99 of --steps 50 leaves none"),
    ({"method": "flow-edit", "image": "a.png", "skip": 0.6, "steps": 1}, "--skip 0.6 of --steps 1 leaves none"),
    ({"weights": ("mug=2",), "cross_window": 0.0}, "--weights act within --cross-window, which has no step"),
    ({"weights": ("mug=2",), "cross_window": 0.1, "steps": 4}, "which has no step; got 0.1"),
    ({"inversion": "negative-prompt", "negative_prompt": "x"}, "away from the source's prompt. Leave out --neg"),
    ({"guidance": 1.0, "negative_prompt": "x"}, "--negative-prompt is what guidance moves away from"),
])  # fmt: skip
def test_what_cannot_work_is_refused_without_a_model(tmp_path, changes, said):
    with refused(said):
        check(Config(**{**PROMPTS, "out": tmp_path / "out", **changes}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("line", "said"), [
    ("{", r"e.jsonl:2 is no JSON"), ('{"source": "a"}', "must be an object of source, target and image; got"),
    ('{"source": "a", "target": "", "image": "a.png"}', "must say something in target; got ''"),
    ('{"source": "a", "target": "b"}', "has no image, which this method edits"),
    ('{"source": "a", "target": "b", "image": "none.png"}', "none.png cannot be read"),
])  # fmt: skip
def test_lines_that_cannot_be_used_are_named(sd, photo, tmp_path, line, said):
    good = json.dumps({**PROMPTS, "image": str(photo)})
    (tmp_path / "e.jsonl").write_text(f"{good}\n{line}\n")
    config = config_of(sd, tmp_path / "out", "sdedit", source="", target="", edits=str(tmp_path / "e.jsonl"))
    with refused(said):
        main(config)
    assert not (tmp_path / "out").exists()
    assert len(pictures(main(dataclasses.replace(config, on_bad_data="skip")))) == 1


def test_words_models_and_pictures_that_do_not_fit_are_refused_before_anything_is_drawn(sd, photo, tmp_path):
    small = tmp_path / "small.png"
    Image.new("RGB", (4, 4)).save(small)
    tiny.sd3().save_pretrained(tmp_path / "sd3")
    tiny.pixels().save_pretrained(tmp_path / "pixels")
    for changes, said in (
        ({"weights": ("blue=2",)}, "--weights blue: the prompt has no word 'blue'; it has a, cup. Name a word of"),
        ({"blend": ("blue",)}, "--blend blue: none of these is a word of 'a mug'"),
        ({"steps": 1001, "dry_run": True}, "--steps 1001 cannot be: .* fewer than 1001 distinct times"),
        ({"blend": ("a mug",)}, "--blend a mug: none of these is a word of 'a cup'"),
        ({"image": str(small)}, "small.png is 4 x 4, smaller than half of 16 x 16"),
        ({"teacher": str(tmp_path / "sd3"), "size": 0}, "SD3Transformer2DModel is no UNet2DConditionModel"),
        ({"teacher": str(tmp_path / "pixels"), "size": 0}, "takes no prompts; expected a text-to-image model"),
        ({"edits": str(tmp_path / "absent.jsonl"), "source": "", "target": ""}, "absent.jsonl cannot be read"),
        ({"device": "nowhere"}, "--device nowhere cannot be used here"),
        ({"device": "fpga"}, "--device fpga cannot be used here: [^.]*[.][^.]* 'FPGA' backend. Pass cpu"),
    ):
        with refused(said):
            main(config_of(sd, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
    flow = {"teacher": str(tmp_path / "sd3"), "size": 0, "cross_window": 0.0, "self_window": 0.0}
    for preset in ("prompt-to-prompt", "flow-edit", "sdedit"):
        made = main(config_of(sd, tmp_path / preset, preset, image=str(photo), **flow))
        assert (made / "000000.png").exists(), "without attention control flow transformers are edited, too"


def test_a_model_that_does_not_tell_words_is_edited_without_attention_or_refused_before(sd, tmp_path, monkeypatch):
    teacher = load_teacher(sd, size=16)
    own = dataclasses.replace(teacher, texts=lambda prompts: teacher.texts(prompts))
    monkeypatch.setattr("edit.recipe.load_teacher", lambda *arguments, **options: own)
    with refused("does not tell the words of a prompt.* or pass --cross-window 0 --self-window 0"):
        main(config_of(sd, tmp_path / "out", dry_run=True))
    out = main(config_of(sd, tmp_path / "out", cross_window=0.0, self_window=0.0, report=True))
    assert "other options" not in (out / "report.html").read_text()


def test_a_scale_that_the_network_is_told_leaves_no_use_for_a_negative_prompt(sd, tmp_path, monkeypatch):
    told = dataclasses.replace(load_teacher(sd, size=16), embedded=3.5)
    monkeypatch.setattr("edit.recipe.load_teacher", lambda *arguments, **options: told)
    with refused("is told its scale of guidance and looks at no --negative-prompt"):
        main(config_of(sd, tmp_path / "out", negative_prompt="blurred"))


def test_weights_are_read_as_words_and_factors():
    assert parse_weights(("red=2", "very soft=-0.5", "a=b=1")) == {"red": 2.0, "very soft": -0.5, "a=b": 1.0}


def test_a_red_mug_becomes_a_blue_one_on_the_model_that_ships(tmp_path):
    target = "a blue mug on a white background, side view"
    config = dataclasses.replace(
        PRESETS["recolour"](), source=target.replace("blue", "red"), target=target, guidance=3.0, steps=20,
        out=tmp_path / "out", device="cpu",
    )  # fmt: skip
    made = pictures(main(config)).float() / 127.5 - 1
    right = right_answers(load_judge(), made, [parse_caption(target)])
    assert all(bool(answer.all()) for answer in right.values())
    source = read_image(str(config.out / "000000.source.png")).float() / 127.5 - 1
    assert (right_answers(load_judge(), source[None], [parse_caption(config.source)])["colour"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "z_image", "lumina2"])
def test_every_method_runs_on_a_family_or_is_refused_by_name(photo, tmp_path, family):
    make = {**transformers.FAMILIES, "sdxl": tiny.sdxl, "sd3": tiny.sd3}[family]
    make().save_pretrained(tmp_path / "model")
    size = 16 if family in ("sdxl", "sd3") else 32
    for preset in PRESETS:
        config = config_of(tmp_path / "model", tmp_path / preset, preset, image=str(photo), size=size)
        if family != "sdxl" and PRESETS[preset]().method == "prompt-to-prompt":
            with refused(
                "Transformer2DModel is no UNet2DConditionModel.*Or pass --cross-window 0 --self-window 0"
            ):
                main(config)
            config = dataclasses.replace(config, cross_window=0.0, self_window=0.0)
        if preset == "null-text" and family in ("flux", "z_image", "lumina2"):
            why = "(is told its scale|has no encoder|scales its guided)"
            with refused(f"--inversion null-text fits a negative prompt; .* {why}"):
                main(config)
            continue
        assert (main(config) / "000000.png").exists(), preset
