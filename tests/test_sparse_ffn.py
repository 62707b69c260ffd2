"""sparse_ffn and SparseFFN: the whole FFN, on the GPU and through the reference."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from checks import DTYPES, assert_no_worse_than_vendor, bits, norm_weight, poisoned, token, weights
from gpu_arrays import OnCupy, OnTorch, large_weights, vendor_mv

import prosparse_cupy as psc
from prosparse_cupy import ffn as ffn_module
from prosparse_cupy import launch, reference
from prosparse_cupy.problem import KERNELS, Problem
from prosparse_cupy.testing import synthetic

on = OnCupy()
SHAPES = [(4096, 11008), (5120, 13824), (1536, 3840), (4104, 1007), (264, 101)]
T = 0.01


def _layer(d_model: int, d_ff: int, dtype: str, sparsity: float, seed: int | None = None):
    return synthetic.layer(d_model, d_ff, DTYPES[dtype], sparsity, T, np.random.default_rng(seed))


def _on_gpu(layer: synthetic.Layer):
    return [on.put(a) for a in (layer.x, layer.w_gate, layer.w_up, layer.w_down.T.copy())]


def _random_ffn(d_model: int, d_ff: int, dtype: str, sparsity: float):
    """x, w_gate, w_up and w_down_t as tensors, with a hot-neuron mask of this sparsity."""
    rng, to = np.random.default_rng(), OnTorch()
    x = to.put(token(d_model, dtype, rng))
    w_gate, w_up, w_down_t = (large_weights(d_ff, d_model, dtype, seed) for seed in range(3))
    mask = synthetic.hot_mask(synthetic.popularity(d_ff, rng), sparsity, rng)
    target = to.put(synthetic.gate_of(mask, T, rng))
    along = x.float() / x.float().square().sum()
    w_gate = (w_gate.float() + (target - w_gate.float() @ x.float()).outer(along)).to(w_gate.dtype)
    return x, w_gate, w_up, w_down_t, mask


def _dense_ffn(x, w_gate, w_up, w_down_t):
    """The dense path, in the dtype of x."""
    gate = vendor_mv(w_gate, x)
    s = gate.where(gate >= T, gate.new_zeros(()))
    return vendor_mv(w_down_t.t().contiguous(), s * vendor_mv(w_up, x))


def _exact_ffn(x, w_gate, w_up, w_down_t, mask) -> np.ndarray:
    """Float64, rounded only where the operators round: after formulas 1 and 3."""
    gate = (w_gate.double() @ x.double()).to(x.dtype)
    np.testing.assert_array_equal((gate >= T).cpu().numpy(), mask)
    s = gate.double() * (gate >= T)
    x1 = (s * (w_up.double() @ x.double())).to(x.dtype)
    return (x1.double() @ w_down_t.double()).cpu().numpy()


@pytest.mark.gpu
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_model", "d_ff"), SHAPES)
def test_no_worse_than_the_vendor(d_model, d_ff, dtype, sparsity, torch):
    to = OnTorch()
    *arrays, mask = _random_ffn(d_model, d_ff, dtype, sparsity)
    exact, dense = _exact_ffn(*arrays, mask), _dense_ffn(*arrays)
    for specialize in (True, False):
        out = to.put(poisoned(d_model, dtype))
        assert psc.sparse_ffn(*arrays, T, out=out, specialize=specialize) is out
        first = to.get(out)
        assert_no_worse_than_vendor(first, to.get(dense), exact)
        ffn = psc.SparseFFN(*arrays[1:], T, specialize=specialize)
        for again in (ffn(arrays[0]), ffn(arrays[0][None])[0], psc.sparse_ffn(*arrays, T, specialize=specialize)):
            np.testing.assert_array_equal(bits(to.get(again)), bits(first))


# Of models with other formulas: Nemotron-H and Minitron without a gate, BitNet's norm, Mistral-sized TurboSparse.
OTHERS = [
    (2560, 18432, "bfloat16", "relu2", False, ()),
    (3072, 9216, "float16", "relu2", False, ("down_bias",)),
    (2560, 6912, "bfloat16", "relu2", True, ("norm_weight",)),
    (4096, 14336, "bfloat16", "drelu", True, ("up_bias", "down_bias")),
]


def _other_ffn(x, w_gate, w_up, w_down_t, activation: str, extras: dict, exact: bool):
    """The dense path of another formula in the dtype of x, or in float64, rounded only where the operators round."""
    import torch

    def wide(a):
        return a.double() if exact else a

    def mv(w, v):
        return w.double() @ v.double() if exact else vendor_mv(w, v)

    gate = wide(mv(w_gate, x).to(x.dtype))
    s = gate * (gate >= T)
    x1 = s.square() if activation == "relu2" else s
    if w_up is not None:
        up = mv(w_up, x) + wide(extras.get("up_bias", x.new_zeros(())))
        x1 = x1 * (torch.relu(up) if activation == "drelu" else up)
    x1 = wide(x1.to(x.dtype))
    if "norm_weight" in extras:
        long = x1 if exact else x1.float()
        x1 = wide((long * torch.rsqrt(long.square().mean() + 1e-5)).to(x1.dtype)) * wide(extras["norm_weight"])
    return mv(w_down_t.t().contiguous(), x1) + wide(extras.get("down_bias", x.new_zeros(())))


@pytest.mark.gpu
@pytest.mark.parametrize(("d_model", "d_ff", "dtype", "activation", "gated", "names"), OTHERS)
def test_other_formulas_are_no_worse_than_the_vendor(d_model, d_ff, dtype, activation, gated, names, torch):
    """And one call has the bits of its two halves, bound or not, with weights in 12 bits or not."""
    to, rng = OnTorch(), np.random.default_rng()
    x, w_gate, w_up, w_down_t, _ = _random_ffn(d_model, d_ff, dtype, 0.9)
    made = {
        "norm_weight": norm_weight(d_ff, dtype, rng),
        "up_bias": token(d_ff, dtype, rng),
        "down_bias": token(d_model, dtype, rng),
    }
    extras = {name: to.put(made[name]) for name in names}
    other = (x, w_gate, w_up if gated else None, w_down_t, activation, extras)
    exact, dense = _other_ffn(*other, exact=True), _other_ffn(*other, exact=False)
    ws = (w_gate, w_up, w_down_t) if gated else (None, w_gate, w_down_t)
    options = {"activation": activation, **extras, "norm_eps": 1e-5 if "norm_weight" in extras else 0.0}
    out = to.put(poisoned(d_model, dtype))
    assert psc.sparse_ffn(x, *ws, T, **options, out=out) is out
    first = to.get(out)
    assert_no_worse_than_vendor(first, to.get(dense), exact.cpu().numpy())
    if gated:
        x1 = psc.ffn_123(x, *ws[:2], T, activation=activation, up_bias=extras.get("up_bias"))
    else:
        x1 = psc.ffn_12(x, w_gate, T, activation=activation)
    norm = {"norm_weight": extras.get("norm_weight"), "norm_eps": options["norm_eps"]}
    again = [psc.ffn_4(x1, w_down_t, bias=extras.get("down_bias"), **norm)]
    again += [psc.SparseFFN(*ws, T, **options)(x), psc.SparseFFN(*ws, T, **options, specialize=False)(x[None])[0]]
    if dtype == "bfloat16":
        packed = [None if w is None else psc.compress(w, layout="slices" if w is w_down_t else "rows") for w in ws]
        again += [psc.SparseFFN(*packed, T, **options)(x), psc.sparse_ffn(x, *packed, T, **options)]
    for y in again:
        np.testing.assert_array_equal(bits(to.get(y)), bits(first))


@pytest.mark.gpu
def test_biases_that_change_under_a_sparse_ffn(torch):
    """Other values are used, and so is other memory; another shape is refused, and nothing is written."""
    to, rng = OnTorch(), np.random.default_rng()
    x, w = to.put(token(256, "bfloat16", rng)), to.put(weights(1000, 256, "bfloat16"))
    bias = torch.nn.Parameter(to.put(token(1000, "bfloat16", rng)), requires_grad=False)
    ffn = psc.SparseFFN(None, w, w, activation="relu2", up_bias=bias)
    before = ffn(x)
    bias.data = bias.data.clone()
    assert torch.equal(ffn(x), before), "elsewhere in memory, it is the same bias"
    bias.data.mul_(2)
    assert torch.equal(ffn(x), psc.sparse_ffn(x, None, w, w, activation="relu2", up_bias=bias)) and not torch.equal(
        ffn(x), before
    )
    bias.data = bias.data[:-8].clone()
    out = torch.full_like(x, float("nan"))
    with pytest.raises(ValueError, match=r"SparseFFN: up_bias must have shape \(d_ff,\) = \(1000,\), got \(992,\)"):
        ffn(x, out=out)
    assert bool(out.isnan().all())


@pytest.mark.gpu
def test_a_second_shape_after_the_first():
    """Arrays of another shape specialise by themselves, and a smaller FFN's scratch does not serve a larger one."""
    import cupy

    from prosparse_cupy.compiler import load

    shapes = [(256, 1000), (512, 11008), (640, 13824), (512, 11008), (256, 1000), (256, 60000)]
    layers = {shape: _layer(*shape, "bfloat16", 0.9, seed=shape[1]) for shape in set(shapes)}
    arrays = {shape: _on_gpu(layer) for shape, layer in layers.items()}
    alone = {}
    for shape, layer in layers.items():
        alone[shape] = on.get(psc.sparse_ffn(*arrays[shape], layer.threshold))
        assert_near_float64(alone[shape], layer)
    before = load.cache_info()
    outs = [(shape, psc.sparse_ffn(*arrays[shape], layers[shape].threshold)) for _ in range(20) for shape in shapes]
    cupy.cuda.Device().synchronize()
    for shape, out in outs:
        np.testing.assert_array_equal(bits(on.get(out)), bits(alone[shape]))
    assert load.cache_info().misses == before.misses


def assert_near_float64(out: np.ndarray, layer: synthetic.Layer) -> None:
    """Within bfloat16's reach of the reference: another shape's numbers are not."""
    exact = reference.sparse_ffn(layer.x, layer.w_gate, layer.w_up, layer.w_down.T, layer.threshold).astype(np.float64)
    assert np.linalg.norm(out.astype(np.float64) - exact) <= 0.02 * np.linalg.norm(exact)


@pytest.mark.gpu
def test_nothing_is_allocated_with_out():
    import cupy

    layer = _layer(512, 1000, "bfloat16", 0.9)
    x, *weights = _on_gpu(layer)
    ffn, y = psc.SparseFFN(*weights, layer.threshold), on.put(poisoned(512, "bfloat16"))
    gate, x1 = (on.put(poisoned(1000, "bfloat16")) for _ in range(2))

    def everything():
        psc.ffn_1(x, weights[0], out=gate)
        psc.ffn_23(gate, x, weights[1], layer.threshold, out=x1)
        psc.ffn_4(x1, weights[2], out=y)
        psc.sparse_ffn(x, *weights, layer.threshold, out=y)
        ffn(x, out=y)

    everything()

    class Allocations(cupy.cuda.MemoryHook):
        name = "Allocations"
        count = 0

        def malloc_preprocess(self, **_):
            self.count += 1

    with Allocations() as hook:
        everything()
    assert hook.count == 0
    with Allocations() as hook:
        psc.ffn_1(x, weights[0])
    assert hook.count == 1


@pytest.mark.gpu
def test_streams_do_not_share_scratch():
    """Each stream has numbers of its own, so that another's x1 in its scratch shows."""
    import cupy

    layers = [_layer(1024, 11008, "bfloat16", 0.9, seed) for seed in range(4)]
    arrays = [_on_gpu(layer) for layer in layers]
    expected = [on.get(psc.sparse_ffn(*a, T)) for a in arrays]
    assert len({e.tobytes() for e in expected}) == 4
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in layers]
    cupy.cuda.Device().synchronize()
    outs = [[] for _ in layers]
    for _ in range(20):
        for stream, mine, own in zip(streams, outs, arrays, strict=True):
            with stream:
                mine.append(psc.sparse_ffn(*own, T))
    cupy.cuda.Device().synchronize()
    for mine, right in zip(outs, expected, strict=True):
        for out in mine:
            np.testing.assert_array_equal(bits(on.get(out)), bits(right))


@pytest.mark.gpu
@pytest.mark.parametrize("change", ["float", "larger"])
def test_weights_that_change_under_a_sparse_ffn_are_refused(change, torch):
    """It used to write beyond its scratch."""
    to = OnTorch()
    x, *ws = (to.put(on.get(a)) for a in _on_gpu(_layer(256, 1000, "bfloat16", 0.5)))
    ws = [torch.nn.Parameter(w, requires_grad=False) for w in ws]
    ffn = psc.SparseFFN(*ws, T)
    before = ffn(x)
    for w in ws:
        w.data = w.data.clone()
    assert torch.equal(ffn(x), before), "elsewhere in memory, they are the same weights"
    for w in ws:
        w.data = w.data.float() if change == "float" else torch.cat([w.data] * 4)
    out = torch.full_like(x, float("nan"), dtype=ws[0].dtype)
    with pytest.raises(ValueError, match=r"SparseFFN: its weights have changed since it was built: .* make a new SparseFFN"):
        ffn(x.to(ws[0].dtype), out=out)
    assert bool(out.isnan().all())


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_a_sparse_ffn_can_be_copied(how):
    layer = _layer(64, 101, "bfloat16", 0.5)
    ffn = psc.SparseFFN(layer.w_gate, layer.w_up, psc.pack_down(layer.w_down), T)
    again = copy.deepcopy(ffn) if how == "copy" else pickle.loads(pickle.dumps(ffn))
    np.testing.assert_array_equal(bits(again(layer.x)), bits(ffn(layer.x)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_arrays_run_the_reference(dtype):
    layer = _layer(64, 101, dtype, 0.5)
    w_down_t = psc.pack_down(layer.w_down)
    np.testing.assert_array_equal(bits(w_down_t), bits(np.ascontiguousarray(layer.w_down.T)))
    expected = reference.sparse_ffn(layer.x, layer.w_gate, layer.w_up, w_down_t, layer.threshold)
    np.testing.assert_array_equal(reference.active(psc.ffn_1(layer.x, layer.w_gate), layer.threshold), layer.mask)
    out = poisoned(64, dtype)
    ffn = psc.SparseFFN(layer.w_gate, layer.w_up, w_down_t, layer.threshold)
    assert ffn(layer.x, out=out) is out
    for result in (out, ffn(layer.x), psc.sparse_ffn(layer.x, layer.w_gate, layer.w_up, w_down_t, layer.threshold)):
        np.testing.assert_array_equal(bits(result), bits(expected))


def _every_option(d_model: int, d_ff: int, dtype: str, gated: bool) -> dict:
    rng = np.random.default_rng(7)
    options = {
        "up_bias": token(d_ff, dtype, rng),
        "down_bias": token(d_model, dtype, rng),
        "norm_weight": norm_weight(d_ff, dtype, rng),
    }
    return {**options, **({"gate_bias": token(d_ff, dtype, rng)} if gated else {}), "activation": "relu2", "norm_eps": 1e-5}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_arrays_with_every_option_are_the_operators_one_by_one(dtype, gated):
    d_model, d_ff = 64, 101
    x, options = token(d_model, dtype, np.random.default_rng()), _every_option(d_model, d_ff, dtype, gated)
    w_gate, w_up, w_down_t = (weights(d_ff, d_model, dtype, seed) for seed in range(3))
    half = {"activation": "relu2"}
    if gated:
        x1 = psc.ffn_123(x, w_gate, w_up, T, gate_bias=options["gate_bias"], up_bias=options["up_bias"], **half)
        two = psc.ffn_23(psc.ffn_1(x, w_gate, bias=options["gate_bias"]), x, w_up, T, bias=options["up_bias"], **half)
        np.testing.assert_array_equal(bits(two), bits(x1))
    else:
        x1 = psc.ffn_12(x, w_up, T, bias=options["up_bias"], **half)
    norm = {"norm_weight": options["norm_weight"], "norm_eps": options["norm_eps"]}
    expected = psc.ffn_4(x1, w_down_t, bias=options["down_bias"], **norm)
    ws, out = (w_gate if gated else None, w_up, w_down_t), poisoned(d_model, dtype)
    ffn = psc.SparseFFN(*ws, T, **options)
    assert psc.sparse_ffn(x, *ws, T, **options, out=out) is out
    for y in (out, ffn(x), ffn(x[None])[0], ffn(x, out=poisoned(d_model, dtype))):
        np.testing.assert_array_equal(bits(y), bits(expected))
    for name in options:  # all of them are used
        other = {key: value for key, value in options.items() if key not in (name, *["norm_eps"] * (name == "norm_weight"))}
        assert np.any(bits(psc.sparse_ffn(x, *ws, T, **other)) != bits(expected)) or name == "norm_eps"


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_a_sparse_ffn_with_every_option_can_be_copied(how, gated):
    options, x = _every_option(64, 101, "bfloat16", gated), token(64, "bfloat16", np.random.default_rng())
    ws = [weights(101, 64, "bfloat16", seed) for seed in range(3)]
    ffn = psc.SparseFFN(ws[0] if gated else None, *ws[1:], T, **options)
    again = copy.deepcopy(ffn) if how == "copy" else pickle.loads(pickle.dumps(ffn))
    np.testing.assert_array_equal(bits(again(x)), bits(ffn(x)))
    assert repr(again) == repr(ffn) and again.activation == "relu2" and again.gated == gated and again.norm_eps == 1e-5
    options["up_bias"][:] = 3
    assert np.any(bits(again(x)) != bits(ffn(x))), "a copy has biases of its own"


def test_what_a_sparse_ffn_says_of_itself():
    w, options = weights(101, 64, "bfloat16"), _every_option(64, 101, "bfloat16", True)
    dims = "SparseFFN(d_model=64, d_ff=101, dtype=bfloat16, threshold="
    assert repr(psc.SparseFFN(w, w, w, 0.25)) == f"{dims}0.25)"
    assert repr(psc.SparseFFN(None, w, w, activation="relu2")) == f"{dims}0, activation=relu2, gated=False)"
    named = repr(psc.SparseFFN(w, w, w, **options))
    assert named == f"{dims}0, activation=relu2, gate_bias, up_bias, down_bias, norm_weight)"


def test_a_sparse_ffn_whose_biases_have_changed_is_refused():
    w, options = weights(101, 64, "bfloat16"), _every_option(64, 101, "bfloat16", True)
    ffn, x = psc.SparseFFN(w, w, w, **options), token(64, "bfloat16", np.random.default_rng())
    before = ffn(x)
    options["norm_weight"] *= 2
    assert np.any(bits(ffn(x)) != bits(before)), "other values are used"
    options["up_bias"].resize(96, refcheck=False)
    with pytest.raises(ValueError, match=r"^SparseFFN: up_bias must have shape \(d_ff,\) = \(101,\), got \(96,\)"):
        ffn(x)


def _compiled(monkeypatch) -> list[Problem]:
    """The problems that `warmup` asks a stand-in for the compiler for."""
    problems, kernels = [], {}

    def load(problem, device):
        problems.append(problem)
        plan = launch.plan(replace(problem, tokens=1))  # whose knobs are not this test's
        return kernels.setdefault((plan, problem.tokens), SimpleNamespace(plan=plan))

    monkeypatch.setattr(ffn_module, "load", load)
    monkeypatch.setattr(ffn_module, "gpu", lambda device: SimpleNamespace(capability=90))
    return problems


@pytest.mark.parametrize(("gated", "halves"), [(True, ["ffn_123", "ffn_23"]), (False, ["ffn_12"])])
@pytest.mark.parametrize("compressed", [False, True])
def test_warmup_compiles_what_a_call_asks_for(monkeypatch, gated, halves, compressed):
    """On a stand-in for the compiler: the kernels, and what they are compiled for."""
    problems = _compiled(monkeypatch)
    options = {"activation": "relu2", "gated": gated, "bias": True, "norm": True, "compressed": compressed}
    report = psc.warmup(64, 101, device=0, **options)
    in_ffn = [] if (gated, compressed) == (False, True) else [halves[0]]  # which lets ffn_4 in there, and nobody by itself
    assert [c.kernel for c in report if "EARLY_SUCCESSOR" in c.defines] == in_ffn
    assert [c.kernel for c in report] == sorted(
        ["ffn_1", *halves, *in_ffn, "ffn_4", "pack_down", *["decompress"] * compressed], key=list(KERNELS).index
    )
    by_kernel = {problem.kernel: problem for problem in problems}
    assert all(by_kernel[kernel].activation == "relu2" for kernel in halves)
    assert by_kernel["ffn_4"].extras == ("down_bias", "norm_weight") and by_kernel["ffn_4"].activation == "relu"
    for c in report:
        assert ("ACTIVATION_RELU2" in c.defines) == (c.kernel in halves) and "_BIAS=0" not in c.defines
    problems.clear()
    psc.warmup(64, 101, device=0, gated=gated)
    assert all(problem.activation == "relu" and not problem.extras for problem in problems)


@pytest.mark.parametrize(("tokens", "numbers"), [(3, [3]), (range(1, 9), [*range(1, 9)]), ([1, 4, np.int64(4)], [1, 4])])
def test_warmup_for_several_tokens(monkeypatch, tokens, numbers):
    """Each kernel for each number, but those that see no tokens once."""
    problems = _compiled(monkeypatch)
    report = psc.warmup(64, 101, device=0, compressed=True, tokens=tokens)
    by_kernel = {kernel: [p.tokens for p in problems if p.kernel == kernel and not p.in_ffn] for kernel in KERNELS}
    of_weights = {kernel: [1] for kernel in ("pack_down", "decompress")}
    assert by_kernel == {**dict.fromkeys(KERNELS, numbers), **of_weights, "ffn_12": []}
    assert [c.kernel for c in report] == [p.kernel for p in problems], "ffn_123 is another one in a whole FFN"


@pytest.mark.parametrize("tokens", [0, 9, -1, 2.0, "2", None, [], [1, 9], [1.0]])
def test_warmup_refuses_numbers_of_tokens_that_no_call_may_have(tokens):
    with pytest.raises(ValueError, match=r"^warmup: tokens must be an int from 1 to 8, or several of these, got "):
        psc.warmup(64, 101, device=0, tokens=tokens)


def test_a_sparse_ffn_takes_any_number_of_tokens():
    layer = _layer(64, 101, "float32", 0.5)
    ffn = psc.SparseFFN(layer.w_gate, layer.w_up, psc.pack_down(layer.w_down), T)
    rng = np.random.default_rng()
    for tokens in (1, 8, 3, 2, 8):
        x = np.stack([token(64, "float32", rng) for _ in range(tokens)])
        np.testing.assert_allclose(ffn(x), np.stack([ffn(row) for row in x]), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"^SparseFFN: x must hold one token, \(d,\), or 1 to 8, \(B, d\), got 9 tokens"):
        ffn(np.zeros((9, 64), np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [True, False])
def test_after_warmup_nothing_is_compiled(gated):
    from prosparse_cupy.compiler import load

    d_model, d_ff = 104, 59 + gated
    options = {
        name: on.put(a) if isinstance(a, np.ndarray) else a
        for name, a in _every_option(d_model, d_ff, "bfloat16", gated).items()
    }
    x, w = on.put(token(d_model, "bfloat16", np.random.default_rng())), on.put(weights(d_ff, d_model, "bfloat16"))
    report = psc.warmup(d_model, d_ff, activation="relu2", gated=gated, bias=True, norm=True)
    assert all(c.seconds > 0 and f"ROW_OPT={d_ff} COL_OPT={d_model}" in c.defines for c in report)
    before = load.cache_info().misses
    psc.SparseFFN(w if gated else None, w, w, 0.1, **options)(x)
    assert load.cache_info().misses == before
