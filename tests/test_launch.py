"""Launch plans: every row and column is covered exactly once, within what every supported GPU allows."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prosparse_cupy import launch, models

shapes = st.builds(
    lambda vectors, d_ff, dtype, *rest: launch.Shape(vectors * launch.vector_length(dtype), d_ff, dtype, *rest),
    st.integers(1, 4096),
    st.integers(1, 60000),
    st.sampled_from(sorted(launch.ITEMSIZE)),
    st.booleans(),
    st.builds(launch.Target, st.sampled_from([80, 86, 89, 90, 100, 120]), st.integers(1, 200)),
)
kernels = st.sampled_from(sorted(launch.KERNELS))


def _defines(plan: launch.Launch) -> dict[str, int | None]:
    assert len(dict(plan.defines)) == len(plan.defines)
    return dict(plan.defines)


def static_shared_bytes(plan: launch.Launch) -> int:
    """What a kernel declares as `__shared__`, which `test_compile` holds against the compiler's word."""
    defines = _defines(plan)
    itemsize = 4 if "DTYPE_FLOAT32" in defines else 2
    if plan.kernel == "ffn_4":
        tile = defines["EACH"] * 32 * defines["WARPS"] * 16 // itemsize
        return 2 * tile + 4 * defines["WARPS"] * defines["LANES"] * 16 // itemsize
    if plan.kernel == "ffn_23" and "ROWS" in defines:
        return 4 * 32 * defines["WARPS"] // 2 + 4
    return 32 * 33 * itemsize if plan.kernel == "pack_down" else 0


@given(kernels, shapes)
def test_launches_are_legal(kernel, shape):
    plan = launch.plan(kernel, shape)
    assert plan.kernel == kernel
    assert all(n >= 1 for n in (*plan.grid, *plan.block))
    assert plan.grid[0] < 2**31 and plan.grid[1] <= 65535 and plan.grid[2] <= 65535
    assert plan.block[0] * plan.block[1] * plan.block[2] <= 1024
    assert plan.shared_bytes + static_shared_bytes(plan) <= 48 * 1024
    assert len(plan.arguments) <= 16 and set(plan.arguments) <= set("Pfi")


@given(kernels, shapes)
def test_defines_say_the_dtype_and_the_dims(kernel, shape):
    defines = _defines(launch.plan(kernel, shape))
    assert [name for name in defines if name.startswith("DTYPE_")] == [f"DTYPE_{shape.dtype.upper()}"]
    dims = (defines.get("ROW_OPT"), defines.get("COL_OPT"))
    assert dims == ((shape.d_ff, shape.d_model) if shape.specialize else (None, None))


@given(st.sampled_from(["ffn_1", "ffn_123", "ffn_23"]), shapes)
def test_every_row_has_one_block(kernel, shape):
    plan = launch.plan(kernel, shape)
    defines = _defines(plan)
    assert plan.block == (32 * defines["WARPS"], 1, 1)
    rows = defines.get("ROWS", defines["WARPS"])  # of a block
    assert plan.grid[0] * rows >= shape.d_ff > (plan.grid[0] - 1) * rows


@given(shapes)
def test_warps_of_ffn_23_share_rows_that_two_of_them_can_halve(shape):
    defines = _defines(launch.ffn_23(shape))
    short = shape.specialize and shape.d_model <= 32 * 8 * launch.vector_length(shape.dtype)
    assert ("ROWS" not in defines) == short
    if not short:
        assert defines["WARPS"] % 2 == 0 and defines["WARPS"] <= defines["ROWS"] <= 32
        if shape.target.capability < 100 or not shape.specialize:
            assert (defines["MIN_BLOCKS"] < 4) == (defines["LOADS"] > 8), "registers"
        else:
            assert defines["MIN_BLOCKS"] < 4 or defines["LOADS"] <= 8, "registers"


@given(kernels, shapes)
def test_a_successor_comes_early_only_where_all_rows_have_a_warp(kernel, shape):
    early = "EARLY_SUCCESSOR" in _defines(launch.plan(kernel, shape))
    fits = shape.d_ff <= 32 * shape.target.multiprocessors
    assert early == (kernel == "ffn_123" and shape.specialize and shape.target.capability >= 90 and fits)


@given(shapes)
def test_every_vector_of_x1_has_one_thread_of_ffn_4(shape):
    plan = launch.ffn_4(shape)
    each, length = _defines(plan)["EACH"], launch.vector_length(shape.dtype)
    assert each >= 1 and each * length <= 32
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
    if shape.specialize:
        assert each == min(32 // length, 7) or (each - 1) * plan.block[0] * length < shape.d_ff <= tile


@given(st.sampled_from([("ffn_1", 20), ("ffn_123", 10), ("ffn_23", 10)]), shapes)
def test_batches_of_a_row_are_equal_and_even(kernel_and_most, shape):
    kernel, most = kernel_and_most
    loads = _defines(launch.plan(kernel, shape))["LOADS"]
    assert 1 <= loads <= most
    if shape.specialize:
        needed = -(-shape.d_model // launch.vector_length(shape.dtype) // 32)
        batches = -(-needed // loads)
        assert batches == -(-needed // most) and loads * batches - needed < 2 * batches
        assert batches == 1 or loads % 2 == 0
        assert batches > 1 or loads == needed
    else:
        assert loads % 2 == 0


@given(shapes)
def test_every_column_has_one_block_of_ffn_4(shape):
    plan = launch.ffn_4(shape)
    defines = _defines(plan)
    assert plan.block == (32 * defines["WARPS"], 1, 1)
    columns = defines["LANES"] * launch.vector_length(shape.dtype)
    assert plan.grid[0] * columns >= shape.d_model > (plan.grid[0] - 1) * columns
    assert 32 % defines["LANES"] == 0 and columns <= plan.block[0]


@pytest.mark.parametrize(
    ("d_model", "dtype", "multiprocessors", "lanes"),
    [
        (4096, "bfloat16", 132, 4),
        (5120, "bfloat16", 132, 4),
        (1536, "bfloat16", 132, 2),
        (4096, "float32", 132, 8),
        (8, "bfloat16", 132, 2),
        (5120, "bfloat16", 108, 8),
        (16384, "float32", 20, 32),
    ],
)
def test_slices_of_ffn_4_follow_the_number_of_multiprocessors(d_model, dtype, multiprocessors, lanes):
    target = launch.Target(90, multiprocessors)
    assert _defines(launch.ffn_4(launch.Shape(d_model, 1000, dtype, target=target)))["LANES"] == lanes


@given(kernels, shapes)
def test_only_hopper_and_later_get_programmatic_launches(kernel, shape):
    plan = launch.plan(kernel, shape)
    assert plan.programmatic == ("PROGRAMMATIC" in _defines(plan))
    assert plan.programmatic == (kernel != "pack_down" and shape.target.capability >= 90)


@given(shapes)
def test_every_tile_of_pack_down_has_one_block(shape):
    plan = launch.pack_down(shape)
    assert plan.block == (32, _defines(plan)["ROWS"], 1) and 32 % plan.block[1] == 0
    for blocks, size in zip(plan.grid, (shape.d_ff, shape.d_model), strict=False):
        assert blocks * 32 >= size > (blocks - 1) * 32


def test_dynamic_kernels_do_not_depend_on_the_shape():
    a, b = (launch.Shape(d, 3 * d, "bfloat16", specialize=False) for d in (4096, 5120))
    for kernel in launch.KERNELS:
        assert launch.plan(kernel, a).defines == launch.plan(kernel, b).defines


def test_models_are_frozen_and_as_published():
    assert (models.LLAMA_2_7B.d_model, models.LLAMA_2_7B.d_ff) == (4096, 11008)
    assert (models.LLAMA_2_13B.d_model, models.LLAMA_2_13B.d_ff) == (5120, 13824)
    assert (models.MINICPM_S_1B.d_model, models.MINICPM_S_1B.d_ff) == (1536, 3840)
    with pytest.raises(dataclasses.FrozenInstanceError):
        models.LLAMA_2_7B.d_model = 1
