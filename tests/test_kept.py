"""Five to eight tokens that blocks keep: which launches do, on the host under the sanitizers, and on the GPU.

Whatever they are launched with, the bits are those of a warp for each row, which `test_host_batches` checks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from checks import bits, poisoned, token, weights
from gpu_arrays import OnCupy
from host_cuda import HostRunError
from plans import Shape, plan_of
from test_compile import ptx_of

from prosparse_cupy import knobs, launch, models, reference
from prosparse_cupy.compiler import source, trying
from prosparse_cupy.formats import BF12_ROWS
from prosparse_cupy.knobs import KEPT, KINDS, KeptKnobs, Knobs
from prosparse_cupy.problem import H100, Problem, Target
from prosparse_cupy.testing import synthetic

T = 0.25
SEVEN_B, THIRTEEN_B, OPT = (4096, 11008), (5120, 13824), (4096, 16384)  # (d_model, d_ff)
BIAS = {"ffn_1": ("gate_bias",), "ffn_12": ("up_bias",), "ffn_123": ("gate_bias", "up_bias")}


# Launches


def _plan(kernel: str, dims: tuple[int, int], dtype: str = "bfloat16", tokens: int = 8, **more) -> launch.Launch:
    target = more.pop("target", H100)
    return plan_of(kernel, Shape(*dims, dtype, more.pop("specialize", True), target), tokens=tokens, **more)


@pytest.mark.parametrize("kernel", KEPT)
@pytest.mark.parametrize("dims", [SEVEN_B, THIRTEEN_B, OPT])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_from_five_tokens_on_or_six(kernel, dims, dtype):
    fewest = 6 if kernel == "ffn_123" else 5
    served = [tokens for tokens in range(1, 9) if _plan(kernel, dims, dtype, tokens).kernel == f"{kernel}_kept"]
    assert served == [*range(fewest, 9)]
    for tokens in served:
        for more in ({"extras": BIAS[kernel]}, {"in_ffn": True}, {"partial": kernel == "ffn_1"}):
            plan = _plan(kernel, dims, dtype, tokens, **more)
            assert plan.kernel == f"{kernel}_kept" and plan.grid == (132, 1, 1) and plan.block == (384, 1, 1)
            assert plan.shared_bytes == tokens * dims[0] * 4 + 2 * 12 * 16 * 32 * 4 <= H100.shared_bytes
            assert not plan.partial_bytes and plan.programmatic


@pytest.mark.parametrize("kernel", KEPT)
@pytest.mark.parametrize(
    "more",
    [
        {"dtype": "float32"},
        {"specialize": False},
        {"formats": BF12_ROWS},
        {"dims": (4096, 11010)},  # no whole groups of rows
        {"dims": (4104, 11008)},  # no whole batches of loads
        {"dims": (8192, 28672)},  # tokens that do not fit
        {"dims": (4096, 4096)},  # little more than a group for each pair of warps
        {"target": Target(80, 108)},  # measured on none but Hopper
        {"target": Target(100, 132)},
    ],
    ids=str,
)
def test_what_they_do_not_serve_is_launched_as_ever(kernel, more):
    more = {"dims": SEVEN_B} | more
    if "formats" in more:
        more["formats"] = (BF12_ROWS,) * (1 + (kernel == "ffn_123"))
    assert _plan(kernel, **more).kernel == kernel


def test_rows_of_which_a_lane_cannot_hold_its_part_are_left_to_others():
    assert _plan("ffn_1", (6144, 16384), tokens=6).kernel == "ffn_1_kept"
    assert _plan("ffn_123", (6144, 16384), tokens=6).kernel == "ffn_123"


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        (KeptKnobs(11, 1), "11 warps: they come in pairs, 15 at most"),
        (KeptKnobs(32, 1), "32 warps: they come in pairs, 15 at most"),
        (KeptKnobs(12, 1, abreast=3), "3 rows abreast, not 2, 4 or 8"),
        (KeptKnobs(12, 1, loads=3), "not 4 abreast, 3 loads each"),
        (KeptKnobs(12, 1, loads=0), "not 4 abreast, 0 loads each"),
        (KeptKnobs(12, 1, blocks=0), "0 blocks, not 1 to 65536"),
        (KeptKnobs(12, 1, blocks=2**40), "blocks, not 1 to 65536"),
        (KeptKnobs(28, 1, abreast=8), "bytes of shared memory, a block has 232448"),
    ],
)
def test_what_cannot_be_launched_is_refused(chosen, why):
    with pytest.raises(ValueError, match=why):
        launch.plan(Problem("ffn_1", *THIRTEEN_B, "bfloat16", tokens=8), H100, chosen)


def test_kernels_that_have_none_refuse_them():
    with pytest.raises(ValueError, match="ffn_23 has SharedRowKnobs, not KeptKnobs"):
        launch.plan(Problem("ffn_23", *SEVEN_B, "bfloat16", tokens=8), H100, KeptKnobs(12, 1))
    with pytest.raises(ValueError, match="tokens are kept from 5 on"):
        launch.plan(Problem("ffn_1", *SEVEN_B, "bfloat16", tokens=4), H100, KeptKnobs(12, 1))


def test_both_ways_are_worth_measuring():
    found = [*knobs.candidates(Problem("ffn_123", *SEVEN_B, "bfloat16", tokens=8), H100)]
    of_another = knobs.candidates(Problem("ffn_1", *SEVEN_B, "bfloat16", tokens=6), Target(90, 114))
    assert {k.blocks for k in of_another if isinstance(k, KeptKnobs)} == {114}
    assert type(found[0]) is KeptKnobs and {type(k) for k in found} == {KeptKnobs, KINDS["ffn_123"]}


# Kernels on the host


class _Tokens:
    """Tokens, of which some have no active neuron and others all but those that nobody has, and what kernels take beside."""

    def __init__(self, dims: tuple[int, int], dtype: str, tokens: int, activation: str = "relu", biased: bool = False) -> None:
        rng = np.random.default_rng([*dims, tokens])
        self.dims, self.dtype, self.tokens, self.activation = dims, dtype, tokens, activation
        d_model, d_ff = dims
        self.x = np.stack([token(d_model, dtype, rng) for _ in range(tokens)])
        self.w = [weights(d_ff, d_model, dtype, seed).copy() for seed in range(2)]
        masks = np.stack([rng.random(d_ff) >= (0.9, 1.0, 0.0, 0.5)[t % 4] for t in range(tokens)])
        masks[:, ::5] = False
        for w in self.w[: 1 if activation == "drelu" else 2]:
            synthetic.steer(w, self.x, synthetic.gate_of(masks, T, rng))
        self.biases = {name: token(d_ff, dtype, rng) for name in ("gate_bias", "up_bias")} if biased else {}

    def run(
        self,
        host,
        kernel: str,
        chosen: Knobs | None = None,
        *,
        which: list[int] | None = None,
        seed: int = 0,
        code: str | None = None,
        **more,
    ) -> np.ndarray:
        """A kernel on all tokens or on these, with these knobs or those of a warp for each row."""
        x = self.x if which is None else np.ascontiguousarray(self.x[which])
        extras = tuple(name for name in BIAS[kernel] if name in self.biases)
        if kernel != "ffn_1":
            more["activation"] = self.activation
        problem = Problem(kernel, *self.dims, self.dtype, tokens=len(x), extras=extras, **more)
        plan = launch.plan(problem, H100, chosen or KINDS[kernel].rule(problem, H100))
        gate, up = self.w
        inputs = {"ffn_1": [x, gate, None], "ffn_12": [x, up, None, T], "ffn_123": [x, gate, up, None, T]}[kernel]
        out = poisoned((len(x), self.dims[1]), "float32" if problem.partial else self.dtype)
        trailing = [self.biases.get(name, 0) for name in BIAS[kernel]]
        return host.run(plan, [*inputs, self.dims[1], self.dims[0], *trailing], out, seed=seed, code=code)


CASES = [
    # More blocks than groups, so that a pair of warps has none; one that has several; loads that end within a row and with it.
    ("ffn_1", (512, 12), 8, "bfloat16", KeptKnobs(4, 1, loads=1, blocks=5)),
    ("ffn_1", (1024, 40), 5, "float16", KeptKnobs(4, 1, loads=2, blocks=2)),
    ("ffn_1", (1024, 48), 6, "bfloat16", KeptKnobs(2, 1, loads=1, abreast=8, blocks=3)),
    ("ffn_12", (1536, 26), 7, "bfloat16", KeptKnobs(4, 1, loads=3, abreast=2, blocks=2)),
    ("ffn_12", (512, 60), 8, "float16", KeptKnobs(6, 1, loads=1, blocks=1)),
    ("ffn_123", (1024, 52), 8, "bfloat16", KeptKnobs(4, 1, loads=2, blocks=2)),
    ("ffn_123", (512, 30), 5, "float16", KeptKnobs(4, 1, loads=1, abreast=2, blocks=3)),
    ("ffn_123", (1024, 40), 6, "bfloat16", KeptKnobs(2, 1, loads=1, abreast=8, blocks=2)),
]


@pytest.mark.parametrize(("kernel", "dims", "tokens", "dtype", "chosen"), CASES, ids=str)
def test_the_bits_of_a_warp_for_each_row(host, kernel, dims, tokens, dtype, chosen):
    for activation, biased in (("relu", False), ("drelu" if kernel == "ffn_123" else "relu2", True)):
        given = _Tokens(dims, dtype, tokens, activation, biased)
        expected = given.run(host, kernel)
        assert np.count_nonzero(expected) > 0 and (kernel == "ffn_1" or not expected.all())
        for seed in range(3):
            np.testing.assert_array_equal(bits(given.run(host, kernel, chosen, seed=seed)), bits(expected))
        for t in (0, tokens - 1):
            np.testing.assert_array_equal(bits(given.run(host, kernel, which=[t])[0]), bits(expected[t]))
    if kernel == "ffn_1":
        partial = given.run(host, kernel, chosen, partial=True)
        np.testing.assert_array_equal(bits(partial), bits(given.run(host, kernel, partial=True)))
        np.testing.assert_array_equal(bits(partial.astype(expected.dtype)), bits(expected))


@pytest.mark.parametrize("kernel", ["ffn_1", "ffn_123"])
def test_the_order_of_sums_where_it_is_all_that_is_left(host, kernel):
    """Every product comes twice, with either sign, at other places: what is left of the sum is the rounding of its order."""
    given, rng = _Tokens((1024, 40), "bfloat16", 8), np.random.default_rng(5)
    other, w = 512 + rng.permutation(512), given.w[kernel == "ffn_123"]
    given.x[:, other] = given.x[:, :512]
    w[:, other] = -w[:, :512]
    expected = given.run(host, kernel)
    found = given.run(host, kernel, KeptKnobs(4, 1, loads=1, blocks=2))
    assert 0 < np.abs(expected.astype(np.float32)).max() < 1e-4
    np.testing.assert_array_equal(bits(found), bits(expected))


def test_rows_of_up_proj_that_nobody_needs_are_not_read(host):
    """They are NaN, and so are those that only another token needs."""
    given = _Tokens((512, 40), "bfloat16", 8)
    expected = given.run(host, "ffn_123")
    active = reference.active(given.run(host, "ffn_1"), T)
    assert active.any(axis=0).any() and not active.any(axis=0).all() and not active.all(axis=0).any()
    given.w[1][~active.any(axis=0)] = np.nan
    found = given.run(host, "ffn_123", KeptKnobs(4, 1, loads=1, blocks=2))
    np.testing.assert_array_equal(bits(found), bits(expected))
    given.w[1][:] = np.nan
    found = given.run(host, "ffn_123", KeptKnobs(4, 1, loads=1, blocks=2))
    assert np.isnan(found[active].astype(np.float32)).all() and not bits(found[~active]).any()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("__syncthreads();", ""),
        ("sync_pair();", ""),
        ("parity ^= 1", "parity ^= 0"),
        ("warp ^ 1][i][lane]", "warp][i][lane]"),
        ("half ? upper : lower;", "half ? lower : upper;"),
        ("first == STEPS - LOADS", "first == STEPS"),
        ("group + step < GROUPS ?", "true ?"),
        ("threadIdx.x / 64 + 1, 64", "1, 64"),
    ],
)
def test_what_is_left_out_is_caught(host, right, wrong):
    """By a report of the sanitizers or of the fibers, or by other bits under some order of warps."""
    given, chosen = _Tokens((512, 60), "bfloat16", 8), KeptKnobs(4, 1, loads=1, blocks=2)
    code = source("ffn_1_kept")
    assert right in code
    expected = given.run(host, "ffn_1", chosen)

    def is_wrong(seed: int) -> bool:
        try:
            found = given.run(host, "ffn_1", chosen, seed=seed, code=code.replace(right, wrong))
        except HostRunError:
            return True
        return not np.array_equal(bits(found), bits(expected))

    assert any(map(is_wrong, range(12)))


# Machine code


@pytest.mark.parametrize("kernel", KEPT)
def test_nothing_is_read_before_the_wait_and_no_successor_let_in(kernel):
    for extras in ((), BIAS[kernel]):
        text = ptx_of(_plan(kernel, SEVEN_B, extras=extras, in_ffn=True), 90).partition(f".entry {kernel}_kept")[2]
        before, waits, after = text.partition("griddepcontrol.wait")
        assert waits and ".global" not in before and "ld.global" in after and "ld.global.nc" not in after
        assert "griddepcontrol" not in after


# On the GPU


def _steered(gpu, kernel: str, dims: tuple[int, int], dtype: str, tokens: int, mask: np.ndarray, rng) -> list:
    """Tokens and matrices whose first products are as the mask says."""
    import cupy

    d_model, d_ff = dims
    x = gpu.put(np.stack([token(d_model, dtype, rng) for _ in range(tokens)]))
    matrices = [cupy.asarray(rng.standard_normal((d_ff, d_model), np.float32) / 64).astype(x.dtype) for _ in range(2)]
    for w in matrices:
        synthetic.steer(w, x, cupy.asarray(synthetic.gate_of(mask, T, rng)))
    return [x, *matrices[: 1 + (kernel == "ffn_123")]]


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "dims", "tokens", "dtype", "chosen"), CASES, ids=str)
def test_small_shapes_on_the_gpu(kernel, dims, tokens, dtype, chosen):
    import prosparse_cupy as psc

    gpu, given = OnCupy(), _Tokens(dims, dtype, tokens, "drelu" if kernel == "ffn_123" else "relu2", biased=True)
    biases = {name: gpu.put(given.biases[name]) for name in BIAS[kernel]}
    matrices = {"ffn_1": given.w[:1], "ffn_12": given.w[1:], "ffn_123": given.w}[kernel]
    arrays = [gpu.put(a) for a in (given.x, *matrices)]
    more = {} if kernel == "ffn_1" else {"threshold": T, "activation": given.activation}
    more |= {"bias": biases.popitem()[1]} if len(biases) == 1 else biases
    operator, out = getattr(psc, kernel), gpu.put(poisoned((tokens, dims[1]), dtype))
    expected = operator(*arrays, **more).get()
    assert np.count_nonzero(expected)
    with trying(Problem(kernel, *dims, dtype, tokens=tokens), chosen) as loaded:
        np.testing.assert_array_equal(bits(operator(*arrays, **more, out=out).get()), bits(expected))
        assert [made.plan.kernel for made in loaded] == [f"{kernel}_kept"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tokens", [5, 6, 7, 8])
@pytest.mark.parametrize("dims", [SEVEN_B, THIRTEEN_B, (1024, 4760), (3072, 9216)])
@pytest.mark.parametrize("kernel", KEPT)
def test_on_the_gpu_too(kernel, dims, tokens, dtype):
    """Of every token the bits that it has alone, and those of other launches, into poisoned memory."""
    import prosparse_cupy as psc

    gpu, rng = OnCupy(), np.random.default_rng([*dims, tokens])
    mask = np.stack([rng.random(dims[1]) >= (0.9, 1.0, 0.0, 0.5)[t % 4] for t in range(tokens)])
    arrays = _steered(gpu, kernel, dims, dtype, tokens, mask, rng)
    operator = getattr(psc, kernel)
    threshold = (T,) if kernel != "ffn_1" else ()
    out = gpu.put(poisoned((tokens, dims[1]), dtype))
    found = operator(*arrays, *threshold, out=out).get()
    for t in range(tokens):
        np.testing.assert_array_equal(bits(found[t]), bits(operator(arrays[0][t], *arrays[1:], *threshold).get()))
    problem = Problem(kernel, *dims, dtype, tokens=tokens)
    with trying(problem, KINDS[kernel].rule(problem, H100)):
        np.testing.assert_array_equal(bits(found), bits(operator(*arrays, *threshold).get()))
    for chosen in (KeptKnobs(12, 1), KeptKnobs(4, 1, loads=1, abreast=2, blocks=7)):
        with trying(problem, chosen):
            np.testing.assert_array_equal(bits(found), bits(operator(*arrays, *threshold).get()))


@pytest.mark.gpu
@pytest.mark.parametrize("model", [models.LLAMA_2_7B, replace(models.OPT_6_7B, activation="relu2")], ids=lambda m: m.name)
def test_a_whole_ffn_of_eight_on_the_gpu(model):
    """Each token as alone, at every share of active neurons."""
    import cupy

    import prosparse_cupy as psc

    gpu, rng, dims = OnCupy(), np.random.default_rng(3), (model.d_model, model.d_ff)
    for sparsity in (0.0, 0.5, 0.9, 1.0):
        mask = rng.random((8, model.d_ff)) >= sparsity
        x, *first = _steered(gpu, "ffn_123" if model.gated else "ffn_12", dims, "bfloat16", 8, mask, rng)
        down = cupy.asarray(rng.standard_normal(dims, np.float32) / 64).astype(x.dtype)
        ffn = psc.SparseFFN(*([None] * (not model.gated)), *first, psc.pack_down(down), T, activation=model.activation)
        y = ffn(x)
        for t in range(8):
            np.testing.assert_array_equal(bits(y[t].get()), bits(ffn(x[t]).get()), err_msg=f"token {t} at {sparsity}")
        assert np.isfinite(y.get().astype(np.float32)).all() and (sparsity == 1.0) == (not y.get().any())
