"""Kernels and Python broken on purpose, which the tests must notice without a GPU: ``python -m tests.mutants``."""

from __future__ import annotations

import hashlib
from typing import NamedTuple


class Mutant(NamedTuple):
    """A text of a file, and what is put in its place."""

    file: str
    old: str
    new: str
    survives: str = ""
    """Why no test on the CPU can notice it, and who does; empty if one must."""

    @property
    def name(self) -> str:
        return f"{self.file}: {self.old.strip()!r:.70} -> {self.new.strip()!r:.50}"

    @property
    def digest(self) -> str:
        """What tells it from every other, whole texts among it, which the name cuts."""
        return hashlib.sha256(repr(tuple(self)).encode()).hexdigest()[:16]
