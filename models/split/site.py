"""The site's half of a split model: head and tail as one module, whose middle is a stream away."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import Tensor, nn

from models.batches import Batch
from models.config import TrainConfig
from models.payload import Payload
from models.split.adapter import added, join
from models.split.cut import Head, Tail
from models.split.step import SiteStep, SplitError, Stream, answered, in_front
from models.train import Correction, Progress, Step, Trained, finite, optimise


class SiteModel(nn.Module):
    """Head and tail of a model; what they train goes by the names of the whole.

    Called as the whole model is, to score rows, while `link` leads to the middle.
    """

    def __init__(self, head: Head, tail: Tail) -> None:
        super().__init__()
        self.head = head
        self.tail = tail
        self.config = tail.model.config
        self.link: Stream | None = None
        self._keys = itertools.count(1)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by the names that the whole model has for them; a tied one comes once."""
        seen: set[int] = set()
        for part in (self.head, self.tail):
            for name, parameter in part.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield part.name_in_whole(name), parameter

    def middle(self) -> Stream:
        """The link; raises SplitError where there is none."""
        if self.link is None:
            raise SplitError("Expected a stream to the middle, got none; open one first.")
        return self.link

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        **rest: Any,
    ) -> Any:
        """The library's output for token ids (batch, tokens), by the middle of `score`."""
        hidden = self.head(input_ids, attention_mask, **rest)
        mask = in_front(attention_mask, hidden, 1)
        asked = self.middle().score(next(self._keys), hidden, mask)
        behind = asked.result().to(hidden)
        return answered(self.tail, behind, attention_mask, labels)


class SplitPayload(Payload):
    """What a split model trains at the sites; `middle` tells what LoRA adds at the server."""

    module: SiteModel

    def __init__(
        self, module: SiteModel, settings: PeftConfig, personal: str, fresh_modules: Sequence[str]
    ) -> None:
        super().__init__("split", module, personal, fresh_modules)
        self.settings = settings
        self.middle: Callable[[], Mapping[str, Tensor]] = dict
        self.beside = ""  # digest of the server's middle, which a site does not have

    @property
    def virtual_tokens(self) -> int:
        """Positions of the context that stand before every text."""
        return self.module.head.virtual_tokens

    def save(self, folder: Path) -> None:
        """Write all three parts as one PEFT adapter for the whole model; at a site, the ends."""
        ends = added(self.module.head) | added(self.module.tail)
        middle = dict(self.middle())
        join(ends | middle, self.settings, folder, "" if middle else self.beside)


def train_across(
    payload: SplitPayload,
    batches: Iterator[Batch],
    config: TrainConfig,
    *,
    steps: int,
    learning_rate: float,
    in_flight: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
    correction: Correction | None = None,
) -> Trained:
    """As `models.train.train`, for head and tail, while the middle steps at its own side.

    Raises TrainingError for a loss that is not finite, and what breaks the stream.
    """
    module = payload.module
    link = module.middle()
    gradients = SiteStep(
        module.head, module.tail, link, batches, accumulation=config.grad_accumulation,
        in_flight=in_flight, precision=config.precision,
    )  # fmt: skip
    numbers = itertools.count(1)
    stepped: list[Future[Tensor]] = []

    def gradient() -> Step:
        found = gradients()
        # What follows comes after it on the stream, so that only the last needs to be awaited.
        stepped[:] = [link.step(next(numbers))]
        return found

    trained = optimise(
        payload, gradient, config, steps=steps, learning_rate=learning_rate, seed=seed,
        progress=progress, correction=correction, max_grad_norm=config.max_grad_norm,
    )  # fmt: skip
    for last in stepped:
        last.result()
    return finite(trained)
