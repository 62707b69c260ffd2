"""The dense path that the sparse one is compared with. `best_dense` of the package chooses one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import ops
from ..device import cupy
from ..formula import Formula
from . import timing

MatrixVector = Callable[[Any, Any, Any], object]
"""``weights @ x`` into `out`."""


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
        """``weights @ x``: formulas 1 and 4."""

    @abstractmethod
    def ffn_23(self, gate: Any, x: Any, w_up: Any, threshold: float, out: Any) -> None:
        """(FAT)ReLU of the gate times the up-projection: formulas 2 and 3."""

    def ffn(self, weights: tuple[Any, Any, Any], x: Any, threshold: float, gate: Any, x1: Any, out: Any) -> None:
        """The whole FFN; `weights` are w_gate, w_up and w_down."""
        self.mv(weights[0], x, gate)
        self.ffn_23(gate, x, weights[1], threshold, x1)
        self.mv(weights[2], x1, out)


class CupyDense(Dense):
    """A matrix-vector product on CuPy arrays, and CuPy's elementwise kernels."""

    def __init__(self, name: str, product: MatrixVector) -> None:
        self.name, self._product = name, product

    def mv(self, weights: Any, x: Any, out: Any) -> None:
        self._product(weights, x, out)

    def ffn_23(self, gate: Any, x: Any, w_up: Any, threshold: float, out: Any) -> None:
        self.mv(w_up, x, out)
        cupy().multiply(out, Formula(threshold).activate(gate), out=out)


def through_cublas() -> CupyDense:
    """`cupy.matmul`."""
    return CupyDense(f"cupy.matmul {cupy().__version__} (cuBLAS)", lambda weights, x, out: cupy().matmul(weights, x, out=out))


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
