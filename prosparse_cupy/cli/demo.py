"""The demo: one FFN, dense and sparse, checked against float64 and timed, on a GPU, or smaller on the host; then a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .. import ffn, ops, reference
from ..checkpoint import FFNWeights
from ..device import cupy, gpu
from ..formula import Formula
from ..testing import best_dense, synthetic, timing, truth
from ..testing.layers import GivenLayers, Timed
from ..testing.measure import DENSE, OURS, all_right, errors, graph_times, variants

Progress = Callable[[str], None]

_HOST_SHRINK = 4
_REPEATS = 24
STEPS = ("ffn_1", "ffn_23", "ffn_4", "SparseFFN")
_PACKAGE = Path(__file__).resolve().parent.parent
PROMPT, TOKENS = "def read(", 65  # to the end of a line that the small model knows by heart
WHAT = {"ffn_1": "gate", "ffn_23": "ReLU x up", "ffn_4": "down", "SparseFFN": "whole FFN"}


@dataclass(frozen=True)
class Row:
    """One operator: times in µs, errors as ‖out - float64‖ / ‖float64‖."""

    operator: str
    dense_us: float
    sparse_us: float
    dense_error: float
    sparse_error: float
    right: bool
    """Whether every call is within the contract; the errors are the largest."""
    spread: float = 0.0
    """Of the times: from the 10th to the 90th percentile, as a share of the median; the larger of both."""

    @property
    def speedup(self) -> float:
        return self.dense_us / self.sparse_us


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
        return tuple(row.operator for row in self.rows if not row.right)

    @property
    def resolution(self) -> float:
        """The largest spread of a time: smaller differences say nothing."""
        return max(row.spread for row in self.rows)


def small_model() -> Path | None:
    """The folder of the small trained model of the checkout that the package lies in, or that the command is called in."""
    folders = (checkout / "tests" / "data" / "relu-lm" for checkout in (_PACKAGE.parent, Path.cwd()))
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def random_layer(
    d_model: int, d_ff: int, dtype: np.dtype[Any], sparsity: float, threshold: float, progress: Progress
) -> synthetic.Layer:
    """A layer with random weights whose token has a realistic mask."""
    return synthetic.layer(d_model, d_ff, dtype, sparsity, threshold, np.random.default_rng(0), progress)


def checkpoint_layer(weights: FFNWeights, dtype: np.dtype[Any], threshold: float) -> synthetic.Layer:
    """A checkpoint's layer with a random token: its mask is the weights' own answer to noise."""
    x = np.random.default_rng(0).standard_normal(weights.w_gate.shape[1:], dtype=np.float32).astype(dtype)
    w_gate, w_up, w_down = (np.ascontiguousarray(w, dtype) for w in (weights.w_gate, weights.w_up, weights.w_down))
    mask = reference.active(reference.ffn_1(x, w_gate), threshold)
    return synthetic.Layer(x, w_gate, w_up, w_down, mask, threshold)


def host_dims(d_model: int, d_ff: int) -> tuple[int, int]:
    """The dims of the host's smaller layer."""
    return max(8, d_model // _HOST_SHRINK // 8 * 8), max(1, d_ff // _HOST_SHRINK)


def on_gpu(layer: synthetic.Layer, dtype: str, progress: Progress) -> Report:
    """Check and time the layer on CuPy's current GPU: copies of it in a CUDA graph, so that nothing stays in the L2 cache."""
    dense = best_dense(layer.x.dtype)
    layers, rows = GivenLayers(layer, dense, progress), []
    for step in STEPS:
        progress(f"timing {step}")
        timed = layers.calls(step, "its own", 1 - float(layer.mask.mean()))
        calls, outs = variants(timed)
        rows.append(_row(step, graph_times(calls, outs, dense, _REPEATS), errors(timed, outs), layer.x.dtype))
    name = gpu(cupy().cuda.Device().id).name
    return Report(
        name, dense.name, layers.model.d_model, layers.model.d_ff, dtype, layers.model.sparsity, layers.count, tuple(rows)
    )


def on_host(layer: synthetic.Layer, dtype: str, progress: Progress) -> Report:
    """The same on the host: the NumPy reference, and the same code skipping nothing."""
    rows = []
    for step, timed in _host_calls(layer).items():
        progress(f"timing {step} on the host")
        calls, outs = variants([timed])
        times = timing.interleave(
            {way: several[0] for way, several in calls.items()}, timing.host_clock, {OURS: 1, DENSE: 1}, 8
        )
        rows.append(_row(step, times, errors([timed], outs), layer.x.dtype))
    where = f"host, NumPy {np.__version__}"
    sparsity = 1 - float(layer.mask.mean())
    d_ff, d_model = layer.w_gate.shape
    return Report(where, "NumPy, nothing skipped", d_model, d_ff, dtype, sparsity, 1, tuple(rows))


def _row(step: str, times: dict[str, timing.Times], found: dict[str, list[float]], dtype: np.dtype[Any]) -> Row:
    ours, dense = times[OURS], times[DENSE]
    right = all_right(found, OURS, float(ml_dtypes.finfo(dtype).eps))
    return Row(step, dense.median, ours.median, max(found[DENSE]), max(found[OURS]), right, max(ours.spread, dense.spread))


def _host_calls(layer: synthetic.Layer) -> dict[str, Timed]:
    """Each operator and its dense counterpart, which differ only in the rows that they read."""
    x, threshold, formula = layer.x, layer.threshold, Formula(layer.threshold)
    w_gate, w_up, w_down_t = layer.w_gate, layer.w_up, np.ascontiguousarray(layer.w_down.T)
    gate = truth.rounded(truth.dot(w_gate, x), x)
    neurons = formula.active(gate)
    exact_x1 = truth.up(gate, w_up, x, neurons)
    x1 = truth.rounded(exact_x1, x)
    exact = {"ffn_1": truth.dot(w_gate, x), "ffn_23": exact_x1, "ffn_4": truth.down(x1, w_down_t)}
    exact["SparseFFN"] = exact["ffn_4"]
    bound, every = ffn.SparseFFN(w_gate, w_up, w_down_t, threshold), np.arange(len(gate))

    def dense_23(g: npt.NDArray[Any], out: npt.NDArray[Any]) -> None:
        out[...] = formula.activate(g).astype(np.float64) * reference.rows_dot(x, w_up, every)

    def dense_4(values: npt.NDArray[Any], out: npt.NDArray[Any]) -> None:
        out[...] = reference.rows_sum(values, w_down_t, every)

    def dense_ffn(out: npt.NDArray[Any]) -> None:
        own_gate, own_x1 = np.empty_like(gate), np.empty_like(x1)
        ops.ffn_1(x, w_gate, out=own_gate)
        dense_23(own_gate, own_x1)
        dense_4(own_x1, out)

    def timed(step: str, size: int, ours: Callable[[Any], Any], dense: Callable[[Any], Any]) -> Timed:
        out, dense_out = (np.full(size, np.nan, np.float32).astype(x.dtype) for _ in range(2))
        return Timed(lambda: ours(out), out, lambda: exact[step], lambda: dense(dense_out), dense_out)

    d_ff, d_model = w_gate.shape
    return {
        "ffn_1": timed("ffn_1", d_ff, *2 * (lambda out: ops.ffn_1(x, w_gate, out=out),)),
        "ffn_23": timed(
            "ffn_23", d_ff, lambda out: ops.ffn_23(gate, x, w_up, threshold, out=out), lambda out: dense_23(gate, out)
        ),
        "ffn_4": timed("ffn_4", d_model, lambda out: ops.ffn_4(x1, w_down_t, out=out), lambda out: dense_4(x1, out)),
        "SparseFFN": timed("SparseFFN", d_model, lambda out: bound(x, out=out), dense_ffn),
    }
