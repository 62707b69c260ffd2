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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..peers import SharedMemory

_SECONDS_BETWEEN = 0.25
_SECONDS_TO_END = 3.0  # that a process gets once another has failed: mostly it fails in the same, and nothing need be aborted
_GIVEN_UP, _ENDED = "prosparse_cupy has given up", "prosparse_cupy calls that have ended"
_STILL_BUSY = "others are still in a call that has failed here, and cannot be told"
_NOBODY_ANSWERS = "the store of the process group does not answer, so the process that holds it has ended"


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
    memories : weakref.WeakSet of SharedMemory
        That GPUs wait at.
    steps : weakref.WeakSet
        Whose graphs have sums in them, each with a `let_go` that frees its graph: NCCL's abort waits until there are none.
    """

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self._group, self._size = weakref.ref(group), size
        self._who = f"rank {rank} of {size} failed, so all stop: "
        self._store: Any = None
        self._calls = 0
        self._is_inside = self._has_failed = False
        self.text = ""
        self.memories, self.steps = weakref.WeakSet[SharedMemory](), weakref.WeakSet[Any]()

    def stop(self) -> None:
        """RuntimeError once the group has been given up: numbers since then mean nothing."""
        if self.text:
            raise _told(self.text)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """A call that all processes make: if it fails in one, the others fail too, with its message.

        Where others fail by themselves, or are done, the group stays as it is. One that is still busy three seconds later
        waits for numbers that will not come, and gives the group up.
        """
        group = self._group()
        if self._is_inside or self._size == 1 or group is None:
            yield
            return
        store = self._store = self._store or _store_of(group)
        if self._has_failed and not self.text:
            self._wait_for_others(store)
        if self.text:
            raise _told(f"{self.text} (the process group has been aborted since: make a new one)")
        self._calls += 1
        call, is_over = f"prosparse_cupy call {self._calls}", threading.Event()
        watch = threading.Thread(target=self._watch, args=(store, call, is_over), name="prosparse-failures", daemon=True)
        watch.start()
        self._is_inside = True
        try:
            yield
        except BaseException as error:
            self._end(watch, is_over, store)
            if not getattr(error, "told", ""):
                # A group that breaks raises a RuntimeError, which is not why.
                if text := self.text or (_found(store, call) if isinstance(error, RuntimeError) else ""):
                    raise _told(text) from error
                self._has_failed = True
                with contextlib.suppress(RuntimeError):  # a store that does not answer has lost the others too
                    store.compare_set(call, "", f"{self._who}{type(error).__name__}: {error}")
            raise
        else:
            self._end(watch, is_over, store)
            if text := self.text or _found(store, call):
                raise _told(text)
        finally:
            self._is_inside = False
            with contextlib.suppress(RuntimeError):
                store.add(_ENDED, 1)

    def _wait_for_others(self, store: Any) -> None:
        """Until they have ended the call that failed here: sums of another one would be taken for theirs."""
        deadline = time.monotonic() + 3 * _SECONDS_TO_END
        with contextlib.suppress(RuntimeError):
            while True:
                has_ended = store.add(_ENDED, 0) >= self._calls * self._size
                text = _found(store, _GIVEN_UP)
                if text or (time.monotonic() > deadline and not has_ended):
                    self._begin_to_give_up(store, text or _STILL_BUSY)
                    return
                if has_ended:
                    break
                time.sleep(_SECONDS_BETWEEN / 4)
        self._has_failed = False

    def _end(self, watch: threading.Thread, is_over: threading.Event, store: Any) -> None:
        is_over.set()
        watch.join(_SECONDS_BETWEEN)  # or no longer, if it has just begun to give up
        if not self.text and (text := _found(store, _GIVEN_UP)):
            self._begin_to_give_up(store, text)  # numbers of others, which have been aborted, mean nothing
        elif self.text:
            self._let_go()

    def _let_go(self) -> None:
        for step in list(self.steps):
            step.let_go()

    def _watch(self, store: Any, call: str, is_over: threading.Event) -> None:
        while not is_over.wait(_SECONDS_BETWEEN):
            at_once = bool(text := _found(store, _GIVEN_UP))
            text = text or _found(store, call, _NOBODY_ANSWERS)
            if text and (at_once or not is_over.wait(_SECONDS_TO_END)):
                self._give_up(store, text)
                return

    def _give_up(self, store: Any, text: str) -> None:
        """Let this process's GPU go on, whatever it waits for."""
        self.text = text
        with contextlib.suppress(RuntimeError):
            store.compare_set(_GIVEN_UP, "", text)
        for memory in list(self.memories):
            memory.give_up()
        abort = getattr(self._group(), "abort", None)
        if abort is not None:
            abort()

    def _begin_to_give_up(self, store: Any, text: str) -> None:
        self.text = text
        threading.Thread(target=self._give_up, args=(store, text), name="prosparse-failures", daemon=True).start()
        self._let_go()


def _told(text: str) -> RuntimeError:
    error = RuntimeError(text)
    error.told = text  # type: ignore[attr-defined]
    return error


def _found(store: Any, key: str, without: str = "") -> str:
    """What a process has left there, or nothing; `without` where the store does not answer."""
    try:
        return store.get(key).decode() if store.check([key]) else ""
    except RuntimeError:
        return without


def _store_of(group: Any) -> Any:
    """The group's store, by a connection of its own: whoever waits at the other one lets nobody else ask."""
    from torch.distributed.distributed_c10d import _get_process_group_store

    store: Any = _get_process_group_store(group)
    return store.clone() if hasattr(store, "clone") else store
