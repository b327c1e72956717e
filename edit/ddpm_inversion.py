"""Edit-friendly inversion of the stochastic sampler: noise maps that rebuild the image exactly.

Huberman-Spiegelglas et al. 2023 (arXiv 2304.06140). Every x_t is the image under noise of its own, so that the
noise maps of neighbouring times are correlated and carry the image's structure:

    x_t = alpha_t x0 + sigma_t eps_t,   z_t = (x_s - mean(x_t)) / std,   std^2 = eta^2 times the posterior's
    variance

The authors' code has eta in place of eta^2 under the root, which is right at eta = 0 and 1 only.
"""

from dataclasses import dataclass
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from edit.inversion import Path, number_of
from scorefield.denoiser import Cond, Denoiser
from scorefield.randomness import Generators, normal_like
from scorefield.sampling import Step, check_decreasing, ddim_moments
from scorefield.schedule import Images, per_sample


@dataclass(frozen=True, eq=False)
class NoiseMaps:
    """What :func:`noise_step` adds at each time.

    Attributes:
        path: from the noisiest x_t to the image.
        maps: (b, *shape) for each time but the last, in units of the sampler's noise.
        rest: what the last prediction lacks to the image.
        eta: of the sampler.
    """

    path: Path
    maps: tuple[Tensor, ...]
    rest: Images
    eta: float

    def since(self, number: int) -> "NoiseMaps":
        """Return the maps from time ``number`` on: what skips the noisiest steps keeps more of the image."""
        path = Path(self.path.times[number:], self.path.points[number:])
        return NoiseMaps(path, self.maps[number:], self.rest, self.eta)


def invert_ddpm(
    denoiser: Denoiser, x0: Images, cond: Cond, *, times: Float[Tensor, " n"], generator: Generators,
    eta: float = 1.0,
) -> NoiseMaps:  # fmt: skip
    """Return the noise maps under which the stochastic sampler returns to ``x0``, exactly.

    Args:
        denoiser: guided as the source shall be; the paper uses 3.5.
        x0: clean images.
        cond: of the source prompts.
        times: the sampling grid, (n,) strictly decreasing.
        generator: draws the noise of every time.
        eta: in (0, 1]; 1 is DDPM. At 0 there is no noise to hold anything.

    Raises:
        ValueError: eta outside (0, 1].
    """
    if not 0 < eta <= 1:
        raise ValueError(f"eta must lie in (0, 1]; got {eta}. At 0 nothing is random: use DDIM inversion.")
    check_decreasing(times)
    schedule, batch = denoiser.schedule, [t.to(x0.device).expand(len(x0)) for t in times]
    points = [schedule.diffuse(x0, normal_like(x0, generator), t) for t in batch]
    answers = [denoiser(x_t, t, cond).to(x0.dtype) for x_t, t in zip(points, batch, strict=True)]
    maps = []
    for number, (t, s) in enumerate(pairwise(batch)):
        mean, std = ddim_moments(schedule, points[number], answers[number], t, s, eta)
        maps.append((points[number + 1] - mean) / per_sample(std, mean))
    return NoiseMaps(Path(times, (*points, x0)), tuple(maps), x0 - answers[-1], eta)


def noise_step(noise: NoiseMaps) -> Step:
    """Return the stochastic sampler's step with these maps for its noise; a larger batch repeats them.

    ``sample(denoiser, noise.path.points[0], cond, times=noise.path.times, step=noise_step(noise))`` returns to the
    image under the source's prompt, and edits it under another one.
    """

    def step(
        denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor | None, cond: Cond, generator: Generators | None
    ) -> Tensor:
        x0 = denoiser(x_t, t, cond).to(x_t.dtype)
        if s is None:
            return x0 + _repeated(noise.rest, x0)
        mean, std = ddim_moments(denoiser.schedule, x_t, x0, t, s, noise.eta)
        return mean + per_sample(std, mean) * _repeated(noise.maps[number_of(noise.path.times, t)], mean)

    return step


def _repeated(held: Tensor, x: Tensor) -> Tensor:
    return held.to(x).repeat(len(x) // len(held), *[1] * (x.ndim - 1))
