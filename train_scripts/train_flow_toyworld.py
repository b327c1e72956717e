"""Train a small flow transformer on the toy world's latents: a ``ZImagePipeline``, for what flow teachers promise.

    python train_scripts/train_flow_toyworld.py --out runs/flow-toyworld

Autoencoder and renders are those of the pipeline that ships (``train_toyworld.py``). The text encoder is a Qwen3
of one layer with random weights that nothing trains: before its last layer, where Z-Image listens, each word is a
vector of its own, and the transformer's context refiner learns to read them. The same command goes on where it
stopped; the averaged weights become a diffusers folder in --out/pipeline.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from train_toyworld import Renders, averaged, latents_of
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from scorefield import NetworkDenoiser, RectifiedFlow
from scorefield.atomic import whole_folder
from scorefield.cache import TensorCache, fingerprint
from scorefield.commands.command import run
from scorefield.gradient import TIME_NOT_FINITE, denoising_errors, prediction_weight, time_not_finite
from scorefield.guidance import guided
from scorefield.models.families import z_image
from scorefield.models.networks import DiffusersNetwork
from scorefield.progress import progress
from scorefield.randomness import Rng, shuffled
from scorefield.sampling import grid, sample
from scorefield.times import logit_normal
from scorefield.training.identity import binding, check_earlier, identity, note_identity
from scorefield.training.loop import EMA, Phase
from scorefield.training.options import check_numbers, check_run
from scorefield.training.run import adamw, cosine, fit, prepare, resume, show_plan, start
from toyworld import pipeline_folder
from toyworld.camera import VIEWS
from toyworld.captions import Attributes, caption, describe
from toyworld.data import draw_scenes
from toyworld.parts import make_merges, without_spread
from toyworld.renders import World, draw_captions, rendered
from toyworld.scene import BACKGROUNDS, COLOURS, SHAPES

TEXT_WIDTH = 64
"""Numbers a word: more than there are words, so that a linear layer can tell all of them apart."""

LENGTH = 32
"""Tokens of a caption that are kept for the training, more than any has."""

HEAD = 64
"""Numbers a head of the transformer; on a CPU few wide ones are faster than many narrow ones."""

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
TEMPLATE = "{% for message in messages %}" + START + "{{ message['content'] }}" + END + "{% endfor %}"


@dataclass(frozen=True, kw_only=True)
class Config(Renders):
    """Train a flow transformer of the toy world."""

    out: Path = Path("runs/flow-toyworld")
    """Folder for renders, latents, checkpoints, logs and the finished pipeline."""
    steps: int = 3200
    """Iterations."""
    batch_size: int = 32
    """Captioned latents per micro-batch."""
    width: int = 192
    """Width of the transformer: a multiple of 64, at most 512."""
    layers: int = 6
    """Blocks of the transformer, beside one that refines the image and one that refines the text; up to
    24."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; a larger one is scaled down."""


def main(config: Config) -> Path:
    """Render, encode, train, and return the pipeline's folder."""
    check_run(config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("the toy world is trained by one process; start it without a launcher.")
    check_numbers(
        config, positive=("num_images", "width", "layers", "learning_rate"),
        shares=("caption_dropout", "part_dropout", "ema_decay"),
    )  # fmt: skip
    if config.width % HEAD or config.width > 512:
        raise ValueError(f"--width must be a multiple of {HEAD}, a head's width, up to 512; got {config.width}.")
    if config.layers > 24:
        raise ValueError(f"--layers must be at most 24; got {config.layers}.")
    torch.manual_seed(config.seed)
    tokenizer = make_tokenizer()
    text_encoder, transformer = make_text_encoder(len(tokenizer)), make_transformer(config.width, config.layers)
    if config.dry_run:
        before = f"{config.num_images:,} renders and their latents"
        show_plan(config, {"transformer": transformer}, {"transformer": config.steps}, before)
        return config.out
    own = binding(config)
    check_earlier(config.out, config.results, own)
    vae: Any = AutoencoderKL.from_pretrained(pipeline_folder() / "vae").eval().requires_grad_(False)
    numbers, captions = number_captions(config.num_images, config.seed)
    texts = {"text_encoder": text_encoder, "tokenizer": tokenizer}
    encode = z_image.encoder(texts, transformer, torch.device("cpu"))
    conds = {name: value[:, :LENGTH].clone() for name, value in encode(captions).items()}
    latents = make_latents(config, vae)
    world = World(latents, numbers[:, :, None], torch.tensor([len(captions) - 1]))
    trained = train(config, world, conds, transformer, vae)
    note_identity(config.out, own)
    return save_pipeline(config.out / "pipeline", vae, text_encoder, tokenizer, trained, card(config))


def make_tokenizer() -> Qwen2Tokenizer:
    """Return Qwen's byte-pair encoding; each word of the captions is one token, and others are spelled."""
    pieces = [PAD, START, END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    split = Qwen2Tokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[])
    words: dict[str, None] = {}
    for text in all_captions():
        words |= dict.fromkeys(word for word, _ in split.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text))
    merges: Any = make_merges(map(list, words))
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, *map("".join, merges)]))}
    no_token: Any = None
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, pad_token=PAD, unk_token=no_token)
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def all_captions() -> list[str]:
    """Return every caption of the toy world, the empty one last."""
    kinds = product(SHAPES, COLOURS, (None, *BACKGROUNDS), (None, *VIEWS))
    return [*dict.fromkeys(caption(Attributes(*kind)) for kind in kinds), ""]


def make_text_encoder(vocabulary: int) -> Qwen3Model:
    """Return a Qwen3 of one layer: its states before the last layer are the embeddings of the tokens."""
    return Qwen3Model(
        Qwen3Config(
            vocab_size=vocabulary, hidden_size=TEXT_WIDTH, intermediate_size=TEXT_WIDTH, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=512, pad_token_id=0,
            initializer_range=1.0,
        )
    ).eval().requires_grad_(False)  # fmt: skip


def make_transformer(width: int, layers: int) -> Any:
    """Return Z-Image's transformer on latents of 16 x 16 x 4; an untrained one predicts zeros."""
    heads = width // HEAD
    transformer: Any = ZImageTransformer2DModel(
        in_channels=4, dim=width, n_layers=layers, n_refiner_layers=1, n_heads=heads, n_kv_heads=heads,
        cap_feat_dim=TEXT_WIDTH, axes_dims=[16, 24, 24], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    with torch.no_grad():
        for token in (transformer.x_pad_token, transformer.cap_pad_token):  # which diffusers leaves as memory was
            token.normal_(0, 0.02)
        last = transformer.all_final_layer["2-1"]
        modulations = [block.adaLN_modulation[0] for block in (*transformer.noise_refiner, *transformer.layers)]
        for layer in (*modulations, last.linear, last.adaLN_modulation[1]):  # DiT's beginning, arXiv 2212.09748
            layer.weight.zero_()
            layer.bias.zero_()
    return transformer


def number_captions(num_images: int, seed: int) -> tuple[Tensor, list[str]]:
    """Return (n, 4) numbers of captions, as ``World.tokens`` has them, and these captions, the empty one last."""
    lacks: list[dict[str, Any]] = [{}, {"view": None}, {"background": None}, {"view": None, "background": None}]
    described = [describe(scene) for scene in draw_scenes(range(num_images), seed)]
    rows = [[caption(replace(one, **lack)) for lack in lacks] for one in described]
    used = {text for row in rows for text in row}
    captions = [text for text in all_captions() if text in used or not text]
    number_of = {text: number for number, text in enumerate(captions)}
    return torch.tensor([[number_of[text] for text in row] for row in rows]), captions


def make_latents(config: Config, vae: Any) -> Tensor:
    """Return the latents of all renders (n, 4, 16, 16) at unit variance; both are kept in files."""
    cache = TensorCache(config.out / "latents", fingerprint(vae.parameters()))
    parts = []
    for first in progress(range(0, config.num_images, 1000), "latents, in thousands"):
        images = rendered(config.out, first, min(first + 1000, config.num_images), config.seed)

        def make(_: Any, images: Tensor = images) -> list[dict[str, Tensor]]:
            return [{"latents": latents_of(vae, images) * vae.config.scaling_factor}]

        parts.append(cache.fetch([images], make)[0]["latents"])
    return torch.cat(parts)


def train(config: Config, world: World, conds: Mapping[str, Tensor], transformer: Any, vae: Any) -> Any:
    """Return the averaged transformer; ``world.images`` are latents, its tokens rows of the encoded ``conds``."""
    accelerator = start(config)
    wrapped = prepare(DiffusersNetwork(transformer, z_image.call), config, accelerator)
    schedule, latents = RectifiedFlow(), world.images
    denoiser = NetworkDenoiser(wrapped, schedule, "flow", 1000.0)

    def loss(batch: dict[str, Tensor], rng: Rng) -> dict[str, Tensor]:
        return flow_loss(denoiser, batch, rng)

    def batches(rng: Rng) -> dict[str, Tensor]:
        chosen = shuffled(len(latents), config.batch_size, rng)
        rows = draw_captions(world, chosen, config.part_dropout, config.caption_dropout, rng)[:, 0]
        batch = {"latents": latents[chosen], **{name: value[rows] for name, value in conds.items()}}
        return {name: value.to(accelerator.device) for name, value in batch.items()}

    optimizer = adamw(wrapped, config.learning_rate, betas=(0.9, 0.99), kind=config.optimizer)
    phase = Phase(
        name="transformer", network=wrapped, optimizer=optimizer, loss=loss, ema=EMA(wrapped, config.ema_decay),
        lr_schedule=cosine(optimizer, config.steps),
    )  # fmt: skip
    average: Any = averaged(phase)

    @torch.no_grad()
    def preview() -> Tensor:
        return pictures_of(average, world, conds, vae, accelerator)

    own = identity(config, accelerator, {"data": fingerprint([latents, world.tokens, *conds.values()])})
    first = resume(config, [phase], accelerator, own)
    fit(config, [phase], batches, accelerator, own=own, first=first, columns=16, preview=preview)
    return average.model


def flow_loss(denoiser: NetworkDenoiser, batch: Mapping[str, Tensor], rng: Rng) -> dict[str, Tensor]:
    """Mean squared error of the flow at logit-normal times (SD3, arXiv 2403.03206, section 3.1)."""
    cond = {name: value for name, value in batch.items() if name != "latents"}
    errors, t = denoising_errors(
        denoiser, batch["latents"], cond, times=logit_normal(), weight=prediction_weight("flow"),
        generator=rng("noise"),
    )  # fmt: skip
    return {"loss": errors.mean(), TIME_NOT_FINITE: time_not_finite(errors, t)}


def pictures_of(
    network: nn.Module, world: World, conds: Mapping[str, Tensor], vae: Any, accelerator: Accelerator
) -> Tensor:
    """Return the first 16 renders after the autoencoder, and answers to their captions: guidance 3, 25 steps."""
    device, schedule = accelerator.device, RectifiedFlow()
    cond, empty = (
        {name: value[rows].to(device) for name, value in conds.items()}
        for rows in (world.tokens[:16, 0, 0], world.empty)
    )
    model = guided(NetworkDenoiser(network, schedule, "flow", 1000.0), 3.0, empty)
    latents = world.images[:16].to(device)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(device)
    made = sample(model, noise, cond, times=grid(schedule, 25))
    decoded: Tensor = vae.to(device).decode(torch.cat([latents, made]) / vae.config.scaling_factor).sample
    return decoded


def save_pipeline(
    folder: Path, vae: Any, text_encoder: Qwen3Model, tokenizer: Qwen2Tokenizer, transformer: Any, card: str
) -> Path:
    """Write a diffusers folder with ``card`` as its README; weights that were trained in float16.

    The text encoder stays float32: transformers gives a model the precision of its file, diffusers float32.
    """
    vae.register_to_config(shift_factor=0.0)  # which Z-Image's pipeline adds
    pipeline: Any = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=without_spread(vae).half(), text_encoder=text_encoder,
        tokenizer=tokenizer, transformer=transformer.half(),
    )  # fmt: skip
    with whole_folder(folder) as temporary:
        pipeline.save_pretrained(temporary, safe_serialization=True)
        (temporary / "README.md").write_text(card)
    return folder


def card(config: Config) -> str:
    """The model card: how this folder was made."""
    return f"""---
license: apache-2.0
library_name: diffusers
tags: [text-to-image]
---
# A flow transformer of the toy world

Draws rendered solids from captions such as "a red mug on a white background, side view", 64 x 64 pixels.
Trained by `train_scripts/train_flow_toyworld.py`, seed {config.seed}, on {config.num_images:,} renders, in the
latents of the autoencoder that ships with scorefield: {config.steps:,} iterations of batch {config.batch_size},
width {config.width}, {config.layers} layers, {config.precision}. Pass height and width 64; the guidance_scale of
this pipeline is the usual one less 1.
"""


if __name__ == "__main__":
    run(main, Config, __doc__)
