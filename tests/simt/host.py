"""The project's CUDA kernels, run on the CPU by the host executor (kernels.cpp)."""

import argparse
import bisect
import math
import os
import select
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from gcov import counts_below, keep_notes
from lanes import FOLDER, LANES, build
from plans import DEVICES

from softmax_ext._C import Plan

ORDERS = ("forward", "reverse", "random", "greedy")
# Of a lane that a case runs slowly in. A sanitizer looks at each access in any order; one warp far
# ahead of the others, and any order, show it the most of them.
LANE_ORDERS = {"asan": ("greedy",), "tsan": ("random",)}
# A process has launches of at most as many threads at a time, and another those of more. Each
# meeting of a thread under ThreadSanitizer takes as long as its process has ever had threads.
LANE_CROWDS = {"tsan": (128, 1024)}
KEPT = FOLDER / "request"  # the last one that failed
SECONDS = 300  # of one request; more is a loop that never ends


@dataclass(frozen=True)
class Result:
    tensor: torch.Tensor
    plan: Plan
    exps: int = 0  # float64 ones that all orders together have taken


@dataclass(frozen=True)
class Instance:
    """What tells one kernel from another, and the two ways in which it reads memory."""

    direction: str
    op: str
    load: torch.dtype
    store: torch.dtype
    kernel: str
    vectorized: bool
    vectors: int
    columns: int

    @staticmethod
    def of_plan(plan: Plan) -> tuple[str, bool, int, int]:
        vectors = 0 if plan.schedule == "columns" else plan.vectors  # steps, which dim decides
        return plan.kernel, plan.vectorized, vectors, plan.columns


def word(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def strides_over(tensor: torch.Tensor, dim: int) -> tuple[int, ...]:
    """Of the dims before it, and of itself; those behind it are contiguous."""
    assert tensor[(0,) * (dim + 1)].is_contiguous()
    return tensor.stride()[: dim + 1]


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """From its first element to its last."""
    if tensor.numel() == 0:
        return tensor.new_empty(0)
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return tensor.as_strided((last + 1,), (1,))


class Host:
    """The kernels as compiled in one lane, in processes that live until they report something."""

    PROGRAM = "kernels"

    def __init__(self, lane: str, seed: int) -> None:
        self.program = build(lane, self.PROGRAM)
        self.lane = lane
        self.seed = seed
        self.orders = LANE_ORDERS.get(lane, ORDERS)
        self.instances: set[Instance] = set()  # what has run
        self.sent = b""  # the last request
        self.crowds = LANE_CROWDS.get(lane, ())
        self.processes: dict[int, subprocess.Popen[bytes]] = {}  # by how many crowds are smaller
        self.scratch = tempfile.TemporaryDirectory()
        keep_notes(self.counts, self.program.parent)

    @property
    def counts(self) -> Path:
        """Where gcov's go, in the lane that has them: they are of this run alone."""
        return Path(self.scratch.name)

    def close(self) -> None:
        """Ends the processes, which then write their counts; the next request starts another."""
        while self.processes:
            self.processes.popitem()[1].communicate()

    def plan(
        self,
        direction: str,
        shape: tuple[int, int, int],
        load: torch.dtype,
        store: torch.dtype,
        **how: object,
    ) -> Plan:
        """Of (outer, dim, inner), contiguous. Runs nothing."""
        request = self._request(direction, "softmax", shape, load, store, how | {"orders": ()})
        return self._exchange(request, b"", 0)[0]

    def forward(
        self,
        op: str,
        input: torch.Tensor,
        dim: int,
        dtype: torch.dtype | None = None,
        **how: object,
    ) -> Result:
        return self._run("forward", op, [input], dim, dtype or input.dtype, how)

    def backward(
        self,
        op: str,
        grad_output: torch.Tensor,
        output: torch.Tensor,
        dim: int,
        dtype: torch.dtype | None = None,
        **how: object,
    ) -> Result:
        return self._run("backward", op, [grad_output, output], dim, dtype or output.dtype, how)

    def _run(
        self,
        direction: str,
        op: str,
        inputs: list[torch.Tensor],
        dim: int,
        dtype: torch.dtype,
        how: dict[str, object],
    ) -> Result:
        """how: as _request has it; and `out`, a tensor that the result is to lie like. With it, the
        inputs are read where they lie, each in all of its memory from its first element to its
        last, and nothing of the result's memory is written but the result."""
        sizes = inputs[0].shape
        dim = dim % len(sizes)
        shape = (sizes[:dim].numel(), sizes[dim], sizes[dim + 1 :].numel())
        load = inputs[0].dtype
        out = how.get("out")
        if isinstance(out, torch.Tensor):
            strides = [strides_over(t, dim) for t in (*inputs, out)]
            of_inputs = tuple(stride for of_input in strides[:-1] for stride in of_input)
            how = {key: value for key, value in how.items() if key != "out"}
            how |= {"sizes": tuple(sizes[:dim]), "load_strides": of_inputs}
            how |= {"store_strides": strides[-1]}
        else:
            inputs, out = [t.contiguous() for t in inputs], torch.empty(sizes, dtype=dtype)
        request = self._request(direction, op, shape, load, dtype, how)
        data = b"".join(memory_of(t).view(torch.uint8).numpy().tobytes() for t in inputs)
        of_result = memory_of(out)
        crowd = 0
        if self.crowds:
            asks = self._request(direction, op, shape, load, dtype, how | {"orders": ()})
            crowd = self._crowd(self._exchange(asks, b"", 0)[0], int(str(how.get("resident", 1))))
        size = of_result.numel() * dtype.itemsize
        plan, body, exps = self._exchange(request, data, size, crowd)
        if plan.blocks > 0:
            self.instances.add(Instance(direction, op, load, dtype, *Instance.of_plan(plan)))
        if not body:  # nothing to do, or the schedule that was asked for cannot do it
            return Result(torch.empty(sizes if inputs[0].numel() == 0 else 0, dtype=dtype), plan)
        memory = torch.frombuffer(bytearray(body), dtype=dtype)
        tensor = memory.as_strided(sizes, out.stride())
        in_place = int(str(how.get("in_place", -1)))
        unwritten = torch.full_like(memory.view(torch.uint8), 0xFF)
        before = memory_of(inputs[in_place]).clone() if in_place >= 0 else unwritten.view(dtype)
        before.as_strided(sizes, out.stride()).copy_(tensor)
        between = before.view(torch.uint8).equal(memory.view(torch.uint8))
        assert between, f"memory between the result's elements was written: {request}"
        return Result(tensor, plan, exps)

    def scores(
        self,
        direction: str,
        op: str,
        sizes: tuple[int, ...],
        reads: dict[str, torch.Tensor],
        writes: dict[str, tuple[torch.Tensor, int]],
        dtype: torch.dtype,
        **how: object,
    ) -> tuple[dict[str, torch.Tensor], Plan]:
        """Of rows over the last of `sizes`. The tensors, named as the arguments of a call have
        them, are expanded to these, and read where they lie. writes: tensors that what is written
        is to lie like, each so many times, one behind the other; of several, as a dim more.

        how: as _request has it, in_place (the first that is written is the first that is read),
        parts, and what scores are made of."""
        how = {"device": "H100", "orders": self.orders} | how
        tensors = {**reads, **{name: tensor for name, (tensor, _) in writes.items()}}
        request: dict[str, object] = {
            "direction": direction,
            "op": op,
            "dtype": str(dtype).removeprefix("torch."),
            "outer": math.prod(sizes[:-1]),
            "dim": sizes[-1],
            "sizes": tuple(sizes[:-1]),
            **vars(DEVICES[str(how.pop("device"))]),
            "seed": self.seed,
            "resident": 1,
            "schedule": "any",
            "most_blocks": 2**31 - 1,
            "in_place": 0,
            "factor": 1.0,
            "softcap": 0.0,
            "sink_of_all": -math.inf,
            "left": -1,
            "right": -1,
            "offset": 0,
            "parts": 1,
            "query.strides": (*(0 for _ in sizes[:-2]), 1, 0),
            "orders": (),
        }
        assert how.keys() <= request.keys(), how
        request |= how
        request |= {"reads": tuple(reads), "writes": tuple(writes)}
        for name, tensor in tensors.items():
            request[f"{name}.dtype"] = str(tensor.dtype).removeprefix("torch.")
            request[f"{name}.strides"] = tensor.expand(sizes).stride()
            request[f"{name}.offset"] = 0
            request[f"{name}.times"] = writes[name][1] if name in writes else 1
        line = " ".join(f"{key}={word(value)}" for key, value in request.items())
        data = b"".join(
            memory_of(tensor).view(torch.uint8).numpy().tobytes() for tensor in reads.values()
        )
        shared = next(iter(reads.values())) if how.get("in_place") else None
        memories = {
            name: (memory_of(shared if k == 0 and shared is not None else tensor), times)
            for k, (name, (tensor, times)) in enumerate(writes.items())
        }
        size = sum(memory.nbytes * times for memory, times in memories.values())
        crowd = 0
        if self.crowds:
            asks = line.replace(f"orders={word(request['orders'])}", "orders=")
            plan = self._exchange(asks, b"", 0)[0]
            crowd = self._crowd(plan, int(str(request["resident"])))
        plan, body, _ = self._exchange(line, data, size, crowd)
        results, begin = {}, 0
        for name, (memory, times) in memories.items():
            tensor = writes[name][0]
            if not body:
                continue
            end = begin + memory.nbytes * times
            written = torch.frombuffer(bytearray(body[begin:end]), dtype=memory.dtype)
            begin = end
            strides = (memory.numel(), *tensor.stride())
            results[name] = written.as_strided((times, *tensor.shape), strides).squeeze(0)
        return results, plan

    def _request(
        self,
        direction: str,
        op: str,
        shape: tuple[int, int, int],
        load: torch.dtype,
        store: torch.dtype,
        how: dict[str, object],
    ) -> str:
        """how: device, schedule, orders, resident, most_blocks, in_place (the number of the input),
        load_offset and store_offset (bytes beyond a multiple of 16, the former one or one each);
        sizes of the outer dims, and strides of those and dim, one tensor after another."""
        how = {"device": "H100", "orders": self.orders} | how
        outer, dim, inner = shape
        contiguous = (dim * inner, inner)
        inputs = 1 if direction == "forward" else 2
        request = {
            "direction": direction,
            "op": op,
            "outer": outer,
            "dim": dim,
            "inner": inner,
            "load": str(load).removeprefix("torch."),
            "store": str(store).removeprefix("torch."),
            **vars(DEVICES[str(how.pop("device"))]),
            "orders": (),
            "seed": self.seed,
            "resident": 1,
            "schedule": "any",
            "most_blocks": 2**31 - 1,
            "in_place": -1,
            "load_offset": 0,
            "store_offset": 0,
            "sizes": (outer,),
            "load_strides": contiguous * inputs,
            "store_strides": contiguous,
        }
        assert how.keys() <= request.keys(), how
        return " ".join(f"{key}={word(value)}" for key, value in (request | how).items())

    def _crowd(self, plan: Plan, resident: int) -> int:
        """Of the launch: how many of the lane's crowds are smaller."""
        blocks = plan.blocks if plan.schedule == "grid" else min(plan.blocks, plan.team * resident)
        return bisect.bisect_left(self.crowds, blocks * plan.threads)

    def _log(self, crowd: int) -> Path:
        return self.counts / f"log{crowd}"

    def _exchange(
        self, request: str, data: bytes, size: int, crowd: int = 0
    ) -> tuple[Plan, bytes, int]:
        words, body = self._answer(request, data, size, crowd)
        exps = int(words.pop("exps"))
        members = {key: int(text) if text.isdecimal() else text for key, text in words.items()}
        return Plan(**members), body, exps

    def _answer(
        self, request: str, data: bytes, size: int, crowd: int = 0
    ) -> tuple[dict[str, str], bytes]:
        """The answer to the line and the bytes: a line, and `size` bytes."""
        self.sent = sent = f"{request}\n".encode() + data
        process = self.processes.get(crowd)
        if process is None:
            with self._log(crowd).open("wb") as log:
                process = self.processes[crowd] = subprocess.Popen(
                    [str(self.program)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=os.environ | counts_below(self.counts, self.program.parent),
                )
        assert process.stdin and process.stdout
        try:
            process.stdin.write(sent)
            process.stdin.flush()
            if not select.select([process.stdout], [], [], SECONDS)[0]:
                process.kill()
            head = process.stdout.readline().decode()
            if " blocks=0 " in head:  # nothing was launched
                size = 0
            body = process.stdout.read(size) if head else b""
        except BrokenPipeError:
            head, body = "", b""
        if not head or len(body) < size:
            raise AssertionError(self._report(sent, crowd))
        words = dict(each.split("=") for each in head.split())
        problem = words.pop("problem").replace("_", " ")
        assert not problem, f"{problem}: {request}"
        return words, body

    def _report(self, request: bytes, crowd: int) -> str:
        code = self.processes.pop(crowd).wait()
        KEPT.write_bytes(request)
        line = request.split(b"\n", 1)[0].decode()
        return (
            f"the {self.lane} lane ended with {code}: {line}\n"
            f"{self._log(crowd).read_text(errors='replace')}"
            f"run it again: {short(self.program)} < {short(KEPT)} > /dev/null"
        )


def short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main() -> None:
    """Runs one case of random values, says what ran, and keeps the request for a debugger."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("direction", choices=["forward", "backward"])
    parser.add_argument("op", choices=["softmax", "log_softmax"])
    parser.add_argument("dtype", help="of what is read: float32")
    parser.add_argument("shape", help="outer x dim x inner: 8x4097x1")
    parser.add_argument("--store", help="the dtype of what is written, if another")
    parser.add_argument("--device", choices=DEVICES, default="H100")
    parser.add_argument("--lane", choices=LANES, default="o1")
    parser.add_argument("--seed", type=int, default=0, help="of the values and the thread orders")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    shape = [int(size) for size in options.shape.split("x")]
    load = getattr(torch, options.dtype)
    store = getattr(torch, options.store or options.dtype)
    x = torch.randn(shape, dtype=torch.float64)
    host = Host(options.lane, options.seed)
    try:
        if options.direction == "forward":
            result = host.forward(options.op, x.to(load), 1, store, device=options.device)
        else:
            output = getattr(torch, options.op)(x, 1).to(load)
            grad = torch.randn(shape).to(load)
            result = host.backward(options.op, grad, output, 1, store, device=options.device)
        print(result.plan)
    except AssertionError as error:
        sys.exit(str(error))
    finally:
        KEPT.write_bytes(host.sent)
        host.close()
    program = short(build("debug", "kernels"))
    print(f"debug it: gdb {program}, then: run < {short(KEPT)} > /dev/null")


if __name__ == "__main__":
    main()
