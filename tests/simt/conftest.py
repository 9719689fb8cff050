"""The lanes of the host executor: `host` runs a test in each that --simt-lanes names."""

import functools
from collections.abc import Iterator

import pytest
import torch
from host import Host


@functools.cache
def host_of(lane: str, seed: int) -> Host:
    return Host(lane, seed)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "host" in metafunc.fixturenames:
        lanes = metafunc.config.getoption("--simt-lanes").split(",")
        metafunc.parametrize("host", lanes, indirect=True, scope="session")


@pytest.fixture(scope="session")
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    host = host_of(request.param, request.config.getoption("--simt-seed"))
    yield host
    host.close()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """torch's others would spin on the core that the executor runs on."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
