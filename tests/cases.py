"""Generated cases: which operator, shape and formula, on which numbers. One set of strategies for every place operators run.

A `Case` is plain data, and `inputs` makes the same arrays of it everywhere, so the line that it prints as repeats it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from checks import DTYPES, active
from hypothesis import strategies as st

from prosparse_cupy import knobs, reference
from prosparse_cupy.formats import SLICE_UNIT, vector_length
from prosparse_cupy.problem import H100, WARP, Problem
from prosparse_cupy.testing import synthetic

BIASES = ("gate_bias", "up_bias", "down_bias")
FORMULAS = ((True, "relu"), (True, "relu2"), (True, "drelu"), (False, "relu"), (False, "relu2"))
MASKS = ("uniform", "hot", "contiguous", "one", "natural")
VALUES = ("normal", "integers", "large", "tiny", "wide")
WAYS = ("call", "stream", "graph", "torch", "dlpack")
SPECIALS = (
    *("nan_x", "inf_x", "subnormal_x"),
    *("nan_hidden", "inf_hidden", "subnormal_hidden", "zeros_hidden", "threshold_hidden"),  # of the gate, or of x1
    *("nan_weights", "inf_weights", "subnormal_weights", "zero_weights"),
    *("nan_inactive", "nan_bias", "inf_bias", "subnormal_bias"),
    *("equal_tokens", "large_token", "zero_token"),
)
AROUND_A_GATE = ("gate", "gate-", "gate+")
"""Thresholds that are a gate of the case, or its neighbours in float32."""


@dataclass(frozen=True)
class Kind:
    """What kernels are compiled for, but for the dims: cases of one kind share them."""

    dtype: str
    compressed: bool
    tokens: int
    """0 for a vector."""
    gated: bool
    activation: str
    biases: tuple[str, ...]
    normed: bool
    partial: bool
    """Whether `out` is of float32, where the dtype is another."""
    specialize: bool

    @property
    def operators(self) -> tuple[str, ...]:
        sums = (*(("ffn_1",) * self.gated), "ffn_4", "sparse_ffn", "SparseFFN")
        if self.partial:
            return sums
        halves = ("ffn_23", "ffn_123") if self.gated else ("ffn_12",)
        return (*halves, *sums, *(("pack_down",) * (self.gated and not self.compressed)))


def _kinds() -> Iterator[Kind]:
    weights = ((False, "bfloat16"), (False, "float32"), (False, "float16"), (True, "bfloat16"))
    biases = ((), BIASES, ("up_bias",), ("gate_bias", "down_bias"))
    flags = product((False, True), repeat=3)
    for (specialize, partial, normed), (gated, activation), some, (compressed, dtype), tokens in product(
        flags, FORMULAS, biases, weights, range(9)
    ):
        of_these = some if gated else tuple(name for name in some if name != "gate_bias")
        # Few of float32 results, of which less can be called, and whose kernels differ in their last line.
        if not partial or (dtype != "float32" and tokens in (0, 1, 3, 8) and some in ((), BIASES) and activation != "relu2"):
            yield Kind(dtype, compressed, tokens, gated, activation, of_these, normed, partial, specialize)


KINDS = tuple(dict.fromkeys(_kinds()))
"""Every kind, the plainest first."""


@dataclass(frozen=True)
class Case(Kind):
    """One call."""

    operator: str
    d_model: int
    d_ff: int
    threshold: float | str
    """T, or one of `AROUND_A_GATE`."""
    norm_eps: float
    """Of cases with a norm."""
    mask: str
    sparsity: float
    values: str
    specials: tuple[str, ...]
    given_out: bool
    way: str
    """How a GPU is asked: see `WAYS`."""
    seed: int

    @classmethod
    def parse(cls, line: str) -> Case:
        """The case that printed itself so."""
        call = ast.parse(line.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args or getattr(call.func, "id", "") != "Case":
            raise ValueError(f"expected Case(...), got {line!r:.80}")
        given = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        if set(given) != {field.name for field in fields(cls)}:
            raise ValueError(f"Case takes exactly {', '.join(field.name for field in fields(cls))}, got {', '.join(given)}")
        return cls(**given)


# Shapes


@cache
def edges_of_d_ff(dtype: str) -> tuple[int, ...]:
    """Rows around what blocks, warps and tiles hold, and around the multiprocessors of GPUs."""
    length, many = vector_length(dtype), 27720  # a multiple of 1 to 12
    sizes = {WARP, 108, H100.multiprocessors}
    for kernel, tokens, specialize in product(("ffn_1", "ffn_12", "ffn_23", "ffn_123"), range(1, 9), (False, True)):
        problem = Problem(kernel, 4096, many, dtype, specialize, tokens)
        sizes.add(-(-many // knobs.rule(problem, H100).shape(problem)[0][0]))
    for d_model, d_ff in product((length, 512 * length), (1, 1024, 4096, 20481)):
        order = knobs.order_of_ffn_4(Problem("ffn_4", d_model, d_ff, dtype))
        unit = order.unit * length
        part = length * WARP * order.warps
        sizes |= {length, unit, unit * order.warps, part, part * order.each, order.listed}
    primes = {2, 3, 5, 7, 13, 31, 61, 127, 257, 509, 1021, 2039, 4093}
    around = {times * size + by for size in sizes for times in (1, 2) for by in (-1, 0, 1)}
    return tuple(sorted(size for size in primes | around if size > 0))


@cache
def edges_of_vectors(dtype: str) -> tuple[int, ...]:
    """Vectors of a row around a warp's loads, a unit of compressed chunks, and ffn_4's slices."""
    slices = {2 * H100.multiprocessors, 4 * H100.multiprocessors}  # from which on they are wider
    sizes = {SLICE_UNIT, WARP, 2 * WARP, 72 * 4} | slices
    for kernel, tokens, vectors in product(("ffn_1", "ffn_23", "ffn_123"), range(1, 9), (192, 512, 640)):
        problem = Problem(kernel, vectors * vector_length(dtype), 1000, dtype, False, tokens)
        loads = knobs.rule(problem, H100).as_dict()["loads"]
        sizes |= {WARP * loads, 2 * WARP * loads}
    around = {size + by for size in sizes for by in (-1, 0, 1)}
    return tuple(sorted(size for size in around if size > 0))


@st.composite
def dims(draw: st.DrawFn, dtype: str, elements: int, longest: int) -> tuple[int, int]:
    """(d_model, d_ff) of a matrix of at most so many elements, in rows of at most so many vectors."""
    length = vector_length(dtype)
    most = min(elements // length, longest)
    edges = [v for v in edges_of_vectors(dtype) if v <= most]
    vectors = draw(st.integers(1, min(9, most)) | st.sampled_from(edges) | st.integers(1, min(700, most)))
    most = elements // (length * vectors)
    edges = [rows for rows in edges_of_d_ff(dtype) if rows <= most] or [1]
    rows = draw(st.integers(1, min(40, most)) | st.sampled_from(edges) | st.integers(1, min(most, 700)))
    return length * vectors, rows


ON_TENSOR_CORES = ((64, 72), (1088, 520), (4096, 144))
"""(d_model, d_ff) of which tensor cores take both halves: slices of 64 columns, an odd number of these, and slices of 128."""
SPECIALIZED = ((264, 101), (8, 1), (2304, 33), (4104, 29), (40, 700), (520, 133), (2840, 20), *ON_TENSOR_CORES)
"""(d_model, d_ff) of cases whose dims are constants: each is kernels of its own.

They end inside every tile, but for 2304, whose rows of 16-bit elements are whole batches; warps share rows of 4104; slices of
2840 lie in units."""


def cases_of(
    kind: Kind,
    elements: int,
    *,
    longest: int = 700,
    specialized: tuple[tuple[int, int], ...] = SPECIALIZED,
    ways: tuple[str, ...] = WAYS,
) -> st.SearchStrategy[Case]:
    """Cases of a kind, with matrices of at most so many elements in rows of at most so many vectors; or `specialized`."""
    dims_of = st.sampled_from(specialized) if kind.specialize else dims(kind.dtype, elements, longest)
    thresholds = st.sampled_from([0.0, 0.25, *AROUND_A_GATE, 2.0**-133, 2.0**-149, 1e30]) | st.floats(0, 4, width=32)
    specials = st.just(()) | st.lists(st.sampled_from(SPECIALS), min_size=1, max_size=4, unique=True).map(_sorted)
    return st.builds(
        lambda operator, size, **more: Case(**asdict(kind), operator=operator, d_model=size[0], d_ff=size[1], **more),
        operator=st.sampled_from(kind.operators),
        size=dims_of,
        threshold=thresholds,
        norm_eps=st.sampled_from([1e-5, 0.0]) if kind.normed else st.just(0.0),
        mask=st.sampled_from(MASKS),
        sparsity=st.sampled_from([0.9, 0.0, 0.5, 1.0, 0.99]) | st.floats(0, 1, width=16),
        values=st.sampled_from(VALUES),
        specials=specials,
        given_out=st.booleans(),
        way=st.sampled_from(ways),
        seed=st.integers(0, 2**32 - 1),
    )


def _sorted(names: list[str]) -> tuple[str, ...]:
    return tuple(sorted(names))


def cases(kinds: tuple[Kind, ...] = KINDS, elements: int = 40_000, **more: Any) -> st.SearchStrategy[Case]:
    """Cases of any of these kinds."""
    return st.sampled_from(kinds).flatmap(lambda kind: cases_of(kind, elements, **more))


# Numbers

_NEEDED = {
    "ffn_1": ("x", "w_gate", "gate_bias"),
    "ffn_12": ("x", "w_up", "up_bias"),
    "ffn_23": ("gate", "x", "w_up", "up_bias"),
    "ffn_123": ("x", "w_gate", "w_up", "gate_bias", "up_bias"),
    "ffn_4": ("x1", "w_down_t", "down_bias", "norm_weight"),
    "pack_down": ("w_down",),
    "sparse_ffn": ("x", "w_gate", "w_up", "w_down_t", "gate_bias", "up_bias", "down_bias", "norm_weight"),
}
_NEEDED["SparseFFN"] = _NEEDED["sparse_ffn"]
_ORDER = _NEEDED["sparse_ffn"] + ("gate", "x1", "w_down")
VECTORS = ("x", "gate", "x1")
"""Which have a row for each token."""


class Inputs(NamedTuple):
    """What a case is called with."""

    arrays: dict[str, np.ndarray]
    threshold: float


def inputs(case: Case) -> Inputs:
    """The same arrays for a case wherever they are made."""
    with np.errstate(all="ignore"):
        return _Maker(case).made()


class _Maker:
    """Each array has random numbers of its own, whatever else a case needs."""

    def __init__(self, case: Case) -> None:
        self.case, self.dtype = case, DTYPES[case.dtype]
        rng = self._rng("x", 1)
        self.lead = max(1, case.tokens)
        self.mask = self._masks(rng)
        self.signs = np.where(rng.random((self.lead, 1)) < 0.25, -1.0, 1.0)  # of x: they turn a token's mask round
        self.computed = "w_gate" if case.gated else "w_up"  # whose products are gates

    def _rng(self, name: str, more: int = 0) -> np.random.Generator:
        return np.random.default_rng([self.case.seed, _ORDER.index(name), more])

    def made(self) -> Inputs:
        case = self.case
        extras = {*case.biases, *(("norm_weight",) * case.normed)}
        names = [n for n in _NEEDED[case.operator] if n not in (*BIASES, "norm_weight") or n in extras]
        if not case.gated and case.operator in ("sparse_ffn", "SparseFFN"):
            names.remove("w_gate")
        arrays = {name: self._array(name) for name in names}
        for special in case.specials:
            if special not in ("threshold_hidden", "nan_inactive"):  # which follow the threshold
                self._put_special(special, arrays)
        threshold = self._threshold(arrays)
        if "threshold_hidden" in case.specials and "gate" in arrays:
            self._put_neighbours_of(threshold, arrays["gate"])
        if "nan_inactive" in case.specials:
            self._poison_inactive(arrays, threshold)
        if case.tokens == 0:
            arrays |= {name: arrays[name][0] for name in VECTORS if name in arrays}
        return Inputs({name: np.ascontiguousarray(a) for name, a in arrays.items()}, threshold)

    def _masks(self, rng: np.random.Generator) -> np.ndarray:
        """(tokens, d_ff): some tokens have all neurons active, or none."""
        d_ff, case = self.case.d_ff, self.case
        masks = np.empty((self.lead, d_ff), bool)
        popular = synthetic.popularity(d_ff, rng)
        for row in masks:
            sparsity = rng.choice([case.sparsity, 0.0, 1.0], p=[0.8, 0.1, 0.1]) if case.tokens > 1 else case.sparsity
            if case.mask == "one":
                row[:] = np.arange(d_ff) == rng.integers(d_ff)
            elif case.mask == "contiguous":
                row[:] = synthetic.contiguous_mask(d_ff, sparsity, rng)
            else:
                row[:] = synthetic.hot_mask(popular if case.mask == "hot" else np.ones(d_ff), sparsity, rng)
        if rng.random() < 0.1:
            masks[:] = masks[0]
        return masks

    def _numbers(self, shape: tuple[int, ...], rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
        values = self.case.values
        if values == "integers":
            return rng.integers(-3, 4, shape).astype(np.float32)
        numbers = rng.standard_normal(shape, np.float32) * np.float32(scale)
        half = self.case.dtype == "float16"
        if values == "large":  # so that some results overflow their dtype, or some sums float32
            numbers *= np.float32(2.0 ** (5 if half else 60))
        elif values == "tiny":
            numbers *= np.float32(2.0 ** (-7 if half else -62))
        elif values == "wide":
            numbers *= np.exp2(rng.integers(-8, 8, shape) if half else rng.integers(-20, 20, shape)).astype(np.float32)
        return numbers

    def _array(self, name: str) -> np.ndarray:
        case, rng = self.case, self._rng(name)
        if name.startswith("w_"):
            shape = (case.d_model, case.d_ff) if name == "w_down" else (case.d_ff, case.d_model)
            numbers = self._numbers(shape, rng, case.d_model**-0.5)
            if name == self.computed and case.mask != "natural" and case.operator != "ffn_23":
                numbers = np.abs(numbers) * np.where(self.mask[0], 1, -1)[:, None]
        elif name == "x":
            numbers = self._numbers((self.lead, case.d_model), rng)
            if case.mask != "natural" and case.operator != "ffn_23":
                numbers = np.abs(numbers) * self.signs
        elif name in VECTORS:
            numbers = self._hidden(name, rng)
        elif name == "norm_weight" and case.values != "integers":
            numbers = np.where(rng.random(case.d_ff) < 0.1, -1, 1) * (1 + 0.2 * rng.standard_normal(case.d_ff))
        else:
            numbers = self._numbers((case.d_model if name == "down_bias" else case.d_ff,), rng)
        return np.asarray(numbers).astype(self.dtype)

    def _hidden(self, name: str, rng: np.random.Generator) -> np.ndarray:
        """A gate, or x1: of the masks, with zeros of both signs."""
        numbers = self._numbers((self.lead, self.case.d_ff), rng)
        zeros = np.where(rng.random(numbers.shape) < 0.5, np.float32(0), np.float32(-0.0))
        if name == "x1":
            return np.where(self.mask, numbers, zeros)
        threshold = self.case.threshold
        least = threshold if isinstance(threshold, float) and threshold < 1e4 and self.case.values == "normal" else 0.0
        off = np.where(rng.random(numbers.shape) < 0.2, zeros, -np.abs(numbers))
        return np.where(self.mask, np.abs(numbers) + np.float32(least), off)

    # Special values

    def _put_special(self, special: str, arrays: dict[str, np.ndarray]) -> None:
        what, where = special.split("_")
        rng = np.random.default_rng([self.case.seed, SPECIALS.index(special), 99])
        if where in ("token", "tokens"):
            self._put_token(what, [arrays[name] for name in VECTORS if name in arrays], rng)
            return
        targets = {
            "x": ("x",),
            "hidden": ("gate", "x1"),
            "weights": [name for name in arrays if name.startswith("w_")],
            "bias": (*BIASES, "norm_weight"),
        }
        for name in targets[where]:
            if name in arrays and what == "zero":  # a whole row
                arrays[name][rng.integers(len(arrays[name]))] = rng.choice([0.0, -0.0])
            elif name in arrays:
                self._put(what, arrays[name], rng, often=where == "hidden" or what in ("subnormal", "zeros"))

    def _put_token(self, what: str, vectors: list[np.ndarray], rng: np.random.Generator) -> None:
        """Another token beside the others, or all alike."""
        token, zeros = rng.integers(self.lead), rng.choice([0.0, -0.0])
        for vector in vectors:
            if what == "equal":
                vector[:] = vector[token]
            else:
                vector[token] = vector[token] * self.dtype.type(6e4) if what == "large" else zeros

    def _put(self, what: str, array: np.ndarray, rng: np.random.Generator, often: bool) -> None:
        """In one to three places, or perhaps in many."""
        flat = array.reshape(-1)
        places = rng.integers(flat.size, size=rng.integers(1, 4))
        if often and rng.random() < 0.5:
            places = np.flatnonzero(rng.random(flat.size) < 0.2)
        tiny = {"bfloat16": 2.0**-133, "float16": 2.0**-24, "float32": 2.0**-149}[self.case.dtype]
        numbers = {
            "nan": np.copysign(np.nan, rng.choice([1, -1], len(places))),
            "inf": rng.choice([np.inf, -np.inf], len(places)),
            "zeros": rng.choice([0.0, -0.0], len(places)),
            "subnormal": tiny * rng.choice([1, -1, 2, 63], len(places)),
        }[what]
        flat[places] = numbers.astype(self.dtype)

    def _threshold(self, arrays: dict[str, np.ndarray]) -> float:
        given = self.case.threshold
        if not isinstance(given, str):
            return float(np.float32(given))
        gates = arrays.get("gate")
        if gates is None and "x" in arrays:
            bias = arrays.get("gate_bias" if self.case.gated else "up_bias")
            w = arrays.get(self.computed)
            gates = None if w is None else reference.ffn_1(arrays["x"], w, bias=bias)
        if gates is None:
            return 0.0
        wide = gates.astype(np.float32).ravel()
        fit = np.unique(wide[np.isfinite(wide) & (wide > 0)])
        if not len(fit):
            return 0.0
        at = fit[len(fit) // 2]
        beside = {"gate": at, "gate-": np.nextafter(at, np.float32(0)), "gate+": np.nextafter(at, np.float32(np.inf))}[given]
        return float(beside) if np.isfinite(beside) else float(at)

    def _put_neighbours_of(self, threshold: float, gate: np.ndarray) -> None:
        """Gates at T as the dtype has it, one ulp below and one above."""
        rng = np.random.default_rng([self.case.seed, 98])
        at = np.asarray(threshold).astype(self.dtype)
        unsigned = np.dtype(f"u{self.dtype.itemsize}")
        patterns = at.view(unsigned).astype(np.int64) + np.array([0, 1, -1])
        near = np.maximum(patterns, 0).astype(unsigned).view(self.dtype)
        places = rng.random(gate.shape) < 0.3
        gate[places] = near[rng.integers(3, size=int(places.sum()))]

    def _poison_inactive(self, arrays: dict[str, np.ndarray], threshold: float) -> None:
        """NaN in what belongs to neurons that no token makes active."""
        if "gate" in arrays:
            used = active(arrays["gate"], threshold).any(axis=0)
        elif "x1" in arrays:
            used = (arrays["x1"].astype(np.float32) != 0).any(axis=0)
        else:
            used = np.where(self.signs > 0, self.mask[0], ~self.mask[0]).any(axis=0)
        if self.case.mask == "natural" and not {"gate", "x1"} & set(arrays):
            return
        for name in ("w_up", "up_bias", "w_down_t", "norm_weight"):
            if name in arrays and (self.case.gated or name not in ("w_up", "up_bias")):
                arrays[name][~used] = np.nan
