"""What commands that train nothing come to: edit, attack, evaluate, the toy world's evaluations, and the demo."""

from collections.abc import Mapping
from typing import Any

from scorefield.report.folder import Folder, figure, number, shortened, told, whole
from scorefield.report.summary import Figure, Outcome, measured, ratio
from scorefield.report.words import command, plural

MOST = 40
"""Rows of a table of figures."""


def share(value: Any) -> str:
    """Return a share as a percentage; a dash for none."""
    return "-" if (found := number(value)) is None else f"{100 * found:.0f} %"


def edit(content: Mapping[str, Any], place: str) -> Outcome:
    """Return what edits came to: how near the source was rebuilt, and how much was changed."""
    rows = [row for row in content["edits"] if isinstance(row, dict)]
    if not rows:
        return Outcome("Broken: report.json names no edit.", False)
    options = content.get("options")
    method = told(options.get("method")) if isinstance(options, dict) else "edit"
    changed, rebuilt = (
        [found for row in rows if (found := number(row.get(name))) is not None]
        for name in ("changed", "psnr_of_rebuilt_source")
    )
    parts = [f"{plural(len(rows), 'edit')} by {method}"]
    if changed:
        parts.append(f"{share(sum(changed) / len(changed))} of the pixels changed")
    if rebuilt:
        parts.append(f"the source was rebuilt to {sum(rebuilt) / len(rebuilt):.1f} dB")
    figures = [_of_edit(row) for row in rows[:MOST]]
    warnings = []
    if changed and not any(changed):
        warnings.append("No pixel changed: raise --guidance, or --strength, or lower --cross-window.")
    if rebuilt and min(rebuilt) < 20:
        warnings.append("A source was rebuilt to less than 20 dB: the edit begins from another picture.")
    return Outcome(
        ", ".join(parts) + ".", None, figures, warnings,
        [(f"The pictures are {place}/000000.png and so on.", "")],
    )  # fmt: skip


def _of_edit(row: Mapping[str, Any]) -> Figure:
    before, after, seconds = (
        figure(number(row.get(name))) for name in ("psnr_of_rebuilt_source", "psnr_to_source", "seconds")
    )
    return Figure(
        f"{told(row.get('source', ''))} → {told(row.get('target', ''))}", f"{share(row.get('changed'))} changed",
        note=f"source rebuilt to {before} dB, edit beside the source {after} dB, {seconds} s",
    )  # fmt: skip


def attack(content: Mapping[str, Any], place: str) -> Outcome:
    """Return what an attack came to: the share of images that it fools, also through purification."""
    clean = content["clean"] if isinstance(content["clean"], dict) else {}
    others = {name: row for name, row in content.items() if name not in ("clean", "settings")}
    attacks = {name: row for name, row in others.items() if isinstance(row, dict)}
    figures = [
        Figure("accuracy on clean images", share(clean.get("accuracy"))),
        *([Figure("accuracy on clean, purified images", share(clean.get("purified_accuracy")))]
          if "purified_accuracy" in clean else []),
    ]  # fmt: skip
    for name, row in list(attacks.items())[:MOST]:
        title, psnr, largest = shortened(name, 60), number(row.get("psnr")), number(row.get("linf_max"))
        note = f"PSNR {figure(psnr)} dB, largest change {figure(largest)} of 1"
        figures.append(Figure(f"{title}: images fooled", share(row.get("success")), note=note))
        if "purified_success" in row:
            fooled, floor = share(row["purified_success"]), share(clean.get("purified_error"))
            note = "floor: what purification breaks by itself"
            figures.append(Figure(f"{title}: fooled after purification", fooled, floor, note=note))
    known = {name: found for name, row in attacks.items() if (found := number(row.get("success"))) is not None}
    if known:
        best = max(known, key=lambda name: known[name])
        fooled = f"{share(known[best])} of the images it had right"
        conclusion = f"{shortened(best, 60)} fools the classifier on {fooled}"
        after = attacks[best].get("purified_success")
        conclusion += "." if number(after) is None else f", and on {share(after)} after purification."
    else:
        conclusion = "No success was measured: none was counted among the images that the classifier had right."
    flags = clean.get("flags")
    outside = [name for name, row in attacks.items() if row.get("within_ball") is False]
    warnings = [f"The classifier is flagged: {told(flags)}; the figures may flatter it."] if flags else []
    warnings += [f"{shortened(name, 60)} left its ball." for name in outside[:5]]
    return Outcome(
        conclusion, None, figures, warnings, [(f"The images, unrounded, are in {place}/adversarial.npz.", "")]
    )


def evaluation(content: Mapping[str, Any], place: str) -> Outcome:
    """Return what `scorefield evaluate` measured, beside the floor."""
    distance, floor = number(content.get("frechet_distance")), number(content.get("floor_frechet_distance"))
    conclusion = f"The Fréchet distance is {figure(distance)}"
    times = ratio(distance, floor)
    if times is not None:
        conclusion += f", {times:.2f} x that of two halves of the reference ({figure(floor)})"
    conclusion += "."
    note = f"floor: two halves of the reference, {told(content.get('floor_num', '?'))} images each"
    figures = [
        Figure("Fréchet distance", figure(distance), figure(floor), note=note),
        Figure("KID", figure(number(content.get("kid"))), figure(number(content.get("floor_kid"))), note=note),
        *measured("accuracy of the classes", content, "accuracy"),
        *measured("generated images", content, "num_generated"), *measured("reference", content, "num_reference"),
    ]  # fmt: skip
    warnings = [told(content["accuracy_left_out"])] if "accuracy_left_out" in content else []
    counts = [whole(content.get(name)) for name in ("num_generated", "num_reference")]
    if None not in counts and counts[0] != counts[1]:
        warnings.append("The sets are of different size, and distances depend on it: pass --num-images.")
    if floor is None:
        warnings.append("There is no floor: the reference is too small for two halves.")
    return Outcome(conclusion, None, figures, warnings)


def students(content: Mapping[str, Any], place: str) -> Outcome:
    """Return what `scorefield toyworld students` measured: each student beside the teacher."""
    rows = {name: row for name, row in content.items() if name != "settings" and isinstance(row, dict)}
    teacher, parts, figures = rows.get("teacher", {}), [], list[Figure]()
    for name, row in list(rows.items())[:MOST]:
        figures.append(
            Figure(f"{shortened(name, 80)}: Fréchet distance", figure(number(row.get("frechet_distance"))),
                   figure(number(teacher.get("frechet_distance"))), note=f"floor: the teacher; right shapes "
                   f"{share(row.get('shape'))}")
        )  # fmt: skip
        if name != "teacher":
            steps = whole(row.get("num_steps"))
            calls = "student" if steps is None else plural(steps, "step")
            parts.append(f"{calls}: {figure(number(row.get('frechet_ratio')))} x the teacher's distance")
    return Outcome(shortened("; ".join(parts[:6]) or "No student was measured") + ".", None, figures)


def pipeline(content: Mapping[str, Any], place: str) -> Outcome:
    """Return what `scorefield toyworld evaluate` measured."""
    drawn, renders, shares, distances = (
        found if isinstance(found := content.get(name), dict) else {}
        for name in ("accuracy", "accuracy_of_renders", "share", "frechet_distance")
    )
    figures = [
        Figure(f"right {shortened(name, 40)}", share(value), ceiling=share(renders.get(name)),
               note="ceiling: the judge on real renders")
        for name, value in list(drawn.items())[:MOST]
    ]  # fmt: skip
    made, floor = (figure(number(distances.get(name))) for name in ("pipeline", "renders"))
    figures.append(Figure("Fréchet distance", made, floor, note="floor: other renders"))
    said = ", ".join(f"{shortened(name, 40)} {share(value)}" for name, value in list(shares.items())[:6])
    return Outcome(f"Right answers, beside those about real renders: {said or 'none'}.", None, figures)


def demo(content: Mapping[str, Any], place: str) -> Outcome:
    """Return what `scorefield demo` measured: the student beside the teacher."""
    steps, speed = whole(content.get("student_steps")), number(content.get("speedup"))
    times = ratio(content.get("student_fd"), content.get("teacher_fd"))
    conclusion = f"{'The student' if steps is None else plural(steps, 'step')}: "
    conclusion += "its distance is not known" if times is None else f"{times:.2f} x the teacher's distance"
    conclusion += "" if speed is None else f", {speed:.0f} times as fast"
    floor, ceiling = (figure(number(content.get(name))) for name in ("test_fd", "one_step_teacher_fd"))
    figures = [
        Figure(f"{who}: Fréchet distance", figure(number(content.get(f"{who}_fd"))), floor, ceiling,
               "floor: real against real; ceiling: the teacher in one step; right digits "
               + share(content.get(f"{who}_accuracy")))
        for who in ("teacher", "student")
    ]  # fmt: skip
    return Outcome(
        conclusion + ".", None, figures, (),
        [("Look closer:", command("scorefield", "report", f"{place}/teacher", f"{place}/student")),
         ("Train for longer:", command("scorefield", "demo", "--long"))],
    )  # fmt: skip


def kind_of(folder: Folder, file: str = "") -> tuple[str, dict[str, Any]]:
    """Return the command whose figures a folder, or one file of it, holds, and the figures; "" for none."""
    for name in (file,) if file else ("report.json", "figures.json"):
        content = folder.object(name)
        if isinstance(content.get("edits"), list):
            return "edit", content
        if {"teacher_fd", "student_fd"} <= content.keys():
            return "demo", content
        if {"clean", "settings"} <= content.keys():
            return "attack", content
        if {"teacher", "settings"} <= content.keys():
            return "toyworld students", content
        if {"accuracy_of_renders", "share"} <= content.keys():
            return "toyworld evaluate", content
        if {"features", "num_generated", "frechet_distance"} <= content.keys():
            return "evaluate", content
    return "", {}


READERS = {
    "edit": edit, "attack": attack, "evaluate": evaluation, "toyworld students": students,
    "toyworld evaluate": pipeline, "demo": demo,
}  # fmt: skip
