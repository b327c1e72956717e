"""Timesteps drawn more often where the loss is large (Nichol and Dhariwal 2021, arXiv 2102.09672, section 3.3).

The bound of a chain has terms of very different sizes, so that uniform timesteps make its gradient noisy. Drawn
with p(t) proportional to the root of E[L(t)^2], and divided by n p(t), the estimate keeps its mean and has the
least variance.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor


@dataclass(frozen=True, eq=False)
class LossHistory:
    """The last losses of each timestep, and how timesteps are drawn from them.

    Args:
        num_steps: n, of the chain.
        length: losses kept of each; until all have as many, timesteps are uniform.
        uniform: share of uniform draws, so that none is forgotten.

    Attributes:
        losses: (n, length) float64, the newest last.
        counts: (n,) how many of them are known.
    """

    num_steps: int
    length: int = 10
    uniform: float = 1e-3
    losses: Float[Tensor, "n length"] = field(init=False)
    counts: Int[Tensor, " n"] = field(init=False)

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.length < 1 or not 0 < self.uniform <= 1:
            raise ValueError(
                f"a history needs num_steps >= 1, length >= 1 and 0 < uniform <= 1; got {self.num_steps}, "
                f"{self.length}, {self.uniform}."
            )
        object.__setattr__(self, "losses", torch.zeros(self.num_steps, self.length, dtype=torch.float64))
        object.__setattr__(self, "counts", torch.zeros(self.num_steps, dtype=torch.long))

    @property
    def probabilities(self) -> Float[Tensor, " n"]:
        """Return how often each timestep is drawn."""
        even = torch.full((self.num_steps,), 1 / self.num_steps, dtype=torch.float64)
        root = self.losses.square().mean(1).sqrt()
        if bool((self.counts < self.length).any()) or not bool(root.sum() > 0):
            return even
        return (1 - self.uniform) * root / root.sum() + self.uniform * even

    def draw(self, n: int, generator: Generator) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
        """Return n timestep numbers and the weights 1 / (num_steps p) by which their losses are multiplied."""
        shares = self.probabilities
        index = torch.multinomial(shares.to(generator.device), n, replacement=True, generator=generator).cpu()
        return index, 1 / (self.num_steps * shares[index])

    def update(self, index: Int[Tensor, " b"], losses: Float[Tensor, " b"]) -> None:
        """Keep losses, unweighted, of the timesteps that they were measured at.

        On several ranks, gather both first: ranks with different histories would train on different losses.
        Raises ``ValueError`` for losses that are not finite.
        """
        values = losses.detach().double().cpu()
        if not bool(values.isfinite().all()):
            raise ValueError("losses must be finite to be kept; got nan or inf.")
        for number, value in zip(index.tolist(), values.tolist(), strict=True):
            self.losses[number] = torch.cat([self.losses[number, 1:], self.losses.new_tensor([value])])
            self.counts[number] = min(int(self.counts[number]) + 1, self.length)
