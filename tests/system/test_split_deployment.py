"""Split learning between real processes: a SuperLink, SuperNodes, and a stream for each site."""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from flower_app.local import free_port, superlink, supernodes
from models.split.load import Cuts, write_parts
from tests.models.split.families import tiny
from tests.serverpaths import unnamed
from tests.system.runs import NAMES, Value, finish, run_app, site_rows

SITES = NAMES[:2]  # each message to a site is a process of its own


def test_sites_with_head_and_tail_alone_train_with_a_server_that_has_the_middle(
    small_run: dict[str, Value], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    tiny("llama", vocab_size=len(tiny_tokenizer)).save_pretrained(whole)
    tiny_tokenizer.save_pretrained(whole)
    parts = write_parts(whole, tmp_path / "parts", Cuts())
    nodes = []
    for name in SITES:
        rows = tmp_path / f"{name}.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in site_rows(name)))
        nodes.append({"site": name, "data-path": str(rows), "model-path": str(parts["site"])})
    port = free_port()
    split: dict[str, Value] = {
        "run.rounds": 1, "run.output-dir": str(tmp_path / "runs"),
        "model.name": str(parts["server"]), "data.source": "embedded", "data.partition": "own",
        "strategy.min-sites": 2, "payload.kind": "split", "split.schedule": "client-batch",
        "split.listen": f"127.0.0.1:{port}", "split.address": f"localhost:{port}",
    }  # fmt: skip
    config = unnamed(small_run | split)
    home = tmp_path / "flower"
    with superlink(home, simulation=False) as link, supernodes(home, link, nodes):
        output = finish(run_app(home, config))
    folder = tmp_path / "runs" / "latest"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["mode"], summary["sites"]) == ("deployment", sorted(SITES)), output
    rows_of = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    sites = [row for row in rows_of if row["kind"] == "site"]
    assert [row["status"] for row in sites] == ["ok"] * 2
    assert all(row["stream_bytes_up"] > 0 for row in sites)
    assert summary["federated"]["loss"] < summary["zero_shot"]["loss"]
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as adapter:
        moved = [key for key in adapter.keys() if adapter.get_tensor(key).abs().sum() > 0]  # noqa: SIM118
    blocks = {key.split(".layers.")[1][0] for key in moved if ".lora_B." in key}
    assert blocks == {"0", "1", "2", "3"}
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(whole), str(folder / "adapter"))
    for name in SITES:
        assert str(tmp_path / f"{name}.jsonl") not in output
