"""Fixtures of all tests: every test that computes takes `device` and so runs on CPU and GPU."""

import os

import pytest
import torch

import softmax_ext

LARGE = "SOFTMAX_EXT_TEST_LARGE"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"large: needs many GB of memory; runs where {LARGE}=1 is set")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get(LARGE) == "1":
        return
    for item in items:
        if item.get_closest_marker("large"):
            item.add_marker(pytest.mark.skip(reason=f"large: set {LARGE}=1 to run it"))


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
