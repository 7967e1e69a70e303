"""A stream of a phase: the batch of each step, the scores of a model, and labels that earlier models make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trainables.config.phase import PredictionQuality, Stream
from trainables.config.value import random_stream
from trainables.data.classification.mixing import mixed
from trainables.data.classification.tasks import Examples, TaskBatch
from trainables.data.corpus.masking import MaskedBatch
from trainables.data.instructions.packing import ExchangeBatch
from trainables.data.order import folds
from trainables.data.prepared import Prepared
from trainables.data.split import SPLITS
from trainables.evaluation.classification import batch_logits
from trainables.evaluation.evaluate import evaluate
from trainables.evaluation.model_size import FLOPS
from trainables.evaluation.per_example import Placement, Scored, Targets
from trainables.training import pseudo_labels


@dataclass(frozen=True)
class StreamLoader:
    """A stream with its data, as the models read them that learn from it. `others`: the same examples as models with another
    tokenizer read them. `made`: labels by split, where models make them; `rows`: the examples of train to read."""

    name: str
    spec: Stream
    data: Prepared
    made: Mapping[str, Tensor] = field(default_factory=dict)
    about: Mapping[str, float] = field(default_factory=dict)  # of made labels: metrics on train
    rows: Tensor | None = None
    others: Mapping[str, Prepared] = field(default_factory=dict)  # by model

    @property
    def num(self) -> int:
        """Training sequences or examples."""
        return len(self.data.train) if self.rows is None else len(self.rows)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence that there can be."""
        return self.data.length

    @property
    def num_labels(self) -> int | None:
        """Outputs of a model's head on the stream; None for a language model."""
        return PredictionQuality.NUM if self.spec.labels else self.data.num_labels

    def read_by(self, model: str) -> Prepared:
        return self.others.get(model, self.data)

    def indices(self, step: int, size: int, seed: int, phase: str) -> Tensor:
        """Returns the examples of a step: a pure function of (seed, phase, stream, step)."""
        return self.data.step_indices(self.rows, size, step, seed=seed, stream=f"{phase}/{self.name}")

    def batch(self, step: int, size: int, seed: int, phase: str) -> MaskedBatch | TaskBatch | ExchangeBatch:
        """Reads the global batch of a step, as the models read it that learn from it."""
        masks = random_stream(seed, "mask", phase, self.name, step)
        return self._mixed(self._read(self.data, self.indices(step, size, seed, phase), masks), step, seed, phase)

    def batches(
        self, step: int, size: int, seed: int, phase: str
    ) -> dict[str, MaskedBatch | TaskBatch | ExchangeBatch]:
        """Reads `batch` by the name of the stream, and the same examples by `stream/model` for each of `others`."""
        found = {self.name: self.batch(step, size, seed, phase)}
        for model, data in self.others.items():  # of corpora, which draw masks, there are none
            own = self._read(data, self.indices(step, size, seed, phase), 0)
            found[f"{self.name}/{model}"] = self._mixed(own, step, seed, phase)
        return found

    def _mixed(self, batch: Any, step: int, seed: int, phase: str) -> MaskedBatch | TaskBatch | ExchangeBatch:
        """Mixes each example with another one of the batch, the same for all models."""
        read: MaskedBatch | TaskBatch | ExchangeBatch = batch
        if self.spec.mix is None or not isinstance(batch, TaskBatch):
            return read
        return mixed(batch, self.spec.mix.alpha, seed=random_stream(seed, "mix", phase, self.name, step))

    def _read(self, data: Prepared, indices: Tensor, masks: int) -> MaskedBatch | TaskBatch | ExchangeBatch:
        return self._labelled(data.batch(indices, self.spec.corruption, seed=masks), "train", indices)

    def dev_batches(self, rows: int) -> Iterator[dict[str, MaskedBatch | TaskBatch | ExchangeBatch]]:
        """Yields dev as `batches` names it, with the labels that the stream's evaluations have."""
        for indices, batch in self.data.dev_batches(self.spec.corruption, rows):
            found = {self.name: batch}
            found |= {f"{self.name}/{model}": data.dev.rows(indices) for model, data in self.others.items()}
            yield {read: self._labelled(each, "dev", indices) for read, each in found.items()}

    def _labelled(self, batch: Any, split: str, indices: Tensor) -> MaskedBatch | TaskBatch | ExchangeBatch:
        """Puts the labels that models make in place of those of the data."""
        if self.made and isinstance(batch, TaskBatch):
            return batch._replace(labels_N=self.made[split][indices])
        read: MaskedBatch | TaskBatch | ExchangeBatch = batch
        return read

    def unpacked(self) -> StreamLoader:
        """Gives each exchange a row of its own."""
        others = {model: data.unpacked() for model, data in self.others.items()}
        return replace(self, data=self.data.unpacked(), others=others)

    def score(self, net: Any, model: str, split: Literal["dev", "test"], *, on: Placement) -> Scored:
        """Evaluates a model on its own encoding; examples that share a text are the same ones for all models."""
        scored = evaluate(net, self.read_by(model), split, Targets(self.spec.corruption, self.made.get(split)), on=on)
        if model in self.others and scored.clusters_E is not None:
            return scored._replace(clusters_E=getattr(self.data, split).clusters())
        return scored


def open_reader(
    name: str,
    spec: Stream,
    read_by: Mapping[str, Prepared],
    make: Callable[[str], tuple[Any, Prepared]],
    *,
    seed: int,
    phase: str,
    on: Placement,
) -> tuple[StreamLoader, float]:
    """Returns the stream, and the FLOPs of making its labels. `read_by`: its data as each model of its terms reads them, first
    one that learns. `make`: builds a labeller as it is when the phase starts, and opens the data as it reads them."""
    data, rows = next(iter(read_by.values())), None
    others = {model: own for model, own in read_by.items() if own.fingerprint != data.fingerprint}
    if spec.fold is not None:
        rows = torch.as_tensor(folds(len(data.train), spec.fold.num) != spec.fold.held_out).nonzero().flatten()
    if spec.labels is None:
        return StreamLoader(name, spec, data, rows=rows, others=others), 0.0
    made, flops, thresholds, about = dict[str, Tensor](), 0.0, None, dict[str, float]()
    labellers = [(net.to(on.device).eval(), own) for net, own in map(make, spec.labels.of)]
    for split in SPLITS:
        examples = getattr(data, split)
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            logits = [_logits(net, getattr(own, split), on) for net, own in labellers]
        flops += counter.get_total_flops()
        fold_of = (
            torch.as_tensor(folds(len(examples), len(labellers))) if split == "train" and len(labellers) > 1 else None
        )
        permutation = random_stream(seed, "labels", phase, name, split)
        labelled = pseudo_labels.prediction_quality(
            spec.labels,
            pseudo_labels.out_of_fold(logits, fold_of),
            torch.as_tensor(examples.labels),
            seed=permutation,
            thresholds=thresholds,
        )
        made[split] = labelled.labels_E
        if split == "train":
            thresholds, about = labelled.thresholds, pseudo_labels.describe(labelled, f"phase {phase}, stream {name}")
    return StreamLoader(name, spec, data, made, about, rows, others), flops


def _logits(net: Any, examples: Examples, on: Placement) -> Tensor:
    """Computes logits [E, C], in the order of the examples."""
    batches = list(batch_logits(net, examples, on))
    order = torch.cat([indices for indices, _ in batches])
    logits_EC = torch.cat([logits_BC for _, logits_BC in batches])
    return logits_EC[order.argsort()]
