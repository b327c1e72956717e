"""Teachers as users bring them: trained by loops of their own and wrapped in a few lines, for the default recipe.

    python benchmarks/strangers.py ddpm --data fashion_mnist/ --out runs/strangers
    python benchmarks/strangers.py flow --data fashion_mnist/ --out runs/strangers
    python benchmarks/strangers.py tiles --data tiles.npz --out runs/strangers
    STRANGERS=runs/strangers scorefield distill --teacher strangers:ddpm --data ...

``ddpm`` predicts eps on linear betas, of images in [-0.5, 0.5], as the public scripts for MNIST do. ``flow`` is a
class-conditional transformer on 16 x 16 images. ``tiles`` predicts v with zero terminal signal-to-noise, of colour
images of 32 x 32. Their loops use nothing of this project, so a shared mistake would show.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional

from scorefield import NetworkDenoiser, RectifiedFlow, VariancePreserving, rescaled_data
from scorefield.data.arrays import read_idx
from scorefield.models.networks import UNet
from scorefield.models.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train one of the teachers."""

    which: Annotated[Literal["ddpm", "flow", "tiles"], tyro.conf.Positional]
    """Teacher to train."""
    data: Path
    """Folder of Fashion-MNIST. For tiles, an npz file with images (n, 3, 32, 32) of bytes."""
    out: Path = Path("runs/strangers")
    """Folder for the weights."""
    steps: int = 2500
    """Optimiser steps."""


def embed(t: Tensor, width: int) -> Tensor:
    """Return sines and cosines of t (b,)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


class Block(nn.Module):
    """Two convolutions with a time embedding between them, and a shortcut."""

    def __init__(self, before: int, after: int, time: int) -> None:
        super().__init__()
        self.n1, self.c1 = nn.GroupNorm(8, before), nn.Conv2d(before, after, 3, padding=1)
        self.n2, self.c2 = nn.GroupNorm(8, after), nn.Conv2d(after, after, 3, padding=1)
        self.e = nn.Linear(time, after)
        self.s = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """Return features (b, after, h, w)."""
        h = self.c1(functional.silu(self.n1(x))) + self.e(e)[:, :, None, None]
        return self.s(x) + self.c2(functional.silu(self.n2(h)))


class SmallUNet(nn.Module):
    """A UNet of 0.4 M parameters for 1 x 28 x 28: forward(x, t) -> noise, t in 0 ... 999."""

    def __init__(self, width: int = 32, time: int = 128) -> None:
        super().__init__()
        w = width
        self.mlp = nn.Sequential(nn.Linear(64, time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        self.inp = nn.Conv2d(1, w, 4, stride=2, padding=1)
        self.d1, self.down = Block(w, w, time), nn.Conv2d(w, 2 * w, 3, stride=2, padding=1)
        self.d2, self.mid, self.u2 = (Block(size, 2 * w, time) for size in (2 * w, 2 * w, 4 * w))
        self.up, self.u1 = nn.ConvTranspose2d(2 * w, w, 2, stride=2), Block(2 * w, w, time)
        grow = nn.ConvTranspose2d(w, w // 2, 2, stride=2)
        self.out = nn.Sequential(nn.GroupNorm(8, w), nn.SiLU(), grow, nn.SiLU())
        self.last = nn.Conv2d(w // 2 + 1, 1, 5, padding=2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the noise, of the shape of x."""
        e = self.mlp(embed(t, 64))
        a = self.d1(self.inp(x), e)
        b = self.d2(self.down(a), e)
        h = self.u2(torch.cat([self.mid(b, e), b], 1), e)
        h = self.u1(torch.cat([self.up(h), a], 1), e)
        noise: Tensor = self.last(torch.cat([self.out(h), x], 1))
        return noise


class DiTBlock(nn.Module):
    """Attention and an MLP, each scaled, shifted and gated by the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.n1, self.n2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.mod = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.mod.weight)
        nn.init.zeros_(self.mod.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Return tokens (b, n, width)."""
        scale, shift, gate, scale2, shift2, gate2 = self.mod(c)[:, None].chunk(6, -1)
        h = self.n1(x) * (1 + scale) + shift
        q, k, v = (z.unflatten(-1, (4, -1)).transpose(1, 2) for z in self.qkv(h).chunk(3, -1))
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.proj(attended)
        return x + gate2 * self.mlp(self.n2(x) * (1 + scale2) + shift2)


class SmallDiT(nn.Module):
    """A class-conditional transformer for 1 x 16 x 16: forward(x, t, class_labels) -> eps - x0, t in [0, 1]."""

    def __init__(self, width: int = 64, depth: int = 4, patch: int = 2, size: int = 16) -> None:
        super().__init__()
        self.patch, tokens = patch, (size // patch) ** 2
        self.inp, self.pos = nn.Linear(patch**2, width), nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.t = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.y = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(DiTBlock(width) for _ in range(depth))
        self.n, self.mod = nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, 2 * width)
        self.last = nn.Linear(width, patch**2)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        """Return the flow, of the shape of x; label 10 means none."""
        side = x.shape[-1] // self.patch
        h = self.inp(functional.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)) + self.pos
        c = functional.silu(self.t(embed(1000 * t, 64)) + self.y(class_labels))
        for block in self.blocks:
            h = block(h, c)
        scale, shift = self.mod(c)[:, None].chunk(2, -1)
        h = self.last(self.n(h) * (1 + scale) + shift)
        return functional.pixel_shuffle(h.transpose(1, 2).unflatten(2, (side, side)), self.patch)


def tiles_network() -> nn.Module:
    """Return a UNet for 3 x 32 x 32; its time input is t / 1000."""
    return UNet((3, 32, 32), channels=(32, 64), patch=2)


def linear_betas() -> Tensor:
    """Return alphas_cumprod of Ho et al. 2020 (arXiv 2006.11239, section 4)."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)


def zero_terminal_snr() -> Tensor:
    """Return alphas_cumprod of Stable Diffusion's betas, rescaled to zero terminal signal-to-noise.

    Source: Lin et al. 2023 (arXiv 2305.08891, Algorithm 1).
    """
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    alphas = torch.cumprod(1 - roots**2, 0).sqrt()
    return ((alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])) ** 2


def fashion(folder: Path) -> tuple[Tensor, Tensor]:
    """Return images (60000, 1, 28, 28) of bytes, and labels."""
    images, labels = read_idx(folder / "train-images-idx3-ubyte.gz")
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.copy()).long()


def ddpm_loss(data: Path) -> Callable[[nn.Module], Tensor]:
    """Return a function that computes the squared error of the noise at integer times; images are pixels - 0.5."""
    images, bar = fashion(data)[0], linear_betas()

    def loss(network: nn.Module) -> Tensor:
        x = images[torch.randint(len(images), (128,))].float() / 255 - 0.5
        t, noise = torch.randint(0, 1000, (128,)), torch.randn_like(x)
        a = bar[t][:, None, None, None]
        return functional.mse_loss(network(a.sqrt() * x + (1 - a).sqrt() * noise, t), noise)

    return loss


def flow_loss(data: Path) -> Callable[[nn.Module], Tensor]:
    """Return a function that computes the squared error of the flow at logit-normal times.

    A tenth of the labels is dropped.
    """
    images, labels = fashion(data)
    small = functional.interpolate(images.float() / 127.5 - 1, 16, mode="bilinear", antialias=True)

    def loss(network: nn.Module) -> Tensor:
        chosen = torch.randint(len(small), (128,))
        x, y = small[chosen], labels[chosen].masked_fill(torch.rand(128) < 0.1, 10)
        t, noise = torch.randn(128).sigmoid(), torch.randn_like(x)
        s = t[:, None, None, None]
        return functional.mse_loss(network((1 - s) * x + s * noise, t, y), noise - x)

    return loss


def tiles_loss(data: Path) -> Callable[[nn.Module], Tensor]:
    """Return a function that computes the squared error of v; half of the images are mirrored."""
    images, bar = torch.from_numpy(np.load(data)["images"]), zero_terminal_snr().float()

    def loss(network: nn.Module) -> Tensor:
        x = images[torch.randint(len(images), (64,))].float() / 127.5 - 1
        x = torch.where(torch.rand(64, 1, 1, 1) < 0.5, x, x.flip(3))
        t, noise = torch.randint(0, 1000, (64,)), torch.randn_like(x)
        a = bar[t][:, None, None, None]
        target = a.sqrt() * noise - (1 - a).sqrt() * x
        return functional.mse_loss(network(a.sqrt() * x + (1 - a).sqrt() * noise, t / 1000), target)

    return loss


def learn(network: nn.Module, loss: Callable[[nn.Module], Tensor], *, steps: int, rate: float) -> nn.Module:
    """Train with a one-cycle rate and return the network with averaged weights."""
    network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    follow = torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=follow)
    start, total = time.process_time(), 0.0
    for step in range(1, steps + 1):
        value = loss(network)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
        total += float(value.detach())
        if step % 100 == 0:
            print(f"{step}: loss {total / 100:.4f}, {time.process_time() - start:.0f} s", flush=True)
            total = 0.0
    return average.module.to(memory_format=torch.contiguous_format).eval()


TRAININGS: dict[str, tuple[Callable[[], nn.Module], Callable[[Path], Callable[[nn.Module], Tensor]], float]] = {
    "ddpm": (SmallUNet, ddpm_loss, 2e-3), "flow": (SmallDiT, flow_loss, 1.5e-3),
    "tiles": (tiles_network, tiles_loss, 1e-3),
}  # fmt: skip


def main(config: Config) -> Path:
    """Train and return the path of the weights."""
    build, loss, rate = TRAININGS[config.which]
    torch.manual_seed(0)
    network = learn(build(), loss(config.data), steps=config.steps, rate=rate)
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / f"{config.which}.pt"
    torch.save(network.state_dict(), path)
    return path


def read(network: nn.Module, name: str) -> nn.Module:
    """Return the network with trained weights, from the folder in the environment variable STRANGERS."""
    folder = Path(os.environ.get("STRANGERS", "runs/strangers"))
    network.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
    return network


def ddpm() -> Teacher:
    """Return the plain DDPM, of images in [-0.5, 0.5]."""
    plain = NetworkDenoiser(read(SmallUNet(), "ddpm"), VariancePreserving(linear_betas()), "eps")
    return Teacher(rescaled_data(plain, 0.5), (1, 28, 28), 0, {})


def flow() -> Teacher:
    """Return the flow transformer."""
    return Teacher(NetworkDenoiser(read(SmallDiT(), "flow"), RectifiedFlow(), "flow"), (1, 16, 16), 10, {})


def tiles() -> Teacher:
    """Return the network of colour tiles."""
    schedule = VariancePreserving(zero_terminal_snr())
    return Teacher(NetworkDenoiser(read(tiles_network(), "tiles"), schedule, "v", 0.001), (3, 32, 32), 0, {})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
