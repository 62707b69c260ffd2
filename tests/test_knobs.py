"""Knobs: what is legal, what the rule chooses, what is worth measuring; and the tables of what was measured."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import Shape

from prosparse_cupy import knobs, launch, measured
from prosparse_cupy.formats import ITEMSIZE, PLAIN, vector_length
from prosparse_cupy.knobs import ColumnKnobs, FusedRowKnobs, KeptKnobs, RowKnobs, SharedRowKnobs, TransposeKnobs
from prosparse_cupy.problem import H100, KERNELS, Problem, Target

targets = st.builds(Target, st.sampled_from([80, 86, 89, 90, 100, 120]), st.integers(1, 200))
problems = st.builds(
    lambda kernel, vectors, d_ff, dtype, specialize, tokens: Problem(
        kernel, vectors * vector_length(dtype), d_ff, dtype, specialize, 1 if kernel in ("pack_down", "decompress") else tokens
    ),
    st.sampled_from(sorted(KERNELS)),
    st.integers(1, 4096),
    st.integers(1, 60000),
    st.sampled_from(sorted(ITEMSIZE)),
    st.booleans(),
    st.integers(1, 8),
)
SEVEN_B = {kernel: Problem(kernel, 4096, 11008, "bfloat16") for kernel in KERNELS}
A100 = Target(80, 108, "NVIDIA A100")


@given(problems, targets)
def test_what_the_rule_chooses_is_legal(problem, target):
    chosen = knobs.rule(problem, target)
    assert type(chosen) in knobs.kinds(problem.kernel) and not chosen.legal(problem, target)


@given(problems, targets)
def test_candidates_are_legal_different_and_begin_with_the_rules(problem, target):
    found = list(knobs.candidates(problem, target))
    assert found[0] == knobs.rule(problem, target) and len(found) == len(set(found))
    for candidate in found:
        assert not candidate.legal(problem, target)
        plan = launch.plan(problem, target, candidate)
        assert plan.block[0] * plan.block[1] <= 1024


def test_every_kernel_of_a_token_has_something_to_measure():
    for kernel in ("ffn_1", "ffn_123", "ffn_23", "ffn_4"):
        assert len(list(knobs.candidates(SEVEN_B[kernel], H100))) >= 6


@pytest.mark.parametrize(
    ("kernel", "chosen", "target", "why"),
    [
        ("ffn_1", RowKnobs(0, 4, 16), H100, "0 warps a block, not 1 to 32"),
        ("ffn_1", RowKnobs(64, 4, 16), H100, "64 warps a block, not 1 to 32"),
        ("ffn_1", RowKnobs(32, 9, 16), H100, "9 blocks of 32 warps do not fit a multiprocessor"),
        ("ffn_1", RowKnobs(4, 0, 16), H100, "0 blocks of 4 warps do not fit"),
        ("ffn_1", RowKnobs(4, 4, 5), H100, "5 loads split a row into batches that do not begin with an even load"),
        ("ffn_123", FusedRowKnobs(4, 4, 16, early_successor=True), A100, "sm_80 has no programmatic launches"),
        ("ffn_23", SharedRowKnobs(3, 4, 8, rows=8), H100, "3 warps cannot share 8 rows"),
        ("ffn_23", SharedRowKnobs(8, 4, 8, rows=33), H100, "8 warps cannot share 33 rows"),
        ("ffn_4", ColumnKnobs(8, 2, 4), H100, "8 warps would change the order of sums"),
        ("ffn_4", ColumnKnobs(16, 2, 0), H100, "0 loads"),
        ("ffn_4", ColumnKnobs(16, 2, 65), H100, "65 loads, not 1 to 64"),
        ("ffn_4", ColumnKnobs(0, 2, 4, lists=3), H100, "0 warps would change the order of sums"),
        ("ffn_1", RowKnobs(4, 4, 10**30), H100, "loads, more than 64"),
        ("pack_down", TransposeKnobs(5, 1), H100, "5 warps do not divide a tile of 32 rows"),
    ],
)
def test_what_no_kernel_can_be_launched_with_is_refused(kernel, chosen, target, why):
    with pytest.raises(ValueError, match=why):
        launch.plan(SEVEN_B[kernel], target, chosen)


absurd = st.integers(-40, 70) | st.sampled_from([sign * big for big in (1 << 31, 1 << 63, 10**30) for sign in (1, -1)])


@given(problems, targets, st.data())
def test_whatever_numbers_a_table_holds_are_refused_or_can_be_launched(problem, target, data):
    kind = data.draw(st.sampled_from(knobs.kinds(problem.kernel)))
    values = {f.name: data.draw(st.booleans() if f.type == "bool" else absurd, f.name) for f in dataclasses.fields(kind)}
    chosen = kind(**values)
    if not chosen.legal(problem, target):
        plan = launch.plan(problem, target, chosen)
        assert 0 < plan.block[0] * plan.block[1] * plan.block[2] <= 1024 and min(plan.grid) >= 1
        assert all(type(value) is bool or value <= (2**16 if name == "blocks" else 100) for name, value in values.items())
        assert plan.shared_bytes <= target.shared_bytes


def test_knobs_of_another_kernel_are_refused():
    with pytest.raises(ValueError, match="ffn_4 has ColumnKnobs, not RowKnobs"):
        launch.plan(SEVEN_B["ffn_4"], H100, RowKnobs(4, 4, 16))


def test_defines_leave_out_what_is_off():
    assert SharedRowKnobs(8, 4, 8).defines(SEVEN_B["ffn_23"]) == (("WARPS", 8), ("MIN_BLOCKS", 4), ("LOADS", 8), ("ABREAST", 1))
    fused = FusedRowKnobs(1, 1, 2, early_successor=True)
    early = fused.defines(dataclasses.replace(SEVEN_B["ffn_123"], in_ffn=True))
    assert early == (("WARPS", 1), ("MIN_BLOCKS", 1), ("LOADS", 2), ("ABREAST", 1), ("EARLY_SUCCESSOR", None))
    assert fused.defines(SEVEN_B["ffn_123"]) == early[:-1], "by itself it does not know its successor"


# Tables

KNOBS = RowKnobs(2, 8, 16)
ROW = measured.Measured(SEVEN_B["ffn_1"], KNOBS, us=29.5, rule_us=30.1, commit="abc1234")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The shipped tables' folder and the user's, empty."""
    shipped, own = tmp_path / "shipped", tmp_path / "own"
    shipped.mkdir()
    monkeypatch.setattr(measured, "_SHIPPED", shipped)
    monkeypatch.setattr(measured, "user_folder", lambda: own)
    measured.tables.cache_clear()
    yield shipped, own
    measured.tables.cache_clear()


def test_a_table_is_read_as_it_was_written(folders):
    file = folders[1] / measured.file_name(H100)
    assert file.name == "nvidia-h100-80gb-hbm3.json"
    other = dataclasses.replace(ROW, problem=Problem("ffn_1", 5120, 11008, "bfloat16"))
    measured.write(file, H100, [ROW])
    measured.write(file, H100, [other])
    assert measured.read(file, H100) == [ROW, other]
    measured.write(file, H100, [dataclasses.replace(ROW, us=29.0)])
    assert [m.us for m in measured.read(file, H100)] == [29.0, 29.5]
    assert [f.name for f in folders[1].iterdir()] == [file.name], "nothing unfinished is left"


def test_what_was_measured_is_launched_and_nothing_else(folders):
    problem = SEVEN_B["ffn_1"]
    before = launch.plan(problem, H100)
    measured.write(folders[0] / measured.file_name(H100), H100, [ROW])
    assert launch.plan(problem, H100) == launch.plan(problem, H100, KNOBS) != before
    for unmeasured in (dataclasses.replace(problem, d_ff=11009), dataclasses.replace(problem, specialize=False)):
        assert launch.plan(unmeasured, H100) == launch.plan(unmeasured, H100, knobs.rule(unmeasured, H100))
    assert launch.plan(problem, H100._replace(name="NVIDIA H200")) == before
    assert launch.plan(problem, H100._replace(name="")) == before


def test_a_users_own_table_comes_before_the_shipped_one(folders):
    mine = dataclasses.replace(ROW, knobs=RowKnobs(8, 2, 16))
    for folder, row in zip(folders, (ROW, mine), strict=True):
        measured.write(folder / measured.file_name(H100), H100, [row])
    assert measured.choose(SEVEN_B["ffn_1"], H100) == mine.knobs


def test_measured_knobs_that_are_not_legal_are_not_used(folders):
    wrong = dataclasses.replace(ROW, knobs=RowKnobs(4, 4, 5))
    measured.write(folders[1] / measured.file_name(H100), H100, [wrong])
    assert measured.choose(SEVEN_B["ffn_1"], H100) == knobs.rule(SEVEN_B["ffn_1"], H100)


def _with_row(content: dict, **changes: object) -> dict:
    return {**content, "measured": [{**content["measured"][0], **changes}]}


def _with_knob(content: dict, name: str, value: object) -> dict:
    row = content["measured"][0]
    return {**content, "measured": [{**row, "knobs": {**row["knobs"], name: value}}]}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: "{", "Expecting property name"),
        (lambda c: [], "it holds no list of measurements"),
        (lambda c: {**c, "measured": 3}, "it holds no list of measurements"),
        (lambda c: {**c, "version": 0}, "it is of version 0, not 2"),
        (lambda c: {**c, "gpu": "NVIDIA A100"}, "it is of a 'NVIDIA A100', not of a 'NVIDIA H100 80GB HBM3'"),
        (lambda c: {**c, "measured": [{**c["measured"][0], "kernel": "ffn_9"}]}, "a line of it cannot be read"),
        (lambda c: {**c, "measured": [{**c["measured"][0], "knobs": {"wings": 2}}]}, "a line of it cannot be read"),
        (lambda c: _with_knob(c, "warps", "4"), "a line of it cannot be read .*warps must be int, got"),
        (lambda c: _with_knob(c, "warps", None), "a line of it cannot be read .*warps must be int, got"),
        (lambda c: _with_knob(c, "warps", 4.0), "a line of it cannot be read .*warps must be int, got"),
        (lambda c: _with_knob(c, "warps", True), "a line of it cannot be read .*warps must be int, got"),
        (lambda c: _with_knob(c, "early_successor", False), "a line of it cannot be read .*early_successor"),
        (lambda c: {**c, "measured": [{**c["measured"][0], "weights": ["bf3"]}]}, "a line of it cannot be read"),
        (lambda c: {**c, "measured": [{**c["measured"][0], "weights": ["plain", "plain"]}]}, "ffn_1 has 1 weights, got 2"),
        (lambda c: "[" * 100_000, "recursion"),
        (lambda c: {**c, "measured": ["ffn_1"]}, "a line of it cannot be read"),
        (lambda c: json.dumps(c).replace("29.5", "1" + 400 * "0"), "a line of it cannot be read .*OverflowError"),
        (lambda c: json.dumps(c).replace("4096", "1" + 9000 * "0"), "Exceeds the limit"),
        (lambda c: _with_row(c, us=[]), "a line of it cannot be read"),
        (lambda c: _with_row(c, us="fast"), "could not convert string to float"),
        (lambda c: _with_row(c, kernel=["ffn_1"]), "a line of it cannot be read"),
        (lambda c: _with_row(c, d_model=4096.0), "a line of it cannot be read .*must be int"),
        (lambda c: _with_row(c, tokens=float("nan")), "a line of it cannot be read .*must be int"),
        (lambda c: _with_row(c, weights=7), "a line of it cannot be read"),
        (lambda c: _with_row(c, weights=[{}]), "a line of it cannot be read"),
        (lambda c: _with_row(c, knobs=[1, 2]), "a line of it cannot be read"),
    ],
)
def test_a_table_that_is_broken_or_foreign_is_left_out_with_one_warning(folders, change, why):
    file = folders[1] / measured.file_name(H100)
    measured.write(file, H100, [ROW])
    changed = change(json.loads(file.read_text()))
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.warns(RuntimeWarning, match=f"{file.name} is left out: .*{why}"):
        chosen = measured.choose(SEVEN_B["ffn_1"], H100)
    assert chosen == knobs.rule(SEVEN_B["ffn_1"], H100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured.choose(SEVEN_B["ffn_4"], H100)
        measured.write(file, H100, [ROW])  # and can be made anew
    assert measured.choose(SEVEN_B["ffn_1"], H100) == KNOBS


def test_a_knob_that_is_on_or_off_is_no_number(folders):
    file, problem = folders[1] / measured.file_name(H100), SEVEN_B["ffn_123"]
    row = dataclasses.replace(ROW, problem=problem, knobs=FusedRowKnobs(2, 4, 16, early_successor=True))
    measured.write(file, H100, [row])
    assert measured.read(file, H100) == [row]
    file.write_text(json.dumps(_with_knob(json.loads(file.read_text()), "early_successor", 1)))
    with pytest.raises(ValueError, match=r"a line of it cannot be read .*early_successor must be bool, got 1"):
        measured.read(file, H100)


def test_a_table_may_hold_every_kind_of_a_kernels_knobs(folders):
    """Their names tell the kinds apart."""
    file, rows = folders[1] / measured.file_name(H100), []
    for tokens, chosen in ((7, RowKnobs(2, 6, 2, 2)), (8, KeptKnobs(16, 1))):
        problem = dataclasses.replace(SEVEN_B["ffn_1"], tokens=tokens)
        rows.append(dataclasses.replace(ROW, problem=problem, knobs=chosen))
    measured.write(file, H100, rows)
    assert measured.read(file, H100) == rows
    assert [launch.plan(row.problem, H100).kernel for row in rows] == ["ffn_1", "ffn_1_kept"]


@pytest.mark.parametrize("name", ["warps", "min_blocks", "loads", "abreast"])
@pytest.mark.parametrize("value", [0, -1, -(1 << 63), 1 << 20, 1 << 63, 10**300])
def test_a_table_of_absurd_knobs_changes_no_launch(folders, name, value):
    file, problem = folders[1] / measured.file_name(H100), SEVEN_B["ffn_1"]
    measured.write(file, H100, [ROW])
    file.write_text(json.dumps(_with_knob(json.loads(file.read_text()), name, value)))
    assert measured.choose(problem, H100) == knobs.rule(problem, H100)


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_table_that_cannot_be_written_leaves_the_old_one_and_nothing_else(folders, monkeypatch, error):
    file = folders[1] / measured.file_name(H100)
    measured.write(file, H100, [ROW])

    def stop(*_):
        raise error

    monkeypatch.setattr(measured.os, "replace", stop)
    with pytest.raises(type(error)):
        measured.write(file, H100, [dataclasses.replace(ROW, us=1.0)])
    assert measured.read(file, H100) == [ROW] and [f.name for f in folders[1].iterdir()] == [file.name]


def test_shipped_tables_can_be_read():
    assert any(measured._SHIPPED.glob("*.json"))
    for file in measured._SHIPPED.glob("*.json"):
        name = json.loads(file.read_text())["gpu"]
        target = H100._replace(name=name)
        assert file.name == measured.file_name(target)
        for row in measured.read(file, target):
            assert not row.knobs.legal(row.problem, target), row


def test_a_folder_that_may_not_be_read_is_left_out_with_a_warning(folders, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError("Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.warns(RuntimeWarning, match="left out: Permission denied"):
        assert measured.choose(SEVEN_B["ffn_1"], H100) == knobs.rule(SEVEN_B["ffn_1"], H100)


def test_a_problem_has_a_format_for_every_weight():
    assert Problem("ffn_123", 64, 8, "float32") == Problem("ffn_123", 64, 8, "float32", formats=(PLAIN, PLAIN))
    with pytest.raises(ValueError, match="ffn_1 has 1 weights, got 2 formats"):
        Problem("ffn_1", 64, 8, "float32", formats=(PLAIN, PLAIN))


def test_the_users_folder_is_the_systems():
    assert measured.user_folder().is_absolute() and "prosparse-cupy" in str(measured.user_folder())


def test_shapes_of_the_tests_default_to_an_h100():
    assert Shape(8, 1, "float32").target == H100


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("tokens", range(1, 9))
@pytest.mark.parametrize(
    ("d_model", "d_ff", "dtype", "specialize"),
    [
        (14336, 57344, "bfloat16", False),
        (5376, 20480, "float16", False),
        (10752, 20480, "bfloat16", True),
        (21248, 20480, "bfloat16", True),
        (21344, 28672, "float16", False),
    ],
)
def test_a_block_of_few_tokens_fits_where_one_of_all_does_not(d_model, d_ff, dtype, specialize, tokens, capability):
    problem, target = Problem("ffn_4", d_model, d_ff, dtype, specialize, tokens), Target(capability, 108)
    assert not knobs.rule(problem, target).legal(problem, target)
