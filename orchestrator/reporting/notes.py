"""The words for the notes and the scope of a verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from orchestrator.analysis.notes import Kind, Note, Scope
from orchestrator.study.claims import AXIS_WORDS

SCOPE: Mapping[Scope, str] = {
    Scope.NEW_DATA: "on new data as well",
    Scope.THIS_SET: "on this evaluation set",
    Scope.BY_COST: "by its cost",
}


def note_text(note: Note) -> str:
    """Puts a note into words."""
    words = WORDS[note.kind]
    text = words(**note.about) if callable(words) else words
    shown = {name: _shown(name, value) for name, value in note.about.items()}
    return text.format(**shown).replace("-", "\N{MINUS SIGN}") if note.kind in _SIGNED else text.format(**shown)


def _shown(name: str, value: Any) -> Any:
    if name == "axis":
        return AXIS_WORDS[value]
    return ", ".join(map(str, value)) if isinstance(value, tuple) and not hasattr(value, "_fields") else value


def _no_value(recorded: tuple[float, ...], **_: Any) -> str:
    others = f"it has {', '.join(f'{progress:.4g}' for progress in recorded)}" if recorded else "nothing is recorded"
    return f"{{arm!r}} has no {{query.split}} {{query.metric}} of {{query.model!r}} in phase {{query.phase!r}} at progress {{query.at:g}}; {others}"


def _shared_runs(num_runs: int, is_compared: bool, tasks: tuple[str, ...], **_: Any) -> str:
    whose = "run" if is_compared else "teacher"
    on = " on {tasks}" if tasks else ""
    if num_runs == 1:
        return f"all {{num_seeds}} seeds share one run of phase {{phase!r}}{on}: the verdict holds for this one {whose}"
    return f"{{num_seeds}} seeds share {{num_runs}} runs of phase {{phase!r}}{on}: the verdict holds for these {whose}s"


def _evaluated_early(progress: tuple[float, ...], unused: float, **_: Any) -> str:
    low, high, n = min(progress), max(progress), len(progress)
    spread = f", mean of {low:g} to {high:g} over {n} seeds" if low < high else ""
    return (
        f"at equal {{axis}} {{arm!r}} was evaluated mid-schedule (at {np.mean(progress):.2f} of its budget{spread}); a "
        f"schedule tuned to this budget may do better; {100 * unused:.0f} % of the {{axis}} is unused"
    )


def _failed_seeds(failed: tuple[tuple[str, tuple[int, ...]], ...]) -> str:
    lost = " and ".join(f"{arm!r} failed at seed {', '.join(map(str, seeds))}" for arm, seeds in failed)
    return f"{lost}: judged by a sign test over all seeds, in which failed ones count as worst for the verdict"


def _interval(interval: tuple[float, float]) -> str:
    return f"[{interval[0]:+.3g}, {interval[1]:+.3g}]"


def _next_evaluation(interval: tuple[float, float], *, is_alike: bool = True, **_: Any) -> str:
    split = "" if is_alike else "; the evaluations before and after equal cost do not agree, so undecided"
    return (
        "evaluations are sparse: at the next one, beyond equal cost, {arm!r} - {against!r} is "
        f"{{effect:+.3g}} {_interval(interval)}, {{decision}} without Holm{split}"
    )


def _single_seed_interval(interval: tuple[float, float]) -> str:
    return f"of these two runs alone, on new examples: 95 % interval {_interval(interval)}; other seeds may differ"


def _cost_ratio(arm: str, part: Any) -> str:
    found, words = part.found, AXIS_WORDS[part.axis]
    ends = " [{:.3g}, {:.3g}]".format(*found.interval) if found.interval else ""
    shared = f"excludes shared phases ({', '.join(part.shared)})" if part.shared else "no phase is shared"
    seeds = f"{found.n} seed{'s' if found.n > 1 else ''}"
    return (
        f"{words} of {arm!r}: ×{found.ratio:.3g}{ends} that of {found.against!r} ({part.verdict}; geometric mean over "
        f"{seeds}; {shared}); in full ×{part.in_full:.3g}"
    )


def _shared_cost(in_full: Any, **_: Any) -> str:
    ratios = ", ".join(f"×{in_full.on(axis):.3g} {words}" for axis, words in AXIS_WORDS.items())
    return f"cost beside {{against!r}} excludes shared phases ({{phases}}); including them: {ratios}"


def _conditions(side_by_side: int, nodes: tuple[str, ...], slot: Any, *, is_shared: bool = False, **about: Any) -> str:
    texts = []
    where = f"on {len(nodes)} nodes" if len(nodes) > 1 else f"on one node ({', '.join(nodes)})"
    if side_by_side == 1:
        texts.append(f"one trial at a time per node, {where}")
    elif side_by_side > 1 and not is_shared:
        texts.append(f"up to {side_by_side} trials side by side per node, {where}, each with its own GPUs")
    elif side_by_side > 1:
        shared = "GPUs" if slot is not None and slot.gpus else "processors and memory"
        texts.append(
            f"up to {side_by_side} trials side by side per node, {where}, sharing its {shared}: a claim about time needs "
            "one slot per device, so undecided"
        )
    if slot is not None:
        cpus, gpus = (
            f"{slot.cpus:g} CPU{'s' if slot.cpus != 1 else ''}",
            f"{slot.gpus:g} GPU" if slot.gpus else "no GPU",
        )
        texts.append(f"a slot was {slot.workers} worker{'s' if slot.workers > 1 else ''} with {cpus} and {gpus} each")
    if about["num_elsewhere"]:
        texts.append(
            "{num_elsewhere} of {num_runs} runs of phase {phase!r} were trained by trials that are not in these tables, "
            "under unknown conditions"
        )
    return f"timing conditions: {'; '.join(texts)}"


def _other_average(papers: tuple[str, ...] | str, **_: Any) -> str:
    over = "GLUE's 8 tasks (9 with WNLI)" if papers == "glue" else f"GLUE's {', '.join(papers)}"
    return f"the average is not comparable with the papers': it is over {{tasks}}, theirs is over {over}"


def _generalises(scope: Scope, margin: float, has_interval: bool, within: float | None = None) -> str:
    beyond = f"differences of {within:g} or more" if within else f"the margin {margin:g}" if margin else "0"
    at_scale = f"at this scale, {'refuted ' if scope == Scope.BY_COST else ''}{SCOPE[scope]}"
    if scope == Scope.BY_COST:
        return f"{at_scale} alone, which does not depend on the examples"
    if scope == Scope.NEW_DATA:
        return f"{at_scale}: the interval over new seeds and new examples excludes {beyond} too"
    if has_interval:
        return f"{at_scale}: the interval over new seeds excludes {beyond}, the one over new seeds and new examples does not"
    return f"{at_scale}: the interval covers new seeds, not new examples"


def _against_margin(arm: str, margin: float, verdict: str) -> str:
    most = f"{abs(margin):g}"
    if margin > 0:
        return f"the gain is below {most}; {arm!r} may still be better, by less"
    return {
        "supported": f"not worse by {most} or more; that {arm!r} is better would be another claim, without a margin",
        "undecided": f"undecided whether {arm!r} is worse by more than {most}",
        "refuted": f"refuted: {arm!r} is worse by more than {most}",
    }[verdict]


def _not_reached(helps: bool, **_: Any) -> str:
    return f"{{what}} is not reached: the teacher {'helps' if helps else 'harms'} throughout what was measured"


_NO_INTERVAL = "no interval over new examples: "
_SIGNED = (Kind.NEXT_EVALUATION, Kind.SINGLE_SEED_INTERVAL, Kind.GENERALISES)  # with a minus sign, not a hyphen
WORDS: Mapping[Kind, str | Callable[..., str]] = {
    Kind.NO_VALUE: _no_value,
    Kind.STOPPED: "{num} stopped trials of {arm!r} count as failed",
    Kind.PROVISIONAL: "provisional: {missing} of {planned} planned seeds of {arm!r} have no value yet",
    Kind.MISSING_TASKS: "{arm!r} has no {tasks} at seed {seeds}; a mean needs all data sets",
    Kind.SHARED_RUNS: _shared_runs,
    Kind.EVALUATED_EARLY: _evaluated_early,
    Kind.TOO_LATE: "{arm!r} has no value at seed {seeds}: its first evaluation, at {progress:g} of its schedule, came after "
    "{ratio:.3g} times the total {axis} of the other arm",
    Kind.NO_PAIR: "no seed has a value in both {arm!r} and {against!r}",
    Kind.SINGLE_PAIR: "n = 1: an effect of two runs; its spread is unknown without a second seed",
    Kind.EQUAL_DIFFERENCES: "all {n} differences are equal: without spread there is no test",
    Kind.TOO_FEW_PAIRS: "n = {n}: provisional; {least} pairs or more decide",
    Kind.FEW_PAIRS: "n = {n}: few pairs, the sign-flip p cannot be below {p_floor:g}",
    Kind.PIVOT: "hangs on one seed: beside {against!r} p is {whole:.2g}, and {p:.2g} without seed {seed} (both before Holm)",
    Kind.FAILED_SEEDS: _failed_seeds,
    Kind.NEXT_EVALUATION: _next_evaluation,
    Kind.SINGLE_SEED_INTERVAL: _single_seed_interval,
    Kind.NOT_STORED: _NO_INTERVAL + "no answers are stored",
    Kind.NOT_AT_END: _NO_INTERVAL + "answers are stored for test at the end of a phase only",
    Kind.FAILED_SEED: _NO_INTERVAL + "a seed failed, and has no answers",
    Kind.NOT_BY_EXAMPLE: _NO_INTERVAL + "{metric} of {task} is not scored by example",
    Kind.SEVERAL_RUNS: _NO_INTERVAL + "{arm!r} has several runs of seed {seed}",
    Kind.RUN_NOT_STORED: _NO_INTERVAL + "answers to {task} are not stored for {arm!r} at seed {seed}",
    Kind.OTHER_EXAMPLES: _NO_INTERVAL + "{arm!r} at seed {seed} was not scored on the same examples of {task}",
    Kind.OTHER_VALUE: _NO_INTERVAL + "the stored answers to {task} do not give the recorded value",
    Kind.NO_CLUSTERS: _NO_INTERVAL + "it is not stored which examples of {task} are of one document or text",
    Kind.FEW_CLUSTERS: _NO_INTERVAL + "{task} has examples of {num} documents or texts; expected {least} or more",
    Kind.UNEVEN_CLUSTERS: _NO_INTERVAL
    + "{num} documents or texts of {task} say as much as {effective} of one size; expected "
    "{least} or more",
    Kind.FEW_SEEDS: _NO_INTERVAL + "{num} seeds; expected {least} or more",
    Kind.NO_COST: "no seed has recorded {axis} for both {arm!r} and {against!r}",
    Kind.EQUAL_COST_RATIOS: "all {n} ratios of {axis} are equal: without spread there is no test",
    Kind.COUNTED_COST_RATIOS: "{axis} are counted: their ratio is the same at each of {n} seeds, and needs no test",
    Kind.FAILED_COST: "a seed failed, and its {axis} are unknown: that part is undecided",
    Kind.COST_RATIO: _cost_ratio,
    Kind.UNEQUAL_COST: "axis not equal: {arm!r} used {ratio:.3g} times the {axis} of {against!r}",
    Kind.SHARED_COST: _shared_cost,
    Kind.CONDITIONS: _conditions,
    Kind.LOST_RUNS: "{num} runs failed or were stopped: a curve without them would be another one, so undecided",
    Kind.NO_CURVE: "no curve: the arms differ too little in {what}; expected three values or more",
    Kind.NOT_REACHED: _not_reached,
    Kind.OUTSIDE: "the bound {bound:.3g} lies outside what was measured, {low:.3g} to {high:.3g}, and nothing is read there",
    Kind.ON_DEV: "measured on dev, by which learning rates and checkpoints are chosen: expected `split: test`",
    Kind.MEAN_OVER: "mean over {tasks}, within each seed",
    Kind.OTHER_AVERAGE: _other_average,
    Kind.GENERALISES: _generalises,
    Kind.AGAINST_MARGIN: _against_margin,
}
