"""Graph attention: which community is a node of, from its own noisy features and its neighbours'?

A layer of Veličković et al., "Graph attention networks" (arXiv 1710.10903): a node is the weighted
mean of its neighbours, by weights that are a softmax over the edges that end in it. Every node has
another number of those, so the weights of all edges side by side are a softmax over segments. The
network is trained with segment_softmax, and with a composition of torch's operators in its place.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, elu, leaky_relu

from softmax_ext import segment_softmax

COMMUNITIES, NODES, FEATURES = 4, 4000, 16
NEAR, FAR = 20.0, 4.0  # edges that a node has on average into its own community, and into others

Softmax = Callable[[Tensor, Tensor], Tensor]


class Graph:
    """A stochastic block model: the edges are sorted by the node that they end in, `ptr` says where
    those of each begin, and each node has one to itself."""

    def __init__(self) -> None:
        self.labels = torch.randint(COMMUNITIES, (NODES,))
        same = self.labels[:, None] == self.labels
        probability = torch.where(same, NEAR * COMMUNITIES / NODES, FAR / NODES)
        linked = torch.rand(NODES, NODES) < probability
        linked.fill_diagonal_(True)
        self.target, self.source = linked.nonzero().unbind(1)
        self.ptr = torch.cat([torch.zeros(1, dtype=torch.int64), linked.sum(1).cumsum(0)])
        centers = torch.randn(COMMUNITIES, FEATURES)
        self.features = 0.5 * centers[self.labels] + torch.randn(NODES, FEATURES)


class GraphAttention(nn.Module):
    """From (nodes, inputs) to (nodes, heads * size)."""

    def __init__(self, inputs: int, heads: int, size: int, softmax: Softmax) -> None:
        super().__init__()
        self.heads, self.softmax = heads, softmax
        self.project = nn.Linear(inputs, heads * size, bias=False)
        self.of_source = nn.Parameter(torch.randn(heads, size) / size**0.5)
        self.of_target = nn.Parameter(torch.randn(heads, size) / size**0.5)

    def forward(self, x: Tensor, graph: Graph) -> Tensor:
        nodes = self.project(x).view(len(x), self.heads, -1)
        by_source, by_target = (nodes * self.of_source).sum(-1), (nodes * self.of_target).sum(-1)
        scores = leaky_relu(by_source[graph.source] + by_target[graph.target], 0.2)
        weights = self.softmax(scores, graph.ptr)  # (edges, heads)
        messages = nodes[graph.source] * weights[:, :, None]
        return torch.zeros_like(nodes).index_add(0, graph.target, messages).flatten(1)


class Classifier(nn.Module):
    def __init__(self, softmax: Softmax) -> None:
        super().__init__()
        self.first = GraphAttention(FEATURES, 8, 4, softmax)
        self.second = GraphAttention(32, 1, COMMUNITIES, softmax)

    def forward(self, x: Tensor, graph: Graph) -> Tensor:
        logits: Tensor = self.second(elu(self.first(x, graph)), graph)
        return logits


def composition(scores: Tensor, ptr: Tensor) -> Tensor:
    """The same by torch's operators, as graph libraries have it."""
    owner = torch.repeat_interleave(ptr.diff())
    index = owner[:, None].expand_as(scores)
    segments = scores.new_zeros(len(ptr) - 1, scores.size(1))
    largest = (segments - torch.inf).scatter_reduce(0, index, scores.detach(), "amax")
    e = (scores - largest.gather(0, index)).exp()
    return e / segments.scatter_add(0, index, e).gather(0, index)


def train(graph: Graph, softmax: Softmax, epochs: int) -> tuple[list[float], float]:
    """The loss of each epoch, and the accuracy on the nodes that no loss has seen."""
    torch.manual_seed(1)
    model = Classifier(softmax)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    seen = torch.rand(NODES) < 0.1
    losses = []
    for _ in range(epochs):
        optimizer.zero_grad()
        loss = cross_entropy(model(graph.features, graph)[seen], graph.labels[seen])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        right = model(graph.features, graph).argmax(1) == graph.labels
    return losses, float(right[~seen].float().mean())


def milliseconds(softmax: Softmax, graph: Graph, heads: int = 8) -> float:
    """Of one forward and backward pass: the least of twenty."""
    scores = torch.randn(len(graph.source), heads, requires_grad=True)
    grad = torch.randn_like(scores)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        torch.autograd.grad(softmax(scores, graph.ptr), scores, grad)
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def main(epochs: int = 60) -> float:
    """Train twice, print the losses and the speed, and return the accuracy, from 0 to 1."""
    torch.manual_seed(0)
    graph = Graph()
    print(f"{NODES} nodes, {len(graph.source)} edges")
    losses, accuracy = train(graph, segment_softmax, epochs)
    expected, expected_accuracy = train(graph, composition, epochs)
    print("epoch  segment_softmax  composition")
    for epoch in range(9, epochs, 10):
        print(f"{epoch + 1:5d}  {losses[epoch]:15.4f}  {expected[epoch]:11.4f}")
    torch.testing.assert_close(losses, expected, rtol=1e-2, atol=1e-3)
    print(f"accuracy {accuracy:.3f}, by the composition {expected_accuracy:.3f}")
    ours, theirs = milliseconds(segment_softmax, graph), milliseconds(composition, graph)
    print(f"softmax, forward and backward: {ours:.2f} ms, by the composition {theirs:.2f} ms")
    return accuracy


if __name__ == "__main__":
    main()
