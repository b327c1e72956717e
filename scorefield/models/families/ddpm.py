"""UNet2DModel on pixels, without prompts."""

from diffusers import UNet2DModel

from scorefield.models.families import Family

FAMILY = Family("DDPMPipeline", "unet", UNet2DModel, {}, latent=False)
