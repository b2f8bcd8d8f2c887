"""Node keys of sites as their operators make them: one of its own each, and all public ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def write_keys(folder: Path, names: Iterable[str]) -> None:
    """Write `<site>.pem` for each site, and the public halves to `peers/`."""
    (folder / "peers").mkdir(parents=True)
    for name in names:
        key = Ed25519PrivateKey.generate()
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        (folder / f"{name}.pem").write_bytes(pem)
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        (folder / "peers" / f"{name}.pem").write_bytes(public)
