"""The network inside what torch wraps round it."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside wrappers of DDP and of ``torch.compile``, in either order, or the network itself."""
    while True:
        inner = network.module if isinstance(network, DistributedDataParallel) else network
        # Compiled modules name their weights "_orig_mod. ...", which nothing else could load.
        inner = getattr(inner, "_orig_mod", inner)
        if inner is network:
            return network
        network = inner


def is_ddp(network: nn.Module) -> bool:
    """Whether DDP averages this network's gradients."""
    return isinstance(getattr(network, "_orig_mod", network), DistributedDataParallel)
