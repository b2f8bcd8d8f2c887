"""Text from a run's model, on the terminal; bad input says so and exits with 2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from flower_app import compose
from flower_app.config import defaults, parse
from flower_app.generate import main

pytestmark = pytest.mark.usefixtures("one_thread")

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tiny_models: Mapping[str, Path], tmp_path: Path) -> MakeRun:
    """A finished run whose payload differs from its start."""

    def make(kind: str = "lora", model: str = "llama", **keys: Any) -> Path:
        given = {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}
        named = {"model.name": str(tiny_models[model]), "payload.kind": kind}
        config = parse(defaults() | named | {"payload.num-virtual-tokens": 4} | given)
        payload = compose.attach(config, compose.load_base(config))
        generator = torch.Generator().manual_seed(1)
        payload.load(
            {
                name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator)
                for name, tensor in payload.select().items()
            }
        )
        run = tmp_path / f"run-{kind}-{model}"
        payload.save(run / "adapter")
        (run / "config.toml").write_text(tomli_w.dumps(config.model_dump(by_alias=True)))
        return run

    return make


def written(capfd: pytest.CaptureFixture[str], run: Path, *more: str) -> str:
    assert main(["--run", str(run), "--prompt", "the cat", "--max-new-tokens", "12", *more]) == 0
    return capfd.readouterr().out


@pytest.mark.parametrize("kind", ["lora", "soft-prompt", "prefix", "adapter", "full"])
def test_the_tuned_model_writes(
    make_run: MakeRun, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    run = make_run(kind)
    tuned = written(capfd, run, "--temperature", "0")
    assert tuned.lstrip().startswith("the cat")
    assert len(tuned) > len("the cat") + 3
    assert written(capfd, run, "--temperature", "0") == tuned
    assert written(capfd, run, "--temperature", "0", "--base") != tuned


def test_greedy_text_is_that_of_a_plain_loop(
    make_run: MakeRun, tiny_models: Mapping[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    model = PeftModel.from_pretrained(model, run / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["llama"])
    # The tokenizer puts nothing before a text; training does, and so does this.
    ids = [tokenizer.bos_token_id, *tokenizer("the cat")["input_ids"]]
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert written(capfd, run, "--temperature", "0").strip("\n") == expected


def test_sampling_goes_by_its_seed(make_run: MakeRun, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    hot = ["--temperature", "1.5", "--seed"]
    texts = [written(capfd, run, *hot, seed) for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_an_empty_prompt_starts_a_text(
    make_run: MakeRun, capfd: pytest.CaptureFixture[str]
) -> None:
    assert written(capfd, make_run(), "--prompt", "").strip()


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_writing_stops_at_the_end_of_the_context(
    make_run: MakeRun, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    run = make_run(kind, "gpt2")
    assert len(written(capfd, run, "--max-new-tokens", "500", "--temperature", "2")) > 10
    assert main(["--run", str(run), "--prompt", "cat " * 70]) == 2
    message = capfd.readouterr().err
    assert "shorter than the model's context of 64 tokens, got" in message
    assert message.endswith("; shorten it.\n")


def spoilt(run: Path, name: str, content: bytes | None) -> None:
    path = run / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.toml", None, "Expected a finished run with config.toml and adapter/, got '"),
        ("config.toml", b"[run", "Expected a run that can be read in '"),
        ("config.toml", b"[run]\nroundz = 3\n", "Unknown configuration key 'run.roundz'"),
        ("adapter/adapter_model.safetensors", b"cut", "Expected a run that can be read in '"),
        ("adapter/adapter_config.json", b"{", "Expected a run that can be read in '"),
    ],
)
def test_a_bad_run_folder_exits_with_2(
    make_run: MakeRun,
    capfd: pytest.CaptureFixture[str],
    name: str,
    content: bytes | None,
    message: str,
) -> None:
    run = make_run()
    spoilt(run, name, content)
    assert main(["--run", str(run), "--prompt", "the cat"]) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith(message)
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_folder_that_is_not_there_exits_with_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run", str(tmp_path / "gone"), "--prompt", "x"]) == 2
    assert "name one with --run, such as runs/latest" in capfd.readouterr().err


def test_a_base_model_that_has_gone_exits_with_2(
    make_run: MakeRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    text = (run / "config.toml").read_text().replace("llama", "moved-away")
    (run / "config.toml").write_text(text)
    assert main(["--run", str(run), "--prompt", "x"]) == 2
    assert "Expected a model folder with a config.json, got" in capfd.readouterr().err


def test_a_classification_has_no_text(make_run: MakeRun, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(
        model="bert",
        model__task="classification",
        model__num_labels=2,
        data__format="classification",
    )
    assert main(["--run", str(run), "--prompt", "x"]) == 2
    assert "Expected a run of a causal-lm, got a classification" in capfd.readouterr().err


def test_nothing_to_write_exits_with_2(
    make_run: MakeRun, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run", str(make_run()), "--prompt", "x", "--max-new-tokens", "0"]) == 2
    assert "--max-new-tokens of at least 1, got 0" in capfd.readouterr().err


def test_the_prompt_is_required(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--run", "somewhere"])
    assert "--prompt" in capfd.readouterr().err


def test_an_instruct_run_is_asked_as_it_was_trained(
    capfd: pytest.CaptureFixture[str], make_run: MakeRun
) -> None:
    run = make_run(data__format="instruct", data__template="Q: {prompt} A:")
    assert written(capfd, run).lstrip().startswith("Q: the cat A:")
