"""docs/what_works_where.md: the tests that it names exist; each row of the first table has one."""

import ast
import functools
import re
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "what_works_where.md"
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


@functools.cache
def functions(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_what_works_where() -> None:
    text = TABLE.read_text()
    rows = text.split("| | functions | in place | switch |\n")[1].split("\n\n")[0].splitlines()[1:]
    assert len(rows) > 20
    for row in rows:
        assert NAMED.search(row), f"no test in {row}"
    for file, name in NAMED.findall(text):
        assert name in functions(file), f"{file} has no {name}"
