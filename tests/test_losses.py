"""Cross-entropy as torch has it: its samples, errors, autograd, transforms, compilation."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import softmax_ext

PROMOTED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INFO = next(info for info in op_db if info.name == "nn.functional.cross_entropy")


def logits(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, dtype=dtype, generator=generator).to(device).requires_grad_()


def events(function: Any) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        function()
    return {event.key for event in record.key_averages()}


# ---- torch's samples ----------------------------------------------------------------------------


def samples(device: str, dtype: torch.dtype, **kwargs: Any) -> Iterator[Any]:
    found = list(INFO.sample_inputs(device, dtype, **kwargs))
    assert len(found) > 20
    yield from found


def by_the_switch(*args: Any, **kwargs: Any) -> torch.Tensor:
    with softmax_ext.enabled():
        return F.cross_entropy(*args, **kwargs)


FUNCTIONS = {"our function": softmax_ext.cross_entropy, "switch": by_the_switch}
each_function = pytest.mark.parametrize("cross_entropy", FUNCTIONS.values(), ids=FUNCTIONS)


@each_function
@pytest.mark.parametrize("dtype", sorted(INFO.supported_dtypes("cpu"), key=str), ids=str)
def test_values_of_torchs_samples(
    dtype: torch.dtype, cross_entropy: Callable[..., torch.Tensor], device: str
) -> None:
    for sample in samples(device, dtype):
        for each in (sample, sample.noncontiguous()):
            expected = INFO.op(each.input, *each.args, **each.kwargs)
            found = cross_entropy(each.input, *each.args, **each.kwargs)
            assert found.dtype == expected.dtype
            # torch sums 16-bit losses as 16 bits.
            rounding = 16 * torch.finfo(dtype).eps
            torch.testing.assert_close(
                found, expected, rtol=rounding, atol=rounding, equal_nan=True
            )


@each_function
def test_gradients_of_torchs_samples(
    cross_entropy: Callable[..., torch.Tensor], device: str
) -> None:
    """Of first and second order, forward mode, batched."""
    for sample in samples(device, torch.float64, requires_grad=True):

        def function(x: torch.Tensor, sample: Any = sample) -> torch.Tensor:
            return cross_entropy(x, *sample.args, **sample.kwargs)

        full = sample.input.numel() > 0
        assert torch.autograd.gradcheck(
            function,
            sample.input,
            fast_mode=True,
            check_forward_ad=True,
            check_batched_grad=False,
        )
        if full:
            assert torch.autograd.gradgradcheck(function, sample.input, fast_mode=True)


@each_function
def test_errors_of_torchs_samples(cross_entropy: Callable[..., torch.Tensor], device: str) -> None:
    for error in INFO.error_inputs(device) if INFO.error_inputs_func else ():
        sample = error.sample_input
        with pytest.raises(error.error_type):
            cross_entropy(sample.input, *sample.args, **sample.kwargs)


def wrong(device: str) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    x, y = logits(3, 5, device=device), torch.tensor([0, 1, 2], device=device)
    return {
        "fewer targets": ((x, y[:2]), {}),
        "a dim too many": ((x, y.view(3, 1)), {}),
        "a dim too few": ((logits(3, 5, 2, device=device), y), {}),
        "other columns": ((logits(3, 5, 2, device=device), y.view(3, 1).expand(3, 3)), {}),
        "integers": ((x.detach().long(), y), {}),
        "16-bit targets": ((x, y.short()), {}),
        "weight of another size": ((x, y), {"weight": torch.ones(4, dtype=torch.float64)}),
        "weight of two dims": ((x, y), {"weight": torch.ones(5, 1, dtype=torch.float64)}),
        "weight of another dtype": ((x, y), {"weight": torch.ones(5)}),
        "16 bits, weight of 32": ((x.bfloat16(), y), {"weight": torch.ones(5)}),
        "weight with a gradient": ((x, y), {"weight": logits(5)}),
        "smoothing": ((x, y), {"label_smoothing": 1.5}),
        "reduction": ((x, y), {"reduction": "max"}),
        "no dims": ((torch.tensor(1.0), torch.tensor(0)), {}),
        "no classes": ((logits(3, 0), torch.zeros(3, dtype=torch.int64)), {}),
    }


@pytest.mark.parametrize("name", wrong("cpu"))
def test_errors_are_torchs(name: str) -> None:
    args, kwargs = wrong("cpu")[name]
    # Whatever torch raises.
    with pytest.raises(Exception) as expected:  # noqa: PT011
        F.cross_entropy(*args, **kwargs)
    with pytest.raises(expected.type) as found:
        softmax_ext.cross_entropy(*args, **kwargs)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("target", [-1, 5, 2**40, -(2**62)])
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3)], ids=str)
def test_a_target_out_of_range(shape: tuple[int, ...], target: int) -> None:
    """Before anything is computed, with its index and value."""
    x = logits(*shape)
    y = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
    y.view(-1)[2] = target
    with pytest.raises(IndexError, match=rf"Target {target} is out of bounds.*element 2 is not"):
        softmax_ext.cross_entropy(x, y)


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("temperature", 0.0, ValueError, "'temperature' to be above 0 and finite, but got 0.0"),
        ("temperature", float("nan"), ValueError, "'temperature' to be above 0"),
        ("temperature", "1", TypeError, "argument 'temperature' must be float, not str"),
        ("softcap", -1.0, ValueError, "'softcap' to be above 0 and finite, but got -1.0"),
        ("softcap", True, TypeError, "argument 'softcap' must be float, not bool"),
        ("z_loss", torch.tensor(1.0), TypeError, "argument 'z_loss' must be float, not Tensor"),
    ],
)
def test_errors_of_our_own_arguments(
    argument: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        softmax_ext.cross_entropy(logits(2, 3), torch.tensor([0, 1]), **{argument: value})


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
def test_other_indices(dtype: torch.dtype, device: str) -> None:
    x, y = logits(4, 5, device=device), torch.tensor([0, 4, 2, 1], device=device)
    torch.testing.assert_close(
        softmax_ext.cross_entropy(x, y.to(dtype)), softmax_ext.cross_entropy(x, y)
    )


def test_nll_loss(device: str) -> None:
    """torch's samples of its own, and int32 targets."""
    info = next(info for info in op_db if info.name == "nn.functional.nll_loss")
    for sample in info.sample_inputs(device, torch.float64, requires_grad=True):
        found = softmax_ext.nll_loss(sample.input, *sample.args, **sample.kwargs)
        expected = F.nll_loss(sample.input, *sample.args, **sample.kwargs)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    x = softmax_ext.log_softmax(logits(4, 5, device=device), 1)
    y = torch.tensor([0, 4, -100, 1], device=device)
    torch.testing.assert_close(softmax_ext.nll_loss(x, y.int()), softmax_ext.cross_entropy(x, y))


@pytest.mark.parametrize("arguments", [{"size_average": False}, {"reduce": False}], ids=str)
def test_deprecated_reductions(arguments: dict[str, Any]) -> None:
    x, y = logits(4, 5), torch.tensor([0, 4, 2, 1])
    with pytest.warns(UserWarning, match="deprecated"):
        found = softmax_ext.cross_entropy(x, y, **arguments)
    with pytest.warns(UserWarning, match="deprecated"):
        expected = F.cross_entropy(x, y, **arguments)
    torch.testing.assert_close(found, expected)


# ---- autograd -----------------------------------------------------------------------------------

ALL = {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 3.0, "temperature": 0.7}


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 3), (4,)], ids=str)
def test_gradcheck(
    shape: tuple[int, ...], reduction: str, options: dict[str, Any], device: str
) -> None:
    """First and second order, forward mode, batched; with lse and with weights."""
    x = logits(*shape, device=device)
    y = torch.ones(shape[:1] + shape[2:] if len(shape) > 1 else (), dtype=torch.int64)
    if y.dim():
        y[0] = -100
    y, weight = y.to(device), torch.tensor([0.5, 2.0, 1.0, 0.0]).double().to(device)

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return softmax_ext.cross_entropy(
            x, y, weight, reduction=reduction, return_lse=True, **options
        )

    assert torch.autograd.gradcheck(
        function, x, check_forward_ad=True, check_batched_grad=True, fast_mode=True
    )
    assert torch.autograd.gradgradcheck(function, x, fast_mode=True)


def test_it_is_the_kernels_node() -> None:
    x = logits(3, 5)
    loss = softmax_ext.cross_entropy(x, torch.tensor([0, 1, 2]))
    assert type(loss.grad_fn).__name__ == "SoftmaxExtCrossEntropyBackward"
    assert loss.grad_fn._saved_self is x
    names = events(lambda: softmax_ext.cross_entropy(x, torch.tensor([0, 1, 2])).backward())
    assert "softmax_ext::cross_entropy" in names
    assert not any("log_softmax" in name for name in names)


def test_only_lse_has_a_gradient(device: str) -> None:
    x = logits(3, 5, device=device)
    _, lse = softmax_ext.cross_entropy(
        x, torch.tensor([0, -100, 2], device=device), return_lse=True
    )
    (found,) = torch.autograd.grad(lse.sum(), x)
    torch.testing.assert_close(found, x.softmax(1))


def test_memory() -> None:
    """One tensor of the logits' size, the gradient; forward keeps a few numbers a row."""
    x = torch.randn(64, 5000, requires_grad=True)
    y = torch.arange(64)
    softmax_ext.cross_entropy(x, y).backward()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as record:
        loss = softmax_ext.cross_entropy(x, y, label_smoothing=0.1, z_loss=1e-4)
        forward = softmax_ext.cross_entropy(x, y)
        (grad,) = torch.autograd.grad(loss, x)
    assert forward.requires_grad
    assert record.profiler is not None
    assert record.profiler.kineto_results is not None
    sizes = [
        event.nbytes()
        for event in record.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.nbytes() > 0
    ]
    assert [size for size in sizes if size >= 64 * 64] == [grad.nbytes]


def test_a_gradient_of_another_kind_is_refused() -> None:
    x = torch.randn(3, 5)
    y = torch.tensor([0, 1, 2])
    options = (1, -100, 0.0, 0.0, 1.0, 0.0)
    forward = torch.ops.softmax_ext.cross_entropy
    backward = torch.ops.softmax_ext.cross_entropy_backward
    loss, lse, kept, total, entropy = forward(x, y, None, *options, False, True)
    right = {"grad": loss, "g_lse": None, "g_entropy": entropy, "x": x, "y": y, "w": None}
    right |= {"lse": lse, "kept": kept, "total": total, "entropy": entropy}
    assert backward(*right.values(), *options).shape == x.shape
    for name, value in {
        "grad": torch.ones(3),
        "g_lse": torch.ones(2),
        "g_entropy": entropy.double(),
        "x": torch.randn(3, 4),
        "y": torch.tensor([0, 1, 9]),
        "w": torch.ones(3),
        "lse": lse.double(),
        "kept": kept[0],
        "total": total.float(),
        "entropy": None,
    }.items():
        if name == "x":
            value = torch.randn(2, 5)
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            backward(*{**right, name: value}.values(), *options)
    for wrong_options in [(7, *options[1:]), (*options[:5], float("nan")), (1, -100, 2.0, 0, 1, 0)]:
        with pytest.raises((RuntimeError, ValueError)):
            forward(x, y, None, *wrong_options, False, False)


# ---- transforms, compilation --------------------------------------------------------------------


def test_transforms(device: str) -> None:
    x = logits(4, 3, 5, device=device).detach()
    y = torch.tensor([0, 1, 2], device=device)

    def f(x: torch.Tensor) -> torch.Tensor:
        return softmax_ext.cross_entropy(x, y, z_loss=0.1)

    def by_torch(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x, y) + 0.1 * x.logsumexp(1).square().mean()

    for transform in (
        torch.vmap,
        lambda f: torch.vmap(torch.func.grad(f)),
        lambda f: lambda x: torch.func.jacrev(f)(x[0]),
        lambda f: lambda x: torch.func.hessian(f)(x[0]),
        lambda f: lambda x: torch.func.jvp(f, (x[0],), (x[1],)),
    ):
        torch.testing.assert_close(transform(f)(x), transform(by_torch)(x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str, device: str) -> None:
    """One graph, training, dynamic shapes; on the CPU on the kernels."""

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss, lse = softmax_ext.cross_entropy(x * 2, y, label_smoothing=0.1, return_lse=True)
        return loss + lse.mean()

    for rows in (3, 6):
        x = logits(rows, 5, dtype=torch.float32, device=device)
        y = torch.arange(rows, device=device) % 5
        found = function(x, y)
        (grad,) = torch.autograd.grad(found, x)
        expected = F.cross_entropy(x * 2, y, label_smoothing=0.1) + (x * 2).logsumexp(1).mean()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(grad, torch.autograd.grad(expected, x)[0])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("layout", ["classes last", "channels last", "contiguous"])
def test_compile_of_layouts(layout: str, dynamic: bool) -> None:
    """The gradient lies as the graph expects it: inductor checks the strides."""
    torch._dynamo.reset()  # what another layout has compiled counts here too

    @torch.compile(fullgraph=True, dynamic=dynamic)
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if layout == "classes last":
            x = x.transpose(1, 2)
        return softmax_ext.cross_entropy(x, y)

    for size in (3, 4):
        if layout == "classes last":
            x, y = torch.randn(2, size, 5), torch.randint(5, (2, size))
        else:
            x, y = torch.randn(2, 5, size, 6), torch.randint(5, (2, size, 6))
        if layout == "channels last":
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        (grad,) = torch.autograd.grad(function(x, y), x)
        z = x.transpose(1, 2) if layout == "classes last" else x
        (expected,) = torch.autograd.grad(F.cross_entropy(z, y), x)
        torch.testing.assert_close(grad, expected)
        if layout != "classes last":
            x = x.detach()
            args = (*saved_by_a_mean(x, y), 1, -100, 0.0, 0.0, 1.0, 0.0)
            torch.library.opcheck(torch.ops.softmax_ext.cross_entropy_backward.default, args)


def saved_by_a_mean(x: torch.Tensor, y: torch.Tensor) -> tuple[Any, ...]:
    """What a backward call of a mean takes before its options."""
    operator = torch.ops.softmax_ext.cross_entropy
    loss, lse, kept, total, _ = operator(x, y, None, 1, -100, 0.0, 0.0, 1.0, 0.0, False, False)
    return torch.ones_like(loss), None, None, x, y, None, lse, kept, total, None


@pytest.mark.parametrize("reduction", [0, 1])
def test_opcheck(reduction: int) -> None:
    x, y = logits(3, 5, dtype=torch.float32), torch.tensor([0, -100, 2])
    operator = torch.ops.softmax_ext.cross_entropy.default
    options = (reduction, -100, 0.1, 0.1, 1.0, 0.0)
    for wants in ((True, False), (False, True)):
        torch.library.opcheck(operator, (x, y, None, *options, *wants))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """In float32, as torch's."""
    x, y = logits(3, 5, dtype=dtype), torch.tensor([0, 1, 2])
    weight = torch.ones(5, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = softmax_ext.cross_entropy(x, y, weight)
        expected = F.cross_entropy(x, y, weight)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    (grad,) = torch.autograd.grad(found, x)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, x)[0])


def test_fake_tensors() -> None:
    with torch._subclasses.FakeTensorMode():
        loss = softmax_ext.cross_entropy(torch.randn(3, 5), torch.tensor([0, 1, 2]))
    assert loss.shape == ()


def test_meta_tensors() -> None:
    x, y = torch.randn(3, 5, device="meta"), torch.zeros(3, dtype=torch.long, device="meta")
    w = torch.randn(7, 5, device="meta")
    for loss in (
        softmax_ext.cross_entropy(x, y),
        softmax_ext.cross_entropy(x, x.softmax(1)),
        softmax_ext.linear_cross_entropy(x, w, y),
        softmax_ext.kl_div_with_logits(x, x * 2),
    ):
        assert loss.is_meta and loss.shape == ()


@pytest.mark.parametrize("weight_dtype", [None, *PROMOTED], ids=str)
@pytest.mark.parametrize("target_dtype", PROMOTED, ids=str)
@pytest.mark.parametrize("dtype", PROMOTED, ids=str)
def test_dtype_of_probabilities_of_another(
    dtype: torch.dtype, target_dtype: torch.dtype, weight_dtype: torch.dtype | None
) -> None:
    x, y = torch.randn(4, 5).to(dtype), torch.rand(4, 5).softmax(1).to(target_dtype)
    weight = None if weight_dtype is None else torch.rand(5).to(weight_dtype)
    expected = F.cross_entropy(x, y, weight)
    found = softmax_ext.cross_entropy(x, y, weight)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_an_ignored_row_of_a_second_gradient() -> None:
    """Its gradient is 0 whatever it holds, also where it can be differentiated again."""
    x = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf]], requires_grad=True)
    for softcap in (None, 5.0):
        loss = softmax_ext.cross_entropy(x, torch.tensor([0, -100]), softcap=softcap)
        plain = torch.autograd.grad(loss, x, retain_graph=True)[0]
        (again,) = torch.autograd.grad(loss, x, create_graph=True)
        torch.testing.assert_close(again, plain)
        assert not plain[1].any()


@pytest.mark.parametrize("argument", ["input", "target"])
def test_what_is_no_tensor(argument: str) -> None:
    tensors: dict[str, Any] = {"input": torch.randn(3, 5), "target": torch.tensor([0, 1, 2])}
    tensors[argument] = None
    with pytest.raises(TypeError, match=f"'{argument}' must be Tensor, not NoneType"):
        softmax_ext.cross_entropy(**tensors)


class Logits(torch.Tensor):
    pass


def test_a_class_that_overrides_functions() -> None:
    x = torch.randn(3, 5).as_subclass(Logits)
    assert type(softmax_ext.cross_entropy(x, torch.tensor([0, 1, 2]))) is Logits


# ---- the module ---------------------------------------------------------------------------------


def test_module() -> None:
    """torch's class with our arguments: state, copies, pickles, equal to the function."""
    weight = torch.rand(5)
    loss = softmax_ext.CrossEntropyLoss(weight, label_smoothing=0.1, z_loss=1e-3, softcap=9.0)
    assert isinstance(loss, torch.nn.CrossEntropyLoss)
    assert list(loss.state_dict()) == ["weight"]
    x, y = logits(3, 5, dtype=torch.float32), torch.tensor([0, 1, 2])
    expected = softmax_ext.cross_entropy(
        x, y, weight, label_smoothing=0.1, z_loss=1e-3, softcap=9.0
    )
    for each in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(each(x, y), expected, rtol=0, atol=0)
    torch.testing.assert_close(
        softmax_ext.CrossEntropyLoss()(x, y), torch.nn.CrossEntropyLoss()(x, y)
    )


MODULES = {
    info.module_cls.__name__: info
    for info in module_db
    if info.module_cls.__name__ in ("CrossEntropyLoss", "LinearCrossEntropyLoss")
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.filterwarnings("ignore:linear_cross_entropy")
@pytest.mark.parametrize("name", MODULES)
def test_torchs_samples_of_modules(name: str, dtype: torch.dtype, device: str) -> None:
    """Ours in the place of torch's: its references' values, its modules' gradients."""
    info = MODULES[name]
    options = {"device": device, "dtype": dtype, "requires_grad": True, "training": True}
    samples = list(info.module_inputs_func(info, **options))
    assert len(samples) > 100
    for sample in samples:
        made = sample.constructor_input
        theirs = info.module_cls(*made.args, **made.kwargs)
        ours = getattr(softmax_ext, name)(*made.args, **made.kwargs)
        ours.load_state_dict(theirs.state_dict())
        kwargs = sample.forward_input.kwargs
        args = [each.detach() for each in sample.forward_input.args]
        args[0].requires_grad_()
        found = ours(*args, **kwargs)
        expected = sample.reference_fn(theirs, *args, **kwargs)
        torch.testing.assert_close(found, expected, equal_nan=True)
        leaves = [args[0], *theirs.parameters()], [args[0], *ours.parameters()]
        by_torch = torch.autograd.grad(theirs(*args, **kwargs).sum(), leaves[0])
        grads = torch.autograd.grad(found.sum(), leaves[1])
        for grad, of_torch in zip(grads, by_torch, strict=True):
            # Small elements of a large gradient are what is left of sums of large ones.
            rtol, atol = (1.3e-6, 1e-5) if dtype == torch.float32 else (1e-7, 1e-7)
            atol += 4 * torch.finfo(dtype).eps * float(of_torch.nan_to_num().norm())
            torch.testing.assert_close(grad, of_torch, rtol=rtol, atol=atol, equal_nan=True)
