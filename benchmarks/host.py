"""What a call costs the calling thread: arrays ready, `out=` given, nothing waited for."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import prosparse_cupy as psc
from prosparse_cupy import compiler
from prosparse_cupy.device import cupy, current_device
from prosparse_cupy.libraries import NUMPY_DTYPES
from prosparse_cupy.models import Model
from prosparse_cupy.problem import Problem
from prosparse_cupy.testing.timing import interleave

from .results import Row

_CALLS = 100  # a clock reading; few enough that the launch queue never fills


def host_clock(call: Callable[[], object]) -> float:
    """Microseconds of the calling thread over `_CALLS` calls."""
    cupy().cuda.Device().synchronize()
    start = time.perf_counter()
    for _ in range(_CALLS):
        call()
    return (time.perf_counter() - start) * 1e6


def measure(model: Model, label: str, repeats: int) -> list[Row]:
    """Rows of `ffn_23`, `ffn_4` and `SparseFFN` by array family.

    `floor_us` is a bare RawKernel launch of the same kernel (for `SparseFFN` the sum of these two), `dense_us` the eager FFN of
    torch.
    """
    arrays = {"CuPy": _arrays(model)}
    dense: Callable[[], object] | None = None
    if importlib.util.find_spec("torch") is not None:
        from prosparse_cupy.testing.torch_dense import TorchDense, eager_ffn, sees_gpu

        if sees_gpu():
            arrays["torch"] = {name: TorchDense().adopt(array) for name, array in arrays["CuPy"].items()}
            dense = eager_ffn(*(arrays["torch"][name] for name in ("x", "w", "w", "w_down")))
    outs = {"ffn_23": arrays["CuPy"]["x1"], "ffn_4": arrays["CuPy"]["y"], "SparseFFN": arrays["CuPy"]["y"]}
    variants: dict[str, Callable[[], object]] = {f"bare {op}": _bare(op, model, arrays["CuPy"]) for op in ("ffn_23", "ffn_4")}
    for family, a in arrays.items():
        variants[f"ffn_23 {family}"] = lambda a=a: psc.ffn_23(a["gate"], a["x"], a["w"], out=a["x1"])
        variants[f"ffn_4 {family}"] = lambda a=a: psc.ffn_4(a["gate"], a["w"], out=a["y"])
        ffn = psc.SparseFFN(a["w"], a["w"], a["w"])
        variants[f"SparseFFN {family}"] = lambda a=a, ffn=ffn: ffn(a["x"], out=a["y"])
    if dense is not None:
        variants["dense"] = dense
    times = interleave(variants, host_clock, dict.fromkeys(variants, _CALLS), repeats)
    right = {(op, family): _fills(variants[f"{op} {family}"], outs[op]) for op in outs for family in arrays}
    bare = {op: times[f"bare {op}"].median for op in ("ffn_23", "ffn_4")}
    bare["SparseFFN"] = sum(bare.values())
    return [
        Row(
            op=op,
            variant=family,
            model=label,
            d_model=model.d_model,
            d_ff=model.d_ff,
            dtype="bfloat16",
            batch=1,
            mask="none",
            sparsity=1.0,
            layers=1,
            time_us=times[f"{op} {family}"].median,
            p10_us=times[f"{op} {family}"].p10,
            p90_us=times[f"{op} {family}"].p90,
            dense_us=times["dense"].median if dense is not None else math.nan,
            bytes=0,
            floor_us=bare[op],
            error=0.0,
            dense_error=0.0,
            checked=right[op, family],
            noisy=times[f"{op} {family}"].is_noisy,
        )
        for family in arrays
        for op in outs
    ]


def _fills(call: Callable[[], object], out: Any) -> bool:
    """Whether a call leaves +0, the result of zero weights, in every element of its output (torch shares CuPy's memory)."""
    out.view(np.uint8).fill(0xFF)
    call()
    return not bool(out.view(np.uint8).any())


def _arrays(model: Model) -> dict[str, Any]:
    shapes = {
        "x": (model.d_model,),
        "y": (model.d_model,),
        "gate": (model.d_ff,),
        "x1": (model.d_ff,),
        "w": (model.d_ff, model.d_model),
        "w_down": (model.d_model, model.d_ff),
    }
    return {name: cupy().zeros(shape, NUMPY_DTYPES["bfloat16"]) for name, shape in shapes.items()}


def _bare(op: str, model: Model, a: dict[str, Any]) -> Callable[[], object]:
    """CuPy's own launch of the operator's kernel."""
    plan = compiler.load(Problem(op, model.d_model, model.d_ff, "bfloat16"), current_device()).plan
    module = cupy().RawModule(code=compiler.source(op), options=compiler.compiler_options(plan))
    kernel = module.get_function(op)
    dims, none = (np.int32(model.d_ff), np.int32(model.d_model)), np.uint64(0)
    arguments = {
        "ffn_23": (a["gate"], a["x"], a["w"], a["x1"], np.float32(0), *dims, none),
        "ffn_4": (a["gate"], a["w"], a["y"], *dims, none, none, np.float32(0)),
    }[op]
    return lambda: kernel(plan.grid, plan.block, arguments)
