"""One example of each member of the closed lists of a trial: contract tests run over them."""

from __future__ import annotations

from typing import Any

from tests.support.trials import flow, hard, inner

WORDPIECE = {"kind": "wordpiece", "size": 160}
DATA: dict[str, dict[str, Any]] = {
    "python_docs": {"kind": "python_docs", "tokenizer": WORDPIECE},
    "files": {"kind": "files", "train": "a.txt", "tokenizer": WORDPIECE, "columns": {"text": "body"}},
    "hub": {"kind": "hub", "name": "x/y", "tokenizer": WORDPIECE, "config": "c", "dev": "validation"},
    "glue": {"kind": "glue", "task": "mrpc", "source": "folder"},
    "python_task": {"kind": "python_task", "task": "topic", "tokenizer": {"kind": "same", "as": "corpus"}},
    "labelled_files": {"kind": "labelled_files", "train": "a.csv", "classes": ["no", "yes"], "score": "f1"},
    "python_instructions": {"kind": "python_instructions", "template": "chat", "scoring": {"seeds": [1], "top_k": 5}},
    "instruction_files": {
        "kind": "instruction_files",
        "train": "a.jsonl",
        "split_by": "id",
        "columns": {"messages": "turns"},
        "template": "chat",
        "tokenizer": WORDPIECE,
    },
    "instruction_hub": {"kind": "instruction_hub", "name": "x/y", "test": "train", "columns": {"context": "input"}},
}


INITS: dict[str, dict[str, Any]] = {
    "random": {"kind": "random", "std": "width", "positions": "sinusoid"},
    "remap": {"kind": "remap", "from": "teacher", "depth": "stack", "rest": {"std": 0.1}},
}


TERMS: dict[str, dict[str, Any]] = {
    "cross_entropy": hard("student"),
    "forward_kl": flow("teacher", "student"),
    "reverse_kl": flow("teacher", "student", "reverse_kl"),
    "jeffreys": flow("teacher", "student", "jeffreys"),
    "jsd": flow("teacher", "student", "jsd", beta=0.1),
    "skew_kl": flow("teacher", "student", "skew_kl", alpha=0.2),
    "skew_reverse_kl": flow("teacher", "student", "skew_reverse_kl", alpha=0.2),
    "total_variation": flow("teacher", "student", "total_variation"),
    "adaptive_kl": flow("teacher", "student", "adaptive_kl", head=0.4),
    "interpolated_kl": flow("teacher", "student", "interpolated_kl", start=0.2, end=0.9, alpha=1e-3, beta=0.9),
    "rank_correlation": flow("teacher", "student", "rank_correlation", top=3, strength=0.5),
    "hidden_mse": inner("teacher", "student", "hidden_mse", layers=[[1, 1]], positions="first", normalise=True),
    "hidden_cosine": inner("teacher", "student", "hidden_cosine", projector=True),
    "attention_mse": inner("teacher", "student", "attention_mse"),
    "relation_kl": inner("teacher", "student", "relation_kl", heads=2),
}


SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "start": 4, "end": 1},
    "cosine": {"kind": "cosine", "start": 4, "end": 1},
    "step": {"kind": "step", "start": 4, "end": 1, "at": 0.5},
    "off_when_better": {"kind": "off_when_better", "weight": 4},
}


BUDGETS: dict[str, dict[str, Any]] = {"steps": {"steps": 3}, "tokens": {"tokens": 999}, "epochs": {"epochs": 0.5}}


UNIT_WEIGHTS: dict[str, dict[str, Any]] = {
    "revision": {"kind": "revision", "by": "teacher", "eta": 0.7},
    "by_loss": {"kind": "by_loss", "among": ["teacher", "other"], "temperature": 0.5},
    "overlap": {"kind": "overlap", "top": 2},
}
