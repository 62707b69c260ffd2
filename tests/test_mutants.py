"""The command that breaks kernels and Python on purpose: its list fits the files, and a run is taken up where it ended."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from mutants import Mutant
from mutants import __main__ as command


def test_every_mutant_breaks_a_text_of_its_file():
    texts = {file: (command.ROOT / file).read_text(encoding="utf-8") for file in {m.file for m in command.MUTANTS}}
    assert [m.name for m in command.MUTANTS if m.old not in texts[m.file] or m.old == m.new] == []
    assert all((command.ROOT / test).is_file() for file in texts for test in command.tests_of(file))


def test_names_tell_mutants_apart():
    names = [m.name for m in command.MUTANTS]
    assert sorted(set(names)) == sorted(names)


def test_a_run_is_taken_up_where_it_ended(tmp_path, monkeypatch):
    file = tmp_path / "found.json"
    noticed, alive, new = Mutant("a.py", "x", "y"), Mutant("b.py", "x", "y", "nothing reads it"), Mutant("c.py", "x", "y")
    monkeypatch.setattr(command, "MUTANTS", [noticed, alive, new])
    kept = command.Kept(file)
    kept.add(command.Outcome(None, "", 1.0))
    assert not file.exists()
    kept.add(command.Outcome(noticed, "tests/test_a.py::test", 1.25))
    kept.add(command.Outcome(alive, "", 2.0))
    found = json.loads(file.read_text())
    assert found["listed"] == 3 and [m["noticed_by"] for m in found["mutants"]] == ["tests/test_a.py::test", ""]
    assert all(m["commit"] == found["commit"] for m in found["mutants"])
    again = command.Kept(file)
    assert [again.has(m) for m in (noticed, alive, new)] == [True, True, False]
    monkeypatch.setattr(command, "MUTANTS", [noticed, alive._replace(survives="for another reason"), new])
    changed = command.Kept(file)
    assert [changed.has(m) for m in (noticed, alive, new)] == [True, False, False]
    assert changed.outcome(noticed) == command.Outcome(noticed, "tests/test_a.py::test", 1.2)
    changed.add(command.Outcome(new, "", 1.0))
    assert [m["mutant"] for m in json.loads(file.read_text())["mutants"]] == [noticed.name, new.name]


def test_long_texts_that_differ_at_their_end_are_two():
    first, last = (Mutant("a.py", "x" * 80 + end, "y") for end in "ab")
    assert first.name == last.name and first.digest != last.digest


@pytest.mark.parametrize(("survives", "status"), [("", 1), ("nothing reads it", 0)])
def test_survivors_of_an_earlier_run_count(tmp_path, monkeypatch, survives, status):
    mutant = Mutant("pyproject.toml", "[project]", "[project ]", survives)
    monkeypatch.setattr(command, "MUTANTS", [mutant])
    command.Kept(tmp_path / "found.json").add(command.Outcome(mutant, "", 1.0))
    done = CliRunner().invoke(command.main, ["--json", str(tmp_path / "found.json")])
    assert done.exit_code == status and "all of them have been run" in done.output, done.output


def test_without_a_file_nothing_is_kept():
    kept = command.Kept(None)
    kept.add(command.Outcome(command.MUTANTS[0], "", 1.0))
    assert not kept.has(command.MUTANTS[0])


@pytest.mark.parametrize("file", ["kernels/ffn_4.cu", "kernels/attend.cu", "prosparse_cupy/knobs.py"])
def test_mutants_have_tests(file):
    assert command.tests_of(file) and all(test.startswith("tests/test_") for test in command.tests_of(file))
