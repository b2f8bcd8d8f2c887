"""Sessions in files: one taker, one successor, nothing left; keys from files."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from models.section import ConfigError
from privacy.secure import site as steps
from privacy.secure.errors import SecureError
from privacy.secure.keys import NodeKey, Pinned
from privacy.secure.sessions import Sessions
from privacy.secure.site import Session
from tests.privacy.secure_groups import keys, terms

PEM = serialization.Encoding.PEM


def session() -> Session:
    return steps.advertise(terms(), "ann", 3, keys()["ann"])[0]


def test_a_session_comes_back_once(tmp_path: Path) -> None:
    place, kept = Sessions(tmp_path / "secure"), session()
    place.begin(kept)
    assert place.take() == kept
    with pytest.raises(SecureError, match="got none: the server asks twice"):
        place.take()
    assert list((tmp_path / "secure").iterdir()) == []


def test_of_many_that_take_one_wins(tmp_path: Path) -> None:
    for _ in range(20):
        Sessions(tmp_path).begin(session())
        start, got = threading.Barrier(6), []

        def take(start: threading.Barrier = start, got: list[str] = got) -> None:
            start.wait()
            try:
                got.append(Sessions(tmp_path).take().site)
            except SecureError:
                got.append("")

        threads = [threading.Thread(target=take) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(got) == [""] * 5 + ["ann"]


def test_a_step_does_not_replace_a_session_that_began_meanwhile(tmp_path: Path) -> None:
    place, old, new = Sessions(tmp_path), session(), session()
    place.begin(old)
    place.take()
    place.begin(new)
    with pytest.raises(SecureError, match="the server has begun another meanwhile"):
        place.keep(old)
    assert place.take() == new
    place.clear()
    assert not tmp_path.exists()


def test_a_session_that_begins_ends_the_one_before(tmp_path: Path) -> None:
    place, new = Sessions(tmp_path), session()
    place.begin(session())
    place.begin(new)
    assert place.take() == new


def test_what_became_of_a_session_is_on_disk_before_an_answer_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names in a folder are as they were when it was last synchronised, once the power is back."""
    place, fsync = Sessions(tmp_path / "run" / "secure"), os.fsync
    disk: dict[Path, list[str]] = {}

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        for folder in filter(Path.is_dir, [tmp_path, *tmp_path.rglob("*")]):
            if folder.stat().st_ino == os.fstat(descriptor).st_ino:
                disk[folder] = sorted(path.name for path in folder.iterdir())

    monkeypatch.setattr(os, "fsync", synced)
    place.begin(session())
    assert disk[tmp_path] == ["run"] and disk[tmp_path / "run"] == ["secure"]
    assert disk[place.folder] == ["session.json"]
    taken = place.take()
    assert disk[place.folder] == []
    place.keep(taken)
    assert disk[place.folder] == ["session.json"]
    place.clear()
    assert disk[place.folder] == []
    assert place.folder.parent.is_dir() and not place.folder.exists()


def test_a_session_is_its_owner_s_alone(tmp_path: Path) -> None:
    place = Sessions(tmp_path / "run" / "secure")
    place.begin(session())
    assert place.folder.stat().st_mode & 0o777 == 0o700
    assert (place.folder / "session.json").stat().st_mode & 0o777 == 0o600


def pem(key: Ed25519PrivateKey | X25519PrivateKey) -> bytes:
    plain = serialization.NoEncryption()
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, plain)


def public_pem(key: Ed25519PrivateKey | X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def test_keys_are_read_as_openssl_writes_them(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    (tmp_path / "node.key").write_bytes(pem(key))
    (tmp_path / "ann.pem").write_bytes(public_pem(key))
    own, pinned = NodeKey.load(str(tmp_path / "node.key")), Pinned.load(str(tmp_path))
    assert pinned.keys == {"ann": own.public}
    pinned.check("ann", own.sign("advert", 1, "x"), "advert", 1, "x")
    for label, parts in (("advert", (1, "y")), ("roster", (1, "x")), ("advert", ("1", "x"))):
        with pytest.raises(SecureError, match=r"Expected the (advert|roster) of 'ann' under its"):
            pinned.check("ann", own.sign("advert", 1, "x"), label, *parts)


def test_files_that_are_no_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Expected public node keys in .*, got no \.pem file"):
        Pinned.load(str(tmp_path))
    other = X25519PrivateKey.generate()
    (tmp_path / "bob.pem").write_bytes(public_pem(other))
    (tmp_path / "node.key").write_bytes(pem(other))
    with pytest.raises(ConfigError, match=r"Ed25519 public node key in PEM form at .*bob\.pem"):
        Pinned.load(str(tmp_path))
    with pytest.raises(ConfigError, match=r"Ed25519 node key .* got X25519PrivateKey; make one"):
        NodeKey.load(str(tmp_path / "node.key"))
    with pytest.raises(ConfigError, match=r"Ed25519 node key .* got FileNotFoundError"):
        NodeKey.load(str(tmp_path / "none"))
