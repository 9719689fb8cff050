"""Random calls of every entry in a process of its own: an exception or torch's value, no signal.

--fuzz-calls says how many; by hand, 100000 take some minutes.
"""

import random
from pathlib import Path

import pytest
from test_threads_and_isa import run


def test_no_call_ends_the_process(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    calls, seed = request.config.getoption("--fuzz-calls"), random.getrandbits(31)
    log = tmp_path / "log"
    script = Path(__file__).parent / "fuzz.py"
    process = run(script, str(calls), str(seed), str(log))
    assert process.returncode == 0, (
        f"{script.name} {calls} {seed}: exit status {process.returncode}; the last call: "
        f"{log.read_text() if log.exists() else None}\n{process.stderr[-4000:]}"
    )
