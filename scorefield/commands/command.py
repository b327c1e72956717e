"""How every command runs: parse into a frozen dataclass, hold the output folder, turn errors into exit codes.

Exit codes: 0 done, 1 the run failed, 2 the input was refused before anything was written, 128 + n stopped by
signal n.
Importing this module imports no torch: a typo is answered at once.
"""

import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from scorefield.atomic import is_full
from scorefield.commands.groups import parse
from scorefield.files import printable
from scorefield.progress import working
from scorefield.training.launcher import check_places, is_first_rank
from scorefield.training.lock import FolderLock
from scorefield.training.options import RunOptions
from scorefield.training.refusal import BEGUN, Ranks, Refusal

C = TypeVar("C")

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

RENAMED = {
    **dict.fromkeys(("--model", "--base", "--pipeline"), "is called --teacher now. Pass --teacher in its place."),
    "--negative": "is called --negative-prompt now. Pass --negative-prompt in its place.",
    "--teacher-size": "is called --size now. Pass --size in its place; of renders it is --render-size.",
    "--resolution": "is called --size now. Pass --size in its place.",
    "--prompt": 'is the word after the preset now: scorefield sds toyworld "a red mug".',
    "--preset": "is the first word now: scorefield distill toyworld-1step, scorefield sds toyworld.",
}
"""Options of earlier versions, and what to do instead."""


def run(
    main: Callable[[C], Path | None], options: type[C], description: str = "", *,
    arguments: Sequence[str] | None = None, prog: str | None = None, default: C | None = None,
    folders: Callable[[C], Sequence[Path]] | None = None,
) -> None:  # fmt: skip
    """Parse the command line into ``options`` and call ``main``.

    Bad input, or a file that cannot be read, is printed in one line and exits with 2; a run that stopped because
    it was not finite, or the disk is full, exits with 1. Ctrl-C exits with 130. A rank that gives up takes the
    others with it: all have its exit code, and it alone says why.

    Args:
        main: the command.
        options: a dataclass.
        description: printed by --help; by default the docstring of ``options``.
        arguments: words after the command; by default ``sys.argv[1:]``.
        prog: the command, for --help.
        default: values that are not given, such as those of a preset.
        folders: what no other run may use meanwhile; by default ``--out`` of a training.
    """
    warnings.formatwarning = one_line
    words = sys.argv[1:] if arguments is None else list(arguments)
    held = ExitStack()
    _refuse_places()
    ranks = Ranks(partial(_follow, held))
    try:
        with held:
            refuse_control(words)
            refuse_renamed(words)
            config = parse(options, words, prog=prog, description=description or options.__doc__, default=default)
            for folder in _out_of(config) if folders is None else folders(config):
                hold(folder, held)
            with working(prog or "run"):  # so that no part of it is silent, whatever it is
                main(config)
    except KeyboardInterrupt:
        if is_first_rank():
            print("\nstopped by Ctrl-C; the same command goes on from what is saved", file=sys.stderr)
        sys.exit(130)
    except SystemExit as stop:
        if stop.code == 2:  # of the parser
            ranks.give_up(2)
        raise
    except Exception as error:
        message, code = _explained(error)
        if (
            isinstance(error, BrokenPipeError) and code == 2
        ):  # of `scorefield ... --help | head`: it has heard enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)  # as of a program that SIGPIPE ends
        first = _tell(ranks, code, unexpected=message is None)
        if message is None:
            raise
        if first:
            say(message)
        if ranks.several:
            _end(code)
        sys.exit(code)
    finally:
        ranks.close()


def _tell(ranks: Ranks, code: int, unexpected: bool) -> bool:
    """Tell the others that this rank gives up; True where it is the first one."""
    if unexpected:
        ranks.wait_for_word()
    if ranks.several:  # torchrun sends it as soon as one of them has ended
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return ranks.give_up(code)


def _end_quietly() -> NoReturn:
    """Exit as a program does that SIGPIPE ends: whoever reads, as in ``--help | head``, has heard enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)


def _refuse_places() -> None:
    # Before anything speaks as one of several ranks.
    try:
        check_places()
    except ValueError as error:
        say(str(error))
        sys.exit(2)


def _explained(error: Exception) -> tuple[str | None, int]:
    """Return what to say of an error, or None for a fault of the program, and the exit code."""
    refused = 1 if BEGUN in getattr(error, "__notes__", ()) else 2
    if is_full(error):
        return f"the disk is full, or its quota is used up: {error}. What was saved before is whole.", 1
    if isinstance(error, ValueError | OSError | FloatingPointError):
        return str(error), 1 if isinstance(error, FloatingPointError) else refused
    # On a CPU torch has no class of its own for it.
    if (
        type(error).__name__ == "OutOfMemoryError"
        or isinstance(error, MemoryError)
        or "allocate memory" in str(error)
    ):
        return f"not enough memory: {error} Lower --batch-size or the size of the network.", refused
    return None, 1


def _follow(held: ExitStack, refusal: Refusal) -> None:
    """End this process as another rank ended; no exception would reach a main thread that waits for that rank."""
    if refusal.why:
        say(refusal.why)
    held.close()
    _end(refusal.code)


def _end(code: int) -> NoReturn:
    """Exit without what Python does at its end, in which ranks wait for each other."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def refuse_renamed(arguments: Sequence[str]) -> None:
    """Raise ``ValueError`` for an option of an earlier version, saying what took its place."""
    for argument in arguments:
        if (flag := argument.partition("=")[0]) in RENAMED:
            raise ValueError(f"{flag} {RENAMED[flag]}")


def refuse_control(arguments: Sequence[str]) -> None:
    """Raise ``ValueError`` for a word with characters that move a cursor: the parser prints words as they are.

    They come with names of files that a shell put in. Line feeds and tabs, which a prompt may have, are let pass.
    """
    for argument in arguments:
        if CONTROL.search(argument):
            raise ValueError(
                f"the word {argument[:80]!r} holds control characters. Leave them out; if a file is called so, "
                "rename it, or name the folder it is in."
            )


def _out_of(config: Any) -> list[Path]:
    return [config.out] if isinstance(config, RunOptions) and not config.dry_run else []


def hold(folder: Path, held: ExitStack) -> None:
    """Take the folder for this run, until ``held`` closes; the first rank does it for all.

    Raises ``FolderInUseError`` where another run has it. A folder that cannot be made is refused by
    :func:`check_out`, which says why.
    """
    if not is_first_rank():
        return
    lock = FolderLock(folder)
    held.callback(lock.release)
    with suppress(OSError):
        lock.acquire()


def say(message: str) -> None:
    """Say in one line why this rank ends."""
    rank = "" if is_first_rank() else f" on rank {os.environ['RANK']}"
    print(f"error{rank}: {printable(message)}", file=sys.stderr)


def one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return a warning as Python prints it, on one line whatever names it holds, without the line of code."""
    del line
    return f"{printable(filename)}:{lineno}: {category.__name__}: {printable(str(message))}\n"
