"""The memory that a worker needs in a phase, by part: an estimate before anything runs.

Weights, gradients and optimizer states are exact, activations are counted by `meta_models`, logits follow from their shapes,
the process and the allocator's waste are constants. benchmarks/RESULTS.md compares the totals with what processes took.
Exchanges of instructions are packed by length: a batch is taken as full rows, with the longest replies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from orchestrator.planning.meta_models import Activations, RowShape, Shapes
from trainables.config.data import Instructions, Sampling
from trainables.config.phase import Interleaved, Phase, Stream
from trainables.config.phase_run import PhaseRun
from trainables.config.schedules import OffWhenBetter
from trainables.config.trial import TrialSpec
from trainables.evaluation.generation import exchange_rows
from trainables.evaluation.per_example import ROWS
from trainables.losses.chunked import LogitSource
from trainables.models.layouts import shape_of
from trainables.training.forward import chunk
from trainables.training.phase_graph import head_of, longest, streams_of

Device = Literal["cpu", "cuda"]
PROCESS: Mapping[Device, float] = {"cpu": 0.65e9, "cuda": 0.6e9}  # Python, torch and Ray (measured); CUDA (assumed)
WASTE: Mapping[Device, float] = {
    "cpu": 0.25,
    "cuda": 0.1,
}  # share that malloc (measured), CUDA's allocator (assumed) waste
STAYING = ("weights", "optimizer", "teacher", "checkpoint")  # parts in large blocks, of which nothing is wasted
EIGHT_BIT_FROM = 4096  # numbers; adamw_8bit keeps the moments of smaller tensors in fp32
EIGHT_BIT_BLOCK = 256  # numbers that share a scale, fp32
FP32 = 4  # bytes
# fp32 tensors [N, V] that are held at once:
TERM_LOGITS = 5  # of each model that a term reads: logits, log-probabilities, their products, a gradient
SCORED_LOGITS = 2.5  # in an evaluation: of the batch before and of this one, the latter also as bf16
COMPARED_LOGITS = 7  # in an evaluation that compares two models
DRAWN_LOGITS = 6  # while the next token is drawn with top_p


@dataclass(frozen=True)
class ModelMemory:
    """Bytes of a model that is trained, whatever the model reads."""

    weights: float  # with LoRA the base's and the pairs'
    gradients: float  # as many bytes as the weights that learn
    optimizer: float

    @classmethod
    def of(cls, net: Any, optimizer: str) -> ModelMemory:
        """Estimates a model on any device, with an optimizer of this kind."""
        learning = [parameter for parameter in net.parameters() if parameter.requires_grad]
        return cls(
            float(sum(parameter.nbytes for parameter in net.parameters())),
            float(sum(parameter.nbytes for parameter in learning)),
            float(sum(_optimizer_bytes(parameter, optimizer) for parameter in learning)),
        )

    @property
    def checkpoint(self) -> float:
        return self.gradients + self.optimizer


def _optimizer_bytes(tensor: torch.Tensor, kind: str) -> int:
    """Counts the bytes for one tensor: two moments in its type, or in 8 bits with scales, or in fp32 the sums over rows and columns of the
    second one. (Step numbers and tables, a few KB, aside.)"""
    if kind == "adafactor":
        if tensor.ndim < 2:
            return FP32 * tensor.numel()
        return FP32 * (tensor.numel() // tensor.shape[-1] + tensor.numel() // tensor.shape[-2])
    if kind == "adamw_8bit":
        scales = -(-tensor.numel() // EIGHT_BIT_BLOCK)
        return 2 * (FP32 * tensor.numel() if tensor.numel() < EIGHT_BIT_FROM else tensor.numel() + FP32 * scales)
    return 2 * tensor.nbytes


@dataclass(frozen=True)
class PhaseMemory:
    """The parts of a phase's memory at each of its moments, in bytes for one worker of `workers`."""

    spec: TrialSpec
    run: PhaseRun
    shapes: Shapes
    device: Device = "cpu"
    workers: int = 1

    @property
    def share(self) -> int:
        """Sequences of a step for one worker."""
        return max(1, self._phase.batch // self.workers)

    def moments(self, rows: int) -> dict[str, dict[str, float]]:
        """Returns by moment ("": a training step with micro-batches of `rows` sequences): bytes by part."""
        found = {"": self.step(rows), " while it is evaluated": self.evaluation()}
        found |= {f" while {makers} replies": parts for makers, parts in self.replies().items()}
        if self.device == "cpu":  # else a checkpoint is read into the machine's memory
            # the file, and what is read from the file, stand beside the fresh weights
            found[" while it restarts from a checkpoint"] = self._parts(checkpoint=2 * self.trained().checkpoint)
        return found

    def trained(self) -> ModelMemory:
        """Returns all models that are trained, together."""
        each = [
            ModelMemory.of(self._net(name, trained=True), self._phase.optimizer_of(name).kind)
            for name in self._phase.train
        ]
        return ModelMemory(
            *(sum(getattr(held, part) for held in each) for part in ("weights", "gradients", "optimizer"))
        )

    def step(self, rows: int) -> dict[str, float]:
        """Estimates a training step. Trained models keep activations for each stream; a frozen one holds a layer's at a time. Several workers
        exchange gradients from buckets beside these."""
        phase, held = self._phase, self.trained()
        kept, passing = 0, 0
        for name, _, row in self._read():
            activations = self._activations(name, row)
            if name in phase.train:
                kept += activations.kept(rows, gradient_checkpointing=phase.gradient_checkpointing)
            else:
                passing = max(passing, activations.one_layer(rows))
        return self._parts(
            gradients=held.gradients * (2 if self.workers > 1 else 1),
            optimizer=held.optimizer,
            activations=kept + passing,
            logits=max(self._logits(rows, on) for on in phase.streams),
        )

    def _logits(self, rows: int, on: str) -> float:
        """Returns what the terms of a stream hold at once: logits of a chunk of positions, and the gradients that they
        leave for hidden states and for heads that learn."""
        terms = [term for term in self._phase.terms.values() if term.on == on and term.inputs == "logits"]
        names, total = {name for term in terms for name in term.reads}, 0.0
        for name, stream, row in self._read():
            if stream != on or name not in names:
                continue
            columns, positions, how = row.num_labels or self._num_tokens(name), rows * row.positions, self._phase.train.get(name)  # fmt: skip
            at_once = chunk({name: LogitSource(torch.empty(1, columns, device="meta"))}, self.device)
            total += FP32 * TERM_LOGITS * min(positions, at_once) * columns
            if row.num_labels is None:
                number = self._net(name).config.hidden_size * self._net(name).dtype.itemsize
                total += number * (positions * (2 if how else 1) + columns * (how == "full"))
        return total

    def evaluation(self) -> dict[str, float]:
        """Estimates an evaluation of what is trained, and of a teacher that is switched off when the student is better. A model that reads
        instructions also answers prompts, and is compared with its teachers."""
        terms = [term for term in self._phase.terms.values() if term.source is not None]
        evaluated = {
            *self._phase.train,
            *(name for term in terms if isinstance(term.weight, OffWhenBetter) for name in term.reads),
        }
        batches = [
            (name, self.spec.data[self._streams[on].data], row) for name, on, row in self._read() if name in evaluated
        ]
        batches += [(name, data, self._packed(data)) for name, data in self._answered()]
        peaks = [0.0]
        for name, data, row in batches:
            rows, logits = min(ROWS, data.evaluate or ROWS), SCORED_LOGITS
            if data.scoring is not None:
                row, rows = self._packed(data), min(rows, exchange_rows(self._num_tokens(name), data.length))
                if any(term.inputs == "logits" and term.target == name for term in terms):
                    logits = COMPARED_LOGITS
            columns = row.num_labels or self._num_tokens(name)
            peaks.append(FP32 * logits * rows * row.positions * columns + self._activations(name, row).one_layer(rows))
        for name, data in self._answered():
            peaks.append(sum(self._answers(name, min(ROWS, data.evaluate or ROWS), data, data.scoring).values()))
        return self._parts(optimizer=self.trained().optimizer, evaluation=max(peaks))

    def replies(self) -> dict[str, dict[str, float]]:
        """Estimates the generation of a stream's replies, all of a worker's share at once; before a step, without gradients."""
        found = dict[str, dict[str, float]]()
        for stream in self._streams.values():
            made, data = stream.replies, self.spec.data[stream.data]
            if made is None or data.scoring is None:
                continue
            each = [self._answers(name, self.share, data, made) for name in made.models]
            parts = max(each, key=lambda parts: sum(parts.values())) | {"cache": sum(parts["cache"] for parts in each)}
            if isinstance(made, Interleaved):  # the teacher's logits of a block
                parts["logits"] += FP32 * self.share * made.block * self._num_tokens(made.teacher)
            found[" and ".join(made.models)] = self._parts(optimizer=self.trained().optimizer, **parts)
        return found

    def _answers(self, name: str, prompts: int, data: Instructions, how: Sampling) -> dict[str, float]:
        """Replies to the longest prompts, at full length: the cache of keys and values, which grows by a quarter at a
        time; a layer's activations while the prompts are read; a draw from the logits."""
        net, tokens = self._net(name), data.prompt_length + how.max_tokens
        tokens = min(tokens, getattr(net.config, "max_position_embeddings", None) or tokens)
        shape, item = shape_of(net.config), 2 if self.spec.precision == "bf16" else net.dtype.itemsize
        token = 2 * net.config.num_hidden_layers * shape.kv_heads * shape.head_size * item
        return {
            "cache": float(token * prompts * (tokens + tokens // 4 + 32)),
            "activations": float(self._activations(name, RowShape(data.prompt_length, 1)).one_layer(prompts)),
            "logits": float(FP32 * DRAWN_LOGITS * prompts * self._num_tokens(name)),
        }

    def _parts(self, **parts: float) -> dict[str, float]:
        """Adds what is there at all moments: the process, weights, teachers, and what the allocator wastes."""
        others = (name for name in self.spec.models_of(self.run.phase) if name not in self._phase.train)
        teacher = sum(self.shapes.num_bytes_held(self.spec.models[name], longest(self.spec)) for name in others)
        moving = sum(size for part, size in parts.items() if part not in STAYING)
        held = {"process": PROCESS[self.device], "weights": self.trained().weights}
        return {**held, **parts, "teacher": float(teacher), "allocator": WASTE[self.device] * moving}

    @property
    def _phase(self) -> Phase:
        return self.spec.phases[self.run.phase]

    @property
    def _streams(self) -> Mapping[str, Stream]:
        return streams_of(self.spec, self.run)

    def _num_tokens(self, name: str) -> int:
        return self.shapes.vocabulary(self.spec.models[name])[0]

    def _net(self, name: str, *, trained: bool = False) -> Any:
        how = self._phase.train[name] if trained else "full"
        return self.shapes.net(self.spec.models[name], longest(self.spec), how=how)

    def _activations(self, name: str, row: RowShape) -> Activations:
        """Estimates activations on a GPU without dropout: masks take a byte for a number there, and attention drops within its kernel."""
        how, precision, drops = self._phase.train.get(name, "full"), self.spec.precision, self.device == "cpu"
        model = self.spec.models[name]
        return self.shapes.activations(model, longest(self.spec), row, how=how, precision=precision, drops=drops)

    def _read(self) -> Iterator[tuple[str, str, RowShape]]:
        """Returns (model, stream, row): each model runs once on each stream that its terms read."""
        terms = self._phase.terms.values()
        for name, on in sorted({(name, term.on) for term in terms for name in term.reads}):
            stream = self._streams[on]
            data, head = self.spec.data[stream.data], head_of(self.spec, self.run, name)
            if head is not None:
                yield name, on, RowShape(data.length, 1, head.num_labels)
            elif data.scoring is not None and stream.replies is None:
                yield name, on, self._packed(data)
            else:
                share = 1.0 if stream.corruption is None else stream.corruption.probability
                yield name, on, RowShape(data.length, min(data.length - 1, max(1, round(share * data.length))))

    def _packed(self, data: Instructions) -> RowShape:
        """Returns a row of packed exchanges, with as many supervised tokens as the data's own replies have at most."""
        most = math.ceil(self.shapes.reply_share * data.length)
        return RowShape(data.length, max(1, min(most, data.length - 1)))

    def _answered(self) -> Iterator[tuple[str, Instructions]]:
        """Returns trained models with the instructions whose prompts they answer in an evaluation."""
        read = [stream.data for stream in self._streams.values()]
        for name in self._phase.train:
            for data in (self.spec.data[item] for item in (*read, *self._phase.eval_only)):
                if data.scoring is not None:
                    yield name, data
