"""Keys for the stream between a site and the server, made for one run and nothing else."""

from __future__ import annotations

import datetime
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
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
    try:
        return x509.load_pem_x509_certificate(certificate).fingerprint(hashes.SHA256()).hex()
    except ValueError:
        raise ConfigError(
            "Expected a certificate in PEM form, got something else; use the same version."
        ) from None
