"""The script that trains adapters: tiny runs from a folder, kills, two ranks, bad input, presets."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_pipelines as tiny
import torch
import train_circles
from accelerate.state import AcceleratorState
from diffusers import ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.functional import to_pil_image

import controlnet.recipe as train_controlnet
import scorefield.cli as cli
from controlnet import circles
from controlnet.adapter import ControlledDenoiser
from controlnet.evidence import Standing
from controlnet.export import load_adapter
from controlnet.options import PRESETS
from controlnet.watch import in_full, make_validation, take_look
from scorefield.guidance import guided
from scorefield.models.codec import Codec
from scorefield.models.teacher import load_teacher
from scorefield.randomness import derived_generator, normal_like
from scorefield.sampling import grid, initial_noise, sample
from toyworld.circles import encode_captions
from toyworld.judge import ANSWERS

ROOT = Path(__file__).resolve().parent.parent
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


def test_the_log_holds_scalars_and_validation_images(place, whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((place / "whole").rglob("events.out*")).parent)).Reload()
    tags = events.Tags()
    assert {"control/loss", "control/gap", "control/edge_f1_1px", "control/edge_f1_1px_floor"} <= set(
        tags["scalars"]
    )
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
    for name, standing in report["scores_without_control"].items():
        assert standing["value"] == pytest.approx(float(drawn[name].mean()), abs=1e-3)
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
    for name, standing in look["standings"].items():
        same = {part: report["scores"][name][part] for part in ("value", "floor", "ceiling")}
        assert same == {part: standing[part] for part in same}
    assert lowered
    assert not any(lowered)


@pytest.mark.parametrize("kill_at", [1, 3, 5])
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


def test_kills_fall_between_steps_in_mid_accumulation_too(place, tmp_path, monkeypatch):
    options = {"accumulate": 3, "steps": 4, "eval_every": 0}
    expected = weights(train_controlnet.main(make_config(place, tmp_path / "whole", **options)))
    real, count = train_controlnet.ControlBatches.finish, 0

    def mortal(self, *arguments):
        nonlocal count
        count += 1
        if count == 3 * 2 + 2:  # the second micro-batch of the third step
            raise KeyboardInterrupt
        return real(self, *arguments)

    AcceleratorState._reset_state(reset_partial_state=True)
    with monkeypatch.context() as patch:
        patch.setattr(train_controlnet.ControlBatches, "finish", mortal)
        with pytest.raises(KeyboardInterrupt):
            train_controlnet.main(make_config(place, tmp_path / "cut", **options))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert equal(expected, weights(train_controlnet.main(make_config(place, tmp_path / "cut", **options))))


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


def test_stock_diffusers_draws_with_the_result(place, whole):
    from diffusers import StableDiffusionControlNetPipeline

    parts = StableDiffusionPipeline.from_pretrained(place / "model").components
    for name in ("image_encoder",):
        parts.pop(name, None)
    pipeline = StableDiffusionControlNetPipeline(
        **{**parts, "safety_checker": None, "feature_extractor": None}, requires_safety_checker=False,
        controlnet=ControlNetModel.from_pretrained(whole),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    hint = Image.new("L", (SIZE, SIZE))
    images = pipeline("red circle", image=hint, num_inference_steps=2, height=SIZE, width=SIZE).images
    assert images[0].size == (SIZE, SIZE)


@pytest.mark.parametrize(
    ("changes", "hint_channels", "score"),
    [
        ({"hint": "outline", "hint_kind": "lines"}, 3, "likeness"),
        ({"hint": "softedge"}, 3, "ssim"),
        ({"hint": "inpaint", "min_snr": 5.0, "prompt_drop": 1.0}, 4, "ssim"),
        ({"gradient_checkpointing": True, "recompute_levels": 1, "flip": True, "lr_floor": 0.0}, 3, "edge_f1_1px"),
        ({"crop": "random", "precision": "bf16", "test_samples": 0, "hint_drop": 0.5}, 3, "edge_f1_1px"),
    ],
)
def test_options_lead_to_a_finite_result(place, tmp_path, changes, hint_channels, score):
    folder = train_controlnet.main(make_config(place, tmp_path, **{"steps": 2, "eval_every": 0, **changes}))
    assert ControlNetModel.from_pretrained(folder).config.conditioning_channels == hint_channels
    assert next(iter(json.loads((tmp_path / "report.json").read_text())["scores"])) == score
    asked = {"outline": "soft edges", "inpaint": "what was kept"}.get(changes.get("hint"), "the same annotator")
    assert asked in (folder / "README.md").read_text()


def test_dry_run_prints_config_and_bytes_and_writes_nothing(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for cache in (tmp_path / "cache", None):
        train_controlnet.main(make_config(place, tmp_path / "out", dry_run=True, cache=cache))
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().out
    assert '"hint": "canny"' in said
    assert "6 samples encoded, 4 held out" in said
    for role in ("teacher: ", "adapter: ", "average: "):
        assert role in said
    assert said.count("gradients and optimiser state") == 2, "one in each plan"
    assert "6 of the adapter" in said


def test_the_plan_counts_an_unlocked_decoder_and_a_base_in_bf16(place, tmp_path, capsys):
    def bytes_of(**options):
        capsys.readouterr()
        train_controlnet.main(make_config(place, tmp_path / "out", dry_run=True, **options))
        lines = dict(
            line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if " bytes of weights" in line
        )
        numbers = {role: line.replace(",", "").split() for role, line in lines.items()}
        return {role: (int(words[2]), int(words[6]) if len(words) > 6 else 0) for role, words in numbers.items()}

    locked, half, unlocked = bytes_of(), bytes_of(precision="bf16"), bytes_of(precision="bf16", unlocked=True)
    assert half["teacher"] == (locked["teacher"][0] // 2, 0)
    assert half["adapter"] == locked["adapter"]
    decoder = unlocked["average"][0] - locked["average"][0]
    assert 0 < decoder < locked["teacher"][0]
    assert unlocked["teacher"] == (
        locked["teacher"][0],
        3 * decoder,
    )  # a gradient and two moments beside each weight


def test_a_broken_record_of_evidence_stops_a_run_at_its_start(place, tmp_path):
    (tmp_path / "evidence.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"evidence\.jsonl is no record of evidence.* Move it away"):
        train_controlnet.main(make_config(place, tmp_path, teacher="nothing is loaded"))


@pytest.mark.parametrize(
    "rank_changes",
    [pytest.param({}, id="adapter"), pytest.param({"unlocked": True}, id="unlocked", marks=pytest.mark.slow)],
)
def test_two_ranks_end_in_the_same_figures_and_one_folder(place, tmp_path, rank_changes):
    options = {
        "--teacher": place / "model", "--data": place / "data", "--size": SIZE, "--steps": 3, "--batch-size": 2,
        "--eval-every": 2, "--eval-samples": 3, "--sampling-steps": 2, "--guidance": 1, "--out": tmp_path / "two",
        "--cache": tmp_path / "cache", "--learning-rate": "1e-3", "--long-prompts": "cut",
    }  # fmt: skip
    flags = [f"--{name}" for name in rank_changes]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [str(word) for item in options.items() for word in item]
    result = subprocess.run(
        [*launcher, str(ROOT / "train_scripts" / "train_controlnet.py"), *words, *flags],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    checkpoint = json.loads(next((tmp_path / "two").glob("checkpoints/step-*/config.json")).read_text())
    assert checkpoint["num_processes"] == 2
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["num_samples"] == 3
    card = (tmp_path / "two" / "controlnet" / "README.md").read_text()
    assert "batch: 4 images" in card, "those of both ranks"
    # One rank draws the same samples without control.
    single = make_config(
        place, tmp_path / "one", steps=3, batch_size=2, accumulate=2, eval_every=2, eval_samples=3, test_samples=0,
        guidance=1.0, cache=tmp_path / "cache", ema_decay=0.999, **rank_changes,
    )  # fmt: skip
    train_controlnet.main(single)
    alone = json.loads((tmp_path / "one" / "report.json").read_text())
    assert alone["scores_without_control"] == report["scores_without_control"]
    # What two ranks saved, judged by one.
    AcceleratorState._reset_state(reset_partial_state=True)
    base, validation, accelerator = make_looker(single)
    folder = tmp_path / "two" / "controlnet"
    if rank_changes:
        base.denoiser.network.model = UNet2DConditionModel.from_pretrained(folder / "unet")
    learned = ControlledDenoiser(base.denoiser, load_adapter(folder))
    look, _ = take_look(3, validation, learned, accelerator)
    assert look.gap.right == pytest.approx(report["gap"]["right"], rel=1e-4)
    for name, standing in look.standings.items():
        for part in ("value", "floor", "ceiling"):
            assert getattr(standing, part) == pytest.approx(report["scores"][name][part], abs=1e-3)


BAD = [
    ([], ["--teacher and --data are needed"]),
    (["--teacher", "{place}/nothing", "--data", "{place}/data"], ["nothing"]),
    (["--teacher", "{place}/model", "--data", "{place}/nothing"], ["nothing", "no such file or folder"]),
    (["--teacher", "{place}/model", "--data", "{place}/data", "--hint", "depth"], ["depth_file_name"]),
    (
        ["--teacher", "{place}/model", "--data", "{place}/data", "--eval-samples", "10", "--long-prompts", "cut"],
        ["held out", "--eval-samples"],
    ),
    (["--teacher", "{place}/model", "--data", "{place}/data", "--eval-samples", "1"], ["at least 2"]),
    (
        ["--teacher", "{place}/model", "--data", "{place}/data", "--prompt-drop", "1.5"],
        ["--prompt-drop", "[0, 1]"],
    ),
    (["--teacher", "{place}/model", "--data", "{place}/data", "--lr-floor", "2"], ["--lr-floor"]),
    (
        ["--teacher", "{place}/model", "--data", "{place}/data", "--learning-rate", "0"],
        ["--learning-rate", "(0, 1]"],
    ),
    (["--teacher", "{place}/model", "--data", "{place}/data", "--steps", "0"], ["--steps"]),
    (["--teacher", "{place}/model", "--data", "toyworld"], ["64 x 64"]),
    (["toyworld-canny", "--out", "{file}/run"], ["cannot write"]),
    (["toyworld-canny", "--hint", "nonsense", "--dry-run"], ["'nonsense'", "image, depth, normals"]),
    (["toyworld-canny", "--hint", ""], ["--hint is missing", "canny"]),
    (["toyworld-canny", "--cache", "{file}/cache"], ["--cache", "is a file"]),
    (["toyworld-canny", "--recompute-levels", "1"], ["--recompute-levels", "--gradient-checkpointing"]),
    (["sd15-canny", "--recompute-levels", "-1"], ["--recompute-levels must be at least 0"]),
    (["sd15"], ["no preset", "toyworld-canny", "Did you mean sd15-canny?"]),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD, ids=[" ".join(words[-2:]) for words, _ in BAD])
def test_bad_input_exits_with_2_and_writes_nothing(place, tmp_path, monkeypatch, capsys, arguments, expected):
    (tmp_path / "file").write_text("a file")
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    small = ["--size", str(SIZE), "--cache", str(tmp_path / "cache")] if arguments[0].startswith("--") else []
    words = [word.format(place=place, file=tmp_path / "file") for word in arguments]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["control", *words, *small, *out])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    for word in expected:
        assert word in said.err + said.out
    assert not (tmp_path / "out").exists()


SPOILT = {
    "rgba": lambda path: Image.new("RGBA", (32, 32), (255, 0, 0, 128)).save(path),
    "grey": lambda path: Image.new("L", (32, 32)).save(path),
    "16 bits": lambda path: Image.new("I;16", (32, 32)).save(path),
    "corrupt": lambda path: path.write_bytes(path.read_bytes()[:60]),
    "missing": lambda path: path.unlink(),
    "small": lambda path: Image.new("RGB", (7, 7)).save(path),
}


def test_left_out_samples_are_named_in_one_line_by_the_first_rank(place, tmp_path, capsys, monkeypatch):
    data = write_samples(tmp_path / "data", 6)
    for number in range(3):
        (data / f"{number}.png").unlink()
    config = make_config(place, tmp_path / "out", data=str(data), dry_run=True, test_samples=0, on_bad_data="skip")
    train_controlnet.main(config)
    said = capsys.readouterr().err
    assert said.count("left out 3 of 6 samples") == 1
    monkeypatch.setenv("RANK", "1")
    train_controlnet.main(config)
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize("fault", list(SPOILT))
def test_bad_data_are_named_and_stop_or_are_skipped(place, tmp_path, capsys, fault):
    data = write_samples(tmp_path / "data", 6)
    SPOILT[fault](data / "2.png")
    config = make_config(place, tmp_path / "out", data=str(data), steps=1, test_samples=0)
    with pytest.raises(ValueError, match=r"2\.png"):
        train_controlnet.main(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    train_controlnet.main(replace(config, on_bad_data="skip"))
    assert f"left out 1 of 6 samples: {data / '2.png'}" in capsys.readouterr().err


def test_empty_captions_are_named(place, tmp_path):
    data = write_samples(tmp_path / "data", 4, caption=" ")
    with pytest.raises(ValueError, match=r"0\.png has an empty caption"):
        train_controlnet.main(make_config(place, tmp_path / "out", data=str(data)))


def test_presets_are_defaults_that_flags_override(monkeypatch, tmp_path):
    seen = []
    arguments = ["toyworld-canny", "--steps", "7", "--out", str(tmp_path)]
    monkeypatch.setattr("controlnet.recipe.main", seen.append)
    cli.main(["control", *arguments])
    assert seen == [replace(PRESETS["toyworld-canny"](), steps=7, out=tmp_path)]


def test_every_preset_is_named_and_its_numbers_are_possible():
    assert all(PRESETS[name]().preset == name for name in PRESETS)
    for name in PRESETS - {""}:
        config = PRESETS[name]()
        assert config.preset == name
        train_controlnet.check(config)


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


def test_captions_of_circles_become_two_tokens():
    states = encode_captions(["red circle with pale green background", "", "lime circle with red background"])
    states = states["encoder_hidden_states"]
    assert states.shape == (3, 2, 2 * len(circles.COLOURS))
    assert states.sum((1, 2)).tolist() == [2, 0, 2]
    red = circles.COLOURS.index("red")
    assert states[0, 0, red] == 1
    assert states[2, 1, len(circles.COLOURS) + red] == 1
    with pytest.raises(ValueError, match="expected a caption such as"):
        encode_captions(["red square with blue background"])


@pytest.mark.parametrize("preset", ["toyworld-canny", "toyworld-depth"])
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


def test_a_standing_in_full():
    assert in_full(Standing(0.5, 0.25, 0.75)) == {"value": 0.5, "floor": 0.25, "ceiling": 0.75, "relative": 0.5}


def test_a_look_without_control_is_that_of_the_base(place):
    base = load_teacher(str(place / "model"), size=SIZE, cache=place / "cache")
    adapter = train_controlnet.copy_encoder(base.denoiser, hint_channels=1, factor=base.codec.factor)
    for parameter in adapter.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    x_t, t = torch.randn(2, 4, SIZE // base.codec.factor, SIZE // base.codec.factor), torch.full((2,), 500.0)
    hint, cond = torch.ones(2, 1, SIZE, SIZE), base.prompts(["a", "b"])
    free = ControlledDenoiser(base.denoiser, adapter, hint, scale=0.0)
    assert torch.equal(free(x_t, t, cond), base.denoiser(x_t, t, cond))
    assert not torch.equal(replace(free, scale=1.0)(x_t, t, cond), base.denoiser(x_t, t, cond))
