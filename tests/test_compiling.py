"""What is compiled says the same as what is not, and whoever listens to a part of it still hears it."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from distill.adversarial import Critic, discriminator_head, logits_alone
from scorefield import NetworkDenoiser, VariancePreserving
from scorefield.models.lora import LoRA, recompute_activations
from scorefield.models.networks import DiffusersNetwork, ResidualMLP
from scorefield.training.compiling import compile_network, pieces

close = torch.testing.assert_close
SD = VariancePreserving.scaled_linear()


def make_unet():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
    )  # fmt: skip
    return DiffusersNetwork(unet).requires_grad_(False)


def make_critic(network, name):
    torch.manual_seed(1)
    return Critic(network, name, discriminator_head(16, 2))


def make_lora(network, told=False):
    lora = LoRA(network, rank=2, targets=["to_q", "conv1"], generator=torch.Generator().manual_seed(2))
    for name, parameter in lora.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) / 4
    if told:
        torch.manual_seed(3)
        lora.tell("camera", "model.time_embedding", nn.Linear(3, 32))
    return lora


BUILD = {
    "copy": lambda: make_unet().requires_grad_(True),
    "copy with a critic": lambda: make_critic(make_unet().requires_grad_(True), "model.mid_block"),
    "LoRA": lambda: make_lora(make_unet()),
    "LoRA with a critic": lambda: make_critic(make_lora(make_unet()), "backbone.model.mid_block"),
    "LoRA that is told": lambda: make_lora(make_unet(), told=True),
}  # fmt: skip


@pytest.fixture
def compiled(monkeypatch):
    """Modules that were compiled, and how often code was made; without the inductor, which takes minutes."""
    plain, kept = nn.Module.compile, {"modules": [], "graphs": 0}

    def backend(graph, inputs):
        kept["graphs"] += 1
        return graph.forward

    def compile_it(module):
        kept["modules"].append(module)
        plain(module, backend=backend)

    torch.compiler.reset()
    monkeypatch.setattr(nn.Module, "compile", compile_it)
    yield kept
    torch.compiler.reset()


def answers(network, told, batch=2):
    """Return outputs of a pass, the gradients, and a critic's logits alone."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(batch, 4, 8, 8, generator=generator)
    t = torch.arange(batch) * 100 + 50
    cond = {"encoder_hidden_states": torch.randn(batch, 5, 8, generator=generator)}
    if told:
        cond["camera"] = torch.randn(batch, 3, generator=generator)
    outputs = network(x, t, **cond)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    loss = sum(output.square().mean() for output in outputs)
    learned = [p for p in network.parameters() if p.requires_grad]
    found = [*outputs, *torch.autograd.grad(loss, learned)]
    if isinstance(network, Critic):
        found.append(logits_alone(NetworkDenoiser(network, SD), x, t, cond))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "recompute"), [*((kind, False) for kind in BUILD), ("LoRA", True), ("LoRA with a critic", True)]
)
def test_compiled_networks_answer_and_learn_as_before(kind, recompute, compiled):
    """With batches of two sizes, and again by a copy, which is not compiled."""
    network = BUILD[kind]()
    if recompute:
        inner = getattr(network, "network", network) if isinstance(network, Critic) else network
        recompute_activations(getattr(inner, "backbone", inner))
    told = "told" in kind
    expected = [answers(network, told, batch) for batch in (2, 3)]
    compile_network(network)
    for batch, wanted in zip((2, 3), expected, strict=True):
        close(answers(network, told, batch), wanted, rtol=1e-4, atol=1e-6)
    assert compiled["graphs"]
    made = compiled["graphs"]
    close(answers(copy.deepcopy(network), told), expected[0], rtol=1e-4, atol=1e-6)
    assert compiled["graphs"] == made


def names_of(network, found):
    inner = getattr(network, "network", network)
    names = {id(module): name for name, module in getattr(inner, "backbone", inner).named_modules()}
    return {names.get(id(module)) for module in found}


@pytest.mark.parametrize("kind", ["copy with a critic", "LoRA with a critic"])
def test_a_critic_leaves_open_what_it_hears_and_all_round_it(kind):
    network = BUILD[kind]()
    found = list(pieces(network))
    assert names_of(network, found) - {None} == {
        "model.time_embedding",
        "model.down_blocks.0", "model.down_blocks.1", "model.up_blocks.0", "model.up_blocks.1",
        "model.mid_block.attentions.0", "model.mid_block.resnets.0", "model.mid_block.resnets.1",
    }  # fmt: skip
    assert network.head in found  # which is none of the network's


def test_what_a_lora_is_told_stays_open_for_it():
    network = BUILD["LoRA that is told"]()
    assert "model.time_embedding" not in names_of(network, pieces(network))


def test_where_nobody_listens_the_network_is_compiled_whole(compiled):
    for network in (make_unet(), make_lora(make_unet()), ResidualMLP((1, 8, 8), 10, width=32, depth=2)):
        compile_network(network)
        assert compiled["modules"][-1] is getattr(network, "backbone", network)
    assert len(compiled["modules"]) == 3


def test_all_pieces_find_room_for_their_code(compiled, monkeypatch):
    """Eight variants of one code are all that torch makes by default, and all calls of modules are one code."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    monkeypatch.setattr(torch._dynamo.config, "accumulated_recompile_limit", 256)
    network = BUILD["copy with a critic"]()
    compile_network(network)
    assert torch._dynamo.config.recompile_limit >= 8 * len(compiled["modules"]) == 8 * 9
    assert torch._dynamo.config.accumulated_recompile_limit >= torch._dynamo.config.recompile_limit
