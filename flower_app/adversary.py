"""A simulation's adversary: rewrites malicious sites' replies before the gate sees them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from logging import INFO
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.logger import log
from torch import Tensor

from models.layout import Layout, LayoutError
from models.seeds import derive
from models.wire import WireError, encode
from strategies.attacks.config import AttackConfig
from strategies.attacks.malformed import Sent
from strategies.attacks.registry import Attack
from strategies.attacks.view import View
from strategies.messages import arrays_of, config_of, decode_all, pack


class Adversary:
    """Sees every update of a round and decides what the malicious sites send.

    Their replies are held back until all others are in. Nothing is kept between rounds, so that a
    resumed run meets the same attack.
    """

    def __init__(
        self,
        attack: Attack,
        options: AttackConfig,
        malicious: frozenset[str],
        layout: Layout,
        seed: int,
    ) -> None:
        """Speak for the sites `malicious` of a run whose payload is laid out as `layout`."""
        self._attack = attack
        self._options = options
        self._malicious = malicious
        self._layout = layout
        self._seed = seed

    def tamper(
        self,
        round_: int,
        asked: Mapping[int, str],
        base_D: Tensor,
        replies: Iterable[Message],
    ) -> Iterator[Message]:
        """Pass honest replies on as they come, then those of the malicious sites, rewritten.

        `asked` maps node ids to site names. Where no site but malicious ones answered, their own
        updates stand for the honest ones.
        """
        held: dict[str, tuple[Message, Tensor]] = {}
        honest: dict[str, Tensor] = {}
        for message in replies:
            site = asked.get(message.metadata.src_node_id, "")
            row_D = self._delta(message)
            if site in self._malicious and row_D is not None and site not in held:
                held[site] = (message, row_D)
                continue
            if site and row_D is not None:
                honest[site] = row_D
            yield message
        if held:
            log(INFO, "Simulated attack %r by %s.", self._options.name, ", ".join(sorted(held)))
            yield from self._rewritten(round_, base_D, held, honest)

    def _delta(self, message: Message) -> Tensor | None:
        """The update in a reply, or None where it holds none, as when the site failed."""
        if message.has_error() or config_of(message.content, "report").get("error"):
            return None
        try:
            return self._layout.flatten(decode_all(arrays_of(message.content)))
        except (LayoutError, WireError):
            return None

    def _rewritten(
        self,
        round_: int,
        base_D: Tensor,
        held: Mapping[str, tuple[Message, Tensor]],
        honest: Mapping[str, Tensor],
    ) -> Iterator[Message]:
        sites = sorted(held)
        own_MD = torch.stack([held[site][1] for site in sites])
        known = [honest[site] for site in sorted(honest)]
        view = View(torch.stack(known) if known else own_MD, own_MD, base_D, self._layout)
        generator = torch.Generator().manual_seed(derive(self._seed, "attack", round_))
        sent_MD = self._attack.forged(view, self._options, generator)
        for site, row_D in zip(sites, sent_MD, strict=True):
            yield from self._sent(held[site][0], row_D)

    def _sent(self, message: Message, row_D: Tensor) -> Iterator[Message]:
        arrays = {name: encode(row) for name, row in self._layout.unflatten(row_D).items()}
        report = config_of(message.content, "report")
        fields = {key: report.get(key) for key in ("round", "layout", "num-examples")}
        sent = Sent(arrays, fields["round"], fields["layout"], fields["num-examples"])
        if self._attack.spoil is not None:
            sent = self._attack.spoil(sent, self._layout)
        content = RecordDict(dict(message.content))
        content["arrays"] = pack(sent.arrays)
        claims: dict[str, Any] = {
            "round": sent.round,
            "layout": sent.layout_digest,
            "num-examples": sent.num_examples,
        }
        content["report"] = ConfigRecord({**report, **claims})
        for _ in range(sent.copies):
            forged = copy.copy(message)
            forged.content = content
            yield forged
