"""Says where replies ran on without an end."""

from __future__ import annotations

from orchestrator.analysis.curves import planned
from orchestrator.analysis.tables import Tables
from trainables.metrics.rouge import UNFINISHED

MUCH = 20.0  # per cent
SHOWN = 4  # arms that are named


def unfinished_replies(tables: Tables) -> list[str]:
    """Names each model with more than 20 % of replies without an end, at its last evaluation: a line for each phase and data
    set, with the mean share of the trials concerned."""
    rows = tables.results
    rows = planned(
        rows[(rows["metric"] == UNFINISHED.name) & (rows["split"] != "dev")]
    )  # test: the same model, scored last
    last = rows.sort_values("step").groupby(["phase", "model", "task", "split", "trial"], as_index=False).last()
    much = last[last["value"] > MUCH]
    lines = []
    for (phase, model, task, split), found in much.groupby(["phase", "model", "task", "split"]):
        points = list(dict.fromkeys(found["point"]))
        others = f" and {len(points) - SHOWN} more" if len(points) > SHOWN else ""
        where = f"{phase}, {task}, {split}; {', '.join(points[:SHOWN])}{others}"
        lines.append(
            f"Unfinished: {found['value'].mean():.0f} % of the replies of {model} ({where}) were cut at the most tokens, without "
            "an end: raise max_tokens, or see whether the data's replies end as this model's do."
        )
    return lines
