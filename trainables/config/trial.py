"""A trial: data, models and phases as one value, with checks of what holds between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trainables.config.data import Data, Instructions, SameTokenizer, Tasks
from trainables.config.models import Model, Remap
from trainables.config.phase import Fold, Masking, Phase, Tokens, makers
from trainables.config.terms import CrossEntropy, HiddenCosine, HiddenMSE, Inner, is_off, reads
from trainables.config.value import Name, Value, digest, single

NUMERICS = 2  # raised whenever a stored reference trajectory changes: it is part of every phase's key


class TrialSpec(Value):
    """Everything that can change a number in a trial's results."""

    data: Annotated[dict[Name, Data], Field(min_length=1), single("kind", "corpus")]
    precision: Literal["fp32", "bf16"] = "fp32"
    models: dict[Name, Model] = Field(min_length=1)
    phases: dict[Name, Phase] = Field(min_length=1)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _every_name_is_defined(self) -> TrialSpec:
        for name, model in self.models.items():
            if isinstance(model.init, Remap):
                _known("model", model.init.from_, self.models, f"models.{name}.init.from")
        for name, phase in self.phases.items():
            at = f"phases.{name}"
            for whose, key in ((phase.train, "train"), (phase.start, "start")):
                for used in whose:
                    _known("model", used, self.models, f"{at}.{key}")
            for term_name, term in phase.terms.items():
                for used in reads(term):
                    _known("model", used, self.models, f"{at}.terms.{term_name}")
            for item in phase.for_each_dataset:
                _known("data set", item, self.data, f"{at}.for_each_dataset")
            for stream_name, stream in phase.streams.items():
                if not phase.for_each_dataset:
                    _known("data set", stream.data, self.data, f"{at}.streams.{stream_name}.data")
                for used in makers({stream_name: stream}):
                    part = "labels.of" if stream.labels is not None and used in stream.labels.of else "replies"
                    _known("model", used, self.models, f"{at}.streams.{stream_name}.{part}")
            for item in phase.eval_only:
                _known("data set", item, self.data, f"{at}.eval_only")
        for name, data in self.data.items():
            if isinstance(data.tokenizer, SameTokenizer):
                _known("data set", data.tokenizer.as_, self.data, f"data.{name}.tokenizer.as")
                if isinstance(self.data[data.tokenizer.as_].tokenizer, SameTokenizer):
                    raise ValueError(f"data.{name}.tokenizer.as: {data.tokenizer.as_!r} has no tokenizer of its own")
        if all(is_off(term.weight) for phase in self.phases.values() for term in phase.terms.values()):
            raise ValueError("phases: every term has weight 0: nothing is learnt")
        self._check_start()
        self._check_tasks()
        self._check_instructions()
        self._check_inner()
        _refuse_cycle({n: [m.init.from_] for n, m in self.models.items() if isinstance(m.init, Remap)}, "remaps")
        _refuse_cycle({name: list(self._upstream(name)) for name in self.phases}, "phases")
        return self

    def _check_start(self) -> None:
        for name, phase in self.phases.items():
            for model, start in phase.start.items():
                at = f"phases.{name}.start.{model}"
                source, fraction, item = parse_start(start)
                _known("phase", source, self.phases, at)
                earlier = self.phases[source]
                if model not in earlier.train:
                    raise ValueError(f"{at}: phase {source!r} does not train {model!r}")
                if fraction != 1.0 and fraction not in earlier.save_at:
                    raise ValueError(
                        f"{at}: phase {source!r} keeps no weights at {fraction:g}; add it to its `save_at`"
                    )
                if item not in earlier.for_each_dataset if item is not None else not _reaches(earlier, phase):
                    valid = ", ".join(f"{source}[{i}]" for i in earlier.for_each_dataset) or source
                    raise ValueError(f"{at}: {start!r} is not there; expected {valid}")

    def _check_tasks(self) -> None:
        """A stream is of a corpus or of a task; whoever reads it has one head."""
        for name, phase in self.phases.items():
            for stream_name, stream in phase.streams.items():
                at = f"phases.{name}.streams.{stream_name}"
                data = {item: self.data[item] for item in phase.for_each_dataset or (stream.data,)}
                tasks = [item for item, found in data.items() if isinstance(found, Tasks)]
                if tasks and len(tasks) < len(data):
                    raise ValueError(
                        f"phases.{name}.for_each_dataset: {', '.join(data)} are neither all corpora nor all tasks"
                    )
                if tasks and stream.corruption not in (None, Masking()):
                    raise ValueError(f"{at}.corruption: {tasks[0]} is a task, which is read as it is; remove it")
                if tasks and isinstance(phase.budget, Tokens):
                    raise ValueError(
                        f"phases.{name}.budget: a budget of tokens is for corpora; expected epochs or steps"
                    )
                for part in ("labels", "fold"):
                    if not tasks and getattr(stream, part) is not None:
                        raise ValueError(f"{at}.{part}: {next(iter(data))} is a corpus; {part} are for tasks")
                if stream.labels is not None:
                    for item in tasks:
                        if self.data[item].is_regression:  # type: ignore[union-attr]
                            raise ValueError(f"{at}.labels: {item} is a regression, where no answer is right or wrong")
                    thresholds = stream.labels.thresholds
                    if isinstance(thresholds, dict) and thresholds.keys() != data.keys():
                        raise ValueError(
                            f"{at}.labels.thresholds: are of {', '.join(thresholds)}; expected of each data set that is read "
                            f"here, and of no other: {', '.join(data)}"
                        )
                    num = len(stream.labels.of)
                    for fold, labeller in enumerate(stream.labels.of):
                        start = None if labeller in phase.train else self.origin(name, labeller)
                        if start is None:
                            raise ValueError(f"{at}.labels.of: {labeller!r} must have been trained by an earlier phase")
                        taught = self.phases[parse_start(start)[0]].streams.values()
                        unseen = Fold(num=num, held_out=fold) if num > 1 else None
                        if unseen is not None and all(other.fold != unseen for other in taught):
                            raise ValueError(
                                f"{at}.labels.of: {labeller!r} labels fold {fold} of {num}, which it must not have seen; "
                                f"train it with fold: {{num: {num}, held_out: {fold}}}"
                            )
            for model in self.models_of(name):
                read = {t.on for t in phase.terms.values() if model in reads(t)}
                streams = [phase.streams[on] for on in sorted(read)]
                heads = {
                    (s.data if not phase.for_each_dataset else "", s.labels and s.labels.model_dump_json())
                    for s in streams
                }
                kinds = {isinstance(self.data[item], Tasks) for on in read for item in (phase.for_each_dataset or (phase.streams[on].data,))}  # fmt: skip
                if True in kinds and len(heads) > 1:
                    raise ValueError(
                        f"phases.{name}: {model!r} reads several streams, and a task needs a head of its own"
                    )

    def _check_instructions(self) -> None:
        for name, phase in self.phases.items():
            for item in phase.eval_only:
                if not isinstance(self.data[item], Instructions):
                    raise ValueError(f"phases.{name}.eval_only: {item} has no replies to score; expected instructions")
                if item in (phase.for_each_dataset or {stream.data for stream in phase.streams.values()}):
                    raise ValueError(
                        f"phases.{name}.eval_only: {item} is scored anyway, as the phase reads it; remove it"
                    )
            for stream_name, stream in phase.streams.items():
                at = f"phases.{name}.streams.{stream_name}"
                data = {item: self.data[item] for item in phase.for_each_dataset or (stream.data,)}
                found = [item for item, one in data.items() if isinstance(one, Instructions)]
                if found and len(found) < len(data):
                    raise ValueError(
                        f"phases.{name}.for_each_dataset: {', '.join(data)} are neither all instructions nor none"
                    )
                if stream.replies is not None and not found:
                    raise ValueError(f"{at}.replies: {next(iter(data))} has no prompts; replies are for instructions")
                if not found:
                    continue
                for item in found:
                    if getattr(data[item], "train", "") is None:
                        raise ValueError(f"{at}: {item} has no train, it is only there to be scored (`eval_only`)")
                if stream.corruption not in (None, Masking()):
                    raise ValueError(
                        f"{at}.corruption: {found[0]} are instructions, which are read as they are; remove it"
                    )
                if isinstance(phase.budget, Tokens):
                    raise ValueError(
                        f"phases.{name}.budget: a budget of tokens is for corpora; expected epochs or steps"
                    )
                replay = stream.replies.replay if stream.replies is not None else None
                if replay is not None and replay.size < phase.batch:
                    raise ValueError(f"{at}.replies.replay.size: {replay.size} is less than a batch of {phase.batch}")
                made_here = set(makers({stream_name: stream})) & set(phase.train)
                for term_name, term in phase.terms.items():
                    if term.on != stream_name or is_off(term.weight):
                        continue
                    if isinstance(term, Inner):
                        raise ValueError(f"phases.{name}.terms.{term_name}: {term.kind} is for corpora and tasks")
                    if isinstance(term, CrossEntropy) and made_here:
                        raise ValueError(
                            f"phases.{name}.terms.{term_name}: replies of {min(made_here)!r}, which learns here, are no "
                            f"labels; use a flow, or a second stream without `replies`"
                        )

    def _check_inner(self) -> None:
        for name, phase in self.phases.items():
            for term_name, term in phase.terms.items():
                if isinstance(term, HiddenMSE | HiddenCosine) and not term.projector:
                    widths = {model: self.models[model].width for model in (term.from_, term.to)}
                    if None not in widths.values() and len(set(widths.values())) > 1:
                        about = ", ".join(f"{model} has {width}" for model, width in widths.items())
                        raise ValueError(
                            f"phases.{name}.terms.{term_name}: widths differ ({about}); set projector: true"
                        )

    def origin(self, phase: str, model: str) -> str | None:
        """The phase (as `phase`, `phase@0.5`, `phase[data]`) whose weights `model` has when `phase` starts, or None.

        Where both fan out, `phase` without data means the branch of the same data: branches are never chained.
        """
        if model in self.phases[phase].start:
            return self.phases[phase].start[model]
        latest = None
        for name, earlier in self.phases.items():
            if name == phase:
                break
            if model in earlier.train and _reaches(earlier, self.phases[phase]):
                latest = name
        return latest

    def models_of(self, phase: str) -> tuple[str, ...]:
        """The models that a phase trains or reads, in the order of the file."""
        p = self.phases[phase]
        used = set(p.train) | {model for term in p.terms.values() for model in reads(term)} | set(makers(p.streams))
        return tuple(name for name in self.models if name in used)

    def _upstream(self, phase: str) -> Iterator[str]:
        """The phases that `phase` needs: where its models come from, remaps included."""
        todo, seen = list(self.models_of(phase)), set[str]()
        while todo:
            model = todo.pop()
            if model in seen:
                continue
            seen.add(model)
            origin = self.origin(phase, model)
            if origin is not None:
                yield parse_start(origin)[0]
                continue
            init = self.models[model].init
            if isinstance(init, Remap):
                todo.append(init.from_)

    def order(self) -> tuple[str, ...]:
        """Phases such that each comes after those it needs; otherwise in the order of the file."""
        done: list[str] = []

        def visit(name: str) -> None:
            if name not in done:
                for upstream in self._upstream(name):
                    visit(upstream)
                done.append(name)

        for name in self.phases:
            visit(name)
        return tuple(done)

    def upto(self, phase: str) -> TrialSpec:
        """The trial that runs only `phase` and what it needs."""
        return self._keep({phase, *self._closure(phase)})

    def _closure(self, phase: str) -> set[str]:
        found: set[str] = set()
        todo = [phase]
        while todo:
            for upstream in self._upstream(todo.pop()):
                if upstream not in found:
                    found.add(upstream)
                    todo.append(upstream)
        return found

    def pruned(self) -> TrialSpec:
        """Without what no result depends on: terms that are off, phases that only they read, models that nothing uses.

        A phase that no other phase reads, as the file stands, is a result and stays, unless all its terms are off. Data
        stay too: models are made for the longest sequence, and that must not change with what is switched off.
        """
        read_as_written = {up for name in self.phases for up in self._upstream(name)}
        phases = {name: phase.without_what_is_off() for name, phase in self.phases.items()}
        lean = self.model_copy(update={"phases": phases})
        for name, phase in phases.items():  # where a phase no longer trains a model, what it had before goes on
            start = {model: lean._trained(model, at) for model, at in phase.start.items()}
            phases[name] = phase.model_copy(update={"start": {m: at for m, at in start.items() if at is not None}})
        results = [name for name, phase in phases.items() if name not in read_as_written and phase.terms]
        return lean._keep(set(results).union(*(lean._closure(name) for name in results)))

    def _trained(self, model: str, start: str | None) -> str | None:
        """`start`, or where that phase got the model from if it does not train it."""
        while start is not None and model not in self.phases[(source := parse_start(start)[0])].train:
            item, start = parse_start(start)[2], self.origin(source, model)
            if (
                item is not None
                and start is not None
                and self.phases[parse_start(start)[0]].for_each_dataset
                and "[" not in start
            ):
                name, _, fraction = start.partition("@")
                start = f"{name}[{item}]" + (f"@{fraction}" if fraction else "")
        return start

    def _keep(self, phases: set[str]) -> TrialSpec:
        kept = {name: phase for name, phase in self.phases.items() if name in phases}
        lean = self.model_copy(update={"phases": kept})
        models = {model for name in kept for model in lean.models_of(name)}
        for name in kept:  # a remap's source is needed where the model is made
            todo = [m for m in lean.models_of(name) if lean.origin(name, m) is None]
            while todo:
                init = self.models[todo.pop()].init
                if isinstance(init, Remap) and init.from_ not in models:
                    models.add(init.from_)
                if isinstance(init, Remap) and lean.origin(name, init.from_) is None:
                    todo.append(init.from_)
        return lean.model_copy(update={"models": {n: m for n, m in self.models.items() if n in models}})


def _reaches(earlier: Phase, later: Phase) -> bool:
    """Whether `later`, or each of its branches, can go on from `earlier` without a branch being named."""
    return not earlier.for_each_dataset or (
        bool(later.for_each_dataset) and set(later.for_each_dataset) <= set(earlier.for_each_dataset)
    )


def parse_start(start: str) -> tuple[str, float, str | None]:
    """`phase`, `phase@0.5`, `phase[data]`, `phase[data]@0.5` -> (phase, fraction, data)."""
    name, _, fraction = start.partition("@")
    item = None
    if name.endswith("]"):
        name, _, item = name[:-1].partition("[")
    try:
        return name, float(fraction) if fraction else 1.0, item
    except ValueError:
        raise ValueError(f"{start!r} is no place to start; expected phase, phase@0.5, phase[data]") from None


def _known(what: str, name: str, among: Mapping[str, Any], at: str) -> None:
    if name not in among:
        raise ValueError(f"{at}: there is no {what} {name!r}; there is {', '.join(among)}")


def _refuse_cycle(edges: Mapping[str, list[str]], what: str) -> None:
    state: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if state.get(name) == 1:
            raise ValueError(f"{what} form a cycle: {' -> '.join((*trail[trail.index(name) :], name))}")
        if state.get(name) != 2:
            state[name] = 1
            for upstream in edges.get(name, ()):
                visit(upstream, (*trail, name))
            state[name] = 2

    for name in edges:
        visit(name, ())


def trial_id(spec: TrialSpec, fingerprints: Mapping[str, str]) -> str:
    """12 hex digits over the pruned spec; data and pretrained weights count by content, not by where they lie."""
    lean = spec.pruned()
    value = lean.model_dump(mode="json")
    value["data"] = {name: fingerprints[f"data:{name}"] for name in lean.data}
    for name, model in lean.models.items():
        if model.pretrained is not None:
            value["models"][name] = {"weights": fingerprints[f"model:{name}"], "dropout": model.dropout}
    return digest(value, 12)
