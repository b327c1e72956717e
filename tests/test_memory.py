"""Bytes that are predicted of shapes alone are those that training then holds."""

import math

import pytest
import tiny_pipelines
import tiny_transformers
import torch
from measure import saved_bytes
from torch import nn

from distill.adversarial import discriminator_head
from scorefield.denoiser import NetworkDenoiser, freeze
from scorefield.models.families import family_of
from scorefield.models.lora import LAYERS, recompute_activations, shared_backbone
from scorefield.models.networks import DiffusersNetwork
from scorefield.models.teacher import load_teacher
from scorefield.schedule import RectifiedFlow
from scorefield.training.memory import Activations, Pass, Role, activations, most_bytes, predicted, role_of

WIDE = {
    "sd": {"block_out_channels": (32, 64)}, "flux": {"num_attention_heads": 4, "num_layers": 2},
    "z_image": {"dim": 64, "n_heads": 4, "n_kv_heads": 4},
}  # fmt: skip
PIPELINES = {"sd": "StableDiffusionPipeline", "flux": "FluxPipeline", "z_image": "ZImagePipeline"}
SMALL = {"sd": lambda: tiny_pipelines.sd().unet, "flux": lambda: tiny_transformers.flux().transformer,
         "z_image": lambda: tiny_transformers.z_image().transformer}  # fmt: skip


def make(name, *, wide, device="cpu"):
    """A network of a family, by its settings alone, and inputs of batch 2."""
    family, settings = family_of({"_class_name": PIPELINES[name]}), {**SMALL[name]().config}
    settings = {key: value for key, value in settings.items() if key[0] != "_"} | (WIDE[name] if wide else {})
    with torch.device(device):
        network = DiffusersNetwork(family.network(**settings), family.call, layers=family.lora)
    channels = settings["in_channels"] // (4 if name == "flux" else 1)
    conds = {
        "sd": {"encoder_hidden_states": (5, settings.get("cross_attention_dim", 1))},
        "flux": {"encoder_hidden_states": (7, 32), "pooled_projections": (32,), "guidance": ()},
        "z_image": {"texts": (32, 16)},
    }  # fmt: skip

    def ask(one, side=16):
        cond = {key: torch.ones(2, *shape) for key, shape in conds[name].items()}
        cond |= {"mask": torch.ones(2, 32, dtype=torch.long)} if name == "z_image" else {}
        return one(torch.ones(2, channels, side, side), torch.full((2,), 500.0), **cond)

    return network, ask


def measured(one, ask, networks, side):
    """Bytes that saved-tensor hooks see, by other code than the library's."""

    def steps():
        while True:
            ask(one, side).float().square().sum().backward()
            for network in networks:
                network.zero_grad()
            yield

    return saved_bytes(steps(), 1, networks)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "wide", "side"), [
    ("sd", False, 16), ("sd", True, 32), ("flux", False, 32), ("flux", True, 16), ("z_image", True, 16),
])  # fmt: skip
def test_activations_are_those_that_saved_tensor_hooks_then_see(name, wide, side, checkpointing):
    network, ask = make(name, wide=wide)
    shape, _ = make(name, wide=wide, device="meta")
    for one in (network, shape) if checkpointing else ():
        recompute_activations(one)
    found = activations(lambda: ask(shape, side).float().square(), [shape])
    wanted = measured(network, ask, [network], side)
    assert found.kept == pytest.approx(wanted, rel=0.1)
    alive = activations(lambda: ask(network, side).float().square(), [network])
    assert found.most == pytest.approx(alive.most, rel=0.1)
    assert found.most > found.kept > 0


@pytest.mark.parametrize(("name", "checkpointing"), [
    ("sd", True), ("flux", False),
    pytest.param("sd", False, marks=pytest.mark.slow), pytest.param("flux", True, marks=pytest.mark.slow),
])  # fmt: skip
def test_so_are_those_of_a_lora_in_bf16(name, checkpointing):
    """The frozen layers keep no inputs, and autocast's copies of the low-rank weights are kept."""
    made = []
    for device in ("cpu", "meta"):
        network, ask = make(name, wide=True, device=device)
        denoiser = NetworkDenoiser(freeze(network), RectifiedFlow(), "flow")
        options = {"targets": network.layers or LAYERS, "checkpointing": checkpointing}
        student, fake = shared_backbone(denoiser, rank=4, generator=torch.Generator(), **options)
        made.append((student.network, fake.network, network, ask))
    (adapted, fake, backbone, ask), (outline, *others, _) = made
    networks = [outline, others[1]]
    found = activations(lambda: ask(outline).float(), networks, precision="bf16")
    gpu = activations(lambda: ask(outline).float(), networks, precision="bf16", gpu=True)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = measured(adapted, ask, [adapted, adapted.backbone, fake, backbone], 16)
    assert found.kept == pytest.approx(wanted, rel=0.1)
    assert gpu.most > found.most, "a GPU's autocast keeps the inputs of norms in float32"


def test_a_role_counts_weights_gradients_and_two_moments():
    network = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128))
    number = 64 * 128 + 3 * 128
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    role = role_of(network)
    assert (role.number, role.weights, role.gradients) == (number, 4 * number, 4 * number)
    assert role.states == sum(x.nbytes for x in moments) == 8 * number
    assert role.bytes == 16 * number
    large, small = 64 * 128, 3 * 128  # tensors below 4,096 numbers keep whole moments
    assert role_of(network, "adamw8bit").states == 2 * (large + 4 * large // 256) + 8 * small
    frozen = role_of(freeze(network.to("meta"), torch.bfloat16))
    assert frozen == Role(number, 2 * number)


def test_the_most_of_a_training_is_all_that_stays_and_the_largest_pass():
    networks = {"teacher": Role(5, 10), "student": Role(1, 4, 4, 8), "fake": Role(1, 4, 4, 20)}
    passes = {"student": Activations(5, 15), "fake": Activations(5, 30)}
    assert most_bytes(networks, passes) == 10 + 8 + 8 + 28 + 30
    assert most_bytes(networks, passes, offload=True) == 26 + 30, "states are there when activations are gone"
    assert most_bytes(networks, {"student": Activations(1, 2)}, offload=True) == 26 + 20
    assert most_bytes(networks, {}) == 26 + 28
    networks["teacher"] = Role(5, 10, unpacked=3)
    assert most_bytes(networks, passes) == 26 + 28 + 30 + 3


def test_an_attention_that_is_not_kept_whole_is_not_counted_whole():
    """Memory grows with the number of tokens, not with its square."""
    found = []
    for side in (16, 32):
        shape, ask = make("flux", wide=False, device="meta")
        found.append(activations(lambda ask=ask, one=shape, side=side: ask(one, side), [shape]).kept)
    tokens = [(side // 2) ** 2 + 7 for side in (16, 32)]
    assert math.log(found[1] / found[0]) / math.log(tokens[1] / tokens[0]) < 1.05


def test_an_autoencoder_that_waits_comes_and_goes_but_for_a_gradient(monkeypatch):
    codec, moved = load_teacher("toyworld").codec.waiting("cpu"), []
    monkeypatch.setattr(codec.vae, "to", moved.append)
    x0 = codec.encode(torch.zeros(1, 3, 64, 64))
    codec.decode(x0)
    cpu = torch.device("cpu")
    assert moved == [cpu, cpu] * 2
    codec.decode(x0.detach().requires_grad_())
    assert moved == [cpu, cpu] * 2 + [cpu], "it stays for the way back"


def test_a_head_for_wide_features_is_no_wider_than_for_those_of_sdxl():
    with torch.device("meta"):
        heads = [discriminator_head(channels, 64) for channels in (1280, 3072)]
    number = [sum(parameter.numel() for parameter in head.parameters()) for head in heads]
    assert number[1] - number[0] == (3072 + 1) * 1280
    assert discriminator_head(1300, 4)(torch.zeros(2, 1300, 4, 4)).shape == (2,)


def test_a_network_whose_shapes_depend_on_numbers_is_not_predicted():
    layer = nn.Linear(4, 4, device="meta")
    x = torch.zeros(2, 4, device="meta")
    runs = {"plain": Pass(lambda: layer(x)), "odd": Pass(lambda: layer(x), lambda y: y * float(x.sum()))}
    assert predicted({"plain": runs["plain"]}, [layer], precision="no", gpu=False)["plain"].kept == x.nbytes
    assert predicted(runs, [layer], precision="no", gpu=False) == {}


def test_autocast_keeps_its_copies_of_learned_weights_until_it_ends():
    layers = [nn.Linear(256, 256, bias=False, device="meta") for _ in range(2)]
    x = torch.zeros(1, 256, device="meta")

    def ask(number):
        with torch.no_grad():
            return layers[number](x)

    def both():
        return ask(0) + ask(1)

    one, two, apart = (
        activations(lambda: ask(0), layers, precision="bf16").most,
        activations(both, layers, precision="bf16").most,
        activations(lambda: ask(0), layers, then=lambda y: ask(1), precision="bf16").most,
    )
    copy = 2 * 256 * 256
    assert copy < one < apart < copy + 4096
    assert two > 2 * copy
