"""The server's blocks at work: micro-batches of several sites joined, their graphs kept.

Joined micro-batches are padded on the right to a common length, as batches are, and masked there,
so that every site gets what it would get alone, up to rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from models.base import seeded
from models.seeds import derive
from models.split.cut import Middle
from models.split.step import SplitError
from models.train import autocast

Place = tuple[str, int]  # a site and the key of one of its micro-batches
Cut = tuple[slice, int]  # its rows in a joined pass, and its length
# What came of a pass for one micro-batch; an error is of its own values, and of nobody else's.
Answer: TypeAlias = Tensor | Exception
# No gradient that a model can learn from comes near it, and sums of squares stay finite below.
_LARGEST = 1e15


class Forward(NamedTuple):
    """Hidden states (batch, tokens, hidden) of one site, and their mask (batch, tokens)."""

    site: str
    key: int
    hidden: Tensor
    mask: Tensor

    @property
    def place(self) -> Place:
        """Whose micro-batch it is."""
        return self.site, self.key


class Backward(NamedTuple):
    """The gradient behind the middle, of a micro-batch that went forward."""

    site: str
    key: int
    gradient: Tensor

    @property
    def place(self) -> Place:
        """Whose micro-batch it is."""
        return self.site, self.key


class _Graph:
    """A forward pass, the `number`-th, and the cuts of its micro-batches that are under way."""

    def __init__(self, before: Tensor, mask: Tensor, number: int, behind: Tensor) -> None:
        self.before = before
        self.mask = mask
        self.number = number
        self.behind = behind
        self.places: dict[Place, Cut] = {}


class MiddleWorker:
    """The middle's side: a graph is kept for each micro-batch between its two passes.

    At most `most` micro-batches of a site are kept at a time, since one that never sends its
    gradients would otherwise fill the memory. `scorer` is the middle as it was when the round
    began, `middle` itself where none is given. Dropout is drawn from `seed`; workers of one process
    that draw at the same time share a `drawing` lock, since torch has one generator for all.
    """

    def __init__(
        self,
        middle: Middle,
        *,
        most: int,
        precision: str = "float32",
        scorer: Middle | None = None,
        seed: int = 0,
        drawing: Lock | None = None,
    ) -> None:
        self._middle = middle
        self._scorer = scorer or middle
        first = next(middle.parameters())
        self._device, self._dtype = first.device, first.dtype
        self._most = most
        self._precision = precision
        self._seed = seed
        self._drawing = drawing or Lock()
        self._draws = draws(middle)
        self._graphs: dict[Place, _Graph] = {}
        self.passes = self.joined = self.tokens = self.padding = self.peak = 0

    def __len__(self) -> int:
        """Number of micro-batches under way."""
        return len(self._graphs)

    def under_way(self, site: str) -> int:
        """Number of micro-batches of one site under way."""
        return sum(name == site for name, _ in list(self._graphs))

    def partners(self, place: Place) -> Collection[Place]:
        """The micro-batches that share a graph with this one, itself included."""
        return tuple(self._graphs[place].places)

    def check(self, asked: Forward | Backward) -> None:
        """Raise SplitError for a key twice, too many under way, and a gradient that fits none."""
        site, key = asked.place
        if isinstance(asked, Forward):
            if asked.place in self._graphs:
                raise SplitError(f"Expected each micro-batch once, got {key} of {site!r} twice.")
            if self.under_way(site) >= self._most:
                raise SplitError(
                    f"Expected at most {self._most} micro-batches under way, got one more by "
                    f"{site!r}; lower split.in-flight."
                )
            return
        graph = self._graphs.get(asked.place)
        if graph is None:
            raise SplitError(f"Expected a micro-batch under way, got {key} of {site!r}.")
        rows, length = graph.places[asked.place]
        expected = (rows.stop - rows.start, length, graph.behind.shape[-1])
        if asked.gradient.shape != expected:
            raise SplitError(
                f"Expected a gradient of shape {expected} from {site!r}, got "
                f"{tuple(asked.gradient.shape)}."
            )

    def forward(self, site: str, key: int, hidden: Tensor, mask: Tensor) -> Tensor:
        """Hidden states behind the middle, of one micro-batch; raises SplitError as `check`."""
        asked = Forward(site, key, hidden, mask)
        self.check(asked)
        return value(self.forward_all([asked])[0])

    def backward(self, site: str, key: int, gradient: Tensor) -> Tensor:
        """The gradient before the middle, of one micro-batch; raises SplitError as `check`."""
        asked = Backward(site, key, gradient)
        self.check(asked)
        return value(self.backward_all([asked])[0])

    def forward_all(self, asked: Sequence[Forward]) -> list[Answer]:
        """Hidden states behind the middle, of checked micro-batches joined into one pass.

        Where that fails, or gives one values that are not finite, each gets a pass of its own.
        """
        try:
            return list(self._forward(asked))
        except Exception as error:
            if len(asked) == 1:
                return [error]
            return [self.forward_all([one])[0] for one in asked]

    def _forward(self, asked: Sequence[Forward]) -> list[Tensor]:
        length = max(one.hidden.shape[1] for one in asked)
        hidden = torch.cat([_longer(one.hidden, length) for one in asked])
        mask = torch.cat([_longer(one.mask, length) for one in asked]).to(self._device)
        before = hidden.detach().to(self._device, self._dtype).requires_grad_()
        graph = self._graph(before, mask, self.passes)
        behind = graph.behind.detach()
        if not bool(behind.isfinite().all()):
            raise SplitError(
                f"Expected finite hidden states behind the middle of {asked[0].site!r}, got NaN or "
                "Inf; look at what its head sends."
            )
        start = 0
        for one in asked:
            rows = slice(start, start := start + len(one.hidden))
            graph.places[one.place] = (rows, one.hidden.shape[1])
            self._graphs[one.place] = graph
        self._count(asked, mask.numel())
        return [behind[rows, :size] for rows, size in graph.places.values()]

    def _graph(self, before: Tensor, mask: Tensor, number: int) -> _Graph:
        with torch.enable_grad(), autocast(self._precision, self._device), self._dropout(number):
            return _Graph(before, mask, number, self._middle(before, mask))

    def backward_all(self, asked: Sequence[Backward]) -> list[Answer]:
        """Gradients before the middle, of checked ones; its parameters' own are added up.

        A graph whose other micro-batches are still to come is kept, at the cost of another pass.
        Where a graph fails, or gives gradients that no model can learn from, each of its
        micro-batches gets a pass of its own, and nothing is added up of those that fail again.
        """
        by_graph: dict[_Graph, list[Backward]] = {}
        for one in asked:
            by_graph.setdefault(self._graphs.pop(one.place), []).append(one)
        found: dict[Place, Answer] = {}
        for graph, members in by_graph.items():
            cuts = {one.place: graph.places.pop(one.place) for one in members}
            try:
                found |= self._backward(graph, members, cuts)
            except Exception as error:
                found |= self._each_alone(graph, members, cuts, error)
        return [found[one.place] for one in asked]

    def _backward(
        self, graph: _Graph, members: Sequence[Backward], cuts: Mapping[Place, Cut]
    ) -> dict[Place, Tensor]:
        gradient = torch.zeros_like(graph.behind)
        for one in members:
            rows, length = cuts[one.place]
            gradient[rows, :length] = one.gradient.to(gradient)
        trained = [p for p in self._middle.parameters() if p.requires_grad]
        # Not `backward`, which would have added them up before they can be looked at.
        before, *own = torch.autograd.grad(
            graph.behind, [graph.before, *trained], gradient, retain_graph=bool(graph.places),
            allow_unused=True,
        )  # fmt: skip
        if not bool(size_of([before, *own]) < _LARGEST):
            raise SplitError(
                f"Expected a gradient of {members[0].site!r} that leads to finite ones of a norm "
                f"below {_LARGEST:g}, got a larger one, NaN or Inf; look at what its tail sends."
            )
        for parameter, new in zip(trained, own, strict=True):
            if new is not None:
                # A copy, since two parameters may have been given one tensor.
                parameter.grad = new.clone() if parameter.grad is None else parameter.grad.add_(new)
        return {place: before[rows, :length] for place, (rows, length) in cuts.items()}

    def _each_alone(
        self,
        graph: _Graph,
        members: Sequence[Backward],
        cuts: Mapping[Place, Cut],
        error: Exception,
    ) -> dict[Place, Answer]:
        """The members of a graph that failed, each as if the others had sent zeros."""
        if len(members) == 1 and cuts[members[0].place][0] == slice(0, len(graph.before)):
            return {members[0].place: error}
        found: dict[Place, Answer] = {}
        for one in members:
            cut = {one.place: cuts[one.place]}
            try:
                found |= self._backward(self._without_others(graph, cut.values()), [one], cut)
            except Exception as own:
                found[one.place] = own
        if graph.places:  # what is still under way has nothing to do with those values either
            rest = self._without_others(graph, graph.places.values())
            rest.places |= graph.places
            self._graphs |= dict.fromkeys(graph.places, rest)
        return found

    def _without_others(self, graph: _Graph, cuts: Iterable[Cut]) -> _Graph:
        """The same pass, dropout too, in which all other rows are zero."""
        before = torch.zeros_like(graph.before)
        for rows, _ in cuts:
            before[rows] = graph.before.detach()[rows]
        return self._graph(before.requires_grad_(), graph.mask, graph.number)

    @torch.no_grad()
    def score(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Hidden states behind the middle, for held-out rows: nothing is kept."""
        with autocast(self._precision, self._device):
            behind: Tensor = self._scorer(
                hidden.to(self._device, self._dtype), mask.to(self._device)
            )
        return behind

    def forget(self, site: str) -> None:
        """Free the graphs of a site that is gone, once nobody else's micro-batch is in them."""
        for place in [place for place in self._graphs if place[0] == site]:
            self._graphs.pop(place).places.pop(place)

    def _count(self, asked: Sequence[Forward], computed: int) -> None:
        self.passes += 1
        self.joined += len(asked)
        self.tokens += computed
        self.padding += computed - sum(one.mask.numel() for one in asked)
        self.peak = max(self.peak, len(self._graphs))

    @contextmanager
    def _dropout(self, number: int) -> Iterator[None]:
        with ExitStack() as stack:
            if self._draws:
                stack.enter_context(self._drawing)
                stack.enter_context(seeded(derive(self._seed, "dropout", number)))
            yield


def value(found: Answer) -> Tensor:
    """What came of a pass; raises where nothing did."""
    if isinstance(found, Exception):
        raise found
    return found


def size_of(gradients: Iterable[Tensor | None]) -> Tensor:
    """L2 norm of all of them, which is not finite where one of them is not."""
    there = [gradient for gradient in gradients if gradient is not None]
    return torch.nn.utils.get_total_norm(there)


def draws(module: nn.Module) -> bool:
    """Whether a module in training draws random numbers, that is, has any dropout."""
    return any(
        (isinstance(part, nn.Dropout) and part.p > 0)
        # Attention drops without a layer for it.
        or any("drop" in k and isinstance(v, float) and v > 0 for k, v in vars(part).items())
        for part in module.modules()
    )


def _longer(tensor: Tensor, length: int) -> Tensor:
    """Zeros appended to (batch, tokens, ...), up to a number of tokens."""
    missing = length - tensor.shape[1]
    after = (0, 0) * (tensor.dim() - 2)
    return nn.functional.pad(tensor, (*after, 0, missing)) if missing else tensor
