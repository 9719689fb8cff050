"""What tools see of a call: the node's names and saved tensors, compiled autograd, profiles."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import all_pairs
from tolerances import OPS, OURS, TORCH
from torch._dynamo import compiled_autograd
from torch.profiler import ExecutionTraceObserver, ProfilerActivity, profile

import softmax_ext

IN_PLACE = {"softmax": softmax_ext.softmax_, "log_softmax": softmax_ext.log_softmax_}
MODULES = {"softmax": softmax_ext.Softmax, "log_softmax": softmax_ext.LogSoftmax}


def leaf_of(device: str) -> torch.Tensor:
    return torch.randn(5, 33, device=device, requires_grad=True)


@pytest.mark.parametrize("op", OPS)
def test_names_and_saved_tensors(op: str, device: str) -> None:
    """torch's attributes under torch's names."""
    for dim in (0, -1):
        ours, theirs = (f[op](leaf_of(device), dim) for f in (OURS, TORCH))
        node, torchs = ours.grad_fn, theirs.grad_fn
        assert type(node).__name__ == node.name()
        assert node.name() in repr(node)
        saved = {name for name in dir(torchs) if "_saved_" in name}
        assert saved <= set(dir(node))
        assert node._saved_dim == dim % 2
        assert node._saved_input_dtype == torch.float32
        assert node._saved_result is not None
        assert torch.equal(node._saved_result, ours)
        assert node._saved_result.grad_fn is node
        ours.sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            _ = node._saved_result


@pytest.mark.parametrize("op", OPS)
def test_names_of_the_gradients_node(op: str, device: str) -> None:
    leaf = leaf_of(device)
    y = OURS[op](leaf, 1)
    (grad,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    node: Any = grad.grad_fn
    assert type(node).__name__ == node.name()
    assert torch.equal(node._saved_output, y)
    assert torch.equal(node._saved_grad_output, 2 * y)
    assert node._saved_dim == 1


@pytest.mark.parametrize("op", OPS)
def test_hooks_on_one_saved_tensor(op: str, device: str) -> None:
    """Registered on _raw_saved_result, by code that walks the graph."""
    leaf = leaf_of(device)
    weight = torch.randn_like(leaf)
    (expected,) = torch.autograd.grad(OURS[op](leaf, 1), leaf, weight)
    y = OURS[op](leaf, 1)
    packed: list[torch.Tensor] = []

    def pack(saved: torch.Tensor) -> torch.Tensor:
        packed.append(saved)
        return saved.cpu()

    node: Any = y.grad_fn
    node._raw_saved_result.register_hooks(pack, lambda saved: saved.to(device))
    (found,) = torch.autograd.grad(y, leaf, weight)
    assert len(packed) == 1
    assert torch.equal(found, expected)


def compiled_backward(loss: torch.Tensor) -> None:
    torch._dynamo.reset()
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss.backward()


FORMS = ["function", "in place", "integer input's cast", "view"]


@pytest.mark.parametrize(
    ("op", "forward_pass", "form"),
    all_pairs(list(itertools.product(OPS, ["eager", "compiled"], FORMS))),
)
def test_compiled_autograd(op: str, forward_pass: str, form: str, device: str) -> None:
    """The backward pass as one graph, after an eager and after a compiled forward pass."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        if form == "function":
            return OURS[op](x, 1)
        if form == "integer input's cast":
            return OURS[op](x, 0, dtype=torch.float64)
        scores = x * 1.5
        if form == "view":
            IN_PLACE[op](scores[1:], 1)
            return scores
        return IN_PLACE[op](scores, 1)

    leaf, weight = leaf_of(device), torch.randn(5, 33, device=device)
    (forward(leaf) * weight).sum().backward()
    expected, leaf.grad = leaf.grad, None
    compiled = torch.compile(forward, backend="aot_eager")
    function = compiled if forward_pass == "compiled" else forward
    for _ in range(2):  # the second time by the graph that was kept
        leaf.grad = None
        compiled_backward((function(leaf) * weight).sum())
        torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("op", OPS)
def test_compiled_autograd_with_hooks(op: str, device: str) -> None:
    leaf, weight = leaf_of(device), torch.randn(5, 33, device=device)
    (OURS[op](leaf, 1) * weight).sum().backward()
    expected, leaf.grad = leaf.grad, None
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x * 2, lambda x: x / 2):
        y = OURS[op](leaf, 1)
    compiled_backward((y * weight).sum())
    torch.testing.assert_close(leaf.grad, expected)


CALLS = {
    "function": lambda op, x: OURS[op](x, 1),
    "module": lambda op, x: MODULES[op](1)(x),
    "out": lambda op, x: OURS[op](x.detach(), 1, out=torch.empty_like(x)),
    "in place": lambda op, x: IN_PLACE[op](x * 1, 1),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("op", OPS)
def test_profile_and_execution_trace(op: str, call: str, device: str, tmp_path: Path) -> None:
    """A call and its backward are there, with shapes, and the two are tied together."""
    name = f"softmax_ext::{op}" + ("_" if call == "in place" else "")
    trace = tmp_path / "trace.json"
    observer = ExecutionTraceObserver().register_callback(str(trace))
    leaf = leaf_of(device)
    with profile(
        activities=[ProfilerActivity.CPU],
        record_shapes=True,
        execution_trace_observer=observer,
    ) as record:
        y = CALLS[call](op, leaf)
        if y.requires_grad:
            y.sum().backward()
    observer.unregister_callback()
    events = record.events()
    assert events is not None
    (forward,) = [event for event in events if event.name == name]
    assert forward.input_shapes[0] == [5, 33]
    assert name in {node["name"] for node in json.loads(trace.read_text())["nodes"]}
    if y.requires_grad:
        assert any(event.name == f"softmax_ext::{op}_backward" for event in events)
        (node,) = [event for event in events if event.name == y.grad_fn.name()]
        assert node.sequence_nr == forward.sequence_nr >= 0
