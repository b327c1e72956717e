"""The networks of :mod:`ddpm`, sampled otherwise."""

from dataclasses import replace

from scorefield.models.families import ddpm

FAMILY = replace(ddpm.FAMILY, pipeline="DDIMPipeline")
