"""What fits where: few blocks stand for all, terms add up, and the page holds what the code counts."""

from functools import partial
from types import SimpleNamespace

import pytest
import scaling_bytes as counted
import tiny_transformers as tiny
from families_bytes import Model
from scaling_bytes import Counted, Options, Size
from torch import nn

from scorefield.training.memory import Activations, Role


@pytest.mark.slow
def test_activations_of_few_blocks_continue_to_those_of_all(monkeypatch):
    settings = {name: value for name, value in tiny.flux().transformer.config.items() if name[0] != "_"}
    model = Model("tiny", "FluxPipeline", settings={**settings, "num_layers": 4, "num_single_layers": 5})
    cond = {"encoder_hidden_states": (7, 32), "pooled_projections": (32,), "guidance": ()}
    size = Size((4, 32, 32), cond, ("num_layers", "num_single_layers"), guided=False)
    monkeypatch.setitem(counted.SIZES, "tiny", size)
    config = counted.settings_of(Options(rank=4), lora=True)
    few, whole = (counted.continued(model, config, whole) for whole in (False, True))
    assert few.keys() == whole.keys() == {"update of the student", "update of the fake score"}
    for name, found in whole.items():
        assert few[name].kept == pytest.approx(found.kept, rel=0.01)
        assert few[name].most == pytest.approx(found.most, rel=0.05)


def test_terms_add_up_and_the_smallest_card_leaves_room():
    gib = 2**30
    roles = {"teacher": Role(9, 4 * gib), "student": Role(1, gib, gib, 2 * gib), "fake": Role(1, gib, gib, gib)}
    found = Counted(roles, {"a": Activations(1, 2 * gib), "b": Activations(3, gib)})
    assert (found.bytes(), found.bytes(offload=True)) == (13 * gib, 10 * gib)
    assert (found.kept, found.most) == (3, 2 * gib)
    assert [found.part(name) for name in ("weights", "gradients", "states")] == [2 * gib, 2 * gib, 3 * gib]
    assert [counted.card(size * gib) for size in (7, 8, 23, 80)] == ["8", "16", "24", "none"]
    assert counted.beside_bar(9 * gib, gib, gib, bar=9) == "9: kept"
    assert counted.beside_bar(10 * gib, gib, 10 * gib, bar=9) == "9: **missed**, kept with 8-bit AdamW"
    assert counted.beside_bar(10 * gib, 10 * gib, 10 * gib, bar=9) == "9: **missed**"
    assert counted.beside_bar(10 * gib, gib, gib, bar=0) == "-"


def test_a_rank_of_pieces_holds_its_share_and_the_largest_block(monkeypatch):
    """Blocks of 2, 3 and 1 times 4 x 4 weights beside a layer of 2 x 4 that lies in none."""
    linear = partial(nn.Linear, 4, 4, bias=False)
    made = [nn.Sequential(*(linear() for _ in range(number))) for number in (2, 3, 1)]
    network = nn.ModuleDict({"first": nn.Linear(2, 4, bias=False), "blocks": nn.ModuleList(made)})
    assert counted.largest_block(network) == 3 * 16
    roles = {"student": Role(1, 4000, 2000, 2000)}
    teacher = SimpleNamespace(denoiser=SimpleNamespace(network=network))
    monkeypatch.setattr(counted, "count", lambda *_: Counted(roles, {}))
    monkeypatch.setattr(counted, "networks_of", lambda *_: (teacher, {"student": network}))
    assert counted.in_pieces("SDXL", 8, Options()) == 8000 // 8 + 8 * 3 * 16


@pytest.mark.slow
def test_the_page_holds_the_weights_that_are_counted():
    page = counted.PAGE.read_text()
    rows = page.partition(counted.MARKS["terms"][0])[2].partition(counted.MARKS["terms"][1])[0].splitlines()
    assert tuple(row.split("|")[1].strip() for row in rows[2:]) == counted.TERMS
    held = counted.held(*counted.networks_of("SDXL", "lora", Options()), "nf4", "adamw")
    cells = [cell.strip() for cell in rows[2].split("|")[2:6]]
    parts = [sum(getattr(role, part) for key, role in held.items() if key != "teacher")
             for part in ("weights", "gradients", "states")]  # fmt: skip
    assert cells == [counted.gib(x) for x in (held["teacher"].weights, *parts)], "run the command above the table"
