"""SIGKILL at any moment: the same command again ends in the same bytes.

A run that silently starts from zero would end equal too, so each restart must say from which step it resumed. The
campaign is over all trainers, in forks of one process; ``KILLS=10`` in the environment shortens it. Two real ranks
are killed as the group of processes that a launcher starts.
"""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import tiny_pipelines as tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import scorefield.commands.teacher as train_teacher
from scorefield.atomic import MARKER
from scorefield.commands.options import TrainTeacher
from scorefield.training.features import Classifier, Facts, save_classifier

ROOT = Path(__file__).resolve().parent.parent
STEPS, SAVE_EVERY = 240, 8


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    return train_teacher.main(TrainTeacher(out=out, steps=4, batch_size=16, width=32, depth=2))


class Run:
    """The distillation script on one or two ranks, as a process group of its own."""

    def __init__(self, out, teacher, ranks, accumulate):
        options = {
            "--teacher": teacher, "--out": out, "--steps": STEPS, "--save-every": SAVE_EVERY, "--batch-size": 16,
            "--student-every": 5, "--warmup-steps": 3, "--num-pairs": 20, "--accumulate": accumulate,
            "--pair-steps": 3, "--fake-warmup": 3, "--student-lr": 3e-4, "--fake-lr": 3e-4, "--warmup-lr": 1e-3,
            "--guard-images": 64, "--guard-every": STEPS // 2,
        }  # fmt: skip
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        self.command = [*launcher, str(ROOT / "train_scripts" / "train_dmd.py")]
        self.command += ["--skip-teacher-check", *(str(word) for item in options.items() for word in item)]
        self.out, self.log = out, out.with_suffix(".log")

    def start(self):
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "TQDM_DISABLE": "1",
            "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def finish(self):
        assert self.process.wait(timeout=300) == 0, self.log.read_text()
        return load_file(self.out / "student" / "model.safetensors")

    def processes(self):
        """The launcher and its ranks, which it starts in sessions of their own."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def kill(self):
        processes = self.processes()
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=60)
        self.process.wait(timeout=60)

    def newest(self):
        """The newest step on disk; -1 if there is none."""
        return max((int(path.name[5:]) for path in self.out.glob("checkpoints/step-*")), default=-1)

    def until(self, condition):
        """Wait for it; False if the run ended first."""
        while not condition():
            if self.process.poll() is not None:
                return False
            time.sleep(0.0005)
        return True


def kill_somewhere(run, chance, while_writing):
    """Start, wait for at least one further checkpoint, and kill; returns whether the run was still going."""
    run.start()
    before, saves = run.newest(), chance.randint(1, 3)
    if not run.until(lambda: run.newest() >= max(before, 0) + saves * SAVE_EVERY):
        return False
    if while_writing:
        if not run.until(lambda: any(run.out.glob("checkpoints/.writing-*"))):
            return False
    else:
        time.sleep(chance.uniform(0, 0.05))
    run.kill()
    return True


def check(tmp_path, teacher, ranks, accumulate, kills, seed, while_writing=False):
    whole = Run(tmp_path / "whole", teacher, ranks, accumulate)
    whole.start()
    expected = whole.finish()
    run, chance, done = Run(tmp_path / "cut", teacher, ranks, accumulate), random.Random(seed), 0
    while done < kills and kill_somewhere(run, chance, while_writing):
        done += 1
        if done > 1:
            assert_resumed(run, newest)
        newest = run.newest()
        assert newest >= SAVE_EVERY
    assert done >= 1, "the run ended before it could be killed"
    run.start()
    actual = run.finish()
    assert_resumed(run, newest)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    return done


def assert_resumed(run, newest):
    said = re.findall(r"resumed from step (\d+)", run.log.read_text())
    assert said == [str(newest)], (said, newest, run.log.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "accumulate", "while_writing"),
    [
        (1, 1, False), (1, 2, True), (2, 1, False)
    ],
)  # fmt: skip
def test_a_killed_run_ends_in_the_same_weights(tmp_path, teacher, ranks, accumulate, while_writing):
    assert check(tmp_path, teacher, ranks, accumulate, kills=1, seed=0, while_writing=while_writing) == 1


@pytest.mark.slow
@pytest.mark.parametrize("while_writing", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_twelve_kills_of_two_ranks(tmp_path, teacher, accumulate, while_writing):
    assert check(tmp_path, teacher, 2, accumulate, kills=3, seed=1, while_writing=while_writing) == 3


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_first_and_the_rest_follows(tmp_path, teacher, ranks):
    """What a scheduler sends before it takes the machine away."""
    run = Run(tmp_path / "run", teacher, ranks, 1)
    run.start()
    assert run.until(lambda: run.newest() >= SAVE_EVERY)
    os.killpg(run.process.pid, signal.SIGTERM)
    code = run.process.wait(timeout=60)
    assert code == 143 if ranks == 1 else code != 0  # torchrun has codes of its own
    newest = run.newest()
    run.start()
    run.finish()
    assert_resumed(run, newest)


# A campaign over all trainers.

KILLS = int(os.environ.get("KILLS", "100"))
"""Of the campaign, in all. Half of them are at a write, the other half at any moment."""

TEACHER_OF_IMAGES = ["--batch-size", "8", "--save-every", "2", "--log-every", "1"]
WATCHED = ["--eval-every", "2", "--eval-images", "20", "--features", "{root}/features"]
STUDENT = [
    *TEACHER_OF_IMAGES, "--steps", "6", "--student-every", "2", "--warmup-steps", "4", "--num-pairs", "8",
    "--pair-steps", "2", "--fake-warmup", "1", "--guard-images", "64", "--guard-every", "2",
    "--skip-teacher-check",
]  # fmt: skip
RATES = ["--student-lr", "1e-4", "--fake-lr", "1e-4", "--warmup-lr", "1e-3"]
TEXTS = [
    "distill", "--teacher", "{root}/sd", "--prompts", "{root}/data/metadata.jsonl", *STUDENT, *RATES,
    "--precision", "no", "--no-gradient-checkpointing",
]  # fmt: skip
SCENE = [
    "a red mug", "--teacher", "{root}/sd", "--long-prompts", "cut", "--steps", "6", "--batch-size", "2",
    "--save-every", "2", "--log-every", "1", "--probe-every", "3", "--render-size", "8", "--num-samples", "8",
    "--quarters", "1", "--draws", "1", "--mesh-resolution", "12", "--turntable-size", "16",
]  # fmt: skip
TRAINERS = {
    "teacher": ["teacher", *TEACHER_OF_IMAGES, *WATCHED, "--steps", "8", "--width", "16", "--depth", "1"],
    "images": ["distill", "--teacher", "{root}/images", *STUDENT, *WATCHED, "--gan-weight", "0.01"],
    "texts": [*TEXTS, "--gan-weight", "0.01"],
    "lora": [*TEXTS, "--gan-weight", "0", "--lora", "--lora-rank", "2"],
    "control": ["control", "--teacher", "{root}/sd", "--data", "{root}/data", "--hint", "canny", "--steps", "6",
                "--batch-size", "2", "--eval-every", "2", "--eval-samples", "2", "--test-samples", "2",
                "--sampling-steps", "2", "--guidance", "2", "--save-every", "2", "--log-every", "1", "--cache",
                "cache/control", "--learning-rate", "1e-3"],
    "robust": ["robust", "digits", "--steps", "8", "--batch-size", "8", "--save-every", "2", "--log-every", "1",
               "--width", "4", "--attack-steps", "2", "--test-steps", "2", "--loss", "trades", "--eval-every", "2",
               "--eval-images", "20", "--generated", "{root}/made.npz", "--mix", "0.25"],
    "canvas": ["sds", "toyworld", *SCENE, "--canvas", "--overhead", "0"],
    "scene": ["sds", "toyworld", *SCENE],
}  # fmt: skip


@pytest.fixture(scope="module")
def material(tmp_path_factory, teacher):
    """Teachers, a feature network and pictures with captions, as small as they can be."""
    root = tmp_path_factory.mktemp("material")
    tiny.sd().save_pretrained(root / "sd")
    shutil.copytree(teacher, root / "images")
    torch.manual_seed(0)
    save_classifier(Classifier(Facts(1, 8, 10)), root / "features")
    made = np.random.default_rng(0).integers(0, 255, (30, 1, 8, 8), np.uint8)
    np.savez(root / "made.npz", images=made, labels=np.arange(30) % 10)
    (root / "data").mkdir()
    rows = []
    for number in range(10):
        pixels = np.random.default_rng(number).integers(0, 255, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(root / "data" / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": ("a mug", "a cone")[number % 2]}))
    (root / "data" / "metadata.jsonl").write_text("\n".join(rows))
    return root


class Server:
    """Runs the console command in forks of one process, which has the libraries."""

    def __init__(self):
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "TQDM_DISABLE": "1",
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "mortal.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=environment,
        )  # fmt: skip

    def run(self, words, folder, *, at=0, after=None):
        """Whether it was killed (at its write ``at``, or ``after`` seconds), what it said, and its seconds."""
        folder.mkdir(exist_ok=True)
        log = folder.with_suffix(".log")
        order = {"words": [*words, "--out", "run"], "folder": str(folder), "log": str(log), "at": at}
        began = time.monotonic()
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        process = int(self.process.stdout.readline())
        if after is not None:
            time.sleep(after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        status = int(self.process.stdout.readline())
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or status == 0, log.read_text(errors="replace")
        return killed, log.read_text(errors="replace"), time.monotonic() - began

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


def checkpoints(out):
    """Steps of the whole checkpoints, those of the warm-up by their own name."""
    return [
        (path.parent.parent.name, int(path.name[5:])) for path in sorted(out.rglob("checkpoints/step-?????????"))
    ]


def assert_went_on(before, said):
    """It says from where, unless it was killed before it could, or nothing was there."""
    main, warm = ([step for folder, step in before if (folder == "warm-up") == inner] for inner in (False, True))
    newest = max(main or warm, default=0)
    told = [int(step) for step in re.findall(r"resumed from step (\d+)", said)]
    assert told == [newest] * bool(newest) or (not told and "writes: " not in said), (before, said[-2000:])


TOLD = ("resumed", "seconds", "cpu_seconds")
"""In the report of a ControlNet: that it was resumed, and how long the last process took."""


OF_THE_LOG = re.compile(r"<!-- from the log -->.*?<!-- to here -->", re.DOTALL)
"""In a page: curves, of which a kill takes what was not written yet, and how long the last process took."""


def results(out):
    """All that a run leaves: bytes, but for what says that it was resumed; tensors; the logs' last scalars."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = path.relative_to(out).as_posix()
        if path.name == "state.pt":
            found[name] = torch.load(path, weights_only=True)
        elif path.name == "report.json" and (out / "controlnet").is_dir():
            report = json.loads(path.read_text())
            found[name] = {key: value for key, value in report.items() if key not in TOLD}
        elif name == "controlnet/README.md":
            found[name] = [line for line in path.read_text().splitlines() if "seconds" not in line]
        elif path.name == "report.html":
            found[name] = OF_THE_LOG.sub("", path.read_text())
        elif path.name.startswith("events.out"):
            pass
        elif path.name not in ("manifest.json", MARKER):  # sums of the others
            found[name] = path.read_bytes()
    for folder in {path.parent for path in out.rglob("events.out*")}:
        events = EventAccumulator(str(folder)).Reload()
        for tag in set(events.Tags()["scalars"]) - {"run/seconds_per_step"}:
            last = events.Scalars(tag)[-1]
            found[f"{folder.relative_to(out)} {tag}"] = (last.step, last.value)
    return found


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def litter(folder):
    return [path.relative_to(folder).as_posix() for path in folder.rglob(".*") if path.name != MARKER]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_hundred_kills(trainer, server, material, tmp_path):
    """A run that was killed up to three times ends as one that was not; it says from which step it went on.

    The seed of a case is its number, which a failure names: ``CASE=3`` in the environment repeats it alone.
    """
    words = [word.replace("{root}", str(material)) for word in TRAINERS[trainer]]
    killed, said, seconds = server.run(words, tmp_path / "whole")
    assert not killed, said
    writes, expected = int(re.findall(r"writes: (\d+)", said)[0]), results(tmp_path / "whole" / "run")
    place, done = list(TRAINERS).index(trainer), {True: 0, False: 0}
    wanted = KILLS * (place + 1) // len(TRAINERS) - KILLS * place // len(TRAINERS)
    for number in [int(os.environ["CASE"])] if "CASE" in os.environ else itertools.count():
        chance, folder, killed = random.Random(f"{trainer} {number}"), tmp_path / f"cut {number}", True
        for kill in range(min(chance.randint(1, 3), wanted - sum(done.values()))):
            at_a_write = (number + kill) % 2 == 0
            how = {"at": chance.randint(1, writes)} if at_a_write else {"after": chance.uniform(0, seconds)}
            before = checkpoints(folder / "run")
            killed, said, _ = server.run(words, folder, **how)
            assert_went_on(before, said)
            if not killed:
                break
            done[at_a_write] += 1
        if killed:
            before = checkpoints(folder / "run")
            killed, said, _ = server.run(words, folder)
            assert_went_on(before, said)
        actual = results(folder / "run")
        different = sorted(
            name
            for name in expected.keys() | actual.keys()
            if name not in expected or name not in actual or not same(expected[name], actual[name])
        )
        assert not different, f"case {number}: {different}\n{said[-2000:]}"
        assert not litter(folder), (number, litter(folder))
        shutil.rmtree(folder)
        if sum(done.values()) >= wanted:
            break
    print(f"{trainer}: {sum(done.values())} kills, {done[True]} at a write, of {writes}; all ended alike")
