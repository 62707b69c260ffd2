"""Whether a gated MLP computes the formula that it is to be replaced by: its code, then its own weights and dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..formula import Formula
from ..numerics import within_contract
from .activation import FATReLU
from .mlp import PROJECTIONS, SparseGatedMLP

Weights = tuple[Tensor, Tensor, Tensor]

_NEURONS = 256  # of the copy whose code is tried
_GATES = (0.01, 1.0, 100.0, 1e4, 1e6)  # sizes of its gates, so that a clamp, an offset or a leak shows at one of them
_LARGEST_DIFFERENCE = 2.0**-16  # code that goes through float32 on its way is well below, another formula well above
_SCALES = (0.1, 1.0, 10.0)  # of the inputs that the layer's own weights are tried on
_ROWS_AT_ONCE = 2048  # a block of rows in float64 is at most some tens of MB


def why_another_formula(mlp: Any, threshold: float) -> str:
    """What `mlp` computes other than ``down_proj(fatrelu(gate_proj(x), threshold) * up_proj(x))``, or nothing.

    Its code is run in float64 on fewer neurons with random weights, so rounding explains nothing and no weights hide anything.
    """
    device, d_model = mlp.gate_proj.weight.device, mlp.gate_proj.weight.shape[1]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator).to(device)

    w_gate, w_up, w_down = (
        random(_NEURONS, d_model) / d_model**0.5,
        random(_NEURONS, d_model),
        random(d_model, _NEURONS),
    )
    small = _with_weights(mlp, (w_gate, w_up, w_down), threshold)
    gates = _GATES + (threshold,) * (threshold > 0)
    x = torch.stack([size * random(d_model) for size in gates])
    try:
        found = small(x[None])
    except Exception as error:  # whatever its code raises on what the formula would take
        said = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
        return f"its code does not run on {_NEURONS} neurons in float64 ({said})"
    if not isinstance(found, Tensor) or found.shape != x[None].shape:
        return f"its code does not return one tensor of its input's shape, but a {type(found).__name__}"
    differences = (found[0].double() - _exact(x, w_gate, w_up, w_down, threshold)).norm(dim=1)
    for gate, difference, size in zip(gates, differences.tolist(), found[0].double().norm(dim=1).tolist(), strict=True):
        if not difference <= _LARGEST_DIFFERENCE * size:
            share = difference / size if size else float("inf")
            return (
                f"its output differs from that of {Formula(threshold)} by {share:.2g} of its norm, with gates of size {gate:g}"
            )
    return ""


def _with_weights(mlp: Any, weights: Weights, threshold: float) -> Any:
    """A shallow copy of `mlp` with these projections, and the threshold where its FATReLU lacks one."""
    other = copy.copy(mlp)
    other._modules = dict(mlp._modules)
    other.__dict__.pop("forward", None)  # the class's, but bound to `mlp`, where accelerate has left one behind
    for name, weight in zip(PROJECTIONS, weights, strict=True):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        other._modules[name] = linear
    if _lacks_threshold(mlp):
        other._modules["act_fn"] = FATReLU(threshold)
    return other


def why_outside_the_contract(mlp: Any, threshold: float, sparse: SparseGatedMLP) -> str:
    """Why the output of `sparse`, or of the `mlp` of T `threshold` that it replaces, is not the formula's within rounding.

    Both are compared with float64 on the layer's own weights. As a vector an output may have twice the error of the dense path
    in the same dtype, plus one ulp.
    """
    weights: Weights = (sparse.gate_proj.weight, sparse.up_proj.weight, sparse.down_proj.weight)
    x = torch.randn(len(_SCALES), weights[0].shape[1], device="cpu", generator=torch.Generator().manual_seed(1))
    x = (x * torch.tensor(_SCALES, device="cpu")[:, None]).to(weights[0])
    before = mlp if not _lacks_threshold(mlp) else _with_weights(mlp, weights, threshold)
    return _compare(
        "sparse output", torch.cat([sparse(row[None]) for row in x]), x, weights, float(sparse.act_fn.threshold or 0.0)
    ) or _compare("output", before(x[None])[0], x, weights, threshold)


def _compare(what: str, output: Tensor, x: Tensor, weights: Weights, threshold: float) -> str:
    """Why the outputs of tokens `x` are not those of the formula within the contract, or nothing."""
    exact, dense = _exact(x, *weights, threshold), _dense(x, *weights, threshold)
    usable = exact.abs().amax(dim=1) <= torch.finfo(x.dtype).max  # float16 may overflow at the largest scale
    if not bool(usable.any()):
        return "its output is not finite on random inputs: are its weights?"
    errors = (output.double() - exact).norm(dim=1)
    dense_errors, epsilon = (dense.double() - exact).norm(dim=1), torch.finfo(x.dtype).eps
    for scale, usable_, error, dense_error, size in zip(
        _SCALES, usable.tolist(), errors.tolist(), dense_errors.tolist(), exact.norm(dim=1).tolist(), strict=True
    ):
        if usable_ and not within_contract(error, dense_error, epsilon, size):
            share = error / size if size else float("inf")
            return (
                f"its {what} differs from that of {Formula(threshold)} by {share:.2g} of its norm, at inputs of scale {scale:g}"
            )
    return ""


def _lacks_threshold(mlp: nn.Module) -> bool:
    """Whether `mlp` cannot run, since its FATReLU was made for a config that names no threshold."""
    activation = getattr(mlp, "act_fn", None)
    return isinstance(activation, FATReLU) and activation.threshold is None


def _dense(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, threshold: float) -> Tensor:
    """The formula of tokens `x` by the vendor's library in their dtype."""
    linear = nn.functional.linear
    return linear(FATReLU(threshold)(linear(x, w_gate)) * linear(x, w_up), w_down)


def _exact(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, threshold: float) -> Tensor:
    """The formula of tokens `x`, (tokens, d_model), in float64, rounded where the operators round (float64: nowhere)."""
    wide, dtype = x.double(), x.dtype
    gate = _by_rows(lambda rows: wide @ w_gate[rows].double().t(), len(w_gate)).to(dtype)
    up = _by_rows(lambda rows: wide @ w_up[rows].double().t(), len(w_up))
    x1 = (FATReLU(threshold)(gate).double() * up).to(dtype).double()
    return _by_rows(lambda rows: x1 @ w_down[rows].double().t(), len(w_down))


def _by_rows(part: Callable[[slice], Tensor], rows: int) -> Tensor:
    return torch.cat([part(slice(i, i + _ROWS_AT_ONCE)) for i in range(0, rows, _ROWS_AT_ONCE)], dim=1)
