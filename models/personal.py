"""Which tensors of a payload stay at the site: the words of `payload.personal`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from models.section import ConfigError, unknown

# PEFT names the factors of an adapted embedding differently.
FACTORS = {
    "lora_A": ("lora_A", "lora_embedding_A"),
    "lora_B": ("lora_B", "lora_embedding_B"),
}


def personal_names(
    names: Sequence[str], listed: str, fresh_modules: Sequence[str] = ()
) -> frozenset[str]:
    """Tensors among `names` that the comma-separated entries of `listed` keep at the site.

    An entry matches where it stands between the dots of a name (`lora_B`, `q_proj`,
    `q_proj.lora_B`); `head` stands for `fresh_modules`. Raises ConfigError for an entry that
    matches nothing, and when nothing would be left to share.
    """
    found: set[str] = set()
    for entry in filter(None, (entry.strip() for entry in listed.split(","))):
        wanted = fresh_modules if entry == "head" else FACTORS.get(entry, (entry,))
        matched = {n for n in names if any(f".{part}." in f".{n}." for part in wanted)}
        if not matched:
            raise unknown("payload.personal entry", entry, _choices(names, fresh_modules))
        found |= matched
    if found and found == set(names):
        raise ConfigError(
            f"Expected payload.personal to leave something that travels, got {listed!r}, which "
            "keeps the whole payload at the site; name less of it."
        )
    return frozenset(found)


def _choices(names: Iterable[str], fresh_modules: Sequence[str]) -> set[str]:
    """Parts of names that tell tensors apart, without numbers of layers."""
    parts = [set(name.split(".")) for name in names]
    everywhere = set.intersection(*parts) if len(parts) > 1 else set()
    listed = {part for part in set.union(*parts) - everywhere if not part.isdecimal()}
    return listed | ({"head"} if fresh_modules else set())
