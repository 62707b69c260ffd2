"""The operators in NumPy, accumulated in float64: what every kernel is held to, and what runs when the arrays are NumPy's.

Same names, layouts and rounding points as the GPU operators: the dtype of the inputs is rounded to once after formula 1, once
after formula 3 and once after formula 4. Weights of inactive neurons are not read here either. Each of several tokens is
computed as if it were alone, so that it has the bits that it has alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .formula import RELU, Formula

_ROWS_AT_ONCE = 256  # some MB in float64, which stay in cache: blocks of 2048 take three times as long


Array = npt.NDArray[Any]


def active(gate: npt.NDArray[Any], threshold: float = 0.0) -> npt.NDArray[np.bool_]:
    """Which neurons are active: `not (gate < threshold) and gate != 0`, compared as float32, so NaN is active."""
    return Formula(threshold).active(gate)


def fatrelu(gate: npt.NDArray[Any], threshold: float = 0.0) -> npt.NDArray[Any]:
    """Formula 2: `gate` where it is active, +0 elsewhere (arXiv 2402.13516, activation threshold shifting)."""
    return Formula(threshold).activate(gate)


def ffn_1(x: Array, w_gate: Array, *, bias: Array | None = None, dtype: npt.DTypeLike | None = None) -> Array:
    """Formula 1: `x @ w_gate.T + bias`, rounded to `dtype`, that of `x` if it is None."""
    if x.ndim > 1:
        return np.stack([ffn_1(token, w_gate, bias=bias, dtype=dtype) for token in x])
    return _biased(rows_dot(x, w_gate, np.arange(len(w_gate))), bias).astype(dtype or x.dtype)


def ffn_12(x: Array, w_up: Array, threshold: float = 0.0, *, activation: str = RELU, bias: Array | None = None) -> Array:
    """Formulas 1 and 2 without a gate: the activation of `x @ w_up.T + bias`."""
    return Formula(threshold, activation, gated=False).activate(ffn_1(x, w_up, bias=bias))


def ffn_23(
    gate: Array, x: Array, w_up: Array, threshold: float = 0.0, *, activation: str = RELU, bias: Array | None = None
) -> Array:
    """Formulas 2 and 3: the activation of `gate` times `x @ w_up.T + bias`."""
    if gate.ndim > 1:
        tokens = zip(gate, x, strict=True)
        return np.stack([ffn_23(*token, w_up, threshold, activation=activation, bias=bias) for token in tokens])
    formula = Formula(threshold, activation)
    used = formula.active(gate)
    x1 = np.zeros(gate.shape, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        up = _biased(rows_dot(x, w_up, np.flatnonzero(used)), None if bias is None else bias[used])
        x1[used] = formula.combine(gate[used], up)
        return x1.astype(gate.dtype)


def ffn_123(
    x: Array,
    w_gate: Array,
    w_up: Array,
    threshold: float = 0.0,
    *,
    activation: str = RELU,
    gate_bias: Array | None = None,
    up_bias: Array | None = None,
) -> Array:
    """Formulas 1 to 3: `ffn_23` of `ffn_1`."""
    return ffn_23(ffn_1(x, w_gate, bias=gate_bias), x, w_up, threshold, activation=activation, bias=up_bias)


def ffn_4(
    x1: Array,
    w_down_t: Array,
    *,
    bias: Array | None = None,
    norm_weight: Array | None = None,
    norm_eps: float = 0.0,
    dtype: npt.DTypeLike | None = None,
) -> Array:
    """Formula 4: `x1 @ w_down_t + bias`, over the rows of `w_down_t` where `x1` is not zero.

    With `norm_weight` x1 is first divided by its root mean square over all neurons and multiplied by the weight. The result is
    rounded to `dtype`, that of `x1` if it is None.
    """
    rows = x1.reshape(-1, x1.shape[-1]).astype(np.float64)
    y = np.zeros((len(rows), w_down_t.shape[1]), np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        for token, values in zip(y, rows, strict=True):
            used = np.flatnonzero(values.astype(np.float32) != 0)
            if norm_weight is not None and len(used):
                scale = 1 / np.sqrt(np.mean(np.square(values)) + norm_eps)
                values[used] *= norm_weight[used].astype(np.float64) * scale
            token += rows_sum(values, w_down_t, used)
        return _biased(y, bias).reshape(*x1.shape[:-1], -1).astype(dtype or x1.dtype)


def sparse_ffn(
    x: Array,
    w_gate: Array | None,
    w_up: Array,
    w_down_t: Array,
    threshold: float = 0.0,
    *,
    activation: str = RELU,
    gate_bias: Array | None = None,
    up_bias: Array | None = None,
    down_bias: Array | None = None,
    norm_weight: Array | None = None,
    norm_eps: float = 0.0,
    dtype: npt.DTypeLike | None = None,
) -> Array:
    """Formulas 1 to 4; without `w_gate`, of a block that has none. Only y is rounded to `dtype`, if it is given."""
    if w_gate is None:
        x1 = ffn_12(x, w_up, threshold, activation=activation, bias=up_bias)
    else:
        x1 = ffn_123(x, w_gate, w_up, threshold, activation=activation, gate_bias=gate_bias, up_bias=up_bias)
    return ffn_4(x1, w_down_t, bias=down_bias, norm_weight=norm_weight, norm_eps=norm_eps, dtype=dtype)


def pack_down(w_down: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`nn.Linear`'s (d_model, d_ff) down-projection weight as (d_ff, d_model), C-contiguous."""
    return np.ascontiguousarray(w_down.T)


def rows_dot(x: npt.NDArray[Any], weights: npt.NDArray[Any], rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The dot products of x with these rows of a (d_ff, d_model) matrix, in float64."""
    wide = x.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        parts = [wide @ weights[part].astype(np.float64).T for part in _parts(rows)]
    return np.concatenate(parts, axis=-1) if parts else np.zeros((*x.shape[:-1], 0))


def rows_sum(values: npt.NDArray[Any], weights: npt.NDArray[Any], rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The sum of these rows of a (d_ff, d_model) matrix, each times its value, in float64."""
    total = np.zeros(weights.shape[1])
    with np.errstate(invalid="ignore", over="ignore"):
        for part in _parts(rows):
            total += values[part].astype(np.float64) @ weights[part].astype(np.float64)
    return total


def _parts(numbers: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    return [numbers[i : i + _ROWS_AT_ONCE] for i in range(0, len(numbers), _ROWS_AT_ONCE)]


def _biased(values: Array, bias: Array | None) -> Array:
    return values if bias is None else values + bias.astype(np.float64)
