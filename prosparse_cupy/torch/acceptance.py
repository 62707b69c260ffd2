"""Whether a gated MLP computes the formula that it is to be replaced by: its code, then its own weights and dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .activation import FATReLU
from .mlp import PROJECTIONS, SparseGatedMLP

_NEURONS = 256  # of the copy whose code is tried
_GATES = (0.01, 1.0, 100.0, 1e4)  # sizes of its gates, so that a clamp, an offset or a leak shows at one of them
_LARGEST_DIFFERENCE = 2.0**-16  # code that goes through float32 on its way is well below, another formula well above
_SCALES = (0.1, 1.0, 10.0)  # of the inputs that the layer's own weights are tried on
_ROWS_AT_ONCE = 2048  # a block of rows in float64 is at most some tens of MB


def why_another_formula(mlp: nn.Module, threshold: float) -> str:
    """What `mlp` computes other than ``down_proj(fatrelu(gate_proj(x), threshold) * up_proj(x))``, or nothing.

    Its code is run in float64 on fewer neurons with random weights, so rounding explains nothing and no weights hide anything.
    """
    weight, generator = mlp.gate_proj.weight, torch.Generator().manual_seed(0)
    small, d_model = copy.copy(mlp), weight.shape[1]
    small._modules = dict(mlp._modules)
    for name in PROJECTIONS:
        rows, columns = (d_model, _NEURONS) if name == "down_proj" else (_NEURONS, d_model)
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        values = torch.randn(rows, columns, dtype=torch.float64, generator=generator) / columns**0.5
        linear.weight = nn.Parameter(values.to(weight.device), requires_grad=False)
        small._modules[name] = linear
    if lacks_threshold(mlp):
        small._modules["act_fn"] = FATReLU(threshold)
    gates = _GATES + (threshold,) * (threshold > 0)
    x = torch.randn(len(gates), d_model, dtype=torch.float64, generator=generator).to(weight.device)
    x *= torch.tensor(gates, dtype=torch.float64, device=weight.device)[:, None]
    w_gate, w_up, w_down = (small._modules[name].weight for name in PROJECTIONS)
    try:
        found = small(x[None])[0].double()
        differences = (found - _exact(x, w_gate, w_up, w_down, threshold)).norm(dim=1)
    except Exception as error:  # whatever its code raises on what the formula would take
        return f"its code does not run on {_NEURONS} neurons in float64 ({type(error).__name__}: {str(error).splitlines()[0]})"
    sizes = found.norm(dim=1)
    for gate, difference, size in zip(gates, differences.tolist(), sizes.tolist(), strict=True):
        if not difference <= _LARGEST_DIFFERENCE * size:
            share = difference / size if size else float("inf")
            return f"its output differs from that of {_name(threshold)} by {share:.2g} of its norm, with gates of size {gate:g}"
    return ""


def why_outside_the_contract(mlp: nn.Module | None, sparse: SparseGatedMLP) -> str:
    """Why the outputs of `sparse`, and of the `mlp` it replaces, are not those of the formula within rounding, or nothing.

    Both are compared with float64 on the layer's own weights. As a vector an output may have twice the error of the dense path
    in the same dtype, plus one ulp.
    """
    weight = sparse.gate_proj.weight
    x = torch.randn(len(_SCALES), weight.shape[1], generator=torch.Generator().manual_seed(1))
    x = (x * torch.tensor(_SCALES)[:, None]).to(weight)
    w_gate, w_up, w_down = (getattr(sparse, name).weight for name in PROJECTIONS)
    exact = _exact(x, w_gate, w_up, w_down, sparse.act_fn.threshold)
    usable = exact.abs().amax(dim=1) <= torch.finfo(weight.dtype).max  # float16 may overflow at the largest scale
    if not bool(usable.any()):
        return "its output is not finite on random inputs: are its weights?"
    dense = sparse(x[None])[0]
    outputs = {"sparse output": torch.cat([sparse(row[None]) for row in x])}
    if mlp is not None:
        outputs["output"] = mlp(x[None])[0]
    allowed = 2 * (dense.double() - exact).norm(dim=1) + torch.finfo(weight.dtype).eps * exact.norm(dim=1)
    for what, output in outputs.items():
        errors = (output.double() - exact).norm(dim=1)
        bad = usable & ~(errors <= allowed)
        if bool(bad.any()):
            worst = int(bad.nonzero()[0])
            share = float(errors[worst] / exact[worst].norm())
            name, scale = _name(sparse.act_fn.threshold), _SCALES[worst]
            return f"its {what} differs from that of {name} by {share:.2g} of its norm, at inputs of scale {scale:g}"
    return ""


def lacks_threshold(mlp: nn.Module) -> bool:
    """Whether `mlp` cannot run, since its FATReLU was made for a config that names no threshold."""
    activation = getattr(mlp, "act_fn", None)
    return isinstance(activation, FATReLU) and activation.threshold is None


def _name(threshold: float) -> str:
    return f"fatrelu({threshold:g})" if threshold else "relu"


def _exact(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, threshold: float) -> Tensor:
    """The formula of tokens `x`, (tokens, d_model), in float64, rounded where the operators round (float64: nowhere)."""
    round_to, activation = x.dtype, FATReLU(threshold)
    wide = x.double()
    gate = _by_rows(lambda rows: wide @ w_gate[rows].double().t(), len(w_gate)).to(round_to)
    up = _by_rows(lambda rows: wide @ w_up[rows].double().t(), len(w_up))
    x1 = (activation(gate).double() * up).to(round_to).double()
    return _by_rows(lambda rows: x1 @ w_down[rows].double().t(), len(w_down))


def _by_rows(part: Callable[[slice], Tensor], rows: int) -> Tensor:
    parts: Sequence[Tensor] = [part(slice(i, i + _ROWS_AT_ONCE)) for i in range(0, rows, _ROWS_AT_ONCE)]
    return torch.cat(parts, dim=1)
