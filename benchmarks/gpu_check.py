"""All that a GPU is needed for, by one command: ``make gpu-check``.

Builds softmax_ext for the GPU at hand, runs the tests on it, calls each schedule under
compute-sanitizer where that works, and measures with what is left of the time. Runs by the Python
it is started with, and installs nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import gpu_report

ROOT = Path(__file__).resolve().parent.parent
DONE = "sanitize: all calls made"  # the last line of sanitize.py
MOST_SECONDS = {"build": 360.0, "tests": 180.0, "sanitizer": 60.0}
RESERVE = 30.0  # for the start of the benchmark and the plots
MOST_WORKERS = 16  # processes that test on one GPU
OPTIONAL = {
    "ninja": "the build takes several times as long",
    "hypothesis": "the test files that need it are left out",
    "xdist": "the tests run one after another",
    "matplotlib": "there are no plots",
}


def gpu_or_why_not() -> tuple[str, str]:
    """Compute capability of the GPU, and what is wrong instead."""
    if importlib.util.find_spec("torch") is None:
        return "", f"{sys.executable} has no torch"
    import torch

    if torch.version.cuda is None:
        return "", f"torch {torch.__version__} is not a CUDA build"
    if not torch.cuda.is_available():
        return "", f"torch {torch.__version__} finds no GPU"
    return "{}.{}".format(*torch.cuda.get_device_capability()), ""


def run(command: list[str], seconds: float, environment: dict[str, str]) -> tuple[int | None, str]:
    """Exit status, None where it was stopped for the time, and the output, which is shown too."""
    print("+", *command, flush=True)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that what it starts can be stopped with it
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    deadline = time.monotonic() + seconds
    output = b""
    try:
        while True:
            status = process.poll()
            chunk = process.stdout.read() or b""
            output += chunk
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
            if status is not None and not chunk:
                return status, output.decode(errors="replace")
            if time.monotonic() > deadline:
                return None, output.decode(errors="replace")
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def outcome(status: int | None, output: str = "") -> str:
    """passed, or what happened instead, with pytest's last line."""
    last = output.strip().rpartition("\n")[2].strip("= ")
    if status is None:
        return "not finished in its time"
    return ("passed" if status == 0 else f"FAILED, exit status {status}") + (last and f": {last}")


def sanitizer_outcome(status: int | None, output: str) -> str:
    """passed needs the calls made and no finding; a tool that refuses the device is no failure."""
    if "Device not supported" in output:
        return "not run: compute-sanitizer does not support the device here"
    if status is None:
        return "not finished in its time"
    summary = next((line for line in output.splitlines() if "SUMMARY" in line), "no summary")
    ok = status == 0 and DONE in output and "SUMMARY: 0 " in summary
    return f"{'passed' if ok else 'FAILED'}: {summary.strip('= ')}"


def test_command() -> list[str]:
    """pytest on the tests of device cuda; that of the machine code needs no GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", "cuda and not cuda_code"]
    if importlib.util.find_spec("hypothesis") is None:
        files = sorted((ROOT / "tests").glob("test_*.py"))
        needing = [path for path in files if "import hypothesis" in path.read_text()]
        needing += [path for path in files if "from hypothesis" in path.read_text()]
        command += [f"--ignore={path}" for path in needing]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1))]
    return command


def main() -> int:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--seconds", type=float, default=525, help="for everything")
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--commit", help="that is measured, where git cannot tell")
    options = parser.parse_args()
    start = time.monotonic()
    capability, problem = gpu_or_why_not()
    if problem:
        print(f"gpu-check needs an NVIDIA GPU and a CUDA build of torch: {problem}")
        return 2
    for module, consequence in OPTIONAL.items():
        if importlib.util.find_spec(module) is None and shutil.which(module) is None:
            print(f"{module} is not installed: {consequence}")

    environment = {**os.environ, "FORCE_CUDA": "1", "PYTHONUNBUFFERED": "1"}
    environment["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or capability
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    checks: dict[str, str] = {}
    python = [sys.executable]

    build = [*python, "setup.py", "-q", "build_ext", "--inplace"]
    status, _ = run(build, MOST_SECONDS["build"], environment)
    checks["build"] = outcome(status)
    if status != 0:
        print(f"build: {checks['build']}")
        return 1

    if importlib.util.find_spec("pytest") is None:
        checks["tests"] = "FAILED: pytest is not installed"
    else:
        # The references are computed on the CPU, by a thread for each process.
        one_thread = {**environment, "OMP_NUM_THREADS": "1"}
        checks["tests"] = outcome(*run(test_command(), MOST_SECONDS["tests"], one_thread))

    for tool in ("memcheck", "racecheck"):
        if shutil.which("compute-sanitizer") is None:
            checks[tool] = "not run: compute-sanitizer is not on the PATH"
            continue
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        if tool == "memcheck":
            command += ["--report-api-errors", "no"]  # torch's own probing
        command += [*python, "-m", "benchmarks.sanitize"]
        # Each tensor an allocation of its own: one beyond its end is beyond all memory.
        uncached = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        checks[tool] = sanitizer_outcome(*run(command, MOST_SECONDS["sanitizer"], uncached))

    left = max(30.0, options.seconds - RESERVE - (time.monotonic() - start))
    folder = options.output.absolute() if options.output else gpu_report.default_folder()
    command = [*python, "-m", "benchmarks.gpu", "--seconds", f"{left:.0f}"]
    command += ["--output", str(folder)]
    command += ["--commit", options.commit] if options.commit else []
    command += [f"--check={name}={result}" for name, result in checks.items()]
    status, _ = run(command, left + RESERVE, environment)
    if status is None and (folder / "results.json").exists():
        print(gpu_report.write(folder))
    checks["benchmark"] = outcome(status)

    print(f"\ngpu-check: {time.monotonic() - start:.0f} s")
    for name, result in checks.items():
        print(f"  {name}: {result}")
    bad = [name for name, result in checks.items() if result.startswith(("FAILED", "not finished"))]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
