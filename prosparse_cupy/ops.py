"""The operators. Each is a straight line: check, allocate, plan, launch, return.

One call, followed down: `ffn_23` -> `check_call` (`arguments`: checks and addresses) -> `kernel_of` (`compiler`: the plan of
`launch`, compiled and cached) -> the kernel's launch (`driver`).
"""

from __future__ import annotations

from . import reference
from .arguments import Call, Operand, Signature, check_call, vector, weight
from .compiler import kernel_of
from .compressed import Weight
from .driver import overlaps
from .formula import check_threshold
from .libraries import A

FFN_1 = Signature("ffn_1", (vector("x", "d_model"), weight("w_gate")), vector("gate", "d_ff"))
FFN_123 = Signature(
    "ffn_123", (vector("x", "d_model"), weight("w_gate"), weight("w_up")), vector("x1", "d_ff"), has_threshold=True
)
FFN_23 = Signature(
    "ffn_23", (vector("gate", "d_ff"), vector("x", "d_model"), weight("w_up")), vector("x1", "d_ff"), has_threshold=True
)
FFN_4 = Signature("ffn_4", (vector("x1", "d_ff"), weight("w_down_t")), vector("y", "d_model"))
PACK_DOWN = Signature(
    "pack_down",
    (Operand("w_down", ("d_model", "d_ff"), aligned=False),),
    Operand("w_down_t", ("d_ff", "d_model"), aligned=False),
)


def ffn_1(x: A, w_gate: Weight[A], *, out: A | None = None, specialize: bool = True) -> A:
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
        Compile `d_ff` and `d_model` into the kernel (ROW_OPT, COL_OPT), once per shape. False: one kernel for all shapes, or of
        `ffn_4` for those whose sums have one order. The bits are the same.

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
    call: Call[A] = check_call(FFN_1, (x, w_gate), out)
    if call.on_host:
        return call.on_reference(reference.ffn_1)
    _launch("ffn_1", call, specialize)
    return call.result()


def ffn_123(
    x: A, w_gate: Weight[A], w_up: Weight[A], threshold: float = 0.0, *, out: A | None = None, specialize: bool = True
) -> A:
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
    call: Call[A] = check_call(FFN_123, (x, w_gate, w_up), out)
    if call.on_host:
        return call.on_reference(reference.ffn_123, threshold)
    _launch("ffn_123", call, specialize, threshold)
    return call.result()


def ffn_23(gate: A, x: A, w_up: Weight[A], threshold: float = 0.0, *, out: A | None = None, specialize: bool = True) -> A:
    """(FAT)ReLU of the gate times the up-projection: ``fatrelu(gate, threshold) * (x @ w_up.T)`` (formulas 2 and 3).

    Rows of `w_up` whose neuron is inactive are not read. A neuron is active iff ``not (gate < threshold) and gate != 0``, so
    ``gate == threshold`` is kept and NaN stays visible; inactive outputs are exactly +0.

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
    call: Call[A] = check_call(FFN_23, (gate, x, w_up), out)
    if call.on_host:
        return call.on_reference(reference.ffn_23, threshold)
    _launch("ffn_23", call, specialize, threshold)
    return call.result()


def ffn_4(x1: A, w_down_t: Weight[A], *, out: A | None = None, specialize: bool = True) -> A:
    """Down-projection: ``x1 @ w_down_t`` (formula 4); rows of `w_down_t` where `x1` is zero are not read.


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
    call: Call[A] = check_call(FFN_4, (x1, w_down_t), out)
    if call.on_host:
        return call.on_reference(reference.ffn_4)
    _launch("ffn_4", call, specialize)
    return call.result()


def pack_down(w_down: A, *, out: A | None = None, specialize: bool = True) -> A:
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
    call: Call[A] = check_call(PACK_DOWN, (w_down,), out)
    if call.on_host:
        return call.on_reference(reference.pack_down)
    _launch("pack_down", call, specialize)
    return call.result()


def _launch(kernel: str, call: Call[A], specialize: bool, *arguments: int | float) -> None:
    """Launch a kernel on the caller's stream: its pointers, then the dims."""
    checked = call.checked
    stream, launched = call.family.stream(checked.device), kernel_of(kernel, checked, specialize)
    overlapping = launched.plan.programmatic and overlaps(stream)
    launched.launch(stream, overlapping, *call.inputs, call.output, *arguments, checked.d_ff, checked.d_model)
