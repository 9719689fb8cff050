"""Around a call: workers, forked and spawned processes, copies, parametrizations, CUDA graphs."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_threads_and_isa import run
from tolerances import OPS, OURS, TORCH

import softmax_ext

# A process of its own: a fork of one with threads, such as that of the tests, may wait for ever.
SCRIPT = """
import multiprocessing, sys, torch, softmax_ext
from torch.utils.data import DataLoader, Dataset

class Rows(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        x = torch.arange(40000.0).view(8, -1) * (index + 1) / 1000
        return softmax_ext.softmax(x, -1)

def child(connection, x):
    leaf = torch.tensor(x).requires_grad_()
    with softmax_ext.enabled():
        y = torch.softmax(leaf, 1)
        y.square().sum().backward()
    connection.send((torch.equal(y, softmax_ext.softmax(leaf, 1)), leaf.grad.tolist()))

if __name__ == "__main__":
    start, rows = sys.argv[1], Rows()
    # The kernels of this process come first, with threads that a fork does not have.
    expected = torch.stack([rows[k] for k in range(8)])
    loader = DataLoader(rows, batch_size=4, num_workers=2, multiprocessing_context=start)
    assert torch.equal(torch.cat(list(loader)), expected)

    leaf = torch.randn(4, 300, requires_grad=True)
    context = multiprocessing.get_context(start)
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs, leaf.tolist()))
    process.start()
    same, grad = ours.recv()
    process.join()
    assert process.exitcode == 0 and same
    softmax_ext.softmax(leaf, 1).square().sum().backward()
    assert torch.equal(torch.tensor(grad), leaf.grad)
"""


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_workers_and_children(start: str, tmp_path: Path) -> None:
    """A DataLoader's workers, and a child process that turns the switch on."""
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    process = run(file, start)
    assert process.returncode == 0, process.stderr


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


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("op", OPS)
def test_cuda_graph_and_side_stream(op: str, device: str) -> None:
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
