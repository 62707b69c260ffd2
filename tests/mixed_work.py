"""What the long run does: all that callers do, in an order that a seed draws, one in so many results checked."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cases import ON_TENSOR_CORES
from checks import bits, poisoned
from gpu_arrays import OnCupy, OnTorch
from test_batches import Block, Kind, T

import prosparse_cupy as psc

DIMS = [(264, 101), (512, 3000), (1536, 3840), (2312, 41), (40, 5000), (1024, 2048)]
KINDS = [
    *(Kind(), Kind(), Kind("drelu", biased=True), Kind("relu2", normed=True), Kind("relu2", gated=False, biased=True)),
    *(Kind(compressed=True), Kind("relu2", gated=False, biased=True, compressed=True)),
]
BLOCKS = 24  # of each library
LANES = 8  # results of a block and an operator that may be on their way at once
FOLDER = Path(__file__).parent / "data" / "relu-lm"
Check = Callable[[], None]


class Case(Block):
    """A block whose vectors lie on the GPU, with places for results: lane 0 for the default stream, the others in turn."""

    def __init__(self, on: Any, *arguments: Any, **keywords: Any) -> None:
        super().__init__(on, *arguments, **keywords)
        self.vectors = [on.put(a) for a in (self.x, self.gate, self.x1)]
        sizes = {o: self.d_model if o in ("ffn_4", "sparse_ffn", "SparseFFN") else self.d_ff for o in self.kind.operators}
        self.outs = {
            (operator, lane): on.put(poisoned((self.tokens, size), self.dtype))
            for operator, size in sizes.items()
            for lane in range(LANES + 1)
        }

    def launch(self, operator: str, out: Any) -> None:
        """On the caller's stream, into a result that is spoilt before."""
        fill = out.fill_ if self.on.name == "torch" else out.fill
        fill(float("nan"))
        self._call(operator, *self.vectors, out)

    def checked(self, operator: str, out: Any) -> Check:
        return lambda: self.check(operator, self.on.get(out))

    def __repr__(self) -> str:
        shape = f"d_model {self.d_model}, d_ff {self.d_ff}, {self.dtype}, {self.tokens} tokens"
        return f"{self.on.name}: {self.kind}, {shape}, specialize={self.specialize}"


class Varying:
    """An FFN without batch invariance, whose blocks count one another's parts; the same call has the same bits each time."""

    def __init__(self, tokens: int, dims: tuple[int, int], rng: np.random.Generator) -> None:
        import cupy

        block = Block(OnCupy(), dims, "bfloat16", tokens, Kind(), rng=rng)
        self.dims, self.tokens, self.x = dims, tokens, block.on.put(block.x)
        w = block.put_w
        self.ffn = psc.SparseFFN(w["w_gate"], w["w_up"], w["w_down_t"], T, batch_invariant=False)
        self.outs = [cupy.empty((tokens, dims[0]), block.x.dtype) for _ in range(LANES + 1)]
        self.launch(0)
        self.expected = self.outs[0].get()
        exact = block("SparseFFN").astype(np.float64)
        error = np.linalg.norm(self.expected.astype(np.float64) - exact) / np.linalg.norm(exact)
        assert exact.any() and error < 0.01, f"{self!r} is {error} from the exact order's"  # of which each is rounded twice

    def launch(self, lane: int) -> None:
        """Into a result that is spoilt before."""
        self.outs[lane].fill(float("nan"))
        self.ffn(self.x, out=self.outs[lane])

    def check(self, lane: int) -> None:
        np.testing.assert_array_equal(bits(self.outs[lane].get()), bits(self.expected))

    def __repr__(self) -> str:
        return f"tensor cores: {self.tokens} tokens, {self.dims}"


class Work:
    """Everything that is to be done, and what came of it."""

    def __init__(self, seed: int, every: int, with_model: bool = True) -> None:
        import cupy

        self.rng, self.every = np.random.default_rng(seed), every
        self.results = self.checked = 0
        self._next_check = every
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self._lane = 0
        torch = _torch_with_a_gpu()
        self.cases = [self._case(OnCupy()) for _ in range(BLOCKS)]
        self.varying = [Varying(tokens, dims, self.rng) for dims in ON_TENSOR_CORES for tokens in (5, 8)]
        self.tensors = [self._case(OnTorch()) for _ in range(BLOCKS)] if torch else []
        steps: dict[Callable[[], None], float] = {
            self.operators: 60,
            self.streams: 8,
            self.threads: 3,
            self.graphs: 6,
            self.compressed: 1,
            self.tensor_cores: 6,
        }
        if torch:
            self._torch, self._modules = torch, [self._module(case) for case in self.tensors if _is_plain(case)]
            steps |= {self.tensor_operators: 15, self.torch_streams: 3, self.torch_graphs: 0.3}
            if self._modules:
                steps |= {self.modules: 5}
        if torch and with_model and (model := _model(torch)):
            self._model, self._ids = model
            self._text: Any = None
            steps |= {self.texts: 0.3}
        cupy.cuda.Device().synchronize()  # other streams do not wait for what has been put there
        self._steps, self._shares = [*steps], np.array([*steps.values()]) / sum(steps.values())

    def step(self) -> None:
        """Something of all this."""
        self._steps[self.rng.choice(len(self._steps), p=self._shares)]()

    # What is done

    def operators(self) -> None:
        self._some_operators("operators", self.cases)

    def tensor_operators(self) -> None:
        self._some_operators("operators of torch", self.tensors)

    def _some_operators(self, name: str, cases: list[Case]) -> None:
        case, operator = self._drawn(cases)
        for _ in range(20):
            out = case.outs[operator, 0]
            case.launch(operator, out)
            self._result(name, case, case.checked(operator, out))

    def streams(self) -> None:
        """A new one, which is destroyed while it runs."""
        import cupy

        drawn = [(*self._drawn(self.cases), self._next_lane()) for _ in range(4)]
        with cupy.cuda.Stream(non_blocking=True):
            for case, operator, lane in drawn:
                case.launch(operator, case.outs[operator, lane])
        self._results("streams", drawn)

    def torch_streams(self) -> None:
        """torch's own, which it keeps, and a foreign one."""
        import cupy

        drawn = [(*self._drawn(self.tensors), self._next_lane()) for _ in range(4)]
        foreign = cupy.cuda.Stream(non_blocking=True)
        streams = [self._torch.cuda.Stream(), self._torch.cuda.ExternalStream(foreign.ptr)]
        for i, (case, operator, lane) in enumerate(drawn):
            with self._torch.cuda.stream(streams[i % 2]):
                case.launch(operator, case.outs[operator, lane])
        self._torch.cuda.synchronize()
        self._results("streams of torch", drawn)

    def threads(self) -> None:
        """Four, on streams of their own or on one."""
        import cupy

        drawn = [(*self._drawn(self.cases), self._next_lane()) for _ in range(4)]
        shares, errors = bool(self.rng.integers(2)), []

        def work(case: Case, operator: str, lane: int) -> None:
            try:
                with contextlib.nullcontext() if shares else cupy.cuda.Stream(non_blocking=True) as own:
                    for _ in range(10):
                        case.launch(operator, case.outs[operator, lane])
                    if own is not None:
                        own.synchronize()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=arguments) for arguments in drawn]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        self.results, self.counts["threads"] = self.results + 36, self.counts["threads"] + 36
        self._results("threads", drawn)

    def graphs(self) -> None:
        """Captured, launched three times on another stream, and destroyed."""
        import cupy

        drawn = [(*self._drawn(self.cases), self._next_lane()) for _ in range(3)]
        for case, operator, lane in drawn:  # which compiles what is not compiled yet
            case.launch(operator, case.outs[operator, lane])
        stream, other = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
        cupy.cuda.Device().synchronize()
        with stream:
            stream.begin_capture()
            for case, operator, lane in drawn:
                case.launch(operator, case.outs[operator, lane])
            graph = stream.end_capture()
        for _ in range(3):
            graph.launch(other)
        self.results, self.counts["graphs"] = self.results + 6, self.counts["graphs"] + 6
        self._results("graphs", drawn)

    def torch_graphs(self) -> None:
        case, operator = self._drawn(self.tensors)
        out = case.outs[operator, 0]
        case.launch(operator, out)
        self._torch.cuda.synchronize()
        graph = self._torch.cuda.CUDAGraph()
        with self._torch.cuda.graph(graph):
            case.launch(operator, out)
        for _ in range(3):
            graph.replay()
            self._result("graphs of torch", case, case.checked(operator, out))
        self._torch.cuda.synchronize()

    def tensor_cores(self) -> None:
        """On the default stream, or four at once on a new one that is destroyed while it runs."""
        import cupy

        drawn = [(self.varying[self.rng.integers(len(self.varying))], self._next_lane()) for _ in range(4)]
        with contextlib.nullcontext() if self.rng.integers(2) else cupy.cuda.Stream(non_blocking=True):
            for ffn, lane in drawn:
                ffn.launch(lane)
        for ffn, lane in drawn:
            self._result("tensor cores", ffn, partial(ffn.check, lane))

    def compressed(self) -> None:
        case = self.cases[self.rng.integers(len(self.cases))]
        if case.dtype != "bfloat16":
            return
        w = case.on.put(case.w["w_up"])
        again = psc.compress(w, layout="rows" if self.rng.integers(2) else "slices").decompress()
        self._result("compress", case, lambda: np.testing.assert_array_equal(bits(case.on.get(again)), bits(case.w["w_up"])))

    def modules(self) -> None:
        case, module = self._modules[self.rng.integers(len(self._modules))]
        x = case.vectors[0][0]
        for _ in range(10):
            y = module(x)
            expected = partial(case, "sparse_ffn", 0)
            self._result(
                "modules", case, lambda y=y, e=expected: np.testing.assert_array_equal(bits(case.on.get(y)), bits(e()))
            )

    def _same(self, case: Case, y: Any) -> None:
        np.testing.assert_array_equal(bits(case.on.get(y)), bits(case("sparse_ffn", 0)))

    def texts(self) -> None:
        """A patched model's greedy text is the same whenever it is written."""
        with self._torch.inference_mode():
            text = self._model.generate(self._ids, max_new_tokens=16, min_new_tokens=16, do_sample=False).tolist()
        self._text = self._text or text
        first = self._text

        def check() -> None:
            assert text == first, f"{text} was {first}"

        self._result("texts", "relu-lm", check)

    # How it is kept

    def _case(self, on: Any) -> Case:
        kind = KINDS[self.rng.integers(len(KINDS))]
        dtype = "bfloat16" if kind.compressed else ("bfloat16", "bfloat16", "float16", "float32")[self.rng.integers(4)]
        dims, tokens = DIMS[self.rng.integers(len(DIMS))], int(self.rng.choice([1, 1, 1, 2, 3, 8]))
        return Case(on, dims, dtype, tokens, kind, specialize=bool(self.rng.integers(4)), rng=self.rng)

    def _module(self, case: Case) -> tuple[Case, Any]:
        from prosparse_cupy.torch import SparseGatedMLP

        module = SparseGatedMLP(case.d_model, case.d_ff, T, device="cuda", dtype=case.vectors[0].dtype).requires_grad_(False)
        for name, source in (("gate_proj", "w_gate"), ("up_proj", "w_up")):
            getattr(module, name).weight.copy_(case.put_w[source])
        module.down_proj.weight.copy_(case.put_w["w_down_t"].t())
        return case, module

    def _drawn(self, cases: list[Case]) -> tuple[Case, str]:
        case = cases[self.rng.integers(len(cases))]
        return case, case.kind.operators[self.rng.integers(len(case.kind.operators))]

    def _next_lane(self) -> int:
        """A lane in which nothing is on its way any more."""
        import cupy

        self._lane = self._lane % LANES + 1
        if self._lane == 1:
            cupy.cuda.Device().synchronize()
        return self._lane

    def _results(self, name: str, drawn: list[tuple[Case, str, int]]) -> None:
        for case, operator, lane in drawn:
            self._result(name, case, case.checked(operator, case.outs[operator, lane]))

    def _result(self, name: str, what: Any, check: Check) -> None:
        """Count a result, and check it if it is one of those."""
        import cupy

        self.results += 1
        self.counts[name] += 1
        if self.results < self._next_check:
            return
        self._next_check = self.results + self.every
        cupy.cuda.Device().synchronize()
        self.checked += 1
        try:
            check()
        except AssertionError as error:
            self.failures.append(f"{name}: {what!r}: result {self.results}: {str(error)[:500]}")


def _is_plain(case: Case) -> bool:
    return case.kind == Kind() and case.specialize


def _torch_with_a_gpu() -> Any:
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def _model(torch: Any) -> tuple[Any, Any] | None:
    """The small model, patched, and a prompt; None without transformers."""
    try:
        import transformers
    except ImportError:
        return None
    from prosparse_cupy.torch import patch_model

    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16).eval().to("cuda")
    assert patch_model(model).sparse
    return model, torch.tensor([list(b"def parse_args(")], device="cuda")
