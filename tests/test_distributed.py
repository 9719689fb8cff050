"""Two processes with gloo on the CPU: the values and gradients that one process has.

The processes run all of distributed_checks.py once; each of its checks is a test here.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed
from test_threads_and_isa import run

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

from distributed_checks import CHECKS, WORLD

Report = dict[str, str]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    """What went wrong by check, of each rank."""
    folder = tmp_path_factory.mktemp("distributed")
    script = Path(__file__).with_name("distributed_checks.py")

    def of(rank: int) -> Report:
        report = folder / f"rank{rank}.json"
        process = run(script, str(rank), str(folder / "meeting"), str(report))
        assert process.returncode == 0, process.stderr
        return json.loads(report.read_text())

    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(of, range(WORLD)))


@pytest.mark.parametrize("check", CHECKS)
def test_as_one_process(check: str, reports: list[Report]) -> None:
    assert [report[check] for report in reports] == [""] * WORLD
