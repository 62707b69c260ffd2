"""The demo: one FFN, dense and sparse, checked against the reference and timed; on a GPU, or smaller on the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from . import ops, reference, synthetic, timing
from ._dense import best_dense
from ._gpu import cupy, gpu
from .checkpoint import FFNWeights

Progress = Callable[[str], None]

_MOST_LAYERS = 16
_HOST_SHRINK = 4
STEPS = ("ffn_1", "ffn_23", "ffn_4", "SparseFFN")
WHAT = {"ffn_1": "gate", "ffn_23": "ReLU x up", "ffn_4": "down", "SparseFFN": "whole FFN"}


@dataclass(frozen=True)
class Row:
    """One operator: times in µs, errors as ‖out - float64‖ / ‖float64‖."""

    operator: str
    dense_us: float
    sparse_us: float
    dense_error: float
    sparse_error: float

    @property
    def speedup(self) -> float:
        return self.dense_us / self.sparse_us

    def is_right(self, dtype: np.dtype) -> bool:
        """At most twice the dense path's error, plus the rounding of the dtype; NaN is not right."""
        return self.sparse_error <= 2 * self.dense_error + float(ml_dtypes.finfo(dtype).eps)


@dataclass(frozen=True)
class Report:
    """What the demo found."""

    where: str
    dense: str
    d_model: int
    d_ff: int
    dtype: str
    sparsity: float
    layers: int
    rows: tuple[Row, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """Operators whose check failed."""
        dtype = np.dtype(self.dtype)
        return tuple(row.operator for row in self.rows if not row.is_right(dtype))


def random_layer(
    d_model: int, d_ff: int, dtype: np.dtype, sparsity: float, threshold: float, progress: Progress
) -> synthetic.Layer:
    """A layer with random weights whose token has a realistic mask."""
    return synthetic.layer(d_model, d_ff, dtype, sparsity, threshold, np.random.default_rng(0), progress)


def checkpoint_layer(weights: FFNWeights, dtype: np.dtype, threshold: float) -> synthetic.Layer:
    """A checkpoint's layer with a random token: its mask is the weights' own answer to noise."""
    x = np.random.default_rng(0).standard_normal(weights.w_gate.shape[1], dtype=np.float32).astype(dtype)
    w_gate, w_up, w_down = (np.ascontiguousarray(w, dtype) for w in (weights.w_gate, weights.w_up, weights.w_down))
    mask = reference.active(reference.ffn_1(x, w_gate), threshold)
    return synthetic.Layer(x, w_gate, w_up, w_down, mask, threshold)


def host_dims(d_model: int, d_ff: int) -> tuple[int, int]:
    """The dims of the host's smaller layer."""
    return max(8, d_model // _HOST_SHRINK // 8 * 8), max(1, d_ff // _HOST_SHRINK)


def _exact(layer: synthetic.Layer) -> dict[str, np.ndarray]:
    """Each operator's result in float64, from inputs that are rounded where the operators round."""
    x, dtype = layer.x.astype(np.float64), layer.x.dtype
    gate = reference.ffn_1(x, layer.w_gate)
    x1 = reference.ffn_23(_round(gate, dtype), x, layer.w_up, layer.threshold)
    y = reference.ffn_4(_round(x1, dtype), np.ascontiguousarray(layer.w_down.T))
    return {"ffn_1": gate, "ffn_23": x1, "ffn_4": y, "SparseFFN": y}


def _round(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return values.astype(dtype).astype(np.float64)


def _error(out: np.ndarray, exact: np.ndarray) -> float:
    norm = np.linalg.norm(exact)
    return float(np.linalg.norm(out.astype(np.float64) - exact) / (norm if norm else 1.0))


# On the GPU: copies of the layer with their neurons rotated. Every copy computes the same y from other memory and another mask,
# so that a graph over all of them finds nothing in the L2 cache, and one reference result checks them all.


class _GpuLayer:
    """One rotated copy, its outputs, and the calls that fill them."""

    def __init__(self, base: tuple[Any, Any, Any, Any], threshold: float, shift: int, dense: Any) -> None:
        x, w_gate, w_up, w_down = base
        w_gate, w_up, w_down = _rotate(w_gate, shift), _rotate(w_up, shift), _rotate(w_down, shift, axis=1)
        w_down_t = ops.pack_down(w_down)
        gate, x1, y, whole = (_poisoned(n, x.dtype) for n in (len(w_gate), len(w_gate), len(x), len(x)))
        ffn = ops.SparseFFN(w_gate, w_up, w_down_t, threshold)
        self.sparse = {
            "ffn_1": (gate, lambda: ops.ffn_1(x, w_gate, out=gate)),
            "ffn_23": (x1, lambda: ops.ffn_23(gate, x, w_up, threshold, out=x1)),
            "ffn_4": (y, lambda: ops.ffn_4(x1, w_down_t, out=y)),
            "SparseFFN": (whole, lambda: ffn(x, out=whole)),
        }
        self.dense = _dense_calls(dense, x, w_gate, w_up, w_down, threshold)


def _poisoned(size: int, dtype: np.dtype) -> Any:
    """NaN in every element, so that one that nobody writes fails the check."""
    return cupy().full(size * dtype.itemsize, 0xFF, np.uint8).view(dtype)


def _rotate(weights: Any, shift: int, axis: int = 0) -> Any:
    first, second = cupy().split(weights, [shift], axis=axis)
    return cupy().concatenate([second, first], axis=axis)


def _dense_calls(dense: Any, x: Any, w_gate: Any, w_up: Any, w_down: Any, threshold: float) -> dict[str, tuple[Any, Callable]]:
    gate, x1, y = (_poisoned(n, x.dtype) for n in (len(w_gate), len(w_gate), len(x)))
    x_, gate_, x1_, y_, w_gate_, w_up_, w_down_ = (dense.adopt(a) for a in (x, gate, x1, y, w_gate, w_up, w_down))

    def whole() -> None:
        dense.mv(w_gate_, x_, gate_)
        dense.step_2(gate_, x_, w_up_, threshold, x1_)
        dense.mv(w_down_, x1_, y_)

    return {
        "ffn_1": (gate, lambda: dense.mv(w_gate_, x_, gate_)),
        "ffn_23": (x1, lambda: dense.step_2(gate_, x_, w_up_, threshold, x1_)),
        "ffn_4": (y, lambda: dense.mv(w_down_, x1_, y_)),
        "SparseFFN": (y, whole),
    }


def on_gpu(layer: synthetic.Layer, dtype: str, progress: Progress) -> Report:
    """Check and time the layer on CuPy's current GPU."""
    cp = cupy()
    progress("computing the float64 reference")
    exact, dense, layers = _exact(layer), best_dense(layer.x.dtype), []
    free, _ = cp.cuda.runtime.memGetInfo()
    count = int(max(1, min(_MOST_LAYERS, free * 0.7 // (4 * layer.w_gate.nbytes) - 1)))
    base = tuple(cp.asarray(a) for a in (layer.x, layer.w_gate, layer.w_up, layer.w_down))
    shifts = [i * layer.w_gate.shape[0] // count for i in range(count)]
    for i, shift in enumerate(shifts):
        progress(f"layer {i + 1} of {count} to the GPU")
        layers.append(_GpuLayer(base, layer.threshold, shift, dense))
    rows = tuple(_measure(step, layers, shifts, exact[step], dense, progress) for step in STEPS)
    d_ff, d_model = layer.w_gate.shape
    name = gpu(cp.cuda.Device().id).name
    return Report(name, dense.name, d_model, d_ff, dtype, 1 - layer.mask.mean(), count, rows)


def _measure(step: str, layers: list[_GpuLayer], shifts: list[int], exact: np.ndarray, dense: Any, progress: Progress) -> Row:
    progress(f"timing {step}")
    # Each path fills its own buffers, the earlier steps first: `capture` runs every call once.
    paths = {"sparse": timing.capture, "dense": dense.capture}
    times, errors = {}, {}
    for path, capture in paths.items():
        outputs = [getattr(layer, path)[step][0] for layer in layers]
        replay = capture([getattr(layer, path)[step][1] for layer in layers])
        times[path] = float(np.median(timing.replay_times(replay, len(layers))))
        turned = [0 if step in ("ffn_4", "SparseFFN") else shift for shift in shifts]
        errors[path] = max(_error(np.roll(out.get(), turn), exact) for out, turn in zip(outputs, turned, strict=True))
    return Row(step, times["dense"], times["sparse"], errors["dense"], errors["sparse"])


def on_host(layer: synthetic.Layer, dtype: str, progress: Progress) -> Report:
    """The same on the host: the NumPy reference, which skips inactive neurons, against its own arithmetic skipping nothing."""
    progress("timing on the host")
    exact, w_down_t = _exact(layer), np.ascontiguousarray(layer.w_down.T)
    x, threshold = layer.x, layer.threshold
    gate, x1 = (exact[step].astype(x.dtype) for step in ("ffn_1", "ffn_23"))

    def step_2(g: np.ndarray) -> np.ndarray:
        up = reference.ffn_1(x, layer.w_up).astype(np.float64)
        return (reference.fatrelu(g, threshold).astype(np.float64) * up).astype(x.dtype)

    dense = {
        "ffn_1": lambda: reference.ffn_1(x, layer.w_gate),
        "ffn_23": lambda: step_2(gate),
        "ffn_4": lambda: reference.ffn_1(x1, layer.w_down),
        "SparseFFN": lambda: reference.ffn_1(step_2(reference.ffn_1(x, layer.w_gate)), layer.w_down),
    }
    sparse = {
        "ffn_1": lambda: ops.ffn_1(x, layer.w_gate),
        "ffn_23": lambda: ops.ffn_23(gate, x, layer.w_up, threshold),
        "ffn_4": lambda: ops.ffn_4(x1, w_down_t),
        "SparseFFN": lambda: ops.sparse_ffn(x, layer.w_gate, layer.w_up, w_down_t, threshold),
    }
    rows = []
    for step in STEPS:
        (dense_us, dense_out), (sparse_us, sparse_out) = _host_time(dense[step]), _host_time(sparse[step])
        rows.append(Row(step, dense_us, sparse_us, _error(dense_out, exact[step]), _error(sparse_out, exact[step])))
    d_ff, d_model = layer.w_gate.shape
    where = f"host, NumPy {np.__version__}"
    return Report(where, "NumPy, nothing skipped", d_model, d_ff, dtype, 1 - layer.mask.mean(), 1, tuple(rows))


def _host_time(call: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    times, out = [], call()
    for _ in range(9):
        start = time.perf_counter()
        out = call()
        times.append((time.perf_counter() - start) * 1e6)
    return float(np.median(times)), out
