"""Around a call: workers, forked and spawned processes, copies, parametrizations, CUDA graphs."""

import copy
import os
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
    on = softmax_ext.is_enabled()
    leaf = torch.tensor(x).requires_grad_()
    with softmax_ext.enabled():
        y = torch.softmax(leaf, 1)
        y.square().sum().backward()
    connection.send((on, torch.equal(y, softmax_ext.softmax(leaf, 1)), leaf.grad.tolist()))

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
    softmax_ext.enable()
    process.start()
    on, same, grad = ours.recv()
    process.join()
    assert process.exitcode == 0 and same
    assert on is (start == "fork")
    softmax_ext.softmax(leaf, 1).square().sum().backward()
    assert torch.equal(torch.tensor(grad), leaf.grad)
"""


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_workers_and_children(start: str, tmp_path: Path) -> None:
    """A DataLoader's workers, and a child that turns the switch on, as in a fork it is already."""
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    process = run(file, start)
    assert process.returncode == 0, process.stderr


FORKS = """
import os, signal, threading, torch, softmax_ext
torch.set_num_threads(1)  # a child has no others
x = torch.randn(64, 1000)
theirs, ours = torch.softmax(x, 1), softmax_ext.softmax(x, 1)
assert not torch.equal(theirs, ours)

def is_on():
    on = torch.equal(torch.softmax(x, 1), ours)
    assert on or torch.equal(torch.softmax(x, 1), theirs)
    assert softmax_ext.is_enabled() is on
    return on

def of_child(check):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # for a child that waits for ever
        try:
            check()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

def starts_off():
    assert not is_on()
    with softmax_ext.enabled():
        assert is_on()
    assert not is_on()

def starts_on():
    assert is_on()
    with softmax_ext.enabled():
        pass
    assert is_on()
    softmax_ext.disable()
    assert not is_on()

stop, within = threading.Event(), threading.Event()

def hammer():
    while not stop.is_set():
        with softmax_ext.enabled():
            pass

def stay():
    with softmax_ext.enabled():
        within.set()
        stop.wait()

of_child(starts_off)
threads = [threading.Thread(target=f, daemon=True) for f in (hammer, stay)]
threads[0].start()
for _ in range(40):
    of_child(starts_off)
threads[1].start()
within.wait()
assert is_on()
for _ in range(10):
    of_child(starts_off)  # what another thread is within does not go on here

def leaves():
    assert is_on()
    block.__exit__(None, None, None)
    assert not is_on()

for _ in range(10):
    with softmax_ext.enabled() as block:
        of_child(leaves)
softmax_ext.enable()
for _ in range(10):
    of_child(starts_on)
softmax_ext.disable()
stop.set()
for thread in threads:
    thread.join()
assert not is_on()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forks_while_threads_use_the_switch() -> None:
    """A child starts with the switch as the thread that forks has it, and can change it."""
    process = run(FORKS)
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
