"""``scorefield report`` and report.html: what a page says is what the files say, whoever wrote them."""

import html
import html.parser
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import time
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import trainers
from accelerate.state import AcceleratorState
from PIL import Image
from refusals import refused
from run_folders import OPTIONS, REPORTS, finished, log, picture, write
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_messages import options_of

import scorefield.cli as cli
import scorefield.report.write as writing
from scorefield.atomic import check_replaceable, whole_folder
from scorefield.commands.options import Report
from scorefield.commands.report import main
from scorefield.report.charts import charts, grouped, signs
from scorefield.report.curves import read_curves
from scorefield.report.folder import Folder
from scorefield.report.page import find_run, page, read_run
from scorefield.report.trainings import kind_of
from scorefield.report.write import NAME, add_page
from scorefield.training.features import Classifier, Facts, save_classifier

MARKED = re.compile(r"<!-- from the log -->.*?<!-- to here -->", re.DOTALL)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>\"' {{ 7*7 }} javascript:alert(3) http://evil.example"
)


class Tags(html.parser.HTMLParser):
    """All tags of a page with their attributes, its texts, and the commands that it shows."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.commands, self.inside = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.inside == "code" and data.startswith("scorefield "):
            self.commands.append(shlex.split(data))
        self.inside = ""


def assert_closed(text):
    """Nothing is asked of a network, and no script but ours runs."""
    found = Tags(text)
    assert len(text.encode()) < 5_000_000
    assert [tag for tag, _ in found.tags].count("script") == 1
    for tag, attributes in found.tags:
        assert tag not in ("iframe", "object", "embed", "link", "base", "form", "a", "audio", "video")
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, attributes)
            assert name not in ("href", "action", "srcset")
            assert name != "src" or value.startswith("data:image/")
    return found


def read(place):
    return read_run(*find_run(place))


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_page_of_a_finished_run_says_what_its_files_say(kind, tmp_path):
    out = finished(tmp_path / "run", kind, seed=7)
    log(out, {"x/loss": [3.0, 2.0, 1.0], "x/learning_rate": [1e-3, 1e-4, 1e-5]})
    run, text = read(out), page([out])
    found = assert_closed(text)
    said = " ".join(" ".join(found.texts).split())
    assert kind_of(json.loads((out / "config.json").read_text())) == run.kind == kind
    assert run.outcome.conclusion in said
    assert f"scorefield {kind}, {out}" in said
    wanted = {
        "teacher": "best Fréchet distance to the data is 1.25, at step 40 of 60",
        "distill": "1 step: the student is 0.25 from its teacher in the teacher's features, 2.00 x the distance "
                   "of two halves of the teacher's own pictures (weights of step 40)",
        "sds": "the mesh looks like the scene's own renders to 25.5 dB",
        "control": "Control was learned at step 50",
        "robust": "right about 97.5% of the held-out images, and about 85.0% under PGD-40 x 2 at 25.5 of 255",
    }  # fmt: skip
    assert wanted[kind] in run.outcome.conclusion
    assert {"seed", "steps"} == {name for name, _, given in run.options if given}
    assert dict(run.facts)["versions"] == "scorefield 0.2.0, torch 2.15"
    assert dict(run.facts)["data, hash"] == "4567cdef"
    (gallery,) = run.galleries
    assert (gallery.sort, [one.label for one in gallery.shown]) == ("slider", ["step 20", "step 40", "step 60"])
    assert "x/loss" in said
    assert text.count("<polyline") == 2
    for words in found.commands:
        assert words[1] in cli.COMMANDS
        flags = {word[2:] for word in words if word.startswith("--")}
        assert flags <= {*options_of(words[1]), "config"}, words


def test_the_verdict_follows_the_report(tmp_path):
    out = finished(tmp_path / "run", "control")
    for event, at, works in (
        ("was learned at step 20", 20, True), ("was not learned by the criterion", None, False),
        ("is undecided: too few looks to tell (1)", None, None),
    ):  # fmt: skip
        causes = {} if at else {"likely_causes": ["it is early: 12 images seen"]}
        write(out / "report.json", {**REPORTS["control"][1], "event": event, "learned_at": at, **causes})
        run = read(out)
        assert (run.outcome.conclusion, run.outcome.works) == (f"Control {event}.", works)
        assert ("it is early: 12 images seen" in run.outcome.warnings) == (at is None)
    (score, _) = run.outcome.figures
    assert (score.value, score.floor, score.ceiling) == ("0.6", "0.1", "0.9")
    out = finished(tmp_path / "student", "distill")
    write(out / "report.json", {**REPORTS["distill"][1], "distance": float("nan")})
    assert read(out).outcome.works is False
    assert "pictures are not finite" in read(out).outcome.conclusion
    write(out / "report.json", {"steps": 60, "num_steps": 4})
    assert (
        read(out).outcome.conclusion
        == "4 steps: the student is there; its distance from the teacher was not measured."
    )


FIGURES = {
    "evaluate": ({"features": "f", "num_generated": 4, "num_reference": 4, "frechet_distance": 3.0, "kid": 0.1,
                  "floor_frechet_distance": 1.5, "floor_kid": 0.1, "floor_num": 2},
                 "The Fréchet distance is 3, 2.00 x that of two halves of the reference (1.5)."),
    "attack": ({"clean": {"accuracy": 1.0, "purified_error": 0.125, "flags": ["random"]}, "settings": {"seed": 1},
                "pgd 8": {"success": 0.25}, "diff-pgd 8": {"success": 0.75, "purified_success": 0.5}},
               "diff-pgd 8 fools the classifier on 75 % of the images it had right, and on 50 % after "
               "purification."),
    "toyworld students": ({"teacher": {"frechet_distance": 2.0}, "settings": {},
                           "runs/a/student": {"frechet_distance": 2.5, "frechet_ratio": 1.25, "num_steps": 1}},
                          "1 step: 1.25 x the teacher's distance."),
    "demo": ({"teacher_fd": 2.0, "student_fd": 2.06, "student_steps": 1, "speedup": 49.6},
             "1 step: 1.03 x the teacher's distance, 50 times as fast."),
    "edit": ({"options": {"method": "sdedit", "preset": "sdedit"},
              "edits": [{"source": "a mug", "target": "a cup", "changed": 0.5, "psnr_of_rebuilt_source": 30.0}]},
             "1 edit by sdedit, 50 % of the pixels changed, the source was rebuilt to 30.0 dB."),
    "toyworld evaluate": ({"accuracy": {"shape": 0.5}, "accuracy_of_renders": {"shape": 1.0},
                           "share": {"shape": 0.5}, "frechet_distance": {"pipeline": 2.0, "renders": 1.0}},
                          "Right answers, beside those about real renders: shape 50 %."),
}  # fmt: skip


@pytest.mark.parametrize("kind", FIGURES)
def test_the_page_of_figures_says_what_they_say(kind, tmp_path):
    content, conclusion = FIGURES[kind]
    name = "report.json" if kind in ("demo", "edit") else "figures.json"
    write(tmp_path / name, content)
    run = read(tmp_path)
    assert (run.kind, run.outcome.conclusion) == (kind, conclusion)
    assert_closed(page([tmp_path]))
    if kind == "evaluate":
        assert main(Report(runs=(tmp_path / name,))) == tmp_path / "figures.html"
        assert conclusion in (tmp_path / "figures.html").read_text()
    if kind == "attack":
        assert "The classifier is flagged: random" in run.outcome.warnings[0]
        assert [(one.value, one.floor) for one in run.outcome.figures[1:]] == [
            ("25 %", ""), ("75 %", ""), ("50 %", "12 %")
        ]  # fmt: skip


def test_what_files_say_is_shown_and_never_run(tmp_path):
    out = finished(tmp_path / f"run{os.sep}<b>&", "control", prompt=HOSTILE, hint=HOSTILE, **{HOSTILE: HOSTILE})
    write(
        out / "report.json",
        {
            **REPORTS["control"][1],
            "event": HOSTILE,
            "scores": {HOSTILE: {"value": HOSTILE}},
            "gap": {"value": 10**400, "error": "x"},
            "likely_causes": [HOSTILE, {"a": [1]}],
        },
    )
    write(out / "about.json", {"set": [HOSTILE, 3], "versions": {HOSTILE: HOSTILE}})
    log(out, {HOSTILE: [1.0, float("inf")], "control/a_floor": [1.0]})
    for text in (page([out]), page([out, finished(tmp_path / "other", "sds", prompt=HOSTILE)])):
        found = assert_closed(text)
        assert any(HOSTILE[:30] in said for said in found.texts)
        assert "49" not in re.findall(r"\{\{.*?\}\}|\b49\b", MARKED.sub("", text))
        assert "default-src 'none'" in str(found.tags)


def test_files_of_any_content_cost_neither_the_page_nor_memory(tmp_path):
    out = finished(tmp_path / "run", "distill")
    random = torch.Generator().manual_seed(0)
    values = [None, True, -1, 10**400, 1e308, "", "x" * 10**6, [], [[[1]]], {}, {"a": HOSTILE}, float("nan")]
    for name in ("config.json", "report.json", "about.json", "identity.json"):
        whole = json.loads((out / name).read_text())
        for key in [*whole][:: 1 if len(whole) < 20 else 7]:
            value = values[int(torch.randint(len(values), (), generator=random))]
            write(out / name, {**whole, key: value})
            assert_closed(page([out]))
        for text in ("", "{", "[]", "null", "[" * 100_000, '{"a": NaN}', "\x00\xff"):
            write(out / name, text)
            assert_closed(page([out]))
        write(out / name, whole)


def bomb(width, height):
    """A PNG of a few bytes that says it is large."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )


def test_pictures_are_read_strictly_and_links_out_are_not_followed(tmp_path):
    secret = picture(tmp_path / "secret.png")
    out = finished(tmp_path / "run", "distill")
    samples = out / "samples"
    (samples / "step-000000020.png").unlink()
    (samples / "step-000000020.png").symlink_to(secret)
    (samples / "step-000000040.png").write_bytes(bomb(8000, 5000))
    (samples / "step-000000041.png").write_bytes(bomb(60_000, 60_000))
    os.mkfifo(samples / "step-000000050.png")
    (samples / "step-000000055.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n(x) run\n")
    (samples / "step-000000058.png").write_bytes((samples / "step-000000060.png").read_bytes()[:60])
    Image.new("RGB", (3, 3)).save(samples / "step-000000059.png", "gif")
    write(samples / "notes.txt", "mine")
    (out / "beside_teacher.png").symlink_to("samples/step-000000060.png")
    run = read(out)
    assert [one.label for gallery in run.galleries for one in gallery.shown] == ["beside_teacher.png", "step 60"]
    notes = " ".join(run.outcome.warnings)
    for said in (
        "step-000000020.png is a link out of the folder", "step-000000040.png has 8000 x 5000 pixels",
        "step-000000041.png cannot be read as a picture: Image size", "step-000000050.png is no regular file",
        "step-000000055.png is no PNG file: it begins with b'%!PS-Ado'",
        "step-000000058.png cannot be read as a picture", "step-000000059.png is no PNG file",
    ):  # fmt: skip
        assert said in notes
    (out / "logs").symlink_to(tmp_path)
    assert "logs is a link out of the folder" in " ".join(read(out).damaged)


def test_a_page_stays_small_whatever_the_pictures(tmp_path):
    out = finished(tmp_path / "run", "control")
    noise = (torch.rand(700, 700, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy()
    Image.fromarray(noise).save(out / "samples.png")
    for step in (60, 80):
        Image.fromarray(noise).save(out / "samples" / f"step-{step:09d}.png")
    text = page([out])
    assert 300_000 < len(text.encode()) < 5_000_000
    assert len(page([out] * 3).encode()) < 5_000_000
    assert [one.title for one in read(out).galleries] == ["Hints, real images, samples", "Over training"]


def test_a_film_becomes_a_turntable_and_edits_show_their_pictures(tmp_path):
    out = finished(tmp_path / "scene", "sds", prompt="a red mug")
    frames = [Image.new("RGB", (40, 30), (10 * number, 0, 0)) for number in range(30)]
    frames[0].save(out / "export" / "turntable.gif", save_all=True, append_images=frames[1:])
    turntable = next(one for one in read(out).galleries if one.sort == "turntable")
    assert turntable.frames == 24
    assert turntable.shown[0].width == 24 * 40
    assert 'data-frames="24"' in page([out])
    for name in ("000000.source.png", "000000.png", "000000.changed.png"):
        picture(tmp_path / "edits" / name)
    write(tmp_path / "edits" / "report.json", FIGURES["edit"][0])
    (gallery,) = read(tmp_path / "edits").galleries
    assert [one.label for one in gallery.shown] == ["source", "edit", "what changed, in white"]


def test_curves_are_those_of_tensorboard_also_where_a_run_was_started_again(tmp_path):
    log(tmp_path, {"a/loss": [1.0, 2.0, 3.0, 4.0], "b": [0.5] * 4})
    log(tmp_path, {"a/loss": [7.0, 8.0]}, first=2)
    theirs = EventAccumulator(str(tmp_path / "logs")).Reload()
    wanted = {tag: [(one.step, one.value) for one in theirs.Scalars(tag)] for tag in theirs.Tags()["scalars"]}
    assert wanted["a/loss"] == [(1, 1.0), (2, 2.0), (3, 7.0), (4, 8.0)]
    assert read_curves(Folder(tmp_path, "run")) == wanted


def test_a_damaged_log_is_read_up_to_its_fault(tmp_path):
    out = finished(tmp_path / "run", "teacher")
    log(out, {"teacher/loss": [3.0, 2.0, 1.0]})
    (file,) = (out / "logs").iterdir()
    data = file.read_bytes()
    for size, said in ((len(data) - 5, "it ends within a record"), (len(data) // 2, "it ends within a record")):
        file.write_bytes(data[:size])
        run = read(out)
        assert said in " ".join(run.damaged)
        assert run.curves["teacher/loss"][0] == (1, 3.0)
    random = torch.randint(256, (4000,), generator=torch.Generator().manual_seed(0)).byte().numpy().tobytes()
    file.write_bytes(random)
    assert "is damaged" in " ".join(read(out).damaged)
    file.write_bytes(struct.pack("<QI", 100, 0) + random[:100] + bytes(4))
    assert "a record is no event" in " ".join(read(out).damaged)
    assert_closed(page([out]))


def test_what_the_curves_say():
    residual = [(step, value) for step, value in enumerate((0.5, 0.3, 0.2, 0.4))]
    assert "is rising: from 0.2 at step 2 to 0.4" in signs("sds", {"probe/residual": residual})[0]
    assert "fell from 0.5 at step 0 to 0.2" in signs("sds", {"probe/residual": residual[:3]})[0]
    nan = float("nan")
    (said,) = signs("teacher", {"teacher/loss": [(1, 1.0), (2, nan)], "control/f1_relative": [(2, nan)]})
    assert said == "teacher/loss: the last value is not finite. Lower the learning rate."
    curves = {
        "control/f1": [(1, 0.5)], "control/f1_floor": [(1, 0.1)], "control/f1_relative": [(1, 0.5)],
        "p/t_0.1": [(1, 1.0)], "p/t_0.5": [(1, 1.0)], "a/learning_rate": [(1, 1.0)], "b/learning_rate": [(1, 1.0)],
        "x": [(1, 1e-6), (2, float("nan")), (3, 1.0), (4, 1.0)],
    }  # fmt: skip
    drawn, left_out = charts(grouped(curves), most=3)
    assert [chart.title for chart in drawn] == ["control/f1", "learning rates", "p"]
    assert [[line.label for line in chart.lines] for chart in drawn] == [
        ["f1", "floor"],
        ["a", "b"],
        ["t_0.1", "t_0.5"],
    ]
    assert left_out == 1
    (chart,), _ = charts({"x": {"x": curves["x"]}})
    assert (chart.lost, chart.is_log, len(chart.lines[0].pieces)) == (1, True, 2)


def broken_runs(root):
    """Runs that did not reach their end, by what the page has to say of them."""
    killed = finished(root / "killed", "teacher", steps=90)
    (killed / "teacher" / "denoiser.json").unlink()
    (killed / "teacher").rmdir()
    (killed / "checkpoints" / "step-000000090").rename(killed / "checkpoints" / "step-000000030")
    early = finished(root / "early", "distill")
    for name in ("checkpoints/step-000000060/manifest.json", "student/model.json", "report.json"):
        (early / name).unlink()
    (early / "checkpoints" / "step-000000060").rmdir()
    (early / "student").rmdir()
    damaged = finished(root / "damaged", "sds")
    write(damaged / "config.json", '{"steps": ')
    extended = finished(root / "extended", "control")
    write(extended / "config.json", {**json.loads((extended / "config.json").read_text()), "steps": 90})
    return {
        killed: "Not finished: the newest checkpoint is of step 30 of 90.",
        early: "Not finished: nothing has been learned yet",
        damaged: "Broken: the folder has a config.json of no known command", extended: "step 60 of 90.",
    }  # fmt: skip


def test_a_broken_run_gets_a_page_that_says_so(tmp_path, capsys):
    for out, said in broken_runs(tmp_path).items():
        main(Report(runs=(out,)))
        text = (out / NAME).read_text()
        assert said in text
        assert '<div class="conclusion bad">' in text
        assert_closed(text)
    assert "config.json is damaged: it is no JSON" in (tmp_path / "damaged" / NAME).read_text()
    assert "There are no curves" in (tmp_path / "killed" / NAME).read_text()
    diverged = finished(tmp_path / "diverged", "teacher")
    log(diverged, {"teacher/loss": [1.0, float("nan")]})
    assert "teacher/loss: the last value is not finite" in page([diverged])


@pytest.mark.parametrize(("words", "said"), [
    (["nowhere"], "nowhere is not there. Pass the --out of a command"), (["empty"], "empty is no run: it holds"),
    (["file.txt"], "file.txt is no file of figures"), ([], "a report is about 1 to 24 runs; got 0"),
    (["run", "--out", "page.pdf"], "--out must be a name that ends in .html; got page.pdf"),
    (["run", "--out", "mine.html"], "mine.html would be replaced, but no report is in it"),
    (["run", "--out", "file.txt/a.html"], "cannot write to --out file.txt"),
    (["run", "empty"], "empty is no run"), (["run"] * 25, "a report is about 1 to 24 runs; got 25"),
])  # fmt: skip
def test_what_is_no_run_is_refused_before_anything_is_written(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    finished(tmp_path / "run", "teacher")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "file.txt", "mine")
    write(tmp_path / "mine.html", "<p>mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", *words])
    assert stopped.value.code == 2
    assert f"error: {said}" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_several_runs_stand_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 1), ("b", 2)):
        out = finished(tmp_path / name / "run", "distill", seed=seed)
        write(out / "report.json", {**REPORTS["distill"][1], "distance": seed / 4})
        log(out, {"guard/distance": [3.0, 2.0, float(seed)], f"only/{name}": [1.0]})
    cli.main(["report", "a/run", "b/run"])
    assert capsys.readouterr().out == "report: report.html\n"
    text = (tmp_path / NAME).read_text()
    found = assert_closed(text)
    table = text[: text.index("Curves together")]
    assert "<th>a/run</th><th>b/run</th>" in table
    assert "<tr><td>--seed</td><td>1</td><td>2</td></tr>" in table
    assert "<tr><td>distance from the teacher</td><td>0.25</td><td>0.5</td></tr>" in table
    together = text[text.index("Curves together") : text.index("<details")]
    assert together.count('<figure class="chart">') == 1
    assert together.count("<polyline") == 2
    assert [tag for tag, _ in found.tags].count("details") >= 2
    cli.main(["report", "a/run", "--out", "pages/a.html"])
    assert (tmp_path / "pages" / "a.html").exists()
    finished(tmp_path / "c" / "run", "control", steps=70)
    cli.main(["report", "a/run", "c/run"])
    table = (tmp_path / NAME).read_text().partition("Curves together")[0].partition("</table>")[0]
    assert "<tr><td>--steps</td><td>60</td><td>70</td></tr>" in table
    assert "--num-pairs" not in table, "an option that one command alone has"


def test_a_page_belongs_to_the_files_of_a_folder_that_lists_them(tmp_path):
    out = tmp_path / "edits"
    with whole_folder(out) as folder:
        write(folder / "report.json", FIGURES["edit"][0])
        add_page(folder, shown=out)
    text = (out / NAME).read_text()
    assert ".writing" not in text
    assert f"scorefield edit, {out}" in text
    write(out / NAME, text.replace("edits", "other"))
    with refused("report.html, which was changed"):
        check_replaceable(out)
    main(Report(runs=(out,)))
    check_replaceable(out)
    assert (out / NAME).read_text() == text


def test_no_failure_of_the_page_is_one_of_the_run(tmp_path, monkeypatch, capsys):
    out = finished(tmp_path / "run", "teacher")
    write(out / NAME, "mine")
    add_page(out)
    assert (out / NAME).read_text() == "mine"
    (out / NAME).unlink()
    (out / NAME).symlink_to(tmp_path / "elsewhere")
    add_page(out)
    assert not (tmp_path / "elsewhere").exists()
    (out / NAME).unlink()
    monkeypatch.setattr(writing, "draw", lambda runs: 1 / 0)
    add_page(out)
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in said] == ["warning"] * 3
    assert said[2] == f"warning: no page in {out}: division by zero. `scorefield report` makes one later."
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == []


def test_what_may_differ_between_two_starts_of_a_run_is_marked(tmp_path):
    texts = []
    for name, values, seconds in (("a", [3.0, 2.0, 1.0], 5.0), ("b", [3.0, 1.0], 9.0)):
        out = finished(tmp_path / name, "control")
        write(out / "report.json", {**REPORTS["control"][1], "seconds": seconds})
        log(out, {"control/loss": values, "run/seconds_per_step": values})
        texts.append(page([out]).replace(str(out), "").replace(f">{name}<", "><").replace(f">{name} -", "> -"))
    assert texts[0] != texts[1]
    assert MARKED.sub("", texts[0]) == MARKED.sub("", texts[1])


@pytest.fixture(scope="module")
def real(tmp_path_factory, sd):
    """The folder of one small run of each kind, by the test's name of it, and its page's place."""
    root = tmp_path_factory.mktemp("real")
    (root / "places").mkdir()
    places, made = trainers.make_places(root / "places", sd), {}
    for name in ("teacher", "student", "texts", "canvas", "control", "robust"):
        one = trainers.TRAINERS[name]
        AcceleratorState._reset_state(True)
        one.main(replace(one.options(places), out=root / name))
        made[name] = root / name / NAME
    brief = ["--device", "cpu", "--seed", "1"]
    commands = {
        "scene": ["sds", "toyworld", "a red mug", "--teacher", str(sd), "--long-prompts", "cut", "--steps", "6",
                  "--batch-size", "2", "--save-every", "2", "--log-every", "1", "--probe-every", "3",
                  "--render-size", "8", "--num-samples", "8", "--quarters", "1", "--draws", "1",
                  "--mesh-resolution", "12", "--turntable-size", "16"],
        "edit": ["edit", "recolour", "--teacher", str(sd), "--source", "a mug", "--target", "a cup",
                 "--size", "16", "--steps", "3", "--report", *brief],
        "attack": ["attack", "toyworld", "--num-images", "4", "--steps", "2", "--draws", "1", "--evaluations", "2",
                   "--purify-steps", "2", "--methods", "fgsm", *brief],
    }  # fmt: skip
    for name, words in commands.items():
        AcceleratorState._reset_state(True)
        cli.main([*words, "--out", str(root / name)])
        made[name] = root / name / NAME
    torch.manual_seed(0)
    save_classifier(Classifier(Facts(1, 8, 10)), root / "features")
    for name in ("made", "reference"):
        images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(len(name)))
        np.savez(root / f"{name}.npz", images=images.numpy(), labels=np.arange(40) % 10)
    sets = ["--generated", str(root / "made.npz"), "--reference", str(root / "reference.npz")]
    network = ["--features", str(root / "features"), "--device", "cpu"]
    cli.main(["evaluate", *sets, *network, "--out", str(root / "figures.json")])
    return {**made, "evaluate": root / "figures.html"}


def said_by(name, out):
    """What the files of a run say, in words that its conclusion must hold."""
    if name == "teacher":
        return "has learned for 6 steps"
    if name == "canvas":
        return "a mug: the pictures were optimised"
    if name == "evaluate":
        return f"Fréchet distance is {json.loads((out / 'figures.json').read_text())['frechet_distance']:.4g}"
    if name == "attack":
        (found,) = (row for key, row in json.loads((out / "figures.json").read_text()).items() if "fgsm" in key)
        return f"fgsm 8 fools the classifier on {100 * found['success']:.0f} %"
    report = json.loads((out / ("export/report.json" if name == "scene" else "report.json")).read_text())
    if name == "scene":
        return f"to {report['mesh_versus_render']['psnr']:.1f} dB"
    if name == "control":
        return f"Control {report['event']}."
    if name == "robust":
        return f"right about {report['accuracy']:.1%} of the held-out images"
    if name == "edit":
        return f"1 edit by prompt-to-prompt, {100 * report['edits'][0]['changed']:.0f} % of the pixels changed"
    return f"is {report['distance']:.4g} from its teacher" if name == "student" else "was not measured"


@pytest.mark.slow
def test_every_command_writes_a_page_whose_verdict_is_that_of_its_report(real):
    for name, path in real.items():
        text = path.read_text()
        found = assert_closed(text)
        conclusion = text[text.index('<div class="conclusion') : text.index("<!-- from the log -->")]
        assert said_by(name, path.parent) in html.unescape(conclusion), (name, conclusion)
        assert "Not finished" not in conclusion
        assert "damaged" not in text
        began = time.process_time()
        again = main(Report(runs=(path.parent if path.name == NAME else path.with_suffix(".json"),)))
        assert time.process_time() - began < 2, name
        assert (again, again.read_text()) == (path, text), "from the files alone"
        pictures = [attributes["src"] for tag, attributes in found.tags if tag == "img"]
        assert bool(pictures) == (name != "evaluate")
    both = page([real["student"].parent, real["texts"].parent])
    assert_closed(both)
    assert both[both.index("Curves together") :].count("fake/loss") >= 3


def opened(path):
    """The page as a browser leaves it, and what its console said."""
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    found = subprocess.run([*words, f"file://{path}"], capture_output=True, text=True, timeout=120, check=True)
    return found.stdout, [line for line in found.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_a_browser_shows_one_step_at_a_time_and_asks_nothing(tmp_path):
    out = finished(tmp_path / "run", "sds", prompt=HOSTILE)
    frames = [Image.new("RGB", (40, 30), (10 * number, 0, 0)) for number in range(12)]
    frames[0].save(out / "export" / "turntable.gif", save_all=True, append_images=frames[1:])
    log(out, {"probe/residual": [0.5, 0.4]})
    main(Report(runs=(out,)))
    shown, said = opened(out / NAME)
    assert said == []
    slider = shown[shown.index('<div class="slider">') :]
    assert [bool(one) for one in re.findall(r'<figure( hidden="")?>', slider)[:3]] == [True, True, False]
    turntable = shown[shown.index('<div class="turntable"') : shown.index('<div class="slider">')]
    assert "hidden" not in re.search(r"<input[^>]*>", turntable)[0], "shown by the script"
    other = (out / NAME).read_text().replace("<h1>", '<img src="http://127.0.0.1:9/x.png"><h1 onclick="x()">')
    _, said = opened(write(tmp_path / "other.html", other))
    assert any("Content Security Policy" in line for line in said), "a page that asks would be told"
