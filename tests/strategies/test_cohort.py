"""Cohorts: order by name, exact shares, bits that do not depend on threads, spooling to disk."""

from __future__ import annotations

import errno
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.layout import Layout
from strategies.cohort import Cohort, CohortError, Delta, LazyRows, Spool, norm

LAYOUT = Layout(("a", "b"), ((2,), (1, 2)))
BASE = torch.zeros(4)


def rows(count: int) -> dict[str, Tensor]:
    return {f"site-{i}": torch.arange(4.0) + 10 * i for i in range(count)}


def test_rows_names_and_weights_are_sorted_together() -> None:
    deltas = {name: torch.full((4,), float(ord(name))) for name in "cab"}
    cohort = Cohort(
        BASE, list(deltas.values()), torch.tensor([0.5, 0.2, 0.3]), ("c", "a", "b"), LAYOUT
    )
    assert cohort.names == ("a", "b", "c")
    assert cohort.weights_N.tolist() == pytest.approx([0.2, 0.3, 0.5])
    assert torch.equal(cohort.deltas_ND[:, 0], torch.tensor([97.0, 98.0, 99.0]))


@given(st.permutations(range(5)))
def test_the_order_of_arrival_leaves_no_trace(order: list[int]) -> None:
    deltas = list(rows(5).items())
    weights = {name: 1.0 + 3 * i for i, (name, _) in enumerate(deltas)}
    straight = Cohort.of(LAYOUT, BASE, dict(deltas), weights)
    shuffled = Cohort.of(
        LAYOUT, BASE, dict(deltas[i] for i in order), dict(list(weights.items())[i] for i in order)
    )
    assert shuffled.names == straight.names
    assert torch.equal(shuffled.weights_N, straight.weights_N)
    assert torch.equal(shuffled.deltas_ND, straight.deltas_ND)


def test_shares_are_proportional_and_uniform_without_weights() -> None:
    weighted = Cohort.of(LAYOUT, BASE, rows(3), {"site-0": 1, "site-1": 2, "site-2": 5})
    assert weighted.weights_N.tolist() == [0.125, 0.25, 0.625]
    assert Cohort.of(LAYOUT, BASE, rows(4)).weights_N.tolist() == [0.25] * 4


@pytest.mark.parametrize(
    ("deltas", "weights", "message"),
    [
        ({}, None, "at least one update"),
        ({"a": torch.zeros(3)}, None, r"delta of 4 parameters from 'a', got .* \(3,\)"),
        ({"a": torch.zeros(1)}, None, "delta of 4 parameters"),
        ({"a": torch.zeros(4, dtype=torch.float64)}, None, "got torch.float64"),
        ({"a": torch.zeros(4)}, {"b": 1.0}, "mismatch at 'a'"),
        ({"a": torch.zeros(4)}, {"a": 0.0}, "positive weight for 'a', got 0.0"),
        ({"a": torch.zeros(4)}, {"a": -1.0}, "positive weight"),
        ({"a": torch.zeros(4)}, {"a": math.nan}, "positive weight"),
        ({"a": torch.zeros(4)}, {"a": math.inf}, "positive weight"),
    ],
)
def test_impossible_cohorts_are_refused(
    deltas: Mapping[str, Tensor], weights: Mapping[str, float] | None, message: str
) -> None:
    with pytest.raises(CohortError, match=message):
        Cohort.of(LAYOUT, BASE, deltas, weights)


def test_inconsistent_parts_are_refused() -> None:
    half = torch.tensor([0.5, 0.5])
    with pytest.raises(CohortError, match="distinct site names"):
        Cohort(BASE, [BASE, BASE], half, ("a", "a"), LAYOUT)
    with pytest.raises(CohortError, match="2 rows and weights, got 1"):
        Cohort(BASE, [BASE], half, ("a", "b"), LAYOUT)
    with pytest.raises(CohortError, match="base of 4 parameters"):
        Cohort(torch.zeros(1), [BASE, BASE], half, ("a", "b"), LAYOUT)


def test_delta_is_added_by_name() -> None:
    new = Delta(torch.tensor([1.0, 2.0, 3.0, 4.0]), LAYOUT).added_to(torch.ones(4))
    assert new["a"].tolist() == [2.0, 3.0] and new["b"].tolist() == [[4.0, 5.0]]


def test_lazy_rows_behave_as_a_sequence() -> None:
    made: list[int] = []

    def make(index: int) -> Tensor:
        made.append(index)
        return torch.tensor([float(index)])

    lazy = LazyRows(3, make)
    assert made == [] and len(lazy) == 3
    assert [float(row) for row in lazy] == [0.0, 1.0, 2.0]
    assert float(lazy[-1]) == 2.0 and [float(row) for row in lazy[1:]] == [1.0, 2.0]
    with pytest.raises(IndexError):
        lazy[3]


def test_spool_gives_back_what_was_put(tmp_path: Path) -> None:
    with Spool(tmp_path / "spool") as spool:
        for name, row in rows(3).items():
            spool.put(name, row)
        assert list(spool) == ["site-0", "site-1", "site-2"]
        assert all(torch.equal(spool[name], row) for name, row in rows(3).items())
        spool["site-0"].add_(1)
        assert torch.equal(spool["site-0"], rows(1)["site-0"])
        with pytest.raises(CohortError, match="second one"):
            spool.put("site-0", BASE)
        with pytest.raises(KeyError):
            spool["elsewhere"]
        kept = spool["site-1"]
        cohort = Cohort.of(LAYOUT, BASE, spool)
        assert torch.equal(cohort.deltas_ND, torch.stack(list(rows(3).values())))
    assert list((tmp_path / "spool").iterdir()) == []
    assert torch.equal(kept, rows(2)["site-1"])


def test_spool_is_not_led_astray_by_site_names(tmp_path: Path) -> None:
    with Spool(tmp_path / "spool") as spool:
        spool.put("../../etc/passwd", BASE)
        spool.put("a/b\0c", BASE)
        assert len(list((tmp_path / "spool").iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["spool"]


def test_spool_removes_what_an_interrupted_round_left(tmp_path: Path) -> None:
    Spool(tmp_path).put("a", BASE)
    (tmp_path / "note.txt").write_text("mine")
    Spool(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_spool_on_a_full_disk_says_so_and_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: Path, data: memoryview) -> int:
        with path.open("wb") as file:
            file.write(bytes(data)[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    spool = Spool(tmp_path)
    spool.put("first", BASE)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="No space left"):
            spool.put("second", BASE)
    assert list(spool) == ["first"] and len(list(tmp_path.iterdir())) == 1
    spool.put("second", BASE + 2)
    assert torch.equal(spool["second"], BASE + 2) and torch.equal(spool["first"], BASE)


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50))
def test_norm_is_the_float64_norm(values: list[float]) -> None:
    assert norm(torch.tensor(values)) == pytest.approx(math.hypot(*values), rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_norm_of_a_vector_that_is_not_finite_is_nan(bad: float) -> None:
    vector = torch.ones(40_000)
    vector[39_999] = bad
    assert math.isnan(norm(vector))


def test_norm_has_the_same_bits_for_any_number_of_threads() -> None:
    vector = torch.randn(300_001, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        found = set()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.add(norm(vector))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_mixed_rows_are_combinations_of_the_source_and_compose() -> None:
    cohort = Cohort.of(LAYOUT, BASE, rows(3))
    half = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    mixed = cohort.mixed(half, ["y", "x"], torch.tensor([0.25, 0.75]))
    assert mixed.names == ("x", "y") and mixed.weights_N.tolist() == [0.75, 0.25]
    assert mixed.rows[1].tolist() == [5.0, 6.0, 7.0, 8.0]
    assert mixed.rows[0] is not mixed.rows[1] and torch.equal(mixed.rows[0], rows(3)["site-2"])
    again = mixed.mixed(torch.tensor([[2.0, 1.0]]), ["z"], torch.ones(1))
    assert again.source is cohort and again.matrix_NS.tolist() == [[0.5, 0.5, 2.0]]
    assert again.coefficients_S.tolist() == [0.5, 0.5, 2.0]
    assert torch.equal(again.deltas_ND[0], mixed.rows[0] * 2 + mixed.rows[1])
    assert cohort.source is cohort and torch.equal(cohort.matrix_NS, torch.eye(3).double())


def test_other_rows_make_another_source() -> None:
    mixed = Cohort.of(LAYOUT, BASE, rows(2)).mixed(torch.eye(2) * 0.5)
    other = replace(mixed, rows=[row + 1 for row in mixed.rows])
    assert other.source is other and other.memo is not mixed.memo


def test_a_mix_of_the_wrong_shape_is_refused() -> None:
    cohort = Cohort.of(LAYOUT, BASE, rows(3))
    with pytest.raises(CohortError, match=r"mix over 3 rows, got shape \(2, 2\)"):
        cohort.mixed(torch.eye(2))
    with pytest.raises(CohortError, match="3 rows and weights, got 2"):
        cohort.mixed(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("mix", "kept"),
    [
        ([[1.0, 0.0], [0.0, 0.5]], True),
        ([[0.5, 0.5], [0.25, 0.25]], True),
        ([[0.6, 0.6], [0.0, 1.0]], False),
        ([[1.5, -0.5], [0.0, 1.0]], False),
        ([[1.01, 0.0], [0.0, 1.0]], False),
    ],
)
def test_a_proved_bound_is_kept_where_it_still_holds(mix: list[list[float]], kept: bool) -> None:
    cohort = replace(Cohort.of(LAYOUT, BASE, rows(2)), clip=30.0)
    mixed = cohort.mixed(torch.tensor(mix))
    assert (mixed.clip is not None) == kept
    if mixed.clip is not None:
        assert mixed.clip == pytest.approx(30.0, rel=1e-6)
        assert all(norm(row) <= mixed.clip for row in mixed.rows)


@given(st.integers(0, 2**31), st.integers(2, 8))
@settings(max_examples=25)
def test_an_average_stays_within_the_bound_after_rounding(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(4, generator=generator)
    deltas = {f"{i}": direction for i in range(count)}
    cohort = replace(Cohort.of(LAYOUT, BASE, deltas), clip=norm(direction))
    shares = torch.rand(count, count, generator=generator, dtype=torch.float64)
    mixed = cohort.mixed(shares / shares.sum(1, keepdim=True))
    assert mixed.clip is not None
    assert all(norm(row) <= mixed.clip for row in mixed.rows)


PEAK = """
import sys, torch
from pathlib import Path
from models.layout import Layout
from strategies.cohort import Cohort, Spool
from strategies.rules import mean

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

layout = Layout(("w",), ((1_000_000,),))
base = torch.zeros(layout.size)
rule = mean()
def run(count):
    with Spool(Path(sys.argv[1]) / str(count)) as spool:
        for index in range(count):
            spool.put(f"site-{index:03d}", torch.full((layout.size,), float(index)))
        delta, _ = rule.apply({}, Cohort.of(layout, base, spool), torch.Generator())
        assert delta.vector_D[0] == (count - 1) / 2, delta.vector_D[0]
run(2)
before = peak()
run(32)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_of_the_mean_does_not_grow_with_the_number_of_sites(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # In kB. 30 more sites are 120 MB of deltas; one delta is 4 MB, the rest is the allocator's.
    assert int(done.stdout) < 30_000
