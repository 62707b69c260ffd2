"""What fails in one process of a group fails in all, also while their GPUs wait for each other's numbers.

A process that waits in a sum cannot be told anything through its group. So each keeps a thread that looks into the group's
store, where a process that fails leaves why, and that lets go of the sums: the memory that GPUs share is given up, NCCL's
communicators are aborted.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..peers import SharedMemory

_SECONDS_BETWEEN = 0.25
_SECONDS_TO_END = 3.0  # that a process gets once another has failed: mostly it fails in the same, and nothing need be aborted
_SECONDS_OF_COMPILING = 60.0  # that a step takes at most
_SECONDS_OF_SILENCE = 30.0  # of the store, until its process is taken to have ended
_STILL_BUSY = "others are still in a call that has failed here, and cannot be told"
_NOBODY_ANSWERS = "the store of the process group does not answer, so the process that holds it has ended"


class FailedAlone(RuntimeError):
    """What a process fails in while the others wait for its numbers, whatever it was: nobody else will refuse it."""


class Failures:
    """Of the calls that the processes of a group make together.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
        Kept by a weak reference.
    rank, size : int
        Of this process, of the group.

    Attributes
    ----------
    text : str
        Why the group has been given up, or nothing. It then adds no more numbers.
    """

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self._group, self._rank, self._size = weakref.ref(group), rank, size
        self._who = f"rank {rank} of {size} failed, so all stop: "
        self._store: _Store | None = None
        self._calls = self._meetings = 0
        self._is_inside = False
        self._lock = threading.Lock()
        self._memories, self._graphs = weakref.WeakSet[SharedMemory](), weakref.WeakSet[Any]()
        self.text = ""

    def covers(self, memory: SharedMemory) -> None:
        """Have a GPU wait at it no more once the group has been given up."""
        with self._lock:
            self._memories.add(memory)

    def frees(self, holder: Any) -> None:
        """Call its `let_go`, which frees a CUDA graph, once the group has been given up: NCCL's abort waits for all."""
        self._graphs.add(holder)

    def stop(self) -> None:
        """RuntimeError once the group has been given up: numbers since then mean nothing."""
        if self.text:
            raise _told(self.text)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """A call that all processes make: if it fails in one, the others fail too, with its message.

        Where others fail by themselves, or are done, the group stays as it is. One that is still busy three seconds later
        waits for numbers that will not come, and gives the group up. Until then the one that failed waits: a sum that it began
        would be taken for what the others wait for.
        """
        if self._is_inside or self._size == 1 or (store := self._opened()) is None:
            yield
            return
        if self.text:
            raise _told(f"{self.text} (the process group has been aborted since: make a new one)")
        is_over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(store, is_over), name="prosparse-failures", daemon=True)
        self._calls += 1
        call = f"call {self._calls}"
        try:
            self._is_inside = True
            watch.start()
            yield
        except BaseException as error:
            self._end(watch, is_over, store)
            if not getattr(error, "told", ""):
                if text := self.text or (store.found(call) if _is_of_group(error) else ""):
                    raise _told(text) from error
                store.leave(call, self._who + _said(error))
                store.note("ended", self._calls)
                self._wait_for_others(store)
            raise
        else:
            self._end(watch, is_over, store)
            if text := self.text or store.found(call):
                raise _told(text)
        finally:
            self._is_inside = False
            store.note("ended", self._calls)

    def _opened(self) -> _Store | None:
        """The group's store; None where there is none to be used."""
        if self._store is None and (group := self._group()) is not None:
            self._store = _Store.of(group, self._rank, self._size)
        return self._store

    def meets(self) -> None:
        """This process is where all tell each other how they have fared."""
        self._meetings += 1
        if self._is_inside and self._store is not None:
            self._store.note("met", self._meetings)

    def all_meet(self) -> bool:
        """Whether all processes come there, rather than waiting for this one in a sum."""
        if not self._is_inside or (store := self._store) is None:
            return True
        return _comes(lambda: store.have_all("met", self._meetings), _SECONDS_OF_COMPILING)

    def _wait_for_others(self, store: _Store) -> None:
        """Until they have ended the call that has failed here."""
        have_ended = _comes(lambda: bool(store.found("given up")) or store.have_all("ended", self._calls), 2 * _SECONDS_TO_END)
        if text := store.found("given up") or ("" if have_ended else _STILL_BUSY):
            self._begin_to_give_up(store, text)

    def _end(self, watch: threading.Thread, is_over: threading.Event, store: _Store) -> None:
        is_over.set()
        if watch.is_alive():
            watch.join(_SECONDS_BETWEEN)  # or no longer, if it has just begun to give up
        if not self.text and (text := store.found("given up")):
            self._begin_to_give_up(store, text)  # numbers of others, which have been aborted, mean nothing
        elif self.text:
            self._let_go()

    def _let_go(self) -> None:
        for holder in list(self._graphs):
            holder.let_go()

    def _watch(self, store: _Store, is_over: threading.Event) -> None:
        call, heard = f"call {self._calls}", time.monotonic()
        while not is_over.wait(_SECONDS_BETWEEN):
            at_once = bool(text := store.found("given up"))
            text = text or store.found(call)
            if not store.is_silent:
                heard = time.monotonic()
            elif time.monotonic() - heard > _SECONDS_OF_SILENCE:
                at_once, text = True, _NOBODY_ANSWERS
            else:
                store.reopen()
                is_over.wait(_SECONDS_TO_END)
            if text and (at_once or not is_over.wait(_SECONDS_TO_END)):
                self._give_up(store, text)
                return

    def _give_up(self, store: _Store, text: str) -> None:
        """Let this process's GPU go on, whatever it waits for."""
        self.text = text
        with self._lock:
            memories = list(self._memories)
        for memory in memories:
            memory.give_up()
        store.leave("given up", text)
        abort = getattr(self._group(), "abort", None)
        if abort is not None:
            abort()

    def _begin_to_give_up(self, store: _Store, text: str) -> None:
        self.text = text
        threading.Thread(target=self._give_up, args=(store, text), name="prosparse-failures", daemon=True).start()
        self._let_go()


class _Store:
    """What the processes of a group leave for each other, in the group's own store. No method raises."""

    def __init__(self, own: Any, rank: int, size: int) -> None:
        self._own, self._rank, self._size = own, rank, size
        self._connection: Any = _connection_of(own)
        self._reopening: threading.Thread | None = None
        # A store may outlive its group, and the next one may have its name.
        self._prefix = f"prosparse_cupy {self._connection.add(f'prosparse_cupy groups of rank {rank}', 1)} "
        self.is_silent = False
        """Whether it did not answer when it was last asked."""

    @classmethod
    def of(cls, group: Any, rank: int, size: int) -> _Store | None:
        """That of a group; None where torch's cannot do what is needed."""
        from torch.distributed.distributed_c10d import _get_process_group_store

        try:
            own = _get_process_group_store(group)
        except KeyError:
            raise RuntimeError(f"the process group {group.group_name!r} has been destroyed") from None
        try:
            return cls(own, rank, size)
        except RuntimeError:
            return None

    def _ask(self, ask: Callable[[Any], Any], otherwise: Any) -> Any:
        try:
            answer = ask(self._connection)
        except RuntimeError:
            self.is_silent = True
            return otherwise
        self.is_silent = False
        return answer

    def reopen(self) -> None:
        """Try a new connection, since one may be lost while the store is there; to one that is gone that takes minutes."""
        if self._reopening is None or not self._reopening.is_alive():
            self._reopening = threading.Thread(target=self._reopen, name="prosparse-failures", daemon=True)
            self._reopening.start()

    def _reopen(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._connection = _connection_of(self._own)

    def leave(self, key: str, text: str) -> None:
        """Why something failed, unless somebody has left that already."""
        self._ask(lambda store: store.compare_set(self._prefix + key, "", text), None)

    def found(self, key: str) -> str:
        """What has been left, or nothing."""
        key = self._prefix + key
        found: str = self._ask(lambda store: store.get(key).decode() if store.check([key]) else "", "")
        return found

    def note(self, what: str, number: int) -> None:
        """How many this process has behind it."""
        self._ask(lambda store: store.set(f"{self._prefix}{what} {self._rank}", str(number)), None)

    def have_all(self, what: str, number: int) -> bool:
        """Whether each process has so many behind it."""
        return all(int(self.found(f"{what} {rank}") or 0) >= number for rank in range(self._size))


def _comes(is_there: Callable[[], bool], seconds: float) -> bool:
    """Whether something comes about in time."""
    deadline = time.monotonic() + seconds
    while not (has_come := is_there()) and time.monotonic() < deadline:
        time.sleep(_SECONDS_BETWEEN / 10)
    return has_come


def _is_of_group(error: BaseException) -> bool:
    """Whether it may be what a group raises that another process broke, which is not why."""
    import torch.distributed as dist

    return type(error) is RuntimeError or isinstance(error, dist.DistError)


def _said(error: BaseException) -> str:
    """An error's name and message, whatever is in it."""
    try:
        text = str(error)
    except Exception:
        text = "(its message cannot be told)"
    name = "" if isinstance(error, FailedAlone) else f"{type(error).__name__}: "
    return f"{name}{text}".encode("utf-8", "replace").decode()


def _told(text: str) -> RuntimeError:
    error = RuntimeError(text)
    error.told = text  # type: ignore[attr-defined]
    return error


def _connection_of(store: Any) -> Any:
    """To a store, of one's own where it has such: whoever waits at another one lets nobody else ask."""
    try:
        return store.clone()
    except (RuntimeError, AttributeError):  # of a class that cannot
        return store
