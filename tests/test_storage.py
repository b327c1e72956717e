"""Denoisers on disk: every schedule and bit comes back, and what was changed is refused."""

import json
import os
import re

import pytest
import torch
from refusals import refused
from torch import nn

from scorefield.atomic import MARKER, whole_folder
from scorefield.data_scale import rescaled_data
from scorefield.denoiser import KarrasPreconditioning, NetworkDenoiser, karras_denoiser
from scorefield.models import storage
from scorefield.models.storage import describe_schedule, load_denoiser, read_facts, restore_schedule, save_denoiser
from scorefield.schedule import Karras, RectifiedFlow, Schedule, VariancePreserving

ALL_SCHEDULES = [
    Karras(), Karras(t_min=0.1 + 0.2, t_max=14.6, rho=3.0), RectifiedFlow(),
    RectifiedFlow(t_min=1e-3, t_max=1 - 1e-5), VariancePreserving.linear(), VariancePreserving.scaled_linear(),
    VariancePreserving.cosine(50),
    VariancePreserving(torch.linspace(0.9, 0.0, 7, dtype=torch.float64), integer=False),
]  # fmt: skip


class Raw(nn.Module):
    """An untrained network with a class condition, of a seed's own."""

    def __init__(self, seed=0, width=8):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 2))
            self.label = nn.Embedding(3, 1)

    def forward(self, x_t, t, class_labels):
        return self.net(torch.cat([x_t, t.to(x_t.dtype)[:, None] / 10, self.label(class_labels)], 1))


@pytest.fixture
def inputs(generator):
    x_t = torch.randn(6, 2, generator=generator)
    return x_t, torch.linspace(0.1, 0.9, 6), {"class_labels": torch.arange(6) % 3}


@pytest.fixture
def saved(tmp_path):
    denoiser = NetworkDenoiser(Raw(), RectifiedFlow(), "flow", 1000.0)
    return save_denoiser(denoiser, tmp_path / "teacher", {"width": 8, "shape": [2]}), denoiser


@pytest.mark.parametrize("original", ALL_SCHEDULES, ids=repr)
def test_every_schedule_survives_json_exactly(original):
    restored = restore_schedule(json.loads(json.dumps(describe_schedule(original))))
    assert type(restored) is type(original)
    t = original.at(torch.linspace(0, 1, 33, dtype=torch.float64))
    for name in ("alpha", "sigma", "initial_std", "snap"):
        assert torch.equal(getattr(restored, name)(t), getattr(original, name)(t))
    fractions = torch.rand(33, dtype=torch.float64)
    assert torch.equal(restored.at(fractions), original.at(fractions))
    assert (restored.t_min, restored.t_max) == (original.t_min, original.t_max)
    if isinstance(original, VariancePreserving):
        assert torch.equal(restored.alphas_cumprod, original.alphas_cumprod)
        assert restored.integer == original.integer
    else:
        assert restored == original


def test_a_schedule_of_ones_own_is_refused_by_name():
    class Mine(Schedule):
        alpha = sigma = time = at = initial_std = snap = None

    with refused("cannot store a Mine"):
        describe_schedule(Mine())


@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
@pytest.mark.parametrize("original", ALL_SCHEDULES[:1] + ALL_SCHEDULES[3:5], ids=repr)
def test_a_denoiser_comes_back_with_bitwise_equal_outputs(tmp_path, inputs, kind, original):
    denoiser = NetworkDenoiser(Raw().eval(), original, kind, 3.0)
    save_denoiser(denoiser, tmp_path / "teacher")
    restored = load_denoiser(tmp_path / "teacher", Raw(seed=1))
    assert (restored.kind, restored.time_scale) == (kind, 3.0)
    assert torch.equal(restored(*inputs), denoiser(*inputs))


def test_the_loaded_network_is_the_one_passed_in_eval_mode_and_facts_come_back(saved):
    folder, denoiser = saved
    assert denoiser.network.training
    network = Raw(seed=1)
    restored = load_denoiser(folder, network)
    assert restored.network is network
    assert not network.training
    assert read_facts(folder) == {"width": 8, "shape": [2]}
    with refused(f"weights in {folder} do not fit Raw"):
        load_denoiser(folder, Raw(width=9))


def test_sigma_data_is_restored_into_a_network_built_with_another(tmp_path, inputs):
    denoiser = karras_denoiser(Raw().eval(), Karras(), sigma_data=0.3)
    save_denoiser(denoiser, tmp_path / "teacher")
    restored = load_denoiser(tmp_path / "teacher", KarrasPreconditioning(Raw(seed=1), sigma_data=0.7))
    assert restored.network.sigma_data == 0.3
    assert torch.equal(restored(*inputs), denoiser(*inputs))
    with refused("do not fit Raw"):
        load_denoiser(tmp_path / "teacher", Raw())
    for read in (read_facts, lambda folder: load_denoiser(folder, Raw())):
        with refused(r"is not a denoiser's folder.*scorefield teacher"):
            read(tmp_path / "missing")


@pytest.mark.parametrize(("old", "new", "message"), [
    ("}", "", "not a denoiser's folder"), ('"kind": "flow"', '"kind": "noise"', "kind"),
    ('"kind"', '"sort"', "lacks kind"), ('"time_scale"', '"scale"', "lacks time_scale"),
    ('"schedule"', '"process"', "lacks schedule"), ('"family"', '"clan"', "schedule"),
    ('"RectifiedFlow"', '"Straight"', "unknown schedule 'Straight'; expected Karras"),
    ('"t_max"', '"end"', "schedule"), ('"t_max": 1.0', '"t_max": -1.0', "t_max=-1.0"),
    ("scorefield-denoiser-1", "scorefield-denoiser-2", "scorefield-denoiser-2"), (None, "[1, 2]", "{folder}"),
])  # fmt: skip
def test_a_description_that_was_tampered_with_is_refused(saved, old, new, message):
    folder, _ = saved
    path = folder / "denoiser.json"
    assert old is None or old in path.read_text()
    path.write_text(new if old is None else path.read_text().replace(old, new))
    with refused(message.format(folder=folder)):
        load_denoiser(folder, Raw())


@pytest.mark.parametrize("size", [0, 4, -1, None])
def test_weights_that_were_cut_or_are_missing_are_refused(saved, size):
    folder, _ = saved
    path = folder / "model.safetensors"
    path.unlink() if size is None else path.write_bytes(path.read_bytes()[:size])
    with refused(str(folder)):
        load_denoiser(folder, Raw())


def test_saving_again_replaces_the_folder_as_a_whole(saved, inputs):
    folder, _ = saved
    with whole_folder(folder) as older:  # of a version that wrote another file
        (older / "stale.txt").write_text("x")
    other = NetworkDenoiser(Raw(seed=2).eval(), Karras(), "eps")
    assert save_denoiser(other, folder) == folder
    assert torch.equal(load_denoiser(folder, Raw())(*inputs), other(*inputs))
    assert sorted(path.name for path in folder.iterdir()) == [MARKER, "denoiser.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["teacher"]


@pytest.mark.parametrize("victim", ["save_model", "json", "os"])
def test_a_failure_while_saving_leaves_the_older_denoiser(saved, inputs, monkeypatch, victim):
    folder, denoiser = saved
    denoiser.network.eval()

    def fail(*arguments, **settings):
        raise KeyboardInterrupt

    target = {"save_model": (storage, "save_model"), "json": (storage.json, "dumps"), "os": (os, "replace")}
    with monkeypatch.context() as patch:
        patch.setattr(*target[victim], fail)
        with pytest.raises(KeyboardInterrupt):
            save_denoiser(NetworkDenoiser(Raw(seed=2), Karras(), "eps"), folder)
    assert torch.equal(load_denoiser(folder, Raw())(*inputs), denoiser(*inputs))
    with pytest.raises(TypeError):
        save_denoiser(denoiser, folder, {"shape": {1, 2}})  # facts that are not JSON
    assert read_facts(folder)["width"] == 8


def test_weights_that_do_not_fit_are_counted_and_a_wrapper_is_named(tmp_path):
    """A UNet has hundreds of them: a line that names all is a page."""
    inner = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(200)))
    plain = NetworkDenoiser(inner, VariancePreserving.scaled_linear(), "eps")
    save_denoiser(rescaled_data(plain, 0.5), tmp_path / "wrapped")
    with refused(
        "do not fit Sequential: they are of such a network inside another.* Pass the function that wraps"
    ):
        load_denoiser(tmp_path / "wrapped", inner)
    save_denoiser(plain, tmp_path / "plain")
    message = "do not fit Linear: 2 are missing, such as bias; 400 have no place there, such as 0.bias."
    with refused(re.escape(message)):
        load_denoiser(tmp_path / "plain", torch.nn.Linear(2, 2))
