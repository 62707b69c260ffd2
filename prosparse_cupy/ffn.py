"""The whole FFN: `sparse_ffn`, the same with its weights bound, and `warmup`. Every caller runs it through `_run`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from operator import index
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

import numpy as np

from . import driver, reference
from .arguments import (
    MOST_TOKENS,
    BoundWeights,
    Call,
    Extras,
    Signature,
    check_call,
    extra,
    total,
    vector,
    weight,
    with_bound_extras,
)
from .compiler import Kernel, gate_of, kernel_of, load
from .compressed import Weight
from .device import current_device, gpu
from .formats import ITEMSIZE, vector_length
from .formula import RELU, check_activation, check_norm_eps, check_threshold
from .knobs import compressed_formats
from .libraries import A
from .ops import partial_sums, trailing_arguments
from .problem import KERNELS, Problem
from .tensor_cores import FEWEST_TOKENS, keeps_bits
from .workspace import take

if TYPE_CHECKING:
    import torch

    DType = str | type[Any] | np.dtype[Any] | torch.dtype

_EXTRAS = (
    extra("gate_bias", "d_ff", "gate_bias"),
    extra("up_bias", "d_ff", "up_bias"),
    extra("down_bias", "d_model", "down_bias"),
    extra("norm_weight", "d_ff", "norm_weight"),
)


def _signature(operator: str, gated: bool, bound: bool) -> Signature:
    """Of an FFN. Bound weights come first, so that an x that does not fit them is to blame."""
    weights = tuple(weight(name) for name in ("w_gate", "w_up", "w_down_t")[not gated :])
    token, optional = (vector("x", "d_model"),), _EXTRAS[not gated :]
    inputs = weights + token if bound else token + weights
    return Signature(operator, inputs, total("y", "d_model"), has_threshold=True, optional=optional)


_OF_TOKENS = frozenset(KERNELS) - {"pack_down", "decompress"}
"""The kernels that are compiled for a number of tokens; the others work on weights alone."""
_HALVES = frozenset({"ffn_12", "ffn_123"})
"""The kernels that `ffn_4` comes behind in a whole FFN, where they may be launched otherwise than by themselves."""
SPARSE_FFN = _signature("sparse_ffn", gated=True, bound=False)
UNGATED_FFN = _signature("sparse_ffn", gated=False, bound=False)
BOUND_FFN = _signature("SparseFFN", gated=True, bound=True)
UNGATED_BOUND_FFN = _signature("SparseFFN", gated=False, bound=True)


def sparse_ffn(
    x: A,
    w_gate: Weight[A] | None,
    w_up: Weight[A],
    w_down_t: Weight[A],
    threshold: float = 0.0,
    *,
    activation: str = RELU,
    gate_bias: A | None = None,
    up_bias: A | None = None,
    down_bias: A | None = None,
    norm_weight: A | None = None,
    norm_eps: float = 0.0,
    batch_invariant: bool = True,
    out: A | None = None,
    specialize: bool = True,
) -> A:
    """The whole FFN of 1 to 8 tokens: formulas 1 to 4, the weights of inactive neurons unread.

    Two launches, `ffn_123` and `ffn_4`, or `ffn_12` and `ffn_4` without a gate, with the intermediate, d_ff elements a token,
    in scratch memory that is kept for the next call on the stream, or for the CUDA graph that the call is captured into.
    Threads and streams do not disturb each other. `SparseFFN` binds the weights.

    A weight row that any token needs is read once from memory, or found in a cache. A token for which a neuron is inactive
    gets nothing from it, NaN weights included, and has the bits that it has alone, whatever stands beside it.

    Parameters
    ----------
    x : array, (d_model,) or (B, d_model)
        The hidden state of a token, or of B tokens, 1 to 8. More are for the dense path, which is faster there.
    w_gate, w_up, w_down_t : array, (d_ff, d_model)
        ``gate_proj.weight`` and ``up_proj.weight`` as they are, and `pack_down` of ``down_proj.weight``. `w_gate` is None for
        an FFN without a gate, ``act(x @ w_up.T) @ w_down.T``.
    threshold : float, default 0.0
        FATReLU's T, as for `ffn_23`.
    activation : {"relu", "relu2", "drelu"}
        As for `ffn_23`; "drelu" needs a gate.
    gate_bias, up_bias : array, (d_ff,), optional
        Of the projections, as for `ffn_123`; like all of these, one for all tokens.
    down_bias : array, (d_model,), optional
        ``down_proj.bias``, as for `ffn_4`.
    norm_weight : array, (d_ff,), optional
        The weight of an RMS norm of each token between formulas 3 and 4, as for `ffn_4`.
    norm_eps : float, default 0.0
        As for `ffn_4`.
    batch_invariant : bool, default True
        Whether a token has the bits that it has alone, whatever stands beside it. False lets 5 to 8 tokens of 16 bits go to
        tensor cores, where `ffn_4` does, and `ffn_1` does from 7 tokens on, which is faster: a token's bits then depend on the
        neurons that the others need. The same call has the same bits again.
    out : array, (d_model,) or (B, d_model), optional
        Takes the result. It must not share memory with an input. Of float32 it takes y as it is before its last rounding, as
        for `ffn_4`: some of the neurons' part of y, to be added to that of the others.
    specialize : bool, default True
        As for `ffn_1`.

    Returns
    -------
    array, (d_model,) or (B, d_model)
        y, rounded to the dtype after formulas 1, 3 and 4, as the dense path is.

    Raises
    ------
    TypeError, ValueError, KernelCompileError
        As for `ffn_23`.
    """
    check_activation("sparse_ffn", activation, gated=w_gate is not None)
    norm_eps = check_norm_eps("sparse_ffn", norm_eps, norm_weight is not None)
    how = (check_threshold("sparse_ffn", threshold), activation, norm_eps, specialize, batch_invariant)
    if w_gate is None:
        extras: Extras = (up_bias, down_bias, norm_weight)
        _refuse_gate_bias("sparse_ffn", gate_bias)
        rest: tuple[Any, ...] = (x, w_up, w_down_t)
        call: Call[A] = check_call(UNGATED_FFN, rest, out, extras)
        return _run(call, (x, None, w_up, w_down_t), call.inputs, how, _named(False, extras))
    extras, rest = (gate_bias, up_bias, down_bias, norm_weight), (x, w_gate, w_up, w_down_t)
    call = check_call(SPARSE_FFN, rest, out, extras)
    return _run(call, rest, call.inputs, how, _named(True, extras))


def _refuse_gate_bias(operator: str, gate_bias: Any) -> None:
    if gate_bias is not None:
        raise ValueError(f"{operator}: gate_bias without a gate: w_gate is None, so the bias of up_proj is up_bias")


def _named(gated: bool, extras: Extras) -> dict[str, Any]:
    """The optional arrays by the names of the reference's arguments."""
    for array in extras:
        if array is not None:
            break
    else:
        return {}
    return {operand.name: a for operand, a in zip(_EXTRAS[not gated :], extras, strict=True) if a is not None}


class _How(NamedTuple):
    """What an FFN is run with beside its arrays."""

    threshold: float
    activation: str
    norm_eps: float
    specialize: bool
    batch_invariant: bool = True


def _run(
    call: Call[A],
    arrays: tuple[Any, ...],
    inputs: Sequence[int],
    how: tuple[float, str, float, bool, bool],
    extras: Mapping[str, Any],
) -> A:
    """The first half of an FFN into scratch, and `ffn_4` out of it.

    `arrays` are x, w_gate, w_up and w_down_t, w_gate None without a gate, and `inputs` their addresses, of which a compressed
    weight has several. `how` is a `_How`, and `extras` are the optional arrays.
    """
    threshold, activation, norm_eps, specialize, batch_invariant = how
    if call.on_host:
        more = {"activation": activation, "norm_eps": norm_eps, **extras}
        return call.on_reference(reference.sparse_ffn, threshold, arrays=arrays, **more)
    half = "ffn_12" if arrays[1] is None else "ffn_123"
    if not batch_invariant and call.checked.tokens >= FEWEST_TOKENS:
        return _run_on_tensor_cores(call, inputs, half, how)
    checked, first_of_down = call.checked, len(inputs) - call.checked.down_pointers
    d_ff, d_model, device = checked.d_ff, checked.d_model, checked.device
    first = kernel_of(half, checked, specialize, activation, in_ffn=True)
    second = kernel_of("ffn_4", checked, specialize)
    given = call.extras
    of_first, of_second = trailing_arguments(half, given, norm_eps), trailing_arguments("ffn_4", given, norm_eps)
    stream = call.family.stream(device)
    captured = driver.is_captured(stream)
    overlaps = driver.overlaps(stream, captured)
    x1, home = take(stream, device, checked.scratch_bytes, captured)
    try:
        first.launch(stream, overlaps, *inputs[:first_of_down], x1, threshold, d_ff, d_model, *of_first)
        second.launch(stream, overlaps, x1, *inputs[first_of_down:], call.output, d_ff, d_model, *of_second)
    finally:
        home.append(x1)
    return call.result()


def _run_on_tensor_cores(call: Call[A], inputs: Sequence[int], half: str, how: tuple[float, str, float, bool, bool]) -> A:
    """`_run` where tensor cores may serve: the gate by itself, then `ffn_23` and `ffn_4`, as far as they do."""
    threshold, activation, norm_eps, specialize, _ = how
    checked, given, down = call.checked, call.extras, len(inputs) - call.checked.down_pointers
    dims = checked.d_ff, checked.d_model
    gate = gate_of(checked, specialize) if half == "ffn_123" else None
    first = kernel_of(half if gate is None else "ffn_23", checked, specialize, activation, in_ffn=gate is None)
    second = kernel_of("ffn_4", checked, specialize, batch_invariant=False)
    stream = call.family.stream(checked.device)
    captured = driver.is_captured(stream)
    overlaps = driver.overlaps(stream, captured)
    with ExitStack() as scratch:

        def taken() -> int:
            address, home = take(stream, checked.device, checked.scratch_bytes, captured)
            scratch.callback(home.append, address)
            return address

        x1, sums = taken(), scratch.enter_context(partial_sums(second, stream, checked.device, captured))
        if gate is None:
            first.launch(stream, overlaps, *inputs[:down], x1, threshold, *dims, *trailing_arguments(half, given, norm_eps))
        else:
            (x, w_gate, *w_up), ungated = inputs[:down], taken()
            gate.launch(stream, overlaps, x, w_gate, ungated, *dims, *trailing_arguments("ffn_1", given, norm_eps))
            of_up = trailing_arguments("ffn_23", given, norm_eps)
            first.launch(stream, overlaps, ungated, x, *w_up, x1, threshold, *dims, *of_up)
        of_down = trailing_arguments("ffn_4", given, norm_eps)
        second.launch(stream, overlaps, x1, *inputs[down:], call.output, *dims, *of_down, *sums)
    return call.result()


class SparseFFN(Generic[A]):
    """`sparse_ffn` with its weights bound; each call may have another number of tokens.

    Any number of threads and streams may share one. A CUDA graph that is captured from it needs it no longer; the weights, `x`
    and `out` must stay where they are for as long as the graph is launched, as with every captured call.

    Parameters
    ----------
    w_gate, w_up, w_down_t : array, (d_ff, d_model)
        As for `sparse_ffn`; `w_gate` is None for an FFN without a gate. They are kept, not copied, and may get other values,
        but not another shape, dtype or GPU.
    threshold : float, default 0.0
        FATReLU's T, as for `ffn_23`.
    activation : {"relu", "relu2", "drelu"}
        As for `ffn_23`; "drelu" needs a gate.
    gate_bias, up_bias : array, (d_ff,), optional
        Of the projections, as for `ffn_123`; kept as the weights are.
    down_bias : array, (d_model,), optional
        ``down_proj.bias``, as for `ffn_4`.
    norm_weight : array, (d_ff,), optional
        The weight of an RMS norm between formulas 3 and 4, as for `ffn_4`.
    norm_eps : float, default 0.0
        As for `ffn_4`.
    batch_invariant : bool, default True
        As for `sparse_ffn`.
    specialize : bool, default True
        As for `ffn_1`.

    Examples
    --------
    >>> ffn = SparseFFN(w_gate, w_up, pack_down(w_down), threshold=0.01)
    >>> y = ffn(x)
    >>> ffn(x, out=y)
    >>> ys = ffn(xs)  # (B, d_model), B from 1 to 8
    >>> ffn = SparseFFN(None, w_up, pack_down(w_down), activation="relu2")  # Nemotron's: squared ReLU, no gate
    """

    def __init__(
        self,
        w_gate: Weight[A] | None,
        w_up: Weight[A],
        w_down_t: Weight[A],
        threshold: float = 0.0,
        *,
        activation: str = RELU,
        gate_bias: A | None = None,
        up_bias: A | None = None,
        down_bias: A | None = None,
        norm_weight: A | None = None,
        norm_eps: float = 0.0,
        batch_invariant: bool = True,
        specialize: bool = True,
    ) -> None:
        self.gated = w_gate is not None
        activation = check_activation("SparseFFN", activation, gated=self.gated)
        norm_eps = check_norm_eps("SparseFFN", norm_eps, norm_weight is not None)
        self._how = _How(check_threshold("SparseFFN", threshold), activation, norm_eps, specialize, batch_invariant)
        extras: Extras = (up_bias, down_bias, norm_weight)
        if w_gate is None:
            _refuse_gate_bias("SparseFFN", gate_bias)
            weights: tuple[Any, ...] = (w_up, w_down_t)
        else:
            weights, extras = (w_gate, w_up, w_down_t), (gate_bias, *extras)
        self._bind(weights, _named(self.gated, extras))
        self.d_model, self.d_ff, self.dtype, _ = self._weights.facts

    def _bind(self, weights: tuple[Any, ...], extras: dict[str, Any]) -> None:
        signature, present = with_bound_extras(BOUND_FFN if self.gated else UNGATED_BOUND_FFN, extras)
        self._weights, self._extras = BoundWeights(signature, (*weights, *present)), extras

    def __call__(self, x: A, *, out: A | None = None) -> A:
        """The FFN of `x`, (d_model,) or (B, d_model); `out` as for `sparse_ffn`."""
        call: Call[A] = self._weights.call(x, out)
        *weights, token = call.inputs
        return _run(call, self._arrays(x), (token, *weights), self._how, self._extras)

    @property
    def threshold(self) -> float:
        """FATReLU's T."""
        return self._how.threshold

    @threshold.setter
    def threshold(self, threshold: float) -> None:
        self._how = self._how._replace(threshold=check_threshold("SparseFFN", threshold))

    @property
    def activation(self) -> str:
        """ "relu", "relu2" or "drelu"."""
        return self._how.activation

    @property
    def norm_eps(self) -> float:
        """What the norm adds, 0 without one."""
        return self._how.norm_eps

    @property
    def batch_invariant(self) -> bool:
        """Whether a token has the bits that it has alone."""
        return self._how.batch_invariant

    def _arrays(self, x: Any) -> tuple[Any, ...]:
        bound = self._weights.arrays
        return (x, *bound[:3]) if self.gated else (x, None, *bound[:2])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_weights": self._weights.arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bind(state["_weights"][: 2 + self.gated], self._extras)

    def __repr__(self) -> str:
        more = "" if self.activation == RELU else f", activation={self.activation}"
        more += "" if self.gated else ", gated=False"
        more += "".join(f", {name}" for name in self._extras)
        more += "" if self.batch_invariant else ", batch_invariant=False"
        return f"SparseFFN(d_model={self.d_model}, d_ff={self.d_ff}, dtype={self.dtype}, threshold={self.threshold:g}{more})"


@dataclass(frozen=True)
class CompiledKernel:
    """What `warmup` made ready."""

    kernel: str
    defines: str
    capability: int
    seconds: float
    """Time to compile it, or to load it where CuPy's disk cache or this process had it already."""


def warmup(
    d_model: int,
    d_ff: int,
    *,
    dtype: DType = "bfloat16",
    device: int | None = None,
    specialize: bool = True,
    compressed: bool = False,
    activation: str = RELU,
    gated: bool = True,
    bias: bool = False,
    norm: bool = False,
    tokens: int | Iterable[int] = 1,
    batch_invariant: bool = True,
) -> list[CompiledKernel]:
    """Compile every kernel of these dims now, so that the first call does not wait and a graph capture does not fail.

    Parameters
    ----------
    d_model, d_ff : int
        The layer's dims; `d_model` a multiple of 8 (4 for float32).
    dtype : {"bfloat16", "float16", "float32"}
        Also a NumPy, CuPy or torch dtype of that name.
    device : int, optional
        GPU index; CuPy's current GPU by default.
    specialize : bool, default True
        As for `ffn_1`.
    compressed : bool, default False
        The kernels for weights from `compress`, laid out as it recommends; bfloat16 only.
    activation : {"relu", "relu2", "drelu"}
        As for `sparse_ffn`.
    gated, bias, norm : bool
        Whether the FFN has a gate, biases of all its projections, and a norm over x1.
    tokens : int or iterable of int, default 1
        How many tokens calls will have, 1 to 8: a kernel is compiled for each number. ``tokens=range(1, 9)`` is all of them.
    batch_invariant : bool, default True
        As for `sparse_ffn`.

    Returns
    -------
    list of CompiledKernel
        One per kernel and number of tokens, with its defines and the seconds it took. `pack_down` and `decompress`, which see
        no tokens, are there once; `ffn_12` and `ffn_123` twice where a whole FFN has another launch of them.

    Raises
    ------
    ValueError
        Dims, dtype or numbers of tokens that no kernel supports.
    NoGPUError, UnsupportedGPUError, KernelCompileError
        No GPU, one older than compute capability 8.0, or NVRTC's refusal.
    """
    name = str(np.dtype(dtype)) if isinstance(dtype, type) else str(dtype).removeprefix("torch.")
    if name not in ITEMSIZE:
        raise ValueError(f"warmup: dtype must be bfloat16, float16 or float32, got {name}")
    if d_ff < 1 or d_model < 1 or d_model % vector_length(name):
        raise ValueError(
            f"warmup: d_ff must be at least 1 and d_model a multiple of {vector_length(name)} for {name}, "
            f"got d_model={d_model}, d_ff={d_ff}"
        )
    if compressed and name != "bfloat16":
        raise ValueError(f"warmup: compressed weights are bfloat16, got {name}")
    check_activation("warmup", activation, gated=gated)
    numbers = _numbers_of_tokens(tokens)
    at = current_device() if device is None else device
    left_out = {"ffn_123", "ffn_23"} if not gated else {"ffn_12"}
    if not compressed:
        left_out.add("decompress")
    report = []
    for kernel, interface in KERNELS.items():
        if kernel in left_out:
            continue
        formats = compressed_formats(kernel, d_model, d_ff) if compressed else ()
        extras = tuple(p for p in interface.optional if (norm if p == "norm_weight" else bias))
        act = activation if interface.has_activation else RELU
        for number in numbers if kernel in _OF_TOKENS else (1,):
            invariant = keeps_bits(kernel, number, batch_invariant)
            problem = Problem(kernel, d_model, d_ff, name, specialize, number, formats, act, extras, batch_invariant=invariant)
            loaded: Kernel | None = None
            for asked in (problem, replace(problem, in_ffn=True)) if kernel in _HALVES else (problem,):
                start, before = time.perf_counter(), loaded
                loaded = load(asked, at)
                seconds, plan = time.perf_counter() - start, loaded.plan
                if loaded is not before:
                    defines = " ".join(key if value is None else f"{key}={value}" for key, value in plan.defines)
                    report.append(CompiledKernel(plan.kernel, defines, gpu(at).capability, seconds))
    return report


def _numbers_of_tokens(tokens: int | Iterable[int]) -> tuple[int, ...]:
    """Each number of tokens that `warmup` was asked for, once, in its order."""
    try:
        numbers = tuple(dict.fromkeys(map(index, tokens if isinstance(tokens, Iterable) else (tokens,))))
    except TypeError:
        numbers = ()
    if not numbers or not all(1 <= number <= MOST_TOKENS for number in numbers):
        raise ValueError(f"warmup: tokens must be an int from 1 to {MOST_TOKENS}, or several of these, got {tokens!r:.80}")
    return numbers
