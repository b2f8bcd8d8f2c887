"""Keys of homomorphic encryption: a public half with which sites encrypt, a secret one that opens.

`python -m privacy.secure.ckks_keys FOLDER` makes both.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from models.section import ConfigError
from privacy.secure.keys import bound

# Additions need one prime for the numbers, and SEAL one for keys: 120 bits in all, of the 218 that
# leave 128 bits of security at this degree (Homomorphic Encryption Standard, table 1).
_DEGREE = 8192
_PRIMES = (60, 60)
SLOTS = _DEGREE // 2
"""Numbers in a ciphertext."""
SCALE = 2.0**21
"""What numbers are multiplied with before they are rounded and get the noise of encryption."""

PUBLIC, SECRET = "ckks-public.key", "ckks-secret.key"


@dataclass(frozen=True, eq=False)
class Key:
    """A key as TenSEAL keeps it; with its secret half it `opens` ciphertexts."""

    context: Any

    @classmethod
    def load(cls, path: Path) -> Key:
        """Read a key from a file; raises ConfigError."""
        library = tenseal()
        try:
            context = library.context_from(path.read_bytes(), n_threads=1)
            if context.global_scale != SCALE or not context.has_public_key():
                raise ValueError("it was made for something else")
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"Expected a key of 'python -m privacy.secure.ckks_keys' at {str(path)!r} "
                f"(ckks-path in this node's config), but: {error}; get it from who made it."
            ) from error
        return cls(context)

    @classmethod
    def shared(cls, path: Path) -> Key:
        """The key in a file, made by whoever asks first: for simulations, where all read it."""
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f"{uuid.uuid4().hex}.new")
            _write(fresh, made().secret)
            try:
                os.link(fresh, path)  # unlike a rename, this does not replace
            except FileExistsError:
                pass
            finally:
                fresh.unlink()
        return cls.load(path)

    @property
    def opens(self) -> bool:
        """Whether the secret half is there."""
        return bool(self.context.has_secret_key())

    @cached_property
    def digest(self) -> bytes:
        """Hash of the public half, by which sites and server tell keys apart."""
        return bound("ckks key", self.public)

    @property
    def public(self) -> bytes:
        """The public half, for a file."""
        return _plain(self.context, secret=False)

    @property
    def secret(self) -> bytes:
        """Both halves, for a file."""
        return _plain(self.context, secret=True)


def tenseal() -> Any:
    """The library; raises ConfigError where it is not installed."""
    if importlib.util.find_spec("tenseal") is None:
        raise ConfigError(
            "Expected the tenseal package with secure.aggregation='ckks', got none; run "
            "./scripts/setup ckks, or set secure.aggregation='masks'."
        )
    import tenseal as library

    return library


def adding() -> Any:
    """A context in which ciphertexts of any key can be added, and none opened."""
    return made().context


def made() -> Key:
    """A new key with both halves; raises ConfigError without the library."""
    library = tenseal()
    context = library.context(
        library.SCHEME_TYPE.CKKS, _DEGREE, coeff_mod_bit_sizes=list(_PRIMES), n_threads=1
    )
    context.global_scale = SCALE
    return Key(context)


def _plain(context: Any, secret: bool) -> bytes:
    return bytes(
        context.serialize(
            save_public_key=True,
            save_secret_key=secret,
            save_galois_keys=False,
            save_relin_keys=False,
        )
    )


def _write(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a new pair of keys in a folder that has none; exit status 2 where that fails."""
    parser = argparse.ArgumentParser(prog="ckks_keys", description=__doc__)
    parser.add_argument("folder", type=Path, help=f"gets {PUBLIC} and {SECRET}")
    folder = parser.parse_args(arguments).folder
    try:
        key = made()
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / SECRET, key.secret)
        _write(folder / PUBLIC, key.public)
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{folder / PUBLIC}: for every site. {folder / SECRET}: for sites that open sums.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
