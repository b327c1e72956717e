"""Every family of diffusers as a teacher: its network's own numbers, its pipeline's own images."""

import copy
import gc
import inspect
import json
import shutil
import weakref
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, SD3Transformer2DModel
from folders import edit
from refusals import refused
from transformers import CLIPTextModel

from scorefield import RectifiedFlow, ScoreDistillation, VariancePreserving, guided
from scorefield.gradient import ratio_weight
from scorefield.models import pipeline as pipelines
from scorefield.models.prompts import CUT, PromptEncoder
from scorefield.models.teacher import load_teacher
from scorefield.sampling import ddpm, grid, sample
from scorefield.times import uniform

PROMPTS, NEGATIVE = ["a red mug", "blue chair"], "blurry"
MAKERS = {
    "sd1": tiny.sd, "sd2": partial(tiny.sd, "v_prediction"), "sdxl": tiny.sdxl, "sd3": tiny.sd3,
    "sd2 zero snr": partial(tiny.sd, "v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    "sd3 without t5": partial(tiny.sd3, with_t5=False), "pixels": tiny.pixels,
    "pixels v": partial(tiny.pixels, "v_prediction"), "pixels x0": partial(tiny.pixels, "sample"),
    "classes": partial(tiny.pixels, num_class_embeds=4),
}  # fmt: skip
KINDS = {
    "sd2": "v",
    "sd2 zero snr": "v",
    "sd3": "flow",
    "sd3 without t5": "flow",
    "pixels v": "v",
    "pixels x0": "x0",
}
WITH_TEXT = [name for name in MAKERS if name.startswith("sd")]
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Saved:
    name: str
    pipeline: Any
    folder: Path
    cache: Path

    def load(self, **options):
        return load_teacher(self.folder, cache=self.cache, **options)


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """Each family built and saved once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("pipelines")
            pipeline = MAKERS[name]()
            pipeline.set_progress_bar_config(disable=True)
            pipeline.save_pretrained(folder / "model")
            made[name] = Saved(name, pipeline, folder / "model", folder / "cache")
        return made[name]

    return get


@pytest.fixture(params=list(MAKERS))
def saved(request, save):
    return save(request.param)


@pytest.fixture(params=WITH_TEXT)
def saved_text(request, save):
    return save(request.param)


def conditions(teacher):
    """Positive ones, batch 2, and a negative one, batch 1."""
    if teacher.texts is not None:
        return teacher.prompts(PROMPTS), teacher.negative(NEGATIVE)
    if teacher.num_classes:
        return teacher.cond(torch.tensor([0, 2])), teacher.cond(torch.tensor([3]))
    return {}, {}


def own_call(saved, x_t, t):
    """The family's own network, called as its pipeline calls it, under PROMPTS or classes 0 and 2."""
    pipeline, name = saved.pipeline, saved.name
    if name.startswith("sd3"):
        embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
        arguments = {"encoder_hidden_states": embeds, "pooled_projections": pooled}
        return pipeline.transformer(hidden_states=x_t, timestep=1000 * t, **arguments).sample
    if name == "sdxl":
        embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
        ids = pipeline._get_add_time_ids((16, 16), (0, 0), (16, 16), torch.float32, 20).repeat(2, 1)
        added = {"text_embeds": pooled, "time_ids": ids}
        return pipeline.unet(x_t, t, encoder_hidden_states=embeds, added_cond_kwargs=added).sample
    if name in WITH_TEXT:
        embeds, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
        return pipeline.unet(x_t, t, encoder_hidden_states=embeds).sample
    labels = torch.tensor([0, 2]) if name == "classes" else None
    return pipeline.unet(x_t, t, class_labels=labels).sample


def coefficients(saved, t):
    """alpha and sigma from diffusers' own tables."""
    if saved.name.startswith("sd3"):
        return (1 - t)[:, None, None, None], t[:, None, None, None]
    product = saved.pipeline.scheduler.alphas_cumprod[t.long()][:, None, None, None]
    return product.sqrt(), (1 - product).sqrt()


@torch.no_grad()
def test_predictions_schedule_and_facts_are_those_of_the_familys_own_call(saved, generator):
    teacher, flow = saved.load(), saved.name.startswith("sd3")
    assert teacher.shift == (3.0 if flow else 1.0)
    assert teacher.denoiser.time_scale == (1000.0 if flow else 1.0)
    assert (teacher.sized, teacher.zero_negative) == (saved.name == "sdxl",) * 2
    assert teacher.num_classes == (4 if saved.name == "classes" else 0)
    assert teacher.device == torch.device("cpu")
    schedule = teacher.denoiser.schedule
    if flow:
        assert schedule == RectifiedFlow()
    else:
        assert torch.equal(schedule.alphas_cumprod, saved.pipeline.scheduler.alphas_cumprod.double())
        assert (schedule.alpha(torch.tensor(999.0)) == 0) == ("zero" in saved.name)
    x_t = torch.randn(2, *teacher.shape, generator=generator)
    t = torch.tensor([0.25, 0.75]) if KINDS.get(saved.name) == "flow" else torch.tensor([250.0, 750.0])
    cond, _ = conditions(teacher)
    expected = own_call(saved, x_t, t)
    denoiser = teacher.denoiser
    assert denoiser.kind == KINDS.get(saved.name, "eps")
    found = denoiser.network(x_t, denoiser.time_scale * t, **cond)
    close(found if isinstance(found, torch.Tensor) else found.sample, expected)
    alpha, sigma = coefficients(saved, t)
    x0 = {
        "eps": (x_t - sigma * expected) / alpha, "v": alpha * x_t - sigma * expected,
        "flow": x_t - sigma * expected, "x0": expected,
    }[denoiser.kind]  # fmt: skip
    found = denoiser(x_t, t, cond)
    close(found, x0)
    close(denoiser.schedule.from_x0(found, x_t, t, denoiser.kind), expected)


@torch.no_grad()
def test_an_image_sampled_by_our_loop_is_the_pipelines(saved_text, generator):
    """Without guidance, from a negative prompt, and from none: SDXL's is zeros then, the others' is encoded."""
    teacher, pipeline = saved_text.load(), saved_text.pipeline
    noise, negative = torch.randn(2, *teacher.shape, generator=generator), teacher.negative(NEGATIVE)
    none, empty = teacher.negative(), teacher.prompts([""])
    assert {len(value) for value in none.values()} == {1}
    assert all(torch.equal(none[name], empty[name]) for name in empty) == (saved_text.name != "sdxl")
    for scale, words, away in ((1.0, NEGATIVE, negative), (5.0, NEGATIVE, negative), (4.0, None, none)):
        call = partial(
            pipeline, PROMPTS, negative_prompt=words and [words] * 2, latents=noise, num_inference_steps=8,
            guidance_scale=scale, height=16, width=16,
        )  # fmt: skip
        latents, image = call(output_type="latent").images, call(output_type="pt").images
        scheduler = pipeline.scheduler
        times = scheduler.sigmas[:-1] if saved_text.name.startswith("sd3") else scheduler.timesteps
        denoiser = guided(teacher.denoiser, scale, away)
        x0 = sample(denoiser, noise, teacher.prompts(PROMPTS), times=times.double())
        assert latents.std() > 0.05
        close(x0, latents, rtol=0, atol=1e-4 * latents.abs().max().item())
        close((teacher.decode(x0) / 2 + 0.5).clamp(0, 1), image, rtol=0, atol=1e-4)


@torch.no_grad()
def test_another_prompt_and_the_scale_change_the_image(saved_text, generator):
    """So that the equality above is no accident of a network that ignores its condition."""
    teacher = saved_text.load()
    cond, negative = conditions(teacher)
    noise = torch.randn(2, *teacher.shape, generator=generator)
    times = grid(teacher.denoiser.schedule, 4, high=0.9)
    swapped = {name: value.flip(0) for name, value in cond.items()}
    images = [
        sample(guided(teacher.denoiser, scale, negative), noise, asked, times=times)
        for scale, asked in ((1.0, cond), (1.0, swapped), (5.0, cond))
    ]
    assert (images[0] - images[1]).abs().max() > 1e-3
    assert (images[0] - images[2]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["pixels", "pixels v", "pixels x0"])
@torch.no_grad()
def test_pixels_sampled_by_our_loop_are_the_pipelines(save, name):
    saved = save(name)
    teacher, asked = saved.load(), {"batch_size": 2, "num_inference_steps": 8, "output_type": "pt"}
    ddim = DDIMPipeline(saved.pipeline.unet, DDIMScheduler.from_config(saved.pipeline.scheduler.config))
    for pipeline, step in ((ddim, None), (saved.pipeline, ddpm())):
        pipeline.set_progress_bar_config(disable=True)
        image = pipeline(generator=torch.Generator().manual_seed(3), **asked).images
        ours = torch.Generator().manual_seed(3)
        noise = torch.randn(2, *teacher.shape, generator=ours)
        times = pipeline.scheduler.timesteps.double()
        x0 = sample(teacher.denoiser, noise, {}, times=times, step=step, generator=ours)
        close((x0 / 2 + 0.5).clamp(0, 1), torch.as_tensor(image), rtol=0, atol=1e-4)


@torch.no_grad()
def test_classes_sampled_by_our_loop_are_the_schedulers(save, generator):
    """No pipeline of diffusers draws classes with a UNet2DModel; this is the loop that one would write."""
    saved = save("classes")
    teacher, scheduler = saved.load(), DDIMScheduler.from_config(saved.pipeline.scheduler.config)
    labels, null = torch.tensor([0, 2]), torch.tensor([3, 3])
    x = noise = torch.randn(2, *teacher.shape, generator=generator)
    scheduler.set_timesteps(8)
    for t in scheduler.timesteps:
        negative, positive = (saved.pipeline.unet(x, t, class_labels=given).sample for given in (null, labels))
        x = scheduler.step(negative + 2 * (positive - negative), t, x).prev_sample
    denoiser = guided(teacher.denoiser, 2.0, teacher.cond(null[:1]))
    close(sample(denoiser, noise, teacher.cond(labels), times=scheduler.timesteps.double()), x, atol=1e-4)


@torch.no_grad()
def test_guidance_and_zero_gradient_identities(saved, generator):
    teacher = saved.load()
    denoiser, (cond, negative) = teacher.denoiser, conditions(teacher)
    x_t = torch.randn(2, *teacher.shape, generator=generator)
    t = denoiser.schedule.at(torch.tensor([0.3, 0.6])).float()
    calls = []
    hook = denoiser.network.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    plain = guided(denoiser, 1.0, negative)(x_t, t, cond)
    assert calls == [2]
    none = guided(denoiser, 0.0, negative)(x_t, t, cond)
    assert calls == [2, 4]
    hook.remove()
    close(plain, denoiser(x_t, t, cond), rtol=0, atol=0)
    twice = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in negative.items()}
    close(none, denoiser(x_t, t, twice))
    method = ScoreDistillation(teacher=denoiser, baseline=denoiser, times=uniform(), weight=ratio_weight(1))
    gradient = method.gradient(x_t, cond, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gradient.value, torch.zeros_like(x_t))


def test_gradients_reach_the_image_and_no_weight(saved, generator):
    teacher = saved.load()
    images = torch.randn(2, 3, *teacher.size, generator=generator, requires_grad=True)
    cond, negative = conditions(teacher)
    denoiser, t = teacher.denoiser, teacher.denoiser.schedule.at(torch.tensor([0.3, 0.6])).float()
    decoded = teacher.decode(guided(denoiser, 3.0, negative)(teacher.encode(images), t, cond))
    decoded.square().sum().backward()
    assert decoded.shape == images.shape
    assert images.grad.isfinite().all()
    assert (images.grad.flatten(1).norm(dim=1) > 0).all()
    for network in [denoiser.network, *([teacher.codec.vae] if teacher.codec else [])]:
        assert not network.training
        assert all(not p.requires_grad and p.grad is None for p in network.parameters())


@torch.no_grad()
def test_latents_are_scaled_and_shifted_as_the_pipeline_does(saved_text, generator):
    teacher, vae = saved_text.load(), saved_text.pipeline.vae
    scaling, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    assert (shift != 0) == saved_text.name.startswith("sd3")
    images = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    posterior = vae.encode(images).latent_dist
    latents = teacher.encode(images)
    close(latents, (posterior.mean - shift) * scaling)
    close(teacher.decode(latents), vae.decode(posterior.mean).sample)
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(5))
    drawn = teacher.encode(images, generator=torch.Generator().manual_seed(5))
    close(drawn, (posterior.mean + posterior.std * noise - shift) * scaling)


@torch.no_grad()
def test_a_posterior_is_all_that_is_needed_of_the_autoencoder(save, tmp_path, generator):
    codec = save("sd1").load().codec
    images = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    mean, std = codec.posterior(images)
    expected = codec.vae.encode(images).latent_dist
    close(mean, expected.mean * 0.18215)
    close(std, expected.std * 0.18215)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    assert torch.equal(codec.encode(images, generator=torch.Generator().manual_seed(5)), mean + std * noise)
    tiny.tiny_vae().save_pretrained(tmp_path / "tiny")
    tiny_codec = save("sd1").load(tiny_vae=tmp_path / "tiny").codec
    assert tiny_codec.posterior(images)[1].abs().max() == 0
    # What latents are kept under: the weights and the scaling, nothing else.
    identity = codec.identity()
    assert copy.deepcopy(codec).identity() == identity
    others = [replace(codec, scaling=0.2), replace(codec, shift=0.1), tiny_codec]
    changed = copy.deepcopy(codec)
    next(changed.vae.parameters()).view(-1)[0] += 1e-3
    assert len({identity, changed.identity(), *(other.identity() for other in others)}) == 5


@pytest.mark.parametrize("option", ["slicing", "tiling"])
def test_slicing_and_tiling_are_the_autoencoders_own_and_differentiable(save, option, generator):
    saved = save("sd1")
    vae = copy.deepcopy(saved.pipeline.vae)
    getattr(vae, f"enable_{option}")()
    teacher = saved.load(**{option: True})
    images = torch.randn(2, 3, 32, 48, generator=generator, requires_grad=True)  # larger than a tile of 16
    latents = teacher.encode(images)
    decoded = teacher.decode(latents)
    decoded.sum().backward()
    assert images.grad.abs().sum() > 0
    with torch.no_grad():
        close(latents, vae.encode(images).latent_dist.mean * 0.18215)
        close(decoded, vae.decode(latents / 0.18215).sample)
        plain = saved.load().encode(images)
    assert torch.allclose(plain, latents, atol=1e-5) == (option == "slicing")


def test_a_tiny_autoencoder_takes_the_place_of_the_large_one(save, tmp_path, generator):
    saved, vae = save("sd1"), tiny.tiny_vae()
    vae.save_pretrained(tmp_path / "tiny")
    teacher = saved.load(tiny_vae=tmp_path / "tiny")
    assert type(teacher.codec.vae) is type(vae)
    images = torch.rand(2, 3, 16, 16, generator=generator, requires_grad=True)
    latents = teacher.encode(images)
    close(latents, vae.encode(images).latents)
    decoded = teacher.decode(latents)
    close(decoded, vae.decode(latents).sample)
    decoded.sum().backward()
    assert images.grad.abs().sum() > 0


def test_images_and_latents_of_another_shape_are_refused_and_pixels_need_no_codec(save):
    codec = save("sd1").load().codec
    for images in (torch.zeros(1, 3, 16, 15), torch.zeros(1, 4, 16, 16), torch.zeros(3, 16, 16)):
        with refused(r"images must be \(b, 3, h, w\) with sides divisible by 2; got"):
            codec.encode(images)
    with refused(r"latents must be \(b, 4, h, w\); got \(1, 3, 8, 8\)"):
        codec.decode(torch.zeros(1, 3, 8, 8))
    teacher, images = save("pixels").load(), torch.randn(2, 3, 8, 8)
    assert teacher.encode(images) is teacher.decode(images) is images
    assert (teacher.shape, teacher.size, teacher.num_classes) == ((3, 8, 8), (8, 8), 0)


def test_all_weights_and_conditions_are_on_the_device_asked_for(saved, tmp_path):
    own = replace(saved, cache=tmp_path)
    conditions(own.load())  # into the cache: there is no encoding on the meta device
    teacher = own.load(device="meta")
    tensors = [*teacher.denoiser.network.parameters()]
    tensors += [cond for side in conditions(teacher) for cond in side.values()]
    tensors += [*teacher.codec.vae.parameters()] if teacher.codec is not None else []
    assert {tensor.device.type for tensor in tensors} == {teacher.device.type} == {"meta"}


def test_the_size_asked_for_reaches_latents_and_time_ids(save):
    teacher = save("sdxl").load(size=(32, 48))
    assert (teacher.shape, teacher.size) == ((4, 16, 24), (32, 48))
    assert teacher.prompts(["a", "b"])["time_ids"].tolist() == [[32, 48, 0, 0, 32, 48]] * 2
    assert save("sd3").load(size=32).shape == (8, 16, 16)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_its_own_and_answers_in_float32(saved, dtype, generator):
    whole, half = saved.load(), saved.load(dtype=dtype)
    upcast = saved.name == "sdxl" and dtype == torch.float16
    assert {p.dtype for p in half.denoiser.network.parameters()} == {dtype}
    if half.codec is not None:
        assert {p.dtype for p in half.codec.vae.parameters()} == {torch.float32 if upcast else dtype}
    x_t = torch.randn(2, *whole.shape, generator=generator)
    t = whole.denoiser.schedule.at(torch.tensor([0.3, 0.6])).float()
    found, expected = (teacher.denoiser(x_t, t, conditions(teacher)[0]) for teacher in (half, whole))
    images = half.decode(found)
    assert found.dtype == images.dtype == half.encode(images).dtype == torch.float32
    assert (found - expected).norm() < 0.1 * expected.norm()


@torch.no_grad()
def test_the_autoencoder_may_be_of_another_precision(save, generator):
    """To the bit what it is in a teacher that is float32 throughout."""
    whole, mixed = save("sd1").load(), save("sd1").load(dtype=torch.bfloat16, vae_dtype=torch.float32)
    assert {p.dtype for p in mixed.denoiser.network.parameters()} == {torch.bfloat16}
    image = torch.rand(1, 3, 16, 16, generator=generator)
    assert torch.equal(mixed.encode(image), whole.encode(image))


@torch.no_grad()
def test_times_and_sizes_reach_a_bf16_network_in_float32(save):
    """bf16 holds neither timestep 999 nor a side of 1023 pixels."""
    teacher, seen = save("sdxl").load(dtype=torch.bfloat16), {}
    model = teacher.denoiser.network.model
    model.register_forward_pre_hook(lambda module, given, named: seen.update(named, x=given[0]), with_kwargs=True)
    cond = {**teacher.prompts(["a"]), "time_ids": torch.full((1, 6), 1023.0)}
    teacher.denoiser(torch.zeros(1, *teacher.shape), torch.tensor([999.0]), cond)
    assert (seen["timestep"].item(), seen["added_cond_kwargs"]["time_ids"].tolist()) == (999.0, [[1023.0] * 6])
    assert seen["x"].dtype == seen["encoder_hidden_states"].dtype == torch.bfloat16


def test_each_prompt_is_encoded_once_and_then_needs_no_text_encoder(saved_text, tmp_path):
    first = replace(saved_text, cache=tmp_path).load()
    cond = first.prompts([*PROMPTS, PROMPTS[0], ""])
    assert len(first.texts._loaded) == 1
    files = set(tmp_path.rglob("*.safetensors"))
    assert len(files) == 3
    again = replace(saved_text, cache=tmp_path).load()
    for name, value in again.prompts([*PROMPTS, PROMPTS[0], ""]).items():
        assert torch.equal(value, cond[name])
    assert not again.texts._loaded
    again.prompts(["a red mug", "a red cup"])
    assert files < set(tmp_path.rglob("*.safetensors"))
    assert len(set(tmp_path.rglob("*.safetensors"))) == 4


def encoded_with(teacher):
    """The pipeline of diffusers that a teacher's prompts are encoded with."""
    encode = inspect.getclosurevars(teacher.texts.load()).nonlocals["encode"]
    return inspect.getclosurevars(encode).nonlocals["pipeline"]


def test_dropped_text_encoders_are_freed_and_new_prompts_refused(save, tmp_path):
    teacher = replace(save("sd3"), cache=tmp_path).load()
    before = conditions(teacher)
    parts = encoded_with(teacher).components.values()
    parts = [weakref.ref(part) for part in parts if part is not None]
    assert len(parts) == 7  # three encoders, three tokenizers, and the transformer, which stays
    teacher = teacher.without_text_encoders()
    gc.collect()
    assert [part() for part in parts if part() is not None] == [teacher.denoiser.network.model]
    for old, new in zip(before, conditions(teacher), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    with refused(r"dropped, and the cache .* lacks 2 of the prompts, such as 'new'"):
        teacher.prompts(["new", PROMPTS[0], "newer"])
    assert save("pixels").load().without_text_encoders().texts is None
    teacher = replace(save("sdxl"), cache=tmp_path).load()
    cond, negative = teacher.prompts(["a"]), teacher.without_text_encoders().negative()  # zeros need no encoder
    assert {name: value.shape for name, value in negative.items()} == {name: v.shape for name, v in cond.items()}
    assert not negative["encoder_hidden_states"].any()


def test_a_prompt_that_is_cut_is_named_every_time(saved_text, tmp_path):
    """Sixteen tokens, two of them its ends; T5 would read more."""
    for _ in range(2):  # encoded, then from the cache
        teacher = replace(saved_text, cache=tmp_path).load()
        with pytest.warns(UserWarning, match="such as 'abcdefghijklmnopqr' by its last 4 tokens") as caught:
            cond = teacher.prompts(["short", "abcdefghijklmnopqr", "abcdefghijklmnopqr"])
        assert len(caught) == 1
        assert CUT not in cond


def test_identity_knows_variant_pipeline_width_tokenizer_and_version(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    tiny.sd3(with_t5=False).save_pretrained(folder)
    print_of = partial(load_teacher, folder)
    seen = [print_of().texts.identify()]
    for path in list(folder.rglob("*.safetensors")):
        shutil.copy(path, path.with_suffix(".fp16.safetensors"))
    assert print_of().texts.identify() == seen[0]
    seen.append(print_of(variant="fp16").texts.identify())
    index = json.loads((folder / "model_index.json").read_text())
    changed = {**index, "tokenizer": ["transformers", "PreTrainedTokenizerFast"]}
    (folder / "model_index.json").write_text(json.dumps(changed))
    seen.append(print_of().texts.identify())
    (folder / "model_index.json").write_text(json.dumps(index))
    monkeypatch.setattr(pipelines.transformers, "__version__", "0")  # the module that it looks at
    seen.append(print_of().texts.identify())
    monkeypatch.undo()
    config = {"caption_projection_dim": 16, "pooled_projection_dim": 24, "joint_attention_dim": 40}
    own = {"sample_size": 8, "in_channels": 8, "out_channels": 8, "num_layers": 1, "attention_head_dim": 8}
    wide = SD3Transformer2DModel(**own, **config, num_attention_heads=2, pos_embed_max_size=8)
    wide.save_pretrained(folder / "transformer")
    seen.append(print_of().texts.identify())
    assert len(set(seen)) == len(seen)


def test_another_encoder_precision_or_tokenizer_is_another_entry(tmp_path):
    pipeline = tiny.sd()
    pipeline.save_pretrained(tmp_path / "a")
    load = partial(load_teacher, tmp_path / "a", cache=tmp_path / "cache")
    first = load().prompts(["a mug"])["encoder_hidden_states"]
    half = load(dtype=torch.bfloat16).prompts(["a mug"])["encoder_hidden_states"]
    assert (first.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    with torch.no_grad():
        next(pipeline.text_encoder.parameters()).add_(0.1)
    pipeline.save_pretrained(tmp_path / "a")
    assert not torch.equal(load().prompts(["a mug"])["encoder_hidden_states"], first)
    pipeline.unet.save_pretrained(tmp_path / "a" / "unet")  # says nothing about prompts
    assert load().without_text_encoders().prompts(["a mug"])
    (tmp_path / "a" / "tokenizer" / "added_tokens.json").write_text("{}")
    with refused("dropped"):
        load().without_text_encoders().prompts(["a mug"])


def test_conditions_that_a_teacher_does_not_take_are_refused(save, tmp_path):
    sd, classes = save("sd1").load(), save("classes").load()
    for prompts in ("a red mug", [], [3], None):
        with refused("prompts must be a non-empty list of strings; got"):
            sd.texts(prompts)
    with refused(r"takes no prompts.*cond\(labels\)"):
        classes.prompts(["a"])
    with refused(r"takes no class labels.*prompts"):
        sd.cond(torch.tensor([0]))
    for label in (-1, 4):
        with refused(r"labels must lie in \[0, 3\]; got"):
            classes.cond(torch.tensor([0, label]))
    cond = {**sd.prompts(["a"]), "pooled_projections": torch.zeros(1, 4)}
    with refused("pooled_projections", TypeError):
        sd.denoiser(torch.zeros(1, 4, 8, 8), torch.tensor([10.0]), cond)
    encoder = PromptEncoder(tmp_path, lambda: "x", lambda: lambda prompts: {"e": torch.full((1, 2), torch.nan)})
    with refused(r"returned NaN or infinity \(e in torch.float32\).* Load the model with"):
        encoder(["a"])
    assert not list(tmp_path.rglob("*.safetensors")), "and nothing is kept"


def test_the_cache_folder_is_in_the_home_folder_unless_named(save, monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    load_teacher(save("sd1").folder).prompts(["a"])
    assert len(list((tmp_path / ".cache" / "scorefield" / "prompts").rglob("*.safetensors"))) == 1


def test_models_without_subfolders_load_too(save, tmp_path):
    """google/ddpm-cifar10-32 keeps everything at the top, and users save networks alone."""
    pipeline = save("classes").pipeline
    pipeline.unet.save_pretrained(tmp_path)
    DDPMScheduler(prediction_type="sample", beta_schedule="squaredcos_cap_v2").save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path)
    assert (teacher.denoiser.kind, teacher.num_classes) == ("x0", 4)
    assert isinstance(teacher.denoiser.schedule, VariancePreserving)
    cond, x_t, t = teacher.cond(torch.tensor([1])), torch.randn(1, 3, 8, 8), torch.tensor([10.0])
    with torch.no_grad():
        close(teacher.denoiser(x_t, t, cond), pipeline.unet(x_t, t, class_labels=torch.tensor([1])).sample)


def test_a_config_that_names_attention_kernels_fetches_none(save, tmp_path):
    """transformers would download and run them."""
    folder = shutil.copytree(save("sd1").folder, tmp_path / "model")
    named = dict.fromkeys(("attn_implementation", "_attn_implementation"), "evil/kernel@main")
    edit(folder / "text_encoder" / "config.json", **named)
    teacher = load_teacher(folder, cache=tmp_path / "cache")
    (encoder,) = (part for part in encoded_with(teacher).components.values() if isinstance(part, CLIPTextModel))
    assert encoder.config._attn_implementation == "sdpa"
