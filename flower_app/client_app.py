"""The ClientApp: answers the roll call, trains and scores at a site, sends back the difference."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable
from functools import wraps
from logging import ERROR, INFO
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.logger import log
from torch import Tensor

from flower_app import baselines, clientlevel, compose, secure
from flower_app.account import SiteAccount
from flower_app.conditions import check_node
from flower_app.config import Config, parse
from flower_app.data.source import DataError
from flower_app.node import NodeConfig, parse_node, versions
from flower_app.recorder import score_fields
from flower_app.releases import evaluations, planned, releases
from flower_app.siteround import SiteRound
from flower_app.sitestate import require_state_path
from flower_app.split import site as across
from flower_app.worker import Worker, pad_token, steps_per_round, worker_name
from models import fold
from models.batches import BatchError
from models.evaluate import Score
from models.layout import LayoutError
from models.paths import located
from models.payload import Payload
from models.section import ConfigError
from models.split.step import SplitError
from models.text import EncodingError
from models.train import TrainingError
from models.wire import WireError
from privacy.secure.errors import SecureError
from strategies.messages import Scalar, arrays_of, config_of, decode_all, to_record

app = ClientApp()

# The one cache of a process: in a simulation it lives as long as the worker, keyed by content.
_WORKER = Worker()

# Faults that a person can mend: they travel as a reason, so that it reads the same everywhere.
_EXPLAINED = (
    BatchError, ConfigError, DataError, EncodingError, LayoutError, SecureError, SplitError,
    TrainingError, WireError, OSError, torch.OutOfMemoryError,
)  # fmt: skip

# What looks like an absolute path, such as the cache from which a model is read.
_PATH = re.compile(r"(?<![\w.])~?/[\w.~-]+(?:/[\w.~-]+)+")

# Message, run config, node config, and what Flower keeps for this node until the run ends.
Handler = Callable[[Message, Config, NodeConfig, RecordDict], RecordDict]


def answering(name: str) -> Callable[[Handler], Callable[[Message, Context], Message]]:
    """Turn a handler into Flower's form; what it cannot do is said in the record `name`."""

    def decorate(handler: Handler) -> Callable[[Message, Context], Message]:
        @wraps(handler)
        def answer(message: Message, context: Context) -> Message:
            node = None
            try:
                config, node = parse(context.run_config), parse_node(context.node_config)
                check_node(config, node)
                compose.check_privacy(config)  # the server has, and need not be believed
                content = handler(message, config, node, context.state)
            except _EXPLAINED as error:
                log(ERROR, "%s", error)
                content = RecordDict({name: _refusal(error, node)})
            except Exception as error:
                if node is None or node.simulated:
                    raise
                # Flower would send the text, which may hold anything that the site's rows hold.
                log(ERROR, "%s", "".join(traceback.format_exception(error)))
                content = RecordDict({name: _refusal(error, node)})
            return Message(content, reply_to=message)

        return answer

    return decorate


def _refusal(error: Exception, node: NodeConfig | None) -> ConfigRecord:
    simulated = node is not None and node.simulated
    return ConfigRecord(
        {
            "error": _told(error, node),
            "site": (node.site or f"partition {node.partition_id}") if node else "",
            "simulated": simulated,
            "partitions": node.num_partitions if node and simulated else 0,
        }
    )


def _told(error: Exception, node: NodeConfig | None) -> str:
    """What the server learns of an error: at a deployed site no cell of a row, and no path."""
    if node is None or node.simulated:
        return str(error)
    if isinstance(error, DataError | OSError) or not isinstance(error, _EXPLAINED):
        return f"{type(error).__name__}: the log at the site says what is wrong."
    text = str(error)
    given = [Path(path) for path in node.paths if path]
    forms = {str(form) for p in given for form in (p, located(str(p)), located(str(p)).resolve())}
    for path in sorted(forms, key=len, reverse=True):  # a path within another one goes first
        text = text.replace(path, "...")
    return _PATH.sub("...", text)


def _plan(message: Message, name: str = "plan") -> dict[str, Scalar]:
    record = config_of(message.content, name)
    return {key: value for key, value in record.items() if isinstance(value, Scalar)}


def _received(message: Message, payload: Payload) -> dict[str, Tensor]:
    """The payload in a message; what it says of the frozen weights takes effect at once."""
    received, folded = (decode_all(arrays_of(message.content, of)) for of in ("arrays", "fold"))
    for name, tensor in (*received.items(), *folded.items()):
        # Before any row is read: which sites fail over such a value would tell of their rows.
        if not bool(tensor.isfinite().all()):
            raise LayoutError(
                f"Expected finite values from the server, got others in {name!r:.80}; begin "
                "again from a round before."
            )
    fold.replace(payload, folded)
    return received


@app.query()
@answering("member")
def on_roll_call(
    message: Message, config: Config, node: NodeConfig, state: RecordDict
) -> RecordDict:
    """Say who this site is and whether it can take part; loads its model and rows to be sure."""
    if keeping := compose.stores(config):
        require_state_path(node, keeping)
    secure.check_keys(config, node)
    compose.site_rank(config, node)
    base, _ = _WORKER.model(config, node)
    site = _WORKER.site(config, node)
    if config.privacy.unit == "record":
        _WORKER.per_sample(config, node, round_=1)
    log(INFO, "%s: %d rows, %d held out; %s", site.name, site.rows, site.held_out_rows, site.notes)
    log(INFO, "%s: base model %s", site.name, base.digest)
    question = _plan(message, "question")
    left = range(int(str(question.get("done", 0))) + 1, config.run.rounds + 1)
    account = SiteAccount(config, node, question, site=site.name, rows=site.rows, base=base.digest)
    releasing = planned(config, site.rows, left, len(site.batches), site.candidates)
    account.planned(releasing, rounds=len(left))
    member = ConfigRecord(
        {
            "site": site.name,
            "rows": site.rows,
            "held-out": site.held_out_rows,
            # An exact figure of held-out rows, which nothing but the account of a stream asks for.
            "candidates": site.candidates if config.split.noise else 0,
            "base": base.digest,
            "simulated": node.simulated,
            "partitions": node.num_partitions,
            "versions": versions(),
        }
    )
    return RecordDict({"member": member})


@app.train()
@answering("report")
def on_train(message: Message, config: Config, node: NodeConfig, state: RecordDict) -> RecordDict:
    """Score the received payload, train it on the site's rows, score it again, send the delta."""
    started = time.perf_counter()
    base, payload = _WORKER.model(config, node)
    received = _received(message, payload)
    site = _WORKER.site(config, node)
    plan = _plan(message)
    round_ = int(str(plan["round"]))
    work = SiteRound(config, node, payload, site, received, plan, done=round_ - 1)
    layout = compose.travelling(config, payload)
    hidden = secure.outgoing(config, node, message, layout, site)
    account = SiteAccount(config, node, plan, site=site.name, rows=site.rows, base=base.digest)
    account.begin(round_)
    loaded = time.perf_counter()
    source = compose.noise_source(config, "split", site.name, round_, "training")
    with across.connected(config, payload, plan, state, source, site.name) as stream:
        # Once there is a key for the stream, and before anything leaves.
        account.charge(releases(config, site.rows, [round_], len(site.batches), site.candidates))
        before, backdoor, personal = Score(), Score(), None
        if scoring := config.train.scores_in(round_):
            before = _WORKER.released(config, site, payload, pad_token(base), round_, "before")
            backdoor = _WORKER.backdoor(config, site, payload)
            personal = work.personal_score(
                before, lambda: _WORKER.score(config, site, payload, pad_token(base))
            )
        scored, sent = time.perf_counter(), across.carried(stream)
        private = config.privacy.unit == "record"
        outcome = work.train(_WORKER.per_sample(config, node, round_) if private else "")
    trained = time.perf_counter()
    after = Score()
    if scoring and config.train.score_after and not stream:  # alone a site has no middle of its own
        after = _WORKER.released(config, site, payload, pad_token(base), round_, "after")
    delta = work.finish()
    report: dict[str, Scalar] = {
        "round": round_,
        "layout": plan["layout"],
        "num-examples": site.rows,
        "examples": site.rows,
        "load_s": loaded - started,
        "train_s": trained - scored,
        "eval_s": (scored - loaded) + (time.perf_counter() - trained),
        "base_reads": _WORKER.bases.reads,
        "worker": worker_name(),
    }
    if not clientlevel.at_sites(config):  # how rows are cut and packed may decide it
        report["steps"] = outcome.steps
    if not config.privacy.noised_by_sites:  # what they say of the rows has no noise
        report |= {
            "train_loss": outcome.loss,
            "tokens": outcome.tokens,
            "useful_tokens": outcome.useful_tokens,
        }
    streamed = across.carried(stream) - sent
    report |= across.traffic(
        stream, streamed, outcome.tokens, batches=len(site.batches), candidates=site.candidates
    )
    report |= {"rank": work.rank} if work.rank < config.payload.rank else {}
    report |= score_fields("before", before) | score_fields("after", after)
    report |= score_fields("backdoor", backdoor) if backdoor.rows else {}
    report |= score_fields("personal", personal) if personal else {}
    arrays = hidden.hidden(layout.flatten(delta)) if hidden else to_record(delta)
    return RecordDict({"arrays": arrays, "report": ConfigRecord({**report})})


@app.evaluate()
@answering("report")
def on_evaluate(
    message: Message, config: Config, node: NodeConfig, state: RecordDict
) -> RecordDict:
    """Score the received payload on the site's held-out rows."""
    base, payload = _WORKER.model(config, node)
    received = _received(message, payload)
    site = _WORKER.site(config, node)
    plan = _plan(message)
    done = int(str(plan["round"]))
    work = SiteRound(config, node, payload, site, received, plan, done)
    account = SiteAccount(config, node, plan, site=site.name, rows=site.rows, base=base.digest)
    beside = releases(config, site.rows, [max(done, 1)], len(site.batches), site.candidates)
    source = compose.noise_source(config, "split", site.name, done, "evaluation")
    with across.connected(config, payload, plan, state, source, site.name):
        account.charge(evaluations(config, done, site.candidates), beside, "held-out")
        score = _WORKER.released(config, site, payload, pad_token(base), done, "evaluation")
        backdoor = _WORKER.backdoor(config, site, payload)
        personal = work.personal_score(
            score, lambda: _WORKER.score(config, site, payload, pad_token(base))
        )
    work.keep_adapter()
    secure.clear(config, node, plan, site.name)
    fields = score_fields("before", score)
    fields |= score_fields("backdoor", backdoor) if backdoor.rows else {}
    fields |= score_fields("personal", personal) if personal else {}
    return RecordDict({"report": ConfigRecord({**fields})})


def _on_secure(step: str) -> Callable[[Message, Context], Message]:
    """The handler of a step of secure aggregation."""

    @answering("answer")
    def on_step(
        message: Message, config: Config, node: NodeConfig, state: RecordDict
    ) -> RecordDict:
        return _secure(step, message, config, node)

    return on_step


def _secure(step: str, message: Message, config: Config, node: NodeConfig) -> RecordDict:
    # On its own: Ray sends a function that has no name in a module by value, with the globals it
    # uses, so that a handler made here would get a worker of its own with every message.
    return secure.answer(step, _WORKER, message, config, node)


for _step in secure.STEPS:
    app.query(_step)(_on_secure(_step))


@app.query(across.KEY_QUERY)
@answering("answer")
def on_split_key(
    message: Message, config: Config, node: NodeConfig, state: RecordDict
) -> RecordDict:
    """Hand out the certificate by which the server knows this site's stream."""
    return RecordDict({"answer": across.certificate(config, state)})


@app.train("baseline")
@answering("report")
def on_baseline(
    message: Message, config: Config, node: NodeConfig, state: RecordDict
) -> RecordDict:
    """Train on one site's rows alone, or on all rows pooled; score on everyone's held-out rows."""
    base, payload = _WORKER.model(config, node)
    sites = _WORKER.all_sites(config, node)
    payload.load(_received(message, payload))
    payload.load_personal(payload.personal_start)
    name = str(config_of(message.content, "plan")["site"])
    alone = next((site for site in sites if site.name == name), None)
    batches = alone.batches if alone else _WORKER.pooled(config, node)
    steps = steps_per_round(config, [site.batches for site in sites])
    baselines.train_alone(config, payload, batches, name, steps)
    scores = {site.name: _WORKER.score(config, site, payload, pad_token(base)) for site in sites}
    fields = baselines.report(scores, alone.name if alone else "")
    return RecordDict({"report": ConfigRecord({**fields})})
