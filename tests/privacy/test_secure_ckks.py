"""Homomorphic encryption: exact sums, whoever drops out, and nothing opened but a sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.layout import Layout
from models.section import ConfigError
from models.wire import RawArray
from privacy.secure import ckks, ckks_keys, encrypted
from privacy.secure.ckks_keys import Key
from privacy.secure.config import SecureConfig
from privacy.secure.encrypted import ENCRYPTED, Encrypted, EncryptedIntake
from privacy.secure.errors import SecureError
from privacy.secure.fixed_point import Words
from privacy.secure.terms import Terms
from strategies.cohort import CohortError
from strategies.exchange import Parcel, Sent
from strategies.gate import Refusal, Reply
from tests.privacy.secure_groups import NAMES, terms, update

pytest.importorskip("tenseal", reason="needs ./scripts/setup ckks")

LAYOUT = Layout(("weight",), ((5,),))
SENT = Sent({"weight": torch.arange(5.0)}, {})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    assert ckks_keys.main([str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def key(files: Path) -> Key:
    return Key.load(files / ckks_keys.SECRET)


def summed(key: Key, terms: Terms, words: Mapping[str, Words]) -> bytes:
    total = ckks.Total(terms)
    for name, own in words.items():
        total.add(ckks.encrypt(key, terms, name, own))
    return total.dump()


@settings(max_examples=25, deadline=None)
@given(
    st.data(), st.sampled_from([8, 9, 12, 16, 18, 19, 24, 32]), st.integers(1, 40),
    st.sets(st.sampled_from(NAMES), min_size=1),
)  # fmt: skip
def test_what_is_opened_is_the_sum_of_the_whole_numbers(
    key: Key, data: st.DataObject, bits: int, size: int, active: set[str]
) -> None:
    agreed = terms(size=size, bits=bits)
    values = st.lists(st.floats(-2, 2, width=32), min_size=size, max_size=size)
    words = {
        name: agreed.numbers.encode(np.array(data.draw(values), np.float32), 1000, 1024)[0]
        for name in sorted(active)
    }
    opened = ckks.decrypt(key, agreed, sorted(active), summed(key, agreed, words))
    expected = agreed.numbers.reduced(np.sum(list(words.values()), axis=0, dtype=opened.dtype))
    assert np.array_equal(opened, expected)


@pytest.mark.parametrize(("bits", "per"), [(32, 1), (16, 2), (9, 4)])
def test_an_update_may_take_several_ciphertexts(key: Key, bits: int, per: int) -> None:
    agreed = terms(size=2 * ckks_keys.SLOTS * per, bits=bits)
    assert ckks.numbers_per_slot(bits) == per
    words = {n: agreed.numbers.encode(update(n, agreed.size), 3, 4)[0] for n in NAMES[:3]}
    opened = ckks.decrypt(key, agreed, NAMES[:3], summed(key, agreed, words))
    assert np.array_equal(opened, agreed.numbers.reduced(sum(words.values())))  # type: ignore[arg-type]


def test_the_noise_of_encryption_is_as_small_as_the_rounding_counts_on(key: Key) -> None:
    """For a thousand sites its standard deviation is a twelfth of the distance that is checked."""
    library, sites = ckks_keys.tenseal(), 9
    zeros = np.zeros(ckks_keys.SLOTS)
    total = library.ckks_vector(key.context, zeros)
    for _ in range(sites - 1):
        total.add_(library.ckks_vector(key.context, zeros))
    std = float(np.std(total.decrypt())) * ckks_keys.SCALE / sites**0.5
    assert 700 < std < 2100
    assert 0.25 / (2100 * ckks.MOST_SITES**0.5 / ckks_keys.SCALE) > 7


def test_nothing_is_opened_but_one_update_of_each_named_site(key: Key) -> None:
    agreed = terms()
    words = {name: agreed.numbers.encode(update(name, 5), 3, 4)[0] for name in NAMES}
    parts = {name: ckks.encrypt(key, agreed, name, words[name]) for name in NAMES}

    def total(names: Sequence[str]) -> bytes:
        added = ckks.Total(agreed)
        for name in names:
            added.add(parts[name])
        return added.dump()

    for names, told in ((["ann"] * 3, NAMES[:3]), (NAMES[:4], NAMES[:3]), (["ann"], NAMES[:3])):
        with pytest.raises(SecureError, match="one update each of ann, bob, cat, got something"):
            ckks.decrypt(key, agreed, told, total(names))
    for told in (["ann"], ["ann", "ann", "ann"], ["ann", "bob", "zoe"], []):
        parcel: Parcel = {"active": list(told), "sum": parts["ann"]}
        with pytest.raises(SecureError, match=r"sum over at least 3 of .* does not open it"):
            encrypted.opened(agreed, parcel, key, 3)


def test_another_key_does_not_open_the_sum(key: Key, files: Path, tmp_path: Path) -> None:
    agreed = terms()
    words = {name: agreed.numbers.encode(update(name, 5), 3, 4)[0] for name in NAMES}
    data = summed(key, agreed, words)
    other = Key.shared(tmp_path / "other")
    assert other.digest != key.digest
    with pytest.raises(SecureError, match="encrypts with another key"):
        ckks.decrypt(other, agreed, NAMES, data)
    public = Key.load(files / ckks_keys.PUBLIC)
    assert public.digest == key.digest and not public.opens and key.opens
    with pytest.raises(SecureError, match="it has no secret key"):
        encrypted.opened(agreed, {"active": list(NAMES), "sum": data}, public, 3)


def test_what_is_no_ciphertext_is_refused_and_changes_nothing(key: Key) -> None:
    agreed = terms()
    words = {name: agreed.numbers.encode(update(name, 5), 3, 4)[0] for name in NAMES[:3]}
    good = ckks.encrypt(key, agreed, "bob", words["bob"])
    total = ckks.Total(agreed)
    total.add(ckks.encrypt(key, agreed, "ann", words["ann"]))
    library = ckks_keys.tenseal()
    shorter = library.ckks_vector(key.context, [1.0, 2.0]).serialize()
    rescaled = library.ckks_vector(key.context, [1.0] * ckks._sizes(agreed)[0], 2.0**20)
    wrong = [
        b"", b"\0", good[:100], good + good, good[:4] + bytes(len(good) - 4), bytes(10**6),
        ckks._joined([shorter]), ckks._joined([rescaled.serialize()]),
    ]  # fmt: skip
    for data in wrong:
        with pytest.raises(SecureError, match="Expected 1 ciphertexts of numbers, but"):
            total.add(data)
    total.add(good)
    opened = ckks.decrypt(key, agreed, ["ann", "bob"], total.dump())
    assert np.array_equal(opened, words["ann"] + words["bob"])


@dataclass
class Sites:
    """Honest sites, some of which have the secret half of the key."""

    public: Key
    secret: Key
    openers: tuple[str, ...] = ("bob", "eve")
    silent: tuple[str, ...] = ()
    keys: dict[str, Key] = field(default_factory=dict)
    asked: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)

    def ask(self, step: str, parcels: Mapping[str, Parcel], timeout: float) -> dict[str, Parcel]:
        self.asked.append((step, tuple(parcels)))
        return {n: self.answer(step, n, parcel) for n, parcel in parcels.items()
                if (step, n) not in {("ckks_open", silent) for silent in self.silent}}  # fmt: skip

    def key(self, name: str) -> Key:
        return self.keys.get(name, self.secret if name in self.openers else self.public)

    def terms(self, parcel: Parcel) -> Terms:
        told = {k: parcel[k] for k in ("run", "round", "group", "layout", "size")}
        members = tuple(parcel["members"])  # type: ignore[arg-type]
        return Terms(**told, members=members, bits=32, range=1.0, settings="s")  # type: ignore[arg-type]

    def answer(self, step: str, name: str, parcel: Parcel) -> Parcel:
        if step == "ckks_advertise":
            return encrypted.advertise(NAMES.index(name) + 1, self.key(name))
        try:
            return encrypted.opened(self.terms(parcel), parcel, self.key(name), 3)
        except SecureError as error:
            return {"error": str(error)}

    def reply(self, intake: EncryptedIntake, name: str) -> Reply:
        parcel = intake.parcels[name]
        agreed, scale = self.terms(parcel), parcel["scale"]
        assert isinstance(scale, int)
        words, _ = agreed.numbers.encode(update(name, 5), NAMES.index(name) + 1, scale)
        data = ckks.encrypt(self.key(name), agreed, name, words)
        array = RawArray("uint8", (len(data),), data)
        return Reply(name, 1, LAYOUT.digest, 3, {ENCRYPTED: array}, len(data))

    def opened(self, groups: int = 1) -> EncryptedIntake:
        secure = SecureConfig.model_validate({"aggregation": "ckks", "groups": groups})
        exchange = Encrypted(secure, LAYOUT, "r", "s", 0, 1e4)
        return exchange.open(1, NAMES, lambda: SENT, self.ask)


@pytest.fixture
def sites(files: Path, key: Key) -> Sites:
    return Sites(Key.load(files / ckks_keys.PUBLIC), key)


def mean(names: Sequence[str]) -> np.ndarray:
    weights = [NAMES.index(name) + 1 for name in names]
    return np.average([update(name, 5) for name in names], axis=0, weights=weights)


@pytest.mark.parametrize("groups", [1, 2])
def test_each_group_is_a_row_of_the_weighted_mean_of_those_that_stay(
    sites: Sites, groups: int
) -> None:
    with sites.opened(groups) as intake:
        for name in NAMES if groups == 2 else NAMES[1:]:
            intake.admit(sites.reply(intake, name))
        got = intake.close()
    assert len(got.rows) == groups and not got.failed
    for group, members in got.sites.items():
        assert np.allclose(got.rows[group].numpy(), mean(members), atol=1e-6)
        assert got.weights[group] == sum(NAMES.index(name) + 1 for name in members)


def test_another_site_opens_the_sum_where_the_first_does_not_answer(sites: Sites) -> None:
    sites.silent = ("bob",)
    with sites.opened() as intake:
        for name in NAMES:
            intake.admit(sites.reply(intake, name))
        got = intake.close()
    assert sites.asked[-2:] == [("ckks_open", ("bob",)), ("ckks_open", ("eve",))]
    assert np.allclose(got.rows["group 1"].numpy(), mean(NAMES), atol=1e-6)


def test_too_few_updates_or_no_answer_keep_the_sum_closed(sites: Sites) -> None:
    with sites.opened() as intake:
        for name in NAMES[:2]:
            intake.admit(sites.reply(intake, name))
        got = intake.close()
    assert not got.rows and "at least 3 sites (secure.min-group)" in got.failed["ann"]
    assert [step for step, _ in sites.asked] == ["ckks_advertise"]
    sites.silent = sites.openers
    with sites.opened() as intake:
        for name in NAMES:
            intake.admit(sites.reply(intake, name))
        got = intake.close()
    assert not got.rows and "a site to open the sum of group 1, but eve" in got.failed["ann"]


def test_keys_that_do_not_fit_are_named(sites: Sites, tmp_path: Path) -> None:
    sites.keys["dan"] = Key.shared(tmp_path / "other")
    with sites.opened() as intake:
        assert "give this site the same file" in intake.failed["dan"]
        assert set(intake.parcels) == set(NAMES) - {"dan"}
        with pytest.raises(Refusal, match="Expected one update of a site with a key, got 'dan'"):
            intake.admit(Reply("dan", 1, LAYOUT.digest, 3, {ENCRYPTED: EMPTY}, 0))
    sites.openers = ()
    del sites.keys["dan"]
    with pytest.raises(CohortError, match="Expected a site with the secret key, to open sums"):
        sites.opened()


EMPTY = RawArray("uint8", (0,), b"")


def test_keys_are_made_once_and_for_their_owner_only(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (files / ckks_keys.SECRET).stat().st_mode & 0o077 == 0
    before = (files / ckks_keys.SECRET).read_bytes()
    assert ckks_keys.main([str(files)]) == 2
    assert "File exists" in capsys.readouterr().err
    assert (files / ckks_keys.SECRET).read_bytes() == before


def test_files_that_are_no_keys_are_refused(tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"junk")
    for name in ("junk", "missing"):
        with pytest.raises(ConfigError, match=r"Expected a key of 'python -m privacy.secure.ckks"):
            Key.load(tmp_path / name)


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ckks_keys.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tenseal package .* run \./scripts/setup ckks"):
        ckks_keys.tenseal()
