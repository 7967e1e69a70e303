"""Makes the model card of an exported model: how it was trained, on what, how well it does, at what cost, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from orchestrator.analysis.curves import planned
from orchestrator.analysis.statistics import mean_and_half
from orchestrator.analysis.tables import Tables
from orchestrator.reporting.commands import DEFAULT_STORAGE, sweep_command
from orchestrator.reporting.document import Table, as_markdown, duration, mean_text, setting, si
from orchestrator.study.schema import Study
from trainables.config.phase_run import PhaseRun

AUTO_CLASSES = {
    "fill-mask": "AutoModelForMaskedLM",
    "text-generation": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
}
LICENCE = (
    "No licence was chosen. Whoever publishes this model adds `license:` to the header above, in keeping with the licences "
    "of the training data and of the models that it was started from or taught by."
)


class Exported(NamedTuple):
    """A model as a phase of a trial left it."""

    row: Mapping[str, Any]  # the end of the trial, with its spec and the fingerprints of its data
    model: str
    phase: str
    task: str  # fill-mask | text-generation | text-classification
    tokenizer_class: str  # of transformers, which reads texts from the folder as in training
    adapter_of: str | None = None  # the base model, where the folder holds LoRA's pairs alone


def model_card(study: Study, tables: Tables, exported: Exported, *, storage: str = DEFAULT_STORAGE) -> str:
    """Returns the README.md of the folder, with metadata as huggingface_hub defines them."""
    row, model, phase, task, *_ = exported
    scores = _scores(tables, exported)
    pretrained = {name: spec.get("pretrained") for name, spec in row["spec"]["models"].items()}
    own = pretrained[model]
    header = ModelCardData(
        model_name=f"{study.folder}-{row['point']}-{model}",
        library_name="transformers" if exported.adapter_of is None else "peft",
        pipeline_tag=task,
        tags=["codistill", "distillation"],
        base_model=own if own and not own.startswith(("/", ".", "~")) else None,
        eval_results=[
            EvalResult(task, score.data, score.data, score.metric, score.value, dataset_split=score.split)
            for score in scores
        ],
    )
    how = f"`{model}` of {row['kind']} {row['point']}, seed {row['seed']}, after phase {phase} (trial {row['trial']})"
    changes = [(path, setting(value)) for path, value in row["params"].items()]
    spent = row["phases"].values()
    flops, seconds = (sum(done[what] for done in spent) for what in ("flops", "device_seconds"))
    data = [(name.removeprefix("data:"), value) for name, value in row["fingerprints"].items() if "data:" in name]
    parts = [
        f"# {model} of {study.folder}, {row['point']}",
        f"{how}, trained by codistill. The study asks: {study.question}",
        "## How to load",
        _snippet(exported),
        "## Scores",
        as_markdown(_score_table(scores)) if scores else "No score of this phase was recorded.",
        "## Recipe",
        as_markdown(Table("What this trial changes in the study's base trial", ("path", "value"), changes, "ml"))
        if changes
        else "This trial is the study's base trial.",
        "The whole of it, with every default:",
        f"```json\n{json.dumps(row['spec'], indent=1, ensure_ascii=False)}\n```",
        f"To train it again: `{sweep_command(study, storage)}`",
        "## Data",
        as_markdown(Table("Data sets, with the hash of their content", ("name", "fingerprint"), data, "lm")),
        "## Cost",
        f"{si(flops, 'FLOPs')} and {duration(seconds)} of device time, all phases of the trial and its teachers included.",
        "## Licence",
        LICENCE,
    ]
    return str(ModelCard(f"---\n{header.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


class _Score(NamedTuple):
    data: str
    split: str
    metric: str
    value: float  # of the exported trial
    others: Sequence[float]  # of the trials of the same point and kind that ended, the exported one included


def _scores(tables: Tables, exported: Exported) -> list[_Score]:
    row, rows = exported.row, tables.results
    trials = planned(tables.trials)
    same = trials[(trials["point"] == row["point"]) & (trials["kind"] == row["kind"]) & (trials["status"] == "ended")]
    rows = rows[
        rows["trial"].isin({*same["trial"], row["trial"]})
        & (rows["model"] == exported.model)
        & _is_of(rows, exported.phase)
        & rows["split"].isin(("dev", "test"))
        & np.isclose(rows["progress"].astype(float), 1.0)
        & np.isfinite(rows["value"].astype(float))
    ]
    scores = []
    for (data, split, metric), own in rows.groupby(["task", "split", "metric"]):
        by_trial: pd.Series[float] = own.groupby("trial")["value"].last()
        if row["trial"] in by_trial:
            value = float(by_trial[row["trial"]])
            scores.append(_Score(str(data), str(split), str(metric), value, by_trial.tolist()))
    return scores


def _is_of(rows: pd.DataFrame, phase: str) -> pd.Series[bool]:
    """Selects the results of a phase run; results of `finetune[rte]` may name the phase alone, and rte as their data set."""
    run = PhaseRun.parse(phase)
    return (rows["phase"] == phase) | ((rows["phase"] == run.phase) & (rows["task"] == run.item))


def _score_table(scores: Sequence[_Score]) -> Table:
    rows = []
    for score in scores:
        mean, half = mean_and_half(score.others)
        rows.append(
            (score.data, score.split, score.metric, f"{score.value:.4g}", mean_text(mean, half), str(len(score.others)))
        )
    caption = (
        "At the end of the phase. Mean over the seeds of the same recipe, ± half its 95 % interval, and their number n"
    )
    return Table(caption, ("data", "split", "metric", "this model", "mean", "n"), rows, "lllrrr")


def _snippet(exported: Exported) -> str:
    name, tokenizer = AUTO_CLASSES[exported.task], exported.tokenizer_class
    if exported.adapter_of is not None:
        return (
            f"```python\nfrom peft import AutoPeftModelForCausalLM\nfrom transformers import {tokenizer}\n\n"
            f'folder = "."  # where this file lies; the base model is {exported.adapter_of}\n'
            f"model = AutoPeftModelForCausalLM.from_pretrained(folder)\ntokenizer = {tokenizer}.from_pretrained(folder)\n```"
        )
    return (
        f'```python\nfrom transformers import {name}, {tokenizer}\n\nfolder = "."  # where this file lies\n'
        f"model, tokenizer = {name}.from_pretrained(folder), {tokenizer}.from_pretrained(folder)\n```"
    )
