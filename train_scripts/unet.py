"""diffusers' UNet as a network of these scripts: another calling convention, and patches for speed."""

from typing import Any

from diffusers import UNet2DModel
from torch import Tensor, nn


class UNet(nn.Module):
    """diffusers' UNet2DModel with the calling convention of this package, on patches of the image.

    Args:
        shape: (c, h, w) of an image.
        num_classes: label ``num_classes`` is the null class; 0 means unconditional.
        channels: of each resolution, halving from one to the next.
        layers: residual blocks at each resolution.
        patch: pixels that become channels first: 2 makes a network four times as fast on large images.
        attention: at the lowest resolution.
        dropout: in each block, while training.
    """

    bottleneck = "unet.mid_block"

    def __init__(
        self, shape: tuple[int, int, int], num_classes: int = 0, channels: tuple[int, ...] = (64, 128),
        layers: int = 1, patch: int = 2, attention: bool = True, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        scale = patch * 2 ** (len(channels) - 1)
        if shape[1] % scale or shape[2] % scale:
            raise ValueError(
                f"a UNet of {len(channels)} resolutions on {patch} x {patch} patches needs sides divisible by "
                f"{scale}; got {shape[1]} x {shape[2]}. Pass another --resolution, or fewer channels."
            )
        self.shape, self.num_classes, self.patch = tuple(shape), num_classes, patch
        if any(width % 8 for width in channels):
            raise ValueError(f"--unet-channels must be divisible by 8, for group norm; got {channels}.")
        inner, plain = shape[0] * patch**2, len(channels) - 1
        unet: Any = UNet2DModel(
            sample_size=(shape[1] // patch, shape[2] // patch), in_channels=inner, out_channels=inner,
            block_out_channels=tuple(channels), layers_per_block=layers, norm_num_groups=8, dropout=dropout,
            down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D" if attention else "DownBlock2D",),
            up_block_types=("AttnUpBlock2D" if attention else "UpBlock2D",) + ("UpBlock2D",) * plain,
            attention_head_dim=16, add_attention=attention,
            num_class_embeds=num_classes + 1 if num_classes else None,
        )  # fmt: skip
        nn.init.zeros_(unet.conv_out.weight)
        nn.init.zeros_(unet.conv_out.bias)
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The prediction, shape of x_t; t of order one, as EDM's log(sigma) / 4 and a flow's t are."""
        patches = nn.functional.pixel_unshuffle(x_t, self.patch)
        # The embedding of diffusers' UNets is made for timesteps up to 1,000.
        prediction: Tensor = self.unet(patches, 1000 * t, class_labels).sample
        return nn.functional.pixel_shuffle(prediction, self.patch)
