"""The recipe of adapters: tiny runs from a folder, kills, two ranks, bad input, presets."""

import json
from dataclasses import replace

import pytest
import tiny_pipelines as tiny
import torch
import train_circles
from accelerate.state import AcceleratorState
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
from ranks import run_on_ranks
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.transforms.functional import to_pil_image

import controlnet.recipe as train_controlnet
import scorefield.cli as cli
from controlnet import circles
from controlnet.adapter import ControlledDenoiser
from controlnet.export import load_adapter
from controlnet.options import PRESETS
from controlnet.watch import in_full, make_validation, take_look
from scorefield.guidance import guided
from scorefield.models.codec import Codec
from scorefield.models.teacher import load_teacher
from scorefield.randomness import derived_generator, normal_like
from scorefield.sampling import grid, initial_noise, sample
from toyworld.judge import ANSWERS

SIZE = 16


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pipeline, a folder of ten circles with their outlines, and a cache for all tests of this file."""
    folder = tmp_path_factory.mktemp("control")
    tiny.sd().save_pretrained(folder / "model")
    write_samples(folder / "data", 10)
    return folder


def write_samples(folder, number, caption=None):
    folder.mkdir(parents=True)
    data, lines = circles.Circles(2 * SIZE, number), []
    for index in range(number):
        sample = data.load(index)
        to_pil_image(sample["image"]).save(folder / f"{index}.png")
        to_pil_image(sample["outline"]).save(folder / f"{index}_outline.png")
        text = data.caption(index) if caption is None else caption
        line = {"file_name": f"{index}.png", "text": text, "outline_file_name": f"{index}_outline.png"}
        lines.append(json.dumps(line))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def make_config(place, out, **changes):
    settings = {
        "teacher": str(place / "model"), "data": str(place / "data"), "size": SIZE, "steps": 6, "batch_size": 2,
        "eval_every": 3, "eval_samples": 2, "test_samples": 2, "sampling_steps": 2, "guidance": 2.0,
        "save_every": 2, "learning_rate": 1e-3, "cache": place / "cache", "ema_decay": 0.5, "log_every": 1,
        "long_prompts": "cut",
    }  # fmt: skip
    return train_controlnet.Config(out=out, **{**settings, **changes})


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(place):
    """A run that nobody disturbed."""
    return train_controlnet.main(make_config(place, place / "whole"))


def test_a_run_writes_what_diffusers_loads_a_card_samples_and_a_report(place, whole):
    model = ControlNetModel.from_pretrained(whole)
    assert model.config.conditioning_channels == 3, "as a pipeline of diffusers wants its hint"
    assert any(bool((p != 0).any()) for p in model.controlnet_mid_block.parameters())
    report = json.loads((place / "whole" / "report.json").read_text())
    assert report == json.loads((whole / "report.json").read_text())
    assert report["step"] == 6
    assert report["num_samples"] == 2
    scores = report["scores"]["edge_f1_1px"]
    assert set(scores) == {"value", "floor", "ceiling", "relative"}
    assert report["gap"]["residual_rms"] > 0
    assert "accuracy" not in report
    card = (whole / "README.md").read_text()
    assert "# ControlNet: canny" in card
    assert "license" not in card, "it is the base's, which nobody told"
    for fact in ("6 samples of 16 x 16 pixels", "batch: 2 images", "decay of the averaged weights: 0.5",
                 "channels: 1", "min-SNR gamma: none", "decoder frozen", "the same annotator"):  # fmt: skip
        assert fact in card
    assert Image.open(whole / "samples.png").size == Image.open(place / "whole" / "samples.png").size
    looks = [json.loads(line) for line in (place / "whole" / "evidence.jsonl").read_text().splitlines()]
    assert [look["step"] for look in looks] == [3, 6]
    saved = list((place / "whole" / "checkpoints" / "step-000000006").glob("*.safetensors"))
    assert {path.name for path in saved} == {"control.safetensors", "control.ema.safetensors"}, "no frozen base"
    events = EventAccumulator(str(next((place / "whole").rglob("events.out*")).parent)).Reload()
    tags = events.Tags()
    assert {"control/loss", "control/gap", "control/edge_f1_1px_floor"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("control/edge_f1_1px")] == [3, 6]
    assert tags["images"] == ["samples"]


def make_looker(config):
    """What judges a run, and its base, as the script makes them."""
    accelerator = train_controlnet.start(config)
    config = replace(config, eval_batch_size=config.batch_size)  # as main resolves it
    base, task = train_controlnet.load(config, accelerator)
    _, held_out = train_controlnet.make_batches(config, base, task, accelerator)
    indices = range(config.eval_samples, len(task.held_out)) if config.test_samples else range(config.eval_samples)
    return base, make_validation(config, base, task, held_out, indices, accelerator), accelerator


def test_without_control_the_report_is_of_the_base_itself(place, whole):
    """Drawn here without any adapter, sample by sample, and judged by edges read off."""
    report = json.loads((whole / "report.json").read_text())
    assert report["scores_without_control"] != report["scores"]
    assert report["learned_at"] is None
    assert report["likely_causes"][-1].startswith("it is early: ")
    base, validation, _ = make_looker(make_config(place, place / "whole"))
    probe, times, images = validation.probe, grid(base.denoiser.schedule, 2, spacing="uniform"), []
    for row in range(2):
        noise = normal_like(probe.x0[:1], [derived_generator(0, "validation", row)])
        cond = {name: value[row : row + 1] for name, value in probe.cond.items()}
        with torch.no_grad():
            x_t = initial_noise(base.denoiser.schedule, noise, times[0])
            x0 = sample(guided(base.denoiser, 2.0, base.negative()), x_t, cond, times=times)
            images.append(base.decode(x0).clamp(-1, 1))
    drawn = validation.judge(torch.cat(images), probe)
    for name, bounded in report["scores_without_control"].items():
        assert bounded["value"] == pytest.approx(float(drawn[name].mean()), abs=1e-3)
    assert validation.ceiling["ssim"] == pytest.approx(report["scores"]["ssim"]["ceiling"])


def test_the_last_look_and_the_report_are_of_one_precision(place, tmp_path, monkeypatch):
    """The same weights on the same samples: networks in bf16, the autoencoder in float32, whoever asks."""
    lowered, real = [], Codec.decode

    def decode(self, x0):
        lowered.append(torch.is_autocast_enabled("cpu"))
        return real(self, x0)

    monkeypatch.setattr(Codec, "decode", decode)
    train_controlnet.main(make_config(place, tmp_path, precision="bf16", test_samples=0, steps=2, eval_every=2))
    report = json.loads((tmp_path / "report.json").read_text())
    look = json.loads((tmp_path / "evidence.jsonl").read_text())
    assert look["gap"] == {name: value for name, value in report["gap"].items() if name != "value"}
    for name, bounded in look["standings"].items():
        same = {part: report["scores"][name][part] for part in ("value", "floor", "ceiling")}
        assert same == {part: bounded[part] for part in same}
    assert lowered
    assert not any(lowered)


@pytest.mark.parametrize("kill_at", [1, 5])
def test_a_killed_run_ends_in_the_same_weights_and_evidence(place, tmp_path, whole, monkeypatch, capsys, kill_at):
    real = train_controlnet.control_phase

    def mortal(*arguments, **options):
        phase = real(*arguments, **options)
        count = 0

        def loss(batch, rng):
            nonlocal count
            count += 1
            if count > kill_at:
                raise KeyboardInterrupt
            return phase.loss(batch, rng)

        return replace(phase, loss=loss)

    with monkeypatch.context() as patch:
        patch.setattr(train_controlnet, "control_phase", mortal)
        with pytest.raises(KeyboardInterrupt):
            train_controlnet.main(make_config(place, tmp_path))
    AcceleratorState._reset_state(reset_partial_state=True)
    capsys.readouterr()
    folder = train_controlnet.main(make_config(place, tmp_path))
    said = f"resumed from step {kill_at - kill_at % 2}"
    assert (said in capsys.readouterr().out) == (kill_at > 1)
    assert equal(weights(whole), weights(folder))
    assert (tmp_path / "evidence.jsonl").read_text() == (place / "whole" / "evidence.jsonl").read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["resumed"] == (kill_at > 1)
    assert ("seconds" in report) == ("cpu_seconds" in report) == (kill_at == 1), "of the last process only"


def test_a_changed_learning_rate_encodes_nothing_again(place, tmp_path, whole, monkeypatch):
    calls, real = [], Codec.posterior

    def counted(self, images):
        calls.append(len(images))
        return real(self, images)

    monkeypatch.setattr(Codec, "posterior", counted)
    config = make_config(place, tmp_path / "run", learning_rate=3e-4, eval_every=0, steps=2)
    train_controlnet.main(config)
    assert sum(calls) == 4, "the ceilings of two samples watched and two reported; all latents were kept"


@pytest.mark.parametrize(("changes", "most"), [({}, 2), ({"eval_batch_size": 1}, 1)])
def test_judging_takes_no_more_images_at_a_time_than_training(place, tmp_path, monkeypatch, changes, most):
    rows = []

    def counted(real):
        def work(self, many):
            rows.append(len(many))
            return real(self, many)

        return work

    monkeypatch.setattr(Codec, "decode", counted(Codec.decode))
    monkeypatch.setattr(Codec, "posterior", counted(Codec.posterior))
    config = make_config(place, tmp_path, steps=1, eval_samples=5, test_samples=0, crop="random", **changes)
    train_controlnet.main(config)
    assert max(rows) == most


RANKS = {"steps": 3, "eval_every": 2, "eval_samples": 3, "test_samples": 0, "guidance": 1.0}


@pytest.mark.parametrize(
    "changes",
    [pytest.param({}, id="adapter"), pytest.param({"unlocked": True}, id="unlocked", marks=pytest.mark.slow)],
)
def test_two_ranks_end_in_the_same_figures_and_one_folder(place, tmp_path, changes):
    two = make_config(place, tmp_path / "two", **RANKS, **changes)
    run_on_ranks(lambda accelerator: bool(train_controlnet.main(two)), tmp_path)
    checkpoint = json.loads(next((tmp_path / "two").glob("checkpoints/step-*/config.json")).read_text())
    assert checkpoint["num_processes"] == 2
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["num_samples"] == 3
    folder = tmp_path / "two" / "controlnet"
    assert "batch: 4 images" in (folder / "README.md").read_text(), "those of both ranks"
    # One rank draws the same samples without control, and what two ranks saved is judged the same by one.
    base, validation, accelerator = make_looker(make_config(place, tmp_path / "one", **RANKS))
    free = {
        name: in_full(one) for name, one in validation.bounded_scores(validation.images(base.denoiser)).items()
    }
    assert free == report["scores_without_control"]
    if changes:
        base.denoiser.network.model = UNet2DConditionModel.from_pretrained(folder / "unet")
    learned = ControlledDenoiser(base.denoiser, load_adapter(folder))
    look, _ = take_look(3, validation, learned, accelerator)
    assert look.gap.right == pytest.approx(report["gap"]["right"], rel=1e-4)
    for name, bounded in look.bounded_scores.items():
        for part in ("value", "floor", "ceiling"):
            assert getattr(bounded, part) == pytest.approx(report["scores"][name][part], abs=1e-3)


def test_an_unlocked_decoder_learns_and_is_saved(place, tmp_path, whole):
    folder = train_controlnet.main(make_config(place, tmp_path, unlocked=True, steps=3))
    ours = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    before = load_file(place / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    changed = {name.split(".")[0] for name in ours if not torch.equal(ours[name], before[name])}
    assert changed == {"up_blocks", "conv_norm_out", "conv_out"}
    free, base = (
        json.loads((run / "report.json").read_text())["scores_without_control"] for run in (whole, tmp_path)
    )
    assert "needs the folder `unet`" in (folder / "README.md").read_text()
    assert free == base, "the base is what it was, not the decoder that learned"


@pytest.mark.parametrize(
    ("changes", "hint_channels", "score"),
    [
        ({"hint": "outline", "hint_kind": "lines", "crop": "random", "hint_drop": 0.5}, 3, "likeness"),
        ({"hint": "inpaint", "min_snr": 5.0, "prompt_drop": 1.0, "precision": "bf16"}, 4, "ssim"),
        ({"gradient_checkpointing": True, "recompute_levels": 1, "flip": True, "lr_floor": 0.0}, 3, "edge_f1_1px"),
    ],
)
def test_options_lead_to_a_finite_result(place, tmp_path, changes, hint_channels, score):
    folder = train_controlnet.main(make_config(place, tmp_path, **{"steps": 2, "eval_every": 0, **changes}))
    assert ControlNetModel.from_pretrained(folder).config.conditioning_channels == hint_channels
    assert next(iter(json.loads((tmp_path / "report.json").read_text())["scores"])) == score
    asked = {"outline": "soft edges", "inpaint": "what was kept"}.get(changes.get("hint"), "the same annotator")
    assert asked in (folder / "README.md").read_text()


def test_the_painter_of_circles_is_trained_resumed_and_put_under_control(tmp_path, capsys):
    options = {"size": 16, "batch_size": 4, "num_samples": 20, "save_every": 2, "log_every": 1}
    painter = train_circles.main(train_circles.Config(out=tmp_path / "painter", steps=2, **options))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert equal(
        weights(painter),
        weights(train_circles.main(train_circles.Config(out=tmp_path / "painter", steps=2, **options))),
    )
    assert "resumed from step 2" in capsys.readouterr().out
    base = load_teacher(str(painter))
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(base.decode(base.encode(images)), images)
    AcceleratorState._reset_state(reset_partial_state=True)
    config = replace(
        PRESETS["circles"](), teacher=str(painter), num_samples=20, steps=2, batch_size=4,
        eval_samples=4, test_samples=0, sampling_steps=2, eval_every=1, out=tmp_path / "control",
        cache=tmp_path / "cache",
    )  # fmt: skip
    train_controlnet.main(config)
    report = json.loads((tmp_path / "control" / "report.json").read_text())
    assert list(report["scores"]) == ["mask_iou", "centre_error", "colour_right", "colour_error"]
    assert report["scores"]["mask_iou"]["ceiling"] == 1
    assert report["scores"]["colour_right"]["ceiling"] == 1
    assert report["scores"]["colour_error"]["ceiling"] < 1e-3
    with pytest.raises(ValueError, match=r"draws 16 x 16 pixels; leave out --size"):
        train_controlnet.main(replace(config, size=32, out=tmp_path / "other"))


@pytest.mark.parametrize("preset", ["toyworld-canny", pytest.param("toyworld-depth", marks=pytest.mark.slow)])
def test_presets_of_the_toy_world_run_and_ask_its_judge(tmp_path, preset):
    config = replace(
        PRESETS[preset](), num_samples=4, steps=1, batch_size=2, eval_samples=2, test_samples=3,
        sampling_steps=2, out=tmp_path / "out", cache=tmp_path / "cache",
    )  # fmt: skip
    train_controlnet.main(config)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["accuracy"].keys() == report["accuracy_without_control"].keys() == ANSWERS.keys()
    assert next(iter(report["scores"])) == {"toyworld-canny": "edge_f1_1px", "toyworld-depth": "mask_iou"}[preset]
    assert next(iter(report["scores"].values()))["ceiling"] > 0.9
    assert ("shading" in report["scores"]) == (preset == "toyworld-depth")
    assert "license: apache-2.0" in (tmp_path / "out" / "controlnet" / "README.md").read_text()


# What is said before anything is trained.


def test_dry_run_prints_config_and_bytes_and_writes_nothing(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))

    def planned(**options):
        train_controlnet.main(
            make_config(place, tmp_path / "out", dry_run=True, cache=tmp_path / "cache", **options)
        )
        said = capsys.readouterr().out
        assert not list(tmp_path.iterdir())
        lines = dict(line.split(": ", 1) for line in said.splitlines() if " bytes of weights" in line)
        numbers = {role: line.replace(",", "").split() for role, line in lines.items()}
        return said, {role: (int(w[2]), int(w[6]) if len(w) > 6 else 0) for role, w in numbers.items()}

    (said, locked), (_, half), (_, unlocked) = (
        planned(), planned(precision="bf16"), planned(precision="bf16", unlocked=True)
    )  # fmt: skip
    for words in ('"hint": "canny"', "6 samples checked, 4 held out", "6 of the adapter",
                  "activations, update of the adapter: ", "activations, decoding pictures: ",
                  "at most on each process"):  # fmt: skip
        assert words in said
    assert said.count("gradients and optimiser state") == 1
    assert half["teacher"] == (locked["teacher"][0] // 2, 0)
    assert half["adapter"] == locked["adapter"]
    decoder = unlocked["average"][0] - locked["average"][0]
    assert 0 < decoder < locked["teacher"][0]
    # A gradient and two moments beside each weight.
    assert unlocked["teacher"] == (locked["teacher"][0], 3 * decoder)


OWN = ["--teacher", "{place}/model", "--data", "{place}/data", "--size", "16"]
BAD = [
    ([], ["--teacher and --data are missing"]),
    (["--teacher", "{place}/nothing", *OWN[2:]], ["nothing"]),
    ([*OWN[:2], "--data", "{place}/nothing", *OWN[4:]], ["nothing", "no such file or folder"]),
    ([*OWN, "--hint", "depth"], ["depth_file_name"]),
    ([*OWN, "--eval-samples", "10", "--long-prompts", "cut"], ["held out", "--eval-samples"]),
    ([*OWN, "--eval-samples", "1"], ["at least 2"]),
    ([*OWN, "--prompt-drop", "1.5"], ["--prompt-drop", "[0, 1]"]),
    ([*OWN, "--lr-floor", "2"], ["--lr-floor"]),
    ([*OWN, "--learning-rate", "0"], ["--learning-rate", "(0, 1]"]),
    ([*OWN, "--steps", "0"], ["--steps"]),
    ([*OWN[:2], "--data", "toyworld", *OWN[4:]], ["64 x 64"]),
    (["toyworld-canny", "--out", "{file}/run"], ["cannot write"]),
    (["toyworld-canny", "--hint", "nonsense", "--dry-run"], ["'nonsense'", "image, depth, normals"]),
    (["toyworld-canny", "--hint", ""], ["--hint is missing", "canny"]),
    (["toyworld-canny", "--cache", "{file}/cache"], ["--cache", "is a file"]),
    (["toyworld-canny", "--recompute-levels", "1"], ["--recompute-levels", "--gradient-checkpointing"]),
    (["toyworld-canny", "--activation-budget", "0.5"], ["--activation-budget must lie in (0, 1]", "--compile"]),
    (["sd15-canny", "--recompute-levels", "-1"], ["--recompute-levels must be at least 0"]),
    (["sd15-cany"], ["no preset", "toyworld-canny", "Did you mean sd15-canny?"]),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD, ids=[" ".join(words[-2:]) for words, _ in BAD])
def test_bad_input_exits_with_2_and_writes_nothing(place, tmp_path, capsys, arguments, expected):
    (tmp_path / "file").write_text("a file")
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    cache = ["--cache", str(tmp_path / "cache")] if "--teacher" in arguments else []
    with pytest.raises(SystemExit) as stopped:
        cli.main(
            ["control", *(word.format(place=place, file=tmp_path / "file") for word in arguments), *cache, *out]
        )
    assert stopped.value.code == 2
    said = capsys.readouterr()
    for word in expected:
        assert word in said.err + said.out
    assert not (tmp_path / "out").exists()


def test_bad_samples_are_named_in_one_line_by_the_first_rank_and_a_broken_record_stops(
    place, tmp_path, capsys, monkeypatch
):
    data = write_samples(tmp_path / "data", 6)
    (data / "2.png").write_bytes((data / "2.png").read_bytes()[:60])
    config = make_config(place, tmp_path / "out", data=str(data), dry_run=True, test_samples=0)
    with pytest.raises(ValueError, match=r"2\.png"):
        train_controlnet.main(config)
    for rank, times in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        train_controlnet.main(replace(config, on_bad_data="skip"))
        assert capsys.readouterr().err.count(f"left out 1 of 6 samples: {data / '2.png'}") == times
    (tmp_path / "evidence.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"evidence\.jsonl is no record of evidence.* Move it away"):
        train_controlnet.main(make_config(place, tmp_path, teacher="nothing is loaded"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_possible_defaults_that_flags_override(monkeypatch, tmp_path, name):
    config, seen = PRESETS[name](), []
    assert config.preset == name
    if name:
        train_controlnet.check(config)
        monkeypatch.setattr("controlnet.recipe.main", seen.append)
        cli.main(["control", name, "--steps", "7", "--out", str(tmp_path)])
        assert seen == [replace(config, steps=7, out=tmp_path)]
