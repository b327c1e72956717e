"""Evidence: nothing where nothing was learned, what was learned where something was, whatever the batch size."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_controls import make_controlled, make_inputs, state_of
from torch import nn

from controlnet.adapter import ControlledDenoiser
from controlnet.evidence import BoundedScore, Gap, Probe, Validation, hint_judge, paired_gap
from controlnet.evidence_log import Evidence, EvidenceLog, learned_at, likely_causes, told
from controlnet.scores import EDGE_SCORES, MASK_SCORES, mask_iou
from scorefield.denoiser import NetworkDenoiser
from scorefield.gradient import min_snr_weight, prediction_weight
from scorefield.guidance import guided
from scorefield.randomness import derived_generator, normal_like
from scorefield.schedule import RectifiedFlow
from scorefield.times import constant, uniform

close = torch.testing.assert_close
SURE, UNSURE = (Gap(right=1.0, shuffled=other, error=0.01, residual_rms=0.1) for other in (1.2, 1.02))


def make_probe(name="pixels", n=6):
    inputs = make_inputs(name, n)
    images = inputs["x0"][:, :3].clamp(-1, 1)
    return Probe(x0=inputs["x0"], hint=inputs["hint"], cond=inputs["cond"], images=images)


class Obedient(nn.Module):
    """A model of pixels that knows its images: what the hint says, or grey if there is no residual."""

    def forward(self, x_t, t, **cond):
        return x_t - cond.get("mid_residual", torch.zeros(()))


class Painter(nn.Module):
    """Its adapter: the hint's mask as an image, mixed with what disobeys."""

    def __init__(self, obedience=1.0):
        super().__init__()
        self.obedience = obedience

    def forward(self, x_t, t, hint, **cond):
        return {"mid_residual": self.obedience * (2 * hint - 1).expand_as(x_t)}


def make_painter(obedience=1.0):
    """eps - x0 = x_t - painted: at t = 1, the only step, x0 is x_t - flow = painted."""
    return ControlledDenoiser(NetworkDenoiser(Obedient(), RectifiedFlow(), "flow"), Painter(obedience))


def make_scenes(n=8):
    """Discs: hint, and image in [-1, 1] that shows exactly it."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randint(4, 12, (n, 2, 1, 1), generator=generator)
    rows, columns = torch.arange(16)[:, None], torch.arange(16)
    hint = ((rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2 <= 9).float()[:, None]
    images = (2 * hint - 1).expand(-1, 3, -1, -1)
    return Probe(x0=images.clone(), hint=hint, cond={}, images=images)


def annotate(images):
    return (images.mean(1, keepdim=True) > 0).float()


def make_validation(**changes):
    settings = {"probe": make_scenes(), "judge": hint_judge(annotate, MASK_SCORES), "num_steps": 1}
    return Validation(**{**settings, **changes})


# The paired gap.


@pytest.mark.parametrize("name", ["sd", "pixels"])
def test_the_gap_is_the_difference_of_two_losses_on_the_same_noise(name):
    """Each loss written out, sample by sample, in the network's own prediction."""
    controlled, probe = make_controlled(name, trained=True), make_probe(name)
    schedule, kind = controlled.schedule, controlled.base.kind
    t = uniform(0.0, 1.0)(len(probe), schedule, derived_generator(7, "gap", "times"))
    table = []
    for i in range(len(probe)):
        x0, own = probe.x0[i : i + 1], {key: value[i : i + 1] for key, value in probe.cond.items()}
        noise = normal_like(x0, [derived_generator(7, "gap", i)])
        x_t = schedule.diffuse(x0, noise, t[i : i + 1])
        wanted = schedule.from_x0(x0, x_t, t[i : i + 1], kind)
        for hint in (probe.hint[i : i + 1], probe.hint[i - 3 : i - 3 + 1 or None]):
            with torch.no_grad():
                x0_hat = controlled.with_hint(hint)(x_t, t[i : i + 1], own)
            error = schedule.from_x0(x0_hat, x_t, t[i : i + 1], kind) - wanted
            table.append(float(error.double().square().mean()))
    right, shuffled = torch.tensor(table, dtype=torch.float64).view(-1, 2).T
    gap = paired_gap(controlled, probe, seed=7)
    assert gap.right == pytest.approx(float(right.mean()), rel=1e-3)
    assert gap.shuffled == pytest.approx(float(shuffled.mean()), rel=1e-3)
    assert gap.value == pytest.approx(float((shuffled - right).mean()), rel=0.02, abs=1e-6)
    assert gap.error == pytest.approx(float((shuffled - right).std()) / math.sqrt(6), rel=0.02)
    assert gap.residual_rms > 1e-3


def test_the_gap_is_zero_for_a_fresh_adapter_positive_for_one_who_obeys_and_negative_for_the_opposite():
    fresh = paired_gap(make_controlled("pixels"), make_probe())
    assert (fresh.value, fresh.error, fresh.residual_rms) == (0.0, 0.0, 0.0)
    assert fresh.right == fresh.shuffled > 0
    gaps = {obedience: paired_gap(make_painter(obedience), make_scenes()) for obedience in (-1.0, 0.0, 1.0)}
    assert gaps[1.0].value > 0.1
    assert gaps[1.0].residual_rms == pytest.approx(1.0)
    assert gaps[0.0].value == 0.0
    assert gaps[-1.0].value < -0.1
    assert [gap.significant for gap in (fresh, *gaps.values())] == [False, False, False, True]


def test_the_gap_does_not_depend_on_batch_size_but_on_seed_times_and_weight_and_leaves_no_trace():
    controlled, probe = make_controlled("pixels", trained=True), make_probe()
    before = state_of(controlled.adapter)
    gap = paired_gap(controlled, probe)
    small = paired_gap(controlled, probe, batch_size=2)
    assert small.value == pytest.approx(gap.value, rel=1e-3, abs=1e-6)
    assert small.right == pytest.approx(gap.right, rel=1e-4)
    assert paired_gap(controlled, probe, weight=prediction_weight("v")) == gap
    others = {"seed": 1}, {"times": constant(200.0)}, {"weight": min_snr_weight()}
    assert all(abs(paired_gap(controlled, probe, **other).right / gap.right - 1) > 1e-3 for other in others)
    assert all(torch.equal(before[name], value) for name, value in controlled.adapter.state_dict().items())
    assert all(p.grad is None for p in controlled.adapter.parameters())


def test_shuffling_gives_every_sample_another_ones_hint_image_and_truth():
    probe = replace(make_probe(), truth={"number": torch.arange(6)})
    other = probe.shuffled()
    assert other.truth["number"].tolist() == [3, 4, 5, 0, 1, 2], "not a neighbour's, which may be much alike"
    assert torch.equal(other.hint[3:], probe.hint[:-3])
    assert torch.equal(other.images[3:], probe.images[:-3])
    assert other.x0 is probe.x0
    assert other.cond is probe.cond


def test_probes_that_do_not_fit_together_are_named():
    probe = make_probe()
    with pytest.raises(ValueError, match=r"6 samples needs as many of everything; got \{'hint': 5\}"):
        replace(probe, hint=probe.hint[:5])
    with pytest.raises(ValueError, match="at least 2 samples, to exchange their hints; got 1"):
        Probe(x0=probe.x0[:1], hint=probe.hint[:1], cond={}, images=probe.images[:1])


# Scores, floor and ceiling.


def test_scores_lie_at_the_ceiling_for_one_who_obeys_and_at_the_floor_for_one_who_does_not():
    validation = make_validation()
    obedient = validation.bounded_scores(validation.images(make_painter(1.0)))
    assert list(obedient) == ["mask_iou", "centre_error"]
    assert obedient["mask_iou"].value == obedient["mask_iou"].ceiling == 1.0
    assert obedient["centre_error"].value == obedient["centre_error"].ceiling == 0.0
    probe = validation.probe
    assert obedient["mask_iou"].floor == pytest.approx(float(mask_iou(probe.hint, probe.shuffled().hint).mean()))
    assert obedient["mask_iou"].floor < 0.3
    assert obedient["centre_error"].floor > 2
    assert [bounded.relative for bounded in obedient.values()] == [1.0, 1.0]
    other = replace(probe, hint=probe.hint.roll(2, 0))
    deaf = validation.bounded_scores(replace(validation, probe=other).images(make_painter(1.0)))
    assert abs(deaf["mask_iou"].relative) < 0.4


def test_the_ceiling_is_what_the_round_trip_through_the_autoencoder_leaves():
    def blurred(images):
        return nn.functional.interpolate(nn.functional.avg_pool2d(images, 4), scale_factor=4.0)

    validation = make_validation(encode=lambda images: images, decode=blurred)
    kept = float(mask_iou(annotate(blurred(validation.probe.images)), validation.probe.hint).mean())
    assert validation.ceiling["mask_iou"] == pytest.approx(kept)
    assert 0.2 < kept < 0.99


def test_relative_standings_know_their_direction():
    assert BoundedScore(0.6, 0.2, 1.0).relative == pytest.approx(0.5)
    assert BoundedScore(3.0, 5.0, 1.0, error=True).relative == pytest.approx(0.5)
    assert BoundedScore(0.1, 0.2, 1.0).relative == pytest.approx(-0.125)
    assert make_validation().bounded_scores(torch.rand(8, 3, 16, 16))["centre_error"].error


@pytest.mark.parametrize("bounded", [
    BoundedScore(0.5, 0.3, 0.3), BoundedScore(0.4, 0.453, 0.426), BoundedScore(0.157, 0.173, 0.166),
    BoundedScore(0.02, -0.011, -0.009), BoundedScore(0.9, 0.3, 0.39), BoundedScore(3.0, 1.0, 5.0, error=True),
    BoundedScore(3.0, 5.0, 4.6, error=True), BoundedScore(0.0, 0.0, 0.0, error=True),
    BoundedScore(0.5, math.nan, 1.0),
])  # fmt: skip
def test_a_ceiling_that_is_hardly_better_than_the_floor_tells_nothing(bounded):
    assert math.isnan(bounded.relative)
    assert learned_at([make_look(step, 0.0, bounded_scores={"f1": bounded}) for step in (1, 2, 3)]) is None


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_an_image_is_what_sampling_by_hand_gives(guidance):
    """Whatever the batch size; for a bare base it is that of control of no strength."""
    controlled, probe = make_controlled("pixels", trained=True), make_probe()
    negative = {name: value[:1] for name, value in probe.cond.items()}
    validation = make_validation(probe=probe, guidance=guidance, negative=negative)
    noise = torch.stack([torch.randn(3, 8, 8, generator=derived_generator(0, "validation", i)) for i in range(6)])
    model = guided(controlled.with_hint(probe.hint), guidance, validation.negative)
    with torch.no_grad():
        expected = model(noise, torch.full((6,), 999.0), probe.cond)
    images = validation.images(controlled)
    close(images, expected.clamp(-1, 1), rtol=1e-4, atol=1e-4)
    close(replace(validation, batch_size=4).images(controlled), images, rtol=1e-3, atol=1e-3)
    assert not torch.equal(replace(validation, seed=1).images(controlled), images)
    free = validation.images(controlled.base)
    assert torch.equal(free, validation.images(replace(controlled, scale=0.0)))
    assert not torch.equal(free, images)


# From figures to an event.


def make_look(step, relative, gap=SURE, bounded_scores=None):
    return Evidence(
        step, gap, bounded_scores or {"f1": BoundedScore(relative, 0.0, 1.0), "ssim": BoundedScore(0.9, 0.0, 1.0)}
    )


def test_control_is_learned_when_two_looks_running_say_so_and_the_loss_uses_the_hint():
    scores = [0.0, 0.6, 0.2, 0.5, 0.7, 0.1, 0.9]
    history = [make_look(100 * i, score) for i, score in enumerate(scores)]
    assert learned_at(history) == 300
    assert learned_at(history[:4]) is None
    assert learned_at(history, consecutive=1) == 100
    assert learned_at(history, threshold=0.55) is None
    assert learned_at(history, threshold=0.8, consecutive=1) == 600
    assert learned_at([]) is None
    assert learned_at([make_look(1, 0.9, UNSURE), make_look(2, 0.9, UNSURE)]) is None
    for wrong in ({"threshold": 0.0}, {"threshold": 1.5}, {"consecutive": 0}):
        with pytest.raises(ValueError, match=r"need 0 < threshold <= 1 and consecutive >= 1; got"):
            learned_at([], **wrong)


@pytest.mark.parametrize(("relatives", "words"), [
    ((0.1, 0.9, 0.9), "was learned at step 2"), ((0.1, 0.1), "was not learned by the criterion"),
    ((0.9, 0.1), "was not learned by the criterion"), ((), "is undecided: too few looks to tell (0)"),
    ((0.9,), "is undecided: too few looks to tell (1)"),
    ((0.1, 0.1, 0.9), "is undecided: too few looks to tell (3)"),
    ((0.1, math.nan), "is undecided: f1 cannot tell: ceiling and floor are too near"),
])  # fmt: skip
def test_nothing_is_told_of_what_was_not_seen(relatives, words):
    assert told([make_look(step, relative) for step, relative in enumerate(relatives, 1)]) == words


def causes(look=None, hints=None, images_seen=20_000):
    hints = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) if hints is None else hints
    unheard = Gap(right=1.0, shuffled=1.0, error=0.01, residual_rms=0.1)
    return likely_causes(look or make_look(1, 0.1, unheard), hints, images_seen=images_seen)


def test_causes_fit_the_figures():
    assert "cropped and flipped with their images" in causes()[0]
    assert "nearly alike" in causes(hints=torch.full((4, 1, 8, 8), 0.3))[0]
    (early,) = causes(images_seen=100)
    assert "it is early: 100 images" in early
    assert "learning rate is too low" in causes(make_look(1, 0.1, gap=Gap(1.0, 1.0, 0.0, 1e-6)))[0]
    assert "the loss does use the hint (gap 0.2 +- 0.01)" in causes(make_look(1, 0.1))[0]
    blind = make_look(1, 0.1, bounded_scores={"f1": BoundedScore(0.3, 0.25, 0.3)})
    assert "f1 cannot tell: real images reach 0.300, hints of other samples 0.250" in causes(blind)[0]


def test_figures_hold_gap_floor_and_ceiling():
    figures = make_look(3, 0.25).figures()
    assert figures["control/gap"] == pytest.approx(0.2)
    assert {"control/f1", "control/f1_floor", "control/f1_ceiling", "control/ssim"} < set(figures)
    assert figures["control/f1_relative"] == 0.25
    assert next(iter(EDGE_SCORES)) == "edge_f1_1px", "the tolerant one is watched"


def test_the_record_survives_a_restart_and_looks_of_another_validation_are_left_out(tmp_path):
    log = EvidenceLog(tmp_path / "new" / "evidence.jsonl", "guidance 3")
    looks = [make_look(step, 0.1 * step) for step in (1, 2, 3)]
    assert log.read() == []
    for look in looks:
        log.append(look)
    assert log.read() == looks
    assert log.read(before=3) == looks[:2]
    assert list(log.read()[0].bounded_scores) == ["f1", "ssim"], "the watched score stays the first"
    again = make_look(2, 0.9)
    log.append(again)  # resumed from a checkpoint of step 1
    assert log.read() == [looks[0], again]
    assert [path.name for path in log.path.parent.iterdir()] == ["evidence.jsonl"]
    other = EvidenceLog(log.path, "guidance 5")
    assert other.read() == []
    other.append(looks[2])
    assert other.read() == looks[2:]
    assert len(log.path.read_text().splitlines()) == 1


@pytest.mark.parametrize("content", ["{}\n", "not json\n", '{"step": 1, "gap": {}, "standings": {}}\n', "[1]\n"])
def test_a_file_that_is_no_record_is_named(tmp_path, content):
    (tmp_path / "evidence.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"evidence\.jsonl is no record of evidence .*Move it away"):
        EvidenceLog(tmp_path / "evidence.jsonl").read()
