"""h-space: activations of a network's middle block, recorded, shifted, and searched for directions.

Kwon et al. 2022 (arXiv 2210.10960) found that a shift of the middle block edits images; Haas et al. 2023 (arXiv
2303.11073) find directions by principal components and by the Jacobian. Readable is not causal: a probe may read
an attribute that a shift along it does not change, so judge a direction by what it does to samples.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from scorefield.denoiser import Cond, Denoiser, NetworkDenoiser
from scorefield.randomness import Generators
from scorefield.sampling import Point, Step, asking_once, mix
from scorefield.schedule import Images, PerSample, Schedule

Shift = Callable[[Tensor, float], Tensor]
"""(activations, t) -> activations, of the same shape."""


def middle(network: nn.Module) -> str:
    """Return the name of a network's middle block: a UNet's mid_block, or what the network calls its bottleneck.

    Raises ``ValueError`` where there is neither.
    """
    found = next((name for name, _ in network.named_modules() if name.split(".")[-1] == "mid_block"), "")
    if not found:
        try:
            found = str(network.bottleneck)
        except AttributeError as error:
            raise ValueError(f"{type(network).__name__} has no middle block; name a module.") from error
    return found


@dataclass(frozen=True, eq=False)
class Hooked:
    """The denoiser of :func:`shifted` and :func:`recorded`: it tells the hook what time it is."""

    denoiser: NetworkDenoiser
    state: "_State"

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's."""
        return self.denoiser.schedule

    def __call__(self, x_t: Images, t: PerSample, cond: Cond) -> Tensor:
        """Return the expected clean image. Raises ``ValueError`` for several times in one batch."""
        if not bool((t == t[0]).all()):
            raise ValueError(f"activations are changed at one time for all samples; got t = {t.tolist()}.")
        self.state.t, self.state.asked = float(t[0]), True
        try:
            with torch.compiler.set_stance("force_eager"):  # a compiled network has no hooks
                return self.denoiser(x_t, t, cond)
        finally:
            self.state.asked = False


@dataclass
class _State:
    t: float = 0.0
    asked: bool = False


@contextmanager
def shifted(denoiser: NetworkDenoiser, shift: Shift, module: str = "") -> Iterator[Hooked]:
    """Change a module's output by ``shift`` within the block; behind it the network is as before.

    Only what is asked through the block's own denoiser is shifted; ``denoiser`` itself answers as ever.

    Args:
        denoiser: without guidance, which goes round the result: all rows are shifted, negatives too.
        shift: of the activations; the first tensor where the module returns several.
        module: its name in the network; by default the :func:`middle` block.

    Raises:
        ValueError: no such module.
    """
    inner, state = denoiser.unwrapped(), _State()

    def hook(part: nn.Module, args: Any, output: Any) -> Any:
        del part, args
        if not state.asked:
            return output
        if isinstance(output, Tensor):
            return shift(output, state.t)
        return (shift(output[0], state.t), *output[1:])

    handle = _module(inner.network, module).register_forward_hook(hook)
    try:
        yield Hooked(inner, state)
    finally:
        handle.remove()


@contextmanager
def recorded(denoiser: NetworkDenoiser, module: str = "") -> Iterator[tuple[Hooked, "Record"]]:
    """Keep a module's output at every time within the block; arguments and errors are those of :func:`shifted`."""
    record = Record()

    def keep(activations: Tensor, t: float) -> Tensor:
        record.activations[t] = activations.detach()
        return activations

    with shifted(denoiser, keep, module) as inner:
        yield inner, record


@dataclass(frozen=True, eq=False)
class Record:
    """Activations (b, *shape) by time, in the order of the calls; the last call at a time counts."""

    activations: dict[float, Tensor] = field(default_factory=dict)

    def joint(self) -> Float[Tensor, "b times *shape"]:
        """Return all times of a sample side by side."""
        return torch.stack(list(self.activations.values()), 1)


def along(direction: Tensor, scale: float, low: float = float("-inf"), high: float = float("inf")) -> Shift:
    """Return the shift h + scale direction at times in [low, high]; scale 0 changes no bit."""

    def shift(activations: Tensor, t: float) -> Tensor:
        if scale == 0 or not low <= t <= high:
            return activations
        return activations + scale * direction.to(activations)

    return shift


def asymmetric(plain: Denoiser) -> Step:
    """Return Asyrp's DDIM step: the shift acts on the clean image alone, the noise is that of ``plain``.

    x_s = alpha_s x0(shifted) + sigma_s eps(plain) (arXiv 2210.10960, Eq. 7). It costs a second call; without it
    the shift acts on both (the symmetric form of arXiv 2303.11073). ``plain`` may be of the same network:

        with shifted(denoiser, shift) as inner:
            sample(inner, x_t, cond, times=times, step=asymmetric(denoiser))
    """

    def move(schedule: Schedule, point: Point, s: Tensor, cond: Cond, generator: Generators | None) -> Tensor:
        del generator
        x_t, t = point.x_t, point.t
        noise = schedule.from_x0(plain(x_t, t, cond).to(x_t.dtype), x_t, t, "eps")
        return mix(point.x0, schedule.alpha(s), noise, schedule.sigma(s))

    return asking_once(move)


# Directions ----------------------------------------------------------------------------------------------------


def difference_of_means(activations: Float[Tensor, "n *shape"], labels: Int[Tensor, " n"]) -> Tensor:
    """Return mean(h | label 1) - mean(h | label 0), shape of one sample.

    Raises ``ValueError`` unless both labels occur.
    """
    positive = labels.bool()
    if not bool(positive.any()) or bool(positive.all()):
        raise ValueError(f"a direction needs samples of both labels; got {int(positive.sum())} of {len(labels)}.")
    return activations[positive].mean(0) - activations[~positive].mean(0)


def linear_probe(
    activations: Float[Tensor, "n *shape"], labels: Int[Tensor, " n"], ridge: float = 1.0
) -> tuple[Tensor, float]:
    """Return the normal of ridge regression onto labels of -1 and 1, of unit length, and its accuracy on these
    samples.

    Computed in float64 from products of samples, of which there are fewer than dimensions.

    Raises ``ValueError`` unless both labels occur, and for a ridge that is not above 0.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be above 0; got {ridge}.")
    difference_of_means(activations, labels)
    x = activations.flatten(1).double()
    centred, sign = x - x.mean(0), 2.0 * labels.double() - 1
    gram = centred @ centred.T + ridge * torch.eye(len(x), dtype=torch.float64, device=x.device)
    normal = centred.T @ torch.linalg.solve(gram, sign - sign.mean())
    right = ((centred @ normal + sign.mean()).sign() == sign).double().mean()
    return (normal / normal.norm()).view(activations.shape[1:]).to(activations), float(right)


def principal_components(activations: Float[Tensor, "n *shape"], number: int) -> tuple[Tensor, Tensor]:
    """Return (number, *shape) orthonormal directions of most variance, and the share of it that each has.

    Raises ``ValueError`` for more directions than n - 1.
    """
    if not 1 <= number < len(activations):
        raise ValueError(f"{len(activations)} samples have 1 to {len(activations) - 1} components; got {number}.")
    x = activations.flatten(1).double()
    _, sizes, directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    shares = sizes.square() / sizes.square().sum()
    return directions[:number].view(number, *activations.shape[1:]).to(activations), shares[:number]


def disentangled(direction: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Return a direction's part that is orthogonal to all others: v - N^T (N N^T)^-1 N v, in float64.

    Projecting off one after the other leaves a rest where the others are not orthogonal.
    """
    if not others:
        return direction
    basis = torch.stack([one.flatten() for one in others]).double()
    v = direction.flatten().double()
    rest = v - basis.T @ torch.linalg.lstsq(basis.T, v[:, None]).solution[:, 0]
    return rest.view_as(direction).to(direction)


def jacobian_svd(
    function: Callable[[Tensor], Tensor], h: Tensor, number: int, *, num_iterations: int = 5,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "b number"], Tensor]:  # fmt: skip
    """Return the largest singular values of each sample's Jacobian, and their right singular vectors.

    Subspace iteration on J^T J by forward and backward derivatives; J is never formed.

    Args:
        function: of activations (b, *shape), of which each sample's result depends on that sample alone.
        h: where the Jacobian is taken.
        number: of vectors.
        num_iterations: three converge where the values lie apart.
        generator: draws the start.

    Returns:
        (b, number) values, descending, and (b, number, *shape) vectors.
    """
    batch, size = len(h), h[0].numel()
    if not 1 <= number <= size:
        raise ValueError(f"a Jacobian in {size} dimensions has 1 to {size} directions; got {number}.")
    vectors = torch.randn(batch, size, number, generator=generator, dtype=h.dtype).to(h.device)
    vectors = torch.linalg.qr(vectors).Q
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward derivative
        for _ in range(num_iterations):
            vectors = torch.linalg.qr(_backward(function, h, _forward(function, h, vectors))).Q
        images = _forward(function, h, vectors)
    _, values, turn = torch.linalg.svd(images, full_matrices=False)
    turned = (vectors @ turn.mT).mT
    return values, turned.reshape(batch, number, *h.shape[1:])


def activations_to_x0(denoiser: NetworkDenoiser, x_t: Images, t: PerSample, cond: Cond, module: str = "") -> Any:
    """Return what :func:`jacobian_svd` takes: the function from activations to x0, and those at x_t."""
    with recorded(denoiser, module) as (inner, record), torch.no_grad():
        inner(x_t, t, cond)
    (h,) = record.activations.values()

    def function(activations: Tensor) -> Tensor:
        with shifted(denoiser, lambda _, __: activations, module) as replaced:
            return replaced(x_t, t, cond)

    return function, h


def _forward(function: Callable[[Tensor], Tensor], h: Tensor, vectors: Tensor) -> Tensor:
    columns = [
        torch.func.jvp(function, (h,), (vectors[..., k].reshape(h.shape),))[1].flatten(1)
        for k in range(vectors.shape[-1])
    ]
    return torch.stack(columns, -1)


def _backward(function: Callable[[Tensor], Tensor], h: Tensor, images: Tensor) -> Tensor:
    with torch.enable_grad():
        at = h.detach().requires_grad_()
        output = function(at)
        rows = [
            torch.autograd.grad(output, at, images[..., k].reshape(output.shape), retain_graph=True)[0].flatten(1)
            for k in range(images.shape[-1])
        ]
    return torch.stack(rows, -1)


def _module(network: nn.Module, name: str) -> nn.Module:
    name = name or middle(network)
    try:
        return network.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{type(network).__name__} has no module {name!r}; got {error}.") from error
