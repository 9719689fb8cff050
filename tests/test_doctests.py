"""The examples in the docstrings of all public modules and of every public name."""

import doctest
import importlib
import pkgutil

import pytest

import softmax_ext

MODULES = [
    "softmax_ext",
    *(
        module.name
        for module in pkgutil.walk_packages(softmax_ext.__path__, "softmax_ext.")
        if "._" not in module.name
    ),
]
PUBLIC = (
    "softmax",
    "log_softmax",
    "softmin",
    "Softmax",
    "LogSoftmax",
    "Softmin",
    "Softmax2d",
    "softmax_",
    "log_softmax_",
    "softmin_",
    "logsumexp",
    "segment_softmax",
    "segment_log_softmax",
    "segment_logsumexp",
    "enable",
    "disable",
    "enabled",
    "is_enabled",
    "BuildInfo",
    "build_info",
    "explain",
    *(f"kernels.{name}" for name in softmax_ext.kernels.__all__),
    *(f"autograd.{name}" for name in softmax_ext.autograd.__all__),
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    result = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert result.failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example(name: str) -> None:
    *module, name = name.split(".")
    within = importlib.import_module(".".join(["softmax_ext", *module]))
    public = getattr(within, name)
    assert name in within.__all__
    examples = [
        example for test in doctest.DocTestFinder().find(public, name) for example in test.examples
    ]
    assert examples, f"{within.__name__}.{name} has no example in its docstring"
