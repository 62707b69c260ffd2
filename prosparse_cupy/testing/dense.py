"""The dense path that the sparse one is compared with. `best_dense` of the package chooses one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import ops
from ..device import cupy
from ..formula import DRELU, Formula
from . import timing

Product = Callable[[Any, Any, Any], object]
"""``x @ weights.T``, of one token or of several, into `out`."""
Weights = tuple[Any, Any, Any]
"""w_gate, w_up and w_down; w_gate None without a gate."""


class Dense(ABC):
    """The formulas on dense weights; arrays come from `adopt`, results go to `out`."""

    name: str

    def adopt(self, array: Any) -> Any:
        """A CuPy array as this library's own, without a copy."""
        return array

    def capture(self, calls: Sequence[timing.Call]) -> timing.Call:
        """The calls as one CUDA graph."""
        return timing.capture(calls)

    @abstractmethod
    def mv(self, weights: Any, x: Any, out: Any) -> None:
        """``x @ weights.T``: formulas 1 and 4, of one token, (d,), or of several, (B, d)."""

    @abstractmethod
    def activate(self, pre: Any, formula: Formula, out: Any = None) -> Any:
        """The activation of a gate, or of the up-projection without one: a new array, or `out`."""

    @abstractmethod
    def norm(self, x1: Any, weight: Any, eps: float) -> Any:
        """The RMS norm of x1."""

    def ffn_23(self, gate: Any, x: Any, w_up: Any, formula: Formula, out: Any) -> None:
        """The activation of the gate times the up-projection: formulas 2 and 3."""
        self.mv(w_up, x, out)
        if formula.activation == DRELU:
            self.activate(out, Formula(), out)
        out *= self.activate(gate, formula)

    def ffn_12(self, x: Any, w_up: Any, formula: Formula, out: Any) -> None:
        """The first half of a block without a gate."""
        self.mv(w_up, x, out)
        self.activate(out, formula, out)

    def ffn(self, weights: Weights, x: Any, formula: Formula, gate: Any, x1: Any, out: Any, norm: Any, eps: float) -> None:
        """The whole FFN. `norm` is the weight of a norm between activation and down-projection, if the formula has one."""
        if weights[0] is None:
            self.mv(weights[1], x, x1)
            x1 = self.activate(x1, formula)
        else:
            self.mv(weights[0], x, gate)
            self.ffn_23(gate, x, weights[1], formula, x1)
        self.mv(weights[2], self.norm(x1, norm, eps) if formula.normed else x1, out)


class CupyDense(Dense):
    """A product on CuPy arrays, and CuPy's elementwise kernels."""

    def __init__(self, name: str, product: Product) -> None:
        self.name, self._product = name, product

    def mv(self, weights: Any, x: Any, out: Any) -> None:
        self._product(weights, x, out)

    def activate(self, pre: Any, formula: Formula, out: Any = None) -> Any:
        activated = formula.activate(pre)
        if out is None:
            return activated
        out[...] = activated
        return out

    def norm(self, x1: Any, weight: Any, eps: float) -> Any:
        wide = x1.astype(np.float32)
        return (wide * ((wide * wide).mean(axis=-1, keepdims=True) + eps) ** -0.5).astype(x1.dtype) * weight


def through_cublas() -> CupyDense:
    """`cupy.matmul`."""

    def product(weights: Any, x: Any, out: Any) -> None:
        if x.ndim == 1:
            cupy().matmul(weights, x, out=out)
        else:
            cupy().matmul(x, weights.T, out=out)

    return CupyDense(f"cupy.matmul {cupy().__version__} (cuBLAS)", product)


def through_ffn_1() -> CupyDense:
    """This library's own dense GEMV, which beats cuBLAS at batch 1."""
    return CupyDense(
        "ffn_1, this library's dense GEMV (torch or cuda-toolkit[cublas] brings cuBLAS)",
        lambda weights, x, out: ops.ffn_1(x, weights, out=out),
    )


def works(dense: Dense, dtype: np.dtype[Any]) -> bool:
    """Whether its product runs on this dtype."""
    try:
        a = cupy().ones((8, 8), dtype)
        dense.mv(a, a[0], a[1].copy())
    except Exception:  # a missing libcublas or an unsupported dtype; which of CuPy's many errors does not matter
        return False
    return True
