"""The server's part of secure aggregation: it carries messages, adds up, and takes masks off.

What it is sent is not trusted: a site whose answer does not fit has dropped out, with a reason.
"""

from __future__ import annotations

import numpy as np

from privacy.secure.errors import SecureError
from privacy.secure.fixed_point import Words
from privacy.secure.intake import Answers, answered
from privacy.secure.keys import KEY_BYTES, SIGNATURE_BYTES, public
from privacy.secure.masks import shift
from privacy.secure.shamir import SHARE_BYTES, ShareError, combine, lagrange
from privacy.secure.site import commitment, pair_mask, self_mask
from privacy.secure.terms import Advert, Roster, Terms, below, octets, table
from strategies.exchange import Parcel


class Summation:
    """One sum over the sites of a group; each step raises SecureError below the threshold.

    `failed` says of sites that have dropped out why.
    """

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.failed: dict[str, str] = {}
        self._roster: Roster | None = None
        self._sealed: dict[str, dict[str, bytes]] = {}
        self._signatures: dict[str, bytes] = {}
        self._commitments: dict[str, bytes] = {}
        self._total: Words = np.zeros(terms.numbers.length(terms.size), terms.numbers.dtype)
        self._active: list[str] = []
        self._confirmed: tuple[str, ...] = ()

    @property
    def roster(self) -> Roster:
        """Who takes part, once that is known."""
        assert self._roster is not None
        return self._roster

    @property
    def active(self) -> tuple[str, ...]:
        """Sites whose numbers are in the sum, sorted."""
        return tuple(sorted(self._active))

    @property
    def dropped(self) -> tuple[str, ...]:
        """Sites with masks in the sum, but without their numbers, sorted."""
        return tuple(sorted(set(self._sealed) - set(self._active)))

    def advertised(self, answers: Answers) -> Answers:
        """Step 1: the adverts that came; what each of those sites is sent for step 2."""
        adverts: list[Advert] = []
        for site, answer in answered(self, answers, self.terms.members):
            try:
                advert = _advert(site, answer)
                advert.check_shape(self.terms)
                adverts.append(advert)
            except SecureError as error:
                self.failed[site] = str(error)
        self._roster = Roster.of(self.terms, adverts)
        return dict.fromkeys(self._roster.names, self._roster.parcel())

    def shared(self, answers: Answers) -> Answers:
        """Step 2: the sealed shares that came; what each of those sites is sent for step 3."""
        for site, answer in answered(self, answers, self.roster.names):
            try:
                self._keep_shares(site, answer)
            except SecureError as error:
                self.failed[site] = str(error)
        self._require(list(self._sealed), "shared their secrets")
        return {site: self._shares_for(site) for site in self._sealed}

    def _keep_shares(self, site: str, answer: Parcel) -> None:
        rows = table(answer, "sites", "sealed")
        sealed = {str(peer): part for peer, part in rows if isinstance(part, bytes)}
        if set(sealed) != set(self.roster.names) - {site}:
            raise SecureError(f"Expected a share of {site!r} for everyone else, got others.")
        self._signatures[site] = octets(answer, "signature", SIGNATURE_BYTES)
        self._commitments[site] = octets(answer, "commitment", KEY_BYTES)
        self._sealed[site] = sealed

    def _shares_for(self, site: str) -> Parcel:
        peers = [peer for peer in sorted(self._sealed) if peer != site]
        return {
            "sites": peers,
            "sealed": [self._sealed[peer][site] for peer in peers],
            "signatures": [self._signatures[peer] for peer in peers],
        }

    def add(self, site: str, data: bytes) -> None:
        """Step 3: add the masked numbers of a site, which are not kept; raises SecureError."""
        if site not in self._sealed or site in self._active:
            raise SecureError(
                f"Expected one masked update of a site with shares, got {site!r:.80}."
            )
        try:
            words = self.terms.numbers.unpack(data, len(self._total))
        except ValueError as error:
            raise SecureError(str(error)) from None
        np.add(self._total, words, out=self._total)
        self._active.append(site)

    def survivors(self) -> Answers:
        """What each active site is sent for step 4."""
        self._require(self.active, "sent masked updates")
        parcel: Parcel = {"active": list(self.active), "dropped": list(self.dropped)}
        return dict.fromkeys(self.active, parcel)

    def confirmed(self, answers: Answers) -> Answers:
        """Step 4: the signatures that came; what each of those sites is sent for step 5."""
        signatures: dict[str, bytes] = {}
        for site, answer in answered(self, answers, self.active):
            try:
                signatures[site] = octets(answer, "signature", SIGNATURE_BYTES)
            except SecureError as error:
                self.failed[site] = str(error)
        self._require(list(signatures), "confirmed the same sum")
        self._confirmed = tuple(sorted(signatures))
        parcel: Parcel = {
            "sites": list(self._confirmed),
            "signatures": [signatures[site] for site in self._confirmed],
        }
        return dict.fromkeys(self._confirmed, parcel)

    def opened(self, answers: Answers, model: bytes) -> Words:
        """Step 5: the shares that came; the sum of the active sites' numbers.

        `model` is the hash of what the sites were sent to train.
        """
        shares: dict[str, dict[str, bytes]] = {}
        for site, answer in answered(self, answers, self._confirmed):
            rows = table(answer, "sites", "shares")
            given = {str(of): s for of, s in rows if isinstance(s, bytes) and len(s) == SHARE_BYTES}
            if set(given) == set(self._sealed):
                shares[site] = given
            else:
                self.failed[site] = f"Expected a share of every site from {site!r}, got others."
        self._require(list(shares), "opened the sum")
        holders = {
            self.roster.points[site]: site for site in sorted(shares)[: self.terms.threshold]
        }
        basis = lagrange(list(holders))
        keys: list[tuple[bytes, int]] = []
        for of in sorted(self._sealed):
            parts = {point: shares[holder][of] for point, holder in holders.items()}
            try:
                secret = combine(parts, basis)
            except ShareError:
                secret = b""
            keys += self._masks(of, secret, model, list(holders.values()))
        shift(self._total, keys)
        return self.terms.numbers.reduced(self._total)

    def _masks(
        self, site: str, secret: bytes, model: bytes, holders: list[str]
    ) -> list[tuple[bytes, int]]:
        """Keys of what a site's masks leave in the sum, and the signs that take it off."""
        roster = self.roster
        if site in self._active:
            if commitment(roster, site, secret) == self._commitments[site]:
                return [(self_mask(roster, site, secret, model), -1)]
        elif secret and public(secret) == roster.by_name[site].masking:
            # With the sign of the dropped site: the active ones added the opposite.
            return [pair_mask(roster, secret, site, peer, model) for peer in self._active]
        raise SecureError(
            f"Expected shares of the secret of {site!r}, got some that do not belong together: "
            f"either {site!r} or one of {', '.join(holders)} sent a wrong share. The sum stays "
            "closed."
        )

    def _require(self, sites: list[str] | tuple[str, ...], what: str) -> None:
        if len(sites) >= self.terms.threshold:
            return
        reasons = "; ".join(
            f"{site}: {why}" for site, why in self.failed.items() if site not in sites
        )
        raise SecureError(below(self.terms, sites, what) + (f" {reasons}" if reasons else ""))


def _advert(site: str, answer: Parcel) -> Advert:
    values = [answer.get(name) for name in ("sealing", "masking", "magnitude", "signature")]
    return Advert(site, *values)  # type: ignore[arg-type]
