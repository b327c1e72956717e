"""Diffusion models as attackers and as defence of classifiers, and honest figures of both.

Conventions, where they differ from the rest: images are in [0, 1], NCHW, as attacks have them, so that a radius of
8 / 255 is eight grey values. A classifier is any function from such images to logits (b, classes), in eval mode,
with its normalisation inside.
"""
