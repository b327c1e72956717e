"""Small bases of every kind that takes control, with inputs, and an adapter that is no ControlNet."""

import functools

import tiny_pipelines as tiny
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from controlnet.adapter import ControlledDenoiser, copy_encoder
from scorefield.denoiser import NetworkDenoiser, freeze
from scorefield.models.networks import DiffusersNetwork
from scorefield.schedule import VariancePreserving

# Name -> pixels of the hint per pixel of x_t, channels of the hint, prediction kind.
BASES = {"sd": (8, 3, "eps"), "sdxl": (8, 1, "eps"), "toyworld": (4, 1, "v"), "pixels": (1, 2, "v")}


@functools.cache
def _sdxl_config():
    return {**tiny.sdxl().unet.config}


def make_unet(name):
    if name == "sdxl":
        return UNet2DConditionModel(**_sdxl_config())
    return tiny.text_unet(**({"in_channels": 3, "out_channels": 3} if name == "pixels" else {}))


def make_base(name="sd", dtype=torch.float32):
    """A frozen base, its weights perturbed, since fresh biases and norms are too regular to tell things apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = make_unet(name).eval()
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    network = DiffusersNetwork(freeze(unet, dtype))
    return NetworkDenoiser(network, VariancePreserving.scaled_linear(), BASES[name][2])


def make_adapter(base, name="sd", trained=False, dtype=torch.float32):
    """A fresh copy, or one whose new convolutions are no longer zero."""
    factor, channels, _ = BASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        widths = (4, 8, 8, 12)[: factor.bit_length()]
        adapter = copy_encoder(base, hint_channels=channels, factor=factor, widths=widths).to(dtype)
        if trained:
            with torch.no_grad():
                for parameter_name, parameter in adapter.named_parameters():
                    if "controlnet_" in parameter_name:
                        parameter.add_(0.1 * torch.randn_like(parameter))
    return adapter


def make_controlled(name="sd", trained=False, dtype=torch.float32, batch=4):
    base = make_base(name, dtype)
    hint = make_inputs(name, batch, dtype)["hint"]
    return ControlledDenoiser(base, make_adapter(base, name, trained, dtype), hint)


def make_inputs(name="sd", batch=4, dtype=torch.float32, seed=0):
    """x0, x_t, t, hint and cond, as the base wants them."""
    factor, channels, _ = BASES[name]
    generator = torch.Generator().manual_seed(seed)
    unet = make_unet(name)
    draw = lambda *shape: torch.randn(batch, *shape, generator=generator).to(dtype)  # noqa: E731
    cond = {"encoder_hidden_states": draw(5, unet.config.cross_attention_dim)}
    if name == "sdxl":
        sizes = torch.tensor([16.0, 16, 0, 0, 16, 16]).repeat(batch, 1)
        cond |= {"text_embeds": draw(20), "time_ids": sizes}
    return {
        "x0": draw(unet.config.in_channels, 8, 8),
        "x_t": draw(unet.config.in_channels, 8, 8),
        "t": torch.randint(1000, (batch,), generator=generator).float(),
        "hint": torch.rand(batch, channels, 8 * factor, 8 * factor, generator=generator).round().to(dtype),
        "cond": cond,
    }


class HintPyramid(nn.Module):
    """A lighter adapter: one zero convolution per skip connection of the tiny UNets, on the shrunken hint."""

    SKIPS = ((8, 8), (8, 8), (8, 4), (16, 4))  # channels and side, finest first

    def __init__(self, channels):
        super().__init__()
        widths = [width for width, _ in self.SKIPS] + [16]
        self.convs = nn.ModuleList(nn.Conv2d(channels, width, 1) for width in widths)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_t, t, hint, **cond):
        sides = [side for _, side in self.SKIPS] + [4]
        values = [
            conv(nn.functional.adaptive_avg_pool2d(hint, side))
            for conv, side in zip(self.convs, sides, strict=True)
        ]
        return {**{f"down_residual_{i}": v for i, v in enumerate(values[:-1])}, "mid_residual": values[-1]}


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


# Constructor arguments of the public UNets, whose sizes are counted on the meta device.
SD15 = {
    "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8, "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
SDXL = {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


def meta_controlled(settings):
    """A public model with a fresh ControlNet, all shapes and no numbers, and inputs for one image."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(in_channels=4, out_channels=4, **settings)
    base = NetworkDenoiser(DiffusersNetwork(freeze(unet)), VariancePreserving.scaled_linear())
    side = settings["sample_size"]
    shapes = {"encoder_hidden_states": (1, 77, settings["cross_attention_dim"])}
    if "addition_embed_type" in settings:
        shapes |= {"text_embeds": (1, 1280), "time_ids": (1, 6)}
    inputs = {
        "x0": torch.zeros(1, 4, side, side, device="meta"),
        "hint": torch.zeros(1, 3, 8 * side, 8 * side, device="meta"),
        "cond": {name: torch.zeros(shape, device="meta") for name, shape in shapes.items()},
    }
    return ControlledDenoiser(base, copy_encoder(base)), inputs
