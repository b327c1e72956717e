"""Checkpoints: all state comes back, kills and damage cost one at most, nobody else's file is touched."""

import hashlib
import json
import shutil
import socket
import subprocess
import warnings

import pytest
import torch
from folders import assert_same
from refusals import refused
from torch import nn

from scorefield import atomic
from scorefield.training import checkpoint
from scorefield.training.loop import EMA, Phase, train

CONFIG = {"lr": 0.01, "name": "toy", "folder": None}
FILES = ["student.safetensors", "student.ema.safetensors", "fake.safetensors", "state.pt", "config.json"]


def make_phases(seed=0):
    """A student with an average and a schedule, and a fake score without."""
    phases = []
    for i, name in enumerate(("student", "fake")):
        with torch.random.fork_rng():
            torch.manual_seed(seed + i)
            network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        optimizer = torch.optim.AdamW(network.parameters(), 0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 0.9**update)
        more = {"ema": EMA(network, 0.5), "lr_schedule": schedule} if name == "student" else {}
        loss = lambda x, rng, net=network: {"loss": (net(x) - x).square().mean()}  # noqa: E731
        phases.append(Phase(name=name, network=network, optimizer=optimizer, loss=loss, **more))
    return phases


def batches(rng):
    return torch.randn(6, 3, generator=rng("data"))


def state_of(phases):
    tensors = {}
    for phase in phases:
        networks = {"net": phase.network, **({"ema": phase.ema.network} if phase.ema else {})}
        for kind, network in networks.items():
            tensors |= {f"{phase.name}.{kind}.{name}": value for name, value in network.state_dict().items()}
        for i, slots in enumerate(phase.optimizer.state.values()):
            tensors |= {f"{phase.name}.optimizer.{i}.{name}": value for name, value in slots.items()}
        tensors[f"{phase.name}.lr"] = torch.tensor(phase.optimizer.param_groups[0]["lr"])
        if phase.lr_schedule:
            tensors[f"{phase.name}.lr_updates"] = torch.tensor(phase.lr_schedule.last_epoch)
        if phase.ema:
            tensors[f"{phase.name}.ema_updates"] = torch.tensor(phase.ema.num_updates)
    return {name: value.clone() for name, value in tensors.items()}


@pytest.fixture
def history(accelerator, tmp_path):
    """Checkpoints of steps 1 and 2 in ``tmp_path / "run"``, the phases at step 3, and the states by step."""
    phases, states = make_phases(), {}
    for report in train(phases, batches, accelerator, steps=3):
        states[report.step] = state_of(phases)
        if report.step < 3:
            checkpoint.save(tmp_path / "run", report.step, phases, CONFIG)
    return tmp_path / "run", phases, states


def load_quietly(folder, phases, config=CONFIG):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return checkpoint.load(folder, phases, config)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_all_state_comes_back_from_files_that_the_manifest_sums(history):
    folder, _, states = history
    phases, path = make_phases(seed=5), folder / "step-000000002"
    assert load_quietly(folder, phases) == 2
    assert_same(state_of(phases), states[2])
    assert names_in(path) == sorted([*FILES, "manifest.json"])
    sums = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in FILES}
    assert json.loads((path / "manifest.json").read_text()) == sums
    assert json.loads((path / "config.json").read_text()) == CONFIG
    state = torch.load(path / "state.pt", weights_only=True)
    assert (state["step"], set(state["phases"])) == (2, {"student", "fake"})


class Malice:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_pickled_code_is_never_run(history, tmp_path):
    folder, phases, _ = history
    path = folder / "step-000000002"
    torch.save({"step": 2, "phases": Malice(tmp_path / "owned")}, path / "state.pt")
    sums = json.loads((path / "manifest.json").read_text())
    sums["state.pt"] = hashlib.sha256((path / "state.pt").read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(sums))
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        checkpoint.load(folder, phases, CONFIG)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "victim", ["save_model", "torch.save", "_sha256", "atomic._flush_to_disk", "atomic.os.replace"]
)
def test_a_kill_while_writing_leaves_the_older_checkpoint_and_no_half_one(history, monkeypatch, victim):
    folder, phases, states = history
    *path, name = victim.split(".")
    module = atomic if path[:1] == ["atomic"] else checkpoint
    path = path[1:] if module is atomic else path
    for part in path:
        module = getattr(module, part)
    original, calls = getattr(module, name), []

    def killed(*arguments, **settings):
        calls.append(name)
        if len(calls) == 2 or name in ("save", "_flush_to_disk", "replace"):
            raise KeyboardInterrupt
        return original(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(folder, 3, phases, CONFIG)
    assert [name for name in names_in(folder) if name.startswith("step-")] == ["step-000000001", "step-000000002"]
    fresh = make_phases(seed=5)
    assert load_quietly(folder, fresh) == 2
    assert_same(state_of(fresh), states[2])
    checkpoint.save(folder, 3, phases, CONFIG)
    assert load_quietly(folder, fresh) == 3
    assert_same(state_of(fresh), states[3])
    assert names_in(folder) == ["step-000000002", "step-000000003"]


@pytest.mark.parametrize("keep", [1, None, 3])
def test_the_last_ones_are_kept_two_unless_told(tmp_path, keep):
    phases, steps = make_phases(), (5, 900, 10_000, 1_000_000)
    for step in steps:
        path = checkpoint.save(tmp_path, step, phases, CONFIG, **({"keep": keep} if keep else {}))
        assert path == tmp_path / f"step-{step:09d}"
    assert names_in(tmp_path) == [f"step-{step:09d}" for step in steps[-(keep or 2) :]]
    assert load_quietly(tmp_path, phases) == 1_000_000


def test_a_step_that_must_stay_outlives_those_after_it(tmp_path):
    """Such as the best one, to which a run goes back; it is not the newest, which a run resumes from."""
    phases = make_phases()
    for step in (1, 2, 3, 4, 5):
        checkpoint.save(tmp_path, step, phases, CONFIG, also=(2, 77))
    assert names_in(tmp_path) == ["step-000000002", "step-000000004", "step-000000005"]
    assert load_quietly(tmp_path, phases) == 5
    assert checkpoint.load(tmp_path, phases, CONFIG, before=3) == 2
    assert checkpoint.newest(tmp_path, before=2) is None
    checkpoint.save(tmp_path, 6, phases, CONFIG)
    assert names_in(tmp_path) == ["step-000000005", "step-000000006"], "no longer"
    checkpoint.save(tmp_path, 1, phases, CONFIG, also=(6,))
    assert names_in(tmp_path) == ["step-000000001"], "later ones are of a run that was started again"


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def empty(path):
    path.write_bytes(b"")


def test_a_run_killed_between_its_last_write_and_the_removal_ends_with_the_checkpoints_of_one_that_was_not(
    tmp_path, monkeypatch
):
    """A resumed run that saves no more removes what its last save would have removed, and nothing later."""
    phases = make_phases()
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, phases, CONFIG, also=(1,))
    with monkeypatch.context() as killed:
        killed.setattr(checkpoint, "_remove", lambda paths, kept: None)
        checkpoint.save(tmp_path, 4, phases, CONFIG, also=(1,))
        checkpoint.save(tmp_path, 5, phases, CONFIG, also=(1,))
    names = lambda: [int(path.name[5:]) for path in checkpoint.steps(tmp_path)]  # noqa: E731
    assert names() == [1, 2, 3, 4, 5]
    checkpoint.prune(tmp_path, 4)
    assert names() == [1, 3, 4, 5]
    checkpoint.prune(tmp_path, 5)
    assert names() == [1, 4, 5]


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", [cut, flip_a_bit, empty, lambda path: path.unlink()])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(history, name, damage):
    folder, _, states = history
    damage(folder / "step-000000002" / name)
    phases = make_phases(seed=5)
    with pytest.warns(UserWarning, match="step-000000002 is damaged") as caught:
        assert checkpoint.load(folder, phases, CONFIG) == 1
    assert_same(state_of(phases), states[1])
    if name != "manifest.json":
        assert name in str(caught[0].message)


def test_damage_of_all_costs_everything_and_what_is_saved_then_outlives_it(history):
    """A run that starts again from a smaller step: its checkpoints are never those thrown away."""
    folder, phases, states = history
    checkpoint.save(folder, 20, phases, CONFIG)
    for path in folder.iterdir():
        cut(path / "state.pt")
    with pytest.warns(UserWarning, match="is damaged") as caught:
        assert checkpoint.load(folder, phases, CONFIG) == 0
    assert len(caught) == 2
    assert_same(state_of(phases), states[3])
    assert checkpoint.save(folder, 5, phases, CONFIG).is_dir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert checkpoint.load(folder, phases, CONFIG) == 5


def test_another_config_is_refused_naming_what_differs_with_both_values(history, tmp_path):
    folder, phases, states = history
    checkpoint.check_config(folder, CONFIG)
    checkpoint.check_config(folder / "nowhere", {"other": 1})
    for check in (checkpoint.check_config, lambda folder, config: checkpoint.load(folder, phases, config)):
        with refused(r"step-000000002 belongs to another config \(lr: 0.01 there, 0.5 now\)"):
            check(folder, {**CONFIG, "lr": 0.5})
        with refused(r"extra: None there, 1 now; name: 'toy' there, 'big' now"):
            check(folder, {**CONFIG, "name": "big", "extra": 1})
    assert_same(state_of(phases), states[3])
    config = {"out": tmp_path, "betas": (0.0, 0.99), "clip": float("inf")}
    checkpoint.save(tmp_path / "own", 1, make_phases(), config)
    assert load_quietly(tmp_path / "own", make_phases(), config) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, value):
    phases = make_phases()
    phases[1].network[2].weight.data[0, 0] = value
    with pytest.raises(FloatingPointError, match="phase 'fake' has weights that are not finite at step 7"):
        checkpoint.save(tmp_path / "run", 7, phases, CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_checkpoints_means_a_start_from_zero(tmp_path):
    phases = make_phases()
    before = state_of(phases)
    (tmp_path / "notes.txt").write_text("x")
    assert load_quietly(tmp_path, phases) == load_quietly(tmp_path / "missing", phases) == 0
    assert_same(state_of(phases), before)
    killed = subprocess.Popen(["true"])
    killed.wait()
    # Of a kill on SIGTERM, under whose odd name nobody writes again.
    (tmp_path / f".writing-{socket.gethostname()}-{killed.pid}-0-step-000000017").mkdir()
    checkpoint.save(tmp_path, 20, phases, {})
    assert names_in(tmp_path) == ["notes.txt", "step-000000020"]


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"state.pt": "0"}'])
def test_a_manifest_that_names_nothing_is_damage(history, manifest):
    folder, phases, _ = history
    (folder / "step-000000002" / "manifest.json").write_text(manifest)
    with pytest.warns(UserWarning, match=r"step-000000002 is damaged \(manifest does not name its files\)"):
        assert checkpoint.load(folder, phases, CONFIG) == 1
    checkpoint.save(folder, 2, phases, CONFIG)  # anew
    assert load_quietly(folder, make_phases(seed=5)) == 2


def test_a_copy_under_another_name_is_neither_used_nor_counted_nor_removed(history):
    """What a user keeps: it is no checkpoint of the run, however it is called."""
    folder, phases, _ = history
    for name in ("step-000000040-good", "step-40", "step-0000000400", "step-000000099.bak"):
        shutil.copytree(folder / "step-000000001", folder / name)
    (folder / "step-000000050").write_text("a file")
    (folder / ".writing-step-notes").mkdir()
    before = set(names_in(folder))
    assert load_quietly(folder, make_phases(seed=5)) == 2
    checkpoint.save(folder, 3, phases, CONFIG)
    assert set(names_in(folder)) == before - {"step-000000001"} | {"step-000000003"}


def test_a_checkpoint_with_a_file_of_someone_else_stays(history):
    folder, phases, _ = history
    (folder / "step-000000001" / "thesis.txt").write_text("years of work")
    checkpoint.save(folder, 3, phases, CONFIG)
    checkpoint.save(folder, 4, phases, CONFIG)
    assert names_in(folder) == ["step-000000001", "step-000000003", "step-000000004"]
    (folder / "step-000000004" / "thesis.txt").write_text("years of work")
    with refused(r"thesis\.txt, which no run wrote"):
        checkpoint.save(folder, 4, phases, CONFIG)


def test_options_that_are_free_or_may_change_do_not_bind():
    saved = {"steps": 5, "log": 1, "rate": 0.1, "width": 8, "free": ["log"], "may_change": ["steps", "rate"]}
    wanted = {**saved, "steps": 9, "log": 2, "rate": 0.2}
    assert checkpoint.differences(saved, wanted) == []
    assert checkpoint.differences(saved, wanted, going_on=False) == ["rate", "steps"]
    assert checkpoint.differences(saved, {**wanted, "width": 4}) == ["width"]
    for side in (0, 1):  # a rate that is constant on one side only is another schedule
        pair = [saved, wanted]
        pair[side] = {**pair[side], "may_change": ["steps"]}
        assert checkpoint.differences(*pair) == ["rate"]
    old = {"steps": 5, "rate": 0.1, "width": 8, "offload": False}
    assert checkpoint.differences(old, {**wanted, "free": ["log", "offload"]}) == [], "of an earlier version"
    assert checkpoint.differences(old, wanted) == ["offload"]


def scheduled(rate, steps, options=()):
    network = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([{"params": [network.weight]}, {"params": [network.bias], "lr": 4 * rate}], rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 - update / steps)
    return Phase(
        name="p", network=network, optimizer=optimizer, loss=lambda batch, rng: {}, lr_schedule=schedule,
        lr_options=options,
    )  # fmt: skip


def rates(phase):
    return [group["lr"] for group in phase.optimizer.param_groups]


@pytest.mark.parametrize(("now", "steps", "expected"), [
    (0.1, 4, 0.05), (0.1, 8, 0.075), (0.2, 8, 0.15), (0.0, 8, 0.075),
])  # fmt: skip
def test_a_schedule_goes_on_as_that_of_the_new_total_and_a_changed_rate_is_taken(tmp_path, now, steps, expected):
    before = scheduled(0.1, 4)
    for _ in range(2):
        before.optimizer.step()
        before.lr_schedule.step()
    checkpoint.save(tmp_path, 2, [before], {"rate": 0.1})
    phase = scheduled(now, steps, ("rate",))
    assert checkpoint.load(tmp_path, [phase], {"rate": now, "may_change": ["rate"]}) == 2
    assert rates(phase) == pytest.approx([expected, 4 * expected])
    phase.lr_schedule.step()
    assert rates(phase)[0] == pytest.approx(expected - (now or 0.1) / steps)


def test_rates_that_were_halved_on_the_way_stay_halved_to_the_last_bit(tmp_path):
    before = scheduled(0.1, 7, ("rate",))
    before.optimizer.step()
    before.lr_schedule.step()
    for group in before.optimizer.param_groups:
        group.update({name: group[name] / 2 for name in ("lr", "initial_lr")})
    before.lr_schedule.base_lrs = [rate / 2 for rate in before.lr_schedule.base_lrs]
    checkpoint.save(tmp_path, 1, [before], {"rate": 0.1})
    phase = scheduled(0.1, 7, ("rate",))
    checkpoint.load(tmp_path, [phase], {"rate": 0.1})
    assert rates(phase) == rates(before)
