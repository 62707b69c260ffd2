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
    """``weights @ x``"""
    wide = _wide(x)
    parts = range(0, len(weights), _ROWS_AT_ONCE)
    sums = [to_numpy((_wide(weights[i : i + _ROWS_AT_ONCE]) * wide).sum(axis=1)) for i in parts]
    return np.concatenate(sums) if sums else np.zeros(0)


def up(gate: Any, w_up: Any, x: Any, neurons: npt.NDArray[np.bool_], *, activation: str = "relu") -> Float64:
    """Formulas 2 and 3 for these active neurons of a block with a gate."""
    on = np.flatnonzero(neurons)
    x1 = np.zeros(len(neurons))
    if len(on):
        projected = dot(w_up[moved(on, w_up)], x)
        rectified = np.maximum(projected, 0) if activation == "drelu" else projected
        x1[on] = half(gate, activation, neurons)[on] * rectified
    return x1


def half(pre: Any, activation: str, neurons: npt.NDArray[np.bool_]) -> Float64:
    """Formula 2 for these active neurons, of gates or of the up-projection without one."""
    wide = np.where(neurons, to_numpy(_wide(pre)), 0)
    return np.square(wide) if activation == "relu2" else wide


def down(x1: Any, w_down_t: Any, *, norm_weight: Any = None, norm_eps: float = 0.0) -> Float64:
    """Formula 4, of x1 or of its RMS norm."""
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
    """‖out - exact‖ / ‖exact‖, or ‖out‖ if the exact result is zero."""
    wide = to_numpy(out.astype(np.float32)).astype(np.float64)
    return float(np.linalg.norm(wide - exact)) / (float(np.linalg.norm(exact)) or 1.0)
