"""The operators. Each is a straight line: check, allocate, plan, launch, return.

A call has one token, (d,), or B of them as rows, (B, d), B from 1 to 8.

One call, followed down: `ffn_23` -> `check_call` (`arguments`: checks and addresses) -> `kernel_of` (`compiler`: the plan of
`launch`, compiled and cached) -> the kernel's launch (`driver`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from . import reference
from .arguments import Call, Operand, Signature, check_call, extra, total, vector, weight
from .compiler import Kernel, kernel_of
from .compressed import Weight
from .driver import is_captured, overlaps
from .formula import RELU, check_activation, check_norm_eps, check_threshold
from .libraries import A
from .problem import KERNELS, OPTIONAL
from .tensor_cores import TICKET_BYTES
from .workspace import take, with_tickets

_BIAS = "bias", "d_ff"
FFN_1 = Signature(
    "ffn_1",
    (vector("x", "d_model"), weight("w_gate")),
    total("gate", "d_ff"),
    optional=(extra(*_BIAS, "gate_bias"),),
)
FFN_12 = Signature(
    "ffn_12",
    (vector("x", "d_model"), weight("w_up")),
    vector("x1", "d_ff"),
    has_threshold=True,
    optional=(extra(*_BIAS, "up_bias"),),
)
FFN_123 = Signature(
    "ffn_123",
    (vector("x", "d_model"), weight("w_gate"), weight("w_up")),
    vector("x1", "d_ff"),
    has_threshold=True,
    optional=(extra("gate_bias", "d_ff", "gate_bias"), extra("up_bias", "d_ff", "up_bias")),
)
FFN_23 = Signature(
    "ffn_23",
    (vector("gate", "d_ff"), vector("x", "d_model"), weight("w_up")),
    vector("x1", "d_ff"),
    has_threshold=True,
    optional=(extra(*_BIAS, "up_bias"),),
)
FFN_4 = Signature(
    "ffn_4",
    (vector("x1", "d_ff"), weight("w_down_t")),
    total("y", "d_model"),
    optional=(extra("bias", "d_model", "down_bias"), extra("norm_weight", "d_ff", "norm_weight")),
)
PACK_DOWN = Signature(
    "pack_down",
    (Operand("w_down", ("d_model", "d_ff"), aligned=False),),
    Operand("w_down_t", ("d_ff", "d_model"), aligned=False),
)


def ffn_1(
    x: A,
    w_gate: Weight[A],
    *,
    bias: A | None = None,
    batch_invariant: bool = True,
    out: A | None = None,
    specialize: bool = True,
) -> A:
    """Gate projection, dense: ``x @ w_gate.T + bias`` (formula 1).

    Parameters
    ----------
    x : array, (d_model,) or (B, d_model)
        A token's hidden state, or those of B tokens, 1 to 8. A token has the bits that it has alone, whatever stands beside it.
        Like every array of a call: bfloat16, float16 or float32, C-contiguous, on one GPU, from one library (CuPy, torch,
        another with ``__dlpack__``); NumPy arrays run `prosparse_cupy.reference` on the host.
    w_gate : array, (d_ff, d_model)
        ``gate_proj.weight`` as it is. `d_model` must be a multiple of 8 (4 for float32), and every array of a call starts
        at a multiple of 16 bytes (biases and what `pack_down` takes excepted).
    bias : array, (d_ff,), optional
        ``gate_proj.bias``, one for all tokens; added in float32, before the gate is rounded.
    batch_invariant : bool, default True
        Whether a token has the bits that it has alone. False: 5 to 8 tokens of 16 bits go to tensor cores, where `d_model` is
        at most 5120, `w_gate` is plain and the dims are compiled in. A token then has the same bits in every call of 5 to 8
        tokens, and others in smaller ones.
    out : array, (d_ff,) or (B, d_ff), optional
        Takes the result; with it nothing is allocated. Of float32 it takes the sums as they are, not rounded to the dtype: for
        a part of a sum whose other parts are on other GPUs.
    specialize : bool, default True
        Compile `d_ff` and `d_model` into the kernel (ROW_OPT, COL_OPT), once per shape. False: one kernel for all shapes, or of
        `ffn_4` for those whose sums have one order. The bits are the same. Each number of tokens has kernels of its own.

    Returns
    -------
    array, (d_ff,) or (B, d_ff)
        The gate before its activation, accumulated in float32 and rounded once: `out`, or a new array of the caller's library.
        The launch is on the caller's current stream and is not waited for.

    Raises
    ------
    TypeError
        Unknown or mixed array libraries, an unsupported or mixed dtype, a torch tensor in host memory.
    ValueError
        Shapes that do not fit, strided or misaligned arrays, two GPUs, `out` sharing memory with an input; no token, or more
        than 8, which are for the dense path, ``x @ w.T``: it is faster there.
    KernelCompileError
        NVRTC refused the kernel.
    """
    call: Call[A] = check_call(FFN_1, (x, w_gate), out, (bias,))
    if call.on_host:
        return call.on_reference(reference.ffn_1, bias=bias)
    _launch("ffn_1", call, specialize, batch_invariant=batch_invariant)
    return call.result()


def ffn_12(
    x: A,
    w_up: Weight[A],
    threshold: float = 0.0,
    *,
    activation: str = RELU,
    bias: A | None = None,
    out: A | None = None,
    specialize: bool = True,
) -> A:
    """Up-projection, bias and activation in one launch: the first half of an FFN without a gate (formulas 1 and 2).

    ``act(x @ w_up.T + bias)``, where ``act`` is ReLU (OPT, Falcon) or squared ReLU (Nemotron, Arcee, Persimmon).

    Parameters
    ----------
    x : array, (d_model,) or (B, d_model)
        The hidden state of a token, or of B tokens, 1 to 8.
    w_up : array, (d_ff, d_model)
        ``up_proj.weight`` as it is; all of it is read, as there is no gate to say which neurons are active.
    threshold : float, default 0.0
        FATReLU's T, as for `ffn_23`; what is compared is rounded to the dtype first.
    activation : {"relu", "relu2"}
        "relu2" is ReLU squared: the square, in float32, of the rounded sum.
    bias : array, (d_ff,), optional
        ``up_proj.bias``; added in float32, before the sum is rounded.
    out : array, (d_ff,) or (B, d_ff), optional
        Takes the result. It must not share memory with an input.
    specialize : bool, default True
        As for `ffn_1`.

    Returns
    -------
    array, (d_ff,) or (B, d_ff)
        x1, what `ffn_4` takes.

    Raises
    ------
    TypeError, ValueError, KernelCompileError
        As for `ffn_23`.
    """
    threshold = check_threshold("ffn_12", threshold)
    check_activation("ffn_12", activation, gated=False)
    call: Call[A] = check_call(FFN_12, (x, w_up), out, (bias,))
    if call.on_host:
        return call.on_reference(reference.ffn_12, threshold, activation=activation, bias=bias)
    _launch("ffn_12", call, specialize, threshold, activation=activation)
    return call.result()


def ffn_123(
    x: A,
    w_gate: Weight[A],
    w_up: Weight[A],
    threshold: float = 0.0,
    *,
    activation: str = RELU,
    gate_bias: A | None = None,
    up_bias: A | None = None,
    out: A | None = None,
    specialize: bool = True,
) -> A:
    """Gate projection, activation and up-projection in one launch: `ffn_23` of `ffn_1`, to the bit (formulas 1 to 3).

    A warp that finds its neuron active goes on to the neuron's row of `w_up`, so the gate is never written to memory.

    Parameters
    ----------
    x : array, (d_model,) or (B, d_model)
        The hidden state of a token, or of B tokens, 1 to 8.
    w_gate, w_up : array, (d_ff, d_model)
        ``gate_proj.weight`` and ``up_proj.weight`` as they are.
    threshold : float, default 0.0
        FATReLU's T, as for `ffn_23`; the gate is rounded to the dtype before it is compared.
    activation : {"relu", "relu2", "drelu"}
        As for `ffn_23`.
    gate_bias, up_bias : array, (d_ff,), optional
        ``gate_proj.bias`` and ``up_proj.bias``, added in float32.
    out : array, (d_ff,) or (B, d_ff), optional
        Takes the result. It must not share memory with an input.
    specialize : bool, default True
        As for `ffn_1`.

    Returns
    -------
    array, (d_ff,) or (B, d_ff)
        x1, what `ffn_4` takes.

    Raises
    ------
    TypeError, ValueError, KernelCompileError
        As for `ffn_23`.
    """
    threshold = check_threshold("ffn_123", threshold)
    check_activation("ffn_123", activation)
    call: Call[A] = check_call(FFN_123, (x, w_gate, w_up), out, (gate_bias, up_bias))
    if call.on_host:
        return call.on_reference(reference.ffn_123, threshold, activation=activation, gate_bias=gate_bias, up_bias=up_bias)
    _launch("ffn_123", call, specialize, threshold, activation=activation)
    return call.result()


def ffn_23(
    gate: A,
    x: A,
    w_up: Weight[A],
    threshold: float = 0.0,
    *,
    activation: str = RELU,
    bias: A | None = None,
    out: A | None = None,
    specialize: bool = True,
) -> A:
    """The activation of the gate times the up-projection: ``act(gate) * (x @ w_up.T + bias)`` (formulas 2 and 3).

    Rows of `w_up` whose neuron is inactive are not read. A neuron is active iff ``not (gate < threshold) and gate != 0``, so
    ``gate == threshold`` is kept and NaN stays visible; inactive outputs are exactly +0.

    Of several tokens, a row that any of them needs is read once. For a token for which a neuron is inactive x1 is exactly +0,
    whatever the row holds, NaN included.

    Parameters
    ----------
    gate : array, (d_ff,) or (B, d_ff)
        The gate before its activation, as `ffn_1` returns it, with the leading dim of `x`.
    x : array, (d_model,) or (B, d_model)
        The hidden state of a token, or of B tokens, 1 to 8.
    w_up : array, (d_ff, d_model)
        ``up_proj.weight`` as it is.
    threshold : float, default 0.0
        FATReLU's T, finite and >= 0, compared as float32; 0 is ReLU. An argument of the launch: it never recompiles.
    activation : {"relu", "relu2", "drelu"}
        "relu2" is squared ReLU, the square in float32 (BitNet b1.58). "drelu" rectifies both projections (TurboSparse, arXiv
        2406.05955): x1 is +0 where the up-projection is not above zero, whatever the threshold.
    bias : array, (d_ff,), optional
        ``up_proj.bias``, added in float32.
    out : array, (d_ff,) or (B, d_ff), optional
        Takes the result. It must not share memory with an input.
    specialize : bool, default True
        As for `ffn_1`.

    Returns
    -------
    array, (d_ff,) or (B, d_ff)
        x1, rounded once.

    Raises
    ------
    TypeError, ValueError, KernelCompileError
        As for `ffn_1`; ValueError also for a threshold that is negative or not finite.
    """
    threshold = check_threshold("ffn_23", threshold)
    check_activation("ffn_23", activation)
    call: Call[A] = check_call(FFN_23, (gate, x, w_up), out, (bias,))
    if call.on_host:
        return call.on_reference(reference.ffn_23, threshold, activation=activation, bias=bias)
    _launch("ffn_23", call, specialize, threshold, activation=activation)
    return call.result()


def ffn_4(
    x1: A,
    w_down_t: Weight[A],
    *,
    bias: A | None = None,
    norm_weight: A | None = None,
    norm_eps: float = 0.0,
    batch_invariant: bool = True,
    out: A | None = None,
    specialize: bool = True,
) -> A:
    """Down-projection: ``x1 @ w_down_t + bias`` (formula 4); rows of `w_down_t` where `x1` is zero are not read.

    With `norm_weight` it is the down-projection of the normalised x1, ``norm_weight * x1 / sqrt(mean(x1**2) + norm_eps)``,
    as BitNet's ``ffn_sub_norm`` computes it: zeros stay zeros, so the same rows are left out.

    Of several tokens, a row that more than one needs is found in a cache by the later ones. A token whose x1 is zero there
    gets nothing from it, whatever the row holds, NaN included.

    Parameters
    ----------
    x1 : array, (d_ff,) or (B, d_ff)
        As `ffn_23` returns it, of one token or of B; any sign.
    w_down_t : array, (d_ff, d_model)
        The transpose of ``down_proj.weight``, made once with `pack_down`, so that a neuron's weights are one contiguous row.
    bias : array, (d_model,), optional
        ``down_proj.bias``; added in float32, before y is rounded.
    norm_weight : array, (d_ff,), optional
        The weight of an RMS norm over x1, one for all tokens. Its mean is over all neurons of each token; nothing is rounded
        between norm and projection.
    norm_eps : float, default 0.0
        What the norm adds to the mean of the squares; without `norm_weight` it must be 0.
    batch_invariant : bool, default True
        Whether a token has the bits that it has alone. False: 5 to 8 tokens of 16 bits go to tensor cores, where `d_model` is a
        multiple of 64, `d_ff` one of 8 whose lists fit a block's shared memory (up to 22528 at a `d_model` of 4096, 51200 on an
        H100), `w_down_t` is plain, there is no norm, and the dims are compiled in. A token's bits then depend on the neurons
        that the others need; the same call has the same bits again.
    out : array, (d_model,) or (B, d_model), optional
        Takes the result. It must not share memory with an input. Of float32 it takes the sums as they are, not rounded to the
        dtype: a shard's part of y, to be added to those of other GPUs.
    specialize : bool, default True
        As for `ffn_1`.

    Returns
    -------
    array, (d_model,) or (B, d_model)
        y, rounded once.

    Raises
    ------
    TypeError, ValueError, KernelCompileError
        As for `ffn_1`.
    """
    norm_eps = check_norm_eps("ffn_4", norm_eps, norm_weight is not None)
    call: Call[A] = check_call(FFN_4, (x1, w_down_t), out, (bias, norm_weight))
    if call.on_host:
        return call.on_reference(reference.ffn_4, bias=bias, norm_weight=norm_weight, norm_eps=norm_eps)
    _launch("ffn_4", call, specialize, norm_eps=norm_eps, batch_invariant=batch_invariant)
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


def _launch(
    kernel: str,
    call: Call[A],
    specialize: bool,
    *threshold: float,
    activation: str = RELU,
    norm_eps: float = 0.0,
    batch_invariant: bool = True,
) -> None:
    """Launch a kernel on the caller's stream: its pointers, the dims, then what it may have or not."""
    checked = call.checked
    stream, launched = call.family.stream(checked.device), kernel_of(kernel, checked, specialize, activation, batch_invariant)
    trailing = trailing_arguments(kernel, call.extras, norm_eps)
    arguments = *call.inputs, call.output, *threshold, checked.d_ff, checked.d_model, *trailing
    if not launched.plan.partial_bytes:
        launched.launch(stream, launched.plan.programmatic and overlaps(stream), *arguments)
        return
    captured = is_captured(stream)
    with partial_sums(launched, stream, checked.device, captured) as more:
        launched.launch(stream, launched.plan.programmatic and overlaps(stream, captured), *arguments, *more)


@contextmanager
def partial_sums(launched: Kernel, stream: int, device: int, captured: bool) -> Iterator[tuple[int, ...]]:
    """The last arguments of a launch whose blocks leave sums for one another: their address, and that of the tickets."""
    if not launched.plan.partial_bytes:
        yield ()
        return
    tickets, home = take(stream, device, with_tickets(launched.plan.partial_bytes), captured)
    try:
        yield tickets + TICKET_BYTES, tickets
    finally:
        home.append(tickets)


_NONE: Mapping[str, tuple[int | float, ...]] = {
    kernel: tuple(0.0 if p == "norm_eps" else 0 for p in interface.parameters if p in (*OPTIONAL, "norm_eps"))
    for kernel, interface in KERNELS.items()
}


def trailing_arguments(kernel: str, extras: Mapping[str, int], norm_eps: float) -> tuple[int | float, ...]:
    """The arguments behind the dims: the addresses of what a call has, null of what it has not."""
    if not extras:
        return _NONE[kernel]
    addresses = [extras.get(p, 0) for p in KERNELS[kernel].optional]
    return (*addresses, norm_eps) if "norm_eps" in KERNELS[kernel].parameters else tuple(addresses)
