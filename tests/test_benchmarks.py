"""The benchmarks without a GPU: statistics and the timing loop, results, tables, figures, comparisons, commands."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)

sys.path.append(str(ROOT))  # last: the installed package goes before the checkout's

import prosparse_cupy as psc  # noqa: E402
from benchmarks import cli, compare, conditions, tables  # noqa: E402
from benchmarks.paper import PUBLISHED  # noqa: E402
from benchmarks.results import BatchesRow, DecodeRow, Head, Result, Row, read_json, write_csv, write_json  # noqa: E402
from prosparse_cupy.testing import timing  # noqa: E402
from prosparse_cupy.testing.dense import Dense  # noqa: E402

HEAD = Head(
    "sweep",
    "NVIDIA H100",
    "580",
    "13.0",
    "14.2",
    "2.11",
    "torch",
    "abc1234",
    True,
    "2026-11-24",
    "graph",
    3000.0,
    1.0,
    ("a clock",),
)


def _row(op: str = "ffn_23", time_us: float = 6.0, **changes) -> Row:
    given = {
        "op": op,
        "variant": "prosparse",
        "model": "7B",
        "d_model": 4096,
        "d_ff": 11008,
        "dtype": "bfloat16",
        "batch": 1,
        "mask": "hot",
        "sparsity": 0.9,
        "layers": 16,
        "time_us": time_us,
        "p10_us": time_us * 0.99,
        "p90_us": time_us * 1.01,
        "dense_us": 36.0,
        "bytes": 9_000_000,
        "floor_us": 4.0,
        "error": 0.002,
        "dense_error": 0.004,
        "checked": True,
        "noisy": False,
    }
    return Row(**{**given, **changes})


def _decode_row(**changes) -> DecodeRow:
    given = {
        "op": "decode",
        "variant": "step",
        "model": "7B",
        "d_model": 4096,
        "d_ff": 11008,
        "n_layers": 32,
        "dtype": "bfloat16",
        "context": 512,
        "sparsity": 0.893,
        "time_us": 5000.0,
        "p10_us": 4990.0,
        "p90_us": 5010.0,
        "dense_us": 8000.0,
        "error": 0.004,
        "dense_error": 0.004,
        "checked": True,
        "noisy": False,
        "sparse_ffn_us": 1280.0,
        "matrices_us": 1560.0,
        "attention_us": 206.0,
        "small_us": 230.0,
        "floor_us": 2500.0,
        "peak_MiB": 14336.0,
    }
    return DecodeRow(**{**given, **changes})


def _batches_row(**changes) -> BatchesRow:
    given = {
        "op": "batches",
        "variant": "step",
        "model": "7B",
        "d_model": 4096,
        "d_ff": 11008,
        "n_layers": 32,
        "dtype": "bfloat16",
        "weights": "plain",
        "batch": 1,
        "context": 512,
        "sparsity": 0.893,
        "time_us": 4000.0,
        "p10_us": 3990.0,
        "p90_us": 4010.0,
        "dense_us": 6000.0,
        "noisy": False,
    }
    return BatchesRow(**{**given, **changes})


# The timing loop, on a clock that is not one


class _FakeClock:
    """Says how long each call takes, and notes in which order they are made."""

    def __init__(self, micros: dict[str, object]) -> None:
        self.order: list[str] = []
        self._micros = {name: iter(values) if isinstance(values, list) else None for name, values in micros.items()}
        self._constant = micros

    def variant(self, name: str):
        return lambda: self.order.append(name)

    def __call__(self, call) -> float:
        call()
        values = self._micros[self.order[-1]]
        return next(values) if values is not None else self._constant[self.order[-1]]


def test_variants_take_turns_and_the_first_of_a_turn_do_not_count():
    turn, uncounted = timing._TURN, timing._UNCOUNTED
    slow_first = ([1000.0] * uncounted + [20.0] * turn) * 2
    clock = _FakeClock({"ours": slow_first, "dense": 100.0})
    variants = {name: clock.variant(name) for name in ("ours", "dense")}
    times = timing.interleave(variants, clock, {"ours": 10, "dense": 2}, repeats=2 * turn)
    assert times == {"ours": timing.Times(2.0, 2.0, 2.0), "dense": timing.Times(50.0, 50.0, 50.0)}
    one = turn + uncounted
    assert clock.order == (["ours"] * one + ["dense"] * one) * 2


def test_a_noisy_variant_is_measured_again_and_the_quietest_round_counts():
    one = timing._TURN + timing._UNCOUNTED
    noisy, quiet = [10.0, 20.0] * (one // 2), [12.0] * one
    clock = _FakeClock({"a": noisy + quiet})
    times = timing.interleave({"a": clock.variant("a")}, clock, {"a": 1}, repeats=timing._TURN)
    assert times["a"].median == 12.0 and not times["a"].is_noisy and len(clock.order) == 2 * one
    clock = _FakeClock({"a": noisy * timing._MOST_ROUNDS})
    times = timing.interleave({"a": clock.variant("a")}, clock, {"a": 1}, repeats=timing._TURN)
    assert times["a"].is_noisy and len(clock.order) == timing._MOST_ROUNDS * one


def test_statistics():
    times = timing.summarise(np.arange(1, 102, dtype=float))
    assert times == (51.0, 11.0, 91.0)
    assert times.spread == pytest.approx(80 / 51) and times.is_noisy
    assert timing.summarise(np.array([np.nan, 1.0])).is_noisy, "a time that is not a number is not quiet"


# Results


def test_derived_columns():
    row = _row(time_us=6.0)
    assert (row.ratio, row.speedup, row.error_ratio) == (1.5, 6.0, 0.5)
    assert row.achieved_GBps == pytest.approx(9e6 / 6e-6 * 1e-9)
    assert math.isnan(_row(error=0.0, dense_error=0.0).error_ratio)


def test_results_survive_their_file(tmp_path):
    result = Result(HEAD, (_row(), _row("ffn_4", dense_us=math.nan, checked=False)))
    write_json(result, tmp_path / "r.json")
    again = read_json(tmp_path / "r.json")
    assert again.head == HEAD and again.rows[0] == result.rows[0]
    assert math.isnan(again.rows[1].dense_us) and again.failed == again.rows[1:]
    write_csv(result, tmp_path / "r.csv")
    lines = (tmp_path / "r.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0].split(",") == [f.name for f in dataclasses.fields(Row)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSONDecodeError"),
        ('{"head": {}}', "KeyError"),
        ("[]", "TypeError"),
        ('{"head": {"disturbances": []}, "rows": []}', "TypeError"),
    ],
)
def test_a_file_that_is_no_result_is_said_to_be_none(tmp_path, text, message):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=rf"r\.json is not a result of these benchmarks: {message}"):
        read_json(tmp_path / "r.json")


def test_rows_from_before_there_were_formats_are_of_plain_weights(tmp_path):
    new = Result(HEAD, (_row(weights="bf12"), _row()))
    write_json(new, tmp_path / "r.json")
    assert read_json(tmp_path / "r.json") == new and len({row.key for row in new.rows}) == 2
    assert [row.setting for row in new.rows] == ["hot, bf12", "hot"]
    data = json.loads((tmp_path / "r.json").read_text())
    for row in data["rows"]:
        del row["weights"]
    (tmp_path / "r.json").write_text(json.dumps(data))
    assert [row.weights for row in read_json(tmp_path / "r.json").rows] == ["plain", "plain"]


def test_a_result_of_another_version_is_refused(tmp_path):
    write_json(Result(dataclasses.replace(HEAD, version=2), ()), tmp_path / "r.json")
    with pytest.raises(ValueError, match="version 2, this reads 1"):
        read_json(tmp_path / "r.json")


def test_find_wants_exactly_one_row():
    result = Result(HEAD, (_row(), _row("ffn_4")))
    assert result.find(op="ffn_4") is result.rows[1]
    for wanted in ({"op": "ffn_1"}, {"model": "7B"}):
        with pytest.raises(LookupError, match=r"[02] rows with"):
            result.find(**wanted)


# Comparisons


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (6.0, 6.0, compare.Verdict.SAME),
        (6.0, 6.1, compare.Verdict.SAME),
        (6.0, 6.15, compare.Verdict.SLOWER),
        (6.0, 6.4, compare.Verdict.REGRESSION),
        (6.4, 6.0, compare.Verdict.FASTER),
    ],
)
def test_verdicts(old, new, verdict):
    [change] = compare.compare(Result(HEAD, (_row(time_us=old),)), Result(HEAD, (_row(time_us=new),)), 5.0)
    assert change.verdict is verdict and change.percent == pytest.approx((new / old - 1) * 100)


def test_a_row_whose_check_fails_is_never_an_improvement():
    [change] = compare.compare(Result(HEAD, (_row(),)), Result(HEAD, (_row(time_us=1.0, checked=False),)), 5.0)
    assert change.verdict is compare.Verdict.BROKEN


def test_only_the_same_measurement_is_compared():
    old, new = Result(HEAD, (_row(), _row("ffn_4"))), Result(HEAD, (_row(sparsity=0.5), _row("ffn_4"), _row(dtype="float32")))
    assert [c.new.op for c in compare.compare(old, new, 5.0)] == ["ffn_4"]
    assert compare.differences(old, Result(dataclasses.replace(HEAD, gpu="A100"), ())) == ["gpu: NVIDIA H100 and A100"]


@pytest.mark.parametrize(("new_us", "status"), [(6.0, 0), (5.0, 0), (7.0, 1)])
def test_the_compare_command(tmp_path, new_us, status):
    for name, time_us in (("old", 6.0), ("new", new_us)):
        write_json(Result(HEAD, (_row(time_us=time_us),)), tmp_path / f"{name}.json")
    done = CliRunner().invoke(cli.main, ["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    assert done.exit_code == status and "ffn_23" in done.output and f"{new_us:.2f}" in done.output


def test_the_compare_command_refuses_what_it_cannot_compare(tmp_path):
    write_json(Result(HEAD, (_row(),)), tmp_path / "old.json")
    write_json(Result(HEAD, (_row("ffn_4"),)), tmp_path / "new.json")
    done = CliRunner().invoke(cli.main, ["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    assert done.exit_code == 1 and "no row in common" in done.output


# What disturbs


def test_a_clock_that_drops_and_other_processes_are_noted(monkeypatch):
    watch = conditions.Watch()
    monkeypatch.setattr(conditions.os, "getpid", lambda: 10)
    assert not watch.note("first", 1980.0, {10})
    assert not watch.note("second", 1900.0, {999})  # one process: ours, seen under another number from inside a container
    assert watch.disturbances == []
    assert watch.note("third", 1500.0, {10, 11, 12})
    assert watch.disturbances == ["third: the clock fell to 1500 MHz from 1980", "third: 2 other process(es) on the GPU"]


QUIET, SLOW, SHARED = ("1980", "10"), ("1500", "10"), ("1980", "10 11")


def _show(monkeypatch, seen: list[tuple[str, str]]) -> None:
    """An nvidia-smi that shows one clock and set of processes after the other."""
    monkeypatch.setattr(conditions.os, "getpid", lambda: 10)
    answers = iter([answer for look in seen for answer in look])
    monkeypatch.setattr(conditions, "_smi", lambda *_: next(answers).split())


@pytest.mark.parametrize(
    ("seen", "expected", "noted"),
    [
        ([QUIET, QUIET], "first", []),
        ([QUIET, SLOW, QUIET], "second", ["7B: the clock fell to 1500 MHz from 1980"]),
        ([QUIET, SHARED, QUIET], "second", ["7B: 1 other process(es) on the GPU"]),
        (
            [QUIET, SHARED, SLOW],
            "second",
            ["7B: 1 other process(es) on the GPU", "7B, measured again: the clock fell to 1500 MHz from 1980"],
        ),
        ([SLOW, QUIET], "first", []),  # a clock that rises is none that fell
    ],
)
def test_what_was_disturbed_is_measured_once_more(monkeypatch, seen, expected, noted):
    _show(monkeypatch, seen)
    watch, results = conditions.Watch(), iter(["first", "second", "third"])
    watch.look("at the start")
    assert watch.undisturbed(lambda: next(results), "7B") == expected
    assert watch.disturbances == noted


def test_floors():
    yard = conditions.Yardsticks(read_peak=3e6, launch_us=1.0)
    assert yard.floor_us(9_000_000) == 4.0


# Commands without a GPU


@pytest.mark.parametrize("command", ["paper", "sweep", "ffn", "batch", "host", "batches"])
def test_without_a_gpu_a_command_says_so(monkeypatch, command):
    def none():
        raise cli.NoGPUError("no CUDA GPU: looked for one")

    monkeypatch.setattr(cli, "current_device", none)
    done = CliRunner().invoke(cli.main, [command])
    assert done.exit_code == 1 and "Error: no CUDA GPU: looked for one" in done.output and "Traceback" not in done.output


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """Commands are whole but for the GPU: what they measure is to be made up."""
    monkeypatch.setattr(cli, "current_device", lambda: 0)
    monkeypatch.setattr(cli.conditions, "yardsticks", lambda: conditions.Yardsticks(3e6, 1.0))

    def head(command, *rest):
        return dataclasses.replace(HEAD, command=command, disturbances=tuple(rest[-1].disturbances))

    monkeypatch.setattr(cli.conditions, "head", head)
    _show(monkeypatch, [QUIET] * 9)
    monkeypatch.setattr(cli, "best_dense", lambda dtype: SimpleNamespace(name="dense"))
    monkeypatch.setattr(cli, "Layers", lambda *_, first, tokens: None)
    pool = SimpleNamespace(free_all_blocks=lambda: None)
    monkeypatch.setattr(cli, "cupy", lambda: SimpleNamespace(get_default_memory_pool=lambda: pool))


def test_what_batch_measures(monkeypatch, no_gpu_needed, tmp_path):
    """Of every setting once; layers are made anew for each number of tokens."""
    settings, made = [], []

    def measured(layers, setting, **_):
        settings.append(setting)
        changes = {"model": setting.label, "batch": setting.tokens, "mask": setting.mask, "weights": setting.weights}
        return [_row(setting.op, **changes, sparsity=setting.sparsity)]

    monkeypatch.setattr(cli, "measure", measured)
    monkeypatch.setattr(cli, "Layers", lambda model, *_, first, tokens: made.append((model.name, tokens)))
    done = CliRunner().invoke(cli.main, ["batch", "--json", str(tmp_path / "r.json")])
    assert done.exit_code == 0, done.output
    assert made == [(cli.MODELS[name].name, tokens) for name in ("7B", "13B") for tokens in (1, 2, 4, 8)]
    rows = read_json(tmp_path / "r.json").rows
    assert len({row.key for row in rows}) == len(rows) == 2 * (2 * (1 + 3) + 3 * 2 * (1 + 3 * 2))
    assert {(s.op, s.tokens) for s in settings if s.with_singles} == {("SparseFFN", 8)}
    varying = {(s.op, s.tokens, s.weights) for s in settings if s.with_varying}
    assert varying == {(op, 8, "plain") for op in ("ffn_1", "ffn_4", "SparseFFN")}
    assert {s.mask for s in settings if s.tokens == 1 or s.op == "ffn_1"} == {"hot"}
    assert {s.sparsity for s in settings} == {0.89}
    _show(monkeypatch, [QUIET] * 2)
    settings.clear()
    options = ["--model", "7B", "--batch", "3", "--weights", "plain", "--mask", "correlated", "--at", "0.5", "--at", "0.9"]
    options += ["--op", "ffn_1", "--op", "SparseFFN"]
    done = CliRunner().invoke(cli.main, ["batch", *options])
    assert done.exit_code == 0, done.output
    assert [(s.op, s.sparsity) for s in settings] == [
        ("ffn_1", 0.5),
        *(("SparseFFN", sparsity) for sparsity in (0.5, 0.9)),
    ]
    assert {(s.tokens, s.mask, s.weights, s.with_singles) for s in settings} == {(3, "correlated", "plain", False)}


@pytest.mark.parametrize("fails", [False, True])
def test_a_failed_check_is_reported_and_ends_in_an_error(monkeypatch, no_gpu_needed, tmp_path, fails):
    def measured(layers, setting, **_):
        return [_row(setting.op, model=setting.label, sparsity=setting.sparsity, checked=not fails, error=0.5)]

    monkeypatch.setattr(cli, "measure", measured)
    files = [tmp_path / "r.json", tmp_path / "r.csv"]
    done = CliRunner().invoke(cli.main, ["paper", "--json", str(files[0]), "--csv", str(files[1])])
    assert done.exit_code == fails, done.output
    assert ("CHECK FAILED: ffn_23 ReluLLaMA-7B bfloat16 hot 66.98%: error 0.5" in done.output) == fails
    result = read_json(files[0])
    assert [(r.model, r.op) for r in result.rows] == [(p.label, op) for p in PUBLISHED for op in ("ffn_23", "ffn_4")]
    assert len(files[1].read_text().splitlines()) == len(result.rows) + 1


def test_a_disturbed_group_is_measured_once_more_and_told(monkeypatch, no_gpu_needed, tmp_path):
    times = {}

    def measured(layers, setting, **_):
        times[setting] = times.get(setting, 0) + 1
        return [_row(setting.op, model=setting.label, sparsity=setting.sparsity, time_us=float(times[setting]))]

    monkeypatch.setattr(cli, "measure", measured)
    _show(monkeypatch, [QUIET, QUIET, SHARED, QUIET])  # the paper's settings are of two models, 7B first
    done = CliRunner().invoke(cli.main, ["paper", "--json", str(tmp_path / "r.json")])
    assert done.exit_code == 0 and "disturbed: prosparse-llama-2-13b, bfloat16: 1 other process(es) on the GPU" in done.output
    result = read_json(tmp_path / "r.json")
    assert {row.model: row.time_us for row in result.rows} == {p.label: 2.0 if "13B" in p.label else 1.0 for p in PUBLISHED}
    assert len(result.rows) == 2 * len(PUBLISHED) and len(result.head.disturbances) == 1


@pytest.mark.parametrize("groups", [0, 1])
def test_groups_that_were_measured_before_an_interrupt_are_written_beside(monkeypatch, no_gpu_needed, tmp_path, groups):
    made = []

    def measured(layers, setting, **_):
        made.append(setting.label)
        if made.count(setting.label) == 3 and len({*made}) > groups:
            raise KeyboardInterrupt
        return [_row(setting.op, model=setting.label, sparsity=setting.sparsity)]

    monkeypatch.setattr(cli, "measure", measured)
    for name in ("r.json", "r.csv"):
        (tmp_path / name).write_text("an earlier result")
    files = ["--json", str(tmp_path / "r.json"), "--csv", str(tmp_path / "r.csv")]
    done = CliRunner().invoke(cli.main, ["batch", "--batch", "2", *files])
    assert done.exit_code == 1 and made[-1] == ("7B", "13B")[groups]
    assert all((tmp_path / name).read_text() == "an earlier result" for name in ("r.json", "r.csv"))
    parts = [tmp_path / "r.partial.json", tmp_path / "r.partial.csv"]
    assert [part.exists() for part in parts] == [bool(groups)] * 2
    if groups:
        result = read_json(parts[0])
        assert {row.model for row in result.rows} == {"7B"} and len(result.rows) == made.count("7B")
        assert result.head.disturbances == ("stopped before all was measured",)
        assert "stopped before all was measured" in done.output and str(parts[1]) in done.output.replace("\n", "")


def test_host_times_too_are_measured_once_more(monkeypatch, no_gpu_needed, tmp_path):
    rounds = iter([[_row(time_us=9.0)], [_row(time_us=5.0)]])
    monkeypatch.setattr(cli.host_times, "measure", lambda *_: next(rounds))
    _show(monkeypatch, [QUIET, SLOW, QUIET])
    done = CliRunner().invoke(cli.main, ["host", "--json", str(tmp_path / "r.json")])
    assert done.exit_code == 0 and "disturbed: 7B: the clock fell" in done.output
    assert [row.time_us for row in read_json(tmp_path / "r.json").rows] == [5.0]


# Whole models


def test_decode_rows_come_back_and_compare(tmp_path):
    head = dataclasses.replace(HEAD, command="decode")
    nothing = dict.fromkeys(("sparse_ffn_us", "matrices_us", "attention_us", "small_us", "floor_us"), math.nan)
    old = Result(head, (_decode_row(), _decode_row(variant="generate()", time_us=20_000.0, noisy=True, **nothing)))
    write_json(old, tmp_path / "a.json")
    write_csv(old, tmp_path / "a.csv")
    read = read_json(tmp_path / "a.json")
    assert (
        read.rows[0] == old.rows[0]
        and math.isnan(read.rows[1].sparse_ffn_us)
        and "NaN" not in (tmp_path / "a.json").read_text()
    )
    assert (tmp_path / "a.csv").read_text().splitlines()[0].startswith("op,variant,model")
    row = read.rows[0]
    assert (row.tokens_per_s, row.dense_tokens_per_s, row.speedup) == (200.0, 125.0, 1.6)
    new = Result(head, (_decode_row(time_us=6000.0, p10_us=5990.0, p90_us=6010.0),))
    [change] = compare.compare(read, new, 3.0)
    assert change.verdict is compare.Verdict.REGRESSION and change.percent == pytest.approx(20)


def test_a_disturbed_model_is_made_and_measured_once_more(monkeypatch, no_gpu_needed, tmp_path):
    """Made anew, since measuring patches it."""
    pytest.importorskip("transformers")
    from benchmarks import decode

    made = []
    monkeypatch.setattr(decode, "random_model", lambda record: made.append(record) or [])
    monkeypatch.setattr(decode, "random_prompt", lambda model: None)
    monkeypatch.setattr(decode, "free_memory", lambda: None)

    def measured(model, prompt, label, yard, repeats, say, threshold):
        say("steps")
        assert threshold == (0.01 if label == "AFM-4.5B" else None)  # by hand where the formula has none
        assert not model, "patched already"
        model.append("patched")
        return [_decode_row(model=label, time_us=1000.0 * len(made))]

    monkeypatch.setattr(decode, "measure_model", measured)
    _show(monkeypatch, [QUIET, SHARED, QUIET, QUIET, QUIET, QUIET])
    done = CliRunner().invoke(cli.main, ["decode", "--json", str(tmp_path / "r.json")])
    assert done.exit_code == 0 and "disturbed: 7B: 1 other process(es) on the GPU" in done.output, done.output
    rows = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["model"], row["time_us"]) for row in rows] == [
        ("7B", 2000.0),
        ("13B", 3000.0),
        ("7B SiLU", 4000.0),
        ("AFM-4.5B", 5000.0),
    ]
    assert made == [cli._WHOLE[label] for label in ("7B", "7B", "13B", "7B SiLU", "AFM-4.5B")]


def test_the_picture_of_decode_has_a_bar_for_each_way(stored):
    figures = pytest.importorskip("benchmarks.figures", reason='the extra "bench" brings matplotlib')
    axes = figures.decode(stored["decode"]).axes[0]
    ways = [f"{model} {way}" for model in ("7B", "13B", "7B SiLU") for way in ("dense, compiled", "patched", "12 bits")]
    assert [label.get_text() for label in axes.get_yticklabels()] == ways
    ends = [max(bar.get_x() + bar.get_width() for bars in axes.containers for bar in [bars[i]]) for i in range(len(ways))]
    assert [(text.get_position()[1], text.get_position()[0]) for text in axes.texts] == [
        *enumerate(pytest.approx(e) for e in ends)
    ]
    rows = [r for r in stored["decode"].rows if not math.isnan(r.matrices_us)]
    assert [text.get_text().strip() for text in axes.texts] == [f"{r.tokens_per_s:.0f} tokens/s" for r in rows]
    for row, end in zip(rows, ends, strict=True):
        assert end == pytest.approx(1e-3 * (row.sparse_ffn_us + row.matrices_us + row.attention_us + row.small_us))


def test_decode_table():
    text = tables.decode(
        Result(HEAD, (_decode_row(), _decode_row(variant="generate()", matrices_us=math.nan, floor_us=math.nan)))
    )
    cells = [cell.strip() for cell in text.splitlines()[2].split("|")[1:-1]]
    assert cells[:7] == ["7B", "step", "plain", "512", "89.30%", "200.0", "1.60x"]
    assert cells[7:] == ["1560 + 1280 + 206 + 230", "2500", "14.0"]
    other = [cell.strip() for cell in text.splitlines()[3].split("|")[1:-1]]
    assert other[1] == "generate()" and other[7:] == ["", "", "14.0"]


def test_random_models_are_as_sparse_as_wanted():
    """On the CPU: 4 layers, each with its own share of active neurons, hot and cold ones among them."""
    torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
    pytest.importorskip("transformers", reason='the extra "hf" brings it')
    from benchmarks import decode
    from prosparse_cupy.models import Model
    from prosparse_cupy.torch import measure_sparsity

    record = Model("small", 256, 1500, 4, 0.01, 0.8932)
    shares = decode.shares(record)
    assert shares.mean() == pytest.approx(1 - record.sparsity) and (np.diff(shares) < 0).all()
    model = decode.random_model(record)
    model.to("cpu")
    ids = torch.randint(1, 32000, (1, 300), generator=torch.Generator().manual_seed(0))
    found: list = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, given: found.append((given[0] != 0)[0]))
    report = measure_sparsity(model, ids)
    assert [layer.active for layer in report.layers] == pytest.approx(list(shares), rel=0.03)
    often = found[0].double().mean(0).sort(descending=True).values
    assert 0.3 < float(often[:150].sum() / often.sum()) < 0.45, "the top tenth has about 36 % of the activations"


def test_the_bytes_of_a_token():
    """What a token must read, against a sum by hand."""
    torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
    pytest.importorskip("transformers", reason='the extra "hf" brings it')
    from benchmarks import decode
    from prosparse_cupy.models import Model
    from prosparse_cupy.torch import patch_model

    model = decode.random_model(Model("small", 256, 1504, 2, 0.01, 0.9)).to("cpu")
    ffn, others, cached = 256 * 1504 * 2, (2 * 4 * 256 * 256 + 32000 * 256) * 2, 2 * 2 * 256 * 2 * 100
    assert decode._bytes_of_a_token(model, 0.0, 100) == 2 * 3 * ffn + others + cached
    patch_model(model)
    assert decode._bytes_of_a_token(model, 0.75, 100) == 2 * round(1.5 * ffn) + others + cached
    assert torch.is_tensor(model.lm_head.weight)


def _batch_result() -> Result:
    """All rows of `batch` of one model, made up."""
    rows = [
        _row(op, 6.0 + tokens, batch=tokens, mask=mask, weights=weights, sparsity=0.89, variant=variant)
        for tokens in (1, 2, 8)
        for op in ("ffn_1", "ffn_23", "ffn_4", "SparseFFN")
        for weights in ("plain", "bf12")
        for mask in ("hot", "correlated")
        if mask == "hot" or (tokens > 1 and op != "ffn_1")
        for variant in ("prosparse", *(["eight calls"] if (op, tokens) == ("SparseFFN", 8) else []))
    ]
    return Result(HEAD, tuple(rows))


def test_batch_table():
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.batch(_batch_result()).splitlines()]
    assert lines[0][:4] == ["", "model", "masks", "1 token: µs, ratio, speed-up"] and len(lines) == 2 + 2 + 2 * 4 + 4 + 4
    assert [line[0] for line in lines[2:5]] == ["`ffn_1`", "`ffn_1`, bf12", "`ffn_23`"]
    assert lines[2] == ["`ffn_1`", "7B", "any", "7.0, 1.75, 5.14x", "8.0, 2.00, 4.50x", "14.0, 3.50, 2.57x"]
    assert lines[-8][0] == "`SparseFFN`" and lines[-1][:3] == ["`SparseFFN`, bf12, eight calls", "7B", "correlated, 89%"]
    assert lines[-1][3:] == ["", "", "14.0, 3.50, 2.57x"]


def test_the_picture_of_batches_has_a_line_for_each_way():
    figures = pytest.importorskip("benchmarks.figures", reason='the extra "bench" brings matplotlib')
    figure = figures.batch(_batch_result())
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["7B, independent masks", "7B, correlated masks"]
    for axes in figure.axes:
        lines = {line.get_label(): line for line in axes.lines}
        assert [*lines] == ["dense", "sparse", "sparse, byte floor", "sparse, 12 bits", "sparse, 12 bits, byte floor"]
        for label, values in [("dense", [36.0] * 3), ("sparse", [7.0, 8.0, 14.0]), ("sparse, byte floor", [4.0] * 3)]:
            assert [*lines[label].get_xdata()] == [1, 2, 8] and [*lines[label].get_ydata()] == values


def _batches_result() -> Result:
    rows = [
        *(_batches_row(variant="compiled step", weights="unpatched", batch=b, time_us=6000.0) for b in (1, 8)),
        *(_batches_row(batch=b, equal=1 if b == 1 else 0.75) for b in (1, 2, 8)),
        _batches_row(variant="lookup 7", tokens_per_step=7.68, accepted=6.96, time_us=4800.0, noisy=True),
    ]
    return Result(dataclasses.replace(HEAD, command="batches"), tuple(rows))


def test_batches_rows_come_back_and_compare(tmp_path):
    old = _batches_result()
    write_json(old, tmp_path / "a.json")
    write_csv(old, tmp_path / "a.csv")
    read = read_json(tmp_path / "a.json")
    assert read.rows[-1] == old.rows[-1] and math.isnan(read.rows[0].accepted)
    assert (tmp_path / "a.csv").read_text().splitlines()[0].startswith("op,variant,model")
    eight = read.find(variant="step", batch=8)
    assert (eight.tokens_per_s, eight.speedup, eight.error, eight.setting) == (2000.0, 1.5, 0.25, "plain, batch 8")
    assert eight.dense_tokens_per_s == pytest.approx(8e6 / 6000)
    lookup = read.find(variant="lookup 7")
    assert (lookup.tokens_per_s, lookup.speedup) == (pytest.approx(1600), pytest.approx(9.6))
    new = Result(read.head, (dataclasses.replace(eight, checked=False),))
    [change] = compare.compare(read, new, 3.0)
    assert change.verdict is compare.Verdict.BROKEN


def test_batches_table():
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.batches(_batches_result()).splitlines()]
    sizes = [f"{size}: tokens/s, over dense" for size in ("1 sequence", "2 sequences", "8 sequences")]
    assert lines[0] == ["model", "how", "weights", *sizes, "guesses kept", "the same tokens"]
    assert lines[2:] == [
        ["7B", "compiled step", "unpatched", "166.7, 1.00x", "", "1333.3, 1.00x", "", ""],
        ["7B", "step", "plain", "250.0, 1.50x", "500.0, 1.50x", "2000.0, 1.50x", "", "100%, 75%, 75%"],
        ["7B", "lookup 7", "plain", "1600.0 ~, 9.60x", "", "", "7.0", "100%"],
    ]


def test_batches_measures_a_small_model(monkeypatch, no_gpu_needed, tmp_path):
    """The command on a model on the CPU, but for torch's whole step, which is made up."""
    pytest.importorskip("transformers", reason='the extra "hf" brings it')
    from benchmarks import batches, decode
    from prosparse_cupy.models import Model

    compiled = []
    monkeypatch.setattr(batches, "compiled_step", lambda model, prompts, _: compiled.append(len(prompts)) or (lambda: None))
    monkeypatch.setattr(decode, "free_memory", lambda: None)
    monkeypatch.setattr(batches, "free_memory", lambda: None)
    monkeypatch.setitem(cli._WHOLE, "7B", Model("small", 256, 688, 2, 0.01, 0.9))
    monkeypatch.setattr(decode, "LlamaConfig", partial(decode.LlamaConfig, vocab_size=600))
    for name, value in (("_NEW_TOKENS", 24), ("_ALONE", 8), ("_LAST", 2)):
        monkeypatch.setattr(batches, name, value)
    done = CliRunner().invoke(cli.main, ["batches", "--quick", "--json", str(tmp_path / "r.json")])
    assert done.exit_code == 0, done.output
    assert compiled == [1, 8] and "7B: bf12: lookup 3" in done.output
    rows = read_json(tmp_path / "r.json").rows
    ours = [("step", 1), ("generate", 1), ("step", 8), ("generate", 8), ("lookup 7", 1), ("lookup 3", 1)]
    expected = [(variant, weights, batch) for weights in batches.WEIGHTS for variant, batch in ours]
    whole = [(decode.COMPILED, "unpatched", batch) for batch in (1, 8)]
    assert [(r.variant, r.weights, r.batch) for r in rows] == whole + expected
    assert all(r.checked and r.time_us > 0 and r.dense_us > 0 and abs(r.sparsity - 0.9) < 0.05 for r in rows)
    for how, verifications in (("lookup 3", 6), ("lookup 7", 3)):  # 24 tokens, of which the prompt's run gives one
        found = [(r.tokens_per_step, r.accepted) for r in rows if r.variant == how]
        assert found == [(24 / (1 + verifications), (23 - verifications) / verifications)] * 3


@pytest.mark.gpu
def test_decode_measures_a_small_model(torch):
    pytest.importorskip("transformers", reason='the extra "hf" brings it')
    from benchmarks import decode
    from prosparse_cupy.models import Model

    model, yard = decode.random_model(Model("small", 256, 1504, 3, 0.01, 0.9)), conditions.Yardsticks(3e6, 1.0)
    told: list[str] = []
    rows = decode.measure_model(model, decode.random_prompt(model), "small", yard, 16, told.append, 64)
    ours = [(variant, weights) for weights in ("plain", "bf12") for variant in (decode.STEP, decode.GENERATE)]
    theirs = [(variant, weights) for weights in ("unpatched", "plain") for variant in (decode.EAGER, decode.STATIC)]
    assert [(r.variant, r.weights) for r in rows] == [(decode.COMPILED, "unpatched"), *theirs, *ours]
    assert told[-1] == "bf12: step and generate"
    assert all(r.checked and r.time_us > 0 and r.dense_us > 0 and abs(r.sparsity - 0.9) < 0.03 for r in rows)
    for row in (r for r in rows if r.variant == decode.STEP):
        assert min(row.sparse_ffn_us, row.matrices_us, row.attention_us, row.small_us, row.floor_us, row.prepare_s) > 0
    assert rows[0].sparse_ffn_us == 0 < rows[0].matrices_us and all(
        r.peak_MiB > 0 for r in rows if r.variant == decode.GENERATE
    )


# The committed results, and what is made of them


@pytest.fixture(scope="module")
def stored() -> dict[str, Result]:
    return cli.stored_results()


def test_stored_results_are_whole(stored):
    for name, result in stored.items():
        gpu = "H200" if name.startswith("h200-") else "H100"
        assert result.head.command == name.removeprefix("h200-").partition("-")[0]
        assert gpu in result.head.gpu and result.head.clean and result.head.commit
        assert result.rows and not result.failed
        assert all(math.isfinite(row.time_us) and row.p10_us <= row.time_us <= row.p90_us for row in result.rows)
    for method in ("graph", "wallclock"):
        paper = stored["paper" if method == "graph" else "paper-wallclock"]
        assert paper.head.method == method and len(paper.rows) == 2 * len(PUBLISHED)


def test_a_comparison_tells_its_rows_apart(stored):
    for result in stored.values():
        table = tables.changes(compare.compare(result, result, 3.0))
        names = list(zip(*(column.cells for column in table.columns[:6]), strict=True))
        assert len(names) == len(set(names)) == len(result.rows)


@pytest.mark.parametrize("page", cli.PAGES)
def test_pages_agree_with_the_results(stored, page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert tables.fill(text, stored) == text, "run python -m benchmarks report"


def test_the_short_table_has_both_llamas(stored):
    lines = tables.ffn_short(stored).splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:12]] == ["7B"] * 5 + ["13B"] * 5
    row = stored["ffn"].find(model="13B", op="SparseFFN", variant="prosparse", weights="bf12")
    assert f"{row.time_us:.1f}, {row.speedup:.2f}x, {row.ratio:.2f}" in lines[11] and stored["ffn"].head.commit in lines[13]


def test_a_table_of_several_tokens_over_sparsities(stored):
    result = stored["batch-sparsities-7b"]
    lines = tables.batch_sparsities(result).splitlines()
    assert lines[0].count("|") == 7 and "8 tokens, tensor cores" in lines[0] and len(lines) == 2 + 4
    row = result.find(batch=8, variant="tensor cores", sparsity=0.5)
    assert lines[3].startswith("| 7B `SparseFFN` | 50% |") and f"{tables._us(row)} ({row.speedup:.2f}x) |" in lines[3]


def test_figures_are_drawings_with_axes_named(stored, tmp_path):
    figures = pytest.importorskip("benchmarks.figures", reason='the extra "bench" brings matplotlib')
    drawn = {
        "speedup": (figures.speedup(stored["sweep"], "7B"), ["sparsity, %", "speed-up over dense", "byte floor", "H100"]),
        "time": (figures.where_time_goes(stored["ffn"]), ["time per token and layer, µs", "one launch", "rest", "H100"]),
        "paper": (figures.paper(stored["paper"]), ["speed-up over dense", "published", "measured", "ProSparse-13B", "H100"]),
        "batch": (
            figures.batch(stored["batch"]),
            ["tokens a call", "FFN, µs", "dense", "12 bits", "byte floor", "13B, correlated masks", "H100"],
        ),
        "decode": (
            figures.decode(stored["decode"]),
            ["ms per token", "sparse FFN", "attention", "13B patched", "13B 12 bits", "byte floor", "tokens/s", "H100"],
        ),
    }
    for name, (figure, words) in drawn.items():
        figures.save(figure, tmp_path / f"{name}.svg")
        text = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
        ElementTree.fromstring(text)
        assert all(word in text for word in words), name


# What is measured, with everything of the GPU made up


def _measured(monkeypatch, setting_changes: dict, first=None, wrong: bool = False, wrong_singles: bool = False) -> list[Row]:
    from benchmarks import measure
    from prosparse_cupy.models import LLAMA_2_7B
    from prosparse_cupy.testing.layers import Timed

    exact, unions = np.array([1.0, 2.0]), iter([1000, 3000])

    def timed() -> Timed:
        outs = [np.full(2, np.nan, np.float32) for _ in range(5)]

        def fill(out, value):
            return lambda: out.__setitem__(slice(None), value)

        first_call = fill(outs[2], exact) if first else None
        ours = fill(outs[0], exact * 1.5 if wrong else exact)
        singles = fill(outs[3], exact * 1.5 if wrong_singles else exact)
        varying = fill(outs[4], exact * (1.5 if wrong_singles else 1.25))
        given = ours, outs[0], lambda: exact, fill(outs[1], exact), outs[1], first_call, outs[2], singles, outs[3]
        return Timed(*given, varying, outs[4], next(unions))

    layers = SimpleNamespace(
        calls=lambda *_: [timed(), timed()],
        count=2,
        touched=lambda op, active, weights: 3_000_000 if active == 1101 else 3000 * active,
        dtype=np.dtype(np.float32),
    )

    def capture(calls):
        return lambda: [call() for call in calls]

    monkeypatch.setattr(timing, "capture", capture)
    monkeypatch.setattr(timing, "graph_clock", lambda call: (call(), 640.0)[1])
    given = {"mask": "hot", "sparsity": 0.9, **setting_changes}
    setting = measure.Setting("SparseFFN", LLAMA_2_7B, "7B", "float32", **given)
    dense = SimpleNamespace(capture=capture)
    return measure.measure(layers, setting, dense, conditions.Yardsticks(3e6, 1.0), measure.GRAPH, 8)


def test_a_row_is_what_the_clock_and_the_check_say(monkeypatch):
    [row] = _measured(monkeypatch, {})
    assert row.checked and row.variant == "prosparse" and (row.error, row.dense_error) == (0.0, 0.0)
    assert (row.time_us, row.dense_us, row.floor_us) == (10.0, 10.0, 2.0)  # a graph of 64 calls takes 640 µs


def test_a_wrong_result_is_not_checked(monkeypatch):
    [row] = _measured(monkeypatch, {}, wrong=True)
    assert not row.checked and row.error == pytest.approx(0.5)


def test_the_first_release_and_the_dense_path_get_rows_of_their_own(monkeypatch):
    rows = _measured(monkeypatch, {"with_dense": True}, first=True)
    assert [row.variant for row in rows] == ["prosparse", "dense", "first release", "dense eager"]
    assert [row.time_us for row in rows] == [10.0, 10.0, 10.0, 320.0]  # eagerly: the two calls, not 64


@pytest.mark.parametrize("wrong", [False, True])
def test_eight_tokens_and_eight_calls(monkeypatch, wrong):
    """The floor is of the mean union, and each way's results are checked."""
    changes = {"tokens": 8, "with_singles": True, "weights": "bf12", "mask": "correlated"}
    rows = _measured(monkeypatch, changes, wrong_singles=wrong)
    assert [(row.variant, row.batch, row.weights, row.setting) for row in rows] == [
        (variant, 8, "bf12", "correlated, bf12, 8 tokens") for variant in ("prosparse", "eight calls")
    ]
    assert [row.checked for row in rows] == [True, not wrong] and {row.floor_us for row in rows} == {3.0}


def test_what_is_not_batch_invariant_has_a_row_of_its_own(monkeypatch):
    rows = _measured(monkeypatch, {"tokens": 8, "with_varying": True})
    assert [(row.variant, row.batch, row.weights, row.error) for row in rows] == [
        ("prosparse", 8, "plain", 0.0),
        ("tensor cores", 8, "plain", pytest.approx(0.25)),
    ]


class _NumpyDense(Dense):
    """A dense path on NumPy arrays."""

    name = "NumPy"

    def mv(self, weights, x, out):
        out[...] = x.astype(np.float32) @ weights.T.astype(np.float32)

    def activate(self, pre, formula, out=None):
        kept = np.where(pre.astype(np.float32) >= np.float32(formula.threshold), pre, 0) * (pre > 0)
        activated = kept * kept if formula.activation == "relu2" else kept
        if out is None:
            return activated
        out[...] = activated
        return out

    def norm(self, x1, weight, eps):
        wide = x1.astype(np.float32)
        return weight * (wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + eps)).astype(x1.dtype)


@pytest.mark.parametrize("mask", ["hot", "uniform", "contiguous"])
@pytest.mark.parametrize("op", ["ffn_1", "ffn_123", "ffn_23", "ffn_4", "three operators", "sparse_ffn", "SparseFFN"])
@pytest.mark.parametrize("weights", ["plain", "bf12"])
def test_layers_call_what_they_check(monkeypatch, op, mask, weights):
    _layers_call_what_they_check(monkeypatch, {}, op, mask, weights)


@pytest.mark.parametrize("weights", ["plain", "bf12"])
@pytest.mark.parametrize(
    ("formula", "op"),
    [
        *(({"activation": "relu2", "gated": False}, op) for op in ("ffn_12", "ffn_4", "sparse_ffn", "SparseFFN")),
        *(({"activation": "relu2", "normed": True}, op) for op in ("ffn_23", "ffn_123", "three operators", "SparseFFN")),
        *(({"activation": "drelu"}, op) for op in ("ffn_23", "ffn_123", "SparseFFN")),
    ],
)
def test_layers_of_other_formulas(monkeypatch, formula, op, weights):
    _layers_call_what_they_check(monkeypatch, formula, op, "hot", weights)


@pytest.mark.parametrize("mask", ["hot", "correlated"])
@pytest.mark.parametrize("op", ["ffn_1", "ffn_123", "ffn_23", "ffn_4", "three operators", "sparse_ffn", "SparseFFN"])
@pytest.mark.parametrize("weights", ["plain", "bf12"])
def test_layers_of_several_tokens(monkeypatch, op, mask, weights):
    _layers_call_what_they_check(monkeypatch, {}, op, mask, weights, tokens=3)


@pytest.mark.parametrize(
    ("formula", "op"),
    [
        *(({"activation": "relu2", "gated": False}, op) for op in ("ffn_12", "SparseFFN")),
        *(({"activation": "relu2", "normed": True}, op) for op in ("ffn_23", "SparseFFN")),
    ],
)
def test_layers_of_several_tokens_and_other_formulas(monkeypatch, formula, op):
    _layers_call_what_they_check(monkeypatch, formula, op, "hot", "plain", tokens=8)


def test_what_several_tokens_need_is_not_counted_with_drelu():
    from prosparse_cupy.models import TURBOSPARSE_MISTRAL
    from prosparse_cupy.testing.layers import Layers

    with pytest.raises(ValueError, match=r"^Layers: what several tokens need with dReLU is not counted"):
        Layers(TURBOSPARSE_MISTRAL, "bfloat16", _NumpyDense(), tokens=2)


def _layers_call_what_they_check(monkeypatch, formula, op, mask, weights, tokens=1):
    """On NumPy arrays, which run the reference: every timed call, ours and dense, leaves what `exact` says, and no NaN."""
    from prosparse_cupy.models import Model
    from prosparse_cupy.testing import layers, truth

    runtime = SimpleNamespace(getDeviceProperties=lambda _: {"l2CacheSize": 100_000}, memGetInfo=lambda: (1 << 40, 1 << 40))
    names = ("full", "asarray", "flatnonzero", "zeros", "concatenate", "uint8", "random")
    fake = SimpleNamespace(
        **{name: getattr(np, name) for name in names}, asnumpy=np.asarray, cuda=SimpleNamespace(runtime=runtime)
    )
    monkeypatch.setattr(layers, "cupy", lambda: fake)
    monkeypatch.setattr(truth, "cupy", lambda: fake)
    monkeypatch.setattr(layers, "current_device", lambda: 0)
    dtype, tolerance = ("float32", 1e-4) if weights == "plain" else ("bfloat16", 3e-2)
    made = layers.Layers(Model("small", 64, 200, 1, 0.01, 0.8, **formula), dtype, _NumpyDense(), tokens=tokens)
    compressed = []
    monkeypatch.setattr(layers, "compress", lambda w, **layout: compressed.append(w) or psc.compress(w, **layout))
    timed = made.calls(op, mask, 0.8, weights)
    has_others = formula.get("gated", True)  # whose up-projection is compressed beside a plain w_down
    assert bool(compressed) == (weights == "bf12" and (op != "ffn_4" or has_others))
    if weights == "bf12" and op != "ffn_4":  # whose weight of so narrow a model stays plain
        assert 0 < made.touched(op, 40, "bf12") < made.touched(op, 40)
    assert made.count == 16 and len(timed) % made.count == 0
    assert 0 < made.touched(op, 40) <= 4 * (3 * 64 * 200 + 1000 * tokens)
    assert all(40 <= t.active <= (40 if tokens == 1 else 200) for t in timed) or formula.get("activation") == "drelu"
    for t in timed[:: len(timed) // 4]:
        assert np.isnan(t.out.astype(np.float32)).all() and np.isnan(t.dense_out.astype(np.float32)).all()
        t.call()
        t.dense()
        exact = t.exact()
        for out in (t.out, t.dense_out):
            assert out.shape == exact.shape and out.ndim == 1 + (tokens > 1)
            np.testing.assert_allclose(out.astype(np.float64), exact, rtol=tolerance, atol=tolerance * np.abs(exact).max())
        assert (t.singles is not None) == (op == "SparseFFN" and tokens > 1)
        if t.singles is not None:
            t.singles()
            np.testing.assert_allclose(t.singles_out.astype(np.float64), exact, rtol=tolerance, atol=tolerance)
        assert (t.varying is not None) == (op in ("ffn_1", "ffn_4", "SparseFFN") and tokens > 1)
        if t.varying is not None:
            t.varying()
            np.testing.assert_array_equal(t.varying_out, t.out)  # on NumPy arrays nothing varies


@pytest.mark.parametrize("wrong", [False, True])
def test_host_rows_are_checked(monkeypatch, wrong):
    """On NumPy arrays, which run the reference."""
    from benchmarks import host
    from prosparse_cupy.models import Model

    monkeypatch.setattr(host, "cupy", lambda: SimpleNamespace(zeros=np.zeros))
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(host, "_bare", lambda *_: lambda: None)
    monkeypatch.setattr(host, "host_clock", lambda call: 100.0 * host._CALLS)
    if wrong:
        monkeypatch.setattr(host.psc, "ffn_4", lambda x1, w, *, out: out.__setitem__(0, 0))
    rows = host.measure(Model("tiny", 16, 24, 1, 0.0, 0.5), "tiny", repeats=8)
    assert {row.op: row.checked for row in rows} == {"ffn_23": True, "ffn_4": not wrong, "SparseFFN": True}
    assert [row.ratio for row in rows] == [1.0, 1.0, 0.5] and all(math.isnan(row.dense_us) for row in rows)
