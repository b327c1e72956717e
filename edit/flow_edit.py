"""FlowEdit: from an image to its edit along the difference of two flows, without inversion.

Kulikov et al. 2024 (arXiv 2412.08629, Algorithm 1). At each time both flows see the image under fresh noise, the
target's moved by what has been edited so far:

    z_source = (1 - t) x + t eps,   z_target = z + z_source - x,   z <- z + (s - t) (v_target - v_source)
"""

import torch
from jaxtyping import Float
from torch import Tensor

from scorefield.denoiser import Cond, Denoiser, rescheduled
from scorefield.randomness import Generators, normal_like
from scorefield.sampling import check_decreasing, ddim, sample
from scorefield.schedule import Images, RectifiedFlow


def as_flow(denoiser: Denoiser) -> Denoiser:
    """Return the denoiser as one of a flow: itself, or on straight paths between its own least and most noise.

    Exact, but a teacher of integer timesteps is asked between them.
    """
    schedule = denoiser.schedule
    if isinstance(schedule, RectifiedFlow):
        return denoiser
    ends = schedule.ratio(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64))
    low, high = RectifiedFlow().time(ends).tolist()  # pure noise, whose ratio is infinite, lies at 1
    return rescheduled(denoiser, RectifiedFlow(low, high))


def flow_edit(
    source: Denoiser, target: Denoiser, image: Images, source_cond: Cond, target_cond: Cond, *,
    times: Float[Tensor, " n"], generator: Generators, num_draws: int = 1, num_plain: int = 0,
) -> Tensor:  # fmt: skip
    """Return the edited image.

    Args:
        source: a flow, guided as the source shall be (Stable Diffusion 3: 3.5).
        target: the same flow, guided as the target shall be (Stable Diffusion 3: 13.5).
        image: (b, *shape) clean images.
        source_cond: of the prompts that describe them, batch b.
        target_cond: of the prompts of the edit, batch b.
        times: (n,) strictly decreasing; leave out the noisiest ones to keep more of the image (33 of 50).
        generator: for the noise.
        num_draws: noises a time, over which the difference is averaged.
        num_plain: last times at which the target is sampled as usual.

    Raises:
        ValueError: a schedule that is no flow's, num_draws below 1 or num_plain outside [0, n].
    """
    for denoiser in (source, target):
        if not isinstance(denoiser.schedule, RectifiedFlow):
            raise ValueError(
                f"FlowEdit needs a flow; got {denoiser.schedule}. Wrap the denoiser in as_flow first."
            )
    if num_draws < 1 or not 0 <= num_plain <= len(times):
        raise ValueError(
            f"num_draws must be at least 1 and num_plain in [0, {len(times)}]; got {num_draws} and {num_plain}."
        )
    check_decreasing(times)
    edited, own = image, times[: len(times) - num_plain]
    following = [*times[1:].tolist(), 0.0]
    for number, time in enumerate(own):
        t, change = time.to(image.device).expand(len(image)), torch.zeros_like(image)
        for _ in range(num_draws):
            z_source = source.schedule.diffuse(image, normal_like(image, generator), t)
            z_target = edited + z_source - image
            moved = target(z_target, t, target_cond) - source(z_source, t, source_cond)
            # v = (z - x0) / t for both.
            change = change + ((edited - image) - moved.to(image.dtype)) / float(time)
        edited = edited + (following[number] - float(time)) * change / num_draws
    if not num_plain:
        return edited
    rest = times[len(times) - num_plain :]
    t = rest[0].to(image.device).expand(len(image))
    start = edited + source.schedule.diffuse(image, normal_like(image, generator), t) - image
    return sample(target, start, target_cond, times=rest, step=ddim())
