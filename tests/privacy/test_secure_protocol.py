"""Sums behind masks: exact for every pattern of dropouts above the threshold, else closed."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.secure import site as steps
from privacy.secure.errors import SecureError
from privacy.secure.fixed_point import FixedPoint, Words
from privacy.secure.masks import shift
from privacy.secure.site import Session
from privacy.secure.terms import model_hash
from tests.privacy.secure_groups import MODEL, NAMES, Group, keys, terms, update

PATTERNS = list(chain.from_iterable(combinations(NAMES, count) for count in range(7)))


def at(stage: str) -> Group:
    """A group of six in which everybody took part in all stages before `stage`."""
    group = Group(terms())
    for name in ("advertise", "share", "mask", "confirm"):
        if name == stage:
            break
        getattr(group, name)()
    return group


def end(group: Group, stage: str, gone: tuple[str, ...]) -> Words:
    """The sum where `gone` drop out in a stage, and are never seen again."""
    left = False
    for name in ("advertise", "share", "mask", "confirm", "opened"):
        left = left or name == stage
        if left:
            result = getattr(group, name)(gone)
    return result  # type: ignore[no-any-return]


@pytest.mark.parametrize("stage", ["advertise", "share", "mask", "confirm", "opened"])
def test_all_patterns_of_dropouts(stage: str) -> None:
    start = at(stage)
    assert start.terms.threshold == 5
    exact = 0
    for gone in PATTERNS:
        group = start.copy()
        if len(gone) > 1:
            with pytest.raises(SecureError, match=r"Expected at least 5 of 6 sites of group 1"):
                end(group, stage, gone)
            continue
        total = end(group, stage, gone)
        late = stage in ("confirm", "opened")  # their numbers are in the sum already
        names = [name for name in NAMES if late or name not in gone]
        assert np.array_equal(total, group.plain(names))
        exact += 1
    assert exact == 7


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_dropouts_in_every_stage(data: st.DataObject) -> None:
    """Any sites leave in any stages; the sum is over those who sent theirs, or there is none."""
    names = [f"site {at}" for at in range(data.draw(st.integers(3, 9)))]
    bits = data.draw(st.sampled_from([12, 16, 32]))
    group = Group(terms(names, bits=bits))
    gone: set[str] = set()
    for stage in ("advertise", "share", "mask", "confirm", "opened"):
        gone |= set(data.draw(st.lists(st.sampled_from(names), max_size=1)))
        if stage == "mask":
            sent = [name for name in names if name not in gone]
        if len(names) - len(gone) < group.terms.threshold:
            with pytest.raises(SecureError, match="nothing is opened"):
                getattr(group, stage)(gone)
            return
        result = getattr(group, stage)(gone)
    assert np.array_equal(result, group.plain(sent))
    mean, weight = group.terms.numbers.decode(result, 4)
    assert weight == 3 * len(sent)
    plain = np.mean([update(name, 5) for name in sent], axis=0)
    assert np.allclose(mean, plain, atol=2 * group.terms.numbers.step)


def chi_square(words: Words, bits: int) -> float:
    """Statistic of the leading byte against the uniform distribution, 255 degrees of freedom."""
    counts = np.bincount((words >> (bits - 8)).astype(np.int64), minlength=256)
    return float(((counts - len(words) / 256) ** 2 / (len(words) / 256)).sum())


LIKELY = (120.0, 430.0)  # 255 +- 7.7 standard deviations of sqrt(510)


@pytest.mark.parametrize("bits", [12, 16, 32])
def test_a_masked_vector_looks_uniform(bits: int) -> None:
    size = 1 << 16
    group = Group(terms(NAMES[:3], size=size, bits=bits)).advertise().share().mask()
    plain, masked = group.numbers("ann"), group.masked["ann"]
    assert chi_square(plain[:size], bits) > 10 * LIKELY[1]
    assert LIKELY[0] < chi_square(masked, bits) < LIKELY[1]
    # Nor does it go together with what is behind it, or with another site's.
    assert LIKELY[0] < chi_square(group.terms.numbers.reduced(masked - plain), bits) < LIKELY[1]
    both = group.terms.numbers.reduced(masked + group.masked["bob"])
    assert LIKELY[0] < chi_square(both, bits) < LIKELY[1]


def test_a_mask_taken_off_leaves_what_was_there() -> None:
    for dtype in ("<u2", "<u4"):
        words = np.arange(100_003).astype(dtype)
        hidden = words.copy()
        shift(hidden, [(b"k" * 32, 1), (b"l" * 32, -1)])
        assert not np.array_equal(hidden, words)
        shift(hidden, [(b"l" * 32, 1), (b"k" * 32, -1)])
        assert np.array_equal(hidden, words)


def test_fresh_keys_in_every_round() -> None:
    group, again = at("mask"), at("mask")
    for name in NAMES:
        one, other = group.sessions[name], again.sessions[name]
        assert len({one.sealing, one.masking, one.seed, other.sealing, other.masking}) == 5
        assert one.seed != other.seed


def test_secrets_do_not_outlive_their_use() -> None:
    group = at("confirm")
    for session in group.sessions.values():
        assert session.sealing == session.masking == session.seed == b""


@pytest.mark.parametrize("stage", ["share", "mask", "confirm", "opened"])
def test_a_session_survives_in_a_file(stage: str) -> None:
    group = at(stage)
    for session in group.sessions.values():
        assert Session.loads(session.dumps()) == session


@pytest.mark.parametrize("changed", ["run", "round", "group", "layout", "settings", "range"])
def test_sites_that_disagree_on_the_terms_do_not_sum(changed: str) -> None:
    """Who was told other terms than the rest signs something else, and nobody goes on with it."""
    group = Group(terms())
    other = {"round": 2, "range": 0.5}.get(changed, "another")
    differing = terms(**{changed: other})
    group.sessions["cat"], parcel = steps.advertise(differing, "cat", 3, keys()["cat"])
    answers = {n: steps.advertise(group.terms, n, 3, keys()[n]) for n in NAMES if n != "cat"}
    group.sessions |= {name: session for name, (session, _) in answers.items()}
    group.mail = group.server.advertised({n: p for n, (_, p) in answers.items()} | {"cat": parcel})
    with pytest.raises(SecureError, match="Expected at least 5"):
        group.share()
    assert all("Expected the advert of 'cat'" in group.refused[n] for n in NAMES if n != "cat")
    assert "Expected the advert of" in group.refused["cat"]


def test_sites_that_were_sent_different_models_give_noise() -> None:
    """A server cannot read one site's update by sending all others a model that does not learn."""
    size = 1 << 14
    group = Group(terms(size=size)).advertise().share()
    group.mask(models={"ann": b"x" * 32})
    total = group.confirm().opened()
    for names in (NAMES, ("ann",), NAMES[1:]):
        off = group.terms.numbers.reduced(total - group.plain(names))
        assert LIKELY[0] < chi_square(off, 32) < LIKELY[1]


def test_the_model_hash_sees_names_bits_and_which_part() -> None:
    import torch

    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    other = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0000002])}
    hashes = {
        model_hash(one), model_hash(other), model_hash(one, {}), model_hash({}, one),
        model_hash({"c": one["a"], "b": one["b"]}),
        model_hash({"a": one["a"].reshape(2, 1), "b": one["b"]}),
    }  # fmt: skip
    assert len(hashes) == 6
    assert model_hash(one) == model_hash({name: t.clone() for name, t in one.items()})


def test_weights_are_scaled_by_what_all_signed() -> None:
    """The scale comes from the sites' own adverts, so that no server can blow one of them up."""
    group = Group(terms())
    sizes = dict(zip(NAMES, (1, 2, 3, 64, 65, 7), strict=True))
    answers = {n: steps.advertise(group.terms, n, sizes[n], keys()[n]) for n in NAMES}
    group.server.advertised({name: parcel for name, (_, parcel) in answers.items()})
    assert group.server.roster.scale == 128


def test_numbers_follow_from_the_members() -> None:
    assert terms().numbers == FixedPoint(32, 1.0, 6)
    assert [terms([str(i) for i in range(n)]).threshold for n in (3, 4, 6, 9, 10, 100)] == [
        3, 3, 5, 7, 7, 67,
    ]  # fmt: skip


@pytest.mark.parametrize("step", ["share", "mask", "confirm"])
def test_a_step_is_done_once(step: str) -> None:
    """A message of a stage that is over is refused, and so is one that comes too early."""
    group = at(step)
    earlier = dict(group.sessions)
    getattr(group, step)()
    assert not group.refused
    again = at("opened")
    again.server = at(step).server
    with pytest.raises(SecureError, match="Expected at least 5" if step != "mask" else "Expected"):
        getattr(again, step)()
    assert len(again.refused) == 6
    assert all("has confirmed; the server asks twice" in text for text in again.refused.values())
    with pytest.raises(SecureError, match="the server asks twice, or in another order"):
        steps.unmask(earlier["ann"], group.mail["ann"], group.pinned)


def test_model_is_part_of_every_mask() -> None:
    group = at("mask")
    roster, session = group.sessions["ann"].known, group.sessions["ann"]
    for model in (MODEL, b"n" * 32):
        ann, sign = steps.pair_mask(roster, session.masking, "ann", "bob", model)
        bob, opposite = steps.pair_mask(roster, group.sessions["bob"].masking, "bob", "ann", model)
        assert ann == bob and sign == -opposite
    assert ann != steps.pair_mask(roster, session.masking, "ann", "bob", MODEL)[0]
