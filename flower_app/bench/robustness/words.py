"""The fixed text of docs/robustness.md: what does not depend on the figures."""

from flower_app.bench.robustness.features import LAYERS
from flower_app.bench.robustness.proxy import RANK, Schedule
from flower_app.bench.robustness.task import SITES

S = Schedule()
"""What the grid trains."""

HEAD = """# Robustness

What attacks do, and what defences are worth against them. All of this page is written by
`./scripts/robustness` from [robustness.csv](robustness.csv), which has every cell of the grid, the
losing ones included; whether a target was met is worked out from the figures."""

METHOD = f"""## How it was measured

**The proxy.** Cells are many, so they train a cheap model: a text is the mean over its tokens of
MiniLM's layer {LAYERS}, computed once; on it stands MiniLM's own pooling layer, frozen, with LoRA
of rank {RANK}, and a classification head. The task is sst2 (6,920 rows to train on, 872 held out),
at {SITES} sites with as many rows each, {S.rounds} rounds of {S.steps} local AdamW steps of
{S.batch} rows. Under Dirichlet 0.1 each site's mix of the two classes is drawn (Hsu et al. 2019),
so that most sites hold one class. The gate, the rules and the attacks are those of the app.

**The adversary** knows all honest updates of the round. Malicious sites are drawn from the seed.
A rule is told the true number of attackers (`strategy.num-byzantine`), also where there are none.
FLTrust's root data are 100 training rows. All other options of rules are their defaults. `alie` has
z = 1.5 and `min-max` pushes against the mean (`attack.direction = "unit"`); the other attacks have
their defaults. The backdoor marks half of a malicious site's rows with
the trigger and the target class; `scaling` boosts the update of such a site.

**Reading it.** A mean over a few seeds of 872 held-out rows is uncertain by about one point. "Best
defence" is chosen after the fact, from the same figures. Who runs a federation does not know the
attack: the line "one defence for all attacks" is the one to go by.

**Doing it again.** `./scripts/robustness` runs what is left of the grid (Ctrl-C stops it, the same
command goes on), `--fractions 0.1` one share of attackers, `--quick` a small grid in a few minutes,
`--whole` the runs on the whole model. Figures of cells that are not run again stay as they are."""
