"""The server's end of split learning: the middle of a run, and the stream of every site to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from logging import INFO, WARNING
from threading import Lock

from flwr.common.logger import log
from torch import Tensor

from flower_app.config import Config
from flower_app.split.sharing import Sharing
from flower_app.split.site import ADDRESS, CERTIFICATE, KEY_QUERY, MIDDLE, frame_bytes, limits
from flower_app.split.stream import Incoming, StreamServer
from models.section import ConfigError
from models.split.adapter import added, digest_of_tensors, factors, load_factors
from models.split.base import SplitBase
from models.split.inbox import Inbox
from models.split.link import Frames
from models.split.messages import Kind, Message
from models.split.middle import MiddleWorker
from models.split.rounds import Learnt
from models.split.schedule import Round
from models.split.step import SplitError
from privacy.tls import Identity, clash, public_form
from strategies import aggregate
from strategies.exchange import Ask, Decoded, Exchange, Intake, Parcel, Received
from strategies.gate import Reply
from strategies.messages import Scalar
from strategies.product import side

_BEGUN = "Expected scores before the next round, but it has begun."


class SplitServer:
    """Holds the middle of a run and serves the sites' streams; use as a context manager.

    `sharing` begins a round of training with the middle as it is then. A stream is let in by the
    certificate that its site gave over Flower's own channel in this run.
    """

    def __init__(self, config: Config, base: SplitBase, sharing: Sharing) -> None:
        """Listen at `split.listen`; raises ConfigError where that cannot be had."""
        self._config = config
        self._middle = base.middle
        self._sharing = sharing
        self.schedule = sharing.schedule
        self._limits = limits(config, base.model.config.hidden_size)
        self._scorer = MiddleWorker(base.middle, most=0, precision=config.train.precision)
        self._round: Round | None = None
        self._number = 0  # of the round
        self._scoring: dict[str, Inbox] = {}  # streams between rounds
        self._free = Lock()  # held while the middle scores, and where rounds begin and end
        self._start: dict[str, Tensor] = {}  # what the replicas of the round began with
        self._identity = Identity.fresh()
        self._stream = StreamServer(
            self._identity,
            {},
            self._serve,
            address=config.split.listen,
            max_bytes=frame_bytes(self._limits),
        )
        self._known: dict[str, bytes] = {}
        self._digested = ""

    def adapter(self) -> dict[str, Tensor]:
        """The middle's share of the joined adapter, trained or not, by the whole model's names."""
        return added(self._middle)

    @property
    def plan(self) -> dict[str, Scalar]:
        """What every site is told of the stream."""
        host = self._config.split.listen.rpartition(":")[0]
        address = self._config.split.address or f"{host}:{self._stream.port}"
        certificate = self._identity.certificate.decode()
        return {ADDRESS: address, CERTIFICATE: certificate, MIDDLE: self._digest()}

    def _digest(self) -> str:
        """That of the last round's middle, which a site's own adapter names; else empty."""
        if self._config.payload.personal and not self._digested:
            learnt = sorted(self.adapter().items())
            self._digested = digest_of_tensors(learnt) if learnt else ""
        return self._digested

    def state(self) -> dict[str, Tensor]:
        """What the middle has learnt, by the names of the whole model's adapter."""
        return factors(self._middle)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self._digested = ""
        load_factors(self._middle, state)

    def admit(self, sites: Sequence[str], ask: Ask) -> dict[str, str]:
        """Let sites in whose keys are not known yet; why some are not, by site."""
        failed: dict[str, str] = {}
        new: dict[str, Parcel] = {site: {} for site in sites if site not in self._known}
        answers = ask(KEY_QUERY, new, self._config.run.roll_call_s) if new else {}
        for site in new:
            answer = answers.get(site, {"error": "No key by the deadline (run.roll-call-s)."})
            public = answer.get("certificate")
            try:
                if not isinstance(public, bytes):
                    raise ConfigError(str(answer.get("error", "Expected a certificate, got none.")))
                own = public_form(public)
                if clash(own, [self._identity.certificate, *self._known.values()]):
                    raise ConfigError(
                        "Expected a key and a certificate of this site alone, got another one's."
                    )
            except ConfigError as error:
                failed[site] = str(error)
            else:
                self._known[site] = own
        self._stream.admit(self._known)
        return failed

    def forget(self, sites: Sequence[str]) -> None:
        """Ask sites for their keys again, which may be lost at their side."""
        for site in sites:
            self._known.pop(site, None)

    def begin(self, round_: int, sites: Sequence[str]) -> None:
        """Train with the streams of these sites from now on."""
        with self._free:
            for inbox in self._scoring.values():
                inbox.close(SplitError(_BEGUN))
            self._scoring.clear()
            self._round, self._number = self._sharing(round_, sites), round_
            self._start = self.state()

    def absent(self, site: str, why: str) -> None:
        """Let no other site wait for one that does not train in this round."""
        if self._round:
            self._round.absent(site, why)

    def finish(self) -> None:
        """End the round and keep what its replicas learnt: the mean of their products for LoRA."""
        if self._round is None:
            return
        ended = self._round
        learnt = finite(ended.finish())
        for site, why in ended.dropped.items():
            log(WARNING, "The stream of %s ended early: %s", site, why)
        figures = ", ".join(f"{name} {value:.3g}" for name, value in ended.report().items())
        log(INFO, "The middle, %s: %s", self.schedule, figures)
        with self._free:
            before, self._start, self._round = self._start, {}, None
            self.restore(mean_of(before, learnt))
            self._middle.eval()

    def _serve(self, site: str, frames: Incoming) -> Frames:
        with self._free:
            current = self._round
            if current is not None and frames.about != str(self._number):
                raise SplitError(
                    f"Expected a stream of round {self._number}, got one of {frames.about!r} by "
                    f"{site!r}, which comes too late."
                )
            if current is None:
                inbox = self._scoring[site] = Inbox(frames)
        yield from current.serve(site, frames) if current else self._scores(site, inbox)

    def _scores(self, site: str, inbox: Inbox) -> Frames:
        """Answer one that scores between rounds, until it stalls or the next round begins."""
        try:
            while (frame := inbox.next(self._config.split.stall_s)) is not None:
                yield self._scored(site, frame)
        except TimeoutError:
            stall_s = self._config.split.stall_s
            raise SplitError(f"Expected a word within split.stall-s={stall_s:g}.") from None
        finally:
            inbox.close()
            with self._free:
                if self._scoring.get(site) is inbox:
                    del self._scoring[site]

    def _scored(self, site: str, frame: bytes) -> bytes:
        asked = self._limits.decode(frame)
        with self._free:
            if self._round is not None:
                raise SplitError(_BEGUN)
            if asked.kind is not Kind.SCORE or asked.values is None or asked.mask is None:
                raise SplitError(
                    f"Expected nothing but scores between rounds, got {asked.kind.name} of "
                    f"{site!r}."
                )
            found = self._scorer.score(asked.values, asked.mask)
        return Message(Kind.SCORED, asked.key, found).encode(self._limits.precision)

    def __enter__(self) -> SplitServer:
        """Nothing to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """End all streams."""
        if self._round:
            self._round.finish()
        self._stream.stop()


def finite(learnt: Sequence[Learnt]) -> list[Learnt]:
    """What replicas learnt, but for those that ended with NaN or Inf."""
    good = [new for new in learnt if all(bool(t.isfinite().all()) for t in new.tensors.values())]
    if lost := len(learnt) - len(good):
        log(WARNING, "%d of %d replicas of the middle ended with values that are not finite; what "
            "they learnt in this round is left out.", lost, len(learnt))  # fmt: skip
    return good


def mean_of(before: Mapping[str, Tensor], learnt: Sequence[Learnt]) -> dict[str, Tensor]:
    """The mean of replicas: of LoRA's products, as near as their rank allows, else of tensors.

    Each weighs as many as sites trained on it. What there was before where nothing is trained, or
    none has learnt anything.
    """
    if not before or not learnt:
        return dict(before)
    if len(learnt) == 1:
        return dict(learnt[0].tensors)
    deltas = [{name: new.tensors[name] - before[name] for name in before} for new in learnt]
    rule = "lora-svd" if any(map(side, before)) else "mean"
    return aggregate(rule, before, deltas, [new.sites for new in learnt])


class SplitExchange(Exchange):
    """The sites' blocks travel in messages as in any run; the streams are open meanwhile."""

    def __init__(self, server: SplitServer, inner: Exchange) -> None:
        self._server = server
        self._inner = inner

    def ready(self, asked: Sequence[str], ask: Ask) -> Mapping[str, str]:
        """Let in the streams of sites that have not trained yet, or not with this server."""
        return self._server.admit(asked, ask)

    def open(self, round_: int, asked: Sequence[str], sent: Decoded, ask: Ask) -> SplitIntake:
        """Begin a round with the sites whose keys are known."""
        failed = self._server.admit(asked, ask)
        for site, why in failed.items():
            log(WARNING, "%s has no stream in round %d: %s", site, round_, why)
        there = [site for site in asked if site not in failed]
        inner = self._inner.open(round_, there, sent, ask)
        self._server.begin(round_, there)
        return SplitIntake(self._server, inner, there, failed)


class SplitIntake:
    """The updates of one round beside its streams."""

    def __init__(
        self, server: SplitServer, inner: Intake, sites: Sequence[str], failed: Mapping[str, str]
    ) -> None:
        self._server = server
        self._inner = inner
        self._missing = set(sites)
        self.failed = failed

    @property
    def parcels(self) -> Mapping[str, Parcel]:
        """Nothing but who trains."""
        return self._inner.parcels

    def admit(self, reply: Reply) -> None:
        """Take in a reply; raises as the intake of a plain round."""
        self._missing.discard(reply.site)
        self._inner.admit(reply)

    def lost(self, site: str, why: str) -> None:
        """Let no other site wait for this one."""
        self._server.absent(site, why)

    def close(self) -> Received:
        """End the round for the streams too."""
        self._server.finish()
        self._server.forget(sorted(self._missing))
        return self._inner.close()

    def __enter__(self) -> SplitIntake:
        """Nothing to do."""
        return self

    def __exit__(self, *error: object) -> None:
        """Clean up."""
        self._server.finish()
        self._inner.__exit__(*error)
