"""A site's side of secure aggregation by homomorphic encryption: its key, and what it encrypts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flwr.app import ArrayRecord
from torch import Tensor

from flower_app.config import Config
from flower_app.node import NodeConfig
from flower_app.rounded import rounded
from models.paths import located
from models.section import ConfigError
from models.wire import RawArray
from privacy.secure.ckks import encrypt
from privacy.secure.ckks_keys import Key
from privacy.secure.encrypted import ENCRYPTED
from privacy.secure.errors import SecureError
from privacy.secure.terms import Terms
from strategies.exchange import Parcel
from strategies.messages import Scalar, pack

_SIMULATED = "ckks.key"


def key_of(node: NodeConfig, folder: Scalar | None = None) -> Key:
    """The key that the node config names; in a simulation one for all, in the run's `folder`.

    Raises ConfigError.
    """
    if node.simulated:
        return Key.shared(Path(str(folder)) / _SIMULATED)
    if not node.ckks_path:
        raise ConfigError(
            "Expected 'ckks-path' in this node's config, since secure.aggregation='ckks' encrypts "
            "with a key that the sites have in common; docs/privacy.md says how to make it."
        )
    return Key.load(located(node.ckks_path))


def clear(node: NodeConfig, folder: Scalar | None) -> None:
    """Destroy the key of a simulation."""
    if node.simulated and folder is not None:
        (Path(str(folder)) / _SIMULATED).unlink(missing_ok=True)


@dataclass(frozen=True)
class Encrypting:
    """An update on its way out of a site, as ciphertexts that the server can only add."""

    config: Config
    key: Key
    terms: Terms
    site: str
    scale: int
    weight: int

    @classmethod
    def of(
        cls, config: Config, key: Key, terms: Terms, site: str, parcel: Parcel, weight: int
    ) -> Encrypting:
        """Raises SecureError where the server does not say what to encrypt."""
        scale = parcel.get("scale")
        if type(scale) is not int or scale < weight or site not in terms.members:
            raise SecureError(
                f"Expected to be asked for {site!r} with a scale of at least {weight}, its weight, "
                f"got {scale!r:.40} for {', '.join(terms.members)}."
            )
        return cls(config, key, terms, site, scale, weight)

    def hidden(self, delta_D: Tensor) -> ArrayRecord:
        """What leaves the site in place of `delta_D`, (D,) float32."""
        words = rounded(self.config, self.terms, self.site, delta_D, self.weight, self.scale)
        data = encrypt(self.key, self.terms, self.site, words)
        return pack({ENCRYPTED: RawArray("uint8", (len(data),), data)})
