"""Metrics rows and the summary: complete, right, and proof against what sites may report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flower_app.config import Config, Value, defaults, parse
from flower_app.recorder import Recorder, human_bytes, read_score, score_fields, summarise
from flower_app.report import results_table, write_report
from flower_app.runfolder import RunFolder
from models.evaluate import Score
from strategies.flower import RoundOutcome
from strategies.messages import Scalar, SiteOutcome

PAYLOAD = {"a": torch.ones(2)}
# What a run promises to hold (see the README).
PROMISED = {
    "zero_shot", "local", "federated", "central", "rounds", "sites", "bytes_down_per_round",
    "bytes_up_per_round", "tokens_per_s", "wall_s", "seed", "secure_aggregation",
}  # fmt: skip
SITE_ROW = {
    "kind", "round", "site", "status", "reason", "examples", "train_loss", "loss_before",
    "loss_after", "metric_before", "metric_after", "steps", "tokens", "useful_tokens", "load_s",
    "train_s", "eval_s", "bytes_down", "bytes_up", "base_reads", "worker",
}  # fmt: skip
ROUND_ROW = {
    "kind", "round", "asked", "ok", "wall_s", "train_s", "wait_s", "aggregate_s", "bytes_down",
    "bytes_up", "learning_rate", "update_norm",
}  # fmt: skip


def config(base: Path, **changes: Value) -> Config:
    flat = {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return parse({**defaults(), "run.output-dir": str(base), "run.rounds": 2, **flat})


def report(before: Score, after: Score | None = None, **changes: Scalar) -> dict[str, Scalar]:
    fields: dict[str, Scalar] = {
        "examples": 40, "train_loss": 2.0, "steps": 5, "tokens": 800, "useful_tokens": 700,
        "load_s": 0.25, "train_s": 2.0, "eval_s": 0.5, "base_reads": 1, "worker": "host:1",
    }  # fmt: skip
    return (
        fields | score_fields("before", before) | score_fields("after", after or before) | changes
    )


def site(
    name: str,
    fields: Mapping[str, Scalar],
    status: Literal["ok", "quarantined", "failed", "missing"] = "ok",
    reason: str = "",
) -> SiteOutcome:
    return SiteOutcome(name, status, reason, fields, 400, 500)


def outcome(round_: int, *sites: SiteOutcome, update_norm: float = 0.5) -> RoundOutcome:
    return RoundOutcome(round_, PAYLOAD, {}, sites, 4.0, 0.5, update_norm)


class Recording:
    """A recorder in a folder of its own."""

    def __init__(self, base: Path, **changes: Value) -> None:
        self.config = config(base, **changes)
        self.folder = RunFolder.create(self.config)
        self.recorder = Recorder(self.config, self.folder, {"base": "b", "layout": "l"})

    def rows(self, kind: str) -> list[dict[str, Any]]:
        text = self.folder.metrics.read_text(encoding="utf-8")
        rows = [json.loads(line, parse_constant=pytest.fail) for line in text.split("\n") if line]
        return [row for row in rows if row["kind"] == kind]

    def summary(self) -> dict[str, Any]:
        facts = {"wall_s": 9.0, "mode": "simulation", "trainable_parameters": 2}
        return summarise(self.config, self.folder.rows(), facts)


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    return Recording(tmp_path)


def two_rounds(recording: Recording) -> None:
    """Two sites, whose loss falls from 4 and 2 by 1 in each round; 10 and 30 labels."""
    for round_ in (1, 2):
        a, b = Score(50.0 - 10 * round_, 10, 0, 3), Score(90.0 - 30 * round_, 30, 0, 5)
        lower = Score(a.loss_sum - 10, 10, 0, 3), Score(b.loss_sum - 30, 30, 0, 5)
        recording.recorder.round_finished(
            outcome(
                round_,
                site("ann", report(a, lower[0])),
                site("bob", report(b, lower[1], worker="host:2", train_s=1.0)),
            )
        )
    last = [site("ann", report(Score(20.0, 10))), site("bob", report(Score(0.0, 30)))]
    recording.recorder.evaluated(2, last)


def test_rows_hold_what_was_promised(recording: Recording) -> None:
    two_rounds(recording)
    assert [set(row) for row in recording.rows("site")] == [SITE_ROW] * 4
    assert [set(row) for row in recording.rows("round")] == [ROUND_ROW] * 2
    for row in recording.rows("evaluation"):
        assert set(row) == {
            "kind", "round", "loss", "perplexity", "eval_tokens", "per_site", "sums"
        }  # fmt: skip
    first = recording.rows("site")[0]
    assert (first["site"], first["loss_before"], first["loss_after"]) == ("ann", 4.0, 3.0)
    assert first["metric_after"] == pytest.approx(math.exp(3.0))
    assert (first["bytes_down"], first["bytes_up"], first["worker"]) == (400, 500, "host:1")


def test_rounds_of_lora_tell_their_gap_and_what_the_fold_costs(recording: Recording) -> None:
    fold = {"m.lora_fold.weight": torch.ones(2, 2)}
    first = replace(outcome(1, site("ann", report(Score(1.0, 1)))), product_gap=0.25)
    second = replace(first, round=2, product_gap=0.5, fold=fold, bytes_down_fold=64)
    recording.recorder.round_finished(first)
    recording.recorder.round_finished(second)
    rows = recording.rows("round")
    assert rows[0]["product_gap"] == 0.25 and "bytes_down_fold" not in rows[0]
    assert (rows[1]["product_gap"], rows[1]["bytes_down_fold"]) == (0.5, 64)
    summary = recording.summary()
    assert summary["product_gap"] == 0.375 and summary["bytes_down_fold_per_round"] == 32
    _, checkpoint = RunFolder.resume(
        recording.config.model_copy(
            update={"run": recording.config.run.model_copy(update={"resume": "latest"})}
        )
    )
    assert checkpoint and torch.equal(checkpoint.fold["m.lora_fold.weight"], torch.ones(2, 2))
    page = write_report(recording.folder.path).read_text()
    for words in ("product gap", "25 %", "37.5 %", "64 B"):
        assert words in page


def test_evaluations_weigh_sites_by_their_labels(recording: Recording) -> None:
    two_rounds(recording)
    by_round = {row["round"]: row for row in recording.rows("evaluation")}
    assert sorted(by_round) == [0, 1, 2]
    assert by_round[0]["loss"] == pytest.approx((40 + 60) / 40)  # not the mean of 4 and 2
    assert by_round[2]["loss"] == pytest.approx(20 / 40)
    assert by_round[2]["perplexity"] == pytest.approx(math.exp(0.5))
    assert by_round[0]["eval_tokens"] == 40
    assert by_round[0]["per_site"]["ann"]["loss"] == 4.0


def test_time_of_a_round_is_split_without_remainder(recording: Recording) -> None:
    two_rounds(recording)
    row = recording.rows("round")[0]
    assert row["train_s"] + row["wait_s"] + row["aggregate_s"] == pytest.approx(row["wall_s"])
    assert row["train_s"] == pytest.approx(2.75)  # the busiest worker's load, train and eval
    assert (row["asked"], row["ok"]) == (2, 2)
    assert (row["bytes_down"], row["bytes_up"]) == (800, 1000)


def test_sites_that_share_a_worker_add_up_but_not_beyond_the_round(recording: Recording) -> None:
    sites = [site(name, report(Score(1.0, 1))) for name in ("ann", "bob")]
    recording.recorder.round_finished(outcome(1, *sites))
    row = recording.rows("round")[0]
    assert (row["train_s"], row["wait_s"]) == (3.5, 0.0)  # 5.5 s reported, 3.5 s there were


def test_each_round_is_the_one_to_resume_from(recording: Recording) -> None:
    two_rounds(recording)
    resumed = config(recording.folder.path.parent, run__resume=str(recording.folder.path))
    again, last = RunFolder.resume(resumed)
    again.rewind(resumed, last)
    assert last is not None
    assert (last.round, last.facts) == (2, {"base": "b", "layout": "l"})
    assert torch.equal(last.payload["a"], PAYLOAD["a"])
    # The rows of both rounds are there; the final evaluation is made again.
    assert [row["round"] for row in again.rows() if row["kind"] == "evaluation"] == [0, 1]


def test_an_evaluation_is_recorded_once(recording: Recording) -> None:
    scored = [site("ann", report(Score(3.0, 1)))]
    for _ in range(2):
        recording.recorder.evaluated(0, scored)
    fresh = Recorder(recording.config, recording.folder, {})
    fresh.evaluated(0, scored)
    assert len(recording.rows("evaluation")) == 1


def test_summary_holds_what_was_promised(recording: Recording) -> None:
    two_rounds(recording)
    for name, own in (("ann", 3.5), ("bob", 1.5)):
        recording.folder.log(
            {"kind": "baseline", "name": "local", "site": name, "loss": 2.0 + own,
             "perplexity": 9.0, "own_loss": own, "own_perplexity": 3.0}
        )  # fmt: skip
    recording.folder.log({"kind": "baseline", "name": "central", "loss": 0.4, "perplexity": 1.5})
    summary = recording.summary()
    assert summary.keys() >= PROMISED
    for key in ("zero_shot", "local", "federated", "central"):
        assert summary[key].keys() >= {"loss", "perplexity"}
    assert summary["zero_shot"]["loss"] == pytest.approx(2.5)
    assert summary["federated"]["loss"] == pytest.approx(0.5)
    assert summary["federated"]["own_loss"] == pytest.approx((2.0 + 0.0) / 2)
    assert summary["local"] == {
        "loss": 4.5, "perplexity": 9.0, "own_loss": 2.5, "own_perplexity": 3.0,
    }  # fmt: skip
    assert summary["central"]["loss"] == 0.4
    assert (summary["rounds"], summary["sites"], summary["seed"]) == (2, ["ann", "bob"], 0)
    assert (summary["bytes_down_per_round"], summary["bytes_up_per_round"]) == (800, 1000)
    assert summary["tokens_per_s"] == pytest.approx(4 * 800 / 8.0)
    assert summary["seconds"]["training"] == pytest.approx(5.5)
    assert summary["quarantined"] == [] and summary["metric"] == "perplexity"
    json.dumps(summary, allow_nan=False)


def test_summary_of_a_run_without_baselines_and_held_out_rows(recording: Recording) -> None:
    recording.recorder.round_finished(outcome(1, site("ann", report(Score()))))
    recording.recorder.evaluated(1, [site("ann", report(Score()))])
    assert recording.rows("evaluation") == []
    row = recording.rows("site")[0]
    assert row["loss_before"] is None and row["metric_after"] is None
    summary = recording.summary()
    for key in ("zero_shot", "local", "federated", "central"):
        assert summary[key] is None
    assert summarise(recording.config, [], {})["tokens_per_s"] == 0.0
    json.dumps(summary, allow_nan=False)


def test_a_site_without_held_out_rows_is_null_beside_the_others(recording: Recording) -> None:
    scored = [site("ann", report(Score(6.0, 3))), site("bob", report(Score()))]
    recording.recorder.evaluated(0, scored)
    (row,) = recording.rows("evaluation")
    assert row["loss"] == 2.0
    assert row["per_site"]["bob"] == {"loss": None, "perplexity": None}


@pytest.mark.parametrize("kind", ["classification", "choice"])
def test_accuracy_is_counted_over_rows(tmp_path: Path, kind: str) -> None:
    task = "classification" if kind == "classification" else "causal-lm"
    recording = Recording(tmp_path, data__format=kind, model__task=task)
    scored = [
        site("ann", report(Score(6.0, 30, 3, 4))), site("bob", report(Score(2.0, 10, 9, 12))),
    ]  # fmt: skip
    recording.recorder.evaluated(0, scored)
    (row,) = recording.rows("evaluation")
    assert row["accuracy"] == 12 / 16 and row["loss"] == 8 / 40 and "perplexity" not in row
    assert row["per_site"]["ann"] == {"loss": 0.2, "accuracy": 0.75}
    assert recording.summary()["zero_shot"]["accuracy"] == 0.75


def test_a_loss_too_large_for_a_perplexity_is_no_overflow(recording: Recording) -> None:
    recording.recorder.evaluated(0, [site("ann", report(Score(1e6, 1)))])
    (row,) = recording.rows("evaluation")
    assert row["loss"] == 1e6 and math.isfinite(row["perplexity"])


def test_quarantined_replies_stand_in_rows_and_summary(recording: Recording) -> None:
    recording.recorder.round_finished(
        outcome(
            1,
            site("ann", report(Score(3.0, 1))),
            site("bob", {}, "missing", "No reply."),
            site("eve", report(Score(1e9, 1)), "quarantined", "not-finite: <NaN>"),
        )
    )
    assert recording.summary()["quarantined"] == [
        {"round": 1, "site": "bob", "status": "missing", "reason": "No reply."},
        {"round": 1, "site": "eve", "status": "quarantined", "reason": "not-finite: <NaN>"},
    ]
    (row,) = recording.rows("evaluation")
    assert row["loss"] == 3.0 and list(row["per_site"]) == ["ann"]  # eve's score is not believed
    assert recording.rows("round")[0]["ok"] == 1
    assert recording.summary()["tokens_per_s"] == pytest.approx(800 / 4.0)


@pytest.mark.parametrize(
    "spoilt",
    [
        {"before-loss-sum": math.nan}, {"before-loss-sum": math.inf}, {"before-loss-sum": -1.0},
        {"before-loss-sum": "6.0"}, {"before-counted": -5}, {"before-counted": 10**18},
        {"before-counted": True}, {"before-rows": -1}, {"before-correct": 9, "before-rows": 3},
        {"before-correct": -1}, {"before-loss-sum": 1e300},
    ],
)  # fmt: skip
def test_a_score_that_cannot_be_true_does_not_count(
    recording: Recording, spoilt: dict[str, Scalar]
) -> None:
    fields = report(Score(6.0, 3, 1, 3)) | spoilt
    assert read_score("before", fields) == Score()
    recording.recorder.evaluated(0, [site("ann", report(Score(6.0, 3))), site("eve", fields)])
    assert recording.rows("evaluation")[0]["loss"] == 2.0


def test_score_survives_the_way_through_a_message() -> None:
    score = Score(1.25, 7, 3, 4)
    assert read_score("x", score_fields("x", score)) == score
    assert read_score("y", score_fields("x", score)) == Score()


_FIELDS = ["train_loss", "load_s", "train_s", "eval_s", "examples", "steps", "tokens",
           "useful_tokens", "base_reads", "worker", *score_fields("before", Score()),
           *score_fields("after", Score())]  # fmt: skip
_ANY = st.one_of(
    st.text(max_size=5), st.booleans(), st.floats(), st.integers(-(2**63), 2**64), st.just(10**400)
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(st.sampled_from(_FIELDS), _ANY))
def test_no_report_of_a_site_can_stop_the_run(tmp_path: Path, spoilt: dict[str, Scalar]) -> None:
    recording = Recording(tmp_path)
    honest = site("ann", report(Score(6.0, 3)))
    eve = site("eve", report(Score(6.0, 3)) | spoilt)
    recording.recorder.round_finished(outcome(1, honest, eve))
    recording.recorder.evaluated(1, [honest, eve])
    (row,) = recording.rows("round")
    assert 0 <= row["train_s"] <= 3.5 and 0 <= row["wait_s"] <= 3.5
    json.dumps(recording.summary(), allow_nan=False)


def test_an_update_without_a_finite_norm_can_be_logged(recording: Recording) -> None:
    recording.recorder.round_finished(
        outcome(1, site("ann", report(Score())), update_norm=math.nan)
    )
    assert recording.rows("round")[0]["update_norm"] is None


def test_report_and_table_take_what_was_recorded(recording: Recording) -> None:
    two_rounds(recording)
    summary = recording.summary()
    (recording.folder.path / "summary.json").write_text(json.dumps(summary))
    page = write_report(recording.folder.path).read_text(encoding="utf-8")
    assert "ann" in page and "bob" in page
    assert "federated" in results_table(summary).lower()


def test_sizes_are_in_the_unit_a_person_would_pick() -> None:
    assert [human_bytes(n) for n in (0, 1023, 1024, 1536, 5 * 2**20, 3 * 2**30)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 MiB", "3.00 GiB",
    ]  # fmt: skip


def test_tensorboard_gets_the_held_out_scores(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    asked = config(tmp_path, run__tensorboard=True)
    folder = RunFolder.create(asked)
    Recorder(asked, folder, {}).evaluated(0, [site("ann", report(Score(3.0, 2)))])
    read = events.EventAccumulator(str(folder.path / "tensorboard")).Reload()
    (loss,) = read.Scalars("held-out/loss")
    assert (loss.step, loss.value) == (0, pytest.approx(1.5))


def test_before_and_after_are_compared_on_the_rows_of_the_same_sites(recording: Recording) -> None:
    recorder = recording.recorder
    # Bob is missing in round 1, so that nothing is known of him before training.
    recorder.round_finished(outcome(1, site("ann", report(Score(8.0, 2)))))
    both = [site("ann", report(Score(6.0, 2))), site("bob", report(Score(1.0, 2)))]
    recorder.evaluated(1, both)
    summary = summarise(recording.config, recording.folder.rows(), {})
    assert (summary["zero_shot"]["loss"], summary["federated"]["loss"]) == (4.0, 3.0)


def test_an_attack_and_the_success_of_its_backdoor_are_told(tmp_path: Path) -> None:
    recording = Recording(tmp_path, attack__name="sign-flip")
    assert recording.summary()["attack"] is None
    recording.recorder.attacked("backdoor", {"west", "north"})
    good = report(Score(1.0, 4, 3, 4), **score_fields("backdoor", Score(1, 4, 1, 4)))
    none = report(Score(1.0, 4, 3, 4), **score_fields("backdoor", Score(1, 4, 0, 4)))
    false = report(Score(1.0, 4, 3, 4), **score_fields("backdoor", Score(1, 4, 5, 4)))
    sites = [site("north", good), site("south", none), site("west", false)]
    recording.recorder.evaluated(0, sites)
    (row,) = recording.rows("evaluation")
    assert row["backdoor_success"] == 0.125
    summary = recording.summary()["attack"]
    assert summary == {
        "name": "backdoor", "malicious": ["north", "west"], "backdoor_success": 0.125,
    }  # fmt: skip
    page = write_report(recording.folder.path).read_text()
    assert "under a simulated attack, backdoor, by 2 of its 3 sites" in page
    assert "north, west. Do not use its model." in page and "12.5 %" in page
    assert '<div class="badge">Simulated attack</div>' in page


def test_a_run_without_an_attack_says_nothing_of_one(recording: Recording) -> None:
    recording.recorder.evaluated(0, [site("north", report(Score(1.0, 4, 3, 4)))])
    assert recording.summary()["attack"] is None
    assert "attack" not in write_report(recording.folder.path).read_text().split("<pre>")[0]
