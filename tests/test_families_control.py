"""ControlNets of transformers: neutral at first, trained by two updates, and drawn by stock diffusers as by us."""

import shutil

import diffusers
import numpy as np
import pytest
import tiny_pipelines
import tiny_transformers as tiny
import torch
from accelerate.state import AcceleratorState
from diffusers import FluxControlPipeline
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.functional import to_pil_image

import controlnet.options
import controlnet.recipe
from controlnet.adapter import ControlledDenoiser
from controlnet.recipe import training_times
from controlnet.training import adamw, control_phase
from controlnet.transformers import control_lora, copy_transformer
from scorefield import guided
from scorefield.denoiser import Conditioned
from scorefield.models.families.flux import pack
from scorefield.models.teacher import load_teacher
from scorefield.randomness import Rng
from scorefield.sampling import ddim, sample

SIZE, STEPS = 32, 3
PROMPTS = ["a red mug", "two blue chairs"]
NAMES = ("flux", "sd3", "sd35", "qwen_image", "z_image", "sana")
MAKERS = {**tiny.FAMILIES, "sd3": tiny_pipelines.sd3, "sana": lambda: tiny.sana(layers=2)}


def sure(pipeline):
    """An autoencoder without a spread, as those of published models nearly are: pipelines draw of it."""
    vae = pipeline.vae
    last = next((getattr(vae, name) for name in ("quant_conv",) if getattr(vae, name, None) is not None), None)
    last = getattr(vae.encoder, "conv_out", None) if last is None else last
    if hasattr(vae, "quant_conv") and last is not None:
        with torch.no_grad():
            half = last.weight.shape[0] // 2
            last.weight[half:] = 0
            last.bias[half:] = -40
    return pipeline


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pipelines as they are asked for, and six pictures with captions."""
    root = tmp_path_factory.mktemp("controls")
    (root / "data").mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 255, (SIZE // 8, SIZE // 8, 3), np.uint8)
        picture = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.NEAREST)
        picture.save(root / "data" / f"{number}.png")
        (root / "data" / f"{number}.txt").write_text(PROMPTS[number % 2])
    yield root
    shutil.rmtree(root)


def folder_of(place, name):
    if not (place / name).exists():
        sure(MAKERS[name]()).save_pretrained(place / name)
    return place / name


def load(place, name):
    return load_teacher(folder_of(place, name), size=SIZE, cache=place / "cache")


def noise_and_hint(teacher):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, *teacher.shape, generator=generator)
    return noise, (torch.rand(2, 1, SIZE, SIZE, generator=generator) > 0.7).float()


def trained(place, name, out, **changes):
    """The folder of an adapter after two updates at a rate that shows."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = controlnet.options.Config(
        out=out,
        **{"teacher": str(folder_of(place, name)), "data": str(place / "data"), "size": SIZE, "steps": 2,
           "batch_size": 2, "eval_samples": 2, "sampling_steps": 1, "guidance": 2.0, "learning_rate": 0.05,
           "warmup": 1, "cache": place / "cache", "ema_decay": 0.0, **changes},
    )  # fmt: skip
    return controlnet.recipe.main(config)


def stock(name, pipeline, noise, hint, scale):
    """Images in [0, 1] that the stock pipeline draws."""
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": STEPS, "height": SIZE, "width": SIZE, "output_type": "pt",
             "control_image": [to_pil_image(one).convert("RGB") for one in hint]}  # fmt: skip
    if not isinstance(pipeline, FluxControlPipeline):
        given["controlnet_conditioning_scale"] = 1.0
    given["latents"] = pack(noise) if name in ("flux", "qwen_image") else noise
    if scale != 1:
        given["negative_prompt"] = ["dull"] * 2
    if name == "flux":
        guidance = {"guidance_scale": 2.5} | ({"true_cfg_scale": scale} if scale != 1 else {})
        return pipeline(PROMPTS, **given, **guidance).images
    if name == "qwen_image":
        return pipeline(PROMPTS, **given, true_cfg_scale=scale).images
    if name == "sana":
        given["use_resolution_binning"] = False
    return pipeline(list(PROMPTS), **given, guidance_scale=scale - (name == "z_image")).images


@torch.no_grad()
def ours(name, teacher, adapter, pipeline, noise, hint, scale):
    denoiser = ControlledDenoiser(teacher.denoiser, adapter).with_hint(hint)
    if name == "flux":
        denoiser = Conditioned(denoiser, {"guidance": torch.tensor([2.5])})
    denoiser = guided(denoiser, scale, teacher.negative("dull"), norm=teacher.norm)
    times = pipeline.scheduler.sigmas[:-1].double()
    x0 = sample(denoiser, noise, teacher.prompts(PROMPTS), times=times, step=ddim())
    return (teacher.decode(x0) / 2 + 0.5).clamp(0, 1)


def read_back(out, adapter):
    """The averaged weights of the last checkpoint: the adapter as the training had it."""
    adapter.load_state_dict(load_file(out / "checkpoints" / "step-000000002" / "control.ema.safetensors"))
    return adapter.eval()


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_copy_leaves_the_teacher_as_it_is(place, name):
    teacher = load(place, name)
    noise, hint = noise_and_hint(teacher)
    cond, t = teacher.prompts(PROMPTS), torch.tensor([0.3, 0.9])
    adapter = copy_transformer(teacher)
    controlled = ControlledDenoiser(teacher.denoiser, adapter).with_hint(hint)
    wanted = teacher.denoiser(noise, t, cond)
    assert torch.equal(controlled(noise, t, cond), wanted)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1)
    assert not torch.allclose(controlled(noise, t, cond), wanted)
    assert not torch.allclose(controlled(noise, t, cond), controlled.with_hint(1 - hint)(noise, t, cond))
    assert torch.equal(teacher.denoiser(noise, t, cond), wanted)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in ("sd3", "qwen_image", "z_image") else pytest.mark.slow)
    for name in NAMES
])  # fmt: skip
def test_the_trained_adapter_is_drawn_by_its_stock_pipeline_as_by_us(place, tmp_path, name):
    folder = trained(place, name, tmp_path / "run")
    teacher = load(place, name)
    noise, hint = noise_and_hint(teacher)
    fresh = copy_transformer(teacher)
    control = fresh.control
    pipeline = getattr(diffusers, control.pipeline).from_pretrained(
        folder_of(place, name), controlnet=control.model.from_pretrained(folder)
    )
    adapter = read_back(tmp_path / "run", copy_transformer(teacher))
    assert f"controlnet={control.model.__name__}" in (folder / "README.md").read_text()
    for scale in (1.0, 2.5):
        found = stock(name, pipeline, noise, hint, scale)
        wanted = ours(name, teacher, adapter, pipeline, noise, hint, scale)
        assert (found - wanted).abs().max() <= 2 / 255
        assert (wanted - ours(name, teacher, fresh, pipeline, noise, hint, scale)).abs().max() > 0.01
    again = trained(place, name, tmp_path / "again", init_from=str(folder), learning_rate=1e-9)
    first, second = (load_file(one / "diffusion_pytorch_model.safetensors") for one in (folder, again))
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)


def test_a_control_lora_is_drawn_by_its_stock_pipeline_as_by_us(place, tmp_path):
    folder = trained(place, "flux", tmp_path / "run", adapter="lora", lora_rank=4)
    teacher = load(place, "flux")
    noise, hint = noise_and_hint(teacher)
    fresh = control_lora(teacher, rank=4, generator=torch.Generator().manual_seed(0))
    cond, t = teacher.prompts(PROMPTS), torch.tensor([0.3, 0.9])
    alone = ControlledDenoiser(teacher.denoiser, fresh).with_hint(hint)(noise, t, cond)
    assert torch.allclose(alone, teacher.denoiser(noise, t, cond), atol=1e-6), "neutral at first"
    pipeline = FluxControlPipeline.from_pretrained(folder_of(place, "flux"))
    pipeline.load_lora_weights(folder)
    found = stock("flux", pipeline, noise, hint, 1.0)
    start = ours("flux", teacher, fresh, pipeline, noise, hint, 1.0)
    adapter = read_back(tmp_path / "run", fresh)
    wanted = ours("flux", teacher, adapter, pipeline, noise, hint, 1.0)
    assert (found - wanted).abs().max() <= 2 / 255
    assert (wanted - start).abs().max() > 0.01
    assert "load_lora_weights" in (folder / "README.md").read_text()
    again = trained(place, "flux", tmp_path / "again", adapter="lora", lora_rank=4, init_from=str(folder),
                    learning_rate=1e-9)  # fmt: skip
    first, second = (load_file(one / "pytorch_lora_weights.safetensors") for one in (folder, again))
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)


@pytest.mark.parametrize("lora", [False, True], ids=["controlnet", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_adapter_alone(place, name, lora):
    """Those of the family's own loss, under recomputation as without it."""
    if lora and name != "flux":
        pytest.skip("diffusers has control LoRAs of FLUX.1")
    teacher = load(place, name)
    generator = torch.Generator().manual_seed(0)
    adapter = control_lora(teacher, rank=2, generator=generator) if lora else copy_transformer(teacher)
    with torch.no_grad():  # past the zeros, behind which nothing is reached yet
        for parameter in adapter.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    denoiser = ControlledDenoiser(teacher.denoiser, adapter)
    phase = control_phase(denoiser, adamw(adapter, 1e-3), times=training_times(teacher))
    x0, hint = noise_and_hint(teacher)
    batch = {"x0": x0, "hint": hint, "cond": teacher.prompts(PROMPTS)}
    gradients = []
    for recompute in (False, True):
        if recompute:
            for part in (teacher.denoiser.network, adapter.backbone if lora else adapter):
                controlnet.recipe.lighten(part)
        adapter.zero_grad()
        phase.loss(batch, Rng(0, 0))["loss"].backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in adapter.parameters()])
    reached = [gradient for gradient in gradients[0] if gradient is not None and gradient.abs().max() > 0]
    assert len(reached) > len(gradients[0]) / 2
    assert all(p.grad is None for p in teacher.denoiser.network.parameters())
    for first, second in zip(*gradients, strict=True):
        assert (first is None) == (second is None)
        assert first is None or torch.allclose(first, second, rtol=1e-3, atol=1e-6)


def test_flow_transformers_learn_at_logit_normal_times_under_their_shift(place):
    """P(logit t < log 3) = 1/2 for a shift of 3."""
    teacher = load(place, "sana")
    t = training_times(teacher)(4000, teacher.denoiser.schedule, torch.Generator().manual_seed(0))
    assert float(t.logit().mean()) == pytest.approx(1.0986, abs=0.06)
    assert float(t.logit().std()) == pytest.approx(1.0, abs=0.05)


def test_what_has_no_controlnet_is_refused_in_words(place, tmp_path):
    for name, changes, said in (
        ("pixart_sigma", {}, "no ControlNet for a PixArtTransformer2DModel"),
        ("sana", {"adapter": "lora"}, "no control LoRA of a SanaTransformer2DModel. Pass --adapter controlnet"),
        ("sana", {"unlocked": True}, "--unlocked is for UNets"),
        ("sana", {"lora_rank": 3}, "pass --adapter lora, too"),
        ("flux", {"recompute_levels": 1, "gradient_checkpointing": True}, "Leave out --recompute-levels"),
    ):
        with pytest.raises(ValueError, match=said):
            trained(place, name, tmp_path / "run", **changes)
        assert not (tmp_path / "run" / "controlnet").exists()


@pytest.mark.parametrize("name", ["flux", "qwen_image", "sd35"])
def test_under_guidance_negatives_get_what_the_pipeline_gives_them(place, name):
    """FLUX.1 and Qwen-Image add what the ControlNet says of the prompt; others ask it about the negative too."""
    teacher = load(place, name)
    noise, hint = noise_and_hint(teacher)
    adapter = copy_transformer(teacher)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1)
    controlled = ControlledDenoiser(teacher.denoiser, adapter).with_hint(hint)
    cond, away = teacher.prompts(PROMPTS), teacher.negative("dull")
    joined = {key: torch.cat([away[key].expand_as(value), value]) for key, value in cond.items()}
    t = torch.tensor([0.3, 0.9])
    both = controlled.residuals(torch.cat([noise, noise]), torch.cat([t, t]), joined)
    alone = controlled.residuals(noise, t, cond)
    for key, value in both.items():
        negative, positive = value.chunk(2)
        assert torch.allclose(positive, alone[key], atol=1e-5)
        assert torch.equal(negative, positive) == (name != "sd35")
    other = controlled.residuals(torch.cat([noise, noise + 1]), torch.cat([t, t]), joined)
    assert not any(torch.equal(*value.chunk(2)) for value in other.values()), "two images each, and no guidance"
