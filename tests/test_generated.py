"""Generated cases of every operator: `properties` holds for each of them, wherever it runs.

``python -m tests.fuzz`` runs more.
"""

from __future__ import annotations

import pytest
from cases import BIASES, ON_TENSOR_CORES, Case, Kind, cases, cases_of
from hypothesis import HealthCheck, given, settings
from properties import WITHOUT_INVARIANCE, Place, check
from simulated import simulated

from prosparse_cupy.problem import H100, Problem
from prosparse_cupy.tensor_cores import knobs_on_tensor_cores

NUMPY = {"elements": 10_000, "ways": ("call",)}
HOST = {"elements": 3_000, "longest": 40, "ways": ("call", "stream", "graph")}
GPU = {"elements": 100_000, "specialized": ((264, 101),), "ways": ("call", "stream", "graph", "dlpack")}
# Few, as each is ten kernels and more to build: what differs between them is in other tests of the host's kernels too.
HOST_KINDS = {
    "tokens": Kind("bfloat16", False, 8, True, "relu", (), False, False, False),
    "drelu": Kind("float32", False, 8, True, "drelu", BIASES, True, False, False),
    "ungated": Kind("float16", False, 5, False, "relu2", BIASES[1:], True, False, False),
    "compressed": Kind("bfloat16", True, 0, True, "relu", (), False, False, False),
}
GPU_KINDS = {
    **HOST_KINDS,
    "specialised": Kind("bfloat16", False, 3, True, "relu2", BIASES, True, False, True),
    "partial": Kind("bfloat16", False, 2, True, "drelu", BIASES, False, True, False),
    "vector": Kind("float16", False, 0, True, "relu2", (), True, False, False),
    "packed": Kind("bfloat16", True, 4, False, "relu", BIASES[1:], False, False, True),
}
some = settings(deadline=None, suppress_health_check=list(HealthCheck))


@settings(some, max_examples=200)
@given(cases(**NUMPY))
def test_numpy(case):
    check(case, Place("numpy"))


@pytest.mark.parametrize("kind", HOST_KINDS.values(), ids=HOST_KINDS)
def test_simulated_gpu(host, kind):
    with simulated(host) as cuda:
        place = Place("host", cuda.random.seed)

        @settings(some, max_examples=10)
        @given(cases_of(kind, **HOST))
        def run(case):
            check(case, place)

        run()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", GPU_KINDS.values(), ids=GPU_KINDS)
def test_gpu(kind):
    place = Place("gpu")

    @settings(some, max_examples=40)
    @given(cases_of(kind, **GPU))
    def run(case):
        check(case, place)

    run()


_ON_TENSOR_CORES = Kind("bfloat16", False, 8, True, "relu", BIASES, False, False, True)


def _is_whole(case: Case) -> bool:
    return case.operator in ("sparse_ffn", "SparseFFN")


@pytest.mark.slow
def test_a_simulated_gpu_without_batch_invariance(host):
    with simulated(host) as cuda:
        place = Place("host", cuda.random.seed)

        @settings(some, max_examples=6)
        @given(cases_of(_ON_TENSOR_CORES, **{**HOST, "specialized": ON_TENSOR_CORES[:1]}).filter(_is_whole))
        def run(case):
            check(case, place)

        run()
        assert place.counts[WITHOUT_INVARIANCE] and {"ffn_1_mma", "ffn_4_mma"} <= {made.kernel for made in cuda.launches}


@pytest.mark.gpu
@pytest.mark.parametrize("dims", ON_TENSOR_CORES)
def test_gpu_without_batch_invariance(dims):
    place, kind = Place("gpu"), _ON_TENSOR_CORES
    problems = [Problem(k, *dims, "bfloat16", True, 8, batch_invariant=False) for k in ("ffn_1", "ffn_4")]
    assert all(knobs_on_tensor_cores(problem, H100) for problem in problems)

    @settings(some, max_examples=30)
    @given(cases_of(kind, **{**GPU, "specialized": (dims,)}))
    def run(case):
        check(case, place)

    run()
    assert place.counts[WITHOUT_INVARIANCE]


@pytest.mark.gpu
def test_torch_tensors(torch):
    place = Place("gpu")

    @settings(some, max_examples=40)
    @given(cases_of(GPU_KINDS["tokens"], **{**GPU, "ways": ("torch",)}))
    def run(case):
        check(case, place)

    run()


@settings(some, max_examples=50)
@given(cases(**NUMPY))
def test_a_case_reads_what_it_prints(case):
    assert Case.parse(repr(case)) == case
