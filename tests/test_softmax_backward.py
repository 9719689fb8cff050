"""Gradients of the three functions, of any order, and what autograd keeps and refuses."""

import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from tolerances import FLOATING, OPS, OURS, TORCH, assert_gradient_close

SIZES = {
    1: "the gradient is 0",
    2: "the shortest row that sums",
    7: "a vector of 8 floats, less one",
    16: "an AVX-512 vector of float",
    17: "an AVX-512 vector of float, plus one",
    33: "a warp, or an AVX-512 vector of 16-bit, plus one",
    65: "four vectors plus one",
    1000: "the classes of ImageNet",
    1025: "a block of 1024 threads, plus one",
    2049: "one above a warp's limit",
    4096: "a chunk of the CPU kernel",
    4097: "a chunk of the CPU kernel, plus one",
    32769: "one above a block's limit in registers",
    50257: "the vocabulary of GPT-2: odd",
}


def check_gradient(
    op: str,
    input: torch.Tensor,
    dim: int,
    dtype: torch.dtype | None = None,
    grad_output: torch.Tensor | None = None,
) -> None:
    input = input.detach().requires_grad_()
    output = OURS[op](input, dim, dtype=dtype)
    if grad_output is None:
        grad_output = torch.randn(output.shape, device=input.device).to(output.dtype)
    (grad,) = torch.autograd.grad(output, input, grad_output)
    assert grad.dtype == input.dtype
    assert grad.device == input.device
    assert_gradient_close(grad, op, grad_output, output, dim)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", SIZES)
def test_last_dim(size: int, op: str, dtype: torch.dtype, device: str) -> None:
    check_gradient(op, torch.randn(3, size, device=device).to(dtype), -1)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("inner", [2, 7, 9, 32, 49, 64, 65, 196, 513])  # as in test_forward
@pytest.mark.parametrize("size", [1, 7, 33, 64, 65, 1000])
def test_other_dim(size: int, inner: int, op: str, dtype: torch.dtype, device: str) -> None:
    check_gradient(op, torch.randn(2, size, inner, device=device).to(dtype), 1)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((2**20 + 3,), 0), ((4099, 3), 1), ((1031, 65), 1), ((4097, 65), 0), ((40000, 3), 0)],
    ids=str,
)
def test_work_shared_by_threads(
    shape: tuple[int, ...], dim: int, op: str, dtype: torch.dtype, device: str
) -> None:
    check_gradient(op, torch.randn(shape, device=device).to(dtype), dim)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 5), (2, 3, 4, 5), (2, 3, 2, 4, 3)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_dim_of_every_rank(op: str, shape: tuple[int, ...], device: str) -> None:
    rank = max(len(shape), 1)
    for dim in range(-rank, rank):
        check_gradient(op, torch.randn(shape, device=device), dim)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("op", [*OPS, "softmin"])
def test_empty(op: str, shape: tuple[int, ...], device: str) -> None:
    for dim in range(len(shape)):
        input = torch.empty(shape, device=device, requires_grad=True)
        OURS[op](input, dim).sum().backward()
        assert input.grad is not None
        assert input.grad.shape == shape


@pytest.mark.parametrize("to", FLOATING, ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("shape", "dim"), [((3, 70), 1), ((2, 4099), 1), ((33, 70), 0)], ids=str)
def test_cast(
    shape: tuple[int, ...], dim: int, op: str, dtype: torch.dtype, to: torch.dtype, device: str
) -> None:
    """The gradient comes back in the input's dtype, computed from that of the result's dtype."""
    check_gradient(op, torch.randn(shape, device=device).to(dtype), dim, to)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("size", [9, 1000])
def test_softmin(size: int, dtype: torch.dtype, device: str) -> None:
    input = torch.randn(3, size, device=device).to(dtype).requires_grad_()
    output = OURS["softmin"](input, 1)
    grad_output = torch.randn_like(output)
    (grad,) = torch.autograd.grad(output, input, grad_output)
    assert_gradient_close(-grad, "softmax", grad_output, output, 1)


GRAD_OUTPUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "expanded from one element": lambda g: g.flatten()[0].expand(g.shape),
    "expanded over rows": lambda g: g[:1].expand(g.shape),
    "expanded over the dim": lambda g: g[:, :1].expand(g.shape),
    "transposed": lambda g: g.t().contiguous().t(),
    "every other element": lambda g: torch.stack([g, g], -1).flatten(1)[:, ::2],
    "flipped": lambda g: g.flip(1),
    "unaligned": lambda g: torch.cat([g.flatten()[:1], g.flatten()])[1:].view(g.shape),
    "zeros": torch.zeros_like,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("layout", GRAD_OUTPUTS)
def test_layout_of_grad_output(
    layout: str, dim: int, op: str, dtype: torch.dtype, device: str
) -> None:
    grad_output = GRAD_OUTPUTS[layout](torch.randn(19, 37, device=device).to(dtype))
    check_gradient(op, torch.randn(19, 37, device=device).to(dtype), dim, grad_output=grad_output)


@pytest.mark.parametrize("op", [*OPS, "softmin"])
def test_layout_of_input(op: str, device: str) -> None:
    """The gradient has the strides torch's has, and reaches every element that was expanded."""
    base = torch.randn(6, 8, device=device, dtype=torch.float64)
    views: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(6, 8),
        lambda x: x.view(1, 2, 3, 8).to(memory_format=torch.channels_last),
    ]
    for view in views:
        grads = []
        for functions in (OURS, TORCH):
            leaf = base.clone().requires_grad_()
            input = view(leaf)
            output = functions[op](input, 1)
            weights = torch.arange(output.numel(), device=device).view(output.shape) % 7 - 3.0
            grads.append(torch.autograd.grad((output * weights).sum(), (input, leaf)))
        for ours, theirs in zip(*grads, strict=True):
            assert ours.stride() == theirs.stride()
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", [*OPS, "softmin"])
def test_end_to_end(op: str, dtype: torch.dtype, device: str) -> None:
    """Against the float64 gradient of the input as it is: the output's rounding adds its share."""
    input = torch.randn(11, 101, device=device).to(dtype)
    grad_output = torch.randn(11, 101, device=device).to(dtype)
    grads = []
    for function, x, g in (
        (OURS[op], input, grad_output),
        (TORCH[op], input.double().cpu(), grad_output.double().cpu()),
    ):
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(function(x, 1), x, g)
        grads.append(grad.double().cpu())
    eps = torch.finfo(dtype).eps
    largest = grad_output.double().abs().max().item()
    sum_of_rounding = 101**0.5 * eps * largest
    torch.testing.assert_close(grads[0], grads[1], rtol=4 * eps, atol=sum_of_rounding)


def nontrivial(*shape: int, device: str) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)


DERIVATIVE_CASES = [((5,), 0), ((3, 4), 1), ((3, 4), 0), ((2, 3, 4), 1), ((2, 19), -1), ((), 0)]


@pytest.mark.parametrize(("shape", "dim"), DERIVATIVE_CASES, ids=str)
@pytest.mark.parametrize("op", [*OPS, "softmin"])
def test_gradcheck(op: str, shape: tuple[int, ...], dim: int, device: str) -> None:
    input = nontrivial(*shape, device=device)
    assert torch.autograd.gradcheck(lambda x: OURS[op](x, dim), input)


@pytest.mark.parametrize(("shape", "dim"), DERIVATIVE_CASES, ids=str)
@pytest.mark.parametrize("op", [*OPS, "softmin"])
def test_gradgradcheck(op: str, shape: tuple[int, ...], dim: int, device: str) -> None:
    input = nontrivial(*shape, device=device)
    assert torch.autograd.gradgradcheck(lambda x: OURS[op](x, dim), input)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dim", [0, 1])
def test_gradcheck_of_views(op: str, dim: int, device: str) -> None:
    for view in (torch.t, lambda x: x[:, ::2], lambda x: x[:1].expand(3, 4)):
        input = nontrivial(3, 4, device=device)

        def function(x: torch.Tensor, view: Callable = view) -> torch.Tensor:
            return OURS[op](view(x), dim)

        assert torch.autograd.gradcheck(function, input)
        assert torch.autograd.gradgradcheck(function, input)


@pytest.mark.parametrize("op", OPS)
def test_gradgradcheck_through_a_cast(op: str, device: str) -> None:
    """float32 in, float64 result: exact input steps of 1/64, so that differences are meaningful."""
    step = 2**-6
    input = torch.randn(3, 4, device=device).mul(8).round().div(8).requires_grad_()

    def function(x: torch.Tensor) -> torch.Tensor:
        return OURS[op](x, 1, dtype=torch.float64)

    kwargs = {"eps": step, "atol": 2e-3, "rtol": 2e-2}
    assert torch.autograd.gradcheck(function, input, **kwargs)
    grad_output = torch.randn(3, 4, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(function, input, grad_output, **kwargs)


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=str)
@pytest.mark.parametrize("op", [*OPS, "softmin"])
@pytest.mark.parametrize("dim", [0, 1])
def test_derivatives_up_to_the_third(
    dim: int, op: str, dtype: torch.dtype | None, device: str
) -> None:
    start = torch.randn(4, 5, device=device)
    results = []
    for functions in (OURS, TORCH):
        x = start.clone().requires_grad_()
        value = functions[op](x, dim, dtype=dtype).pow(2).sum()
        derivatives = []
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            assert grad.requires_grad
            derivatives.append(grad)
            value = grad.pow(2).sum()
        results.append(derivatives)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_grad_without_create_graph_has_no_graph(op: str, device: str) -> None:
    x = torch.randn(3, 5, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(OURS[op](x, 1).pow(2).sum(), x)
    assert not grad.requires_grad


@pytest.mark.parametrize("op", [*OPS, "softmin"])
def test_when_a_graph_is_made(op: str, device: str) -> None:
    plain = torch.randn(3, 5, device=device)
    leaf = plain.clone().requires_grad_()
    integers = torch.ones(3, 5, dtype=torch.int32, device=device)
    for input, expected in ((plain, False), (leaf, True), (leaf * 1, True)):
        output = OURS[op](input, 1)
        assert output.requires_grad is expected
        assert (output.grad_fn is not None) is expected
        assert not output.is_leaf or not expected
    assert not OURS[op](integers, 1, dtype=torch.float32).requires_grad
    with torch.no_grad():
        assert not OURS[op](leaf, 1).requires_grad
        with torch.enable_grad():
            assert OURS[op](leaf, 1).requires_grad
    with torch.inference_mode():
        output = OURS[op](leaf, 1)
        assert output.is_inference()
        assert not output.requires_grad
    assert not OURS[op](leaf.detach(), 1).requires_grad


@pytest.mark.parametrize("op", OPS)
def test_inference_tensor_as_input(op: str, device: str) -> None:
    with torch.inference_mode():
        input = torch.randn(3, 5, device=device)
    output = OURS[op](input, 1)
    assert not output.is_inference()
    torch.testing.assert_close(output, TORCH[op](input, 1))


@pytest.mark.parametrize("op", OPS)
def test_gradient_accumulates_in_the_leaf(op: str, device: str) -> None:
    x = torch.randn(3, 5, device=device, requires_grad=True)
    weights = torch.randn(3, 5, device=device)
    (OURS[op](x, 1) * weights).sum().backward()
    assert x.grad is not None
    once = x.grad.clone()
    assert once.abs().max() > 0
    (OURS[op](x, 1) * weights).sum().backward()
    torch.testing.assert_close(x.grad, 2 * once)


@pytest.mark.parametrize("op", OPS)
def test_backward_twice_needs_retain_graph(op: str, device: str) -> None:
    x = torch.randn(3, 5, device=device, requires_grad=True)
    loss = OURS[op](x, 1).pow(2).sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)
    output = OURS[op](x, 1)
    grad_output = torch.randn_like(output)
    torch.autograd.grad(output, x, grad_output)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(output, x, grad_output)


@pytest.mark.parametrize("op", OPS)
def test_output_changed_before_backward(op: str, device: str) -> None:
    """Backward needs the output as it was: an in-place change is refused, as torch's is."""
    x = torch.randn(3, 5, device=device, requires_grad=True)
    output = OURS[op](x, 1)
    with torch.no_grad():
        output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_input_changed_before_backward(op: str, device: str) -> None:
    """Backward does not need the input, so the input is free to change."""
    x = torch.randn(3, 5, device=device, requires_grad=True)
    output = OURS[op](x, 1)
    grad_output = torch.randn_like(output)
    with torch.no_grad():
        x.zero_()
    (grad,) = torch.autograd.grad(output, x, grad_output)
    assert_gradient_close(grad, op, grad_output, output, 1)


@pytest.mark.parametrize("op", OPS)
def test_in_place_op_on_the_output(op: str, device: str) -> None:
    """Under grad mode, too: log_softmax(x).exp_() overwrites what backward needs."""
    x = torch.randn(3, 5, device=device, requires_grad=True)
    output = OURS[op](x, 1).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_hooks(op: str, device: str) -> None:
    x = torch.randn(3, 5, device=device, requires_grad=True)
    seen: list[str] = []

    def on_input(grad: torch.Tensor) -> torch.Tensor:
        seen.append("input")
        return grad * 2

    def on_output(grad: torch.Tensor) -> None:
        seen.append("output")

    x.register_hook(on_input)
    output = OURS[op](x, 1)
    output.register_hook(on_output)
    output.retain_grad()
    grad_output = torch.randn_like(output)
    output.backward(grad_output)
    assert seen == ["output", "input"]
    assert torch.equal(output.grad, grad_output)
    assert x.grad is not None
    assert_gradient_close(x.grad / 2, op, grad_output, output, 1)


@pytest.mark.parametrize("op", OPS)
def test_saved_tensor_hooks(op: str, device: str) -> None:
    """One tensor is saved, the output, and by the hooks that offload or checkpoint it."""
    x = torch.randn(3, 5, device=device, requires_grad=True)
    packed: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = OURS[op](x, 1)
    assert len(packed) == 1
    assert torch.equal(packed[0], output)
    grad_output = torch.randn_like(output)
    (grad,) = torch.autograd.grad(output, x, grad_output)
    assert_gradient_close(grad, op, grad_output, output, 1)


@pytest.mark.parametrize("op", OPS)
def test_checkpoint(op: str, device: str) -> None:
    x = torch.randn(3, 5, device=device, requires_grad=True)
    weights = torch.randn(3, 5, device=device)
    expected = torch.autograd.grad((OURS[op](x, 1) * weights).sum(), x)
    output = torch.utils.checkpoint.checkpoint(OURS[op], x, 1, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad((output * weights).sum(), x), expected)


@pytest.mark.parametrize("op", OPS)
def test_output_is_freed(op: str, device: str) -> None:
    """The graph saves the output without keeping itself alive: no cycle, so no collector needed."""
    x = torch.randn(3, 5, device=device, requires_grad=True)
    gc.disable()
    try:
        output = OURS[op](x, 1)
        alive = weakref.ref(output)
        del output
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("op", OPS)
def test_anomaly_mode(op: str, device: str) -> None:
    x = torch.tensor([[torch.inf, 0.0]], device=device, requires_grad=True)
    with (
        pytest.warns(UserWarning, match="Error detected|Anomaly Detection"),
        torch.autograd.detect_anomaly(),
        pytest.raises(RuntimeError, match="returned nan values"),
    ):
        OURS[op](x, 1).sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_backward_from_several_threads(op: str, device: str) -> None:
    """Each thread runs its own backward; the results are those of one thread."""
    inputs = [torch.randn(63, 517, device=device, requires_grad=True) for _ in range(6)]
    weights = torch.randn(63, 517, device=device)
    expected = [torch.autograd.grad((OURS[op](x, 1) * weights).sum(), x)[0] for x in inputs]
    failures: list[str] = []

    def work(index: int) -> None:
        for _ in range(10):
            x = inputs[index]
            (grad,) = torch.autograd.grad((OURS[op](x, 1) * weights).sum(), x)
            if not torch.equal(grad, expected[index]):
                failures.append(f"thread {index}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("op", OPS)
def test_one_graph_shared_by_threads(op: str, device: str) -> None:
    """Several threads run backward through the same node."""
    x = torch.randn(63, 517, device=device, requires_grad=True)
    output = OURS[op](x, 1)
    grad_output = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, x, grad_output, retain_graph=True)
    grads: list[torch.Tensor] = []

    def work() -> None:
        grads.extend(torch.autograd.grad(output, x, grad_output, retain_graph=True))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(grads) == 4
    assert all(torch.equal(grad, expected) for grad in grads)


@pytest.mark.parametrize("op", OPS)
def test_gradient_of_an_affine_classifier(op: str, device: str) -> None:
    """Through layers before and after, as in training: equal to torch's, parameter by parameter."""
    torch.manual_seed(1)
    model = torch.nn.Linear(8, 10).to(device).double()
    input = torch.randn(32, 8, device=device, dtype=torch.float64)
    target = torch.randint(10, (32,), device=device)
    grads = []
    for functions in (OURS, TORCH):
        model.zero_grad()
        output = functions[op](model(input), 1)
        logs = output if op == "log_softmax" else output.log()
        torch.nn.functional.nll_loss(logs, target).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == 2
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("op", OPS)
def test_masked_elements_get_no_gradient(op: str, device: str) -> None:
    """-inf logits: a gradient of 0 for softmax, and of grad_output for log_softmax."""
    x = torch.randn(4, 37, device=device)
    x[:, ::3] = -torch.inf
    x.requires_grad_()
    output = OURS[op](x, 1)
    grad_output = torch.randn_like(output)
    (grad,) = torch.autograd.grad(output, x, grad_output)
    expected = torch.zeros_like(grad) if op == "softmax" else grad_output
    assert torch.equal(grad[:, ::3], expected[:, ::3])
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dim", [0, 1])
def test_special_values_in_grad_output(dim: int, op: str, dtype: torch.dtype, device: str) -> None:
    """Infinities and NaN spoil their own row and no other, as torch's do."""
    size = 37
    grad_output = torch.randn(size, size, device=device).to(dtype)
    rows = grad_output if dim == 1 else grad_output.t()
    rows[0, 3], rows[1, 36], rows[2, 0] = torch.nan, torch.inf, -torch.inf
    start = torch.randn(size, size, device=device).to(dtype)
    grads = []
    for functions in (OURS, TORCH):
        x = start.clone().requires_grad_()
        (grad,) = torch.autograd.grad(functions[op](x, dim), x, grad_output)
        grads.append(grad)
    ours, theirs = grads
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isinf(), theirs.isinf())
    spoilt = ~ours.isfinite().all(dim)
    assert spoilt.nonzero().flatten().tolist() == [0, 1, 2]
