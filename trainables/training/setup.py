"""Starts a phase: loads its models, checks them, builds the optimizer, and restores a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainables.config.models import Remap
from trainables.config.phase import Lora, Phase, Stream
from trainables.config.phase_run import PhaseRun
from trainables.evaluation.model_size import flops_per_token
from trainables.evaluation.per_example import Placement
from trainables.generation.context import Autocast
from trainables.generation.sample import generation_mode
from trainables.models import build, lora, output_head, quantise, remap, tokenizer_check
from trainables.models.pretrained import Folder
from trainables.storage.checkpoints import load_checkpoint
from trainables.storage.files import log
from trainables.storage.phase_store import Corrupt
from trainables.training import forward, on_policy
from trainables.training.optimizers import make_optimizer
from trainables.training.phase_graph import (
    TaskHead,
    carried_projectors,
    head_of,
    longest,
    num_steps,
    origin_of,
    reads_head,
    seed_of,
    source_of,
    streams_of,
)
from trainables.training.readings import check_readings
from trainables.training.state import LearningStates, PhaseState, Progress, TrialContext
from trainables.training.streams import StreamLoader, open_reader

Loaders = Mapping[str, StreamLoader]


class PhaseInputs(NamedTuple):
    trial: TrialContext
    instance: PhaseRun
    spec: Phase
    seed: int
    streams: Loaders


def begin(trial: TrialContext, instance: PhaseRun) -> PhaseState:
    """Returns the phase as it starts, or, where it was interrupted, as its last checkpoint left it."""
    spec, seed = trial.spec.phases[instance.phase], seed_of(trial.spec, instance.phase)
    streams, label_flops = _open_streams(trial, instance, seed)
    inputs = PhaseInputs(trial, instance, spec, seed, streams)
    nets = load_models(inputs)
    check_models(inputs, nets)
    models = call_models(inputs, nets)
    optimizer = make_optimizer(spec, {name: parameters_of(spec, models.learning, name) for name in spec.train})
    replies = {name: on_policy.new_state() for name, stream in streams.items() if stream.spec.replies is not None}
    restored = restore(inputs, models, optimizer)
    progress, best_weights = restored or (Progress(flops=label_flops, replies=replies), {})
    eval_only = {f"scored on {item}": _open_scored(trial, item, spec.train) for item in spec.eval_only}
    if one_per_row := _without_packing(inputs, nets):
        log.info("one exchange per row: %s cannot separate packed exchanges", ", ".join(one_per_row))
        streams, eval_only = (
            {name: loader.unpacked() for name, loader in loaders.items()} for loaders in (streams, eval_only)
        )
    total = num_steps(spec, length=streams[spec.pace].length, num_sequences=streams[spec.pace].num)
    log.info("phase %s: from step %d of %d (%s)", instance, progress.step, total, trial.key(instance))
    share = spec.batch // trial.session.world
    micro = min(share, trial.environment.micro_batch or share)
    phase = PhaseState(
        trial,
        instance,
        spec,
        seed,
        streams,
        models,
        optimizer,
        total,
        progress,
        micro,
        share,
        eval_only=eval_only,
        best_weights=best_weights,
    )
    for stream in streams.values():
        for name in stream.spec.reply_models:
            phase.token_flops[name] = flops_per_token(nets[name], length=stream.length, device=trial.device)
    return phase


def load_model(trial: TrialContext, instance: PhaseRun, name: str, head: TaskHead | None) -> Any:
    """Loads a model as the instance starts with it: from an earlier phase, from pretrained weights, remapped, or fresh.

    `head`: of a task, drawn anew unless the model already had it; None: of a language model. A remap's source has the
    same.
    """
    spec, model = trial.spec, trial.spec.models[name]
    origin, seed = origin_of(spec, instance, name), seed_of(spec, instance.phase)
    data = trial.read_by(name)
    how: dict[str, Any] = {
        "name": name,
        "seed": seed,
        "special_ids": tokenizer_check.special_ids(data.tokenizer),
        "class_names": () if head is None or head.is_derived else getattr(trial.data[head.data], "class_names", ()),
    }
    num_labels = head.num_labels if head is not None else None
    if origin is not None:
        key = trial.key(origin.instance)
        published = trial.store.find(key)
        if published is None:
            raise Corrupt(key, "is not there")
        config, weights = published.configs[name], trial.store.weights(key, origin.entry)
        if head == head_of(spec, origin.instance, name):
            return build.restore(config, weights)
        return build.with_head(config, weights, num_labels, build.initial(model), **how)
    net = build.build(
        model,
        vocab_size=data.vocab_size,
        length=longest(spec),
        num_labels=num_labels,
        is_head_read=reads_head(spec, instance, name),
        **how,
    )
    if isinstance(model.init, Remap):
        source = load_model(trial, instance, model.init.from_, head)
        layers = remap.check(model.init.depth, source.config, net.config, model.init.width)
        remap.apply(source, net, layers, model.init.width)
    return net


def load_models(inputs: PhaseInputs) -> dict[str, Any]:
    """Loads the models that terms read or that generate replies onto the device, and freezes untrained ones."""
    trial, instance, spec, seed, streams = inputs
    read = dict.fromkeys(model for term in spec.terms.values() for model in term.reads)
    read |= dict.fromkeys(model for stream in streams.values() for model in stream.spec.reply_models)
    build.check_types(trial.spec.precision, {name: trial.spec.models[name] for name in read}, trial.device)
    nets = {name: load_model(trial, instance, name, head_of(trial.spec, instance, name)) for name in read}
    for name, net in nets.items():
        if (kind := trial.spec.models[name].quantize) is not None and name not in spec.train:
            quantise.quantise(net, kind, trial.device)
        net.to(trial.device).train(name in spec.train).requires_grad_(name in spec.train)
        trained_how = spec.train.get(name)
        if isinstance(trained_how, Lora):
            lora.attach(net, trained_how, name=name, seed=seed, with_head=_learns_head(inputs, name, trained_how))
        if trained_how is not None and spec.gradient_checkpointing:
            build.enable_gradient_checkpointing(net)
    return nets


def _learns_head(inputs: PhaseInputs, name: str, how: Lora) -> bool:
    """Returns whether a classifier's head learns beside the pairs: as asked, else where the head is drawn anew."""
    trial, instance = inputs.trial, inputs.instance
    head = head_of(trial.spec, instance, name)
    if head is None or how.head is not None:
        return head is not None and bool(how.head)
    source, origin = source_of(trial.spec, instance, name)
    if origin is not None:
        return head != head_of(trial.spec, origin.instance, source)
    model = trial.spec.models[source]
    if model.pretrained is None:
        return True
    names = () if head.is_derived else getattr(trial.data[head.data], "class_names", ())
    return bool(build.start_of(Folder.read(model.pretrained, model.revision), head.num_labels, names).fresh)


def check_models(inputs: PhaseInputs, nets: Mapping[str, Any]) -> None:
    """Raises ModelError for a model that cannot read its streams, TermError for a term that its models do not support,
    and ValueError for a batch or a term that several workers cannot share."""
    spec, streams, where = inputs.spec, inputs.streams, f"phase {inputs.instance}"
    for name, net in nets.items():
        reads = {term.on for term in spec.terms.values() if name in term.reads}
        for on in reads | {on for on, stream in streams.items() if name in stream.spec.reply_models}:
            if streams[on].num_labels is None:
                build.check_stream(net.config, streams[on].spec.corruption, name)
            else:
                build.check_task(net.config, name, is_mixed=streams[on].spec.mix is not None)
    forward.check_layers(spec.terms, nets)
    check_readings(inputs.trial.spec, inputs.instance, inputs.trial.data)
    world = inputs.trial.session.world
    if spec.batch % world:
        raise ValueError(f"{where}: a batch of {spec.batch} cannot be shared by {world} workers")
    vanishing = next((name for name, term in spec.terms.items() if term.weight.can_be_zero), None)
    if world > 1 and vanishing and _reads_below_logits(spec):
        raise ValueError(f"{where}: beside terms inside models {vanishing} may not reach 0 on several workers")


def call_models(inputs: PhaseInputs, nets: Mapping[str, Any]) -> forward.Models:
    """Adds heads and the projectors of terms to the models, and wraps them where several ranks exchange gradients."""
    trial, instance, spec, seed, _ = inputs
    with trial.autocast():
        heads = {name: output_head.head_of(nets[name]) for name in _language_models(inputs, nets)}
    projectors = forward.make_projectors(spec.terms, nets, seed=seed, phase=str(instance))
    _carry_on(trial, instance, projectors)
    vocab_sizes = {name: trial.read_by(name).vocab_size for name in nets}
    models = forward.Models(nets, frozenset(spec.train), heads, vocab_sizes, projectors=projectors)
    learning = {name: module.to(trial.device) for name, module in models.learning.items()}
    models = replace(models, wrapped=learning)
    if _reads_below_logits(spec):
        _freeze_unreached(inputs, models)
    if trial.session.world > 1:  # gradients are averaged over ranks during the backward
        device_ids = [torch.cuda.current_device()] if trial.device.startswith("cuda") else None
        wrap = partial(DistributedDataParallel, device_ids=device_ids)
        models = replace(models, wrapped={name: wrap(module) for name, module in learning.items()})
    return models


def _carry_on(trial: TrialContext, instance: PhaseRun, projectors: Mapping[str, forward.Projector]) -> None:
    """Loads the projectors that an earlier phase trained; one for other layers or widths stays as drawn."""
    for term, run in carried_projectors(trial.spec, instance).items():
        state = trial.store.weights(trial.key(run), forward.projector_name(term))
        own = projectors[term].state_dict()
        if {name: tensor.shape for name, tensor in own.items()} == {
            name: tensor.shape for name, tensor in state.items()
        }:
            projectors[term].load_state_dict(state)
        else:
            log.info("phase %s: the projector of %s is drawn anew: that of %s has other shapes", instance, term, run)


def learning_states(models: forward.Models, *, is_copy: bool = False) -> LearningStates:
    """Returns the tensors of the modules that learn, of LoRA the pairs alone; with `is_copy` on the CPU."""
    states = {
        name: lora.adapter_state(module) if lora.is_attached(module) else module.state_dict()
        for name, module in models.learning.items()
    }
    if not is_copy:
        return states
    return {name: {key: t.detach().cpu().clone() for key, t in state.items()} for name, state in states.items()}


def load_learning_states(models: forward.Models, states: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    for name, state in states.items():
        module = models.learning[name]
        (lora.load_adapter_state if lora.is_attached(module) else nn.Module.load_state_dict)(module, state)


def restore(
    inputs: PhaseInputs, models: forward.Models, optimizer: torch.optim.Optimizer
) -> tuple[Progress, LearningStates] | None:
    """Loads the furthest checkpoint of the phase, if there is one, into models and optimizer. Returns the progress, and
    the weights that early stopping keeps."""
    trial, environment = inputs.trial, inputs.trial.environment
    folders = (*environment.earlier, environment.folder)
    saved = load_checkpoint(environment.storage, folders, trial.key(inputs.instance))
    if saved is None:
        return None
    load_learning_states(models, saved.pop("models"))
    optimizer.load_state_dict(saved.pop("optimizer"))
    best_weights = saved.pop("best_weights", {})
    return Progress(**{key: value for key, value in saved.items() if key != "key"}), best_weights


def _reads_below_logits(spec: Phase) -> bool:
    return any(term.inputs != "logits" for term in spec.terms.values())


def _language_models(inputs: PhaseInputs, nets: Mapping[str, Any]) -> list[str]:
    return [name for name in nets if head_of(inputs.trial.spec, inputs.instance, name) is None]


def _freeze_unreached(inputs: PhaseInputs, models: forward.Models) -> None:
    """Freezes parameters that no term's gradient reaches: those above the last layer that a term reads.

    Several ranks would wait for their gradients in vain. One backward over one sequence shows which they are.
    """
    trial, instance, spec, seed, streams = inputs
    batches = (stream.batches(0, spec.batch, seed, str(instance)) for stream in streams.values())
    parts = {name: batch.rows(0, 1).to(trial.device) for read in batches for name, batch in read.items()}
    context = forward.ForwardContext(trial.device, trial.autocast, dropout=lambda *_: 0)
    loss, _ = forward.run_terms(models, spec.terms, parts, dict.fromkeys(spec.terms, 1.0), context=context)
    loss.backward()  # type: ignore[no-untyped-call]
    for module in models.wrapped.values():
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None


def _without_packing(inputs: PhaseInputs, nets: Mapping[str, Any]) -> list[str]:
    """Finds the models that read exchanges but do not support packing."""
    spec, streams = inputs.spec, inputs.streams
    terms = [term for term in spec.terms.values() if streams[term.on].data.scoring is not None]
    readers = {model for term in terms for model in term.reads}
    if spec.eval_only:
        readers |= set(spec.train) & set(_language_models(inputs, nets))
    return [name for name in sorted(readers) if not supports_packing(nets[name], inputs.trial.autocast)]


def supports_packing(net: Any, autocast: Autocast) -> bool:
    """Tests by a forward whether a model separates sequences in one row by their position ids alone.

    Models that do not take position ids (ALiBi, recurrent models), or rely on the attention mask, read across the
    border.
    """
    device = next(net.parameters()).device
    ids_BT = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, 3, 4]], device=device)
    position_ids_BT = torch.tensor([[0, 1, 2, 0, 1]], device=device).expand(2, 5)
    with generation_mode(net), autocast():
        before_NV, after_NV = (
            output_head.logits_at(
                net, ids_BT[row, None], torch.tensor([3, 4], device=device), position_ids_BT=position_ids_BT[row, None]
            )
            for row in (0, 1)
        )
    return bool((before_NV - after_NV).abs().max() <= 1e-5 * before_NV.abs().max())


def _open_streams(trial: TrialContext, instance: PhaseRun, seed: int) -> tuple[dict[str, StreamLoader], float]:
    """Opens the streams of an instance, and counts the FLOPs of computing their labels."""
    loaders, flops, phase = dict[str, StreamLoader](), 0.0, trial.spec.phases[instance.phase]
    for name, stream in streams_of(trial.spec, instance).items():
        num_labels = trial.spec.data[stream.data].num_labels
        head = TaskHead(stream.data, num_labels, False) if num_labels is not None else None
        loaders[name], spent = open_reader(
            name,
            stream,
            {model: trial.read_by(model, stream.data) for model in phase.readers(name)},
            lambda model, head=head, item=stream.data: (  # type: ignore[misc]
                load_model(trial, instance, model, head),
                trial.read_by(model, item),
            ),
            seed=seed,
            phase=str(instance),
            on=Placement(trial.device, trial.autocast),
        )
        flops += spent
    return loaders, flops


def _open_scored(trial: TrialContext, item: str, models: Iterable[str]) -> StreamLoader:
    """Opens a data set that models are only evaluated on."""
    read_by = {model: trial.read_by(model, item) for model in models}
    return StreamLoader(item, Stream(data=item, corruption=None), next(iter(read_by.values())), others=read_by)


def parameters_of(spec: Phase, learning: Mapping[str, Any], model: str) -> list[Any]:
    """Lists the learning parameters of a model, and of the projectors of the terms that teach the model."""
    projectors = [forward.projector_name(name) for name, term in spec.terms.items() if term.target == model]
    modules = [learning[name] for name in (model, *projectors) if name in learning]
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
