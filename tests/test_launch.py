"""Launch plans: every row and column is covered exactly once, within what every supported GPU allows."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prosparse_cupy import launch, models

shapes = st.builds(
    lambda vectors, d_ff, dtype, specialize, sms: launch.Shape(
        vectors * launch.vector_length(dtype), d_ff, dtype, specialize, sms
    ),
    st.integers(1, 4096),
    st.integers(1, 60000),
    st.sampled_from(sorted(launch.ITEMSIZE)),
    st.booleans(),
    st.integers(1, 200),
)
kernels = st.sampled_from(sorted(launch.KERNELS))


def _defines(plan: launch.Launch) -> dict[str, int | None]:
    assert len(dict(plan.defines)) == len(plan.defines)
    return dict(plan.defines)


@given(kernels, shapes)
def test_launches_are_legal(kernel, shape):
    plan = launch.plan(kernel, shape)
    assert plan.kernel == kernel
    assert all(n >= 1 for n in (*plan.grid, *plan.block))
    assert plan.grid[0] < 2**31 and plan.grid[1] <= 65535 and plan.grid[2] <= 65535
    assert plan.block[0] * plan.block[1] * plan.block[2] <= 1024
    assert plan.shared_bytes <= 48 * 1024
    assert len(plan.arguments) <= 16 and set(plan.arguments) <= set("Pfi")


@given(kernels, shapes)
def test_defines_say_the_dtype_and_the_dims(kernel, shape):
    defines = _defines(launch.plan(kernel, shape))
    assert [name for name in defines if name.startswith("DTYPE_")] == [f"DTYPE_{shape.dtype.upper()}"]
    dims = (defines.get("ROW_OPT"), defines.get("COL_OPT"))
    assert dims == ((shape.d_ff, shape.d_model) if shape.specialize else (None, None))


@given(shapes)
def test_every_row_of_ffn_1_has_one_warp(shape):
    plan = launch.ffn_1(shape)
    defines = _defines(plan)
    assert plan.block == (32 * defines["WARPS"], 1, 1)
    rows = [b * defines["WARPS"] + w for b in (0, plan.grid[0] - 1) for w in range(defines["WARPS"])]
    assert min(rows) == 0 and max(rows) >= shape.d_ff - 1  # the last row has a warp
    assert (plan.grid[0] - 1) * defines["WARPS"] < shape.d_ff  # and no block is idle


def _rows_of_set(shape: launch.Shape, plan: launch.Launch, row_set: int) -> list[int]:
    """The vectors that active_bits() visits for a set, over all tiles, threads and vectors of a thread."""
    defines, vectors = _defines(plan), -(-shape.d_ff // launch.vector_length(shape.dtype))
    per_tile = defines["EACH"] * plan.block[0]
    starts = range(0, vectors, defines["SETS"] * per_tile)
    visited = [tile + i * defines["SETS"] + row_set for tile in starts for i in range(per_tile)]
    return [v for v in visited if v < vectors]


@given(st.sampled_from(["ffn_23", "ffn_4"]), shapes)
def test_every_vector_of_rows_is_listed_once(kernel, shape):
    plan = launch.plan(kernel, shape)
    sets = _defines(plan)["SETS"]
    visited = sorted(v for s in range(sets) for v in _rows_of_set(shape, plan, s))
    assert visited == list(range(-(-shape.d_ff // launch.vector_length(shape.dtype))))
    assert _defines(plan)["EACH"] * launch.vector_length(shape.dtype) <= 32


@given(shapes, st.integers(0, 3000))
def test_every_listed_row_of_ffn_23_has_one_warp(shape, listed):
    plan = launch.ffn_23(shape)
    defines = _defines(plan)
    assert plan.block == (32 * defines["WARPS"], 1, 1)
    assert plan.grid[0] % defines["SETS"] == 0 and plan.grid[0] <= shape.sm_count
    members = plan.grid[0] // defines["SETS"]
    taken = [
        i
        for m in range(members)
        for w in range(defines["WARPS"])
        for i in range(m + w * members, listed, members * defines["WARPS"])
    ]
    assert sorted(taken) == list(range(listed))


@given(shapes)
def test_passes_over_a_row_are_even(shape):
    loads = _defines(launch.ffn_1(shape))["LOADS"]
    assert 1 <= loads <= 20
    if shape.specialize:
        vectors = shape.d_model // launch.vector_length(shape.dtype)
        passes = -(-vectors // (32 * loads))
        assert passes == -(-vectors // (32 * 20)) and 32 * loads * passes - vectors < 32 * (passes + 1)


@given(shapes)
def test_every_column_has_one_block_of_ffn_4(shape):
    plan = launch.ffn_4(shape)
    defines = _defines(plan)
    assert plan.block == (32 * defines["WARPS"], 1, 1)
    columns = defines["LANES"] * launch.vector_length(shape.dtype)
    assert plan.grid[0] * columns >= shape.d_model > (plan.grid[0] - 1) * columns
    assert 32 % defines["LANES"] == 0


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
