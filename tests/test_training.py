import copy
import math

import pytest
import torch
from torch import nn

from scorefield.randomness import shuffled
from scorefield.training import checkpoint
from scorefield.training.loop import EMA, Phase, train

close = torch.testing.assert_close
DATA = torch.randn(24, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def make_network(seed=0, dropout=0.0, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(3, 8, dtype=dtype), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3, dtype=dtype)
        )


def error_of(network):
    return lambda x, rng: {"loss": (network(x) - x.roll(1, 1)).square().mean()}


def make_phase(name="net", network=None, loss=None, optimizer=None, **settings):
    network = make_network() if network is None else network
    optimizer = torch.optim.SGD(network.parameters(), 0.1) if optimizer is None else optimizer
    return Phase(name=name, network=network, optimizer=optimizer, loss=loss or error_of(network), **settings)


def batches_of(size):
    return lambda rng: DATA[shuffled(len(DATA), size, rng)]


def flat(network):
    return torch.cat([p.detach().reshape(-1) for p in network.parameters()])


def drain(*arguments, **settings):
    return list(train(*arguments, **settings))


class Recorder(torch.optim.SGD):
    """Notes each step, and each step of the LR schedule and EMA that follow it, in ``events``."""

    def __init__(self, name, parameters, events):
        super().__init__(parameters, 0.1)
        self.name, self.events = name, events

    def step(self, closure=None):
        self.events.append(f"{self.name} steps")
        return super().step(closure)


def test_phases_step_on_their_own_iterations_with_their_own_ema_and_lr_schedule(accelerator):
    network, other = make_network(0), make_network(1)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 0.5**update)
    slow = make_phase("slow", network, optimizer=optimizer, every=5, ema=EMA(network), lr_schedule=schedule)
    fast = make_phase("fast", other, ema=EMA(other))
    moved, before = [], flat(network)
    for report in train([slow, fast], batches_of(4), accelerator, steps=20):
        moved.append(not torch.equal(flat(network), before))
        before = flat(network)
        assert report.phases == (("slow", "fast") if moved[-1] else ("fast",))
        assert {name.split("/")[0] for name in report.metrics} == set(report.phases)
    assert [i for i, move in enumerate(moved) if move] == [4, 9, 14, 19]
    assert (slow.ema.num_updates, fast.ema.num_updates) == (4, 20)
    assert (schedule.last_epoch, optimizer.param_groups[0]["lr"]) == (4, 0.1 * 0.5**4)


def test_student_then_fake_on_one_sample_and_optimisers_after_all_losses(accelerator):
    events, seen = [], []

    def rollout(batch, names, rng):
        events.append("rollout for " + " and ".join(names))
        return {"x": batch, "fresh": object()}

    def loss_of(name, network):
        def loss(batch, rng):
            events.append(f"{name} loss")
            seen.append((name, batch["fresh"]))
            return error_of(network)(batch["x"], rng)

        return loss

    phases = []
    for name, every, network in (("student", 2, make_network(0)), ("fake", 1, make_network(1))):
        optimizer = Recorder(name, network.parameters(), events)
        phases.append(make_phase(name, network, loss_of(name, network), optimizer, every=every))
    drain(phases, batches_of(4), accelerator, steps=2, rollout=rollout)
    both = ["rollout for student and fake", "student loss", "fake loss", "student steps", "fake steps"]
    assert events == ["rollout for fake", "fake loss", "fake steps", *both]
    assert [name for name, _ in seen] == ["fake", "student", "fake"]
    assert seen[1][1] is seen[2][1]
    events.clear()
    drain(phases, batches_of(4), accelerator, steps=2, start=1, rollout=rollout, accumulate=2)
    assert events == [*both[:3], *both]


def run_accumulated(accelerator, batch_size, accumulate):
    networks = make_network(0), make_network(1)
    phases = [
        make_phase(name, network, optimizer=torch.optim.AdamW(network.parameters(), 0.01), every=every)
        for name, network, every in zip("ab", networks, (2, 1), strict=True)
    ]
    reports = drain(phases, batches_of(batch_size), accelerator, steps=6, accumulate=accumulate, clip_norm=0.05)
    return torch.cat([flat(network) for network in networks]), [report.read() for report in reports], phases


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_micro_batches_equal_one_batch(accelerator, accumulate):
    expected, expected_metrics, _ = run_accumulated(accelerator, 8, 1)
    weights, metrics, _ = run_accumulated(accelerator, 8 // accumulate, accumulate)
    close(weights, expected, rtol=0, atol=1e-10)
    assert [row.keys() for row in metrics] == [row.keys() for row in expected_metrics]
    for row, reference in zip(metrics, expected_metrics, strict=True):
        assert row == pytest.approx(reference, rel=1e-5)


def test_accumulation_steps_every_phase_once_an_iteration(accelerator):
    """Accelerate's own accumulation counts blocks: with two phases and 2 micro-batches one never steps."""
    start = torch.cat([flat(make_network(0)), flat(make_network(1))])
    weights, _, phases = run_accumulated(accelerator, 4, 2)
    updates = [next(iter(phase.optimizer.state.values()))["step"].item() for phase in phases]
    assert updates == [3, 6]
    assert bool((weights != start).all())


def test_metrics_are_averages_and_the_norm_is_that_before_clipping(accelerator):
    network = make_network()
    start = flat(network)
    loss = error_of(network)
    phase = make_phase(network=network, loss=lambda x, rng: {**loss(x, rng), "mean": x.mean()})
    value = loss(DATA[:8], None)["loss"]
    wanted = torch.autograd.grad(value, list(network.parameters()))
    expected = {"net/loss": value.item(), "net/mean": DATA[:8].mean().item()}
    expected["net/grad_norm"] = torch.cat([g.reshape(-1) for g in wanted]).norm().item()
    (report,) = train([phase], lambda rng: DATA[:8], accelerator, steps=1, accumulate=2, clip_norm=0.01)
    assert report.read() == pytest.approx(expected, rel=1e-5)
    assert (flat(network) - start).norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)
    assert report.step == 1


def test_gradients_pass_through_other_phases_but_not_into_them(accelerator):
    """A GAN's student differentiates the fake network; the fake's weights must not learn from that."""
    student, fake = make_network(0), make_network(1)
    notes = []

    def student_loss(x, rng):
        notes.append(("student", [p.requires_grad for p in fake.parameters()]))
        return {"loss": fake(student(x)).square().mean()}

    def fake_loss(x, rng):
        grads = [[p.grad for p in network.parameters()] for network in (student, fake)]
        notes.append(("grads", [all(g is not None and bool((g != 0).any()) for g in grads[0]), grads[1]]))
        return {"loss": (fake(x) - student(x)).square().mean()}

    phases = [make_phase("student", student, student_loss), make_phase("fake", fake, fake_loss)]
    expected = copy.deepcopy((student, fake))
    for _ in train(phases, lambda rng: DATA, accelerator, steps=1):
        pass
    assert notes[0] == ("student", [False] * 4)
    assert notes[1] == ("grads", [True, [None] * 4])
    assert all(p.requires_grad for network in (student, fake) for p in network.parameters())
    first, second = expected
    losses = (second(first(DATA)).square().mean(), (second(DATA) - first(DATA)).square().mean())
    for network, reference, loss in zip((student, fake), expected, losses, strict=True):
        gradient = torch.autograd.grad(loss, list(reference.parameters()), retain_graph=True)
        want = flat(reference) - 0.1 * torch.cat([g.reshape(-1) for g in gradient])
        close(flat(network), want, rtol=0, atol=1e-12)


def test_a_network_that_is_not_due_gets_no_gradient(accelerator):
    student, fake = make_network(0), make_network(1)
    phases = [
        make_phase("student", student, lambda x, rng: {"loss": fake(student(x)).square().mean()}),
        make_phase("fake", fake, every=4),
    ]
    for report in train(phases, lambda rng: DATA, accelerator, steps=3):
        assert all(p.grad is None for network in (student, fake) for p in network.parameters()), report.step


def test_requires_grad_is_restored_as_it_was_even_after_an_error(accelerator):
    network, other = make_network(0), make_network(1)
    other[0].weight.requires_grad_(False)

    def broken(x, rng):
        raise KeyError("real")

    with pytest.raises(KeyError):
        drain([make_phase("a", network, broken), make_phase("b", other)], batches_of(4), accelerator, steps=1)
    assert [p.requires_grad for p in other.parameters()] == [False, True, True, True]


def nan_loss(network):
    return lambda x, rng: {"loss": network(x).mean() * (math.nan if rng.step == 2 else 1.0), "extra": x.mean()}


def nan_gradient(network):
    """The loss is finite, but the root has no slope at zero."""
    return lambda x, rng: {"loss": (network(x).square().mean() * (0.0 if rng.step == 2 else 1.0)).sqrt()}


@pytest.mark.parametrize("bad_loss", [nan_loss, nan_gradient])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("order", [("good", "bad"), ("bad", "good")])
def test_what_is_not_finite_stops_the_run_before_any_weight_changes(accelerator, bad_loss, accumulate, order):
    networks = {"good": make_network(0), "bad": make_network(1)}
    losses = {"good": error_of(networks["good"]), "bad": bad_loss(networks["bad"])}
    phases = [make_phase(name, networks[name], losses[name], ema=EMA(networks[name])) for name in order]
    reports = train(phases, batches_of(4), accelerator, steps=5, accumulate=accumulate)
    next(reports), next(reports)
    before = {name: flat(network) for name, network in networks.items()}
    with pytest.raises(FloatingPointError, match=r"phase 'bad' is not finite in step 3: .*bad/loss"):
        next(reports)
    for phase in phases:
        assert torch.equal(flat(phase.network), before[phase.name])
        assert phase.ema.num_updates == 2


def test_a_run_after_a_failed_one_starts_without_its_gradients(accelerator):
    """The message says: resume with a lower learning rate. In one process too, that must work."""
    network, reference = make_network(0), make_network(0)

    def fails(x, rng):
        return {"loss": network(x).mean() * math.inf}

    with pytest.raises(FloatingPointError):
        drain([make_phase(network=network, loss=fails)], batches_of(4), accelerator, steps=1)
    drain([make_phase(network=network)], batches_of(4), accelerator, steps=1)
    drain([make_phase(network=reference)], batches_of(4), accelerator, steps=1)
    assert torch.equal(flat(network), flat(reference))


@pytest.mark.parametrize(
    ("names", "settings", "run", "message"),
    [
        (["a", "a"], {}, {}, r"distinct names; got \['a', 'a'\]"),
        ([], {}, {}, "distinct names"),
        (["a"], {"every": 0}, {}, "phase 'a' needs every >= 1; got 0"),
        (["a"], {}, {"steps": 0}, "steps and accumulate must be at least 1; got 0 and 1"),
        (["a"], {}, {"accumulate": 0}, "steps and accumulate must be at least 1; got 4 and 0"),
    ],
)
def test_unusable_phases_and_counts_are_refused(accelerator, names, settings, run, message):
    phases = [make_phase(name, **settings) for name in names]
    with pytest.raises(ValueError, match=message):
        drain(phases, batches_of(4), accelerator, **{"steps": 4, **run})


def test_accelerates_own_accumulation_is_refused(make_accelerator):
    accelerator = make_accelerator(gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=2.*pass accumulate="):
        drain([make_phase()], batches_of(4), accelerator, steps=1)


def test_ranks_that_would_each_train_alone_are_refused(accelerator, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 2 but Accelerate sees 1 .*ACCELERATE_USE_CPU=1"):
        drain([make_phase()], batches_of(4), accelerator, steps=1)


def test_bf16_computes_in_bf16_and_keeps_float32_weights(make_accelerator):
    accelerator = make_accelerator(mixed_precision="bf16")
    network, dtypes = make_network(dtype=torch.float32), []

    def rollout(batch, names, rng):
        with torch.no_grad():
            return {"x": batch.float(), "y": network(batch.float())}

    def loss(batch, rng):
        output = network(batch["x"])
        dtypes.extend([batch["y"].dtype, output.dtype])
        return {"loss": (output.float() - batch["x"]).square().mean()}

    start = flat(network)
    phase = make_phase(network=network, loss=loss, ema=EMA(network))
    reports = drain([phase], batches_of(4), accelerator, steps=2, rollout=rollout)
    assert dtypes == [torch.bfloat16] * 4
    assert {p.dtype for net in (network, phase.ema.network) for p in net.parameters()} == {torch.float32}
    assert not torch.equal(flat(network), start)
    assert all(math.isfinite(value) for value in reports[-1].read().values())


def test_batches_are_told_where_they_stand(accelerator):
    seen = []

    def batches(rng):
        seen.append((rng.seed, rng.step, rng.micro, rng.rank, rng.index))
        return DATA[:4]

    drain([make_phase()], batches, accelerator, steps=4, start=2, accumulate=2, seed=7)
    assert seen == [(7, 2, 0, 0, 4), (7, 2, 1, 0, 5), (7, 3, 0, 0, 6), (7, 3, 1, 0, 7)]


def test_dropout_is_reproducible_whatever_was_drawn_before(accelerator):
    def run(seed, run_seed=0):
        torch.manual_seed(seed)
        network = make_network(dropout=0.5)
        drain([make_phase(network=network)], batches_of(4), accelerator, steps=3, accumulate=2, seed=run_seed)
        return flat(network)

    first = run(0)
    assert torch.equal(first, run(1))
    assert not torch.equal(first, run(0, run_seed=1))


def resumable(seed=0):
    """Two phases, ratio 3, with all that has a state: AdamW, EMA, an LR schedule each, and dropout."""
    phases = []
    for name, every in (("student", 3), ("fake", 1)):
        network = make_network(seed + every, dropout=0.3)
        optimizer = torch.optim.AdamW(network.parameters(), 0.05)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 / (1 + update))
        phases.append(make_phase(name, network, None, optimizer, every=every, ema=EMA(network, 0.9),
                                 lr_schedule=schedule))  # fmt: skip
    student, fake = (phase.network for phase in phases)

    def rollout(batch, names, rng):
        noise = torch.randn(batch.shape, generator=rng("noise"), dtype=batch.dtype)
        return {"x": batch, "y": student(batch + noise)}

    def student_loss(batch, rng):
        return {"loss": (fake(batch["y"]) - batch["x"]).square().mean()}

    def fake_loss(batch, rng):
        return {"loss": (fake(batch["y"].detach()) + batch["x"]).square().mean()}

    for phase, loss in zip(phases, (student_loss, fake_loss), strict=True):
        object.__setattr__(phase, "loss", loss)
    return phases, rollout


def full_state(phases):
    tensors = []
    for phase in phases:
        tensors += [flat(phase.network), flat(phase.ema.network), torch.tensor(phase.ema.num_updates)]
        tensors += [value for state in phase.optimizer.state.values() for value in state.values()]
        tensors += [torch.tensor([phase.optimizer.param_groups[0]["lr"], phase.lr_schedule.last_epoch])]
    return tensors


@pytest.fixture
def uninterrupted(accelerator):
    phases, rollout = resumable()
    drain(phases, batches_of(5), accelerator, steps=7, rollout=rollout)
    return full_state(phases)


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_run_resumed_at_any_step_ends_bitwise_equal(accelerator, uninterrupted, tmp_path, stop):
    phases, rollout = resumable()
    for report in train(phases, batches_of(5), accelerator, steps=7, rollout=rollout):
        if report.step == stop:
            checkpoint.save(tmp_path, report.step, phases, {})
            break
    phases, rollout = resumable(seed=10)
    start = checkpoint.load(tmp_path, phases, {})
    assert start == stop
    reports = drain(phases, batches_of(5), accelerator, steps=7, start=start, rollout=rollout)
    assert [report.step for report in reports] == list(range(stop + 1, 8))
    for tensor, expected in zip(full_state(phases), uninterrupted, strict=True):
        assert torch.equal(tensor, expected)


def test_ema_follows_its_formula_and_copies_buffers():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    ema = EMA(network, decay=0.5)
    expected = flat(network)
    for n in range(1, 20):
        for parameter in network.parameters():
            parameter.data += n
        network[1].running_mean += 1
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * flat(network)
    close(flat(ema.network), expected)
    assert torch.equal(ema.network[1].running_mean, network[1].running_mean)
    assert not any(p.requires_grad for p in ema.network.parameters())
    assert not ema.network.training
    ema.reset()
    assert torch.equal(flat(ema.network), flat(network))
    assert ema.num_updates == 0


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_an_impossible_ema_decay_is_refused(decay):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        EMA(make_network(), decay)
