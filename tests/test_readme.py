"""README.md and docs/ are code too: their blocks run, their commands, options, files and sections exist."""

import dataclasses
import math
import re
import typing
from pathlib import Path

import pytest
import tiny_pipelines
from PIL import Image

import scorefield.cli as cli
from distill.export import export_student
from distill.student import Student
from scorefield.models.teacher import load_teacher

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *(ROOT / "docs").glob("*.md"),
    ]
}
README = PAGES["README.md"]
EVIDENCE = ("LOG.md", "PAPERS.md", "benchmarks/RESULTS.md")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def words_of(page):
    """The commands of a page, each as a list of words."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := line.split("#")[0].split())]


# The examples of docs/teachers.md need networks of their owners: tests/test_docs_teachers.py runs them.
PYTHON = [(page, text) for page in PAGES if page != "docs/teachers.md" for text in blocks(page, "python")]
EIGHT_MODES = next(text for _, text in PYTHON if "eight_modes" in text)
OTHERS = [(page, text) for page, text in PYTHON if text != EIGHT_MODES]
SHELL = [(page, words) for page in PAGES for words in words_of(page)]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a block in a folder of its own, as a program."""

    def call(code):
        exec(compile(code, "block", "exec"), {"__name__": "__main__"})  # what a page says is what users run

    monkeypatch.chdir(tmp_path)
    return call


@pytest.mark.slow
def test_the_library_example_draws_eight_modes(tmp_path, run, capsys):
    # Its networks and points are drawn anew each time, and now and then a hundredth more lies between the modes.
    run("import torch\ntorch.manual_seed(0)\n" + EIGHT_MODES)
    assert capsys.readouterr().out.splitlines()[-1].startswith("1000 {'student/loss'")
    counts = Image.open(tmp_path / "eight_modes.png").convert("L")
    assert counts.size == (256, 256)
    lit = [(x, y) for x in range(256) for y in range(256) if counts.getpixel((x, y)) > 10]

    def radius(x, y):
        return (((x - 127.5) * 3 / 256) ** 2 + ((y - 127.5) * 3 / 256) ** 2) ** 0.5

    assert len(lit) > 500
    sectors = [round(math.atan2(y - 127.5, x - 127.5) / (math.pi / 4)) % 8 for x, y in lit]
    assert all(sectors.count(mode) > 30 for mode in range(8)), "each of them"
    assert sum(0.6 < radius(x, y) < 1.4 for x, y in lit) > 0.98 * len(lit)


@pytest.mark.parametrize(("page", "code"), OTHERS, ids=[page for page, _ in OTHERS])
def test_every_other_block_runs(tmp_path, run, page, code):
    for name in set(re.findall(r'load_teacher\("([^"]+)"', code)) - {"toyworld"}:
        tiny_pipelines.sd().save_pretrained(tmp_path / name)  # a folder of that name comes first
    for name in re.findall(r'from_pretrained\("([^"]+)"', code):
        tiny_pipelines.sd().save_pretrained(tmp_path / "teacher")
        student = Student(load_teacher(tmp_path / "teacher").denoiser, (999.0,))
        export_student(student, tmp_path / "teacher", tmp_path / name)
    run(code)


def test_the_library_example_has_about_fifteen_lines_of_code():
    lines = [line for line in EIGHT_MODES.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) <= 19


def test_the_readme_fits_on_a_few_screens():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize(("page", "words"), SHELL, ids=[f"{page}: {' '.join(words)}" for page, words in SHELL])
def test_commands_exist(page, words):
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        for target in targets:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    if "scorefield" not in words or words[0] not in ("scorefield", "accelerate"):
        return
    words = words[words.index("scorefield") + 1 :]
    if words[0].startswith("-") or words[0] == "...":
        assert words[0] in ("--help", "--version", "...")
        return
    name = words[0] if words[0] in cli.COMMANDS else " ".join(words[:2])
    command = cli.COMMANDS[name]
    options = cli.found(command.options)
    hints = typing.get_type_hints(options, include_extras=True)
    known = {"--config", *("--" + field.name.replace("_", "-") for field in dataclasses.fields(options))}
    extras = [one for hint in hints.values() for one in getattr(hint, "__metadata__", ())]
    known |= {alias for one in extras for alias in getattr(one, "aliases", ()) or ()}
    assert {word for word in words if word.startswith("--")} <= known
    after = words[len(name.split()) :]
    if command.presets and after and not after[0].startswith(("-", "...")):
        presets = cli.found(command.presets)
        assert after[0] in (presets(after) if callable(presets) else presets)


def anchors(text):
    """Names of the sections, as the site and code hosts make them of headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *EVIDENCE])
def test_named_files_exist(page):
    text = (ROOT / page).read_text()
    for path, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        if path.startswith(("http", "mailto")):
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target.read_text()), f"{path}#{anchor}"
    if page in EVIDENCE or page == "CHANGELOG.md":  # they speak of earlier versions, too
        return
    folders = "scorefield|distill|sds|controlnet|edit|attack|toyworld|train_scripts|benchmarks|tests|docs"
    for path in re.findall(rf"`((?:{folders})/[\w./]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_tests_that_reliability_names_exist():
    tests = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    file = ""
    for named, test in re.findall(r"`(test_\w+\.py)?(?:::)?(test_\w+)?`", PAGES["docs/reliability.md"]):
        file = named or file  # a test without a file is of the one that was named before it
        if named or test:
            assert f"def {test}" in tests[file], f"{file}::{test}"


def test_every_page_is_in_the_navigation_and_read():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for path in (ROOT / "docs").rglob("*.md"):
        name = path.relative_to(ROOT / "docs").as_posix()
        assert f": {name}\n" in navigation, name
        if "/" not in name:
            linked = [page for page, text in PAGES.items() if name in text and page != f"docs/{name}"]
            assert linked, f"no page links to {name}"


def test_api_pages_name_modules_that_exist():
    for path in (ROOT / "docs" / "api").glob("*.md"):
        names = re.findall(r"^::: ([\w.]+)$", path.read_text(), re.MULTILINE)
        assert names
        for name in names:
            place = ROOT / name.replace(".", "/")
            assert place.with_suffix(".py").exists() or (place / "__init__.py").exists(), name


def test_no_figure_is_left_out():
    for name in (*PAGES, *EVIDENCE):
        assert not re.findall(r"@[A-Z]+|^[A-Z]{4,}$", (ROOT / name).read_text(), re.MULTILINE), name
