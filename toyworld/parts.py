"""Untrained parts of the toy world's text-to-image pipeline, and the function that saves them as one.

It is latent diffusion in the shape of Stable Diffusion 2 (v-prediction), some hundred times smaller. All parts are
built by diffusers and transformers, so the finished folder loads wherever a ``StableDiffusionPipeline`` does.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from scorefield.atomic import whole_folder
from toyworld.captions import WORDS

SIZE = 64
"""Height and width of an image in pixels. Its latent has 4 channels and a quarter of the height and width."""

LENGTH = 24
"""Tokens of a prompt, including start and end."""

START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-/"


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair encoding, in which each word of the captions is one token, and others are spelled."""
    pairs: Any = make_merges([*word[:-1], word[-1] + "</w>"] for word in dict.fromkeys(WORDS))
    pieces = [*LETTERS, *(letter + "</w>" for letter in LETTERS), *map("".join, pairs)]
    vocabulary = {piece: number for number, piece in enumerate([START, END, *dict.fromkeys(pieces)])}
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=LENGTH)


def make_merges(words: Iterable[list[str]]) -> list[tuple[str, str]]:
    """Return the pairs of a byte-pair encoding in which each word, given as its letters, becomes one token."""
    merges: list[tuple[str, str]] = []
    for word in words:
        # Later merges have less right than earlier ones, so they never break a word that is whole already.
        found = _apply(merges, list(word))
        while len(found) > 1:
            merges.append((found[0], found[1]))
            found = ["".join(found[:2]), *found[2:]]
    return merges


def _apply(merges: list[tuple[str, str]], pieces: list[str]) -> list[str]:
    """Apply a byte-pair encoding: the earliest merge first, wherever it matches."""
    for merge in merges:
        place = 0
        while place < len(pieces) - 1:
            if (pieces[place], pieces[place + 1]) == merge:
                pieces[place : place + 2] = ["".join(merge)]
            place += 1
    return pieces


def make_vae() -> Any:
    """Return an AutoencoderKL from 64 x 64 x 3 to 16 x 16 x 4, of about a million parameters."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=SIZE, block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False,
    )  # fmt: skip


def make_text_encoder(vocabulary: int) -> CLIPTextModel:
    """Return a CLIP text model of two layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=96, intermediate_size=384, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip


def make_unet() -> Any:
    """Return a UNet2DConditionModel of three resolutions and about five million parameters.

    All resolutions but the first attend to the text.
    """
    return UNet2DConditionModel(
        sample_size=SIZE // 4, in_channels=4, out_channels=4, block_out_channels=(64, 96, 112),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1, cross_attention_dim=96, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip


def make_scheduler() -> DDIMScheduler:
    """Return a scheduler with Stable Diffusion's betas and v-prediction, whose last step is at t = 0."""
    scheduler: DDIMScheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading",
    )  # fmt: skip
    return scheduler


class Autoencoding(nn.Module):
    """An autoencoder with a draw from the posterior, as one module, so that several ranks can wrap it."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return reconstructions (b, 3, h, w) from latents mean + std * noise, and KL to N(0, 1) per sample."""
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * noise
        return self.vae.decode(latents).sample, posterior.kl()


class TextToLatent(nn.Module):
    """Text encoder and UNet as one v-prediction network, trained together: forward(z_t, t, tokens)."""

    def __init__(self, text_encoder: CLIPTextModel, unet: Any) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, z_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """Return v (b, 4, h, w) for latents at timesteps t (b,), conditioned on tokens (b, length)."""
        states = self.text_encoder(input_ids=tokens).last_hidden_state
        velocity: Tensor = self.unet(z_t, t, encoder_hidden_states=states.to(z_t.dtype)).sample
        return velocity


def without_spread(vae: Any) -> Any:
    """Return an ``AutoencoderKL`` whose samples of the posterior are its means, up to 3e-7; in place.

    The weak KL term of ``train_toyworld.py`` leaves deviations above 1, while all that is trained on its latents
    saw the means. Training scripts sample: without this they would train on noise.
    """
    last, means = vae.quant_conv, vae.config.latent_channels
    with torch.no_grad():
        last.weight[means:].zero_()
        last.bias[means:].fill_(-30.0)  # the least logarithm of a variance that diffusers has
    return vae


def save_pipeline(folder: Path, vae: Any, text_encoder: CLIPTextModel, unet: Any, card: str) -> Path:
    """Write a diffusers folder with ``card`` as its README; UNet and VAE in float16, the text encoder in float32.

    A folder with a float16 text encoder would not run when it is loaded without a dtype: the UNet would become
    float32, the text encoder would stay float16.
    """
    parts: dict[str, Any] = {
        "vae": without_spread(vae).half(),
        "unet": unet.half(),
        "text_encoder": text_encoder.float(),
    }
    pipeline: Any = StableDiffusionPipeline(
        tokenizer=make_tokenizer(), scheduler=make_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, **parts,
    )  # fmt: skip
    with whole_folder(folder) as temporary:
        pipeline.save_pretrained(temporary, safe_serialization=True)
        (temporary / "README.md").write_text(card)
    return folder


def tokens_of(texts: list[str], tokenizer: CLIPTokenizer) -> Tensor:
    """Return token numbers (n, ``LENGTH``), padded and truncated."""
    tokens: Tensor = tokenizer(
        texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    return tokens
