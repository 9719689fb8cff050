"""Fixtures of all tests: every test that computes takes `device` and so runs on CPU and GPU."""

import random
from collections.abc import Callable

import pytest
import torch

import softmax_ext

SUMMARIES = pytest.StashKey[list[tuple[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-large", action="store_true", help="run the tests marked `large`")
    parser.addoption(
        "--update-cuda-budgets", action="store_true", help="write softmax_ext/cuda_budgets.txt anew"
    )
    parser.addoption(
        "--simt-lanes",
        default="o2",
        help="builds of the host executor to run the CUDA kernels in: o2,asan,tsan,debug",
    )
    parser.addoption(
        "--simt-seed",
        type=int,
        default=random.getrandbits(31),
        help="of the thread orders of the host executor; by default another one each time",
    )


def pytest_report_header(config: pytest.Config) -> str:
    lanes, seed = config.getoption("--simt-lanes"), config.getoption("--simt-seed")
    return f"host executor: lanes {lanes}, --simt-seed={seed}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--run-large"):
        return
    for item in items:
        if item.get_closest_marker("large"):
            item.add_marker(pytest.mark.skip(reason="large: runs with --run-large"))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for title, text in config.stash.get(SUMMARIES, []):
        terminalreporter.section(title)
        terminalreporter.write(text)


@pytest.fixture
def summary(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """summary(title, text): shown at the end of the run, whether or not the test passes."""
    texts = request.config.stash.setdefault(SUMMARIES, [])
    return lambda title, text: texts.append((title, text))


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        if name not in softmax_ext.build_info().devices:
            pytest.skip("softmax_ext was built without CUDA")
    return name


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
