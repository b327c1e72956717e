"""Videos of Wan: drawn as its own pipeline draws them, distilled and exported; refused where images are needed."""

import io
import json
import shutil
from contextlib import redirect_stdout

import numpy as np
import pytest
import tiny_transformers as tiny
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline, FlowMatchLCMScheduler
from folders import captioned
from hostile import run
from PIL import Image
from safetensors.torch import load_file
from trainers import Killed, kill, stop

import distill.options
import distill.recipe
import scorefield.commands.sample as sample
from distill.export import LORA
from distill.guard import pooled
from scorefield import guided
from scorefield.commands.options import Sample
from scorefield.files import read_json
from scorefield.models.codec import latent_frames
from scorefield.models.lora_student import load_lora_student
from scorefield.models.student import Student
from scorefield.models.teacher import load_teacher
from scorefield.sampling import ddim
from scorefield.sampling import sample as draw_steps
from scorefield.training.report import as_grid, as_rows

PROMPTS = ("a red mug", "two blue chairs")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("video")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    tiny.wan().save_pretrained(root / "wan")
    yield root
    shutil.rmtree(root)


@pytest.fixture(autouse=True)
def own_cache(root, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))


def stock(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def frames_of(pipeline, prompts, noise, size, frames, steps, **given):
    """What the stock pipeline draws from ``noise``, (b, c, frames, h, w) in [-1, 1]."""
    made = pipeline(prompt=list(prompts), latents=noise, height=size[0], width=size[1], num_frames=frames,
                    num_inference_steps=steps, output_type="pt", **given).frames  # fmt: skip
    return torch.as_tensor(made).float().transpose(1, 2) * 2 - 1


@pytest.mark.parametrize(("frames", "size", "scale"), [(5, (32, 32), 1.0), (9, (32, 48), 2.5)])
def test_our_sampler_draws_the_frames_that_the_pipeline_draws(root, frames, size, scale):
    teacher = load_teacher(root / "wan", size=size, num_frames=frames)
    assert teacher.shape == (16, 1 + (frames - 1) // 4, size[0] // 8, size[1] // 8)
    assert (teacher.num_frames, teacher.image_shape) == (frames, (3, frames, *size))
    pipeline = stock(root / "wan")
    noise = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(1))
    away = {"negative_prompt": ["dull"] * 2} if scale != 1 else {}
    wanted = frames_of(pipeline, PROMPTS, noise, size, frames, 3, guidance_scale=scale, **away)
    denoiser = guided(teacher.denoiser, scale, teacher.negative("dull"))
    times = pipeline.scheduler.sigmas[:-1].double()
    with torch.no_grad():
        x0 = draw_steps(denoiser, noise, teacher.prompts(PROMPTS), times=times, step=ddim())
        found = teacher.decode(x0).clamp(-1, 1)
    assert wanted.shape == (2, 3, frames, *size)
    assert wanted.std() > 0.01
    assert (found - wanted).abs().max() <= 1e-4
    assert (found[:, :, 0] - found[:, :, -1]).abs().max() > 0.01, "frames are alike"


def test_videos_become_latents_and_come_back_as_the_autoencoder_has_them(root):
    teacher, vae = load_teacher(root / "wan", size=32, num_frames=9), stock(root / "wan").vae
    video = torch.rand(2, 3, 9, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = teacher.encode(video)
        assert latents.shape == (2, *teacher.shape)
        wanted = vae.decode(vae.encode(video).latent_dist.mode()).sample
        assert torch.allclose(teacher.decode(latents), wanted, atol=1e-5)
        image = teacher.encode(video[:, :, 0])
        assert torch.allclose(latents[:, :, 0], image, atol=1e-5), "the first latent is the first frame's"
    with pytest.raises(ValueError, match=r"1 more than a multiple of 4; got 8\. Nearest are 5 and 9"):
        teacher.encode(video[:, :, :8])
    still = load_teacher(root / "wan", size=32)
    assert (still.shape, still.num_frames, still.image_shape) == ((16, 4, 4), 1, (3, 32, 32))


def test_frames_that_an_autoencoder_takes():
    assert [latent_frames(number, 4) for number in (1, 5, 9, 81)] == [1, 2, 3, 21]
    assert latent_frames(7, 1) == 7
    with pytest.raises(ValueError, match=r"must be 1 more than a multiple of 4; got 4\. Nearest are 1 and 5"):
        latent_frames(4, 4)


def test_a_picture_of_videos_has_a_row_for_each(root):
    videos = torch.arange(2 * 20, dtype=torch.float32).view(2, 1, 20, 1, 1).expand(2, 3, 20, 4, 6) / 40
    rows, columns = as_rows(videos, 3)
    assert (len(rows), columns) == (16, 8)
    assert (40 * rows[:, 0, 0, 0]).round().tolist() == [0, 3, 5, 8, 11, 14, 16, 19, 20, 23, 25, 28, 31, 34, 36, 39]
    assert as_grid(videos, 3).shape == (1, 3, 2 * 5 + 1, 8 * 7 + 1)
    images = torch.rand(4, 3, 4, 4)
    assert as_rows(images, 2) == (images, 2)
    assert torch.allclose(pooled(videos), videos.mean((2, 3, 4)))


def config_of(root, out, **changes):
    asked = {"prompts": PROMPTS, "num_images": 3, "steps": 2, "size": 32, "num_frames": 5, **changes}
    return Sample(teacher=str(root / "wan"), out=out, **asked)


def test_sampled_videos_are_gifs_a_grid_of_frames_and_exact_in_npz(root, tmp_path):
    out = sample.main(config_of(root, tmp_path / "made"))
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == ["0000/000000.gif", "0001/000001.gif", "0000/000002.gif"]
    assert {row["num_frames"] for row in rows} == {5}
    with Image.open(out / rows[0]["file_name"]) as film:
        assert (film.n_frames, film.size, film.info["duration"], film.info["loop"]) == (5, (32, 32), 60, 0)
    with Image.open(tmp_path / "made.grid.png") as grid:
        assert grid.size == (5 * 33 + 1, 3 * 33 + 1)
    whole = np.load(sample.main(config_of(root, tmp_path / "a.npz")))["images"]
    alone = np.load(sample.main(config_of(root, tmp_path / "b.npz", batch_size=1)))["images"]
    assert whole.shape == (3, 3, 5, 32, 32)
    assert np.abs(whole.astype(int) - alone).max() <= 1
    still = np.load(sample.main(config_of(root, tmp_path / "c.npz", num_frames=1)))["images"]
    assert still.shape == (3, 3, 32, 32)
    assert sample.batch_size_for((480, 832), 81) == 1
    assert sample.batch_size_for((32, 32), 16) == 64


def options_of(root, out, **changes):
    return distill.options.Config(
        preset="text", teacher=str(root / "wan"), prompts=str(root / "prompts.txt"), out=out,
        **{"steps": 2, "student_every": 1, "batch_size": 2, "warmup_steps": 1, "num_pairs": 4, "pair_steps": 2,
           "guard_images": 64, "guard_every": 2, "fake_warmup": 1, "student_lr": 1e-2, "fake_lr": 1e-3,
           "warmup_lr": 1e-2, "guidance": 2.0, "size": 32, "num_frames": 5, "skip_teacher_check": True,
           "ema_decay": 0.0, "max_setbacks": 9, "lora": True, "lora_rank": 4, **changes},
    )  # fmt: skip


def distilled(root, out, **changes):
    AcceleratorState._reset_state(reset_partial_state=True)
    return distill.recipe.main(options_of(root, out, **changes))


@pytest.mark.parametrize(("steps", "lora"), [
    (1, True), pytest.param(4, True, marks=pytest.mark.slow), pytest.param(2, False, marks=pytest.mark.slow),
])  # fmt: skip
def test_stock_diffusers_draws_the_students_frames(root, tmp_path, steps, lora):
    """DMD in 1 and 4 steps as a LoRA, and in 2 of all weights; noise between steps is the global generator's."""
    changes = {} if lora else {"lora": False, "lora_rank": 64, "skip_teacher_check": False}
    folder = distilled(root, tmp_path / "run", num_steps=steps, **changes)
    teacher = load_teacher(root / "wan", size=32, num_frames=5)
    if lora:
        assert (folder / LORA).is_file()
        pipeline, student = stock(root / "wan"), load_lora_student(folder, teacher)
        with pytest.raises(ValueError, match="learned videos of 5 frames, and --teacher draws 1"):
            load_lora_student(folder, load_teacher(root / "wan", size=32))
        pipeline.load_lora_weights(folder)
        pipeline.scheduler = FlowMatchLCMScheduler.from_pretrained(folder, subfolder="scheduler")
    else:
        pipeline, student = stock(folder), load_teacher(folder, size=32, few_steps=True, num_frames=0)
        assert student.shape == teacher.shape
        with pytest.raises(ValueError, match="draws videos of 5 frames, and images are needed here"):
            load_teacher(folder, size=32, few_steps=True)
        assert (tmp_path / "run" / "teacher_check.png").is_file()
        drawn = sample.main(Sample(teacher=str(folder), prompts=PROMPTS, size=32, out=tmp_path / "drawn.npz"))
        assert np.load(drawn)["images"].shape == (2, 3, 5, 32, 32)
        distilled(root, tmp_path / "on", num_steps=2, init_from=str(folder), dry_run=True, **changes)
    assert len(student.times) == steps
    noise, cond = torch.randn(2, *teacher.shape), teacher.prompts(PROMPTS)
    torch.manual_seed(5)
    found = frames_of(pipeline, PROMPTS, noise, (32, 32), 5, steps, guidance_scale=1.0)
    torch.manual_seed(5)
    x0 = Student(student.denoiser, student.times).sample(noise, cond, generator=torch.default_generator)
    wanted = teacher.decode(x0).detach().clamp(-1, 1)
    assert (found - wanted).abs().max() <= 2 * 2 / 255
    untrained = Student(teacher.denoiser, student.times[:1]).sample(noise, cond)
    first = Student(student.denoiser, student.times[:1]).sample(noise, cond)
    assert (untrained - first).abs().max() > 0.01, "nothing was learned"
    card = (folder / "README.md").read_text()
    assert "height=32, width=32, num_frames=5).frames[0]" in card
    assert "pipeline_tag: text-to-video" in card
    assert read_json(folder / ("dmd2.json" if lora else "model_index.json"))["dmd2_num_frames"] == 5
    with Image.open(tmp_path / "run" / "beside_teacher.png") as beside:
        assert beside.size == (5 * 33 + 1, 2 * 4 * 33 + 1)
    assert list((tmp_path / "run" / "samples").glob("*.png"))


@pytest.mark.slow
def test_a_run_of_videos_that_is_killed_ends_in_the_same_bytes(root, tmp_path, monkeypatch, capsys):
    changes = {"save_every": 1, "guard_images": 0}
    whole = distilled(root, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        stop(patch, 2, kill)
        with pytest.raises(Killed):
            distilled(root, tmp_path / "cut", **changes)
    capsys.readouterr()
    cut = distilled(root, tmp_path / "cut", **changes)
    assert "resumed from step 1\n" in capsys.readouterr().out
    first, last = (
        load_file(tmp_path / "cut" / "checkpoints" / f"step-00000000{n}" / "student.safetensors") for n in (1, 2)
    )
    assert any(not torch.equal(first[name], last[name]) for name in last), "the second step changes nothing"
    assert (whole / LORA).read_bytes() == (cut / LORA).read_bytes()
    with pytest.raises(ValueError, match=r"belongs to another config.*num_frames: 5 there, 9 now"):
        distilled(root, tmp_path / "cut", num_frames=9, **changes)


@pytest.mark.slow
def test_a_dry_run_counts_the_frames(root, tmp_path):
    def most(frames):
        said = io.StringIO()
        with redirect_stdout(said):
            distilled(root, tmp_path / "run", num_frames=frames, size=256, dry_run=True, guard_images=0)
        lines = said.getvalue().splitlines()
        found = {line.partition(":")[0]: line for line in lines if line.startswith("activations, ")}
        return [int(found[f"activations, {name}"].rpartition(", ")[2].split()[0].replace(",", "")) for name in (
            "update of the student", "update of the fake score", "teacher pairs", "decoding a picture",
        )]  # fmt: skip

    few, many = most(5), most(33)  # 2 latents and 9, of 256 tokens each, beside 512 tokens of texts
    assert all(2.5 < b / a < 4.5 for a, b in zip(few[:3], many[:3], strict=True)), (few, many)
    assert many[3] > 2 * few[3], (few, many)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("changes", "said"), [
    ({"num_frames": 4}, "must be 1 more than a multiple of 4; got 4. Nearest are 1 and 5"),
    ({"num_frames": 257}, "num_frames must be at most 253 here; got 257"),
    ({"num_frames": 0}, "--num-frames must be above 0; got 0"),
    ({"size": 1040}, "size must be at most 1024 pixels here; got 1040 x 1040"),
    ({"method": "sid"}, "makes videos, which --method sid does not learn from. Pass --method dmd"),
    ({"gan_weight": 0.01}, "makes videos, and the critic of --gan-weight reads images. Pass --gan-weight 0"),
    ({"reals": "teacher"}, "makes videos, and --reals teacher is for a critic of images"),
    ({"eval_every": 1}, "makes videos, and the judge of --eval-every sees pictures"),
])  # fmt: skip
def test_what_videos_cannot_be_is_refused_before_anything_is_written(root, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        distilled(root, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_models_of_images_and_other_kinds_of_wan_are_refused(root, tmp_path):
    tiny.z_image().save_pretrained(tmp_path / "z_image")
    with pytest.raises(ValueError, match="num_frames is for models of videos, and ZImagePipeline draws images"):
        load_teacher(tmp_path / "z_image", size=32, num_frames=5)
    load_teacher(tmp_path / "z_image", size=32, num_frames=1)
    with pytest.raises(ValueError, match=r"num_frames must be 0, .* or more; got -3"):
        load_teacher(tmp_path / "z_image", size=32, num_frames=-3)
    with pytest.raises(ValueError, match="for models of videos, and StableDiffusionPipeline draws images"):
        load_teacher("toyworld", num_frames=5)
    shutil.copytree(root / "wan", tmp_path / "wan")
    index = tmp_path / "wan" / "model_index.json"
    own = json.loads(index.read_text())
    for name, value in (("boundary_ratio", 0.875), ("expand_timesteps", True),
                        ("transformer_2", ["diffusers", "WanTransformer3DModel"])):  # fmt: skip
        index.write_text(json.dumps({**own, name: value}))
        with pytest.raises(ValueError, match=f"is a WanPipeline with {name}, which is not supported"):
            load_teacher(tmp_path / "wan", size=32)
    for value in (0, "5", 2.5, True, [5]):
        index.write_text(json.dumps({**own, "dmd2_num_frames": value}))
        with pytest.raises(ValueError, match="dmd2_num_frames must be a whole number above 0"):
            load_teacher(tmp_path / "wan", size=32)


@pytest.mark.parametrize("command", ["sds", "control", "edit"])
def test_commands_of_images_know_no_frames(root, tmp_path, command):
    words = {"sds": ["dreamfusion", "a mug"], "control": ["toyworld-canny"], "edit": []}[command]
    code, said = run(command, [*words, "--teacher", str(root / "wan"), "--num-frames", "5"])
    assert code == 2
    assert "--num-frames" in said


def test_videos_are_no_data(root, tmp_path):
    """Files of films are refused; pictures beside prompts are passed over, and said to be."""
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    for source in ("films", "films/a.mp4"):
        words = ["--teacher", str(root / "wan"), "--prompts", str(tmp_path / source), "--num-frames", "5",
                 "--out", str(tmp_path / "run"), "--size", "32"]  # fmt: skip
        code, said = run("distill", words)
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert (code, len(errors)) == (2, 1), said
        assert str(tmp_path / "films") in errors[0]
    words[3] = str(captioned(tmp_path / "pictures", PROMPTS).parent)
    code, said = run("distill", [*words, "--dry-run"])
    assert code == 0, said
    assert "passed over: 2 pictures beside the prompts; videos are learned from prompts alone" in said
    assert not (tmp_path / "run").exists()
