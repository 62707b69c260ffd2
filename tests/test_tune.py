"""`prosparse-cupy tune`: what is kept, with everything of the GPU made up; and on a GPU."""

from __future__ import annotations

import json
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from prosparse_cupy import cli, compiler, knobs, measured
from prosparse_cupy.cli import tune
from prosparse_cupy.compiler import KernelCompileError
from prosparse_cupy.models import Model
from prosparse_cupy.problem import H100, Problem
from prosparse_cupy.testing.layers import Timed

MODEL = Model("small", 64, 200, 1, 0.01, 0.8)


class _Gpu:
    """Launches as NumPy work: what a launch with these knobs leaves, and how long it takes."""

    def __init__(self, monkeypatch) -> None:
        self.now: knobs.Knobs | None = None
        self.us = lambda kernel, chosen, sparsity: 10.0
        self.broken: set[knobs.Knobs] = set()
        self.wrong: set[knobs.Knobs] = set()
        monkeypatch.setattr(tune, "Layers", lambda *_, tokens: SimpleNamespace(calls=lambda *setting: self._calls(*setting)))
        monkeypatch.setattr(tune, "current_device", lambda: 0)
        monkeypatch.setattr(tune.compiler, "target_of", lambda device: H100)
        monkeypatch.setattr(tune.compiler, "trying", self._trying)
        monkeypatch.setattr(tune.timing, "capture", self._capture)
        monkeypatch.setattr(tune.timing, "graph_clock", lambda replay: replay.us())

    def _calls(self, op: str, mask: str, sparsity: float, weights: str) -> list[Timed]:
        self.weights, self.mask = weights, mask
        self.steered = sparsity

        def timed() -> Timed:
            out = np.empty(3, np.float32)
            call = lambda: self._launch(out)  # noqa: E731
            call.sparsity = sparsity
            return Timed(call, out, None, None, None)

        return [timed(), timed()]

    @contextmanager
    def _trying(self, problem: Problem, chosen: knobs.Knobs):
        self.now, self.kernel = chosen, problem.kernel
        yield [object()]
        self.now = None

    def _launch(self, out: np.ndarray) -> None:
        if self.now in self.broken:
            raise KernelCompileError("too many registers")
        out.fill(2.0 if self.now in self.wrong else 1.0)

    def _capture(self, calls):
        kernel, chosen, sparsity = self.kernel, self.now, calls[0].sparsity

        def replay() -> None:
            for call in calls:
                call()

        def us() -> float:
            assert self.steered == sparsity, "other calls have steered the layers' weights since"
            return self.us(kernel, chosen, sparsity) * len(calls)

        replay.us = us
        return replay


@pytest.fixture
def gpu(monkeypatch):
    return _Gpu(monkeypatch)


def _tuned() -> dict[str, measured.Measured]:
    return {m.problem.kernel: m for m in tune.tune(MODEL, "bfloat16", None, "abc1234", lambda *_: None)}


def _others(kernel: str) -> list[knobs.Knobs]:
    """Candidates besides the rule's."""
    return list(knobs.candidates(Problem(kernel, MODEL.d_model, MODEL.d_ff, "bfloat16"), H100))[1:]


def test_the_fastest_is_kept(gpu):
    gpu.us = lambda kernel, chosen, sparsity: 8.0 if chosen == _others(kernel)[2] else 10.0
    for kernel, found in _tuned().items():
        assert found.knobs == _others(kernel)[2] and (found.us, found.rule_us, found.commit) == (8.0, 10.0, "abc1234")
        assert found.problem == Problem(kernel, 64, 200, "bfloat16")


def test_what_gains_nothing_is_not_kept(gpu):
    gpu.us = lambda kernel, chosen, sparsity: 9.97 if chosen in _others(kernel) else 10.0
    for kernel, found in _tuned().items():
        assert found.knobs == knobs.rule(Problem(kernel, 64, 200, "bfloat16"), H100) and found.us == 10.0


@pytest.mark.parametrize("elsewhere", [0.0, 0.5, 0.97, 0.99, 1.0])
def test_what_loses_at_another_sparsity_is_not_kept(gpu, elsewhere):
    first, second = _others("ffn_4")[:2]
    times = {(first, 0.8): 7.0, (first, elsewhere): 10.2, (second, 0.8): 8.0, (second, elsewhere): 10.04}
    gpu.us = lambda kernel, chosen, sparsity: times.get((chosen, sparsity), 10.0)
    assert _tuned()["ffn_4"].knobs == second


@pytest.mark.parametrize("tokens", [2, 3, 8])
def test_several_tokens(gpu, tokens):
    """They have candidates of their own, of which none may lose where tokens share their neurons."""
    every = {k: list(knobs.candidates(Problem(k, 64, 200, "bfloat16", tokens=tokens), H100)) for k in tune.TIMED_IN}
    assert all(len(found) > 4 for found in every.values())
    gpu.us = lambda kernel, chosen, sparsity: {every[kernel][1]: 8.0, every[kernel][2]: 9.0}.get(chosen, 10.0)
    found = tune.tune(MODEL, "bfloat16", None, "abc1234", lambda *_: None, tokens=tokens)
    assert [m.problem.tokens for m in found] == [tokens] * 4
    assert all(m.knobs == every[m.problem.kernel][1] for m in found)
    gpu.us = lambda kernel, chosen, sparsity: {
        every[kernel][1]: 12.0 if gpu.mask == "correlated" else 8.0,
        every[kernel][2]: 9.0,
    }.get(chosen, 10.0)
    found = tune.tune(MODEL, "bfloat16", None, "abc1234", lambda *_: None, tokens=tokens)
    assert all(m.knobs == every[m.problem.kernel][1 if m.problem.kernel == "ffn_1" else 2] for m in found)


def test_what_does_not_compile_is_passed_over(gpu):
    gpu.broken = set(_others("ffn_23"))
    assert _tuned()["ffn_23"].knobs == knobs.rule(Problem("ffn_23", 64, 200, "bfloat16"), H100)


def test_a_rule_that_does_not_compile_is_the_compilers_error(gpu):
    gpu.broken = {knobs.rule(Problem("ffn_23", 64, 200, "bfloat16"), H100)}
    with pytest.raises(KernelCompileError, match="too many registers"):
        _tuned()


def test_no_sparsity_is_timed_that_cannot_change_the_choice(gpu):
    fast, asked = _others("ffn_4")[0], []
    gpu.us = lambda kernel, chosen, sparsity: 9.0 if chosen == fast and sparsity == 0.8 else 11.0 if chosen == fast else 10.0
    calls = gpu._calls
    gpu._calls = lambda op, mask, sparsity, weights: asked.append((op, sparsity)) or calls(op, mask, sparsity, weights)
    assert _tuned()["ffn_4"].knobs == knobs.rule(Problem("ffn_4", 64, 200, "bfloat16"), H100)
    assert [s for op, s in asked if op == "ffn_4"] == [0.8, 0.0]
    assert [s for op, s in asked if op == "ffn_1"] == [0.8]


def test_other_bits_end_it(gpu):
    gpu.wrong = {_others("ffn_4")[0]}
    with pytest.raises(tune.TuningError, match=r"ffn_4: ColumnKnobs\(.*\) gives other bits than ColumnKnobs"):
        _tuned()


def test_other_bits_at_another_sparsity_end_it_too(gpu):
    fast = _others("ffn_4")[0]
    gpu.us = lambda kernel, chosen, sparsity: 9.0 if chosen == fast else 10.0
    calls = gpu._calls

    def wrong_without_sparsity(op, mask, sparsity, weights):
        gpu.wrong = {fast} if sparsity == 0.0 else set()
        return calls(op, mask, sparsity, weights)

    gpu._calls = wrong_without_sparsity
    with pytest.raises(tune.TuningError, match="gives other bits"):
        _tuned()


def test_a_gpu_that_is_full_is_an_error_message(gpu, tmp_path, monkeypatch):
    def fill(*_, **__):
        raise MemoryError("out of memory allocating 9 bytes")

    monkeypatch.setattr(cli, "current_device", lambda: 0)
    monkeypatch.setattr(cli, "best_dense", lambda dtype: None)
    monkeypatch.setattr(tune, "Layers", fill)
    done = CliRunner().invoke(cli.main, ["tune", "--output", str(tmp_path / "table.json")])
    assert done.exit_code == 1 and "Error: out of memory" in done.output and not any(tmp_path.iterdir())


def test_every_candidate_is_told(gpu):
    told = []
    tune.tune(MODEL, "bfloat16", None, "abc1234", lambda *doing: told.append(doing))
    for kernel in tune.TIMED_IN:
        number = len(_others(kernel)) + 1
        assert [t for t in told if t[0] == kernel] == [(kernel, i, number) for i in range(number)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--d-model", "64"], "--d-model and --d-ff go together"),
        (["--model", "7b", "--d-model", "64", "--d-ff", "8"], "leave out --d-model and --d-ff"),
        (["--d-model", "60", "--d-ff", "8"], "must be a multiple of 8 for bfloat16, got 60"),
        (["--sparsity", "nan"], "nan is not a number"),
    ],
)
def test_wrong_options_get_a_usage_error(arguments, message):
    done = CliRunner().invoke(cli.main, ["tune", *arguments])
    assert done.exit_code == 2 and message in done.output


def test_the_command_writes_a_table_that_is_then_used(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "current_device", lambda: 0)
    monkeypatch.setattr(cli, "best_dense", lambda dtype: None)
    monkeypatch.setattr(measured, "user_folder", lambda: tmp_path)
    monkeypatch.setattr(measured, "_SHIPPED", tmp_path / "shipped")
    fast = _others("ffn_23")[0]
    gpu.us = lambda kernel, chosen, sparsity: 8.0 if chosen == fast else 10.0
    measured.tables.cache_clear()
    done = CliRunner().invoke(cli.main, ["tune", "--d-model", "64", "--d-ff", "200", "--sparsity", "0.8"])
    assert done.exit_code == 0, done.output
    file = tmp_path / measured.file_name(H100)
    assert str(file) in done.output.replace("\n", "") and len(json.loads(file.read_text())["measured"]) == 4
    assert measured.choose(Problem("ffn_23", 64, 200, "bfloat16"), H100) == fast
    assert measured.describe(H100).startswith("0 shipped, 4 own (")
    measured.tables.cache_clear()


@pytest.mark.gpu
def test_tuning_on_the_gpu(tmp_path, monkeypatch):
    """A small shape, whose launches all give the same bits; what was found is what is launched."""
    from prosparse_cupy.device import current_device

    monkeypatch.setattr(measured, "user_folder", lambda: tmp_path)
    measured.tables.cache_clear()
    try:
        done = CliRunner().invoke(cli.main, ["tune", "--d-model", "512", "--d-ff", "1500"])
        assert done.exit_code == 0, done.output
        target = compiler.target_of(current_device())
        for m in measured.read(tmp_path / measured.file_name(target), target):
            assert 0 < m.us <= m.rule_us
            assert measured.choose(m.problem, target) == m.knobs
    finally:
        measured.tables.cache_clear()
