"""SCAFFOLD's arithmetic, on quadratics whose optimum is known and which FedAvg misses."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.layout import Layout
from strategies import aggregate, control
from strategies.cohort import Delta
from strategies.product import structure
from tests.strategies.lora import LORA

STEPS, RATE = 20, 0.1


@dataclass
class Quadratic:
    """A site with the loss (a / 2) * (w - y)^2, and its control variate."""

    curvature: float
    centre: float
    own: dict[str, Tensor] = field(default_factory=lambda: {"w": torch.zeros(1)})

    def work(self, received: dict[str, Tensor], *, scaffold: bool) -> dict[str, Tensor]:
        """Local steps by hand, as Algorithm 1 has them; the update that travels."""
        payload, server = control.parted(received)
        w = payload["w"].clone()
        added = control.shift(self.own, server)["w"] if scaffold else torch.zeros(1)
        for _ in range(STEPS):
            w = w - RATE * (self.curvature * (w - self.centre) + added)
        delta = {"w": w - payload["w"]}
        new = control.renewed(self.own, server, delta, STEPS * RATE)
        change = {"w": new["w"] - self.own["w"]}
        self.own = new if scaffold else self.own
        return control.joined(delta, change)


def optimum(sites: list[Quadratic]) -> float:
    return sum(s.curvature * s.centre for s in sites) / sum(s.curvature for s in sites)


def federate(
    sites: list[Quadratic], rounds: int, *, scaffold: bool, asked: int | None = None
) -> dict[str, Tensor]:
    """Rounds with `asked` of the sites each, in turn."""
    start = {"w": torch.zeros(1)}
    flow = control.joined(start, control.started(start))
    layout = Layout.of(flow)
    for round_ in range(rounds):
        chosen = [sites[(round_ + at) % len(sites)] for at in range(asked or len(sites))]
        deltas = [site.work(flow, scaffold=scaffold) for site in chosen]
        zero = {name: torch.zeros_like(tensor) for name, tensor in flow.items()}
        mean = Delta(layout.flatten(aggregate("mean", zero, deltas)), layout)
        flow = control.damped(mean, len(chosen) / len(sites)).added_to(layout.flatten(flow))
    return flow


def heterogeneous() -> list[Quadratic]:
    return [Quadratic(0.2, 10.0), Quadratic(1.0, 0.0), Quadratic(3.0, -2.0)]


def test_many_local_steps_take_fedavg_past_the_optimum_and_scaffold_to_it() -> None:
    wanted = optimum(heterogeneous())
    fedavg = federate(heterogeneous(), 200, scaffold=False)["w"]
    scaffold = federate(heterogeneous(), 200, scaffold=True)["w"]
    assert abs(float(fedavg) - wanted) > 1.0
    assert float(scaffold) == pytest.approx(wanted, abs=1e-4)


def test_at_the_optimum_control_variates_are_the_gradients_there() -> None:
    sites = heterogeneous()
    flow = federate(sites, 300, scaffold=True)
    for site in sites:
        gradient = site.curvature * (optimum(sites) - site.centre)
        assert float(site.own["w"]) == pytest.approx(gradient, abs=1e-3)
    assert float(flow["control/w"]) == pytest.approx(0, abs=1e-4)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_the_server_s_control_variate_is_the_mean_of_the_sites(
    count: int, asked: int, rounds: int
) -> None:
    sites = [Quadratic(0.3 + at, 2.0 - at * at) for at in range(count)]
    flow = federate(sites, rounds, scaffold=True, asked=min(asked, count))
    mean = sum(float(site.own["w"]) for site in sites) / count
    assert float(flow["control/w"]) == pytest.approx(mean, rel=1e-4, abs=1e-4)


def test_asking_some_sites_at_a_time_ends_at_the_optimum_too() -> None:
    sites = heterogeneous()
    found = federate(sites, 600, scaffold=True, asked=1)["w"]
    assert float(found) == pytest.approx(optimum(sites), abs=1e-3)


def test_the_first_round_is_fedavg() -> None:
    first, plain = (federate(heterogeneous(), 1, scaffold=on)["w"] for on in (True, False))
    assert torch.equal(first, plain)


def test_control_variates_travel_behind_the_payload() -> None:
    both = control.with_controls(LORA)
    assert both.names == (*LORA.names, *(f"control/{name}" for name in LORA.names))
    assert both.shapes == LORA.shapes * 2
    payload = LORA.unflatten(torch.arange(LORA.size, dtype=torch.float32))
    joined = control.joined(payload, control.started(payload))
    both.check(joined)
    back, zeros = control.parted(joined)
    assert list(back) == list(zeros) == list(LORA.names)
    assert not any(bool(tensor.any()) for tensor in zeros.values())
    assert control.parted(payload) == (payload, {})


def test_control_variates_of_factors_are_no_factors() -> None:
    plain, both = structure(LORA), structure(control.with_controls(LORA))
    assert both.pairs == plain.pairs
    covered = sum(part.stop - part.start for part in both.others)
    assert covered == LORA.size + sum(part.stop - part.start for part in plain.others)


def test_damping_touches_control_variates_only() -> None:
    layout = control.with_controls(Layout(("w",), ((2,),)))
    delta = Delta(torch.tensor([4.0, 4.0, 4.0, 4.0]), layout)
    assert control.damped(delta, 0.25).vector_D.tolist() == [4.0, 4.0, 1.0, 1.0]
    assert delta.vector_D.tolist() == [4.0] * 4
    plain = Delta(torch.ones(2), Layout(("w",), ((2,),)))
    assert control.damped(plain, 0.25) is plain
