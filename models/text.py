"""Text records of every task, and their encoding into token ids and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a position that the loss does not count."""


class EncodingError(ValueError):
    """Records that cannot be turned into examples as asked."""


@dataclass(frozen=True, slots=True)
class Document:
    """Running text, every token of which is learnt."""

    text: str


@dataclass(frozen=True, slots=True)
class Instruct:
    """A prompt and the answer to it; only the answer is learnt."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Choice:
    """A prompt and candidate answers, of which `label` is the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    label: int


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text, or a pair of texts, of class `label`."""

    text: str
    pair: str | None
    label: int


Record = Document | Instruct | Choice | Labelled
R = TypeVar("R", Document, Instruct, Choice, Labelled)


@dataclass(frozen=True, slots=True, eq=False)
class Causal:
    """Token ids (L,) with the labels (L,) of next-token prediction; labels[0] is not counted."""

    input_ids: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Classified:
    """Token ids (L,), their segment ids (L,) if the tokenizer has any, and the class."""

    input_ids: Tensor
    token_type_ids: Tensor | None
    label: int


Example = Causal | Classified


@dataclass(frozen=True, slots=True, eq=False)
class Ranked:
    """The candidates of one `Choice`, each as a causal example, and the index of the right one."""

    candidates: tuple[Causal, ...]
    label: int


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Examples to train on; `ranked` holds all candidates of `Choice` records for evaluation.

    `truncated` counts records that lost tokens to the length limit, `dropped` those that had
    nothing left to learn. `chunks` counts the examples of each record, where one can have several.
    """

    examples: tuple[Example, ...]
    truncated: int
    dropped: int
    ranked: tuple[Ranked, ...] = ()
    chunks: tuple[int, ...] = ()

    @property
    def by_record(self) -> tuple[range, ...]:
        """Indices of the examples that each record became."""
        chunks = self.chunks or (1,) * len(self.examples)
        ends = tuple(accumulate(chunks))
        return tuple(range(end - count, end) for end, count in zip(ends, chunks, strict=True))


def encode(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    bos: bool = True,
    eos: bool = True,
) -> Encoded:
    """Encode records of one kind, all in one call of the fast tokenizer.

    With `bos`, causal examples start with what the tokenizer itself puts before a text or, where
    it puts nothing, with its beginning-of-sequence token if it has one; with `eos` they end with
    the end-of-sequence token. A `Document` longer than `max_length` tokens is cut into chunks that
    overlap by one token, so that every token is predicted exactly once. Prompt and answer are
    tokenised apart, as they are when the model answers. Raises EncodingError on mixed kinds or a
    `max_length` without room.
    """
    if not records:
        return Encoded((), 0, 0)
    kinds = sorted({type(record).__name__ for record in records})
    if len(kinds) > 1:
        raise EncodingError(f"Expected records of one kind, got {', '.join(kinds)}.")
    if isinstance(records[0], Labelled):
        return _encode_labelled(_only(Labelled, records), tokenizer, max_length)
    frame = Frame.of(tokenizer, bos=bos, eos=eos)
    frame.check(max_length)
    if isinstance(records[0], Document):
        return _encode_documents(_only(Document, records), tokenizer, max_length, frame)
    if isinstance(records[0], Instruct):
        return _encode_instructs(_only(Instruct, records), tokenizer, max_length, frame)
    return _encode_choices(_only(Choice, records), tokenizer, max_length, frame)


@dataclass(frozen=True, slots=True)
class Frame:
    """Token ids put before (`head`) and after (`tail`) the tokens of a causal example."""

    head: tuple[int, ...]
    tail: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, bos: bool, eos: bool) -> Frame:
        """Frame that the tokenizer's own conventions ask for."""
        head: tuple[int, ...] = ()
        if bos:
            head = _prefix(tokenizer)
            if not head and tokenizer.bos_token_id is not None:
                head = (int(tokenizer.bos_token_id),)
        tail: tuple[int, ...] = ()
        if eos and tokenizer.eos_token_id is not None:
            tail = (int(tokenizer.eos_token_id),)
        return cls(head, tail)

    def check(self, max_length: int) -> None:
        """Raise EncodingError if `max_length` leaves no room for text."""
        least = max(len(self.head), 1) + 1 + len(self.tail)
        if max_length < least:
            raise EncodingError(
                f"Expected train.max-length of at least {least} with this tokenizer, "
                f"got {max_length}; raise it."
            )


def _only(kind: type[R], records: Sequence[Record]) -> list[R]:
    return [record for record in records if isinstance(record, kind)]


def _prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    plain = _tokens(tokenizer, ["a"])[0]
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Plain token ids of each text, without special tokens."""
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and not backend.padding and not backend.truncation:
        # Skips the offsets and the per-text bookkeeping of __call__: twice as fast.
        found = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]
    encoded = tokenizer(texts, add_special_tokens=False, padding=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _tensors(rows: list[list[int]]) -> list[Tensor]:
    """One int64 tensor per row, all views of one allocation."""
    flat = torch.tensor([token for row in rows for token in row], dtype=torch.long)
    return list(torch.split(flat, [len(row) for row in rows])) if rows else []


def _causal(rows: list[list[int]], counted_from: list[int]) -> tuple[Causal, ...]:
    """Examples of which the labels before position `counted_from` are not counted."""
    examples = []
    for ids, start in zip(_tensors(rows), counted_from, strict=True):
        labels = ids.clone()
        labels[:start] = IGNORED
        examples.append(Causal(ids, labels))
    return tuple(examples)


def _encode_documents(
    records: list[Document], tokenizer: PreTrainedTokenizerBase, max_length: int, frame: Frame
) -> Encoded:
    rows: list[list[int]] = []
    chunks: list[int] = []
    dropped = 0
    for ids in _tokens(tokenizer, [record.text for record in records]):
        whole = [*frame.head, *ids, *frame.tail]
        if not ids or len(whole) < 2:
            dropped += 1
            continue
        step = max_length - 1
        cut = [whole[at : at + max_length] for at in range(0, len(whole) - 1, step)]
        rows.extend(cut)
        chunks.append(len(cut))
    # Of a first chunk, the rest of a longer head (such as "[gMASK]<sop>") is counted too: it is
    # constant, learnt at once, and keeps "one position per example is not counted" simple.
    return Encoded(_causal(rows, [1] * len(rows)), 0, dropped, chunks=tuple(chunks))


@dataclass(frozen=True, slots=True)
class _Room:
    """How many tokens of prompt and answer fit beside the frame."""

    frame: Frame
    max_length: int

    def join(self, prompt: list[int], answer: list[int], longest: int) -> tuple[list[int], int]:
        """Framed ids and the first counted position; `longest` is the answer to make room for."""
        keep = max(0, self.max_length - len(self.frame.head) - longest)
        head = [*self.frame.head, *prompt[max(0, len(prompt) - keep) :]]
        return (head + answer)[: self.max_length], max(len(head), 1)

    def fits(self, prompt: list[int], answer: list[int]) -> bool:
        """Whether nothing has to be cut."""
        return len(self.frame.head) + len(prompt) + len(answer) <= self.max_length


def _encode_instructs(
    records: list[Instruct], tokenizer: PreTrainedTokenizerBase, max_length: int, frame: Frame
) -> Encoded:
    texts = [record.prompt for record in records] + [record.answer for record in records]
    tokens = _tokens(tokenizer, texts)
    prompts, answers = tokens[: len(records)], tokens[len(records) :]
    room = _Room(frame, max_length)
    rows: list[list[int]] = []
    starts: list[int] = []
    truncated = dropped = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        framed = [*answer, *frame.tail]
        row, start = room.join(prompt, framed, len(framed))
        if not answer or start >= len(row):
            dropped += 1
            continue
        truncated += not room.fits(prompt, framed)
        rows.append(row)
        starts.append(start)
    return Encoded(_causal(rows, starts), truncated, dropped)


def _encode_choices(
    records: list[Choice], tokenizer: PreTrainedTokenizerBase, max_length: int, frame: Frame
) -> Encoded:
    texts = [text for record in records for text in (record.prompt, *record.choices)]
    tokens = iter(_tokens(tokenizer, texts))
    room = _Room(frame, max_length)
    ranked: list[Ranked] = []
    truncated = dropped = 0
    for record in records:
        prompt = next(tokens)
        answers = [next(tokens) for _ in record.choices]
        framed = [[*answer, *frame.tail] for answer in answers]
        # The same part of the prompt stands before every candidate, or they could not be compared.
        longest = max(len(answer) for answer in framed)
        joined = [room.join(prompt, answer, longest) for answer in framed]
        if not all(answers) or any(start >= len(row) for row, start in joined):
            dropped += 1
            continue
        truncated += not all(room.fits(prompt, answer) for answer in framed)
        candidates = _causal([row for row, _ in joined], [start for _, start in joined])
        ranked.append(Ranked(candidates, record.label))
    examples = tuple(row.candidates[row.label] for row in ranked)
    return Encoded(examples, truncated, dropped, tuple(ranked))


def _encode_labelled(
    records: list[Labelled], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    encoded = _call_pairs(records, tokenizer, {})
    rows: list[list[int]] = [list(ids) for ids in encoded["input_ids"]]
    types: list[list[int]] | None = encoded.get("token_type_ids")
    long = [index for index, row in enumerate(rows) if len(row) > max_length]
    if long:
        limit = {"truncation": True, "max_length": max_length}
        cut = _call_pairs([records[index] for index in long], tokenizer, limit)
        for at, index in enumerate(long):
            rows[index] = list(cut["input_ids"][at])
            if types is not None:
                types[index] = list(cut["token_type_ids"][at])
    kept = [index for index, row in enumerate(rows) if row]
    ids = _tensors([rows[index] for index in kept])
    segments = None if types is None else _tensors([types[index] for index in kept])
    examples = tuple(
        Classified(ids[at], None if segments is None else segments[at], records[index].label)
        for at, index in enumerate(kept)
    )
    return Encoded(examples, len(long), len(rows) - len(kept))


def _call_pairs(
    records: list[Labelled], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> Any:
    paired = any(record.pair is not None for record in records)
    pairs = [record.pair or "" for record in records] if paired else None
    texts = [record.text for record in records]
    return tokenizer(texts, pairs, padding=False, verbose=False, **options)
