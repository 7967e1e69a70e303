"""Sections on cost: costs that claims compare, time to equal quality, and the cost of each arm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from orchestrator.analysis.costs import costs
from orchestrator.analysis.curves import ended, objective_reading, planned
from orchestrator.analysis.notes import Note
from orchestrator.analysis.queries import parsed
from orchestrator.analysis.tables import Tables
from orchestrator.analysis.timing import ReachTime, time_to_equal_quality
from orchestrator.analysis.verdicts import Verdict
from orchestrator.reporting.claim_lines import numbered
from orchestrator.reporting.document import Section, Table, duration, p_value, plural, si
from orchestrator.reporting.notes import note_text
from orchestrator.study.claims import AXIS_WORDS
from orchestrator.study.schema import Study


def costs_compared(verdicts: Sequence[Verdict]) -> Section | None:
    """Returns the cost part of each claim with `less`; None where no claim has one."""
    rows = []
    for name, v in numbered(verdicts):
        for part in v.cost_parts:
            c = part.found
            ends = f"[{c.interval[0]:.3g}, {c.interval[1]:.3g}]" if c.interval else "no interval"
            p = p_value(0.0 if part.verdict != "undecided" and c.log_sd == 0 else c.p)
            names = (name, f"{v.claim.arm} / {c.against}", AXIS_WORDS[part.axis])
            shared = (", ".join(part.shared) or "nothing", f"×{part.in_full:.3g}")
            rows.append((*names, str(c.n), f"×{c.ratio:.3g}", ends, p, part.verdict, *shared))
    if not rows:
        return None
    text = (
        "For claims with `less`: the arm’s cost divided by the other arm’s, paired by seed; geometric means, Student’s t on "
        "the logarithms. Shared phases are excluded, except in the last column. Such a claim is supported only where both "
        "quality and cost are."
    )
    head = ("claim", "ratio of", "cost", "n", "ratio", "95 %", "p", "this part", "excluded", "shared phases included")
    return Section("Costs compared", (text, Table("Cost of the arm over that of the other", head, rows, "lllrrrrllr")))


def time_to_quality(tables: Tables, verdicts: Sequence[Verdict]) -> Section | None:
    """Tabulates the device time until each arm of a claim about time first matches the other's final score; None without such a claim."""
    rows, by_seed, conditions = [], [], dict[Note, None]()
    timed = [(name, v) for name, v in numbered(verdicts) if v.claim.is_of_time]
    if not timed:
        return None
    for name, v in timed:
        claim = v.claim
        rival = v.reading._replace(model=claim.against_model or claim.model)
        for against in claim.rivals:
            reached = time_to_equal_quality(tables.results, tables.trials, (claim.arm, against), (v.reading, rival))
            if reached is None or not reached.seconds:
                continue
            rows.append((name, claim.arm, f"{claim.metric} of {against}", *_cells(reached)))
            by_seed.append((name, _by_seed(reached, claim.arm)))
            conditions |= {v.conditions: None} if v.conditions else {}
    title = "Time to equal quality"
    if not rows:
        return Section(title, ("No seed of these arms has ended yet.",))
    text = (
        "Device time until an arm first matches the other’s final score (same seed), without the phases that both share. The "
        "time is that of an evaluation: the arm reached the score at some moment since the evaluation before, and a score "
        "that fluctuates may reach the target early. A seed that never reaches the score is censored: in the median, later "
        "than every seed that does. These times decide no verdict."
    )
    head = ("claim", "arm", "target", "n", "reached", "median time", "the other’s time (median)", "median ratio")
    tables_ = (
        Table("Device time to the other’s final score", head, rows, "lllrrrrr"),
        Table("By seed", ("claim", "at each seed"), by_seed, "ll"),
    )
    return Section(
        title, (text, *(f"{words[0].upper()}{words[1:]}." for words in map(note_text, conditions)), *tables_)
    )


def _cells(reached: ReachTime) -> tuple[str, ...]:
    median = "not reached" if reached.median is None else duration(reached.median)
    ratio = "not reached" if reached.ratio is None else f"×{reached.ratio:.3g}"
    return (
        str(len(reached.seconds)),
        str(len(reached.reached)),
        median,
        duration(statistics.median(reached.took.values())),
        ratio,
    )


def _by_seed(reached: ReachTime, arm: str) -> str:
    seeds = [
        f"seed {seed}: {duration(s)} of {duration(reached.took[seed])}"
        if seed in reached.reached
        else f"seed {seed}: not reached by {duration(s)} ({reached.against} took {duration(reached.took[seed])})"
        for seed, s in reached.seconds.items()
    ]
    if reached.left_out:
        seeds.append(f"{plural(len(reached.left_out), 'seed')} excluded: no evaluation of {arm} yet")
    return "; ".join(seeds)


def cost_by_arm(study: Study, tables: Tables) -> Section:
    title, phase, rows = "Cost", study.objective.phase, []
    for arm in study.arms:
        cost = costs(tables, ended(tables, "trial", arm), objective_reading(study))
        if cost.empty:
            continue
        mean = cost.drop(columns="trial").mean()
        row = [arm, str(len(cost)), si(mean["tokens"])]
        for what, as_text in (("flops", si), ("device_seconds", duration)):
            row += [as_text(mean[f"own_{what}"] + more) for more in (0, mean[f"shared_{what}"], mean[f"before_{what}"])]
        rows.append(row)
    trials = planned(tables.trials)
    reused = [done for cell in trials["phases"] for done in parsed(cell).values() if done.get("reused")]
    flops, seconds = (sum(float(done[what]) for done in reused) for what in ("flops", "device_seconds"))
    saved = "No phase was reused."
    if reused:
        saved = (
            f"Sharing saved {plural(len(reused), 'run')} of a phase: {si(flops, 'FLOPs')} and {duration(seconds)} of "
        )
        saved += "device time at their recorded cost."
    memory = float(trials["peak_memory"].astype(float).max())
    saved += f" Peak memory of a trial: {si(memory, 'B')}." if math.isfinite(memory) else ""
    if not rows:
        return Section(title, ("No trial of an arm has ended.", saved))
    ways = ("teacher as 0", "amortised", "in full")
    columns = [f"{what}, {way}" for what in ("FLOPs", "time") for way in ways]
    text = (
        f"Mean per trial up to the end of phase {phase}. Earlier phases (the teacher) count as 0, amortised over the trials "
        f"that share a phase, or in full; a reused phase counts at its recorded cost. Tokens are those of phase {phase}; time "
        "is device time."
    )
    head = ("arm", "n", f"{study.objective.model} tokens", *columns)
    return Section(title, (text, Table("Cost by arm", head, rows, "l" + "r" * 8), saved))
