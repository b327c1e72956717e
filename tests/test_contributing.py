"""CONTRIBUTING.md is code: its diffs apply to this repository, and the tests that they bring pass."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
SECTIONS = re.findall(r"^### (.*?)\n(.*?)(?=^##)", TEXT, re.DOTALL | re.MULTILINE)
DIFFS = {
    title: "".join(re.findall(r"^```diff\n(.*?)^```", text, re.DOTALL | re.MULTILINE)) for title, text in SECTIONS
}
PACKAGES = ("scorefield", "distill", "sds", "controlnet", "edit", "attack", "toyworld", "tests")


def apply(diff, folder):
    # Lines around a change may have moved, but not changed.
    return subprocess.run(["git", "apply", "-"], input=diff, cwd=folder, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path):
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "pipeline")
        )
    return tmp_path


def test_there_is_an_example_of_everything_that_is_added():
    assert list(DIFFS) == ["A loss", "A model family", "A hint", "A metric", "An optimiser"]
    assert all("+def test_" in diff for diff in DIFFS.values())


def test_the_table_says_what_the_diffs_touch():
    """Files of the library, apart from those that the text names for a further choice."""
    touched = {title: [name for name in re.findall(r"^\+\+\+ b/(.*)$", diff, re.M) if "tests/" not in name]
               for title, diff in DIFFS.items()}  # fmt: skip
    assert [len(names) for names in touched.values()] == [1, 1, 2, 2, 2]
    rows = {line for line in TEXT.splitlines() if line.startswith("| a")}
    for name in ("controlnet/tasks.py", "scorefield/commands/evaluate.py", "scorefield/training/run.py"):
        assert any(name in row for row in rows)
        assert any(name in names for names in touched.values())


def test_the_diffs_apply_to_this_version(copy):
    for title, diff in DIFFS.items():
        result = apply(diff, copy)
        assert not result.returncode, f"CONTRIBUTING.md, {title}: {result.stderr}"


@pytest.mark.slow
def test_what_they_add_works(copy):
    before = set((copy / "tests").glob("test_*.py"))
    for diff in DIFFS.values():
        assert not apply(diff, copy).returncode
    added = sorted(set((copy / "tests").glob("test_*.py")) - before)
    assert len(added) == len(DIFFS)
    shutil.copy(ROOT / "setup.cfg", copy)
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, added)]
    result = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True, timeout=1200)
    assert not result.returncode, result.stdout
    assert re.search(r"\d+ passed", result.stdout)
