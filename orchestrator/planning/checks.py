"""What only shows when a study's models meet its data; each failure is a StudyError that names the place in the file."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from orchestrator.planning.meta_models import Shapes
from orchestrator.study.errors import StudyError
from orchestrator.study.schema import Study
from trainables.config.errors import DataError, ModelError
from trainables.config.models import Remap
from trainables.config.phase import Lora
from trainables.config.phase_run import PhaseRun
from trainables.config.trial import TrialSpec
from trainables.data.prepared import Prepared
from trainables.generation import kv_cache
from trainables.generation.context import GenerationError
from trainables.models import build, initialise, quantise, remap, tokenizer_check
from trainables.training import forward, optimizers
from trainables.training.phase_graph import head_of, longest, phase_runs, reads_head, source_of, streams_of
from trainables.training.readings import check_readings


def check_trial(study: Study, spec: TrialSpec, corpora: Mapping[str, Prepared], shapes: Shapes) -> None:
    """Checks a pruned trial: types of the device, tokenizers, weights, remaps, training, heads. Raises StudyError.

    `corpora`: of the study's data; a trial may name others.
    """
    if study.slot.gpus and torch.cuda.is_available():  # else another machine trains, and reports this itself
        with _named(f"{study.file}: trial.", ""):
            build.check_types(spec.precision, spec.models, "cuda")
    data = {name: corpora.get(name) or next(iter(corpora.values())) for name in spec.readings()}
    for name, model in spec.models.items():
        with _named(f"{study.file}: ", f"models.{name}: "):
            if model.pretrained is not None:
                shapes.folder(model)
    _check_tokenizers(study, spec, data)
    nets: Callable[[str], Any] = lambda name: shapes.net(spec.models[name], longest(spec))  # noqa: E731
    with _named(f"{study.file}: ", "models: "):
        configs = {name: shapes.config(model, longest(spec)) for name, model in spec.models.items()}
        for name, model in spec.models.items():
            _check_pretrained(study, spec, name, net=nets(name), vocab_size=shapes.vocabulary(model)[0])
            if isinstance(model.init, Remap):
                _check_rows(spec, name, model.init.from_, data)
                remap.check(model.init.depth, configs[model.init.from_], configs[name], model.init.width)
        for name in spec.phases:
            _check_phase(study, spec, name, shapes)
        for run in phase_runs(spec):
            _check_reads(spec, run, configs, nets)
            check_readings(spec, run, data)
    with _named(f"{study.file}: ", "models."):
        for run in phase_runs(spec):
            fresh_heads(spec, run, corpora, shapes)


@contextmanager
def _named(file: str, path: str) -> Iterator[None]:
    """Turns what a check raises into a StudyError with the place in the file."""
    try:
        yield
    except forward.TermError as error:
        raise StudyError(f"{file}phases: {error}") from None
    except (ModelError, DataError, GenerationError) as error:
        raise StudyError(f"{file}{path}{error}") from None


def _check_tokenizers(study: Study, spec: TrialSpec, corpora: Mapping[str, Prepared]) -> None:
    """Checks that a model reads all data of a trial with one tokenizer, which is that of its pretrained weights."""
    first_item = next(iter(spec.data))
    for name, (item, tokenizer) in spec.readings().items():
        first_name = name.replace(item, first_item, 1)
        corpus, first = corpora[name], corpora[first_name]
        if corpus.tokenizer_identity == first.tokenizer_identity:
            continue
        vocabularies = {f"data {n!r}": c.tokenizer.get_vocab() for n, c in ((name, corpus), (first_name, first))}
        if difference := tokenizer_check.difference_of(vocabularies):
            one = f"tokenizers.{tokenizer}" if tokenizer else "tokenizer"
            raise StudyError(f"{study.file}: data.{item}: {difference}; expected one {one} for all data of a trial")
    for name, model in spec.models.items():
        with _named(f"{study.file}: ", f"models.{name}: "):
            tokenizer_check.check_tokenizer(model, corpora[spec.reading(first_item, name)].tokenizer, first_item)


def _check_rows(spec: TrialSpec, name: str, source: str, corpora: Mapping[str, Prepared]) -> None:
    """Checks that copied rows of embeddings are of tokens that mean the same."""
    item = next(iter(spec.data))
    ours, theirs = (corpora[spec.reading(item, model)] for model in (name, source))
    if ours.tokenizer_identity != theirs.tokenizer_identity:
        raise ModelError(
            f"{name}: a remap copies rows of embeddings, and the tokenizers of {name} ({ours.vocab_size:,} tokens) and of "
            f"{source} ({theirs.vocab_size:,}) differ; expected one tokenizer, or init: {{kind: random}}"
        )


def _check_pretrained(study: Study, spec: TrialSpec, name: str, *, net: Any, vocab_size: int) -> None:
    """Checks that pretrained weights have a row for each of the data's tokens, and as many positions as the longest sequence has."""
    model = spec.models[name]
    if model.pretrained is None:
        return
    at = f"{study.file}: models.{name}: {model.pretrained!r}"
    if (rows := getattr(net.config, "vocab_size", None)) is not None and rows < vocab_size:
        raise StudyError(
            f"{at} has {rows} rows of embeddings, and the data's tokenizer has {vocab_size} tokens; expected the tokenizer "
            "of the model"
        )
    positions = initialise.num_positions(net)
    if positions is not None and positions < longest(spec):
        data = max(spec.data, key=lambda item: spec.data[item].length)
        raise StudyError(
            f"{at} has {positions} positions, and sequences of data.{data} have up to {spec.data[data].length} tokens; "
            f"expected data.{data}.length: {positions} at most"
        )


def fresh_heads(spec: TrialSpec, run: PhaseRun, corpora: Mapping[str, Prepared], shapes: Shapes) -> list[str]:
    """Says which heads are drawn anew when a run starts, though the trunk has weights.

    Raises ModelError where pretrained weights do not fit, and where the run reads such a head without training it.
    """
    lines = list[str]()
    for name in spec.models_of(run.phase):
        head, (source, origin) = head_of(spec, run, name), source_of(spec, run, name)
        is_read, how = reads_head(spec, run, name), spec.phases[run.phase].train.get(name)
        if head is None and isinstance(how, Lora) and how.head:
            raise ModelError(
                f"{name}: `head: true` is for classifiers, and phase {run} trains a language model; remove it, or name a data "
                "set of a task"
            )
        if origin is not None:
            is_fresh = head is not None and head != head_of(spec, origin.instance, source)
        elif spec.models[source].pretrained is not None:
            read = corpora.get(head.data) if head is not None and not head.is_derived else None
            names, num_labels = tuple(getattr(read, "class_names", ())), head.num_labels if head is not None else None
            try:
                is_fresh = bool(shapes.start(spec.models[source], num_labels, names, is_head_read=is_read).fresh)
            except ModelError as error:
                raise ModelError(f"{source}: {error}") from None
        else:
            continue
        if head is None or not is_fresh or not is_read:
            continue
        if how is None or (isinstance(how, Lora) and how.head is False):
            why = "reads it without training" if how is None else "trains LoRA's pairs alone"
            raise ModelError(
                f"{source}: has no head for the outputs of data.{head.data}, and phase {run} {why}; expected a classifier of "
                f"these, or an earlier phase on data.{head.data} with train: {{{name}: full}}"
            )
        lines.append(f"{name:12} phase {run} draws its head for the {head.num_labels} outputs of data.{head.data} anew")
    return lines


def _check_phase(study: Study, spec: TrialSpec, name: str, shapes: Shapes) -> None:
    """Checks that the workers share the batch, the optimizers are installed, and the models can be trained as the phase says."""
    phase, at = spec.phases[name], f"{study.file}: trial.phases.{name}"
    if phase.batch % study.slot.workers:
        raise StudyError(
            f"{at}.batch: {phase.batch} cannot be shared by slot.workers {study.slot.workers}; expected a multiple"
        )
    with _named(f"{at}", ": "):
        optimizers.check_optimizers(phase)
        for model, how in phase.train.items():
            net = shapes.net(spec.models[model], longest(spec), how=how)
            if phase.gradient_checkpointing:
                build.enable_gradient_checkpointing(copy.deepcopy(net))
        for model in spec.models_of(name):
            if model not in phase.train and (kind := spec.models[model].quantize) is not None:
                quantise.check(kind)


def _check_reads(spec: TrialSpec, run: PhaseRun, configs: Mapping[str, Any], nets: Callable[[str], Any]) -> None:
    """Checks that each model has the head that its streams need, and those that reply have a cache of keys and values."""
    phase, streams = spec.phases[run.phase], streams_of(spec, run)
    replying = {model for stream in streams.values() for model in stream.reply_models}
    for term in phase.terms.values():
        stream = streams[term.on]
        for name in term.reads:
            data = spec.data[stream.data]
            if data.num_labels is not None:
                build.check_task(configs[name], name, is_mixed=stream.mix is not None)
                continue
            build.check_stream(configs[name], stream.corruption, name)
            if data.scoring is not None and name in phase.train:  # an evaluation scores its own replies
                replying.add(name)
    for name in replying:
        kv_cache.check(nets(name))
    forward.check_layers(phase.terms, {name: nets(name) for term in phase.terms.values() for name in term.reads})
