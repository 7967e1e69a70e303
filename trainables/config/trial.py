"""A trial: data, models and phases as one value, with checks of what holds between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trainables.config.data import Data, SameTokenizer
from trainables.config.extension import installed
from trainables.config.models import Model, Random, Remap
from trainables.config.phase import Fold, Phase
from trainables.config.phase_run import PhaseRun, Start
from trainables.config.stream_checks import StreamRead, check_stream
from trainables.config.value import Name, Value, digest, single

NUMERICS = 2  # raised whenever a stored reference trajectory changes: it is part of every phase's key


class TrialSpec(Value):
    """Everything that can change a number in a trial's results."""

    data: Annotated[dict[Name, Data], Field(min_length=1), single("kind", "corpus", Data)]  # name -> data set
    precision: Literal["fp32", "bf16"] = "fp32"  # of the computation; bf16 needs a GPU
    models: dict[Name, Model] = Field(min_length=1)  # name -> model
    phases: dict[Name, Phase] = Field(min_length=1)  # name -> phase
    seed: int = Field(0, ge=0)
    # SHA-256 of the user's own file; set by `--extension` and never in a study; absent from a dump without one
    extension: str | None = Field(None, exclude_if=lambda value: value is None)

    @model_validator(mode="after")
    def _the_parts_fit_together(self) -> TrialSpec:
        own = installed()
        if self.extension is not None and (own is None or own.sha256 != self.extension):
            raise ValueError(
                f"extension: needs the file of SHA-256 {self.extension[:12]}…; expected --extension FILE.py"
            )
        known: dict[str, Mapping[str, Any]] = {"model": self.models, "data set": self.data}
        for path, what, name in _references(self):
            _known(what, name, known[what], path)
        for name, data in self.data.items():
            same = data.tokenizer
            if isinstance(same, SameTokenizer) and isinstance(self.data[same.as_].tokenizer, SameTokenizer):
                raise ValueError(f"data.{name}.tokenizer.as: {same.as_!r} has no tokenizer of its own")
            if isinstance(same, SameTokenizer) and data.tokenizers:
                raise ValueError(f"data.{name}.tokenizers: these are lent as well; name them in data.{same.as_}")
        for name, model in self.models.items():
            for item, data in self.data.items() if model.tokenizer is not None else ():
                if model.tokenizer not in data.tokenizers and not isinstance(data.tokenizer, SameTokenizer):
                    there = ", ".join(data.tokenizers) or "none"
                    raise ValueError(
                        f"models.{name}.tokenizer: there is no {model.tokenizer!r} in data.{item}.tokenizers; there is {there}"
                    )
        if all(term.weight.is_off for phase in self.phases.values() for term in phase.terms.values()):
            raise ValueError("phases: every term has weight 0, so that no model is trained")
        _check_start(self)
        for name, phase in self.phases.items():
            for stream_name, stream in phase.streams.items():
                data_of = {item: self.data[item] for item in phase.for_each_dataset or (stream.data,)}
                read = StreamRead(name, phase, stream_name, stream, data_of)
                check_stream(read)
                _check_labels(self, read)
        _check_heads(self)
        _check_eval_only(self)
        _check_quantize(self)
        _check_widths(self)
        _refuse_cycle({n: [m.init.from_] for n, m in self.models.items() if isinstance(m.init, Remap)}, "remaps")
        _refuse_cycle({n: [m.like] for n, m in self.models.items() if isinstance(m.like, str)}, "models.*.like")
        for name in self.models:
            self.models[name] = self._self_contained(name)
        _refuse_cycle({name: self._upstream(name) for name in self.phases}, "phases")
        return self

    def _self_contained(self, name: str) -> Model:
        """Returns the model with the value of that which it is like, of which only the config counts."""
        model = self.models[name]
        if not isinstance(model.like, str):
            return model
        unset = {"init": Random(), "dtype": "fp32", "tokenizer": None}
        return model.model_copy(update={"like": self._self_contained(model.like).model_copy(update=unset)})

    def origin(self, phase: str, model: str) -> str | None:
        """Returns the phase (`phase`, `phase@0.5`, `phase[data]`) whose weights `model` has when `phase` starts, or None.

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
        """Returns the models that a phase trains or reads, in the order of the file."""
        return tuple(name for name in self.models if name in self.phases[phase].models)

    def reading(self, item: str, model: str) -> str:
        """Names a data set as a model reads it: `data`, or `data/tokenizer` where the model has another tokenizer."""
        tokenizer = self.models[model].tokenizer
        return item if tokenizer is None else f"{item}/{tokenizer}"

    def readings(self) -> dict[str, tuple[str, str | None]]:
        """Maps each `reading` that there is, beside every data set with its own tokenizer, to (data set, tokenizer)."""
        named = sorted({model.tokenizer for model in self.models.values() if model.tokenizer is not None})
        own: dict[str, tuple[str, str | None]] = {item: (item, None) for item in self.data}
        return own | {f"{item}/{tokenizer}": (item, tokenizer) for item in self.data for tokenizer in named}

    def _needed(self, phase: str) -> dict[str, str | None]:
        """Maps each model that `phase` uses, sources of remaps included, to its origin."""
        needed, todo = dict[str, str | None](), list(self.models_of(phase))
        while todo:
            model = todo.pop()
            if model in needed:
                continue
            needed[model] = self.origin(phase, model)
            init = self.models[model].init
            if needed[model] is None and isinstance(init, Remap):
                todo.append(init.from_)
        return needed

    def _upstream(self, phase: str) -> list[str]:
        """Returns the phases in which the models of `phase` have their origin."""
        return [Start.parse(origin).run.phase for origin in self._needed(phase).values() if origin is not None]

    def order(self) -> tuple[str, ...]:
        """Returns the phases such that each comes after those it needs; otherwise in the order of the study file."""
        done: list[str] = []

        def visit(name: str) -> None:
            if name not in done:
                for upstream in self._upstream(name):
                    visit(upstream)
                done.append(name)

        for name in self.phases:
            visit(name)
        return tuple(done)

    def upto(self, *phases: str) -> TrialSpec:
        """Returns the trial that runs only these phases and those that they need."""
        return self._keep(self._closure(*phases))

    def _closure(self, *phases: str) -> set[str]:
        """Returns the phases with all that they need."""
        closure, todo = set[str](), list(phases)
        while todo:
            if (phase := todo.pop()) not in closure:
                closure.add(phase)
                todo += self._upstream(phase)
        return closure

    def pruned(self) -> TrialSpec:
        """Removes what no result depends on: terms that are off, phases that only they read, models that nothing uses.

        A phase that no other phase reads in the study file is a result and stays, unless all its terms are off. Data
        stay too: models are made for the longest sequence, and that must not change when a term is switched off.
        """
        read_as_written = {up for name in self.phases for up in self._upstream(name)}
        phases = {name: phase.pruned() for name, phase in self.phases.items()}
        lean = self.model_copy(update={"phases": phases})
        for name, phase in phases.items():  # a phase that no longer trains a model passes on the weights from before
            start = {model: lean._trained(model, start) for model, start in phase.start.items()}
            phases[name] = phase.model_copy(update={"start": {m: s for m, s in start.items() if s is not None}})
        results = [name for name, phase in phases.items() if name not in read_as_written and phase.terms]
        return lean._keep(lean._closure(*results))

    def _trained(self, model: str, start: str | None) -> str | None:
        """Returns `start`, or the origin of the model in that phase if the phase does not train the model."""
        while start is not None and model not in self.phases[(run := Start.parse(start).run).phase].train:
            start = self.origin(run.phase, model)
            if start is not None and run.item is not None:
                source, fraction = Start.parse(start)
                if source.item is None and self.phases[source.phase].for_each_dataset:
                    start = str(Start(PhaseRun(source.phase, run.item), fraction))
        return start

    def _keep(self, phases: set[str]) -> TrialSpec:
        lean = self.model_copy(update={"phases": {n: phase for n, phase in self.phases.items() if n in phases}})
        models = {model for name in lean.phases for model in lean._needed(name)}
        return lean.model_copy(update={"models": {n: m for n, m in self.models.items() if n in models}})


def _references(spec: TrialSpec) -> Iterator[tuple[str, str, str]]:
    """Yields (path, "model" or "data set", name) for each name by which one part refers to another."""
    remaps = {name: model.init.from_ for name, model in spec.models.items() if isinstance(model.init, Remap)}
    yield from ((f"models.{name}.init.from", "model", source) for name, source in remaps.items())
    likes = {name: model.like for name, model in spec.models.items() if isinstance(model.like, str)}
    yield from ((f"models.{name}.like", "model", other) for name, other in likes.items())
    for name, phase in spec.phases.items():
        at = f"phases.{name}"
        yield from ((f"{at}.train", "model", model) for model in phase.train)
        yield from ((f"{at}.start", "model", model) for model in phase.start)
        for term_name, term in phase.terms.items():
            yield from ((f"{at}.terms.{term_name}", "model", model) for model in term.reads)
        yield from ((f"{at}.for_each_dataset", "data set", item) for item in phase.for_each_dataset)
        for stream_name, stream in phase.streams.items():
            on = f"{at}.streams.{stream_name}"
            if not phase.for_each_dataset:
                yield f"{on}.data", "data set", stream.data
            for model in stream.models:
                is_labeller = stream.labels is not None and model in stream.labels.of
                yield f"{on}.{'labels.of' if is_labeller else 'replies'}", "model", model
        yield from ((f"{at}.eval_only", "data set", item) for item in phase.eval_only)
    for name, data in spec.data.items():
        if isinstance(data.tokenizer, SameTokenizer):
            yield f"data.{name}.tokenizer.as", "data set", data.tokenizer.as_


def _check_start(spec: TrialSpec) -> None:
    for name, phase in spec.phases.items():
        for model, start in phase.start.items():
            path = f"phases.{name}.start.{model}"
            run, fraction = Start.parse(start)
            source, item = run.phase, run.item
            _known("phase", source, spec.phases, path)
            earlier = spec.phases[source]
            if model not in earlier.train:
                raise ValueError(f"{path}: phase {source!r} does not train {model!r}")
            if fraction != 1.0 and fraction not in earlier.save_at:
                raise ValueError(f"{path}: phase {source!r} keeps no weights at {fraction:g}; add it to its `save_at`")
            if item not in earlier.for_each_dataset if item is not None else not _reaches(earlier, phase):
                runs = ", ".join(f"{source}[{i}]" for i in earlier.for_each_dataset) or source
                raise ValueError(f"{path}: {start!r} is not there; expected {runs}")


def _check_labels(spec: TrialSpec, read: StreamRead) -> None:
    if (labels := read.stream.labels) is None:
        return
    for item, data in read.data.items():
        if data.num_labels == 1:
            raise ValueError(f"{read.path}.labels: {item} is a regression, where no answer is right or wrong")
    if isinstance(labels.thresholds, dict) and labels.thresholds.keys() != read.data.keys():
        raise ValueError(
            f"{read.path}.labels.thresholds: given for {', '.join(labels.thresholds)}; expected thresholds for the data "
            f"sets that the stream reads: {', '.join(read.data)}"
        )
    num = len(labels.of)
    for fold, labeller in enumerate(labels.of):
        start = None if labeller in read.phase.train else spec.origin(read.phase_name, labeller)
        if start is None:
            raise ValueError(f"{read.path}.labels.of: {labeller!r} must have been trained by an earlier phase")
        taught = spec.phases[Start.parse(start).run.phase].streams.values()
        if num > 1 and all(other.fold != Fold(num=num, held_out=fold) for other in taught):
            raise ValueError(
                f"{read.path}.labels.of: {labeller!r} labels fold {fold} of {num}, which it must not have seen; "
                f"train it with fold: {{num: {num}, held_out: {fold}}}"
            )


def _check_heads(spec: TrialSpec) -> None:
    """Checks that a model has one head in a phase: streams of a task are read by no model that reads another stream."""
    for name, phase in spec.phases.items():
        for model in spec.models_of(name):
            streams = [phase.streams[on] for on in {t.on for t in phase.terms.values() if model in t.reads}]
            heads = {
                ("" if phase.for_each_dataset else s.data, s.labels and s.labels.model_dump_json()) for s in streams
            }
            items = {item for stream in streams for item in phase.for_each_dataset or (stream.data,)}
            if len(heads) > 1 and any(spec.data[item].num_labels is not None for item in items):
                raise ValueError(f"phases.{name}: {model!r} reads several streams, and a task needs a head of its own")


def _check_eval_only(spec: TrialSpec) -> None:
    for name, phase in spec.phases.items():
        for item in phase.eval_only:
            if "replies" not in spec.data[item].format.supports:
                raise ValueError(f"phases.{name}.eval_only: {item} has no replies to score; expected instructions")
            if item in (phase.for_each_dataset or {stream.data for stream in phase.streams.values()}):
                raise ValueError(f"phases.{name}.eval_only: {item} is scored anyway, as the phase reads it; remove it")


def _check_quantize(spec: TrialSpec) -> None:
    for name, model in spec.models.items():
        if model.quantize is not None and all(
            name in spec.phases[phase].train for phase in spec.phases if name in spec.models_of(phase)
        ):
            raise ValueError(
                f"models.{name}.quantize: weights are kept in {model.quantize} where a phase reads a model and does not "
                f"train it, and no phase does so with {name!r}; remove quantize"
            )


def _check_widths(spec: TrialSpec) -> None:
    for name, phase in spec.phases.items():
        for term_name, term in phase.terms.items():
            if term.inputs == "hidden_states" and not term.has_projector:
                widths = {model: spec.models[model].width for model in term.reads}
                if None not in widths.values() and len(set(widths.values())) > 1:
                    about = ", ".join(f"{model} has {width}" for model, width in widths.items())
                    raise ValueError(f"phases.{name}.terms.{term_name}: widths differ ({about}); set projector: true")


def _reaches(earlier: Phase, later: Phase) -> bool:
    """Returns whether `later`, or each of its branches, can start from `earlier` without a branch being named."""
    return not earlier.for_each_dataset or (
        bool(later.for_each_dataset) and set(later.for_each_dataset) <= set(earlier.for_each_dataset)
    )


def _known(what: str, name: str, among: Mapping[str, Any], at: str) -> None:
    if name not in among:
        raise ValueError(f"{at}: there is no {what} {name!r}; there is {', '.join(among)}")


def _refuse_cycle(edges: Mapping[str, Sequence[str]], what: str) -> None:
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        raise ValueError(f"{what} form a cycle: {' -> '.join(reversed(error.args[1]))}") from None


def trial_id(spec: TrialSpec, fingerprints: Mapping[str, str]) -> str:
    """Returns 12 hex digits over the pruned spec; data and pretrained weights count by content, not by path."""
    lean = spec.pruned()
    value = lean.model_dump(mode="json")
    value["data"] = {name: fingerprints[f"data:{name}"] for name in lean.data}
    for name, model in lean.models.items():
        if model.pretrained is not None:
            own = model.model_dump(mode="json", include={"dtype", "quantize"}, exclude_defaults=True)
            value["models"][name] = {"weights": fingerprints[f"model:{name}"], "dropout": model.dropout, **own}
        elif model.like is not None:
            value["models"][name] = model.by_content(fingerprints.get(f"model:{name}"))
        if model.tokenizer is not None:
            read = {item: fingerprints[f"data:{lean.reading(item, name)}"] for item in lean.data}
            value["models"][name] = {**value["models"][name], "tokenizer": read}
    return digest(value, 12)
