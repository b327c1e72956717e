"""What campaigns of hostile inputs share: the guard, the limits, one case after another, JSON and bytes spoilt."""

import contextlib
import copy
import faulthandler
import importlib
import io
import os
import resource
import signal
import sys

import torch
from accelerate.state import AcceleratorState

import scorefield.cli as cli
import scorefield.commands.command as command

CASES = int(os.environ.get("CASES", "1000"))
WALL, CPU = 120, 20
"""Seconds of a case that is no hang: of a busy machine, and of its own."""

MEMORY = 8 * 2**30
"""Bytes that a campaign may take on top of what it begins with; more would be a file that fills the memory."""


class Hung(BaseException):
    """Not an Exception: nothing may catch it on the way."""


CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "shutil.rmtree")
NEVER = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn", "socket.connect",
    "socket.getaddrinfo", "socket.sendto", "socket.bind", "pickle.find_class",
)  # fmt: skip


class Guard:
    """An audit hook, which stays for good, and notes what a case must not do, and which files it reads."""

    def __init__(self):
        self.folder, self.allowed, self.found, self.opened = None, (), [], set()
        sys.addaudithook(self)

    @contextlib.contextmanager
    def watching(self, folder, *allowed):
        self.folder, self.allowed, self.found = str(folder), tuple(map(str, allowed)), []
        self.opened = set()
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
            if named and not writes:
                self.opened.add(os.path.abspath(os.fsdecode(first)))
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


@contextlib.contextmanager
def limited(words):
    def hung(number, frame):
        raise Hung(words)

    before = {number: signal.signal(number, hung) for number in (signal.SIGALRM, signal.SIGPROF)}
    signal.setitimer(signal.ITIMER_REAL, WALL)
    signal.setitimer(signal.ITIMER_PROF, CPU)
    # A library that waits below Python hears no signal: the campaign ends there, and says where.
    faulthandler.dump_traceback_later(2 * WALL, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def little_memory():
    """At most ``MEMORY`` more than now: what asks for more fails at once, and not when the machine is full."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


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
    numbers = [int(os.environ["CASE"])] if "CASE" in os.environ else range(cases)
    with little_memory():
        for number in numbers:
            if number % 50 == 0:
                print(f"case {number}: {codes}, {len(faults)} faults", file=sys.stderr, flush=True)
            try:
                code = one(number)
                codes[code] = codes.get(code, 0) + 1
            except Exception as error:
                if "CASE" in os.environ:
                    raise  # with its traceback
                faults.append(f"case {number}: {type(error).__name__}: {str(error)[:1500]}")
            except Hung as hung:
                faults.append(f"case {number}: hung in {hung}")
    print(f"{len(numbers)} cases, exit codes {codes}, {len(faults)} faults")
    assert not faults, "\n".join(faults)
    return codes


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
