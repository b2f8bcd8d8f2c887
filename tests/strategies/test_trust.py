"""FLTrust and FoolsGold: by hand, a naive second implementation, limits, state, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.section import ConfigError
from strategies import registry
from strategies.cohort import Cohort
from strategies.trust import foolsgold, foolsgold_scores
from tests.strategies.cohorts import apply, plain, prepared, result
from tests.strategies.inputs import LIES, SEEDS, attacked, rows_of
from tests.strategies.lora import lora_cohort, update

FLTRUST = registry.RULES["fltrust"]()


def trusting(rows: Tensor | list[list[float]], trusted: Tensor | list[float]) -> Cohort:
    return replace(plain(rows), trusted_D=torch.as_tensor(trusted, dtype=torch.float32))


def test_fltrust_worked_by_hand() -> None:
    # Cosines 1, 0.6, -1; norms brought to 2: 1/1.6 * ([2, 0] + 0.6 * [1.2, 1.6])
    rows = [[5.0, 0.0], [3.0, 4.0], [-1.0, 0.0]]
    found = result(FLTRUST, trusting(rows, [2.0, 0.0]))
    assert found.tolist() == pytest.approx([(2 + 0.72) / 1.6, 0.96 / 1.6])


@given(SEEDS)
@settings(max_examples=25)
def test_fltrust_agrees_with_a_naive_one(seed: int) -> None:
    rows, root = rows_of("cauchy", seed, 6), rows_of("normal", seed + 1, 1)[0]
    x, g = rows.double().numpy(), root.double().numpy()
    length = np.linalg.norm(x, axis=1)
    scores = np.maximum(x @ g / length / np.linalg.norm(g), 0)
    scaled = x / length[:, None] * np.linalg.norm(g)
    expected = scores @ scaled / scores.sum() if scores.sum() else np.zeros(6)
    np.testing.assert_allclose(
        result(FLTRUST, trusting(rows, root)), expected, rtol=1e-4, atol=1e-5
    )


@given(SEEDS, st.lists(LIES, min_size=9, max_size=9))
@settings(max_examples=50)
def test_no_number_of_liars_moves_fltrust_beyond_the_trusted_norm(
    seed: int, lies: list[float]
) -> None:
    root = rows_of("normal", seed + 1, 1)[0]
    found = result(FLTRUST, trusting(attacked(rows_of("normal", seed, 2), lies, seed), root))
    assert float(found.norm()) <= float(root.norm()) * (1 + 1e-5)


def test_fltrust_leaves_the_model_where_nobody_is_to_be_trusted() -> None:
    for rows, root in (
        ([[-1.0, 0.0], [-2.0, 0.0]], [1.0, 0.0]),
        ([[0.0, 0.0], [0.0, 0.0]], [1.0, 0.0]),
        ([[1.0, 0.0], [2.0, 0.0]], [0.0, 0.0]),
    ):
        assert result(FLTRUST, trusting(rows, root)).tolist() == [0.0, 0.0]


def test_fltrust_without_a_trusted_update_says_what_to_set() -> None:
    with pytest.raises(ConfigError, match=r"got none; set strategy\.root-source, or pass trusted="):
        result(FLTRUST, plain([[1.0], [2.0]]))


@given(SEEDS, st.floats(0.1, 10))
@settings(max_examples=15)
def test_fltrust_compares_products(seed: int, k: float) -> None:
    root = lora_cohort(seed, 7).rows[6]
    stage = registry.PRE["fltrust"]()
    cohort = replace(lora_cohort(seed, 6), trusted_D=root)
    turned = lora_cohort(seed, 6, gauge=[-1.0, 1.0, k, -k, 1.0, -1.0])
    kept = prepared(stage, cohort)
    same = prepared(stage, replace(turned, trusted_D=root))
    torch.testing.assert_close(same.coefficients_S, kept.coefficients_S, rtol=1e-3, atol=1e-4)
    dense = torch.stack([update(cohort, row) for row in cohort.rows]).float()
    naive = replace(plain(dense), trusted_D=update(cohort, root).float())
    expected = prepared(stage, naive).coefficients_S
    torch.testing.assert_close(kept.coefficients_S, expected, rtol=1e-3, atol=1e-4)


def naive_foolsgold(vectors: np.ndarray) -> np.ndarray:
    """Algorithm 1 with loops over sites; a site's similarity with itself is left out."""
    n = len(vectors)
    lengths = np.linalg.norm(vectors, axis=1)
    cs = vectors @ vectors.T / np.outer(lengths, lengths)
    v = [max(cs[i][j] for j in range(n) if j != i) for i in range(n)]
    alpha = []
    for i in range(n):
        similar = []
        for j in range(n):
            if j != i:
                pardoned = v[j] > v[i] and v[j] > 0
                similar.append(cs[i][j] * max(v[i], 0) / v[j] if pardoned else cs[i][j])
        alpha.append(min(1.0, max(0.0, 1 - max(similar))))
    alpha = np.array(alpha)
    if alpha.max() <= 0:
        return alpha
    alpha = np.minimum(alpha / alpha.max(), 0.99)
    with np.errstate(divide="ignore"):
        return np.clip(np.log(alpha / (1 - alpha)) + 0.5, 0, 1)


@given(SEEDS, st.integers(2, 9))
@settings(max_examples=40)
def test_foolsgold_agrees_with_a_naive_one(seed: int, count: int) -> None:
    rows = rows_of("normal", seed, count).double()
    found = foolsgold_scores(rows @ rows.T)
    np.testing.assert_allclose(found, naive_foolsgold(rows.numpy()), rtol=1e-6, atol=1e-9)


def test_foolsgold_leaves_copies_no_weight() -> None:
    rows = torch.cat([torch.eye(4), torch.full((3, 4), -1.0)])
    kept = prepared(foolsgold(), plain(rows))
    assert kept.weights_N.tolist() == pytest.approx([0.25] * 4 + [0.0] * 3)
    assert result(registry.RULES["foolsgold"](), plain(rows)).tolist() == pytest.approx([0.25] * 4)


def test_foolsgold_alone_and_among_nothing_but_copies() -> None:
    rule = registry.RULES["foolsgold"]()
    assert result(rule, plain([[3.0, 4.0]])).tolist() == [3.0, 4.0]
    assert result(rule, plain([[1.0, 0.0]] * 3)).tolist() == [0.0, 0.0]
    assert result(rule, plain([[0.0, 0.0]] * 3)).tolist() == [0.0, 0.0]


def test_foolsgold_remembers_sites_by_name() -> None:
    rule = registry.RULES["foolsgold"]()
    rounds = [
        {"a": [1.0, 0.0], "b": [0.0, 1.0]},
        {"b": [1.0, 1.0], "c": [0.0, 2.0]},
        {"a": [0.0, 1.0], "b": [2.0, 0.0], "c": [1.0, 1.0]},
    ]
    state, ends = None, {name: [0.0] * 6 for name in "abc"}
    for index, given_ in enumerate(rounds):
        cohort = plain({name: torch.tensor(row) for name, row in given_.items()})
        final, state = apply(rule, cohort, state)
        for name, row in given_.items():
            ends[name][2 * index : 2 * index + 2] = row
    laid = torch.tensor([ends[name] for name in "abc"], dtype=torch.float64)
    assert state is not None and bytes(state["foolsgold/names"].tolist()) == b'["a", "b", "c"]'
    torch.testing.assert_close(state["foolsgold/products"], laid @ laid.T)
    scores = foolsgold_scores(laid @ laid.T)
    expected = scores / scores.sum() @ torch.tensor(list(rounds[2].values())).double()
    torch.testing.assert_close(final.double(), expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(final, result(rule, cohort))  # the history tells


@given(SEEDS, st.permutations(range(6)))
@settings(max_examples=20)
def test_order_and_scale_are_of_no_consequence(seed: int, order: list[int]) -> None:
    rows, root = rows_of("normal", seed, 6), rows_of("normal", seed + 1, 1)[0]
    for name in ("fltrust", "foolsgold"):
        rule = registry.RULES[name]()
        found = result(rule, trusting(rows, root))
        renamed = result(rule, trusting(rows[order], root))
        torch.testing.assert_close(renamed, found, rtol=1e-4, atol=1e-5)
        scaled = result(rule, trusting(rows * 4, root * 4))
        torch.testing.assert_close(scaled, found * 4, rtol=1e-6, atol=1e-6)
