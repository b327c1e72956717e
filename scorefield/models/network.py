"""A small residual MLP for points and tiny images; anything larger wants a network of diffusers."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from scorefield.schedule import Images, PerSample

Labels = Int[Tensor, " b"]


class ResidualMLP(nn.Module):
    """Predicts a tensor of the shape of its input from that input, a time and an optional class.

    Each block is modulated by the embedding of time and class. A fresh network outputs zeros.

    Args:
        shape: of one sample, for example (2,) or (1, 8, 8).
        num_classes: number of classes; label ``num_classes`` is the null class. 0 means unconditional.
        num_steps: number of student steps it can be told apart by ``step``; its embedding starts at zero.
        width: of the hidden layer.
        depth: number of blocks; ``bottleneck`` is the middle one, where a critic may listen.
        embedding: width of the embedding of time and class, even.
        dropout: in each block, while training.
    """

    frequencies: Tensor

    def __init__(
        self, shape: Sequence[int], num_classes: int = 0, width: int = 512, depth: int = 6, embedding: int = 128,
        num_steps: int = 0, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if depth < 1 or width < 1 or embedding % 2:
            raise ValueError(f"need depth, width >= 1 and an even embedding; got {depth}, {width}, {embedding}.")
        self.shape, self.num_classes = tuple(shape), num_classes
        size = math.prod(self.shape)
        # Periods for times of order one: c_noise of EDM, t of a flow, t / 1000 of DDPM (time_scale = 1e-3).
        self.register_buffer("frequencies", torch.logspace(0, 5, 16, base=2))
        self.time = nn.Sequential(nn.Linear(32, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label = nn.Embedding(num_classes + 1, embedding) if num_classes else None
        self.step = nn.Embedding(num_steps, embedding) if num_steps else None
        if self.step is not None:
            nn.init.zeros_(self.step.weight)
        self.enter = nn.Linear(size, width)
        self.blocks = nn.ModuleList(_Block(width, embedding, dropout) for _ in range(depth))
        last = nn.Linear(width, size)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), last)

    @property
    def bottleneck(self) -> str:
        """Name of the middle block, for :class:`distill.adversarial.Critic`."""
        return f"blocks.{(len(self.blocks) - 1) // 2}"

    def forward(
        self, x_t: Images, t: PerSample, class_labels: Labels | None = None, step: Labels | None = None
    ) -> Float[Tensor, "b *shape"]:
        """The prediction, shape of x_t. Raises ``ValueError`` for another shape or labels out of range."""
        if tuple(x_t.shape[1:]) != self.shape:
            raise ValueError(f"x_t must have samples of shape {self.shape}; got {tuple(x_t.shape[1:])}.")
        angles = t[:, None] * self.frequencies
        code = self.time(torch.cat([angles.sin(), angles.cos()], 1).to(self.enter.weight.dtype))
        if self.label is not None:
            if class_labels is None:
                raise ValueError(
                    f"class_labels are missing; pass cond={{'class_labels': ...}} ({self.num_classes} is null)."
                )
            code = code + _embed("class_labels", self.label, class_labels)
        if self.step is not None and step is not None:
            code = code + _embed("step", self.step, step)
        code = nn.functional.silu(code)
        hidden = self.enter(x_t.flatten(1).to(code.dtype))
        for block in self.blocks:
            hidden = block(hidden, code)
        prediction: Tensor = self.leave(hidden)
        return prediction.view_as(x_t)


def _embed(name: str, table: nn.Embedding, numbers: Tensor) -> Tensor:
    # On a GPU the comparison would wait for the device in every call; there the embedding itself complains.
    if numbers.device.type == "cpu" and not bool(((numbers >= 0) & (numbers < table.num_embeddings)).all()):
        raise ValueError(
            f"{name} must lie in [0, {table.num_embeddings - 1}]; got [{numbers.min()}, {numbers.max()}]."
        )
    code: Tensor = table(numbers)
    return code


class _Block(nn.Module):
    def __init__(self, width: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(embedding, 2 * width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, hidden: Tensor, code: Tensor) -> Tensor:
        scale, shift = self.modulate(code).chunk(2, 1)
        inner = nn.functional.silu(self.first(self.norm(hidden) * (1 + scale) + shift))
        return hidden + self.second(self.dropout(inner))
