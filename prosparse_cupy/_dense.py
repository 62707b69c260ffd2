"""The dense path that the sparse one is compared with: the vendor's library where it is installed, our own GEMV where not."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import ops, timing
from ._gpu import cupy


class Dense:
    """Formulas 1, 2+3 and 4 on dense weights; arrays come from `adopt`, results go to `out`."""

    name: str

    def adopt(self, array: Any) -> Any:
        """A CuPy array as this library's own, without a copy."""
        return array

    def capture(self, calls: Sequence[timing.Call]) -> timing.Call:
        """The calls as one CUDA graph."""
        return timing.capture(calls)

    def mv(self, weights: Any, x: Any, out: Any) -> None:
        """``weights @ x``"""
        raise NotImplementedError

    def step_2(self, gate: Any, x: Any, w_up: Any, threshold: float, out: Any) -> None:
        """(FAT)ReLU of the gate times the up-projection."""
        raise NotImplementedError


class _Elementwise(Dense):
    """A dense path whose activation and product are CuPy's elementwise kernels."""

    def step_2(self, gate: Any, x: Any, w_up: Any, threshold: float, out: Any) -> None:
        self.mv(w_up, x, out)
        kept = gate.astype(np.float32) >= np.float32(threshold)  # a Python float would be rounded to the gate's dtype first
        cupy().multiply(out, cupy().where(kept, gate, cupy().zeros_like(gate)), out=out)


class CupyDense(_Elementwise):
    """cuBLAS through `cupy.matmul`."""

    def __init__(self) -> None:
        self.name = f"cupy.matmul {cupy().__version__} (cuBLAS)"

    def mv(self, weights: Any, x: Any, out: Any) -> None:
        cupy().matmul(weights, x, out=out)


class OwnDense(_Elementwise):
    """This library's dense GEMV, `ffn_1`."""

    name = "ffn_1, this library's dense GEMV (no cuBLAS found: torch or cuda-toolkit[cublas] brings it)"

    def mv(self, weights: Any, x: Any, out: Any) -> None:
        ops.ffn_1(x, weights, out=out)


def best_dense(dtype: np.dtype) -> Dense:
    """torch's if it sees the GPU, else CuPy's if its cuBLAS works on this dtype, else our own."""
    if importlib.util.find_spec("torch") is not None:
        from .torch.dense import TorchDense, sees_gpu

        if sees_gpu():
            return TorchDense()
    try:
        dense = CupyDense()
        a = cupy().ones((8, 8), dtype)
        dense.mv(a, a[0], a[1].copy())
        return dense
    except Exception:  # a missing libcublas or an unsupported dtype; which of CuPy's many errors does not matter
        return OwnDense()
