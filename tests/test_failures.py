"""What fails in one process of a group fails in all: threads here that share a store, real processes in `test_parallel`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from prosparse_cupy.torch import failures  # noqa: E402
from prosparse_cupy.torch.failures import Failures  # noqa: E402

pytestmark = pytest.mark.quick


class Group:
    """As much of a process group as `Failures` uses; its abort waits until no graph has its sums, as NCCL's does."""

    def __init__(self) -> None:
        self.aborted, self.has_no_graph, self.was_released = threading.Event(), threading.Event(), threading.Event()

    def abort(self) -> None:
        self.aborted.set()
        if self.has_no_graph.wait(10):
            self.was_released.set()


class Step:
    """As much of a `Step`: what has a graph."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def let_go(self) -> None:
        self._group.has_no_graph.set()


class Memory:
    """As much of a `SharedMemory`: what a GPU waits at."""

    def __init__(self) -> None:
        self.is_given_up = threading.Event()

    def give_up(self) -> None:
        self.is_given_up.set()


class Process:
    """One of two, in a thread."""

    def __init__(self, rank: int, size: int = 2) -> None:
        self.group, self.memory = Group(), Memory()
        self.failures = Failures(self.group, rank, size)
        self.failures.memories.add(self.memory)  # type: ignore[arg-type]
        self.step = Step(self.group)
        self.failures.steps.add(self.step)

    def call(self, do: Callable[[], Any]) -> Any:
        """What a call returns, or the error that it ends with."""
        try:
            with self.failures.shared():
                return do()
        except BaseException as error:
            return error

    def wait(self) -> str:
        """For a sum that the other process has no part in."""
        assert self.memory.is_given_up.wait(10), "nobody has let this GPU go on"
        return "a number that means nothing"


class Store:
    """torch's, and how often it has been asked."""

    def __init__(self) -> None:
        self.own, self.is_gone, self.asked = dist.HashStore(), False, 0

    def __getattr__(self, name: str) -> Any:
        if self.is_gone:
            raise dist.DistNetworkError("connection reset, says the test")
        self.asked += 1
        return getattr(self.own, name)


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    own = Store()
    monkeypatch.setattr(failures, "_store_of", lambda _: own)
    monkeypatch.setattr(failures, "_SECONDS_BETWEEN", 0.01)
    monkeypatch.setattr(failures, "_SECONDS_TO_END", 0.3)
    return own


def _together(first: Callable[[], Any], last: Callable[[], Any]) -> list[Any]:
    """What two calls at the same time end with."""
    found: list[Any] = [None, None]

    def run(i: int, call: Callable[[], Any]) -> None:
        found[i] = call()

    threads = [threading.Thread(target=run, args=(i, call)) for i, call in enumerate((first, last))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def _raise(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize("error", [ValueError("no, says the test"), RuntimeError("no"), KeyboardInterrupt(), MemoryError("no")])
def test_a_process_that_waits_is_let_go_and_told(error):
    first, last = Process(0), Process(1)
    found = _together(lambda: first.call(first.wait), lambda: last.call(lambda: _raise(error)))
    assert found[1] is error
    told = f"rank 1 of 2 failed, so all stop: {type(error).__name__}: {error}"
    assert type(found[0]) is RuntimeError and str(found[0]) == told
    assert first.group.aborted.is_set() and not last.group.aborted.is_set()
    assert first.group.was_released.wait(5)
    with pytest.raises(RuntimeError, match="rank 1 of 2"):
        first.failures.stop()
    again = first.call(lambda: None)
    assert str(again) == f"{told} (the process group has been aborted since: make a new one)"
    # So does the next call of the one that failed, which began no sums that the others could have taken for theirs.
    assert str(last.call(lambda: pytest.fail("it began another call"))) == str(again)
    assert last.group.aborted.wait(5) and last.group.was_released.wait(5)


@pytest.mark.parametrize("ends", ["with an object that is cut off", "with a number"])
def test_what_an_aborted_group_gives_means_nothing(store, ends):
    """What others have aborted may end a sum here before this process looks: with any error, or with none."""
    first = Process(0)

    def garbage() -> int:
        store.own.set(failures._GIVEN_UP, "rank 1 of 2 failed, so all stop: no")
        if ends == "with a number":
            return 7
        raise EOFError("Ran out of input")

    failures._SECONDS_BETWEEN = 5
    assert str(first.call(garbage)) == "rank 1 of 2 failed, so all stop: no" and first.group.was_released.wait(5)
    assert "make a new one" in str(first.call(lambda: 1))


def test_what_is_aborted_may_raise(store):
    """As NCCL does, and gloo where a process has ended: the message is that of the process that failed."""
    first, last = Process(0), Process(1)
    last.call(lambda: _raise(ValueError("no")))

    def broken() -> None:
        raise RuntimeError("connection closed by peer")

    found = first.call(broken)
    assert str(found) == "rank 1 of 2 failed, so all stop: ValueError: no" and "closed" in str(found.__cause__)
    assert not first.group.aborted.is_set()


@pytest.mark.parametrize("lag", [0.0, 0.1])
def test_processes_that_fail_alike_keep_their_group(lag):
    first, last = Process(0), Process(1)

    def late() -> None:
        time.sleep(lag)
        raise ValueError("both")

    found = _together(lambda: first.call(lambda: _raise(ValueError("both"))), lambda: last.call(late))
    assert [type(error) for error in found] == [ValueError, ValueError]
    assert _together(lambda: first.call(lambda: 1), lambda: last.call(lambda: 2)) == [1, 2]
    assert not first.group.aborted.is_set() and not last.group.aborted.is_set()
    assert not first.memory.is_given_up.is_set() and not first.failures.text


def test_a_process_that_is_done_before_it_is_let_go_is_told_too():
    first, last = Process(0), Process(1)
    last.call(lambda: _raise(ValueError("no")))
    assert str(first.call(lambda: 1)) == "rank 1 of 2 failed, so all stop: ValueError: no"
    assert not first.group.aborted.is_set() and first.call(lambda: 1) == 1


def test_a_process_that_failed_waits_until_the_others_have_ended_that_call():
    first, last = Process(0), Process(1)
    order = list[str]()

    def long() -> None:
        time.sleep(0.2)
        order.append("first ends")

    def twice() -> Any:
        last.call(lambda: _raise(ValueError("no")))
        return last.call(lambda: order.append("last again"))

    found = _together(lambda: first.call(long), twice)
    assert order == ["first ends", "last again"] and "ValueError: no" in str(found[0]) and found[1] is None


def test_a_process_that_failed_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(failures, "_SECONDS_TO_END", 0.05)
    last = Process(1)
    assert isinstance(last.call(lambda: _raise(ValueError("no"))), ValueError)
    assert "still in a call that has failed here" in str(last.call(lambda: 1))


def test_what_all_have_told_each_other_is_not_told_again(store):
    error = RuntimeError("rank 0 of 2 failed, so all stop: no")
    error.told = "no"  # type: ignore[attr-defined]
    first, last = Process(0), Process(1)
    assert _together(lambda: first.call(lambda: _raise(error)), lambda: last.call(lambda: _raise(error))) == [error, error]
    assert _together(lambda: first.call(lambda: 1), lambda: last.call(lambda: 2)) == [1, 2]
    assert not first.failures.text and store.own.num_keys() <= 1  # HashStore counts one of its own


def test_a_store_that_is_gone(store):
    first = Process(0)

    def lost() -> str:
        store.is_gone = True
        return first.wait()

    assert "does not answer" in str(first.call(lost))


def test_a_store_that_goes_at_the_end_harms_nobody(store):
    first = Process(0)

    def last_words() -> int:
        store.is_gone = True
        time.sleep(0.05)
        return 1

    assert first.call(last_words) == 1 and not first.failures.text


def test_calls_within_calls_and_groups_of_one(store):
    first = Process(0)
    assert first.call(lambda: first.call(lambda: first.call(lambda: 3))) == 3
    asked, alone = store.asked, Process(0, size=1)
    assert alone.call(lambda: 1) == 1 and store.asked == asked
    ended = Process(0)
    del ended.group, ended.step
    assert ended.call(lambda: 1) == 1 and store.asked == asked


def test_no_thread_stays():
    both = [Process(0), Process(1)]
    before = threading.active_count()
    for _ in range(20):
        for process in both:
            process.call(lambda: 1)
        for process in both:
            assert isinstance(process.call(lambda: _raise(ValueError("no"))), ValueError)
    assert threading.active_count() == before


def test_a_streamer_gets_nothing_of_a_group_that_has_been_given_up():
    from prosparse_cupy.torch.generation import _Checked

    heard, process = list[Any](), Process(0)

    class Streamer:
        def put(self, value: Any) -> None:
            heard.append(value)

        def end(self) -> None:
            heard.append("the end")

    streamer = _Checked(Streamer(), process)  # type: ignore[arg-type]
    streamer.put(1)
    process.failures.text = "rank 1 of 2 failed, so all stop: no"
    for call in (lambda: streamer.put(2), streamer.end):
        with pytest.raises(RuntimeError, match="rank 1 of 2"):
            call()
    process.failures.text = ""
    streamer.end()
    assert heard == [1, "the end"]
