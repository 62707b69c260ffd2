"""docs/reliability.md says what the kept results say, of tests that there are."""

from __future__ import annotations

from pathlib import Path

import pytest
import reliability

TESTS = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(not reliability.PAGE.exists(), reason="needs the source tree")


def test_the_page_is_what_the_results_make():
    text = reliability.PAGE.read_text(encoding="utf-8")
    assert reliability.filled(text) == text, "run python -m tests.reliability page"


def test_promises_name_tests_that_there_are():
    named = {test for promise in reliability.PROMISES for test in promise.tests}
    assert all((TESTS / f"test_{test}.py").is_file() for test in named)


def test_cases_of_a_run_are_counted_by_file(tmp_path):
    file = tmp_path / "t.xml"
    file.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_a" name="x"/>'
        '<testcase classname="tests.test_a.Class" name="y"><failure/></testcase>'
        '<testcase classname="tests.test_b" name="z"><skipped/></testcase>'
        '<testcase classname="" name="tests.test_c"><skipped/></testcase></testsuite></testsuites>'
    )
    assert reliability.read_junit(file) == {"a": {"passed": 1, "failed": 1}, "b": {"skipped": 1}, "c": {"skipped": 1}}
    found = {"files": reliability.read_junit(file)}
    assert reliability._cases(found, ("a",)) == "**1 of 2 failed**" and reliability._cases(found, ("b",)) == "-"
