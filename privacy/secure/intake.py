"""What all ways of summing in secret share at the server: replies, groups that fail, rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from privacy.secure.errors import SecureError
from privacy.secure.fixed_point import Words
from privacy.secure.terms import Terms
from strategies.cohort import norm
from strategies.exchange import Ask, Parcel, Received
from strategies.gate import MAX_EXAMPLES, Refusal, Reply

Answers = Mapping[str, Parcel]


class Sum(Protocol):
    """A sum over the sites of a group; `failed` says of sites that have dropped out why."""

    terms: Terms
    failed: dict[str, str]

    @property
    def active(self) -> tuple[str, ...]:
        """Sites that are in the sum, sorted."""

    def add(self, site: str, data: bytes) -> None:
        """Add what a site sent; raises SecureError."""


S = TypeVar("S", bound=Sum)


class SumIntake(Generic[S]):
    """The sums of one round; a group that cannot be summed fails as a whole, the others go on.

    `array` is the name of what a site sends in place of its update.
    """

    def __init__(
        self, sums: Sequence[S], array: str, ask: Ask, timeout: float, max_norm: float
    ) -> None:
        self.parcels: Mapping[str, Parcel] = {}
        self._sums = list(sums)
        self._array = array
        self._ask = ask
        self._timeout = timeout
        self._max_norm = max_norm
        self._failed: dict[str, str] = {}
        self._rows: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    @property
    def failed(self) -> Mapping[str, str]:
        """Why sites that were asked do not train."""
        return dict(self._failed)

    def lost(self, site: str, why: str) -> None:
        """A dropout, like one that never answers."""

    def admit(self, reply: Reply) -> None:
        """Check the envelope of what a site sent and add it up; raises Refusal."""
        s = next((s for s in self._sums if reply.site in s.terms.members), None)
        if s is None:
            raise Refusal("unasked", f"Expected no reply from {reply.site!r:.80} in this round.")
        if type(reply.round) is not int or reply.round != s.terms.round:
            raise Refusal(
                "wrong-round",
                f"Expected a reply to round {s.terms.round}, got {reply.round!r:.40}.",
            )
        if reply.layout_digest != s.terms.layout:
            raise Refusal("layout", f"Expected a reply to layout {s.terms.layout[:12]}.")
        if set(reply.arrays) != {self._array}:
            raise Refusal(
                "extra-key", f"Expected {self._array} numbers only, got {list(reply.arrays)!r:.80}."
            )
        try:
            s.add(reply.site, reply.arrays[self._array].data)
        except SecureError as error:
            duplicate = reply.site in s.active
            raise Refusal("duplicate" if duplicate else "malformed-bytes", str(error)) from None

    def _keep(self, s: S, words: Words, scale: int) -> None:
        """The row of a sum; one whose weight or norm is absurd is left out: SecureError.

        Where the sites add noise in shares, the sum is divided by all that were asked.
        """
        fixed = len(s.terms.members) if s.terms.noise else 0
        mean_D, weight = s.terms.numbers.decode(words, scale, fixed)
        row_D = torch.from_numpy(mean_D)
        most, length = MAX_EXAMPLES * len(s.active), norm(row_D)
        if not len(s.active) <= weight <= most or length > self._max_norm:
            raise SecureError(
                f"Expected a sum of {len(s.active)} updates of an L2 norm of at most "
                f"{self._max_norm:g} (strategy.max-update-norm), got a mean of norm {length:.4g} "
                f"with weight {weight}; one of the sites sent something else."
            )
        self._rows[s.terms.group] = row_D
        self._weights[s.terms.group] = float(fixed or weight)

    def _received(self) -> Received:
        """The rows of the groups that are left."""
        sites = {s.terms.group: s.active for s in self._sums}
        return Received(self._rows, self._weights, sites, dict(self._failed))

    def _asked(self, step: str, parcels: Mapping[int, Answers]) -> Answers:
        """The answers of the sites of all groups."""
        together = {site: parcel for own in parcels.values() for site, parcel in own.items()}
        return self._ask(step, together, self._timeout) if together else {}

    def _each(self, step: Callable[[S], Answers]) -> dict[int, Answers]:
        """Take each sum one step further; one that cannot go on is left out, with its sites."""
        done: dict[int, Answers] = {}
        for s in list(self._sums):
            try:
                done[id(s)] = step(s)
            except SecureError as error:
                self._sums.remove(s)
                self._failed |= {site: s.failed.get(site, str(error)) for site in s.terms.members}
        return done

    def __exit__(self, *_: object) -> None:
        """Forget the sums."""
        self._sums.clear()


def proposed(terms: Terms) -> Parcel:
    """What a site is told of a sum."""
    return {
        "run": terms.run, "round": terms.round, "group": terms.group,
        "members": list(terms.members), "layout": terms.layout, "size": terms.size,
    }  # fmt: skip


def invited(terms: Terms) -> Answers:
    """What the sites of a group are sent for the first step."""
    return dict.fromkeys(terms.members, proposed(terms))


def own(s: Sum, answers: Answers) -> Answers:
    """The answers of the sites of one group."""
    return {site: answers[site] for site in s.terms.members if site in answers}


def answered(s: Sum, answers: Answers, expected: Sequence[str]) -> list[tuple[str, Parcel]]:
    """The answers of those who were asked, by name; all others have dropped out."""
    for site in expected:
        if site not in answers:
            s.failed.setdefault(site, "No answer in time (secure.stage-s).")
        elif (error := answers[site].get("error")) is not None:
            s.failed[site] = str(error)
    good = [site for site in expected if site in answers and "error" not in answers[site]]
    return [(site, answers[site]) for site in sorted(good)]
