"""Head, middle and tail compute what the whole model computes, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from models.section import ConfigError
from models.split import cut
from tests.models.split.families import CAUSAL, ENCODERS, batch, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("head", "tail"), [(1, 1), (2, 1)])
@pytest.mark.parametrize("family", CAUSAL + ENCODERS)
def test_cut_is_whole(family: str, head: int, tail: int) -> None:
    whole = tiny(family)
    parts = cut(copy.deepcopy(whole), head, tail)
    given = batch(family)
    labels, mask = given["labels"], given["attention_mask"]
    expected = whole(**given)
    expected.loss.backward()

    hidden = parts.middle(parts.head(given["input_ids"], mask), mask)
    found = parts.tail.output(hidden, mask, labels=labels)
    found.loss.backward()
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(parts.tail(hidden, mask), expected.logits)
    assert float(found.loss) == float(expected.loss)

    gradients = {
        part.name_in_whole(name): parameter.grad
        for part in parts
        for name, parameter in part.named_parameters()
    }
    for name, parameter in whole.named_parameters():
        assert parameter.grad is not None and gradients[name] is not None, name
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", CAUSAL)
def test_a_tied_embedding_stays_one_tensor(family: str) -> None:
    model = tiny(family, tie_word_embeddings=True)
    parts = cut(model)
    embedding = next(iter(parts.head.model.get_input_embeddings().parameters()))
    assert parts.tail.model.get_output_embeddings().weight is embedding
    assert not any(parameter is embedding for parameter in parts.middle.parameters())


@pytest.mark.parametrize("family", CAUSAL + ENCODERS)
def test_each_part_holds_its_own_alone(family: str) -> None:
    whole = tiny(family)
    names = [name for name, _ in whole.named_parameters()]
    parts = cut(copy.deepcopy(whole))
    own = [{p.name_in_whole(name) for name, _ in p.named_parameters()} for p in parts]
    assert own[0] | own[1] | own[2] >= set(names)
    assert not own[1] & (own[0] | own[2])
    middle = {name for name in names if ".1." in name or ".2." in name}
    assert {name for name in own[1]} == {name for name in middle if _of_a_block(name)}


def _of_a_block(name: str) -> bool:
    return any(f".{blocks}." in f".{name}" for blocks in ("layers", "h", "layer"))


@pytest.mark.parametrize("family", CAUSAL)
def test_parts_generate_with_caches_of_their_own(family: str) -> None:
    whole = tiny(family)
    parts = cut(copy.deepcopy(whole))
    ids = batch(family)["input_ids"][:1]
    expected = whole.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    caches = [DynamicCache(config=part.model.config) for part in parts]
    text = new = ids
    with torch.no_grad():
        for _ in range(6):
            hidden = new
            for part, cache in zip(parts, caches, strict=True):
                hidden = part(hidden, past_key_values=cache, use_cache=True)
            new = hidden[:, -1:].argmax(-1)
            text = torch.cat([text, new], dim=1)
    assert torch.equal(text, expected)
    assert [len(cache.layers) for cache in caches] == [1, 2, 1]


def test_too_few_blocks_are_refused() -> None:
    for head, tail in ((2, 2), (0, 1), (1, 0), (5, 1)):
        with pytest.raises(ConfigError, match=rf"of 4, got split.head-blocks={head} and .*={tail}"):
            cut(tiny("llama"), head, tail)


def test_other_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="whose blocks can be cut, got a GPTNeoXForCausalLM"):
        cut(tiny("gpt_neox"))
    with pytest.raises(ConfigError, match="whose blocks can be cut, got a Linear"):
        cut(nn.Linear(2, 2))
