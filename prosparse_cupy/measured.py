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
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs

from .formats import FORMATS
from .knobs import KINDS, Knobs, kinds, rule
from .problem import Problem, Target

VERSION = 2
"""Of the tables: raised when what a knob means changes."""
_SHIPPED = Path(__file__).resolve().parent / "tables"


@dataclass(frozen=True)
class Measured:
    """The fastest knobs of a problem."""

    problem: Problem
    """With its dims as constants: others are not measured."""
    knobs: Knobs
    us: float
    """Microseconds a call."""
    rule_us: float
    """The same with the knobs that `rule` chooses."""
    commit: str

    def as_dict(self) -> dict[str, Any]:
        problem = self.problem
        return {
            "kernel": problem.kernel,
            "d_model": problem.d_model,
            "d_ff": problem.d_ff,
            "dtype": problem.dtype,
            "tokens": problem.tokens,
            "weights": [f.name for f in problem.formats],
            "activation": problem.activation,
            "knobs": self.knobs.as_dict(),
            "us": self.us,
            "rule_us": self.rule_us,
            "commit": self.commit,
        }


def choose(problem: Problem, target: Target) -> Knobs:
    """The knobs measured fastest for a problem, or those of the rule."""
    measured = tables(target).get(problem.measured)
    if measured is not None and not measured.knobs.legal(problem, target):
        return measured.knobs
    return rule(problem, target)


@cache
def tables(target: Target) -> dict[Problem, Measured]:
    """All that was measured on a GPU model: the shipped table, and over it the user's own."""
    found: dict[Problem, Measured] = {}
    for folder in (_SHIPPED, user_folder()) if target.name else ():
        file = folder / file_name(target)
        try:
            found |= {m.problem: m for m in read(file, target)}
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
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
        except (OSError, ValueError, RecursionError) as error:
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
        kernel, dims = row["kernel"], (row["d_model"], row["d_ff"], row["tokens"])
        formats, values = tuple(FORMATS[name] for name in row["weights"]), row["knobs"]
        kind = next((k for k in kinds(kernel) if {f.name for f in fields(k)} == set(values)), KINDS[kernel])
        knobs = kind(**values)
        for f in fields(knobs):
            if type(getattr(knobs, f.name)).__name__ != f.type:
                raise TypeError(f"{f.name} must be {f.type}, got {getattr(knobs, f.name)!r}")
        if any(type(dim) is not int for dim in dims):
            raise TypeError(f"d_model, d_ff and tokens must be int, got {dims}")
        problem = Problem(kernel, *dims[:2], str(row["dtype"]), True, dims[2], formats, str(row["activation"]))
        return Measured(problem, knobs, float(row["us"]), float(row["rule_us"]), str(row["commit"]))
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"a line of it cannot be read ({type(error).__name__}: {error})") from None


def write(file: Path, target: Target, rows: list[Measured]) -> None:
    """Write a table whole or not at all: what it held on other shapes stays, if it can be read."""
    try:
        kept = {m.problem: m for m in read(file, target)}
    except (OSError, ValueError, RecursionError):
        kept = {}
    kept |= {m.problem: m for m in rows}
    lines = sorted((m.as_dict() for m in kept.values()), key=lambda line: [str(line[k]) for k in line if k != "knobs"])
    content = {"version": VERSION, "gpu": target.name, "measured": lines}
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f"{file.stem}.") as unfinished:
        new = Path(unfinished, file.name)
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(new, file)
    tables.cache_clear()
