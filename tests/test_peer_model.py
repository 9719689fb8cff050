"""Models of another library, unchanged, with the switch on: the same logits and gradients."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import softmax_ext

transformers = pytest.importorskip("transformers", reason="pip install softmax_ext[test]")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library and of torch's compiler
        yield
    torch._dynamo.reset()


def bert() -> torch.nn.Module:
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=211,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="eager",
        )
    )


def gpt2() -> torch.nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=211,
            n_positions=64,
            n_embd=64,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="eager",
        )
    )


def step(model: torch.nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Logits, loss and all gradients."""
    model.zero_grad()
    result: Any = model(input_ids=tokens, attention_mask=mask, labels=tokens)
    result.loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [result.logits.detach(), result.loss.detach(), *(g.clone() for g in grads)]


@pytest.mark.parametrize("make", [bert, gpt2], ids=lambda make: make.__name__)
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_a_training_step(how: str, make: Any, device: str) -> None:
    torch.manual_seed(0)
    model = make().to(device)
    tokens = torch.randint(1, 211, (3, 48), device=device)
    mask = torch.ones_like(tokens)
    mask[1, 40:] = 0
    expected = step(model, tokens, mask)
    run = torch.compile(model, backend="aot_eager") if how == "compiled" else model
    with softmax_ext.enabled():
        found = step(run, tokens, mask)
    assert len(found) == len(expected) > 20
    torch.testing.assert_close(found, expected)
    # The kernels did run: some bit is another.
    assert any(not torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("make", [bert, gpt2], ids=lambda make: make.__name__)
def test_the_loss_of_a_model(make: Any) -> None:
    """Its cross-entropy is one call of the kernels, forward and backward."""
    tokens = torch.randint(1, 211, (3, 48))
    with softmax_ext.enabled():
        loss = make()(input_ids=tokens, labels=tokens).loss
    assert loss.grad_fn.name() == "SoftmaxExtCrossEntropyBackward"
