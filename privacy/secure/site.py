"""A site's part of secure aggregation (Bonawitz et al. 2017, figure 4), step by step.

Each step takes the session that the step before it returned, and the message of the server. It
raises SecureError where server or peers do not keep to the protocol; then the session is over.
Whoever stores sessions sees to it that each one is used once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import numpy as np

from privacy.secure.distributed import Noise
from privacy.secure.errors import SecureError
from privacy.secure.fixed_point import Words
from privacy.secure.keys import NodeKey, Pinned, agree, bound, fresh, public, seal, unseal
from privacy.secure.masks import shift
from privacy.secure.shamir import SHARE_BYTES, split
from privacy.secure.terms import Advert, Roster, Terms, below, magnitude, table
from strategies.exchange import Parcel

Step = Literal["advertised", "shared", "masked", "confirmed"]


@dataclass(frozen=True)
class Session:
    """What a site must remember between two steps of one sum; all of it is secret.

    `held` has, of each site, the shares of its two secrets that this site keeps: the seed of its
    own mask, and the private key of the masks that it has in common with others.
    """

    step: Step
    site: str
    terms: Terms
    sealing: bytes = b""
    masking: bytes = b""
    seed: bytes = b""
    roster: Roster | None = None
    held: Mapping[str, tuple[bytes, bytes]] = field(default_factory=dict)
    active: tuple[str, ...] = ()

    def require(self, step: Step) -> None:
        """Raise SecureError for a message that comes out of turn."""
        if self.step != step:
            raise SecureError(
                f"Expected a message for a site that has {step}, got one for {self.site!r}, which "
                f"has {self.step}; the server asks twice, or in another order."
            )

    @property
    def known(self) -> Roster:
        """The roster, once it has come."""
        assert self.roster is not None
        return self.roster

    def dumps(self) -> str:
        """As text, to be kept between two messages."""
        roster = self.roster and {k: _hexed(v) for k, v in self.roster.parcel().items()}
        own = {name: getattr(self, name).hex() for name in ("sealing", "masking", "seed")}
        held = {site: [share.hex() for share in shares] for site, shares in self.held.items()}
        plain = {"step": self.step, "site": self.site, "active": self.active}
        return json.dumps(
            {**plain, **own, "held": held, "terms": asdict(self.terms), "roster": roster}
        )

    @classmethod
    def loads(cls, text: str) -> Session:
        """The inverse of `dumps`."""
        values = json.loads(text)
        told = values["terms"]
        noise = Noise(**told["noise"]) if told["noise"] else None
        terms = Terms(**{**told, "members": tuple(told["members"]), "noise": noise})
        columns = values["roster"] or {}
        for name in ("sealing", "masking", "signatures"):
            columns[name] = [bytes.fromhex(entry) for entry in columns.get(name, [])]
        sealing, masking, seed = (bytes.fromhex(values[n]) for n in ("sealing", "masking", "seed"))
        held = {
            site: (bytes.fromhex(a), bytes.fromhex(b)) for site, (a, b) in values["held"].items()
        }
        roster = Roster.read(terms, columns) if values["roster"] else None
        step, site, active = values["step"], values["site"], tuple(values["active"])
        return cls(step, site, terms, sealing, masking, seed, roster, held, active)


def advertise(terms: Terms, site: str, weight: int, key: NodeKey) -> tuple[Session, Parcel]:
    """Step 1: two fresh key pairs, signed with the site's node key."""
    if site not in terms.members:
        raise SecureError(f"Expected a group with this site, {site!r}, got {terms.members}.")
    session = Session("advertised", site, terms, sealing=fresh(), masking=fresh())
    advert = Advert(site, public(session.sealing), public(session.masking), magnitude(weight), b"")
    advert = replace(advert, signature=key.sign("advert", *advert.signed(terms)))
    parcel: Parcel = {
        "sealing": advert.sealing,
        "masking": advert.masking,
        "magnitude": advert.magnitude,
        "signature": advert.signature,
    }
    return session, parcel


def share(
    session: Session, message: Parcel, key: NodeKey, pinned: Pinned
) -> tuple[Session, Parcel]:
    """Step 2: check who takes part, and share this site's two secrets among them, sealed."""
    session.require("advertised")
    terms, site = session.terms, session.site
    roster = Roster.read(terms, message)
    _check_own(session, roster)
    for advert in roster.adverts:
        pinned.check(advert.site, advert.signature, "advert", *advert.signed(terms))
    seed = os.urandom(32)
    points = list(roster.points.values())
    seeds = split(seed, points, terms.threshold)
    keys = split(session.masking, points, terms.threshold)
    peers = [name for name in roster.names if name != site]
    sealed = [
        seal(
            agree(session.sealing, roster.by_name[peer].sealing, *_way(roster, site, peer)),
            seeds[roster.points[peer]] + keys[roster.points[peer]],
            bound("share", *_way(roster, site, peer)),
        )
        for peer in peers
    ]
    own = {site: (seeds[roster.points[site]], keys[roster.points[site]])}
    after = replace(session, step="shared", seed=seed, roster=roster, held=own)
    parcel: Parcel = {
        "sites": peers,
        "sealed": sealed,
        "signature": key.sign("roster", roster.digest),
        "commitment": commitment(roster, site, seed),
    }
    return after, parcel


def mask(
    session: Session, message: Parcel, words: Words, model: bytes, pinned: Pinned
) -> tuple[Session, Words]:
    """Step 3: open the shares of the others, and add this site's masks to its numbers.

    `message` has the sealed shares, and everyone's signature under the same roster; `model` is the
    hash of what this site was sent to train.
    """
    session.require("shared")
    roster, site = session.known, session.site
    held = dict(session.held)
    for peer, sealed, signature in table(message, "sites", "sealed", "signatures"):
        if not isinstance(peer, str) or peer not in roster.by_name or peer in held:
            raise SecureError(f"Expected shares of the sites in the roster, got {peer!r:.80}.")
        if not isinstance(sealed, bytes) or not isinstance(signature, bytes):
            raise SecureError(
                f"Expected a sealed and signed share of {peer!r}, got something else."
            )
        pinned.check(peer, signature, "roster", roster.digest)
        way = _way(roster, peer, site)
        sealing = agree(session.sealing, roster.by_name[peer].sealing, *way)
        both = unseal(sealing, sealed, bound("share", *way), peer)
        held[peer] = (both[:SHARE_BYTES], both[SHARE_BYTES:])
    if len(held) < session.terms.threshold:
        raise SecureError(below(session.terms, list(held), "shared their secrets"))
    masked = np.array(words, copy=True)
    keys = [(self_mask(roster, site, session.seed, model), 1)]
    for peer in held:
        if peer != site:
            keys.append(pair_mask(roster, session.masking, site, peer, model))
    shift(masked, keys)
    after = replace(session, step="masked", sealing=b"", masking=b"", seed=b"", held=held)
    return after, session.terms.numbers.reduced(masked)


def confirm(session: Session, message: Parcel, key: NodeKey) -> tuple[Session, Parcel]:
    """Step 4: sign who is in the sum and who dropped out, so that all open the same one."""
    session.require("masked")
    active, dropped = _names(message, "active"), _names(message, "dropped")
    both = sorted(set(active) & set(dropped))
    if both:
        raise SecureError(
            f"Expected {both[0]!r} to be active or dropped, got it named as both; with both of its "
            "secrets the server could read its update."
        )
    if {*active, *dropped} != set(session.held) or session.site not in active:
        raise SecureError(
            f"Expected the sites of this sum, {', '.join(sorted(session.held))}, as active or "
            f"dropped, got {', '.join([*active, *dropped])}; the server has told the sites "
            "different rosters."
        )
    if len(active) < session.terms.threshold:
        raise SecureError(below(session.terms, active, "sent masked updates"))
    signature = key.sign("survivors", *survivors(session.known, active, dropped))
    return replace(session, step="confirmed", active=active), {"signature": signature}


def unmask(session: Session, message: Parcel, pinned: Pinned) -> Parcel:
    """Step 5: where enough sites signed the same, one secret's share of each: never both.

    Ends the session: it must be destroyed before the answer leaves.
    """
    session.require("confirmed")
    dropped = tuple(sorted(set(session.held) - set(session.active)))
    what = survivors(session.known, session.active, dropped)
    signers: set[str] = set()
    for peer, signature in table(message, "sites", "signatures"):
        if not isinstance(signature, bytes) or peer not in session.active or peer in signers:
            raise SecureError(f"Expected one signature of each active site, got {peer!r:.80}.")
        pinned.check(str(peer), signature, "survivors", *what)
        signers.add(str(peer))
    if len(signers) < session.terms.threshold:
        raise SecureError(below(session.terms, sorted(signers), "confirmed the same sum"))
    sites = sorted(session.held)
    return {
        "sites": sites,
        "shares": [session.held[site][site not in session.active] for site in sites],
    }


def commitment(roster: Roster, site: str, seed: bytes) -> bytes:
    """Hash by which the server knows that it has put a seed together rightly."""
    return bound("seed", roster.digest, site, seed)


def self_mask(roster: Roster, site: str, seed: bytes, model: bytes) -> bytes:
    """Key of the mask that a site has to itself."""
    return bound("self mask", roster.digest, site, model, seed)


def pair_mask(
    roster: Roster, masking: bytes, site: str, peer: str, model: bytes
) -> tuple[bytes, int]:
    """Key of the mask that two sites have in common, and its sign at the first of them."""
    first, second = sorted((site, peer))
    other = roster.by_name[peer].masking
    key = agree(masking, other, "pair mask", roster.digest, first, second, model)
    return key, 1 if site == first else -1


def survivors(
    roster: Roster, active: tuple[str, ...], dropped: tuple[str, ...]
) -> tuple[bytes | str | int, ...]:
    """What sites sign about who is in a sum."""
    return (roster.digest, len(active), *active, *dropped)


def _way(roster: Roster, sender: str, receiver: str) -> tuple[str, bytes, str, str]:
    return ("seal", roster.digest, sender, receiver)


def _check_own(session: Session, roster: Roster) -> None:
    own = roster.by_name.get(session.site)
    keys = (public(session.sealing), public(session.masking))
    if own is None or (own.sealing, own.masking) != keys:
        raise SecureError(
            f"Expected the keys that {session.site!r} advertised, got "
            f"{'others' if own else 'none'}; the server changed the roster, or repeats an old one."
        )


def _names(message: Parcel, name: str) -> tuple[str, ...]:
    names = [row[0] for row in table(message, name)]
    if not all(isinstance(entry, str) for entry in names) or len(set(names)) != len(names):
        raise SecureError(f"Expected distinct names of {name} sites, got {names!r:.200}.")
    return tuple(sorted(str(entry) for entry in names))


def _hexed(column: object) -> object:
    assert isinstance(column, list)
    return [entry.hex() if isinstance(entry, bytes) else entry for entry in column]
