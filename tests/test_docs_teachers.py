"""docs/teachers.md is code: each example wraps an exact network of the units and times it speaks of, exactly."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from distill.student import Student, save_student
from scorefield import GaussianMixture, Karras, VariancePreserving
from scorefield.models.saved_network import own_network
from scorefield.models.teacher import load_teacher

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "teachers.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
LINEAR = VariancePreserving.linear().alphas_cumprod
COSINE = torch.cos(torch.linspace(0, 1, 1001).double()[1:] * torch.pi / 2) ** 2

# The owner's network: exact for pixels N(mean, std^2) in the owner's units, once its weights are loaded.
OWNER = """
import torch
from torch import nn

class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.std = (nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(2))

    def x0(self, y_t, alpha, sigma, shift=0.0):
        alpha, sigma = (v.double().reshape(-1, 1, 1, 1) for v in (alpha, sigma))
        mean = self.mean + torch.as_tensor(shift).reshape(-1, 1, 1, 1)
        variance = self.std**2
        x0 = mean + alpha * variance * (y_t - alpha * mean) / (alpha**2 * variance + sigma**2)
        return x0, alpha, sigma

    def forward(self, {arguments}):
{body}
"""
TABLE = "        a = torch.load('table.pt', weights_only=True)[t.long()]\n"
NOISE = "        return (x_t - alpha * x0) / sigma"
BODIES = [
    ("x_t, t", TABLE + "        x0, alpha, sigma = self.x0(x_t, a.sqrt(), (1 - a).sqrt())\n" + NOISE),
    ("x_t, t, y",
     "        assert not t.is_floating_point()\n" + TABLE
     + "        x0, alpha, sigma = self.x0(x_t, a.sqrt(), (1 - a).sqrt(), 0.1 * y)\n"
     + "        return alpha * (x_t - alpha * x0) / sigma - sigma * x0"),
    ("x_t, t",
     "        x0, alpha, sigma = self.x0(x_t, t, 1 - t)\n        return x0 - (x_t - alpha * x0) / sigma"),
    ("x, c_noise",
     "        sigma = (4 * c_noise).exp()\n        total = (sigma**2 + 0.25).reshape(-1, 1, 1, 1)\n"
     "        x_t = x * total.sqrt()\n        x0, alpha, s = self.x0(x_t, torch.ones_like(sigma), sigma)\n"
     "        return (x0 - 0.25 / total * x_t) * total.sqrt() / (0.5 * s)"),
    ("x_t, sigma", "        return self.x0(x_t, torch.ones_like(sigma), sigma)[0]"),
    ("x_t, t, y",
     TABLE + "        x0, alpha, sigma = self.x0(x_t, a.sqrt(), (1 - a).sqrt(), 0.1 * y)\n"
     + "        return torch.cat([(x_t - alpha * x0) / sigma, torch.ones_like(x_t)], 1)"),
]  # fmt: skip
UNITS = [(0.5, 0.0), (1.0, 0.0), (0.5, 0.5), (1.0, 0.0), (1.0, 0.0), (1.0, 0.0)]
SIGMA_DATA = [None, None, None, 0.5, 0.5, None]
MEAN, STD = 0.2, 0.3


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_code", "mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    for name in ("my_code", "mine"):
        sys.modules.pop(name, None)


def write(folder, number):
    """mine.py of the example, the owner's code, and a checkpoint of the owner's network."""
    arguments, body = BODIES[number]
    (folder / "mine.py").write_text(EXAMPLES[number])
    (folder / "my_code.py").write_text(OWNER.replace("{arguments}", arguments).replace("{body}", body))
    checkpoint = re.search(r'"(\w+\.pt)"', EXAMPLES[number])[1]
    scale, mean = UNITS[number]
    state = {"mean": torch.tensor(scale * MEAN + mean), "std": torch.tensor(scale * STD)}
    torch.save({name: value.double() for name, value in state.items()}, folder / checkpoint)
    torch.save(COSINE * (torch.arange(1000) < 999) if number == 1 else LINEAR, folder / "table.pt")
    return folder / checkpoint


def test_every_example_is_tested():
    assert len(EXAMPLES) == len(BODIES) == len(UNITS)
    assert all("weights_only=True" in example for example in EXAMPLES)


@pytest.mark.parametrize("number", range(len(BODIES)))
def test_examples_are_exact_and_their_students_need_no_checkpoint(workplace, number):
    checkpoint = write(workplace, number)
    teacher = load_teacher("mine:teacher")
    assert teacher.facts.get("sigma_data") == SIGMA_DATA[number]
    assert (teacher.num_classes > 0) == ("y" in BODIES[number][0])
    schedule = teacher.denoiser.schedule
    t = schedule.at(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    x_t = torch.randn(3, teacher.shape[0], 2, 2, dtype=torch.float64)
    for label in range(2 if teacher.num_classes else 1):
        mean = torch.full((1, teacher.shape[0], 2, 2), MEAN + 0.1 * label, dtype=torch.float64)
        exact = GaussianMixture(mean, torch.tensor([STD]).double(), torch.ones(1), schedule)
        got = teacher.denoiser(x_t, t, teacher.cond(torch.full((3,), label)))
        torch.testing.assert_close(got, exact(x_t, t, {}), rtol=1e-5, atol=1e-5)
    save_student(Student(teacher.denoiser, (float(t[1]),)), workplace / "student", teacher.facts)
    checkpoint.unlink()
    student = load_teacher(str(workplace / "student"), "mine:denoiser")
    cond = teacher.cond(torch.zeros(3, dtype=torch.long))
    assert torch.equal(student.denoiser(x_t, t, cond), teacher.denoiser(x_t, t, cond))
    assert student.null_class == teacher.null_class
    assert isinstance(own_network("mine:denoiser"), nn.Module)


def test_the_units_of_the_table_are_those_of_the_text():
    """y = scale x + mean for pixels p = (x + 1) / 2 that were shown as (p - m) / s."""
    m, s, p = 0.3, 0.7, torch.rand(9)
    torch.testing.assert_close(0.5 / s * (2 * p - 1) + (0.5 - m) / s, (p - m) / s)
    assert "| 0.5 / s | (0.5 - m) / s," in TEXT
    assert Karras(0.002, 80.0) == Karras()
