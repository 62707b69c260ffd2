"""Measured tables: which knobs a GPU is fastest with, as `prosparse-cupy tune` found them. No CuPy.

A table is a JSON file of one GPU model: a line for each kernel, shape and dtype, with its knobs, the time in µs and the commit
that it was measured at. The package may ship some; a user's own are kept in the user's data folder and come first. Shapes and
GPUs that no table names get `knobs.rule`.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs

from .knobs import KINDS, Knobs, rule
from .problem import Problem, Target

VERSION = 1
"""Of the tables: raised when what a knob means changes."""
_SHIPPED = Path(__file__).resolve().parent / "tables"

Key = tuple[str, int, int, str]


@dataclass(frozen=True)
class Measured:
    """The fastest knobs of one kernel on one shape."""

    kernel: str
    d_model: int
    d_ff: int
    dtype: str
    knobs: Knobs
    us: float
    """Microseconds a call."""
    rule_us: float
    """The same with the knobs that `rule` chooses."""
    commit: str

    @property
    def key(self) -> Key:
        return self.kernel, self.d_model, self.d_ff, self.dtype

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "knobs": self.knobs.as_dict()}


def choose(problem: Problem, target: Target) -> Knobs:
    """The knobs measured fastest for a problem, or those of the rule. Kernels without dims as constants are not measured."""
    if problem.specialize and problem.tokens == 1:
        measured = tables(target).get((problem.kernel, problem.d_model, problem.d_ff, problem.dtype))
        if measured is not None and not measured.knobs.legal(problem, target):
            return measured.knobs
    return rule(problem, target)


@cache
def tables(target: Target) -> dict[Key, Measured]:
    """All that was measured on a GPU model: the shipped table, and over it the user's own."""
    found: dict[Key, Measured] = {}
    for folder in (_SHIPPED, user_folder()):
        file = folder / file_name(target)
        if target.name and file.is_file():
            try:
                found |= {m.key: m for m in read(file, target)}
            except (OSError, ValueError) as error:
                warnings.warn(
                    f"prosparse_cupy: the measured table {file} is left out: {error}. `prosparse-cupy tune` makes it anew.",
                    RuntimeWarning,
                    stacklevel=2,
                )
    return found


def user_folder() -> Path:
    """Where a user's own tables are."""
    return Path(platformdirs.user_data_dir("prosparse-cupy", appauthor=False)) / "tables"


def describe(target: Target) -> str:
    """How many launches of a GPU are measured, and where the user's own table is or would be."""
    counts, own = [], user_folder() / file_name(target)
    for what, file in (("shipped", _SHIPPED / own.name), ("own", own)):
        try:
            counts.append(f"{len(read(file, target))} {what}")
        except FileNotFoundError:
            counts.append(f"0 {what}")
        except (OSError, ValueError) as error:
            counts.append(f"{what} left out ({error})")
    return f"{', '.join(counts)} ({own})"


def file_name(target: Target) -> str:
    """Of a GPU model's table."""
    return re.sub(r"[^a-z0-9]+", "-", target.name.lower()).strip("-") + ".json"


def read(file: Path, target: Target) -> list[Measured]:
    """A table; ValueError if it is broken, of another GPU, or of another version."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("measured"), list):
        raise ValueError("it holds no list of measurements")
    if content.get("version") != VERSION:
        raise ValueError(f"it is of version {content.get('version')!r}, not {VERSION}")
    if content.get("gpu") != target.name:
        raise ValueError(f"it is of a {content.get('gpu')!r}, not of a {target.name!r}")
    return [_measured(row) for row in content["measured"]]


def _measured(row: Any) -> Measured:
    try:
        kind = KINDS[row["kernel"]]
        problem = Problem(row["kernel"], int(row["d_model"]), int(row["d_ff"]), str(row["dtype"]))
        return Measured(
            *(problem.kernel, problem.d_model, problem.d_ff, problem.dtype),
            *(kind(**row["knobs"]), float(row["us"]), float(row["rule_us"]), str(row["commit"])),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"a line of it cannot be read ({type(error).__name__}: {error})") from None


def write(file: Path, target: Target, rows: list[Measured]) -> None:
    """Write a table whole or not at all: what it held on other shapes stays, if it can be read."""
    try:
        kept = {m.key: m for m in read(file, target)}
    except (OSError, ValueError):
        kept = {}
    kept |= {m.key: m for m in rows}
    content = {"version": VERSION, "gpu": target.name, "measured": [kept[key].as_dict() for key in sorted(kept)]}
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False, encoding="utf-8") as unfinished:
        json.dump(content, unfinished, indent=1)
        unfinished.write("\n")
    os.replace(unfinished.name, file)
    tables.cache_clear()
