"""How a phase begins: its models as they are then, its streams, its optimizer, and the state that a checkpoint has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainables.config.data import Tasks
from trainables.config.models import Remap
from trainables.config.phase import Lora, Phase, Stream
from trainables.config.terms import Inner, InterpolatedKL, reads, target
from trainables.data.instructions.exchanges import ExchangeSet
from trainables.evaluation.model_size import flops_per_token
from trainables.models import build, lora, output_head, remap, tokenizer_check
from trainables.storage.checkpoints import load_checkpoint
from trainables.storage.files import log
from trainables.storage.phase_store import Corrupt
from trainables.training import controllers, forward, on_policy
from trainables.training.optimizers import make_optimizer
from trainables.training.phase_graph import (
    PhaseRun,
    TaskHead,
    head_of,
    longest,
    num_steps,
    origin_of,
    seed_of,
    streams_of,
)
from trainables.training.schedules import can_be_zero
from trainables.training.state import Autocast, PhaseState, Progress, TrialContext, makers_of
from trainables.training.streams import StreamLoader, open_reader


def make(run: TrialContext, instance: PhaseRun, name: str, head: TaskHead | None) -> Any:
    """The model as it is when the instance starts: from an earlier phase, from pretrained weights, remapped, or fresh.

    `head`: of a task, drawn anew unless the model had it before; None: of a language model. A remap's source has the same.
    """
    spec, model = run.spec, run.spec.models[name]
    origin, seed = origin_of(spec, instance, name), seed_of(spec, instance.phase)
    num_labels = head.num_labels if head is not None else None
    if origin is not None:
        key = run.key(origin.instance)
        published = run.store.find(key)
        if published is None:
            raise Corrupt(key, "is not there")
        config, weights = published.configs[name], run.store.weights(key, origin.entry)
        if head == head_of(spec, origin.instance, name):
            return build.restore(config, weights)
        return build.with_head(config, weights, num_labels, build.initial(model), name=name, seed=seed)
    data = next(iter(run.data.values()))
    net = build.build(
        model,
        name=name,
        seed=seed,
        vocab_size=data.vocab_size,
        special_ids=tokenizer_check.special_ids(data.tokenizer),
        length=longest(spec),
        num_labels=num_labels,
    )
    if isinstance(model.init, Remap):
        source = make(run, instance, model.init.from_, head)
        layers = remap.check(model.init.depth, source.config, net.config, model.init.width)
        remap.apply(source, net, layers, model.init.width)
    return net


def begin(run: TrialContext, instance: PhaseRun) -> PhaseState:
    """Models, optimizer and, where the phase was interrupted, the state in which it was."""
    spec, at, seed = run.spec.phases[instance.phase], run.at, seed_of(run.spec, instance.phase)
    streams, flops = _readers(run, instance, seed)
    read = dict.fromkeys(model for term in spec.terms.values() for model in reads(term))
    read |= dict.fromkeys(model for stream in streams.values() for model in makers_of(stream.spec))
    build.check_types(run.spec.precision, {name: run.spec.models[name] for name in read}, at.device)
    nets = {name: make(run, instance, name, head_of(run.spec, instance, name)) for name in read}
    for name, net in nets.items():
        net.to(at.device).train(name in spec.train).requires_grad_(name in spec.train)
        how = spec.train.get(name)
        if isinstance(how, Lora):
            lora.attach(net, how, name=name, seed=seed)
        if how is not None and spec.gradient_checkpointing:
            build.recompute(net)
        made_on = {on for on, stream in streams.items() if name in makers_of(stream.spec)}
        for on in made_on | {term.on for term in spec.terms.values() if name in reads(term)}:
            if streams[on].num_labels is None:
                build.check_stream(net.config, streams[on].spec.corruption, name)
            else:
                build.check_task(net.config, name)
    forward.check_inner(spec.terms, nets)
    projectors = forward.make_projectors(spec.terms, nets, seed=seed, phase=str(instance))
    language = [name for name in nets if head_of(run.spec, instance, name) is None]
    with run.autocast():
        heads = {name: output_head.head_of(nets[name]) for name in language}
    vocab_size = next(iter(run.data.values())).vocab_size
    called = forward.Models(nets, frozenset(spec.train), heads, vocab_size, projectors=projectors)
    learning = {name: module.to(at.device) for name, module in called.learning.items()}
    called = replace(called, wrapped=learning)
    if any(isinstance(term, Inner) for term in spec.terms.values()):
        _freeze_unreached(run, instance, called, streams)
    if run.session.world > 1:
        called = replace(called, wrapped={name: _wrap(net, at.device) for name, net in learning.items()})
    optimizer = make_optimizer(spec, {name: parameters_of(spec, learning, name) for name in spec.train})
    total = num_steps(spec, length=streams[spec.pace].length, num_sequences=streams[spec.pace].num)
    progress = Progress(flops=flops, **_controls(spec))
    saved = load_checkpoint(at.storage, (*at.earlier, at.folder), run.key(instance))
    if saved is not None:
        for name, state in saved.pop("models").items():
            is_adapter = lora.is_attached(learning[name])
            (lora.load_adapter_state if is_adapter else nn.Module.load_state_dict)(learning[name], state)
        optimizer.load_state_dict(saved.pop("optimizer"))
        progress = Progress(**{key: value for key, value in saved.items() if key != "key"})
    log.info("phase %s: from step %d of %d (%s)", instance, progress.step, total, run.key(instance))
    if spec.batch % run.session.world:
        raise ValueError(f"phase {instance}: a batch of {spec.batch} cannot be shared by {run.session.world} workers")
    share = spec.batch // run.session.world
    micro = min(share, at.micro_batch or share)
    further = {
        f"scored on {item}": StreamLoader(item, Stream(data=item, corruption=None), run.data[item])
        for item in spec.eval_only
    }
    replying = {n for t in spec.terms.values() if isinstance(streams[t.on].data, ExchangeSet) for n in reads(t)}
    replying |= set(spec.train) & set(language) if further else set()
    if joining := [name for name in sorted(replying) if not keeps_apart(nets[name], run.autocast)]:
        log.info("each exchange has a row of its own: %s would read those of one row as one", ", ".join(joining))
        streams, further = (_apart(readers) for readers in (streams, further))
    phase = PhaseState(run, instance, spec, seed, streams, called, optimizer, total, progress, micro, share, further)
    for stream in streams.values():
        for name in makers_of(stream.spec):
            phase.token_flops[name] = flops_per_token(nets[name], length=stream.length, device=at.device)
    return phase


def _controls(spec: Phase) -> dict[str, Any]:
    """The states of what steers a phase, as they are at its start."""
    moving = {n: controllers.taid_start(t) for n, t in spec.terms.items() if isinstance(t, InterpolatedKL)}
    shares = {n: s.replies.share for n, s in spec.streams.items() if s.replies is not None}
    made = {n: on_policy.new_state(controllers.share_start(share)) for n, share in shares.items()}
    return {"targets": moving, "made": made}


def _freeze_unreached(
    run: TrialContext, instance: PhaseRun, called: forward.Models, streams: Mapping[str, StreamLoader]
) -> None:
    """What no term's gradient reaches does not learn: what stands above the last layer that a term inside a model reads.

    Several ranks would wait for its gradient in vain; a pass over one sequence tells. For the same reason they need terms
    that are there at every step.
    """
    spec, device, seed = run.spec.phases[instance.phase], run.at.device, seed_of(run.spec, instance.phase)
    passing = [name for name, term in spec.terms.items() if can_be_zero(term.weight)]
    if passing and run.session.world > 1:
        raise ValueError(
            f"phase {instance}: beside terms inside models {passing[0]} may not reach 0 on several workers"
        )
    batches = {name: stream.batch(0, spec.batch, seed, str(instance)) for name, stream in streams.items()}
    parts = {name: batch.rows(0, 1).to(device) for name, batch in batches.items()}
    how: dict[str, Any] = {"device": device, "autocast": run.autocast, "dropout": lambda *_: 0}
    loss, _ = forward.run_terms(called, spec.terms, parts, dict.fromkeys(spec.terms, 1.0), **how)
    loss.backward()  # type: ignore[no-untyped-call]
    for module in called.wrapped.values():
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None


def _apart(readers: Mapping[str, StreamLoader]) -> dict[str, StreamLoader]:
    """The readers, whose exchanges have rows of their own."""
    return {
        name: replace(reader, data=reader.data.apart()) if isinstance(reader.data, ExchangeSet) else reader
        for name, reader in readers.items()
    }


@torch.no_grad()
def keeps_apart(net: Any, autocast: Autocast) -> bool:
    """Whether a model takes sequences in one row, of which only their places tell, for what they are: a forward tells.

    Those that do not learn places of tokens from what they are given (ALiBi, recurrent ones), or ask the attention mask
    for them, read on over the border.
    """
    device = next(net.parameters()).device
    ids_BT = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, 3, 4]], device=device)
    places_BT = torch.tensor([[0, 1, 2, 0, 1]], device=device).expand(2, 5)
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    with autocast():
        before_NV, after_NV = (
            output_head.logits_at(
                net, ids_BT[row, None], torch.tensor([3, 4], device=device), places_BT=places_BT[row, None]
            )
            for row in (0, 1)
        )
    for module, mode in modes:
        module.training = mode
    return bool((before_NV - after_NV).abs().max() <= 1e-5 * before_NV.abs().max())


def _readers(run: TrialContext, instance: PhaseRun, seed: int) -> tuple[dict[str, StreamLoader], float]:
    """The streams of an instance, and the FLOPs of making their labels."""
    readers, flops = dict[str, StreamLoader](), 0.0
    for name, stream in streams_of(run.spec, instance).items():
        data = run.spec.data[stream.data]
        head = TaskHead(stream.data, data.num_labels, False) if isinstance(data, Tasks) else None
        readers[name], spent = open_reader(
            name,
            stream,
            run.data[stream.data],
            lambda model, head=head: make(run, instance, model, head),  # type: ignore[misc]
            seed=seed,
            phase=str(instance),
            device=run.at.device,
            autocast=run.autocast,
        )
        flops += spent
    return readers, flops


def _wrap(net: Any, device: str) -> Any:
    """Gradients of a trained model are averaged over ranks while the backward runs; frozen ones stay as they are."""
    return DistributedDataParallel(net, device_ids=[torch.cuda.current_device()] if device.startswith("cuda") else None)


def parameters_of(spec: Phase, learning: Mapping[str, Any], model: str) -> list[Any]:
    """What learns of a model. A term's projector learns with the model that it projects."""
    beside = [forward.projector_of(name) for name, term in spec.terms.items() if target(term) == model]
    return [p for name in (model, *beside) if name in learning for p in learning[name].parameters() if p.requires_grad]
