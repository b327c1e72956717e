"""DiT (arXiv 2212.09748): classes of ImageNet, eps and a variance beside it."""

from typing import Any

from diffusers import DiTTransformer2DModel
from torch import Tensor

from scorefield.models.families import Family


def call(model: Any, x_t: Tensor, t: Tensor, given: dict[str, Any]) -> Tensor:
    """Ask the transformer, and leave out the variance that it predicts in the second half of its channels."""
    prediction: Tensor = model(x_t, timestep=t, return_dict=False, **given)[0]
    return prediction[:, : x_t.shape[1]]


FAMILY = Family(
    "DiTPipeline",
    "transformer",
    DiTTransformer2DModel,
    {},
    call=call,
    blocks="transformer_blocks",
    variance=True,
    classes="num_embeds_ada_norm",
)
