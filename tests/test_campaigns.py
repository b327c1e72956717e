"""Hundreds of hostile inputs each, from fixed seeds: folders of models, command lines, folders of data.

Each case runs a script's whole command line in this process and ends with 0, or with 2 and nothing written. A
traceback is an exception that reaches the test. An audit hook watches for code of the folder, processes, sockets
and writes elsewhere. ``CASES=200`` in the environment shortens a campaign.
"""

import contextlib
import copy
import dataclasses
import importlib
import io
import json
import os
import random
import shutil
import signal
import socket
import struct
import sys
import typing

import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import scorefield.cli as cli
import scorefield.commands.command as command
import scorefield.commands.teacher as train_teacher
from scorefield.commands.options import TrainTeacher

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("CASES", "1000"))
WALL, CPU = 120, 20
"""Seconds of a case that is no hang: of a busy machine, and of its own."""


class Hung(BaseException):
    """Not an Exception: nothing may catch it on the way."""


CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "shutil.rmtree")
NEVER = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn", "socket.connect",
    "socket.getaddrinfo", "socket.sendto", "socket.bind", "pickle.find_class",
)  # fmt: skip


class Guard:
    """An audit hook, which stays for good, and notes what a case must not do."""

    def __init__(self):
        self.folder, self.allowed, self.found = None, (), []
        sys.addaudithook(self)

    @contextlib.contextmanager
    def watching(self, folder, *allowed):
        self.folder, self.allowed, self.found = str(folder), tuple(map(str, allowed)), []
        try:
            yield self.found
        finally:
            self.folder = None

    def __call__(self, event, arguments):
        if self.folder is None:
            return
        first = arguments[0] if arguments else None
        if event == "exec":
            bad = str(getattr(first, "co_filename", "")).startswith(self.folder)
        elif event == "open":
            named = isinstance(first, str | bytes | os.PathLike) and isinstance(arguments[2], int)
            writes = named and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            bad = bool(writes) and not self._may_be_written(first)
        elif event in CHANGES:
            # What is removed relative to an open folder was reached through its parent.
            bad = not self._may_be_written(first) and os.path.isabs(os.fsdecode(first))
        else:
            bad = event in NEVER
        if bad:
            self.found.append((event, str(arguments)[:200]))

    def _may_be_written(self, name):
        name = os.fsdecode(name)
        return name == os.devnull or os.path.abspath(name).startswith(self.allowed)


@pytest.fixture(scope="module")
def guard():
    return Guard()


@contextlib.contextmanager
def limited(words):
    def hung(number, frame):
        raise Hung(words)

    before = {number: signal.signal(number, hung) for number in (signal.SIGALRM, signal.SIGPROF)}
    signal.setitimer(signal.ITIMER_REAL, WALL)
    signal.setitimer(signal.ITIMER_PROF, CPU)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def run(script, words):
    """Exit code, and what was said."""
    AcceleratorState._reset_state(True)
    said = io.StringIO()
    try:
        with limited(words), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            if script in cli.COMMANDS:
                cli.main([*script.split(), *words])
            else:
                command.run(importlib.import_module(script).main, options_of(script), arguments=words)
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        torch.use_deterministic_algorithms(False)
    return code, said.getvalue()


def options_of(script):
    """The dataclass of a command, or of a script that is none."""
    if script in cli.COMMANDS:
        return cli.found(cli.COMMANDS[script].options)
    return importlib.import_module(script).Config


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def campaign(cases, one):
    """Run ``one(number)`` for each case; all that failed are told together, by their numbers."""
    faults, codes = [], {}
    for number in range(cases):
        try:
            code = one(number)
            codes[code] = codes.get(code, 0) + 1
        except Exception as error:
            faults.append(f"case {number}: {type(error).__name__}: {str(error)[:1500]}")
        except Hung as hung:
            faults.append(f"case {number}: hung in {hung}")
    print(f"{cases} cases, exit codes {codes}, {len(faults)} faults")
    assert not faults, "\n".join(faults)
    return codes


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
    shutil.rmtree(root / "run")
    for folder in root.iterdir():
        for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
            (place / "payload.py").write_text("raise SystemError('imported')")
    return root


DELETED = object()
DEEP = {"a": {}}
for _ in range(400):
    DEEP = {"a": DEEP}
VALUES = [
    DELETED, None, True, False, 0, 1, -1, 2, 3, 7, 16, 10**6, 10**12, 2**63, 10**400, 0.5, -0.5, 1e-300, 1e300, "",
    "x", "auto", "../../etc/passwd", "/dev/zero", "payload:make", "payload.Model", "os:system", "a\nb\x1b[2J",
    "\ud800", [], [0], [1, 2], [8, 16, 32], ["a", 1], [[]], [None], {}, {"a": 1}, DEEP, "FluxPipeline",
    "UNet2DModel", "CLIPTextModel", "LCMScheduler", "linear", "sample", "v_prediction",
    ["diffusers", "AutoencoderKL"], ["payload", "Model"],
]  # fmt: skip
KEYS = {
    "auto_map": {"AutoModel": "payload.Model", "AutoTokenizer": ["payload.T", None]}, "custom_pipeline": "payload",
    "quantization_config": {"quant_method": "bitsandbytes"}, "_attn_implementation": "kernels-community/flash",
    "architectures": ["payload.Model"], "_name_or_path": "somebody/else", "torch_dtype": "float8", "dtype": "x",
    "tokenizer_class": "payload.T", "processor_class": "payload.P", "_class_name": ["payload", "Model"],
    "model_type": "payload", "trust_remote_code": True, "gguf_file": "x.gguf", "vocab_file": "/etc/passwd",
    "is_decoder": True, "output_hidden_states": True, "return_dict": False, "chat_template": "{{ 1/0 }}",
    "added_tokens_decoder": {"0": {"content": "x", "special": True}, "x": 1}, "network": "function",
    "time_scale": 1e-300, "times": [1, 2], "conditioning_times": [2.0, 9.0, -1.0], "adapter": "payload",
    "dmd2_denoising_timesteps": [1e9, "x"], "transformers_weights": "../x", "use_safetensors": False,
}  # fmt: skip


def places(content, path=()):
    """Where the values of a JSON document are."""
    items = (
        content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    )
    for key, value in items:
        yield (*path, key)
        if not (isinstance(value, dict | list) and len(value) > 200):  # vocabularies
            yield from places(value, (*path, key))


def mutated(content, chance):
    """A JSON document with one to three values replaced, removed or added."""
    content = copy.deepcopy(content)
    for _ in range(chance.randint(1, 3)):
        found = list(places(content))
        if not found or chance.random() < 0.15:
            if isinstance(content, dict):
                key = chance.choice(list(KEYS))
                content[key] = KEYS[key]
            continue
        *path, last = chance.choice(found)
        holder = content
        for key in path:
            holder = holder[key]
        value = chance.choice(VALUES)
        if value is DELETED:
            del holder[last]
        else:
            holder[last] = copy.deepcopy(value)
    return content


def spoilt(data, chance):
    """Bytes with some changed, cut off, or put in."""
    place = chance.randrange(max(1, len(data)))
    kind = chance.randrange(4)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + chance.randbytes(chance.randint(1, 9)) + data[place:]
    if kind == 2:
        junk = [b"[" * 100_000, b'"', b"}", b"NaN", b"1e999", b"\xff\xfe", b"\0"]
        return data[:place] + chance.choice(junk) + data[place:]
    return data[:place] + chance.randbytes(4) + data[place + 4 :]


def mutate_text(file, chance):
    data = file.read_bytes()
    if chance.random() < 0.2:
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


def model_commands(root, out, kind):
    model, dry = str(root / "model"), ["--dry-run", "--out", str(out)]
    draw = ["--teacher", model, "--num-images", "1", "--steps", "2", "--out", str(out / "made.npz")]
    teach = ["--teacher", model, "--skip-teacher-check", *dry]
    if kind in ("pixels", "ours"):
        return [("sample", draw), ("distill", [*teach, "--gan-weight", "0"])]
    learn = ["dreamfusion", "a", "--precision", "no", "--canvas", "--teacher", model, *dry]
    return [
        ("sample", [*draw, "--prompts", "a mug"]), ("sds", learn),
        ("distill", [*teach, "--precision", "no", "--prompts", str(root / "prompts.txt")]),
    ]  # fmt: skip


def test_folders_of_models(models, guard, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "prompts.txt").write_text("a mug\na chair\n")
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    kinds = ["sd", "sd", "sd", "sd3", "pixels", "ours", "ours"]
    monkeypatch.chdir(tmp_path)

    def start(kind):
        for folder in (tmp_path / "model", tmp_path / "out", cache):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(models / kind, tmp_path / "model")

    for kind in sorted(set(kinds)):
        start(kind)
        for script, words in model_commands(tmp_path, tmp_path / "out", kind):
            assert run(script, words)[0] == 0, "what is not spoilt works"

    def one(number):
        chance = random.Random(number)
        kind = chance.choice(kinds)
        start(kind)
        files = sorted((tmp_path / "model").rglob("*.json")) + sorted((tmp_path / "model").rglob("*.safetensors"))
        file = chance.choice([file for file in files if file.name != ".scorefield.json"])
        (mutate_text if file.suffix == ".json" else mutate_header)(file, chance)
        (tmp_path / "out").mkdir()
        script, words = chance.choice(model_commands(tmp_path, tmp_path / "out", kind))
        before, said = listing(tmp_path / "model"), ""
        with guard.watching(tmp_path / "model", tmp_path / "out", cache, "/tmp/tmp", "/proc/", "/dev/shm"):
            code, said = run(script, words)
            found = list(guard.found)
        about = f"{kind} {file.relative_to(tmp_path / 'model')} {script}: {code} {said[-600:]}"
        assert not found, f"{about} {found}"
        assert listing(tmp_path / "model") == before, about
        assert code in (0, 2), about
        if code == 2 or script != "sample":
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
    (root / "empty").mkdir()
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
        "train_circles": ["--dry-run"], "train_toyworld": ["--dry-run"], "demo": ["--dry-run"],
        "sample": ["--teacher", ours, "--num-images", "2", "--steps", "2"],
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
UNTOUCHED = {"dry_run", "compile", "out", "device", "preset", "prompt"}


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
        words = [*lines[name], "--out", str(out), *hostile(options_of(script), chance, places)]
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
