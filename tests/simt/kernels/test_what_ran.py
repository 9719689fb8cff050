"""Looking back at what all tests of this folder have run, of which this is the last file."""

import itertools
import re
from collections.abc import Callable

import gcov
import pytest
import torch
from host import Host, Instance
from kernel_cases import (
    CSRC,
    DIRECTIONS,
    NATIVE,
    NEW,
    OLD,
    SMS,
    VECTOR_BYTES,
    Types,
    has_the_accesses_of_another,
    has_the_barriers_of_another,
)
from lanes import SANITIZERS
from scores_reference import OURS as OPS_OF_SCORES
from tolerances import FLOATING, OPS, SIXTEEN_BIT


def kernels_of(types: Types) -> int:
    """Of each op: of rows in registers, of longer ones, of short ones, of slabs, of columns, and
    of slabs of those."""
    registers = types.chunk_vectors.bit_length() - 1
    short = registers + 1 - types.inputs
    packed = 1 if types.load == torch.float64 else 4
    columns = 3 if types.load in SIXTEEN_BIT else 2
    return registers + 1 + short + packed + 1 + columns


def test_every_kernel_that_a_plan_can_ask_for_has_run(host: Host, whole_folder: bool) -> None:
    """For all types, with and without vectors. Of what plans can ask for, asking around every power
    of two leaves nothing out."""
    if not whole_folder:
        pytest.skip("only a part of this folder was selected")
    shapes = [(1, 2**k + more, 1) for k in range(24) for more in (0, 1)]
    inners = (1, 2, 3, 4, 12, VECTOR_BYTES)
    shapes += [(SMS, dim, inner) for _, dim, _ in shapes for inner in inners]
    shapes += [(2**20, 2**k, 1) for k in range(12)]
    wanted = set()
    for types, shape, device in itertools.product(NATIVE, shapes, (NEW, OLD)):
        plan = host.plan(types.direction, shape, types.load, types.store, device=device)
        if host.lane == "tsan" and has_the_barriers_of_another(types):
            continue
        read = (types.load, types.store, *Instance.of_plan(plan))
        for op in OPS:
            if host.lane not in SANITIZERS or not has_the_accesses_of_another(op, types):
                wanted.add(Instance(types.direction, op, *read))
    kernels = {instance.kernel for instance in wanted}
    assert kernels == {
        "registers",
        "long",
        "short",
        "packed_short",
        "packed",
        "packed_columns",
        "columns",
    }
    assert not wanted - host.instances


def test_lines_that_ran(
    host: Host, whole_folder: bool, summary: Callable[[str, str], None]
) -> None:
    """Of what the host build has of the kernels and of the headers that they share."""
    if host.lane != "gcov":
        pytest.skip(f"lines are counted in the gcov lane, not in {host.lane}")
    if not whole_folder:
        pytest.skip("only a part of this folder was selected")
    tool = gcov.find_gcov()
    if tool is None:
        pytest.skip("lines are counted by g++ and its gcov")
    host.close()
    sources = [*CSRC.glob("cuda/*.cuh"), *CSRC.glob("cuda/launch*.cu")]
    sources += CSRC.glob("include/softmax_ext/*.h")
    coverage = gcov.read(tool, host.counts, sources)
    title = "lines of the CUDA kernels that ran on the host executor"
    summary(title, gcov.table(coverage.lines))

    kernels = {
        name: ran
        for name, ran in coverage.functions.items()
        if re.match(r"void softmax_ext::cuda::\w+_kernel<", name)
    }
    of_scores = len(OPS_OF_SCORES) * len(FLOATING) * len(DIRECTIONS) * 2  # short, and all others
    of_softmax = len(OPS) * sum(map(kernels_of, NATIVE))
    assert len(kernels) == of_softmax + of_scores, "every instance is counted"
    assert [name for name, ran in kernels.items() if not ran] == []
    ran = [ran for lines in coverage.lines.values() for ran in lines.values()]
    assert len(ran) > 300
    assert sum(ran) >= 0.95 * len(ran)
