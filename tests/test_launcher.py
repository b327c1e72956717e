"""What ``accelerate config`` sets is honoured or refused; ranks that differ are told so at the start."""

import copy
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import scorefield.commands.command as command
import scorefield.training.identity as starting
from scorefield.denoiser import NetworkDenoiser, unwrap
from scorefield.schedule import RectifiedFlow
from scorefield.training import ranks
from scorefield.training.identity import check_earlier, check_ranks, code_hash, note_identity
from scorefield.training.launcher import check_launcher
from scorefield.training.loop import EMA
from scorefield.training.options import RunOptions, check_run
from scorefield.training.ranks import is_ddp

ROOT = Path(__file__).resolve().parent.parent

# What `accelerate launch --num_processes 1` sets of its own accord.
PLAIN = {
    "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False", "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False", "ACCELERATE_CPU_AFFINITY": "False",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_USE_CPU": "True",
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ACCELERATE_DYNAMO_BACKEND": "EAGER"}, "--compile"),
        ({"ACCELERATE_DYNAMO_BACKEND": "inductor"}, "--dynamo_backend no"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "Pass --precision bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "float32 or bf16 only"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "float32 or bf16 only"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "Pass --accumulate 4"),
        ({"ACCELERATE_USE_FSDP": "true"}, "--multi_gpu"),
        ({"ACCELERATE_USE_DEEPSPEED": "1"}, "--multi_gpu"),
        ({"ACCELERATE_USE_MEGATRON_LM": "True"}, "--multi_gpu"),
        ({"ACCELERATE_DOWNCAST_BF16": "true"}, "Unset it"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "Unset it"),
        ({"ACCELERATE_OF_A_LATER_VERSION": "yes"}, "Unset it"),
    ],
)
def test_settings_that_would_change_the_run_are_refused(settings, message):
    (name,) = settings
    with pytest.raises(ValueError, match=f"(?s){name}.*{message}"):
        check_launcher("no", 1, {**PLAIN, **settings})


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


def test_a_run_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stopped:
        command.run(check_run, RunOptions, "")
    assert stopped.value.code == 2
    assert "ACCELERATE_DYNAMO_BACKEND" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_equal_accumulation_is_left_to_the_loop(monkeypatch, tmp_path, accelerator):
    """Accelerate's own would count blocks, not phases."""
    import scorefield.training.run as fitting

    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    assert fitting.start(RunOptions(out=tmp_path, accumulate=4)).gradient_accumulation_steps == 1


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
        with pytest.raises(
            ValueError, match=re.escape(f"the 2 ranks of a run must be alike; they differ in {said}")
        ):
            ranks.check_same_fields(OWN, "Fix", TwoRanks())


def test_a_rank_may_find_its_files_elsewhere_but_not_run_another_code(monkeypatch, tmp_path):
    """Compared as soon as there is an Accelerator: what would make ranks wait for each other for ever."""
    seen = []
    monkeypatch.setattr(starting, "check_same_fields", lambda own, fix, accelerator: seen.append(own))
    check_ranks(RunOptions(out=tmp_path, seed=3), TwoRanks())
    assert seen[0]["seed"] == 3
    assert seen[0]["code"] == code_hash()
    assert "out" not in seen[0]


WORKER = """
import os, sys
from pathlib import Path
import fitting, starting
from scorefield.training.identity import identity
from distill.options import Config
rank, out = int(os.environ["RANK"]), Path(sys.argv[1])
real = starting.code_hash
for what in ("option", "code", "input", "same"):
    starting.code_hash = (lambda: "another") if what == "code" and rank else real
    config = Config(out=out, student_every=2 + rank if what == "option" else 2)
    try:
        accelerator = fitting.start(config)
        assert accelerator.num_processes == 2
        own = identity(config, accelerator, {"data": str(rank if what == "input" else 0)})
        fitting.resume(config, [], accelerator, own)
        accelerator.wait_for_everyone()  # the first rank writes
        print(f"rank {rank} {what}: {out.exists()}", flush=True)
    except ValueError as error:
        print(f"rank {rank} {what}: {out.exists()} {error}", flush=True)
"""


@pytest.mark.slow
def test_two_real_ranks_are_told_before_anything_is_written(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "train_scripts"))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words += [str(tmp_path / "worker.py"), str(tmp_path / "run")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    for rank in (0, 1):
        for start in ("option: False", "code: False", "input: False", "same: True"):
            assert f"rank {rank} {start}" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("differ in student_every: 2, 3") == 2
    assert done.stdout.count('differ in data: "0", "1"') == 2


def test_the_code_has_one_hash():
    assert code_hash() == code_hash()
    assert len(code_hash()) == 16


def test_the_hash_is_of_all_packages():
    assert all(map(find_spec, starting.PACKAGES))
    assert set(starting.PACKAGES) == {path.parent.name for path in ROOT.glob("*/py.typed")}


def test_results_without_checkpoints_belong_to_the_run_that_made_them(tmp_path):
    """``rm -r checkpoints`` and other options: the first run's results stay."""
    own = {"width": 64, "sizes": (1, 2), "data": "a"}
    check_earlier(tmp_path, ("teacher",), own)
    (tmp_path / "teacher").mkdir()
    with pytest.raises(ValueError, match="holds teacher of another run"):
        check_earlier(tmp_path, ("teacher",), own)
    note_identity(tmp_path, own)
    check_earlier(tmp_path, ("teacher",), own)
    with pytest.raises(ValueError, match="choose another --out"):
        check_earlier(tmp_path, ("teacher",), {**own, "width": 32})
    (tmp_path / "checkpoints" / "step-000000003").mkdir(parents=True)
    check_earlier(tmp_path, ("teacher",), {**own, "width": 32})  # the checkpoint says more
