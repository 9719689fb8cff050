"""Fixtures of all tests: every test that computes takes `device` and so runs on CPU and GPU.

With pytest-xdist (`-n`) they run in several processes. `make test` has them take a file at a time
(`--dist loadfile`), in which a test may count on those before it.
"""

import gc
import os
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import softmax_ext

SUMMARIES = pytest.StashKey[list[tuple[str, str]]]()
# Markers whose tests an option asks for.
ASKED_FOR = {"large": "--run-large", "cuda_code": "--cuda-code"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-large", action="store_true", help="run the tests marked `large`")
    parser.addoption(
        "--cuda-code",
        action="store_true",
        help="compile the CUDA kernels for every architecture and check their machine code: "
        "minutes of nvcc on all cores",
    )
    parser.addoption(
        "--update-cuda-budgets",
        action="store_true",
        help="with --cuda-code: write benchmarks/cuda_budgets.txt anew",
    )
    parser.addoption(
        "--fuzz-calls", type=int, default=1000, help="random calls of all entries (tests/fuzz.py)"
    )
    parser.addoption(
        "--simt-lanes",
        default="o1",
        help="builds of the host executor to run the CUDA kernels in: o1,gcov,asan,tsan,debug",
    )
    parser.addoption(
        "--simt-seed",
        type=int,
        default=random.getrandbits(31),
        help="of the thread orders of the host executor; by default another one each time",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Several processes on the cores that one would have. Each keeps two threads at least, so that
    shared work is shared; and no thread that waits for work holds a core up."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0))
    if hasattr(config, "workerinput"):
        config.option.simt_seed = config.workerinput["simt_seed"]
    if workers == 0:  # xdist's processes, started from here, read it as they begin
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    elif "OMP_NUM_THREADS" not in os.environ:
        threads = max(2, torch.get_num_threads() // workers)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """One process draws the seed for all of xdist's."""
    node.workerinput["simt_seed"] = node.config.getoption("--simt-seed")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of `--dist loadfile`: a file at a time, and of one for the host executor a lane. Those of the
    CUDA kernels stay together: the last looks back at what all have run."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    lanes = "|".join(config.getoption("--simt-lanes").split(","))

    class ByFileAndLane(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            lane = re.search(rf"\[({lanes})\b", nodeid)
            file = re.sub("^(tests/simt/kernels)/.*", r"\1", super()._split_scope(nodeid))
            return file + (lane[1] if lane else "")

    return ByFileAndLane(config, log)


def pytest_report_header(config: pytest.Config) -> str:
    lanes, seed = config.getoption("--simt-lanes"), config.getoption("--simt-seed")
    return f"host executor: lanes {lanes}, --simt-seed={seed}"


def why_not_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "no GPU"
    if "cuda" not in softmax_ext.build_info().devices:
        return "softmax_ext was built without CUDA"
    return None


NO_CUDA = why_not_cuda()


def pytest_collection(session: pytest.Session) -> None:
    """Nothing that is collected becomes garbage, so that nobody need look for it, neither now..."""
    gc.disable()


def pytest_collection_finish(session: pytest.Session) -> None:
    """... nor while the tests run."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests that need a GPU, where there is none, and those to be asked for."""
    not_asked_for = {mark: opt for mark, opt in ASKED_FOR.items() if not config.getoption(opt)}

    def why_not(item: pytest.Item) -> str | None:
        callspec = getattr(item, "callspec", None)
        if NO_CUDA and callspec and callspec.params.get("device") == "cuda":
            return "of device cuda"
        for marker, option in not_asked_for.items():
            if item.get_closest_marker(marker):
                return f"marked {marker}: {option} runs them"
        return None

    why = {item: why_not(item) for item in items}
    items[:] = [item for item in items if why[item] is None]
    # What else is built for the host executor would wait for the kernels, which come first.
    items.sort(key=lambda item: item.path.parent.name == "simt")
    summaries = config.stash.setdefault(SUMMARIES, [])
    reasons = Counter(filter(None, why.values()))
    if NO_CUDA:  # the others were never made of it
        del reasons["of device cuda"]
        summaries.append((f"not run: the tests of device cuda: {NO_CUDA}", ""))
    for reason, number in reasons.items():
        summaries.append((f"not run: {number} tests {reason}", ""))


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["summaries"] = session.config.stash.get(SUMMARIES, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What one of xdist's processes has to say, if no other has said it."""
    summaries = node.config.stash.setdefault(SUMMARIES, [])
    for title, text in getattr(node, "workeroutput", {}).get("summaries", []):
        if (title, text) not in summaries:
            summaries.append((title, text))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for title, text in config.stash.get(SUMMARIES, []):
        if text:
            terminalreporter.section(title)
            terminalreporter.write(text)
        else:
            terminalreporter.write_line(title)


@pytest.fixture
def summary(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """summary(title, text): shown at the end of the run, whether or not the test passes."""
    texts = request.config.stash.setdefault(SUMMARIES, [])
    return lambda title, text: texts.append((title, text))


@pytest.fixture(params=["cpu"] if NO_CUDA else ["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
