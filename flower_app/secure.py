"""A site's side of secure aggregation: its keys, its session, and the answer to each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from flower_app import ckks, clientlevel, compose
from flower_app.config import Config
from flower_app.node import NodeConfig
from flower_app.rounded import rounded
from flower_app.sitestate import site_folder
from flower_app.worker import Site, Worker
from models.layout import Layout
from models.section import ConfigError
from models.wire import RawArray
from privacy.secure import encrypted
from privacy.secure import site as steps
from privacy.secure.errors import SecureError
from privacy.secure.exchange import MASKED
from privacy.secure.keys import NodeKey, Pinned
from privacy.secure.sessions import Sessions
from privacy.secure.site import Session
from privacy.secure.terms import Terms, model_hash
from strategies.exchange import Parcel
from strategies.messages import Scalar, arrays_of, config_of, decode_all, pack

Plan = Mapping[str, Scalar]


@dataclass(frozen=True)
class Keys:
    """The site's own node key, and the public ones that are pinned at it."""

    own: NodeKey
    pinned: Pinned

    @classmethod
    def of(cls, config: Config, node: NodeConfig, site: str, members: tuple[str, ...]) -> Keys:
        """From the files that the node config names; in a simulation made from the run's seed.

        Raises ConfigError.
        """
        if node.simulated:
            made = {name: NodeKey.simulated(config.run.seed, name) for name in {site, *members}}
            return cls(made[site], Pinned({name: key.public for name, key in made.items()}))
        for key, value in {"key-path": node.key_path, "peers-path": node.peers_path}.items():
            if not value:
                raise ConfigError(
                    f"Expected {key!r} in this node's config, since secure.aggregation="
                    f"{config.secure.aggregation!r} signs with keys that the sites know of each "
                    "other; docs/privacy.md says how to make them."
                )
        own, pinned = NodeKey.load(node.key_path), Pinned.load(node.peers_path)
        if pinned.keys.get(site, own.public) != own.public:
            raise ConfigError(
                f"Expected {site}.pem in the folder of 'peers-path' to be the public half of "
                "'key-path', got another key; make it again with 'openssl pkey -pubout'."
            )
        return cls(own, pinned)


def sessions(node: NodeConfig, plan: Plan, site: str) -> Sessions:
    """Where a site keeps its session in the run of `plan`."""
    return Sessions(site_folder(node, plan, site) / "secure")


def clear(config: Config, node: NodeConfig, plan: Plan, site: str) -> None:
    """Destroy what rounds left at a site."""
    if config.secure.aggregation == "masks":
        sessions(node, plan, site).clear()
    if config.secure.aggregation == "ckks":
        ckks.clear(node, plan.get("state"))


def check_keys(config: Config, node: NodeConfig) -> None:
    """Refuse to take part without the keys that a run needs; raises ConfigError."""
    if config.secure.aggregation == "masks":
        Keys.of(config, node, node.site, ())
    if config.secure.aggregation == "ckks" and not node.simulated:
        ckks.key_of(node)


def outgoing(
    config: Config, node: NodeConfig, message: Message, layout: Layout, site: Site
) -> Outgoing | ckks.Encrypting | None:
    """How a site's update is to leave, found before it trains; None: as it is.

    Raises SecureError for a message that asks for an update outside a sum, and ConfigError.
    """
    if config.secure.aggregation == "masks":
        return Outgoing.claim(config, node, message, layout, site)
    if config.secure.aggregation == "ckks":
        plan, parcel = _record(message, "plan"), dict(config_of(message.content, "parcel").items())
        terms, key = _terms(config, parcel), ckks.key_of(node, plan.get("state"))
        _check_run(terms, config, node, plan)
        _check_terms(terms, plan, layout)
        weight = compose.weight(config, site.rows)
        return ckks.Encrypting.of(config, key, terms, site.name, parcel, weight)
    return None


@dataclass(frozen=True)
class _Step:
    """A question of the server at a site: what was asked, and what the answer takes."""

    worker: Worker
    config: Config
    node: NodeConfig
    plan: Plan
    parcel: Parcel
    name: str

    @property
    def sessions(self) -> Sessions:
        return sessions(self.node, self.plan, self.name)

    def keys(self, terms: Terms) -> Keys:
        return Keys.of(self.config, self.node, self.name, terms.members)

    def proposed(self) -> Terms:
        """Terms that this message proposes."""
        terms = _terms(self.config, self.parcel)
        _check_run(terms, self.config, self.node, self.plan)
        return terms

    def taken(self) -> Session:
        """The session, if it is one of this very run."""
        session = self.sessions.take()
        _check_run(session.terms, self.config, self.node, self.plan)
        return session

    def advertise(self) -> Parcel:
        """Step 1."""
        weight = compose.weight(self.config, self.worker.site(self.config, self.node).rows)
        terms = self.proposed()
        session, answer = steps.advertise(terms, self.name, weight, self.keys(terms).own)
        self.sessions.begin(session)
        return answer

    def share(self) -> Parcel:
        """Step 2."""
        session = self.taken()
        keys = self.keys(session.terms)
        session, answer = steps.share(session, self.parcel, keys.own, keys.pinned)
        self.sessions.keep(session)
        return answer

    def confirm(self) -> Parcel:
        """Step 4."""
        session = self.taken()
        session, answer = steps.confirm(session, self.parcel, self.keys(session.terms).own)
        self.sessions.keep(session)
        return answer

    def unmask(self) -> Parcel:
        """Step 5, after which nothing is left here."""
        session = self.taken()
        answer = steps.unmask(session, self.parcel, self.keys(session.terms).pinned)
        self.sessions.clear()
        return answer

    def name_key(self) -> Parcel:
        """Step 1 under homomorphic encryption."""
        self.proposed()
        weight = compose.weight(self.config, self.worker.site(self.config, self.node).rows)
        return encrypted.advertise(weight, ckks.key_of(self.node, self.plan.get("state")))

    def open_sum(self) -> Parcel:
        """Step 3 under homomorphic encryption."""
        terms, key = self.proposed(), ckks.key_of(self.node, self.plan.get("state"))
        return encrypted.opened(terms, self.parcel, key, self.config.secure.min_group)


_STEPS: Mapping[str, Mapping[str, Callable[[_Step], Parcel]]] = MappingProxyType(
    {
        "none": {},
        "masks": {
            "secure_advertise": _Step.advertise,
            "secure_share": _Step.share,
            "secure_confirm": _Step.confirm,
            "secure_unmask": _Step.unmask,
        },
        "ckks": {"ckks_advertise": _Step.name_key, "ckks_open": _Step.open_sum},
    }
)
STEPS = tuple(step for steps in _STEPS.values() for step in steps)


def answer(
    step: str, worker: Worker, message: Message, config: Config, node: NodeConfig
) -> RecordDict:
    """Answer a question of the server; raises SecureError, ConfigError."""
    kind = config.secure.aggregation
    if step not in _STEPS[kind]:
        raise SecureError(f"Expected no {step!r} with secure.aggregation={kind!r}.")
    plan, parcel = _record(message, "plan"), dict(config_of(message.content, "parcel").items())
    asked = _Step(worker, config, node, plan, parcel, worker.name(config, node))
    return RecordDict({"answer": ConfigRecord(dict(_STEPS[kind][step](asked)))})


@dataclass(frozen=True)
class Outgoing:
    """An update on its way out of a site, as numbers behind masks (step 3)."""

    config: Config
    sessions: Sessions
    session: Session
    keys: Keys
    parcel: Parcel
    model: bytes
    weight: int

    @classmethod
    def claim(
        cls, config: Config, node: NodeConfig, message: Message, layout: Layout, site: Site
    ) -> Outgoing:
        """Take the session before training, so that it ends with it.

        Raises SecureError for a message that asks for an update outside a session.
        """
        plan, content = _record(message, "plan"), message.content
        place = sessions(node, plan, site.name)
        session = place.take()
        terms = session.terms
        _check_run(terms, config, node, plan)
        _check_terms(terms, plan, layout)
        return cls(
            config,
            place,
            session,
            Keys.of(config, node, site.name, terms.members),
            dict(config_of(content, "parcel").items()),
            model_hash(decode_all(arrays_of(content)), decode_all(arrays_of(content, "fold"))),
            compose.weight(config, site.rows),
        )

    def hidden(self, delta_D: Tensor) -> ArrayRecord:
        """What leaves the site in place of `delta_D`, (D,) float32."""
        terms, scale = self.session.terms, self.session.known.scale
        words = rounded(self.config, terms, self.session.site, delta_D, self.weight, scale)
        session, hidden = steps.mask(self.session, self.parcel, words, self.model, self.keys.pinned)
        self.sessions.keep(session)
        data = terms.numbers.pack(hidden)
        return pack({MASKED: RawArray("uint8", (len(data),), data)})


def _check_run(terms: Terms, config: Config, node: NodeConfig, plan: Plan) -> None:
    """Refuse terms of a sum that are not those of the run at hand; raises SecureError.

    The server names runs: keys that were made for a run without noise must not open a sum of one
    that the policy admits, and the ledger is charged for, because of its noise.
    """
    wanted = (terms.run if node.simulated else plan.get("run"), config.digest)
    if (terms.run, terms.settings) != wanted:
        raise SecureError(
            "Expected a sum of this very run, with all of its settings, got one of run "
            f"{terms.run!r:.80} with settings {terms.settings[:12]} instead of "
            f"{config.digest[:12]}; the server must begin the round again."
        )


def _check_terms(terms: Terms, plan: Plan, layout: Layout) -> None:
    """Refuse an update that is not of the round and layout of its sum; raises SecureError."""
    if (terms.round, terms.layout, terms.size) != (plan["round"], layout.digest, layout.size):
        raise SecureError(
            f"Expected the round and layout that this site has keys for, {terms.round} and "
            f"{terms.layout[:12]}, got {plan['round']} and {layout.digest[:12]}."
        )


def _terms(config: Config, parcel: Parcel) -> Terms:
    """The terms that the server proposes, with this site's own idea of the settings."""
    kinds = {"run": str, "round": int, "group": str, "layout": str, "size": int, "members": list}
    values = {name: parcel.get(name) for name in kinds}
    wrong = [name for name, kind in kinds.items() if not isinstance(values[name], kind)]
    if wrong:
        raise SecureError(f"Expected terms of a sum with {', '.join(kinds)}, got no {wrong[0]}.")
    members = tuple(str(name) for name in values.pop("members"))  # type: ignore[union-attr]
    least = config.secure.min_group
    if len(set(members)) != len(members) or len(members) < least:
        raise SecureError(
            f"Expected a sum over at least {least} sites (secure.min-group), got {members!r:.200}."
        )
    secure = config.secure
    return Terms(
        **values,  # type: ignore[arg-type]
        members=members,
        bits=secure.bits,
        range=secure.range,
        settings=config.digest,
        noise=clientlevel.shares(config),
    )


def _record(message: Message, name: str) -> dict[str, Scalar]:
    record = config_of(message.content, name)
    return {key: value for key, value in record.items() if isinstance(value, Scalar)}
