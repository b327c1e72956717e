"""Frozen weights in 4 or 8 bits, so that a large teacher fits a small card. What they compute stays as it was.

    quantize(teacher.denoiser.network, "nf4", device="cuda")

The weights of the linear layers inside the blocks of a network are rounded; a transformer has hardly any others.
Embeddings, norms, convolutions and biases keep their precision. Inputs and outputs are not rounded: the gradient
to the inputs is exactly that of the rounded network, and low-rank changes (:mod:`scorefield.models.lora`) learn on
top in full precision, as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

- nf4: bitsandbytes' NormalFloat4, blocks of 64 weights, their scales rounded to 8 bits: 4.13 bits a weight;
- int8: torchao's 8-bit integers, one scale per output: a little over 8 bits a weight.
"""

import copy
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from scorefield.choices import QUANTIZE_PACKAGES, Quantize

SMALLEST = 4096
"""Weights of the smallest layer that is rounded: below, the tables of the scales outweigh what is saved."""


def check_package(how: Quantize) -> None:
    """Raise ``ValueError`` where the package that rounds the weights is not installed."""
    package = QUANTIZE_PACKAGES.get(how)
    if package and find_spec(package) is None:
        raise ValueError(f"rounding weights to {how} needs: pip install {package}.")


def quantize(network: nn.Module, how: Quantize, device: torch.device | str = "cpu") -> nn.Module:
    """Round the weights of the linear layers in the blocks of a frozen network in place; move it to ``device``.

    It goes layer by layer, so that the device never holds the unrounded network.

    Args:
        network: frozen; not rounded yet; its weights may be on the CPU.
        how: "no", "nf4" or "int8".
        device: where the network goes.

    Raises:
        ValueError: the package is missing, or the network has no linear layer in a block.
    """
    check_package(how)
    if how == "no":
        return network.to(device)
    for name in _rounded_layers(network, how):
        parent, _, last = name.rpartition(".")
        owner, layer = network.get_submodule(parent), network.get_submodule(name)
        setattr(owner, last, _nf4(layer, device) if how == "nf4" else _int8(layer, device))
    return network.to(device)


def count_weights(network: nn.Module) -> tuple[int, int]:
    """Return how many parameters a network has, and their bytes with the scales of those that are rounded."""
    parameters = list(network.parameters())
    return sum(map(_number_of, parameters)), sum(map(_bytes_of, parameters))


def planned_weights(network: nn.Module, how: Quantize = "no") -> tuple[int, int]:
    """Return what :func:`count_weights` of a network will be once it is rounded, of shapes alone.

    It may be on the meta device, and no package is needed. Raises ``ValueError`` where nothing can be rounded.
    """
    number, size = count_weights(network)
    if how == "no":
        return number, size
    rounded: list[Any] = [network.get_submodule(name).weight for name in _rounded_layers(network, how)]
    return number, size + sum(_planned(weight, how) - _bytes_of(weight) for weight in rounded)


def unpacked(network: nn.Module, how: Quantize = "no") -> int:
    """Return the bytes of the largest rounded layer as it computes: each is unpacked while it is used.

    ``how`` is for a network that is not rounded yet, as in :func:`planned_weights`.
    """
    if how != "no":
        weights: list[Any] = [network.get_submodule(name).weight for name in _rounded_layers(network, how)]
        return max(int(weight.numel() * weight.element_size()) for weight in weights)
    layers: list[Any] = [module for module in network.modules() if is_quantized(getattr(module, "weight", None))]
    sizes = [one.in_features * one.out_features * _computed_in(one).itemsize for one in layers]
    return max(sizes, default=0)


def _computed_in(layer: Any) -> torch.dtype:
    dtype: torch.dtype = getattr(layer, "compute_dtype", layer.weight.dtype)
    return dtype


def _planned(weight: Any, how: Quantize) -> int:
    outputs, inputs = weight.shape
    if how == "int8":  # and a float32 scale for each output
        return int(outputs * inputs + 4 * outputs)
    # Two weights a byte. Scales of 64 weights, less their mean, are rounded to 8 bits, 256 of them with a float32
    # scale of their own. Each layer has the tables of the 16 values, and of the 256 that scales take.
    scales = -(-outputs * inputs // 64)
    return -(-outputs * inputs // 2) + scales + 4 * -(-scales // 256) + 4 * (1 + 16 + 256)


def stored(weight: Any) -> list[Tensor]:
    """Return the tensors that hold a weight: itself, or rounded numbers and their scales."""
    if state := getattr(weight, "quant_state", None):
        nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
        return [weight.data, state.absmax, state.code, *nested]
    if is_quantized(weight):
        return [getattr(weight, name) for name in weight.tensor_data_names]
    return [weight]


def stored_weights(network: nn.Module) -> list[Tensor]:
    """Return the tensors that hold the weights of a network, as :func:`stored` has them, for fingerprints."""
    return [part for parameter in network.parameters() for part in stored(parameter)]


def dequantized(layer: nn.Module) -> nn.Module:
    """Return a linear layer with the weights that a rounded one computes with; any other layer as it is."""
    weight: Any = getattr(layer, "weight", None)
    if not is_quantized(weight):
        return layer
    own: Any = layer
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        full = dequantize_4bit(weight.data, weight.quant_state).to(own.compute_dtype)
    else:
        full = weight.dequantize()
    plain = nn.utils.skip_init(
        nn.Linear,
        own.in_features,
        own.out_features,
        bias=own.bias is not None,
        device=full.device,
        dtype=full.dtype,
    )
    plain.weight = nn.Parameter(full, requires_grad=False)
    plain.bias = own.bias
    return plain


def outlined(network: nn.Module) -> nn.Module:
    """Return a copy on the meta device: shapes without numbers, of rounded layers those that they had before."""
    memo: dict[int, Any] = {}
    for module in network.modules():
        own: Any = module
        if is_quantized(getattr(module, "weight", None)):
            memo[id(module)] = nn.Linear(
                own.in_features, own.out_features, own.bias is not None, device="meta", dtype=_computed_in(own)
            ).requires_grad_(False)  # fmt: skip
    for tensor in (*network.parameters(), *network.buffers()):
        if is_quantized(tensor):  # its layer is there already
            continue
        empty = torch.empty_like(tensor, device="meta")
        is_weight = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
    return copy.deepcopy(network, memo)


def is_quantized(weight: object) -> bool:
    """Return True for a weight that :func:`quantize` rounded."""
    return hasattr(weight, "quant_state") or type(weight).__module__.startswith("torchao.")


def _rounded_layers(network: nn.Module, how: Quantize) -> list[str]:
    names = [name for name, module in network.named_modules() if _is_rounded(name, module)]
    if not names:
        raise ValueError(
            f"a {type(network).__name__} has no linear layers of {SMALLEST:,} weights in blocks: nothing to round "
            f"to {how}."
        )
    return names


def _is_rounded(name: str, module: nn.Module) -> bool:
    # Blocks stand in lists: "transformer_blocks.0.attn.to_q". What is before and behind them is small.
    in_block = any(part.isdigit() for part in name.split("."))
    return in_block and type(module) is nn.Linear and module.weight.numel() >= SMALLEST


def _nf4(layer: Any, device: torch.device | str) -> nn.Module:
    import bitsandbytes

    weight: Tensor = layer.weight.detach()
    rounded: Any = bitsandbytes.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=False,
        compute_dtype=weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    rounded.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=rounded)
    rounded.bias = layer.bias
    # On CPUs with AVX512 a call without gradients would pack the weights, which several roles share, into a form
    # that later calls get no gradient through.
    rounded.support_avx512bf16_for_cpu = False
    return rounded.to(device)  # which rounds


def _int8(layer: nn.Module, device: torch.device | str) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    holder = nn.Sequential(layer)
    quantize_(holder, Int8WeightOnlyConfig(), device=torch.device(device))
    return holder[0].requires_grad_(False)


def _number_of(parameter: Any) -> int:
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if state is None else state.shape.numel())


def _bytes_of(parameter: Tensor) -> int:
    return sum(one.numel() * one.element_size() for one in stored(parameter))
