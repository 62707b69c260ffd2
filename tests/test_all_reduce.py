"""Sums over the GPUs of one host: the kernel under sanitizers and on one GPU, and the memory that processes share."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checks import bits
from host_cuda import HostKernels, HostRunError, why_unavailable
from test_compile import ARCHITECTURES, compile_for

from prosparse_cupy import peers
from prosparse_cupy.compiler import source
from prosparse_cupy.peers import CAPACITY, Layout, SharedMemory, all_reduce_plan, capacity_of

SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3e38], np.float32)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory):
    if reason := why_unavailable():
        pytest.skip(reason)
    kernels = HostKernels(tmp_path_factory.mktemp("builds"))
    yield kernels
    kernels.close()


def _parts(ranks: int, numbers: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng([ranks, numbers, seed])
    parts = [(rng.standard_normal(numbers) * 10.0 ** rng.integers(-20, 20)).astype(np.float32) for _ in range(ranks)]
    for part in parts:
        part[rng.integers(0, numbers, numbers // 3)] = rng.choice(SPECIAL, numbers // 3)
    return parts


def _sum(parts: list[np.ndarray]) -> np.ndarray:
    """In the order of ranks, in float32."""
    total = parts[0]
    with np.errstate(over="ignore", invalid="ignore"):
        for part in parts[1:]:
            total = total + part
    return total


def _same(found: np.ndarray, expected: np.ndarray) -> bool:
    """Bits, but for a NaN's, which hosts and GPUs choose otherwise."""
    numbers = ~np.isnan(expected)
    return np.array_equal(bits(found[numbers]), bits(expected[numbers])) and bool(np.isnan(found[~numbers]).all())


class Rank:
    """What one GPU has: poisoned mail, and what its kernel leaves."""

    def __init__(self, host: HostKernels, rank: int, ranks: int, numbers: int, capacity: int, exchange: int, seed: int) -> None:
        self.host, self.rank, self.ranks, self.numbers, self.capacity = host, rank, ranks, numbers, capacity
        self.plan = all_reduce_plan(ranks, numbers, programmatic=False)
        self.exchange, self.is_given_up = exchange % 2**32, 0
        rng = np.random.default_rng([seed, rank])
        mail = rng.integers(0, 2**64, (ranks, 2, ranks, capacity, 2), dtype=np.uint64)  # of all, this one's among them
        self.mails = np.where(mail >> np.uint64(32) == self.exchange, mail ^ np.uint64(1 << 40), mail)
        self.exchanges = np.full(Layout(ranks, capacity).blocks, (exchange - 1) % 2**32, np.uint32)

    def words(self, part: np.ndarray) -> np.ndarray:
        """What is sent of a vector: pairs, the last of which may be half."""
        padded = np.zeros(2 * -(-self.numbers // 2), np.float32)
        padded[: self.numbers] = part
        return (np.uint64(self.exchange) << np.uint64(32) | padded.view(np.uint32).astype(np.uint64)).reshape(-1, 2)

    def sent(self, parts: list[np.ndarray]) -> None:
        """The others' words have come."""
        for other, part in enumerate(parts):
            if other != self.rank:
                words = self.words(part)
                self.mails[self.rank, self.exchange % 2, other, : len(words)] = words

    def run(self, part: np.ndarray, *, code: str | None = None, in_place: bool = False, seed: int = 0) -> np.ndarray:
        """The kernel's out; `mails` and `exchanges` are what it leaves."""
        library = self.host.build("all_reduce", code or source("all_reduce"), self.plan.defines)
        size = self.mails[0].nbytes
        others = [(r - self.rank) * size for r in range(self.ranks)]
        offsets = np.array([*others, 8 * (self.ranks + 2), 0, self.is_given_up], np.int64)
        out = np.full(self.numbers, np.nan, np.float32)
        arrays = [out, np.ascontiguousarray(part), self.mails, offsets, self.exchanges]
        pointers = [(1, 0), (1 if in_place else 0, 0), (2, self.rank * size), (3, 0), (4, 0)]
        numbers = [n.to_bytes(8, "little") for n in (self.rank, self.numbers, self.capacity, 1)]
        slots = [(slot,) for slot in (*pointers, *numbers)]
        buffers = [a.tobytes() for a in arrays]
        changed = self.host.launch(library, self.plan.grid, self.plan.block, slots, buffers, seed)
        left = [
            np.frombuffer(changed.get(i, b), a.dtype).reshape(a.shape)
            for i, (a, b) in enumerate(zip(arrays, buffers, strict=True))
        ]
        self.mails, self.exchanges = left[2].copy(), left[4].copy()
        assert (1 in changed) <= in_place and 3 not in changed
        return left[1] if in_place else left[0]


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("numbers", [1, 2, 255, 256, 257, 600])
def test_sums_on_the_host(host, ranks, numbers):
    for rank in {0, ranks // 2, ranks - 1}:
        for exchange in (1, 2, 2**32 - 1, 2**32):
            capacity = numbers // 2 + 1 + exchange % 3
            parts = _parts(ranks, numbers, exchange % 7)
            own = Rank(host, rank, ranks, numbers, capacity, exchange, seed=numbers)
            own.sent(parts)
            expected = own.mails.copy()
            words = own.words(parts[rank])
            for other in range(ranks):
                if other != rank:
                    expected[other, own.exchange % 2, rank, : len(words)] = words
            before = own.exchanges.copy()
            out = own.run(parts[rank], in_place=exchange == 2, seed=exchange % 5)
            assert _same(out, _sum(parts))
            assert np.array_equal(own.mails, expected)  # the words, and nothing else
            launched = own.plan.grid[0]
            assert (own.exchanges[:launched] == own.exchange).all() and (own.exchanges[launched:] == before[launched:]).all()


@pytest.mark.parametrize("kept", ["nothing", "the exchange before", "half a pair"])
def test_a_word_that_was_not_sent_is_not_taken(host, kept):
    parts, own = _parts(2, 40, 0), Rank(host, 0, 2, 40, 20, 5, seed=1)
    own.sent(parts)
    slot = own.mails[0, 1, 1]
    if kept == "half a pair":
        slot[7, 1] ^= np.uint64(3) << np.uint64(32)
    elif kept == "nothing":
        slot[7] = 0
    else:
        slot[7] -= np.uint64(2) << np.uint64(32)
    with pytest.raises(HostRunError, match="nobody has sent"):
        own.run(parts[0])


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_gpu_that_is_to_wait_no_more_ends(host, ranks):
    """And sends what others may still wait for; words that have come count."""
    parts, own = _parts(ranks, 40, 0), Rank(host, ranks - 1, ranks, 40, 20, 5, seed=1)
    own.sent(parts)
    own.mails[ranks - 1, 1, 0, 3] = [0, 1 << 32]
    own.is_given_up = 1
    out = own.run(parts[-1])
    missing = np.isin(np.arange(40), [6, 7])
    assert _same(out[~missing], _sum(parts)[~missing])
    assert np.array_equal(own.mails[0, 1, ranks - 1, :20], own.words(parts[-1])) and (own.exchanges == 5).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills(architecture):
    for ranks in (2, 4, 8):
        _, report = compile_for(all_reduce_plan(ranks, 5120, programmatic=architecture >= 90), architecture)
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report and "warning" not in report


@pytest.mark.quick
@pytest.mark.parametrize(("ranks", "numbers"), [(1, 8), (9, 8), (2, 0), (2, 2 * CAPACITY + 1)])
def test_what_the_kernel_does_not_take(ranks, numbers):
    with pytest.raises(ValueError, match="all_reduce"):
        all_reduce_plan(ranks, numbers, programmatic=False)


@pytest.mark.quick
@pytest.mark.parametrize("ranks", [2, 3, 7, 8])
@pytest.mark.parametrize("capacity", [1, 127, 128, 129, 4096, CAPACITY])
def test_the_layout_holds_what_the_kernel_reads(ranks, capacity):
    """No part reaches into the next one, and mail lies at a multiple of 16 bytes."""
    layout = Layout(ranks, capacity)
    assert ranks <= layout.given_up < layout.exchanges and 8 * layout.exchanges + 4 * layout.blocks <= 8 * layout.mail
    assert layout.mail % 2 == 0 and layout.words - layout.mail == 2 * ranks * capacity * 2
    assert layout.blocks >= all_reduce_plan(ranks, 2 * capacity, programmatic=False).grid[0]


@pytest.mark.quick
def test_sums_that_a_gpu_has_room_for():
    assert capacity_of(5120, 132) == 2560 and capacity_of(5, 132) == 3
    assert capacity_of(10**6, 132) == CAPACITY and capacity_of(10**6, 10) == 10 * 8 * 128


class _PageLocked(bytearray):
    """What can be written to at an address of the GPU's."""

    def __init__(self, content: bytes, ptr: int) -> None:
        super().__init__(content)
        self.ptr = ptr


class _Driver:
    """As much of CuPy as `SharedMemory` uses, of two processes: what is allocated, opened and given back."""

    class CUDARuntimeError(Exception):
        pass

    def __init__(self, rank: int, failing: str) -> None:
        self.rank, self.failing, self.held = rank, failing, set[str]()
        self.memory, self.others = np.full(8, -1, np.int64), list[_Driver]()
        stream = SimpleNamespace(ptr=7, synchronize=lambda: None)
        self.cuda = SimpleNamespace(
            runtime=self,
            Device=lambda _: threading.RLock(),
            Stream=lambda non_blocking: stream,
            alloc_pinned_memory=lambda nbytes: _PageLocked(b"\xff" * nbytes, 70_000 + 10_000 * rank),
        )

    def _perhaps_fail(self, what: str) -> None:
        if self.failing == what:
            raise self.CUDARuntimeError(f"no {what}, says the test")

    def malloc(self, nbytes: int) -> int:
        self._perhaps_fail("memory")
        self.held.add("own")
        return 1000 * (self.rank + 1)

    def ipcGetMemHandle(self, address: int) -> bytes:
        return b"handle of %d" % address

    def ipcOpenMemHandle(self, handle: bytes, flags: int) -> int:
        self._perhaps_fail("link")
        self.held.add("other's")
        return 50_000 + int(handle.split()[-1])

    def ipcCloseMemHandle(self, address: int) -> None:
        assert "own" in self.others[1 - self.rank].held, "freed before it was closed"
        self.held.remove("other's")

    def free(self, address: int) -> None:
        assert "other's" not in self.others[1 - self.rank].held, "freed before the others have closed it"
        self.held.remove("own")

    def memcpy(self, to: int, of: int, nbytes: int, kind: int) -> None:
        """A word to the other process's memory, or this one's own back."""
        if kind == 1:
            address = to - 50_000 - 1000 * (2 - self.rank)
            if self.failing != "silence":
                self.others[1 - self.rank].memory[address // 8] = ctypes.c_int64.from_address(of).value
        else:
            ctypes.memmove(to, self.memory.ctypes.data, nbytes)

    def memsetAsync(self, address: int, value: int, nbytes: int, stream: int) -> None:
        assert (address, value, nbytes, stream) == (1000 * (self.rank + 1), 0, 64, 7)
        self.memory[:] = 0


def _shared(
    monkeypatch: pytest.MonkeyPatch, failing: dict[int, str], hosts: tuple[str, str] = ("a", "a")
) -> tuple[list[Any], list[_Driver]]:
    """What two processes, threads here, have or raise."""
    drivers = [_Driver(rank, failing.get(rank, "")) for rank in range(2)]
    for driver in drivers:
        driver.others = drivers
    said, barrier, found = [None, None], threading.Barrier(2), [None, None]
    here = threading.local()
    monkeypatch.setattr(peers, "cupy", lambda: drivers[here.rank])
    monkeypatch.setattr(peers, "_host", lambda: hosts[here.rank])

    def process(rank: int) -> None:
        here.rank = rank

        def tell(what: Any) -> list[Any]:
            said[rank] = what
            barrier.wait(10)
            all_said = [*said]
            barrier.wait(10)
            return all_said

        try:
            found[rank] = SharedMemory(1, 64, 0, rank, tell)
        except OSError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found, drivers


@pytest.mark.quick
def test_processes_find_each_others_memory(monkeypatch):
    found, drivers = _shared(monkeypatch, {})
    assert [m.offsets for m in found] == [[0, 51_000, 69_000], [49_000, 0, 78_000]]
    assert all(d.held == {"own", "other's"} and not d.memory.any() for d in drivers)


@pytest.mark.quick
def test_the_word_that_ends_waiting_is_this_processs_own(monkeypatch):
    """And is written to without a call of CUDA."""
    found, drivers = _shared(monkeypatch, {})
    words = [np.frombuffer(memory._page_locked, np.int64) for memory in found]
    assert [word.tolist() for word in words] == [[0], [0]]
    monkeypatch.setattr(peers, "cupy", None)
    found[1].give_up()
    assert [word.tolist() for word in words] == [[0], [1]] and not any(d.memory.any() for d in drivers)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("failing", "hosts", "message"),
    [
        ({1: "memory"}, ("a", "a"), "rank 1: no memory"),
        ({0: "link"}, ("a", "a"), "rank 0: no link"),
        ({0: "link", 1: "memory"}, ("a", "a"), "rank 1: no memory"),
        ({}, ("a", "b"), "rank 0: the processes run on different hosts"),
        ({0: "silence"}, ("a", "a"), "rank 1: what rank 0 writes does not arrive"),
    ],
)
def test_what_one_process_cannot_see_all_do_without(monkeypatch, failing, hosts, message):
    found, drivers = _shared(monkeypatch, failing, hosts)
    assert all(isinstance(error, str) and message in error for error in found), found
    assert not any(d.held for d in drivers)


@pytest.mark.quick
def test_nccls_users_who_switch_links_off_are_heard(monkeypatch):
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    found, drivers = _shared(monkeypatch, {})
    assert all("NCCL_P2P_DISABLE is set" in error for error in found) and not any(d.held for d in drivers)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_on_one_gpu(ranks):
    """Each on a stream of its own: many exchanges of several sizes, launched apart and from graphs."""
    torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
    import prosparse_cupy.torch.peers  # noqa: F401

    capacity, sizes = 1100, (1, 2, 257, 2048, 2199, 2200)
    layout = Layout(ranks, capacity)
    shared = [torch.zeros(layout.words, dtype=torch.int64, device="cuda") for _ in range(ranks)]
    waits_no_more = torch.zeros(1, dtype=torch.int64, device="cuda")
    for own in shared:
        own[: ranks + 1] = torch.tensor(
            [other.data_ptr() - own.data_ptr() for other in (*shared, waits_no_more)], device="cuda"
        )
    streams = [torch.cuda.Stream() for _ in range(ranks)]
    inputs = {n: [torch.from_numpy(p).cuda() for p in _parts(ranks, n, 5)] for n in sizes}
    expected = {n: _sum(_parts(ranks, n, 5)) for n in sizes}

    def summed(rank: int, numbers: int) -> Any:
        return torch.ops.prosparse.all_reduce(inputs[numbers][rank], shared[rank], ranks, rank, capacity, 20)

    def check(outs: list[Any], numbers: int) -> None:
        torch.cuda.synchronize()
        found = [out.cpu().numpy() for out in outs]
        assert all(_same(own, expected[numbers]) for own in found), numbers
        assert all(np.array_equal(bits(own), bits(found[0])) for own in found)

    torch.cuda.synchronize()
    order = np.random.default_rng(ranks).choice(sizes, 60)
    for numbers in map(int, order):
        outs = []
        for rank in np.random.default_rng(numbers).permutation(ranks):
            with torch.cuda.stream(streams[rank]):
                outs.append(summed(int(rank), numbers))
        check(outs, numbers)

    graphs, kept = [], []
    for rank in range(ranks):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=streams[rank]):
            kept.append([summed(rank, numbers) for numbers in sizes])
        graphs.append(graph)
    for turn in range(50):
        for n in sizes:  # so that a word that was left of the turn before would show
            expected[n] = _sum(fresh := _parts(ranks, n, 100 + turn))
            for own, part in zip(inputs[n], fresh, strict=True):
                own.copy_(torch.from_numpy(part))
        torch.cuda.synchronize()
        for rank in np.random.default_rng(turn).permutation(ranks):
            with torch.cuda.stream(streams[rank]):
                graphs[rank].replay()
        for of_size, n in zip(zip(*kept, strict=True), sizes, strict=True):
            check([*of_size], n)


@pytest.mark.gpu
@pytest.mark.parametrize(("ranks", "rank", "numbers"), [(2, 0, 1), (2, 1, 257), (3, 1, 600), (8, 7, 2200)])
def test_one_rank_whose_others_have_sent(ranks, rank, numbers):
    """By itself, as tools see it that run one launch at a time: what it adds and sends, and that it writes nothing else."""
    torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
    import prosparse_cupy.torch.peers  # noqa: F401

    capacity = numbers // 2 + 3
    layout, parts = Layout(ranks, capacity), _parts(ranks, numbers, 9)
    shared = [torch.full((layout.words,), -1, dtype=torch.int64, device="cuda") for _ in range(ranks)]
    own = shared[rank]
    own[: layout.mail] = 0  # no exchange yet: the words of the first one have an odd number
    own[:ranks] = torch.tensor([other.data_ptr() - own.data_ptr() for other in shared], device="cuda")
    own[ranks] = 8 * ranks + 8  # the next word, which is zero

    def words(part: np.ndarray) -> Any:
        padded = np.zeros(2 * -(-numbers // 2), np.float32)
        padded[:numbers] = part
        return torch.from_numpy(padded.view(np.int32).astype(np.int64) & 0xFFFFFFFF | 1 << 32).cuda()

    def slot(of: Any, sender: int) -> Any:
        return of[layout.mail :].view(2, ranks, 2 * capacity)[1, sender, : 2 * -(-numbers // 2)]

    for sender in range(ranks):
        if sender != rank:
            slot(own, sender).copy_(words(parts[sender]))
    expected = [memory.clone() for memory in shared]
    expected[rank][layout.exchanges : layout.mail].view(torch.int32)[: -(-numbers // 256)] = 1
    for other in range(ranks):
        if other != rank:
            slot(expected[other], rank).copy_(words(parts[rank]))
    out = torch.ops.prosparse.all_reduce(torch.from_numpy(parts[rank]).cuda(), own, ranks, rank, capacity, 20)
    assert _same(out.cpu().numpy(), _sum(parts))
    assert all(torch.equal(found, wanted) for found, wanted in zip(shared, expected, strict=True))


@pytest.mark.gpu
def test_a_gpu_does_not_wait_for_ever():
    """The other rank never sends: an error after the time given, in a process of its own, since its CUDA is lost with it."""
    pytest.importorskip("torch", reason='the extra "torch" brings it')
    code = """
        import time, torch, prosparse_cupy.torch.peers
        from prosparse_cupy.peers import Layout
        shared = torch.zeros(Layout(2, 64).words, dtype=torch.int64, device="cuda")
        shared[2] = 24  # the next word, which is zero
        part = torch.ones(100, device="cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.ops.prosparse.all_reduce(part, shared, 2, 0, 64, 2)
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print("raised", 1.5 < time.perf_counter() - start < 30)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    assert ran.stdout.split() == ["raised", "True"], ran.stdout + ran.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("is_default", [True, False])
def test_a_gpu_is_let_go_while_it_waits(is_default):
    """From another thread, whatever stream it waits on; its CUDA goes on."""
    torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
    import prosparse_cupy.torch.peers  # noqa: F401

    shared, part = torch.zeros(Layout(2, 64).words, dtype=torch.int64, device="cuda"), torch.ones(100, device="cuda")
    memory = object.__new__(SharedMemory)
    memory._page_locked = peers.cupy().cuda.alloc_pinned_memory(8)
    memory._waits_no_more = np.frombuffer(memory._page_locked, np.int64, 1)
    memory._waits_no_more[0], shared[2] = 0, memory._page_locked.ptr - shared.data_ptr()
    torch.cuda.synchronize()
    stream, ended = torch.cuda.default_stream() if is_default else torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        torch.ops.prosparse.all_reduce(part, shared, 2, 0, 64, 60)
        ended.record()
        time.sleep(0.3)
        assert not ended.query()
        thread = threading.Thread(target=memory.give_up)
        start = time.perf_counter()
        thread.start()
        ended.synchronize()
        thread.join()
        for _ in range(5):
            torch.ops.prosparse.all_reduce(part, shared, 2, 0, 64, 60)
    torch.cuda.synchronize()
    assert time.perf_counter() - start < 10
    assert float((part + part).sum()) == 200


@pytest.mark.gpu
def test_bad_tensors_are_refused_before_a_launch():
    torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
    import prosparse_cupy.torch.peers  # noqa: F401

    words = Layout(2, 64).words
    good = {
        "part": torch.ones(100, device="cuda"),
        "shared": torch.zeros(words, dtype=torch.int64, device="cuda"),
        "ranks": 2,
        "rank": 0,
        "capacity": 64,
        "seconds": 1,
    }
    for bad, message in (
        ({"part": good["part"].half()}, "part must be contiguous float32"),
        ({"part": torch.ones(100, device="cuda")[::2]}, "part must be contiguous"),
        ({"part": torch.ones(129, device="cuda")}, "room for 1 to 128"),
        ({"part": torch.ones(0, device="cuda")}, "room for 1 to 128"),
        ({"rank": 2}, "rank 2"),
        ({"rank": -1}, "rank -1"),
        ({"shared": good["shared"].cpu()}, "shared must be contiguous int64 on cuda"),
        ({"shared": good["shared"].int()}, "shared must be contiguous int64"),
        ({"shared": good["shared"][1:]}, "shared must be"),
        ({"shared": torch.zeros(words + 1, dtype=torch.int64, device="cuda")[1:]}, "multiple of 16 bytes"),
        ({"capacity": 65}, "shared must be"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.prosparse.all_reduce(**{**good, **bad})
    torch.cuda.synchronize()
    assert not good["shared"].any()
