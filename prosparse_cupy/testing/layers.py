"""Layers on the GPU, and the calls of each operator on them: many different weights and masks, so that nothing stays in L2."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import ffn, ops
from ..compressed import compress, is_too_narrow
from ..device import cupy, current_device
from ..formats import BF12_ROWS, PLAIN
from ..formula import DRELU
from ..libraries import NUMPY_DTYPES
from ..models import Model
from . import synthetic, truth
from .dense import Dense

Mask = npt.NDArray[np.bool_]
FirstRelease = tuple[Callable[..., Any], Callable[..., Any]]
"""`torch_launch_ffn_fuse_23` and `torch_launch_ffn_4` of the operators' first release."""

MASKS: dict[str, Callable[[int, float, np.random.Generator], Mask]] = {
    "hot": lambda d_ff, sparsity, rng: synthetic.hot_mask(synthetic.popularity(d_ff, rng), sparsity, rng),
    "uniform": synthetic.uniform_mask,
    "contiguous": synthetic.contiguous_mask,
}
"""A token's; those of several tokens are independent."""
CORRELATED = "correlated"
"""Masks of several tokens, of which each shares a part of its active neurons with all others."""
STEPS = ("ffn_1", "ffn_23", "ffn_4")
WHOLE = ("SparseFFN", "sparse_ffn", "three operators")
_NORM_EPS = 1e-5


def operators_of(model: Model) -> tuple[str, ...]:
    """The operators that a model's FFN is made of, then the ways to call all of it."""
    halves = (*STEPS, "ffn_123", "three operators") if model.gated else ("ffn_12", "ffn_4")
    return (*halves, "sparse_ffn", "SparseFFN")


_LEAST_LAYERS = 16
_TIMES_L2 = 4
_MOST_CALLS = 256


@dataclass(frozen=True)
class Timed:
    """One operator on one layer and mask: the call, where its result lands, and what it should be."""

    call: Callable[[], Any]
    out: Any
    exact: Callable[[], truth.Float64]
    dense: Callable[[], Any]
    dense_out: Any
    first: Callable[[], Any] | None = None
    """The operators' first release, if it is given."""
    first_out: Any = None
    singles: Callable[[], Any] | None = None
    """Of a whole FFN of several tokens: as many calls of one token each."""
    singles_out: Any = None
    varying: Callable[[], Any] | None = None
    """Of several tokens: the call without batch invariance, for an operator that can do without."""
    varying_out: Any = None
    active: int = 0
    """Neurons that are active for some token."""


def poisoned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
    """A CuPy array with NaN in every element, so that one that nobody writes fails the check."""
    kind = np.dtype(dtype)
    return cupy().full(math.prod(shape) * kind.itemsize, 0xFF, np.uint8).view(kind).reshape(shape)


class Layers:
    """Random FFN layers of one model and dtype, made on the GPU once; masks change from setting to setting.

    Vectors are of one token, (d,), or of `tokens`, (tokens, d). The first release knows one token alone.
    """

    def __init__(
        self,
        model: Model,
        dtype: str,
        dense: Dense,
        seed: int = 0,
        first: FirstRelease | None = None,
        tokens: int = 1,
    ) -> None:
        if tokens > 1 and model.activation == DRELU:
            raise ValueError("Layers: what several tokens need with dReLU is not counted: its up-projection makes other zeros")
        cp = cupy()
        self.model, self.dtype, self._dense, self.tokens = model, NUMPY_DTYPES[dtype], dense, tokens
        self._first = first if tokens == 1 else None
        self._random = cp.random.default_rng(seed)
        self._l2: int = cp.cuda.runtime.getDeviceProperties(current_device())["l2CacheSize"]
        self._row_bytes: int = PLAIN.row_bytes(model.d_model, dtype)
        weight_bytes = model.d_ff * self._row_bytes
        wanted = max(_LEAST_LAYERS, math.ceil(_TIMES_L2 * self._l2 / self._least_touched()))
        free = cp.cuda.runtime.memGetInfo()[0]
        self.count = max(1, min(wanted, _MOST_CALLS, int(free * 0.8 // (4 * weight_bytes))))
        self._format = "plain"
        self._compressed: dict[int, tuple[Any, Any]] = {}
        self.x = self._token()
        self._weights = [self._layer(i) for i in range(self.count)]
        self._packed = [ops.pack_down(w[2]) for w in self._weights]
        self._norm = (1 + self._normal((model.d_ff,), 0.1)).astype(self.dtype) if model.normed else None

    def _least_touched(self) -> int:
        """Bytes that a call touches at least: more layers are made of less."""
        return int(self.model.d_ff * self._row_bytes)

    def _token(self) -> Any:
        return self._normal(self._shape(self.model.d_model), 1.0)

    def _shape(self, size: int) -> tuple[int, ...]:
        """Of a vector for each token."""
        return (size,) if self.tokens == 1 else (self.tokens, size)

    def _layer(self, index: int) -> tuple[Any, Any, Any]:
        """w_gate, w_up and w_down of a layer; without a gate, w_up stands first too, since it is what is steered."""
        d_model, d_ff, scale = self.model.d_model, self.model.d_ff, self.model.d_model**-0.5
        first = self._normal((d_ff, d_model), scale)
        return first, self._normal((d_ff, d_model), scale) if self.model.gated else first, self._normal((d_model, d_ff), scale)

    def _normal(self, shape: tuple[int, ...], scale: float) -> Any:
        return (self._random.standard_normal(shape, dtype=np.float32) * np.float32(scale)).astype(self.dtype)

    def touched(self, op: str, active: int, weights: str = "plain") -> int:
        """Bytes that one call must move: active rows once, in the format of the weights, and each token's vectors.

        `active` counts the neurons whose x1 is not zero for some token.
        """
        d_model, d_ff = self.model.d_model, self.model.d_ff
        gates = self._active_gates(active)
        rows, elements = {
            "ffn_1": (d_ff, d_model + d_ff),
            "ffn_12": (d_ff, d_model + d_ff),
            "ffn_23": (gates, d_model + 2 * d_ff),
            "ffn_4": (active, d_ff + d_model),
            "ffn_123": (d_ff + gates, d_model + d_ff),
            **dict.fromkeys(WHOLE, (d_ff + self.model.gated * gates + active, 2 * d_model)),
        }[op]
        row_bytes = self._row_bytes if weights == "plain" else BF12_ROWS.row_bytes(d_model, str(self.dtype))
        plain = active if op in ("ffn_4", *WHOLE) and is_too_narrow(d_model, d_ff) else 0  # rows that are plain in any case
        vectors = self.tokens * elements * self.dtype.itemsize
        return int((rows - plain) * row_bytes + plain * self._row_bytes + vectors)

    def _active_gates(self, active: int) -> int:
        """Neurons whose gate is active, of which dReLU's up-projection makes half zero."""
        return min(self.model.d_ff, 2 * active) if self.model.activation == DRELU else active

    def calls(self, op: str, mask: str, sparsity: float, weights: str = "plain") -> list[Timed]:
        """Calls of an operator; as many masks a layer as touch several times the L2 cache. `weights` may also be bf12.

        Each token has a mask of this sparsity. `mask` is a name in `MASKS`, or `CORRELATED` of several tokens.

        Those of `ffn_123` and of whole FFNs steer the layers' own weights: use them up before others of these are made.
        """
        active = synthetic.active_count(self.model.d_ff, sparsity)
        masks = self._masks(op, active, weights)
        if op != "ffn_4":
            sparsity = 1 - self._active_gates(active) / self.model.d_ff
        self._format = weights
        rng = np.random.default_rng(1)
        steps = {
            "ffn_1": self._ffn_1,
            "ffn_12": self._ffn_12,
            "ffn_123": self._ffn_123,
            "ffn_23": self._ffn_23,
            "ffn_4": self._ffn_4,
        }
        make = steps.get(op, partial(self._ffn, op))

        def call(layer: int) -> Timed:
            neurons = self._neurons(layer, mask, sparsity, rng)
            union = neurons.reshape(-1, self.model.d_ff).any(axis=0)
            return replace(make(layer, neurons, rng), active=int(union.sum()))

        return [call(layer) for _ in range(masks) for layer in range(self.count)]

    def _masks(self, op: str, active: int, weights: str = "plain") -> int:
        """Masks a layer."""
        if op not in ("ffn_23", "ffn_4") or active == 0:
            return 1
        wanted = math.ceil(_TIMES_L2 * self._l2 / self.touched(op, active, weights) / self.count)
        return int(min(wanted, _MOST_CALLS // self.count))

    def _sparse_gate(self, layer: int) -> Any:
        """w_gate as the sparse side gets it, steered as it is now."""
        w_gate = self._weights[layer][0]
        return w_gate if self._format == "plain" else compress(w_gate)

    def _sparse_others(self, layer: int) -> tuple[Any, Any]:
        """w_up and w_down_t as the sparse side gets them."""
        w_up, packed = self._weights[layer][1], self._packed[layer]
        if self._format == "plain":
            return w_up, packed  # without a gate w_up is what `_sparse_gate` has
        if layer not in self._compressed:
            up = None if not self.model.gated else compress(w_up)  # without a gate `_sparse_gate` has it, steered
            narrow = is_too_narrow(self.model.d_model, self.model.d_ff)  # then patch_model leaves it plain too
            self._compressed[layer] = up, packed if narrow else compress(packed, layout="slices")
        return self._compressed[layer]

    def _neurons(self, layer: int, mask: str, sparsity: float, rng: np.random.Generator) -> Mask:
        """The active neurons of a call, of each of its tokens."""
        d_ff = self.model.d_ff
        if mask == CORRELATED:
            return synthetic.correlated_masks(d_ff, sparsity, self.tokens, rng).reshape(self._shape(d_ff))
        return np.stack([MASKS[mask](d_ff, sparsity, rng) for _ in range(self.tokens)]).reshape(self._shape(d_ff))

    def _steer(self, layer: int, neurons: Mask, rng: np.random.Generator) -> None:
        """Make these neurons of a layer active for the token, or for each token its own."""
        gate = cupy().asarray(synthetic.gate_of(neurons, self.model.threshold, rng))
        synthetic.steer(self._weights[layer][0], self.x, gate)

    def _gate(self, layer: int, neurons: Mask, rng: np.random.Generator) -> Any:
        """A gate with these neurons active."""
        return cupy().asarray(synthetic.gate_of(neurons, self.model.threshold, rng)).astype(self.dtype)

    def _poisoned(self, size: int) -> Any:
        return poisoned(self._shape(size), self.dtype)

    def _timed(
        self,
        size: int,
        call: Callable[[Any], Any],
        dense: Callable[[Any], Any],
        exact: Callable[[], truth.Float64],
        first: Callable[[Any], Any] | None = None,
        varying: Callable[[Any], Any] | None = None,
    ) -> Timed:
        out, dense_out, first_out = (self._poisoned(size) for _ in range(3))
        adopted, first_adopted = self._dense.adopt(dense_out), self._dense.adopt(first_out)
        first_call = (lambda: first(first_adopted)) if first is not None else None
        timed = Timed(lambda: call(out), out, exact, lambda: dense(adopted), dense_out, first_call, first_out)
        if varying is None or self.tokens == 1:
            return timed
        other = self._poisoned(size)
        return replace(timed, varying=lambda: varying(other), varying_out=other)

    def _ffn_1(self, layer: int, neurons: Mask, rng: np.random.Generator) -> Timed:
        x, w = self.x, self._weights[layer][0]
        x_, w_ = map(self._dense.adopt, (x, w))
        given = self._sparse_gate(layer)
        return self._timed(
            self.model.d_ff,
            lambda out: ops.ffn_1(x, given, out=out),
            lambda out: self._dense.mv(w_, x_, out),
            lambda: truth.dot(w, x),
            varying=lambda out: ops.ffn_1(x, given, batch_invariant=False, out=out),
        )

    def _ffn_123(self, layer: int, neurons: Mask, rng: np.random.Generator) -> Timed:
        (w_gate, w_up, _), x, formula = self._weights[layer], self.x, self.model.formula
        self._steer(layer, neurons, rng)
        x_, gate_, *w_ = map(self._dense.adopt, (x, self._poisoned(self.model.d_ff), w_gate, w_up))
        given = self._sparse_gate(layer), self._sparse_others(layer)[0]

        def dense(out: Any) -> None:
            self._dense.mv(w_[0], x_, gate_)
            self._dense.ffn_23(gate_, x_, w_[1], formula, out)

        return self._timed(
            self.model.d_ff,
            lambda out: ops.ffn_123(x, *given, formula.threshold, activation=formula.activation, out=out),
            dense,
            lambda: self._exact_x1(layer, neurons),
        )

    def _exact_x1(self, layer: int, neurons: Mask) -> truth.Float64:
        """Formulas 1 to 3 of a layer whose token makes these neurons active, the gate rounded."""
        (w_gate, w_up, _), x = self._weights[layer], self.x
        gate = truth.rounded(truth.dot(w_gate, x), x)
        np.testing.assert_array_equal(self.model.formula.active(truth.to_numpy(gate)), neurons)
        if not self.model.gated:
            return truth.half(gate, self.model.activation, neurons)
        return truth.up(gate, w_up, x, neurons, activation=self.model.activation)

    def _ffn_12(self, layer: int, neurons: Mask, rng: np.random.Generator) -> Timed:
        w_up, x, formula = self._weights[layer][1], self.x, self.model.formula
        self._steer(layer, neurons, rng)
        x_, w_ = map(self._dense.adopt, (x, w_up))
        given = self._sparse_gate(layer)
        return self._timed(
            self.model.d_ff,
            lambda out: ops.ffn_12(x, given, formula.threshold, activation=formula.activation, out=out),
            lambda out: self._dense.ffn_12(x_, w_, formula, out),
            lambda: self._exact_x1(layer, neurons),
        )

    def _ffn_23(self, layer: int, neurons: Mask, rng: np.random.Generator) -> Timed:
        gate, x, w, formula = self._gate(layer, neurons, rng), self.x, self._weights[layer][1], self.model.formula
        threshold, activation = formula.threshold, formula.activation
        gate_, x_, w_ = map(self._dense.adopt, (gate, x, w))
        first, dims = self._first, (self.model.d_model, self.model.d_ff)
        given = self._sparse_others(layer)[0]
        return self._timed(
            self.model.d_ff,
            lambda out: ops.ffn_23(gate, x, given, threshold, activation=activation, out=out),
            lambda out: self._dense.ffn_23(gate_, x_, w_, formula, out),
            lambda: truth.up(gate, w, x, neurons, activation=activation),
            None if first is None else lambda out: first[0](gate_, x_, w_, out, *dims, threshold),
        )

    def _ffn_4(self, layer: int, neurons: Mask, rng: np.random.Generator) -> Timed:
        values = rng.standard_normal(neurons.shape, dtype=np.float32) * neurons
        x1, w, packed = cupy().asarray(values).astype(self.dtype), self._weights[layer][2], self._packed[layer]
        x1_, w_, packed_ = map(self._dense.adopt, (x1, w, packed))
        first, dims = self._first, (self.model.d_ff, self.model.d_model)
        given = self._sparse_others(layer)[1]
        return self._timed(
            self.model.d_model,
            lambda out: ops.ffn_4(x1, given, out=out),
            lambda out: self._dense.mv(w_, x1_, out),
            lambda: truth.down(x1, packed),
            None if first is None else lambda out: first[1](packed_, x1_, out, *dims),
            varying=lambda out: ops.ffn_4(x1, given, batch_invariant=False, out=out),
        )

    def _ffn(self, how: str, layer: int, neurons: Mask, rng: np.random.Generator) -> Timed:
        (w_gate, w_up, w_down), packed, x, formula = self._weights[layer], self._packed[layer], self.x, self.model.formula
        self._steer(layer, neurons, rng)
        gate, x1 = self._poisoned(self.model.d_ff), self._poisoned(self.model.d_ff)
        first, (second, down_given) = self._sparse_gate(layer), self._sparse_others(layer)
        given: Any = (first, second, down_given) if formula.gated else (None, first, down_given)
        norm: dict[str, Any] = {"norm_weight": self._norm, "norm_eps": _NORM_EPS} if formula.normed else {}
        threshold, activation = formula.threshold, formula.activation
        how_: dict[str, Any] = {"threshold": threshold, "activation": activation, **norm}
        bound, varying = (ffn.SparseFFN(*given, **how_, batch_invariant=flag) for flag in (True, False))
        sparse: dict[str, Callable[[Any], Any]] = {
            "SparseFFN": lambda out: bound(x, out=out),
            "sparse_ffn": lambda out: ffn.sparse_ffn(x, *given, **how_, out=out),
            "three operators": lambda out: ops.ffn_4(
                ops.ffn_23(ops.ffn_1(x, first, out=gate), x, second, threshold, activation=activation, out=x1),
                down_given,
                **norm,
                out=out,
            ),
        }
        vectors = (x, self._poisoned(self.model.d_ff), self._poisoned(self.model.d_ff))
        x_, gate_, x1_, *w_ = map(self._dense.adopt, (*vectors, w_gate, w_up, w_down))
        norm_ = self._dense.adopt(self._norm) if formula.normed else None
        weights = (w_[0] if formula.gated else None, w_[1], w_[2])

        def dense(out: Any) -> None:
            self._dense.ffn(weights, x_, formula, gate_, x1_, out, norm_, _NORM_EPS)

        def exact() -> truth.Float64:
            return truth.down(truth.rounded(self._exact_x1(layer, neurons), x), packed, **norm)

        other = (lambda out: varying(x, out=out)) if how == "SparseFFN" else None
        timed = self._timed(self.model.d_model, sparse[how], dense, exact, varying=other)
        if self.tokens == 1 or how != "SparseFFN":
            return timed
        singles_out = self._poisoned(self.model.d_model)
        tokens = [*zip(x, singles_out, strict=True)]
        return replace(timed, singles=lambda: [bound(token, out=out) for token, out in tokens], singles_out=singles_out)


class GivenLayers(Layers):
    """Copies of one given layer with their neurons rotated: other memory and another mask each, the same y.

    The active neurons are the layer's own answer to the token, so nothing is steered.
    """

    def __init__(self, layer: synthetic.Layer, dense: Dense, tell: Callable[[str], None] = lambda doing: None) -> None:
        self._given, self._tell = layer, tell
        d_ff, d_model = layer.w_gate.shape
        model = Model("given", d_model, d_ff, 1, layer.threshold, 1 - float(layer.mask.mean()))
        super().__init__(model, str(layer.x.dtype), dense)
        del self._unrotated

    def _least_touched(self) -> int:
        # The same rows every time: as many layers as keep the sparse operators from finding them in the cache.
        return max(self.touched("ffn_4", int(self._given.mask.sum())), self.model.d_ff * self._row_bytes // _MOST_CALLS)

    def _token(self) -> Any:
        return cupy().asarray(self._given.x)

    def _layer(self, index: int) -> tuple[Any, Any, Any]:
        self._tell(f"layer {index + 1} of {self.count} to the GPU")
        if index == 0:
            self._unrotated = tuple(map(cupy().asarray, (self._given.w_gate, self._given.w_up, self._given.w_down)))
        w_gate, w_up, w_down = self._unrotated
        return _rotated(w_gate, self._shift(index)), _rotated(w_up, self._shift(index)), _rotated(w_down, self._shift(index), 1)

    def _shift(self, index: int) -> int:
        return int(index * self.model.d_ff // self.count)

    def _masks(self, op: str, active: int, weights: str = "plain") -> int:
        return 1

    def _neurons(self, layer: int, mask: str, sparsity: float, rng: np.random.Generator) -> Mask:
        return np.roll(self._given.mask, -self._shift(layer))

    def _steer(self, layer: int, neurons: Mask, rng: np.random.Generator) -> None:
        pass

    def _gate(self, layer: int, neurons: Mask, rng: np.random.Generator) -> Any:
        return truth.rounded(truth.dot(self._weights[layer][0], self.x), self.x)


def _rotated(weights: Any, shift: int, axis: int = 0) -> Any:
    first, second = cupy().split(weights, [shift], axis=axis)
    return cupy().concatenate([second, first], axis=axis)
