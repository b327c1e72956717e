"""Named choices that options and functions share. Importing them imports no torch: the command line needs that."""

from typing import Literal

LongPrompts = Literal["stop", "skip", "cut"]
"""What to do about prompts that are longer than the text encoders read."""

OnBadData = Literal["stop", "skip"]
"""What to do about samples that cannot be used."""

Quantize = Literal["no", "nf4", "int8"]
"""How the weights of a frozen network are rounded: not at all, to 4 bits, or to 8."""

QUANTIZE_PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao"}
"""The package that rounds weights so."""

Kind = Literal["image", "lines", "mask", "labels", "depth", "normals"]
"""What a picture means, and so how it is resized, mirrored and scaled:

- image: colours or grey values, antialiased; the image itself in [-1, 1], a hint image in [0, 1];
- lines: thin white lines, of which none may vanish: the largest value counts; [0, 1];
- mask: black and white, nearest; [0, 1];
- labels: whole numbers, nearest, as they are;
- depth: distances or any numbers, nearest, as they are;
- normals: 0 to 1 is -1 to 1, red to the right: nearest, and mirroring turns red over; black is none, and stays.
"""

Tracker = Literal["tensorboard", "wandb", "trackio", "none"]
"""Where the curves of a run go."""

Spacing = Literal["uniform", "trailing", "karras", "log-snr"]
"""uniform: even in the schedule's customary spacing, from the noisiest time to the cleanest.
trailing: even in the customary spacing, with the clean image as the last point; diffusers' "trailing".
karras: even in (sigma / alpha)^(1/7) (arXiv 2206.00364, Eq. 5), with the clean end left out as in trailing.
log-snr: even in log(sigma / alpha), with the clean end left out as in trailing."""

Solver = Literal["ddim", "ddpm", "heun", "dpm++", "unipc"]
"""A sampler by name: :func:`sampling.ddim`, ``ddpm`` and ``heun``, :func:`solvers.dpm_solver` and ``unipc``."""
