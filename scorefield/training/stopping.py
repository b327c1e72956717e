"""How a training is asked to stop, and how it answers: Ctrl-C, a terminal that closes, a scheduler."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator
from tqdm import tqdm

from scorefield.training.launcher import is_first_rank
from scorefield.training.refusal import BEGUN

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextmanager
def stop_signals(accelerator: Accelerator) -> Iterator[Callable[[int], int]]:
    """Ask at a step whether any rank got SIGTERM, SIGINT or SIGHUP: the signal's number, or 0.

    All ranks get the same answer, and stop after the same step. Several ranks ask each other in every tenth step
    only, since each time they wait for one another. A step that raises, such as ``FloatingPointError``, has
    nothing to save: the process that was asked exits with 128 + the signal's number instead. After one SIGINT the
    next ends the process at once; what is on disk is whole at any moment. A signal that was ignored before, as
    under nohup, still is.
    """
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            if is_first_rank():  # print may not be called while it is interrupted
                os.write(2, b"\nCtrl-C: saving a checkpoint after this step; press it again to end at once\n")

    def answer(step: int) -> int:
        number = asked[0] if asked else 0
        if accelerator.num_processes > 1:
            if step % 10:
                return 0
            number = int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
        if number and not asked:
            asked.append(number)
        return number

    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, note)
    try:
        yield answer
    except Exception as error:
        if not asked:
            error.add_note(BEGUN)
            raise
        tqdm.write(
            f"asked to end by {signal.Signals(asked[0]).name}, in a step that is not saved: {error}",
            file=sys.stderr,
        )
        raise SystemExit(128 + asked[0]) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
