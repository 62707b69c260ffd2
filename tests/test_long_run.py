"""The long run: how it judges memory, what it says of a run, and on a GPU a short one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import long_run
import numpy as np
import pytest
from click.testing import CliRunner
from long_run import LIMITS, MIB, Sample, growth_of, judge

SECONDS = 600.0


def _samples(host=lambda t: 0.0, device=lambda t: 0.0, seconds: float = SECONDS, number: int = 601) -> list[Sample]:
    """So many MiB more than a GiB at each time."""
    times = np.linspace(0, seconds, number)
    return [Sample(t, int(1000 * t), round((1024 + host(t)) * MIB), round((1024 + device(t)) * MIB)) for t in times]


def _noise(t: float) -> float:
    """Some MiB up and down."""
    return 8 * np.sin(17 * t)


@pytest.mark.parametrize("which", ["host", "device"])
@pytest.mark.parametrize(
    ("taken", "is_flat"),
    [
        (lambda t: 0.0, True),
        (_noise, True),
        (lambda t: 5000.0 if t > 30 else 0.0, True),  # what compiling and pools take while they warm up
        (lambda t: 20.0 if t > 400 else 0.0, True),  # a pool's block
        (lambda t: 3000.0 if 399 < t < 400 else 0.0, True),  # for a second
        (lambda t: -t, True),
        (lambda t: 0.05 * t, True),
        (lambda t: 0.1 * t, False),
        (lambda t: 0.1 * t + _noise(t), False),
        (lambda t: max(0.0, t - 250) * 0.2, False),
        (lambda t: 100.0 if t > 400 else 0.0, False),
        (lambda t: 64.0 * (t // 100), False),
    ],
)
def test_memory_is_flat_or_not(which, taken, is_flat):
    verdict = judge(_samples(**{which: taken}), SECONDS)
    assert verdict.is_flat == is_flat, verdict
    assert verdict.is_flat or f"{which} memory by " in verdict.why
    other = {"host": "device", "device": "host"}[which]
    assert abs(verdict.growth[other]) < MIB


def test_growth_is_that_of_a_line():
    assert growth_of([0, 1, 2, 3], [10, 12, 14, 16]) == 6
    assert growth_of([0, 10, 30], [7, 7, 7]) == 0
    assert growth_of([0, 1, 2], [100, 50, 0]) == -100
    uneven = judge([Sample(t, 0, 10 * round(t) * MIB, MIB) for t in (200.0, 201.0, 202.0, 300.0, 599.0, 600.0)], SECONDS)
    assert uneven.growth == {"host": 4000 * MIB, "device": 0} and not uneven.is_flat


def test_too_few_samples_are_no_verdict():
    for samples in ([], _samples(number=3), _samples(seconds=150.0)):
        verdict = judge(samples, SECONDS)
        assert not verdict.is_flat and "samples after the warm-up" in verdict.why


def test_a_leak_of_four_bytes_a_call_shows():
    """In ten minutes of 30,000 calls a second."""
    assert not judge(_samples(host=lambda t: 4 * 30_000 * t / MIB), SECONDS).is_flat
    assert set(LIMITS) == {"host", "device"}


class _Work:
    """Work that takes a moment, and counts."""

    def __init__(self) -> None:
        self.results = self.checked = 0
        self.failures, self.counts = [], Counter()

    def step(self) -> None:
        self.results += 1
        self.counts["steps"] += 1


def test_a_run_samples_all_the_time(monkeypatch):
    """On a clock that each step moves on by a tenth of a second."""
    work, shown = _Work(), []
    monkeypatch.setattr(long_run.time, "monotonic", lambda: work.results / 10)
    monkeypatch.setattr(long_run, "sample", lambda seconds, results: Sample(seconds, results, MIB, MIB))
    samples = long_run.run(work, 600, lambda done, doing: shown.append(done))
    times = [s.seconds for s in samples]
    assert times[0] == 0 and times[-1] >= 600 and 590 <= len(times) <= 602 and shown == times[:-1]
    assert max(np.diff(times)) < 1.2 and samples[-1].results == work.results == 6000
    assert judge(samples, 600).is_flat


def test_an_error_ends_a_run_and_is_told(monkeypatch, capsys):
    work = _Work()

    def fail():
        raise RuntimeError("an illegal memory access was encountered")

    work.step = fail
    monkeypatch.setattr(long_run, "sample", lambda seconds, results: Sample(seconds, results, MIB, MIB))
    assert len(long_run.run(work, 600)) == 1
    assert "RuntimeError: an illegal memory access" in work.failures[0] and "Traceback" in capsys.readouterr().err


def test_what_a_run_is_called(monkeypatch):
    """Clean is a run with results that were checked, none wrong, and flat memory."""
    monkeypatch.setattr(long_run, "where", lambda: {"gpu": "a GPU", "cuda_driver": "12090", "commit": "abc"})
    flat, grown = judge(_samples(), SECONDS), judge(_samples(host=lambda t: t), SECONDS)
    for checked, failures, verdict, is_clean in [
        (60, [], flat, True),
        (0, [], flat, False),
        (60, ["x"], flat, False),
        (60, [], grown, False),
    ]:
        work = SimpleNamespace(results=6000, checked=checked, failures=failures, counts=Counter(graphs=6000))
        found = json.loads(json.dumps(long_run.summary(work, _samples(), verdict, 7, SECONDS)))
        assert (
            found["is_clean"] == is_clean
            and found["is_flat"] == verdict.is_flat
            and found["seed"] == 7
            and found["by_work"] == {"graphs": 6000}
        )
        assert found["commit"] == "abc" and len(found["samples"]) == 601 and found["memory"]["limits"] == LIMITS
        long_run._tell(found)


def test_without_a_gpu_the_command_says_so(monkeypatch):
    from prosparse_cupy import device

    def no_gpu():
        raise device.NoGPUError("prosparse_cupy: no CUDA GPU")

    monkeypatch.setattr(device, "current_device", no_gpu)
    done = CliRunner().invoke(long_run.main, ["--seconds", "1", "--seed", "5"])
    assert done.exit_code == 1 and "no CUDA GPU" in done.output and "--seconds 1 --seed 5" in done.output


@pytest.mark.gpu
def test_a_short_run(tmp_path):
    path = tmp_path / "found.json"
    command = [sys.executable, "-m", "tests.long_run", "--seconds", "15", "--seed", "1", "--every", "5", "--no-generate"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(long_run.ROOT), *filter(None, sys.path)])}
    pipes = {"capture_output": True, "text": True, "timeout": 300, "check": False}
    done = subprocess.run([*command, "--json", str(path)], cwd=long_run.ROOT, env=environment, **pipes)
    assert path.is_file(), done.stdout + done.stderr[-3000:]
    found = json.loads(path.read_text())  # whose memory is not judged here: others may use the GPU meanwhile
    assert not found["failures"] and found["checked"] >= 5 and len(found["samples"]) > 2, found["first_failures"]
    assert len(found["by_work"]) >= 2 and sum(found["by_work"].values()) == found["results"]
