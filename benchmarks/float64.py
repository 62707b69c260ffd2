"""Formulas 1 to 4 in float64 on the GPU, from elementwise products and sums: no code of the operators, no vendor library."""

from __future__ import annotations

from typing import Any

import numpy as np

from prosparse_cupy._gpu import cupy


def _wide(array: Any) -> Any:
    return array.astype(np.float32).astype(np.float64)


def dot(weights: Any, x: Any) -> np.ndarray:
    """``weights @ x``"""
    wide = _wide(x)
    parts = [(_wide(weights[i : i + 2048]) * wide).sum(axis=1) for i in range(0, len(weights), 2048)]
    return cupy().asnumpy(cupy().concatenate(parts)) if parts else np.zeros(0)


def up(gate: Any, w_up: Any, x: Any, neurons: np.ndarray) -> np.ndarray:
    """Formulas 2 and 3 for these active neurons."""
    on = np.flatnonzero(neurons)
    x1 = np.zeros(len(neurons))
    if len(on):
        x1[on] = cupy().asnumpy(_wide(gate))[on] * dot(w_up[cupy().asarray(on)], x)
    return x1


def down(x1: Any, packed: Any) -> np.ndarray:
    """Formula 4."""
    on = cupy().flatnonzero(x1.astype(np.float32))
    y = cupy().zeros(packed.shape[1])
    for i in range(0, len(on), 2048):
        part = on[i : i + 2048]
        y += (_wide(x1[part])[:, None] * _wide(packed[part])).sum(axis=0)
    return cupy().asnumpy(y)
