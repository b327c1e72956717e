"""What load_teacher refuses, and what it says; what it finds by name without a connection."""

import hashlib
import importlib
import json
import os
import pickle
import pkgutil
import shutil
from functools import partial
from types import SimpleNamespace

import httpx
import huggingface_hub
import pytest
import tiny_pipelines as tiny
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from scorefield.models import families, pretrained
from scorefield.models.teacher import load_teacher
from scorefield.schedule import VariancePreserving

# Where weights lie in memory decides which kernels run, so the same weights differ in the last bit.
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
MIRROR = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    tiny.sd().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy of a pipeline to damage."""
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No connection, and a cache of downloads that is empty."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "downloads"))
    return tmp_path / "downloads"


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def pickle_weights(folder):
    """Replace every safetensors file by the pickle that old versions wrote."""
    for path in folder.rglob("*.safetensors"):
        stem = "pytorch_model" if path.stem == "model" else path.stem
        torch.save(load_file(path), path.with_name(f"{stem}.bin"))
        path.unlink()


@torch.no_grad()
def predictions(teacher):
    torch.manual_seed(0)
    return teacher.denoiser(torch.randn(1, *teacher.shape), torch.tensor([500.0]), teacher.prompts(["a mug"]))


def test_vanished_names_are_answered_with_living_ones(offline):
    for name, copies in pretrained.MIRRORS.items():
        with pytest.raises(ValueError, match="Its owner deleted it; unofficial copies") as caught:
            load_teacher(name)
        assert all(copy in str(caught.value) for copy in copies)
    assert pretrained.MIRRORS["runwayml/stable-diffusion-v1-5"] == (MIRROR,)
    assert not set(pretrained.MIRRORS) & {copy for copies in pretrained.MIRRORS.values() for copy in copies}


@pytest.mark.parametrize("name", ["nobody/no-such-model", "runs/no/such/folder", "./here", "no such name", "''"])
def test_a_name_that_is_nothing_is_refused(offline, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"is no folder here, and no name of a model online|could not be downloaded"
    ) as caught:
        load_teacher(name)
    assert MIRROR in str(caught.value)


def test_a_missing_tiny_autoencoder_is_refused(offline, folder):
    with pytest.raises(ValueError, match="'madebyollin/taesd' is no folder here"):
        load_teacher(folder, tiny_vae="madebyollin/taesd")


def downloaded(offline, name, source):
    """The folder that a download of ``name`` would have left."""
    repository = offline / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(source, repository / "snapshots" / ("0" * 40))


def test_a_model_downloaded_before_is_found_by_name_without_a_connection(offline, original, tmp_path):
    downloaded(offline, "somebody/tiny", original)
    tiny.tiny_vae().save_pretrained(tmp_path / "taesd")
    downloaded(offline, "somebody/taesd", tmp_path / "taesd")
    named, local = (load_teacher(name, cache=tmp_path / "cache") for name in ("somebody/tiny", original))
    close(predictions(named), predictions(local))
    assert type(load_teacher(original, tiny_vae="somebody/taesd").codec.vae).__name__ == "AutoencoderTiny"


def online(monkeypatch, index, files):
    """A model that is there, but must not be downloaded."""
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
    monkeypatch.setattr(huggingface_hub, "model_info", lambda name, revision: info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names, revision: str(index))
    monkeypatch.setattr(DiffusionPipeline, "download", lambda *names, **options: pytest.fail("downloaded"))


def test_weights_that_will_not_be_read_are_not_downloaded(monkeypatch, original):
    weights = ["unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"]
    online(monkeypatch, original / "model_index.json", ["model_index.json", "unet/config.json", *weights])
    with pytest.raises(
        ValueError, match=r"somebody/old/unet holds pickled weights only .*pass --allow-pickle if you"
    ):
        load_teacher("somebody/old")
    parts = ("unet", "text_encoder", "vae")
    online(monkeypatch, original / "model_index.json", [f"{part}/model.fp16.safetensors" for part in parts])
    with pytest.raises(
        ValueError, match="somebody/half/unet holds weights of variant fp16 only; got no --variant"
    ):
        load_teacher("somebody/half")


def test_a_gated_model_has_its_own_remedy(monkeypatch, original):
    def refuse(*names, revision):
        raise GatedRepoError("403", response=httpx.Response(403, request=httpx.Request("GET", "https://x")))

    online(monkeypatch, original / "model_index.json", [])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(
        ValueError, match=r"Accept its terms at https://huggingface\.co/somebody/gated, and log in"
    ):
        load_teacher("somebody/gated")


def test_an_unsupported_model_is_refused_before_it_is_downloaded(monkeypatch, tmp_path):
    (tmp_path / "index.json").write_text(json.dumps({"_class_name": "KolorsPipeline"}))
    online(monkeypatch, tmp_path / "index.json", [])
    with pytest.raises(ValueError, match=r"unsupported pipeline class 'KolorsPipeline'; expected one of .*Stable"):
        load_teacher("somebody/flux")


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_a_download_is_asked_for_safetensors_of_what_is_used(monkeypatch, original, allow_pickle):
    asked = {}
    online(monkeypatch, original / "model_index.json", [])
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name, **options: asked.update(options) or original)
    load_teacher("somebody/tiny", variant="fp16", revision="v1", allow_pickle=allow_pickle)
    assert asked == {
        "revision": "v1", "variant": "fp16", "use_safetensors": None if allow_pickle else True,
        "safety_checker": None, "feature_extractor": None, "image_encoder": None,
    }  # fmt: skip


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_part_without_weights_is_refused(folder, part):
    for path in (folder / part).glob("*.safetensors"):
        path.unlink()
    with pytest.raises(
        ValueError, match=rf"{part} holds no weights: expected \*\.safetensors, and it holds config"
    ):
        load_teacher(folder)
    shutil.rmtree(folder / part)
    with pytest.raises(ValueError, match=f"{part} holds no weights: .* it is empty or missing"):
        load_teacher(folder)


def test_pickled_weights_are_refused_unless_allowed(folder, original, tmp_path):
    load = partial(load_teacher, cache=tmp_path / "cache")
    expected = predictions(load(original))
    pickle_weights(folder)
    with pytest.raises(
        ValueError, match=r"unet holds pickled weights only .*bin.*pass --allow-pickle if you trust"
    ):
        load(folder)
    close(predictions(load(folder, allow_pickle=True)), expected)


class Bomb:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"])
def test_a_pickle_never_runs_even_where_pickles_are_allowed(folder, tmp_path, name):
    pickle_weights(folder)
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "mark"), protocol=2))
    with pytest.raises(ValueError, match="pass --allow-pickle if you trust"):
        load_teacher(folder)
    with pytest.raises(ValueError, match=r"cannot be read as (UNet2DConditionModel|CLIPTextModel)"):
        load_teacher(folder, allow_pickle=True, cache=tmp_path / "cache").prompts(["a"])
    assert not (tmp_path / "mark").exists()


def test_safetensors_are_preferred_where_both_are_there(folder, tmp_path):
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(
        pickle.dumps(Bomb(tmp_path / "mark"), protocol=2)
    )
    for allow_pickle in (False, True):
        load_teacher(folder, allow_pickle=allow_pickle)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_other_safetensors_beside_a_pickle_do_not_let_it_through(folder, tmp_path, part):
    pickle_weights(folder)
    for name in ("unet", "vae", "text_encoder"):
        save_file({"a": torch.zeros(1)}, folder / name / "lora.safetensors")
    (pickled,) = (folder / part).glob("*.bin")
    pickled.write_bytes(pickle.dumps(Bomb(tmp_path / "mark"), protocol=2))
    with pytest.raises(ValueError, match="unet cannot be read as UNet2DConditionModel"):
        load_teacher(folder)
    reader = pretrained.PartReader(torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"text_encoder cannot be read as CLIPTextModel: .*safetensors"):
        reader.read(CLIPTextModel, folder / "text_encoder")
    assert not (tmp_path / "mark").exists()


def test_a_variant_is_read_where_it_exists(folder, tmp_path):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    zeros = {name: torch.zeros_like(value) for name, value in load_file(path).items()}
    save_file(zeros, path.with_name("diffusion_pytorch_model.fp16.safetensors"), metadata={"format": "pt"})
    load = partial(load_teacher, folder, cache=tmp_path / "cache")
    assert next(load().denoiser.network.parameters()).abs().sum() > 0
    assert next(load(variant="fp16").denoiser.network.parameters()).abs().sum() == 0
    path.unlink()
    with pytest.raises(ValueError, match=r"unet holds weights of variant fp16 only; got no --variant"):
        load()


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("model.safetensors", None),
        ("model-00001-of-00002.safetensors", None),
        ("model.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "fp16"),
        ("diffusion_pytorch_model.non_ema.bin", "non_ema"),
    ],
)
def test_variants_of_file_names(name, variant):
    assert pretrained._variant(name) == variant


def test_sharded_weights_load(folder, original, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(original / "unet")
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="50KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    load = partial(load_teacher, cache=tmp_path / "cache")
    close(predictions(load(folder)), predictions(load(original)))


def test_damaged_weights_are_refused(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a tensor"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="unet cannot be read as UNet2DConditionModel"):
            load_teacher(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_lack_a_tensor_are_refused_not_filled_with_random_numbers(folder, part, tmp_path):
    (path,) = (folder / part).glob("*.safetensors")
    weights = load_file(path)
    removed = sorted(weights)[0]
    del weights[removed]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{part} .*{removed.split('.')[-2]}"):
        load_teacher(folder, cache=tmp_path / "cache").prompts(["a"])


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_with_more_tensors_than_the_config_has_are_refused(folder, part, tmp_path):
    if part == "text_encoder":
        edit(folder / part / "config.json", num_hidden_layers=1)
    else:
        path = folder / "unet" / "diffusion_pytorch_model.safetensors"
        save_file({**load_file(path), "more.weight": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"the weights in .*{part} have \d+ tensors, such as .* no place for"):
        load_teacher(folder, cache=tmp_path / "cache").prompts(["a"])


def test_tensors_that_older_versions_stored_are_no_surplus(folder, original, tmp_path):
    path = folder / "text_encoder" / "model.safetensors"
    old = {
        "text_model.embeddings.position_ids": torch.arange(16)[None],
        "text_projection.weight": torch.ones(4, 4),
    }
    save_file({**load_file(path), **old}, path, metadata={"format": "pt"})
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(path)
    for new, name in names.items():
        weights = {key.replace(f".{new}.", f".{name}."): value for key, value in weights.items()}
    assert weights.keys() != load_file(path).keys()
    save_file(weights, path, metadata={"format": "pt"})
    load = partial(load_teacher, cache=tmp_path / "cache")
    close(predictions(load(folder)), predictions(load(original)))
    images = torch.rand(1, 3, 16, 16)
    close(load(folder).encode(images), load(original).encode(images))


@pytest.mark.parametrize("vocabulary", [None, "", "{"])
def test_a_tokenizer_without_vocabulary_is_refused(folder, vocabulary):
    """transformers makes one without tokens of it, and all prompts get the same embedding."""
    file = folder / "tokenizer" / "tokenizer.json"
    file.unlink() if vocabulary is None else file.write_text(vocabulary)
    with pytest.raises(ValueError, match=r"tokenizer holds no vocabulary: expected|cannot read .*tokenizer\.json"):
        load_teacher(folder)


def test_a_missing_or_endless_tokenizer_is_refused(folder, tmp_path):
    config = folder / "tokenizer" / "tokenizer_config.json"
    edit(config, model_max_length=10**30)
    with pytest.raises(ValueError, match=r"model_max_length must be the most tokens of a prompt.*; got 10+"):
        load_teacher(folder)
    edit(config, model_max_length=16)
    (folder / "tokenizer" / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match="tokenizer cannot be read as CLIPTokenizer"):
        load_teacher(folder, cache=tmp_path / "cache").prompts(["a"])
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer holds no vocabulary: .*got nothing"):
        load_teacher(folder)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1", b"\x80\x02junkjunk"])
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_damaged_pickles_are_refused(folder, tmp_path, part, content):
    pickle_weights(folder)
    next((folder / part).glob("*.bin")).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{part} cannot be read as"):
        load_teacher(folder, allow_pickle=True, cache=tmp_path / "cache").prompts(["a"])


def test_weights_of_another_shape_are_refused(folder):
    edit(folder / "unet" / "config.json", cross_attention_dim=48)
    with pytest.raises(ValueError, match="unet cannot be read as UNet2DConditionModel"):
        load_teacher(folder)


@pytest.mark.parametrize(
    "name", ["KolorsPipeline", "StableDiffusionInpaintPipeline", ["my_code", "MyPipeline"], None]
)
def test_other_pipelines_are_refused(folder, name):
    edit(folder / "model_index.json", _class_name=name)
    with pytest.raises(ValueError, match=r"unsupported pipeline class .*; expected one of DDIMPipeline, "):
        load_teacher(folder)


def test_a_family_is_found_by_the_name_of_its_file():
    names = [module.name for module in pkgutil.iter_modules(families.__path__)]
    assert "stable_diffusion_xl" in names
    for name in names:
        family = importlib.import_module(f"{families.__name__}.{name}").FAMILY
        assert families.family_of({"_class_name": family.pipeline}) is family


def test_folders_that_are_no_pipelines_are_refused(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"it holds a UNet2DConditionModel alone. Pass what save_pretrained wrote"
    ):
        load_teacher(folder / "unet")
    with pytest.raises(ValueError, match=r"is not a pipeline's folder: it holds no model_index\.json"):
        load_teacher(tmp_path)
    (folder / "model_index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"model_index\.json must hold a JSON object; got list"):
        load_teacher(folder)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*model_index\.json"):
        load_teacher(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "fp16", None])
def test_dtypes_that_networks_cannot_have_are_refused(folder, dtype):
    with pytest.raises(ValueError, match=r"dtype must be one of torch.float16, .*; got"):
        load_teacher(folder, dtype=dtype)


def test_schedulers_that_do_not_fit_are_refused(folder):
    file = folder / "scheduler" / "scheduler_config.json"
    whole = file.read_text()
    edit(file, prediction_type="score")
    with pytest.raises(
        ValueError, match="unknown prediction_type 'score' of DDIMScheduler; expected epsilon, v_pre"
    ):
        load_teacher(folder)
    edit(file, prediction_type="epsilon", beta_schedule="round")
    with pytest.raises(ValueError, match="unknown beta_schedule 'round' of DDIMScheduler"):
        load_teacher(folder)
    EDMEulerScheduler().save_pretrained(folder / "scheduler")
    with pytest.raises(ValueError, match="EDMEulerScheduler is neither of the DDPM nor the flow-matching family"):
        load_teacher(folder)
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    with pytest.raises(ValueError, match="needs a DDPM-like scheduler; got FlowMatchEulerDiscreteScheduler"):
        load_teacher(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"has no scheduler/scheduler_config\.json"):
        load_teacher(folder)
    file.write_text(whole)
    load_teacher(folder)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_every_beta_schedule_is_diffusers_own(schedule):
    for settings in ({}, {"rescale_betas_zero_snr": True}, {"num_train_timesteps": 400, "beta_end": 0.01}):
        scheduler = DDPMScheduler(beta_schedule=schedule, **settings)
        found, kind = pretrained.read_schedule(dict(scheduler.config))
        assert torch.equal(found.alphas_cumprod, scheduler.alphas_cumprod.double())
        assert kind == "eps"
    own = DDPMScheduler(trained_betas=[0.1, 0.2, 0.3])
    assert isinstance(pretrained.read_schedule(dict(own.config))[0], VariancePreserving)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 9}, "maps 9 channels to 4: it learned its variance, or takes an image"),
        ({"time_cond_proj_dim": 8}, "distilled model that is told the guidance scale"),
    ],
)
def test_networks_that_need_more_than_noise_time_and_prompt_are_refused(folder, changes, message):
    tiny.text_unet(**changes).save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match=message):
        load_teacher(folder)


def test_other_autoencoders_are_refused(folder):
    edit(folder / "vae" / "config.json", latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(ValueError, match=r"unsupported autoencoder in .*latents normalised per channel"):
        load_teacher(folder)
    edit(folder / "vae" / "config.json", _class_name="AutoencoderKLMochi")
    with pytest.raises(
        ValueError, match=r"unsupported autoencoder in .*AutoencoderKLMochi; expected one of AutoencoderKL,"
    ):
        load_teacher(folder)


@pytest.mark.parametrize("tokenizer", [["tokenizer", "MyTokenizer"], ["transformers", "CLIPModel"], [None, None]])
def test_tokenizers_that_are_not_transformers_are_refused(folder, tokenizer):
    edit(folder / "model_index.json", tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"unsupported tokenizer: .*; expected a tokenizer of transformers"):
        load_teacher(folder)


def test_a_pipeline_without_its_text_encoder_is_refused(folder):
    edit(folder / "model_index.json", text_encoder=[None, None])
    with pytest.raises(
        ValueError, match=r"model_index\.json lacks text_encoder, without which there are no prompts"
    ):
        load_teacher(folder)


def test_a_fingerprint_is_of_names_contents_and_facts(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("content")
    one, two = tmp_path / "one" / "file", tmp_path / "two" / "file"
    prints = {
        pretrained.fingerprint([one]),
        pretrained.fingerprint([two]),
        pretrained.fingerprint([one], ["fact"]),
    }
    one.write_text("changed")
    prints.add(pretrained.fingerprint([one]))
    one.rename(one.with_name("renamed"))
    prints.add(pretrained.fingerprint([one.with_name("renamed")]))
    assert len(prints) == 5


def test_a_file_that_stays_is_hashed_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("content")
    first = pretrained.fingerprint([tmp_path / "file"])
    monkeypatch.setattr(hashlib, "file_digest", lambda *names: pytest.fail("hashed again"))
    assert pretrained.fingerprint([tmp_path / "file"]) == first


def test_only_what_is_read_is_hashed(folder):
    part = folder / "text_encoder"
    for name in ("README.md", "model.fp16.safetensors", "pytorch_model.bin"):
        (part / name).write_text("x")
    for variant, weights in ((None, "model.safetensors"), ("fp16", "model.fp16.safetensors")):
        reader = pretrained.PartReader(torch.float32, torch.device("cpu"), variant=variant)
        assert [path.name for path in reader.files(part)] == ["config.json", weights]


@pytest.mark.parametrize(("options", "message"), [
    ({"device": "gpu"}, "device must be one that is here, such as cpu; got 'gpu'"),
    ({"device": "cuda:99"}, "device must be one that is here, such as cpu; got 'cuda:99'"),
    ({"size": 33}, "size must be in multiples of 2 pixels"),
    ({"size": (8, 8, 8)}, r"whole number of pixels, or \(height, width\); got \(8, 8, 8\)"),
    ({"size": 8.5}, "whole number of pixels"),
    ({"tiny_vae": "tiny", "tiling": True}, "tiling is for AutoencoderKL"),
    ({"tiny_vae": "other"}, "the autoencoder has 8 channels, the network 4"),
])  # fmt: skip
def test_what_json_files_tell_is_said_before_weights_are_read(folder, tmp_path, monkeypatch, options, message):
    tiny.tiny_vae().save_pretrained(tmp_path / "tiny")
    tiny.tiny_vae(channels=8).save_pretrained(tmp_path / "other")
    monkeypatch.setattr(pretrained.PartReader, "read", lambda *parts: pytest.fail("read"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_teacher(folder, **options)


def test_pixel_models_refuse_what_does_not_apply(tmp_path, monkeypatch):
    tiny.pixels().save_pretrained(tmp_path / "plain")
    tiny.pixels(class_embed_type="timestep").save_pretrained(tmp_path / "classes")
    monkeypatch.setattr(pretrained.PartReader, "read", lambda *parts: pytest.fail("read"))
    for option in ({"tiny_vae": "taesd"}, {"tiling": True}, {"slicing": True}):
        with pytest.raises(ValueError, match=f"without an autoencoder; leave out {next(iter(option))}"):
            load_teacher(tmp_path / "plain", **option)
    with pytest.raises(ValueError, match="size must be in multiples of 2 pixels; got 9 x 9"):
        load_teacher(tmp_path / "plain", size=9)
    with pytest.raises(ValueError, match="embeds its classes as 'timestep'; expected class numbers"):
        load_teacher(tmp_path / "classes")


def test_sd3_refuses_sizes_beyond_its_positions_and_shifts_that_are_none(tmp_path, monkeypatch):
    tiny.sd3(with_t5=False).save_pretrained(tmp_path)
    monkeypatch.setattr(pretrained.PartReader, "read", lambda *parts: pytest.fail("read"))
    with pytest.raises(ValueError, match="size must be at most 32 pixels here; got 36 x 36"):
        load_teacher(tmp_path, size=36)
    for shift in (0, -1, None):
        edit(tmp_path / "scheduler" / "scheduler_config.json", shift=shift)
        with pytest.raises(ValueError, match="shift must be a number above 0, such as 3; got"):
            load_teacher(tmp_path)
