"""The shim catches what it is there to catch: barriers that are missing, indices that are off, sums that depend on an order."""

from __future__ import annotations

import re

import numpy as np
import pytest
from checks import DTYPES, bits, poisoned, token, weights
from host_cuda import HostRunError
from plans import Shape, plan_of

from prosparse_cupy.compiler import source
from prosparse_cupy.formats import ITEMSIZE
from prosparse_cupy.launch import Launch
from prosparse_cupy.problem import KERNELS

BARRIER = "__syncthreads();"
FIRST_HALVES = ("ffn_1", "ffn_12", "ffn_123")
SANITIZER = r"AddressSanitizer|runtime error"
# A barrier of a kernel's source by its number, and the tokens with which it matters. Of two that surround a passing on through
# shared memory the first matters only to kernels that pass on more than once.
BARRIERS = [
    ("ffn_1", 1, 2),
    ("ffn_12", 1, 2),
    ("ffn_123", 0, 2),
    ("ffn_123", 1, 2),
    ("ffn_23", 1, 2),
    ("ffn_23", 2, 1),
    ("ffn_4", 0, 1),
    ("ffn_4", 0, 2),
    ("pack_down", 0, 1),
]


def _inputs(kernel: str, shape: Shape, tokens: int = 1) -> tuple[list, np.ndarray]:
    rng = np.random.default_rng(5)
    x, h = (np.stack([token(d, shape.dtype, rng) for _ in range(tokens)]) for d in (shape.d_model, shape.d_ff))
    w = weights(shape.d_ff, shape.d_model, shape.dtype)
    dims = [shape.d_ff, shape.d_model]
    if kernel == "pack_down":
        return [w.reshape(shape.d_model, shape.d_ff), None, *dims], poisoned((shape.d_ff, shape.d_model), shape.dtype)
    inputs = {
        "ffn_1": [x, w, None],
        "ffn_12": [x, w, None, 0.0],
        "ffn_123": [x, w, w, None, 0.0],
        "ffn_23": [h, x, w, None, 0.0],
        "ffn_4": [h, w, None],
    }[kernel]
    return [*inputs, *dims], poisoned((tokens, shape.d_model if kernel == "ffn_4" else shape.d_ff), shape.dtype)


def _barriers(kernel: str) -> list[tuple[int, tuple[str, int]]]:
    """The barriers of a kernel's source: their offsets, and file and line."""
    found = []
    file, line = "", 0
    offset = 0
    for text in source(kernel).splitlines(keepends=True):
        if directive := re.match(r'#line (\d+) "(.+)"', text):
            file, line = directive[2], int(directive[1]) - 1
        if BARRIER in text:
            found.append((offset + text.index(BARRIER), (file, line)))
        offset, line = offset + len(text), line + 1
    return found


def _is_caught(host, kernel: str, shape: Shape, code: str, tokens: int = 1) -> bool:
    """Whether the run ends in a report, or some seed gives another result than the shipped kernel."""
    plan = plan_of(kernel, shape, tokens=tokens)
    inputs, out = _inputs(kernel, shape, tokens)
    good = host.run(plan, inputs, out)
    try:
        return any(not np.array_equal(bits(host.run(plan, inputs, out, seed=s, code=code)), bits(good)) for s in range(4))
    except HostRunError:
        return True


def test_every_barrier_is_taken_out_somewhere():
    every = {place for kernel in KERNELS for _, place in _barriers(kernel)}
    assert every == {_barriers(kernel)[which][1] for kernel, which, _ in BARRIERS}


@pytest.mark.parametrize(("kernel", "which", "tokens"), BARRIERS)
def test_a_missing_barrier_is_caught(host, kernel, which, tokens):
    shape = Shape(
        512 if kernel in (*FIRST_HALVES, "ffn_23") else 64, 40, "float32", specialize=False
    )  # both halves of a row have loads
    at = _barriers(kernel)[which][0]
    code = source(kernel)[:at] + source(kernel)[at:].replace(BARRIER, ";", 1)
    assert _is_caught(host, kernel, shape, code, tokens)


def test_a_missing_barrier_of_a_warp_is_caught(host):
    code = source("ffn_4")
    assert code.count("__syncwarp();\n    return total;") == 1
    shape = Shape(64, 2000, "float32", specialize=False)
    assert _is_caught(host, "ffn_4", shape, code.replace("__syncwarp();\n    return total;", "return total;"))


OFF_BY_ONE = [
    ("ffn_1", 1, "return c < chunks;", "return c <= chunks;"),
    ("ffn_1", 1, "if (exists<STEP>(own + 32 * STEP * i, chunks))\n            add_products", "add_products"),
    ("ffn_1", 2, "if (!exists<2>(own + 64 * i, chunks)) continue;", ""),
    ("ffn_23", 8, "if (exists<2>(own + 64 * i, chunks)) add", "add"),
    ("ffn_1", 8, "WHOLE_GROUPS<N> || row < rows ? row : rows - 1", "row"),
    ("ffn_12", 8, "const bool inside = WHOLE_GROUPS<N> || row < rows;", "const bool inside = row <= rows;"),
    *((kernel, 1, "if (first >= rows) return;", "if (first > rows) return;") for kernel in FIRST_HALVES),
    ("ffn_23", 1, "first + lane < rows", "first + lane <= rows"),
    ("ffn_4", 1, "row + VEC <= rows ?", "row <= rows ?"),
    *(("ffn_4", tokens, "row + e < rows) value", "row + e <= rows) value") for tokens in (1, 2)),
    *(("ffn_4", tokens, "WHOLE_SLICES || chunk < stored<W_DOWN>(chunks)", "true") for tokens in (1, 2)),
    *(("ffn_4", tokens, "c >= columns", "c > columns") for tokens in (1, 2)),
    ("pack_down", 1, "j0 + threadIdx.x < rows", "j0 + threadIdx.x <= rows"),
]


@pytest.mark.parametrize(("kernel", "tokens", "right", "wrong"), OFF_BY_ONE)
def test_an_index_off_by_one_is_reported(host, kernel, tokens, right, wrong):
    shape = Shape(264, 33, "bfloat16", specialize=False)
    code = source(kernel)
    assert right in code
    inputs, out = _inputs(kernel, shape, tokens)
    with pytest.raises(HostRunError, match=SANITIZER):
        host.run(plan_of(kernel, shape, tokens=tokens), inputs, out, code=code.replace(right, wrong))


ATOMIC_SUM = """
extern "C" __global__ void __launch_bounds__(32) atomic_sum(const float* x, float* out, int n) {
    if (blockIdx.x * 32 + threadIdx.x < n) atomicAdd(out, x[blockIdx.x * 32 + threadIdx.x]);
}
"""
SHARED = """
extern "C" __global__ void shared_array(const float* x, float* out, int n) {
    __shared__ float tile[32];
    tile[threadIdx.x + n] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = tile[31 - threadIdx.x];
}
"""
COLLECTIVE = """
extern "C" __global__ void collective(const float* x, float* out, int n) {
    if ((int)threadIdx.x >= n) return;
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
}
"""
DEADLOCK = """
extern "C" __global__ void deadlock(const float* x, float* out, int n) {
    if ((int)threadIdx.x < n) __syncthreads(); else __syncwarp();
    out[threadIdx.x] = x[threadIdx.x];
}
"""


def _tiny(host, name: str, code: str, n: int, grid: int = 1, seed: int = 0) -> np.ndarray:
    plan = Launch(name, (grid, 1, 1), (32, 1, 1), (), ("P", "P", "i"))
    x = np.random.default_rng(0).standard_normal(32 * grid).astype(np.float32)
    return host.run(plan, [x, None, n], np.zeros(32, np.float32), seed=seed, code=code)


def test_a_sum_that_depends_on_the_order_of_blocks_is_caught(host):
    assert len({_tiny(host, "atomic_sum", ATOMIC_SUM, 1024, grid=32, seed=s)[0] for s in range(8)}) > 1


def test_shared_memory_has_bounds(host):
    x = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    np.testing.assert_array_equal(_tiny(host, "shared_array", SHARED, 0), x[::-1])
    with pytest.raises(HostRunError, match=SANITIZER):
        _tiny(host, "shared_array", SHARED, 1)


def test_shared_memory_is_poisoned_before_every_block(host):
    code = SHARED.replace("tile[threadIdx.x + n] = x[threadIdx.x];", "if (x[0] == 0) tile[threadIdx.x] = n;")
    assert np.isnan(_tiny(host, "shared_array", code, 0, grid=2)).all()


def test_a_collective_with_exited_lanes_is_reported(host):
    x = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    np.testing.assert_array_equal(_tiny(host, "collective", COLLECTIVE, 32), x.reshape(-1, 2)[:, ::-1].ravel())
    with pytest.raises(HostRunError, match="has exited"):
        _tiny(host, "collective", COLLECTIVE, 31)


def test_a_deadlock_is_reported(host):
    with pytest.raises(HostRunError, match="deadlock"):
        _tiny(host, "deadlock", DEADLOCK, 16)


def test_a_misaligned_vector_is_reported(host):
    code = source("ffn_1").replace("chunks_of(x)", "reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(x) + 2)")
    shape = Shape(64, 4, "bfloat16")
    inputs, out = _inputs("ffn_1", shape)
    with pytest.raises(HostRunError, match="misaligned"):
        host.run(plan_of("ffn_1", shape), inputs, out, code=code)


def test_a_kernel_that_does_not_compile_shows_the_compilers_message(host):
    shape = Shape(8, 1, "float32")
    inputs, out = _inputs("ffn_1", shape)
    code = source("ffn_1").replace("return warp_sums(total);", "return no_such_sum(total);")
    with pytest.raises(HostRunError, match=r"row_dot\.cuh:\d+:\d+: error: .no_such_sum."):
        host.run(plan_of("ffn_1", shape), inputs, out, code=code)


def test_dtypes_are_those_of_the_library():
    assert set(DTYPES) == set(ITEMSIZE)
