"""Noise schedules that only tests need."""

from scorefield.schedule import VariancePreserving


def zero_snr(schedule: VariancePreserving) -> VariancePreserving:
    """The schedule with its last alpha moved to 0 (Lin et al. 2023, arXiv 2305.08891, Algorithm 1)."""
    alpha = schedule.alphas_cumprod.sqrt()
    return VariancePreserving(((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2)


ZERO_SNR = zero_snr(VariancePreserving.scaled_linear())
