"""Several Python threads at once, and every instruction set of the CPU kernels."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import FLOATING, OPS, OURS, assert_close_to_reference, assert_gradient_close

import softmax_ext

ISAS = ("baseline", "avx2", "avx512")
VARIABLE = "SOFTMAX_EXT_ISA"


def test_python_threads(device: str) -> None:
    """Forward calls from eight threads on shared and own inputs give what one thread gives."""
    shapes = [(3, 7), (65, 33), (5, 4099), (300, 19), (2, 70000), (17, 16), (9, 1000), (40, 257)]
    inputs = [torch.randn(shape, device=device) for shape in shapes]
    expected = [[OURS[op](x, dim) for op in OPS for dim in (0, 1)] for x in inputs]
    failures: list[str] = []
    start = threading.Barrier(len(inputs))

    def work(first: int) -> None:
        start.wait()
        for i in range(2 * len(inputs)):
            index = (first + i) % len(inputs)
            actual = [OURS[op](inputs[index], dim) for op in OPS for dim in (0, 1)]
            for a, b in zip(actual, expected[index], strict=True):
                if not torch.equal(a, b):
                    failures.append(f"thread {first}, shape {shapes[index]}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_interpreter_runs_during_a_long_call() -> None:
    """The GIL is released: another thread ticks while a kernel runs."""
    input = torch.randn(2**24)
    ticks: list[int] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(1e-4):
            ticks.append(1)

    thread = threading.Thread(target=tick)
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # now a thread runs only while the other has let go of the GIL
    try:
        for _ in range(20):
            before = len(ticks)
            OURS["softmax"](input, 0)
            during = len(ticks) - before
            if during:
                break
    finally:
        sys.setswitchinterval(interval)
        done.set()
        thread.join()
    assert during > 0


def run(script: str | Path, *args: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A Python process of its own, with this package: of a script's text, or its file."""
    root = str(Path(softmax_ext.__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, **environment}
    command = [str(script)] if isinstance(script, Path) else ["-c", script]
    return subprocess.run(
        [sys.executable, *command, *args], capture_output=True, text=True, env=env, timeout=300
    )


SHAPES = [
    ((3, 1), 1), ((3, 7), 1), ((3, 16), 1), ((5, 37), 1), ((2, 1030), 1), ((2, 4099), 1),
    ((2, 70001), 1), ((33, 7), 0), ((2, 37, 70), 1), ((1000, 19), 0), ((5000, 3), 0),
    ((40, 7, 3), 1), ((5, 64, 9), 1), ((3, 17, 49), 1), ((3, 65, 33), 1), ((2, 700, 64), 1),
]  # fmt: skip

COMPUTE = """
import sys, torch, softmax_ext
cases = torch.load(sys.argv[1], weights_only=True)
results = []
for op, dim, to, x, grad_output in cases:
    x.requires_grad_(x.is_floating_point())
    y = getattr(softmax_ext, op)(x, dim, dtype=to)
    grad = torch.autograd.grad(y, x, grad_output)[0] if x.requires_grad else None
    results.append((y.detach(), grad))
torch.save((softmax_ext.build_info().cpu_isa, results), sys.argv[2])
"""


def cases_of_every_kernel() -> list[tuple[Any, ...]]:
    cases = []
    for op in OPS:
        for shape, dim in SHAPES:
            for dtype in FLOATING:
                x = torch.randn(shape).mul(2).to(dtype)
                x[(0,) * x.dim()] = -torch.inf if x.shape[dim] > 2 else 0.0
                cases.append((op, dim, dtype, x, torch.randn(shape).to(dtype)))
            half = torch.randn(shape).half()
            cases.append((op, dim, torch.float32, half, torch.randn(shape)))
            integers = torch.randint(-6, 7, shape)
            cases.append((op, dim, torch.bfloat16, integers, torch.randn(shape).bfloat16()))
    return cases


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_set(isa: str, tmp_path: Path) -> None:
    """Forward and backward on each instruction set of this CPU, by the same tolerances."""
    if isa not in softmax_ext.build_info().cpu_isas:
        pytest.skip(f"{isa} is not built, or this CPU lacks it")
    cases = cases_of_every_kernel()
    torch.save(cases, tmp_path / "cases")
    process = run(COMPUTE, str(tmp_path / "cases"), str(tmp_path / "results"), **{VARIABLE: isa})
    assert process.returncode == 0, process.stderr
    used, results = torch.load(tmp_path / "results", weights_only=True)
    assert used == isa
    for (op, dim, to, x, grad_output), (y, grad) in zip(cases, results, strict=True):
        try:
            assert_close_to_reference(y, op, x, dim, to)
            if grad is not None:
                assert_gradient_close(grad, op, grad_output, y, dim)
        except AssertionError as error:
            where = f"{op} of {tuple(x.shape)} {x.dtype} over dim {dim} to {to}"
            raise AssertionError(f"{where}: {error}") from error


IMPORTS = """
import json, os, sys, torch
for os.environ[sys.argv[1]] in sys.argv[2:]:
    if os.fork() == 0:
        try:
            import softmax_ext
            print(json.dumps(softmax_ext.build_info().cpu_isa), flush=True)
        except ImportError as error:
            print(json.dumps(f"ImportError: {error}"), flush=True)
        os._exit(0)
    os.wait()
"""


def imports(variable: str, values: Iterable[str]) -> dict[str, str]:
    """What the import ends with for each value of an environment variable: the error, or the
    instruction set that is used. In children of one process that has imported torch."""
    values = list(values)
    process = run(IMPORTS, variable, *values)
    assert process.stderr == ""
    assert "pip install" not in process.stdout  # a build is not what it lacks
    return dict(zip(values, map(json.loads, process.stdout.splitlines()), strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_instruction_sets_by_name() -> None:
    """One that is unknown, or that this CPU or the build lacks, is an error that names it; an empty
    name counts as none, and the fastest that is usable is the default."""
    usable = softmax_ext.build_info().cpu_isas
    ends = imports(VARIABLE, ["sse9", "AVX2 ", "none", "", *ISAS])
    assert ends.pop("") == max(usable, key=ISAS.index)
    for name, end in ends.items():
        if name in usable:
            assert end == name
        else:
            assert end.startswith("ImportError: ")
            assert VARIABLE in end
            assert name in end


def test_build_info() -> None:
    info = softmax_ext.build_info()
    assert isinstance(info, softmax_ext.BuildInfo)
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.cpu_isa = "none"  # type: ignore[misc]
    assert info.cpu_isa in info.cpu_isas
    record = json.loads((Path(softmax_ext.__file__).parent / "_build.json").read_text())
    assert set(info.cpu_isas) <= set(record["isas"]) <= set(ISAS)
    assert ("baseline" in info.cpu_isas) is ("baseline" in record["isas"])
    assert info.cpu_isa == (os.environ.get(VARIABLE) or info.cpu_isa)
    assert "cpu" in info.devices
    assert ("cuda" in info.devices) is (bool(info.cuda) and torch.cuda.is_available())
    assert info.version == softmax_ext.__version__
    release = info.torch.split("+")[0].split(".")[:2]
    assert release == torch.__version__.split("+")[0].split(".")[:2]


FORK = """
import os, torch, softmax_ext
x = torch.randn(64, 5000)
expected = softmax_ext.softmax(x, 1)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    same = torch.equal(softmax_ext.softmax(x, 1), expected)
    os._exit(0 if same else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_after_fork() -> None:
    """As a DataLoader's worker does: forked after the parent has used its threads."""
    process = run(FORK)
    assert process.returncode == 0, process.stderr
