"""Compressed weights as users have them: made, looked at, given to operators, copied, and refused."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from checks import DTYPES, bits, gate, token, weights
from gpu_arrays import OnCupy, OnTorch

import prosparse_cupy as psc
from prosparse_cupy import CompressedWeight, arguments, compress, ops
from prosparse_cupy.arguments import check_call
from prosparse_cupy.ffn import BOUND_FFN
from prosparse_cupy.formats import BF12_ROWS, BF12_SLICES, PLAIN
from prosparse_cupy.libraries import Family

D_MODEL, D_FF = 264, 101
layouts = pytest.mark.parametrize("layout", ["rows", "slices"])


def _weights(rng: np.random.Generator) -> np.ndarray:
    """Weights of which a few escape."""
    w = weights(D_FF, D_MODEL, "bfloat16").copy()
    w.view(np.uint16)[rng.random(w.shape) < 0.01] = 0x0001
    return w


@layouts
def test_a_weight_comes_back(layout):
    w = _weights(np.random.default_rng())
    before, packed = w.copy(), compress(w, layout=layout)
    assert (packed.shape, packed.dtype, packed.layout) == (w.shape, w.dtype, layout)
    np.testing.assert_array_equal(bits(packed.decompress()), bits(before))
    out = np.full_like(w, np.nan)
    assert packed.decompress(out=out) is out
    np.testing.assert_array_equal(bits(out), bits(before))
    np.testing.assert_array_equal(bits(w), bits(before))
    assert packed.nbytes == sum(a.nbytes for a in packed.arrays) and packed.ratio == packed.nbytes / w.nbytes
    assert 0 < packed.escapes == len(packed.arrays[-1]) <= w.size / 8
    assert f"{packed.escapes} escapes" in repr(packed) and f"{D_FF} x {D_MODEL}, {layout}" in repr(packed)


def test_normal_weights_take_three_quarters():
    packed = compress(weights(4000, 1024, "bfloat16"))
    assert 0.75 < packed.ratio < 0.755


@layouts
def test_nothing_that_escapes(layout):
    w = np.ones((3, 16), DTYPES["bfloat16"])
    packed = compress(w, layout=layout)
    assert packed.escapes == 0 and len(packed.arrays[-1]) == 1, "kernels get an address"
    np.testing.assert_array_equal(packed.decompress(), w)


@layouts
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_and_pickles(layout, duplicate):
    w = _weights(np.random.default_rng())
    other = duplicate(compress(w, layout=layout))
    assert other.layout == layout and other.format is BF12_ROWS, "whose slices are narrower than a unit"
    np.testing.assert_array_equal(bits(other.decompress()), bits(w))


def test_rows_are_a_weight_of_their_own():
    w = weights(24, 64, "bfloat16")
    part = compress(w).rows(4, 20)
    assert part.shape == (16, 64)
    np.testing.assert_array_equal(bits(part.decompress()), bits(w[4:20]))
    np.testing.assert_array_equal(bits(part.arrays[1]), bits(compress(w).arrays[1][4:20]))


def test_slices_of_wide_matrices_lie_in_units():
    w = weights(20, 2680, "bfloat16")
    packed = {layout: compress(w, layout=layout) for layout in ("rows", "slices")}
    assert [p.format for p in packed.values()] == [BF12_ROWS, BF12_SLICES]
    for p in packed.values():
        np.testing.assert_array_equal(bits(pickle.loads(pickle.dumps(p)).decompress()), bits(w))


def test_torch_tensors_stay_torch_tensors():
    torch = pytest.importorskip("torch")
    w = torch.from_numpy(_weights(np.random.default_rng()).view(np.int16)).view(torch.bfloat16)
    packed = compress(w)
    assert all(type(a) is torch.Tensor for a in packed.arrays) and packed.dtype is torch.bfloat16
    assert torch.equal(packed.decompress().view(torch.int16), w.view(torch.int16))
    out = torch.empty_like(w)
    assert packed.decompress(out=out) is out and torch.equal(out.view(torch.int16), w.view(torch.int16))
    torch.save(packed.arrays, __import__("io").BytesIO())


@pytest.mark.parametrize(
    ("w", "error", "message"),
    [
        (np.ones((4, 16), np.float16), TypeError, "w must be bfloat16, got float16: .* without loss"),
        (np.ones((4, 16), np.float32), TypeError, "w must be bfloat16, got float32"),
        (np.ones(16, DTYPES["bfloat16"]), ValueError, r"must have shape \(d_ff, d_model\), at most .* got \(16,\)"),
        (np.ones((4, 12), DTYPES["bfloat16"]), ValueError, r"d_model a multiple of 8, got \(4, 12\)"),
        (np.ones((0, 16), DTYPES["bfloat16"]), ValueError, r"got \(0, 16\)"),
        (np.ones((16, 16), DTYPES["bfloat16"]).T[:, :8], ValueError, "must be C-contiguous, got a strided view"),
        ([[1.0]], TypeError, "w must be a NumPy or CuPy array or a torch tensor, got builtins.list"),
    ],
)
def test_what_cannot_be_compressed_is_refused(w, error, message):
    with pytest.raises(error, match=f"compress: .*{message}"):
        compress(w)


def test_tensors_without_memory_are_refused():
    torch = pytest.importorskip("torch")
    w = torch.ones((4, 16), dtype=torch.bfloat16)
    for without, what in ((w.to("meta"), "a tensor without memory"), (w.to_sparse(), "a tensor of layout torch.sparse_coo")):
        with pytest.raises(TypeError, match=f"compress: w must be a plain array in memory, got {what}"):
            compress(without)


def test_a_layout_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match='layout must be "rows" or "slices", got \'columns\''):
        compress(np.ones((4, 16), DTYPES["bfloat16"]), layout="columns")


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (np.ones((D_FF, 8), DTYPES["bfloat16"]), ValueError, r"got \(\(101, 8\), 'bfloat16'"),
        (np.ones((D_FF, D_MODEL), np.float16), ValueError, "got .*'float16'"),
        (np.ones((D_MODEL, D_FF), DTYPES["bfloat16"]).T, ValueError, "C-contiguous.*False"),
        ([1.0], TypeError, "out must be a NumPy array, as the compressed one is, got list"),
    ],
)
def test_a_wrong_out_is_refused(out, error, message):
    with pytest.raises(error, match=message):
        compress(_weights(np.random.default_rng())).decompress(out=out)


@layouts
def test_what_is_compressed_here_fits(layout):
    for d_model in (8, D_MODEL, 2680):
        assert compress(weights(20, d_model, "bfloat16"), layout=layout).misfit == ""


@layouts
@pytest.mark.parametrize("d_model", [8, D_MODEL, 2680])
def test_chunks_that_escape_to_nowhere_are_counted(layout, d_model):
    """Also in the words that fill the last unit of a row, which kernels read too."""
    w = weights(20, d_model, "bfloat16").copy()
    w[:2] = 2.0**-100
    packed = compress(w, layout=layout)
    assert packed.strays() == 0 < packed.escapes
    words = [a.view(np.uint32) for a in packed.arrays[:-1]]
    if len(words) == 2:  # apart: the low words of all chunks, and the high ones
        low0, high = words[0][-1, -1, :1], words[1][-1, -1:]
    else:  # units of four chunks, whose vector 2 is low0, low1 and high of the last, and the high word of another
        low0, high = words[0][-1, -1, 8:9], words[0][-1, -1, 10:11]
        assert d_model // 8 % 4, "the last chunk of a row only fills it"
    for place, strays in ((packed.escapes - 1, 0), (packed.escapes, 1), (1 << 31, 1), (0xFFFFFFFF, 1)):
        low0[0], high[0] = place, 0x88888888
        assert packed.strays() == strays, place


def test_a_weight_without_escapes_has_no_place_for_one():
    packed = compress(np.ones((3, 16), DTYPES["bfloat16"]))
    packed.arrays[1].view(np.uint32)[0, 0] = 0x88888888
    assert packed.escapes == 0 and packed.strays() == 1


@layouts
def test_the_reference_takes_them(layout):
    rng = np.random.default_rng()
    w_gate, w_up, w_down_t = (_weights(rng) for _ in range(3))
    x, g = token(D_MODEL, "bfloat16", rng), gate(D_FF, "bfloat16", 0.5, rng)
    pack = lambda w: compress(w, layout=layout)  # noqa: E731
    for plain, packed in (
        (psc.ffn_1(x, w_gate), psc.ffn_1(x, pack(w_gate))),
        (psc.ffn_23(g, x, w_up, 0.1), psc.ffn_23(g, x, pack(w_up), 0.1)),
        (psc.ffn_123(x, w_gate, w_up), psc.ffn_123(x, pack(w_gate), w_up)),
        (psc.ffn_4(g, w_down_t), psc.ffn_4(g, pack(w_down_t))),
        (psc.sparse_ffn(x, w_gate, w_up, w_down_t), psc.sparse_ffn(x, w_gate, pack(w_up), pack(w_down_t))),
        (psc.SparseFFN(w_gate, w_up, w_down_t)(x), psc.SparseFFN(pack(w_gate), w_up, pack(w_down_t))(x)),
    ):
        np.testing.assert_array_equal(bits(packed), bits(plain))
    bound = pickle.loads(pickle.dumps(psc.SparseFFN(pack(w_gate), w_up, w_down_t, 0.1)))
    np.testing.assert_array_equal(bits(bound(x)), bits(psc.sparse_ffn(x, w_gate, w_up, w_down_t, 0.1)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p, w, x: psc.ffn_1(p, w), TypeError, "ffn_1: x must be an array, got a CompressedWeight: decompress"),
        (lambda p, w, x: psc.ffn_4(x, w, out=p), TypeError, "ffn_4: out must be an array, got a CompressedWeight"),
        (lambda p, w, x: psc.pack_down(p), TypeError, "pack_down: w_down must be an array, got a CompressedWeight"),
        (
            lambda p, w, x: psc.ffn_1(x.astype(np.float32), p),
            TypeError,
            "w_gate must have the dtype of x, float32, got bfloat16",
        ),
        (lambda p, w, x: psc.ffn_1(x[:16], p), ValueError, r"w_gate must have shape .*, got \(101, 264\)"),
        (lambda p, w, x: psc.ffn_123(x, p, w[:5]), ValueError, "w_up must have shape .*d_ff is 101 in w_gate"),
    ],
)
def test_what_does_not_fit_is_refused(call, error, message):
    rng = np.random.default_rng()
    w = _weights(rng)
    with pytest.raises(error, match=message):
        call(compress(w), w, token(D_MODEL, "bfloat16", rng))


def test_libraries_are_not_mixed():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng()
    packed = compress(_weights(rng))
    with pytest.raises(TypeError, match="all arrays of a call must come from one library, got x is torch"):
        psc.ffn_1(torch.ones(D_MODEL, dtype=torch.bfloat16), packed)


# What kernels get, on arrays that are only facts


class _Array:
    def __init__(self, address: int, *shape: int, dtype: str = "bfloat16", nbytes: int = 0) -> None:
        self.address, self.shape, self.dtype, self.nbytes = address, shape, dtype, nbytes


class _Facts(Family):
    name = "facts"

    def describe(self, array):
        return array.shape, array.dtype, 0, True

    def address(self, array):
        return array.address

    def empty(self, shape, dtype, device):
        return _Array(0x900000, *shape)


@pytest.fixture
def family(monkeypatch):
    facts = _Facts()
    monkeypatch.setattr(arguments, "_common_family", lambda signature, kinds: facts)
    monkeypatch.setattr("prosparse_cupy.compressed.family_of", lambda kind: facts)
    monkeypatch.setattr(arguments, "family_of", lambda kind: facts)
    return facts


def _on_gpu(first: int, layout: str) -> CompressedWeight:
    from prosparse_cupy.bf12 import Packed

    count = 2 if layout == "rows" else 1
    arrays = [_Array(first + 0x1000 * i, 16, dtype="int32", nbytes=0x800) for i in range(count + 1)]
    arrays[-1].dtype = "bfloat16"
    return CompressedWeight((24, 4096), layout, Packed(tuple(arrays[:count]), arrays[count], base=7), 3)


def test_a_kernel_gets_the_addresses_of_a_weight_and_its_number(family):
    gate_, down = _on_gpu(0x10000, "rows"), _on_gpu(0x30000, "slices")
    up = _Array(0x20000, 24, 4096)
    call = check_call(psc.ffn.SPARSE_FFN, (_Array(0x5000, 4096), gate_, up, down), None)
    number = 7 | 1 << 32
    gates, downs = [0x10000, 0x11000, 0x12000, number], [0x30000, 0x31000, number]
    assert call.inputs == [0x5000, *gates, 0x20000, *downs] and call.output == 0x900000
    assert dict(call.checked.formats) == {"W_GATE": BF12_ROWS, "W_UP": PLAIN, "W_DOWN": BF12_SLICES}
    assert call.checked.down_pointers == len(downs)
    weights_ = arguments.BoundWeights(BOUND_FFN, (gate_, up, down))
    for _ in range(2):  # checked, and known
        bound = weights_.call(_Array(0x5000, 4096), None)
        assert bound.inputs == [*gates, 0x20000, *downs, 0x5000] and bound.checked.formats == call.checked.formats
    assert len(weights_._known) == 1
    plain = check_call(psc.ffn.SPARSE_FFN, (_Array(0x5000, 4096), *3 * [up]), None)
    assert plain.checked.down_pointers == 1 and {f for _, f in plain.checked.formats} == {PLAIN}


def test_out_may_not_share_memory_with_any_part(family):
    for offset in (0, 0x1000, 0x2000):
        with pytest.raises(ValueError, match="out must not share memory with w_gate"):
            check_call(ops.FFN_1, (_Array(0x5000, 4096), _on_gpu(0x10000, "rows")), _Array(0x10000 + offset, 24))
    check_call(ops.FFN_1, (_Array(0x5000, 4096), _on_gpu(0x10000, "rows")), _Array(0x20000, 24))


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        (0x5008, ValueError, "out must start at a multiple of 16 bytes, got address 0x5008"),
        (0, TypeError, "plain array in memory"),
    ],
)
def test_kernels_write_no_weight_where_they_cannot(family, monkeypatch, address, error, message):
    monkeypatch.setattr("prosparse_cupy.compressed.decompression_of", lambda *_: pytest.fail("launched"))
    with pytest.raises(error, match=message):
        _on_gpu(0x10000, "rows").decompress(out=_Array(address, 24, 4096))


# On a GPU

LIBRARIES = [OnCupy, OnTorch]


@pytest.mark.gpu
@layouts
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("d_model", "d_ff"), [(4096, 11008), (1536, 3840), (264, 101)])
def test_operators_give_the_bits_of_plain_weights(library, layout, d_model, d_ff):
    on, rng = library(), np.random.default_rng()
    host = [weights(d_ff, d_model, "bfloat16").copy() for _ in range(3)]
    for w in host:
        w.view(np.uint16)[rng.random(w.shape) < 1e-4] = 0x0001
    x, g = on.put(token(d_model, "bfloat16", rng)), on.put(gate(d_ff, "bfloat16", 0.8, rng))
    w_gate, w_up, w_down_t = map(on.put, host)
    p_gate, p_up, p_down = (compress(w, layout=layout) for w in (w_gate, w_up, w_down_t))
    for packed, w in zip((p_gate, p_up, p_down), host, strict=True):
        np.testing.assert_array_equal(bits(on.get(packed.decompress())), bits(w))
    for plain, packed in (
        (psc.ffn_1(x, w_gate), psc.ffn_1(x, p_gate)),
        (psc.ffn_23(g, x, w_up, 0.1), psc.ffn_23(g, x, p_up, 0.1)),
        (psc.ffn_123(x, w_gate, w_up, 0.1), psc.ffn_123(x, p_gate, p_up, 0.1)),
        (psc.ffn_4(g, w_down_t), psc.ffn_4(g, p_down)),
        (psc.sparse_ffn(x, w_gate, w_up, w_down_t, 0.1), psc.sparse_ffn(x, p_gate, w_up, p_down, 0.1)),
        (psc.SparseFFN(w_gate, w_up, w_down_t)(x), psc.SparseFFN(p_gate, p_up, p_down)(x)),
        (psc.ffn_1(x, w_gate, specialize=False), psc.ffn_1(x, p_gate, specialize=False)),
        (psc.ffn_12(x, w_up, 0.1, activation="relu2"), psc.ffn_12(x, p_up, 0.1, activation="relu2")),
        (psc.ffn_23(g, x, w_up, activation="drelu", bias=g), psc.ffn_23(g, x, p_up, activation="drelu", bias=g)),
        (psc.ffn_4(g, w_down_t, bias=x, norm_weight=g), psc.ffn_4(g, p_down, bias=x, norm_weight=g)),
        (psc.SparseFFN(None, w_up, w_down_t, norm_weight=g)(x), psc.SparseFFN(None, p_up, p_down, norm_weight=g)(x)),
    ):
        np.testing.assert_array_equal(bits(on.get(packed)), bits(on.get(plain)))
