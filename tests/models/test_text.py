"""Labels count exactly what is to be learnt, and nothing is lost unsaid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from models.text import (
    IGNORED,
    Causal,
    Choice,
    Classified,
    Document,
    EncodingError,
    Instruct,
    Labelled,
    Record,
    encode,
)

STORIES = Path(__file__).parents[3] / "shared" / "data" / "models" / "stories260K"


def byte_tokenizer(*, bos: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """A token per byte, so that lengths can be counted by hand; ids follow the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>"]
    vocabulary = {token: at for at, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>"} if bos else {}
    names |= {"eos_token": "</s>"} if eos else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """A word tokenizer in BERT's manner, with segment ids."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "play"]
    backend = Tokenizer(WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def causal(examples: tuple[Causal | Classified, ...]) -> list[Causal]:
    """The examples, known to be causal."""
    found = [example for example in examples if isinstance(example, Causal)]
    assert len(found) == len(examples)
    return found


def counted(example: Causal) -> str:
    """The counted labels as text."""
    kept = example.labels[example.labels != IGNORED]
    return str(byte_tokenizer().decode(kept))


def test_document_is_framed_and_all_but_its_first_token_is_counted() -> None:
    (example,) = causal(encode([Document("abc")], byte_tokenizer(), 16).examples)
    assert byte_tokenizer().decode(example.input_ids) == "<s>abc</s>"
    assert example.labels[0] == IGNORED
    assert example.labels[1:].equal(example.input_ids[1:])


def test_without_frame_or_special_tokens_a_document_is_its_text() -> None:
    bare = encode([Document("abc")], byte_tokenizer(), 16, bos=False, eos=False).examples
    none = encode([Document("abc")], byte_tokenizer(bos=False, eos=False), 16).examples
    for (example,) in (causal(bare), causal(none)):
        assert byte_tokenizer().decode(example.input_ids) == "abc"
        assert counted(example) == "bc"


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="abcdefgh", min_size=1, max_size=80), st.integers(3, 20))
def test_every_token_of_a_long_document_is_predicted_exactly_once(text: str, limit: int) -> None:
    encoded = encode([Document(text)], byte_tokenizer(), limit)
    examples = causal(encoded.examples)
    assert "".join(counted(example) for example in examples) == text + "</s>"
    assert all(2 <= len(example.input_ids) <= limit for example in examples)
    assert all(example.labels[0] == IGNORED for example in examples)
    assert (encoded.truncated, encoded.dropped) == (0, 0)


def test_empty_document_is_dropped_and_counted() -> None:
    encoded = encode([Document(""), Document("a")], byte_tokenizer(), 8)
    assert (len(encoded.examples), encoded.dropped) == (1, 1)


def test_only_the_answer_and_its_end_are_counted() -> None:
    (example,) = causal(encode([Instruct("ask:", "yes")], byte_tokenizer(), 32).examples)
    assert byte_tokenizer().decode(example.input_ids) == "<s>ask:yes</s>"
    assert counted(example) == "yes</s>"


@pytest.mark.parametrize(
    ("limit", "text", "learnt"),
    [
        (11, "<s>prompt:OK</s>", "OK</s>"),  # 1 + 7 + 2 + 1 = 11: fits
        (8, "<s>mpt:OK</s>", "OK</s>"),  # the prompt loses its left end
        (4, "<s>OK</s>", "OK</s>"),
        (3, "<s>OK", "OK"),  # the answer loses its right end
    ],
)
def test_prompt_gives_way_from_the_left_before_the_answer(
    limit: int, text: str, learnt: str
) -> None:
    encoded = encode([Instruct("prompt:", "OK")], byte_tokenizer(), limit)
    (example,) = causal(encoded.examples)
    assert byte_tokenizer().decode(example.input_ids) == text
    assert counted(example) == learnt
    assert encoded.truncated == (limit < 11)


def test_first_position_is_never_counted_even_without_prompt_and_bos() -> None:
    tokenizer = byte_tokenizer(bos=False)
    for limit in (3, 32):
        (example,) = causal(encode([Instruct("", "answer")], tokenizer, limit).examples)
        assert example.labels[0] == IGNORED
        assert (example.labels != IGNORED).sum() == len(example.input_ids) - 1


def test_row_without_answer_is_dropped_and_counted() -> None:
    encoded = encode([Instruct("p", ""), Instruct("p", "a")], byte_tokenizer(), 8)
    assert (len(encoded.examples), encoded.truncated, encoded.dropped) == (1, 0, 1)


def test_choice_trains_on_the_right_answer_and_keeps_all() -> None:
    encoded = encode([Choice("q:", ("no", "maybe"), 1)], byte_tokenizer(), 32)
    (example,) = causal(encoded.examples)
    assert counted(example) == "maybe</s>"
    (ranked,) = encoded.ranked
    assert [counted(candidate) for candidate in ranked.candidates] == ["no</s>", "maybe</s>"]
    assert ranked.label == 1


def test_candidates_stand_behind_the_same_part_of_a_long_prompt() -> None:
    encoded = encode([Choice("prompt:", ("a", "four"), 0)], byte_tokenizer(), 9)
    texts = [byte_tokenizer().decode(c.input_ids) for c in encoded.ranked[0].candidates]
    assert texts == ["<s>pt:a</s>", "<s>pt:four</s>"]
    assert encoded.truncated == 1


def test_choice_with_an_empty_candidate_is_dropped() -> None:
    encoded = encode([Choice("q", ("a", ""), 0)], byte_tokenizer(), 9)
    assert (encoded.examples, encoded.ranked, encoded.dropped) == ((), (), 1)


def test_labelled_uses_the_tokenizers_own_pairs() -> None:
    records = [Labelled("good film", "bad play", 1), Labelled("good", "bad", 0)]
    encoded = encode(records, pair_tokenizer(), 16)
    first = encoded.examples[0]
    assert isinstance(first, Classified) and first.token_type_ids is not None
    assert first.input_ids.tolist() == [2, 4, 6, 3, 5, 7, 3]
    assert first.token_type_ids.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert [e.label for e in encoded.examples if isinstance(e, Classified)] == [1, 0]


def test_long_labelled_text_is_cut_with_its_frame_kept() -> None:
    records = [Labelled("good film good film", None, 1), Labelled("bad", None, 0)]
    encoded = encode(records, pair_tokenizer(), 4)
    assert [example.input_ids.tolist() for example in encoded.examples] == [[2, 4, 6, 3], [2, 5, 3]]
    assert (encoded.truncated, encoded.dropped) == (1, 0)


def test_mixed_kinds_and_too_short_a_limit_are_refused() -> None:
    mixed: list[Record] = [Document("a"), Instruct("a", "b")]
    with pytest.raises(EncodingError, match=r"one kind, got Document, Instruct"):
        encode(mixed, byte_tokenizer(), 8)
    with pytest.raises(EncodingError, match=r"train.max-length of at least 3 .* got 2"):
        encode([Document("a")], byte_tokenizer(), 2)
    assert encode([], byte_tokenizer(), 8).examples == ()


def test_tokenizer_with_a_frame_of_its_own_gets_it_once() -> None:
    if not STORIES.is_dir():
        pytest.skip("needs ../shared/data/models/stories260K")
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    text = "Once upon a time there was a girl."
    (example,) = causal(encode([Document(text)], tokenizer, 64).examples)
    assert example.input_ids.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert (example.input_ids == tokenizer.bos_token_id).sum() == 1


def test_batch_encoding_equals_encoding_one_by_one() -> None:
    records = [Instruct("p" * n, "a" * (n % 5)) for n in range(20)]
    whole = causal(encode(records, byte_tokenizer(), 12).examples)
    single = [e for r in records for e in causal(encode([r], byte_tokenizer(), 12).examples)]
    assert len(whole) == len(single) == 16
    for one, other in zip(whole, single, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.labels, other.labels)
