"""No vector leaves a site without clipping and noise, and none goes uncounted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as within
from hypothesis import strategies as st
from torch import Tensor

from models.section import ConfigError
from models.split import cut
from models.split.link import FrameLink, Frames
from models.split.messages import Kind
from models.split.noise import NoisyLink, Norms, clipped
from models.split.schedule import sequential
from models.split.step import SiteStep
from tests.models.split.families import tiny
from tests.models.split.sites import LIMITS, linked, settings, shortened
from tests.models.split.test_step import batches

pytestmark = pytest.mark.usefixtures("one_thread")


@within(max_examples=25, deadline=None)
@given(norm=st.floats(1e-6, 1e6), scale=st.floats(1e-6, 1e6), seed=st.integers(0, 99))
def test_vectors_are_cut_to_the_norm_and_keep_their_direction(
    norm: float, scale: float, seed: int
) -> None:
    vectors = scale * torch.randn(4, 7, generator=torch.Generator().manual_seed(seed))
    vectors[0] = 0
    found = clipped(vectors, norm)
    before = vectors.double().norm(dim=-1)
    assert bool((found.norm(dim=-1) <= norm * (1 + 1e-12)).all())
    torch.testing.assert_close(found.norm(dim=-1), before.clamp(max=norm))
    torch.testing.assert_close(
        found * before[:, None], vectors * found.norm(dim=-1)[:, None].double()
    )


class Recorded:
    """A stand-in for noise that is known: adds one to every value, and keeps what it was given."""

    def __init__(self) -> None:
        self.given: list[tuple[Tensor, float]] = []

    def __call__(self, vectors: Tensor, norm: float) -> Tensor:
        self.given.append((vectors, norm))
        return vectors + 1


def test_all_that_leaves_is_noisy_and_counted() -> None:
    parts, recorded, sent = cut(tiny("llama")), Recorded(), []
    round_ = sequential([parts.middle], ["ann"], settings())

    def listening(frames: Frames) -> Frames:
        def overheard() -> Frames:
            for frame in frames:
                sent.append(LIMITS.decode(frame))
                yield frame

        return round_.serve("ann", overheard())

    batch = shortened(next(batches("llama")), 1)
    mask = batch.inputs["attention_mask"]
    with FrameLink(listening, LIMITS) as plain:
        link = NoisyLink(plain, Norms(0.5, 0.01), recorded)
        SiteStep(parts.head, parts.tail, link, iter([batch]))()
        link.step(1).result(timeout=20)
        hidden = parts.head(batch.inputs["input_ids"], mask)
        link.score(9, hidden, mask).result(timeout=20)
    count = int(mask.sum())
    assert count < mask.numel()
    assert [m.kind for m in sent] == [Kind.FORWARD, Kind.BACKWARD, Kind.STEP, Kind.SCORE]
    given = [*recorded.given[:2], None, recorded.given[2]]
    for message, norm in zip(sent, (0.5, 0.01, None, 0.5), strict=True):
        if message.values is None:
            continue
        vectors, told = given[sent.index(message)]  # type: ignore[misc]
        assert told == norm and float(vectors.norm(dim=-1).max()) <= norm * (1 + 1e-9)
        assert len(vectors) == count
        there = mask.bool()
        torch.testing.assert_close(message.values[there], (vectors + 1).float())
        assert not bool(message.values[~there].any())  # nothing at padding
    released = link.released
    assert (released.hidden, released.gradients, released.held_out) == (count, count, count)
    longer = [int((v.norm(dim=-1) >= n * (1 - 1e-9)).sum()) for v, n in recorded.given]
    assert (released.clipped_hidden, released.clipped_gradients) == (
        longer[0] + longer[2],
        longer[1],
    )
    assert longer[0] > 0 and f"{2 * count} hidden states (" in str(released)


def test_without_noise_and_with_wide_norms_nothing_changes() -> None:
    parts = cut(tiny("llama"))
    losses = []
    for noisy in (False, True):
        round_ = sequential([parts.middle], ["ann"], settings())
        with linked(round_, "ann") as plain:
            wide = NoisyLink(plain, Norms(1e9, 1e9), lambda vectors, norm: vectors)
            step = SiteStep(parts.head, parts.tail, wide if noisy else plain, batches("llama"))
            losses.append(float(step().loss))
        round_.finish()
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_norms_that_are_none_are_refused() -> None:
    for hidden, gradient, what in ((0.0, 1.0, "hidden states"), (1.0, float("nan"), "gradients")):
        with pytest.raises(ConfigError, match=f"a norm above 0 for {what}, got"):
            Norms(hidden, gradient)
