"""SDEdit as an edit: noise the image a little, denoise it under the target's prompt (arXiv 2108.01073).

A strength is a share of the steps, and exactly that many network calls are made: K steps are R(., K) ... R(.,
1). Code that passes an index of the noisiest step instead makes one more.
"""

from jaxtyping import Float
from torch import Tensor

from scorefield.denoiser import Cond, Denoiser
from scorefield.randomness import Generators
from scorefield.sampling import Multistep, Step
from scorefield.sampling import sdedit as noise_and_denoise
from scorefield.schedule import Images


def last_times(times: Float[Tensor, " n"], strength: float) -> Float[Tensor, " k"]:
    """Return the last k = round(strength n) of the times, the cleanest: how far back SDEdit goes.

    Raises ``ValueError`` for a strength outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is a share of the steps in [0, 1]; got {strength}.")
    return times[len(times) - round(strength * len(times)) :]


def sdedit(
    denoiser: Denoiser, image: Images, cond: Cond, *, times: Float[Tensor, " n"], strength: float,
    generator: Generators, step: Step | Multistep | None = None, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the image, noised by ``strength`` and denoised under ``cond``; 0 returns it, 1 is fresh sampling.

    Args:
        denoiser: guided as wanted.
        image: clean images.
        cond: of the target's prompt, batch b.
        times: of a whole sampling run; the last round(strength n) are used.
        strength: in [0, 1].
        generator: for the noise.
        step: ``ddim()`` by default.
        mask: True where the image may change; elsewhere it stays exactly.
    """
    chosen = last_times(times, strength)
    return noise_and_denoise(denoiser, image, cond, times=chosen, generator=generator, step=step, mask=mask)
