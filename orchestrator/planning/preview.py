"""Prints the plan of a study before anything runs. Only reads: no Ray, no writes."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from orchestrator.analysis.claim_history import ClaimHistory
from orchestrator.analysis.looks import expected, level_of
from orchestrator.analysis.statistics import ALPHA, MIN_PAIRS, detectable_in_sd
from orchestrator.planning.checks import check_trial, fresh_heads
from orchestrator.planning.cost import Rows, StepTimer, cost_lines, is_over
from orchestrator.planning.meta_models import Shapes
from orchestrator.planning.pilot import pilot_lines
from orchestrator.planning.reachable import reachable
from orchestrator.planning.slot_fit import largest_phase, memory_lines, num_slots
from orchestrator.scheduling.scheduler import Scheduler
from orchestrator.scheduling.trials import PlannedTrial
from orchestrator.study.axes import Choice
from orchestrator.study.errors import StudyError
from orchestrator.study.objectives import TIMES
from orchestrator.study.schema import Study
from trainables.config.errors import DataError, ModelError
from trainables.config.models import Remap
from trainables.config.phase import Stream
from trainables.config.terms import Term
from trainables.config.trial import TrialSpec
from trainables.config.value import digest
from trainables.data.prepare import fingerprint, prepare
from trainables.data.prepared import Prepared, open_data
from trainables.models import remap, tokenizer_check
from trainables.storage.files import Storage
from trainables.storage.phase_store import PhaseStore
from trainables.training import layer_outputs
from trainables.training.phase_graph import longest, num_steps, pace_reading, phase_runs, streams_of

EFFECTS = (0.5, 0.7, 1.0, 1.5)  # whose power a plan of looks states


def print_plan(scheduler: Scheduler) -> int:
    """Prints the plan, and checks what only shows when models meet data. Returns how many trials this machine can run at once.

    Raises StudyError.
    """
    study = scheduler.study
    base = study.spec(seed=0)
    reached = list(reachable(study))
    with _prepared([base, *(trial.spec for trial in reached)], scheduler.storage) as corpora:
        shapes = Shapes.of(corpora)
        for spec in (base.pruned(), *(trial.spec for trial in reached)):
            check_trial(study, spec, corpora, shapes)
        trials, rows = scheduler.known(), scheduler.ledger.rows
        try:
            largest = largest_phase(study, shapes, reached)
            num = num_slots(study.slot, largest.total)
            sections = {
                "trials": _trials(study, trials, rows),
                "phases": _phases(scheduler.storage, trials, base, corpora),
                "models": _models(study, base, corpora, shapes),
                "losses": _losses(base),
                "remaps": _remaps([trial.spec for trial in reached], shapes),
                "data": _data(base, corpora),
                "memory": memory_lines(study, shapes, reached, largest),
                "cost": cost_lines(scheduler, trials, StepTimer(corpora, shapes), num),
                "claims": claim_lines(study, scheduler.claim_history() if rows else None),
                "power": _power(study),
                "pilot": pilot_lines(study, scheduler.storage),
            }
        except ModelError as error:
            raise StudyError(f"{study.file}: models: {error}") from None
    print(f"\n{study.folder}: {study.question}\n")
    for heading, lines in sections.items():
        for i, line in enumerate(lines):
            print(f"  {heading if i == 0 else '':8}{line}")
    print(flush=True)
    return num


@contextmanager
def _prepared(specs: Sequence[TrialSpec], storage: Storage) -> Iterator[dict[str, Prepared]]:
    """Yields the prepared data of the first trial, as the models of all trials read them: from the storage, or prepared now in a
    temporary folder."""
    with tempfile.TemporaryDirectory(prefix="codistill-") as scratch:
        found, base = dict[str, Prepared](), specs[0].data
        for spec in specs:
            for name, (item, tokenizer) in spec.readings().items():
                if name in found or item not in base:
                    continue
                data = spec.data[item]
                try:
                    try:
                        key = fingerprint(data, spec.data, by=tokenizer)
                        found[name] = open_data(storage.sub("data").uri, key)
                    except DataError:
                        found[name] = prepare(data, scratch, spec.data, by=tokenizer)
                except DataError as error:
                    raise StudyError(f"data.{name}: {error}") from None
        yield found


def _trials(study: Study, trials: Sequence[PlannedTrial], rows: Rows) -> list[str]:
    parts = []
    if study.arms:
        parts.append(f"{len(study.arms)} arms x {study.looks[0]} seeds{' at first' if len(study.looks) > 1 else ''}")
    if study.tune:
        (path, grid), *_ = study.tune.grid.items()
        seeds = f" on {study.tune.seeds} seeds" if study.tune.seeds > 1 else ""
        parts.append(f"{path.rsplit('.', 1)[-1]} of each tuned over {len(grid)} values{seeds}")
    if study.search:
        parts.append(f"{study.search.points} points by {study.search.sampler} over {len(study.vary)} factors")
    if study.confirm:
        parts.append(f"the winner and {study.confirm.against} on {study.confirm.seeds} fresh seeds")
    over, planned = sum(is_over(rows, trial) for trial in trials), {trial.id for trial in trials}
    aside = [trial for trial, row in rows.items() if trial not in planned and row["kind"] != "teacher"]
    state = f"{over} reused, {len(trials) - over} to run of those that can be named now"
    if changes := _additions(trials, rows):
        state = f"{', '.join(changes)}: {state}"
    lines = ["; ".join(parts), state + (f", {len(aside)} set aside" if aside else "")]
    if len(study.looks) > 1:
        claimed = {arm for claim in study.claims.values() for arm in claim.arms}
        most = len(claimed) * study.num_seeds + len(study.arms.keys() - claimed) * study.looks[0]
        lines.append(
            f"looks at {_listed(study.looks)} seeds: after each, the arms of claims that are still open get more; at most "
            f"{most} trials of arms"
        )
    if study.search:
        stop = study.search.stop_early
        asha = f"ASHA from {stop.first:g} of the budget, keeping 1/{stop.reduction}" if stop else "none"
        lines.append(f"early stopping: {asha}")
        if len(study.objectives) > 1 or study.constraints:
            goals = ", ".join(f"{o.words()} ({o.mode})" for o in study.objectives)
            bounds = f"; within {', '.join(bound.words() for bound in study.constraints)}" if study.constraints else ""
            lines.append(f"objectives: {goals}{bounds}")
        timed = [what.metric for what in (*study.objectives, *study.constraints) if what.metric in TIMES]
        if timed and study.slot.gpus < 1:
            lines.append(f"{', '.join(timed)}: trials side by side on a device slow each other; give it one slot")
    return lines + _confirmation(study)


def _confirmation(study: Study) -> list[str]:
    if study.confirm is None:
        return []
    against, seeds = study.confirm.against, study.confirm.seeds
    taken = study.taken_over(against)
    rivals = ["as it was tuned"] + [f"at the winner's {', '.join(p.rsplit('.', 1)[-1] for p in taken)}"] * bool(taken)
    num = (2 + len(rivals)) * seeds
    return [
        f"confirmation: the winner against {against} {' and '.join(rivals)}; if it costs more, also against {against} for as "
        f"long as costs the same: up to {num} trials"
    ]


def _additions(trials: Sequence[PlannedTrial], rows: Rows) -> list[str]:
    """Returns the arms and seeds that the study has now, and had not when trials last ran."""
    before = [row for row in rows.values() if row["kind"] == "trial"]
    new = [trial for trial in trials if trial.kind == "trial" and trial.id not in rows]
    arms = {trial.arm for trial in new if trial.arm} - {row["arm"] for row in before}
    seeds = {trial.seed for trial in new} - {row["seed"] for row in before}
    added = {"arm": len(arms), "seed": len(seeds)} if rows else {}
    return [f"+{num} {what}{'s' * (num > 1)}" for what, num in added.items() if num]


def _phases(
    storage: Storage, trials: Sequence[PlannedTrial], base: TrialSpec, corpora: Mapping[str, Prepared]
) -> list[str]:
    store, keys, lines = PhaseStore(storage), dict[str, set[str]](), list[str]()
    for planned in trials:
        for name, key in planned.keys.items():
            keys.setdefault(name, set()).add(key)
    for run in phase_runs(base):
        name, phase = str(run), base.phases[run.phase]
        train = corpora[pace_reading(base, run)].train
        steps = num_steps(phase, length=train.length, num_sequences=len(train))
        stored = sum(store.find(key) is not None for key in keys.get(name, ()))
        after = sorted(base.upto(run.phase).phases.keys() - {run.phase})
        lines.append(
            f"{name:12} trains {', '.join(phase.train)}: {steps:,} steps of {phase.batch} x {train.length} tokens"
            f"{'; needs ' + ', '.join(after) if after else ''}; {len(keys.get(name, ()))} to have, {stored} in the store"
        )
        for model, how in phase.train.items():
            if how == "full" and base.models[model].dtype == "bf16":
                # half the spacing of bf16 is 2^-9 to 2^-8 of a number; a step of AdamW is about lr
                lr = phase.optimizer_of(model).lr
                lines.append(
                    f"{name:12} {model}'s own weights are bf16, which loses steps under 1/512 of a weight: at lr {lr:g} "
                    f"no weight beyond {512 * lr:.2g} moves; `precision: bf16` computes in bf16 on weights in fp32"
                )
    return lines


def _models(study: Study, base: TrialSpec, corpora: Mapping[str, Prepared], shapes: Shapes) -> list[str]:
    lines, item = [], next(iter(base.data))
    for name, model in base.models.items():
        net = shapes.net(model, longest(base))
        config, total = net.config, shapes.num_parameters(model, longest(base))
        embeddings = net.get_input_embeddings().weight.numel()
        shape = f"{config.num_hidden_layers}x{config.hidden_size} {config.model_type}"
        if (runs := layer_outputs.num_executed(config)) != config.num_hidden_layers:
            shape += f", {runs} layers run"
        if model.quantize is not None:
            shape += f", in {model.quantize} where it is not trained"
        lines.append(f"{name:12} {shape}: {total:,} parameters, {total - embeddings:,} without embeddings")
        if model.pretrained is not None:
            tokenizer = corpora[base.reading(item, name)].tokenizer
            differ = tokenizer_check.other_special_ids(shapes.folder(model).config, tokenizer)
            lines += [f"{name:12} {difference}" for difference in differ]
    pruned = base.pruned()
    for run in phase_runs(pruned):
        lines += fresh_heads(pruned, run, corpora, shapes)
    for factor in study.size_axes():
        choice = study.vary[factor]
        if isinstance(choice, Choice):
            lines.append(f"{factor:12} varied: {', '.join(choice.choice)}")
    return lines


def _losses(base: TrialSpec) -> list[str]:
    lines = []
    for phase_name, phase in base.phases.items():
        for name, term in phase.terms.items():
            lines.append(f"{phase_name}.{name}: {_coefficient(term)}{_mixture(phase.streams[term.on])}")
    return lines


def _mixture(stream: Stream) -> str:
    return "" if stream.mix is None else f", on {stream.mix.formula}"


def _coefficient(term: Term) -> str:
    start, end = (term.weight.value_at(progress) for progress in (0.0, 1.0))
    weight = f"{start:g}" if start == end else f"{start:g} → {end:g}"
    return f"{weight} x {term.formula}"


def _remaps(specs: Iterable[TrialSpec], shapes: Shapes) -> list[str]:
    """Returns each remap that a trial can ask for, measured on small models of the same proportions."""
    seen: dict[str, str] = {}
    for spec in specs:
        for name, model in spec.models.items():
            if not isinstance(model.init, Remap):
                continue
            source = spec.models[model.init.from_]
            pair = [m.model_dump(mode="json", exclude={"init", "dropout"}) for m in (source, model)]
            key = digest([*pair, model.init.depth, model.init.width])
            if key in seen:
                continue
            ours, theirs = (shapes.net(m, longest(spec)) for m in (source, model))
            how = f"{model.init.depth} {ours.config.num_hidden_layers}→{theirs.config.num_hidden_layers}"
            if model.init.width is not None:
                how += f", {model.init.width} {ours.config.hidden_size}→{theirs.config.hidden_size}"
            plan = remap.check(model.init.depth, ours.config, theirs.config, model.init.width)
            try:
                _, found = remap.preview_remap(model.init, ours.config, theirs.config)
                verdict = f"{found.verdict} (logits change by {found.difference:.2g})"
            except ModelError as error:  # a family whose small models are none
                verdict = f"not measured: {error}"
            layers = " ".join("-" if i is None else str(i) for i in plan)
            parts = [f"layers {layers}", verdict, *remap.notes(ours, theirs, plan)]
            seen[key] = f"{name} from {model.init.from_}, {how}: {'; '.join(parts)}"
    return list(seen.values())


def _data(base: TrialSpec, corpora: Mapping[str, Prepared]) -> list[str]:
    lines = [f"{name}: {corpus.summary()}" for name, corpus in corpora.items()]
    first_read = {name.partition("/")[2]: corpus for name, corpus in [*corpora.items()][::-1]}
    for tokenizer, first in sorted(first_read.items()):  # the same for all data, else `check` has said so
        of = f"tokenizer {tokenizer}" if tokenizer else "tokenizer"
        lines.append(f"{of} of {first.vocab_size:,} tokens, identity {first.tokenizer_identity[:12]}")
    shown = set[str]()
    for instance in phase_runs(base):
        phase = base.phases[instance.phase]
        read = [
            (base.reading(stream.data, model), stream.corruption)
            for name, stream in streams_of(base, instance).items()
            for model in (*phase.readers(name), *stream.models)
        ]
        read += [(base.reading(item, model), None) for item in phase.eval_only for model in phase.train]
        for name, corruption in read:
            if name in corpora and name not in shown:
                shown.add(name)
                width = 500 if corpora[name].scoring is not None else 150  # the reply stands at the end
                texts = corpora[name].examples(corruption)
                lines += [f"{name}, an example: {_shorten(text, width)}" for text in texts]
    return lines


def _shorten(text: str, width: int = 150) -> str:
    return text if len(text) <= width else text[:width] + " …"


def claim_lines(study: Study, history: ClaimHistory | None = None) -> list[str]:
    """Returns each claim as it will be judged, whatever it says of itself; with when it was stated, once trials have
    begun."""
    lines = []
    for name, claim in study.claims.items():
        whose = claim.model if claim.against_model is None else f"{claim.model} against {claim.against_model}"
        at = f" at {claim.at:g} of the budget" if claim.at not in ("equal", 1) else ""
        stated = f"; {history.stated(name).text()}" if history is not None else ""
        lines.append(f"{name}: {claim.stated()} ({claim.metric} of {whose} on {claim.split}{at}){stated}")
    if history is not None:
        lines += [f"edited after {edit.num_results} results: {edit.text()}" for edit in history.edits()]
    lines += [
        f"{n}: measured on dev, by which choices are made; expected test"
        for n, c in study.claims.items()
        if c.split == "dev"
    ]
    if any(claim.is_of_time for claim in study.claims.values()) and study.slot.gpus < 1:
        lines.append("device time is judged: trials side by side on a device slow each other; give it one slot")
    return lines


def _power(study: Study) -> list[str]:
    if not study.claims:
        return []
    if study.num_seeds < MIN_PAIRS:
        seeds = f"{study.num_seeds} seed{'s' if study.num_seeds > 1 else ''}"
        return [
            f"{seeds}: effects are shown, but no claim can be decided; at least {MIN_PAIRS} are needed, 5 are usual"
        ]
    lines, n = [], study.num_seeds
    if len(study.looks) > 1:
        level = f"{level_of(study.looks):.4f}".lstrip("0")
        lines.append(
            f"alpha .05 over {len(study.looks)} looks: level {level} at each; effects in SDs of the paired differences"
        )
    for family, size in Counter(claim.family for claim in study.claims.values()).items():
        named = f"family {family}: " if family != "main" else ""
        if len(study.looks) > 1:
            lines += [f"{named}{_power_of_looks(study.looks, effect, size)}" for effect in EFFECTS]
            continue
        one, first = (detectable_in_sd(n, alpha=ALPHA / claims) for claims in (1, size))
        effect = (
            f"{first:.2f} SD in the first of {size} claims (Holm), {one:.2f} in the last"
            if size > 1
            else f"{one:.2f} SD"
        )
        lines.append(f"{named}{n} paired seeds detect {effect}; SD of the paired differences, alpha .05, power .8")
    return lines


def _power_of_looks(looks: tuple[int, ...], effect: float, num_claims: int) -> str:
    """Returns the chance that an effect is found by each look, and the seeds that this takes; of several claims by
    Holm."""
    texts = []
    for alpha in dict.fromkeys((ALPHA / num_claims, ALPHA)):
        found = expected(looks, effect, alpha)
        texts.append(f"{_listed([f'{power:.2f}' for power in found.power])} (mean n {found.mean_n:.1f})")
    places = (f" in the first of {num_claims} claims (Holm)", " in the last") if num_claims > 1 else ("",)
    return f"{effect:g} SD: power by look {'; '.join(map(str.__add__, texts, places))}"


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
