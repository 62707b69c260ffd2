"""Which model has which decoding step: until the model is gone, changes, or is told to release it."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

_kept: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class Kept(Protocol):
    """What is kept for a model."""

    def release(self) -> None:
        """Free what is large."""


T = TypeVar("T", bound=Kept)


def kept_for(model: Any, make: Callable[[], T]) -> T:
    """What is kept for a model, made at the first call."""
    with _lock:
        found: T = _kept.get(model) or _kept.setdefault(model, make())
        return found


def release_generation(model: Any) -> None:
    """Free what `generate` keeps of a model: its decoding step, with graph and cache. The next call makes them again."""
    with _lock:
        kept: Kept | None = _kept.get(model)
    if kept is not None:
        kept.release()


_of_parents: list[Any] = []


def _begin_anew() -> None:
    """In a forked process: a thread that is not here may have held a lock, and graphs, the parent's, are not to be freed."""
    global _kept, _lock
    _of_parents.append(_kept)
    _kept, _lock = weakref.WeakKeyDictionary(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
