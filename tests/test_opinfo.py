"""torch's own samples of its softmax functions: ours on them, and torch's with the switch on."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tolerances import OURS
from torch.testing._internal.common_methods_invocations import op_db

import softmax_ext

NAMES = {"softmax": "softmax", "log_softmax": "log_softmax", "nn.functional.softmin": "softmin"}
INFOS = {
    f"{info.name} {info.variant_test_name}".strip(): info for info in op_db if info.name in NAMES
}
Function = Callable[..., torch.Tensor]


def switched(function: Function) -> Function:
    return softmax_ext.enabled()(lambda *args, **kwargs: function(*args, **kwargs))


def of_the_switch(info: Any) -> Function:
    return switched(info.op)


def of_ours(info: Any) -> Function:
    return OURS[NAMES[info.name]]


@pytest.fixture(params=[of_ours, of_the_switch], ids=["our function", "switch"])
def find(request: pytest.FixtureRequest) -> Callable[[Any], Function]:
    return request.param  # type: ignore[no-any-return]


@contextmanager
def none_of_torchs(find: Callable[[Any], Function]) -> Iterator[None]:
    """No softmax of torch's runs in the block, unless it is what `find` gives."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        yield
    assert record.profiler is not None
    assert record.profiler.kineto_results is not None
    names = {event.name() for event in record.profiler.kineto_results.events()}
    softmaxes = {name.split("::")[0] for name in names if re.match(r"\w+::\w*softm", name)}
    assert softmaxes == ({"aten"} if find is of_the_switch else {"softmax_ext"})


def samples(info: Any, device: str, dtype: torch.dtype, **kwargs: Any) -> Iterator[Any]:
    found = list(info.sample_inputs(device, dtype, **kwargs))
    assert found
    yield from found


CASES = [
    pytest.param(name, dtype, id=f"{name}-{dtype}")
    for name, info in INFOS.items()
    for dtype in sorted(info.supported_dtypes("cpu"), key=str)
]


def test_torch_has_the_samples() -> None:
    assert set(INFOS) == {f"{name}{variant}" for name in NAMES for variant in ("", " with_dtype")}


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_values(
    name: str, dtype: torch.dtype, find: Callable[[Any], Function], device: str
) -> None:
    """Of contiguous and other inputs."""
    info = INFOS[name]
    if dtype not in info.supported_dtypes(device):
        pytest.skip("not by torch on this device")
    for sample in samples(info, device, dtype):
        for each in (sample, sample.noncontiguous()):
            expected = info.op(each.input, *each.args, **each.kwargs)
            found = find(info)(each.input, *each.args, **each.kwargs)
            assert found.dtype == expected.dtype
            eps = torch.finfo(found.dtype).eps if found.dtype.is_floating_point else 0
            torch.testing.assert_close(found, expected, rtol=16 * eps, atol=4 * eps)


@pytest.mark.parametrize("name", INFOS)
def test_gradients(name: str, find: Callable[[Any], Function], device: str) -> None:
    """Of first and second order, forward mode, forward over reverse, batched. Of each
    formula once every element of the Jacobian; elsewhere products with random vectors, as in
    torch's own tests."""
    info = INFOS[name]
    fast = find is not of_ours or name not in ("softmax", "log_softmax")
    for sample in samples(info, device, torch.float64, requires_grad=True):
        for each in (sample, sample.noncontiguous()):

            def function(x: torch.Tensor, each: Any = each) -> torch.Tensor:
                return find(info)(x, *each.args, **each.kwargs)

            full = each.input.numel() > 0
            options = {"check_batched_grad": full, "check_batched_forward_grad": full}
            options["fast_mode"] = fast
            with none_of_torchs(find):
                assert torch.autograd.gradcheck(
                    function, each.input, check_forward_ad=True, **options
                )
                assert torch.autograd.gradgradcheck(
                    function, each.input, check_fwd_over_rev=True, fast_mode=fast
                )


@pytest.mark.parametrize("name", INFOS)
def test_vmap(name: str, find: Callable[[Any], Function], device: str) -> None:
    info = INFOS[name]
    for sample in samples(info, device, torch.float32):
        inputs = torch.stack([sample.input, sample.input + 1], -1)

        def function(x: torch.Tensor, f: Function, sample: Any = sample) -> torch.Tensor:
            return f(x, *sample.args, **sample.kwargs)

        with none_of_torchs(find):
            found = torch.vmap(lambda x: function(x, find(info)), in_dims=-1)(inputs)
        expected = torch.stack([function(x, info.op) for x in inputs.unbind(-1)])
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", INFOS)
def test_errors(name: str, find: Callable[[Any], Function], device: str) -> None:
    """torch's samples of wrong arguments, and two of the like where it has none."""
    info = INFOS[name]
    cases = [
        (error.sample_input.input, error.sample_input.args, error.sample_input.kwargs)
        for error in (info.error_inputs(device) if info.error_inputs_func else ())
    ]
    x = torch.randn(2, 3, device=device)
    cases += [(x, (2,), {}), (x, (-3,), {"dtype": torch.float64})]
    for input, args, kwargs in cases:
        # Whatever torch raises.
        with pytest.raises(Exception) as expected:  # noqa: PT011
            info.op(input, *args, **kwargs)
        with pytest.raises(expected.type):
            find(info)(input, *args, **kwargs)
