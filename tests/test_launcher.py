"""What ``accelerate config`` sets is honoured or refused; ranks that differ are told so at the start."""

import copy
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from refusals import refused
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import scorefield.commands.command as command
import scorefield.commands.evaluate as evaluate
import scorefield.commands.features as features
import scorefield.commands.sample as sample
import scorefield.training.identity as starting
import toyworld.demo as demo
import toyworld.evaluate
import toyworld.students
from scorefield.commands.options import Evaluate, Sample, TrainFeatures
from scorefield.denoiser import NetworkDenoiser, unwrap
from scorefield.schedule import RectifiedFlow
from scorefield.training import ranks
from scorefield.training.identity import check_earlier, check_ranks, code_hash, note_identity
from scorefield.training.launcher import PLACES, check_drawing, check_launcher, check_places
from scorefield.training.loop import EMA
from scorefield.training.options import RunOptions, check_run
from scorefield.training.ranks import is_ddp
from scorefield.training.run import start
from toyworld.options import Demo, EvaluatePipeline, EvaluateStudents

ROOT = Path(__file__).resolve().parent.parent

# What `accelerate launch --num_processes 1` sets of its own accord.
PLAIN = {
    "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False", "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False", "ACCELERATE_CPU_AFFINITY": "False",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_USE_CPU": "True",
}  # fmt: skip


@pytest.mark.parametrize(("name", "value", "message"), [
    ("DYNAMO_BACKEND", "EAGER", "--compile"), ("DYNAMO_BACKEND", "inductor", "--dynamo_backend no"),
    ("MIXED_PRECISION", "bf16", "Pass --precision bf16"), ("MIXED_PRECISION", "fp16", "float32 or bf16 only"),
    ("MIXED_PRECISION", "fp8", "float32 or bf16 only"),
    ("GRADIENT_ACCUMULATION_STEPS", "4", "Pass --accumulate 4"),
    ("USE_FSDP", "true", "--shard N"), ("USE_DEEPSPEED", "1", "--multi_gpu, and pass --shard N"),
    ("USE_MEGATRON_LM", "True", "--shard N"), ("DOWNCAST_BF16", "true", "Unset it"),
    ("USE_PARALLELISM_CONFIG", "true", "Unset it"), ("OF_A_LATER_VERSION", "yes", "Unset it"),
])  # fmt: skip
def test_settings_that_would_change_the_run_are_refused(name, value, message):
    with refused(f"(?s)ACCELERATE_{name}.*{message}"):
        check_launcher("no", 1, {**PLAIN, f"ACCELERATE_{name}": value})


@pytest.mark.parametrize(
    ("settings", "precision", "accumulate"),
    [
        ({}, "no", 1), ({}, "bf16", 1), ({}, "no", 8), ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "bf16", 1),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "no", 4), ({"ACCELERATE_LOG_LEVEL": "INFO"}, "no", 1),
        ({"OTHER_USE_FSDP": "true"}, "no", 1), ({"ACCELERATE_USE_FSDP": "false"}, "no", 1),
    ],
)  # fmt: skip
def test_settings_that_agree_are_honoured(settings, precision, accumulate):
    check_launcher(precision, accumulate, {**PLAIN, **settings})


@pytest.mark.parametrize(("told", "said"), [
    ({"RANK": ""}, "RANK is ''"), ({"RANK": "abc"}, "RANK is 'abc'"), ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x'"),
    ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"), ({"RANK": "1"}, "RANK is 1 of 1 processes"),
    ({"LOCAL_RANK": "0"}, "LOCAL_RANK is 0 in the environment, without"),
    ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2 in the environment, without"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2"), ({"PMI_SIZE": "4"}, "PMI_SIZE is 4"),
    ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "tcp://a"}, "WORLD_SIZE is 2"),
    ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK is 2 of 2"),
])  # fmt: skip
def test_a_place_among_processes_that_says_nothing_is_refused_by_every_command(told, said, monkeypatch, capsys):
    for name in (*PLACES, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    check_places()
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        command.run(lambda config: None, RunOptions, arguments=["--dry-run"])
    assert stopped.value.code == 2
    words = capsys.readouterr().err
    assert said in words
    assert words.count("\n") == 1


def test_ranks_that_a_launcher_has_placed_are_let_pass():
    for rank in "01":
        check_places({"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"})
    check_places({"RANK": "0", "WORLD_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "1", "MASTER_PORT": "tcp://a"})


@pytest.mark.parametrize("name", ["MIXED_PRECISION", "USE_FSDP", "USE_DEEPSPEED", "TORCH_DEVICE"])
def test_samples_are_drawn_as_their_command_says(name, monkeypatch, tmp_path):
    value = {"MIXED_PRECISION": "bf16", "TORCH_DEVICE": "nonsense"}.get(name, "true")
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with refused(f"the launcher sets ACCELERATE_{name}={value}: "):
        sample.main(Sample(teacher="nowhere", out=tmp_path / "out"))
    check_drawing("bf16", {**PLAIN, "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "EAGER"})


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:77"])
def test_a_device_of_the_launcher_that_is_not_here_is_refused(device, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", device)
    with refused(f"the launcher sets ACCELERATE_TORCH_DEVICE={device}: device must be one that is here"):
        start(RunOptions(out=tmp_path / "run"))


@pytest.mark.parametrize(("main", "config"), [
    (evaluate.main, Evaluate(generated="a", reference="b", features=Path("c"), device="cpu")),
    (features.main, TrainFeatures(device="cpu")), (demo.main, Demo()),
    (toyworld.evaluate.main, EvaluatePipeline(device="cpu")),
    (toyworld.students.main, EvaluateStudents(students=(Path("a"),), device="cpu")),
])  # fmt: skip
def test_commands_of_one_process_say_so_to_a_launcher(main, config, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    with refused("works in one process, and a launcher has started 2"):
        main(config)
    assert not list(tmp_path.iterdir())


def test_words_that_move_a_cursor_never_reach_the_parser(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.run(lambda config: None, RunOptions, arguments=["--report-to", "\x1b[2J"])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert r"the word '\x1b[2J' holds control characters" in said.err
    command.refuse_control(["a red\nmug\t", "\udcff", "\u200d"])


def test_a_run_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    with pytest.raises(SystemExit) as stopped:
        command.run(check_run, RunOptions, arguments=["--out", str(tmp_path / "run")])
    assert stopped.value.code == 2
    assert "ACCELERATE_DYNAMO_BACKEND" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_equal_accumulation_is_left_to_the_loop(monkeypatch, tmp_path, accelerator):
    """Accelerate's own would count blocks, not phases."""
    import scorefield.training.run as running

    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    assert running.start(RunOptions(out=tmp_path, accumulate=4)).gradient_accumulation_steps == 1


class Compiled(nn.Module):
    """What ``torch.compile`` returns, without its imports."""

    def __init__(self, network):
        super().__init__()
        self._orig_mod = network


@pytest.fixture
def ddp():
    """One process's group, so that DDP can wrap."""
    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:29517", rank=0, world_size=1)
    yield DistributedDataParallel
    torch.distributed.destroy_process_group()


def test_compiled_and_wrapped_networks_are_found_inside(ddp):
    network = nn.Linear(2, 2)
    for wrapped in (network, Compiled(network), ddp(network), Compiled(ddp(network)), ddp(Compiled(network))):
        assert unwrap(wrapped) is network
        assert NetworkDenoiser(wrapped, RectifiedFlow(), "x0").unwrapped().network is network
        assert EMA(copy.deepcopy(wrapped) if wrapped is network else wrapped).network.state_dict().keys() == {
            "weight", "bias"
        }  # fmt: skip
    assert [is_ddp(x) for x in (network, Compiled(network), ddp(network), Compiled(ddp(network)))] == [0, 0, 1, 1]


class TwoRanks:
    """Stands for the first of two ranks."""

    num_processes, process_index, is_main_process, device = 2, 0, True, torch.device("cpu")


OWN = {"student_lr": 1e-3, "data": "a", "only": None}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"student_lr": 2e-3}, "student_lr: 0.001, 0.002. Fix"), ({"data": "b"}, 'data: "a", "b". Fix'),
        ({"more": 1}, "more: None, 1. Fix"), ({}, None),
    ],
)  # fmt: skip
def test_ranks_that_differ_are_told_in_what(monkeypatch, other, said):
    def gather(own):
        return [*own, {name: json.dumps(value) for name, value in {**OWN, **other}.items()}]

    monkeypatch.setattr(ranks, "gather_object", gather)
    if said is None:
        ranks.check_same_fields(OWN, "Fix", TwoRanks())
    else:
        with refused(re.escape(f"the 2 ranks of a run must be alike; they differ in {said}")):
            ranks.check_same_fields(OWN, "Fix", TwoRanks())


def test_a_rank_may_find_its_files_elsewhere_but_not_run_another_code(monkeypatch, tmp_path):
    """Compared as soon as there is an Accelerator: what would make ranks wait for each other for ever."""
    seen = []
    monkeypatch.setattr(starting, "check_same_fields", lambda own, fix, accelerator: seen.append(own))
    check_ranks(RunOptions(out=tmp_path, seed=3), TwoRanks())
    assert seen[0]["seed"] == 3
    assert seen[0]["code"] == code_hash()
    assert "out" not in seen[0]


def test_the_code_has_one_hash_of_all_packages():
    assert code_hash() == code_hash()
    assert len(code_hash()) == 16
    assert all(map(find_spec, starting.PACKAGES))
    assert set(starting.PACKAGES) == {path.parent.name for path in ROOT.glob("*/py.typed")}


def test_results_without_checkpoints_belong_to_the_run_that_made_them(tmp_path):
    """``rm -r checkpoints`` and other options: the first run's results stay."""
    own = {"width": 64, "sizes": (1, 2), "data": "a"}
    check_earlier(tmp_path, ("teacher",), own)
    (tmp_path / "teacher").mkdir()
    with refused("holds teacher of another run"):
        check_earlier(tmp_path, ("teacher",), own)
    (tmp_path / "config.json").write_text("{}")  # such as of a model that lies here
    with refused("holds config.json of another run"):
        check_earlier(tmp_path, (), own)
    note_identity(tmp_path, own)
    check_earlier(tmp_path, ("teacher",), own)
    with refused("choose another --out"):
        check_earlier(tmp_path, ("teacher",), {**own, "width": 32})
    (tmp_path / "checkpoints" / "step-000000003").mkdir(parents=True)
    check_earlier(tmp_path, ("teacher",), {**own, "width": 32})  # the checkpoint says more
