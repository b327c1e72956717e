"""Options and presets of train_dmd.py, and the parts that are built of them."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from refusals import refused

import distill.options as distill_options
import distill.parts as parts
import scorefield.cli as cli
from distill.checks import check
from distill.decoupled import SeparateGuidance
from distill.dmd import DMD
from distill.options import IMAGE_PRESETS, PRESETS, Config
from distill.student import Student, even_times
from scorefield.denoiser import NetworkDenoiser
from scorefield.models.networks import build_network
from scorefield.models.teacher import Listed, Teacher
from scorefield.schedule import Karras, RectifiedFlow, VariancePreserving

ALONE = SimpleNamespace(process_index=0, num_processes=1, wait_for_everyone=lambda: None)
"""An accelerator of one process, as far as pairs ask for it."""


def parsed(monkeypatch, *arguments):
    """The config of a command line."""
    seen = []
    monkeypatch.setattr("distill.recipe.main", seen.append)
    cli.main(["distill", *arguments])
    return seen[0]


def test_a_preset_is_where_values_come_from_and_flags_override_it(monkeypatch):
    found = parsed(monkeypatch, "sdxl-4step-lora", "--prompts", "x", "--steps", "9")
    assert found == replace(distill_options.sdxl_4step_lora(), prompts="x", steps=9)
    assert parsed(monkeypatch) == distill_options.auto()
    papers = (Path(__file__).resolve().parent.parent / "PAPERS.md").read_text()
    for name, preset in PRESETS.items():
        assert name in (*IMAGE_PRESETS, "text", "toyworld-4step", "toyworld-1step-lora") or f"`{name}`" in papers
        config = preset()
        assert config.preset == name
        check(config if config.prompts or name in IMAGE_PRESETS else replace(config, prompts="x"))


def test_prompts_have_numbers_of_their_own(monkeypatch):
    found = parsed(monkeypatch, "--teacher", "x", "--prompts", "y")
    assert found == replace(distill_options.text(), teacher="x", prompts="y")
    assert parsed(monkeypatch, "--teacher", "x", "--prompts=y") == found
    assert (found.student_lr, found.gan_weight, found.warmup_steps) == (0.0, None, None), "measured, and settled"
    assert found.guidance > 1
    check(found)


@pytest.mark.parametrize(("changes", "message"), [
    ({"preset": "digits"}, "preset digits is for teachers of images"),
    ({"preset": "sd15-1step", "prompts": ""}, "preset sd15-1step is for .*: pass --prompts"),
    ({"preset": "digits", "prompts": "", "lora": True}, "--lora is for text-to-image teachers"),
    ({"preset": "digits", "prompts": "", "long_prompts": "cut"}, "--long-prompts is for text-to-image"),
    ({"preset": "digits", "prompts": "", "lora_rank": 3}, "--lora-rank is for text-to-image"),
    ({"data": "nowhere"}, "--data is for teachers of images"),
    ({"flip": True}, "--flip is for teachers of images"),
    ({"channels": "grey"}, "--channels is for"), ({"features": Path("gone")}, "--features is for"),
    ({"lora_rank": 3}, "--lora-rank is for LoRAs"), ({"lora_alpha": 3.0}, "--lora-alpha is for LoRAs"),
    ({"negative_prompt": "dull", "guidance": 1.0}, "--negative-prompt is what guidance moves away from"),
    ({"gan_weight": 0.1, "critic_weight": 0.0}, "--critic-weight 0 trains no critic"),
    ({"eval_every": -1}, "--eval-every must be at least 0"), ({"betas": (0.9, 1.0)}, "--betas must lie"),
    ({"eval_every": 2, "eval_images": 1}, "--eval-images must be at least 2"),
    ({"validation_prompts": ("a", " ")}, "--validation-prompts must say something"),
    ({"lora": True, "quantize": "nf4", "compile": True}, "--compile was not made .* --quantize"),
    ({"preset": "auto"}, "preset auto is for teachers of images.*take text"),
    ({"ratio_range": (1.0, 1.0)}, "--ratio-range needs 0 < first < last, or 0 0; got 1 1"),
    ({"ratio_range": (0.0, 20.0)}, "--ratio-range needs 0 < first"),
    ({"ratio_range": (2.0, math.inf)}, "--ratio-range needs 0 < first"),
    ({"ratio_range": (math.nan, 1.0)}, "--ratio-range needs 0 < first"),
    ({"guard_images": 63}, "--guard-images must be 0 or at least 64; got 63"),
    ({"guard_every": 0}, "--guard-every must be above 0"), ({"guard_images": -64}, "--guard-images must be at"),
    ({"num_pairs": -1}, "--num-pairs must be at least 0"), ({"max_setbacks": -1}, "--max-setbacks must be at"),
    ({"student_ratio": -1.0}, "--student-ratio must be at least 0"), ({"fake_warmup": -1}, "--fake-warmup must"),
    ({"student_lr": -1e-5}, "--student-lr must be at least 0"), ({"fake_lr": 2.0}, "--fake-lr must be at most 1"),
    ({"warmup_steps": -1}, "--warmup-steps must be at least 0"), ({"gan_weight": -0.1}, "--gan-weight must be at"),
    ({"gan_weight": math.nan}, "--gan-weight must be"),
    ({"reals": "teacher", "regression_weight": 0.0}, "--reals teacher takes the images of the teacher pairs"),
])  # fmt: skip
def test_options_that_contradict_are_refused_before_anything_is_read(tmp_path, changes, message):
    config = Config(**{"preset": "text", "prompts": "x", "out": tmp_path, "warmup_steps": 0, **changes})
    with refused(message):
        check(config)


def test_conditions_of_pairs_are_fetched_in_parts(monkeypatch):
    """A teacher of many prompts puts what it is asked for on the GPU."""
    sizes = []

    class Many:
        num_classes, shape, shift, device = 700, (2,), 1.0, torch.device("cpu")
        denoiser = NetworkDenoiser(torch.nn.Linear(2, 2), RectifiedFlow(), "flow")

        def cond(self, labels):
            sizes.append(len(labels))
            return {"embeds": labels.float()[:, None]}

    monkeypatch.setattr(parts, "make_pairs", lambda target, cond, **options: cond)
    monkeypatch.setattr(parts, "stored_pairs", lambda make, *args, **options: make(0, 1))
    found = parts.teacher_pairs(Config(), Many.denoiser, Many(), ALONE, number=800, identity="many")["embeds"]
    assert max(sizes) <= 250
    assert torch.equal(found[:, 0], torch.arange(800.0) % 700)


@pytest.mark.parametrize(("batch_size", "wanted"), [(2, 16), (32, 256), (512, 256)])
def test_pairs_are_made_in_batches_that_fit_where_the_training_does(monkeypatch, batch_size, wanted):
    seen = []
    teacher = SimpleNamespace(
        num_classes=2, shape=(2,), shift=1.0, cond=lambda labels: {"embeds": labels.float()[:, None]},
        denoiser=NetworkDenoiser(torch.nn.Linear(2, 2), RectifiedFlow(), "flow"), device=torch.device("cpu"),
    )  # fmt: skip
    monkeypatch.setattr(parts, "make_pairs", lambda *args, **options: seen.append(options["batch"]))
    monkeypatch.setattr(parts, "stored_pairs", lambda make, *args, **options: make(0, 1))
    config = Config(batch_size=batch_size)
    parts.teacher_pairs(config, teacher.denoiser, teacher, ALONE, number=600, identity="one")
    assert seen == [wanted]


def test_only_the_conditions_of_a_batch_go_to_the_teachers_device():
    denoiser = NetworkDenoiser(torch.nn.Linear(2, 2, device="meta"), RectifiedFlow(), "flow")
    listed = Listed(("a",) * 5, {"embeds": torch.zeros(5, 3)}, {})
    teacher = Teacher(denoiser, (3, 8, 8), 5, listed=listed)
    found = teacher.cond(torch.tensor([4, 1]))["embeds"]
    assert (found.device.type, found.shape) == ("meta", (2, 3))


@pytest.mark.parametrize(("schedule", "last"), [("cosine", (0.0, 0.1)), ("constant", (1.0, 1.0))])
def test_the_learning_rates_fall_or_stay(schedule, last):
    denoiser = NetworkDenoiser(torch.nn.Linear(2, 2), RectifiedFlow(), "flow")
    config = Config(steps=400, student_every=2, lr_schedule=schedule, betas=(0.9, 0.999), student_lr=1e-5)
    method = DMD(teacher=denoiser, student=Student(denoiser, (1.0,)), fake=denoiser, shape=(2,), student_every=2)
    student, fake = parts.build_phases(config, method)
    for phase, end, updates in ((student, last[0], 200), (fake, last[1], 400)):
        assert phase.optimizer.param_groups[0]["betas"] == (0.9, 0.999)
        factor = phase.lr_schedule.lr_lambdas[0]
        assert factor(updates) == pytest.approx(end)
        assert factor(0) < 0.1


# What the options leave open.


class Tokens(torch.nn.Module):
    """A network whose narrowest part is a sequence, which no critic reads."""

    def __init__(self):
        super().__init__()
        self.into, self.out = torch.nn.Linear(1, 4), torch.nn.Linear(4, 1)

    def forward(self, x_t, t):
        return self.out(self.into(x_t.flatten(1)[..., None])).view_as(x_t)


def teacher_of(network, num_classes=0, facts=None):
    return Teacher(NetworkDenoiser(network, RectifiedFlow(), "flow"), (1, 4, 4), num_classes, facts or {})


@pytest.fixture(scope="module")
def listening():
    """A teacher with a bottleneck."""
    facts = {"network": "mlp", "shape": [1, 4, 4], "num_classes": 3, "options": {"width": 8, "depth": 3}}
    return teacher_of(build_network(facts), 3, facts)


def test_a_gan_term_is_the_default_where_there_are_images_and_a_bottleneck(listening):
    found = parts.settled(Config(), listening, real=True)
    assert (found.gan_weight, found.bottleneck) == (0.03, "blocks.1")
    assert parts.settled(Config(reals="teacher"), listening, real=False).gan_weight == 0.03
    deaf = teacher_of(Tokens())
    for config, teacher, real in (
        (Config(), listening, False), (Config(), deaf, True), (Config(reals="teacher"), deaf, False),
        (Config(critic_weight=0.0), listening, True),
    ):  # fmt: skip
        assert parts.settled(config, teacher, real).gan_weight == 0.0
    for weight in (0.0, 0.3):
        assert parts.settled(Config(gan_weight=weight), deaf, real=True).gan_weight == weight, "as asked for"
    assert parts.settled(Config(bottleneck="blocks.0"), listening, real=True).bottleneck == "blocks.0"
    with refused("got --bottleneck nowhere"):
        parts.settled(Config(bottleneck="nowhere"), listening, real=True)


@pytest.mark.parametrize(
    ("changes", "steps", "pairs"),
    [
        ({}, 8000, 25_600), ({"steps": 100}, 400, 2000), ({"batch_size": 101, "accumulate": 3}, 8000, 121_200),
        ({"warmup_steps": 2001, "batch_size": 33}, 2001, 3302), ({"warmup_steps": 0}, 0, 2000),
        ({"num_pairs": 7}, 8000, 7),
    ],
)  # fmt: skip
def test_the_warm_up_is_four_times_the_rest_and_reads_each_pair_twenty_times(listening, changes, steps, pairs):
    found = parts.settled(replace(distill_options.auto(), **changes), listening, real=False)
    assert (found.warmup_steps, found.num_pairs) == (steps, pairs)


def test_what_is_settled_stays_settled(listening):
    """Such is the config that is saved beside a run and printed by a dry run."""
    found = parts.settled(Config(), listening, real=True)
    assert parts.settled(found, listening, real=False) == found


def test_a_student_begins_at_a_moderate_noise_level_unless_told():
    schedule = VariancePreserving.scaled_linear()

    def levels(config):
        times = torch.tensor(parts.student_times(config, schedule), dtype=torch.float64)
        return schedule.ratio(times).tolist()

    assert levels(Config()) == [pytest.approx(3.5, rel=5e-3)]
    assert levels(Config(num_steps=2)) == pytest.approx([3.5, 0.7], rel=5e-3)
    assert levels(Config(num_steps=4)) == pytest.approx([3.5, 1.565, 0.7, 0.313], rel=5e-3)
    assert parts.student_times(Config(), Karras()) == (pytest.approx(3.5),)
    assert parts.student_times(Config(), RectifiedFlow()) == (pytest.approx(3.5 / 4.5),)
    assert parts.student_times(Config(student_ratio=0.0, num_steps=2), schedule) == even_times(schedule, 2)
    assert parts.student_times(Config(times=(7.0, 3.0)), schedule) == (7.0, 3.0)


def test_a_student_of_prompts_begins_where_a_scheduler_can():
    """Evenly spaced below the highest timestep whose noise level is 3.5; from the noisiest one at ratio 0."""
    schedule = VariancePreserving.scaled_linear()
    assert parts.student_times(Config(prompts="x"), schedule) == (712.0,)
    assert schedule.ratio(torch.tensor(712.0, dtype=torch.float64)) == pytest.approx(3.5, rel=5e-3)
    assert parts.student_times(Config(prompts="x", num_steps=4), schedule) == (711.0, 533.0, 355.0, 177.0)
    assert parts.student_times(Config(prompts="x", num_steps=4, student_ratio=0.0), schedule) == (
        999.0, 749.0, 499.0, 249.0,
    )  # fmt: skip
    assert parts.student_times(Config(prompts="x", num_steps=2), RectifiedFlow()) == (1.0, 0.5)


@pytest.mark.parametrize(("changes", "kind"), [
    ({}, type(None)), ({"separate_guidance": True}, type(None)), ({"guidance": 3.0}, type(None)),
    ({"separate_guidance": True, "guidance": 3.0}, SeparateGuidance),
])  # fmt: skip
def test_guidance_is_drawn_apart_where_that_is_asked_for(listening, changes, kind):
    config = Config(gan_weight=0.0, **changes)
    student, fake = parts.build_networks(config, listening)
    method = parts.build_method(config, listening, student, fake)
    assert type(method.guidance) is kind


@pytest.mark.parametrize(("given", "ends"), [((0.15, 20.0), (0.15, 20.0)), ((0.0, 0.0), (1 / 49, 49.0))])
def test_teacher_and_student_are_compared_within_the_ratio_range(listening, given, ends):
    config = Config(gan_weight=0.0, ratio_range=given)
    method = parts.build_method(config, listening, *parts.build_networks(config, listening))
    schedule = listening.denoiser.schedule
    t = method.times(4000, schedule, torch.Generator().manual_seed(0))
    ratios = schedule.ratio(t.double())
    assert float(ratios.min()) == pytest.approx(ends[0], rel=0.1)
    assert float(ratios.max()) == pytest.approx(ends[1], rel=0.1)
    assert ratios.min() > ends[0] * 0.99
    assert ratios.max() < ends[1] * 1.01


@pytest.mark.parametrize(("schedule", "changes", "stopped"), [
    (VariancePreserving.linear(), {"student_ratio": 0.0}, True), (VariancePreserving.linear(), {}, False),
    (VariancePreserving.linear(), {"student_ratio": 0.0, "precision": "no"}, False),
    (VariancePreserving.scaled_linear(), {"student_ratio": 0.0}, False),
])  # fmt: skip
def test_an_eps_student_in_bf16_is_not_asked_where_rounding_is_all_it_would_show(schedule, changes, stopped):
    denoiser = NetworkDenoiser(torch.nn.Linear(2, 2), schedule, "eps")
    config = replace(distill_options.auto(), precision="bf16")
    config = replace(config, **changes)
    if stopped:
        with refused(r"sigma / alpha = 157; 20 is the most.*--student-ratio 3.5"):
            parts.check_rounding(config, denoiser)
    else:
        parts.check_rounding(config, denoiser)
    parts.check_rounding(config, replace(denoiser, kind="v"))
