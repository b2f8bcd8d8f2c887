"""Rounds under homomorphic encryption: the server adds what it cannot read, a site opens the sum.

A site with the secret key can read whatever it is handed, and so can a server that it helps. The
server sees sums only as long as it keeps to the protocol and no site with that key helps it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from models.layout import Layout
from privacy.secure import ckks
from privacy.secure.ckks_keys import Key
from privacy.secure.config import SecureConfig
from privacy.secure.errors import SecureError
from privacy.secure.fixed_point import Words
from privacy.secure.groups import drawn
from privacy.secure.intake import Answers, SumIntake, answered, invited, own, proposed
from privacy.secure.keys import KEY_BYTES
from privacy.secure.terms import MAGNITUDE, Terms, magnitude, octets, table
from strategies.cohort import CohortError
from strategies.exchange import Ask, Decoded, Exchange, Parcel, Received

ENCRYPTED = "encrypted"
"""Name of the array that a site sends in place of its update."""


@dataclass(frozen=True)
class Encrypted(Exchange):
    """Secure aggregation by CKKS; `settings` is a digest of the run's configuration."""

    secure: SecureConfig
    layout: Layout
    run: str
    settings: str
    seed: int
    max_update_norm: float

    def open(self, round_: int, asked: Sequence[str], sent: Decoded, ask: Ask) -> EncryptedIntake:
        """Draw groups, and ask who has which key; raises CohortError for too few or many sites."""
        secure = self.secure
        members = drawn(asked, secure.groups, secure.min_group, self.seed, round_)
        if (largest := max(map(len, members))) > ckks.MOST_SITES:
            raise CohortError(
                f"Expected at most {ckks.MOST_SITES} sites in a sum with secure.aggregation="
                f"'ckks', got {largest}; set more secure.groups."
            )
        common = Terms(
            self.run, round_, "", (), self.layout.digest, self.layout.size, secure.bits,
            secure.range, self.settings,
        )  # fmt: skip
        sums = [
            EncryptedSum(
                replace(common, group=f"group {number}", members=tuple(names)), secure.min_group
            )
            for number, names in enumerate(members, 1)
        ]
        intake = EncryptedIntake(sums, ENCRYPTED, ask, secure.stage_s, self.max_update_norm)
        intake.begin()
        return intake


class EncryptedSum:
    """One sum over the sites of a group, of which at least `least` must be in it."""

    def __init__(self, terms: Terms, least: int) -> None:
        self.terms = terms
        self.failed: dict[str, str] = {}
        self.openers: tuple[str, ...] = ()
        self.scale = 1
        self._least = least
        self._invited: tuple[str, ...] = ()
        self._active: list[str] = []
        self._total = ckks.Total(terms)

    @property
    def active(self) -> tuple[str, ...]:
        """Sites whose numbers are in the sum, sorted."""
        return tuple(sorted(self._active))

    def advertised(self, answers: Answers) -> Answers:
        """Step 1: keys and weights that came; what each of those sites is sent with the payload."""
        adverts: dict[str, tuple[int, bytes, bool]] = {}
        for site, answer in answered(self, answers, self.terms.members):
            try:
                adverts[site] = _advert(site, answer)
            except SecureError as error:
                self.failed[site] = str(error)
        counts = Counter(key for _, key, _ in adverts.values())
        usual = max(counts, key=lambda key: (counts[key], key), default=b"")
        for site, (_, key, _) in list(adverts.items()):
            if key != usual:
                del adverts[site]
                self.failed[site] = (
                    f"Expected the public key of most sites, {usual.hex()[:12]}, got "
                    f"{key.hex()[:12]}; give this site the same file (ckks-path)."
                )
        self._invited = tuple(sorted(adverts))
        self.openers = tuple(site for site in self._invited if adverts[site][2])
        self._require(self._invited, "sent the same public key")
        self.scale = 2 ** max(magnitude for magnitude, _, _ in adverts.values())
        parcel: Parcel = {**proposed(self.terms), "scale": self.scale}
        return dict.fromkeys(self._invited, parcel)

    def add(self, site: str, data: bytes) -> None:
        """Step 2: add the ciphertexts of a site, which are not kept; raises SecureError."""
        if site not in self._invited or site in self._active:
            raise SecureError(f"Expected one update of a site with a key, got {site!r:.80}.")
        self._total.add(data)
        self._active.append(site)

    def sealed(self) -> Parcel:
        """What a site is sent to open the sum; raises SecureError where too few are in it."""
        self._require(self.active, "sent encrypted updates")
        return {**proposed(self.terms), "active": list(self.active), "sum": self._total.dump()}

    def opened(self, site: str, answers: Answers) -> Words:
        """Step 3: the numbers of the sum, as a site opened it; raises SecureError."""
        for _, answer in answered(self, answers, [site]):
            numbers = self.terms.numbers
            length = numbers.length(self.terms.size)
            packed = octets(answer, "numbers", numbers.nbytes(self.terms.size))
            return numbers.unpack(packed, length)
        raise SecureError(self.failed[site])

    def _require(self, sites: Sequence[str], what: str) -> None:
        if len(sites) >= self._least:
            return
        raise SecureError(
            f"Expected at least {self._least} sites (secure.min-group) of {self.terms.group} that "
            f"{what}, got {len(sites)}; nothing is opened."
        )


class EncryptedIntake(SumIntake[EncryptedSum]):
    """The sums of one round in ciphertexts; any asked site with the secret key can open them."""

    def begin(self) -> None:
        """Step 1, after which `parcels` holds what the sites need to encrypt."""
        adverts = self._asked("ckks_advertise", {id(s): invited(s.terms) for s in self._sums})
        parcels = self._each(lambda s: s.advertised(own(s, adverts)))
        self.parcels = {site: parcel for told in parcels.values() for site, parcel in told.items()}
        if self._sums and not any(s.openers for s in self._sums):
            raise CohortError(
                "Expected a site with the secret key, to open sums, got only the public one at "
                f"{', '.join(sorted(self.parcels))}; give one of them both halves (ckks-path)."
            )
        for s in self._sums:
            self._failed |= s.failed

    def close(self) -> Received:
        """Step 3: one row for each group whose sum a site has opened."""
        openers = sorted({site for s in self._sums for site in s.openers})

        def open_(s: EncryptedSum) -> Answers:
            self._keep(s, self._opened(s, openers), s.scale)
            return {}

        self._each(open_)
        return self._received()

    def _opened(self, s: EncryptedSum, openers: Sequence[str]) -> Words:
        """Ask one site after the other until one opens the sum, those that took part first."""
        parcel, why = s.sealed(), "no site with the secret key takes part"
        for site in sorted(openers, key=lambda site: (site not in s.active, site)):
            try:
                return s.opened(site, self._ask("ckks_open", {site: parcel}, self._timeout))
            except SecureError as error:
                why = f"{site}: {error}"
        raise SecureError(f"Expected a site to open the sum of {s.terms.group}, but {why}")

    def __enter__(self) -> EncryptedIntake:
        """Nothing to do."""
        return self


def advertise(weight: int, key: Key) -> Parcel:
    """A site's step 1: its key's digest, whether it can open sums, and a bound on its weight."""
    return {"key": key.digest, "opens": key.opens, "magnitude": magnitude(weight)}


def opened(terms: Terms, parcel: Parcel, key: Key, least: int) -> Parcel:
    """A site's step 3: the numbers of a sum of at least `least` sites; raises SecureError."""
    active = [str(row[0]) for row in table(parcel, "active")]
    if len(set(active) & set(terms.members)) < max(least, len(active)):
        raise SecureError(
            f"Expected a sum over at least {least} of {', '.join(terms.members)}, got one over "
            f"{', '.join(active) or 'none'}; this site does not open it."
        )
    if not key.opens:
        raise SecureError("Expected to be asked for what this site can do: it has no secret key.")
    data = parcel.get("sum")
    if not isinstance(data, bytes):
        raise SecureError("Expected an encrypted sum, got none.")
    return {"numbers": terms.numbers.pack(ckks.decrypt(key, terms, active, data))}


def _advert(site: str, answer: Parcel) -> tuple[int, bytes, bool]:
    size, opens = answer.get("magnitude"), answer.get("opens")
    key = octets(answer, "key", KEY_BYTES)
    if type(size) is not int or not 0 <= size <= MAGNITUDE or type(opens) is not bool:
        raise SecureError(f"Expected a key and the size of a weight of {site!r:.80}, got others.")
    return size, key, opens
