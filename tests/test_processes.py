"""Around a call: workers, forked and spawned processes, copies, parametrizations, CUDA graphs."""

import copy
import multiprocessing
from typing import Any

import pytest
import torch
from tolerances import OPS, OURS, TORCH
from torch.utils.data import DataLoader, Dataset

import softmax_ext


class Rows(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return softmax_ext.softmax(torch.arange(40000.0).view(8, -1) * (index + 1) / 1000, -1)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_workers(start: str) -> None:
    """Their kernels run after those of this process, whose threads a fork does not have."""
    rows = Rows()
    expected = torch.stack([rows[k] for k in range(8)])
    loader = DataLoader(rows, batch_size=4, num_workers=2, multiprocessing_context=start)
    assert torch.equal(torch.cat(list(loader)), expected)


def child(connection: Any, x: Any) -> None:
    with softmax_ext.enabled():
        leaf = torch.tensor(x).requires_grad_()
        y = torch.softmax(leaf, 1)
        y.square().sum().backward()
        assert leaf.grad is not None
        same = torch.equal(y, softmax_ext.softmax(leaf, 1))
        connection.send((same, leaf.grad.tolist()))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_child_process_with_the_switch(start: str) -> None:
    x = torch.randn(4, 300)
    leaf = x.clone().requires_grad_()
    OURS["softmax"](leaf, 1).square().sum().backward()
    context = multiprocessing.get_context(start)
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs, x.tolist()))
    process.start()
    same, grad = ours.recv()
    process.join()
    assert process.exitcode == 0
    assert same
    assert leaf.grad is not None
    assert torch.equal(torch.tensor(grad), leaf.grad)


def test_deep_copies(device: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), softmax_ext.Softmax(1)).to(device)
    x = torch.randn(5, 4, device=device)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    y = softmax_ext.softmax(x, 1)
    assert torch.equal(copy.deepcopy(y), y)


@pytest.mark.parametrize("op", OPS)
def test_parametrization(op: str, device: str) -> None:
    """A weight that is a softmax of what is trained."""

    class Rows(torch.nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.function = function

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return self.function(weight, 1)

    grads = []
    for function in (OURS[op], TORCH[op]):
        torch.manual_seed(1)
        layer = torch.nn.Linear(6, 3, bias=False).to(device)
        torch.nn.utils.parametrize.register_parametrization(layer, "weight", Rows(function))
        layer(torch.ones(2, 6, device=device)).square().sum().backward()
        grads.append(layer.parametrizations.weight.original.grad)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("op", OPS)
def test_cuda_graph_and_side_stream(op: str, device: str) -> None:
    if device != "cuda":
        pytest.skip("of a GPU")
    x = torch.randn(64, 1000, device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = OURS[op](x, 1)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, OURS[op](x, 1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = OURS[op](x, 1)
    x.normal_()
    graph.replay()
    assert torch.equal(y, OURS[op](x, 1))
