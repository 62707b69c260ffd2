"""Processes of one group, over gloo or NCCL, which run what a test asks for: each test's functions are in `ranks_*.py`."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
_SECONDS = 120  # for one function


class RankError(RuntimeError):
    """What functions raised, or that one did not end; `errors` has the message of each rank, or nothing."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__("\n".join(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error))
        self.errors = errors


class Ranks:
    """`size` processes, each with a GPU of its own or none."""

    def __init__(self, size: int, backend: str = "gloo") -> None:
        self._size, self.backend = size, backend
        self._start()

    def _start(self) -> None:
        size, backend = self._size, self.backend
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        if backend == "gloo":
            common["CUDA_VISIBLE_DEVICES"] = ""
        self._processes = [
            subprocess.Popen(
                [sys.executable, str(_HERE / "ranks.py"), backend],
                env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for rank in range(size)
        ]

    def run(self, function: Any, *arguments: Any, each: list[tuple[Any, ...]] | None = None) -> list[Any]:
        """What the function, one of a module in this folder, returns in each rank; `each` has arguments for each rank."""
        for rank, process in enumerate(self._processes):
            request = (function.__module__, function.__name__, arguments + (each[rank] if each is not None else ()))
            pickle.dump(request, process.stdin)
            process.stdin.flush()
        timer = threading.Timer(_SECONDS, self.close)
        timer.start()
        try:
            answers = [pickle.load(process.stdout) for process in self._processes]
        except EOFError:
            self.close()
            self._start()  # for the next test
            raise RankError([f"a process ended, or a function took more than {_SECONDS} s"]) from None
        finally:
            timer.cancel()
        errors = [error for _, error in answers]
        if any(errors):
            raise RankError(errors)
        return [result for result, _ in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


@contextmanager
def ranks(size: int, backend: str = "gloo") -> Iterator[Ranks]:
    group = Ranks(size, backend)
    try:
        yield group
    finally:
        group.close()


def _work() -> None:
    """Run what comes in at the standard input; nothing else writes to the standard output."""
    answers, sys.stdout = os.fdopen(os.dup(1), "wb"), sys.stderr
    os.dup2(2, 1)
    sys.path[:0] = [str(_HERE), str(_HERE.parent)]
    import importlib

    import torch
    import torch.distributed as dist

    backend = sys.argv[1]
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)
    while True:
        try:
            module, name, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        try:
            answer = getattr(importlib.import_module(module), name)(*arguments), ""
        except Exception as error:
            if os.environ.get("RANKS_VERBOSE"):
                traceback.print_exc()
            answer = None, f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    _work()
