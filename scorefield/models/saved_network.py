"""The network of a saved denoiser: built by its description, or by the function that the user names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scorefield.denoiser import NetworkDenoiser
from scorefield.models.networks import build_network
from scorefield.models.storage import WEIGHTS
from scorefield.models.user_code import call
from scorefield.models.weights import check_fit


def network_of(folder: Path, facts: Mapping[str, Any], network: str) -> nn.Module:
    """Return the network that ``facts`` of a folder describe, or that the user's ``network`` builds.

    Raises ``ValueError`` for weights that do not fit, and for a folder that needs code and was given none.
    """
    if facts["network"] != "function":
        if network:
            raise ValueError(
                f"--network is for students of a module:function; {folder} says how its network is built."
            )
        # Facts and weights may come from anywhere. A network that would fill the memory costs none on "meta".
        with torch.device("meta"):
            planned = build_network(facts)
        check_fit(folder / WEIGHTS, planned)
        return build_network(facts)
    if network:
        return own_network(network)
    # A folder may come from anywhere. Its word for the function is repeated here, and never imported.
    options = facts.get("options")
    hint = str(options.get("name") if isinstance(options, dict) else None)[:80]
    raise ValueError(
        f"{folder} holds the weights of a network that its owner's code builds; it names {hint!r}, and what a "
        "folder names is not run. If you have that code and trust it, pass --network module:function to "
        "`scorefield sample` or `scorefield distill`: a function that returns the network, or the teacher, with "
        "weights of any kind."
    )


def own_network(name: str) -> nn.Module:
    """Return the network that the user's ``module:function`` builds, alone, in a denoiser or in a teacher.

    Raises ``ValueError`` for a function that fails, or returns anything else.
    """
    built = call(name)
    if not isinstance(built, nn.Module | NetworkDenoiser):
        built = getattr(built, "denoiser", built)  # of a teacher
    built = built.network if isinstance(built, NetworkDenoiser) else built
    if not isinstance(built, nn.Module):
        raise ValueError(
            f"--network {name} must return a network, a NetworkDenoiser or a Teacher; got {type(built).__name__}."
        )
    return built
