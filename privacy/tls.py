"""Keys for the stream between a site and the server, made for one run and nothing else."""

from __future__ import annotations

import datetime
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID

from models.section import ConfigError

_KEY, _CERTIFICATE = "key.pem", "certificate.pem"
_EARLY = datetime.timedelta(hours=1)  # clocks differ


@dataclass(frozen=True)
class Identity:
    """A private key and the certificate for it, both PEM; the certificate may go anywhere."""

    key: bytes
    certificate: bytes

    def __repr__(self) -> str:
        """Without the key."""
        return "Identity(...)"

    @classmethod
    def fresh(cls, days: int = 30) -> Identity:
        """A new P-256 key with a certificate that it signed itself, for one run.

        Whom it belongs to is said by whoever hands the certificate on, over Flower's own channel.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        # Certificates of one name would be taken for each other when one is looked up as a root.
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, secrets.token_hex(16))])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _EARLY)
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, hashes.SHA256())
        )
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return cls(private, certificate.public_bytes(Encoding.PEM))

    def write(self, folder: Path) -> None:
        """Keep key and certificate in a new folder; raises ConfigError where there are some."""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(folder / _KEY, "xb", opener=_for_the_owner) as file:
                file.write(self.key)
        except FileExistsError:
            raise ConfigError(
                f"Expected no key in {str(folder)!r} yet, got one; name another folder."
            ) from None
        (folder / _CERTIFICATE).write_bytes(self.certificate)

    @classmethod
    def read(cls, folder: Path) -> Identity:
        """What `write` kept; raises ConfigError for a folder without it."""
        return cls(read_pem(folder / _KEY), read_pem(folder / _CERTIFICATE))


def read_pem(path: Path) -> bytes:
    """A file of PEM; raises ConfigError for one that is not there."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"Expected a key or certificate in {str(path)!r}, but: {error.strerror}; make both "
            "with ./scripts/split keys, or ask the other side for its certificate."
        ) from None


def _for_the_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


HOST = "florilegium"  # what every certificate is for: who it is, is decided by the certificate


def fingerprint(certificate: bytes) -> str:
    """SHA-256 of a PEM certificate, in hex; raises ConfigError for what is none."""
    return _parsed(certificate).fingerprint(hashes.SHA256()).hex()


def public_form(certificate: bytes) -> bytes:
    """A certificate as PEM with nothing beside it; raises ConfigError for none that `Identity` has.

    Certificates of sites are joined to one text of roots: what else one brings would be read there.
    """
    found = _parsed(certificate)
    try:
        key = found.public_key()
        found.verify_directly_issued_by(found)
        list(found.extensions)  # read when asked for, and may then turn out to be nonsense
    except Exception:
        raise _unusable() from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _unusable()
    return found.public_bytes(Encoding.PEM)


def clash(certificate: bytes, others: Iterable[bytes]) -> bool:
    """Whether a certificate has the name or the key of another one, and may be taken for it."""
    own = _marks(certificate)
    return any(own & _marks(other) for other in others)


def _marks(certificate: bytes) -> set[bytes]:
    found = _parsed(certificate)
    key = found.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return {b"name" + found.subject.public_bytes(), b"key" + key}


def _parsed(certificate: bytes) -> x509.Certificate:
    """The first certificate in a text of PEM; raises ConfigError."""
    try:
        return x509.load_pem_x509_certificate(certificate)
    except Exception:  # the parser has many errors, not all of one kind, and the bytes are a peer's
        raise _unusable() from None


def _unusable() -> ConfigError:
    return ConfigError(
        "Expected a certificate in PEM form that signs itself with a P-256 key, got something "
        "else; use the same version."
    )
