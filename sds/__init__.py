"""A scene learns: score distillation of a frozen diffusion model into a picture, a latent or a field of radiance.

    images = scene(...)                                        # (b, 3, h, w) in [-1, 1], with gradient
    x0 = encoded(images, teacher.encode, teacher.size)         # one pass of the encoder
    terms = distillation_loss(sds(guide), x0, cond, num_draws=4, generator=generator)
    terms["loss"].backward()                                   # ... and one pass back, for all four noises

Every loss is an object with ``gradient(x0, cond, generator=...) -> ScoreGradient``: :mod:`sds.losses`.
"""
