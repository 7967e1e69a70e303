"""Two sections of the report: costs that claims compare, and the time to equal quality. Pure; knows no HTML."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.analysis.tables import Tables
from orchestrator.analysis.timing import Reached, time_to_equal_quality
from orchestrator.analysis.verdicts import Verdict
from orchestrator.reporting.document import Section, Table, duration, p_value, plural
from orchestrator.study.schema import AXIS_WORDS


def costs_compared(verdicts: Sequence[Verdict]) -> Section | None:
    """The part of each claim that says `less`; None where none does."""
    rows = []
    for i, v in enumerate(verdicts, 1):
        for part in v.cost_parts:
            c = part.found
            ends = f"[{c.interval[0]:.3g}, {c.interval[1]:.3g}]" if c.interval else "no interval"
            what, out = AXIS_WORDS[part.axis], ", ".join(part.shared) or "nothing"
            numbers = (
                str(c.n),
                f"×{c.ratio:.3g}",
                ends,
                p_value(0.0 if part.verdict != "undecided" and c.log_sd == 0 else c.p),
            )
            rows.append(
                (
                    f"{i}. {v.name}",
                    f"{v.claim.arm} / {c.against}",
                    what,
                    *numbers,
                    part.verdict,
                    out,
                    f"×{part.in_full:.3g}",
                )
            )
    if not rows:
        return None
    text = (
        "The second part of claims that ask for less cost: what the arm spent over what the other spent, paired by seed; geometric "
        "means, Student’s t on the logarithms. Phases that both start from are left out; in full they count on both sides. "
        "Supported only where quality and cost both are."
    )
    head = ("claim", "ratio of", "cost", "n", "ratio", "95 %", "p", "this part", "left out", "in full")
    return Section("Costs compared", (text, Table("The arm’s cost over the other’s", head, rows, "lllrrrrllr")))


def time_to_quality(tables: Tables, verdicts: Sequence[Verdict]) -> Section | None:
    """When each arm of a claim about time first has what the other ends with; None where no claim is about time."""
    rows, by_seed, conditions = [], [], dict[str, None]()
    timed = [(i, v) for i, v in enumerate(verdicts, 1) if v.claim.is_of_time]
    if not timed:
        return None
    for i, v in timed:
        claim = v.claim
        rival = v.reading._replace(model=claim.against_model or claim.model)
        for against in claim.rivals:
            found = time_to_equal_quality(tables.results, tables.trials, claim.arm, against, v.reading, rival)
            if found is None or not found.seconds:
                continue
            what = f"{claim.metric} of {against}"
            rows.append((f"{i}. {v.name}", claim.arm, what, *_cells(found)))
            by_seed.append((f"{i}. {v.name}", *_of_seeds(found, claim.arm)))
            conditions |= {v.conditions: None} if v.conditions else {}
    title = "Time to equal quality"
    if not rows:
        return Section(title, ("No seed of these arms has ended yet.",))
    text = (
        "The device time at which an arm first has, at the same seed, what the other has at its own end; phases that both "
        "start from are left out. It is the time of a look: the arm got there at some moment since the look before; and where "
        "a score wavers, the first look that is good enough comes early. Where none is, the time is censored: not reached by "
        "the last look, and in a median later than all that have it. Nothing here decides a verdict."
    )
    head = (
        "claim",
        "arm",
        "what it reaches",
        "n",
        "reached",
        "median time",
        "the other took (median)",
        "median ratio",
    )
    columns = ("claim", "at each seed")
    return Section(
        title,
        (
            text,
            *(f"{c[0].upper()}{c[1:]}." for c in conditions),
            Table("Time until the arm has it", head, rows, "lllrrrrr"),
            Table("By seed", columns, by_seed, "ll"),
        ),
    )


def _cells(found: Reached) -> tuple[str, ...]:
    never = "not reached"
    took = sorted(found.took.values())
    middle = (took[(len(took) - 1) // 2] + took[len(took) // 2]) / 2
    return (
        str(len(found.seconds)),
        str(len(found.reached)),
        never if found.median is None else duration(found.median),
        duration(middle),
        never if found.ratio is None else f"×{found.ratio:.3g}",
    )


def _of_seeds(found: Reached, arm: str) -> tuple[str]:
    each = [
        f"seed {seed}: {duration(s)} of {duration(found.took[seed])}"
        if seed in found.reached
        else f"seed {seed}: not reached by {duration(s)} ({found.against} took {duration(found.took[seed])})"
        for seed, s in found.seconds.items()
    ]
    if found.left_out:
        each.append(f"{plural(len(found.left_out), 'seed')} left out: no look of {arm} yet")
    return ("; ".join(each),)
