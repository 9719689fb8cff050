"""The modules: torch.nn's in name, repr, state, pickling and results."""

import copy
import inspect
import io
import pickle
import warnings
from typing import Any

import pytest
import torch

import softmax_ext
from softmax_ext.functional.scores import Scores

NAMES = ("Softmax", "LogSoftmax", "Softmin")
ALL = (*NAMES, "Softmax2d")
FUNCTIONS = {"Softmax": "softmax", "LogSoftmax": "log_softmax", "Softmin": "softmin"}


def both(name: str, *args: Any, **kwargs: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    make = (getattr(softmax_ext, name), getattr(torch.nn, name))
    return make[0](*args, **kwargs), make[1](*args, **kwargs)


@pytest.mark.parametrize("dim", [None, 0, 1, -1])
@pytest.mark.parametrize("name", NAMES)
def test_repr_and_state(name: str, dim: int | None) -> None:
    ours, theirs = both(name, dim)
    assert repr(ours) == repr(theirs) == f"{name}(dim={dim})"
    assert ours.state_dict() == theirs.state_dict() == {}
    assert list(ours.parameters()) == list(ours.buffers()) == []
    assert ours.dim == dim
    assert isinstance(ours, torch.nn.Module)
    own = ["inplace"] if name == "Softmin" else ["inplace", "scored"]
    assert ours.__constants__ == [*theirs.__constants__, *own]
    assert repr(both(name, dim=dim)[0]) == repr(theirs)


def test_repr_of_softmax2d() -> None:
    ours, theirs = both("Softmax2d")
    assert repr(ours) == repr(theirs) == "Softmax2d()"
    assert ours.state_dict() == {}


@pytest.mark.parametrize("name", ALL)
def test_signature(name: str) -> None:
    """torch's, typed, `inplace`, and what softmax is told of scores; dim may be a tuple there."""
    ours, theirs = (
        inspect.signature(getattr(package, name), eval_str=True)
        for package in (softmax_ext, torch.nn)
    )
    own = {key: p for key, p in ours.parameters.items() if p.kind is p.KEYWORD_ONLY}
    of_scores = {} if name in ("Softmin", "Softmax2d") else Scores.__annotations__
    assert list(own) == ["inplace", *of_scores]
    assert str(own["inplace"]) == "inplace: bool = False"
    if name == "Softmax2d":  # whose signature in torch is that of Module
        assert ours.parameters == own
    else:
        dim, of_torch = ours.parameters["dim"], theirs.parameters["dim"]
        assert list(ours.parameters) == ["dim", *own]
        assert dim.replace(annotation=of_torch.annotation) == of_torch
        assert dim.annotation == (int | tuple[int, ...] | None if of_scores else int | None)
    for type_ in (getattr(softmax_ext, name), getattr(torch.nn, name)):
        with pytest.raises(TypeError):
            type_(dims=1)
        with pytest.raises(TypeError):
            type_(1, 2)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("name", NAMES)
def test_result_and_gradient(name: str, dim: int, device: str) -> None:
    ours, theirs = both(name, dim)
    input = torch.randn(3, 4, 5, device=device, dtype=torch.float64)
    grad_output = torch.randn(3, 4, 5, device=device, dtype=torch.float64)
    results = []
    for module in (ours, theirs):
        x = input.clone().requires_grad_()
        y = module(x)
        results.append((y, *torch.autograd.grad(y, x, grad_output)))
    torch.testing.assert_close(results[0], results[1])
    function = getattr(softmax_ext, FUNCTIONS[name])
    assert torch.equal(results[0][0], function(input, dim))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 4, 5)], ids=str)
def test_softmax2d(shape: tuple[int, ...], device: str) -> None:
    ours, theirs = both("Softmax2d")
    input = torch.randn(shape, device=device)
    torch.testing.assert_close(ours(input), theirs(input))
    torch.testing.assert_close(ours(input).sum(-3), torch.ones(input.sum(-3).shape, device=device))


@pytest.mark.parametrize("rank", [0, 1, 2, 5])
def test_softmax2d_of_another_rank(rank: int, device: str) -> None:
    for module in both("Softmax2d"):
        with pytest.raises(ValueError, match=f"3D or 4D, got {rank}D"):
            module(torch.randn([2] * rank, device=device))


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_no_dim_warns_as_torch(name: str, rank: int, device: str) -> None:
    input = torch.randn([2, 3, 4, 5][:rank], device=device)
    found = []
    for module in both(name):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = module(input)
        found.append([(str(w.message), w.category, w.filename) for w in caught])
    assert len(found[0]) == 1
    assert found[0] == found[1]
    expected_dim = 0 if rank in (1, 3) else 1
    torch.testing.assert_close(result, getattr(torch.nn, name)(expected_dim)(input))


@pytest.mark.parametrize("name", ALL)
def test_pickle_copy_and_save(name: str, device: str) -> None:
    module = getattr(softmax_ext, name)() if name == "Softmax2d" else both(name, 1)[0]
    input = torch.randn(2, 3, 4, 5, device=device)
    expected = module(input)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for copied in (
        pickle.loads(pickle.dumps(module)),
        copy.copy(module),
        copy.deepcopy(module),
        torch.load(file, weights_only=False),
    ):
        assert type(copied) is type(module)
        assert repr(copied) == repr(module)
        assert torch.equal(copied(input), expected)


@pytest.mark.parametrize("name", NAMES)
def test_state_without_dim(name: str) -> None:
    """A module pickled before it had a dim gets None, as torch's does."""
    for module in both(name, 1):
        state = module.__dict__.copy()
        del state["dim"]
        restored = type(module).__new__(type(module))
        restored.__setstate__(state)
        assert restored.dim is None
        state["dim"] = 2
        restored.__setstate__(state)
        assert restored.dim == 2


def test_in_a_model(device: str) -> None:
    """In nn.Sequential, with hooks, apply, train/eval, dtype and state dict of the whole."""

    def model(package: Any) -> torch.nn.Sequential:
        torch.manual_seed(3)
        return torch.nn.Sequential(
            torch.nn.Linear(6, 4), package.Softmax(dim=1), torch.nn.Linear(4, 3),
            package.LogSoftmax(dim=-1),
        )  # fmt: skip

    ours, theirs = model(softmax_ext).to(device).double(), model(torch.nn).to(device).double()
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    input = torch.randn(5, 6, device=device, dtype=torch.float64)
    torch.testing.assert_close(ours(input), theirs(input))
    torch.testing.assert_close(ours.eval()(input), theirs.eval()(input))

    shapes: list[tuple[int, ...]] = []
    handle = ours[1].register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    ours(input)
    handle.remove()
    assert shapes == [(5, 4)]

    for each in (ours, theirs):
        each(input)[:, 0].sum().backward()
    vectors = [
        torch.nn.utils.parameters_to_vector(p.grad for p in m.parameters()) for m in (ours, theirs)
    ]
    assert vectors[0].abs().max() > 0
    torch.testing.assert_close(vectors[0], vectors[1])


def test_subclass_and_attribute_change(device: str) -> None:
    """dim is read at each call, and a subclass's own extra_repr is used."""

    class Named(softmax_ext.Softmax):
        def extra_repr(self) -> str:
            return f"named, {super().extra_repr()}"

    module = Named(dim=0)
    assert repr(module) == "Named(named, dim=0)"
    input = torch.randn(3, 5, device=device)
    module.dim = 1
    torch.testing.assert_close(module(input), torch.softmax(input, 1))


def test_training_step(device: str) -> None:
    """SGD on log-probabilities lowers the loss by what it does with torch's LogSoftmax."""
    losses = []
    for package in (softmax_ext, torch.nn):
        torch.manual_seed(4)
        model = torch.nn.Sequential(torch.nn.Linear(8, 4), package.LogSoftmax(1)).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        input = torch.randn(64, 8, device=device)
        target = input[:, :4].argmax(1)
        history = []
        for _ in range(30):
            loss = torch.nn.functional.nll_loss(model(input), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[0][-1] < losses[0][0] / 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
