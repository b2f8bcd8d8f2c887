"""The benchmark of secure aggregation: it adds up, and counts what travels."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from flower_app.bench import encrypted, secure, secure_rounds
from privacy.secure.config import SecureConfig
from privacy.secure.exchange import Masks
from privacy.secure.terms import Terms
from strategies.exchange import Parcel, nbytes
from tests.privacy.secure_groups import NAMES
from tests.privacy.test_secure_exchange import LAYOUT, SENT, Sites


@pytest.mark.parametrize(("bits", "words"), [(32, 4), (16, 2)])
def test_bytes_are_those_of_the_wire(bits: int, words: int) -> None:
    record = secure._round(sites=7, size=20_000, bits=bits, rate=1e9)
    assert record["dropped"] == 1
    assert record["bytes_plain"] == 8 * 20_000
    payload = (4 + words) * 20_000
    # Per site: terms with all names, 64 bytes of keys, shares of 82 bytes and signatures for and
    # from six others.
    assert payload + 2000 < record["bytes_secure"] < payload + 8000
    assert record["overhead"] == record["bytes_secure"] / record["bytes_plain"]
    assert all(record[f"{work}_s"] > 0 for work in secure.TIMED)
    assert f"{record['overhead']:.3f}" in secure._text([{"bits": bits, **record}], 7, 20_000, 1e9)


def test_bytes_are_all_that_an_exchange_sends_and_gets() -> None:
    """The first message among them, which names all members."""
    sites, down, up = Sites(), 0, 0

    def ask(step: str, parcels: Mapping[str, Parcel], timeout: float) -> dict[str, Parcel]:
        nonlocal down, up
        answers = sites.ask(step, parcels, timeout)
        down += sum(map(nbytes, parcels.values()))
        up += sum(map(nbytes, answers.values()))
        return answers

    masks = Masks(SecureConfig(aggregation="masks"), LAYOUT, "r", "s", 0, 1e4)
    with masks.open(1, NAMES, lambda: SENT, ask) as intake:
        down += sum(map(nbytes, intake.parcels.values()))
        for name in NAMES[1:]:
            reply = sites.reply(intake, name)
            intake.admit(reply)
            up += reply.nbytes
        assert intake.close().counted == NAMES[1:]
    terms = Terms("r", 1, "group 1", NAMES, LAYOUT.digest, LAYOUT.size, 32, 1.0, "s")
    bench = secure.Bench(terms, torch.zeros(LAYOUT.size))
    bench.run()
    assert bench.server.dropped == NAMES[:1]
    assert (bench.down, bench.up) == (down, up)


def test_a_wrong_sum_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    run = secure.Bench.run
    monkeypatch.setattr(secure.Bench, "run", lambda bench: run(bench) + 0.001)
    with pytest.raises(AssertionError, match="the sum is not that of the updates"):
        secure._round(sites=7, size=1000, bits=32, rate=1e9)


@pytest.mark.parametrize(("bits", "numbers"), [(32, 1), (16, 2)])
def test_bytes_in_ciphertexts_are_those_of_the_wire(bits: int, numbers: int) -> None:
    pytest.importorskip("tenseal", reason="needs ./scripts/setup ckks")
    size = 20_000
    record = encrypted.measured(secure.terms(7, size, bits), secure.REACH)
    ciphertexts = -(-(size / numbers) // 4096) * 4096 * 32
    opened = (ciphertexts + size * bits // 8) / 6
    assert record["bytes_secure"] == pytest.approx(4 * size + ciphertexts + opened, rel=0.02)
    assert record["overhead"] == record["bytes_secure"] / (8 * size)
    assert all(record[f"{work}_s"] > 0 for work in ("encode", "encrypt", "server", "open"))
    assert f"{record['overhead']:.3f}" in encrypted.text([{"bits": bits, **record}])


def rounds_of(monkeypatch: pytest.MonkeyPatch, ok: int) -> None:
    """Let a run of four sites have had these metrics, without running it."""
    seconds = (9.0, 2.0, 4.0)
    rows = [{"kind": "site"}] + [
        {"kind": "round", "ok": ok, "wall_s": wall_s, "bytes_down": 4000, "bytes_up": 8000}
        for wall_s in seconds
    ]
    monkeypatch.setattr(secure_rounds, "metrics", lambda output: rows)
    monkeypatch.setattr(secure_rounds, "process", lambda *_: nullcontext(Mock()))


def test_rounds_are_compared_after_the_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rounds_of(monkeypatch, ok=4)
    config = secure_rounds._config(tmp_path, tmp_path / "run", 3)
    found = secure_rounds._later(tmp_path, config, 4)
    assert found == {"seconds": 3.0, "bytes": 3000.0}
    record = {"way": "plain", "sites": 4, "size": 5, "bytes_ratio": 1.0, "seconds_ratio": 1.0}
    assert "3.0" in secure_rounds._text([{**record, **found}], 3)


def test_a_round_without_a_site_is_no_measurement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rounds_of(monkeypatch, ok=3)
    (tmp_path / "run.log").write_text("site-03 takes no part")
    config = secure_rounds._config(tmp_path, tmp_path / "run", 3)
    with pytest.raises(RuntimeError, match="3 rounds of all sites, got:\nsite-03 takes no part"):
        secure_rounds._later(tmp_path, config, 4)
