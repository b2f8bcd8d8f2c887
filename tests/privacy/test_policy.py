"""The policy of a site: what it reads, what it refuses, and the numbers that it gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.section import ConfigError
from privacy.accounting import epsilon, spent
from privacy.events import Event
from privacy.policy import Policy, PolicyError, Request, read_policy

WHOLE = """
max-epsilon = 8
delta = 1e-6
min-noise-multiplier = 0.5
require-unit = "record"
trust-server-noise = false
require-secure-aggregation = false
allowed-payloads = ["lora", "adapter"]
allowed-base-models = ["c0ffee"]
min-rows = 10
max-rows = 5000
max-rounds = 20
"""
REQUEST = Request("record", "lora", "c0ffee", 100, 20, secure_aggregation=False)
ROUND = Event("gaussian", "record", 1.0, 0.1, 10)


def made(**keys: Any) -> Policy:
    return Policy(**keys)


def written(folder: Path, text: str) -> Path:
    path = folder / "policy.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_whole_policy_is_read_and_admits_what_it_allows(tmp_path: Path) -> None:
    policy = read_policy(written(tmp_path, WHOLE))
    assert (policy.max_epsilon, policy.delta, policy.max_rounds) == (8.0, 1e-6, 20)
    policy.admit(REQUEST)
    policy.check_noise([ROUND])
    policy.check_budget("record", [], [ROUND])


def test_an_empty_policy_allows_everything(tmp_path: Path) -> None:
    policy = read_policy(written(tmp_path, ""))
    policy.admit(replace(REQUEST, unit="none"))
    policy.check_noise([])
    policy.check_budget("record", [Event("none", "record")], [ROUND])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max-epsilom = 3", "Unknown key of the site's policy 'max-epsilom'. Did you mean 'max-ep"),
        ("max_epsilon = 3", "Unknown key of the site's policy 'max_epsilon'"),
        ("max-epsilon = 0", "max-epsilon: Input should be greater than 0"),
        ("max-epsilon = 'much'", "max-epsilon: Input should be a valid number"),
        ("max-epsilon = nan", "max-epsilon: Input should be greater than 0"),
        ("delta = 1.0", "delta: Input should be less than 1"),
        (
            "require-unit = 'token'",
            "require-unit: Input should be 'record', 'client' or 'position'",
        ),
        ("require-unit = 'none'", "require-unit: Input should be 'record', 'client' or 'position'"),
        ("allowed-payloads = 'lora'", "allowed-payloads: Input should be a valid list"),
        ("max-rounds = true", "max-rounds: Input should be a valid integer"),
        ("min-rows = 9\nmax-rows = 8", "min-rows of at most max-rows=8.*got 9"),
        ("max-epsilon", "Expected a policy in TOML at"),
        ("max-epsilon = 3\nmax-epsilon = 4", "Expected a policy in TOML at"),
    ],
)
def test_a_policy_that_cannot_be_followed_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_policy(written(tmp_path, text))


def test_a_missing_policy_file_is_no_policy_to_go_on_without(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Without it the site takes part in nothing"):
        read_policy(tmp_path / "gone.toml")


@pytest.mark.parametrize(
    ("policy", "change", "said"),
    [
        ({"max_epsilon": 3.0}, {"unit": "none"}, "Expected privacy.unit='record'.*got 'none'"),
        ({"min_noise_multiplier": 1.0}, {"unit": "none"}, "Expected privacy.unit='record'"),
        ({"require_unit": "client"}, {"unit": "none"}, "Expected privacy.unit='client'.*'none'"),
        ({"require_unit": "client"}, {}, "Expected privacy.unit='client'.*got 'record'"),
        ({"allowed_payloads": ["adapter"]}, {}, "payload.kind to be among adapter.*got 'lora'"),
        ({"allowed_payloads": []}, {}, "payload.kind to be among none at all"),
        ({"allowed_base_models": ["beef"]}, {}, "base model to be among beef.*got 'c0ffee'"),
        ({"min_rows": 101}, {}, "at least 101 rows to train on.*got 100"),
        ({"max_rows": 99}, {}, "at most 99 rows to train on.*got 100"),
        ({"max_rounds": 19}, {}, r"at most 19 rounds \(run.rounds\).*got 20"),
        ({"require_secure_aggregation": True}, {}, "Expected secure aggregation"),
    ],
)
def test_a_run_that_is_not_allowed_is_refused(
    policy: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    request = replace(REQUEST, **change)
    with pytest.raises(PolicyError, match=rf"{said}.*;"):
        made(**policy).admit(request)
    made().admit(request)


def test_releases_that_delta_covers_without_any_noise_are_refused() -> None:
    seldom = replace(ROUND, noise_multiplier=0.1, sample_rate=5e-6, count=1)
    assert spent([seldom], 1e-5) == 0.0
    with pytest.raises(PolicyError, match="By this site's policy: Expected a delta below 5e-06"):
        made(max_epsilon=1.0).check_budget("record", [], [seldom])
    with pytest.raises(PolicyError, match="at most epsilon 1"):
        made(max_epsilon=1.0, delta=1e-6).check_budget("record", [], [seldom])


def test_what_is_not_about_noise_is_asked_of_plain_runs_too() -> None:
    plain = replace(REQUEST, unit="none")
    made(max_rounds=20, max_rows=100, allowed_payloads=["lora"]).admit(plain)
    with pytest.raises(PolicyError, match="at most 19 rounds"):
        made(max_rounds=19).admit(plain)


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([ROUND, replace(ROUND, noise_multiplier=0.4)], "at least 0.5 by.*got 0.4 .training rows"),
        ([replace(ROUND, noise_multiplier=0.4, part="held-out")], "got 0.4 .held-out rows"),
        ([Event("none", "record")], "at least 0.5"),
        ([replace(ROUND, noise_at="server")], "noise that this site adds.*noise at the server"),
        ([replace(ROUND, noise_at="sites")], "noise that this site adds.*let.*trust-peer-noise"),
        ([], "Expected releases with noise"),
    ],
)
def test_too_little_noise_is_refused(events: list[Event], said: str) -> None:
    policy = made(min_noise_multiplier=0.5)
    with pytest.raises(PolicyError, match=said):
        policy.check_noise(events)
    policy.check_noise([replace(ROUND, noise_multiplier=0.5)])
    made(min_noise_multiplier=0.5, trust_server_noise=True).check_noise(
        [replace(ROUND, noise_at="server")]
    )
    made(min_noise_multiplier=0.5, trust_peer_noise=True).check_noise(
        [replace(ROUND, noise_at="sites")]
    )


def test_an_exceeded_budget_is_refused_with_the_numbers() -> None:
    past, planned = [ROUND] * 3, [replace(ROUND, round=r) for r in (1, 2)]
    before, alone = spent(past, 1e-5), spent(planned, 1e-5)
    together = epsilon(1.0, 0.1, 50, 1e-5)
    made(max_epsilon=together * 1.01).check_budget("record", past, planned)
    limit = round(together * 0.98, 3)
    with pytest.raises(PolicyError) as refusal:
        made(max_epsilon=limit).check_budget("record", past, planned)
    text = str(refusal.value)
    assert f"at most epsilon {limit:g} (max-epsilon; per record, delta 1e-05, zero-out)" in text
    for number in (together, before, limit - before, alone):
        assert f"{number:.4g}" in text
    assert "its 2 rounds would by themselves spend" in text


def test_the_delta_of_a_budget_is_the_policys_own() -> None:
    loose, strict = epsilon(1.0, 0.1, 10, 1e-3), epsilon(1.0, 0.1, 10, 1e-9)
    limit = (loose + strict) / 2
    made(max_epsilon=limit, delta=1e-3).check_budget("record", [], [ROUND])
    with pytest.raises(PolicyError, match=r"delta 1e-09.*round 0 would"):
        made(max_epsilon=limit, delta=1e-9).check_budget("record", [], [ROUND])


def test_nothing_fits_after_a_release_without_noise() -> None:
    with pytest.raises(PolicyError, match="no bound at all was spent before, 0 remains"):
        made(max_epsilon=100.0).check_budget("record", [Event("none", "record")], [ROUND])
