"""What the sites of a group must agree on before one of them sends anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from models.wire import encode
from privacy.secure.distributed import Noise
from privacy.secure.errors import SecureError
from privacy.secure.fixed_point import FixedPoint
from privacy.secure.keys import KEY_BYTES, bound
from strategies.exchange import Parcel

MAGNITUDE = 30  # a weight is at most 10**9


@dataclass(frozen=True)
class Terms:
    """One sum of one round: over which sites, of what, and in which numbers.

    `members` are the sites that were asked, `layout` and `size` say what they train, `settings` is
    a digest of the run's whole configuration. With `noise` the sites add shares of it. Every
    signature and every key is bound to all of it.
    """

    run: str
    round: int
    group: str
    members: tuple[str, ...]
    layout: str
    size: int
    bits: int
    range: float
    settings: str
    noise: Noise | None = None

    @property
    def threshold(self) -> int:
        """Sites without which there is no sum."""
        return threshold(len(self.members))

    @property
    def numbers(self) -> FixedPoint:
        """The numbers that are summed; raises ConfigError where the bits are too few."""
        sites = len(self.members)
        if self.noise:
            return self.noise.numbers(self.bits, self.range, sites, self.threshold, self.size)
        return FixedPoint(self.bits, self.range, sites)

    @cached_property
    def digest(self) -> bytes:
        """Hash of all the terms."""
        numbers = (self.layout, self.size, self.bits, repr(self.range), repr(self.noise))
        where = (self.run, self.round, self.group)
        return bound("terms", *where, *numbers, self.settings, *self.members)


@dataclass(frozen=True)
class Advert:
    """A site's public keys of one round, and the power of two that its weight does not exceed."""

    site: str
    sealing: bytes
    masking: bytes
    magnitude: int
    signature: bytes

    def signed(self, terms: Terms) -> tuple[bytes, str, bytes, bytes, int]:
        """What the site signs."""
        return (terms.digest, self.site, self.sealing, self.masking, self.magnitude)

    def check_shape(self, terms: Terms) -> None:
        """Raise SecureError for what cannot be an advert of one of the members."""
        keys = all(isinstance(k, bytes) and len(k) == KEY_BYTES for k in self._keys)
        size = isinstance(self.magnitude, int) and 0 <= self.magnitude <= MAGNITUDE
        if not (keys and size and isinstance(self.signature, bytes)):
            raise SecureError(
                f"Expected an advert with two keys of {self.site!r:.80}, got another."
            )
        if self.site not in terms.members:
            raise SecureError(f"Expected adverts of this group, got one of {self.site!r:.80}.")

    @property
    def _keys(self) -> tuple[bytes, bytes]:
        return self.sealing, self.masking


@dataclass(frozen=True)
class Roster:
    """The adverts of the sites that take part, sorted by name."""

    terms: Terms
    adverts: tuple[Advert, ...]

    @classmethod
    def of(cls, terms: Terms, adverts: Sequence[Advert]) -> Roster:
        """Check what can be checked without keys; raises SecureError."""
        for advert in adverts:
            advert.check_shape(terms)
        names = [advert.site for advert in adverts]
        if len(set(names)) != len(names):
            raise SecureError(f"Expected each site once in the roster, got {sorted(names)}.")
        keys = {key for advert in adverts for key in (advert.sealing, advert.masking)}
        if len(keys) != 2 * len(adverts):
            raise SecureError("Expected keys of their own of all sites, got one key twice.")
        if len(adverts) < terms.threshold:
            raise SecureError(below(terms, names, "sent keys"))
        return cls(terms, tuple(sorted(adverts, key=lambda advert: advert.site)))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The sites, sorted."""
        return tuple(advert.site for advert in self.adverts)

    @cached_property
    def points(self) -> dict[str, int]:
        """Where in the field each site's shares lie, from 1."""
        return {name: at for at, name in enumerate(self.names, 1)}

    @cached_property
    def by_name(self) -> dict[str, Advert]:
        """The adverts by site."""
        return {advert.site: advert for advert in self.adverts}

    @cached_property
    def digest(self) -> bytes:
        """Hash of terms and adverts."""
        parts = [part for advert in self.adverts for part in advert.signed(self.terms)[1:]]
        return bound("roster", self.terms.digest, *parts)

    @property
    def scale(self) -> int:
        """What all weights are divided by: nobody, and not the server, chooses it alone."""
        return int(2 ** max(advert.magnitude for advert in self.adverts))

    def parcel(self) -> Parcel:
        """As it travels."""
        return {
            "sites": list(self.names),
            "sealing": [advert.sealing for advert in self.adverts],
            "masking": [advert.masking for advert in self.adverts],
            "magnitudes": [advert.magnitude for advert in self.adverts],
            "signatures": [advert.signature for advert in self.adverts],
        }

    @classmethod
    def read(cls, terms: Terms, parcel: Parcel) -> Roster:
        """The inverse of `parcel`; raises SecureError for what cannot be a roster."""
        columns = table(parcel, "sites", "sealing", "masking", "magnitudes", "signatures")
        return cls.of(terms, [Advert(*row) for row in columns])  # type: ignore[arg-type]


def threshold(sites: int) -> int:
    """How many of `sites` must stay to the end: more than two thirds.

    So two sets of them share an honest site even where a third of them cheats.
    """
    return 2 * sites // 3 + 1


def magnitude(weight: int) -> int:
    """Exponent of the smallest power of two that a weight does not exceed."""
    return (weight - 1).bit_length()


def model_hash(tensors: Mapping[str, Tensor], *more: Mapping[str, Tensor]) -> bytes:
    """Hash of all that a site trains from, so that sites which were sent different models differ.

    Otherwise a server could send most sites a model with vanishing gradients and read the update of
    the rest from the sum (Pasquini et al. 2022).
    """
    parts: list[bytes | str] = []
    for group in (tensors, *more):
        for name, tensor in group.items():
            raw = encode(tensor)
            parts += [name, raw.dtype, str(raw.shape), raw.data]
        parts.append("end")
    return bound("model", *parts)


def table(parcel: Parcel, *columns: str) -> list[tuple[bytes | str | int, ...]]:
    """Rows of a parcel whose columns are lists of one length; raises SecureError for others."""
    lists = [parcel.get(column) for column in columns]
    found = [list(entry) for entry in lists if isinstance(entry, Sequence) and _listed(entry)]
    if len(found) != len(columns) or len({len(entry) for entry in found}) > 1:
        raise SecureError(
            f"Expected lists of one length for {', '.join(columns)}, got {sorted(parcel)}; the "
            "other side runs another version of the app, or does not keep to the protocol."
        )
    return list(zip(*found, strict=True))


def octets(parcel: Parcel, name: str, length: int) -> bytes:
    """Bytes of a parcel of an exact length; raises SecureError for others."""
    value = parcel.get(name)
    if not isinstance(value, bytes) or len(value) != length:
        raise SecureError(f"Expected {length} bytes of {name}, got something else.")
    return value


def below(terms: Terms, sites: Sequence[str], what: str) -> str:
    """The reason of a sum that too few sites take part in."""
    missing = sorted(set(terms.members) - set(sites))
    return (
        f"Expected at least {terms.threshold} of {len(terms.members)} sites of {terms.group} that "
        f"{what}, got {len(sites)} (without {', '.join(missing) or 'none'}); nothing is opened."
    )


def _listed(entry: object) -> bool:
    return not isinstance(entry, str | bytes)
