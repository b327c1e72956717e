"""Text to 3D by score distillation: a frozen diffusion model teaches an image, a latent or a radiance field.

    images = scene(...)                                        # (b, 3, h, w) in [-1, 1], with gradient
    x0 = encoded(images, teacher.encode, teacher.size)         # one pass of the encoder
    terms = distillation_loss(sds(guide), x0, cond, num_draws=4, generator=generator)
    terms["loss"].backward()                                   # ... and one pass back, for all four noises

Every loss has a method ``gradient(x0, cond, generator=...) -> ScoreGradient``; see :mod:`sds.losses` and
:mod:`sds.vsd`.

A finished run of ``scorefield sds`` is read again by ``sds.load_run(folder)``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sds.runs import load_run as load_run

__all__ = ["load_run"]


def __getattr__(name: str) -> Any:
    if name != "load_run":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sds.runs import load_run

    return load_run
