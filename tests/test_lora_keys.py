"""LoRAs in kohya's keys, networks in single files: stock diffusers reads what we write, and we what it reads."""

import shutil

import pytest
import tiny_pipelines
import tiny_transformers as tiny
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from safetensors.torch import load_file, save_file
from torch import nn

from distill.export import LORA, export_lora, lcm_times
from distill.student import Student
from scorefield.files import read_json
from scorefield.models.families import family_of, flux
from scorefield.models.lora import LAYERS, LoRA, adaptable, adapter_weights, load_adapter_weights, shared_backbone
from scorefield.models.lora_keys import KOHYA, fused, kohya_weights, layers_of, read_lora
from scorefield.models.teacher import load_teacher

MAKERS = {
    "sd": (tiny_pipelines.sd, "StableDiffusionPipeline"),
    "sdxl": (tiny_pipelines.sdxl, "StableDiffusionXLPipeline"),
    "qwen_image": (tiny.qwen_image, "QwenImagePipeline"), "z_image": (tiny.z_image, "ZImagePipeline"),
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("keys")
    yield root
    shutil.rmtree(root)


def folder_of(root, name, make):
    if not (root / name).exists():
        make().save_pretrained(root / name)
    return root / name


def changed_student(teacher, alpha):
    """A student of one step with a LoRA of random weights on all layers that its family changes."""
    generator = torch.Generator().manual_seed(0)
    layers = teacher.denoiser.network.layers or LAYERS
    denoiser, _ = shared_backbone(teacher.denoiser, rank=4, alpha=alpha, targets=layers, generator=generator)
    with torch.no_grad():
        for parameter in denoiser.network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return Student(denoiser, lcm_times(denoiser.schedule, 1, highest=3.5))


@pytest.mark.parametrize("name", MAKERS)
def test_both_files_draw_the_same_image_in_stock_diffusers(root, tmp_path, name):
    make, kind = MAKERS[name]
    teacher = load_teacher(folder_of(root, name, make), size=16 if name in ("sd", "sdxl") else 32)
    student = changed_student(teacher, alpha=2.0)
    folder = export_lora(student, root / name, tmp_path / "lora", kohya=True)
    weights = load_file(folder / KOHYA)
    assert all(key.startswith("lora_unet_") for key in weights)
    alphas = [key for key in weights if key.endswith(".alpha")]
    assert {float(weights[key]) for key in alphas} <= {4.0, 12.0}, (
        "the rank, or three times that where q, k, v join"
    )
    assert len(alphas) == len([key for key in weights if key.endswith(".lora_down.weight")])
    images = {}
    for file in ("none", LORA, KOHYA):
        pipeline = DiffusionPipeline.from_pretrained(root / name)
        pipeline.set_progress_bar_config(disable=True)
        if file != "none":
            pipeline.load_lora_weights(folder, weight_name=file)
        height, width = teacher.size
        made = pipeline("a mug", height=height, width=width, num_inference_steps=2, output_type="np",
                        generator=torch.Generator().manual_seed(0))  # fmt: skip
        images[file] = torch.from_numpy(made.images)
    assert (images[LORA] - images["none"]).abs().max() > 0.01
    assert (images[KOHYA] - images[LORA]).abs().max() < 1e-4
    part = family_of(read_json(root / name / "model_index.json")).part
    for file in (LORA, KOHYA):
        same_changes(read_lora(folder / file, kind, part), adapter_weights(student.denoiser.network))


def same_changes(found, wanted):
    """Products of the matrices, layer by layer; a file of joined layers may give them a larger rank."""
    ends = (".lora_A.weight", ".lora_B.weight")
    layers = [key.removesuffix(ends[0]) for key in wanted if key.endswith(ends[0])]
    assert {key.removesuffix(end) for key in found for end in ends if key.endswith(end)} == set(layers)
    for layer in layers:
        first, second = (
            weights[layer + ends[1]].flatten(1) @ weights[layer + ends[0]].flatten(1)
            for weights in (found, wanted)
        )
        assert torch.allclose(first, second, atol=1e-4)


def test_a_student_starts_from_a_file_of_kohyas_keys(root, tmp_path):
    teacher = load_teacher(folder_of(root, "sd", tiny_pipelines.sd), size=16)
    student = changed_student(teacher, alpha=2.0)
    folder = export_lora(student, root / "sd", tmp_path / "lora", kohya=True)
    other = changed_student(teacher, alpha=None).denoiser.network
    load_adapter_weights(other, read_lora(folder / KOHYA, "StableDiffusionPipeline", "unet"))
    same_changes(adapter_weights(other), adapter_weights(student.denoiser.network))
    with pytest.raises(ValueError, match=r"kohya\.safetensors cannot be read as a LoRA of FluxPipeline"):
        read_lora(folder / KOHYA, "FluxPipeline", "transformer")


def test_flux_in_kohyas_keys_at_its_own_size():
    """The converter of diffusers has the sizes of FLUX.1 built in, so all but the depth is that of the model."""
    inner = 3072
    generator = torch.Generator().manual_seed(0)
    sizes = {"attn.to_out.0": (inner, inner), "ff.net.0.proj": (inner, 4 * inner), "ff.net.2": (4 * inner, inner)}
    double = {f"transformer_blocks.1.{name}": size for name, size in sizes.items()}
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
        double[f"transformer_blocks.1.attn.{name}"] = (inner, inner)
    double |= {
        key.replace(".ff.", ".ff_context."): size for key, size in double.items() if ".ff." in key
    }  # fmt: skip
    single = {f"single_transformer_blocks.2.attn.to_{one}": (inner, inner) for one in "qkv"}
    single["single_transformer_blocks.2.proj_mlp"] = (inner, 4 * inner)
    single["single_transformer_blocks.2.proj_out"] = (5 * inner, inner)
    layers = {**double, **single}
    network = nn.Module()
    for name, (first, last) in layers.items():
        place = network
        *path, own = name.split(".")
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.add_module(own, nn.Linear(first, last, bias=False, device="meta"))
    adapted = LoRA(network.requires_grad_(False), rank=2, targets=list(layers), generator=generator)
    adapted.changes = nn.ParameterDict({
        name: nn.Parameter(torch.randn(value.shape, generator=generator))
        for name, value in adapted.changes.items()
    })  # fmt: skip
    assert sorted(layers_of(adapted)) == sorted(layers)
    found = _convert_kohya_flux_lora_to_diffusers(kohya_weights(adapted, fused(layers_of(adapted), flux.KOHYA)))
    wanted = adapter_weights(adapted)
    assert set(found) == {f"transformer.{key}" for key in wanted}
    for key, value in wanted.items():
        assert torch.allclose(found[f"transformer.{key}"], value, atol=1e-6)
    with pytest.raises(ValueError, match=r"no name for the layer transformer_blocks\.0\.norm1\.linear"):
        fused(["transformer_blocks.0.norm1.linear"], flux.KOHYA)


def test_all_layers_of_flux_have_a_name(root):
    network = load_teacher(folder_of(root, "flux", tiny.flux), size=32).denoiser.network
    layers = [name.removeprefix("model.") for name in adaptable(network, network.layers)]
    named = fused(layers, flux.KOHYA)
    assert sorted(layer for joined in named.values() for layer in joined) == sorted(layers)
    assert [len(named[name]) for name in ("single_blocks_0_linear1", "double_blocks_0_txt_attn_qkv")] == [4, 3]


def test_a_network_is_read_from_a_single_file(root, tmp_path):
    """In place of the weights of its folder, beside their config; damaged ones are named."""
    folder = folder_of(root, "z_image", tiny.z_image)
    wanted = load_teacher(folder, size=32)
    shutil.copytree(folder, tmp_path / "own")
    weights = tmp_path / "own" / "transformer" / "diffusion_pytorch_model.safetensors"
    single = weights.with_name("z_image_bf16.safetensors")
    makers = tiny.in_makers_names(load_file(weights))
    weights.unlink()
    save_file(makers, single)
    found = load_teacher(tmp_path / "own", size=32)
    x_t, t, cond = torch.randn(1, *wanted.shape), torch.tensor([0.5]), wanted.prompts(["a mug"])
    own, theirs = wanted.denoiser.network.state_dict(), found.denoiser.network.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in own.items())
    # Where weights lie in memory decides about the last bits on some processors.
    torch.testing.assert_close(found.denoiser(x_t, t, cond), wanted.denoiser(x_t, t, cond), rtol=1e-5, atol=1e-5)
    first = next(iter(makers))
    save_file({key: value for key, value in makers.items() if key != first}, single)
    with pytest.raises(ValueError, match=r"z_image_bf16\.safetensors"):
        load_teacher(tmp_path / "own", size=32)
    with pytest.raises(ValueError, match="is a single file"):
        load_teacher(single)


def test_gguf_names_the_package_that_it_needs(root, tmp_path, monkeypatch):
    monkeypatch.setattr("scorefield.models.gguf_file.find_spec", lambda name: None)
    folder = folder_of(root, "z_image", tiny.z_image)
    shutil.copytree(folder, tmp_path / "own")
    (tmp_path / "own" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "own" / "transformer" / "z_image-Q8_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"z_image-Q8_0\.gguf needs the package gguf: pip install gguf"):
        load_teacher(tmp_path / "own", size=32)
