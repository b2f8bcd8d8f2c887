"""Packed documents do not see each other, and the stream of batches is reproducible."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from models import attention
from models.batches import Batch, BatchError, Batches, eval_batches, pack
from models.text import IGNORED, Causal, Classified, Example

STORIES = Path(__file__).parents[3] / "shared" / "data" / "models" / "stories260K"
WORDS = 97


def documents(count: int, seed: int = 0, longest: int = 40) -> list[Example]:
    """Random causal examples of 2 to `longest` tokens."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Example] = []
    for _ in range(count):
        length = int(torch.randint(2, longest + 1, (), generator=generator))
        ids = torch.randint(3, WORDS, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3 + 1] = IGNORED
        found.append(Causal(ids, labels))
    return found


def classes(count: int) -> list[Example]:
    """Random classified examples with segment ids."""
    ids = [example.input_ids for example in documents(count)]
    return [Classified(row, torch.ones_like(row), at % 3) for at, row in enumerate(ids)]


def stream(examples: list[Example], *, packing: bool, seed: int = 0, size: int = 3) -> Batches:
    """Batches of the examples with this file's usual settings."""
    return Batches(examples, batch_size=size, seed=seed, pad_id=0, packing=packing, max_length=40)


def llama() -> PreTrainedModel:
    """A random grouped-query Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
    )
    model: PreTrainedModel = LlamaForCausalLM(config)
    model.eval()
    return model


def gpt2() -> PreTrainedModel:
    """A random GPT-2, which has learnt positions."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=WORDS, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.4
    )
    model: PreTrainedModel = GPT2LMHeadModel(config)
    model.eval()
    return model


def mistral() -> PreTrainedModel:
    """A random Mistral whose sliding window is shorter than the documents."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        initializer_range=0.4,
    )
    model: PreTrainedModel = MistralForCausalLM(config)
    model.eval()
    return model


def stories() -> PreTrainedModel:
    """The real pretrained model, where it is at hand."""
    if not STORIES.is_dir():
        pytest.skip("needs ../shared/data/models/stories260K")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    model.eval()
    return model


@pytest.mark.parametrize("build", [llama, gpt2, mistral, stories])
@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_logits_equal_those_of_each_document_alone(build: object, use_cache: bool) -> None:
    assert callable(build)
    model = build()
    examples = documents(12)
    with torch.no_grad():
        alone = [model(input_ids=example.input_ids[None]).logits[0] for example in examples]
        assert attention.enable(model)
        for batch in stream(examples, packing=True).take(0, 2):
            logits = model(**batch.inputs, use_cache=use_cache).logits[0]
            expected = torch.cat([alone[row] for row in batch.rows])
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_packed_gradients_equal_those_of_padded_batches(build: object) -> None:
    assert callable(build)
    examples = documents(9)
    grads = []
    for packing in (True, False):
        model = build()
        assert attention.enable(model)
        size = 99 if packing else 9
        (batch,) = stream(examples, packing=packing, size=size).take(0, 1)
        assert sorted(batch.rows) == list(range(9))
        model(**batch.inputs).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-5, msg=name)


def test_document_cannot_see_its_neighbour() -> None:
    model = llama()
    assert attention.enable(model)
    first, second = documents(2, longest=10)
    other = Causal(first.input_ids.flip(0), torch.full_like(first.input_ids, IGNORED))
    logits = []
    for left in (first, other):
        (batch,) = stream([left, second], packing=True).take(0, 1)
        with torch.no_grad():
            out = model(**batch.inputs).logits[0]
        lengths = [len([left, second][row].input_ids) for row in batch.rows]
        logits.append(dict(zip(batch.rows, out.split(lengths), strict=True)))
    assert torch.equal(logits[0][1], logits[1][1])
    assert not torch.allclose(logits[0][0], logits[1][0])


def test_model_that_was_not_enabled_fails_on_a_packed_batch() -> None:
    (batch,) = stream(documents(4), packing=True).take(0, 1)
    with pytest.raises(RuntimeError):
        llama()(**batch.inputs)


def test_enabled_model_treats_padded_batches_as_before() -> None:
    (batch,) = stream(documents(5), packing=False, size=5).take(0, 1)
    model = llama()
    with torch.no_grad():
        before = model(**batch.inputs)
        assert attention.enable(model) and attention.enable(model)
        after = model(**batch.inputs)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)


def test_model_that_cannot_keep_documents_apart_is_left_as_it_was() -> None:
    model = llama()
    model.set_attn_implementation("eager")
    assert not attention.enable(model)
    assert model.config._attn_implementation == "eager"

    leaky = llama()
    original = leaky.forward

    def forward(*args: object, **inputs: object) -> object:
        ids = inputs["input_ids"]
        assert isinstance(ids, torch.Tensor)
        out = original(*args, **inputs)
        out.logits = out.logits + ids.cumsum(-1)[..., None]
        return out

    leaky.forward = forward
    assert not attention.enable(leaky)
    assert leaky.config._attn_implementation == "sdpa"


def test_saved_model_does_not_name_this_attention(tmp_path: Path) -> None:
    model = llama()
    assert attention.enable(model)
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 32), max_size=60), st.integers(0, 9))
def test_packing_holds_each_once_within_the_limit_and_near_the_least_rows(
    lengths: list[int], seed: int
) -> None:
    rows = pack(lengths, 32, seed)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 32 for row in rows)
    assert rows == pack(lengths, 32, seed)
    assert len(rows) == len(pack(lengths, 32, seed + 1))
    # Of any two rows one is more than half full, or they would have been one.
    assert len(rows) <= -(-2 * sum(lengths) // 32)
    assert len(rows) == len(naive_best_fit(lengths, 32))


def naive_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Free room of each row after best-fit decreasing, by looking through all rows each time."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(capacity - length)
    return rooms


def test_packing_puts_the_worked_example_into_three_full_rows() -> None:
    rows = pack([6, 5, 5, 4, 7, 3], 10, seed=3)
    assert sorted(sorted([6, 5, 5, 4, 7, 3][i] for i in row) for row in rows) == [
        [3, 7],
        [4, 6],
        [5, 5],
    ]


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(BatchError, match=r"1 to 8 tokens, got 3 to 9"):
        pack([3, 9], 8, 0)


def test_packing_a_hundred_thousand_takes_no_time() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 513, (100_000,), generator=generator).tolist()
    start = time.process_time()
    rows = pack(lengths, 512, 0)
    assert time.process_time() - start < 3.0
    assert sum(lengths) / (512 * len(rows)) > 0.99


@pytest.mark.parametrize("packing", [True, False])
def test_stream_is_the_same_however_it_is_taken(packing: bool) -> None:
    examples = documents(23)
    whole = [batch.rows for batch in stream(examples, packing=packing).take(0, 30)]
    other = stream(examples, packing=packing)
    pieces = [b.rows for start in (20, 0, 10) for b in other.take(start, 10)]
    assert pieces == whole[20:] + whole[:20]
    assert whole != [b.rows for b in stream(examples, packing=packing, seed=1).take(0, 30)]


@pytest.mark.parametrize("packing", [True, False])
def test_epoch_holds_every_example_once_and_the_next_is_in_another_order(packing: bool) -> None:
    examples = documents(23)
    batches = stream(examples, packing=packing)
    epochs = [
        [row for batch in batches.take(epoch * len(batches), len(batches)) for row in batch.rows]
        for epoch in range(3)
    ]
    assert all(sorted(rows) == list(range(23)) for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("packing", [True, False])
def test_counts_match_the_tensors(packing: bool) -> None:
    examples = documents(17)
    for batch in stream(examples, packing=packing).take(0, 6):
        chosen = [example for row in batch.rows if isinstance(example := examples[row], Causal)]
        assert batch.counted == sum(int((e.labels != IGNORED).sum()) for e in chosen)
        assert batch.useful == sum(len(e.input_ids) for e in chosen)
        assert batch.tokens == batch.inputs["input_ids"].numel() >= batch.useful
        assert (batch.tokens == batch.useful) or not packing


def test_padding_is_masked_and_not_counted() -> None:
    short = Causal(torch.tensor([5, 6]), torch.tensor([IGNORED, 6]))
    long = Causal(torch.tensor([7, 8, 9]), torch.tensor([IGNORED, 8, 9]))
    (batch,) = stream([short, long], packing=False, size=2).take(0, 1)
    at = batch.rows.index(0)
    assert batch.inputs["input_ids"][at].tolist() == [5, 6, 0]
    assert batch.inputs["attention_mask"][at].tolist() == [1, 1, 0]
    assert batch.inputs["labels"][at].tolist() == [IGNORED, 6, IGNORED]
    assert (batch.counted, batch.useful, batch.tokens) == (3, 5, 6)


def test_classes_are_padded_with_their_segments() -> None:
    examples = classes(7)
    seen: Counter[int] = Counter()
    for batch in stream(examples, packing=False).take(0, 3):
        assert batch.inputs["labels"].tolist() == [row % 3 for row in batch.rows]
        assert batch.counted == len(batch.rows)
        types = batch.inputs["token_type_ids"]
        assert types.sum() == batch.useful
        assert torch.equal(types, batch.inputs["attention_mask"])
        seen.update(batch.rows)
    assert seen == Counter(range(7))


def test_evaluation_takes_every_example_once_longest_first() -> None:
    examples = documents(20)
    batches: list[Batch] = list(eval_batches(examples, 6, 0))
    assert [len(batch.rows) for batch in batches] == [6, 6, 6, 2]
    assert sorted(row for batch in batches for row in batch.rows) == list(range(20))
    widths = [batch.inputs["input_ids"].shape[1] for batch in batches]
    assert widths == sorted(widths, reverse=True)
    assert list(eval_batches([], 6, 0)) == []


def test_rows_by_their_indices_are_taken_once_longest_first() -> None:
    lengths = [3, 9, 5, 7, 5]
    examples = [Causal(torch.arange(1, n + 1), torch.arange(1, n + 1)) for n in lengths]
    stream = Batches(examples, batch_size=2, seed=0, pad_id=0, packing=False, max_length=16)
    assert [list(own) for own in stream.by_record] == [[0], [1], [2], [3], [4]]
    assert [batch.rows for batch in stream.of_rows([4, 0, 2, 1])] == [(1, 2), (4, 0)]
    assert [batch.rows for batch in stream.of_rows([4, 0, 2], size=1)] == [(2,), (4,), (0,)]
    assert list(stream.of_rows([])) == []


def test_unusable_examples_are_refused() -> None:
    with pytest.raises(BatchError, match=r"at least one example"):
        stream([], packing=False)
    with pytest.raises(BatchError, match=r"set packing off"):
        stream(classes(2), packing=True)
    with pytest.raises(BatchError, match=r"batch size of at least 1, got 0"):
        stream(documents(2), packing=False, size=0)
    with pytest.raises(BatchError, match=r"of one kind"):
        list(stream([*documents(1), *classes(1)], packing=False).take(0, 1))
