"""An optimiser whose state waits in the computer's memory while others learn."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def offload_state(optimizer: Optimizer, home: torch.device | str = "cpu") -> Optimizer:
    """Keep the optimiser's state at ``home`` except within ``step``; returns the optimiser.

    The student's moments are idle while the fake score learns, four iterations of five. The state travels once per
    step in each direction; numbers and checkpoints are the same.
    """

    def fetch(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, state in optimizer.state.items():
            _move(state, parameter.device)

    def put_away(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for state in optimizer.state.values():
            _move(state, torch.device(home))

    optimizer.register_step_pre_hook(fetch)
    optimizer.register_step_post_hook(put_away)
    optimizer.register_load_state_dict_post_hook(lambda loaded: put_away(loaded, None, None))
    return optimizer


def _move(state: dict[str, Any], device: torch.device) -> None:
    for name, value in state.items():
        if isinstance(value, Tensor):
            state[name] = value.to(device)
