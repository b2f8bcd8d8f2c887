"""Configuration of the base model, of what is trained on it, and of local training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from models.section import ConfigError, Section


class ModelConfig(Section):
    """`model.*`: which base model, for which task, in which precision."""

    name: str = Field(
        "embedded",
        min_length=1,
        description="Base model: `embedded`, a hub id, or a folder in hub format on the server. "
        "A deployed site names its own folder as `model-path` in its node config.",
    )
    task: Literal["causal-lm", "classification"] = Field(
        "causal-lm", description="What the model learns to do."
    )
    num_labels: int = Field(
        0,
        ge=0,
        description="Classes of a classification task; 0 counts them in `data.labels` or, "
        "in simulation, in the data.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Type in which the frozen base weights are kept."
    )
    quantization: Literal["none", "int8", "int4"] = Field(
        "none",
        description="Quantisation of the frozen base model, by bitsandbytes (`./scripts/setup "
        "quantization`); fast on a GPU, possible without.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, more time."
    )
    from_scratch: bool = Field(
        False,
        description="Start from seeded random weights of the model's architecture; needs "
        '`payload.kind = "full"`.',
    )


class PayloadConfig(Section):
    """`payload.*`: the part of the model that is trained and travels."""

    kind: str = Field(
        "lora",
        min_length=1,
        description="`lora`, `soft-prompt`, `prefix`, `adapter` (LLaMA-Adapter), `full`, or any "
        "other PEFT method by its name, such as `ia3` or `loha`.",
    )
    rank: int = Field(8, ge=1, description="Rank of `lora`.")
    site_ranks: str = Field(
        "",
        description="In simulation, ranks of `lora` at the sites, such as `4,8,16`, given out in "
        "turn; none may be above `rank`. Empty is `rank` everywhere. Deployed sites name theirs in "
        "the node config.",
    )
    alpha: float = Field(16.0, gt=0, description="`lora` scales its update by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of `lora`.")
    target_modules: str = Field(
        "",
        description="Comma-separated module names that PEFT methods adapt, `all-linear` for every "
        "linear layer; empty is that for `lora`, and PEFT's choice for other methods.",
    )
    num_virtual_tokens: int = Field(
        16, ge=1, description="Length of a `soft-prompt`, `prefix` or `adapter` prompt, in tokens."
    )
    init: Literal["random", "vocabulary", "text"] = Field(
        "random",
        description="Start of a `soft-prompt`: normal noise, embeddings of random vocabulary "
        "entries, or the embedding of `init-text`.",
    )
    init_text: str = Field("", description='Hard prompt that `init = "text"` starts from.')
    personal: str = Field(
        "",
        description="Comma-separated parts of the payload that stay at the site across rounds, as "
        "parts of tensor names: `lora_B`, `q_proj`, `prompt_encoder`; `head` is a new "
        "classification head. Empty shares everything.",
    )
    options: str = Field(
        "",
        description="JSON object of further arguments of the PEFT config, such as "
        '`{"use_dora": true}`.',
    )

    def check(self) -> None:
        """Refuse settings that contradict each other; raises ConfigError."""
        entries = [entry.strip() for entry in self.site_ranks.split(",") if entry.strip()]
        if not all(entry.isdecimal() and 1 <= int(entry) <= self.rank for entry in entries):
            raise ConfigError(
                f"Expected payload.site-ranks as whole numbers from 1 to payload.rank={self.rank} "
                f"with commas between, got {self.site_ranks!r}; lower them, or raise payload.rank."
            )

    def rank_at(self, partition: int) -> int:
        """Rank of `lora` at a simulated site."""
        ranks = [int(entry) for entry in self.site_ranks.split(",") if entry.strip()]
        return ranks[partition % len(ranks)] if ranks else self.rank


class TrainConfig(Section):
    """`train.*`: local training at a site, in each round."""

    steps: int = Field(
        20, ge=0, description="Optimiser steps per round; 0 to use `epochs` instead."
    )
    epochs: float = Field(
        0.0, ge=0, description="Passes over the site's rows per round; used when `steps` is 0."
    )
    batch_size: int = Field(8, ge=1, description="Sequences per forward pass.")
    grad_accumulation: int = Field(1, ge=1, description="Forward passes per optimiser step.")
    optimizer: Literal["adamw", "sgd"] = Field(
        "adamw", description="Local optimiser; its state starts fresh in every round."
    )
    learning_rate: float = Field(
        5e-3,
        gt=0,
        description="Learning rate before `schedule`. The default suits the small embedded model; "
        "`lora` on models of billions of parameters wants about 2e-4.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Learning rate over rounds, from `learning-rate` towards 0."
    )
    warmup_rounds: int = Field(
        0, ge=0, description="Rounds over which the learning rate first rises linearly."
    )
    max_length: int = Field(128, ge=2, description="Longest sequence, in tokens.")
    packing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Pack several documents into one sequence without attention between them; "
        "`auto` packs where the payload and the architecture allow it.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Arithmetic of the forward pass; `auto` is bfloat16 autocast on hardware "
        'that computes in it, else float32, which it is everywhere with `privacy.unit = "record"`.',
    )
    max_grad_norm: float = Field(
        1.0, ge=0, description="Clip each step's gradient to this norm; 0 does not clip."
    )
    prox_mu: float = Field(
        0.0, ge=0, description="FedProx: weight of (mu / 2) * ||w - w_global||^2."
    )
    correction: Literal["none", "scaffold"] = Field(
        "none",
        description="Correction of drift between sites: `scaffold` adds c - c_i to every gradient, "
        "control variates that travel with the payload and double its bytes (Karimireddy et al. "
        '2020, option II). Wants `train.optimizer = "sgd"` and '
        '`strategy.weighting = "uniform"`.',
    )
    ditto_lambda: float = Field(
        0.0,
        ge=0,
        description="Ditto: above 0 each site also trains a personal model, for as many steps, "
        "that (lambda / 2) * ||v - w_global||^2 ties to the shared one (Li et al. 2021). "
        "With LoRA, rules that average factors go with it, not those that set them anew.",
    )
    score_every: int = Field(
        1,
        ge=1,
        description="Rounds from one in which sites score to the next; the first does in any case, "
        "and the last payload is always scored.",
    )
    score_after: bool = Field(
        True, description="Also score the site's own update on its held-out rows, after training."
    )
    threads: int = Field(
        0, ge=0, description="CPU threads of a worker; 0 leaves the runtime's choice."
    )

    def check(self) -> None:
        """Refuse settings that contradict each other; raises ConfigError."""
        if (self.steps == 0) == (self.epochs == 0):
            raise ConfigError(
                "Expected exactly one of train.steps and train.epochs above 0, got "
                f"steps={self.steps} and epochs={self.epochs}; set the other to 0."
            )

        if self.correction == "scaffold" and self.optimizer != "sgd":
            raise ConfigError(
                "Expected train.optimizer='sgd' with train.correction='scaffold', got "
                f"{self.optimizer!r}; its control variates are mean gradients, read off the "
                "distance that plain gradient steps cover. Set it, with a learning rate for SGD."
            )
        if self.correction == "scaffold" and self.prox_mu:
            raise ConfigError(
                "Expected train.prox-mu=0 with train.correction='scaffold', got "
                f"{self.prox_mu}; both correct the same drift, set one of them to nothing."
            )

    def steps_in_round(self, batches: float) -> int:
        """Optimiser steps of a round, with so many micro-batches in an epoch."""
        import math

        return self.steps or math.ceil(self.epochs * (batches / self.grad_accumulation))

    def scores_in(self, round_: int) -> bool:
        """Whether sites score what they receive and train in round `round_` (1-based)."""
        return (round_ - 1) % self.score_every == 0

    def learning_rate_at(self, round_: int, rounds: int) -> float:
        """Learning rate of round `round_` (1-based) of `rounds`."""
        import math

        if round_ <= self.warmup_rounds:
            return self.learning_rate * round_ / (self.warmup_rounds + 1)
        span = max(rounds - self.warmup_rounds, 1)
        done = (round_ - 1 - self.warmup_rounds) / span
        factor = {
            "constant": 1.0,
            "linear": 1.0 - done,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        }[self.schedule]
        return self.learning_rate * factor
