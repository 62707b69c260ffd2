"""The operators. Each is a straight line: check, allocate, plan, launch, return.

One call, followed down: `ffn_23` -> `Call` (`_buffers`: checks and addresses) -> `load` (`_compile`: the plan of `launch`,
compiled and cached) -> the kernel's launch (`_driver`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import launch, reference
from ._buffers import Call, Checked, Operand, Signature, check_threshold, vector, weight
from ._compile import load
from ._families import Family
from ._gpu import current_device, gpu
from ._workspace import take

FFN_1 = Signature("ffn_1", (vector("x", "d_model"), weight("w_gate")), vector("gate", "d_ff"))
FFN_123 = Signature("ffn_123", (vector("x", "d_model"), weight("w_gate"), weight("w_up")), vector("x1", "d_ff"))
FFN_23 = Signature("ffn_23", (vector("gate", "d_ff"), vector("x", "d_model"), weight("w_up")), vector("x1", "d_ff"))
FFN_4 = Signature("ffn_4", (vector("x1", "d_ff"), weight("w_down_t")), vector("y", "d_model"))
_WEIGHTS = (weight("w_gate"), weight("w_up"), weight("w_down_t"))
SPARSE_FFN = Signature("sparse_ffn", (vector("x", "d_model"), *_WEIGHTS), vector("y", "d_model"))
# A SparseFFN's weights come first, so that an x that does not fit them is to blame. Building one checks the weights alone.
BUILD = Signature("SparseFFN", _WEIGHTS, vector("y", "d_model"))
BOUND_FFN = Signature("SparseFFN", (*_WEIGHTS, vector("x", "d_model")), vector("y", "d_model"))
PACK_DOWN = Signature(
    "pack_down",
    (Operand("w_down", ("d_model", "d_ff"), aligned=False),),
    Operand("w_down_t", ("d_ff", "d_model"), aligned=False),
)


def ffn_1(x: Any, w_gate: Any, *, out: Any = None, specialize: bool = True) -> Any:
    """Gate projection, dense: ``x @ w_gate.T`` (formula 1).

    Parameters
    ----------
    x : array, (d_model,) or (1, d_model)
        The token's hidden state. Like every array of a call: bfloat16, float16 or float32, C-contiguous, on one GPU, from one
        library (CuPy, torch, another with ``__dlpack__``); NumPy arrays run `prosparse_cupy.reference` on the host.
    w_gate : array, (d_ff, d_model)
        ``gate_proj.weight`` as it is. `d_model` must be a multiple of 8 (4 for float32), and every array of a call starts
        at a multiple of 16 bytes (`pack_down` excepted).
    out : array, (d_ff,) or (1, d_ff), optional
        Takes the result; with it nothing is allocated.
    specialize : bool, default True
        Compile `d_ff` and `d_model` into the kernel (ROW_OPT, COL_OPT), once per shape. False: one kernel for all shapes.

    Returns
    -------
    array, (d_ff,) or (1, d_ff)
        The gate before its activation, accumulated in float32 and rounded once: `out`, or a new array of the caller's library.
        The launch is on the caller's current stream and is not waited for.

    Raises
    ------
    TypeError
        Unknown or mixed array libraries, an unsupported or mixed dtype, a torch tensor in host memory.
    ValueError
        Shapes that do not fit, strided or misaligned arrays, two GPUs, `out` sharing memory with an input.
    KernelCompileError
        NVRTC refused the kernel.
    """
    call = Call(FFN_1, (x, w_gate), out)
    if call.on_host:
        return call.result(reference.ffn_1(x, w_gate))
    _launch("ffn_1", call.checked, call.family, specialize, *call.inputs, call.output)
    return call.result()


def ffn_123(x: Any, w_gate: Any, w_up: Any, threshold: float = 0.0, *, out: Any = None, specialize: bool = True) -> Any:
    """Gate projection, (FAT)ReLU and up-projection in one launch: `ffn_23` of `ffn_1`, to the bit (formulas 1 to 3).

    A warp that finds its neuron active goes on to the neuron's row of `w_up`, so the gate is never written to memory.

    Parameters
    ----------
    x : array, (d_model,) or (1, d_model)
        The token's hidden state.
    w_gate, w_up : array, (d_ff, d_model)
        ``gate_proj.weight`` and ``up_proj.weight`` as they are.
    threshold : float, default 0.0
        FATReLU's T, as for `ffn_23`; the gate is rounded to the dtype before it is compared.
    out : array, (d_ff,) or (1, d_ff), optional
        Takes the result. It must not share memory with an input.
    specialize : bool, default True
        As for `ffn_1`.

    Returns
    -------
    array, (d_ff,) or (1, d_ff)
        x1, what `ffn_4` takes.

    Raises
    ------
    TypeError, ValueError, KernelCompileError
        As for `ffn_23`.
    """
    threshold = check_threshold("ffn_123", threshold)
    call = Call(FFN_123, (x, w_gate, w_up), out)
    if call.on_host:
        return call.result(reference.ffn_123(x, w_gate, w_up, threshold))
    _launch("ffn_123", call.checked, call.family, specialize, *call.inputs, call.output, threshold)
    return call.result()


def ffn_23(gate: Any, x: Any, w_up: Any, threshold: float = 0.0, *, out: Any = None, specialize: bool = True) -> Any:
    """(FAT)ReLU of the gate times the up-projection: ``fatrelu(gate, threshold) * (x @ w_up.T)`` (formulas 2 and 3).

    Rows of `w_up` whose neuron is inactive are not read. A neuron is active iff ``not (gate < threshold) and gate != 0``, so
    ``gate == threshold`` is kept and NaN stays visible; inactive outputs are exactly +0.
    Operator step (2) of ProSparse (arXiv 2402.13516).

    Parameters
    ----------
    gate : array, (d_ff,) or (1, d_ff)
        The gate before its activation, as `ffn_1` returns it.
    x : array, (d_model,) or (1, d_model)
        The token's hidden state.
    w_up : array, (d_ff, d_model)
        ``up_proj.weight`` as it is.
    threshold : float, default 0.0
        FATReLU's T, finite and >= 0, compared as float32; 0 is ReLU. An argument of the launch: it never recompiles.
    out : array, (d_ff,) or (1, d_ff), optional
        Takes the result. It must not share memory with an input.
    specialize : bool, default True
        As for `ffn_1`.

    Returns
    -------
    array, (d_ff,) or (1, d_ff)
        x1, rounded once.

    Raises
    ------
    TypeError, ValueError, KernelCompileError
        As for `ffn_1`; ValueError also for a threshold that is negative or not finite.
    """
    threshold = check_threshold("ffn_23", threshold)
    call = Call(FFN_23, (gate, x, w_up), out)
    if call.on_host:
        return call.result(reference.ffn_23(gate, x, w_up, threshold))
    _launch("ffn_23", call.checked, call.family, specialize, *call.inputs, call.output, threshold)
    return call.result()


def ffn_4(x1: Any, w_down_t: Any, *, out: Any = None, specialize: bool = True) -> Any:
    """Down-projection: ``x1 @ w_down_t`` (formula 4); rows of `w_down_t` where `x1` is zero are not read.

    Operator step (3) of ProSparse (arXiv 2402.13516).

    Parameters
    ----------
    x1 : array, (d_ff,) or (1, d_ff)
        As `ffn_23` returns it; any sign.
    w_down_t : array, (d_ff, d_model)
        The transpose of ``down_proj.weight``, made once with `pack_down`, so that a neuron's weights are one contiguous row.
    out : array, (d_model,) or (1, d_model), optional
        Takes the result. It must not share memory with an input.
    specialize : bool, default True
        As for `ffn_1`.

    Returns
    -------
    array, (d_model,) or (1, d_model)
        y, rounded once.

    Raises
    ------
    TypeError, ValueError, KernelCompileError
        As for `ffn_1`.
    """
    call = Call(FFN_4, (x1, w_down_t), out)
    if call.on_host:
        return call.result(reference.ffn_4(x1, w_down_t))
    _launch("ffn_4", call.checked, call.family, specialize, *call.inputs, call.output)
    return call.result()


def pack_down(w_down: Any, *, out: Any = None, specialize: bool = True) -> Any:
    """``nn.Linear``'s down-projection weight in the layout of `ffn_4`: a transpose, on the GPU.

    Parameters
    ----------
    w_down : array, (d_model, d_ff)
        ``down_proj.weight`` as it is.
    out : array, (d_ff, d_model), optional
        Takes the result. It must not share memory with `w_down`.
    specialize : bool, default True
        As for `ffn_1`.

    Returns
    -------
    array, (d_ff, d_model)
        A copy; `w_down` may be freed.

    Raises
    ------
    TypeError, ValueError, KernelCompileError
        As for `ffn_1`.
    """
    call = Call(PACK_DOWN, (w_down,), out)
    if call.on_host:
        return call.result(reference.pack_down(w_down))
    _launch("pack_down", call.checked, call.family, specialize, *call.inputs, call.output)
    return call.result()


def sparse_ffn(
    x: Any, w_gate: Any, w_up: Any, w_down_t: Any, threshold: float = 0.0, *, out: Any = None, specialize: bool = True
) -> Any:
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
    call = Call(SPARSE_FFN, (x, w_gate, w_up, w_down_t), out)
    if call.on_host:
        return call.result(reference.sparse_ffn(x, w_gate, w_up, w_down_t, threshold))
    _launch_ffn(call, *call.inputs, threshold, specialize)
    return call.result()


class SparseFFN:
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

    def __init__(self, w_gate: Any, w_up: Any, w_down_t: Any, threshold: float = 0.0, *, specialize: bool = True) -> None:
        self.threshold = check_threshold("SparseFFN", threshold)
        self._weights = (w_gate, w_up, w_down_t)
        self._specialize = specialize
        self._bound = _what_is_bound(Call(BUILD, self._weights, None).checked)
        self.d_model, self.d_ff, self.dtype, _ = self._bound

    def __call__(self, x: Any, *, out: Any = None) -> Any:
        """The FFN of `x`, (d_model,) or (1, d_model); `out` as for `sparse_ffn`."""
        call = Call(BOUND_FFN, (*self._weights, x), out)
        if _what_is_bound(call.checked) != self._bound:
            self._refuse(call.checked)
        if call.on_host:
            return call.result(reference.sparse_ffn(x, *self._weights, self.threshold))
        w_gate, w_up, w_down_t, x_address = call.inputs
        _launch_ffn(call, x_address, w_gate, w_up, w_down_t, self.threshold, self._specialize)
        return call.result()

    def _refuse(self, now: Checked) -> None:
        raise ValueError(
            f"SparseFFN: its weights have changed since it was built: (d_model, d_ff, dtype, GPU) were {self._bound}, are "
            f"{_what_is_bound(now)}: make a new SparseFFN of them"
        )

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
    d_model: int, d_ff: int, *, dtype: str = "bfloat16", device: int | None = None, specialize: bool = True
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
    if name not in launch.ITEMSIZE:
        raise ValueError(f"warmup: dtype must be bfloat16, float16 or float32, got {name}")
    if d_ff < 1 or d_model < 1 or d_model % launch.vector_length(name):
        raise ValueError(
            f"warmup: d_ff must be at least 1 and d_model a multiple of {launch.vector_length(name)} for {name}, "
            f"got d_model={d_model}, d_ff={d_ff}"
        )
    index = current_device() if device is None else device
    report = []
    for kernel in launch.KERNELS:
        start = time.perf_counter()
        plan = load(kernel, d_model, d_ff, name, index, specialize).plan
        seconds = time.perf_counter() - start
        defines = " ".join(key if value is None else f"{key}={value}" for key, value in plan.defines)
        report.append(CompiledKernel(kernel, defines, gpu(index).capability, seconds))
    return report


def _what_is_bound(checked: Checked) -> tuple[int, int, str, int]:
    """What a SparseFFN's weights may not change."""
    return checked.d_model, checked.d_ff, checked.dtype, checked.device


def _launch(kernel: str, checked: Checked, family: Family, specialize: bool, *arguments: int | float) -> None:
    d_ff, d_model, device = checked.d_ff, checked.d_model, checked.device
    load(kernel, d_model, d_ff, checked.dtype, device, specialize)(family.stream(device), *arguments, d_ff, d_model)


def _launch_ffn(call: Call, x: int, w_gate: int, w_up: int, w_down_t: int, threshold: float, specialize: bool) -> None:
    """`ffn_123` into scratch and `ffn_4` out of it."""
    checked = call.checked
    d_ff, d_model, dtype, device = checked.d_ff, checked.d_model, checked.dtype, checked.device
    first = load("ffn_123", d_model, d_ff, dtype, device, specialize)
    second = load("ffn_4", d_model, d_ff, dtype, device, specialize)
    stream = call.family.stream(device)
    x1, home = take(stream, device, checked.scratch_bytes)
    try:
        first(stream, x, w_gate, w_up, x1, threshold, d_ff, d_model)
        second(stream, x1, w_down_t, call.output, d_ff, d_model)
    finally:
        home.append(x1)
