"""Markers and fixtures: GPU tests skip with the reason where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
from host_cuda import HostKernels, why_unavailable


@cache
def _why_no_gpu() -> str:
    try:
        import cupy

        return "" if cupy.cuda.runtime.getDeviceCount() else "no CUDA GPU"
    except Exception as error:
        return f"no CUDA GPU: {type(error).__name__}: {error}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not _why_no_gpu():
        return
    skip = pytest.mark.skip(reason=_why_no_gpu())
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def host() -> Iterator[HostKernels]:
    """The kernels on the host, under the sanitizers."""
    if reason := why_unavailable():
        pytest.skip(reason)
    kernels = HostKernels()
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
