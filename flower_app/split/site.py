"""A site's end of split learning: its key of the run, and the stream to the server's middle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from logging import INFO

from flwr.app import ConfigRecord, RecordDict
from flwr.common.logger import log

from flower_app.config import Config
from flower_app.split.stream import MOST_BYTES, exchange
from models.payload import Payload
from models.section import ConfigError
from models.seeds import derive
from models.split.link import FrameLink, Limits
from models.split.noise import NoisyLink, Norms
from models.split.site import SplitPayload
from models.split.step import Stream
from models.split.wire import token_bytes
from privacy.noise import Source
from privacy.tls import Identity
from privacy.tokens import adding
from strategies.messages import Scalar, config_of

KEY_QUERY = "split_key"
_STATE = "split"
# What the server says of its stream with every plan.
ADDRESS, CERTIFICATE, MIDDLE = "split-address", "split-certificate", "split-middle"


def limits(config: Config, hidden_size: int) -> Limits:
    """What one message of a stream may hold."""
    prompt = config.payload.num_virtual_tokens if config.split.head == "soft-prompt" else 0
    tokens = config.train.batch_size * (prompt + config.train.max_length)
    return Limits(tokens, hidden_size, config.split.wire)


def frame_bytes(within: Limits) -> int:
    """The longest frame: a header, a mask, and values as float32; raises ConfigError."""
    found = 1024 + within.most_tokens * (1 + token_bytes("fp32", within.hidden_size))
    if found > MOST_BYTES:
        raise ConfigError(
            f"Expected a micro-batch to fit into a message of {MOST_BYTES} bytes, got up to "
            f"{found}, for {within.most_tokens} tokens of hidden size {within.hidden_size}; lower "
            "train.batch-size (and raise train.grad-accumulation) or train.max-length."
        )
    return found


def certificate(config: Config, state: RecordDict) -> ConfigRecord:
    """The site's certificate of this run; its key is made when first asked for, and stays here.

    Raises ConfigError where the run has no stream.
    """
    if config.payload.kind != "split":
        raise ConfigError(
            f"Expected payload.kind='split' when asked for a key, got {config.payload.kind!r}."
        )
    if not config_of(state, _STATE):
        made = Identity.fresh()
        state[_STATE] = ConfigRecord({"key": made.key, "certificate": made.certificate})
    return ConfigRecord({"certificate": bytes(_identity(state).certificate)})


def _identity(state: RecordDict) -> Identity:
    kept = config_of(state, _STATE)
    key, public = kept.get("key"), kept.get("certificate")
    if not isinstance(key, bytes) or not isinstance(public, bytes):
        raise ConfigError(
            "Expected a key for the stream of this run at this site, got none, as after a restart "
            "of its SuperNode; the server asks for a new one in the next round."
        )
    return Identity(key, public)


@contextmanager
def connected(
    config: Config,
    payload: Payload,
    plan: Mapping[str, Scalar],
    state: RecordDict,
    source: Source,
    site: str,
) -> Iterator[FrameLink | None]:
    """Lead to the server's middle while the block runs; nothing, and None, for other payloads.

    `source` is that of the noise of `site`: charge what leaves first. Raises ConfigError without a
    key; what needs the stream raises StreamError when it breaks.
    """
    if not isinstance(payload, SplitPayload):
        yield None
        return
    module = payload.module
    payload.beside = str(plan.get(MIDDLE, ""))
    within = limits(config, module.config.hidden_size)
    ask = partial(
        exchange,
        str(plan[ADDRESS]),
        _identity(state),
        str(plan[CERTIFICATE]).encode(),
        max_bytes=frame_bytes(within),
        about=str(plan["round"]),  # which the server may have ended before the stream is there
        timeout=config.run.deadline_s,
    )
    # Noise of rounding that sites or rounds shared would not average out.
    seed = derive(config.run.seed, "rounding", site, int(str(plan["round"])))
    with FrameLink(ask, within, seed=seed) as link:
        module.link = _noisy(config, link, source)
        try:
            yield link
        finally:
            if isinstance(module.link, NoisyLink):
                log(INFO, "Left on the stream with noise: %s", module.link.released)
            module.link = None


def _noisy(config: Config, link: FrameLink, source: Source) -> Stream:
    """The link, with clipping and noise on all that it is given where the run asks for them."""
    split = config.split
    if not split.noise:
        return link
    return NoisyLink(link, Norms(split.clip_norm, split.clip_gradient), adding(source, split.noise))


def carried(link: FrameLink | None) -> int:
    """Bytes that a stream carried so far, both ways; 0 without one."""
    return link.bytes_up + link.bytes_down if link else 0


def traffic(
    link: FrameLink | None, training: int, tokens: int, *, batches: int, candidates: int
) -> dict[str, Scalar]:
    """What a stream carried, as fields of a report; `training` bytes of it for so many tokens.

    `batches` are those of an epoch, `candidates` the most answers of a held-out row, from which it
    follows how often a row was read.
    """
    if link is None:
        return {}
    return {
        "stream_bytes_up": link.bytes_up,
        "stream_bytes_down": link.bytes_down,
        "stream_bytes_per_token": training / max(tokens, 1),
        "batches": batches,
        "candidates": candidates,
    }
