"""The benchmark of a step of text-to-3D: equal gradients, what each contender does, what is counted."""

import functools
import json
from dataclasses import replace

import pytest
import sds_contenders
import sds_operations
import sds_step
import tiny_pipelines as tiny
import torch
from sds_contenders import Guide, generfacto, ours, threestudio
from sds_operations import meta_guide, operations, parts, step_operations, totals
from sds_step import PEERS, Config
from teachers import as_codec
from torch import Generator, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from scorefield.denoiser import NetworkDenoiser, freeze
from scorefield.models.networks import DiffusersNetwork
from scorefield.models.teacher import Teacher
from scorefield.schedule import VariancePreserving

SMALL = Config(num_views=2, size=8, rounds=1, warmup=0, iterations=1)
B, SIDE = 2, 16


@pytest.fixture(scope="module")
def networks():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {"sd21_unet": tiny.text_unet(), "sd_vae": tiny.vae(), "taesd": tiny.tiny_vae()}


@pytest.fixture(scope="module")
def configs(networks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, network in networks.items():
        settings = {"_class_name": type(network).__name__, **network.config}
        (folder / f"{name}.json").write_text(json.dumps(settings))
    return folder


def real_guide(networks, vae="sd_vae"):
    """The networks themselves, not their shapes."""
    unet = freeze(DiffusersNetwork(networks["sd21_unet"]))
    denoiser = NetworkDenoiser(unet, VariancePreserving.scaled_linear())
    codec = as_codec(freeze(networks[vae]))
    teacher = Teacher(denoiser=denoiser, shape=(4, SIDE // codec.factor, SIDE // codec.factor), codec=codec)
    return Guide(teacher=teacher, negative=prompt(1, 1), scale=5.0)


def prompt(batch, seed):
    generator = torch.Generator().manual_seed(seed)
    return {"encoder_hidden_states": torch.randn(batch, sds_operations.TOKENS, 32, generator=generator)}


def losses(guide):
    two_calls = generfacto(guide, two_calls=True)
    return {"ours": ours(guide), "ours, K = 3": ours(guide, 3), "threestudio": threestudio(guide),
            "generfacto": generfacto(guide), "two calls": two_calls}  # fmt: skip


def image(batch=1):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, SIDE, SIDE, generator=generator).clamp(-1, 1).requires_grad_()


@pytest.mark.slow
def test_all_contenders_start_from_the_same_gradient_or_are_refused(monkeypatch, capsys):
    errors = sds_step.gradient_errors(SMALL)
    assert errors.keys() == set(PEERS)
    assert max(errors.values()) < 1e-9
    monkeypatch.setattr(sds_contenders, "sigma_squared", lambda t, schedule: 3 * schedule.sigma(t) ** 2)
    with pytest.raises(ValueError, match=r"same gradients, .*'threestudio': (2\.0|1\.99)"):
        sds_step.main(SMALL)
    assert not capsys.readouterr().out


def test_each_does_the_work_that_it_is_named_for(networks, monkeypatch):
    """Batches through decoder and network in one step of two views; who leaves its encoder unfrozen."""
    guide, batches, copies, found = real_guide(networks), {}, [], {}
    vae, deepcopy = guide.teacher.codec.vae, sds_contenders.copy.deepcopy
    monkeypatch.setattr(
        sds_contenders.copy, "deepcopy", lambda module: copies.append(deepcopy(module)) or copies[-1]
    )
    for name, part in {"decoder": vae.decoder, "network": guide.teacher.denoiser.network}.items():
        part.register_forward_hook(lambda m, x, y, name=name: batches[name].append(len(x[0])))
    for name, loss in losses(guide).items():
        batches |= {"decoder": [], "network": []}
        loss(image(B), prompt(B, 2), Generator()).backward()
        found[name] = (batches["decoder"], batches["network"])
    assert found == {
        "ours": ([], [2 * B]), "ours, K = 3": ([], [3 * 2 * B]), "threestudio": ([B], [2 * B]),
        "generfacto": ([], [2 * B]), "two calls": ([], [B, B]),
    }  # fmt: skip
    assert len(copies) == 2
    assert all(p.grad is not None for vae in copies for p in vae.encoder.parameters())
    for network in (guide.teacher.codec.vae, guide.teacher.denoiser.network):
        assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    with pytest.raises(ValueError, match="no encoder"):
        generfacto(replace(guide, teacher=replace(guide.teacher, codec=None)))
    scene = sds_contenders.new_scene()
    before = [p.detach().clone() for p in scene.parameters()]
    next(sds_contenders.training(ours(guide), scene, prompt(4, 3), num_views=1, size=8))
    assert all(not torch.equal(old, p) for old, p in zip(before, scene.parameters(), strict=True))


@pytest.mark.slow
def test_it_reports_every_contender_and_ratio(tmp_path, capsys, configs, monkeypatch):
    monkeypatch.setattr(sds_operations, "DRAWS", (1, 2))
    tables = sds_operations.tables
    monkeypatch.setattr(sds_operations, "tables", lambda folder: tables(folder, SIDE))
    result = sds_step.main(replace(SMALL, configs=configs, out=tmp_path / "new" / "step.json"))
    assert json.loads((tmp_path / "new" / "step.json").read_text()) == result
    names = {"ours", "ours, K = 2", "ours, K = 4", *PEERS}
    for part in ("iteration", "after rendering"):
        assert result[part]["seconds"].keys() == names
        assert len(result[part]["ratios"]) == len(PEERS) + 2
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in [*names, *result["iteration"]["ratios"]])
    assert "\n".join(result["operations"]) in printed
    assert f"| step, one image of {SIDE} px | goal | K = 1 | K = 2 |" in printed
    seconds = {"ours": [1.0, 2.0], "ours, K = 2": [1.0, 1.0], "ours, K = 4": [2.0, 2.0]}
    found = sds_step.ratios(seconds | {name: [3.0, 3.0] for name in PEERS})
    assert found["2 x ours / ours, K = 2"] == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert found["threestudio / ours"] == {"median": 2.25, "low": 1.5, "high": 3.0}


def test_unusable_settings_and_missing_files_are_named(configs, tmp_path):
    for changes in ({"rounds": -1}, {"rounds": 0}, {"num_views": 0}, {"iterations": 0}):
        with pytest.raises(ValueError, match="rounds"):
            sds_step.main(replace(SMALL, **changes))
    (tmp_path / "sd21_unet.json").write_text((configs / "sd21_unet.json").read_text())
    with pytest.raises(ValueError, match=r"lacks sd_vae\.json"):
        sds_step.main(replace(SMALL, rounds=0, configs=tmp_path))


# What is counted.


def test_a_layer_that_learns_costs_a_third_pass():
    x, frozen = torch.zeros(7, 3, device="meta"), nn.Linear(3, 5, device="meta").requires_grad_(False)
    product = 2 * 7 * 3 * 5
    assert operations(lambda: frozen(x)) == product
    assert operations(lambda: frozen(x.requires_grad_()).sum().backward()) == 2 * product
    assert operations(lambda: frozen.requires_grad_()(x).sum().backward()) == 3 * product


@pytest.mark.slow
@pytest.mark.parametrize("vae", ["sd_vae", "taesd"])
def test_shapes_are_counted_as_a_real_run_is(configs, networks, vae):
    """Fused attention multiplies queries and keys once more going backward; AutoencoderKL has it in its middle."""
    real, meta = real_guide(networks, vae), meta_guide(configs, "sd21_unet", vae, SIDE)
    counted = {name: step_operations(loss, meta) for name, loss in losses(meta).items()}
    for name, loss in losses(real).items():
        step = functools.partial(lambda loss: loss(image(), prompt(1, 2), Generator()).backward(), loss)
        with sdpa_kernel(SDPBackend.MATH):
            assert counted[name] == operations(step) > 0, name
        once_more = 2 * 64**2 * 8 if vae == "sd_vae" else 0
        assert operations(step) == counted[name] + once_more, name


@pytest.mark.slow
def test_a_step_is_the_sum_of_its_parts(configs):
    full, tiny_guide = (meta_guide(configs, "sd21_unet", vae, SIDE) for vae in ("sd_vae", "taesd"))
    part, small, found = parts(full), parts(tiny_guide), totals(full, tiny_guide)
    assert found["ours"] == {k: part["encoder"] + k * part["network"] for k in (1, 2, 4)}
    assert found["ours, AutoencoderTiny"] == {k: small["encoder"] + k * small["network"] for k in (1, 2, 4)}
    assert found["threestudio, K steps"][1] == found["ours"][1] + part["decoder"]
    assert found["generfacto, K steps"][1] == part["learning encoder"] + part["network"] > found["ours"][1]
    assert found["generfacto, K steps"][4] == 4 * found["generfacto, K steps"][1]


SD21 = {
    "_class_name": "UNet2DConditionModel", "sample_size": 96, "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True,
}  # fmt: skip
VAE = {
    "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip


@pytest.mark.slow
def test_a_step_at_the_size_of_stable_diffusion_stays_within_its_budget(tmp_path):
    """In 10^12 operations for one image of 512 pixels; all other settings are diffusers' defaults."""
    for name, settings in {"unet": SD21, "full": VAE, "tiny": {"_class_name": "AutoencoderTiny"}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(settings))
    full, small = (meta_guide(tmp_path, "unet", vae, 512) for vae in ("full", "tiny"))
    found = {
        "ours": step_operations(ours(full), full), "tiny": step_operations(ours(small), small),
        "threestudio": step_operations(threestudio(full), full),
        "generfacto": step_operations(generfacto(full), full),
    }  # fmt: skip
    expected = {"ours": 3.876, "tiny": 1.853, "threestudio": 6.391, "generfacto": 4.958}
    assert {name: round(value / 1e12, 3) for name, value in found.items()} == expected
    assert found["ours"] + 2 * (64 * 64) ** 2 * 512 <= sds_operations.GOALS["ours"]
    assert found["tiny"] <= sds_operations.GOALS["ours, AutoencoderTiny"]
