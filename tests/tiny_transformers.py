"""Pipelines of flow transformers and their kin with random weights, as small as each family allows."""

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_pipelines import LETTERS, clip, clip_tokenizer, sd3, spread, t5, t5_tokenizer, vae
from tokenizers import pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


def qwen_tokenizer():
    """Byte-level BPE without merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {piece: number for number, piece in enumerate([*special, *letters])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>", unk_token=None)
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def gemma_tokenizer():
    pieces = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "▁",
        *LETTERS.strip(),
        *"0123456789.,:;-'\n<>ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    ]
    return GemmaTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[])


def gemma(width=16):
    config = Gemma2Config(
        vocab_size=128, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=2, sliding_window=512,
    )  # fmt: skip
    return spread(Gemma2Model(config).eval())


def qwen3(kind=Qwen3Model, width=16, layers=2):
    config = Qwen3Config(
        vocab_size=300, hidden_size=width, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=2048, pad_token_id=0,
    )  # fmt: skip
    return spread(kind(config).eval())


def flow(**settings):
    return FlowMatchEulerDiscreteScheduler(**settings)


DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}


def flux(guidance=True):
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance,
    ).eval()  # fmt: skip
    return FluxPipeline(
        transformer=transformer, scheduler=flow(**DYNAMIC), vae=vae(4, shift=0.1159, scaling=0.3611, quant=False),
        text_encoder=clip(), tokenizer=clip_tokenizer(), text_encoder_2=t5(), tokenizer_2=t5_tokenizer(),
    )  # fmt: skip


def z_image():
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 4, 8], axes_lens=[1024, 64, 64],
    ).eval()  # fmt: skip
    return ZImagePipeline(
        transformer=_awake(transformer), scheduler=flow(shift=3.0),
        vae=vae(4, shift=0.1159, scaling=0.3611, quant=False), text_encoder=qwen3(), tokenizer=qwen_tokenizer(),
    )  # fmt: skip


def _awake(module):
    """Give weights that begin at zero, or are left uninitialised, a value."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.isfinite().all() or parameter.abs().max() == 0 or parameter.abs().max() > 1e3:
                parameter.normal_(0, 0.05)
    return module


def qwen_image():
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": 300, "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
        },
        vision_start_token_id=1, vision_end_token_id=2, image_token_id=3, video_token_id=4,
    )  # fmt: skip
    autoencoder = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.8, 1.1],
    ).eval()  # fmt: skip
    return QwenImagePipeline(
        transformer=transformer, scheduler=flow(**DYNAMIC), vae=autoencoder,
        text_encoder=spread(Qwen2_5_VLForConditionalGeneration(config).eval()), tokenizer=qwen_tokenizer(),
    )  # fmt: skip


def flux2_transformer(texts, guidance):
    return Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=texts, timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance,
    ).eval()  # fmt: skip


def flux2_vae():
    autoencoder = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, layers_per_block=1,
        sample_size=16,
    ).eval()  # fmt: skip
    with torch.no_grad():
        autoencoder.bn.running_mean.normal_(0, 0.3)
        autoencoder.bn.running_var.uniform_(0.5, 2)
    return autoencoder


def flux2_klein():
    torch.manual_seed(0)
    return Flux2KleinPipeline(
        transformer=flux2_transformer(48, guidance=False), scheduler=flow(use_dynamic_shifting=True),
        vae=flux2_vae(), text_encoder=qwen3(Qwen3ForCausalLM, layers=28), tokenizer=qwen_tokenizer(),
    )  # fmt: skip


PARTS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {% for part in message['content'] %}"
    "{{ part['text'] }}{% endfor %}<|im_end|>{% endfor %}"
)


def pixtral_processor():
    """A tokenizer, which knows the tokens of images, in a processor that is told parts of messages."""
    tokenizer = qwen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]})
    return PixtralProcessor(
        image_processor=PixtralImageProcessor(size={"longest_edge": 16}, patch_size=4), tokenizer=tokenizer,
        patch_size=4, chat_template=PARTS,
    )  # fmt: skip


def flux2():
    torch.manual_seed(0)
    config = Mistral3Config(
        text_config={
            "model_type": "mistral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 30,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 300,
            "max_position_embeddings": 2048, "pad_token_id": 0, "sliding_window": None,
        },
        vision_config={
            "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "head_dim": 8, "patch_size": 4, "image_size": 16,
        },
        image_token_index=260, spatial_merge_size=1,
    )  # fmt: skip
    return Flux2Pipeline(
        transformer=flux2_transformer(48, guidance=True), scheduler=flow(use_dynamic_shifting=True),
        vae=flux2_vae(), text_encoder=spread(Mistral3ForConditionalGeneration(config).eval()),
        tokenizer=pixtral_processor(),
    )  # fmt: skip


def sd35():
    """Stable Diffusion 3.5: norms of queries and keys, and two attentions in its first block."""
    torch.manual_seed(0)
    pipeline = sd3()
    own = {"qk_norm": "rms_norm", "dual_attention_layers": (0,), "pos_embed_max_size": 16}
    config = {**pipeline.transformer.config, **own}
    pipeline.register_modules(transformer=SD3Transformer2DModel.from_config(config).eval())
    return pipeline


def sana(layers=1):
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=layers, num_attention_heads=2,
        attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8,
        caption_channels=16, sample_size=16,
    ).eval()  # fmt: skip
    autoencoder = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1],
        downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.41407,
    ).eval()  # fmt: skip
    return SanaPipeline(
        transformer=transformer, scheduler=flow(shift=3.0), vae=autoencoder, text_encoder=gemma(),
        tokenizer=gemma_tokenizer(),
    )  # fmt: skip


BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}


def pixart_sigma():
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        caption_channels=32, in_channels=4, cross_attention_dim=16, out_channels=8, attention_bias=True,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        use_additional_conditions=False,
    ).eval()  # fmt: skip
    return PixArtSigmaPipeline(
        transformer=transformer, scheduler=DDIMScheduler(**BETAS), vae=vae(), text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )  # fmt: skip


def dit():
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero", norm_elementwise_affine=False,
    ).eval()  # fmt: skip
    return DiTPipeline(transformer=transformer, vae=vae(), scheduler=DDIMScheduler(**BETAS))


def lumina2():
    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=2, ffn_dim_multiplier=None, cap_feat_dim=16,
        axes_dim_rope=(4, 2, 2), axes_lens=(512, 64, 64),
    ).eval()  # fmt: skip
    return Lumina2Pipeline(
        transformer=_awake(transformer), scheduler=flow(shift=6.0),
        vae=vae(4, shift=0.1159, scaling=0.3611, quant=False), text_encoder=gemma(), tokenizer=gemma_tokenizer(),
    )  # fmt: skip


def wan():
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=64,
    ).eval()  # fmt: skip
    autoencoder = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    config = UMT5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return WanPipeline(
        transformer=transformer, scheduler=flow(shift=3.0), vae=autoencoder,
        text_encoder=spread(UMT5EncoderModel(config).eval()), tokenizer=t5_tokenizer(),
    )  # fmt: skip


FAMILIES = {
    "flux": flux, "z_image": z_image, "qwen_image": qwen_image, "flux2_klein": flux2_klein, "flux2": flux2,
    "sd35": sd35, "sana": sana, "pixart_sigma": pixart_sigma, "dit": dit, "lumina2": lumina2, "wan": wan,
}  # fmt: skip


MAKERS_NAMES = {
    "attention.to_out.0": "attention.out", "norm_q": "q_norm", "norm_k": "k_norm",
    "all_final_layer.2-1": "final_layer", "all_x_embedder.2-1": "x_embedder",
}  # fmt: skip


def in_makers_names(weights):
    """Z-Image's transformer as its makers save it: queries, keys and values in one."""
    made = {}
    for own_name, value in weights.items():
        name = own_name
        for own, theirs in MAKERS_NAMES.items():
            name = name.replace(own, theirs)
        if ".to_q." in name:
            parts = [weights[own_name.replace(".to_q.", f".to_{one}.")] for one in "qkv"]
            made["model.diffusion_model." + name.replace(".to_q.", ".qkv.")] = torch.cat(parts)
        elif ".to_k." not in name and ".to_v." not in name:
            made["model.diffusion_model." + name] = value
    return made
