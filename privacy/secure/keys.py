"""Keys: who signs, who reads, and what every signature and every derived key is bound to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from models.paths import located
from models.section import ConfigError
from privacy.secure.errors import SecureError

KEY_BYTES = 32
SIGNATURE_BYTES = 64
_NONCE = bytes(12)  # each sealing key is derived for one message in one direction

Bindable = bytes | str | int


def bound(label: str, *parts: Bindable) -> bytes:
    """SHA-256 over a purpose and what belongs to it, unambiguous whatever the parts hold."""
    digest = hashlib.sha256()
    for part in ("florilegium secure aggregation", label, *parts):
        octets = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(f"{type(part).__name__} {len(octets)} ".encode())
        digest.update(octets)
    return digest.digest()


@dataclass(frozen=True)
class NodeKey:
    """The Ed25519 key that a site signs with for as long as it takes part."""

    private: Ed25519PrivateKey

    @classmethod
    def load(cls, path: str) -> NodeKey:
        """Read an unencrypted PEM file, as `openssl genpkey -algorithm ed25519` writes it.

        Raises ConfigError; it says nothing of the file's content.
        """
        try:
            octets = located(path).read_bytes()
            key = serialization.load_pem_private_key(octets, password=None)
        except (OSError, ValueError, TypeError) as error:
            raise _unreadable("node key", path, type(error).__name__) from None
        if not isinstance(key, Ed25519PrivateKey):
            raise _unreadable("node key", path, type(key).__name__)
        return cls(key)

    @classmethod
    def simulated(cls, seed: int, site: str) -> NodeKey:
        """The key of a simulated site, which anyone can derive who knows the run's seed."""
        return cls(Ed25519PrivateKey.from_private_bytes(bound("simulated node key", seed, site)))

    @property
    def public(self) -> bytes:
        """The raw public key, 32 bytes."""
        return self.private.public_key().public_bytes_raw()

    def sign(self, label: str, *parts: Bindable) -> bytes:
        """Sign a purpose and what belongs to it."""
        return self.private.sign(bound(label, *parts))


@dataclass(frozen=True)
class Pinned:
    """The public node keys of the sites, each of which an operator has put there."""

    keys: Mapping[str, bytes]

    @classmethod
    def load(cls, folder: str) -> Pinned:
        """Read `<site>.pem`, as `openssl pkey -pubout` writes it, of all; raises ConfigError."""
        found: dict[str, bytes] = {}
        for path in sorted(located(folder).glob("*.pem")):
            try:
                key = serialization.load_pem_public_key(path.read_bytes())
            except (OSError, ValueError) as error:
                raise _unreadable("public node key", str(path), type(error).__name__) from None
            if not isinstance(key, Ed25519PublicKey):
                raise _unreadable("public node key", str(path), type(key).__name__)
            found[path.stem] = key.public_bytes_raw()
        if not found:
            raise ConfigError(
                f"Expected public node keys in {folder!r}, got no .pem file there; put <site>.pem "
                "of each site into the folder that 'peers-path' of the node config names."
            )
        return cls(found)

    def check(self, site: str, signature: bytes, label: str, *parts: Bindable) -> None:
        """Raise SecureError unless `site` signed that purpose and what belongs to it."""
        if site not in self.keys:
            raise SecureError(
                f"Expected a site whose node key is pinned here, got {site!r}; put {site}.pem into "
                "the folder of 'peers-path', or leave that site out."
            )
        try:
            Ed25519PublicKey.from_public_bytes(self.keys[site]).verify(
                signature, bound(label, *parts)
            )
        except InvalidSignature:
            raise SecureError(
                f"Expected the {label} of {site!r} under its pinned node key, got another "
                "signature; either the server changed it, or that site has a new key."
            ) from None


def fresh() -> bytes:
    """A private X25519 key, 32 bytes."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public(private: bytes) -> bytes:
    """The public half of a private X25519 key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, peer: bytes, label: str, *parts: Bindable) -> bytes:
    """A key that the holders of both private halves share, for one purpose (X25519, HKDF).

    Raises SecureError for a public key of small order, with which everyone would know it.
    """
    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(peer)
        )
    except ValueError:
        raise SecureError("Expected a public key of full order, got a degenerate one.") from None
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=bound(label, *parts)).derive(shared)


def seal(key: bytes, text: bytes, context: bytes) -> bytes:
    """Encrypt and authenticate (ChaCha20-Poly1305) with a key that is used this once."""
    return ChaCha20Poly1305(key).encrypt(_NONCE, text, context)


def unseal(key: bytes, sealed: bytes, context: bytes, sender: str) -> bytes:
    """The inverse; raises SecureError, naming the sender, for anything but what was sealed."""
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed, context)
    except InvalidTag:
        raise SecureError(
            f"Expected the share that {sender!r} sealed for this round, got something else; either "
            "the server changed it or that site sent garbage."
        ) from None


def _unreadable(what: str, path: str, why: str) -> ConfigError:
    return ConfigError(
        f"Expected an Ed25519 {what} in PEM form at {path!r}, got {why}; make one with 'openssl "
        "genpkey -algorithm ed25519 -out node.pem' and its public half with 'openssl pkey -in "
        "node.pem -pubout'."
    )
