"""What holds for every case, wherever its operator runs: on NumPy arrays, on a GPU, or on a simulated one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ranges
from cases import VECTORS, Case, inputs
from checks import active, bits
from gpu_arrays import Exporter, OnCupy, OnNumpy, OnTorch

import prosparse_cupy as psc
from prosparse_cupy import reference
from prosparse_cupy.tensor_cores import FEWEST_OF_GATE, FEWEST_TOKENS

_CANARIES = ({2: 0x7FD5, 4: 0x7FD5D5D5}, {2: 0x3F5A, 4: 0x3F5A5A5A})
"""What lies around an array, and in an output before the call: NaN, or else a number."""
_DOWN = ("ffn_4", "sparse_ffn", "SparseFFN")  # whose result is of d_model
_MAY_VARY = ("ffn_1", *_DOWN)  # with `batch_invariant=False`
WITHOUT_INVARIANCE = "the same bits again without batch invariance"
_ALIGNMENT = 16


@dataclass(frozen=True)
class Call:
    """One call of an operator, by the names that kernels have for its arrays."""

    operator: str
    arrays: dict[str, np.ndarray]
    threshold: float
    activation: str
    norm_eps: float
    compressed: bool = False
    partial: bool = False
    specialize: bool = False
    batch_invariant: bool = True
    way: str = "call"
    given_out: bool = True
    canary: int = 0
    """Which of `_CANARIES`."""
    offset: int = 0
    """Decides where in their memory arrays begin."""

    @property
    def dtype(self) -> np.dtype:
        return next(iter(self.arrays.values())).dtype

    @property
    def lead(self) -> tuple[int, ...]:
        """(tokens,), or () of a vector."""
        return next((self.arrays[name].shape[:-1] for name in VECTORS if name in self.arrays), ())

    @property
    def out_shape(self) -> tuple[int, ...]:
        if self.operator == "pack_down":
            return self.arrays["w_down"].shape[::-1]
        matrix = next(a for name, a in self.arrays.items() if name.startswith("w_"))
        return (*self.lead, matrix.shape[self.operator in _DOWN])

    def of(self, operator: str, arrays: dict[str, np.ndarray], **more: Any) -> Call:
        """Another operator on other arrays, plain, in the ordinary way, rounded unless `more` says so.

        Without batch invariance dims stay constants: without them there are no tensor cores.
        """
        specialize = not more.get("batch_invariant", self.batch_invariant)
        plain = {"compressed": False, "specialize": specialize, "way": "call", "given_out": True, "partial": False}
        return replace(self, operator=operator, arrays=arrays, **{**plain, **more})

    def some(self, *names: str, **renamed: str) -> dict[str, np.ndarray]:
        """These of the arrays that there are; `renamed` are new names and those they have."""
        wanted = {**{name: name for name in names}, **renamed}
        return {new: self.arrays[old] for new, old in wanted.items() if old in self.arrays}


class Guarded:
    """An array inside a larger one of a library, between canaries; or, where it starts at None, in memory of its own size."""

    def __init__(self, on: Any, array: np.ndarray, start: int | None, canary: int, *, is_output: bool = False) -> None:
        size = array.dtype.itemsize
        room = 0 if start is None else 8 * _ALIGNMENT // size
        self.start = start
        start = start or 0
        pattern = np.array(_CANARIES[canary][size], f"u{size}")
        whole = np.full(start + array.size + room, pattern).view(array.dtype)
        self._inside = slice(start, start + array.size)
        if not is_output:
            whole[self._inside] = array.ravel()
        self._on, self._before = on, whole
        self.whole = on.put(whole)
        self.array = self.whole[self._inside].reshape(array.shape)
        self._shape = array.shape

    def poison(self, other: Guarded) -> None:
        """Everything as `other` is."""
        unsigned = f"u{other._before.dtype.itemsize}"  # CuPy knows no copies of bfloat16
        self.whole.view(unsigned)[:] = other.whole.view(unsigned)
        self._before = other._before

    def unchanged(self) -> bool:
        return np.array_equal(bits(self._on.get(self.whole)), bits(self._before))

    def taken(self) -> np.ndarray:
        """What is inside; around it nothing may have changed."""
        found = self._on.get(self.whole)
        around = np.ones(found.shape, bool)
        around[self._inside] = False
        assert np.array_equal(bits(found[around]), bits(self._before[around])), "something was written beside the output"
        return found[self._inside].reshape(self._shape).copy()


@dataclass
class Place:
    """Where calls run, and what they have been found to do."""

    name: str
    """numpy, gpu, or host: a simulated GPU."""
    reseed: Callable[[int], None] = lambda seed: None
    """Called before each case, so that it repeats where the order of threads and launches is drawn."""
    counts: Counter[str] = field(default_factory=Counter)
    """Checks by property."""

    def run(self, call: Call) -> np.ndarray:
        """The result; nothing but it has changed."""
        on = self._library(call)
        with np.errstate(all="ignore"):
            # The host's sanitizer sees what is read beside an array only if nothing lies there.
            is_bare = self.name == "host" and call.canary == 0
            guarded = {name: Guarded(on, a, None if is_bare else _start(call, name), 0) for name, a in call.arrays.items()}
            out_dtype = np.dtype(np.float32) if call.partial else call.dtype
            empty, start = np.empty(call.out_shape, out_dtype), None if is_bare else _start(call, "out", out_dtype)
            out = Guarded(on, empty, start, call.canary, is_output=True)
            bound = self._bound(call, {name: g.array for name, g in guarded.items()}, on)
            found = self._run(call, bound, out, on)
        for name, g in guarded.items():
            assert g.unchanged(), f"{name}, or memory beside it, was written"
        self.counts["inputs and what lies around every buffer are unchanged"] += 1
        return found

    def _library(self, call: Call) -> Any:
        if self.name == "numpy":
            return OnNumpy()
        return OnTorch() if call.way == "torch" else OnCupy()

    def _run(self, call: Call, bound: Callable[[Any], Any], out: Guarded, on: Any) -> np.ndarray:
        way = "call" if self.name == "numpy" else call.way
        if way in ("stream", "graph"):
            return self._on_a_stream(call, bound, out)
        if not (call.given_out or call.partial):
            return on.get(bound(None)).copy()
        result = bound(out.array)
        assert result is out.array, "the result is not `out`"
        return out.taken()

    def _on_a_stream(self, call: Call, bound: Callable[[Any], Any], out: Guarded) -> np.ndarray:
        import cupy

        cupy.cuda.Device().synchronize()  # what is on the default stream
        stream = cupy.cuda.Stream(non_blocking=True)
        if call.way == "stream":
            with stream:
                result = bound(out.array if call.given_out or call.partial else None)
            stream.synchronize()
            return out.taken() if result is out.array else result.get()
        found = []
        with stream:
            stream.begin_capture()
            bound(out.array)
            graph = stream.end_capture()
        for canary in (call.canary, 1 - call.canary):
            fresh = Guarded(OnCupy(), np.empty(call.out_shape, out.array.dtype), out.start, canary, is_output=True)
            cupy.cuda.Device().synchronize()
            out.poison(fresh)
            cupy.cuda.Device().synchronize()
            graph.launch(stream)
            stream.synchronize()
            found.append(out.taken())
        assert_same(found[0], found[1], "a graph launched twice")
        self.counts["a graph repeats bits"] += 1
        return found[0]

    def _bound(self, call: Call, arrays: dict[str, Any], on: Any) -> Callable[[Any], Any]:
        """The call but for `out`. What is made once, weights in 12 bits and a `SparseFFN`, is made here."""
        way = "call" if self.name == "numpy" else call.way
        if call.compressed:
            for name in [n for n in arrays if n.startswith("w_")]:
                packed = psc.compress(arrays[name], layout="slices" if name == "w_down_t" else "rows")
                restored = on.get(packed.decompress())
                assert np.array_equal(bits(restored), bits(call.arrays[name])), f"{name} does not come back"
                arrays[name] = packed
                self.counts["weights in 12 bits come back"] += 1
        elif way == "dlpack":
            arrays = {name: Exporter(a) for name, a in arrays.items()}
        return _bind(call, arrays)


def _bind(call: Call, a: dict[str, Any]) -> Callable[[Any], Any]:
    more: dict[str, Any] = {"specialize": call.specialize}
    if call.operator in _MAY_VARY:
        more["batch_invariant"] = call.batch_invariant
    act = {"activation": call.activation}
    norm = {"norm_weight": a["norm_weight"], "norm_eps": call.norm_eps} if "norm_weight" in a else {}
    t = call.threshold
    if call.operator == "ffn_1":
        return lambda out: psc.ffn_1(a["x"], a["w_gate"], bias=a.get("gate_bias"), out=out, **more)
    if call.operator == "ffn_12":
        return lambda out: psc.ffn_12(a["x"], a["w_up"], t, bias=a.get("up_bias"), out=out, **act, **more)
    if call.operator == "ffn_23":
        return lambda out: psc.ffn_23(a["gate"], a["x"], a["w_up"], t, bias=a.get("up_bias"), out=out, **act, **more)
    if call.operator == "ffn_123":
        biases = {name: a.get(name) for name in ("gate_bias", "up_bias")}
        return lambda out: psc.ffn_123(a["x"], a["w_gate"], a["w_up"], t, out=out, **biases, **act, **more)
    if call.operator == "ffn_4":
        return lambda out: psc.ffn_4(a["x1"], a["w_down_t"], bias=a.get("down_bias"), out=out, **norm, **more)
    if call.operator == "pack_down":
        return lambda out: psc.pack_down(a["w_down"], out=out, **more)
    every = {name: a[name] for name in ("gate_bias", "up_bias", "down_bias") if name in a} | norm | act | more
    ws = (a.get("w_gate"), a["w_up"], a["w_down_t"])
    if call.operator == "sparse_ffn":
        return lambda out: psc.sparse_ffn(a["x"], *ws, t, out=out, **every)
    ffn = psc.SparseFFN(*ws, t, **every)
    return lambda out: ffn(a["x"], out=out)


def _start(call: Call, name: str, dtype: np.dtype | None = None) -> int:
    """Of an array in its memory: a multiple of 16 bytes, or of an element if that is all its operator asks for."""
    vector = _ALIGNMENT // (dtype or call.dtype).itemsize
    which = sum(name.encode()) + call.offset
    any_element = name.endswith("_bias") or name == "norm_weight" or call.operator == "pack_down"
    return vector * (1 + which % 5) + which % vector * any_element


def assert_same(one: np.ndarray, other: np.ndarray, why: str) -> None:
    """The same bits, but that one NaN may stand for another: on a host its bits depend on the order of factors."""
    assert one.dtype == other.dtype and one.shape == other.shape, why
    unsigned = f"u{one.dtype.itemsize}"
    differ = (one.view(unsigned) != other.view(unsigned)) & ~(_is_nan(one) & _is_nan(other))
    if differ.any():
        at, values = np.argwhere(differ)[0].tolist(), (one[differ][0], other[differ][0])
        raise AssertionError(f"{why}: {differ.sum()} of {differ.size} elements differ, the first at {at}: {values}")


def _is_nan(array: np.ndarray) -> np.ndarray:
    return np.isnan(array.astype(np.float32))


def check(case: Case, place: Place) -> None:
    """All properties of a case, or AssertionError."""
    place.reseed(case.seed)
    arrays, threshold = inputs(case)
    arrays = {name: _read_only(a) for name, a in arrays.items()}
    call = Call(case.operator, arrays, threshold, case.activation, case.norm_eps, partial=case.partial, offset=case.seed % 97)
    own = replace(call, compressed=case.compressed, specialize=case.specialize)
    with np.errstate(all="ignore"):
        out = place.run(own)
        again = place.run(replace(own, canary=1, way=_way(case), given_out=case.given_out))
        _same(place, out, again, "every element is written, and the same bits again")
        if case.specialize and place.name != "numpy":  # where it changes nothing
            _same(place, out, place.run(replace(own, specialize=False)), "the bits do not depend on `specialize`")
        if case.compressed:
            _same(place, out, place.run(replace(own, compressed=False)), "weights in 12 bits give the bits of plain ones")
        _alone(place, own, out, case.seed)
        _verify(place, call, out)
        if place.name == "numpy":
            _same(place, out, _by_reference(call), "NumPy arrays run the reference")
        elif case.specialize and case.tokens >= FEWEST_TOKENS and case.operator in _MAY_VARY:
            loose = replace(own, batch_invariant=False)
            if case.compressed:  # not on tensor cores
                _same(place, out, place.run(loose), "weights in 12 bits keep the bits of one token")
            else:
                _without_invariance(place, call, loose, _way(case), case.given_out)
    place.counts["cases"] += 1


def _without_invariance(place: Place, call: Call, own: Call, way: str, given_out: bool) -> None:
    """On tensor cores, where the shape allows that."""
    out, again = place.run(own), place.run(replace(own, canary=1, way=way, given_out=given_out))
    _same(place, out, again, WITHOUT_INVARIANCE)
    _verify(place, replace(call, batch_invariant=False, specialize=True), out)


def _way(case: Case) -> str:
    """DLPack shows nothing but arrays, and torch keeps bfloat16 weights that are compressed by itself."""
    return "call" if case.compressed and case.way == "dlpack" else case.way


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _same(place: Place, one: np.ndarray, other: np.ndarray, what: str) -> None:
    assert_same(one, other, what)
    place.counts[what] += 1


def _alone(place: Place, call: Call, out: np.ndarray, seed: int) -> None:
    """Some tokens of a batch by themselves."""
    if not call.lead:
        return
    tokens = call.lead[0]
    for t in {0, tokens - 1, seed % tokens}:
        one = {name: a[t] if name in VECTORS else a for name, a in call.arrays.items()}
        _same(place, out[t], place.run(replace(call, arrays=one)), "each token has the bits that it has alone")


def _tokens(call: Call, out: np.ndarray) -> Iterable[tuple[dict[str, np.ndarray], np.ndarray]]:
    """The arrays of each token, and its result."""
    if not call.lead:
        return [(call.arrays, out)]
    return [({n: a[t] if n in VECTORS else a for n, a in call.arrays.items()}, out[t]) for t in range(call.lead[0])]


def _verify(place: Place, call: Call, out: np.ndarray) -> None:
    """Against float64, step by step: between them the operators' own roundings are taken."""
    operator = call.operator
    if operator == "pack_down":
        assert np.array_equal(bits(out), bits(call.arrays["w_down"].T)), "the transpose has other bits"
        place.counts["results are right"] += 1
    elif operator == "ffn_123":
        gate = place.run(call.of("ffn_1", call.some("x", "w_gate", "gate_bias")))
        _verify(place, call.of("ffn_1", call.some("x", "w_gate", "gate_bias")), gate)
        two = call.of("ffn_23", {"gate": gate, **call.some("x", "w_up", "up_bias")})
        _same(place, out, place.run(two), "ffn_123 is ffn_23 of ffn_1")
        _verify(place, two, out)
    elif operator in ("sparse_ffn", "SparseFFN"):
        names = ("x", "w_gate", "w_up", "gate_bias", "up_bias")
        half = call.of("ffn_123" if "w_gate" in call.arrays else "ffn_12", call.some(*names), batch_invariant=True)
        if not call.batch_invariant and "w_gate" in call.arrays and call.lead[0] >= FEWEST_OF_GATE:
            gates = call.of("ffn_1", call.some("x", "w_gate", "gate_bias"))
            gate = place.run(gates)
            _verify(place, gates, gate)
            half = call.of("ffn_23", {"gate": gate, **call.some("x", "w_up", "up_bias")}, batch_invariant=True)
        x1 = place.run(half)
        _verify(place, half, x1)
        down = call.of("ffn_4", {"x1": x1, **call.some("w_down_t", "down_bias", "norm_weight")}, partial=call.partial)
        _same(place, out, place.run(down), "an FFN is its halves")
        _verify(place, down, out)
    else:
        before = None
        if operator == "ffn_12":
            gates = call.of("ffn_1", call.some("x", w_gate="w_up", gate_bias="up_bias"))
            before = place.run(gates)
            _verify(place, gates, before)
        for t, (arrays, row) in enumerate(_tokens(call, out)):
            pre = None if before is None else before[t] if call.lead else before
            _verify_token(call, arrays, row, pre)
        place.counts["results are right"] += 1
    if call.partial:
        _verify_partial(place, call, out)


def _verify_token(call: Call, a: dict[str, np.ndarray], out: np.ndarray, pre: np.ndarray | None) -> None:
    t, act = call.threshold, call.activation
    zeros = np.zeros(len(out), bool)
    if call.operator == "ffn_1":
        found = ranges.ffn_1(a["x"], a["w_gate"], a.get("gate_bias"))
    elif call.operator == "ffn_12":
        found, zeros = ranges.ffn_12(pre, t, act), ~active(pre, t)
    elif call.operator == "ffn_23":
        found, zeros = ranges.ffn_23(a["gate"], a["x"], a["w_up"], t, act, a.get("up_bias")), ~active(a["gate"], t)
        if act == "drelu":
            zeros = zeros | ((found.high == 0) & (found.low == 0) & ~found.may_be_nan)
    else:
        found = ranges.ffn_4(a["x1"], a["w_down_t"], a.get("down_bias"), a.get("norm_weight"), call.norm_eps)
        if not active(np.abs(a["x1"])).any() and "down_bias" not in a:
            zeros = ~zeros
    misfit = found.misfit(out)
    assert not misfit, f"{call.operator}: {misfit}"
    assert not bits(out[zeros]).any(), f"{call.operator}: an inactive output is not +0"


def _verify_partial(place: Place, call: Call, out: np.ndarray) -> None:
    """A float32 result is what the ordinary one is rounded from; the reference rounds from float64."""
    full = place.run(replace(call, partial=False))
    _verify(place, replace(call, partial=False), full)
    if place.name != "numpy":
        _same(place, out.astype(full.dtype), full, "float32 results round to the ordinary ones")


def _by_reference(call: Call) -> np.ndarray:
    a, act = call.arrays, {"activation": call.activation}
    dtype = {"dtype": np.float32 if call.partial else None}
    norm = {"norm_weight": a["norm_weight"], "norm_eps": call.norm_eps} if "norm_weight" in a else {}
    if call.operator == "ffn_1":
        return reference.ffn_1(a["x"], a["w_gate"], bias=a.get("gate_bias"), **dtype)
    if call.operator == "ffn_12":
        return reference.ffn_12(a["x"], a["w_up"], call.threshold, bias=a.get("up_bias"), **act)
    if call.operator == "ffn_23":
        return reference.ffn_23(a["gate"], a["x"], a["w_up"], call.threshold, bias=a.get("up_bias"), **act)
    if call.operator == "ffn_123":
        biases = call.some("gate_bias", "up_bias")
        return reference.ffn_123(a["x"], a["w_gate"], a["w_up"], call.threshold, **biases, **act)
    if call.operator == "ffn_4":
        return reference.ffn_4(a["x1"], a["w_down_t"], bias=a.get("down_bias"), **norm, **dtype)
    if call.operator == "pack_down":
        return reference.pack_down(a["w_down"])
    biases = call.some("gate_bias", "up_bias", "down_bias")
    ws = (a.get("w_gate"), a["w_up"], a["w_down_t"])
    return reference.sparse_ffn(a["x"], *ws, call.threshold, **biases, **norm, **act, **dtype)
