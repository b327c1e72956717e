"""Hundreds of hostile inputs each, from fixed seeds: folders of models, command lines, folders of data.

Each case runs a script's whole command line in this process and ends with 0, or with 2 and nothing written. A
traceback is an exception that reaches the test. An audit hook watches for code of the folder, processes, sockets
and writes elsewhere. ``CASES=200`` in the environment shortens a campaign.
"""

import dataclasses
import json
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import types
import typing

import datasets
import hostile_data
import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from hostile import CASES, Guard, campaign, listing, mutated, options_of, run, spoilt
from PIL import Image

import attack.networks as robust_networks
import scorefield.commands.teacher as train_teacher
from controlnet.adapter import copy_encoder
from controlnet.export import save_adapter
from distill.export import export_pipeline, lcm_times
from distill.student import Student
from scorefield.atomic import MARKER
from scorefield.commands.options import TrainTeacher
from scorefield.files import printable
from scorefield.models.teacher import load_teacher
from scorefield.training.features import Classifier, Facts, save_classifier

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def guard():
    return Guard()


@pytest.fixture(scope="module", autouse=True)
def classifiers():
    """What a user has of his own to be attacked: a function of any image."""
    mine = types.ModuleType("scorefield_tests")

    def classifier():
        return lambda images: images.mean((1, 2, 3))[:, None] * torch.arange(10)

    mine.classifier = classifier
    sys.modules["scorefield_tests"] = mine
    yield
    del sys.modules["scorefield_tests"]


# Folders of models.


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Of each kind of folder that a command reads a small one."""
    root = tmp_path_factory.mktemp("models")
    tiny.sd().save_pretrained(root / "sd")
    tiny.sd3(with_t5=False).save_pretrained(root / "sd3")
    tiny.pixels(num_class_embeds=4).save_pretrained(root / "pixels")
    teacher = train_teacher.main(TrainTeacher(out=root / "run", steps=2, batch_size=8, width=16, depth=1))
    shutil.copytree(teacher, root / "ours")
    known = load_teacher(root / "sd")
    export_pipeline(Student(known.denoiser, lcm_times(known.denoiser.schedule, 2)), root / "sd", root / "student")
    adapter = copy_encoder(known.denoiser, hint_channels=1, factor=known.codec.factor)
    save_adapter(adapter, root / "adapter", "A card.")
    save_classifier(Classifier(Facts(1, 8, 10)), root / "features")
    facts = robust_networks.Facts(network="cnn", channels=1, resolution=8, num_classes=10, width=4)
    robust_networks.save_classifier(robust_networks.build_classifier(facts), facts, root / "classifier")
    for folder in root.iterdir():
        for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
            (place / "payload.py").write_text("raise SystemError('imported')")
    return root


def mutate_text(file, chance):
    data = file.read_bytes()
    if chance.random() < 0.2 or file.suffix == ".txt":
        file.write_bytes(spoilt(data, chance))
    else:
        file.write_text(json.dumps(mutated(json.loads(data), chance), ensure_ascii=True))


def mutate_header(file, chance):
    """The header of safetensors: its JSON, its length, or its bytes."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    kind = chance.random()
    if kind < 0.7:
        header = json.dumps(mutated(json.loads(header), chance)).encode()
        header += b" " * (-len(header) % 8)
        length = len(header)
    elif kind < 0.85:
        length = chance.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])
    else:
        header = spoilt(header, chance)
    file.write_bytes(struct.pack("<Q", length) + header + rest)


def model_commands(root, out, kind, models, inputs):
    """Command lines that read the folder ``root / "model"`` of a kind."""
    model, dry = str(root / "model"), ["--dry-run", "--out", str(out)]
    draw = ["--teacher", model, "--num-images", "1", "--steps", "2", "--out", str(out / "made.npz")]
    teach = ["--teacher", model, "--skip-teacher-check", *dry]
    npz = str(inputs / "images.npz")
    if kind == "features":
        judge = ["--generated", npz, "--reference", npz, "--features", model, "--device", "cpu"]
        return [("evaluate", [*judge, "--out", str(out / "made.json")])]
    if kind == "adapter":
        hints = ["--data", str(inputs / "data"), "--hint", "canny", "--eval-samples", "2"]
        return [("control", ["--teacher", str(models / "sd"), *hints, "--init-from", model, *dry])]
    if kind == "student":
        return [("sample", [*draw, "--prompts", "a mug"])]
    if kind == "classifier":
        held = ["--data", npz, "--methods", "fgsm", "--num-images", "4", "--out", str(out / "made")]
        learn = ["--data", npz, "--generated", npz, "--size", "8", *dry]
        return [
            ("attack", ["--classifier", model, *held]),
            ("robust", ["digits", *learn, "--pseudo-label", model]),
        ]
    if kind in ("pixels", "ours"):
        attack = ["--data", npz, "--methods", "fgsm", "--num-images", "2", "--evaluations", "2", *draw[:2]]
        attack += ["--classifier", "scorefield_tests:classifier", "--out", str(out / "made")]
        learned = [("sample", draw), ("distill", [*teach, "--gan-weight", "0"])]
        return [*learned, ("attack", attack)] if kind == "ours" else learned
    learn = ["dreamfusion", "a", "--precision", "no", "--canvas", "--teacher", model, *dry]
    edit = ["sdedit" if kind == "sd3" else "recolour", "--image", str(inputs / "data" / "0.png"), *draw[:2]]
    return [
        ("sample", [*draw, "--prompts", "a mug"]), ("sds", learn),
        ("edit", [*edit, "--source", "a mug", "--target", "a cup", "--steps", "2", "--out", str(out / "made")]),
        ("distill", [*teach, "--precision", "no", "--prompts", str(root / "prompts.txt")]),
    ]  # fmt: skip


def test_folders_of_models(models, inputs, guard, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "prompts.txt").write_text("a mug\na chair\n")
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    kinds = ["sd", "sd", "sd", "sd3", "pixels", "ours", "ours", "student", "features", "adapter", "classifier"]
    monkeypatch.chdir(tmp_path)

    def start(kind):
        for folder in (tmp_path / "model", tmp_path / "out", cache):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(models / kind, tmp_path / "model")

    for kind in sorted(set(kinds)):
        start(kind)
        for script, words in model_commands(tmp_path, tmp_path / "out", kind, models, inputs):
            code, said = run(script, words)
            assert code == 0, f"what is not spoilt works: {kind} {script}: {said[-600:]}"

    def one(number):
        chance = random.Random(number)
        kind = chance.choice(kinds)
        start(kind)
        endings = (".json", ".safetensors", ".txt")
        files = [file for file in sorted((tmp_path / "model").rglob("*")) if file.suffix in endings]
        file = chance.choice([file for file in files if file.name != MARKER])
        (mutate_header if file.suffix == ".safetensors" else mutate_text)(file, chance)
        (tmp_path / "out").mkdir()
        script, words = chance.choice(model_commands(tmp_path, tmp_path / "out", kind, models, inputs))
        before, said = listing(tmp_path / "model"), ""
        with guard.watching(tmp_path / "model", tmp_path / "out", cache, "/tmp/tmp", "/proc/", "/dev/shm"):
            code, said = run(script, words)
            found = list(guard.found)
        about = f"{kind} {file.relative_to(tmp_path / 'model')} {script}: {code} {said[-600:]}"
        assert not found, f"{about} {found}"
        assert listing(tmp_path / "model") == before, about
        assert code in (0, 2), about
        if code == 2 or script not in ("sample", "evaluate", "edit", "attack"):
            assert listing(tmp_path / "out") == [], about
        if code == 2:
            assert sum(line.startswith("error: ") for line in said.splitlines()) == 1, about
            assert "\x1b" not in said, about
        return code

    campaign(CASES, one)


# Command lines.


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, models):
    root = tmp_path_factory.mktemp("inputs")
    np.savez(root / "images.npz", images=np.random.RandomState(0).rand(40, 1, 8, 8), labels=np.arange(40) % 10)
    (root / "prompts.txt").write_text("a mug\na chair\n")
    (root / "data").mkdir()
    rows = []
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(root / "data" / f"{number}.png")
        rows.append(json.dumps({"text": "mug", "file_name": f"{number}.png"}))
    (root / "data" / "metadata.jsonl").write_text("\n".join(rows))
    asked = [{"source": "a mug", "target": "a cup", "image": f"data/{number}.png"} for number in range(4)]
    (root / "edits.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (root / "empty").mkdir()
    save_classifier(Classifier(Facts(1, 8, 2)), root / "features")
    return root


def usual(inputs, models):
    """A command line of each script that starts, but for what hostile words change."""
    ours, sd = str(models / "ours"), str(models / "sd")
    npz, texts = str(inputs / "images.npz"), str(inputs / "prompts.txt")
    return {
        "teacher": ["--dry-run"],
        "distill": ["--teacher", ours, "--dry-run", "--skip-teacher-check"],
        "distill (texts)": ["--teacher", sd, "--prompts", texts, "--precision", "no", "--dry-run"],
        "sds": ["toyworld", "a mug", "--teacher", sd, "--dry-run"],
        "control": ["--teacher", sd, "--data", str(inputs / "data"), "--hint", "canny", "--dry-run",
                             "--eval-samples", "2", "--test-samples", "0"],
        "train_circles": ["--dry-run"], "train_toyworld": ["--dry-run"],
        "train_flow_toyworld": ["--dry-run"], "demo": ["--dry-run"],
        "sample": ["--teacher", ours, "--num-images", "2", "--steps", "2"],
        "edit": ["--teacher", sd, "--source", "a mug", "--target", "a cup", "--dry-run"],
        "edit (pictures)": ["sdedit", "--teacher", sd, "--edits", str(inputs / "edits.jsonl"), "--dry-run"],
        "attack": ["--teacher", ours, "--data", npz, "--classifier", "scorefield_tests:classifier", "--dry-run"],
        "robust": ["digits", "--data", npz, "--generated", npz, "--dry-run"],
        "report": [str(models / "run")], "export": [str(models / "run")],
        "push": [str(models / "run"), "--to", "me/it", "--dry-run"], "play": ["--teacher", sd, "--dry-run"],
        "toyworld evaluate": ["--teacher", str(inputs / "empty")], "toyworld students": ["--students", ours],
        "train_judge": ["--device", "nowhere"],
        "features": ["--data", npz, "--steps", "2", "--batch-size", "4", "--device", "nowhere"],
        "evaluate": ["--generated", npz, "--reference", npz, "--features", str(inputs / "empty")],
    }  # fmt: skip


NUMBERS = [
    "0", "1", "-1", "2", "3", "4", "7", "64", "100", "0.5", "-0.5", "nan", "inf", "-inf", "1e-9", "1e308", "1e999",
    "2147483648", "9223372036854775808", "99999999999999999999",
]  # fmt: skip
WORDS = [
    "", " ", "x", "None", "True", "bf16", "a/b", "../..", "/", "/dev/null/x", "/dev/zero", "/proc/self/mem",
    "missing/folder", "a\nerror: forged", "\x1b[2J", "\udcff", "é模" * 9, "y" * 5000, "toyworld",
    "circles", "canny", "cpu", "{inputs}/data",
    "{inputs}/images.npz", "{inputs}/prompts.txt", "{inputs}/empty", "{models}/sd",
    "{models}/ours", "{models}/pixels", "nowhere:make", ":", "a:b:c",
]  # fmt: skip
UNTOUCHED = {"dry_run", "compile", "out", "device", "preset", "prompt", "run", "runs"}


def word_for(hint, chance):
    """Mostly of the right kind: what is not never gets beyond the parser."""
    if chance.random() < 0.1:
        return chance.choice([*NUMBERS, *WORDS])
    if typing.get_origin(hint) is typing.Literal:
        return str(chance.choice(typing.get_args(hint)))
    text = str(hint)
    if "Literal" in text and "int" not in text:
        return chance.choice(WORDS[:6])
    return chance.choice(WORDS if "str" in text or "Path" in text else NUMBERS)


def hostile(config, chance, places):
    """One to five options, each with as many words as it takes, or fewer, or more."""
    hints = typing.get_type_hints(config)
    fields = [field for field in dataclasses.fields(config) if field.name not in UNTOUCHED]
    words = []
    for field in chance.sample(fields, min(len(fields), chance.choice([1, 1, 2, 2, 3, 5]))):
        flag = f"--{field.name.replace('_', '-')}"
        if hints[field.name] is bool:
            words += [chance.choice([flag, flag.replace("--", "--no-", 1)])]
            continue
        count = {tuple: 2}.get(typing.get_origin(hints[field.name]), 1)
        count = chance.choice([*[count] * 15, 0, 3])
        words += [flag, *(word_for(hints[field.name], chance) for _ in range(count))]
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    return words


def test_command_lines(models, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def nowhere(*arguments, **options):
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    lines = usual(inputs, models)
    places = {"{inputs}": inputs, "{models}": models}
    before = {root: listing(root) for root in (models, inputs)}

    def one(number):
        chance = random.Random(number)
        name = sorted(lines)[number % len(lines)]
        script = name.partition(" (")[0]
        out = tmp_path / "out" / "run"
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        to = [] if script in ("push", "play") else ["--out", str(out)]
        words = [*lines[name], *to, *hostile(options_of(script), chance, places)]
        if script == "report" and chance.random() < 0.7:
            words.insert(0, chance.choice([*WORDS, *NUMBERS]).format(inputs=inputs, models=models))
        code, said = run(script, words)
        about = f"{script} {[word[:60] for word in words]}: {code} {said[-600:]}"
        assert code in (0, 2), about
        assert "Traceback" not in said, about
        if code == 2:
            assert "\x1b[2J" not in said, about
            ours = sum(line.startswith("error: ") for line in said.splitlines())
            assert ours == 1 or "full helptext" in said, about  # or the parser's frame
        if code == 2 or "--dry-run" in words:
            assert not (tmp_path / "out").exists(), about
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        assert set(listing(tmp_path)) <= {"out", *(f"out/{one}" for one in listing(tmp_path / "out"))}, about
        assert {root: listing(root) for root in before} == before, about
        return code

    campaign(CASES, one)


# Folders of data.


def data_commands(source, models, inputs, out, chance):
    """Command lines that read a source, by what they read of it: pictures, captions or both."""
    ours, sd, npz = str(models / "ours"), str(models / "sd"), str(inputs / "images.npz")
    skip = ["--on-bad-data", chance.choice(["stop", "skip"])]
    small = ["--size", "8", "--channels", "grey"]
    train = ["--out", str(out), *chance.choice([["--dry-run"], ["--dry-run"], ["--steps", "1"]])]
    learn = ["--steps", "2", "--batch-size", "4", "--device", "cpu"]
    teach = ["--batch-size", "4", "--skip-teacher-check", "--dry-run", "--out", str(out)]
    judge = ["--features", str(inputs / "features"), "--device", "cpu", "--out", str(out / "figures.json")]
    edit = ["sdedit", "--teacher", sd, "--edits", str(source), "--steps", "2", "--out", str(out / "made")]
    attack = ["--classifier", "scorefield_tests:classifier", "--data", str(source), "--methods", "pgd"]
    text = ["--teacher", sd, "--prompts", str(source), "--precision", "no", "--student-every", "1"]
    long = ["--long-prompts", chance.choice(["cut", "skip"])]
    one = str(source) if source.suffix in (".txt", ".jsonl", ".tar", ".parquet") else "a mug"
    robust = ["--generated", str(source), "--size", "8", "--width", "4", "--dry-run", "--out", str(out), *skip]
    return {
        "teacher": [*train, "--data", str(source), *skip, "--batch-size", "4", "--width", "8", "--depth", "1"],
        "robust": [*robust, "--pseudo-label", str(models / "classifier")],
        "distill": [*teach, "--teacher", ours, "--data", str(source), *small, *skip],
        "features": [*learn, "--data", str(source), *skip, *small[:2], "--out", str(out / "features")],
        "evaluate": [*judge, "--generated", str(source), "--reference", npz, *skip],
        "evaluate (reference)": [*judge, "--generated", npz, "--reference", str(source), *skip],
        "distill (texts)": [*text, *teach, *skip, *long, "--gan-weight", chance.choice(["0", "0.01"])],
        "control": [
            "--teacher", sd, "--data", str(source), "--hint", "canny", "--dry-run", "--eval-samples", "2",
            "--out", str(out), *skip, *long, *chance.choice([[], ["--text-column", ""]]),
        ],
        "sample": [
            "--teacher", sd, "--prompts", one, "--num-images", "1", "--steps", "2", *skip, *long,
            "--out", str(out / "made.npz"),
        ],
        "edit": [*edit, *skip, *chance.choice([["--dry-run"], []])],
        "attack": [*attack, "--size", "8", "--steps", "2", "--num-images", "4", "--out", str(out / "made"), *skip,
                   *chance.choice([["--dry-run"], []])],
    }  # fmt: skip


CAPTIONED = ("described", "described_in_csv", "lines", "whole_json", "table", "shards", "parquet", "saved")
LABELLED = (*CAPTIONED, "classes", "numbered", "splits", "npz", "idx")
READ = {
    "teacher": LABELLED, "distill": LABELLED, "features": LABELLED, "evaluate": LABELLED,
    "evaluate (reference)": LABELLED, "distill (texts)": (*CAPTIONED, "beside"), "control": (*CAPTIONED, "beside"),
    "sample": ("lines", "prompts", "parquet"), "edit": ("edits",), "attack": LABELLED, "robust": LABELLED,
}  # fmt: skip
"""What each command can use, if nothing is wrong with it."""


def unaccounted(root, opened, said):
    """Files under ``root`` that were neither opened nor named, if they are more than those that were counted."""
    said = said.replace("\\\\", "\\")
    left_out = re.search(r"train/ is used, and not ([^;\n]*)|$", said)[1] or ""
    silent = []
    for path in hostile_data.entries(root):
        here = path.relative_to(root).parts
        if (here[0] != "train" and f"{here[0]}/" in left_out) or any(name.startswith(".") for name in here[:-1]):
            continue  # what is in them is counted, or named, with them
        read = str(path) in opened or any(one.startswith(f"{path}/") for one in opened)
        if (
            not read
            and printable(path.name) not in said
            and (path.is_symlink() or not path.is_dir() or here[-1][0] == ".")
        ):
            silent.append("/".join(here))
    passed_over = re.findall(r"passed over: ([^;\n]*)", said)
    counted = sum(int(number) for part in passed_over for number in re.findall(r"\d+", part))
    return silent if len(silent) > counted else []


def test_folders_of_data(models, inputs, guard, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    cache, root, out = tmp_path / "cache", tmp_path / "data", tmp_path / "out"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache / "datasets"))
    monkeypatch.chdir(tmp_path)
    kinds = sorted(hostile_data.SOURCES)

    def start(kind):
        # shutil calls itself in each folder, and some are deeper than Python's stack.
        subprocess.run(["rm", "-rf", str(root), str(out), str(cache / "datasets")], check=True)
        out.mkdir()
        return hostile_data.SOURCES[kind](root)

    for name, known in sorted(READ.items()):
        for kind in sorted(known):
            source = start(kind)
            words = data_commands(source, models, inputs, out, random.Random(0))[name]
            code, said = run(name.partition(" (")[0], words)
            assert code == 0, f"what is not spoilt works: {name} {kind}: {said[-600:]}"

    def one(number):
        chance = random.Random(number)
        name = chance.choice(sorted(READ))
        kind = chance.choice([*kinds, *sorted(READ[name]) * 3])
        source = start(kind)
        for _ in range(chance.choice([1, 1, 2, 3])):
            hostile_data.spoil(root, chance)
        words = data_commands(source, models, inputs, out, chance)[name]
        before = hostile_data.entries(root)
        with guard.watching(root, out, cache, "/tmp/tmp", "/proc/", "/dev/shm"):
            code, said = run(name.partition(" (")[0], words)
            found, opened = list(guard.found), set(guard.opened)
        about = f"{kind} {name} {words[-9:]}: {code} {said[-900:]}"
        assert not found, f"{about} {found}"
        assert hostile_data.entries(root) == before, about
        assert code in (0, 2), about
        assert "\x1b" not in said, about
        assert "not enough memory" not in said, about
        if code == 2:
            assert listing(out) == [], about
            assert sum(line.startswith("error: ") for line in said.splitlines()) == 1, about
        elif name not in ("sample", "edit") and source.is_dir() and kind not in hostile_data.HIDDEN:
            silent = unaccounted(root, opened, said)
            assert not silent, f"{about} says nothing of {silent[:5]}"
        return code

    try:
        campaign(CASES, one)
    finally:  # folders so deep that nothing of Python removes them later
        start(kinds[0])
