"""The gate: nothing reaches a rule unchecked.

A reply that does not pass is refused with a kind and a reason; the round goes on with the rest.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from models.layout import Layout
from models.wire import RawArray, WireError, decode
from strategies.cohort import norm

RefusalKind: TypeAlias = Literal[
    "unasked",
    "wrong-round",
    "duplicate",
    "oversized",
    "layout",
    "num-examples",
    "missing-key",
    "extra-key",
    "reordered-keys",
    "wrong-dtype",
    "wrong-shape",
    "malformed-bytes",
    "not-finite",
    "norm",
]

MAX_EXAMPLES = 10**9
# What a message may hold beside the elements: metrics and envelope, and a name and a shape each.
_ENVELOPE = 64 * 1024
_PER_TENSOR = 1024


class Refusal(ValueError):
    """A reply that is quarantined: `kind` names the class of fault, `message` explains it."""

    def __init__(self, kind: RefusalKind, message: str) -> None:
        """Keep kind and message; the text of the exception is `kind: message`."""
        super().__init__(f"{kind}: {message}")
        self.kind: RefusalKind = kind
        self.message = message


@dataclass(frozen=True)
class Reply:
    """What one site sent, not yet trusted: `nbytes` is the size of the message as received."""

    site: str
    round: object
    layout_digest: object
    num_examples: object
    arrays: Mapping[str, RawArray]
    nbytes: int


@dataclass(frozen=True, eq=False)
class Update:
    """An admitted update: `delta_D`, (D,) float32, and the examples it is credited with."""

    site: str
    delta_D: Tensor
    num_examples: int


class Gate:
    """Checks the replies of one round against what was asked; the first good one per site stays."""

    def __init__(
        self,
        round: int,
        layout: Layout,
        asked: Collection[str],
        max_update_norm: float,
        weight_cap: int,
    ) -> None:
        """Set up for a round whose sites `asked` were sent a payload laid out as `layout`."""
        self._round = round
        self._layout = layout
        self._asked = frozenset(asked)
        self._max_norm = max_update_norm
        self._cap = weight_cap
        self._admitted: set[str] = set()

    @property
    def outstanding(self) -> tuple[str, ...]:
        """Sites that were asked and from which nothing was admitted yet, sorted."""
        return tuple(sorted(self._asked - self._admitted))

    @property
    def max_nbytes(self) -> int:
        """Largest message that is looked into: the payload's bytes and room for the envelope."""
        elements = self._layout.size * self._layout.torch_dtype.itemsize
        return elements + _ENVELOPE + _PER_TENSOR * len(self._layout.names)

    def admit(self, reply: Reply) -> Update:
        """Check a reply, cheapest test first; raises Refusal, and then the site may try again."""
        self._check_envelope(reply)
        examples = self._examples(reply.num_examples)
        self._check_arrays(reply.arrays)
        delta_D = self._decode(reply.arrays)
        self._check_norm(delta_D)
        self._admitted.add(reply.site)
        return Update(reply.site, delta_D, examples)

    def _check_envelope(self, reply: Reply) -> None:
        if reply.site not in self._asked:
            raise Refusal("unasked", f"Expected no reply from {reply.site!r:.80} in this round.")
        if type(reply.round) is not int or reply.round != self._round:
            raise Refusal(
                "wrong-round", f"Expected a reply to round {self._round}, got {reply.round!r:.40}."
            )
        if reply.site in self._admitted:
            raise Refusal("duplicate", f"Expected one reply from {reply.site!r}, got another one.")
        nbytes = max(reply.nbytes, sum(len(raw.data) for raw in reply.arrays.values()))
        if nbytes > self.max_nbytes:
            raise Refusal("oversized", f"Expected at most {self.max_nbytes} bytes, got {nbytes}.")
        if reply.layout_digest != self._layout.digest:
            raise Refusal(
                "layout",
                f"Expected a reply to layout {self._layout.digest[:12]}, got "
                f"{reply.layout_digest!r:.20}; model or payload of the site differ.",
            )

    def _examples(self, value: object) -> int:
        # bool is an int to Python, and NaN compares false with everything.
        if type(value) is not int or not 1 <= value <= MAX_EXAMPLES:
            raise Refusal(
                "num-examples", f"Expected an integer from 1 to {MAX_EXAMPLES}, got {value!r:.40}."
            )
        return min(value, self._cap)

    def _check_arrays(self, arrays: Mapping[str, RawArray]) -> None:
        layout = self._layout
        if missing := [name for name in layout.names if name not in arrays]:
            raise Refusal("missing-key", f"Expected tensor {missing[0]!r}, which is missing.")
        if len(arrays) != len(layout.names):
            extra = next(name for name in arrays if name not in set(layout.names))
            raise Refusal(
                "extra-key", f"Expected the layout's tensors only, got {extra!r:.80} too."
            )
        if tuple(arrays) != layout.names:
            raise Refusal("reordered-keys", "Expected the layout's order of tensors, got another.")
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            raw = arrays[name]
            if raw.dtype != layout.dtype:
                raise Refusal(
                    "wrong-dtype", f"Expected {name!r} as {layout.dtype}, got {raw.dtype!r:.40}."
                )
            # Equality, not broadcasting: (1,) must not pass for (1000,).
            if tuple(raw.shape) != shape:
                raise Refusal(
                    "wrong-shape", f"Expected {name!r} of shape {shape}, got {raw.shape!r:.80}."
                )

    def _decode(self, arrays: Mapping[str, RawArray]) -> Tensor:
        tensors: dict[str, Tensor] = {}
        for name in self._layout.names:
            try:
                tensors[name] = decode(arrays[name])
            except WireError as error:
                raise Refusal("malformed-bytes", f"{name!r}: {error}") from None
        return self._layout.flatten(tensors)

    def _check_norm(self, delta_D: Tensor) -> None:
        length = norm(delta_D)
        if not math.isfinite(length):
            named = self._layout.unflatten(delta_D)
            bad = next(name for name, tensor in named.items() if not bool(tensor.isfinite().all()))
            raise Refusal("not-finite", f"Expected finite numbers, got NaN or Inf in {bad!r}.")
        if length > self._max_norm:
            raise Refusal(
                "norm",
                f"Expected an update with an L2 norm of at most {self._max_norm:g} "
                f"(strategy.max-update-norm), got {length:.4g}.",
            )
