"""The benchmark of secure aggregation: it adds up, and counts what travels."""

from __future__ import annotations

import pytest

from flower_app.bench import encrypted, secure


@pytest.mark.parametrize(("bits", "words"), [(32, 4), (16, 2)])
def test_bytes_are_those_of_the_wire(bits: int, words: int) -> None:
    record = secure._round(sites=7, size=20_000, bits=bits, rate=1e9)
    assert record["dropped"] == 1
    assert record["bytes_plain"] == 8 * 20_000
    payload = (4 + words) * 20_000
    # Per site: 64 bytes of keys, shares of 82 bytes and signatures for and from six others.
    assert payload + 2000 < record["bytes_secure"] < payload + 8000
    assert record["overhead"] == record["bytes_secure"] / record["bytes_plain"]
    assert all(record[f"{work}_s"] > 0 for work in secure.TIMED)
    assert f"{record['overhead']:.3f}" in secure._text([{"bits": bits, **record}], 7, 20_000, 1e9)


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
