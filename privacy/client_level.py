"""Client-level differential privacy: what a whole site sends is clipped, summed and noised.

In the central model the server adds the noise and is trusted to; in the local one each site does,
and in the distributed one each adds a share (`privacy.secure.distributed`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from models.layout import Layout
from models.section import ConfigError
from privacy.adaptive import Adaptive
from privacy.correlated import Correlated
from privacy.events import Event
from privacy.noise import Source, add_gaussian, std_for
from strategies.cohort import Cohort, Delta, norm
from strategies.rules import clip
from strategies.stage import ComposeError, Facts, Rule, Stage, State

# Sites may join a run, up to this many times those that it began with.
_GROWTH = 2

# Draws the source of a round's noise, given the generator of that round.
Draw = Callable[[torch.Generator], Source]
# Writes down what is about to be released; raises where that is not possible.
Charge = Callable[[Event], None]


@dataclass(frozen=True)
class Terms:
    """What client-level privacy in the central model rests on, all of it public.

    Each of `sites` sites takes part in a round with the chance `share`, by itself (Poisson), or,
    with `correlated` noise, in its turn. `noise_multiplier` is the standard deviation of the noise
    of one release over its sensitivity, `clip_norm` the L2 norm of an update (of the first round,
    where it is `adaptive`).
    """

    noise_multiplier: float
    clip_norm: float
    sites: int
    share: float = 1.0
    adaptive: Adaptive | None = None
    correlated: Correlated | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for an adaptive norm under correlated noise."""
        if self.adaptive and self.correlated:
            raise ConfigError(
                "Expected privacy.clipping='fixed' with privacy.noise='correlated', got "
                "'adaptive'; noise that spans rounds needs one norm for all of them."
            )

    def event(self, round_: int) -> Event | None:
        """What round `round_`, counted from 1, releases about a client; None: nothing new.

        With turns, the first round of each period stands for the one turn that a site has in it.
        """
        if self.correlated and (round_ - 1) % self.correlated.period:
            return None
        return Event(
            "gaussian" if self.noise_multiplier else "none",
            "client",
            self.noise_multiplier,
            1.0 if self.correlated else self.share,
            noise_at="server",
            round=round_,
        )


def private(rule: Rule, terms: Terms, draw: Draw, charge: Charge) -> Rule:
    """The rule under client-level privacy; the noise cannot be had without its accounting.

    McMahan et al. 2018, Algorithm 1, with fixed denominators: each update is clipped and weighs 1 /
    (share * sites) whoever else takes part, and the noise is as large as the rule's sensitivity
    demands. A site that is missing counts as zero, and so does a round without any: it is charged
    and gets its noise like every other. What the rule holds still gets none, as it is zero whatever
    the updates are. `charge` is called before the noise is drawn. Raises ComposeError for a rule
    that has no proof of its sensitivity.
    """
    require_proof(rule)

    def init(size: int) -> State:
        state = {
            "round": torch.zeros((), dtype=torch.int64),
            "sites": torch.tensor(terms.sites),
            "terms": _numbers(terms),
            "clip": torch.tensor(terms.clip_norm, dtype=torch.float64),
        }
        if terms.correlated:
            kept = terms.correlated.bands - 1
            state["noise"] = torch.zeros(kept, size, dtype=torch.float64)
        return state | {f"rule/{key}": tensor for key, tensor in rule.init(size).items()}

    def apply(state: State, cohort: Cohort, generator: torch.Generator) -> tuple[Delta, State]:
        _check_terms(terms, state, cohort)
        round_, sites = int(state["round"]) + 1, int(state["sites"])
        bound, expected = float(state["clip"]), terms.share * sites
        clipped, _ = clip(clip_norm=bound).apply({}, _fixed(cohort, expected), generator)
        own = {k.removeprefix("rule/"): v for k, v in state.items() if k.startswith("rule/")}
        held = rule.holds(own, cohort.layout)
        delta, own = rule.apply(own, clipped, generator)
        if delta.fold:
            raise ComposeError(f"Expected no change of frozen weights, got one by {rule.name!r}.")
        if event := terms.event(round_):
            charge(event)
        source = draw(generator)
        std = _std(rule, terms, bound, sites, cohort.layout.size)
        add = partial(_add, moving_D=_moving(delta, held), std=std, source=source)
        noisy_D, kept = _released(terms.correlated, state.get("noise"), delta.vector_D, add)
        after = state | {"round": torch.tensor(round_)} | {f"rule/{k}": v for k, v in own.items()}
        if kept is not None:
            after["noise"] = kept
        if terms.adaptive:
            norms = [norm(row_D) for row_D in cohort.rows]
            moved = terms.adaptive.next_norm(bound, norms, terms.noise_multiplier, expected, source)
            after["clip"] = torch.tensor(moved, dtype=torch.float64)
        return replace(delta, vector_D=noisy_D.float()), after

    return Stage(f"private({rule.name})", Cohort, Delta, apply, init)


def require_proof(rule: Rule) -> Rule:
    """The rule itself; raises ComposeError for one that has no proof of its sensitivity."""
    if rule.sensitivity(Facts(clip=1.0, max_weight=1.0, sites=1)) is None:
        raise ComposeError(
            f"Expected a rule whose sensitivity is proved with privacy.unit='client', got "
            f"{rule.name!r}; set strategy.rule to 'mean', 'norm-bounding', 'lora-mean', "
            "'lora-freeze-a', 'lora-alternate' or 'lora-share-a' and strategy.pre to '' or 'clip', "
            "or set privacy.place='local', where the sites add the noise and any rule may follow."
        )
    return rule


def _numbers(terms: Terms) -> Tensor:
    """The numbers that must not change within a run."""
    gain = terms.correlated.gain if terms.correlated else 1.0
    return torch.tensor([terms.noise_multiplier, terms.share, gain], dtype=torch.float64)


def _check_terms(terms: Terms, state: State, cohort: Cohort) -> None:
    if not torch.equal(state["terms"], _numbers(terms)):
        was, now = (
            ", ".join(f"{number:.6g}" for number in numbers.tolist())
            for numbers in (state["terms"], _numbers(terms))
        )
        raise ConfigError(
            f"Expected the noise of the run to resume (multiplier, share, gain: {was}), got {now}, "
            "which follows from run.rounds; set run.rounds back, or start a new run."
        )
    most = _GROWTH * int(state["sites"])
    if len(cohort.names) > most:
        raise ConfigError(
            f"Expected at most {most} sites in a round of a run that began with "
            f"{int(state['sites'])}, got {len(cohort.names)}; start a new run, whose noise is made "
            "for all of them."
        )


def _fixed(cohort: Cohort, expected: float) -> Cohort:
    """The updates with one fixed weight for each; a round of nobody is one update of zeros."""
    if not cohort.names:
        still_D = torch.zeros(cohort.layout.size)
        cohort = Cohort.of(cohort.layout, cohort.base_D, {"nobody": still_D})
    return replace(cohort, weights_N=torch.full((len(cohort.names),), _weight(expected)))


def _weight(expected: float) -> float:
    return float(torch.tensor(1.0 / expected))  # as the float32 that it will be


def _std(rule: Rule, terms: Terms, bound: float, sites: int, size: int) -> float:
    """Standard deviation of the noise on an aggregate of `size` values."""
    if terms.noise_multiplier == 0.0:
        return 0.0
    expected = terms.share * sites
    facts = Facts(clip=bound, max_weight=_weight(expected), sites=_GROWTH * sites)
    sensitivity = rule.sensitivity(facts)
    assert sensitivity is not None, "proved when the mechanism was made"
    if terms.correlated:
        whole = terms.correlated.gain * sensitivity
        return std_for(whole, terms.noise_multiplier, size * terms.correlated.rounds)
    multiplier = terms.noise_multiplier
    if terms.adaptive:
        multiplier = terms.adaptive.update_multiplier(multiplier, expected)
    return std_for(sensitivity, multiplier, size)


def _moving(delta: Delta, held: frozenset[str]) -> Tensor | None:
    """Which values (D,) a rule that holds some tensors may have moved; None: any.

    Raises ComposeError where it has moved what it said that it holds.
    """
    if not held:
        return None
    shapes = zip(delta.layout.names, delta.layout.shapes, strict=True)
    parts = [torch.full((math.prod(shape),), name not in held) for name, shape in shapes]
    moving_D = torch.cat(parts)
    if bool(delta.vector_D[~moving_D].any()):
        raise ComposeError(
            f"Expected no change of {', '.join(sorted(held)):.200}, which the rule says that it "
            "holds still, got one; mend the rule."
        )
    return moving_D


def _add(value_D: Tensor, moving_D: Tensor | None, std: float, source: Source) -> Tensor:
    """The value (D,) with noise where it may move and zero elsewhere, float64."""
    if moving_D is None:
        return add_gaussian(value_D, std, source)
    noisy_D = torch.zeros_like(value_D, dtype=torch.float64)
    noisy_D[moving_D] = add_gaussian(value_D[moving_D], std, source)
    return noisy_D


def _released(
    correlated: Correlated | None,
    kept: Tensor | None,
    exact_D: Tensor,
    add: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor | None]:
    """The aggregate with its noise, and the noise of this and earlier rounds (bands - 1, D).

    With y = C x + z, the released x' = C^-1 y follows row by row: x' = x + z - sum over j > 0 of
    c_j times the noise j rounds ago. What is rounded to the lattice is C x less what is public. A
    value that is held in a round is not released in it: the others are some of the rows of y, as
    its x' is the x that is known, zero.
    """
    if correlated is None or kept is None:
        return add(exact_D), None
    exact_D = exact_D.double()
    past = torch.tensor(correlated.coefficients[1:], dtype=torch.float64)
    noisy_D = add(exact_D - past @ kept)
    return noisy_D, torch.cat([(noisy_D - exact_D)[None], kept])[: len(kept)]


def noised_at_site(
    delta: Mapping[str, Tensor], clip_norm: float, noise_multiplier: float, source: Source
) -> dict[str, Tensor]:
    """A site's update, clipped and noised before it leaves: client-level, in the local model.

    The Gaussian mechanism on the whole update, float32: replacing it by nothing moves it by at most
    `clip_norm`. Raises ConfigError for an update that is not finite.
    """
    layout = Layout.of({name: tensor.float() for name, tensor in delta.items()})
    whole_D = layout.flatten({name: tensor.float() for name, tensor in delta.items()})
    std = std_for(clip_norm, noise_multiplier, layout.size)
    return layout.unflatten(add_gaussian(clipped(whole_D, clip_norm), std, source).float())


def clipped(update_D: Tensor, clip_norm: float) -> Tensor:
    """One update (D,), float32, scaled to an L2 norm of at most `clip_norm`."""
    layout = Layout(("update",), (tuple(update_D.shape),))
    cohort = Cohort.of(layout, torch.zeros(layout.size), {"site": update_D})
    after, _ = clip(clip_norm=clip_norm).apply({}, cohort, torch.Generator())
    return after.rows[0]
