"""Which lines of the kernels ran, by the counts of a build with --coverage (g++ and its gcov)."""

import json
import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Coverage:
    """A line or function counts as run if it ran in one of the translation units and, of a
    template, in one of its instances."""

    lines: dict[Path, dict[int, bool]]  # of each file those with code, and whether they ran
    functions: dict[str, bool]  # by their demangled names: an instance of a template is one


def counts_below(folder: Path, objects: Path) -> dict[str, str]:
    """The environment in which a program adds the counts of its `objects` to those in `folder`."""
    return {"GCOV_PREFIX": str(folder), "GCOV_PREFIX_STRIP": str(len(objects.parts) - 1)}


def find_gcov() -> str | None:
    """The one that belongs to the compiler; None where that is not g++."""
    compiler = os.environ.get("CXX", "g++")
    name = re.sub(r"(^|/|-)g\+\+(-[\d.]+)?$", r"\1gcov\2", compiler)
    return shutil.which(name) if name != compiler else None


def keep_notes(folder: Path, objects: Path) -> None:
    """Copies what the compiler noted of the lines: another build while the program runs would leave
    notes that its counts do not fit."""
    for notes in objects.glob("*.gcno"):
        shutil.copy(notes, folder)


def read(gcov: str, folder: Path, sources: Collection[Path]) -> Coverage:
    """From the counts and the notes in `folder`."""
    command = [gcov, "--json-format", "--stdout", *sorted(p.name for p in folder.glob("*.gcda"))]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"gcov: {result.stderr}")
    lines: dict[Path, dict[int, bool]] = {source: {} for source in sources}
    functions: dict[str, bool] = defaultdict(bool)
    for unit in map(json.loads, result.stdout.splitlines()):
        for file in unit["files"]:
            path = Path(unit["current_working_directory"], file["file"]).resolve()
            if path not in lines:
                continue
            for line in file["lines"]:
                number = line["line_number"]
                lines[path][number] = lines[path].get(number, False) or line["count"] > 0
            for function in file["functions"]:
                functions[function["demangled_name"]] |= function["execution_count"] > 0
    return Coverage(lines, dict(functions))


def table(lines: dict[Path, dict[int, bool]]) -> str:
    """Of each file how many lines have code, how many of those ran, and which did not."""
    rows = []
    for path, ran in sorted(lines.items()):
        missing = ", ".join(str(number) for number, did in sorted(ran.items()) if not did)
        rows.append(_row(path.name, ran.values(), missing) if ran else f"{path.name:22} no code")
    every = [did for ran in lines.values() for did in ran.values()]
    return "".join(f"{row}\n" for row in [*rows, _row("all", every, "")])


def _row(name: str, ran: Collection[bool], missing: str) -> str:
    percent = 100 * sum(ran) / len(ran)
    return f"{name:22} {len(ran):4} lines {percent:6.1f} % {missing}".rstrip()
