"""Which model has which decoding step: until the model is gone, changes, or is told to release it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

_kept: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
T = TypeVar("T")


def kept_for(model: Any, make: Callable[[], T]) -> T:
    """What is kept for a model, made at the first call."""
    with _lock:
        found: T = _kept.get(model) or _kept.setdefault(model, make())
        return found


def release_generation(model: Any) -> None:
    """Free what `generate` keeps of a model: its decoding step, with graph and cache. The next call makes them again."""
    with _lock:
        _kept.pop(model, None)
