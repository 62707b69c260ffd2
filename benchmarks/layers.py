"""Layers on the GPU, and the calls of each operator on them: many different weights and masks, so that nothing stays in L2."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import prosparse_cupy as psc
from prosparse_cupy import launch, synthetic
from prosparse_cupy._dense import Dense
from prosparse_cupy._families import NUMPY_DTYPES
from prosparse_cupy._gpu import cupy, current_device
from prosparse_cupy.models import Model

from . import float64

MASKS = {
    "hot": lambda d_ff, sparsity, rng: synthetic.hot_mask(synthetic.popularity(d_ff, rng), sparsity, rng),
    "uniform": synthetic.uniform_mask,
    "contiguous": synthetic.contiguous_mask,
}
STEPS = ("ffn_1", "ffn_23", "ffn_4")
WHOLE = ("SparseFFN", "sparse_ffn", "three operators")
_LEAST_LAYERS = 16
_TIMES_L2 = 4
_MOST_CALLS = 256


@dataclass(frozen=True)
class Timed:
    """One operator on one layer and mask: the call, where its result lands, and what it should be."""

    call: Callable[[], Any]
    out: Any
    exact: Callable[[], np.ndarray]
    dense: Callable[[], Any]
    dense_out: Any
    first: Callable[[], Any] | None = None
    """The operators' first release, where it is installed."""
    first_out: Any = None


def first_release() -> tuple[Callable, Callable] | None:
    """`torch_launch_ffn_fuse_23` and `torch_launch_ffn_4` of the first release's modules, or None if they are not installed."""
    if not all(importlib.util.find_spec(name) for name in ("ffn_23", "ffn_4", "torch")):
        return None
    modules = importlib.import_module("ffn_23"), importlib.import_module("ffn_4")
    return modules[0].torch_launch_ffn_fuse_23, modules[1].torch_launch_ffn_4


class Layers:
    """Random FFN layers of one model and dtype, made on the GPU once; masks change from setting to setting."""

    def __init__(self, model: Model, dtype: str, dense: Dense, seed: int = 0) -> None:
        cp = cupy()
        self.model, self.dtype, self._dense = model, NUMPY_DTYPES[dtype], dense
        self._first = first_release()
        self._random = cp.random.default_rng(seed)
        self._l2 = cp.cuda.runtime.getDeviceProperties(current_device())["l2CacheSize"]
        weight_bytes = model.d_ff * model.d_model * launch.ITEMSIZE[dtype]
        wanted = max(_LEAST_LAYERS, math.ceil(_TIMES_L2 * self._l2 / weight_bytes))
        free = cp.cuda.runtime.memGetInfo()[0]
        self.count = max(1, min(wanted, int(free * 0.8 // (4 * weight_bytes))))
        self.x = self._normal((model.d_model,), 1.0)
        scale = model.d_model**-0.5
        shapes = [(model.d_ff, model.d_model)] * 2 + [(model.d_model, model.d_ff)]
        self._weights = [[self._normal(shape, scale) for shape in shapes] for _ in range(self.count)]
        self._packed = [psc.pack_down(w[2]) for w in self._weights]

    def _normal(self, shape: tuple[int, ...], scale: float) -> Any:
        return (self._random.standard_normal(shape, dtype=np.float32) * np.float32(scale)).astype(self.dtype)

    def touched(self, op: str, active: int) -> int:
        """Bytes that one call must move: active rows once, and its vectors."""
        d_model, d_ff = self.model.d_model, self.model.d_ff
        elements = {
            "ffn_1": d_ff * d_model + d_model + d_ff,
            "ffn_23": active * d_model + d_model + 2 * d_ff,
            "ffn_4": active * d_model + d_ff + d_model,
            "ffn_123": (d_ff + active) * d_model + d_model + d_ff,
            **dict.fromkeys(WHOLE, (d_ff + 2 * active) * d_model + 2 * d_model),
        }
        return elements[op] * self.dtype.itemsize

    def calls(self, op: str, mask: str, sparsity: float) -> list[Timed]:
        """Calls of an operator; as many masks a layer as touch several times the L2 cache."""
        active = synthetic.active_count(self.model.d_ff, sparsity)
        masks = math.ceil(_TIMES_L2 * self._l2 / max(1, self.touched(op, active)) / self.count)
        masks = min(masks, _MOST_CALLS // self.count) if op in ("ffn_23", "ffn_4") and active else 1
        rng = np.random.default_rng(1)
        steps = {"ffn_1": self._ffn_1, "ffn_123": self._ffn_123, "ffn_23": self._ffn_23, "ffn_4": self._ffn_4}
        make = steps.get(op, partial(self._ffn, op))
        return [
            make(layer, MASKS[mask](self.model.d_ff, sparsity, rng), rng) for _ in range(masks) for layer in range(self.count)
        ]

    def _gate(self, neurons: np.ndarray, rng: np.random.Generator) -> Any:
        return cupy().asarray(synthetic.gate_of(neurons, self.model.threshold, rng)).astype(self.dtype)

    def _poisoned(self, size: int) -> Any:
        return cupy().full(size * self.dtype.itemsize, 0xFF, np.uint8).view(self.dtype)

    def _timed(self, size: int, call: Callable, dense: Callable, exact: Callable, first: Callable | None = None) -> Timed:
        out, dense_out, first_out = (self._poisoned(size) for _ in range(3))
        adopted, first_adopted = self._dense.adopt(dense_out), self._dense.adopt(first_out)
        first_call = (lambda: first(first_adopted)) if first is not None and self._first is not None else None
        return Timed(lambda: call(out), out, exact, lambda: dense(adopted), dense_out, first_call, first_out)

    def _ffn_1(self, layer: int, neurons: np.ndarray, rng: np.random.Generator) -> Timed:
        x, w = self.x, self._weights[layer][0]
        x_, w_ = map(self._dense.adopt, (x, w))
        return self._timed(
            self.model.d_ff,
            lambda out: psc.ffn_1(x, w, out=out),
            lambda out: self._dense.mv(w_, x_, out),
            lambda: float64.dot(w, x),
        )

    def _ffn_123(self, layer: int, neurons: np.ndarray, rng: np.random.Generator) -> Timed:
        (w_gate, w_up, _), x, threshold = self._weights[layer], self.x, self.model.threshold
        _steer(w_gate, x, cupy().asarray(synthetic.gate_of(neurons, threshold, rng)))
        x_, gate_, *w_ = map(self._dense.adopt, (x, self._poisoned(self.model.d_ff), w_gate, w_up))

        def dense(out: Any) -> None:
            self._dense.mv(w_[0], x_, gate_)
            self._dense.step_2(gate_, x_, w_[1], threshold, out)

        return self._timed(
            self.model.d_ff,
            lambda out: psc.ffn_123(x, w_gate, w_up, threshold, out=out),
            dense,
            lambda: self._exact_x1(layer, neurons),
        )

    def _exact_x1(self, layer: int, neurons: np.ndarray) -> np.ndarray:
        """Formulas 1 to 3 of a steered layer, the gate rounded."""
        (w_gate, w_up, _), x = self._weights[layer], self.x
        gate = cupy().asarray(float64.dot(w_gate, x)).astype(self.dtype)
        np.testing.assert_array_equal(cupy().asnumpy(gate.astype(np.float32)) >= np.float32(self.model.threshold), neurons)
        return float64.up(gate, w_up, x, neurons)

    def _ffn_23(self, layer: int, neurons: np.ndarray, rng: np.random.Generator) -> Timed:
        gate, x, w, threshold = self._gate(neurons, rng), self.x, self._weights[layer][1], self.model.threshold
        gate_, x_, w_ = map(self._dense.adopt, (gate, x, w))
        return self._timed(
            self.model.d_ff,
            lambda out: psc.ffn_23(gate, x, w, threshold, out=out),
            lambda out: self._dense.step_2(gate_, x_, w_, threshold, out),
            lambda: float64.up(gate, w, x, neurons),
            lambda out: self._first[0](gate_, x_, w_, out, self.model.d_model, self.model.d_ff, threshold),
        )

    def _ffn_4(self, layer: int, neurons: np.ndarray, rng: np.random.Generator) -> Timed:
        values = rng.standard_normal(self.model.d_ff, dtype=np.float32) * neurons
        x1, w, packed = cupy().asarray(values).astype(self.dtype), self._weights[layer][2], self._packed[layer]
        x1_, w_, packed_ = map(self._dense.adopt, (x1, w, packed))
        return self._timed(
            self.model.d_model,
            lambda out: psc.ffn_4(x1, packed, out=out),
            lambda out: self._dense.mv(w_, x1_, out),
            lambda: float64.down(x1, packed),
            lambda out: self._first[1](packed_, x1_, out, self.model.d_ff, self.model.d_model),
        )

    def _ffn(self, how: str, layer: int, neurons: np.ndarray, rng: np.random.Generator) -> Timed:
        (w_gate, w_up, w_down), packed, x, threshold = self._weights[layer], self._packed[layer], self.x, self.model.threshold
        _steer(w_gate, x, cupy().asarray(synthetic.gate_of(neurons, threshold, rng)))
        gate, x1 = self._poisoned(self.model.d_ff), self._poisoned(self.model.d_ff)
        bound = psc.SparseFFN(w_gate, w_up, packed, threshold)
        sparse = {
            "SparseFFN": lambda out: bound(x, out=out),
            "sparse_ffn": lambda out: psc.sparse_ffn(x, w_gate, w_up, packed, threshold, out=out),
            "three operators": lambda out: psc.ffn_4(
                psc.ffn_23(psc.ffn_1(x, w_gate, out=gate), x, w_up, threshold, out=x1), packed, out=out
            ),
        }
        dense_gate, dense_x1 = self._poisoned(self.model.d_ff), self._poisoned(self.model.d_ff)
        x_, gate_, x1_, *w_ = map(self._dense.adopt, (x, dense_gate, dense_x1, w_gate, w_up, w_down))

        def dense(out: Any) -> None:
            self._dense.mv(w_[0], x_, gate_)
            self._dense.step_2(gate_, x_, w_[1], threshold, x1_)
            self._dense.mv(w_[2], x1_, out)

        def exact() -> np.ndarray:
            return float64.down(cupy().asarray(self._exact_x1(layer, neurons)).astype(self.dtype), packed)

        return self._timed(self.model.d_model, sparse[how], dense, exact)


def _steer(w_gate: Any, x: Any, gate: Any) -> None:
    """Move `w_gate` along `x` so that ``w_gate @ x`` is `gate`, up to rounding."""
    wide = x.astype(np.float32)
    along = wide / (wide * wide).sum()
    for i in range(0, len(w_gate), 2048):
        rows = w_gate[i : i + 2048].astype(np.float32)
        rows += (gate[i : i + 2048] - (rows * wide).sum(axis=1))[:, None] * along
        w_gate[i : i + 2048] = rows.astype(w_gate.dtype)
