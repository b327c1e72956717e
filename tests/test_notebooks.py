"""The notebooks of docs/ run from top to bottom, and show what their words say."""

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "notebooks"
NAMES = ("one_score", "digits_in_one_step")


def cells(name, kind):
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def run(name):
    """Run all code in one namespace; return it, and what the last line of each cell gave."""
    space, shown = {"__name__": "__main__"}, []
    for code in cells(name, "code"):
        tree = ast.parse(code)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), space)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), name, "eval"), space))
    return space, shown


def test_all_notebooks_are_known_are_saved_without_outputs_and_link_to_what_is_there():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)
    for name in NAMES:
        notebook = json.loads((FOLDER / f"{name}.ipynb").read_text())
        assert not any(cell.get("outputs") for cell in notebook["cells"])
        for code in cells(name, "code"):
            ast.parse(code)
        for link in re.findall(r"\]\(([^)#]+)", "\n".join(cells(name, "markdown"))):
            assert (FOLDER / link).exists(), link


@pytest.mark.slow
def test_one_score_draws_teaches_and_edits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space, shown = run("one_score")
    assert len(shown) == 4
    yellow = [float(one[0, :2].mean() - one[0, 2].mean()) for one in space["seen"]]
    assert yellow[-1] > 0.15 > yellow[0], "a yellow torus has less blue than red and green"
    source, _, edited = (np.asarray(one) for one in space["row"].permute(0, 2, 3, 1))
    middle = (slice(16, 48), slice(16, 48))
    assert (source[middle][..., 0] - source[middle][..., 2]).mean() > 0.2, "a red mug"
    assert (edited[middle][..., 2] - edited[middle][..., 0]).mean() > 0.2, "a blue mug"


@pytest.mark.slow
def test_digits_are_learned_in_one_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space, shown = run("digits_in_one_step")
    assert len(shown) >= 2
    assert space["report"]["distance"] < 20 * space["halves"]
    assert (tmp_path / "runs" / "notebook" / "student" / "report.html").is_file()
    assert space["digits"].shape == (20, 1, 8, 8)
