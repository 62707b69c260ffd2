"""`torch.ops.prosparse.ffn`: an FFN of any number of tokens as one opaque operator.

Code that an engine compiles does not know its number of tokens, and a CUDA graph has one for each size that is captured. So
the operator chooses when it runs: as many tokens as `crossover` says go through the sparse kernels, more through torch's matrix
products, on the same weights.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from ..crossover import most_tokens
from ..formula import DRELU, Formula
from ..torch import ops as _ops  # noqa: F401  defines the namespace
from ..torch.activation import FATReLU, combined, module_of
from ..torch.dispatch import dispatched, few_tokens

_LIBRARY = torch.library.Library("prosparse", "FRAGMENT")
_LIBRARY.define(
    'ffn(Tensor x, Tensor[] w_in, Tensor w_down, float threshold=0.0, *, str activation="relu", bool gated=True, '
    "Tensor[]? b_in=None, Tensor? b_down=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


def _ffn(
    x: Tensor,
    w_in: list[Tensor],
    w_down: Tensor,
    threshold: float = 0.0,
    *,
    activation: str = "relu",
    gated: bool = True,
    b_in: list[Tensor] | None = None,
    b_down: Tensor | None = None,
) -> Tensor:
    """The FFN of tokens `x`, (..., d_model).

    `w_in` is [gate, up], or one matrix with the rows of both, or [up] of a block without a gate; `b_in` their biases, or
    nothing. `w_down` is (d_model, d_ff) as `nn.Linear` has it, the transposed view of contiguous memory.
    """
    weights, biases = [plain(w) for w in w_in], [plain(b) for b in b_in or ()]
    down, down_bias = plain(w_down), None if b_down is None else plain(b_down)
    tokens = few_tokens(x, most_tokens("sparse_ffn"))
    if tokens is None:
        return _dense(x, weights, biases, down, down_bias, threshold, activation, gated)
    return _sparse(tokens, weights, biases, down, down_bias, threshold, activation, gated).view_as(x)


def plain(tensor: Tensor) -> Tensor:
    """The same memory as a torch.Tensor itself: engines have parameters of their own classes."""
    return tensor.detach().as_subclass(Tensor)


def _sparse(
    tokens: Tensor,
    w_in: list[Tensor],
    b_in: list[Tensor],
    w_down: Tensor,
    b_down: Tensor | None,
    threshold: float,
    activation: str,
    gated: bool,
) -> Tensor:
    """Few tokens, (B, d_model), by the sparse operators."""
    *gate, up = _halves(w_in) if gated else w_in
    names = ("gate_bias", "up_bias") if gated else ("up_bias",)
    extras: dict[str, Tensor] = dict(zip(names, _halves(b_in) if gated else b_in, strict=False))
    if b_down is not None:
        extras["down_bias"] = b_down
    weights = gate[0] if gate else None, up, w_down.mT
    return dispatched("sparse_ffn", tokens, weights, threshold, activation=activation, **extras)


def _halves(parts: list[Tensor]) -> list[Tensor]:
    """Those of gate and up, which may lie in one tensor."""
    return list(parts[0].chunk(2)) if len(parts) == 1 else parts


def _dense(
    x: Tensor,
    w_in: list[Tensor],
    b_in: list[Tensor],
    w_down: Tensor,
    b_down: Tensor | None,
    threshold: float,
    activation: str,
    gated: bool,
) -> Tensor:
    """Many tokens by torch's matrix products."""
    linear, act = nn.functional.linear, _module_of(threshold, activation)
    sums = [linear(x, weight, b_in[i] if b_in else None) for i, weight in enumerate(w_in)]
    if gated:
        gates, ups = sums[0].chunk(2, dim=-1) if len(sums) == 1 else sums
        x1 = combined(act, gates, ups, activation == DRELU)
    else:
        x1 = act(sums[0])
    return linear(x1, w_down, b_down)


@lru_cache(maxsize=64)
def _module_of(threshold: float, activation: str) -> FATReLU:
    return module_of(Formula(threshold, activation))


def _fake(x: Tensor, w_in: list[Tensor], w_down: Tensor, threshold: float = 0.0, **keywords: object) -> Tensor:
    return x.new_empty(x.shape)


for _key in ("CUDA", "CPU"):
    _LIBRARY.impl("ffn", _ffn, _key)
torch.library.register_fake("prosparse::ffn", _fake, lib=_LIBRARY)
