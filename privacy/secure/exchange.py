"""Rounds behind masks: the steps before and after training, group by group, at the server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.layout import Layout
from privacy.secure.config import SecureConfig
from privacy.secure.distributed import Noise
from privacy.secure.errors import SecureError
from privacy.secure.groups import drawn
from privacy.secure.server import Answers, Summation
from privacy.secure.terms import Terms, model_hash
from strategies.cohort import norm
from strategies.exchange import Ask, Decoded, Parcel, Received
from strategies.gate import MAX_EXAMPLES, Refusal, Reply

MASKED = "masked"
"""Name of the array that a site sends in place of its update."""


@dataclass(frozen=True)
class Masks:
    """Secure aggregation by masks; `settings` is a digest of the run's configuration.

    With `noise`, of which the sites add shares, a sum is divided by the sites that were asked.
    """

    secure: SecureConfig
    layout: Layout
    run: str
    settings: str
    seed: int
    max_update_norm: float
    noise: Noise | None = None

    def open(self, round_: int, asked: Sequence[str], sent: Decoded, ask: Ask) -> MaskedIntake:
        """Draw groups, collect keys and shares; raises CohortError for too few sites."""
        secure, groups = self.secure, self.secure.groups
        members = drawn(asked, groups, secure.min_group, self.seed, round_)
        common = Terms(
            self.run, round_, "", (), self.layout.digest, self.layout.size, secure.bits,
            secure.range, self.settings, self.noise,
        )  # fmt: skip
        sums = [
            Summation(replace(common, group=f"group {number}", members=tuple(names)))
            for number, names in enumerate(members, 1)
        ]
        whole = sent()
        model = model_hash(whole.payload, whole.fold)
        intake = MaskedIntake(sums, model, ask, secure.stage_s, self.max_update_norm)
        intake.begin()
        return intake


class MaskedIntake:
    """The sums of one round; a group below its threshold fails as a whole, the others go on."""

    def __init__(
        self, sums: Sequence[Summation], model: bytes, ask: Ask, timeout: float, max_norm: float
    ) -> None:
        self.parcels: Mapping[str, Parcel] = {}
        self._sums = list(sums)
        self._model = model
        self._ask = ask
        self._timeout = timeout
        self._max_norm = max_norm
        self._failed: dict[str, str] = {}

    @property
    def failed(self) -> Mapping[str, str]:
        """Why sites that were asked do not train."""
        return dict(self._failed)

    def begin(self) -> None:
        """Steps 1 and 2, after which `parcels` holds what the sites need for step 3."""
        adverts = self._asked("secure_advertise", {id(s): _invited(s) for s in self._sums})
        rosters = self._each(lambda s: s.advertised(_own(s, adverts)))
        shares = self._asked("secure_share", rosters)
        parcels = self._each(lambda s: s.shared(_own(s, shares)))
        self.parcels = {site: parcel for own in parcels.values() for site, parcel in own.items()}
        for s in self._sums:
            self._failed |= s.failed

    def admit(self, reply: Reply) -> None:
        """Step 3: check the envelope of masked numbers and add them up; raises Refusal."""
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
        if set(reply.arrays) != {MASKED}:
            raise Refusal(
                "extra-key", f"Expected masked numbers only, got {list(reply.arrays)!r:.80}."
            )
        try:
            s.add(reply.site, reply.arrays[MASKED].data)
        except SecureError as error:
            duplicate = reply.site in s.active
            raise Refusal("duplicate" if duplicate else "malformed-bytes", str(error)) from None

    def close(self) -> Received:
        """Steps 4 and 5: one row for each group whose sum could be opened."""
        asked = self._each(lambda s: s.survivors())
        signed = self._asked("secure_confirm", asked)
        confirmed = self._each(lambda s: s.confirmed(_own(s, signed)))
        shares = self._asked("secure_unmask", confirmed)
        rows: dict[str, Tensor] = {}
        weights: dict[str, float] = {}

        def open_(s: Summation) -> Answers:
            words = s.opened(_own(s, shares), self._model)
            fixed = len(s.terms.members) if s.terms.noise else 0
            scale = 1 if fixed else s.roster.scale
            mean_D, weight = s.terms.numbers.decode(words, scale, fixed)
            rows[s.terms.group] = self._checked(s, torch.from_numpy(mean_D), weight)
            weights[s.terms.group] = float(fixed or weight)
            return {}

        self._each(open_)
        sites = {s.terms.group: s.active for s in self._sums}
        return Received(rows, weights, sites, dict(self._failed))

    def _checked(self, s: Summation, mean_D: Tensor, weight: int) -> Tensor:
        """The only gate there is: a sum whose weight or norm is absurd is left out."""
        most, length = MAX_EXAMPLES * len(s.active), norm(mean_D)
        if not len(s.active) <= weight <= most or length > self._max_norm:
            raise SecureError(
                f"Expected a sum of {len(s.active)} updates of an L2 norm of at most "
                f"{self._max_norm:g} (strategy.max-update-norm), got a mean of norm {length:.4g} "
                f"with weight {weight}; one of the sites sent something else."
            )
        return mean_D

    def _asked(self, step: str, parcels: Mapping[int, Answers]) -> Answers:
        """The answers of the sites of all groups."""
        together = {site: parcel for own in parcels.values() for site, parcel in own.items()}
        return self._ask(step, together, self._timeout) if together else {}

    def _each(self, step: Callable[[Summation], Answers]) -> dict[int, Answers]:
        """Take each sum one step further; one that cannot go on is left out, with its sites."""
        done: dict[int, Answers] = {}
        for s in list(self._sums):
            try:
                done[id(s)] = step(s)
            except SecureError as error:
                self._sums.remove(s)
                self._failed |= {site: s.failed.get(site, str(error)) for site in s.terms.members}
        return done

    def __enter__(self) -> MaskedIntake:
        """Nothing to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """Forget the sums."""
        self._sums.clear()


def _invited(s: Summation) -> Answers:
    """What the sites of a group are sent for step 1."""
    t = s.terms
    parcel: Parcel = {
        "run": t.run, "round": t.round, "group": t.group, "members": list(t.members),
        "layout": t.layout, "size": t.size,
    }  # fmt: skip
    return dict.fromkeys(t.members, parcel)


def _own(s: Summation, answers: Answers) -> Answers:
    return {site: answers[site] for site in s.terms.members if site in answers}
