"""Every rejection: the exception's type and the words that help, on NumPy arrays and on described ones."""

from __future__ import annotations

import subprocess
import sys
import warnings
from fractions import Fraction

import numpy as np
import pytest
from checks import DTYPES, bits, poisoned
from gpu_arrays import Exporter

import prosparse_cupy as psc
from prosparse_cupy import arguments, ops
from prosparse_cupy.arguments import Checked, Meta, _check_addresses, check
from prosparse_cupy.ffn import SPARSE_FFN, UNGATED_FFN
from prosparse_cupy.formula import check_threshold
from prosparse_cupy.libraries import CUPY, NUMPY

D_FF, D_MODEL = 24, 16


def _arrays(dtype: str = "bfloat16") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    vectors = {"x": D_MODEL, "gate": D_FF, "x1": D_FF}
    shapes = {**{n: (s,) for n, s in vectors.items()}, **dict.fromkeys(("w_gate", "w_up", "w_down_t"), (D_FF, D_MODEL))}
    shapes["w_down"] = (D_MODEL, D_FF)
    return {name: rng.standard_normal(shape).astype(DTYPES[dtype]) for name, shape in shapes.items()}


INPUTS = {
    "ffn_1": ("x", "w_gate"),
    "ffn_12": ("x", "w_up"),
    "ffn_123": ("x", "w_gate", "w_up"),
    "ffn_23": ("gate", "x", "w_up"),
    "ffn_4": ("x1", "w_down_t"),
    "sparse_ffn": ("x", "w_gate", "w_up", "w_down_t"),
    "pack_down": ("w_down",),
}
OUT = {
    "ffn_1": (D_FF,),
    "ffn_12": (D_FF,),
    "ffn_123": (D_FF,),
    "ffn_23": (D_FF,),
    "ffn_4": (D_MODEL,),
    "sparse_ffn": (D_MODEL,),
    "pack_down": (D_FF, D_MODEL),
}
every_input = pytest.mark.parametrize(("operator", "name"), [(op, name) for op, names in INPUTS.items() for name in names])
every_operator = pytest.mark.parametrize("operator", INPUTS)
VECTORS = ("x", "gate", "x1")


def _call(operator: str, arrays: dict[str, np.ndarray], **options):
    return getattr(psc, operator)(*(arrays[name] for name in INPUTS[operator]), **options)


@every_operator
def test_what_fits_is_accepted_and_out_is_returned(operator):
    arrays = _arrays()
    result = _call(operator, arrays)
    assert result.shape == OUT[operator] and result.dtype == DTYPES["bfloat16"]
    out = poisoned(OUT[operator], "bfloat16")
    assert _call(operator, arrays, out=out) is out
    np.testing.assert_array_equal(bits(out), bits(result))


@every_input
def test_not_an_array(operator, name):
    with pytest.raises(TypeError, match=rf"{operator}: {name} must be a CuPy array.* __dlpack__, got builtins\.list"):
        _call(operator, {**_arrays(), name: [1.0, 2.0]})


@every_operator
def test_out_is_not_an_array(operator):
    with pytest.raises(TypeError, match=rf"{operator}: out must be a CuPy array.* got builtins\.str"):
        _call(operator, _arrays(), out="y")


@every_input
@pytest.mark.parametrize("dtype", [np.float64, np.int16, ">f2"])
def test_dtypes_that_no_kernel_has(operator, name, dtype):
    arrays = _arrays()
    wrong = {**arrays, name: arrays[name].astype(np.float32).astype(dtype)}
    with pytest.raises(TypeError, match=rf"{operator}: {name} must be bfloat16, float16 or float32, got .*: cast it"):
        _call(operator, wrong)


@every_input
def test_mixed_dtypes(operator, name):
    arrays = _arrays()
    if name == INPUTS[operator][0]:
        options, wrong, blamed = {"out": poisoned(OUT[operator], "float16")}, arrays, "out"
    else:
        options, wrong, blamed = {}, {**arrays, name: arrays[name].astype(np.float16)}, name
    with pytest.raises(TypeError, match=rf"{operator}: {blamed} must have the dtype of .*bfloat16, got float16: one dtype"):
        _call(operator, wrong, **options)


@every_input
def test_wrong_shapes(operator, name):
    arrays = _arrays()
    with pytest.raises(ValueError, match=rf"{operator}: \w+ must have shape \(d_"):
        _call(operator, {**arrays, name: np.concatenate([arrays[name]] * 2, axis=-1)}, out=poisoned(OUT[operator], "bfloat16"))


@every_input
def test_wrong_number_of_dims(operator, name):
    arrays = _arrays()
    with pytest.raises(ValueError, match=rf"{operator}: {name} must (be 1-D|have shape)"):
        _call(operator, {**arrays, name: arrays[name].reshape(1, 1, *arrays[name].shape)})


@every_operator
def test_out_of_the_wrong_shape(operator):
    with pytest.raises(ValueError, match=rf"{operator}: out must have shape"):
        _call(operator, _arrays(), out=poisoned((*OUT[operator][:-1], OUT[operator][-1] + 8), "bfloat16"))


@pytest.mark.parametrize(("operator", "name"), [("ffn_4", "w_down_t"), ("sparse_ffn", "w_down_t")])
def test_unpacked_w_down_says_pack_down(operator, name):
    arrays = _arrays()
    expected = (
        rf"{operator}: w_down_t must have shape \(d_ff, d_model\) = \(24, 16\), got \(16, 24\): "
        r"this is nn.Linear's layout, call pack_down\(w_down\) once"
    )
    with pytest.raises(ValueError, match=expected):
        _call(operator, {**arrays, name: arrays["w_down"]})
    with pytest.raises(ValueError, match=r"w_down_t must be C-contiguous.*call pack_down"):
        _call(operator, {**arrays, name: arrays["w_down"].T})


@pytest.mark.parametrize(("operator", "name"), [("ffn_1", "w_gate"), ("ffn_23", "w_up"), ("sparse_ffn", "w_up")])
def test_transposed_gate_and_up_are_named(operator, name):
    arrays = _arrays()
    with pytest.raises(ValueError, match=rf"{name} must have shape .*\(24, 16\), got \(16, 24\): this is transposed"):
        _call(operator, {**arrays, name: np.ascontiguousarray(arrays[name].T)})


@every_input
def test_strided_views(operator, name):
    arrays = _arrays()
    view = np.repeat(arrays[name], 2, axis=-1)[..., ::2]
    assert not view.flags.c_contiguous
    with pytest.raises(ValueError, match=rf"{operator}: {name} must be C-contiguous, got a strided view"):
        _call(operator, {**arrays, name: view})


@every_operator
def test_strided_out(operator):
    out = np.repeat(poisoned(OUT[operator], "bfloat16"), 2, axis=-1)[..., ::2]
    with pytest.raises(ValueError, match=rf"{operator}: out must be C-contiguous"):
        _call(operator, _arrays(), out=out)


@pytest.mark.parametrize(("dtype", "multiple"), [("bfloat16", 8), ("float16", 8), ("float32", 4)])
def test_d_model_must_fill_vectors(dtype, multiple):
    for size in (multiple + 2, multiple + multiple // 2):
        with pytest.raises(ValueError, match=rf"ffn_1: d_model must be a multiple of {multiple} for {dtype}.*got {size}: pad"):
            psc.ffn_1(np.ones(size, DTYPES[dtype]), np.ones((3, size), DTYPES[dtype]))
    psc.ffn_1(np.ones(multiple, DTYPES[dtype]), np.ones((3, multiple), DTYPES[dtype]))


@every_operator
def test_empty_arrays(operator):
    arrays = {name: a[..., :0] if a.shape[-1] == D_MODEL else a[:0] for name, a in _arrays().items()}
    with pytest.raises(ValueError, match=rf"{operator}: \w+ must not be empty, got shape .*: its d_\w+ is 0"):
        _call(operator, {name: np.ascontiguousarray(a) for name, a in arrays.items()})


@every_operator
@pytest.mark.parametrize(("tokens", "advice"), [(0, "there must be at least one"), (9, "more are for the dense path")])
def test_no_tokens_and_too_many_are_refused_with_advice(operator, tokens, advice):
    if operator == "pack_down":
        return
    arrays = _arrays()
    arrays |= {name: np.stack([arrays[name]] * 9)[:tokens] for name in VECTORS}
    message = rf"{operator}: \w+ must hold one token, \(d,\), or 1 to 8, \(B, d\), got {tokens} tokens: {advice}"
    with pytest.raises(ValueError, match=message):
        _call(operator, arrays)


@every_operator
@pytest.mark.parametrize("tokens", [2, 8])
def test_several_tokens_are_each_as_alone(operator, tokens):
    if operator == "pack_down":
        return
    arrays = _arrays()
    result = _call(operator, {**arrays, **{name: np.stack([arrays[name]] * tokens) for name in VECTORS}})
    np.testing.assert_allclose(result.astype(np.float32), np.stack([_call(operator, arrays)] * tokens).astype(np.float32))


def test_leading_dims_must_agree():
    arrays = _arrays()
    with pytest.raises(ValueError, match=r"ffn_23: x must have the leading dims of gate, \(\), got \(1,\): reshape"):
        psc.ffn_23(arrays["gate"], arrays["x"][None], arrays["w_up"])
    two, three = (np.stack([arrays["x"]] * n) for n in (2, 3))
    with pytest.raises(ValueError, match=r"ffn_23: x must have the leading dims of gate, \(3,\), got \(2,\): reshape"):
        psc.ffn_23(np.stack([arrays["gate"]] * 3), two, arrays["w_up"])
    with pytest.raises(ValueError, match=r"ffn_1: out must have the leading dims of x, \(3,\), got \(2,\)"):
        psc.ffn_1(three, arrays["w_gate"], out=poisoned((2, D_FF), "bfloat16"))
    with pytest.raises(ValueError, match=r"ffn_1: out must have the leading dims of x"):
        psc.ffn_1(arrays["x"][None], arrays["w_gate"], out=poisoned(D_FF, "bfloat16"))


@every_operator
def test_one_token_with_a_leading_dim(operator):
    if operator == "pack_down":
        return
    arrays = _arrays()
    result = _call(operator, {**arrays, **{name: arrays[name][None] for name in VECTORS}})
    np.testing.assert_array_equal(bits(result), bits(_call(operator, arrays)[None]))


@every_input
def test_out_overlapping_an_input(operator, name):
    if operator == "pack_down":
        buffer = np.ones(D_FF * D_MODEL + 8, DTYPES["bfloat16"])
        arrays, out = {"w_down": buffer[:-8].reshape(D_MODEL, D_FF)}, buffer[8:].reshape(D_FF, D_MODEL)
    else:
        arrays = _arrays()
        buffer = np.zeros(arrays[name].size + OUT[operator][0] - 1, DTYPES["bfloat16"])  # share one element
        arrays[name], out = buffer[: arrays[name].size].reshape(arrays[name].shape), buffer[-OUT[operator][0] :]
    before = buffer.copy()
    with pytest.raises(ValueError, match=rf"{operator}: out must not share memory with {name}.*pass another array"):
        _call(operator, arrays, out=out)
    np.testing.assert_array_equal(bits(buffer), bits(before))


# What an operator may have beside its inputs: the arguments' names and their dims.
EXTRAS = {
    "ffn_1": {"bias": D_FF},
    "ffn_12": {"bias": D_FF},
    "ffn_123": {"gate_bias": D_FF, "up_bias": D_FF},
    "ffn_23": {"bias": D_FF},
    "ffn_4": {"bias": D_MODEL, "norm_weight": D_FF},
    "sparse_ffn": {"gate_bias": D_FF, "up_bias": D_FF, "down_bias": D_MODEL, "norm_weight": D_FF},
}
every_extra = pytest.mark.parametrize(("operator", "name"), [(op, name) for op, names in EXTRAS.items() for name in names])


def _extra(operator: str, name: str, dtype: str = "bfloat16") -> np.ndarray:
    return np.random.default_rng(1).standard_normal(EXTRAS[operator][name]).astype(DTYPES[dtype])


@every_extra
def test_what_a_call_may_have(operator, name):
    """It is used, in the same way with `out`, and left as it was."""
    arrays, extra, out = _arrays(), _extra(operator, name), poisoned(OUT[operator], "bfloat16")
    before, plain = extra.copy(), _call(operator, arrays)
    result = _call(operator, arrays, **{name: extra})
    assert _call(operator, arrays, **{name: extra}, out=out) is out
    np.testing.assert_array_equal(bits(out), bits(result))
    np.testing.assert_array_equal(bits(extra), bits(before))
    assert np.any(bits(result) != bits(plain))


@every_extra
def test_biases_and_norm_weights_that_do_not_fit(operator, name):
    arrays, right = _arrays(), _extra(operator, name)
    dim = {D_FF: "d_ff", D_MODEL: "d_model"}[len(right)]
    shape = rf"{name} must have shape \({dim},\) = \({len(right)},\), got "
    for wrong, error, message in [
        (np.concatenate([right, right[:1]]), ValueError, rf"{shape}\({len(right) + 1},\): {dim} is {len(right)} in \w+$"),
        (right[:0], ValueError, rf"{shape}\(0,\)"),
        (right[None], ValueError, rf"{name} must be 1-D, one for all tokens, got \(1, {len(right)}\): pass {name}\[0\]$"),
        (np.stack([right] * 2), ValueError, rf"{shape}\(2, {len(right)}\)$"),
        (right[:, None], ValueError, rf"{shape}\({len(right)}, 1\)$"),
        (right[:1].reshape(()), ValueError, rf"{shape}\(\)$"),
        (right.astype(np.float32), TypeError, rf"{name} must have the dtype of \w+, bfloat16, got float32: one dtype per call"),
        (right.astype(np.float64), TypeError, rf"{name} must be bfloat16, float16 or float32, got float64"),
        (np.repeat(right, 2)[::2], ValueError, rf"{name} must be C-contiguous, got a strided view"),
        ([1.0], TypeError, rf"{name} must be a CuPy array.* got builtins\.list"),
        (psc.compress(arrays["w_up"]), TypeError, rf"{name} must be an array, got a CompressedWeight: decompress\(\) it first"),
    ]:
        with pytest.raises(error, match=rf"^{operator}: {message}"):
            _call(operator, arrays, **{name: wrong})


@every_extra
def test_out_overlapping_a_bias_or_a_norm_weight(operator, name):
    size, own = OUT[operator][0], EXTRAS[operator][name]
    buffer = np.ones(own + size - 1, DTYPES["bfloat16"])
    with pytest.raises(ValueError, match=rf"{operator}: out must not share memory with {name}: .* pass another array"):
        _call(operator, _arrays(), **{name: buffer[:own]}, out=buffer[-size:])
    np.testing.assert_array_equal(buffer, np.ones_like(buffer))


@every_extra
def test_mixed_libraries_name_the_bias(operator, name):
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=rf"{operator}: all arrays .* one library, got .*{name} is torch\.Tensor"):
        _call(operator, _arrays(), **{name: torch.zeros(EXTRAS[operator][name])})


@pytest.mark.parametrize("operator", ["ffn_12", "ffn_123", "ffn_23", "sparse_ffn", "SparseFFN", "warmup"])
def test_activations_that_there_are_not(operator):
    arrays, inputs = _arrays(), INPUTS.get(operator, ("w_gate", "w_up", "w_down_t"))

    def call(activation):
        if operator == "warmup":
            return psc.warmup(D_MODEL, D_FF, activation=activation)
        return getattr(psc, operator)(*(arrays[name] for name in inputs), activation=activation)

    for wrong in ("silu", "gelu", "", None, 2):
        with pytest.raises(ValueError, match=rf"^{operator}: activation must be 'relu' or 'relu2'.*, got {wrong!r}$"):
            call(wrong)
    with pytest.raises(ValueError, match=rf"^{operator}: .* got 'fatrelu': FATReLU is activation='relu' with a threshold$"):
        call("fatrelu")


def test_what_needs_a_gate():
    arrays, bias = _arrays(), np.ones(D_FF, DTYPES["bfloat16"])
    x, w_up, w_down_t = (arrays[name] for name in ("x", "w_up", "w_down_t"))
    for operator, call in [
        ("ffn_12", lambda **o: psc.ffn_12(x, w_up, **o)),
        ("sparse_ffn", lambda **o: psc.sparse_ffn(x, None, w_up, w_down_t, **o)),
        ("SparseFFN", lambda **o: psc.SparseFFN(None, w_up, w_down_t, **o)),
        ("warmup", lambda **o: psc.warmup(D_MODEL, D_FF, gated=False, **o)),
    ]:
        with pytest.raises(ValueError, match=rf"^{operator}: activation must be .* got 'drelu': dReLU needs a gate$"):
            call(activation="drelu")
        if "FFN" in operator.upper() and operator != "ffn_12":
            with pytest.raises(ValueError, match=rf"^{operator}: gate_bias without a gate: .* bias of up_proj is up_bias$"):
                call(gate_bias=bias)
    with pytest.raises(TypeError, match=r"^sparse_ffn: w_up must be a CuPy array.* got builtins\.NoneType"):
        psc.sparse_ffn(x, None, None, w_down_t)


@pytest.mark.parametrize("operator", ["ffn_4", "sparse_ffn", "SparseFFN"])
def test_what_a_norm_adds(operator):
    arrays, inputs = _arrays(), INPUTS.get(operator, ("w_gate", "w_up", "w_down_t"))
    norm = np.ones(D_FF, DTYPES["bfloat16"])

    def call(**options):
        return getattr(psc, operator)(*(arrays[name] for name in inputs), **options)

    with pytest.raises(ValueError, match=rf"^{operator}: norm_eps=1e-06 without a norm: pass norm_weight too, or leave"):
        call(norm_eps=1e-6)
    for wrong in (-1e-9, float("nan"), float("inf"), 1e39, 10**400):
        with pytest.raises(ValueError, match=rf"^{operator}: norm_eps must be finite as float32 and >= 0, got"):
            call(norm_weight=norm, norm_eps=wrong)
    for wrong in ("1e-6", None, np.zeros(1)):
        with pytest.raises(TypeError, match=rf"^{operator}: norm_eps must be a Python number, got \w+: pass a float"):
            call(norm_weight=norm, norm_eps=wrong)
    for right in (0, 1e-6, np.float32(1e-5), Fraction(1, 3)):
        call(norm_weight=norm, norm_eps=right)


def test_a_bias_needs_no_alignment():
    """It is read an element at a time."""
    metas = tuple(Meta(CUPY, shape, "bfloat16", 0, True) for shape in ((D_MODEL,), (D_FF, D_MODEL), (D_FF,)))
    signature, _ = arguments.with_extras(ops.FFN_1, (metas[2],))
    checked = check(signature, metas, None)
    assert checked.extras == ("gate_bias",) and checked.extra_places == (2,)
    _check_addresses(signature, checked, (16, 1024, 4098, 8192))
    with pytest.raises(ValueError, match="ffn_1: out must not share memory with bias"):
        _check_addresses(signature, checked, (16, 1024, 4098, 4098 + 2 * D_FF - 2))


@pytest.mark.parametrize("operator", ["ffn_12", "ffn_123", "ffn_23", "sparse_ffn", "SparseFFN"])
def test_thresholds(operator):
    arrays = _arrays()
    inputs = INPUTS.get(operator, ("w_gate", "w_up", "w_down_t"))

    def call(threshold):
        return getattr(psc, operator)(*(arrays[name] for name in inputs), threshold)

    for wrong in (-1e-9, float("nan"), float("inf"), 1e39, np.float32(-1), 10**400):
        with pytest.raises(ValueError, match=rf"{operator}: threshold must be finite as float32 and >= 0, got"):
            call(wrong)
    for wrong in ("0.1", None, True, np.bool_(True), np.zeros(1), arrays["x"]):
        with pytest.raises(TypeError, match=rf"{operator}: threshold must be a Python number, got .*(call|pass a) float"):
            call(wrong)
    with pytest.raises(TypeError, match=r"got '0\.1': pass a float"):
        call("0.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for right in (0, 0.5, np.float16(0.1), np.float32(0.5), np.float64(0.5), 1e-50, 3e38, Fraction(1, 3)):
            call(right)


def test_minus_zero_is_a_threshold_of_zero():
    assert np.copysign(1.0, check_threshold("ffn_23", -0.0)) == 1.0


def test_an_error_leaves_out_as_it_was():
    arrays, out = _arrays(), np.arange(D_FF).astype(DTYPES["bfloat16"])
    before = out.copy()
    with pytest.raises(ValueError, match="threshold"):
        psc.ffn_23(arrays["gate"], arrays["x"], arrays["w_up"], -1.0, out=out)
    np.testing.assert_array_equal(bits(out), bits(before))


def test_keywords_only():
    arrays = _arrays()
    with pytest.raises(TypeError, match="positional"):
        psc.ffn_1(arrays["x"], arrays["w_gate"], poisoned(D_FF, "bfloat16"))


def test_sparse_ffn_object_checks_weights_when_built():
    arrays = _arrays()
    with pytest.raises(ValueError, match=r"SparseFFN: w_down_t must have shape .*call pack_down"):
        psc.SparseFFN(arrays["w_gate"], arrays["w_up"], arrays["w_down"])
    ffn = psc.SparseFFN(arrays["w_gate"], arrays["w_up"], arrays["w_down_t"], 0.25)
    assert (ffn.d_model, ffn.d_ff, ffn.dtype, ffn.threshold) == (D_MODEL, D_FF, "bfloat16", 0.25)
    assert "threshold=0.25" in repr(ffn)
    with pytest.raises(ValueError, match=r"SparseFFN: x must have shape \(d_model,\) = \(16,\), got \(24,\)"):
        ffn(arrays["gate"])
    expected = psc.reference.sparse_ffn(arrays["x"], arrays["w_gate"], arrays["w_up"], arrays["w_down_t"], 0.25)
    np.testing.assert_array_equal(bits(ffn(arrays["x"])), bits(expected))


def _metas(**changes: dict) -> tuple[Meta, ...]:
    shapes = {"gate": (D_FF,), "x": (D_MODEL,), "w_up": (D_FF, D_MODEL)}
    return tuple(Meta(CUPY, shape, "bfloat16", 0, True)._replace(**changes.get(name, {})) for name, shape in shapes.items())


def test_two_gpus():
    assert check(ops.FFN_23, _metas(), None).device == 0
    with pytest.raises(ValueError, match="ffn_23: x must be on the GPU of gate, 0, got GPU 1: move one"):
        check(ops.FFN_23, _metas(x={"device": 1}), None)
    with pytest.raises(ValueError, match="ffn_23: out must be on the GPU of gate"):
        check(ops.FFN_23, _metas(), Meta(CUPY, (D_FF,), "bfloat16", 1, True))


def test_a_host_tensor_among_device_ones():
    with pytest.raises(TypeError, match=r"ffn_23: w_up must be on a CUDA GPU, got a CuPy array in host memory.*\.cuda\(\)"):
        check(ops.FFN_23, _metas(w_up={"device": -1}), None)
    assert check(ops.FFN_23, tuple(m._replace(family=NUMPY, device=-1) for m in _metas()), None).device == -1


def test_dims_beyond_int32():
    """And near them: kernels count rows past the last one, by up to a tile."""
    for d_ff in (2**31, 2**31 - 1, 2**31 - 2**17 + 1):
        with pytest.raises(ValueError, match=r"ffn_23: gate must have d_ff <= 2147352576, got shape"):
            check(ops.FFN_23, _metas(gate={"shape": (d_ff,)}, w_up={"shape": (d_ff, D_MODEL)}), None)
    largest = 2**31 - 2**17
    assert check(ops.FFN_23, _metas(gate={"shape": (largest,)}, w_up={"shape": (largest, D_MODEL)}), None).d_ff == largest
    with pytest.raises(ValueError, match=r"ffn_23: x must have d_model <= 1048576"):
        check(ops.FFN_23, _metas(x={"shape": (2**20 + 8,)}, w_up={"shape": (D_FF, 2**20 + 8)}), None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_ff", [1, 11008, 13824, 60000])
def test_scratch_holds_x1(d_ff, dtype):
    shapes = ((D_MODEL,), *3 * [(d_ff, D_MODEL)])
    checked = check(SPARSE_FFN, tuple(Meta(CUPY, shape, dtype, 0, True) for shape in shapes), None)
    assert d_ff * DTYPES[dtype].itemsize <= checked.scratch_bytes <= max(4096, 2 * d_ff * DTYPES[dtype].itemsize)


def test_views_of_foreign_arrays_live_until_they_are_launched_on(monkeypatch):
    """Where a library exports copies, nothing else keeps them."""
    import weakref

    class View:
        def __init__(self, array):
            self.array = array

    class Foreign(type(NUMPY)):
        name, is_foreign = "foreign", True

        def bring_in(self, array):
            view = View(array)
            views.append(weakref.ref(view))
            return view

        def describe(self, view):
            return super().describe(view.array)

        def address(self, view):
            return super().address(view.array)

    views, foreign, arrays = [], Foreign(), _arrays()
    monkeypatch.setattr(arguments, "_common_family", lambda signature, kinds: foreign)
    monkeypatch.setattr(foreign, "empty", lambda *given: View(NUMPY.empty(*given)))
    monkeypatch.setattr(arguments, "NUMPY", foreign)
    call = arguments.check_call(ops.FFN_1, (arrays["x"], arrays["w_gate"]), None)
    assert call.inputs and len(views) == 2 and all(view() is not None for view in views)


def test_alignment():
    checked = check(
        ops.FFN_4, (Meta(CUPY, (D_FF,), "bfloat16", 0, True), Meta(CUPY, (D_FF, D_MODEL), "bfloat16", 0, True)), None
    )
    assert isinstance(checked, Checked)
    _check_addresses(ops.FFN_4, checked, (16, 1024, 4096))
    for addresses, name in (((2, 1024, 4096), "x1"), ((16, 1032, 4096), "w_down_t"), ((16, 1024, 4098), "out")):
        with pytest.raises(ValueError, match=f"ffn_4: {name} must start at a multiple of 16 bytes, got address 0x.*: copy it"):
            _check_addresses(ops.FFN_4, checked, addresses)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 4100, "d_ff": 8}, "d_model a multiple of 8 for bfloat16, got d_model=4100"),
        ({"d_model": 4096, "d_ff": 0}, "d_ff must be at least 1"),
        ({"d_model": 0, "d_ff": 8}, "d_ff must be at least 1"),
        ({"d_model": 8, "d_ff": 8, "dtype": "float64"}, "dtype must be bfloat16, float16 or float32, got float64"),
        ({"d_model": 6, "d_ff": 8, "dtype": "float32"}, "multiple of 4 for float32"),
        ({"d_model": 8, "d_ff": 8, "dtype": "float16", "compressed": True}, "compressed weights are bfloat16, got float16"),
    ],
)
def test_warmup_refuses_what_no_kernel_supports(arguments, message):
    with pytest.raises(ValueError, match=f"warmup: .*{message}"):
        psc.warmup(**arguments)


def test_mixed_libraries():
    torch = pytest.importorskip("torch")
    arrays = _arrays()
    with pytest.raises(TypeError, match=r"ffn_1: all arrays .* one library, got x is numpy\.ndarray, w_gate is torch\.Tensor"):
        psc.ffn_1(arrays["x"], torch.zeros(D_FF, D_MODEL))
    with pytest.raises(TypeError, match=r"one library, got .*out is torch\.Tensor"):
        psc.ffn_1(arrays["x"], arrays["w_gate"], out=torch.zeros(D_FF))


def test_torch_tensors_in_host_memory():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"ffn_1: x must be on a CUDA GPU, got a torch array in host memory.*pass NumPy arrays"):
        psc.ffn_1(torch.zeros(D_MODEL), torch.zeros(D_FF, D_MODEL))


def test_dlpack_objects_in_host_memory():
    arrays = _arrays("float32")
    with pytest.raises(TypeError, match="Exporter in host memory: move it to a GPU, or pass NumPy arrays"):
        psc.ffn_1(Exporter(arrays["x"]), Exporter(arrays["w_gate"]))
    with pytest.raises(TypeError, match="one library"):
        psc.ffn_1(Exporter(arrays["x"]), arrays["w_gate"])


def test_import_is_free():
    """No CuPy, no torch, so no CUDA context and no compiler either."""
    heavy = "{'cupy', 'torch', 'rich', 'click'}"
    code = f"import sys, prosparse_cupy, prosparse_cupy.compat; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


WITHOUT_CUPY = """
import importlib.abc, sys
class NoCupy(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "cupy":
            raise ModuleNotFoundError("No module named 'cupy'", name="cupy")
sys.meta_path.insert(0, NoCupy())
import numpy as np
import prosparse_cupy as psc
w = np.ones((3, 4), np.float32)
print(psc.sparse_ffn(np.ones(4, np.float32), w, w, w), psc.models.LLAMA_2_7B.d_ff)
try:
    psc.warmup(4096, 11008)
except ImportError as error:
    print(error)
"""


def test_without_cupy():
    done = subprocess.run([sys.executable, "-c", WITHOUT_CUPY], capture_output=True, text=True, check=True)
    assert "[48. 48. 48. 48.] 11008" in done.stdout
    assert 'pip install "prosparse-cupy[cuda12x]"' in done.stdout and "prosparse-cupy[cuda13x]" in done.stdout


def test_signatures_name_the_public_functions():
    for signature in (ops.FFN_1, ops.FFN_12, ops.FFN_123, ops.FFN_23, ops.FFN_4, SPARSE_FFN, UNGATED_FFN, ops.PACK_DOWN):
        assert hasattr(psc, signature.operator)


@pytest.mark.parametrize(
    ("operator", "changes", "message"),
    [
        ("ffn_23", {"gate": (15,)}, r"w_up must have shape \(d_ff, d_model\) = \(15, 16\), got \(24, 16\): d_ff is 15 in gate"),
        ("ffn_23", {"gate": (15,), "x": (8,)}, r"got \(24, 16\): d_ff is 15 in gate and d_model is 8 in x"),
        ("ffn_1", {"x": (8,)}, r"w_gate must have shape \(d_ff, d_model\) with d_model = 8, got \(24, 16\): d_model is 8 in x"),
        ("sparse_ffn", {"w_up": (32, 16)}, r"w_up must have shape .* got \(32, 16\): d_ff is 24 in w_gate"),
    ],
)
def test_a_contradiction_names_both_arguments(operator, changes, message):
    arrays = _arrays()
    arrays |= {name: np.ones(shape, DTYPES["bfloat16"]) for name, shape in changes.items()}
    with pytest.raises(ValueError, match=message):
        _call(operator, arrays)


def test_an_out_that_contradicts_names_the_weights():
    arrays = _arrays()
    with pytest.raises(ValueError, match=r"out must have shape \(d_ff,\) = \(24,\), got \(25,\): d_ff is 24 in w_gate"):
        psc.ffn_1(arrays["x"], arrays["w_gate"], out=poisoned(25, "bfloat16"))


def test_a_sparse_ffn_whose_weights_have_changed_is_refused():
    arrays = _arrays()
    ws = [arrays[name].copy() for name in ("w_gate", "w_up", "w_down_t")]
    ffn = psc.SparseFFN(*ws)
    before = ffn(arrays["x"])
    for w in ws:
        w *= 2
    assert not np.array_equal(bits(ffn(arrays["x"])), bits(before)), "other values are used"
    for w in ws:
        w.resize((48, D_MODEL), refcheck=False)
    with pytest.raises(
        ValueError, match=r"SparseFFN: its weights have changed since it was built: .*\(16, 24, .* are \(16, 48"
    ):
        ffn(arrays["x"])


@every_operator
def test_an_out_that_is_read_only_is_refused_before_anything_is_computed(operator):
    arrays = _arrays()
    out = np.array(_call(operator, arrays))
    kept = out.copy()
    out.flags.writeable = False
    arrays = {name: array + array for name, array in arrays.items()}
    with pytest.raises(ValueError, match=rf"{operator}: out is a read-only array: pass one that may be written"):
        _call(operator, arrays, out=out)
    assert np.array_equal(bits(out), bits(kept))


@every_input
@pytest.mark.parametrize("kind", [np.asmatrix, np.ma.array])
def test_arrays_that_compute_in_their_own_way_are_refused(operator, name, kind):
    arrays = _arrays()
    arrays[name] = kind(arrays[name])
    with pytest.raises(TypeError, match=rf"{operator}: {name} must be .*, got numpy\.\S+, which computes in its own way"):
        _call(operator, arrays)
