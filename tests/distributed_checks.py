"""What test_distributed.py runs in each of its processes: rank, world size, a file to meet at, and
one to write to, by check, what went wrong.

Each check compares what all ranks have together with what one process has of the whole.
"""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.parallel import DistributedDataParallel

import softmax_ext

WORLD = 2
CHECKS: dict[str, Callable[[int], None]] = {}
FUNCTIONS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "softmax": (softmax_ext.softmax, F.softmax),
    "log_softmax": (softmax_ext.log_softmax, F.log_softmax),
    "softmin": (softmax_ext.softmin, F.softmin),
}


def check(function: Callable[[int], None]) -> Callable[[int], None]:
    CHECKS[function.__name__] = function
    return function


def model(package: Any) -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), package.Softmax(1), torch.nn.Linear(8, 4), package.LogSoftmax(1)
    )


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randn(8, 6), torch.randint(4, (8,))


def one_step(trained: torch.nn.Module, x: torch.Tensor, target: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.5)
    F.nll_loss(trained(x), target).backward()
    optimizer.step()


def whole_step() -> list[torch.Tensor]:
    """The parameters after a step of torch's model on the whole batch, in one process."""
    trained = model(torch.nn)
    one_step(trained, *batch())
    return [parameter.detach() for parameter in trained.parameters()]


def train(wrap: Callable[[torch.nn.Module], torch.nn.Module], package: Any, rank: int) -> None:
    x, target = (part.chunk(WORLD)[rank] for part in batch())
    trained = wrap(model(package))
    one_step(trained, x, target)
    for found, expected in zip(trained.parameters(), whole_step(), strict=True):
        whole = found.full_tensor() if isinstance(found, DTensor) else found
        torch.testing.assert_close(whole.detach(), expected)


def shard(module: torch.nn.Module) -> torch.nn.Module:
    for layer in module:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=MESH)
    return fully_shard(module, mesh=MESH)


@check
def ddp(rank: int) -> None:
    train(DistributedDataParallel, softmax_ext, rank)


@check
def ddp_with_the_switch(rank: int) -> None:
    with softmax_ext.enabled():
        train(DistributedDataParallel, torch.nn, rank)


@check
def fsdp2(rank: int) -> None:
    train(shard, softmax_ext, rank)


@check
def fsdp2_with_the_switch(rank: int) -> None:
    with softmax_ext.enabled():
        train(shard, torch.nn, rank)


def on_dtensors(functions: int) -> None:
    """0: ours, 1: torch's. The sharded dim, which must be gathered, and others, which need not."""
    torch.manual_seed(3)
    x, weights = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
    for pair in FUNCTIONS.values():
        for dim in (0, 1, 2, -1):
            leaf = x.clone().requires_grad_()
            y = pair[1](leaf, dim)
            (grad,) = torch.autograd.grad((y * weights).sum(), leaf)
            for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
                local = distribute_tensor(x, MESH, [placement]).requires_grad_()
                found = pair[functions](local, dim)
                assert isinstance(found, DTensor)
                assert found.placements == pair[1](local, dim).placements
                torch.testing.assert_close(found.full_tensor(), y)
                loss = (found * distribute_tensor(weights, MESH, [placement])).sum()
                (local_grad,) = torch.autograd.grad(loss, local)
                torch.testing.assert_close(local_grad.full_tensor(), grad)


@check
def dtensor(rank: int) -> None:
    on_dtensors(0)


@check
def dtensor_with_the_switch(rank: int) -> None:
    with softmax_ext.enabled():
        on_dtensors(1)


@check
def dtensor_in_place(rank: int) -> None:
    torch.manual_seed(3)
    x = torch.randn(4, 6, 8)
    for dim in (0, 1, 2):
        for placement in (Shard(0), Shard(1), Replicate()):
            local = distribute_tensor(x.clone(), MESH, [placement])  # which may share memory
            assert softmax_ext.softmax_(local, dim) is local
            assert local.placements == (placement,)
            torch.testing.assert_close(local.full_tensor(), F.softmax(x, dim))


def loss_over_sharded_classes() -> None:
    torch.manual_seed(4)
    logits, target = torch.randn(6, 10), torch.randint(10, (6,))
    leaf = logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf, target)
    expected.backward()
    sharded = distribute_tensor(logits, MESH, [Shard(1)]).requires_grad_()
    with loss_parallel():
        loss = F.cross_entropy(sharded, target)
        loss.backward()
    torch.testing.assert_close(loss.full_tensor(), expected)
    torch.testing.assert_close(sharded.grad.full_tensor(), leaf.grad)


@check
def loss_parallel_with_the_switch(rank: int) -> None:
    with softmax_ext.enabled():
        loss_over_sharded_classes()


if __name__ == "__main__":
    rank, (meeting, report) = int(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    MESH = init_device_mesh("cpu", (WORLD,))
    errors = {}
    for name, function in CHECKS.items():
        try:
            function(rank)
            errors[name] = ""
        except Exception:
            errors[name] = traceback.format_exc()
        dist.barrier()
    Path(report).write_text(json.dumps(errors))
    dist.destroy_process_group()
