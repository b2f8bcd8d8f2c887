"""The one adapter between Flower's messages and the chain of stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from logging import INFO
from pathlib import Path
from typing import Protocol

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from models.layout import Layout
from models.seeds import derive
from strategies.cohort import Cohort, CohortError, Delta, norm
from strategies.config import StrategyConfig
from strategies.control import damped
from strategies.exchange import Exchange, Intake, Parcel, Plain, Received, Sent
from strategies.fold import accumulated, nbytes
from strategies.gap import product_gap
from strategies.gate import Refusal, Reply
from strategies.messages import (
    Scalar,
    SiteOutcome,
    Traffic,
    ask_sites,
    collect,
    decode_all,
    read_reply,
    relabelled,
    to_record,
)
from strategies.sampling import Selection, TooFewSites, fixed_share
from strategies.stage import Rule, State

_RESUME = "run again with run.resume='latest'"


class RoundError(RuntimeError):
    """A round that cannot end with the replies that came; the rounds before it are safe."""


@dataclass(frozen=True)
class RoundOutcome:
    """A finished round: the new global payload, the chain's state and what each site did.

    `fold` is what was added to the frozen weights so far, `bytes_down_fold` what sending it cost
    this round's sites, `product_gap` the error of averaging LoRA's factors apart.
    """

    round: int
    payload: dict[str, Tensor]
    state: dict[str, Tensor]
    sites: tuple[SiteOutcome, ...]
    wall_s: float
    aggregate_s: float
    update_norm: float
    product_gap: float | None = None
    fold: Mapping[str, Tensor] = field(default_factory=dict)
    bytes_down_fold: int = 0


class Listener(Protocol):
    """Told of every finished round and evaluation, in order."""

    def asked(self, kind: str, round_: int, sites: Sequence[str]) -> None:
        """Called before messages of a kind are sent to `sites`; what it raises ends the run."""

    def round_finished(self, outcome: RoundOutcome) -> None:
        """Called after each round; what it raises ends the run."""

    def evaluated(self, round_: int, sites: Sequence[SiteOutcome]) -> None:
        """Called with the scores of the global payload after `round_` rounds."""


# Round, node id -> site, payload before the round, replies: the replies that the gate is shown.
Tamper = Callable[[int, Mapping[int, str], Tensor, Iterable[Message]], Iterable[Message]]
# Round, payload, fold so far: what the server itself would send, were it a site.
Trusted = Callable[[int, Mapping[str, Tensor], Mapping[str, Tensor]], Mapping[str, Tensor]]


class ComposedStrategy(Strategy):
    """Plans rounds, gates replies and runs the chain; the only subclass of Flower's Strategy.

    `members` maps the names of the sites that are present, after a number of finished rounds, to
    their node ids, `plan` gives what a site needs to know of a round; `exchange` is how updates
    travel, as they are unless it is given. `tamper` is the adversary of a simulation, `trusted`
    trains the server's own update and `lora_scale` is alpha / rank, for rules that ask for them.
    `selection` chooses the sites of a round, `strategy.fraction` of them where it is not given.
    Given the same seed, members and replies, the result is the same bit for bit, in whatever order
    the replies arrive.
    """

    def __init__(
        self,
        settings: StrategyConfig,
        chain: Rule,
        layout: Layout,
        *,
        seed: int,
        quorum: float,
        members: Callable[[Grid, int], Mapping[str, int]],
        plan: Callable[[int, str], Mapping[str, Scalar]],
        spool: Path,
        listener: Listener,
        tamper: Tamper | None = None,
        trusted: Trusted | None = None,
        lora_scale: float = 1.0,
        selection: Selection | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        self._settings = settings
        self._chain = chain
        self._layout = layout
        self._seed = seed
        self._selection = selection or fixed_share(
            settings.fraction, settings.min_sites, seed, quorum
        )
        self._members = members
        self._plan = plan
        self._spool = spool
        self._listener = listener
        self._tamper = tamper
        self._trusted = trusted
        self._lora_scale = lora_scale
        self._exchange = exchange or Plain(settings, layout, spool)
        self._intake: Intake | None = None
        self._traffic = Traffic()
        self._done = 0
        self._base_D = torch.zeros(layout.size)
        self._state: State = chain.init(layout.size)
        self.fold: dict[str, Tensor] = {}
        self._asked: dict[int, str] = {}
        self._unready: Mapping[str, str] = {}
        self._present = 0
        self._started = 0.0

    def restore(self, done: int, state: State, fold: Mapping[str, Tensor] | None = None) -> None:
        """Go on after round `done` with the chain's state and the fold of that moment."""
        self._done = done
        self._state = state
        self.fold = dict(fold or {})

    def summary(self) -> None:
        """Log what the strategy is made of."""
        s = self._settings
        log(INFO, "\t├──> Chain: %s", self._chain.name)
        log(INFO, "\t├──> Sites per round: %.0f %% of those present", 100 * s.fraction)
        size, digest = self._layout.size, self._layout.digest
        log(INFO, "\t└──> Payload: %d values, layout %s", size, digest[:12])

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the round's sites by name and address each with the payload and the plan."""
        members = self._members(grid, server_round - 1)
        self._started = time.monotonic()
        try:
            names = self._selection.draw(members, server_round)
            self._asked = {members[name]: name for name in names}
            self._present = len(members)
            plan = partial(self._plan, server_round)
            nodes = {site: members[site] for site in names}
            self._traffic = Traffic()
            ask = partial(ask_sites, grid, nodes, plan, self._traffic)

            def sent() -> Sent:
                return Sent(decode_all(arrays), self.fold)

            self._intake = self._exchange.open(server_round, sorted(names), sent, ask)
        except (TooFewSites, CohortError) as error:
            raise RoundError(f"{error} Finished rounds are safe: {_RESUME}.") from error
        parcels = self._intake.parcels
        self._traffic.sent(parcels)
        return self._messages(MessageType.TRAIN, server_round, arrays, config, parcels)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Address every site that is present, and can, with the payload to score."""
        members = self._members(grid, server_round)
        ask = partial(ask_sites, grid, members, partial(self._plan, server_round), Traffic())
        self._unready = self._exchange.ready(sorted(members), ask)
        self._asked = {n: name for name, n in members.items() if name not in self._unready}
        return self._messages(MessageType.EVALUATE, server_round, arrays, config)

    def _messages(
        self,
        kind: str,
        round_: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        parcels: Mapping[str, Parcel] | None = None,
    ) -> list[Message]:
        records: dict[str, ArrayRecord] = {"arrays": arrays}
        if self.fold:
            records["fold"] = to_record(self.fold)
        common = {**config, "round": round_, "layout": self._layout.digest}

        def message(node_id: int, site: str) -> Message:
            content = RecordDict({**records})
            content["plan"] = ConfigRecord({**self._plan(round_, site), **common})
            if parcels and parcels[site]:
                content["parcel"] = ConfigRecord(dict(parcels[site]))
            return Message(content, node_id, kind, group_id=str(round_))

        nodes = {site: node_id for node_id, site in self._asked.items()}
        asked = sorted(site for site in nodes if parcels is None or site in parcels)
        self._listener.asked(kind, round_, asked)
        return [message(nodes[site], site) for site in asked]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Gate the replies as they come, run the chain over the admitted, tell the listener.

        Raises RoundError when fewer sites than the quorum, or than the rule needs, answered well.
        """
        assert self._intake is not None  # configure_train opened it
        with self._intake as intake:
            if self._tamper:
                replies = self._tamper(server_round, self._asked, self._base_D, replies)
            outcomes = self._admit(intake, replies)
            got = intake.close()
            outcomes = relabelled(outcomes, got.failed, "failed")
            self._require_quorum(server_round, len(got.counted), outcomes)
            received = time.monotonic()
            cohort = self._cohort(got)
            share = len(got.counted) / self._present
            delta = damped(self._run_chain(server_round, cohort, outcomes), share)
            gap = self._gap(cohort, got)
        left_out = {
            s: why for row, why in delta.left_out.items() for s in got.sites.get(row, (row,))
        }
        outcomes = relabelled(outcomes, left_out, "screened")
        folded_down = nbytes(self.fold) * len(self._asked)
        self.fold = accumulated(self.fold, delta.fold)
        self._base_D, self._done = self._base_D + delta.vector_D, server_round
        payload = self._layout.unflatten(self._base_D)
        update_norm = norm(delta.vector_D)
        now = time.monotonic()
        self._listener.round_finished(
            RoundOutcome(
                server_round,
                payload,
                self._state,
                self._traffic.added(outcomes),
                now - self._started,
                now - received,
                update_norm,
                gap,
                self.fold,
                folded_down,
            )
        )
        return to_record(payload), MetricRecord({"update-norm": update_norm})

    def _admit(self, intake: Intake, replies: Iterable[Message]) -> tuple[SiteOutcome, ...]:
        outcomes: dict[str, SiteOutcome] = {}
        admitted: set[str] = set()
        down = self._bytes_down()
        for message in replies:
            site = self._asked.get(message.metadata.src_node_id)
            if site is None:
                why = message.error.reason if message.has_error() else "its node was not asked"
                log(INFO, "A reply is dropped: %s.", why)
                continue
            outcome, reply = read_reply(site, message, down)
            if reply is None:
                intake.lost(site, outcome.reason)
            else:
                try:
                    self._keep(intake, reply)
                    admitted.add(site)
                except Refusal as refusal:
                    outcome = replace(outcome, status="quarantined", reason=str(refusal))
            if site in admitted and outcome.status != "ok":  # its first good reply stays
                outcomes[site] = replace(outcomes[site], reason=outcome.reason)
            else:
                outcomes[site] = outcome
        for site in self._asked.values():
            if why := intake.failed.get(site):
                outcomes.setdefault(site, SiteOutcome(site, "failed", why, {}, 0, 0))
            late = "No reply by the deadline (run.deadline-s)."
            outcomes.setdefault(site, SiteOutcome(site, "missing", late, {}, down, 0))
        return tuple(outcomes[site] for site in sorted(outcomes))

    def _keep(self, intake: Intake, reply: Reply) -> None:
        try:
            intake.admit(reply)
        except OSError as error:
            raise RoundError(
                f"Expected room for the updates of a round in {str(self._spool)!r}, but: {error}. "
                f"Finished rounds are safe: free some space and {_RESUME}."
            ) from error

    def _gap(self, cohort: Cohort, got: Received) -> float | None:
        """The error of averaging LoRA's factors apart, where each row is one site's update."""
        single = all(len(sites) == 1 for sites in got.sites.values())
        return product_gap(cohort, self._settings.rule) if single and got.sites else None

    def _require_quorum(self, round_: int, admitted: int, outcomes: Sequence[SiteOutcome]) -> None:
        needed = self._selection.required(len(self._asked))
        if admitted >= needed:
            return
        raise RoundError(
            f"Expected at least {needed} of {len(self._asked)} sites to answer well in round "
            f"{round_}, got {admitted} ({_reasons(outcomes)}). Finished rounds are safe: mend "
            f"the sites and {_RESUME}, or lower run.quorum or strategy.min-sites."
        )

    def _bytes_down(self) -> int:
        return 4 * self._layout.size + nbytes(self.fold)

    def _cohort(self, got: Received) -> Cohort:
        if not got.rows:  # only a selection that lets a round go on without updates comes here
            return Cohort.nobody(self._layout, self._base_D)
        return Cohort.of(self._layout, self._base_D, got.rows, got.weights)

    def _run_chain(self, round_: int, cohort: Cohort, outcomes: Sequence[SiteOutcome]) -> Delta:
        # Where too few are left for f liars, those that the gate caught count among them.
        caught = sum(outcome.status == "quarantined" for outcome in outcomes)
        cohort = replace(cohort, lora_scale=self._lora_scale, caught=caught)
        if self._trusted:
            own = self._trusted(round_, self._layout.unflatten(self._base_D), self.fold)
            cohort = replace(cohort, trusted_D=self._layout.flatten(own))
        generator = torch.Generator().manual_seed(derive(self._seed, "chain", round_))
        try:
            delta, self._state = self._chain.apply(self._state, cohort, generator)
        except CohortError as error:
            raise RoundError(
                f"Expected updates that {self._chain.name} can aggregate in round {round_}, but: "
                f"{error} Not among them: {_reasons(outcomes) or 'no site'}. Finished rounds are "
                f"safe: {_RESUME}."
            ) from error
        return delta

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Hand the sites' scores to the listener; they are never mixed into the model."""
        outcomes = [
            read_reply(site, message, self._bytes_down())[0]
            for message in replies
            if (site := self._asked.get(message.metadata.src_node_id)) is not None
        ]
        outcomes += [SiteOutcome(s, "failed", why, {}, 0, 0) for s, why in self._unready.items()]
        self._listener.evaluated(server_round, sorted(outcomes, key=lambda o: o.site))
        return None

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds that are not done yet; unlike Flower's own loop this one can resume.

        Training replies carry the score of the payload they started from, so that only the last
        payload, and the first where not every site trains, need a message of their own.
        """
        train_config = train_config or ConfigRecord()
        evaluate_config = evaluate_config or ConfigRecord()
        self.summary()
        result = Result()
        arrays = initial_arrays
        self._base_D = self._layout.flatten(decode_all(initial_arrays))
        if self._done == 0 and self._settings.fraction < 1:
            self._evaluate(grid, 0, arrays, evaluate_config, timeout)
        for round_ in range(self._done + 1, num_rounds + 1):
            log(INFO, "[ROUND %s/%s]", round_, num_rounds)
            messages = self.configure_train(round_, arrays, train_config, grid)
            new, metrics = self.aggregate_train(round_, collect(grid, messages, timeout))
            assert new is not None and metrics is not None
            arrays, result.train_metrics_clientapp[round_] = new, metrics
        self._evaluate(grid, self._done, arrays, evaluate_config, timeout)
        result.arrays = arrays
        return result

    def _evaluate(
        self, grid: Grid, round_: int, arrays: ArrayRecord, config: ConfigRecord, timeout: float
    ) -> None:
        messages = self.configure_evaluate(round_, arrays, config, grid)
        self.aggregate_evaluate(round_, collect(grid, messages, timeout))


def _reasons(outcomes: Sequence[SiteOutcome]) -> str:
    return "; ".join(f"{o.site}: {o.reason}" for o in outcomes if o.status != "ok")
