"""What trainings come to: teacher, distill, sds, control; read off their results, never off their logs."""

import math
import re
from collections.abc import Mapping
from typing import Any

from scorefield.report.folder import Folder, figure, number, shortened, told, whole
from scorefield.report.summary import Figure, Outcome, measured, ratio
from scorefield.report.words import command, plural

RESULTS = {
    "teacher": ("teacher/model.safetensors", "teacher/denoiser.json"),
    "distill": ("student",),
    "sds": ("export", "canvas.png"),
    "control": ("controlnet",),
    "robust": ("report.json",),
}
"""What a finished run of each command has left; one of these is enough."""


def newest_step(folder: Folder) -> int | None:
    """Return the step of the newest checkpoint, or None without one."""
    names = folder.names("checkpoints", r"step-\d{9}")
    return int(names[-1][-9:]) if names else None


def unfinished(folder: Folder, kind: str, config: Mapping[str, Any], ended: bool = False) -> Outcome | None:
    """Return what is to be said of a run that did not reach its end; None for one that did.

    ``ended``: the run says itself that it ended before its last step.
    """
    step, steps = newest_step(folder), whole(config.get("steps"))
    left = any(folder.holds(name) for name in RESULTS[kind])
    if left and (step is None or steps is None or step >= steps or ended):
        return None
    again = command("scorefield", kind, "--config", f"{folder.shown}/config.json", "--out", folder.shown)
    goes_on = "If it is not running any more, the same command goes on from there:"
    if step is None or step == 0:
        begun = " Its warm-up has begun." if folder.names("warm-up/checkpoints", r"step-\d{9}") else ""
        begun = " Its starts have begun." if folder.names("starts", r"seed-\d+") else begun
        return Outcome(
            f"Not finished: nothing has been learned yet.{begun}",
            False, next_steps=[("If it is not running any more, start it again:", again)],
        )  # fmt: skip
    of = "" if steps is None else f" of {steps:,}"
    why = "" if left or steps is None or step < steps else " Its last step was saved, and its result was not."
    return Outcome(
        f"Not finished: the newest checkpoint is of step {step:,}{of}.{why}", False, next_steps=[(goes_on, again)]
    )


def teacher(folder: Folder, config: Mapping[str, Any]) -> Outcome:
    """Return what a training of a teacher came to, by the best distance where one was measured."""
    if (broken := unfinished(folder, "teacher", config)) is not None:
        return broken
    best, place, made = folder.object("best.json"), folder.shown, f"{folder.shown}/teacher"
    steps = whole(config.get("steps")) or newest_step(folder) or 0
    distance, at = number(best.get("frechet_distance")), whole(best.get("step"))
    figures = [
        *measured("Fréchet distance to the data, best", best, "frechet_distance", "smaller is better"),
        *measured("KID to the data, there", best, "kid", "smaller is better"),
    ]
    warnings = []
    if distance is None:
        conclusion = f"The teacher has learned for {plural(steps, 'step')}; no distance to the data was measured."
        warnings.append(
            "Nothing but the pictures says whether it is good: --eval-every 500 --features runs/features measure "
            "its distance to the data."
        )
    else:
        conclusion = f"The teacher's best Fréchet distance to the data is {figure(distance)}"
        conclusion += "." if at is None else f", at step {at:,} of {steps:,}."
    if at is not None and at < steps:
        warnings.append(f"The weights of step {at:,} were better than the last ones: they are in {place}/best.")
    return Outcome(
        conclusion, None if distance is None or math.isfinite(distance) else False, figures, warnings,
        [("Draw pictures:", command("scorefield", "sample", "--teacher", made, "--out", "samples")),
         ("Distil it to one step:", command("scorefield", "distill", "--teacher", made, "--out", "runs/student"))],
    )  # fmt: skip


def distill(folder: Folder, config: Mapping[str, Any]) -> Outcome:
    """Return what a distillation came to: the distance that its guard measured from the teacher."""
    report, place = folder.object("report.json"), folder.shown
    broken = unfinished(folder, "distill", config, ended=report.get("ended_early") is True)
    if broken is not None:
        return broken
    calls = whole(report.get("num_steps")) or whole(config.get("student_steps")) or 0
    name = plural(calls, "step") if calls else "The student"
    distance, halves = number(report.get("distance")), number(report.get("distance_of_halves"))
    share, step, count = ratio(distance, halves), whole(report.get("step")), whole(report.get("num_images"))
    works: bool | None = None
    apart = ""
    if distance is None:
        conclusion = f"{name}: the student is there; its distance from the teacher was not measured."
        if not report:
            conclusion = (
                f"{name}: the student is there; report.json, which says how good it is, is missing or damaged."
            )
    elif not math.isfinite(distance):
        conclusion, works = f"{name}: the student's pictures are not finite.", False
    else:
        conclusion = f"{name}: the student is {figure(distance)} from its teacher in the teacher's features"
        if share is not None:
            conclusion += f", {share:.2f} x the distance of two halves of the teacher's own pictures"
            apart = f"two halves of the teacher's own {told(count)} pictures are {figure(halves)} apart"
        conclusion += "." if step is None else f" (weights of step {step:,})."
    figures = [] if distance is None else [
        Figure("distance from the teacher", figure(distance), note=apart),
        *measured("KID, in the same features", report, "kernel"),
        *measured("difference of pictures of the same noise", report, "error", "mean over pixels; pictures are in "
                  "[-1, 1]"),
        *measured("brightness beside the teacher's", report, "brightness", "0 is the same"),
    ]  # fmt: skip
    return Outcome(
        conclusion, works, figures, distill_warnings(report, config, distance),
        [("Draw pictures:", command("scorefield", "sample", "--teacher", f"{place}/student", "--out", "samples")),
         ("Measure them beside real ones:", command(
             "scorefield", "evaluate", "--generated", "samples", "--reference", "held_out",
             "--features", "runs/features"))],
    )  # fmt: skip


def distill_warnings(report: Mapping[str, Any], config: Mapping[str, Any], distance: float | None) -> list[str]:
    """Return what a reader of a distillation should know."""
    said = []
    if distance is None and config.get("guard_images") == 0:
        said.append("The guard was off (--guard-images 0): the last weights were kept, good or not.")
    if setbacks := whole(report.get("setbacks")):
        said.append(
            f"The student drifted {plural(setbacks, 'time')} and went back to its best weights at half the rates."
        )
    if report.get("ended_early") is True:
        said.append("The run ended before its last step, since the student drifted again: lower the rates.")
    if config.get("skip_teacher_check") is True:
        said.append("The teacher was not checked (--skip-teacher-check).")
    return said


def sds(folder: Folder, config: Mapping[str, Any]) -> Outcome:
    """Return what a scene, or a canvas, came to."""
    if (broken := unfinished(folder, "sds", config)) is not None:
        return broken
    prompt = shortened(config["prompt"], 100) if isinstance(config.get("prompt"), str) else "the scene"
    if config.get("canvas") is True:
        scene = [("Make a scene of it:", command("scorefield", "sds", "toyworld", prompt))]
        return Outcome(
            f"{prompt}: the pictures were optimised; no figure says how good they are, look at them.", None,
            starts_of(folder),
            next_steps=[] if prompt.startswith("-") else scene,  # which a shell would take for an option
        )  # fmt: skip
    report = folder.object("export/report.json")
    compared = report.get("mesh_versus_render")
    facts, mesh = (report.get(name) for name in ("facts", "mesh"))
    compared, facts, mesh = (one if isinstance(one, dict) else {} for one in (compared, facts, mesh))
    psnr = number(compared.get("psnr"))
    if psnr is None:
        conclusion = f"{prompt}: the scene was exported; its report is missing or damaged."
    else:
        conclusion = f"{prompt}: the mesh looks like the scene's own renders to {psnr:.1f} dB."
    rollbacks = whole(facts.get("rollbacks")) or 0
    warnings = []
    if rollbacks:
        warnings.append(f"The scene was lost {plural(rollbacks, 'time')} and went back to a checkpoint.")
    if psnr is not None and psnr < 20:
        warnings.append("Below 20 dB the mesh lacks much of the scene: fog, or thin parts. Look at contact.png.")
    doubts = facts.get("doubts")
    warnings += [told(one) for one in doubts[:10]] if isinstance(doubts, list) else []
    figures = [
        *starts_of(folder),
        *measured("mesh beside renders, PSNR in dB", compared, "psnr", "higher is better"),
        *measured("vertices", mesh, "vertices"), *measured("faces", mesh, "faces"),
        *measured("volume", mesh, "volume"), *measured("rollbacks", facts, "rollbacks"),
    ]  # fmt: skip
    files = f"{folder.shown}/export"
    return Outcome(
        conclusion, None if psnr is not None and math.isfinite(psnr) else False, figures, warnings,
        [(f"Open {files}/scene.glb in Blender or any viewer of glTF; {files}/turntable.mp4 is a film.", "")],
    )  # fmt: skip


def starts_of(folder: Folder) -> list[Figure]:
    """Return the residual of each start of a scene, and which one went on; empty for a run with one start."""
    starts = folder.object("starts.json")
    found, steps, chosen = starts.get("residual_at_high_noise"), whole(starts.get("steps")), starts.get("chosen")
    if not isinstance(found, dict) or steps is None:
        return []
    figures = []
    for seed, value in list(found.items())[:20]:
        note = "smaller is better" + (": this one went on" if seed == str(chosen) else "")
        residual = "lost" if value is None else figure(number(value))
        name = f"start of seed {shortened(seed, 20)}: residual at high noise after {steps:,} steps"
        figures.append(Figure(name, residual, note=note))
    return figures


def control(folder: Folder, config: Mapping[str, Any]) -> Outcome:
    """Return what an adapter came to: whether control was learned, and the scores beside floor and ceiling."""
    if (broken := unfinished(folder, "control", config)) is not None:
        return broken
    report = folder.object("report.json")
    event = report.get("event")
    learned = whole(report.get("learned_at"))
    conclusion = "The adapter is there; its report is missing or damaged."
    if isinstance(event, str):
        conclusion = f"Control {shortened(event, 200)}."
    works = None if not isinstance(event, str) or "undecided" in event else learned is not None
    figures = scores_of(report)
    gap = report.get("gap")
    if isinstance(gap, dict):
        error = figure(number(gap.get("error")))
        figures += measured("loss gap of the hints", gap, "value", f"+- {error}; 0 is none")
    causes = report.get("likely_causes")
    warnings = [told(cause) for cause in causes[:10]] if isinstance(causes, list) else []
    again = command("scorefield", "control", "--config", f"{folder.shown}/config.json", "--out", folder.shown)
    steps = whole(config.get("steps"))
    more = [] if learned is not None or not steps else [("Train on:", f"{again} --steps {2 * steps}")]
    process = measured("seconds", report, "seconds", "of a run that was not resumed")
    return Outcome(
        conclusion, works, figures, warnings,
        [*more, (f"How diffusers draws with it is in {folder.shown}/controlnet/README.md.", "")], process,
    )  # fmt: skip


def scores_of(report: Mapping[str, Any]) -> list[Figure]:
    """Return the scores of control, each beside its floor, its ceiling and the base without control."""
    scores, without = (report.get(name) for name in ("scores", "scores_without_control"))
    scores, without = (one if isinstance(one, dict) else {} for one in (scores, without))
    figures = []
    for name, score in list(scores.items())[:20]:
        found, free = (one if isinstance(one, dict) else {} for one in (score, without.get(name)))
        value, floor, ceiling = (figure(number(found.get(key))) for key in ("value", "floor", "ceiling"))
        note = "floor: hints of other samples; ceiling: real images"
        if (alone := number(free.get("value"))) is not None:
            note += f"; without control {figure(alone)}"
        figures.append(Figure(shortened(name, 60), value, floor, ceiling, note))
    return figures


def robust(folder: Folder, config: Mapping[str, Any]) -> Outcome:
    """Return what adversarial training came to: accuracy on held-out images, clean and attacked."""
    if (broken := unfinished(folder, "robust", config)) is not None:
        return broken
    report, place = folder.object("report.json"), folder.shown
    clean, held, attack = number(report.get("accuracy")), number(report.get("robust_accuracy")), told(
        report.get("attack", "an attack")
    )  # fmt: skip
    verdict = "The classifier is there; report.json, which says how good it is, is missing or damaged."
    if clean is not None:
        verdict = f"The classifier is right about {clean:.1%} of the held-out images"
        verdict += "." if held is None else (
            f", and about {held:.1%} under {attack} at {figure(number(report.get('epsilon')))} of 255."
        )  # fmt: skip
    figures = [
        *measured("accuracy on held-out images", report, "accuracy"),
        *measured("accuracy under attack", report, "robust_accuracy", f"{attack}, right when clean, too"),
        *measured("cross-entropy of clean images", report, "cross_entropy", "nats; smaller is better"),
        *measured("held-out images", report, "num_images"),
    ]
    curve = report.get("curve")
    for point in [one for one in curve[:20] if isinstance(one, dict)] if isinstance(curve, list) else ():
        name = f"accuracy at radius {figure(number(point.get('epsilon')))} of 255"
        figures += measured(name, point, "accuracy")
    beside = report.get("autoattack")
    if isinstance(beside, dict):
        figures += measured("accuracy under AutoAttack", beside, "accuracy", told(beside.get("package", "")))
    flags = report.get("flags")
    warnings = [f"The classifier is flagged: {told(flags)}; the figures may flatter it."] if flags else []
    if config.get("eval_every"):
        warnings.append("Held-out images were measured on the way: what was chosen by that is flattered here.")
    images, made = f"{place}/adversarial", f"{place}/classifier"
    return Outcome(
        verdict, None if clean is not None and math.isfinite(clean) else False, figures, warnings,
        [("Attack it otherwise:", command(
            "scorefield", "attack", "--classifier", made, "--data", "held_out", "--methods", "pgd", "--out", images
        ))],
    )  # fmt: skip


KIND_OF = {
    "teacher": {"noise_mean", "unet_channels"}, "distill": {"student_every", "fake_lr"},
    "sds": {"turntable_size", "render_size"}, "control": {"hint", "eval_samples"},
    "robust": {"attack_steps", "test_restarts"},
}  # fmt: skip
"""Options by which the config.json of each command is known."""

READERS = {"teacher": teacher, "distill": distill, "sds": sds, "control": control, "robust": robust}


def kind_of(config: Mapping[str, Any]) -> str | None:
    """Return the command that a config.json is of, or None."""
    return next((kind for kind, names in KIND_OF.items() if names <= config.keys()), None)


def is_run(folder: Folder) -> bool:
    """Return True for a folder with traces of a training."""
    names = ("config.json", "identity.json", "checkpoints", "logs", "warm-up", "report.json", "figures.json")
    return any(folder.holds(name) for name in names) or bool(folder.names("samples", r"step-\d{9}\.png"))


def unknown(folder: Folder) -> Outcome:
    """Return what is to be said of a folder whose config.json does not tell the command."""
    step = newest_step(folder)
    there = "" if step is None else f" Its newest checkpoint is of step {step:,}."
    config = "holds no config.json" if not folder.holds("config.json") else "has a config.json of no known command"
    return Outcome(f"Broken: the folder {config}, so that no result can be read.{there}", False)


def steps_of(names: list[str]) -> list[str]:
    """Return the step in each name of a picture in samples/, in words."""
    return [f"step {int(found[0]):,}" if (found := re.findall(r"\d{9}", name)) else name for name in names]
