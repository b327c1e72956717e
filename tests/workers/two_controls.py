"""What two ranks do to an adapter, and what one is expected to answer."""

from dataclasses import replace
from functools import partial

import torch
from tiny_controls import make_adapter, make_base, make_inputs
from torch import nn

from controlnet.adapter import ControlledDenoiser
from controlnet.evidence import Probe, Validation, hint_judge, paired_gap
from controlnet.scores import MASK_SCORES
from controlnet.training import control_phase, unlock
from scorefield.denoiser import unwrap
from scorefield.randomness import Rng
from scorefield.times import uniform
from scorefield.training.loop import train
from scorefield.training.ranks import shared_rows, verify_weights

STEPS, BATCH, NAME = 2, 2, "pixels"


def flat(network):
    return torch.cat([p.detach().reshape(-1) for p in network.parameters()])


def data():
    inputs = make_inputs(NAME, 12, seed=3)
    return {"x0": inputs["x0"].double(), "hint": inputs["hint"].double(),
            "states": inputs["cond"]["encoder_hidden_states"].double()}  # fmt: skip


def batches(rng):
    """Two samples by number, another two for each rank and step."""
    rows = (BATCH * rng.index + torch.arange(BATCH)) % 12
    chosen = {name: value[rows] for name, value in data().items()}
    return {"x0": chosen["x0"], "hint": chosen["hint"], "cond": {"encoder_hidden_states": chosen["states"]}}


def make_phase(unlocked, prepare=lambda network: network):
    """In float64; what learns is the adapter, in DDP if ``prepare`` wraps it, or the decoder, too."""
    base = make_base(NAME)
    base.network.double()
    denoiser = ControlledDenoiser(base, prepare(make_adapter(base, NAME, trained=True).double()))
    network = unlock(denoiser) if unlocked else denoiser.adapter
    optimizer = torch.optim.SGD(network.parameters(), 1e-2)
    return control_phase(denoiser, optimizer, network=network, times=uniform(0.3, 0.9))


def run(unlocked, accelerator, wrapped):
    phase = make_phase(unlocked, accelerator.prepare if wrapped else lambda network: network)
    for _ in train([phase], batches, accelerator, steps=STEPS, verify_every=1):
        verify_weights(phase.name, unwrap(phase.network), accelerator)
    return flat(phase.network)


def expected(unlocked):
    """By hand on one rank: each update descends the mean of what two ranks would have measured."""
    phase = make_phase(unlocked)
    for step in range(STEPS):
        losses = []
        for rank in range(2):
            rng = Rng(0, step, 0, rank, 2 * step + rank)
            losses.append(phase.loss(batches(rng), rng)["loss"])
        phase.optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        phase.optimizer.step()
    return flat(phase.network)


def look(share=None):
    """The gap, and images of a validation, of seven samples: no even share for two ranks."""
    inputs = make_inputs(NAME, 7)
    images = inputs["x0"].clamp(-1, 1)
    probe = Probe(x0=inputs["x0"], hint=inputs["hint"], cond=inputs["cond"], images=images)
    base = make_base(NAME)
    denoiser = ControlledDenoiser(base, make_adapter(base, NAME, trained=True))
    judge = hint_judge(lambda images: (images[:, :2] > 0).float(), MASK_SCORES)
    settings, decoded = {} if share is None else {"share": share}, []

    def decode(x0):
        decoded.append(len(x0))
        return x0.clone()

    validation = Validation(probe=probe, judge=judge, decode=decode, num_steps=2, batch_size=2, **settings)
    gap = paired_gap(denoiser, probe, batch_size=2, **settings)
    numbers = torch.tensor([gap.right, gap.shuffled, gap.error, gap.residual_rms], dtype=torch.float64)
    drawn = validation.images(denoiser)
    ceiling = torch.tensor(list(validation.ceiling.values()))
    return {"gap": numbers, "images": drawn, "ceiling": ceiling, "decoded": sum(decoded)}


class Recording(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.rows = inner, 0

    def forward(self, x_t, *arguments, **cond):
        self.rows += len(x_t)
        return self.inner(x_t, *arguments, **cond)


def rows_asked(share):
    base = make_base(NAME)
    adapter = Recording(make_adapter(base, NAME))
    inputs = make_inputs(NAME, 7)
    probe = Probe(x0=inputs["x0"], hint=inputs["hint"], cond=inputs["cond"], images=inputs["x0"])
    paired_gap(replace(ControlledDenoiser(base, adapter), hint=None), probe, share=share)
    return adapter.rows


def main(accelerator):
    share = partial(shared_rows, accelerator=accelerator)
    return {
        "locked": run(False, accelerator, wrapped=True), "locked_bare": run(False, accelerator, wrapped=False),
        "unlocked": run(True, accelerator, wrapped=False), "look": look(share), "rows": rows_asked(share),
    }  # fmt: skip
