"""The plan as a person reads it, before anything is done. Reads only: no Ray, no writes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from orchestrator.analysis.statistics import detectable_in_sd
from orchestrator.planning.cost import cost_lines
from orchestrator.planning.memory import memory_lines
from orchestrator.planning.meta_models import Shapes, reachable
from orchestrator.scheduling.scheduler import Agenda
from orchestrator.scheduling.trials import PlannedTrial
from orchestrator.study.errors import StudyError
from orchestrator.study.schema import Choice, Study
from trainables.config import errors
from trainables.config.data import Instructions, Tasks
from trainables.config.errors import DataError
from trainables.config.models import Remap
from trainables.config.terms import CrossEntropy, Inner, Term, reads
from trainables.config.trial import TrialSpec
from trainables.config.value import digest
from trainables.data.batches import examples
from trainables.data.classification.tasks import Task
from trainables.data.instructions.exchanges import ExchangeSet
from trainables.data.prepare import fingerprint, prepare
from trainables.data.prepared import Prepared, open_data
from trainables.generation import kv_cache
from trainables.models import build, remap, tokenizer_check
from trainables.storage.files import Storage
from trainables.storage.phase_store import PhaseStore
from trainables.training import forward, optimizers
from trainables.training.phase_graph import longest, num_steps, phase_runs, streams_of
from trainables.training.schedules import weight_at


def print_plan(agenda: Agenda, num_slots: int | None) -> None:
    """Prints the plan and checks what only shows when models meet data. Raises StudyError."""
    study = agenda.study
    base = study.spec(seed=0)
    with _corpora(base, agenda.storage) as corpora:
        shapes = Shapes.of(*corpora.values())
        reached = list(reachable(study))
        for spec in (base.pruned(), *(one.spec for one in reached)):
            check(study, spec, {name: corpora.get(name) or next(iter(corpora.values())) for name in spec.data}, shapes)
        trials = agenda.known()
        parts = {
            "trials": _trials(agenda, trials),
            "phases": _phases(agenda, trials, base, corpora),
            "models": _models(study, base, shapes),
            "losses": _losses(base),
            "remaps": _remaps([one.spec for one in reached], shapes),
            "data": _data(base, corpora),
            "memory": memory_lines(study, shapes, reached),
            "cost": cost_lines(agenda, trials, corpora, shapes, num_slots),
            "claims": claim_lines(study),
            "power": _power(study),
        }
    print(f"\n{study.folder}: {study.question}\n")
    for head, lines in parts.items():
        for i, line in enumerate(lines):
            print(f"  {head if i == 0 else '':8}{line}")
    print(flush=True)


@contextmanager
def _corpora(spec: TrialSpec, storage: Storage) -> Iterator[dict[str, Prepared]]:
    """The prepared data, from the storage where it has them, else in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="codistill-") as scratch:
        found = dict[str, Prepared]()
        for name, data in spec.data.items():
            try:
                try:
                    found[name] = open_data(storage.sub("data").uri, fingerprint(data, spec.data))
                except DataError:
                    found[name] = prepare(data, scratch, spec.data)
            except DataError as error:
                raise StudyError(f"data.{name}: {error}") from None
        yield found


# --------------------------------------------------------------------------------------------------------------- checks


def check(study: Study, spec: TrialSpec, corpora: Mapping[str, Prepared], shapes: Shapes) -> None:
    """Types that the device lacks, tokenizers that differ, remaps between shapes that cannot be, heads that do not fit their
    streams. `spec` is pruned."""
    (lender, first), *_ = corpora.items()
    at = f"{study.file}: "
    if study.slot.gpus and torch.cuda.is_available():  # else another machine trains, and its trials tell
        try:
            build.check_types(spec.precision, spec.models, "cuda")
        except errors.ModelError as error:
            raise StudyError(f"{at}trial.{error}") from None
    for name, corpus in corpora.items():
        maps = {f"data {whose!r}": one.tokenizer.get_vocab() for whose, one in ((name, corpus), (lender, first))}
        if corpus.tokenizer_identity != first.tokenizer_identity and (
            difference := tokenizer_check.difference_of(maps)
        ):
            raise StudyError(f"{at}data.{name}: {difference}; expected one tokenizer for all data of a trial")
    for name, model in spec.models.items():  # first of all: it says best why a model cannot be had
        try:
            tokenizer_check.check_tokenizer(model, first.tokenizer, lender)
        except errors.ModelError as error:
            raise StudyError(f"{at}models.{name}: {error}") from None
    try:
        configs = {name: shapes.config(model, longest(spec)) for name, model in spec.models.items()}
        for name, model in spec.models.items():
            _check_pretrained(study, spec, name, configs[name], first.vocab_size)
            if isinstance(model.init, Remap):
                remap.check(model.init.depth, configs[model.init.from_], configs[name], model.init.width)
        for phase_name, phase in spec.phases.items():
            if phase.batch % study.slot.workers:
                raise StudyError(
                    f"{at}trial.phases.{phase_name}.batch: {phase.batch} cannot be shared by slot.workers {study.slot.workers}; "
                    f"expected a multiple of it"
                )
            _check_training(study, spec, phase_name, shapes)
        for instance in phase_runs(spec):
            phase, streams = spec.phases[instance.phase], streams_of(spec, instance)
            for term in phase.terms.values():
                for name in reads(term):
                    if isinstance(read := spec.data[streams[term.on].data], Tasks):
                        build.check_task(configs[name], name)
                    elif isinstance(read, Instructions):
                        build.check_stream(configs[name], None, name)
                        if name in phase.train:  # its own replies are scored
                            kv_cache.check(shapes.net(spec.models[name], longest(spec)))
                    else:
                        build.check_stream(configs[name], streams[term.on].corruption, name)
            for name in (maker for stream in streams.values() if stream.replies for maker in stream.replies.makers):
                kv_cache.check(shapes.net(spec.models[name], longest(spec)))
            nets = {name: shapes.net(spec.models[name], longest(spec)) for term in phase.terms.values() for name in reads(term)}  # fmt: skip
            forward.check_inner(phase.terms, nets)
    except forward.SiteError as error:
        raise StudyError(f"{at}phases: {error}") from None
    except (errors.ModelError, remap.RemapError, DataError, kv_cache.GenerationError) as error:
        raise StudyError(f"{at}models: {error}") from None


def _check_pretrained(study: Study, spec: TrialSpec, name: str, config: Any, vocab_size: int) -> None:
    """Whether pretrained weights have a row for each of the data's tokens, and a place for each of the longest sequences'."""
    model = spec.models[name]
    if model.pretrained is None:
        return
    if (rows := getattr(config, "vocab_size", None)) is not None and rows < vocab_size:
        raise StudyError(
            f"{study.file}: models.{name}: {model.pretrained!r} has {rows} rows of embeddings, and the data's tokenizer has "
            f"{vocab_size} tokens; expected the tokenizer of the model"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < longest(spec):
        data = max(spec.data, key=lambda item: spec.data[item].length)
        raise StudyError(
            f"{study.file}: models.{name}: {model.pretrained!r} has {positions} positions, and sequences of data.{data} have "
            f"up to {spec.data[data].length} tokens; expected data.{data}.length: {positions} at most"
        )


def _check_training(study: Study, spec: TrialSpec, name: str, shapes: Shapes) -> None:
    """Whether the phase's optimizers are installed, and whether its models can be trained as it says."""
    phase, length = spec.phases[name], longest(spec)
    try:
        optimizers.check_optimizers(phase)
        for model, how in phase.train.items():
            shapes.net(spec.models[model], length, how=how, recompute=phase.gradient_checkpointing)
    except errors.ModelError as error:
        raise StudyError(f"{study.file}: trial.phases.{name}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------- lines


def _trials(agenda: Agenda, trials: list[PlannedTrial]) -> list[str]:
    study = agenda.study
    parts = []
    if study.arms:
        parts.append(f"{len(study.arms)} arms x {study.seeds} seeds")
    if study.tune:
        (path, grid), *_ = study.tune.grid.items()
        parts.append(f"{path.rsplit('.', 1)[-1]} of each tuned over {len(grid)} values")
    if study.search:
        parts.append(f"{study.search.points} points by {study.search.sampler} over {len(study.vary)} factors")
    if study.confirm:
        parts.append(f"the winner and {study.confirm.against} on {study.confirm.seeds} fresh seeds")
    done = [p for p in trials if agenda.rows.get(p.id, {}).get("status") in ("ended", "stopped", "failed")]
    ids = {p.id for p in trials}
    aside = [row for trial, row in agenda.rows.items() if trial not in ids and row["kind"] != "teacher"]
    lines = ["; ".join(parts)]
    state = f"{len(done)} reused, {len(trials) - len(done)} to run of those that can be named now"
    if agenda.rows:
        before = {(row["arm"] or "search", row["seed"]) for row in agenda.rows.values() if row["kind"] == "trial"}
        new = [p for p in trials if p.kind == "trial" and p.id not in agenda.rows]
        arms = {p.arm for p in new if p.arm} - {arm for arm, _ in before}
        seeds = {p.seed for p in new} - {seed for _, seed in before}
        changes = [f"+{len(arms)} arm{'s' * (len(arms) > 1)}"] * bool(arms) + [
            f"+{len(seeds)} seed{'s' * (len(seeds) > 1)}"
        ] * bool(seeds)
        state = ", ".join(changes) + ": " * bool(changes) + state
    lines.append(state + (f", {len(aside)} set aside" if aside else ""))
    if study.search:
        stop = study.search.stop_early
        lines.append(
            f"early stopping: {f'ASHA from {stop.first:g} of the budget, keeping 1/{stop.reduction}' if stop else 'none'}"
        )
    return lines


def _phases(agenda: Agenda, trials: list[PlannedTrial], base: TrialSpec, corpora: Mapping[str, Prepared]) -> list[str]:
    store = PhaseStore(agenda.storage)
    keys: dict[str, set[str]] = {}
    for planned in trials:
        for which, key in planned.keys.items():
            keys.setdefault(which, set()).add(key)
    lines = []
    for instance in phase_runs(base):
        name = str(instance)
        phase = base.phases[instance.phase]
        stream = streams_of(base, instance)[phase.pace]
        steps = num_steps(
            phase, length=corpora[stream.data].train.length, num_sequences=len(corpora[stream.data].train)
        )
        have = sum(store.find(key) is not None for key in keys.get(name, ()))
        after = sorted(base.upto(instance.phase).phases.keys() - {instance.phase})
        lines.append(
            f"{name:12} trains {', '.join(phase.train)}: {steps:,} steps of {phase.batch} x {corpora[stream.data].train.length} tokens"
            f"{'; needs ' + ', '.join(after) if after else ''}; {len(keys.get(name, ()))} to have, {have} in the store"
        )
        for model, how in phase.train.items():
            if how == "full" and base.models[model].dtype == "bf16":
                # its halved spacing: from 2^-9 to 2^-8 of a number; a step of AdamW is about lr
                lr = phase.optimizer_of(model).lr
                lines.append(
                    f"{name:12} {model}'s own weights are bf16, in which a step under 1/512 of a weight is lost: at lr {lr:g} "
                    f"none beyond {512 * lr:.2g} moves; `precision: bf16` computes in bf16 on weights in fp32"
                )
    return lines


def _models(study: Study, base: TrialSpec, shapes: Shapes) -> list[str]:
    lines = []
    for name, model in base.models.items():
        net = shapes.net(model, longest(base))
        config, total = net.config, shapes.num_parameters(model, longest(base))
        embeddings = net.get_input_embeddings().weight.numel()
        shape = f"{config.num_hidden_layers}x{config.hidden_size} {config.model_type}"
        if (runs := forward.num_executed(config)) != config.num_hidden_layers:
            shape += f", {runs} layers run"
        lines.append(f"{name:12} {shape}: {total:,} parameters, {total - embeddings:,} without embeddings")
    for axis in study.size_axes():
        choice = study.vary[axis]
        if isinstance(choice, Choice):
            lines.append(f"{axis:12} varied: {', '.join(choice.choice)}")
    return lines


def _losses(base: TrialSpec) -> list[str]:
    lines = []
    for phase_name, phase in base.phases.items():
        for name, term in phase.terms.items():
            lines.append(f"{phase_name}.{name}: {_coefficient(term)}")
    return lines


def _coefficient(term: Term) -> str:
    start, end = (weight_at(term.weight, progress) for progress in (0.0, 1.0))
    weight = f"{start:g}" if start == end else f"{start:g} → {end:g}"
    if isinstance(term, CrossEntropy):
        return f"{weight} x cross-entropy of {term.of}"
    if isinstance(term, Inner):
        about = ", ".join(f"{key} {value}" for key, value in term.model_dump(mode="json", exclude={"kind", "from_", "to", "on", "weight"}).items() if value)  # fmt: skip
        return f"{weight} x {term.kind}({term.from_} → {term.to}; {about}), gradient into {term.to} only"
    factor = f" x τ²={term.temperature**2:g}" if term.tau_squared else ""
    return f"{weight}{factor} x {term.kind}({term.from_} → {term.to}) at τ={term.temperature:g}, gradient into {term.to} only"


def _remaps(specs: Iterable[TrialSpec], shapes: Shapes) -> list[str]:
    """Each remap that a trial can ask for, measured on small models of the same proportions."""
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
            config = shapes.config(source, longest(spec))
            how = f"{model.init.depth} {config.num_hidden_layers}→{model.layers}"
            if model.init.width is not None:
                how += f", {model.init.width} {config.hidden_size}→{model.width}"
            try:
                plan, found = remap.foresee(source, model, config if source.pretrained else None)
                layers = " ".join("-" if i is None else str(i) for i in plan)
                verdict = f"layers {layers}; {found.verdict} (logits change by {found.difference:.2g})"
            except ValueError as error:  # pretrained weights of a family whose small models are none
                if source.pretrained is None:
                    raise
                verdict = f"not measured: {str(error).splitlines()[0]}"
            seen[key] = f"{name} from {model.init.from_}, {how}: {verdict}"
    return list(seen.values())


def _data(base: TrialSpec, corpora: Mapping[str, Prepared]) -> list[str]:
    lines = []
    for name, corpus in corpora.items():
        about = corpus.about
        removed = sum(about["removed_duplicates"].values())
        if isinstance(corpus, ExchangeSet):
            lines.append(f"{name}: {_exchanged(corpus)}; {removed:,} duplicates across splits removed")
            continue
        if isinstance(corpus, Task):
            counts = f"{_sizes(about['splits'])}; scored by {corpus.score.replace('_', ' ')}"
        else:
            counts = ", ".join(
                f"{split} {found['documents']:,} documents / {found['sequences']:,} sequences"
                for split, found in about["splits"].items()
            )
        lines.append(f"{name}: {counts}; {removed} near-duplicates across splits removed")
    first = next(iter(corpora.values()))  # the same for all, else `check` has said so
    lines.append(f"tokenizer of {first.vocab_size:,} tokens, identity {first.tokenizer_identity[:12]}")
    shown = set[str]()
    for instance in phase_runs(base):
        read = [(stream.data, stream.corruption) for stream in streams_of(base, instance).values()]
        for name, corruption in [*read, *((item, None) for item in base.phases[instance.phase].eval_only)]:
            if name in corpora and name not in shown:
                shown.add(name)
                found = examples(corpora[name], corruption, num=2)
                width = 500 if isinstance(corpora[name], ExchangeSet) else 150  # the reply stands at the end
                lines += [f"{name}, an example: {_shorten(text, width)}" for text in found]
    return lines


def _exchanged(data: ExchangeSet) -> str:
    """Exchanges by split; which share of the replies is cut; what was left out, and why."""
    splits = {split: data.about["splits"][split] for split in ("train", "dev", "test")}
    sizes = ", ".join(
        f"{split} {found['exchanges']:,} exchanges" for split, found in splits.items() if found["exchanges"]
    )
    num = sum(found["exchanges"] for found in splits.values())
    cut = sum(found["truncated"] * found["exchanges"] for found in splits.values()) / num
    dropped: dict[str, int] = {}
    for found in splits.values():
        for reason, rows in found["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + rows
    out = ", ".join(f"{rows:,} with {reason}" for reason, rows in sorted(dropped.items()))
    most = max((len(data.test.references(i)) for i in range(len(data.test))), default=1)
    best = f"; scored against the best of up to {most} references" if most > 1 else ""
    return (
        f"{sizes}{best}; {data.about['exchanges']['template']} template; {cut:.1%} of the replies cut at {data.length} tokens of "
        f"prompt and reply; rows left out: {out or 'none'}"
    )


def _sizes(splits: Mapping[str, Any]) -> str:
    """Examples, how many of them were cut at the longest length, and the share of the most frequent class."""
    parts = []
    for split, found in splits.items():
        more = [f"{found['truncated']:.1%} cut"] if found["truncated"] else []
        if "classes" in found:
            most = max(found["classes"], key=found["classes"].get)
            more.append(f"{found['classes'][most] / found['examples']:.0%} {most}")
        parts.append(f"{split} {found['examples']:,} examples" + (f" ({', '.join(more)})" if more else ""))
    return ", ".join(parts)


def _shorten(text: str, width: int = 150) -> str:
    return text if len(text) <= width else text[:width] + " …"


def claim_lines(study: Study) -> list[str]:
    """Each claim as it will be judged, whatever it says of itself."""
    lines = []
    for name, claim in study.claims.items():
        whose = claim.model if claim.against_model is None else f"{claim.model} against {claim.against_model}"
        at = f" at {claim.at:g} of the budget" if claim.at not in ("equal", 1) else ""
        lines.append(f"{name}: {claim.stated()} ({claim.metric} of {whose} on {claim.split}{at})")
    if any(claim.is_of_time for claim in study.claims.values()) and study.slot.gpus < 1:
        lines.append("device time is judged: trials side by side on a device slow each other; give it one slot")
    return lines


def _power(study: Study) -> list[str]:
    if not study.claims:
        return []
    if study.seeds < 2:
        return ["1 seed: effects are shown, but no claim can be decided; at least 2 are needed, 5 are usual"]
    return [
        f"{study.seeds} paired seeds detect {detectable_in_sd(study.seeds):.2f} SD of the paired differences (alpha .05, power .8)"
    ]
