"""`torch.ops.prosparse.attend` and its kernel: attention of new tokens over static caches.

The kernel itself also runs here without a GPU, on the host under AddressSanitizer and UBSan, as in test_host_kernels.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from checks import DTYPES, bits, ulp
from test_compile import ARCHITECTURES, compile_for, compiler_options, nvrtc

from prosparse_cupy.attention import Attention, attend_plan
from prosparse_cupy.compiler import source

torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
from torch.library import opcheck  # noqa: E402
from torch_devices import DEVICES  # noqa: E402

from prosparse_cupy.torch.attention import attention_of  # noqa: E402
from prosparse_cupy.torch.ops import as_numpy, from_numpy  # noqa: E402


class Case(NamedTuple):
    """An attention with arrays in NumPy."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    position: int
    window: int
    scale: float

    @property
    def first(self) -> int:
        return max(0, self.position + 1 - self.window) if self.window else 0


# Heads of the query, of keys, and elements of a head: one, several and all heads of a query share keys.
SHAPES = [
    *(
        (4, 2, 16),
        (4, 4, 32),
        (8, 1, 64),
        (6, 2, 80),
        (3, 3, 96),
        (8, 2, 128),
        (14, 2, 128),
        (4, 1, 256),
        (1, 1, 8),
        (40, 8, 24),
    ),
]
# Position, window and capacity: the first, the second, the edges of a window, and the last of the cache.
PLACES = [
    *((0, 0, 1), (0, 3, 8), (1, 0, 2), (1, 1, 8), (5, 6, 16), (6, 6, 16), (5, 5, 16), (4, 5, 16), (63, 0, 64), (63, 1, 64)),
    *((130, 64, 131), (299, 0, 300), (299, 300, 512), (299, 299, 512)),
]


def _case(shape: tuple[int, int, int], place: tuple[int, int, int], dtype: str, seed: int = 0) -> Case:
    """With NaN at every position that must not be looked at: behind `position`, there, and outside the window."""
    heads, kv_heads, head_dim = shape
    position, window, capacity = place
    rng = np.random.default_rng([seed, *shape, *place])

    def normal(*dims: int) -> np.ndarray:
        return rng.standard_normal(dims, dtype=np.float32).astype(DTYPES[dtype])

    q, k, v = 2 * normal(heads, head_dim), normal(kv_heads, head_dim), normal(kv_heads, head_dim)
    keys, values = (normal(kv_heads, capacity, head_dim) for _ in range(2))
    case = Case(q, k, v, keys, values, position, window, 1.5 * head_dim**-0.5)
    for cache in (keys, values):
        cache[:, : case.first] = np.nan
        cache[:, position:] = np.nan
    return case


def _exact(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The attention in float64, and how far a float32 computation with one rounding may be from it.

    A score is a sum of head_dim products, so it is off by at most (head_dim + 4) * 2**-24 of the sum of their magnitudes,
    scaled. A weight is off by that much of itself, by exp's own error, and once more for each of up to n times that a running
    softmax is scaled again. Numerator and denominator are sums of n weights, hence twice, and n additions each.
    """
    q, keys, values = (a.astype(np.float64) for a in (case.q, case.keys, case.values))
    stop, (heads, head_dim), group = case.position + 1, q.shape, len(q) // len(keys)
    keys[:, case.position], values[:, case.position] = case.k.astype(np.float64), case.v.astype(np.float64)
    exact, bound = np.empty_like(q), np.empty_like(q)
    for h in range(heads):
        seen, read = keys[h // group, case.first : stop], values[h // group, case.first : stop]
        scores = case.scale * (seen @ q[h])
        size = case.scale * (np.abs(seen) @ np.abs(q[h])).max()
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        exact[h] = weights @ read
        bound[h] = 2.0**-24 * 2 * ((head_dim + 4) * size + 4 * len(read) + 16) * (weights @ np.abs(read))
    return exact, bound + ulp(exact, case.q.dtype)


def _assert_attends(out: np.ndarray, case: Case) -> None:
    exact, bound = _exact(case)
    error = np.abs(out.astype(np.float64) - exact)
    assert np.all(error <= bound), f"error {error.max()}, bound {bound.flat[error.argmax()]}"


def _tensors(case: Case, device: str = "cpu") -> list[Any]:
    arrays = [from_numpy(a.copy()).to(device) for a in case[:5]]
    words = attention_of(arrays[0], arrays[3]).scratch_words
    position = torch.tensor([case.position], device=device)
    return [*arrays, position, torch.zeros(words, dtype=torch.int32, device=device), case.scale, case.window]


def _attend(*arguments: Any) -> Any:
    return torch.ops.prosparse.attend(*arguments)


def _numpy(tensor: Any) -> np.ndarray:
    return as_numpy(tensor.cpu())


@pytest.mark.quick
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, device):
    for place in PLACES:
        case = _case(shape, place, dtype)
        out = _attend(*_tensors(case, device))
        assert out.dtype == getattr(torch, dtype) and out.device.type == device and out.is_contiguous()
        _assert_attends(_numpy(out), case)


@pytest.mark.quick
def test_the_oracle_sees_a_wrong_position():
    """One token more or less, another head's keys, a forgotten scale: each is far outside the bound."""
    case = _case((4, 2, 16), (40, 9, 64), "bfloat16")
    right = _numpy(_attend(*_tensors(case)))
    _assert_attends(right, case)
    shown = case._replace(keys=np.nan_to_num(case.keys, nan=0.5), values=np.nan_to_num(case.values, nan=0.5))
    for wrong in (
        shown._replace(window=10),
        shown._replace(window=8),
        shown._replace(window=0),
        shown._replace(scale=1.0),
        shown._replace(k=case.v),
        shown._replace(keys=shown.keys[::-1]),
    ):
        with pytest.raises(AssertionError, match="error"):
            _assert_attends(_numpy(_attend(*_tensors(wrong))), case)


@pytest.mark.quick
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_numbers_come_out_to_the_bit(dtype, device):
    """Equal scores weigh equally, and a mean of 64 small whole numbers is a number of any of the dtypes."""
    case = _case((8, 2, 32), (63, 0, 100), dtype)
    rng = np.random.default_rng(0)
    whole = (64 * rng.integers(-1, 2, (2, 64, 32))).astype(case.q.dtype)
    values, v = case.values.copy(), whole[:, 63]
    values[:, :63] = whole[:, :63]
    case = case._replace(q=np.zeros_like(case.q), v=v, values=values)
    expected = np.repeat(whole.astype(np.float64).mean(axis=1), 4, axis=0)
    np.testing.assert_array_equal(_numpy(_attend(*_tensors(case, device))).astype(np.float64), expected)


@pytest.mark.quick
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_any_size(dtype, device):
    """Weights of 1 and 0: nothing overflows, and what a large score hides is not there."""
    case = _case((4, 2, 64), (200, 0, 256), dtype)
    keys = np.nan_to_num(case.keys, nan=0.0)
    keys[:, 77] = 30 * case.q[::2]
    for sign in (1, -1):
        huge = case._replace(q=(sign * 10 * case.q).astype(case.q.dtype), keys=keys, scale=1.0)
        out = _numpy(_attend(*_tensors(huge, device)))
        assert np.isfinite(out.astype(np.float32)).all()
        _assert_attends(out, huge)
    np.testing.assert_array_equal(  # of the heads whose query the key is
        bits(_numpy(_attend(*_tensors(huge._replace(q=10 * case.q), device)))[::2]), bits(case.values[:, 77])
    )


@pytest.mark.quick
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_key_and_the_value_are_stored_and_nothing_else_changes(dtype, place, device):
    case = _case((6, 2, 32), place, dtype)
    arguments = _tensors(case, device)
    _attend(*arguments)
    expected = [case.q, case.k, case.v, case.keys.copy(), case.values.copy()]
    expected[3][:, case.position], expected[4][:, case.position] = case.k, case.v
    for found, wanted in zip(arguments, expected, strict=False):
        np.testing.assert_array_equal(bits(_numpy(found)), bits(wanted))
    assert int(arguments[5]) == case.position


@pytest.mark.quick
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_after_the_other_is_attention_over_all(device):
    """Tokens fed one by one, from an empty cache of NaN: the last ones see those before as they were given."""
    rng = np.random.default_rng(0)
    case = _case((4, 2, 32), (0, 0, 20), "float32")
    arguments = _tensors(case, device)
    arguments[3].fill_(float("nan"))
    arguments[4].fill_(float("nan"))
    keys, values = (rng.standard_normal((2, 20, 32), dtype=np.float32) for _ in range(2))
    for p in range(20):
        own = [torch.from_numpy(a[:, p].copy()).to(device) for a in (keys, values)]
        arguments[5].fill_(p)
        out = _attend(arguments[0], *own, *arguments[3:])
        _assert_attends(_numpy(out), case._replace(keys=keys, values=values, k=keys[:, p], v=values[:, p], position=p))


@pytest.mark.quick
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("position", [-1, 8, 1 << 40])
def test_a_position_outside_the_cache_stores_nothing(position, device):
    """Only the device knows it there, so the result says it, and the next call is right."""
    case = _case((4, 2, 16), (5, 0, 8), "float32")
    arguments, before = _tensors(case, device), _tensors(case, device)
    arguments[5].fill_(position)
    if device == "cpu":
        with pytest.raises(ValueError, match=f"attend: position {position} is not in a cache of 8"):
            _attend(*arguments)
    else:
        assert _attend(*arguments).isnan().all()
    for at in (3, 4, 6):
        assert torch.equal(arguments[at].nan_to_num(9), before[at].nan_to_num(9))
    arguments[5].fill_(5)
    _assert_attends(_numpy(_attend(*arguments)), case)


@pytest.mark.quick
def test_opcheck():
    for dtype in DTYPES:
        arguments = _tensors(_case((4, 2, 16), (5, 0, 8), dtype)._replace(keys=np.ones((2, 8, 16)).astype(DTYPES[dtype])))
        arguments[4].fill_(1)
        opcheck(torch.ops.prosparse.attend.default, tuple(arguments))


BAD = {
    "float64": (lambda a: [t.double() for t in a[:5]] + a[5:], "all must be bfloat16, float16 or float32, got .*float64"),
    "integers": (lambda a: [t.int() for t in a[:5]] + a[5:], "all must be bfloat16, float16 or float32, got .*int32"),
    "another dtype": (lambda a: [a[0], a[1].half(), *a[2:]], r"all must be .*'torch.float32', 'torch.float16'"),
    "a cache of another dtype": (lambda a: [*a[:4], a[4].half(), *a[5:]], "all must be .*'torch.float16'"),
    "heads": (lambda a: [a[0][:3].clone(), *a[1:]], "3 heads of the query do not share 2 heads of keys evenly"),
    "fewer heads": (lambda a: [a[0][:1].clone(), *a[1:]], "1 heads of the query do not share 2"),
    "no heads": (lambda a: [a[0][:0], *a[1:]], "0 heads of the query do not share 2"),
    "head_dim": (
        lambda a: [t[..., :6].clone() for t in a[:5]] + a[5:],
        "a head of 6 elements is not a multiple of 4 up to 256",
    ),
    "a long head": (
        lambda a: [torch.zeros(*t.shape[:-1], 260) for t in a[:5]] + a[5:],
        "a head of 260 elements is not a multiple of 4 up to 256",
    ),
    "k of another shape": (lambda a: [a[0], a[1][:1].clone(), *a[2:]], r"k must be .*shape \(2, 16\).*got \(1, 16\)"),
    "v of another shape": (lambda a: [*a[:2], a[2][:, :8].clone(), *a[3:]], r"v must be .*shape \(2, 16\).*got \(2, 8\)"),
    "k with a batch": (lambda a: [a[0], a[1][None], *a[2:]], r"k must be .*shape \(2, 16\).*got \(1, 2, 16\)"),
    "values shorter": (lambda a: [*a[:4], a[4][:, :7].clone(), *a[5:]], r"values must be .*\(2, 8, 16\).*got \(2, 7, 16\)"),
    "flat keys": (lambda a: [*a[:3], a[3].flatten(1), *a[4:]], r"keys must be .*got \(2, 128\)"),
    "strided q": (lambda a: [a[0].t().contiguous().t(), *a[1:]], "q must be contiguous"),
    "strided keys": (lambda a: [*a[:3], a[3].transpose(1, 2).contiguous().transpose(1, 2), *a[4:]], "keys must be contiguous"),
    "a slice of a cache": (lambda a: [*a[:4], torch.zeros(2, 9, 16)[:, :8], *a[5:]], "values must be contiguous"),
    "an empty cache": (lambda a: [*a[:3], a[3][:, :0], a[4][:, :0], *a[5:]], "a cache of 0 positions"),
    "position in 32 bits": (lambda a: [*a[:5], a[5].int(), *a[6:]], "position must be one int64 on cpu, got torch.int32"),
    "two positions": (lambda a: [*a[:5], torch.zeros(2, dtype=torch.int64), *a[6:]], "position must be one int64"),
    "no position": (lambda a: [*a[:5], torch.zeros(0, dtype=torch.int64), *a[6:]], "position must be one int64"),
    "scratch of floats": (
        lambda a: [*a[:6], a[6].float(), *a[7:]],
        r"scratch must be \d+ int32 on cpu, got \d+ of torch.float32",
    ),
    "scratch too short": (lambda a: [*a[:6], a[6][:-1], *a[7:]], r"scratch must be \d+ int32"),
    "strided scratch": (lambda a: [*a[:6], a[6].repeat(2)[::2], *a[7:]], r"scratch must be \d+ int32"),
}


@pytest.mark.quick
@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_refused_by_name(what):
    spoil, message = BAD[what]
    arguments = spoil(_tensors(_case((4, 2, 16), (5, 0, 8), "float32")))
    before = [t.clone() for t in arguments[:5]]
    with pytest.raises(ValueError, match=f"^attend: {message}"):
        _attend(*arguments)
    for one, other in zip(arguments, before, strict=False):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.gpu
def test_on_the_gpu_devices_and_alignment_are_refused_too(torch_gpu):
    given = _tensors(_case((4, 2, 16), (5, 0, 8), "float32"), "cuda")
    for at, name in enumerate(("q", "k", "v", "keys", "values", "position", "scratch")):
        elsewhere = [*given]
        elsewhere[at] = given[at].cpu()
        with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=name if at else ""):
            _attend(*elsewhere)
    for at in range(5):
        off = [*given]
        off[at] = torch.zeros(given[at].numel() + 1, device="cuda")[1:].view(given[at].shape)
        with pytest.raises(ValueError, match="must start at multiples of 16 bytes"):
            _attend(*off)
    torch.cuda.synchronize()


def _gpu_case(shape, place, dtype="bfloat16"):
    case = _case(shape, place, dtype)
    return case, _tensors(case, "cuda")


GPU_SHAPES = [(32, 32, 128), (32, 8, 128), (64, 8, 128), (28, 4, 128), (24, 8, 64), (8, 4, 256), (32, 32, 80), (36, 36, 64)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_real_shapes_on_the_gpu(shape, dtype, torch_gpu):
    """Right, the same twice, the same in a cache of another capacity, and the scratch's tickets zeros again."""
    for place in ((0, 0, 1), (31, 0, 32), (1000, 0, 1024), (4095, 0, 4096), (3000, 1024, 4096)):
        case, given = _gpu_case(shape, place, dtype)
        out = _attend(*given)
        _assert_attends(_numpy(out), case)
        tickets = given[6][attention_of(given[0], given[3]).partials :]
        assert tickets.numel() == attention_of(given[0], given[3]).blocks and not tickets.any()
        assert torch.equal(_attend(*given), out)
        larger = [torch.full((shape[1], place[2] + 777, shape[2]), float("nan"), device="cuda").to(out.dtype) for _ in range(2)]
        for one, other in zip(larger, given[3:5], strict=True):
            one[:, : place[2]] = other
        assert torch.equal(_attend(*given[:3], *larger, *given[5:]), out)
        assert not tickets.any()


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 40])
def test_in_a_graph_the_position_moves(window, torch_gpu):
    """What a graph replays at positions that move is what calls give, to the bit."""
    _, given = _gpu_case((32, 8, 128), (0, window, 512))
    steps = torch.randn(3, 300, 32, 128, device="cuda").to(given[0].dtype)
    apart, static = [t.clone() if isinstance(t, torch.Tensor) else t for t in given], given
    with torch.inference_mode():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            _attend(*static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = _attend(*static)
            static[5].add_(1)
        static[5].zero_()
        for p in range(300):
            for i, heads in enumerate((32, 8, 8)):
                static[i].copy_(steps[i, p, :heads])
                apart[i].copy_(steps[i, p, :heads])
            apart[5].fill_(p)
            graph.replay()
            assert torch.equal(replayed, _attend(*apart)), p
        assert torch.equal(static[3][:, :300], apart[3][:, :300]) and torch.equal(static[4][:, :300], apart[4][:, :300])
    assert int(static[5]) == 300 and not static[6][attention_of(given[0], given[3]).partials :].any()


@pytest.mark.gpu
def test_streams_with_scratch_of_their_own(torch_gpu):
    pairs = [_gpu_case((32, 8, 128), (3000, 0, 4096)), _gpu_case((32, 8, 128), (2777, 1000, 4096))]
    alone = [_attend(*given) for _, given in pairs]
    streams = [torch.cuda.Stream() for _ in pairs]
    torch.cuda.synchronize()
    found: list[list[Any]] = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(_attend(*pairs[i][1]))
    torch.cuda.synchronize()
    for i, (case, _) in enumerate(pairs):
        _assert_attends(_numpy(alone[i]), case)
        assert all(torch.equal(out, alone[i]) for out in found[i])


class Together(NamedTuple):
    """Several tokens in one launch, and each of them alone, by the number of its sequence and its own."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    positions: np.ndarray
    window: int
    scale: float

    def alone(self, s: int, t: int) -> Case:
        """The tokens of the sequence that come before this one are in the cache then."""
        keys, values = self.keys[s].copy(), self.values[s].copy()
        start = self.positions[s]
        for cache, new in ((keys, self.k), (values, self.v)):
            cache[:, start : start + t] = new[s, :t].swapaxes(0, 1)
        return Case(self.q[s, t], self.k[s, t], self.v[s, t], keys, values, int(start + t), self.window, self.scale)


def _together(
    shape: tuple[int, int, int], starts: tuple[int, ...], tokens: int, window: int, capacity: int, dtype: str
) -> Together:
    """With NaN wherever nothing may be read: in the caches behind each sequence's start."""
    heads, kv_heads, head_dim = shape
    rng = np.random.default_rng([*shape, *starts, tokens, window])

    def normal(*dims: int) -> np.ndarray:
        return rng.standard_normal(dims, dtype=np.float32).astype(DTYPES[dtype])

    leading = len(starts), tokens
    q, k, v = 2 * normal(*leading, heads, head_dim), normal(*leading, kv_heads, head_dim), normal(*leading, kv_heads, head_dim)
    keys, values = (normal(len(starts), kv_heads, capacity, head_dim) for _ in range(2))
    for s, start in enumerate(starts):
        keys[s, :, start:] = values[s, :, start:] = np.nan
    return Together(q, k, v, keys, values, np.array(starts), window, 1.5 * head_dim**-0.5)


# Shape, positions, tokens, window and capacity: sequences of one token, one sequence of several, and both.
TOGETHER = [
    ((4, 2, 16), (0, 5, 299), 1, 0, 300),
    ((8, 1, 64), (40, 40, 41, 0, 1, 2, 3, 130), 1, 7, 131),
    ((4, 1, 256), (90,), 2, 33, 92),
    ((3, 3, 80), (0,), 8, 0, 8),
    ((8, 2, 128), (130,), 8, 6, 140),
    ((6, 2, 24), (9, 70), 3, 0, 80),
]


def _tensors_of_several(case: Together, device: str) -> list[Any]:
    arrays = [from_numpy(a.copy()).to(device) for a in case[:6]]
    words = attention_of(arrays[0], arrays[3]).scratch_words
    return [*arrays, torch.zeros(words, dtype=torch.int32, device=device), case.scale, case.window]


def _stored(case: Together) -> list[np.ndarray]:
    """The caches as a launch must leave them."""
    caches = [case.keys.copy(), case.values.copy()]
    for cache, new in zip(caches, (case.k, case.v), strict=True):
        for s, start in enumerate(case.positions):
            cache[s, :, start : start + new.shape[1]] = new[s].swapaxes(0, 1)
    return caches


@pytest.mark.quick
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", TOGETHER, ids=str)
def test_tokens_together_have_the_bits_that_they_have_alone(setting, dtype, device):
    case = _together(*setting, dtype)
    arguments = _tensors_of_several(case, device)
    out = _attend(*arguments)
    assert out.shape == case.q.shape and out.is_contiguous()
    for s, t in np.ndindex(case.q.shape[:2]):
        one = case.alone(s, t)
        _assert_attends(_numpy(out[s, t]), one)
        np.testing.assert_array_equal(bits(_numpy(out[s, t])), bits(_numpy(_attend(*_tensors(one, device)))))
    for found, wanted in zip(arguments[3:5], _stored(case), strict=True):
        np.testing.assert_array_equal(bits(_numpy(found)), bits(wanted))
    assert arguments[5].tolist() == case.positions.tolist()
    attention = attention_of(arguments[0], arguments[3])
    assert not arguments[6][attention.partials :].any() and attention.tickets == attention.blocks * case.q[..., 0, 0].size


@pytest.mark.quick
@pytest.mark.parametrize("device", DEVICES)
def test_a_sequence_outside_its_cache_stores_nothing(device):
    """Others are what they are; of several tokens, those that still fit are stored on the GPU."""
    case = _together((4, 2, 16), (3, 8, 5), 1, 0, 8, "float32")
    if device == "cpu":
        with pytest.raises(ValueError, match="attend: position 8 is not in a cache of 8"):
            _attend(*_tensors_of_several(case, device))
        with pytest.raises(ValueError, match="attend: position 6 is not in a cache of 8 for 3 tokens"):
            _attend(*_tensors_of_several(_together((4, 2, 16), (6,), 3, 0, 8, "float32"), device))
        return
    arguments = _tensors_of_several(case, device)
    out = _numpy(_attend(*arguments))
    assert np.isnan(out[1]).all()
    for s in (0, 2):
        _assert_attends(out[s, 0], case.alone(s, 0))
    case = _together((4, 2, 16), (6,), 3, 0, 8, "float32")
    arguments = _tensors_of_several(case, device)
    out = _numpy(_attend(*arguments))
    assert np.isnan(out[0, 2]).all()
    for t in (0, 1):
        _assert_attends(out[0, t], case.alone(0, t))
    np.testing.assert_array_equal(_numpy(arguments[3])[0, :, 6:], case.k[0, :2].swapaxes(0, 1))


@pytest.mark.quick
def test_opcheck_of_several():
    case = _together((4, 2, 16), (0, 0), 2, 0, 2, "float32")
    arguments = _tensors_of_several(case._replace(keys=np.ones_like(case.keys), values=np.ones_like(case.values)), "cpu")
    opcheck(torch.ops.prosparse.attend.default, tuple(arguments))


BAD_OF_SEVERAL = {
    "too many": (lambda a: [*(t.repeat(1, 5, 1, 1) for t in a[:3]), *a[3:]], "2 sequences of 10 tokens are not 1 to 8 tokens"),
    "q of three dims": (lambda a: [a[0][0], *a[1:]], r"q must be \(heads, head_dim\), got \(2, 4, 16\)"),
    "one cache": (lambda a: [*a[:3], a[3][0], *a[4:]], r"keys must be \(sequences, kv_heads, capacity, head_dim\), got"),
    "k of one token": (lambda a: [a[0], a[1][:, :1].clone(), *a[2:]], r"k must be .*\(2, 2, 2, 16\).*got \(2, 1, 2, 16\)"),
    "values of a sequence": (lambda a: [*a[:4], a[4][:1].clone(), *a[5:]], r"values must be .*got \(1, 2, 8, 16\)"),
    "one position": (lambda a: [*a[:5], a[5][:1], *a[6:]], "position must be 2 int64 on cpu"),
    "strided positions": (lambda a: [*a[:5], a[5].repeat_interleave(2)[::2], *a[6:]], "position must be contiguous"),
    "scratch of one": (lambda a: [*a[:6], a[6][: len(a[6]) // 4], *a[7:]], r"scratch must be \d+ int32"),
}


@pytest.mark.quick
@pytest.mark.parametrize("what", BAD_OF_SEVERAL)
def test_what_does_not_fit_of_several_is_refused_by_name(what):
    spoil, message = BAD_OF_SEVERAL[what]
    with pytest.raises(ValueError, match=f"^attend: {message}"):
        _attend(*spoil(_tensors_of_several(_together((4, 2, 16), (5, 3), 2, 0, 8, "float32"), "cpu")))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_real_shapes_of_several_on_the_gpu(shape, dtype, torch_gpu):
    """Eight tokens over a long cache: each as alone, and again and again the same, whichever block comes first."""
    for starts, tokens, window in (((3000,), 8, 0), ((2999,), 8, 1024), ((3000, 0, 17, 4000, 1, 2000, 4088, 8), 1, 0)):
        case = _together(shape, starts, tokens, window, 4096, dtype)
        given = _tensors_of_several(case, "cuda")
        out = _attend(*given)
        for s, t in np.ndindex(case.q.shape[:2]):
            assert torch.equal(out[s, t], _attend(*_tensors(case.alone(s, t), "cuda"))), (starts, s, t)
        for _ in range(20):
            assert torch.equal(_attend(*given), out)
        assert not given[6][attention_of(given[0], given[3]).partials :].any()


# On the host: shape, place and dtype. Of 129 heads, each has one block for all its positions. Of 16 heads, eight read the same
# keys, and two blocks have four of these each.
HOST = [
    ((4, 2, 16), (40, 7, 41), "bfloat16"),
    ((8, 1, 64), (1, 1, 3), "float16"),
    ((3, 1, 80), (299, 0, 300), "bfloat16"),
    ((4, 1, 256), (90, 33, 91), "float32"),
    ((129, 129, 8), (9, 0, 10), "bfloat16"),
    ((16, 2, 8), (40, 0, 41), "float32"),
]


def _on_host(host, case: Case, dtype: str, left_in: int = 6, seed: int = 0, without: int = 0) -> np.ndarray:
    """What a launch leaves in one of its arguments, the output if nothing else is asked for.

    `without` so many of the blocks that share the positions of the same heads, as if these had not come yet.
    """
    attention = Attention(dtype, len(case.q), len(case.k), case.q.shape[1])
    poison, partials = np.full_like(case.q, np.nan), np.full(attention.partials, np.nan, np.float32)
    arrays: list[Any] = [*case[:5], np.array([case.position]), poison, partials, np.zeros(attention.blocks, np.int32)]
    starts = arrays[left_in]
    arrays[left_in] = None
    plan = attend_plan(attention, programmatic=False)
    plan = dataclasses.replace(plan, grid=(plan.grid[0] - without, *plan.grid[1:]))
    return host.run(plan, [*arrays, case.scale, case.window, case.keys.shape[1]], starts, seed=seed)


@pytest.mark.parametrize("setting", HOST, ids=str)
def test_the_kernel_on_the_host(setting, host):
    """Nothing is read or written outside the arrays."""
    case = _case(*setting)
    _assert_attends(_on_host(host, case, setting[2]), case)


def test_the_kernel_on_the_host_in_any_order(host):
    """Of threads and blocks. It stores what it should and nothing else, and the tickets end as zeros."""
    case, dtype = _case(*HOST[2]), HOST[2][2]
    one, other = (_on_host(host, case, dtype, seed=seed) for seed in (1, 2))
    np.testing.assert_array_equal(bits(one), bits(other))
    for at, (cache, own) in ((3, (case.keys, case.k)), (4, (case.values, case.v))):
        expected = cache.copy()
        expected[:, case.position] = own
        np.testing.assert_array_equal(bits(_on_host(host, case, dtype, left_in=at)), bits(expected))
    assert not _on_host(host, case, dtype, left_in=8).any()


@pytest.mark.parametrize("seed", [1, 2])
def test_on_the_host_nothing_is_added_up_before_the_last_block_has_come(host, seed):
    """On a GPU a block that came before it might write its sum of what was there after the last one's.

    Here the blocks run one after the other, and the last one's would be what remains; so one is left out, and until it comes
    the tickets count the others and the output is as it was.
    """
    case, dtype = _case(*HOST[-1]), HOST[-1][2]
    attention = Attention(dtype, len(case.q), len(case.k), case.q.shape[1])
    out = _on_host(host, case, dtype, seed=seed, without=1)
    np.testing.assert_array_equal(bits(out), bits(np.full_like(out, np.nan)))
    tickets = _on_host(host, case, dtype, left_in=8, seed=seed, without=1)
    assert tickets.tolist() == [attention.splits - 1] * attention.blocks and attention.splits > 2


@pytest.mark.parametrize("position", [-1, 300])
def test_on_the_host_a_position_outside_the_cache_stores_nothing(position, host):
    case, dtype = _case(*HOST[2])._replace(position=position), HOST[2][2]
    assert np.isnan(_on_host(host, case, dtype).astype(np.float32)).all()
    for at, cache in ((3, case.keys), (8, np.zeros(1, np.int32))):
        np.testing.assert_array_equal(bits(_on_host(host, case, dtype, left_in=at)), bits(cache))


def _several_on_host(host, case: Together, dtype: str, left_in: int = 6, **more: Any) -> np.ndarray:
    """As `_on_host`, of several tokens."""
    sequences, tokens, heads, head_dim = case.q.shape
    attention = Attention(dtype, heads, case.k.shape[2], head_dim, sequences, tokens)
    poison, partials = np.full_like(case.q, np.nan), np.full(attention.partials, np.nan, np.float32)
    arrays: list[Any] = [*case[:6], poison, partials, np.zeros(attention.tickets, np.int32)]
    starts = arrays[left_in]
    arrays[left_in] = None
    plan = attend_plan(attention, programmatic=False)
    return host.run(plan, [*arrays, case.scale, case.window, case.keys.shape[2]], starts, **more)


# As `TOGETHER`, and dtype. A launch of one token here has 32 or 64 blocks, which are seconds.
TOGETHER_ON_HOST = [
    ((1, 1, 8), (0, 5, 9), 1, 0, 10, "bfloat16"),
    ((2, 1, 16), (9,), 3, 4, 12, "float32"),
    ((8, 1, 8), (40,), 2, 0, 42, "float16"),
    ((1, 1, 8), (0, 6), 2, 0, 8, "bfloat16"),
]


@pytest.mark.parametrize("setting", TOGETHER_ON_HOST, ids=str)
def test_the_kernel_of_several_on_the_host(setting, host):
    """Under two orders of threads and blocks: the last token has the bits that the kernel of one token gives it."""
    case, dtype = _together(*setting), setting[-1]
    out, other = (_several_on_host(host, case, dtype, seed=seed) for seed in (1, 2))
    np.testing.assert_array_equal(bits(out), bits(other))
    for s, t in np.ndindex(case.q.shape[:2]):
        _assert_attends(out[s, t], case.alone(s, t))
    np.testing.assert_array_equal(bits(out[-1, -1]), bits(_on_host(host, case.alone(s, t), dtype)))
    at = 3 + TOGETHER_ON_HOST.index(setting) % 2
    np.testing.assert_array_equal(bits(_several_on_host(host, case, dtype, left_in=at)), bits(_stored(case)[at - 3]))


def test_on_the_host_tickets_of_several_end_as_zeros(host):
    assert not _several_on_host(host, _together(*TOGETHER_ON_HOST[3]), "bfloat16", left_in=8).any()


def test_on_the_host_tokens_behind_a_caches_end_store_nothing(host):
    case = _together((1, 1, 8), (6,), 3, 0, 8, "float32")
    out = _several_on_host(host, case, "float32")
    assert np.isnan(out[0, 2]).all() and np.isfinite(out[0, :2]).all()
    keys = _several_on_host(host, case, "float32", left_in=3)
    np.testing.assert_array_equal(keys[0, :, 6:], case.k[0, :2].swapaxes(0, 1))
    case = _together((1, 1, 8), (8, 3), 1, 0, 8, "float32")
    out = _several_on_host(host, case, "float32")
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


def test_a_new_token_that_is_read_from_the_cache_is_caught(host):
    """The launch's own tokens come from k and v: a block that looks for them in the cache may come before they are stored."""
    case, code = _together((1, 1, 8), (9,), 3, 0, 12, "float32"), source("attend")
    for right, wrong in (("? i >= start : i == p", "? i == p : i == p"), ("(i - start) * KV_HEADS", "token * KV_HEADS")):
        assert right in code
        code = code.replace(right, wrong)
    good = _several_on_host(host, case, "float32")
    found = (_several_on_host(host, case, "float32", seed=seed, code=code) for seed in range(4))
    assert any(not np.array_equal(bits(out), bits(good)) for out in found)


@pytest.mark.quick
def test_how_the_work_is_shared():
    """Every head is some block's, heads of a block read the same keys, and their sums fit in shared memory."""
    for dtype in DTYPES:
        for heads, kv_heads in ((1, 1), (32, 32), (32, 8), (28, 4), (40, 8), (64, 1), (14, 2), (300, 300), (1024, 1024)):
            for head_dim in (8, 64, 80, 128, 192, 256):
                a = Attention(dtype, heads, kv_heads, head_dim)
                assert not a.misfit and a.blocks * a.heads_of_block == heads
                assert (heads // kv_heads) % a.heads_of_block == 0 and a.splits >= 1
                assert 8 * a.heads_of_block * (head_dim + 2) * 4 < 48 * 1024, "more than a block has without asking"
                plan = attend_plan(a, programmatic=True)
                assert plan.programmatic and not plan.shared_bytes and not attend_plan(a, False).programmatic
                assert plan.grid == (a.splits, a.blocks, 1) and plan.block == (256, 1, 1) and len(plan.arguments) == 12
                assert a.scratch_words == heads * a.splits * (head_dim + 2) + a.blocks
                for sequences, tokens in ((1, 8), (8, 1), (2, 3)):
                    several = a._replace(sequences=sequences, tokens=tokens)
                    assert not several.misfit and several.splits == a.splits, "another order of sums"
                    assert attend_plan(several, True).grid == (a.splits * tokens, a.blocks, sequences)
                    assert several.scratch_words == sequences * tokens * a.scratch_words


USUAL = [
    *(("bfloat16", *shape) for shape in GPU_SHAPES),
    *((dtype, 32, 8, 128) for dtype in ("float16", "float32")),
    ("float32", 4, 1, 256),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills(architecture):
    for shape in (*USUAL, ("bfloat16", 32, 8, 128, 8, 1), ("bfloat16", 32, 32, 128, 1, 8), ("float32", 32, 8, 128, 1, 4)):
        _, report = compile_for(attend_plan(Attention(*shape), architecture >= 90), architecture)
        for what in ("spill stores", "spill loads", "stack frame"):
            assert int(re.search(rf"(\d+) bytes {what}", report)[1]) == 0, (shape, report)
        assert int(re.search(r"Used (\d+) registers", report)[1]) <= 65536 // 256, "a block does not fit a multiprocessor"
        assert int(re.search(r"(\d+) bytes smem", report)[1]) <= 48 * 1024
        assert "warning" not in report, report


@pytest.mark.quick
@pytest.mark.parametrize("shape", [("bfloat16", 32, 8, 128), ("float32", 4, 4, 64)], ids=str)
def test_reads_and_writes_come_after_the_wait(shape):
    """A predecessor may be writing until then, so nothing comes through the cache of what does not change; 16 bytes a time."""
    plan = attend_plan(Attention(*shape), True)
    program = nvrtc._NVRTCProgram(source("attend"), "attend.cu", method="ptx")
    text = program.compile((*compiler_options(plan), "-arch=compute_90", "--device-as-default-execution-space"), None)[
        0
    ].decode()
    before, waits, after = text.partition("griddepcontrol.wait")
    assert waits and not re.search(r"\b(ld|st|cp|atom)\.\S*global", before) and "ld.global.nc" not in text
    assert re.search(r"ld\.global\.v4\.u?[b]?32", after)


@pytest.mark.quick
def test_a_head_that_is_no_whole_vectors_does_not_compile():
    plan = attend_plan(Attention("bfloat16", 4, 2, 12), False)
    with pytest.raises(nvrtc.CompileException, match="a head must be whole 16-byte vectors"):
        compile_for(plan, 90)


@pytest.mark.quick
def test_ml_dtypes_round_as_torch_does():
    """The oracle's own numbers are the operator's: bfloat16 through NumPy and through torch."""
    a = np.random.default_rng(0).standard_normal(1000, dtype=np.float32)
    np.testing.assert_array_equal(bits(a.astype(ml_dtypes.bfloat16)), bits(as_numpy(torch.from_numpy(a).to(torch.bfloat16))))
