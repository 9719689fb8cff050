"""docs/what_works_where.md: the tests that it names exist, and each row has one."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "what_works_where.md"


def test_what_works_where() -> None:
    table = TABLE.read_text().split("| | functions | in place | switch |\n")[1].split("\n\n")[0]
    rows = table.splitlines()[1:]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert named, f"no test in {row}"
        for file, name in named:
            tree = ast.parse((TESTS / file).read_text())
            names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert name in names, f"{file} has no {name}"
