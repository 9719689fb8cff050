"""Fixtures of all tests: every test that computes takes `device` and so runs on CPU and GPU."""

import pytest
import torch

import softmax_ext


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-large", action="store_true", help="run the tests marked `large`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--run-large"):
        return
    for item in items:
        if item.get_closest_marker("large"):
            item.add_marker(pytest.mark.skip(reason="large: runs with --run-large"))


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        if name not in softmax_ext.build_info()["devices"]:
            pytest.skip("softmax_ext was built without CUDA")
    return name


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
