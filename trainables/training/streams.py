"""A stream of a phase on its way: what a step reads, what is scored, and labels that earlier models make for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trainables.config.phase import PredictionQuality, Stream
from trainables.config.value import random_stream
from trainables.data.batches import batch_indices, corrupt
from trainables.data.classification.tasks import Task, TaskBatch, folds, task_evaluation, task_indices
from trainables.data.corpus.masking import MaskedBatch
from trainables.data.corpus.sequences import Corpus
from trainables.data.instructions.exchanges import ExchangeSet
from trainables.data.instructions.packing import ExchangeBatch
from trainables.data.prepared import Prepared
from trainables.evaluation.classification import evaluate_task
from trainables.evaluation.generation import evaluate_exchanges
from trainables.evaluation.language_modelling import evaluate
from trainables.evaluation.model_size import FLOPS
from trainables.evaluation.per_example import ROWS, Scored
from trainables.models import output_head
from trainables.training import pseudo_labels

SPLITS: tuple[Literal["train", "dev", "test"], ...] = ("train", "dev", "test")


@dataclass(frozen=True)
class StreamLoader:
    """A stream with its data. `made`: labels by split, where a model makes them; `rows`: examples of train that count."""

    name: str
    spec: Stream
    data: Prepared
    made: Mapping[str, Tensor] = field(default_factory=dict)
    about: Mapping[str, float] = field(default_factory=dict)  # of made labels: metrics on train
    rows: Tensor | None = None

    @property
    def num(self) -> int:
        """Training sequences or examples."""
        return len(self.data.train) if self.rows is None else len(self.rows)

    @property
    def length(self) -> int:
        """Tokens of the longest one."""
        return self.data.train.length

    @property
    def num_labels(self) -> int | None:
        """Outputs of whoever reads it; None for a language model."""
        if not isinstance(self.data, Task):
            return None
        return PredictionQuality.NUM if self.spec.labels else self.data.num_labels

    def indices(self, step: int, size: int, seed: int, phase: str) -> Tensor:
        """The examples of a step, of similar length where lengths differ: a pure function of (seed, phase, stream, step)."""
        order = f"{phase}/{self.name}"
        if isinstance(self.data, Corpus):
            return batch_indices(self.num, size, step, seed=seed, stream=order)
        lengths = self.data.train.lengths if self.rows is None else self.data.train.lengths[self.rows]
        indices = task_indices(lengths, size, step, seed=seed, stream=order)
        return indices if self.rows is None else self.rows[indices]

    def batch(self, step: int, size: int, seed: int, phase: str) -> MaskedBatch | TaskBatch | ExchangeBatch:
        """The global batch of a step, as the data have it."""
        indices = self.indices(step, size, seed, phase)
        if isinstance(self.data, Corpus):
            masks = random_stream(seed, "mask", phase, self.name, step)
            return corrupt(self.data.train.rows(indices), self.data, self.spec.corruption, seed=masks)
        if isinstance(self.data, ExchangeSet):
            return self.data.train.rows(indices)
        batch = self.data.train.rows(indices)
        return batch._replace(labels_N=self.made["train"][indices]) if self.made else batch

    def score(self, net: Any, split: Literal["dev", "test"], **how: Any) -> Scored:
        """How a model does on a split; `how`: device, autocast, session."""
        if isinstance(self.data, Corpus):
            return evaluate(net, self.data, split, self.spec.corruption, **how)
        if isinstance(self.data, ExchangeSet):
            return evaluate_exchanges(net, self.data, split, **how)
        return evaluate_task(net, self.data, split, made_E=self.made.get(split), **how)


def open_reader(
    name: str,
    spec: Stream,
    data: Prepared,
    make: Callable[[str], Any],
    *,
    seed: int,
    phase: str,
    device: str,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> tuple[StreamLoader, float]:
    """The stream, and the FLOPs of making its labels. `make`: a labeller as it is when the phase starts."""
    rows = None
    if spec.fold is not None:
        rows = torch.as_tensor(folds(len(data.train), spec.fold.num) != spec.fold.held_out).nonzero().flatten()
    if spec.labels is None or not isinstance(data, Task):
        return StreamLoader(name, spec, data, rows=rows), 0.0
    made, flops, thresholds, about = dict[str, Tensor](), 0.0, None, dict[str, float]()
    nets = [make(model).to(device).eval() for model in spec.labels.of]
    for split in SPLITS:
        examples = getattr(data, split)
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            logits = [_logits(net, examples, device, autocast) for net in nets]
        flops += counter.get_total_flops()
        fold_of = torch.as_tensor(folds(len(examples), len(nets))) if split == "train" and len(nets) > 1 else None
        permutation = random_stream(seed, "labels", phase, name, split)
        classes_E = torch.as_tensor(examples.labels)
        found = pseudo_labels.prediction_quality(
            spec.labels, pseudo_labels.out_of_fold(logits, fold_of), classes_E, seed=permutation, thresholds=thresholds
        )
        made[split] = found.labels_E
        if split == "train":
            thresholds, about = found.thresholds, pseudo_labels.tell(found, f"phase {phase}, stream {name}")
    return StreamLoader(name, spec, data, made, about, rows), flops


@torch.no_grad()
def _logits(net: Any, examples: Any, device: str, autocast: Callable[[], AbstractContextManager[Any]]) -> Tensor:
    """[E, C], in the order of the examples."""
    found: Tensor | None = None
    for indices, batch in task_evaluation(examples, batch=ROWS):
        batch = batch.to(device)
        with autocast():
            logits_BC = output_head.class_logits(net, batch.ids_BT, batch.mask_BT, batch.types_BT).float().cpu()
        if found is None:
            found = torch.empty(len(examples), logits_BC.shape[1])
        found[torch.as_tensor(indices)] = logits_BC
    assert found is not None
    return found
