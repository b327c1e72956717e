"""Every family of flow transformers and their kin: our denoiser and sampler draw what its own pipeline draws."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tiny_transformers as tiny
import torch

from distill.adversarial import features_at
from scorefield import Conditioned, guided
from scorefield.models.families import table
from scorefield.models.families.flux import pack, unpack
from scorefield.models.lora import LAYERS, adaptable
from scorefield.models.networks import DiffusersNetwork, Tokens, image_activations
from scorefield.models.teacher import load_teacher
from scorefield.sampling import ddim, sample

PAGE = Path(__file__).resolve().parent.parent / "docs" / "families.md"
PROMPTS = ["a red mug", "two blue chairs on a hill"]
NEGATIVE = "dull"
SQUARE, WIDE = (32, 32), (32, 64)
STEPS = 3
TOLD = ("flux", "flux2")
"""Families whose network is told the scale of guidance."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The families' pipelines, saved when they are first asked for."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def folder(name):
        if name not in made:
            made[name] = tiny.FAMILIES[name]()
            made[name].set_progress_bar_config(disable=True)
            made[name].save_pretrained(root / name)
        return root / name, made[name]

    yield folder
    shutil.rmtree(root)


def load(folders, name, size=None, **options):
    folder, pipeline = folders(name)
    size = None if name == "dit" else size
    return load_teacher(folder, size=size, cache=folder.parent / "cache", **options), pipeline


def stock(name, pipeline, noise, size, scale):
    """Latents that the pipeline draws from ``noise``, as the network sees them."""
    given = {"height": size[0], "width": size[1], "num_inference_steps": STEPS, "output_type": "latent"}
    away = {"negative_prompt": [NEGATIVE] * len(PROMPTS)} if scale != 1 else {}
    if name == "flux":
        made = pipeline(PROMPTS, latents=pack(noise), guidance_scale=2.5, true_cfg_scale=scale, **given, **away)
        return unpack(made.images, *noise.shape[2:])
    if name == "qwen_image":
        made = pipeline(PROMPTS, latents=pack(noise), true_cfg_scale=scale, **given, **away)
        return unpack(made.images, *noise.shape[2:])
    if name == "z_image":  # pos + s (pos - neg)
        return pipeline(list(PROMPTS), latents=noise, guidance_scale=scale - 1, **given, **away).images
    if name == "wan":
        made = pipeline(PROMPTS, latents=noise[:, :, None], guidance_scale=scale, num_frames=1, **given, **away,
                        max_sequence_length=512)  # fmt: skip
        return made.frames[:, :, 0]
    if name == "flux2":
        made = pipeline(prompt=PROMPTS, latents=noise, guidance_scale=2.5, **given).images
        return made.transpose(1, 2).unflatten(2, noise.shape[2:])
    if name == "flux2_klein":
        away = {}
        made = pipeline(prompt=PROMPTS, latents=noise, guidance_scale=scale, **given, **away)
        return made.images
    own = {"use_resolution_binning": False} if name in ("sana", "pixart_sigma") else {}
    return pipeline(PROMPTS, latents=noise, guidance_scale=scale, **given, **away, **own).images


def ours(name, teacher, pipeline, noise, scale):
    """Latents that our sampler draws at the noise levels that the pipeline has just used."""
    scheduler = pipeline.scheduler
    times = scheduler.sigmas[:-1] if hasattr(scheduler, "sigmas") else scheduler.timesteps
    denoiser = teacher.denoiser
    if name in TOLD:
        denoiser = teacher.guided(2.5)
    negative = teacher.negative("" if name == "flux2_klein" else NEGATIVE)
    denoiser = guided(denoiser, scale, negative, norm=teacher.norm)
    cond = teacher.prompts(PROMPTS)
    return sample(denoiser, noise, cond, times=times.double(), step=ddim())


@pytest.mark.parametrize("scale", [1.0, 2.5], ids=["plain", "guided"])
@pytest.mark.parametrize("size", [SQUARE, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("name", [name for name in tiny.FAMILIES if name != "dit"])
def test_our_sampler_draws_what_the_pipeline_draws(folders, name, size, scale):
    if name == "flux2" and scale != 1:
        pytest.skip("its pipeline has no negative prompts")
    teacher, pipeline = load(folders, name, size)
    noise = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(1))
    wanted = stock(name, pipeline, noise, size, scale)
    found = ours(name, teacher, pipeline, noise, scale)
    if name == "flux2_klein":  # which hands out what its autoencoder takes
        codec = teacher.codec
        found = torch.nn.functional.pixel_shuffle(found / codec.scaling + codec.shift, codec.patch)
    assert wanted.std() > 0.1
    assert (found - wanted).abs().max() <= 1e-4 * max(1, float(wanted.abs().max()))


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_classes_are_drawn_as_dit_draws_them(folders, scale):
    teacher, pipeline = load(folders, "dit")
    made = pipeline([3, 7], guidance_scale=scale, num_inference_steps=STEPS, output_type="np",
                    generator=torch.Generator().manual_seed(1)).images  # fmt: skip
    noise = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(1))
    times = pipeline.scheduler.timesteps.double()
    x0 = sample(teacher.guided(scale), noise, teacher.cond(torch.tensor([3, 7])), times=times, step=ddim())
    found = (teacher.decode(x0) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert (found - torch.from_numpy(made)).abs().max() <= 1e-4
    assert teacher.null_class


@pytest.mark.parametrize(("name", "usual"), [("flux", 3.5), ("flux2", 4.0)])
def test_guidance_of_flux_is_told_to_the_network(folders, name, usual):
    teacher, _ = load(folders, name, SQUARE)
    noise, t = torch.randn(1, *teacher.shape), torch.tensor([0.7])
    cond = teacher.prompts(PROMPTS[:1])
    assert cond["guidance"].tolist() == [usual]
    told = Conditioned(teacher.denoiser, {"guidance": torch.tensor([5.0])})
    assert torch.equal(teacher.guided(5.0)(noise, t, cond), told(noise, t, cond))
    assert torch.equal(teacher.guided(1.0)(noise, t, cond), teacher.denoiser(noise, t, cond))
    assert not torch.equal(teacher.guided(5.0)(noise, t, cond), teacher.denoiser(noise, t, cond))


SIZES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
"""Of finite differences: which of them rounding and kinks leave alone depends on the processor, too."""


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if name in ("qwen_image", "flux2", "flux2_klein") else ())
    for name in tiny.FAMILIES
])  # fmt: skip
def test_gradients_are_those_of_finite_differences(folders, name):
    """To x_t through the network, and to pixels through the autoencoder, in float64."""
    teacher, _ = load(folders, name, SQUARE, dtype=torch.float64)
    teacher.denoiser.network.double()  # the parts that diffusers keeps in float32, too
    generator = torch.Generator().manual_seed(2)
    x_t = torch.randn(1, *teacher.shape, generator=generator, dtype=torch.float64)
    cond = teacher.cond(torch.tensor([5])) if name == "dit" else teacher.prompts(PROMPTS[:1])
    t = torch.tensor([500.0 if name in ("dit", "pixart_sigma") else 0.5], dtype=torch.float64)
    pixels = torch.rand(1, 3, *teacher.size, generator=generator, dtype=torch.float64) * 2 - 1
    for function, at in ((lambda x: teacher.denoiser(x, t, cond), x_t), (teacher.encode, pixels),
                         (teacher.decode, x_t)):  # fmt: skip
        at = at.clone().requires_grad_()
        weight = torch.randn(function(at).shape, generator=generator, dtype=torch.float64)
        (gradient,) = torch.autograd.grad((function(at) * weight).sum(), at)
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0
        for _ in range(3):
            step = torch.randn(at.shape, generator=generator, dtype=torch.float64)
            found = float((gradient * step).sum())
            # Norms inside compute in float32, whose rounding small steps show; large ones cross kinks of ReLUs.
            changes = [slope(function, at, step, weight, size) for size in SIZES]
            assert min(abs(found - change) for change in changes) < 2e-2 * abs(found) + 5e-2, (found, changes)


@torch.no_grad()
def slope(function, at, step, weight, size):
    change = (function(at + size * step) - function(at - size * step)) * weight
    return float(change.sum()) / (2 * size)


@pytest.mark.parametrize("name", [name for name in tiny.FAMILIES if "flux2" not in name])
def test_pixels_come_back_as_the_autoencoder_alone_has_them(folders, name):
    """Encoded and decoded through the affine map and out of it again."""
    teacher, pipeline = load(folders, name, SQUARE)
    pixels = torch.rand(2, 3, *teacher.size) * 2 - 1
    video = name in ("wan", "qwen_image")
    with torch.no_grad():
        inner = pixels[:, :, None] if video else pixels
        encoded = pipeline.vae.encode(inner)
        z = encoded.latent if name == "sana" else encoded.latent_dist.mode()
        wanted = pipeline.vae.decode(z).sample
        found = teacher.decode(teacher.encode(pixels))
    assert torch.allclose(found, wanted[:, :, 0] if video else wanted, atol=1e-5)


def test_shift_follows_the_size_of_the_image(folders):
    """exp(mu) of a dynamic scheduler: mu from 0.5 at 256 tokens to 1.15 at 4,096."""
    for size, tokens in (((32, 32), 64), ((64, 32), 128)):
        teacher, _ = load(folders, "flux", size)
        mu = 0.5 + 0.65 * (tokens - 256) / 3840
        assert teacher.shift == pytest.approx(float(torch.tensor(mu).exp()))
    assert load(folders, "sana", SQUARE)[0].shift == 3.0


def test_an_unknown_pipeline_names_the_nearest(folders, tmp_path):
    folder, _ = folders("flux")
    shutil.copytree(folder, tmp_path / "other")
    index = tmp_path / "other" / "model_index.json"
    index.write_text(index.read_text().replace('"FluxPipeline"', '"FluxImg2ImgPipeline"'))
    with pytest.raises(
        ValueError, match=r"unsupported pipeline class 'FluxImg2ImgPipeline'.*Nearest is FluxPipeline"
    ):
        load_teacher(tmp_path / "other")


FLOW = {"scheduler": "FlowMatchEulerDiscreteScheduler"}
OTHERS = {
    "HunyuanDiTPipeline": {
        "transformer": "HunyuanDiT2DModel", "text_encoder": "BertModel", "text_encoder_2": "T5EncoderModel",
        "scheduler": "DDPMScheduler",
    },
    "KolorsPipeline": {
        "unet": "UNet2DConditionModel", "text_encoder": "ChatGLMModel", "scheduler": "EulerDiscreteScheduler",
    },
    "AuraFlowPipeline": {"transformer": "AuraFlowTransformer2DModel", "text_encoder": "UMT5EncoderModel", **FLOW},
    "CogView4Pipeline": {"transformer": "CogView4Transformer2DModel", "text_encoder": "GlmModel", **FLOW},
    "LTXPipeline": {"transformer": "LTXVideoTransformer3DModel", "text_encoder": "T5EncoderModel", **FLOW},
}  # fmt: skip
NEAREST = {
    "HunyuanDiTPipeline": "PixArtSigmaPipeline", "KolorsPipeline": "StableDiffusionPipeline",
    "AuraFlowPipeline": "WanPipeline", "CogView4Pipeline": "ZImagePipeline", "LTXPipeline": "FluxPipeline",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_pipelines_of_other_families_are_refused_in_words(tmp_path, name):
    """With the family that shares most parts, and the page that says how to add one."""
    parts = {part: ["diffusers", kind] for part, kind in OTHERS[name].items()}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name, **parts}))
    with pytest.raises(ValueError, match=f"unsupported pipeline class '{name}'; expected one of") as refused:
        load_teacher(tmp_path)
    assert f"Nearest is {NEAREST[name]}. docs/families.md says how to add a family." in str(refused.value)
    assert "## To add a family" in PAGE.read_text()


def test_labels_of_prompts_are_their_conditions(folders):
    teacher, _ = load(folders, "z_image", SQUARE)
    asked = teacher.asked(PROMPTS)
    assert dataclasses.asdict(asked.listed)["prompts"] == tuple(PROMPTS)
    found, wanted = asked.cond(torch.tensor([1])), teacher.prompts(PROMPTS[1:])
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_critic_is_given_the_image_and_not_the_text(folders, name):
    """Its map of activations has the image's proportions, and moves with the image where that is changed."""
    teacher, _ = load(folders, name, WIDE)
    layer = teacher.denoiser.network.bottleneck
    cond = teacher.cond(torch.tensor([5])) if name == "dit" else teacher.prompts(PROMPTS[:1])
    t = torch.tensor([500.0 if name in ("dit", "pixart_sigma") else 0.5])
    x_t = torch.randn(1, *teacher.shape, generator=torch.Generator().manual_seed(4))
    changed = x_t.clone()
    changed[..., -1, -1] += 3
    seen = [features_at(teacher.denoiser, layer, image, t, cond) for image in (x_t, changed)]
    assert seen[0].ndim == 4
    assert seen[0].shape[2] * x_t.shape[3] == seen[0].shape[3] * x_t.shape[2]
    moved = (seen[0] - seen[1]).abs().sum(1)[0]
    assert moved.argmax() == moved.numel() - 1, "the last position has changed most"


def test_tokens_are_told_from_texts():
    """Two streams of one length, joined ones in either order, and an output that is no image's."""
    x_t = torch.zeros(1, 4, 4, 8)
    text, image = torch.zeros(1, 8, 3), torch.arange(24.0).reshape(1, 8, 3)
    joined = torch.cat([torch.full((1, 5, 3), -1.0), image], 1)
    wanted = image.transpose(1, 2).reshape(1, 3, 2, 4)
    assert torch.equal(Tokens("blocks").image((text, image), x_t, {}), wanted)
    assert torch.equal(Tokens("blocks").image((None, image), x_t, {}), wanted)
    network = DiffusersNetwork(torch.nn.Identity(), tokens=Tokens("blocks"))
    assert torch.equal(image_activations(network, (None, image), x_t, {}), wanted), "the last block of SD3"
    assert torch.equal(Tokens("blocks").image(joined, x_t, {}), wanted)
    assert torch.equal(Tokens("blocks", first=True).image(joined.roll(8, 1), x_t, {}), wanted)
    with pytest.raises(ValueError, match=r"a block returns \[\(1, 5, 3\)\]; expected 2 x 4 tokens"):
        Tokens("blocks").image(joined[:, :5], x_t, {})


def test_tokens_of_an_image_begin_behind_the_text_of_each_row():
    """Lumina 2: a row of 5 words, and one of 2 with padding behind its image."""
    x_t, image = torch.zeros(2, 4, 4, 8), torch.arange(48.0).reshape(2, 8, 3)
    text, padding = torch.full((5, 3), -1.0), torch.full((3, 3), -2.0)
    joined = torch.stack([torch.cat([text, image[0]]), torch.cat([text[:2], image[1], padding])])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])
    found = Tokens("blocks", mask="mask").image(joined, x_t, {"mask": mask})
    wanted = image.transpose(1, 2).reshape(2, 3, 2, 4)
    assert torch.equal(found, wanted)
    alone = Tokens("blocks", mask="mask").image(image, x_t, {"mask": mask})
    assert torch.equal(alone, wanted), "blocks before the text joins"


def test_a_critic_of_lumina_hears_an_image_as_it_does_alone(folders):
    """Beside a longer prompt the image's tokens lie elsewhere, and say the same."""
    teacher, _ = load(folders, "lumina2", WIDE)
    layer, cond = teacher.denoiser.network.bottleneck, teacher.prompts(PROMPTS)
    assert cond["encoder_attention_mask"].sum(1).unique().numel() == 2
    x_t = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(4))
    t = torch.tensor([0.5, 0.5])
    both = features_at(teacher.denoiser, layer, x_t, t, cond)
    for row in (0, 1):
        own = {name: value[row : row + 1] for name, value in cond.items()}
        alone = features_at(teacher.denoiser, layer, x_t[row : row + 1], t[:1], own)
        assert torch.allclose(both[row : row + 1], alone, atol=1e-5)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_loras_change_the_layers_of_the_blocks(folders, name):
    teacher, _ = load(folders, name, SQUARE)
    network = teacher.denoiser.network
    found = adaptable(network, network.layers or LAYERS)
    linear = [
        full for full, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and any(part in full for part in ("blocks.", "layers."))
    ]  # fmt: skip
    left = [full for full in linear if full not in found and "norm" not in full and "adaLN" not in full]
    # Modulation by time, and what refines the text, stays as it is.
    known = ("mod", "refiner", "time", "scale_shift", "caption", "pos_embed")
    assert not [full for full in left if not any(part in full for part in known)]


def test_the_table_of_families_is_that_of_the_code():
    assert table() in PAGE.read_text()
