"""Markers and fixtures: GPU tests skip with the reason where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from host_cuda import HostKernels, why_unavailable


@cache
def _why_no_gpu() -> str:
    try:
        import cupy

        return "" if cupy.cuda.runtime.getDeviceCount() else "no CUDA GPU"
    except Exception as error:
        return f"no CUDA GPU: {type(error).__name__}: {error}"


# What builds kernels, packages or pages, runs a model or a type checker: too long for every save.
_SLOW = {
    *("test_attend", "test_cli_generate", "test_compile", "test_docs", "test_examples", "test_families", "test_generate"),
    *("test_host_batches", "test_host_cuda", "test_host_kernels", "test_packaging", "test_small_model", "test_torch_linears"),
    *(
        "test_engines",
        "test_abuse_models",
        "test_speculation",
        "test_torch_compressed",
        "test_torch_patch",
        "test_types",
        "test_vllm",
    ),
}
_SLOW_TESTS = {
    *("test_a_process_that_fails_while_the_others_add", "test_batches_measures_a_small_model"),
    *("test_compiled_code_has_a_graph_for_few_tokens_and_one_for_many", "test_whole_model"),
    "test_nothing_is_fetched_started_or_unpickled_with_models",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        builds_or_starts = {"host", "two"} & set(getattr(item, "fixturenames", ()))  # kernels, and processes
        is_slow = item.path.stem in _SLOW or item.originalname in _SLOW_TESTS or builds_or_starts
        if not is_slow and not any(map(item.get_closest_marker, ("gpu", "large", "slow"))):
            item.add_marker(pytest.mark.quick)
        if item.get_closest_marker("slow") and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="pytest -m slow runs it, as CI does"))
    if not _why_no_gpu():
        return
    skip = pytest.mark.skip(reason=_why_no_gpu())
    for item in items:
        if item.get_closest_marker("gpu") or item.get_closest_marker("large"):
            item.add_marker(skip)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker with nothing left to do takes half of what another still has. By default the last one runs alone for long."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run that pytest-xdist's workers share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def host(shared_folder: Path) -> Iterator[HostKernels]:
    """The kernels on the host, under the sanitizers; pytest-xdist's workers share what they build."""
    if reason := why_unavailable():
        pytest.skip(reason)
    # A folder that outlives the run saves building again.
    builds = Path(os.environ.get("PROSPARSE_HOST_BUILDS", shared_folder / "host_cuda_builds"))
    builds.mkdir(parents=True, exist_ok=True)
    kernels = HostKernels(builds)
    yield kernels
    kernels.close()


@pytest.fixture
def torch_gpu(torch) -> None:
    """Skips where torch has no GPU, for tests that import torch themselves."""


@pytest.fixture
def torch():
    """torch with a GPU."""
    module = pytest.importorskip("torch")
    if not module.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return module
