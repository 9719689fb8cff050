"""That planted_faults.py can plant its faults: the sources have not gone on without it."""

from pathlib import Path

import pytest
from planted_faults import FAULTS, ROOT, Fault

FAMILIES = {
    *(f"cpu {rows}" for rows in ("register rows", "short rows", "long rows", "split rows")),
    *("cpu streamed rows", "cpu columns", "cpu narrow columns", "cpu casts", "cpu strides"),
    *("cpu segments", "cpu losses", "cpu divergences", "cpu probabilities"),
    *(f"cuda {of}" for of in ("short", "registers", "long", "packed", "packed short", "columns")),
    *(f"cuda {of}" for of in ("block", "cluster", "grid", "strides", "plan")),
    *("cuda scores", "cuda segments", "cuda losses"),
    *("torch operators", "autograd", "switch", "python"),
    *("baseline", "avx2", "avx512"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_it_can_be_planted(fault: Fault, tmp_path: Path) -> None:
    text = (ROOT / fault.path).read_text()
    assert text.count(fault.old) == 1
    (tmp_path / fault.path).parent.mkdir(parents=True)
    (tmp_path / fault.path).write_text(text)
    fault.plant(tmp_path)
    assert (tmp_path / fault.path).read_text() not in (text, "")
    assert all((ROOT / each).exists() for each in fault.tests.split())


def test_every_family_has_one() -> None:
    assert {fault.family for fault in FAULTS} == FAMILIES
    assert {fault.isa for fault in FAULTS} == {"", "baseline", "avx2", "avx512"}
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
