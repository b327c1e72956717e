"""Pipelines of diffusers with random weights, as small as each family allows, with tokenizers made on the spot."""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

SD_BETAS = {"beta_start": 8.5e-4, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LETTERS = "abcdefghijklmnopqrstuvwxyz "


def clip_tokenizer(length=16):
    """Byte-level BPE without merges: one token per letter."""
    ends = ["<|startoftext|>", "<|endoftext|>"]
    pieces = [*ends, *LETTERS.strip(), *(letter + "</w>" for letter in LETTERS.strip())]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=length)


def t5_tokenizer():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((x, -2.0) for x in LETTERS.strip())]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=32)


def clip(width=32, projection=None, length=16):
    kind = CLIPTextModel if projection is None else CLIPTextModelWithProjection
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=length, projection_dim=projection or width, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    return spread(kind(config).eval())


def t5(width=32):
    config = T5Config(
        vocab_size=64, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


def spread(module):
    """Larger than transformers' initial 0.02, so that another prompt makes another image."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return module


def vae(channels=4, shift=None, scaling=0.18215, quant=True):
    blocks = 2
    return AutoencoderKL(
        block_out_channels=(8,) * blocks, down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks, latent_channels=channels, norm_num_groups=4,
        layers_per_block=1, sample_size=16, scaling_factor=scaling, shift_factor=shift, use_quant_conv=quant,
        use_post_quant_conv=quant,
    ).eval()  # fmt: skip


def tiny_vae(channels=4):
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(latent_channels=channels, **blocks, **counts).eval()


def text_unet(width=32, **changes):
    settings = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16),
        "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": width,
    }  # fmt: skip
    return UNet2DConditionModel(**{**settings, **changes}).eval()


def pixel_unet(**changes):
    settings = {
        "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4, "add_attention": False, "layers_per_block": 1,
    }  # fmt: skip
    return UNet2DModel(**{**settings, **changes}).eval()


def sd(prediction="epsilon", **scheduler):
    """Stable Diffusion 1.x; 2.x with ``prediction`` "v_prediction"."""
    torch.manual_seed(0)
    settings = {**SD_BETAS, "clip_sample": False, "steps_offset": 1, "prediction_type": prediction, **scheduler}
    return StableDiffusionPipeline(
        vae=vae(), text_encoder=clip(), tokenizer=clip_tokenizer(), unet=text_unet(),
        scheduler=DDIMScheduler(**settings), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def sdxl():
    torch.manual_seed(0)
    unet = text_unet(
        32 + 24, addition_embed_type="text_time", addition_time_embed_dim=4, transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=20 + 6 * 4, use_linear_projection=True,
    )  # fmt: skip
    scheduler = DDIMScheduler(**SD_BETAS, clip_sample=False, steps_offset=1)
    return StableDiffusionXLPipeline(
        vae=vae(scaling=0.13025), text_encoder=clip(), text_encoder_2=clip(24, projection=20),
        tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), unet=unet, scheduler=scheduler,
        add_watermarker=False,
    )  # fmt: skip


def sd3(with_t5=True):
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=8, out_channels=8, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=24,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(8, shift=0.0609, scaling=1.5305, quant=False),
        text_encoder=clip(16, projection=12), tokenizer=clip_tokenizer(),
        text_encoder_2=clip(12, projection=12), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5() if with_t5 else None, tokenizer_3=t5_tokenizer() if with_t5 else None,
    )  # fmt: skip


def pixels(prediction="epsilon", **changes):
    torch.manual_seed(0)
    scheduler = DDPMScheduler(prediction_type=prediction, clip_sample=False)
    return DDPMPipeline(pixel_unet(**changes), scheduler)
