"""The attacks recover what is there to recover, and nothing where there is nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from privacy.audit.inversion import (
    IGNORED,
    Decoder,
    Guard,
    Seen,
    clipped_and_noised,
    nearest_embedding,
    share_recovered,
)

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS, WIDTH = 50, 16
EMBEDDING = torch.randn(WORDS, WIDTH, generator=torch.Generator().manual_seed(0))


def rows(number: int, seed: int, head: Guard | None = None) -> Seen:
    """Random words behind a head; by default it is the embedding and no more."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (number, 12), generator=generator)
    lengths = torch.randint(3, 13, (number,), generator=generator).sort().values
    mask = (torch.arange(12) < lengths[:, None]).long()
    hidden = EMBEDDING[ids]
    return Seen(head(hidden) if head else hidden, mask, ids.masked_fill(mask == 0, IGNORED))


def nothing(hidden: Tensor) -> Tensor:
    return hidden


def noise(seed: int) -> Guard:
    """What tells nothing of the hidden states."""
    generator = torch.Generator().manual_seed(seed)
    return lambda hidden: torch.randn(hidden.shape, generator=generator)


def trained(public: Seen, guard: Guard, epochs: int) -> Decoder:
    decoder = Decoder(EMBEDDING, heads=2)
    decoder.learn(public, guard, epochs=epochs, generator=torch.Generator().manual_seed(1))
    return decoder


def test_an_embedding_alone_hides_nothing() -> None:
    held_out = rows(60, 2)
    assert share_recovered(nearest_embedding(EMBEDDING), held_out, nothing) > 0.98
    decoder = trained(rows(200, 3), nothing, epochs=3)
    assert share_recovered(decoder.recover, held_out, nothing) > 0.98


def test_a_head_that_turns_everything_around_hides_nothing_from_a_trained_decoder() -> None:
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(4)))[0]

    def head(hidden: Tensor) -> Tensor:
        return hidden @ turn

    held_out = rows(60, 2, head)
    assert share_recovered(nearest_embedding(EMBEDDING), held_out, nothing) < 0.2
    decoder = trained(rows(400, 3, head), nothing, epochs=15)
    assert share_recovered(decoder.recover, held_out, nothing) > 0.9


def test_pure_noise_gives_no_more_than_chance() -> None:
    held_out = rows(200, 2)
    decoder = trained(rows(200, 3), noise(5), epochs=3)
    tokens = int((held_out.ids != IGNORED).sum())
    most = 1 / WORDS + 5 * (1 / WORDS / tokens) ** 0.5  # five standard deviations above chance
    assert share_recovered(decoder.recover, held_out, noise(6)) < most
    assert share_recovered(nearest_embedding(EMBEDDING), held_out, noise(6)) < most
    assert 1 / WORDS < held_out.chance() < 0.04


def test_noise_is_as_large_as_it_says() -> None:
    hidden = 3 * torch.nn.functional.normalize(torch.ones(4, 1000, 8), dim=-1)
    given = clipped_and_noised(2.0, 0.5, torch.Generator().manual_seed(0))(hidden)
    expected = hidden * 2 / 3
    assert float((given - expected).std()) == pytest.approx(1.0, rel=0.02)
    short = clipped_and_noised(2.0, 0.0, torch.Generator())(hidden / 3)
    assert torch.allclose(short, hidden / 3)


def test_batches_hold_every_row_once_without_common_padding() -> None:
    seen = rows(70, 8)
    batches = list(seen.batches(torch.Generator().manual_seed(0)))
    assert sum(len(batch.ids) for batch in batches) == 70
    assert {batch.ids.shape[1] for batch in batches} != {12}
    total = sum(int((batch.ids != IGNORED).sum()) for batch in batches)
    assert total == int((seen.ids != IGNORED).sum())
    again = list(seen.batches(torch.Generator().manual_seed(0)))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(batches, again, strict=True))
