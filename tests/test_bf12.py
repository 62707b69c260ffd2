"""Weights in 12 bits: every bit pattern comes back, and kernels that read them give the bits that plain weights give."""

from __future__ import annotations

import numpy as np
import pytest
from checks import DTYPES, bits, gate, norm_weight, poisoned, token, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from plans import Shape, plan_of

from prosparse_cupy import bf12, reference
from prosparse_cupy.formats import BF12_ROWS, BF12_SLICES, FORMATS, PLAIN, SLICE_UNIT
from prosparse_cupy.problem import KERNELS, Problem

LAYOUTS = {BF12_ROWS: bf12.ROWS, BF12_SLICES: bf12.SLICES}
BFLOAT16 = DTYPES["bfloat16"]
formats = pytest.mark.parametrize("format_", LAYOUTS, ids=lambda f: f.name)
both = pytest.mark.parametrize("specialize", [True, False], ids=["specialised", "dynamic"])


def _round_trip(patterns: np.ndarray, layout: bf12.Layout) -> bf12.Packed:
    before = patterns.copy()
    packed = bf12.pack(np, patterns, layout)
    out = np.full_like(patterns, 0xABCD)
    bf12.unpack(np, packed, layout, out)
    np.testing.assert_array_equal(out, before)
    np.testing.assert_array_equal(patterns, before)
    return packed


matrices = st.tuples(st.integers(1, 12), st.integers(1, 40)).flatmap(
    lambda dims: st.one_of(
        arrays(np.uint16, (dims[0], 8 * dims[1])),
        arrays(np.uint16, (dims[0], 8 * dims[1]), elements=st.integers(0x3C00, 0x3CFF) | st.sampled_from([0, 0x8000, 0x7FC1])),
    )
)


@settings(max_examples=150, deadline=None)
@given(matrices, st.sampled_from([bf12.ROWS, bf12.SLICES]))
def test_every_matrix_comes_back(patterns, layout):
    _round_trip(patterns, layout)


@formats
def test_every_bit_pattern_comes_back(format_):
    layout = LAYOUTS[format_]
    patterns = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    _round_trip(patterns, layout)
    _round_trip(np.random.default_rng().permuted(patterns.ravel()).reshape(64, 1024), layout)


@formats
@pytest.mark.parametrize(
    ("patterns", "escaped"),
    [
        (np.full((5, 24), 0x3F80, np.uint16), 0.0),  # one value
        (np.zeros((5, 24), np.uint16), 0.0),
        (np.full((3, 40), 0xFFFF, np.uint16), 0.0),  # NaN, whose exponent is the largest
        (np.full((5, 24), 0x8000, np.uint16), 1.0),  # the words that mean an escape
        (np.tile(np.array([0x0080, 0x3F80], np.uint16), (4, 12)), 1.0),  # no window holds both
    ],
)
def test_what_no_window_holds_escapes_and_the_rest_does_not(format_, patterns, escaped):
    packed = _round_trip(patterns, LAYOUTS[format_])
    assert len(packed.escapes) == escaped * patterns.size / 8


@formats
def test_normal_weights_take_12_bits(format_):
    d_ff, d_model = 3000, 1024
    patterns = weights(d_ff, d_model, "bfloat16").view(np.uint16)
    packed = _round_trip(patterns, LAYOUTS[format_])
    assert sum(a.nbytes for a in packed.words) == d_ff * format_.row_bytes(d_model, "bfloat16") == 1.5 * d_ff * d_model
    assert len(packed.escapes) < 0.002 * patterns.size / 8


def test_a_unit_is_what_knobs_know():
    assert bf12.SLICES.UNIT == SLICE_UNIT


@formats
def test_the_pointers_of_a_format_are_its_arrays_and_its_base(format_):
    packed = bf12.pack(np, np.zeros((1, 8), np.uint16), LAYOUTS[format_])
    assert format_.pointers == len(packed.words) + len((packed.escapes, packed.base))
    assert FORMATS[format_.name] is format_


def test_escapes_lie_row_by_row():
    patterns = np.full((6, 64), 0x3F80, np.uint16)
    places = [(0, 1), (2, 0), (2, 3), (2, 7), (5, 6)]
    for number, (row, column) in enumerate(places):
        patterns[row, 8 * column + number] = number
    for layout in LAYOUTS.values():
        packed = _round_trip(patterns, layout)
        np.testing.assert_array_equal(packed.escapes, [patterns[r, 8 * c : 8 * c + 8] for r, c in places])


# Kernels, on the host under sanitizers

# Rows that end inside a unit of four chunks and of a warp's 32, with three chunks in the last unit and with one; rows that two
# warps of ffn_23 share; and for ffn_4 slices of four chunks, the last of three. Shorter rows have slices of two, not of units.
CASES = [
    (24, 101, True, ("ffn_1", "ffn_4")),
    (264, 101, False, ("ffn_1", "ffn_123", "ffn_23", "ffn_4")),
    (280, 33, True, ("ffn_1", "ffn_123", "ffn_23")),
    (2312, 41, True, ("ffn_23",)),
    (2840, 20, True, ("ffn_4",)),
    (2840, 9, False, ("ffn_4",)),
]
SPECIAL = np.array([0x0000, 0x8000, 0x0001, 0x807F, 0x7F80, 0xFF80, 0x7FC0, 0x0080], np.uint16)


def _weights(d_ff: int, d_model: int, rng: np.random.Generator, special: np.ndarray = SPECIAL[:4]) -> np.ndarray:
    """Normal weights with values that have no code: in every chunk of the first row, at ends of rows, and here and there."""
    w = weights(d_ff, d_model, "bfloat16").copy()
    patterns = w.view(np.uint16)
    patterns[0, rng.integers(0, 8) :: 8] = rng.choice(special, d_model // 8)
    patterns[:, -1] = rng.choice(special, d_ff)
    here = rng.random(w.shape) < 0.01
    patterns[here] = rng.choice(special, int(here.sum()))
    return w


def _arguments(w: np.ndarray, format_) -> tuple:
    packed = bf12.pack(np, w.view(np.uint16), LAYOUTS[format_])
    assert len(packed.escapes) > 0
    return (*packed.words, packed.escapes, packed.base)


def _run(host, kernel: str, shape: Shape, inputs: list, out: np.ndarray, trailing: tuple = (), **more) -> np.ndarray:
    plan = plan_of(kernel, shape, **more)
    seed = 1 + ("formats" in more)  # another order of threads
    return host.run(plan, [*inputs, shape.d_ff, shape.d_model, *trailing], out, seed=seed)


@formats
@pytest.mark.parametrize(("d_model", "d_ff", "specialize", "kernels"), CASES)
def test_kernels_give_the_bits_of_plain_weights(host, format_, d_model, d_ff, specialize, kernels):
    if format_ is BF12_SLICES and d_model < 2120:
        kernels = tuple(kernel for kernel in kernels if kernel != "ffn_4")
    rng = np.random.default_rng(d_model * d_ff)
    shape = Shape(d_model, d_ff, "bfloat16", specialize)
    x, g, w_gate, w_up = (
        token(d_model, "bfloat16", rng),
        gate(d_ff, "bfloat16", 0.6, rng, 0.25),
        *(_weights(d_ff, d_model, rng) for _ in range(2)),
    )
    x1 = reference.ffn_23(g, x, w_up, 0.25)
    packed_gate, packed_up = _arguments(w_gate, format_), _arguments(w_up, format_)
    runs = {
        "ffn_1": ([x, w_gate, None], [x, packed_gate, None]),
        "ffn_123": ([x, w_gate, w_up, None, 0.1], [x, packed_gate, packed_up, None, 0.1]),
        "ffn_23": ([g, x, w_up, None, 0.25], [g, x, packed_up, None, 0.25]),
        "ffn_4": ([x1, w_up, None], [x1, packed_up, None]),
    }
    for kernel in kernels:
        plain, packed = runs[kernel]
        out = poisoned(d_model if kernel == "ffn_4" else d_ff, "bfloat16")
        expected = _run(host, kernel, shape, plain, out)
        found = _run(host, kernel, shape, packed, out, formats=(format_,) * len(KERNELS[kernel].weights))
        np.testing.assert_array_equal(bits(found), bits(expected), err_msg=kernel)
        assert np.any(bits(expected)), "nothing was compared"


@pytest.mark.parametrize(
    ("d_model", "d_ff", "kernel", "activation", "format_"),
    [
        (264, 101, "ffn_12", "relu2", BF12_ROWS),
        (264, 101, "ffn_123", "drelu", BF12_SLICES),
        (264, 101, "ffn_23", "relu2", BF12_ROWS),
        (264, 101, "ffn_4", "relu", BF12_ROWS),
        (2120, 9, "ffn_4", "relu", BF12_SLICES),
    ],
)
def test_activations_biases_and_norm_do_not_depend_on_the_format(host, d_model, d_ff, kernel, activation, format_):
    rng = np.random.default_rng(d_model * d_ff)
    shape = Shape(d_model, d_ff, "bfloat16", specialize=False)
    x, g, w = token(d_model, "bfloat16", rng), gate(d_ff, "bfloat16", 0.6, rng, 0.25), _weights(d_ff, d_model, rng)
    biases = [token(d_ff, "bfloat16", rng) for _ in range(2)]
    x1, trailing = reference.fatrelu(g) * token(d_ff, "bfloat16", rng), ()
    inputs = {
        "ffn_12": [x, w, None, 0.1],
        "ffn_123": [x, w, w, None, 0.1],
        "ffn_23": [g, x, w, None, 0.25],
        "ffn_4": [x1, w, None],
    }
    if kernel == "ffn_4":
        extras, trailing = (
            ("down_bias", "norm_weight"),
            (token(d_model, "bfloat16", rng), norm_weight(d_ff, "bfloat16", rng), 1e-5),
        )
    else:
        extras = ("gate_bias", "up_bias") if kernel == "ffn_123" else ("up_bias",)
        trailing = tuple(biases[: len(extras)])
    more = {"trailing": trailing, "extras": extras, "activation": activation}
    out = poisoned(d_model if kernel == "ffn_4" else d_ff, "bfloat16")
    expected = _run(host, kernel, shape, inputs[kernel], out, **more)
    packed = [_arguments(w, format_) if a is w else a for a in inputs[kernel]]
    found = _run(host, kernel, shape, packed, out, formats=(format_,) * len(KERNELS[kernel].weights), **more)
    np.testing.assert_array_equal(bits(found), bits(expected))
    assert np.count_nonzero(expected) > 4, "nothing was compared"


@formats
@pytest.mark.parametrize(("d_model", "d_ff"), [(8, 5), (264, 21), (1048, 9), (1064, 3), (2080, 2)])
def test_decompress_gives_the_bits_back(host, format_, d_model, d_ff):
    w = _weights(d_ff, d_model, np.random.default_rng(d_model), SPECIAL)
    plan = plan_of("decompress", Shape(d_model, d_ff, "bfloat16", specialize=d_model == 264), formats=(format_,))
    found = host.run(plan, [_arguments(w, format_), None, d_ff, d_model], poisoned((d_ff, d_model), "bfloat16"))
    np.testing.assert_array_equal(bits(found), bits(w))


@formats
def test_values_that_are_not_finite_arrive(host, format_):
    rng = np.random.default_rng(3)
    shape = Shape(264, 40, "bfloat16")
    x, w = token(264, "bfloat16", rng), weights(40, 264, "bfloat16").copy()
    for row, pattern in enumerate(SPECIAL):
        w.view(np.uint16)[row, 8 * row + row % 8] = pattern
    expected = _run(host, "ffn_1", shape, [x, w, None], poisoned(40, "bfloat16"))
    found = _run(host, "ffn_1", shape, [x, _arguments(w, format_), None], poisoned(40, "bfloat16"), formats=(format_,))
    np.testing.assert_array_equal(bits(found), bits(expected))
    assert not np.isfinite(found[4:7].astype(np.float32)).any() and np.isfinite(found[7:].astype(np.float32)).all()


def test_formats_may_be_mixed(host):
    rng = np.random.default_rng(4)
    shape, x = Shape(264, 101, "bfloat16"), token(264, "bfloat16", rng)
    w_gate, w_up = (_weights(101, 264, rng) for _ in range(2))
    expected = _run(host, "ffn_123", shape, [x, w_gate, w_up, None, 0.1], poisoned(101, "bfloat16"))
    for kinds in ((BF12_ROWS, PLAIN), (PLAIN, BF12_SLICES), (BF12_SLICES, BF12_ROWS)):
        given_ = [w if k is PLAIN else _arguments(w, k) for w, k in zip((w_gate, w_up), kinds, strict=True)]
        found = _run(host, "ffn_123", shape, [x, *given_, None, 0.1], poisoned(101, "bfloat16"), formats=kinds)
        np.testing.assert_array_equal(bits(found), bits(expected))


# On a GPU


@pytest.mark.gpu
@formats
@both
@pytest.mark.parametrize(("d_model", "d_ff"), [(4096, 11008), (5120, 2000), (1536, 3840), (264, 101)])
def test_kernels_on_the_gpu_give_the_bits_of_plain_weights(format_, d_model, d_ff, specialize):
    import cupy

    from prosparse_cupy import compiler, launch, ops

    rng = np.random.default_rng()
    target = compiler.target_of(0)
    x, g = (cupy.asarray(a) for a in (token(d_model, "bfloat16", rng), gate(d_ff, "bfloat16", 0.8, rng)))
    w = [cupy.asarray(_weights(d_ff, d_model, rng)) for _ in range(2)]
    packed = [bf12.pack(cupy, a.view(np.uint16), LAYOUTS[format_]) for a in w]
    gates, ups = ((*(a.data.ptr for a in (*p.words, p.escapes)), p.base) for p in packed)
    x1 = ops.ffn_23(g, x, w[1])
    runs = {
        "ffn_1": (ops.ffn_1(x, w[0]), (x.data.ptr, *gates), ()),
        "ffn_123": (ops.ffn_123(x, *w, 0.1), (x.data.ptr, *gates, *ups), (0.1,)),
        "ffn_23": (x1, (g.data.ptr, x.data.ptr, *ups), (0.0,)),
        "ffn_4": (ops.ffn_4(x1, w[1]), (x1.data.ptr, *ups), ()),
    }
    for kernel, (expected, inputs, scalars) in runs.items():
        if kernel == "ffn_4" and format_ is BF12_SLICES and d_model < 2120:
            continue  # its slices are no units
        found = cupy.full(expected.size, -1, np.int16)
        problem = Problem(kernel, d_model, d_ff, "bfloat16", specialize, formats=(format_,) * len(KERNELS[kernel].weights))
        plan = launch.plan(problem, target)
        compiler.Kernel(plan, 0).launch(
            0, True, *inputs, found.data.ptr, *scalars, d_ff, d_model, *ops.trailing_arguments(kernel, {}, 0.0)
        )
        np.testing.assert_array_equal(found.get(), expected.view(np.int16).get(), err_msg=kernel)
        assert expected.view(np.int16).any()


def test_slices_of_less_than_a_unit_are_refused():
    with pytest.raises(ValueError, match=r"ffn_4: .* slices are narrower than the 4 chunks that bf12-slices keeps together"):
        plan_of("ffn_4", Shape(1536, 3840, "bfloat16"), formats=(BF12_SLICES,))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@formats
def test_other_dtypes_are_refused(format_, dtype):
    with pytest.raises(ValueError, match=rf"ffn_1: weights in the format {format_.name} must be bfloat16, got {dtype}"):
        Problem("ffn_1", 64, 8, dtype, formats=(format_,))
