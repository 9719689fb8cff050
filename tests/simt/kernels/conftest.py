"""Every schedule of the CUDA kernels, forward and backward, run on the host executor.

`host` is the executor as built in one lane. It takes each case through the project's own plan and
launchers, for the device that the case names, and without sanitizers in four thread orders that
have to give the same bits. Most tests name the schedule that is to run, and all say what its plan
is, so that a change of the plan cannot take a kernel out of their reach; test_what_ran.py looks
back at what all of them together have run.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from host import Host
from kernel_cases import (
    Types,
    has_the_accesses_of_another,
    has_the_barriers_of_another,
)
from lanes import SANITIZERS
from losses_on_host import LossesHost

FOLDER = Path(__file__).parent
# What these tests show is in the values, which are those of the other lanes.
OF_VALUES = (
    "test_bits_do_not_depend_on_how_a_row_is_run",
    "test_bits_of_long_rows",
    "test_bits_of_special_rows",
    "test_bits_of_a_column_depend_on_dim_alone",
    "test_bits_of_special_columns",
    "test_special_rows",
    "test_shares_of_minus_infinity",
    "test_tiles_of_minus_infinity",
    "test_ulp_of_float32",
    "test_results_of_16_bits_are_rounded_as_the_exact_ones",
    "test_exp_is_taken_once_of_an_element",
    "test_every_pair_of_arguments",
    "test_bits_of_every_schedule",
    "test_a_band_has_the_bits_of_its_mask",
    "test_rows_of_which_nothing_takes_part",
    "test_nearly_equal_distributions",
    "test_classes_of_no_share",
    "test_a_value_that_is_no_number_shows",
    "test_bits_of_pairs",
)
# But where the kernels that cast run: nowhere else do all of them.
OF_CASTS = (
    "test_bits_do_not_depend_on_how_a_row_is_run",
    "test_bits_of_a_column_depend_on_dim_alone",
)


@pytest.fixture(scope="session")
def losses(host: Host) -> Iterator[LossesHost]:
    losses = LossesHost(host.lane, host.seed)
    yield losses
    losses.close()


@pytest.fixture(autouse=True)
def only_what_moves_memory_under_sanitizers(request: pytest.FixtureRequest) -> None:
    """An access outside of memory, and a race, are of addresses and barriers. Neither the operation
    nor which of the 16-bit types it is changes one: one of each stands for the other."""
    if request.getfixturevalue("host").lane not in SANITIZERS:
        return
    parameters = request.node.callspec.params
    edge = parameters.get("edge")
    types = edge.types if edge else parameters.get("types")
    if "dtype" in parameters:  # of scores
        types = Types("forward", parameters["dtype"], parameters["dtype"])
    name = request.node.originalname
    casts = name in OF_CASTS and types.load != types.store
    if name in OF_VALUES and not casts:
        pytest.skip("sanitizers: a test of values, run without them")
    way, is_tsan = parameters.get("way"), request.getfixturevalue("host").lane == "tsan"
    if is_tsan and has_the_barriers_of_another(types):
        pytest.skip("tsan: the barriers of float32; asan sees the accesses")
    if (
        is_tsan
        and request.node.path.name == "test_strides.py"
        and way is not None
        and way.schedule not in ("packed", "columns")
    ):
        pytest.skip("tsan: where rows begin moves no barrier of theirs; asan sees their accesses")
    if has_the_accesses_of_another(parameters.get("op"), types):
        pytest.skip("sanitizers: the same accesses as softmax, or as float16")


DESELECTED = pytest.StashKey[set[Path]]()


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        item.config.stash.setdefault(DESELECTED, set()).add(item.path)


@pytest.fixture
def whole_folder(request: pytest.FixtureRequest) -> bool:
    """Whether all tests of this folder were selected."""
    of_one_test = [argument for argument in request.config.args if "::" in argument]
    files = set(FOLDER.glob("test_*.py"))
    deselected = request.config.stash.get(DESELECTED, set())
    collected = {item.path for item in request.session.items}
    return not of_one_test and files <= collected and not files & deselected
