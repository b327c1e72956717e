"""The README is code too: its blocks run, its commands, options and files exist."""

import dataclasses
import os
import re
import subprocess
import sys
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
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
PYTHON = [text for language, text in BLOCKS if language == "python"]
SHELL = [
    line.split("#")[0].split() for language, text in BLOCKS if language == "bash" for line in text.splitlines()
]


def run(code, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_library_example_draws_eight_modes(tmp_path):
    # Its networks and points are drawn anew each time, and now and then a hundredth more lies between the modes.
    printed = run("import torch\ntorch.manual_seed(0)\n" + PYTHON[0], tmp_path)
    assert printed.splitlines()[-1].startswith("1000 {'student/loss'")
    counts = Image.open(tmp_path / "eight_modes.png").convert("L")
    assert counts.size == (256, 256)
    lit = [(x, y) for x in range(256) for y in range(256) if counts.getpixel((x, y)) > 10]

    def radius(x, y):
        return (((x - 127.5) * 3 / 256) ** 2 + ((y - 127.5) * 3 / 256) ** 2) ** 0.5

    assert len(lit) > 500
    assert sum(0.6 < radius(x, y) < 1.4 for x, y in lit) > 0.98 * len(lit)


@pytest.mark.parametrize("number", range(1, len(PYTHON)))
def test_every_other_block_runs(tmp_path, number):
    for name in re.findall(r'load_teacher\("([^"]+)"', PYTHON[number]):  # a folder of that name comes first
        tiny_pipelines.sd().save_pretrained(tmp_path / name)
    for name in re.findall(r'from_pretrained\("([^"]+)"', PYTHON[number]):
        tiny_pipelines.sd().save_pretrained(tmp_path / "teacher")
        student = Student(load_teacher(tmp_path / "teacher").denoiser, (999.0,))
        export_student(student, tmp_path / "teacher", tmp_path / name)
    run(PYTHON[number], tmp_path)


def test_the_library_example_has_about_fifteen_lines_of_code():
    lines = [line for line in PYTHON[0].splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) <= 19


@pytest.mark.parametrize("words", [words for words in SHELL if words], ids=" ".join)
def test_commands_exist(words):
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if "scorefield" in words and words[0] in ("scorefield", "accelerate"):
        words = words[words.index("scorefield") + 1 :]
        name = words[0] if words[0] in cli.COMMANDS else " ".join(words[:2])
        options = cli.found(cli.COMMANDS[name].options)
        hints = typing.get_type_hints(options, include_extras=True)
        known = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(options)}
        extras = [one for hint in hints.values() for one in getattr(hint, "__metadata__", ())]
        known |= {alias for one in extras for alias in getattr(one, "aliases", ()) or ()}
        assert {word for word in words if word.startswith("--")} <= known


def test_named_files_exist():
    linked = re.findall(r"\]\(([^)]+)\)", README)
    quoted = re.findall(r"`((?:score|distill|sds|controlnet|toyworld|train_scripts|tests|docs)/[\w./]+)`", README)
    for path in {*linked, *quoted}:
        assert path.startswith("http") or (ROOT / path).exists(), path


def test_no_figure_is_left_out():
    for name in ("README.md", "LOG.md", "PAPERS.md", "benchmarks/RESULTS.md"):
        assert not re.findall(r"@[A-Z]+", (ROOT / name).read_text()), name
