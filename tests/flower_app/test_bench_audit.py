"""The audit of split models: real code on tiny models and made-up rows."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from flower_app.bench import audit
from flower_app.bench.inversion import Study, measure
from flower_app.bench.output import Progress, put_into
from tests.models.split.families import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["the", "cat", "sat", "on", "mat", "dog", "ran", "after", "bird", "sang", "nobody", "sing"]


@pytest.fixture
def data(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Rows whose label is whether a cat is in them, and a model of each kind."""
    chance = random.Random(0)
    for name, most in (("public", 320), ("held-out", 60)):
        texts = [" ".join(chance.choices(WORDS, k=chance.randint(3, 9))) for _ in range(most)]
        rows = [{"sentence": text, "label": int("cat" in text)} for text in texts]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    for family in ("llama", "bert"):
        model = tiny(family, vocab_size=len(tiny_tokenizer), initializer_range=0.02)
        # The encoder comes without a class head, as sentence encoders do.
        (model.base_model if family == "bert" else model).save_pretrained(tmp_path / family)
        tiny_tokenizer.save_pretrained(tmp_path / family)
    return tmp_path


def study(model: str, classes: int = 0) -> Study:
    return Study(
        model, "public.jsonl", "held-out.jsonl", "sentence", 24, (1, 2), (0.0, 5.0), 320, 60,
        classes=classes, scored_rows=320,
    )  # fmt: skip


@pytest.mark.parametrize(("model", "classes"), [("llama", 0), ("bert", 2)])
def test_the_table_tells_what_noise_buys_and_costs(data: Path, model: str, classes: int) -> None:
    given = study(model, classes)
    rows = measure(given, data, quick=False, progress=Progress())
    assert [(row.blocks, row.multiplier) for row in rows] == [(1, 0), (1, 5), (2, 0), (2, 5)]
    clear, noisy = rows[0], rows[1]
    assert max(clear.nearest, clear.decoder) > 0.9
    assert max(noisy.nearest, noisy.decoder) < 0.3
    assert 0 < clear.chance < 0.5
    assert clear.quality == pytest.approx(rows[2].quality)  # wherever the model is cut
    assert not classes or noisy.quality < clear.quality
    lines = audit.table(given, rows).splitlines()
    assert len(lines) == 8 and lines[0].endswith("| accuracy |" if classes else "| loss |")
    assert lines[2].startswith("| 1 | 0 | ∞ | ") and lines[3].startswith("| 1 | 5 | 1.")
    assert f"right for {100 * clear.chance:.1f} %" in lines[-1]


def test_a_page_gets_its_table_and_keeps_the_rest(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- table:x -->\nold\n<!-- /table:x -->\nb\n")
    put_into(page, "x", r"new \1")
    assert page.read_text() == "a\n<!-- table:x -->\nnew \\1\n<!-- /table:x -->\nb\n"
    put_into(page, "y", "nothing")
    assert "nothing" not in page.read_text()


def test_missing_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main(["inversion", "--data", str(tmp_path / "gone")]) == 2
    assert "found none; name them with --data" in capsys.readouterr().out
