"""The gate: every malformed class is refused by its kind, and the honest result keeps its bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.layout import Layout
from models.wire import RawArray, encode
from strategies.cohort import Cohort
from strategies.config import StrategyConfig
from strategies.gate import MAX_EXAMPLES, Gate, Refusal, RefusalKind, Reply
from strategies.registry import RULES, build

LAYOUT = Layout(("a", "b", "c"), ((2, 3), (4,), ()))
# As many numbers, as LoRA factors and a head: for rules that ask for factors.
FACTORS = Layout(("m.lora_A.weight", "m.lora_B.weight", "head"), ((2, 2), (2, 2), (3,)))
ASKED = ("ann", "bob", "dan", "eve")
Spoil = Callable[[Reply], Reply]


def honest(site: str, seed: int = 0) -> Reply:
    generator = torch.Generator().manual_seed(seed)
    arrays = {
        name: encode(torch.randn(shape, generator=generator))
        for name, shape in zip(LAYOUT.names, LAYOUT.shapes, strict=True)
    }
    return Reply(site, 3, LAYOUT.digest, 10 + seed, arrays, nbytes=500)


def gate() -> Gate:
    return Gate(3, LAYOUT, ASKED, max_update_norm=100.0, weight_cap=1000)


def with_array(reply: Reply, name: str, raw: RawArray) -> Reply:
    return replace(reply, arrays={**reply.arrays, name: raw})


def tensor(name: str, value: Tensor) -> Spoil:
    return lambda reply: with_array(reply, name, encode(value))


def filled(value: float) -> Spoil:
    return tensor("b", torch.tensor([0.0, 0.0, value, 0.0]))


def examples(value: object) -> Spoil:
    return lambda reply: replace(reply, num_examples=value)


def part(name: str, **changes: Any) -> Spoil:
    return lambda reply: with_array(reply, name, replace(reply.arrays[name], **changes))


def only(*names: str) -> Spoil:
    return lambda reply: replace(reply, arrays={name: reply.arrays[name] for name in names})


MALFORMED: list[tuple[str, RefusalKind, Spoil]] = [
    ("no arrays", "missing-key", only()),
    ("one array missing", "missing-key", only("a", "c")),
    ("one array misnamed", "missing-key", lambda r: replace(
        r, arrays={"a": r.arrays["a"], "B": r.arrays["b"], "c": r.arrays["c"]})),
    ("one array more", "extra-key", tensor("d", torch.zeros(1))),
    ("arrays in another order", "reordered-keys", only("b", "a", "c")),
    ("transposed", "wrong-shape", tensor("a", torch.zeros(3, 2))),
    ("flattened", "wrong-shape", tensor("a", torch.zeros(6))),
    ("would broadcast (1,)", "wrong-shape", tensor("b", torch.zeros(1))),
    ("would broadcast ()", "wrong-shape", tensor("b", torch.zeros(()))),
    ("would broadcast (1, 3)", "wrong-shape", tensor("a", torch.zeros(1, 3))),
    ("scalar as vector", "wrong-shape", tensor("c", torch.zeros(1))),
    ("empty", "wrong-shape", tensor("b", torch.zeros(0))),
    ("negative side", "wrong-shape", part("b", shape=(-4,))),
    ("half precision", "wrong-dtype", tensor("b", torch.zeros(4, dtype=torch.float16))),
    ("bfloat16", "wrong-dtype", tensor("b", torch.zeros(4, dtype=torch.bfloat16))),
    ("double", "wrong-dtype", part("b", dtype="float64", data=bytes(32))),
    ("objects", "wrong-dtype", part("b", dtype="O")),
    ("bytes short", "malformed-bytes", part("b", data=bytes(15))),
    ("bytes long", "malformed-bytes", part("b", data=bytes(17))),
    ("no bytes", "malformed-bytes", part("b", data=b"")),
    ("NaN", "not-finite", filled(math.nan)),
    ("+Inf", "not-finite", filled(math.inf)),
    ("-Inf", "not-finite", filled(-math.inf)),
    ("large", "norm", filled(101.0)),
    ("largest float", "norm", filled(3.4e38)),
    ("no examples", "num-examples", examples(0)),
    ("negative examples", "num-examples", examples(-5)),
    ("too many examples", "num-examples", examples(MAX_EXAMPLES + 1)),
    ("absurd examples", "num-examples", examples(10**15)),
    ("NaN examples", "num-examples", examples(math.nan)),
    ("inf examples", "num-examples", examples(math.inf)),
    ("fractional examples", "num-examples", examples(10.0)),
    ("true examples", "num-examples", examples(True)),
    ("text examples", "num-examples", examples("10")),
    ("missing examples", "num-examples", examples(None)),
    ("earlier round", "wrong-round", lambda r: replace(r, round=2)),
    ("later round", "wrong-round", lambda r: replace(r, round=4)),
    ("round as float", "wrong-round", lambda r: replace(r, round=3.0)),
    ("no round", "wrong-round", lambda r: replace(r, round=None)),
    ("other layout", "layout", lambda r: replace(r, layout_digest="0" * 64)),
    ("no layout", "layout", lambda r: replace(r, layout_digest=None)),
    ("unasked", "unasked", lambda r: replace(r, site="mallory")),
    ("huge message", "oversized", lambda r: replace(r, nbytes=10**9)),
    ("huge array, small claim", "oversized", part("b", data=bytes(10**6))),
]  # fmt: skip
IDS = [name for name, _, _ in MALFORMED]


def aggregate(replies: list[Reply], config: StrategyConfig) -> tuple[Tensor, list[RefusalKind]]:
    """Gate the replies, run the chain on what is admitted; the delta and the kinds refused."""
    door, admitted, refused = gate(), {}, []
    for reply in replies:
        try:
            update = door.admit(reply)
            admitted[update.site] = update
        except Refusal as refusal:
            refused.append(refusal.kind)
    deltas = {site: update.delta_D for site, update in admitted.items()}
    weights = {site: float(update.num_examples) for site, update in admitted.items()}
    layout = FACTORS if config.rule.startswith("lora-") else LAYOUT
    cohort = Cohort.of(layout, torch.zeros(layout.size), deltas, weights)
    cohort = replace(cohort, trusted_D=torch.linspace(-1, 1, layout.size))
    chain = build(config)
    delta, _ = chain.apply(chain.init(LAYOUT.size), cohort, torch.Generator().manual_seed(0))
    return delta.vector_D, refused


def test_an_honest_reply_is_admitted_whole() -> None:
    update = gate().admit(honest("ann", 7))
    assert (update.site, update.num_examples) == ("ann", 17)
    expected = torch.cat([
        torch.frombuffer(bytearray(raw.data), dtype=torch.float32)
        for raw in honest("ann", 7).arrays.values()
    ])  # fmt: skip
    assert update.delta_D.dtype == torch.float32 and torch.equal(update.delta_D, expected)


@pytest.mark.parametrize(("name", "kind", "spoil"), MALFORMED, ids=IDS)
def test_a_malformed_reply_is_refused_by_its_kind(
    name: str, kind: RefusalKind, spoil: Spoil
) -> None:
    with pytest.raises(Refusal, match="Expected") as caught:
        gate().admit(spoil(honest("eve")))
    assert caught.value.kind == kind
    assert str(caught.value) == f"{kind}: {caught.value.message}"


@pytest.mark.parametrize("rule", sorted(RULES))
def test_the_result_is_that_of_the_honest_ones_to_the_bit(rule: str) -> None:
    """All that is malformed comes before, between and after the honest replies."""
    good = [honest("ann", 1), honest("bob", 2), honest("dan", 3)]
    config = StrategyConfig(rule=rule, pre="clip", num_byzantine=0)
    alone, none_refused = aggregate(good, config)
    bad = [spoil(honest("eve", 3)) for _, _, spoil in MALFORMED]
    kinds = [kind for _, kind, _ in MALFORMED]
    together, refused = aggregate([*bad, good[0], *bad, *good[1:], *bad], config)
    assert refused == 3 * kinds and none_refused == []
    assert torch.equal(together, alone)


def test_every_kind_of_refusal_is_tried() -> None:
    tried = {kind for _, kind, _ in MALFORMED}
    assert tried | {"duplicate"} == set(get_args(RefusalKind))


def test_the_first_good_reply_of_a_site_stays() -> None:
    first, second, other = honest("ann", 1), honest("ann", 2), honest("bob", 3)
    config = StrategyConfig()
    once, _ = aggregate([first, other], config)
    again, refused = aggregate([first, second, other], config)
    assert refused == ["duplicate"] and torch.equal(once, again)


def test_a_site_whose_reply_was_refused_may_send_a_good_one() -> None:
    door = gate()
    with pytest.raises(Refusal):
        door.admit(replace(honest("ann"), num_examples=0))
    assert "ann" in door.outstanding
    door.admit(honest("ann"))
    assert door.outstanding == ("bob", "dan", "eve")


def test_examples_are_capped_not_trusted() -> None:
    assert gate().admit(examples(1000)(honest("ann"))).num_examples == 1000
    assert gate().admit(examples(1001)(honest("ann"))).num_examples == 1000
    assert gate().admit(examples(MAX_EXAMPLES)(honest("ann"))).num_examples == 1000


def test_norm_at_the_bound_is_admitted() -> None:
    zero = {n: encode(torch.zeros(s)) for n, s in zip(LAYOUT.names, LAYOUT.shapes, strict=True)}
    at_bound = filled(100.0)(replace(honest("ann"), arrays=zero))
    assert gate().admit(at_bound).delta_D.sum() == 100.0
    assert gate().admit(replace(at_bound, arrays=zero)).delta_D.abs().sum() == 0.0


def test_an_oversized_reply_is_refused_before_its_bytes_are_read() -> None:
    class Untouched(dict[str, RawArray]):
        def __getitem__(self, key: str) -> RawArray:
            raise AssertionError("decoded")

    reply = replace(honest("ann"), arrays=Untouched(honest("ann").arrays), nbytes=10**9)
    with pytest.raises(Refusal) as caught:
        gate().admit(reply)
    assert caught.value.kind == "oversized"
    assert gate().max_nbytes < 10**5
    assert gate().admit(replace(honest("ann"), nbytes=gate().max_nbytes))


def test_reasons_are_short_whatever_a_site_sends() -> None:
    long = "x" * 1_000_000
    for spoil in (
        lambda r: replace(r, site=long),
        lambda r: replace(r, round=long),
        lambda r: replace(r, layout_digest=long),
        lambda r: replace(r, num_examples=long),
        tensor(long, torch.zeros(1)),
        part("b", dtype=long),
        part("b", shape=(1,) * 100_000),
    ):  # fmt: skip
        with pytest.raises(Refusal) as caught:
            gate().admit(spoil(honest("ann")))
        assert len(str(caught.value)) < 300


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary()))
def test_any_number_of_examples_is_credited_in_range_or_refused(value: object) -> None:
    reply = examples(value)(honest("ann"))
    if type(value) is int and 1 <= value <= MAX_EXAMPLES:
        assert gate().admit(reply).num_examples == min(value, 1000)
        return
    with pytest.raises(Refusal) as caught:
        gate().admit(reply)
    assert caught.value.kind == "num-examples"


@given(st.binary(max_size=80), st.text(max_size=8), st.lists(st.integers(-2, 9), max_size=3))
def test_garbage_is_refused_and_never_crashes(data: bytes, dtype: str, shape: list[int]) -> None:
    for kind in (dtype, "float32"):
        for sides in (tuple(shape), (4,)):
            reply = with_array(honest("ann"), "b", RawArray(kind, sides, data))
            try:
                update = gate().admit(reply)
            except Refusal:
                continue
            assert update.delta_D.isfinite().all() and len(data) == 16
