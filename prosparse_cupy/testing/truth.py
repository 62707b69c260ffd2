"""Formulas 1 to 4 in float64, from elementwise products and sums: no code of the operators, no vendor library.

On NumPy arrays and on CuPy arrays alike; results are NumPy's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..device import cupy

Float64 = npt.NDArray[np.float64]
_ROWS_AT_ONCE = 2048  # a block of rows in float64 is at most some tens of MB


def to_numpy(array: Any) -> npt.NDArray[Any]:
    """A NumPy or CuPy array as a NumPy one."""
    found: npt.NDArray[Any] = array.get() if hasattr(array, "get") else np.asarray(array)
    return found


def _wide(array: Any) -> Any:
    return array.astype(np.float32).astype(np.float64)


def dot(weights: Any, x: Any) -> Float64:
    """``x @ weights.T``, of a vector or of each row of several."""
    tokens = _wide(x).reshape(-1, x.shape[-1])
    sums = [np.zeros((len(tokens), 0))]
    for i in range(0, len(weights), _ROWS_AT_ONCE):
        rows = _wide(weights[i : i + _ROWS_AT_ONCE])
        sums.append(np.stack([to_numpy((rows * token).sum(axis=1)) for token in tokens]))
    return np.concatenate(sums, axis=1).reshape(*x.shape[:-1], len(weights))


def up(gate: Any, w_up: Any, x: Any, neurons: npt.NDArray[np.bool_], *, activation: str = "relu") -> Float64:
    """Formulas 2 and 3 for these active neurons of a block with a gate, of one token or of several."""
    on = np.flatnonzero(neurons.reshape(-1, neurons.shape[-1]).any(axis=0))  # of any token
    x1 = np.zeros(neurons.shape)
    if len(on):
        projected = dot(w_up[moved(on, w_up)], x)
        rectified = np.maximum(projected, 0) if activation == "drelu" else projected
        # A row that another token needs may hold NaN.
        x1[..., on] = np.where(neurons[..., on], half(gate, activation, neurons)[..., on] * rectified, 0)
    return x1


def half(pre: Any, activation: str, neurons: npt.NDArray[np.bool_]) -> Float64:
    """Formula 2 for these active neurons, of gates or of the up-projection without one."""
    wide = np.where(neurons, to_numpy(_wide(pre)), 0)
    return np.square(wide) if activation == "relu2" else wide


def down(x1: Any, w_down_t: Any, *, norm_weight: Any = None, norm_eps: float = 0.0) -> Float64:
    """Formula 4, of x1 or of its RMS norm, of one token or of several."""
    if x1.ndim > 1:
        return np.stack([down(token, w_down_t, norm_weight=norm_weight, norm_eps=norm_eps) for token in x1])
    on = np.flatnonzero(to_numpy(x1.astype(np.float32)))
    values = to_numpy(_wide(x1))
    if norm_weight is not None:
        values = values * to_numpy(_wide(norm_weight)) / np.sqrt(np.mean(np.square(values)) + norm_eps)
    y = np.zeros(w_down_t.shape[1])
    for i in range(0, len(on), _ROWS_AT_ONCE):
        part = on[i : i + _ROWS_AT_ONCE]
        s = moved(values[part], w_down_t)
        y += to_numpy((s[:, None] * _wide(w_down_t[moved(part, w_down_t)])).sum(axis=0))
    return y


def rounded(values: Float64, like: Any) -> Any:
    """Float64 values in the dtype and the library of `like`, as the operators round."""
    return moved(values, like).astype(like.dtype)


def moved(array: npt.NDArray[Any], like: Any) -> Any:
    """A NumPy array in the library of `like`."""
    return array if isinstance(like, np.ndarray) else cupy().asarray(array)


def relative_error(out: Any, exact: Float64) -> float:
    """‖out - exact‖ / ‖exact‖, or ‖out‖ if the exact result is zero; of several tokens the largest of theirs."""
    wide = to_numpy(out.astype(np.float32)).astype(np.float64).reshape(-1, exact.shape[-1])
    tokens = exact.reshape(wide.shape)
    size = np.linalg.norm(tokens, axis=1)
    return float(np.max(np.linalg.norm(wide - tokens, axis=1) / np.where(size == 0, 1.0, size)))  # NaN where one is
