"""torch.compile for networks that others listen to: whole where nobody does, else in pieces around the places.

Compiled code does not call a hook that is registered later, such as that of a critic on the bottleneck of its fake
score. So a module that is listened to stays as it is, and so do those around it. What they are made of is compiled
piece by piece: the blocks of a UNet or a transformer.
"""

from collections.abc import Iterator

from torch import nn

VARIANTS = 8
"""Kinds of code for one piece: with and without gradients, under autocast, and for batches of two sizes."""


def compile_network(network: nn.Module) -> None:
    """Compile in place, so that names of weights stay; whoever listens to a part hears it as before.

    A module may have two attributes more than others: ``heard``, the modules that it puts hooks on at each call,
    and ``backbone``, a network that is none of its own submodules, as a LoRA's.
    """
    if not _heard(network):
        whole = getattr(network, "backbone", network)
        whole.compile()
        return
    import torch._dynamo as dynamo  # seconds

    found = list(pieces(network))
    # All share the code of nn.Module's call, and torch gives up at eight variants of one code, without an error.
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, VARIANTS * len(found))
    dynamo.config.accumulated_recompile_limit = max(
        dynamo.config.accumulated_recompile_limit, 4 * dynamo.config.recompile_limit
    )
    for piece in found:
        piece.compile()


def pieces(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the largest parts that are not listened to and hold nothing that is.

    Single layers are left out: there is nothing to fuse in them.
    """
    yield from _pieces(network, _heard(network))


def _pieces(module: nn.Module, heard: set[int]) -> Iterator[nn.Module]:
    holder = isinstance(module, nn.ModuleList | nn.ModuleDict)  # which is never called
    if holder or heard & {id(part) for part in _inside(module)}:
        for part in _parts(module):
            yield from _pieces(part, heard)
    elif any(True for _ in module.children()):
        yield module


def _heard(network: nn.Module) -> set[int]:
    return {id(module) for part in _inside(network) for module in getattr(part, "heard", ())}


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    yield module
    for part in _parts(module):
        yield from _inside(part)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    yield from module.children()
    backbone = getattr(module, "backbone", None)
    if isinstance(backbone, nn.Module) and backbone not in module.children():
        yield backbone
