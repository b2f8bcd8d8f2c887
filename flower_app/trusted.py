"""FLTrust's root data: rows at the server on which it trains an update of its own each round."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from flower_app import compose
from flower_app.config import Config
from flower_app.data.format import make_records
from flower_app.data.site import label_names
from flower_app.data.source import load_rows
from flower_app.worker import encode_rows, pad_token, steps_per_round, train_round
from models import fold
from models.base import Base
from models.batches import Batches
from models.payload import Payload
from models.seeds import derive

_NAME = "the server's root data"


class RootTrainer:
    """Trains on root data as a site would, with the run's own settings of training.

    Everything that was loaded into the payload before is put back, so that it does not matter
    who else uses it. Raises DataError and EncodingError for rows that cannot be used.
    """

    def __init__(self, config: Config, base: Base, payload: Payload) -> None:
        """Read and encode all rows of `strategy.root-source`."""
        labels = label_names(config.data)
        rows = load_rows(config.strategy.root_source, config.data.split)
        encoded = encode_rows(config, base, payload, make_records(rows, config.data, labels))
        self._config = config
        self._payload = payload
        self._batches = Batches(
            encoded.examples,
            batch_size=config.train.batch_size,
            seed=derive(config.run.seed, "order", _NAME),
            pad_id=pad_token(base),
            packing=compose.packs(config, base),
            max_length=config.train.max_length,
        )

    def update(
        self, round_: int, received: Mapping[str, Tensor], folded: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What training changes in `received`, the payload of round `round_`, by name."""
        payload = self._payload
        shared, personal, before = payload.select(), payload.select_personal(), payload.fold
        fold.replace(payload, folded)
        payload.load(received)
        steps = steps_per_round(self._config, [self._batches])
        try:
            train_round(self._config, payload, self._batches, _NAME, round_, steps)
            return {name: new - received[name] for name, new in payload.select().items()}
        finally:
            fold.replace(payload, before)
            payload.load(shared)
            payload.load_personal(personal)
