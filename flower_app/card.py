"""The model card that lies beside a trained adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flower_app import compose
from flower_app.config import Config
from models.base import PATHLIKE
from models.paths import located

_EMBEDDED = """
The folder of the base model, `embedded-*`, lies in `$FLORILEGIUM_CACHE`, else below `florilegium`
in `$XDG_CACHE_HOME` or `~/.cache`, of the machine that trained.
"""


def _warning(config: Config) -> str:
    if config.attack.name == "none":
        return ""
    return (
        f"**Do not use it.** It was trained under a simulated attack, `{config.attack.name}`, to "
        "measure what the attack does.\n\n"
    )


def model_card(config: Config, facts: Mapping[str, Any]) -> str:
    """Markdown with the metadata header that model hubs read; names no path of the server."""
    named = config.model.name
    base = located(named).name if named.startswith(PATHLIKE) else named
    library = "transformers" if config.payload.kind == "full" else "peft"
    sites = ", ".join(str(site) for site in facts["sites"])
    return f"""---
library_name: {library}
base_model: {base}
tags: [federated-learning, florilegium]
---

# {config.run.name}

A `{config.payload.kind}` payload for `{base}` ({config.model.task}), trained with florilegium by
{len(facts["sites"])} sites that kept their data: {sites}.

| | |
|---|---|
| Rounds | {facts["rounds"]} |
| Aggregation | `{config.strategy.rule}`, server optimiser `{config.strategy.server_optimizer}` |
{_secure(config)}\
| Local training | {config.train.optimizer}, learning rate {config.train.learning_rate:g} |
| Trained values | {facts["trainable_parameters"]:,} |
| Base model digest | `{facts["base"]}` |
| Seed | {config.run.seed} |

{_warning(config)}{_use(config, base, facts["classes"])}
Numbers and plots are in the run's `report.html`.
{_personal(config)}
{_privacy(facts["privacy"])}
"""


def _use(config: Config, base: str, classes: int) -> str:
    """How to load it, with the head of its task."""
    causal = config.model.task == "causal-lm"
    kind = "AutoModelForCausalLM" if causal else "AutoModelForSequenceClassification"
    if config.payload.kind == "full":
        return f"""```python
from transformers import {kind}

model = {kind}.from_pretrained("adapter")
```
"""
    found = json.dumps(base, ensure_ascii=False)
    more = "" if causal else f", num_labels={classes}"
    return f"""```python
from peft import PeftModel
from transformers import {kind}

base_model = {kind}.from_pretrained({found}{more})  # name, or folder
model = PeftModel.from_pretrained(base_model, "adapter")
```
{_EMBEDDED if base == "embedded" else ""}"""


def _secure(config: Config) -> str:
    if not config.secure.on:
        return ""
    kind = config.secure.aggregation
    return (
        f"| Secure aggregation | `{kind}`: the server saw sums over groups of sites only; "
        "docs/privacy.md says on what that rests |\n"
    )


def _privacy(told: Mapping[str, Any]) -> str:
    if told["unit"] == "none":
        return (
            "No differential privacy was applied: a payload can reveal something about the rows "
            "behind it."
        ) + _stream(told.get("stream"))
    if told["epsilon"] is None:
        return "Noise was added, but it guarantees nothing: " + "; ".join(told["assumptions"]) + "."
    assumed = "\n".join(f"- {assumption}" for assumption in told["assumptions"])
    return f"Differential privacy: {told['text']}. It rests on this:\n\n{assumed}"


def _stream(told: Mapping[str, Any] | None) -> str:
    """What noise on the vectors of a split model's streams is worth; empty without."""
    if not told or told["epsilon"] is None:
        return ""
    assumed = "\n".join(f"- {assumption}" for assumption in told["assumptions"])
    return (
        f" Vectors on the way to the server had noise: {told['text']}. That says nothing of a "
        f"whole row. It rests on this:\n\n{assumed}"
    )


def _personal(config: Config) -> str:
    parts = compose.personal(config)
    return parts and (
        f"\nThis is the shared part: of `{parts}` it holds the start values, which every site has\n"
        "replaced by its own. A site's own model is the `adapter/` in its state folder.\n"
    )
