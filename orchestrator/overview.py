"""The plan as a person reads it, before anything is done. Reads only: no Ray, no writes."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from orchestrator.agenda import Agenda
from orchestrator.messages import StudyError
from orchestrator.plan import Planned, strata
from orchestrator.statistics import detectable_in_sd
from orchestrator.study import Choice, Study
from trainables import models, remap
from trainables.data import DataError, tokenizer
from trainables.data.batches import corrupt, examples
from trainables.data.corpus import Corpus, open_corpus
from trainables.data.prepare import fingerprint, prepare
from trainables.losses.schedules import weight_at
from trainables.phases import instances, longest, num_steps, streams_of
from trainables.spec import CrossEntropy, Model, PretrainedTokenizer, Remap, Term, TrialSpec, digest, reads
from trainables.store import PhaseStore, Storage

PROBE_FLOPS = 2e11  # a step beyond that is not timed here: the machine that runs it is another one


def print_plan(agenda: Agenda, num_slots: int | None) -> None:
    """Prints the plan and checks what only shows when models meet data. Raises StudyError."""
    study = agenda.study
    base = study.spec(seed=0)
    with _corpora(base, agenda.storage) as corpora:
        shapes = _shapes(study)
        for spec in shapes:
            check(study, spec, {name: corpora.get(name) or next(iter(corpora.values())) for name in spec.data})
        trials = agenda.known()
        print(f"\n{study.folder}: {study.question}\n")
        for head, lines in (
            ("trials", _trials(agenda, trials)),
            ("phases", _phases(agenda, trials, base, corpora)),
            ("models", _models(study, base, corpora)),
            ("losses", _losses(base)),
            ("remaps", _remaps(shapes)),
            ("data", _data(base, corpora)),
            ("memory", _memory(base, corpora)),
            ("cost", _cost(agenda, trials, corpora, num_slots)),
            ("power", _power(study)),
        ):
            for i, line in enumerate(lines):
                print(f"  {head if i == 0 else '':8}{line}")
    print(flush=True)


@contextmanager
def _corpora(spec: TrialSpec, storage: Storage) -> Iterator[dict[str, Corpus]]:
    """The prepared data, from the storage where it has them, else in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="codistill-") as scratch:
        found = {}
        for name, data in spec.data.items():
            try:
                try:
                    found[name] = _existing(data, storage)
                except DataError:
                    found[name] = prepare(data, scratch)
            except DataError as error:
                raise StudyError(f"data.{name}: {error}") from None
        yield found


def _existing(data: Any, storage: Storage) -> Corpus:
    return open_corpus(storage.sub("data").uri, fingerprint(data))


# --------------------------------------------------------------------------------------------------------------- checks


def _shapes(study: Study) -> list[TrialSpec]:
    """One trial for each set of models that an arm, or an end of a range at any sizes, brings."""
    specs = [study.spec(seed=0), *(study.spec(arm=arm, seed=0) for arm in study.arms)]
    for sizes in strata(study):
        for name, axis in study.vary.items():
            for end in axis.ends():
                wanted = {**sizes, **study.point_at(name, end)}
                point = {key: wanted[key] for key in study.vary if key in wanted}
                if not study.is_excluded(point):
                    specs.append(study.spec(point=point, seed=0))
    distinct = {digest(s.model_dump(mode="json", include={"models", "data", "phases"})): s for s in specs}
    return list(distinct.values())


def check(study: Study, spec: TrialSpec, corpora: Mapping[str, Corpus]) -> None:
    """Tokenizers that differ, remaps between shapes that cannot be, heads that do not fit their streams."""
    spec = spec.pruned()
    first = next(iter(corpora.values()))
    at = f"{study.file}: "
    for name, corpus in corpora.items():
        if corpus.tokenizer_identity != first.tokenizer_identity:
            raise StudyError(
                f"{at}data.{name}: its tokenizer differs from that of data.{next(iter(corpora))} (by token → id map)"
            )
    try:
        configs = {name: config_of(model, first, longest(spec)) for name, model in spec.models.items()}
        for name, model in spec.models.items():
            if model.pretrained is not None:
                theirs = tokenizer.load_pretrained(
                    PretrainedTokenizer(kind="pretrained", name=model.pretrained, revision=model.revision)
                )
                if tokenizer.identity(theirs) != first.tokenizer_identity:
                    raise StudyError(
                        f"{at}models.{name}: the tokenizer of {model.pretrained!r} ({len(theirs)} tokens) differs from the data's "
                        f"({first.vocab_size} tokens) by its token → id map; valid: tokenizer: {{kind: pretrained, name: {model.pretrained}}}"
                    )
            if isinstance(model.init, Remap):
                remap.check(model.init.depth, configs[model.init.from_], configs[name])
        for phase_name, phase in spec.phases.items():
            if phase.batch % study.slot.workers:
                raise StudyError(
                    f"{at}trial.phases.{phase_name}.batch: {phase.batch} cannot be shared by slot.workers {study.slot.workers}; "
                    f"valid: a multiple of it"
                )
            for term in phase.terms.values():
                for name in reads(term):
                    models.check_stream(configs[name], phase.streams[term.on].corruption, name)
    except (models.ModelError, remap.RemapError, DataError) as error:
        raise StudyError(f"{at}models: {error}") from None


def config_of(model: Model, corpus: Corpus, length: int) -> Any:
    if model.pretrained is not None:
        try:
            return AutoConfig.from_pretrained(
                model.pretrained, revision=model.revision or "main", trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise models.ModelError(f"no model at {model.pretrained!r}: {str(error).splitlines()[0]}") from None
    return models.make_config(
        model, vocab_size=corpus.vocab_size, special_ids=models.special_ids(corpus.tokenizer), length=length
    )


# ---------------------------------------------------------------------------------------------------------------- lines


def _trials(agenda: Agenda, trials: list[Planned]) -> list[str]:
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


def _phases(agenda: Agenda, trials: list[Planned], base: TrialSpec, corpora: Mapping[str, Corpus]) -> list[str]:
    store = PhaseStore(agenda.storage)
    keys: dict[str, set[str]] = {}
    for planned in trials:
        for which, key in planned.keys.items():
            keys.setdefault(which, set()).add(key)
    lines = []
    for instance in instances(base):
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
    return lines


def _models(study: Study, base: TrialSpec, corpora: Mapping[str, Corpus]) -> list[str]:
    corpus = next(iter(corpora.values()))
    lines = []
    for name, model in base.models.items():
        config = config_of(model, corpus, longest(base))
        with torch.device("meta"):
            net = models.skeleton(config)
        total = models.num_parameters(net)
        embeddings = net.get_input_embeddings().weight.numel()
        shape = f"{config.num_hidden_layers}x{config.hidden_size} {config.model_type}"
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
    factor = f" x τ²={term.temperature**2:g}" if term.tau_squared else ""
    return f"{weight}{factor} x {term.kind}({term.from_} → {term.to}) at τ={term.temperature:g}, gradient into {term.to} only"


def _remaps(shapes: list[TrialSpec]) -> list[str]:
    """Each remap that a trial can ask for, measured on narrow models of the same family and depth."""
    seen: dict[tuple[Any, ...], str] = {}
    for spec in shapes:
        for name, model in spec.pruned().models.items():
            if not isinstance(model.init, Remap):
                continue
            source = spec.models[model.init.from_]
            if source.layers is None or model.layers is None:
                continue
            key = (model.init.depth, source.family, source.layers, model.layers)
            if key in seen:
                continue
            plan = remap.depth_plan(model.init.depth, source.layers, model.layers)
            narrow = {"width": 64, "heads": 2, "inner": 128, "dropout": 0.0, "init": {"kind": "random", "std": "width"}}
            nets = [
                models.build(Model.model_validate({**m.model_dump(include={"family", "layers", "config"}), **narrow}), name=n, seed=0,
                             vocab_size=128, special_ids={"pad_token_id": 0}, length=32)
                for m, n in ((source, "source"), (model, "target"))
            ]  # fmt: skip
            found = remap.measure(nets[0], nets[1], plan)
            layers = " ".join("-" if i is None else str(i) for i in plan)
            seen[key] = (
                f"{name} from {model.init.from_}, {model.init.depth} {source.layers}→{model.layers}: layers {layers}; {found.verdict} (logits change by {found.difference:.2g})"
            )
    return list(seen.values())


def _data(base: TrialSpec, corpora: Mapping[str, Corpus]) -> list[str]:
    lines = []
    for name, corpus in corpora.items():
        splits = corpus.about["splits"]
        counts = ", ".join(
            f"{split} {splits[split]['documents']:,} documents / {splits[split]['sequences']:,} sequences"
            for split in splits
        )
        lines.append(
            f"{name}: {counts}; {sum(corpus.about['removed_duplicates'].values())} near-duplicates across splits removed"
        )
        lines.append(f"{name}: tokenizer of {corpus.vocab_size:,} tokens, identity {corpus.tokenizer_identity[:12]}")
    phase = next(iter(base.phases.values()))
    stream = next(iter(phase.streams.values()))
    corpus = corpora.get(stream.data) or next(iter(corpora.values()))
    lines += [f"example: {_shorten(text)}" for text in examples(corpus, stream.corruption, num=2)]
    return lines


def _shorten(text: str, width: int = 150) -> str:
    return text if len(text) <= width else text[:width] + " …"


def _memory(base: TrialSpec, corpora: Mapping[str, Corpus]) -> list[str]:
    """An estimate by part for the largest phase of the trial as it stands, in fp32 master weights."""
    corpus = next(iter(corpora.values()))
    best: tuple[float, str] = (0.0, "")
    for name, phase in base.phases.items():
        length = corpus.train.length
        parts = dict.fromkeys(("weights", "gradients", "optimizer", "activations", "logits"), 0.0)
        for model in base.models_of(name):
            config = config_of(base.models[model], corpus, longest(base))
            with torch.device("meta"):
                size = 4.0 * models.num_parameters(models.skeleton(config))
            parts["weights"] += size
            stream = next(iter(phase.streams.values()))
            share = 1.0 if stream.corruption is None else stream.corruption.probability
            trained = model in phase.train
            parts["logits"] += 4.0 * phase.batch * length * share * config.vocab_size * (4 if trained else 2)
            if trained:
                parts["gradients"] += size
                parts["optimizer"] += 2 * size
                parts["activations"] += 4.0 * phase.batch * length * config.hidden_size * config.num_hidden_layers * 30
        total = sum(parts.values())
        shown = ", ".join(f"{part} {bytes_text(size)}" for part, size in parts.items())
        best = max(best, (total, f"phase {name}: about {bytes_text(total)} at the full batch ({shown}); estimate"))
    return [best[1]]


def _cost(agenda: Agenda, trials: list[Planned], corpora: Mapping[str, Corpus], num_slots: int | None) -> list[str]:
    """Device-hours from what the store has measured, or from a step timed here and now."""
    study = agenda.study
    store = PhaseStore(agenda.storage)
    todo: dict[str, tuple[Planned, str]] = {}
    for planned in trials:
        if agenda.rows.get(planned.id, {}).get("status") in ("ended", "stopped", "failed"):
            continue
        for instance, key in planned.keys.items():
            if store.find(key) is None:
                todo[key] = (planned, instance)
    per_step: dict[str, float | None] = {}
    seconds, flops_known = 0.0, True
    size = 0
    last: dict[str, float] = {}
    for planned, instance in todo.values():
        phase = planned.spec.phases[instance.partition("[")[0]]
        shape = digest([phase.model_dump(mode="json", include={"train", "batch", "streams"}), sorted(phase.terms),
                        {m: planned.spec.models[m].model_dump(mode="json", exclude={"init"}) for m in planned.spec.models_of(instance.partition("[")[0])}])  # fmt: skip
        if shape not in per_step:
            per_step[shape] = _time_step(planned.spec, instance.partition("[")[0], corpora)
        step = per_step[shape]
        if step is None:
            flops_known = False
            continue
        data = next(iter(phase.streams.values())).data
        corpus = corpora.get(data) or next(iter(corpora.values()))
        cost = step * num_steps(phase, length=corpus.train.length, num_sequences=len(corpus.train))
        seconds += cost
        last[instance] = cost
        size += sum(4 * _params(planned.spec, m, corpora) for m in phase.train) * (1 + len(phase.keep))
    extra = study.search.points if study.search else 0
    if study.confirm and not any(p.kind == "confirm" for p in trials):
        extra += 2 * study.confirm.seeds
    extra -= sum(1 for p in trials if p.arm is None and p.kind == "trial")
    if last and extra > 0:
        seconds += extra * sum(last.values())
        size += (
            extra
            * 4
            * max(
                _params(p.spec, m, corpora) for p, i in todo.values() for m in p.spec.phases[i.partition("[")[0]].train
            )
        )
    lines = []
    if not todo and extra <= 0:
        lines.append("nothing to train")
    elif not flops_known:
        lines.append("too large to be timed on this machine; device-hours show after the first phases")
    else:
        slots = num_slots or max(1, int((os.cpu_count() or 1) // (study.slot.cpus * study.slot.workers)))
        lines.append(
            f"about {seconds / 3600:.2g} device-hours without evaluation: {_minutes(seconds / slots)} on {slots} slots of "
            f"{study.slot.workers} x ({study.slot.cpus:g} cpu, {study.slot.gpus:g} gpu) (steps timed here)"
        )
    free = shutil.disk_usage(_existing_parent(agenda.storage)).free if agenda.storage.is_local else None
    lines.append(
        f"about {bytes_text(size)} of weights to be written"
        + (f", {bytes_text(free)} free" if free is not None else "")
    )
    if study.limits.minutes:
        lines.append(f"limit: nothing new is started after {study.limits.minutes:g} minutes")
    return lines


def _existing_parent(storage: Storage) -> str:
    path = storage.path()
    while not path.exists():
        path = path.parent
    return str(path)


def _params(spec: TrialSpec, name: str, corpora: Mapping[str, Corpus]) -> int:
    """Parameters of a model; each shape is made once, without memory."""
    corpus = next(iter(corpora.values()))
    shape = spec.models[name].model_dump_json(exclude={"init", "dropout"}), corpus.vocab_size, longest(spec)
    if shape not in _COUNTED:
        with torch.device("meta"):
            net = models.skeleton(config_of(spec.models[name], corpus, longest(spec)))
        _COUNTED[shape] = models.num_parameters(net)
    return _COUNTED[shape]


_COUNTED: dict[tuple[str, int, int], int] = {}


def _time_step(spec: TrialSpec, phase_name: str, corpora: Mapping[str, Corpus]) -> float | None:
    """Seconds of one step of a phase on this machine, with fresh weights; None where it is too large to try."""
    phase = spec.phases[phase_name]
    corpus = next(iter(corpora.values()))
    stream = next(iter(phase.streams.values()))
    batch = corrupt(corpus.train.rows(range(min(phase.batch, len(corpus.train)))), corpus, stream.corruption, seed=0)
    nets = {}
    flops = 0
    for name in spec.models_of(phase_name):
        config = config_of(spec.models[name], corpus, longest(spec))
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            net = models.skeleton(config)
            net(input_ids=torch.zeros(1, corpus.train.length, dtype=torch.long))
        flops += counter.get_total_flops() * phase.batch * (3 if name in phase.train else 1)
        nets[name] = config
    if flops > PROBE_FLOPS:
        return None
    built = {name: models.skeleton(config) for name, config in nets.items()}
    torch.set_num_threads(1)

    def step() -> None:
        for name, net in built.items():
            with torch.set_grad_enabled(name in phase.train):
                logits = models.logits_at(net, batch.ids_BT, batch.positions_N)
                loss = torch.nn.functional.cross_entropy(logits, batch.labels_N)
            if name in phase.train:
                loss.backward()  # type: ignore[no-untyped-call]

    step()  # warms up
    started = time.monotonic()
    step()
    return time.monotonic() - started


def _power(study: Study) -> list[str]:
    if not study.claims:
        return []
    if study.seeds < 2:
        return ["1 seed: effects are shown, but no claim can be decided; at least 2 are needed, 5 are usual"]
    return [
        f"{study.seeds} paired seeds detect {detectable_in_sd(study.seeds):.2f} SD of the paired differences (alpha .05, power .8)"
    ]


def bytes_text(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
