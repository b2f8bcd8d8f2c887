"""`split.*`: where the model is cut, how its parts are trained, and what travels between them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from models.section import ConfigError, Section


class SplitConfig(Section):
    """`split.*`: split learning, with `payload.kind = "split"`."""

    head_blocks: int = Field(
        1, ge=1, description="First blocks, which stay at the site with the embeddings."
    )
    tail_blocks: int = Field(
        1, ge=1, description="Last blocks, which stay at the site with the output layer."
    )
    head: Literal["lora", "full", "soft-prompt", "none"] = Field(
        "lora",
        description="What is trained of the first blocks, at the site: LoRA, all weights, a prompt "
        "before every text (`payload.num-virtual-tokens`, with `none` in the others), or nothing.",
    )
    middle: Literal["lora", "full", "none"] = Field(
        "lora", description="What is trained of the blocks between, at the server."
    )
    tail: Literal["lora", "full", "none"] = Field(
        "lora", description="What is trained of the last blocks, at the site."
    )
    schedule: Literal["sequential", "client-batch", "hierarchical", "auto"] = Field(
        "sequential",
        description="How sites share the middle in a round: one after another in the order of "
        "their names, all at once with what they send joined into one batch, or in shares with a "
        "replica of the middle each; `auto` measures the last two before the first round.",
    )
    replicas: int = Field(
        2, ge=1, description="Replicas of the middle under `hierarchical`, one on each GPU."
    )
    join_tokens: int = Field(
        8192, ge=1, description="Most tokens that are joined into one batch of the middle."
    )
    in_flight: int = Field(
        4,
        ge=1,
        description="Micro-batches of a step (`train.grad-accumulation`) under way at once.",
    )
    wire: Literal["bf16", "fp32", "int8", "int4"] = Field(
        "bf16",
        description="How hidden states and their gradients travel; whole numbers have a scale for "
        "each token.",
    )
    noise: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Noise that a site adds to every vector before it leaves on its stream: "
        "standard deviation over the norm that the vector is clipped to; 0 adds none.",
    )
    clip_norm: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="L2 norm to which each hidden state is clipped, with `noise`.",
    )
    clip_gradient: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="L2 norm to which each token's gradient is clipped, with `noise`.",
    )
    wait_s: float = Field(
        60.0,
        gt=0,
        description="Seconds that the middle waits for a site of the round to open its stream, or "
        "to keep up with the others, before it goes on without.",
    )
    stall_s: float = Field(
        120.0,
        gt=0,
        description="Seconds without a word after which a stream is given up, and after which "
        "nobody waits for a site that still scores, or for its own part of one step.",
    )
    listen: str = Field(
        "127.0.0.1:0",
        min_length=1,
        description="Address and port at which the server waits for the sites' streams; port 0 "
        "takes a free one.",
    )
    address: str = Field(
        "",
        description="Address and port at which the sites reach it, such as "
        "`server.example.org:9095`; empty is that of `listen`, which deployed sites "
        "are not sent to where it means their own machine.",
    )

    def check(self) -> None:
        """Refuse noise without both norms, and norms that nothing uses; raises ConfigError."""
        norms = {"split.clip-norm": self.clip_norm, "split.clip-gradient": self.clip_gradient}
        for key, norm in norms.items():
            if self.noise and not norm:
                raise ConfigError(
                    f"Expected {key} above 0 with split.noise={self.noise:g}, got 0; set it, to "
                    "about the median norm of what it clips."
                )
            if norm and not self.noise:
                raise ConfigError(
                    f"Expected {key}=0 with split.noise=0, got {norm:g}, which clips nothing "
                    "without noise; set split.noise as well."
                )
