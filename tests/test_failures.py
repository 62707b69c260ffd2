"""What fails in one process of a group fails in all: threads here that share a store, real processes in `test_parallel`."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from prosparse_cupy.torch import failures  # noqa: E402
from prosparse_cupy.torch.failures import Failures  # noqa: E402
from prosparse_cupy.torch.step import CannotStep  # noqa: E402

pytestmark = pytest.mark.quick
REAL_OF = failures._Store.of


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
        self.failures.covers(self.memory)  # type: ignore[arg-type]
        self.step = Step(self.group)
        self.failures.frees(self.step)

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

    def clone(self) -> Store:
        return self

    def __getattr__(self, name: str) -> Any:
        if self.is_gone:
            raise dist.DistNetworkError("connection reset, says the test")
        self.asked += 1
        return getattr(self.own, name)


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    own = Store()
    monkeypatch.setattr(failures._Store, "of", lambda _, rank, size: failures._Store(own, rank, size))
    monkeypatch.setattr(failures, "_SECONDS_BETWEEN", 0.01)
    monkeypatch.setattr(failures, "_SECONDS_TO_END", 0.3)
    monkeypatch.setattr(failures, "_SECONDS_OF_COMPILING", 0.3)
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


def _until_left(store: Store, key: str) -> None:
    """Work on until the other process has failed."""
    deadline = time.monotonic() + 10
    while not store.own.check([key]) and time.monotonic() < deadline:
        time.sleep(0.005)


def _raise(error: BaseException) -> Any:
    raise error


def _left(store: Store, key: str, text: str) -> None:
    """As the other process leaves it in its first group."""
    store.own.set(f"prosparse_cupy 1 {key}", text)


@pytest.mark.parametrize(
    "error",
    [ValueError("no, says the test"), RuntimeError("no"), KeyboardInterrupt(), MemoryError("a \udcff"), CannotStep("no")],
)
def test_a_process_that_waits_is_let_go_and_told(error):
    first, last = Process(0), Process(1)
    found = _together(lambda: first.call(first.wait), lambda: last.call(lambda: _raise(error)))
    assert found[1] is error
    told = f"rank 1 of 2 failed, so all stop: {type(error).__name__}: {error}".replace("\udcff", "?")
    assert type(found[0]) is RuntimeError and str(found[0]) == told
    for process in (first, last):
        assert process.group.aborted.wait(5) and process.group.was_released.wait(5) and process.memory.is_given_up.wait(5)
        with pytest.raises(RuntimeError, match="rank 1 of 2"):
            process.failures.stop()
        again = process.call(lambda: pytest.fail("it began another call"))
        assert str(again) == f"{told} (the process group has been aborted since: make a new one)"


def test_the_next_group_of_a_name_knows_nothing_of_the_last_one(store):
    first, last = Process(0), Process(1)
    _together(lambda: first.call(first.wait), lambda: last.call(lambda: _raise(ValueError("no"))))
    first, last = Process(0), Process(1)
    assert _together(lambda: first.call(lambda: 1), lambda: last.call(lambda: 2)) == [1, 2]
    here = "prosparse_cupy 2 call 2"
    found = _together(
        lambda: first.call(lambda: _until_left(store, here)), lambda: last.call(lambda: _raise(ValueError("other")))
    )
    assert str(found[0]) == "rank 1 of 2 failed, so all stop: ValueError: other"


@pytest.mark.parametrize("ends", ["with an object that is cut off", "with a number"])
def test_what_an_aborted_group_gives_means_nothing(store, monkeypatch, ends):
    """What others have aborted may end a sum here before this process looks: with any error, or with none."""
    first = Process(0)

    def garbage() -> int:
        _left(store, "given up", "rank 1 of 2 failed, so all stop: no")
        if ends == "with a number":
            return 7
        raise EOFError("Ran out of input")

    monkeypatch.setattr(failures, "_SECONDS_BETWEEN", 5)
    assert str(first.call(garbage)) == "rank 1 of 2 failed, so all stop: no" and first.group.was_released.wait(5)
    assert "make a new one" in str(first.call(lambda: 1))


def test_a_group_that_breaks_is_not_why(store):
    """As gloo's does where a process has ended: the message is that of the process that failed."""
    first = Process(0)

    def broken() -> None:
        _left(store, "call 1", "rank 1 of 2 failed, so all stop: ValueError: no")
        raise RuntimeError("connection closed by peer")

    found = first.call(broken)
    assert str(found) == "rank 1 of 2 failed, so all stop: ValueError: no" and "closed" in str(found.__cause__)
    assert not first.group.aborted.is_set()


@pytest.mark.parametrize("lag", [0.0, 0.1])
@pytest.mark.parametrize("error", [ValueError, torch.OutOfMemoryError, NotImplementedError])
def test_processes_that_fail_alike_keep_their_group_and_their_errors(lag, error):
    first, last = Process(0), Process(1)
    failures._SECONDS_TO_END = 10.0  # that the fixture puts back

    def late() -> None:
        time.sleep(lag)
        raise error("both")

    for _ in range(2):
        found = _together(lambda: first.call(lambda: _raise(error("both"))), lambda: last.call(late))
        assert [type(own) for own in found] == [error, error]
        assert _together(lambda: first.call(lambda: 1), lambda: last.call(lambda: 2)) == [1, 2]
    assert not first.group.aborted.is_set() and not last.group.aborted.is_set()
    assert not first.memory.is_given_up.is_set() and not first.failures.text


def test_a_process_that_is_done_before_it_is_let_go_is_told_too(store):
    first, last, here = Process(0), Process(1), "prosparse_cupy 1 call 1"
    found = _together(lambda: first.call(lambda: _until_left(store, here)), lambda: last.call(lambda: _raise(ValueError("no"))))
    assert str(found[0]) == "rank 1 of 2 failed, so all stop: ValueError: no" and type(found[1]) is ValueError
    assert not first.group.aborted.is_set()
    assert _together(lambda: first.call(lambda: 1), lambda: last.call(lambda: 2)) == [1, 2]


def test_a_process_that_failed_does_nothing_else_until_the_others_have_ended_that_call():
    first, last, order = Process(0), Process(1), list[str]()

    def long() -> None:
        time.sleep(0.2)
        order.append("first ends")

    def then() -> None:
        last.call(lambda: _raise(ValueError("no")))
        order.append("last goes on")

    _together(lambda: first.call(long), then)
    assert order == ["first ends", "last goes on"]


def test_a_process_that_failed_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(failures, "_SECONDS_TO_END", 0.05)
    last = Process(1)
    assert isinstance(last.call(lambda: _raise(ValueError("no"))), ValueError)
    assert "still in a call that has failed here" in str(last.call(lambda: 1))


@pytest.mark.parametrize("come", [True, False])
def test_whether_all_meet_or_some_wait_in_a_sum(monkeypatch, come):
    monkeypatch.setattr(failures, "_SECONDS_OF_COMPILING", 10.0 if come else 0.3)
    first, last = Process(0), Process(1)

    def other() -> None:
        if come:
            time.sleep(0.05)
            last.failures.meets()
        else:
            time.sleep(0.4)

    def one() -> bool:
        first.failures.meets()
        return first.failures.all_meet()

    for _ in range(2):
        assert _together(lambda: first.call(one), lambda: last.call(other))[0] is come


def test_what_all_have_told_each_other_is_not_told_again(store):
    error = RuntimeError("rank 0 of 2 failed, so all stop: no")
    error.told = "no"  # type: ignore[attr-defined]
    first, last = Process(0), Process(1)
    assert _together(lambda: first.call(lambda: _raise(error)), lambda: last.call(lambda: _raise(error))) == [error, error]
    assert _together(lambda: first.call(lambda: 1), lambda: last.call(lambda: 2)) == [1, 2]
    assert not first.failures.text and not store.own.check(["prosparse_cupy 1 call 1"])


def test_a_store_that_is_gone(store, monkeypatch):
    monkeypatch.setattr(failures, "_SECONDS_OF_SILENCE", 0.1)
    first = Process(0)

    def lost() -> str:
        store.is_gone = True
        return first.wait()

    assert "does not answer" in str(first.call(lost))


def test_a_connection_that_is_lost_is_made_again(store, monkeypatch):
    """To the same store, whose other connections go on."""
    first, last, again = Process(0), Process(1), Store()
    again.own = store.own
    monkeypatch.setattr(failures, "_SECONDS_TO_END", 0.05)
    monkeypatch.setattr(Store, "clone", lambda _: again)

    def lost() -> str:
        store.is_gone = True
        return first.wait()

    def late() -> None:
        time.sleep(0.3)
        _left(store, "given up", "rank 1 of 2 failed, so all stop: no")

    assert str(_together(lambda: first.call(lost), late)[0]) == "rank 1 of 2 failed, so all stop: no"
    assert last.failures.text == ""


def test_a_store_that_is_silent_for_a_while_or_at_the_end_harms_nobody(store):
    first = Process(0)

    def silent(at_the_end: bool) -> int:
        store.is_gone = True
        time.sleep(0.1)
        store.is_gone = at_the_end
        time.sleep(0.1)
        return 1

    assert first.call(lambda: silent(False)) == 1 and first.call(lambda: silent(True)) == 1 and not first.failures.text


def test_calls_within_calls_and_groups_that_need_none(store, monkeypatch):
    first = Process(0)
    assert first.call(lambda: first.call(lambda: first.call(lambda: 3))) == 3
    asked, alone = store.asked, Process(0, size=1)
    assert alone.call(lambda: 1) == 1 and store.asked == asked
    ended = Process(0)
    del ended.group, ended.step
    assert ended.call(lambda: 1) == 1 and store.asked == asked
    monkeypatch.setattr(failures._Store, "of", lambda *_: None)
    assert Process(0).call(lambda: 1) == 1 and isinstance(Process(0).call(lambda: _raise(ValueError("no"))), ValueError)


def test_stores_that_cannot_do_it():
    class Bare:
        def add(self, *_: Any) -> int:
            raise RuntimeError("pure virtual function")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dist.distributed_c10d, "_get_process_group_store", lambda _: Bare())
        assert REAL_OF(Group(), 0, 2) is None
        patched.setattr(dist.distributed_c10d, "_get_process_group_store", lambda _: dist.HashStore())
        assert REAL_OF(Group(), 0, 2) is not None

    class Gone(Group):
        group_name = "of yesterday"

    with pytest.raises(RuntimeError, match="'of yesterday' has been destroyed"):
        REAL_OF(Gone(), 0, 2)


def test_no_thread_and_no_group_stays():
    both = [Process(0), Process(1)]
    before, kept = threading.active_count(), list[Any]()
    for _ in range(10):
        assert _together(*(lambda process=process: process.call(lambda: 1) for process in both)) == [1, 1]
        kept += _together(*(lambda process=process: process.call(lambda: _raise(ValueError("no"))) for process in both))
    assert threading.active_count() == before and all(type(error) is ValueError for error in kept)
    groups = [weakref.ref(process.group) for process in both]
    for process in both:
        del process.group, process.step
    assert not any(group() for group in groups)


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
