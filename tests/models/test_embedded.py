"""The embedded base model: built once, whole or not at all, and always with the same bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.embedded import STAMP, Recipe, cache_root, digest, ensure, passages, reference_text
from models.section import ConfigError

TINY = Recipe(
    vocab_size=320,
    hidden_size=32,
    layers=1,
    heads=2,
    intermediate_size=32,
    seq_length=32,
    batch_size=2,
    steps=4,
    threads=1,
)

ROOT = Path(__file__).resolve().parents[2]

IN_ANOTHER_PROCESS = """
import sys
from pathlib import Path
from models.embedded import Recipe, ensure
ensure(Path(sys.argv[1]), print, Recipe(**eval(sys.argv[2])))
"""
# Two that share the time of the imports, and go apart before they compute anything.
IN_TWO_PROCESSES = """
import os, sys
from pathlib import Path
import torch
from models.embedded import Recipe, ensure
child = os.fork()
if not child:
    torch.set_num_threads(2)
ensure(Path(sys.argv[1]), print, Recipe(**eval(sys.argv[2])))
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def silent(line: str) -> None:
    """Drop a progress line."""


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, by name."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def start(folder: Path, recipe: Recipe, code: str) -> subprocess.Popen[str]:
    """Start a build outside of this process, its log on a pipe."""
    given = repr(dataclasses.asdict(recipe))
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code, str(folder), given],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny embedded model, built once for this file."""
    return ensure(tmp_path_factory.mktemp("cache") / "model", silent, TINY)


def test_folder_loads_as_any_hub_model_does(built: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(built)
    tokenizer = AutoTokenizer.from_pretrained(built)
    assert model.config.max_position_embeddings == 512 == tokenizer.model_max_length
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    ids = tokenizer("The with statement", return_tensors="pt")
    logits = model(**ids).logits
    assert logits.shape == (1, ids["input_ids"].shape[1], len(tokenizer))
    assert torch.isfinite(logits).all()


def test_tokenizer_gives_back_every_text(built: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built)
    text = "def f(x):\n\treturn  x # naïve 花\n\n    end ."
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_training_lowers_the_loss(tmp_path: Path, built: Path) -> None:
    longer = dataclasses.replace(TINY, steps=60)
    trained = AutoModelForCausalLM.from_pretrained(ensure(tmp_path / "longer", silent, longer))
    barely = AutoModelForCausalLM.from_pretrained(built)
    tokenizer = AutoTokenizer.from_pretrained(built)
    ids = tokenizer(passages(reference_text(), 800)[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        after, before = (m(input_ids=ids, labels=ids).loss.item() for m in (trained, barely))
    assert after < before - 0.5


def test_same_bytes_whatever_the_threads_and_the_global_generator(
    tmp_path: Path, built: Path
) -> None:
    torch.manual_seed(12345)
    before = torch.random.get_rng_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again = ensure(tmp_path / "again", silent, TINY)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert hashes(again) == hashes(built)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_another_seed_gives_other_weights(tmp_path: Path, built: Path) -> None:
    other = ensure(tmp_path / "other", silent, dataclasses.replace(TINY, seed=1))
    assert hashes(other)["model.safetensors"] != hashes(built)["model.safetensors"]
    assert hashes(other)["tokenizer.json"] == hashes(built)["tokenizer.json"]


def test_two_processes_build_once_and_agree_with_a_third(tmp_path: Path, built: Path) -> None:
    folder = tmp_path / "model"
    processes = start(folder, TINY, IN_TWO_PROCESSES)
    log, _ = processes.communicate(timeout=120)
    assert processes.returncode == 0
    assert log.count("Built the embedded base model") == 1
    assert hashes(folder) == hashes(built)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.lock"]


def test_second_call_neither_builds_nor_writes(built: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in built.iterdir()}
    lines: list[str] = []
    assert ensure(built, lines.append, TINY) == built
    assert lines == []
    assert {p: p.stat().st_mtime_ns for p in built.iterdir()} == before


def test_progress_is_told(tmp_path: Path) -> None:
    lines: list[str] = []
    ensure(tmp_path / "model", lines.append, TINY)
    assert any("step 4/4, loss " in line for line in lines)


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if "step" in line and "loss" in line:
            raise KeyboardInterrupt

    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        ensure(tmp_path / "model", stop, TINY)
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == []
    assert torch.get_num_threads() == threads
    assert (ensure(tmp_path / "model", silent, TINY) / STAMP).is_file()


def test_a_killed_build_leaves_no_half_folder_and_the_next_tidies_up(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    process = start(folder, dataclasses.replace(TINY, steps=1_000_000), IN_ANOTHER_PROCESS)
    assert process.stdout is not None
    with contextlib.closing(process.stdout) as log:
        # What it writes it writes at the end, so that it is in its midst from the first line on.
        assert any("Building the embedded base model" in line for line in log)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not folder.exists()
    assert any(p.name.startswith(".model.part-") for p in tmp_path.iterdir())
    ensure(folder, silent, TINY)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.lock"]


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, built: Path) -> None:
    (tmp_path / "diary.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"Expected .* got 'no readable stam.*delete the folder"):
        ensure(tmp_path, silent, TINY)
    with pytest.raises(ConfigError, match=r"Expected .*delete the folder or name another"):
        ensure(built, silent, dataclasses.replace(TINY, seed=7))
    assert (tmp_path / "diary.txt").read_text(encoding="utf-8") == "mine"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"Expected to be able to write .*FLORILEGIUM_CACHE"):
        ensure(tmp_path / "file" / "model", silent, TINY)


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLORILEGIUM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/ada")
    assert cache_root() == Path("/home/ada/.cache/florilegium")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/xdg/florilegium")
    monkeypatch.setenv("FLORILEGIUM_CACHE", "/own")
    assert cache_root() == Path("/own")


def test_default_folder_is_keyed_by_everything_that_determines_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLORILEGIUM_CACHE", str(tmp_path))
    text = reference_text()
    folder = ensure(None, silent, TINY)
    assert folder == tmp_path / f"embedded-{digest(TINY, text)[:16]}"
    assert digest(TINY, text) != digest(TINY, [*text, "more"])
    keys = {digest(TINY, text), digest(Recipe(), text)}
    for field in dataclasses.fields(TINY):
        raised = dataclasses.replace(TINY, **{field.name: getattr(TINY, field.name) + 1})
        keys.add(digest(raised, text))
    assert len(keys) == 2 + len(dataclasses.fields(TINY))


def test_passages_keep_every_paragraph_and_are_distinct() -> None:
    text = reference_text()
    found = passages(text, 800)
    assert len(found) == len(set(found)) > 300
    whole = "\n".join(found)
    assert all(paragraph in whole for topic in text for paragraph in topic.split("\n\n"))
