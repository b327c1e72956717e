"""Many prompts in one process: each is a run of its own, and all share the teacher."""

import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from tqdm import tqdm

from scorefield.commands.command import hold
from scorefield.data.texts import read_texts
from scorefield.files import load_json, printable
from scorefield.progress import is_first_rank
from scorefield.training import checkpoint
from scorefield.training.identity import resolved
from scorefield.training.refusal import BEGUN
from sds.options import Config, check

LONGEST = 60
"""Characters of a prompt in the name of its folder."""


def runs_of(config: Config) -> list[Config]:
    """Return the options of each run that a command asks for: one, or one for each prompt of ``--prompts``.

    Raises ``ValueError`` for a file that cannot be read, and for a prompt that is there twice.
    """
    if not config.prompts:
        return [config]
    found: dict[str, Config] = {}
    for prompt in read_texts(config.prompts, on_bad_data=config.on_bad_data).prompts:
        name = f"{slug(prompt)}-{config.seed}"
        if name in found:
            raise ValueError(
                f"--prompts {config.prompts} holds {prompt[:80]!r} twice, and both runs would be {name}. Leave "
                "one out; for another scene of it pass another --seed."
            )
        found[name] = replace(config, prompt=prompt, prompts="", out=config.out / name)
    for one in found.values():
        check(one)
    return list(found.values())


def slug(prompt: str) -> str:
    """Return a name for the folder of a prompt: its letters and digits, in lower case.

    Where that says less than the prompt does, six digits of its hash follow, so that two prompts never share one.

    >>> slug("a red mug"), slug("a mug, red!")
    ('a-red-mug', 'a-mug-red-bad393')
    """
    name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:LONGEST].strip("-")
    if name.replace("-", " ") == prompt:
        return name
    return "-".join(filter(None, [name, hashlib.sha256(prompt.encode()).hexdigest()[:6]]))


def is_finished(config: Config) -> bool:
    """Return True for a run that was trained to its end and exported with these very options."""
    done = config.out / ("canvas.png" if config.canvas else "export/report.json")
    try:
        same = load_json(config.out / "config.json") == resolved(config)
    except (OSError, ValueError):
        return False
    newest = checkpoint.newest(config.out / "checkpoints")
    return same and done.is_file() and newest is not None and newest.name == f"step-{config.steps:09d}"


def run_all(runs: Sequence[Config], run: Callable[[Config], None], *, alone: bool) -> None:
    """Call ``run`` with the options of each run. One that fails does not end the others.

    Args:
        runs: Options of each run, which holds its folder meanwhile.
        run: Makes one scene.
        alone: There is one process. Of several, one may fail and the others would wait for it: there only a scene
            that was lost, which all see, lets the next run begin.

    Raises ``ValueError`` in the end, naming the runs that failed.
    """
    survived = (FloatingPointError, ValueError, OSError) if alone else FloatingPointError
    failed = []
    for number, config in enumerate(runs, 1):
        if is_first_rank():
            print(f"prompt {number} of {len(runs)}: {printable(config.prompt)}, in {config.out}", flush=True)
        try:
            with ExitStack() as held:
                hold(config.out, held)
                run(config)
        except survived as error:
            failed.append(config.out.name)
            if is_first_rank():
                tqdm.write(f"error in {config.out}: {printable(str(error))}", file=sys.stderr)
    if failed:
        failure = ValueError(
            f"{len(failed)} of {len(runs)} prompts failed: {', '.join(failed)}. The others are finished; the same "
            "command tries these again."
        )
        failure.add_note(BEGUN)
        raise failure
