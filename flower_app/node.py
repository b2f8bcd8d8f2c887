"""What a node says about itself: the node config that its operator gave it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from pydantic import Field, ValidationError

from models.section import ConfigError, Section


class NodeConfig(Section):
    """Node config of a SuperNode; Flower's simulation sets `partition-id` and `num-partitions`."""

    partition_id: int = Field(-1, ge=-1, description="Set by Flower's simulation.")
    num_partitions: int = Field(0, ge=0, description="Set by Flower's simulation.")
    site: str = Field("", description="Name of the site, unique in the federation.")
    data_path: str = Field("", description="File or folder of the site's rows.")
    eval_path: str = Field("", description="Held-out rows of their own; else a share is held out.")
    model_path: str = Field("", description="Folder of the base model at the site.")
    rank: int = Field(
        0,
        ge=0,
        description="Rank of `lora` at this site, at most `payload.rank`; 0 is that.",
    )
    state_path: str = Field(
        "",
        description="Folder for what the site keeps across rounds and runs, its ledger among "
        "it; needed where a run keeps something there.",
    )
    policy_path: str = Field(
        "", description="File in TOML with what the site takes part in; empty: in anything."
    )
    key_path: str = Field(
        "",
        description="PEM file of the site's own Ed25519 key; needed for secure aggregation.",
    )
    peers_path: str = Field(
        "",
        description="Folder with the public key of each site as `<site>.pem`; needed for secure "
        "aggregation.",
    )

    ckks_path: str = Field(
        "",
        description="File of the key of homomorphic encryption, with its secret half at sites that "
        'open sums; needed for `secure.aggregation = "ckks"`.',
    )

    @property
    def paths(self) -> tuple[str, ...]:
        """Every path that the operator gave, which is nobody else's business."""
        own = (self.data_path, self.eval_path, self.model_path, self.state_path)
        return (*own, self.policy_path, self.key_path, self.peers_path, self.ckks_path)

    @property
    def simulated(self) -> bool:
        """Whether the node is a partition of a simulation."""
        return self.partition_id >= 0 and not self.data_path


def parse_node(values: Mapping[str, bool | int | float | str | bytes]) -> NodeConfig:
    """Read a node config; raises ConfigError for unknown keys and for a site without a name."""
    try:
        node = NodeConfig.model_validate(dict(values))
    except ValidationError as error:
        known = ", ".join(str(info.alias) for info in NodeConfig.model_fields.values())
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"Expected a node config of {known}, but {wrong}.") from None
    if not node.simulated and not (node.site and node.data_path):
        given = {"site": node.site, "data-path": node.data_path}
        got = " and ".join(key for key, value in given.items() if value)  # the values stay here
        raise ConfigError(
            f"Expected 'site' and 'data-path' in this node's config, got {got or 'neither'}; start "
            "the SuperNode with --node-config "
            "\"site='name' data-path='/where/the/rows/are.jsonl'\"."
        )
    if node.simulated and node.partition_id >= node.num_partitions:
        raise ConfigError(
            "Expected 'partition-id' below 'num-partitions' in this node's config, got "
            f"{node.partition_id} of {node.num_partitions}; count partitions from 0."
        )
    return node


def versions() -> str:
    """Versions of the packages that decide the bits of a result."""
    return ", ".join(
        f"{name} {version(name)}" for name in ("flwr", "torch", "transformers", "peft")
    )
