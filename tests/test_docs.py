"""docs/what_works_where.md: the tests that it names exist, and each row has one."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "what_works_where.md"


def test_what_works_where() -> None:
    if not TABLE.exists():
        return
    rows = [line for line in TABLE.read_text().splitlines() if "::" in line]
    assert len(rows) > 20
    for row in rows:
        for file, name in re.findall(r"`(\w+\.py)::(\w+)`", row):
            tree = ast.parse((TESTS / file).read_text())
            names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert name in names, f"{file} has no {name}"
