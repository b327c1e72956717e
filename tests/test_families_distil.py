"""Two steps of distillation of every family, and its student in stock diffusers: the image of the training."""

import shutil
from dataclasses import replace

import diffusers
import pytest
import tiny_pipelines
import tiny_transformers as tiny
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from trainers import Killed, kill, stop

import distill.options
import distill.recipe
import sds.options
import sds.recipe
from distill.export import LORA, export_student, lcm_times, scheduler_for
from distill.student import Student
from scorefield.files import read_json
from scorefield.models.families.flux import pack, unpack
from scorefield.models.teacher import load_teacher

PROMPTS = ("a red mug", "two blue chairs")
FAST = ("flux", "z_image")
NAMES = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in tiny.FAMILIES if name != "dit"
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    yield root
    shutil.rmtree(root)


def pipeline_folder(root, name):
    if not (root / name).exists():
        make = tiny_pipelines.sd3 if name == "sd3" else tiny.FAMILIES[name]
        make().save_pretrained(root / name)
    return root / name


def distilled(root, name, out, **changes):
    """A student of two updates at a rate that shows."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = distill.options.Config(
        preset="text", teacher=str(pipeline_folder(root, name)), prompts=str(root / "prompts.txt"), out=out,
        **{"steps": 2, "student_every": 1, "batch_size": 2, "warmup_steps": 1, "num_pairs": 4, "pair_steps": 2,
           "guard_images": 64, "guard_every": 2, "fake_warmup": 1, "student_lr": 1e-2, "fake_lr": 1e-3,
           "warmup_lr": 1e-2, "guidance": 2.0, "size": 32, "skip_teacher_check": True, "ema_decay": 0.0,
           "max_setbacks": 9, "gan_weight": 0.0, **changes},
    )  # fmt: skip
    return distill.recipe.main(config)


def stock_image(name, pipeline, noise, size):
    """What a plain call of the pipeline draws of the first prompt in one step, in [-1, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    given = {"height": size[0], "width": size[1], "num_inference_steps": 1, "output_type": "pt"}
    if name == "flux":
        given |= {"latents": pack(noise), "guidance_scale": 3.5}
    elif name == "flux2":
        given |= {"latents": noise, "guidance_scale": 4.0}
    elif name == "qwen_image":
        given |= {"latents": pack(noise), "true_cfg_scale": 1.0}
    elif name == "z_image":
        given |= {"latents": noise, "guidance_scale": 0.0}
    elif name == "wan":
        given |= {"latents": noise[:, :, None], "guidance_scale": 1.0, "num_frames": 1}
    else:
        given |= {"latents": noise, "guidance_scale": 1.0}
    if name in ("sana", "pixart_sigma"):
        given["use_resolution_binning"] = False
    made = pipeline(prompt=PROMPTS[0], **given)
    images = made.frames[:, 0] if name == "wan" else made.images
    return torch.as_tensor(images).float() * 2 - 1


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_stock_diffusers_draws_the_students_image(root, tmp_path, name, lora):
    changes = {"lora": True, "lora_rank": 4} if lora else {}
    folder = distilled(root, name, tmp_path / "run", **changes)
    teacher = load_teacher(root / name, size=32, cache=tmp_path / "cache")
    noise = torch.randn(1, *teacher.shape, generator=torch.Generator().manual_seed(3))
    cond = teacher.prompts(PROMPTS[:1])
    untrained = Student(teacher.denoiser, (first(teacher),)).sample(noise, cond)
    told = {"flux": "3.5", "flux2": "4"}.get(name, "1")
    assert f"guidance_scale={told}, height" in (folder / "README.md").read_text()
    if (folder / LORA).is_file():
        pipeline = DiffusionPipeline.from_pretrained(root / name)
        pipeline.load_lora_weights(folder)
        facts = read_json(folder / "dmd2.json")
        kind = getattr(diffusers, read_json(folder / "scheduler" / "scheduler_config.json")["_class_name"])
        pipeline.scheduler = kind.from_pretrained(folder, subfolder="scheduler")
        student = load_lora(teacher, folder)
        times = tuple(t / teacher.denoiser.time_scale for t in facts["dmd2_denoising_timesteps"])
    else:
        pipeline, made = DiffusionPipeline.from_pretrained(folder), load_teacher(folder, size=32, few_steps=True)
        student, times = made.denoiser, made.times
    ours = Student(student, times).sample(noise, cond)
    wanted = teacher.decode(ours).clamp(-1, 1)
    found = stock_image(name, pipeline, noise, teacher.size)
    assert (found - wanted).abs().max() <= 2 * 2 / 255
    assert (untrained - ours).abs().max() > 0.01, "nothing was learned"


def first(teacher):
    """The time that a student of one step is asked at."""
    return lcm_times(teacher.denoiser.schedule, 1, highest=3.5)[0]


def load_lora(teacher, folder):
    """The teacher's denoiser with a LoRA file, read by peft alone."""
    weights = {name.partition(".")[2]: value for name, value in load_file(folder / LORA).items()}
    targets = sorted({name.rpartition(".lora_")[0] for name in weights})
    rank = next(value.shape[0] for name, value in weights.items() if name.endswith("lora_A.weight"))
    network = teacher.denoiser.network
    model = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), network.model)
    set_peft_model_state_dict(model, weights)
    return replace(teacher.denoiser, network=network)


@pytest.mark.parametrize(
    "name",
    [name if name.values[0] != "z_image" else pytest.param("z_image", marks=pytest.mark.slow) for name in NAMES],
)
def test_a_critic_learns_on_a_transformer(root, tmp_path, name):
    folder = distilled(root, name, tmp_path / "run", gan_weight=0.01, reals="teacher")
    assert (folder / "model_index.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["flux", "z_image", "qwen_image", "sd3", "sana", "pixart_sigma", "lumina2"])
def test_a_run_of_every_family_that_is_killed_ends_in_the_same_bytes(
    root, tmp_path, monkeypatch, capsys, name, lora
):
    changes = {"gan_weight": 0.01, "reals": "teacher", "save_every": 1, "guard_images": 0, "lora": lora}
    changes |= {"lora_rank": 4} if lora else {}
    whole = distilled(root, name, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        stop(patch, 2, kill)
        with pytest.raises(Killed):
            distilled(root, name, tmp_path / "cut", **changes)
    saved = load_file(tmp_path / "cut" / "checkpoints" / "step-000000001" / "student.safetensors")
    capsys.readouterr()
    cut = distilled(root, name, tmp_path / "cut", **changes)
    assert "resumed from step 1\n" in capsys.readouterr().out
    last = load_file(tmp_path / "cut" / "checkpoints" / "step-000000002" / "student.safetensors")
    assert any(not torch.equal(saved[name], last[name]) for name in last), "the second step changes nothing"
    files = [path.relative_to(whole) for path in whole.rglob("*.safetensors")]
    assert files
    for file in files:
        assert (whole / file).read_bytes() == (cut / file).read_bytes(), file


def test_students_of_two_steps_are_drawn_alike(root, tmp_path):
    teacher = load_teacher(pipeline_folder(root, "flux"), size=32, cache=tmp_path / "cache")
    student = Student(teacher.denoiser, (1.0, 0.5))
    assert scheduler_for(student, read_json(root / "flux" / "scheduler" / "scheduler_config.json"))
    folder = export_student(student, root / "flux", tmp_path / "student", size=(32, 32))
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *teacher.shape, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(5)
    found = pipeline(PROMPTS[0], height=32, width=32, num_inference_steps=2, guidance_scale=3.5,
                     latents=pack(noise), output_type="pt").images * 2 - 1  # fmt: skip
    torch.manual_seed(5)
    packed = torch.randn(pack(noise).shape)  # the noise between steps is drawn in the packed shape
    cond, t = teacher.prompts(PROMPTS[:1]), torch.ones(1)
    x0 = teacher.denoiser(noise, t, cond)
    x_t = teacher.denoiser.schedule.diffuse(x0, unpack(packed, *noise.shape[2:]), 0.5 * t)
    wanted = teacher.decode(teacher.denoiser(x_t, 0.5 * t, cond)).clamp(-1, 1)
    assert (found - wanted).abs().max() <= 2 * 2 / 255


@pytest.mark.parametrize("method", ["sds", "vsd"])
@pytest.mark.parametrize("name", NAMES)
def test_pictures_learn_from_every_family(root, tmp_path, name, method):
    """Two steps of score distillation on a canvas: its pictures move, and are finite."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = sds.options.Config(
        preset="dreamfusion", prompt="a mug", canvas=True, method=method, teacher=str(pipeline_folder(root, name)),
        size=32, steps=2, batch_size=2, guidance=(2.0, 2.0), probe_every=1, out=tmp_path / "run",
        learning_rate=(0.1, 0.1),
    )  # fmt: skip
    assert sds.recipe.main(config).is_file()
    first, last = (
        load_file(tmp_path / "run" / "checkpoints" / f"step-{step:09d}" / "scene.safetensors") for step in (0, 2)
    )
    moved = [(first[name] - last[name]).abs().max() for name in first]
    assert max(moved) > 0
    assert all(value.isfinite().all() for value in last.values())


def class_config(root, out, **changes):
    return distill.options.Config(
        teacher=str(pipeline_folder(root, "dit")), out=out,
        **{"steps": 2, "student_every": 1, "batch_size": 4, "warmup_steps": 1, "num_pairs": 8, "pair_steps": 2,
           "guard_images": 64, "guard_every": 2, "fake_warmup": 1, "student_lr": 1e-2, "fake_lr": 1e-3,
           "warmup_lr": 1e-2, "guidance": 2.0, "skip_teacher_check": True, "ema_decay": 0.0, "max_setbacks": 9,
           "eval_every": 0, **changes},
    )  # fmt: skip


def test_classes_in_latents_are_distilled_into_a_pipeline(root, tmp_path):
    """DiT: two updates with a critic on the teacher's own images; stock DiTPipeline draws the same image."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = distill.recipe.main(class_config(root, tmp_path / "run", gan_weight=0.01, reals="teacher"))
    teacher = load_teacher(root / "dit")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline([3, 7], guidance_scale=1, num_inference_steps=1, output_type="np",
                     generator=torch.Generator().manual_seed(1)).images  # fmt: skip
    noise = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(1))
    cond = teacher.cond(torch.tensor([3, 7]))
    trained = load_file(tmp_path / "run" / "checkpoints" / "step-000000002" / "student.safetensors")
    start = Student(teacher.denoiser, lcm_times(teacher.denoiser.schedule, 1, highest=3.5))
    untrained = teacher.decode(start.sample(noise, cond))
    teacher.denoiser.network.load_state_dict(trained)
    images = teacher.decode(start.sample(noise, cond))
    wanted = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert (torch.from_numpy(found) - wanted).abs().max() <= 2 / 255
    assert (images - untrained).abs().max() > 0.01, "nothing was learned"
    again = load_teacher(folder, few_steps=True)
    assert again.times == start.times
    assert "pipe([207], num_inference_steps=1, guidance_scale=1)" in (folder / "README.md").read_text()


def test_what_classes_in_latents_cannot_do_is_refused(root, tmp_path):
    config = class_config(root, tmp_path / "run")
    with pytest.raises(ValueError, match=r"images for it are not encoded\. Leave out --data"):
        distill.recipe.main(replace(config, data=tmp_path))
    with pytest.raises(ValueError, match="no LCMScheduler asks at the times"):
        distill.recipe.main(replace(config, times=(700.0, 100.0), num_steps=2))
    with pytest.raises(ValueError, match="draws prompts: pass --prompts"):
        distill.recipe.main(replace(config, teacher=str(pipeline_folder(root, "flux"))))
    assert not (tmp_path / "run").exists()
