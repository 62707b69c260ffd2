"""One harness for the demo, the benchmarks and the GPU tests: layers, float64 truth, the dense path, and timing.

Nothing that users' programs call imports it.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

from .dense import Dense, through_cublas, through_ffn_1, works


def best_dense(dtype: np.dtype[Any]) -> Dense:
    """torch's if it sees the GPU, else CuPy's if its cuBLAS works on this dtype, else our own GEMV."""
    if importlib.util.find_spec("torch") is not None:
        from .torch_dense import TorchDense, sees_gpu

        if sees_gpu():
            return TorchDense()
    cublas = through_cublas()
    return cublas if works(cublas, dtype) else through_ffn_1()
