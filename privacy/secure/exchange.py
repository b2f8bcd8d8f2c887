"""Rounds behind masks: the steps before and after training, group by group, at the server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from models.layout import Layout
from privacy.secure.config import SecureConfig
from privacy.secure.distributed import Noise
from privacy.secure.groups import drawn
from privacy.secure.intake import Answers, SumIntake, invited, own
from privacy.secure.server import Summation
from privacy.secure.terms import Terms, model_hash
from strategies.exchange import Ask, Decoded, Exchange, Received

MASKED = "masked"
"""Name of the array that a site sends in place of its update."""


@dataclass(frozen=True)
class Masks(Exchange):
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


class MaskedIntake(SumIntake[Summation]):
    """The sums of one round behind masks; a group below its threshold fails as a whole."""

    def __init__(
        self, sums: Sequence[Summation], model: bytes, ask: Ask, timeout: float, max_norm: float
    ) -> None:
        super().__init__(sums, MASKED, ask, timeout, max_norm)
        self._model = model

    def begin(self) -> None:
        """Steps 1 and 2, after which `parcels` holds what the sites need for step 3."""
        adverts = self._asked("secure_advertise", {id(s): invited(s.terms) for s in self._sums})
        rosters = self._each(lambda s: s.advertised(own(s, adverts)))
        shares = self._asked("secure_share", rosters)
        parcels = self._each(lambda s: s.shared(own(s, shares)))
        self.parcels = {site: parcel for told in parcels.values() for site, parcel in told.items()}
        for s in self._sums:
            self._failed |= s.failed

    def close(self) -> Received:
        """Steps 4 and 5: one row for each group whose sum could be opened."""
        asked = self._each(lambda s: s.survivors())
        signed = self._asked("secure_confirm", asked)
        confirmed = self._each(lambda s: s.confirmed(own(s, signed)))
        shares = self._asked("secure_unmask", confirmed)

        def open_(s: Summation) -> Answers:
            words = s.opened(own(s, shares), self._model)
            self._keep(s, words, 1 if s.terms.noise else s.roster.scale)
            return {}

        self._each(open_)
        return self._received()

    def __enter__(self) -> MaskedIntake:
        """Nothing to do."""
        return self
