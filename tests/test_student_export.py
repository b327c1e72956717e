"""What is exported gives the training-time image in stock diffusers, in another process, for the same noise."""

import copy
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from distill.export import (
    LORA,
    export_lora,
    export_pipeline,
    export_student,
    lcm_times,
    read_student_facts,
    scheduler_for,
)
from distill.student import Student, even_times
from scorefield.denoiser import NetworkDenoiser
from scorefield.models.lora import shared_backbone
from scorefield.models.networks import ResidualMLP
from scorefield.models.teacher import load_teacher
from scorefield.schedule import RectifiedFlow, VariancePreserving
from toyworld import pipeline_folder

FAMILIES = {"sd": tiny.sd, "sd2": lambda: tiny.sd("v_prediction"), "sdxl": tiny.sdxl, "sd3": tiny.sd3}
TEXTS = "model.safetensors"
PROMPTS = ["a red mug", "a blue chair"]

# Nothing of this package: only torch, diffusers and the folder.
PROGRAM = """
import json, sys
import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchLCMScheduler, LCMScheduler

answers = {}
for name, job in json.load(open(sys.argv[1])).items():
    pipe = DiffusionPipeline.from_pretrained(job["pipeline"], local_files_only=True)
    if job["lora"]:
        pipe.load_lora_weights(job["lora"])
        kinds = {kind.__name__: kind for kind in (FlowMatchLCMScheduler, LCMScheduler)}
        pipe.scheduler = kinds[job["scheduler"]].from_pretrained(job["lora"], subfolder="scheduler")
    if job["fuse"]:
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    pipe.set_progress_bar_config(disable=True)
    noise = torch.load(job["noise"], weights_only=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(noise))]
    torch.manual_seed(7)
    images = pipe(
        job["prompts"], latents=noise, generator=generators, num_inference_steps=job["steps"], guidance_scale=1.0,
        output_type="np",
    ).images
    answers[name] = images
assert not any(module.split(".")[0] in ("scorefield", "distill") for module in sys.modules)
np.savez(sys.argv[2], **answers)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, make in FAMILIES.items():
        make().save_pretrained(root / name)
    return {**{name: root / name for name in FAMILIES}, "toyworld": pipeline_folder()}


def changed(network, strength):
    """Weights that differ from the teacher's, as training makes them."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        spread = strength * (parameter.std(correction=0) + (0.05 if parameter.ndim > 1 else 0))
        parameter.data += spread * torch.randn(parameter.shape, generator=generator)
    return network


def make_student(teacher, num_steps, lora, highest=math.inf):
    denoiser = teacher.denoiser
    if lora:
        alpha = 2.0  # a scale of its own has to be exported, too
        role = shared_backbone(denoiser, rank=4, alpha=alpha, generator=torch.Generator().manual_seed(0))[0]
        changed(role.network, 0.5)
    else:
        role = replace(denoiser, network=changed(copy.deepcopy(denoiser.network), 0.2))
    return Student(role, lcm_times(denoiser.schedule, num_steps, highest=highest))


CASES = [
    (family, steps, kind)
    for family in (*FAMILIES, "toyworld")
    for steps in (1, 4)
    for kind in ("full", "lora", "fused", "merged")
    # One step is four with less; it differs by family in its scheduler alone, and sd2 from sd in its prediction.
    if (family != "sd2" or kind in ("full", "lora"))
    and (steps == 4 or (family in ("sd", "sd3", "toyworld") and kind in ("full", "lora")))
]
# From a moderate noise level on, as the default recipe has it: the scheduler's betas are cut off there.
CUT_OFF = [("toyworld", 1, "cut"), ("toyworld", 4, "cut"), ("sd2", 2, "cut"), ("sdxl", 4, "cut-lora")]
CASES += CUT_OFF
SLOW = [
    (family, steps, kind)
    for family, steps, kind in CASES
    if (kind in ("fused", "merged") and family in ("sdxl", "sd3", "toyworld")) or (family == "sd3" and steps == 1)
] + [("toyworld", 1, "lora"), ("sd2", 4, "lora")]
"""What differs from another case by its family alone."""


@pytest.fixture(scope="module")
def answers(folders, tmp_path_factory):
    return make_answers([case for case in CASES if case not in SLOW], folders, tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module")
def slow_answers(folders, tmp_path_factory):
    return make_answers(SLOW, folders, tmp_path_factory.mktemp("exported"))


def make_answers(cases, folders, root):
    """For every case the training-time images and those of a fresh process."""
    wanted, jobs, teachers = {}, {}, {}
    for family, steps, kind in cases:
        source, name = folders[family], f"{family}-{steps}-{kind}"
        if family not in teachers:
            teachers[family] = load_teacher(source, cache=root / "cache")
        teacher = teachers[family]
        lora = kind not in ("full", "cut")
        student = make_student(teacher, steps, lora, 3.5 if kind.startswith("cut") else math.inf)
        noise = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(3))
        torch.save(noise, root / f"{name}.pt")
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        if family == "sd3":  # whose pipeline draws between steps from the global generator, whatever it is given
            generators = torch.Generator().manual_seed(7)
        cond = teacher.prompts(PROMPTS)
        with torch.no_grad():
            x0 = student.sample(noise, cond, generator=generators)
            wanted[name] = (teacher.decode(x0).clamp(-1, 1) / 2 + 0.5, teacher.decode(x0).std())
        lora = kind in ("lora", "fused", "cut-lora")
        write = export_pipeline if kind == "merged" else export_student  # which knows a LoRA by its LoRA
        out = write(student, source, root / name)
        scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
        jobs[name] = {
            "pipeline": str(source if lora else out), "lora": str(out) if lora else "", "fuse": kind == "fused",
            "scheduler": scheduler, "noise": str(root / f"{name}.pt"), "steps": steps, "prompts": PROMPTS,
        }  # fmt: skip
    (root / "jobs.json").write_text(json.dumps(jobs))
    (root / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(root / "program.py"), str(root / "jobs.json"), str(root / "answers.npz")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = np.load(root / "answers.npz")
    return root, wanted, {name: torch.from_numpy(found[name]).permute(0, 3, 1, 2) for name in found}


@pytest.mark.parametrize(("family", "steps", "kind"), [case for case in CASES if case not in SLOW])
def test_stock_diffusers_gives_the_image_of_the_training(answers, family, steps, kind):
    assert_same_images(answers, family, steps, kind)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "steps", "kind"), SLOW)
def test_stock_diffusers_gives_it_for_every_family(slow_answers, family, steps, kind):
    assert_same_images(slow_answers, family, steps, kind)


def assert_same_images(answers, family, steps, kind):
    _, wanted, found = answers
    name = f"{family}-{steps}-{kind}"
    images, spread = wanted[name]
    assert (found[name] - images).abs().max() <= 2 / 255
    assert spread > 0.01, "a flat picture would prove nothing"
    # It is the prompt, the noise and the weights that made it.
    assert (images[0] - images[1]).abs().max() > 8 / 255


@pytest.mark.parametrize(("family", "steps", "kind"), CUT_OFF)
def test_the_exported_scheduler_begins_at_the_students_noise_level(answers, family, steps, kind):
    """Its betas are the teacher's up to there: the noise between two steps is that of the training."""
    root, _, _ = answers
    scheduler = LCMScheduler.from_pretrained(root / f"{family}-{steps}-{kind}" / "scheduler")
    scheduler.set_timesteps(steps)
    times = {1: [712], 2: [711, 355], 4: [711, 533, 355, 177]}[steps]
    assert scheduler.timesteps.tolist() == times
    assert len(scheduler.config.trained_betas) == times[0] + 1
    whole = VariancePreserving.scaled_linear().alphas_cumprod[: times[0] + 1]
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), whole.double(), rtol=1e-4, atol=0)
    facts = read_student_facts(root / f"{family}-{steps}-{kind}")
    assert facts["dmd2_denoising_timesteps"] == times


def test_another_kind_of_student_gives_another_image(answers):
    _, wanted, _ = answers
    assert (wanted["toyworld-4-full"][0] - wanted["toyworld-1-full"][0]).abs().max() > 16 / 255
    assert (wanted["toyworld-4-lora"][0] - wanted["toyworld-4-full"][0]).abs().max() > 16 / 255


def test_the_index_says_how_to_sample(answers):
    root, _, _ = answers
    index = json.loads((root / "sd-4-full" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    facts = {
        "dmd2_denoising_timesteps": [999.0, 749.0, 499.0, 249.0], "dmd2_num_inference_steps": 4,
        "dmd2_guidance_scale": 1.0,
    }  # fmt: skip
    assert {name: index[name] for name in facts} == facts
    assert read_student_facts(root / "sd-4-full") == read_student_facts(root / "sd-4-lora") == facts
    flow = read_student_facts(root / "sd3-4-full")
    assert flow["dmd2_denoising_timesteps"] == [1000.0, 750.0, 500.0, 250.0]
    assert flow["dmd2_scheduler_shift"] == 1.0
    assert not read_student_facts(pipeline_folder())


def test_the_card_says_how_to_load(answers, folders):
    root, _, _ = answers
    card = (root / "sd-4-full" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers")
    assert "num_inference_steps=4, guidance_scale=1" in card
    assert "999, 749, 499, 249" in card
    card = (root / "sd-1-lora" / "README.md").read_text()
    assert "load_lora_weights" in card
    assert 'LCMScheduler.from_pretrained("this folder", subfolder="scheduler")' in card
    assert (root / "sd-1-lora" / LORA).is_file()
    assert "tags: [text-to-image, diffusion, distillation, dmd2, lora]" in card
    for kind, call in (("full", "this folder"), ("lora", "some/model")):
        student = make_student(load_teacher(folders["toyworld"], cache=root / "cache"), 1, kind == "lora")
        sized = export_student(student, folders["toyworld"], root / kind, base_model="some/model", size=(32, 48))
        card = (sized / "README.md").read_text()
        assert f'from_pretrained("{call}")' in card
        assert "guidance_scale=1, height=32, width=48)" in card
        assert "base_model: some/model\nlicense: other" in card
        assert read_student_facts(sized)["dmd2_width"] == 48


def test_an_export_is_a_model_that_our_own_hub_reads(answers):
    root, wanted, _ = answers
    teacher = load_teacher(root / "toyworld-1-full", cache=root / "cache", few_steps=True)
    noise = torch.load(root / "toyworld-1-full.pt", weights_only=True)
    with torch.no_grad():
        image = teacher.decode(Student(teacher.denoiser, (999.0,)).sample(noise, teacher.prompts(PROMPTS)))
    assert (image.clamp(-1, 1) / 2 + 0.5 - wanted["toyworld-1-full"][0]).abs().max() < 1e-4


# Times.

SETTINGS = {"beta_start": 8.5e-4, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def student_at(times, schedule=None, scale=1.0):
    kind = "flow" if isinstance(schedule, RectifiedFlow) else "eps"
    network = ResidualMLP((2,), num_classes=2)
    return Student(NetworkDenoiser(network, schedule or VariancePreserving.scaled_linear(), kind, scale), times)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 7, 8, 50])
def test_the_schedulers_ask_at_lcm_times(number):
    for schedule, scale in ((VariancePreserving.scaled_linear(), 1.0), (RectifiedFlow(), 1000.0)):
        times = lcm_times(schedule, number)
        scheduler = scheduler_for(student_at(times, schedule, scale), SETTINGS)
        scheduler.set_timesteps(number)
        assert scheduler.timesteps.tolist() == pytest.approx([scale * t for t in times], abs=1e-2)


def test_lcm_times_are_those_of_the_paper():
    assert lcm_times(VariancePreserving.scaled_linear(), 4) == (999.0, 749.0, 499.0, 249.0)
    assert lcm_times(VariancePreserving.scaled_linear(), 1) == (999.0,)
    assert lcm_times(RectifiedFlow(), 4) == even_times(RectifiedFlow(), 4)
    with pytest.raises(ValueError, match="takes 1 to 1000 steps; got 1001"):
        lcm_times(VariancePreserving.scaled_linear(), 1001)


def test_lcm_times_below_a_noise_level_are_evenly_spaced_down_from_it():
    schedule = VariancePreserving.scaled_linear()
    assert lcm_times(schedule, 1, highest=3.5) == (712.0,)
    assert lcm_times(schedule, 4, highest=3.5) == (711.0, 533.0, 355.0, 177.0), "713 // 4 = 178 apart"
    assert lcm_times(schedule, 4, highest=1e6) == lcm_times(schedule, 4), "above all that there is"
    for highest in (0.5, 1.0, 3.5, 10.0):
        (t,) = lcm_times(schedule, 1, highest=highest)
        ratios = schedule.ratio(torch.tensor([t - 1, t, t + 1], dtype=torch.float64))
        assert (ratios - highest).abs().argmin() == 1, "the timestep that is nearest to it"
    assert lcm_times(RectifiedFlow(), 2, highest=3.5) == (1.0, 0.5), "whose scheduler begins at 1"
    with pytest.raises(ValueError, match="takes 1 to 713 steps; got 714"):
        lcm_times(schedule, 714, highest=3.5)


@pytest.mark.parametrize(
    ("times", "first"),
    [((999.0, 749.0, 500.0, 250.0), 999), ((999.0, 500.0), 999), ((998.5,), 998), ((711.0, 356.0), 711)],
)
def test_times_that_no_scheduler_has_are_refused_with_those_that_one_has(times, first):
    message = rf"no LCMScheduler asks at the times .* in \d step.*; expected {first}"
    with pytest.raises(ValueError, match=message):
        scheduler_for(student_at(times), SETTINGS)


@pytest.mark.parametrize("times", [(399.0,), (711.0, 355.0)])
def test_times_below_the_noisiest_are_asked_by_a_scheduler_that_begins_there(times):
    scheduler = scheduler_for(student_at(times), SETTINGS)
    scheduler.set_timesteps(len(times))
    assert scheduler.timesteps.tolist() == list(times)


def test_uneven_times_of_a_flow_are_refused():
    """With those that end as they do, which are not those of lcm_times."""
    refusal = r"no FlowMatchLCMScheduler asks at the times 1, 0\.9, 0\.25 in 3 .* expected 1, 0\.625, 0\.25\.$"
    with pytest.raises(ValueError, match=refusal):
        scheduler_for(student_at((1.0, 0.9, 0.25), RectifiedFlow(), 1000.0), {})
    scheduler_for(student_at((1.0, 0.625, 0.25), RectifiedFlow(), 1000.0), {})


def test_times_at_which_a_scheduler_returns_the_noisy_image_are_refused():
    """LCMScheduler's boundary condition: at t = 0 nothing of the student is left, at t = 2 nothing is missing."""
    for number, last in ((1000, 0), (500, 1)):
        times = lcm_times(VariancePreserving.scaled_linear(), number)
        with pytest.raises(ValueError, match=f"at its last time {last} an LCMScheduler returns .* x_t"):
            scheduler_for(student_at(times), SETTINGS)
    scheduler = scheduler_for(student_at(lcm_times(VariancePreserving.scaled_linear(), 333)), SETTINGS)
    x_t, last = torch.ones(1, 4), scheduler.timesteps[-1]
    noise = x_t / (1 - scheduler.alphas_cumprod[last]).sqrt()  # a prediction that leaves x0 = 0
    assert last == 2
    assert scheduler.step(noise, last, x_t).prev_sample.abs().max() < 1e-3


def test_betas_that_the_scheduler_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"has no beta_schedule 'sigmoid'; expected .* trained_betas"):
        scheduler_for(student_at((999.0,)), {**SETTINGS, "beta_schedule": "sigmoid"})


def test_the_scheduler_has_the_teachers_betas_and_prediction():
    scheduler = scheduler_for(
        student_at((999.0,)), {**SETTINGS, "beta_end": 0.02, "prediction_type": "v_prediction"}
    )
    assert isinstance(scheduler, LCMScheduler)
    assert (scheduler.config.beta_end, scheduler.config.prediction_type) == (0.02, "v_prediction")
    assert scheduler.config.clip_sample is False
    assert scheduler.config.steps_offset == 1  # StableDiffusionPipeline warns of any other


def test_a_student_draws_at_the_size_it_learned(folders, tmp_path):
    """Its teacher's is 16 x 16."""
    teacher = load_teacher(folders["sd"], cache=tmp_path / "cache", size=(24, 24))
    before = dict(teacher.denoiser.network.model.config)
    out = export_student(make_student(teacher, 1, False), folders["sd"], tmp_path / "out", size=teacher.size)
    pipe = StableDiffusionPipeline.from_pretrained(out, local_files_only=True)
    assert pipe("a mug", num_inference_steps=1, guidance_scale=1).images[0].size == (24, 24)
    assert dict(teacher.denoiser.network.model.config) == before
    out = export_student(make_student(teacher, 1, False), folders["sd"], tmp_path / "out", size=(16, 32))
    assert load_teacher(out, cache=tmp_path / "cache", few_steps=True).size == (16, 32)


def test_a_student_of_a_teacher_in_half_precision_runs_when_loaded_plainly(folders, tmp_path):
    """And says that the safety checker of its teacher is gone."""
    pipe = StableDiffusionPipeline.from_pretrained(folders["sd"], local_files_only=True, dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "half")
    index = json.loads((tmp_path / "half" / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (tmp_path / "half" / "model_index.json").write_text(json.dumps(index))
    teacher = load_teacher(tmp_path / "half", cache=tmp_path / "cache")
    out = export_student(make_student(teacher, 1, False), tmp_path / "half", tmp_path / "out")
    assert {x.dtype for x in load_file(tmp_path / "half" / "text_encoder" / TEXTS).values()} >= {torch.float16}
    assert torch.float16 not in {x.dtype for x in load_file(out / "text_encoder" / TEXTS).values()}
    pipe = StableDiffusionPipeline.from_pretrained(out, local_files_only=True)
    assert pipe("a mug", num_inference_steps=1, guidance_scale=1).images
    assert "The teacher's safety checker is not part of it." in (out / "README.md").read_text()


# What cannot be exported.


def test_networks_that_diffusers_does_not_have_are_refused(folders, tmp_path):
    student = student_at((999.0,))
    with pytest.raises(ValueError, match="a pipeline holds a network of diffusers; got a ResidualMLP"):
        export_pipeline(student, folders["sd"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"a LoRA is made of a scorefield\.models\.lora\.LoRA; got ResidualMLP"):
        export_lora(student, folders["sd"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_replaces_an_older_one_as_a_whole(folders, tmp_path):
    teacher = load_teacher(folders["sd"], cache=tmp_path / "cache")
    for steps in (4, 1):
        out = export_pipeline(make_student(teacher, steps, False), folders["sd"], tmp_path / "out")
    assert read_student_facts(out)["dmd2_num_inference_steps"] == 1
    assert not list(tmp_path.glob(".*"))
