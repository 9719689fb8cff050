"""What is refused of scores: by which exception, in which words, and that nothing is touched."""

import inspect
import re
from typing import Any

import pytest
import torch
from scores_reference import OURS

import softmax_ext
from softmax_ext.functional.scores import Scores

EVERY = {
    **OURS,
    "softmax_": softmax_ext.softmax_,
    "log_softmax_": softmax_ext.log_softmax_,
}
SHAPE = (2, 3, 4, 5)


def bools(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


# The argument named, what is given, what is raised, and words of it.
FAULTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "mask that is no tensor": ({"mask": [True]}, TypeError, "'mask' must be Tensor, not list"),
    "no mask": ({"mask": False}, TypeError, "'mask' must be Tensor, not bool"),
    "no sink": ({"sink": False}, TypeError, "'sink' must be float or Tensor, not bool"),
    "causal or not": ({"is_causal": None}, TypeError, "'is_causal' must be bool, not NoneType"),
    "int mask": ({"mask": torch.ones(5).int()}, TypeError, "'mask'.* bool or floating.*Int"),
    "complex mask": ({"mask": torch.ones(5).cfloat()}, TypeError, "'mask'.* bool or floating"),
    "mask of more keys": (
        {"mask": bools(6)},
        RuntimeError,
        r"'mask' of shape \[6\].*\[2, 3, 4, 5\]$",
    ),
    "mask of another batch": (
        {"mask": bools(3, 1, 1, 5)},
        RuntimeError,
        r"'mask' of shape \[3, 1, 1, 5\].*\[2, 3, 4, 5\]$",
    ),
    "mask of more dims": ({"mask": bools(1, 1, 1, 1, 5)}, RuntimeError, r"'mask'.*\[1, 1, 1, 1, 5"),
    "mask elsewhere": ({"mask": bools(5).to("meta")}, RuntimeError, "same device.*'mask' on meta"),
    "scale along the row": (
        {"scale": torch.ones(5)},
        RuntimeError,
        r"'scale' of shape \[5\].*each row",
    ),
    "scale of other heads": (
        {"scale": torch.ones(2, 1, 1)},
        RuntimeError,
        r"'scale' of shape \[2, 1, 1\].*\[2, 3, 4, 5\]",
    ),
    "int scale": ({"scale": torch.ones(1).int()}, TypeError, "'scale'.* floating.*Int"),
    "scale that is no number": (
        {"scale": "2"},
        TypeError,
        "'scale' must be float or Tensor, not str",
    ),
    "bool for a scale": ({"scale": True}, TypeError, "'scale' must be float or Tensor, not bool"),
    "scale elsewhere": ({"scale": torch.ones(1, device="meta")}, RuntimeError, "device.*'scale'"),
    "both": ({"scale": 1.0, "temperature": 1.0}, ValueError, "scale or temperature.*both"),
    "no temperature": ({"temperature": 0.0}, ValueError, "temperature above 0, but got 0.0"),
    "negative": ({"temperature": -1}, ValueError, "temperature above 0, but got -1"),
    "NaN": ({"temperature": float("nan")}, ValueError, "temperature above 0, but got nan"),
    "one temperature of many": (
        {"temperature": torch.tensor([[1.0], [2.0], [0.0], [1.0]])},
        ValueError,
        "temperature above 0, but got tensor",
    ),
    "int temperature": ({"temperature": torch.ones(1).int()}, TypeError, "'temperature'.*floating"),
    "temperature along the row": (
        {"temperature": torch.ones(5)},
        RuntimeError,
        r"'temperature' of shape \[5\].*\[2, 3, 4, 5\]",
    ),
    "temperature in words": ({"temperature": "hot"}, TypeError, "'temperature' must be float or T"),
    "softcap of 0": ({"softcap": 0.0}, ValueError, "softcap above 0, but got 0.0"),
    "negative softcap": ({"softcap": -50.0}, ValueError, "softcap above 0, but got -50.0"),
    "infinite softcap": ({"softcap": float("inf")}, ValueError, "finite softcap.*inf"),
    "NaN for a softcap": ({"softcap": float("nan")}, ValueError, "softcap.*nan"),
    "tensor for a softcap": (
        {"softcap": torch.ones(())},
        TypeError,
        "'softcap' must be float, not T",
    ),
    "causal in numbers": ({"is_causal": 1}, TypeError, "'is_causal' must be bool, not int"),
    "offset of nothing": ({"causal_offset": 0}, ValueError, "causal_offset needs is_causal=True"),
    "half an offset": (
        {"is_causal": True, "causal_offset": 0.5},
        TypeError,
        "'causal_offset' must be int, not float",
    ),
    "window of one": ({"window": (1,)}, ValueError, r"window of two ints.*\(1,\)"),
    "window that is an int": (
        {"window": 3},
        TypeError,
        "'window' must be tuple of two ints, not int",
    ),
    "window in halves": ({"window": (0.5, 1)}, TypeError, "'window' must be tuple of two ints"),
    "negative window": ({"window": (-2, 0)}, ValueError, r"-1 or more, but got \(-2, 0\)"),
    "sinks of other heads": (
        {"sink": torch.ones(4)},
        RuntimeError,
        r"'sink' of shape \[4\].*\[2, 3, 4, 5\]",
    ),
    "sinks along the row": ({"sink": torch.ones(4, 5)}, RuntimeError, r"'sink'.*\[4, 5\]"),
    "int sink": ({"sink": torch.ones(3).int()}, TypeError, "'sink'.* floating.*Int"),
    "sink in words": ({"sink": "low"}, TypeError, "'sink' must be float or Tensor, not str"),
    "sink elsewhere": ({"sink": torch.ones(3, device="meta")}, RuntimeError, "device.*'sink'"),
    "unknown": ({"scal": 1.0}, TypeError, "unexpected keyword argument 'scal'; .*scale, temp"),
    "unknown, None": ({"masks": None}, TypeError, "unexpected keyword argument 'masks'"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", EVERY)
def test_refused(name: str, fault: str, device: str) -> None:
    scores, error, words = FAULTS[fault]
    moved = {
        key: value.to(device) if isinstance(value, torch.Tensor) and not value.is_meta else value
        for key, value in scores.items()
    }
    input = torch.randn(SHAPE, device=device)
    before, version = input.clone(), input._version
    with pytest.raises(error, match=re.compile(words, re.DOTALL)) as caught:
        EVERY[name](input, -1, **moved)
    assert name.rstrip("_") in str(caught.value)
    assert torch.equal(input, before)
    assert input._version == version


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((5,), 0), ((3, 5), 0), ((2, 3, 5), 1), ((2, 3, 5), (1, 2)), ((), 0)],
    ids=str,
)
@pytest.mark.parametrize("scores", [{"is_causal": True}, {"window": (1, 1)}], ids=str)
@pytest.mark.parametrize("op", OURS)
def test_a_band_needs_queries_and_keys(
    op: str, scores: dict[str, Any], shape: tuple[int, ...], dim: Any, device: str
) -> None:
    words = f"two dims or more, with dim the last.* an input of {len(shape)} dims"
    with pytest.raises(ValueError, match=words):
        OURS[op](torch.randn(shape, device=device), dim, **scores)


@pytest.mark.parametrize("sink", [torch.ones(3), torch.ones(5)])
def test_sinks_of_heads_need_heads(sink: torch.Tensor, device: str) -> None:
    """Without a dim of heads, or over another dim, a 1-D sink is broadcast as any tensor is."""
    with pytest.raises(RuntimeError, match="'sink'"):
        softmax_ext.softmax(torch.randn(3, 5, device=device), 1, sink=sink.to(device))
    with pytest.raises(RuntimeError, match="'sink'"):
        softmax_ext.softmax(torch.randn(2, 5, 3, device=device), 1, sink=sink[:2].to(device))


@pytest.mark.parametrize("dim", [-1, 1, (2, 3)], ids=str)
@pytest.mark.parametrize("argument", ["scale", "temperature", "sink", "mask"])
def test_shapes_are_refused_alike_over_any_dim(argument: str, dim: Any, device: str) -> None:
    wrong = torch.ones(7, 1, 1, 1, device=device)
    with pytest.raises(RuntimeError) as caught:
        softmax_ext.softmax(torch.randn(SHAPE, device=device), dim, **{argument: wrong})
    assert str(caught.value).splitlines()[0] == (
        f"softmax(): argument '{argument}' of shape [7, 1, 1, 1] cannot be broadcast to 'input' of "
        "shape [2, 3, 4, 5]" + " with one number for each row" * (argument != "mask")
    )


DIMS: dict[str, tuple[Any, type[Exception], str]] = {
    "twice": ((1, 1), RuntimeError, "dim 1 appears multiple times in the list of dims"),
    "twice, once from behind": ((1, -3), RuntimeError, "dim 1 appears multiple times"),
    "out of range": ((0, 4), IndexError, r"range of \[-4, 3\], but got 4"),
    "out of range from behind": ((-5,), IndexError, r"range of \[-4, 3\], but got -5"),
    "a float": ((0, 1.0), TypeError, "'dim' must be int or tuple of ints, not float"),
    "a bool": ((True,), TypeError, "'dim' must be int or tuple of ints, not bool"),
    "a name": (("heads",), TypeError, "'dim' must be int or tuple of ints, not str"),
}


@pytest.mark.parametrize("fault", DIMS)
@pytest.mark.parametrize("scores", [{}, {"scale": 2.0}], ids=str)
@pytest.mark.parametrize("name", [*EVERY, "softmin", "softmin_"])
def test_dims(name: str, scores: dict[str, Any], fault: str, device: str) -> None:
    if scores and "softmin" in name:
        return
    dim, error, words = DIMS[fault]
    with pytest.raises(error, match=words):
        getattr(softmax_ext, name)(torch.randn(SHAPE, device=device), dim, **scores)


@pytest.mark.parametrize("name", ["softmin", "softmin_", "Softmin", "Softmax2d"])
def test_softmin_takes_no_scores(name: str) -> None:
    function = getattr(softmax_ext, name)
    arguments = (torch.randn(3, 5), 1) if "softmin" in name else ()
    with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
        function(*arguments, scale=1.0)


@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
def test_modules_know_the_names(name: str) -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'scal'; .*scale, temp"):
        getattr(softmax_ext, name)(1, scal=1.0)


@pytest.mark.parametrize("op", OURS)
def test_input_and_dtype(op: str, device: str) -> None:
    x = torch.randn(3, 5, device=device)
    with pytest.raises(TypeError, match="'input' must be Tensor, not list"):
        OURS[op]([1.0], 0, scale=1.0)
    with pytest.raises(TypeError, match="'dtype'"):
        OURS[op](x, 0, dtype="float32", scale=1.0)
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(NotImplementedError, match=op):
            OURS[op](x, 0, dtype=dtype, scale=1.0)
    with pytest.raises(NotImplementedError, match=op):
        OURS[op](x.cfloat(), 0, scale=1.0)
    if op != "logsumexp":  # which takes torch's default dtype for integers
        with pytest.raises(NotImplementedError, match=op):
            OURS[op](x.int(), 0, scale=1.0)


@pytest.mark.parametrize("op", OURS)
def test_out(op: str, device: str) -> None:
    x = torch.randn(3, 5, device=device)
    shape = (3,) if op == "logsumexp" else (3, 5)

    def refused(error: type[Exception], words: str, out: Any, **scores: Any) -> None:
        before = out.clone() if isinstance(out, torch.Tensor) and not out.is_meta else None
        with pytest.raises(error, match=words):
            OURS[op](x, 1, out=out, **{"scale": 0.5, **scores})
        if before is not None:
            assert torch.equal(out, before)

    refused(TypeError, "'out' must be Tensor, not list", [1.0])
    refused(RuntimeError, "'out'|floating point type", torch.zeros(shape, device=device).long())
    refused(RuntimeError, "'out' on", torch.zeros(shape, device="meta"))
    out = torch.zeros(shape, device=device)
    refused(RuntimeError, "automatic differentiation", out.clone().requires_grad_())
    refused(RuntimeError, "automatic differentiation", out, sink=torch.ones(1, requires_grad=True))
    if op != "logsumexp":  # which casts, as torch.logsumexp
        refused(RuntimeError, "'out' to have dtype torch.float32", out.double())
    else:
        double = torch.zeros(3, dtype=torch.float64, device=device)
        assert torch.equal(softmax_ext.logsumexp(x, 1, out=double).float(), OURS[op](x, 1))


@pytest.mark.parametrize(
    "args", [(), (None,), ("a",), (1.5,), (True,), (0, 1), (0, "a"), ((0, 0),), (7,)], ids=str
)
def test_logsumexp_refuses_what_torch_does(args: Any) -> None:
    x = torch.randn(3, 5)
    errors = []
    for function in (softmax_ext.logsumexp, torch.logsumexp):
        with pytest.raises(Exception) as caught:  # noqa: PT011  the types are compared
            function(x, *args)
        errors.append(caught.value)
    names = args in ((None,), ("a",)) and hasattr(torch.Tensor, "refine_names")
    if names:  # of dims, which torch still has in 2.11
        assert type(errors[0]) is TypeError
    else:
        assert type(errors[0]) is type(errors[1]), errors


@pytest.mark.parametrize("name", ["softmax_", "log_softmax_"])
def test_in_place_rules(name: str, device: str) -> None:
    """A leaf that requires a gradient, an expanded tensor: torch's errors, and nothing changed."""
    function = getattr(softmax_ext, name)
    leaf = torch.randn(3, 5, device=device, requires_grad=True)
    expanded = torch.randn(1, 5, device=device).expand(3, 5)
    for x in (leaf, expanded):
        before = x.detach().clone()
        for dim, scores in ((1, {"scale": 0.5}), (0, {"scale": 0.5}), ((0, 1), {})):
            with pytest.raises(RuntimeError, match=r"leaf|single memory location"):
                function(x, dim, **scores)
        assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("name", [*EVERY, "Softmax", "LogSoftmax"])
def test_the_signature_has_the_names(name: str) -> None:
    parameters = inspect.signature(getattr(softmax_ext, name)).parameters
    of_scores = [parameters[name] for name in Scores.__annotations__]
    assert [str(p.replace(annotation=inspect.Parameter.empty)) for p in of_scores] == [
        "scale=None",
        "temperature=None",
        "softcap=None",
        "mask=None",
        "is_causal=False",
        "causal_offset=None",
        "window=None",
        "sink=None",
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in of_scores)
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
