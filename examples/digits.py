"""Handwritten digits, learned twice: by torch's softmax and cross-entropy, then by softmax_ext's.

The classifier reads an image row by row, as eight tokens, through one layer of attention (softmax)
and learns by cross-entropy. Both trainings start from one seed and see the same batches, so both
must go the same way: if they do not, the program says so and exits with status 1.
Then it times both implementations, turn and turn about, and draws all of it as a PNG.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import softmax_ext

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WIDTH = 32
BATCH = 64
LOSS_TOLERANCE = 1e-4  # of the first loss; rounding alone moves it by about 1e-7
ACCURACY_TOLERANCE = 0.005  # two images of the test set
WIDE = 0.2  # quartiles of a ratio this far apart, in ratios, leave little of its second digit
BUSY = 0.25  # cores in use by other programs
SPEED_SHAPES = ((8, 64), (4096, 16), (4096, 128), (1024, 1024), (64, 50257))
EXAMPLES = ("ordinary", "ordinary", "least certain", "next to least certain")
COLORS = {"torch": "#ee4c2c", "softmax_ext": "#1f6f8b"}


class Implementation(NamedTuple):
    name: str
    softmax: Callable[..., Tensor]
    log_softmax: Callable[..., Tensor]
    cross_entropy: type[nn.CrossEntropyLoss]


TORCH = Implementation(
    "torch",
    torch.nn.functional.softmax,
    torch.nn.functional.log_softmax,
    nn.CrossEntropyLoss,
)
OURS = Implementation(
    "softmax_ext", softmax_ext.softmax, softmax_ext.log_softmax, softmax_ext.CrossEntropyLoss
)


class Digits(NamedTuple):
    """Images of shape (n, 8, 8) from 0 to 1, and labels of shape (n,)."""

    train_x: Tensor
    test_x: Tensor
    train_y: Tensor
    test_y: Tensor


class Timing(NamedTuple):
    """Median seconds a call of both; quartiles of torch's time over softmax_ext's."""

    shape: str
    op: str
    what: str
    torch: float
    softmax_ext: float
    low: float
    ratio: float
    high: float


class Speed(NamedTuple):
    timings: list[Timing]
    others: float | None  # cores in use by other programs meanwhile, if the system says


class Result(NamedTuple):
    losses: list[float]  # mean over the training set, one an epoch
    accuracies: list[float]  # on the test set, from 0 to 1, one an epoch
    probabilities: Tensor  # (test images, 10)
    seconds: float


class RowReader(nn.Module):
    """Logits of shape (n, 10) from images of shape (n, 8, 8)."""

    def __init__(self, implementation: Implementation) -> None:
        super().__init__()
        self.softmax = implementation.softmax
        self.token = nn.Linear(8, WIDTH)
        self.position = nn.Parameter(0.1 * torch.randn(8, WIDTH))
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Sequential(nn.Linear(8 * WIDTH, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        x = self.token(images) + self.position
        query, key, value = self.query_key_value(x).chunk(3, dim=-1)
        attention = self.softmax(query @ key.transpose(1, 2) / WIDTH**0.5, dim=-1)
        logits: Tensor = self.head((x + attention @ value).flatten(1))
        return logits


def load(device: str) -> Digits:
    digits = load_digits()
    parts = train_test_split(
        torch.tensor(digits.images / 16, dtype=torch.float32, device=device),
        torch.tensor(digits.target, device=device),
        test_size=0.25,
        random_state=0,
    )
    return Digits(*parts)


def train(implementation: Implementation, digits: Digits, epochs: int, seed: int) -> Result:
    torch.manual_seed(seed)
    device = digits.train_x.device
    model = RowReader(implementation).to(device)
    cross_entropy = implementation.cross_entropy()
    cross_entropy = implementation.cross_entropy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses: list[float] = []
    accuracies: list[float] = []
    start = time.perf_counter()
    progress = tqdm(range(epochs), desc=f"{implementation.name:>11}", unit="epoch", ncols=88)
    for _ in progress:
        total = torch.zeros((), device=device)
        for batch in torch.randperm(len(digits.train_x)).to(device).split(BATCH):
            optimizer.zero_grad()
            loss = cross_entropy(model(digits.train_x[batch]), digits.train_y[batch])
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(batch)
        with torch.no_grad():
            probabilities = implementation.softmax(model(digits.test_x), dim=-1)
        losses.append(total.item() / len(digits.train_x))
        accuracies.append((probabilities.argmax(1) == digits.test_y).float().mean().item())
        progress.set_postfix_str(f"loss {losses[-1]:.4f}, accuracy {accuracies[-1]:.3f}")
    return Result(losses, accuracies, probabilities.cpu(), time.perf_counter() - start)


def differences(a: Result, b: Result) -> tuple[float, float]:
    """The largest distance of the two loss curves, in first losses, and of the accuracies."""
    loss = (torch.tensor(a.losses) - torch.tensor(b.losses)).abs().max() / a.losses[0]
    return loss.item(), abs(a.accuracies[-1] - b.accuracies[-1])


def print_training(results: dict[str, Result]) -> None:
    names = list(results)
    print("\nepoch" + "".join(f"{name + ' loss':>19}{'accuracy':>10}" for name in names))
    epochs = len(results[names[0]].losses)
    for epoch in sorted({0, epochs // 8, epochs // 4, epochs // 2, epochs - 1}):
        cells = [f"{r.losses[epoch]:19.6f}{r.accuracies[epoch]:10.4f}" for r in results.values()]
        print(f"{epoch + 1:5d}" + "".join(cells))


def pick(probabilities: Tensor) -> list[int]:
    """The images that EXAMPLES names."""
    return [0, 1, *probabilities.max(1).values.argsort()[:2].tolist()]


def print_probabilities(probabilities: Tensor, labels: Tensor) -> None:
    block = "\N{FULL BLOCK}"
    try:
        block.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        block = "#"
    print("\nClass probabilities by softmax_ext, the three highest:")
    for example, i in zip(EXAMPLES, pick(probabilities), strict=True):
        print(f"\n  {example}, a {int(labels[i])}")
        for p, digit in zip(*(t.tolist() for t in probabilities[i].topk(3)), strict=True):
            print(f"    {digit}  {block * round(40 * p):40}  {p:6.1%}")


def call_seconds(function: Callable[..., Tensor], x: Tensor, grad: Tensor, calls: int) -> float:
    """Mean seconds a call; with the backward pass if x requires grad."""
    synchronize = torch.cuda.synchronize if x.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        y = function(x, dim=-1)
        if x.requires_grad:
            torch.autograd.grad(y, x, grad)
    synchronize()
    return (time.perf_counter() - start) / calls


def compare(op: str, x: Tensor, pairs: int = 11) -> Timing:
    """Time both, turn and turn about, each pair in the other order; quartiles over the pairs."""
    functions: list[Callable[..., Tensor]] = [getattr(TORCH, op), getattr(OURS, op)]
    grad = torch.randn_like(x)
    once = max(call_seconds(function, x, grad, 3) for function in functions)
    calls = max(1, int(0.005 / once))
    times: list[list[float]] = [[], []]
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            times[which].append(call_seconds(functions[which], x, grad, calls))
    ratios = [a / b for a, b in zip(*times, strict=True)]
    what = "forward + backward" if x.requires_grad else "forward"
    shape = "x".join(map(str, x.shape))
    medians = map(statistics.median, times)
    return Timing(shape, op, what, *medians, *statistics.quantiles(ratios, n=4))


def others_seconds() -> float | None:
    """CPU time that all programs but this one have had so far, where the system tells (Linux)."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def compare_all(device: str) -> Speed:
    timings = []
    start, before = time.perf_counter(), others_seconds()
    for shape in tqdm(SPEED_SHAPES, desc=f"{'speed':>11}", unit="shape", ncols=88):
        x = torch.randn(shape, device=device)
        for op in ("softmax", "log_softmax"):
            timings.append(compare(op, x))
            timings.append(compare(op, x.detach().requires_grad_()))
    after = others_seconds()
    if before is None or after is None:
        return Speed(timings, None)
    return Speed(timings, max(0.0, after - before) / (time.perf_counter() - start))


def doubts(speed: Speed) -> list[str]:
    """Why the figures are not to be relied on: nothing, on a quiet machine."""
    wide = sum((t.high - t.low) / t.ratio > WIDE for t in speed.timings)
    notes = []
    if speed.others is not None and speed.others > BUSY:
        notes.append(
            f"This machine is busy: other programs used {speed.others:.1f} of its {os.cpu_count()} "
            "cores meanwhile."
        )
    if wide:
        notes.append(
            f"{wide} of the {len(speed.timings)} ratios have quartiles more than {WIDE:.0%} apart."
        )
    return [*notes, "Run it again when the machine is quiet."] if notes else []


def print_speed(speed: Speed) -> None:
    print("\nMicroseconds a call, float32, median of paired runs, and of their ratios:\n")
    print(f"{'':66}{'torch / softmax_ext':>21}")
    print(f"{'shape':>10}  {'':32}{'torch':>9}{'softmax_ext':>13}{'median':>8}{'quartiles':>13}")
    for t in speed.timings:
        print(
            f"{t.shape:>10}  {t.op + ' ' + t.what:32}{1e6 * t.torch:9.1f}"
            f"{1e6 * t.softmax_ext:13.1f}{t.ratio:8.2f}{t.low:8.2f} - {t.high:.2f}"
        )
    print("".join(f"\n{note}" for note in doubts(speed)))


def draw(
    results: dict[str, Result], digits: Digits, speed: Speed, path: Path, machine: str
) -> None:
    figure = plt.figure(figsize=(13, 8.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    loss_axes, accuracy_axes, speed_axes = top.subplots(1, 3, width_ratios=(1, 1, 1.2))

    for name, width, style in (("torch", 6.0, "-"), ("softmax_ext", 1.8, "--")):
        line = {"color": COLORS[name], "lw": width, "ls": style, "label": name}
        line["alpha"] = 0.45 if name == "torch" else 1.0
        epochs = range(1, len(results[name].losses) + 1)
        loss_axes.plot(epochs, results[name].losses, **line)
        accuracy_axes.plot(epochs, results[name].accuracies, **line)
    loss_axes.set(title="training loss", xlabel="epoch", yscale="log")
    accuracy_axes.set(title="test accuracy", xlabel="epoch")
    loss_axes.legend()
    accuracy_axes.legend(loc="lower right")

    softmax_timings = [t for t in speed.timings if t.op == "softmax"][::-1]
    labels = [f"{t.shape}\n{t.what}" for t in softmax_timings]
    bars = speed_axes.barh(
        labels,
        [t.ratio for t in softmax_timings],
        xerr=[
            [t.ratio - t.low for t in softmax_timings],
            [t.high - t.ratio for t in softmax_timings],
        ],
        color=COLORS["softmax_ext"],
    )
    speed_axes.bar_label(bars, fmt="%.2f", padding=3)
    speed_axes.axvline(1, color=COLORS["torch"], lw=2)
    speed_axes.set(title="softmax: time of torch / time of softmax_ext")
    speed_axes.set(xlabel="median, and a line between the quartiles")
    speed_axes.tick_params(axis="y", labelsize=8)
    speed_axes.margins(x=0.15)

    probabilities = results["softmax_ext"].probabilities
    axes = bottom.subplots(2, len(EXAMPLES), height_ratios=(1.6, 1))
    for column, i in enumerate(pick(probabilities)):
        image, chart = axes[:, column]
        image.imshow(digits.test_x[i].cpu(), cmap="gray_r")
        image.set(title=f"{EXAMPLES[column]}: a {int(digits.test_y[i])}", xticks=[], yticks=[])
        chart.bar(range(10), probabilities[i], color=COLORS["softmax_ext"])
        chart.set(ylim=(0, 1), xticks=range(10), yticks=(0, 1))
        chart.spines[["top", "right"]].set_visible(False)
    figure.suptitle("\n".join([machine, *doubts(speed)[:1]]))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("digits.png"))
    arguments = parser.parse_args()

    built = softmax_ext.build_info()
    on_gpu = torch.cuda.is_available() and "cuda" in built.devices
    device = "cuda" if on_gpu else "cpu"
    processor = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    machine = f"torch {torch.__version__}, {device} ({processor})"
    print(f"Handwritten digits, {machine}\n")

    digits = load(device)
    results = {i.name: train(i, digits, arguments.epochs, arguments.seed) for i in (TORCH, OURS)}
    print_training(results)
    loss, accuracy = differences(*results.values())
    print(f"\nlargest difference of the loss curves: {loss:.1e} of the first loss")
    print(f"difference of the final accuracies:    {accuracy:.4f}")
    if not (loss <= LOSS_TOLERANCE and accuracy <= ACCURACY_TOLERANCE):
        sys.exit("The two trainings differ: softmax_ext does not compute what torch computes.")
    print_probabilities(results["softmax_ext"].probabilities, digits.test_y)

    speed = compare_all(device)
    print_speed(speed)
    draw(results, digits, speed, arguments.output, machine)
    print(f"\nAll of it as a picture: {arguments.output}")


if __name__ == "__main__":
    main()
