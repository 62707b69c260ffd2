"""The whole FFN: `sparse_ffn`, the same with its weights bound, and `warmup`. Every caller runs it through `_run`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic

import numpy as np

from . import driver, reference
from .arguments import BoundWeights, Call, Signature, check_call, vector, weight
from .compiler import kernel_of, load
from .compressed import Weight
from .device import current_device, gpu
from .formats import ITEMSIZE, vector_length
from .formula import check_threshold
from .knobs import compressed_formats
from .libraries import A
from .problem import KERNELS, Problem
from .workspace import take

if TYPE_CHECKING:
    import torch

    DType = str | type[Any] | np.dtype[Any] | torch.dtype

_WEIGHTS = (weight("w_gate"), weight("w_up"), weight("w_down_t"))
SPARSE_FFN = Signature("sparse_ffn", (vector("x", "d_model"), *_WEIGHTS), vector("y", "d_model"), has_threshold=True)
# A SparseFFN's weights come first, so that an x that does not fit them is to blame.
BOUND_FFN = Signature("SparseFFN", (*_WEIGHTS, vector("x", "d_model")), vector("y", "d_model"), has_threshold=True)


def sparse_ffn(
    x: A,
    w_gate: Weight[A],
    w_up: Weight[A],
    w_down_t: Weight[A],
    threshold: float = 0.0,
    *,
    out: A | None = None,
    specialize: bool = True,
) -> A:
    """The whole gated FFN of one token: formulas 1 to 4, the weights of inactive neurons unread.

    Two launches, `ffn_123` and `ffn_4`, with the (d_ff,) intermediate in scratch memory that is kept for the next call on the
    stream, or for the CUDA graph that the call is captured into. Threads and streams do not disturb each other. `SparseFFN`
    binds the weights.

    Parameters
    ----------
    x : array, (d_model,) or (1, d_model)
        The token's hidden state.
    w_gate, w_up, w_down_t : array, (d_ff, d_model)
        ``gate_proj.weight`` and ``up_proj.weight`` as they are, and `pack_down` of ``down_proj.weight``.
    threshold : float, default 0.0
        FATReLU's T, as for `ffn_23`.
    out : array, (d_model,) or (1, d_model), optional
        Takes the result. It must not share memory with an input.
    specialize : bool, default True
        As for `ffn_1`.

    Returns
    -------
    array, (d_model,) or (1, d_model)
        y, rounded to the dtype after formulas 1, 3 and 4, as the dense path is.

    Raises
    ------
    TypeError, ValueError, KernelCompileError
        As for `ffn_23`.
    """
    threshold = check_threshold("sparse_ffn", threshold)
    call: Call[A] = check_call(SPARSE_FFN, (x, w_gate, w_up, w_down_t), out)
    return _run(call, (x, w_gate, w_up, w_down_t), call.inputs, threshold, specialize)


def _run(call: Call[A], arrays: tuple[Any, ...], inputs: Sequence[int], threshold: float, specialize: bool) -> A:
    """`ffn_123` into scratch and `ffn_4` out of it. `arrays` and `inputs`, their addresses, are x, w_gate, w_up, w_down_t.

    A compressed weight has several addresses.
    """
    if call.on_host:
        return call.on_reference(reference.sparse_ffn, threshold, arrays=arrays)
    checked, first_of_down = call.checked, len(inputs) - call.checked.down_pointers
    d_ff, d_model, device = checked.d_ff, checked.d_model, checked.device
    first, second = kernel_of("ffn_123", checked, specialize), kernel_of("ffn_4", checked, specialize)
    stream = call.family.stream(device)
    captured = driver.is_captured(stream)
    overlaps = driver.overlaps(stream, captured)
    x1, home = take(stream, device, checked.scratch_bytes, captured)
    try:
        first.launch(stream, overlaps, *inputs[:first_of_down], x1, threshold, d_ff, d_model)
        second.launch(stream, overlaps, x1, *inputs[first_of_down:], call.output, d_ff, d_model)
    finally:
        home.append(x1)
    return call.result()


class SparseFFN(Generic[A]):
    """`sparse_ffn` with its weights bound.

    Any number of threads and streams may share one. A CUDA graph that is captured from it needs it no longer; the weights, `x`
    and `out` must stay where they are for as long as the graph is launched, as with every captured call.

    Parameters
    ----------
    w_gate, w_up, w_down_t : array, (d_ff, d_model)
        As for `sparse_ffn`. They are kept, not copied, and may get other values, but not another shape, dtype or GPU.
    threshold : float, default 0.0
        FATReLU's T, as for `ffn_23`.
    specialize : bool, default True
        As for `ffn_1`.

    Examples
    --------
    >>> ffn = SparseFFN(w_gate, w_up, pack_down(w_down), threshold=0.01)
    >>> y = ffn(x)
    >>> ffn(x, out=y)
    """

    def __init__(
        self, w_gate: Weight[A], w_up: Weight[A], w_down_t: Weight[A], threshold: float = 0.0, *, specialize: bool = True
    ) -> None:
        self.threshold = check_threshold("SparseFFN", threshold)
        self._weights, self._specialize = BoundWeights(BOUND_FFN, (w_gate, w_up, w_down_t)), specialize
        self.d_model, self.d_ff, self.dtype, _ = self._weights.facts

    def __call__(self, x: A, *, out: A | None = None) -> A:
        """The FFN of `x`, (d_model,) or (1, d_model); `out` as for `sparse_ffn`."""
        call: Call[A] = self._weights.call(x, out)
        *weights, token = call.inputs
        return _run(call, (x, *self._weights.arrays), (token, *weights), self.threshold, self._specialize)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_weights": self._weights.arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _weights=BoundWeights(BOUND_FFN, state["_weights"]))

    def __repr__(self) -> str:
        return f"SparseFFN(d_model={self.d_model}, d_ff={self.d_ff}, dtype={self.dtype}, threshold={self.threshold:g})"


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

    Returns
    -------
    list of CompiledKernel
        One per kernel, with its defines and the seconds it took.

    Raises
    ------
    ValueError
        Dims or dtype that no kernel supports.
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
    index = current_device() if device is None else device
    report = []
    for kernel in KERNELS:
        if kernel == "decompress" and not compressed:
            continue
        start = time.perf_counter()
        formats = compressed_formats(kernel, d_model, d_ff) if compressed else ()
        plan = load(Problem(kernel, d_model, d_ff, name, specialize, formats=formats), index).plan
        seconds = time.perf_counter() - start
        defines = " ".join(key if value is None else f"{key}={value}" for key, value in plan.defines)
        report.append(CompiledKernel(kernel, defines, gpu(index).capability, seconds))
    return report
