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
from folders import edit, pickle_weights, reweigh, weights_in
from huggingface_hub.errors import GatedRepoError
from refusals import refused
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from scorefield.models import families, pretrained
from scorefield.models.teacher import load_teacher
from scorefield.schedule import VariancePreserving

# Where weights lie in memory decides which kernels run, so the same weights differ in the last bit.
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
MIRROR = "stable-diffusion-v1-5/stable-diffusion-v1-5"
UNET, CLIP = "unet/diffusion_pytorch_model", "text_encoder/model"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No connection, and a cache of downloads that is empty."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "downloads"))
    return tmp_path / "downloads"


@torch.no_grad()
def predictions(teacher):
    torch.manual_seed(0)
    return teacher.denoiser(torch.randn(1, *teacher.shape), torch.tensor([500.0]), teacher.prompts(["a mug"]))


# Names.


def test_vanished_names_are_answered_with_living_ones(offline):
    for name, copies in pretrained.MIRRORS.items():
        with refused("Its owner deleted it; unofficial copies") as caught:
            load_teacher(name)
        assert all(copy in str(caught.value) for copy in copies)
    assert pretrained.MIRRORS["runwayml/stable-diffusion-v1-5"] == (MIRROR,)
    assert not set(pretrained.MIRRORS) & {copy for copies in pretrained.MIRRORS.values() for copy in copies}


@pytest.mark.parametrize("name", ["nobody/no-such-model", "runs/no/such/folder", "./here", "no such name", "''"])
def test_a_name_that_is_nothing_is_refused(offline, name, monkeypatch, tmp_path, sd):
    monkeypatch.chdir(tmp_path)
    with refused(r"is no folder here, and no name of a model online|could not be downloaded") as caught:
        load_teacher(name)
    assert MIRROR in str(caught.value)
    with refused("'madebyollin/taesd' is no folder here"):
        load_teacher(sd, tiny_vae="madebyollin/taesd")


def test_a_name_online_is_told_from_a_slip_of_the_pen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    seen = []
    monkeypatch.setattr(
        "scorefield.models.teacher.open_pipeline", lambda name, *a, **o: seen.append(name) or 1 / 0
    )
    for online in (MIRROR, "studnt/student"):
        with refused("ZeroDivisionError"):
            load_teacher(online)
    assert len(seen) == 2
    for local in ("runs/studnt", "teacher", "a/b/c", str(tmp_path / "x")):
        with refused("is no folder here, and no name of a model online"):
            load_teacher(local)


def test_a_model_downloaded_before_is_found_by_name_without_a_connection(offline, sd, tmp_path):
    tiny.tiny_vae().save_pretrained(tmp_path / "taesd")
    for name, source in (("somebody/tiny", sd), ("somebody/taesd", tmp_path / "taesd")):
        repository = offline / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        shutil.copytree(source, repository / "snapshots" / ("0" * 40))
    close(predictions(load_teacher("somebody/tiny")), predictions(load_teacher(sd)))
    assert type(load_teacher(sd, tiny_vae="somebody/taesd").codec.vae).__name__ == "AutoencoderTiny"


@pytest.fixture
def online(monkeypatch, sd):
    """A model that is there, but must not be downloaded."""

    def there(*files, index=sd / "model_index.json"):
        info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
        monkeypatch.setattr(huggingface_hub, "model_info", lambda name, revision: info)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names, revision: str(index))
        monkeypatch.setattr(DiffusionPipeline, "download", lambda *names, **options: pytest.fail("downloaded"))

    return there


def test_what_will_not_be_read_is_not_downloaded(online, monkeypatch, tmp_path):
    online("model_index.json", "unet/config.json", f"{UNET}.bin", "text_encoder/pytorch_model.bin")
    with refused(r"somebody/old/unet holds pickled weights only .*pass --allow-pickle if you"):
        load_teacher("somebody/old")
    online(*(f"{part}/model.fp16.safetensors" for part in ("unet", "text_encoder", "vae")))
    with refused("somebody/half/unet holds weights of variant fp16 only; got no --variant"):
        load_teacher("somebody/half")
    (tmp_path / "index.json").write_text(json.dumps({"_class_name": "KolorsPipeline"}))
    online(index=tmp_path / "index.json")
    with refused(r"unsupported pipeline class 'KolorsPipeline'; expected one of .*Stable"):
        load_teacher("somebody/flux")

    def refuse(*names, revision):
        raise GatedRepoError("403", response=httpx.Response(403, request=httpx.Request("GET", "https://x")))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with refused(r"Accept its terms at https://huggingface\.co/somebody/gated, and log in"):
        load_teacher("somebody/gated")


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_a_download_is_asked_for_safetensors_of_what_is_used(online, monkeypatch, sd, allow_pickle):
    asked = {}
    online()
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name, **options: asked.update(options) or sd)
    load_teacher("somebody/tiny", variant="fp16", revision="v1", allow_pickle=allow_pickle)
    assert asked == {
        "revision": "v1", "variant": "fp16", "use_safetensors": None if allow_pickle else True,
        "safety_checker": None, "feature_extractor": None, "image_encoder": None,
    }  # fmt: skip


# Pickles, variants, shards.


class Bomb:
    """A pickle that leaves a folder behind when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def bomb(tmp_path):
    yield pickle.dumps(Bomb(tmp_path / "mark"), protocol=2)
    assert not (tmp_path / "mark").exists()


def test_pickled_weights_are_refused_unless_allowed(folder, sd):
    expected = predictions(load_teacher(sd))
    pickle_weights(folder)
    with refused(r"unet holds pickled weights only .*bin.*pass --allow-pickle if you trust"):
        load_teacher(folder)
    close(predictions(load_teacher(folder, allow_pickle=True)), expected)


@pytest.mark.parametrize("name", [f"{UNET}.bin", "text_encoder/pytorch_model.bin"])
def test_a_pickle_never_runs_even_where_pickles_are_allowed(folder, bomb, name):
    pickle_weights(folder)
    (folder / name).write_bytes(bomb)
    with refused("pass --allow-pickle if you trust"):
        load_teacher(folder)
    for content in (bomb, b"", b"version https://git-lfs.github.com/spec/v1", b"\x80\x02junkjunk"):
        (folder / name).write_bytes(content)
        with refused(rf"{name.split('/')[0]} cannot be read as (UNet2DConditionModel|CLIPTextModel)"):
            load_teacher(folder, allow_pickle=True).prompts(["a"])


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_pickle_beside_safetensors_is_not_read(folder, bomb, part):
    (folder / f"{UNET}.bin").write_bytes(bomb)
    for allow_pickle in (False, True):
        load_teacher(folder, allow_pickle=allow_pickle)
    pickle_weights(folder)
    for name in ("unet", "vae", "text_encoder"):  # other safetensors do not let it through
        save_file({"a": torch.zeros(1)}, folder / name / "lora.safetensors")
    next((folder / part).glob("*.bin")).write_bytes(bomb)
    with refused("unet cannot be read as UNet2DConditionModel"):
        load_teacher(folder)
    reader = pretrained.PartReader(torch.float32, torch.device("cpu"))
    with refused(r"text_encoder cannot be read as CLIPTextModel: .*safetensors"):
        reader.read(CLIPTextModel, folder / "text_encoder")


def test_a_variant_is_read_where_it_exists_and_only_what_is_read_is_hashed(folder):
    path, part = folder / f"{UNET}.safetensors", folder / "text_encoder"
    zeros = {name: torch.zeros_like(value) for name, value in load_file(path).items()}
    save_file(zeros, path.with_name("diffusion_pytorch_model.fp16.safetensors"), metadata={"format": "pt"})
    for name in ("README.md", "model.fp16.safetensors", "pytorch_model.bin"):
        (part / name).write_text("x")
    for variant, weights in ((None, "model.safetensors"), ("fp16", "model.fp16.safetensors")):
        reader = pretrained.PartReader(torch.float32, torch.device("cpu"), variant=variant)
        assert [file.name for file in reader.files(part)] == ["config.json", weights]
        network = load_teacher(folder, variant=variant).denoiser.network
        assert bool(next(network.parameters()).abs().sum() > 0) is (variant is None)
    path.unlink()
    with refused(r"unet holds weights of variant fp16 only; got no --variant"):
        load_teacher(folder)
    for name, variant in (
        ("model.safetensors", None), ("model-00001-of-00002.safetensors", None),
        ("model.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "fp16"),
        ("diffusion_pytorch_model.non_ema.bin", "non_ema"),
    ):  # fmt: skip
        assert pretrained._variant(name) == variant


def test_sharded_weights_load(folder, sd):
    unet = UNet2DConditionModel.from_pretrained(sd / "unet")
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="50KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    close(predictions(load_teacher(folder)), predictions(load_teacher(sd)))


def test_tensors_that_older_versions_stored_are_no_surplus(folder, sd):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def older(weights):
        for new, name in names.items():
            weights = {key.replace(f".{new}.", f".{name}."): value for key, value in weights.items()}
        assert any(".query." in name for name in weights)
        return weights

    extra = {"text_model.embeddings.position_ids": torch.arange(16)[None],
             "text_projection.weight": torch.ones(4, 4)}  # fmt: skip
    reweigh(folder / f"{CLIP}.safetensors", lambda weights: {**weights, **extra})
    reweigh(weights_in(folder / "vae"), older)
    close(predictions(load_teacher(folder)), predictions(load_teacher(sd)))
    images = torch.rand(1, 3, 16, 16)
    close(load_teacher(folder).encode(images), load_teacher(sd).encode(images))


# Damaged and foreign folders.


def editing(file, **changes):
    return lambda folder: edit(folder / file, **changes)


def writing(file, content):
    return lambda folder: (folder / file).write_bytes(content)


def removing(place):
    def remove(folder):
        shutil.rmtree(folder / place) if (folder / place).is_dir() else (folder / place).unlink()

    return remove


def saving(part, build):
    return lambda folder: build().save_pretrained(folder / part)


def lacking_a_tensor(part):
    def change(weights):
        return {name: value for name, value in weights.items() if name != min(weights)}

    return lambda folder: reweigh(weights_in(folder / part), change)


def half(folder):
    file = folder / f"{UNET}.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def more_tensors(folder):
    reweigh(folder / f"{UNET}.safetensors", lambda weights: {**weights, "more.weight": torch.ones(2)})


INDEX, SCHEDULER, VAE = "model_index.json", "scheduler/scheduler_config.json", "vae/config.json"
CANNOT, PLACE = "unet cannot be read as UNet2DConditionModel", r"tensors, such as .* no place for"
EMPTY, VOCABULARY = r"{} holds no weights: .* it is empty or missing", r"tokenizer holds no vocabulary: "
WEIGHTS = {"unet": f"{UNET}.safetensors", "vae": "vae/diffusion_pytorch_model.safetensors",
           "text_encoder": f"{CLIP}.safetensors"}  # fmt: skip
DAMAGE = [
    *((removing(file), rf"{part} holds no weights: expected \*\.safetensors, and it holds config")
      for part, file in WEIGHTS.items()),
    *((removing(part), EMPTY.format(part)) for part in WEIGHTS),
    *((writing(f"{UNET}.safetensors", content), CANNOT) for content in (b"", b"not a tensor")), (half, CANNOT),
    *((lacking_a_tensor(part), rf"{part} .*{name}") for part, name in
      (("unet", "conv_in"), ("vae", "conv_in"), ("text_encoder", "position_embedding"))),
    (more_tensors, rf"the weights in .*unet have \d+ {PLACE}"),
    (editing("text_encoder/config.json", num_hidden_layers=1), rf"weights in .*text_encoder have \d+ {PLACE}"),
    (editing("unet/config.json", cross_attention_dim=48), CANNOT),
    (removing("tokenizer/tokenizer.json"), VOCABULARY + "expected"),
    (removing("tokenizer"), VOCABULARY + ".*got nothing"),
    *((writing("tokenizer/tokenizer.json", text), r"holds no vocabulary|cannot read .*tokenizer\.json")
      for text in (b"", b"{")),
    (writing("tokenizer/tokenizer.json", b'{"model": 3}'), "tokenizer cannot be read as CLIPTokenizer"),
    (editing("tokenizer/tokenizer_config.json", model_max_length=10**30),
     r"model_max_length must be the most tokens of a prompt.*; got 10+"),
    *((editing(INDEX, _class_name=name), r"unsupported pipeline class .*; expected one of .*DDIMPipeline")
      for name in ("KolorsPipeline", "StableDiffusionInpaintPipeline", ["my_code", "MyPipeline"], None)),
    *((editing(INDEX, tokenizer=name), r"unsupported tokenizer: .*; expected a tokenizer of transformers")
      for name in (["tokenizer", "MyTokenizer"], ["transformers", "CLIPModel"], [None, None])),
    (editing(INDEX, text_encoder=[None, None]), "lacks text_encoder, without which there are no prompts"),
    (writing(INDEX, b"[]"), r"model_index\.json must hold a JSON object; got list"),
    (writing(INDEX, b"{"), r"cannot read .*model_index\.json"),
    (editing(SCHEDULER, prediction_type="score"),
     "unknown prediction_type 'score' of DDIMScheduler; expected epsilon, v_pre"),
    (editing(SCHEDULER, beta_schedule="round"), "unknown beta_schedule 'round' of DDIMScheduler"),
    (saving("scheduler", EDMEulerScheduler), "EDMEulerScheduler is neither of the DDPM nor the flow-matching"),
    (saving("scheduler", FlowMatchEulerDiscreteScheduler), "needs a DDPM-like scheduler; got FlowMatchEuler"),
    (removing(SCHEDULER), r"has no scheduler/scheduler_config\.json"),
    (saving("unet", partial(tiny.text_unet, in_channels=9)),
     "maps 9 channels to 4: it learned its variance, or takes an image"),
    (saving("unet", partial(tiny.text_unet, time_cond_proj_dim=8)), "model that is told the guidance scale"),
    (editing(VAE, latents_mean=[0.0] * 4, latents_std=[1.0] * 4), "latents normalised per channel"),
    (editing(VAE, _class_name="AutoencoderKLMochi"), "AutoencoderKLMochi; expected one of AutoencoderKL,"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_damaged_and_foreign_folders_are_refused(folder, number):
    """A missing tensor is not filled with random numbers, and a tokenizer without tokens is not made up."""
    change, message = DAMAGE[number]
    change(folder)
    with refused(message):
        load_teacher(folder).prompts(["a"])


def test_folders_of_something_else_are_no_pipelines(sd, tmp_path):
    alone = "it holds a UNet2DConditionModel alone. Pass what save_pretrained wrote"
    for folder, message in (
        (sd / "unet", alone),
        (tmp_path, "is not a pipeline's folder: it holds no model_index"),
    ):
        with refused(message):
            load_teacher(folder)


def test_a_family_is_found_by_the_name_of_its_file():
    names = [module.name for module in pkgutil.iter_modules(families.__path__)]
    assert "stable_diffusion_xl" in names
    for name in names:
        family = importlib.import_module(f"{families.__name__}.{name}").FAMILY
        assert families.family_of({"_class_name": family.pipeline}) is family


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_every_beta_schedule_is_diffusers_own(schedule):
    for settings in ({}, {"rescale_betas_zero_snr": True}, {"num_train_timesteps": 400, "beta_end": 0.01}):
        scheduler = DDPMScheduler(beta_schedule=schedule, **settings)
        found, kind = pretrained.read_schedule(dict(scheduler.config))
        assert torch.equal(found.alphas_cumprod, scheduler.alphas_cumprod.double())
        assert kind == "eps"
    own = DDPMScheduler(trained_betas=[0.1, 0.2, 0.3])
    assert isinstance(pretrained.read_schedule(dict(own.config))[0], VariancePreserving)


def test_a_fingerprint_is_of_names_contents_and_facts_and_made_once(tmp_path, monkeypatch):
    one, two = tmp_path / "one" / "file", tmp_path / "two" / "file"
    for file in (one, two):
        file.parent.mkdir()
        file.write_text("content")
    prints = [pretrained.fingerprint(files, *facts) for files, *facts in (([one],), ([two],), ([one], ["fact"]))]
    one.write_text("changed")
    prints.append(pretrained.fingerprint([one]))
    one.rename(one.with_name("renamed"))
    prints.append(pretrained.fingerprint([one.with_name("renamed")]))
    assert len(set(prints)) == 5
    monkeypatch.setattr(hashlib, "file_digest", lambda *names: pytest.fail("hashed again"))
    assert pretrained.fingerprint([one.with_name("renamed")]) == prints[-1]


# Before weights are read.


def sd3_shift(value):
    def build(folder):
        tiny.sd3(with_t5=False).save_pretrained(folder)
        edit(folder / SCHEDULER, shift=value)

    return build


BUILDS = {
    "sd": lambda folder: tiny.sd().save_pretrained(folder), "pixels": lambda f: tiny.pixels().save_pretrained(f),
    "timestep": lambda folder: tiny.pixels(class_embed_type="timestep").save_pretrained(folder),
    "any size": lambda folder: tiny.pixels(sample_size=None).save_pretrained(folder),
    "sd3": sd3_shift(3.0), **{f"sd3 {shift}": sd3_shift(shift) for shift in (0, -1, None)},
}  # fmt: skip


@pytest.mark.parametrize(("model", "options", "message"), [
    *(("sd", {"device": name}, f"device must be one that is here, such as cpu; got '{name}'")
      for name in ("gpu", "cuda:99")),
    *(("sd", {"size": size}, r"size must be in multiples of 2 pixels; got") for size in (33, (32, 31), 0, -2)),
    ("sd", {"size": (8, 8, 8)}, r"whole number of pixels, or \(height, width\); got \(8, 8, 8\)"),
    ("sd", {"size": 8.5}, "whole number of pixels"), ("sd", {"tiny_vae": "tiny", "tiling": True}, "tiling is for"),
    ("sd", {"tiny_vae": "other"}, "the autoencoder has 8 channels, the network 4"),
    *(("sd", {"dtype": dtype}, r"dtype must be one of torch.float16, .*; got")
      for dtype in (torch.int8, torch.float8_e4m3fn, "fp16", None)),
    ("sd", {"vae_dtype": torch.int64}, r"dtype must be one of .*; got torch\.int64"),
    *(("pixels", {name: True}, f"without an autoencoder; leave out {name}")
      for name in ("tiny_vae", "tiling", "slicing")),
    ("pixels", {"size": 9}, "size must be in multiples of 2 pixels; got 9 x 9"),
    ("timestep", {}, "embeds its classes as 'timestep'; expected class numbers"),
    ("any size", {}, r"does not say the size of its images. Pass --size"),
    ("sd3", {"size": 36}, "size must be at most 32 pixels here; got 36 x 36"),
    ("sd3", {"size": 30}, r"size must be in multiples of 4 pixels; got 30 x 30"),  # two latents are one patch
    *((f"sd3 {shift}", {}, "shift must be a number above 0, such as 3; got") for shift in (0, -1, None)),
])  # fmt: skip
def test_what_json_files_tell_is_said_before_weights_are_read(tmp_path, monkeypatch, model, options, message):
    BUILDS[model](tmp_path / "model")
    tiny.tiny_vae().save_pretrained(tmp_path / "tiny")
    tiny.tiny_vae(channels=8).save_pretrained(tmp_path / "other")
    monkeypatch.setattr(pretrained.PartReader, "read", lambda *parts: pytest.fail("read"))
    monkeypatch.chdir(tmp_path)
    with refused(message):
        load_teacher(tmp_path / "model", **options)


def test_a_model_of_any_size_takes_the_one_it_is_given(tmp_path):
    BUILDS["any size"](tmp_path)
    assert load_teacher(tmp_path, size=(8, 16)).shape == (3, 8, 16)
