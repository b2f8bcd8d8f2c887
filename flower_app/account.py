"""A site's account: its policy, and the ledger of what it has released."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from flower_app.config import Config
from flower_app.node import NodeConfig
from flower_app.releases import unit_of
from flower_app.sitestate import file_name, require_state_path
from models.paths import located
from models.section import ConfigError
from privacy.events import Event, Part, Unit
from privacy.ledger import FILE, Ledger
from privacy.policy import Policy, Request, read_policy
from strategies.messages import Scalar


class SiteAccount:
    """What one site may release in a run, and what it has released in all runs.

    Events are stamped with the run and the site here, so that callers say mechanism, unit, noise,
    sampling, count, part and round only. `plan` is the message's record: `run` names the run,
    `state` the folder of a simulation. A site without a policy allows everything, but a deployed
    one with a state-path keeps a ledger of whatever it releases, with noise or without; one in a
    simulation, whose runs are apart, of what it releases with noise. Raises ConfigError for a
    policy that cannot be read, and where the ledger has no place to be.
    """

    def __init__(
        self,
        config: Config,
        node: NodeConfig,
        plan: Mapping[str, Scalar],
        *,
        site: str,
        rows: int,
        base: str,
    ) -> None:
        self._config = config
        self._site = site
        self._run = str(plan.get("run") or config.run.name)
        self._split = _split(config, node)
        self._simulated = node.simulated
        self._policy = policy_of(node)
        self._request = Request(
            unit_of(config) or "none",
            config.payload.kind,
            base,
            rows,
            config.run.rounds,
            secure_aggregation=config.secure.on,
        )
        if config.privacy.on:
            require_state_path(node, f"privacy.unit={config.privacy.unit!r}")
        if config.split.noise:
            require_state_path(node, f"split.noise={config.split.noise:g}")
        if self._policy and self._policy.max_epsilon:
            require_state_path(node, "max-epsilon of this site's policy")
        path = ledger_path(node, plan, site)
        self._ledger = Ledger(path) if path else None
        self._rounds = Ledger(path.with_name("rounds.jsonl")) if path else None

    def admit(self) -> None:
        """Refuse a run that the policy does not allow for what it is; raises PolicyError."""
        if self._policy:
            self._policy.admit(self._request)

    def begin(self, round_: int) -> None:
        """Refuse to train in a round that the run does not have, or in one too many of it.

        Under `max-rounds` every message that asks for training counts, in a file beside the
        ledger, since nothing else keeps a server from asking for one round again and again. Raises
        ConfigError, PolicyError, and LedgerError where it cannot be counted.
        """
        last = self._config.run.rounds
        if not 1 <= round_ <= last:
            raise ConfigError(f"Expected a round from 1 to run.rounds={last}, got {round_}.")
        if self._policy and self._policy.max_rounds and self._rounds:
            asked = Event("none", "record", run=self._run, round=round_, site=self._site)
            self._rounds.append([asked], self._check_rounds)

    def _check_rounds(self, past: Sequence[Event], new: Sequence[Event]) -> None:
        assert self._policy
        mine = [event for event in past if (event.run, event.site) == (self._run, self._site)]
        self._policy.check_rounds(len(mine) + len(new))

    def planned(self, events: Sequence[Event], rounds: int) -> None:
        """Refuse a run that would exceed the policy, given all of its `rounds` still to come.

        Writes nothing. Raises PolicyError with what the run would spend, what was spent and what
        remains, and LedgerError for a ledger that cannot be trusted.
        """
        self.admit()
        past = self._ledger.events() if self._ledger else []
        if rounds:
            stamped = self._stamped(events)
            if self._policy:
                self._policy.check_noise(stamped)
            self._budget(past, stamped)

    def charge(
        self, events: Sequence[Event], run: Sequence[Event] = (), part: Part = "training"
    ) -> None:
        """Write down what is about to be released, then return: call it before anything is.

        A round that is trained again is charged again. `run` is what the run releases beside, by
        whose noise it is judged too; `part` are the rows that are released where it has no noise.
        Raises PolicyError where the policy or what is left of its budget does not allow it, and
        LedgerError where it could not be written down: nothing may leave the site then.
        """
        self.admit()
        stamped = self._stamped(events)
        plain = self._stamped(self._plain(events, part))
        if self._policy:
            self._policy.check_noise([*run, *stamped])
        if self._ledger and (stamped or plain):
            self._ledger.append([*stamped, *plain], lambda past, _: self._budget(past, stamped))
        else:
            self._budget([], stamped)

    def _plain(self, events: Sequence[Event], part: Part) -> list[Event]:
        """A release without noise for records, of `part`, which a ledger must not pass over.

        Not even before the first one with noise, which it would leave with an epsilon that these
        rows do not have. Beside the vectors of a stream there is one, of the same rows; without
        noise these vectors are such a release themselves.
        """
        if self._config.privacy.on or not self._ledger:
            return []
        parts = sorted({event.part for event in events})
        if not parts and not self._simulated:
            parts = [part]
        plain = [Event("none", "record", part=part) for part in parts]
        if self._config.payload.kind == "split" and not events:
            plain += [replace(e, unit="position", relation="replace-one") for e in plain]
        return plain

    def _budget(self, past: Sequence[Event], new: Sequence[Event]) -> None:
        if self._policy and new:
            self._policy.check_budget(_unit(new), past, new)

    def _stamped(self, events: Sequence[Event]) -> list[Event]:
        return [replace(e, run=self._run, site=self._site, split=self._split) for e in events]


class ServerAccount:
    """What the server has released about its sites in all runs of one `run.output-dir`."""

    def __init__(self, config: Config, run: str) -> None:
        self._run = run
        self.ledger = server_ledger(config)

    def charge(self, *events: Event) -> None:
        """Write down what is about to be released: call it before the noise is drawn.

        Raises LedgerError where it could not be written: nothing may be made of the round then.
        """
        self.ledger.append([replace(event, run=self._run) for event in events])

    def events(self) -> list[Event]:
        """What this run has released, rounds that were done twice included."""
        return [event for event in self.ledger.events() if event.run == self._run]


def server_ledger(config: Config) -> Ledger:
    """The ledger of all runs of an output folder."""
    return Ledger(located(config.run.output_dir) / FILE)


def policy_of(node: NodeConfig) -> Policy | None:
    """The policy that a node names, None without one; raises ConfigError for one not readable."""
    return read_policy(located(node.policy_path)) if node.policy_path else None


def ledger_path(node: NodeConfig, plan: Mapping[str, Scalar], site: str) -> Path | None:
    """Where the site's ledger is: one for all runs, in a simulation one for each; None: nowhere."""
    if node.simulated:
        return Path(str(plan["state"])) / file_name(site) / FILE if "state" in plan else None
    return located(node.state_path) / FILE if node.state_path else None


def _unit(events: Sequence[Event]) -> Unit:
    units = {event.unit for event in events}
    if len(units) != 1:
        raise ConfigError(f"Expected releases of one unit in a run, got {sorted(units)}; split it.")
    return units.pop()


def _split(config: Config, node: NodeConfig) -> str:
    """What decides which of a site's records are held out, as a digest; empty where they may mix.

    With held-out rows of their own a record may be in both files, and one that is held out keeps
    another one out of training.
    """
    if node.eval_path or config.data.eval_source:
        return ""
    parts = [config.data.model_dump_json(), str(config.run.seed)]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]
