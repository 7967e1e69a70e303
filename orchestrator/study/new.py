"""Writes a study of a user's own models and data: does the student learn more with the teacher than without?

Reads the head of the data for its columns, and the teacher's config for whether it predicts masked tokens or the next one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any, Literal

from orchestrator.study.errors import StudyError
from orchestrator.study.load import load_study
from trainables.config.errors import DataError, ModelError

Task = Literal["instructions", "classification", "text"]
QUESTIONS: Mapping[Task, str] = {
    "instructions": "Does the student answer better for having learnt from the teacher?",
    "classification": "Does the student classify better for having learnt from the teacher?",
    "text": "Does the student predict text better for having learnt from the teacher?",
}
USUAL: Mapping[Task, Mapping[str, Sequence[str]]] = {  # field -> names that its column often has, the likeliest first
    "instructions": {
        "messages": ("messages", "conversations", "conversation", "turns"),
        "prompt": ("instruction", "prompt", "question", "query", "problem", "input"),
        "response": ("response", "output", "answer", "completion", "reply", "solution"),
    },
    "classification": {
        "label": ("label", "labels", "class", "category", "sentiment", "topic"),
        "first": ("sentence", "text", "sentence1", "premise", "content", "review"),
        "second": ("sentence2", "hypothesis"),
    },
    "text": {"text": ("text", "content", "body", "document")},
}
NEEDED: Mapping[Task, Sequence[Sequence[str]]] = {  # one of these groups of fields must be there
    "instructions": (["messages"], ["prompt", "response"]),
    "classification": (["first", "label"],),
    "text": (["text"],),
}
MOST_CLASSES = 100


@dataclass(frozen=True)
class NewStudy:
    """What a user says: models as folders or hub ids, the data as a path or glob, and the columns where they are unusual."""

    teacher: str
    data: str
    student: str | None = None  # else the first of `layers` layers of the teacher
    layers: int | None = None
    task: Task | None = None  # by default as the columns are
    columns: Mapping[str, str] = field(default_factory=dict)  # field -> column
    question: str | None = None

    def write(self, file: str) -> Task:
        """Writes the study file; returns its task. Raises StudyError where the file exists, or the study would not load."""
        if os.path.exists(file):
            raise StudyError(f"{file}: is there already; give a new name, or remove it")
        try:
            task, text = self.text(os.path.dirname(os.path.abspath(file)))
        except (DataError, ModelError) as error:
            raise StudyError(str(error)) from None
        try:
            with open(file, "x") as opened:
                opened.write(text)
        except OSError as error:
            raise StudyError(f"{file}: {error.strerror}") from None
        try:
            load_study(file)
        except StudyError:
            os.remove(file)
            raise
        return task

    def text(self, folder: str) -> tuple[Task, str]:
        """Returns the task and the text of a study whose file will be in `folder`. Raises DataError, ModelError, StudyError."""
        from trainables.models.configs import is_masked_lm
        from trainables.models.pretrained import Folder

        task, columns, more = self._read_data()
        teacher = Folder.read(os.path.expanduser(self.teacher), None)
        masked = is_masked_lm(teacher.config.model_type)
        if task == "instructions" and masked:
            raise StudyError(
                f"{self.teacher}: a {teacher.config.model_type} writes no text; instructions need a decoder"
            )
        if self.student is not None:
            student, tokenizer = f"{{pretrained: {self._path(self.student, folder)}}}", self.student
        else:
            self._check_layers(teacher.config.num_hidden_layers)
            remap = "{kind: remap, from: teacher, depth: spread}"
            student, tokenizer = f"{{like: teacher, layers: {self.layers}, init: {remap}}}", self.teacher
        if task == "instructions" and ("messages" in columns or _has_chat_template(Path(tokenizer).expanduser())):
            more["template"] = "chat"
        data = {"train": self._path(self.data, folder), "columns": flow(columns), **more}
        data["tokenizer"] = f"{{kind: pretrained, name: {self._path(tokenizer, folder)}}}"
        return task, STUDY.substitute(
            _of_task(task, masked),
            schema=os.path.relpath(Path(__file__).with_name("study.schema.json"), folder),
            question=json.dumps(self.question or QUESTIONS[task], ensure_ascii=False),
            teacher=self._path(self.teacher, folder),
            student=student,
            data=", ".join(f"{key}: {value}" for key, value in data.items()),
        )

    def _read_data(self) -> tuple[Task, dict[str, str], dict[str, str]]:
        """Returns the task, field -> column, and further fields of the data set."""
        from trainables.data.sources.files import column_names, find

        file = find(self.data, "data")[0]
        there = column_names(file, what="data")
        for task in [self.task] if self.task else USUAL:
            usual = {name: next((c for c in names if c in there), None) for name, names in USUAL[task].items()}
            columns = {name: c for name, c in (usual | dict(self.columns)).items() if c is not None}
            if group := next((group for group in NEEDED[task] if set(group) <= columns.keys()), None):
                optional = [name for name in ("second",) if name in columns]
                columns = {name: columns[name] for name in (*group, *optional)}
                return task, columns, self._classes(columns["label"]) if task == "classification" else {}
        wanted = " or ".join(
            f"{' and '.join(group)} ({task})" for task in USUAL for group in NEEDED[task] if self.task in (None, task)
        )
        raise StudyError(
            f"{self.data}: cannot tell what its columns are: {', '.join(there)}; name {wanted}, e.g. --columns "
            f"prompt={there[0]} response={there[-1]}"
        )

    def _classes(self, column: str) -> dict[str, str]:
        """Returns the classes, in order; none where the labels are numbers with a fraction."""
        from trainables.data.sources.files import Wanted, find, read

        tables = read(find(self.data, "data"), Wanted((), (column,), {column: "columns.label"}), what="data")
        labels = {label for table in tables for label in table.columns[column] if label is not None}
        if any(isinstance(label, float) and label % 1 for label in labels):
            return {}
        if not 2 <= len(labels) <= MOST_CLASSES:
            raise StudyError(
                f"{self.data}: column {column!r} has {len(labels)} different labels; expected 2 … {MOST_CLASSES}"
            )
        return {"classes": flow(sorted(labels, key=lambda label: (str(type(label)), label)))}

    def _check_layers(self, num: int) -> None:
        if self.layers is None or not 1 <= self.layers < num:
            raise StudyError(
                f"the teacher has {num} layers; give a student folder, or fewer layers (got {self.layers})"
            )

    def _path(self, text: str, folder: str) -> str:
        """Returns a path as it starts at the study's file; ids of the hub, URIs and absolute paths stay as they are."""
        path = os.path.expanduser(text)
        is_id = "://" in text or (not os.path.exists(path) and re.fullmatch(r"[\w.-]+/[\w.-]+", text))
        return flow(text if is_id or os.path.isabs(path) else f"./{os.path.relpath(path, folder)}")


def _has_chat_template(folder: Path) -> bool:
    """Returns whether a local folder's tokenizer brings a chat template."""
    config = folder / "tokenizer_config.json"
    is_in_config = config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8", errors="replace")
    return (folder / "chat_template.jinja").is_file() or is_in_config


def flow(value: Any) -> str:
    """Returns a value as one line of YAML; text in quotes where it would be read as more than text."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(flow, value))}]"
    is_plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_./~][\w./~-]*", value)
    return (
        value
        if is_plain and value.lower() not in ("true", "false", "null", "~")
        else json.dumps(value, ensure_ascii=False)
    )


STUDY = Template("""\
# yaml-language-server: $$schema=$schema
question: $question
trial:
  data:
    mine: {kind: $kind, $data}
  models:
    teacher: {pretrained: $teacher}
    student: $student
  phases:
$teach    distil:
      train: {student: full}
      streams: {main: {data: mine$corruption}}
      budget: {epochs: $epochs}
      batch: 16
      gradient_checkpointing: true
      optimizer: {lr: 1e-4, warmup: 0.1}
      terms:
        hard: {kind: cross_entropy, of: student}
        soft: {kind: forward_kl, from: teacher, to: student, weight: 1, tau_squared: false}
objective: {phase: distil, model: student, metric: $metric, mode: $mode}
seeds: 5
arms:
  alone: {phases.distil.terms.soft.weight: 0}  # learns from the data only
  taught: {}  # from the data and from the teacher
claims:
  teacher_helps: {arm: taught, against: alone, model: student, metric: $metric}
""")
TEACH = Template("""\
    teach:  # the teacher learns the task first, once for all arms of a seed
      train: {teacher: $how}
      streams: {main: {data: mine}}
      budget: {epochs: $epochs}
      batch: 16
      gradient_checkpointing: true  # less memory, more time
      optimizer: {lr: $lr, warmup: 0.1}
      evaluate: [1]
      terms: {hard: {kind: cross_entropy, of: teacher}}
""")


def _of_task(task: Task, masked: bool) -> dict[str, str]:
    """Returns what depends on the task: the kind of data, the metric, and whether the teacher learns first."""
    match task:
        case "instructions":
            teach = TEACH.substitute(how="{kind: lora, rank: 16}", lr="1e-3", epochs=3)
            about = {"kind": "instruction_files", "metric": "rougeL", "mode": "max", "corruption": "", "epochs": "3"}
        case "classification":
            teach = TEACH.substitute(how="full", lr="5e-5", epochs=3)
            about = {"kind": "labelled_files", "metric": "score", "mode": "max", "corruption": "", "epochs": "3"}
        case "text":
            metric, corruption = ("mlm_loss", "") if masked else ("lm_loss", ", corruption: null")
            about = {"kind": "files", "metric": metric, "mode": "min", "corruption": corruption, "epochs": "1"}
            teach = ""
    return {**about, "teach": teach}
