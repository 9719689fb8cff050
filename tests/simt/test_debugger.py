"""What docs/debugging_kernels.md says of gdb: it stops inside a thread of a kernel."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from host import Host
from lanes import ROOT, build

GDB = shutil.which("gdb")
KERNELS = ROOT / "csrc" / "cuda" / "row_kernels.cuh"


@pytest.mark.skipif(GDB is None, reason="no gdb on PATH")
def test_gdb_stops_in_the_thread_that_a_condition_names(tmp_path: Path) -> None:
    host = Host("debug", seed=0)
    input = torch.arange(3000.0).view(3, 1000)
    plan = host.forward("softmax", input, 1, orders=("random",)).plan
    assert (plan.schedule, plan.vectorized, plan.group) == ("registers", True, 32)
    request = tmp_path / "request"
    request.write_bytes(host.sent)
    host.close()

    lines = KERNELS.read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if "group_reduce<Max>(max)" in text)
    script = tmp_path / "script"
    script.write_text(
        f"break {KERNELS.name}:{line} if blockIdx.x == 1 && threadIdx.x == 5\n"
        f"run < {request} > /dev/null\n"
        "print threadIdx.x + 1000 * blockIdx.x\n"
        "print row\n"
        "print max\n"
        "print x[0]@4\n"
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
    assert printed == ["1005", "1", "1919", "{1020, 1021, 1022, 1023}"], output
    assert re.search(r"^#\d+ .*registers_forward_kernel", output, re.MULTILINE), output
