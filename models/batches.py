"""Batches of encoded examples: packed or padded, in an endless reproducible order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.attention import lengths_mask
from models.seeds import derive
from models.text import IGNORED, Causal, Classified, Example


class BatchError(ValueError):
    """Examples that cannot be batched as asked."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Tensors for `model(**inputs)`, labels included, and what they hold.

    `counted` is the number of labels in the loss, `tokens` the tokens computed, padding included,
    `useful` those that are not padding, `rows` the indices of the examples, in their order.
    """

    inputs: dict[str, Tensor]
    counted: int
    tokens: int
    useful: int
    rows: tuple[int, ...]


def pack(lengths: Sequence[int], max_length: int, seed: int) -> list[list[int]]:
    """Group indices of lengths into rows of at most `max_length` tokens, by best-fit decreasing.

    Each length goes, longest first, into the fullest row that still has room (Johnson 1974: at most
    11/9 of the least number of rows, plus one). Equal lengths change places, and rows and their
    contents are ordered, by `seed`; the number of rows depends on the lengths alone. Takes time
    proportional to their number. Raises BatchError on a length that does not fit.
    """
    if any(not 0 < length <= max_length for length in lengths):
        raise BatchError(
            f"Expected examples of 1 to {max_length} tokens, got {min(lengths)} to {max(lengths)}; "
            "encode with the same max_length."
        )
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]
    rooms = 0  # bit r is set when with_room[r] holds a row: finds the fullest in one step
    for index in sorted(shuffled, key=lambda index: -lengths[index]):
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = max_length, len(rows)
            rows.append([])
        rows[row].append(index)
        left = room - length
        if left:
            with_room[left].append(row)
            rooms |= 1 << left
    order = torch.randperm(len(rows), generator=generator).tolist()
    place = {index: at for at, index in enumerate(shuffled)}
    return [sorted(rows[row], key=place.__getitem__) for row in order]


class Batches:
    """An endless stream of batches over a site's examples, reshuffled in every epoch.

    Batch `i` of the stream depends on the examples, the arguments and `i` alone, so that a round
    goes on where the last one stopped, in another process too. With `packing`, a batch holds
    `batch_size` packed rows of up to `max_length` tokens, laid end to end without any padding; the
    model must have been through `models.attention.enable`. Without, it holds `batch_size`
    examples, padded to the longest. The last batch of an epoch may be smaller.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        seed: int,
        pad_id: int,
        packing: bool,
        max_length: int,
        by_record: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Raise BatchError when there is nothing to batch, or classes are to be packed."""
        if not examples:
            raise BatchError(
                "Expected at least one example to train on, got none; check that the rows have "
                "text and fit train.max-length."
            )
        if batch_size < 1:
            raise BatchError(f"Expected a batch size of at least 1, got {batch_size}.")
        if packing and not all(isinstance(example, Causal) for example in examples):
            raise BatchError("Expected causal examples to pack, got classes; set packing off.")
        self._examples = examples
        self._batch_size = batch_size
        self._seed = seed
        self._pad_id = pad_id
        self._packing = packing
        self._max_length = max_length
        # The examples that each record became, by default one.
        self.by_record = by_record or [(index,) for index in range(len(examples))]
        self._lengths = [len(example.input_ids) for example in examples]
        self._plan: tuple[int, list[list[int]]] = (0, self._epoch(0))

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self._plan[1])

    def of_rows(self, rows: Sequence[int], size: int | None = None) -> Iterator[Batch]:
        """The examples of these indices once, in padded batches of like length, longest first.

        Batches hold `size` examples, or `batch_size` where that is None.
        """
        size = size or self._batch_size
        order = sorted(rows, key=lambda row: (-self._lengths[row], row))
        for at in range(0, len(order), size):
            yield _padded(self._examples, order[at : at + size], self._pad_id)

    def take(self, start: int, count: int) -> Iterator[Batch]:
        """Batches `start` to `start + count` of the stream."""
        for at in range(start, start + count):
            epoch, within = divmod(at, len(self))
            if epoch != self._plan[0]:
                self._plan = (epoch, self._epoch(epoch))
            rows = self._plan[1][within]
            if self._packing:
                yield _packed(self._examples, rows)
            else:
                yield _padded(self._examples, rows, self._pad_id)

    def _epoch(self, epoch: int) -> list[list[int]]:
        """Indices of the examples of each batch."""
        size = self._batch_size
        seed = derive(self._seed, "epoch", epoch)
        if self._packing:
            rows = pack(self._lengths, self._max_length, seed)
            groups = [rows[at : at + size] for at in range(0, len(rows), size)]
            return [[index for row in group for index in row] for group in groups]
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = torch.randperm(len(self._examples), generator=generator).tolist()
        return [order[at : at + size] for at in range(0, len(order), size)]


def eval_batches(examples: Sequence[Example], batch_size: int, pad_id: int) -> Iterator[Batch]:
    """Every example once, in padded batches of like length, longest first.

    The longest first, so that a batch too large for the memory shows at once.
    """
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index].input_ids))
    for at in range(0, len(order), batch_size):
        yield _padded(examples, order[at : at + batch_size], pad_id)


def _packed(examples: Sequence[Example], rows: list[int]) -> Batch:
    chosen = [example for index in rows if isinstance(example := examples[index], Causal)]
    lengths = [len(example.input_ids) for example in chosen]
    labels = torch.cat([example.labels for example in chosen])
    inputs = {
        "input_ids": torch.cat([example.input_ids for example in chosen])[None],
        "attention_mask": lengths_mask(lengths),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "labels": labels[None],
    }
    total = sum(lengths)
    return Batch(inputs, int((labels != IGNORED).sum()), total, total, tuple(rows))


def _padded(examples: Sequence[Example], rows: list[int], pad_id: int) -> Batch:
    chosen = [examples[index] for index in rows]
    ids = [example.input_ids for example in chosen]
    inputs = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }
    causal = [example for example in chosen if isinstance(example, Causal)]
    classes = [example for example in chosen if isinstance(example, Classified)]
    if causal and classes:
        raise BatchError("Expected examples of one kind, got causal ones and classes.")
    if causal:
        labels = [example.labels for example in causal]
        inputs["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    else:
        inputs["labels"] = torch.tensor([example.label for example in classes])
        types = [row.token_type_ids for row in classes if row.token_type_ids is not None]
        if types:
            inputs["token_type_ids"] = pad_sequence(types, batch_first=True)
    counted = int((inputs["labels"] != IGNORED).sum())
    useful = sum(len(row) for row in ids)
    return Batch(inputs, counted, inputs["input_ids"].numel(), useful, tuple(rows))
