"""Fixtures shared by all tests: exact distributions on every schedule, in float64, from fixed seeds."""

import os
import shutil

import pytest
import torch
from torch import nn

from scorefield.exact import GaussianMixture
from scorefield.schedule import Karras, RectifiedFlow, VariancePreserving

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Prompts, pairs and renders that tests make are not left in the user's cache, nor found there."""
    before, folder = os.environ.get("XDG_CACHE_HOME"), tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    yield folder
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def sd(tmp_path_factory):
    """The folder of a tiny Stable Diffusion, not to be changed."""
    import tiny_pipelines

    folder = tmp_path_factory.mktemp("sd")
    tiny_pipelines.sd().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sd, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(sd, tmp_path / "model")


SCHEDULES = {"karras": Karras(), "flow": RectifiedFlow(), "vp": VariancePreserving.scaled_linear()}


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def schedules():
    """All three families by name; their noise levels overlap on 0.03 <= sigma / alpha <= 14."""
    return SCHEDULES


@pytest.fixture(params=list(SCHEDULES))
def schedule(request):
    return SCHEDULES[request.param]


@pytest.fixture(params=["x0", "eps", "v", "flow"])
def kind(request):
    return request.param


@pytest.fixture
def ratios():
    """Noise levels sigma / alpha that every schedule of the tests reaches."""
    return torch.logspace(-1.3, 1.1, 9, dtype=torch.float64)


@pytest.fixture
def make_mixture():
    """A labelled mixture of four components in two dimensions, two to a class, on a given schedule."""

    def make(schedule, shift=0.0, labelled=True):
        means = torch.tensor([[-1.5, 0.0], [1.5, 0.5], [0.0, 1.6], [0.4, -1.0]], dtype=torch.float64) + shift
        stds = torch.tensor([0.15, 0.4, 0.25, 0.3], dtype=torch.float64)
        weights = torch.tensor([0.3, 0.4, 0.2, 0.1], dtype=torch.float64)
        return GaussianMixture(means, stds, weights, schedule, torch.tensor([0, 1, 0, 1]) if labelled else None)

    return make


@pytest.fixture
def mixture(make_mixture, schedule):
    return make_mixture(schedule)


class ExactNetwork(nn.Module):
    """A perfectly trained network of some prediction kind; ``calls`` holds the arguments of every call."""

    def __init__(self, denoiser, kind):
        super().__init__()
        self.denoiser, self.kind, self.calls = denoiser, kind, []

    def forward(self, x_t, t, **cond):
        self.calls.append((x_t, t, cond))
        return self.denoiser.schedule.from_x0(self.denoiser(x_t, t, cond), x_t, t, self.kind)


@pytest.fixture
def exact_network():
    return ExactNetwork


class RandomMLP(nn.Module):
    """An untrained class-conditional network for flat samples, so that equalities hold for no special reason."""

    def __init__(self, size=2, num_classes=2, dtype=torch.float32):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.label = nn.Embedding(num_classes + 1, 8, dtype=dtype)
            self.net = nn.Sequential(
                nn.Linear(size + 9, 32, dtype=dtype), nn.Tanh(), nn.Linear(32, size, dtype=dtype)
            )

    def forward(self, x_t, t, class_labels):
        features = [x_t, torch.log1p(t).to(x_t.dtype)[:, None], self.label(class_labels)]
        return self.net(torch.cat(features, 1))


@pytest.fixture
def random_network():
    return RandomMLP


@pytest.fixture
def make_accelerator():
    """Accelerate's state is global: each call starts a new one on the CPU."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def make(**settings):
        AcceleratorState._reset_state(reset_partial_state=True)
        return Accelerator(cpu=True, **settings)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def accelerator(make_accelerator):
    return make_accelerator()
