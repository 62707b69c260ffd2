"""Launch plans: every row and column is covered exactly once, within what every supported GPU allows."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import Shape, plan_of

from prosparse_cupy import launch, models
from prosparse_cupy.formats import ITEMSIZE, vector_length
from prosparse_cupy.problem import KERNELS, Target

shapes = st.builds(
    lambda vectors, d_ff, dtype, *rest: Shape(vectors * vector_length(dtype), d_ff, dtype, *rest),
    st.integers(1, 4096),
    st.integers(1, 60000),
    st.sampled_from(sorted(ITEMSIZE)),
    st.booleans(),
    st.builds(Target, st.sampled_from([80, 86, 89, 90, 100, 120]), st.integers(1, 200)),
)
kernels = st.sampled_from(sorted(KERNELS))
EXTRAS = {"GATE_BIAS", "UP_BIAS", "DOWN_BIAS", "NORM_WEIGHT"}


def _defines(plan: launch.Launch) -> dict[str, int | str | None]:
    assert len(dict(plan.defines)) == len(plan.defines)
    return dict(plan.defines)


def static_shared_bytes(plan: launch.Launch) -> int:
    """What a kernel declares as `__shared__`, which `test_compile` holds against the compiler's word."""
    defines = _defines(plan)
    itemsize = 4 if "DTYPE_FLOAT32" in defines else 2
    if plan.kernel == "ffn_4":
        if plan.shared_bytes:  # then it is dynamic
            return 0
        columns = defines["LANES"] * 16 // itemsize + defines["NORM_WEIGHT"]
        return 2 * defines["WARPS"] * defines["LISTED"] + 4 * defines["WARPS"] * columns
    if plan.kernel == "ffn_23" and "ROWS" in defines:
        return 4 * 32 * defines["WARPS"] // 2 + 4
    return 32 * 33 * itemsize if plan.kernel == "pack_down" else 0


@given(kernels, shapes)
def test_launches_are_legal(kernel, shape):
    plan = plan_of(kernel, shape)
    assert plan.kernel == kernel
    assert all(n >= 1 for n in (*plan.grid, *plan.block))
    assert plan.grid[0] < 2**31 and plan.grid[1] <= 65535 and plan.grid[2] <= 65535
    assert plan.block[0] * plan.block[1] * plan.block[2] <= 1024
    assert static_shared_bytes(plan) <= 48 * 1024
    assert len(plan.arguments) <= 16 and set(plan.arguments) <= {"P", "f", "i"}


@given(kernels, shapes)
def test_defines_say_the_dtype_and_the_dims(kernel, shape):
    defines = _defines(plan_of(kernel, shape))
    assert [name for name in defines if name.startswith("DTYPE_")] == [f"DTYPE_{shape.dtype.upper()}"]
    dims = (defines.get("ROW_OPT"), defines.get("COL_OPT"))
    assert dims == ((shape.d_ff, shape.d_model) if shape.specialize else (None, None))


@given(st.sampled_from(["ffn_1", "ffn_12", "ffn_123", "ffn_23"]), shapes)
def test_every_row_has_one_block(kernel, shape):
    plan = plan_of(kernel, shape)
    defines = _defines(plan)
    assert plan.block == (32 * defines["WARPS"], 1, 1)
    rows = defines.get("ROWS", defines["WARPS"])  # of a block
    assert plan.grid[0] * rows >= shape.d_ff > (plan.grid[0] - 1) * rows


@given(shapes)
def test_warps_of_ffn_23_share_rows_that_two_of_them_can_halve(shape):
    defines = _defines(plan_of("ffn_23", shape))
    short = shape.specialize and shape.d_model <= 32 * 8 * vector_length(shape.dtype)
    assert ("ROWS" not in defines) == short
    if not short:
        assert defines["WARPS"] % 2 == 0 and defines["WARPS"] <= defines["ROWS"] <= 32
        if shape.target.capability < 100 or not shape.specialize:
            assert (defines["MIN_BLOCKS"] < 4) == (defines["LOADS"] > 8), "registers"
        else:
            assert defines["MIN_BLOCKS"] < 4 or defines["LOADS"] <= 8, "registers"


@given(kernels, shapes)
def test_by_the_rule_a_successor_comes_early_only_where_all_rows_have_a_warp(kernel, shape):
    early = "EARLY_SUCCESSOR" in _defines(plan_of(kernel, shape, in_ffn=True))
    fits = kernel == "ffn_12" or (kernel == "ffn_123" and shape.d_ff <= 32 * shape.target.multiprocessors)
    assert early == (fits and shape.specialize and shape.target.capability >= 90)


@given(kernels, shapes)
def test_only_ffn_4_is_let_in_early(kernel, shape):
    """By itself a kernel does not know who comes next, and that may write before it waits."""
    alone, in_ffn = _defines(plan_of(kernel, shape)), _defines(plan_of(kernel, shape, in_ffn=True))
    assert "EARLY_SUCCESSOR" not in alone and {k: v for k, v in in_ffn.items() if k != "EARLY_SUCCESSOR"} == alone


@given(shapes)
def test_every_vector_of_x1_has_one_thread_of_ffn_4(shape):
    plan = plan_of("ffn_4", shape)
    each, length = _defines(plan)["EACH"], vector_length(shape.dtype)
    assert each >= 1 and each * length <= (40 if length == 8 else 28)
    tile = each * plan.block[0] * length
    warps, unit = plan.block[0] // 32, _defines(plan)["UNIT"]
    starts = [
        first + (((k * 32 + lane) // unit * warps + warp) * unit + lane % unit) * length
        for first in range(0, shape.d_ff, tile)
        for k in range(each)
        for warp in range(warps)
        for lane in range(32)
    ]
    assert sorted(starts) == list(range(0, -(-shape.d_ff // tile) * tile, length))
    # A warp's list holds every row of a tile that it may have.
    owners = Counter()
    for i, start in enumerate(starts):
        owners[start // tile, i // 32 % warps] += max(0, min(length, shape.d_ff - start))
    assert max(owners.values()) <= _defines(plan)["LISTED"] and warps * _defines(plan)["LISTED"] <= 20480
    tiles = -(-shape.d_ff // tile)
    assert tiles == 1 or tiles * (each - 1) * plan.block[0] * length < shape.d_ff, "tiles are equal, and as few as can be"


@given(st.sampled_from([("ffn_1", 20), ("ffn_12", 20), ("ffn_123", 10), ("ffn_23", 10)]), shapes)
def test_batches_of_a_row_are_equal_and_even(kernel_and_most, shape):
    kernel, most = kernel_and_most
    loads = _defines(plan_of(kernel, shape))["LOADS"]
    assert 1 <= loads <= most
    if shape.specialize:
        needed = -(-shape.d_model // vector_length(shape.dtype) // 32)
        batches = -(-needed // loads)
        assert batches == -(-needed // most) and loads * batches - needed < 2 * batches
        assert batches == 1 or loads % 2 == 0
        assert batches > 1 or loads == needed
    else:
        assert loads % 2 == 0


@given(shapes)
def test_every_column_has_one_block_of_ffn_4(shape):
    plan = plan_of("ffn_4", shape)
    defines = _defines(plan)
    assert plan.block == (32 * defines["WARPS"], 1, 1)
    columns = defines["LANES"] * vector_length(shape.dtype)
    assert plan.grid[0] * columns >= shape.d_model > (plan.grid[0] - 1) * columns
    assert 32 % defines["LANES"] == 0 and columns <= plan.block[0]


@pytest.mark.parametrize(
    ("d_model", "dtype", "lanes"),
    [
        (4096, "bfloat16", 4),
        (5120, "bfloat16", 4),
        (1536, "bfloat16", 2),
        (4096, "float32", 8),
        (8, "bfloat16", 2),
        (16384, "float32", 32),
    ],
)
def test_slices_of_ffn_4_follow_the_shape(d_model, dtype, lanes):
    assert _defines(plan_of("ffn_4", Shape(d_model, 1000, dtype)))["LANES"] == lanes


@given(shapes, st.builds(Target, st.sampled_from([80, 89, 90, 120]), st.integers(1, 200)), st.booleans())
def test_the_order_of_ffn_4s_sums_is_the_same_on_every_gpu_and_without_constants(shape, target, specialize):
    one, other = (_defines(plan_of("ffn_4", s)) for s in (shape, shape._replace(target=target, specialize=specialize)))
    assert all(one[name] == other[name] for name in ("WARPS", "LANES", "EACH", "UNIT"))


@given(kernels, shapes)
def test_only_hopper_and_later_get_programmatic_launches(kernel, shape):
    plan = plan_of(kernel, shape)
    assert plan.programmatic == ("PROGRAMMATIC" in _defines(plan))
    assert plan.programmatic == (kernel not in ("pack_down", "decompress") and shape.target.capability >= 90)


@given(shapes)
def test_every_tile_of_pack_down_has_one_block(shape):
    plan = plan_of("pack_down", shape)
    assert plan.block == (32, _defines(plan)["WARPS"], 1) and 32 % plan.block[1] == 0
    for blocks, size in zip(plan.grid, (shape.d_ff, shape.d_model), strict=False):
        assert blocks * 32 >= size > (blocks - 1) * 32


def test_dynamic_kernels_do_not_depend_on_the_shape():
    a, b = (Shape(d, 3 * d, "bfloat16", specialize=False) for d in (4096, 5120))
    for kernel in KERNELS:
        one, other = _defines(plan_of(kernel, a)), _defines(plan_of(kernel, b))
        if kernel == "ffn_4":  # but for the order of the sums, which is that of the kernel with constants
            names = ("EACH", "UNIT", "LISTED")
            assert [one.pop(name) for name in names] != [other.pop(name) for name in names]
        assert one == other


@given(kernels, shapes)
def test_kernels_are_compiled_for_their_own_weights_and_formula(kernel, shape):
    defines = _defines(plan_of(kernel, shape))
    weights = {name for name in defines if name.startswith("W_")}
    own = {
        "ffn_1": {"W_GATE"},
        "ffn_12": {"W_UP"},
        "ffn_123": {"W_GATE", "W_UP"},
        "ffn_23": {"W_UP"},
        "ffn_4": {"W_DOWN"},
        "decompress": {"W_PACKED"},
    }
    assert weights == own.get(kernel, set())
    assert all(defines[name] == "Plain" for name in weights) and defines["TOKENS"] == 1
    assert ("ACTIVATION_RELU" in defines) == (kernel in ("ffn_12", "ffn_123", "ffn_23"))
    assert [name for name, value in defines.items() if name in EXTRAS and value != 0] == []


@given(kernels, shapes, st.sampled_from(["relu", "relu2", "drelu"]), st.booleans(), st.booleans())
def test_activation_biases_and_norm_are_defines_and_change_nothing_else(kernel, shape, activation, bias, norm):
    own = {
        "ffn_1": ["gate_bias"],
        "ffn_12": ["up_bias"],
        "ffn_123": ["gate_bias", "up_bias"],
        "ffn_23": ["up_bias"],
        "ffn_4": ["down_bias", "norm_weight"],
    }.get(kernel, [])
    extras = tuple(name for name in own if (norm if name == "norm_weight" else bias))
    plain, plan = plan_of(kernel, shape), plan_of(kernel, shape, activation=activation, extras=extras)
    before, after = _defines(plain), _defines(plan)
    assert {name for name in before if name in EXTRAS} == {name.upper() for name in own}
    if "ACTIVATION_RELU" in before:
        del before["ACTIVATION_RELU"]
        before[f"ACTIVATION_{activation.upper()}"] = None
    assert after == {**before, **{name.upper(): int(name in extras) for name in own}}
    assert dataclasses.replace(plan, defines=plain.defines) == plain
    assert "".join(plan.arguments).endswith("ii" + "P" * len(own) + "f" * (kernel == "ffn_4"))


def test_models_are_frozen_and_as_published():
    assert (models.LLAMA_2_7B.d_model, models.LLAMA_2_7B.d_ff) == (4096, 11008)
    assert (models.LLAMA_2_13B.d_model, models.LLAMA_2_13B.d_ff) == (5120, 13824)
    assert (models.MINICPM_S_1B.d_model, models.MINICPM_S_1B.d_ff) == (1536, 3840)
    with pytest.raises(dataclasses.FrozenInstanceError):
        models.LLAMA_2_7B.d_model = 1
