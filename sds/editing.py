"""Delta denoising score: an image is edited from what one prompt says to what another says."""

from dataclasses import dataclass

import torch
from torch import Generator

from scorefield.denoiser import Cond, Denoiser, expand_cond
from scorefield.gradient import (
    NoiseSampler,
    ScoreGradient,
    TimeWeight,
    noise_weight,
    standard_normal,
    weighted_gap,
)
from scorefield.schedule import Images
from scorefield.times import TimeSampler, uniform
from sds.losses import unit


@dataclass(frozen=True, kw_only=True, eq=False)
class DDS:
    """w(t) (eps_s(x_t, target prompt) - eps_s(source_t, source prompt)) (Hertz et al. 2023, arXiv 2304.07090).

    It is SDS of the edited image less SDS of the source at the same t and noise: what SDS does to an image that
    already fits its prompt (blur, saturation) cancels. The gradient is 0 where image and prompt are the source's.
    One call of the teacher on 2b samples.

    Args:
        teacher: guided as wished; the paper uses 7.5.
        source: x0 of the image to edit, batch 1 or b.
        source_cond: the prompt that describes it, batch 1 or b.
        times: how t is drawn; the paper draws 50 to 950 of 1000.
        w: weight of the published difference; 1 in the paper's code.
        noise: how the noise is drawn.
    """

    teacher: Denoiser
    source: Images
    source_cond: Cond
    times: TimeSampler = uniform(0.05, 0.95)
    w: TimeWeight = unit
    noise: NoiseSampler = standard_normal

    @torch.no_grad()
    def gradient(self, x0: Images, cond: Cond, *, generator: Generator) -> ScoreGradient:
        """The gradient at one draw of t and noise per sample; ``cond`` is the target prompt.

        Raises ``ValueError`` where source and x0, or their prompts, do not fit each other.
        """
        source = self._source_for(x0)
        given = expand_cond(self.source_cond, len(x0))
        if given.keys() != cond.keys():
            raise ValueError(f"source_cond must have the keys of cond {sorted(cond)}; got {sorted(given)}.")
        schedule = self.teacher.schedule
        t = self.times(len(x0), schedule, generator).to(x0.device)
        noise = self.noise(x0, cond, t, generator)
        x_t = torch.cat([schedule.diffuse(image, noise, t) for image in (x0, source)])
        both = {name: torch.cat([value, given[name].to(value)]) for name, value in cond.items()}
        x0_hat, source_hat = self.teacher(x_t, t.repeat(2), both).chunk(2)
        gap = (x0 - x0_hat) - (source - source_hat)
        return weighted_gap(noise_weight(self.w)(x0, x0_hat, t, schedule), gap, t)

    def _source_for(self, x0: Images) -> Images:
        if self.source.shape[1:] != x0.shape[1:]:
            raise ValueError(
                f"source must be images like x0 {tuple(x0.shape)}; got {tuple(self.source.shape)}. Encode and "
                "resize it as the scene's renders are."
            )
        return expand_cond({"source": self.source.to(x0)}, len(x0))["source"]
