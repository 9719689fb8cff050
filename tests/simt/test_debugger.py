"""What docs/debugging_kernels.md says: a case from the command line, and gdb inside a kernel."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from host import KEPT, Host
from lanes import ROOT, build

GDB = shutil.which("gdb")
KERNELS = ROOT / "csrc" / "cuda" / "row_kernels.cuh"


@pytest.fixture(autouse=True)
def debug_lane(request: pytest.FixtureRequest) -> None:
    """Half a minute to compile, and a quarter for gdb to read."""
    if "debug" not in request.config.getoption("--simt-lanes").split(","):
        pytest.skip("runs with --simt-lanes=debug")


@pytest.mark.skipif(GDB is None, reason="no gdb on PATH")
def test_gdb_stops_in_the_thread_that_a_condition_names(tmp_path: Path) -> None:
    host = Host("debug", seed=0)
    input = torch.arange(3000.0).view(3, 1000)
    plan = host.forward("softmax", input, 1, orders=("random",)).plan
    assert (plan.schedule, plan.vectorized, plan.group) == ("warp", True, 32)
    request = tmp_path / "request"
    request.write_bytes(host.sent)
    host.close()

    lines = KERNELS.read_text().splitlines()
    line = next(
        number
        for number, text in enumerate(lines, 1)
        if "warp_reduce<Max>(max_in(of_largest)" in text
    )
    script = tmp_path / "script"
    script.write_text(
        f"break {KERNELS.name}:{line} if blockIdx.x == 1 && threadIdx.x == 5\n"
        f"run < {request} > /dev/null\n"
        "print threadIdx.x + 1000 * blockIdx.x\n"
        "print of_largest\n"
        "print *(float(*)[4])x[0].word\n"
        "backtrace\n"
        "kill\n"
    )
    command = [str(GDB), "-q", "-nx", "-batch", "-x", str(script), str(build("debug", "kernels"))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    output = result.stdout + result.stderr
    if "Could not trace the inferior process" in output:
        pytest.skip("processes may not be traced here")
    printed = re.findall(r"^\$\d+ = (.*)$", output, re.MULTILINE)
    # Lane 5 has the vectors from element 20 on, of 4 elements, 128 apart, as far as there are 1000.
    largest, first = "{1916, 1917, 1918, 1919}", "{1020, 1021, 1022, 1023}"
    assert printed == ["1005", largest, first], output
    assert re.search(r"^#\d+ .*registers_forward_kernel", output, re.MULTILINE), output


def test_the_command_line_says_what_ran_and_keeps_it() -> None:
    KEPT.unlink(missing_ok=True)
    command = [sys.executable, "tests/simt/host.py", "backward", "log_softmax", "float32"]
    command += ["8x4097x1", "--device", "A100", "--store", "bfloat16"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    plan, debug = result.stdout.splitlines()
    expected = "Plan(schedule='block', hold='registers', vectorized=False, width=4, vectors=8"
    assert plan.startswith(expected)
    assert (
        debug
        == "debug it: gdb build/simt/debug/kernels, then: run < build/simt/request > /dev/null"
    )
    line, data = KEPT.read_bytes().split(b"\n", 1)
    assert b"direction=backward op=log_softmax outer=8 dim=4097 inner=1" in line
    assert len(data) == 2 * 8 * 4097 * 4
