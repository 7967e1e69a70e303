"""Writes a trained model as an ordinary Hugging Face folder.

    python -m orchestrator.export search_spaces/dwt.yaml --to best-student

Without `--arm` or `--trial`, the search's winner: at its first confirmed seed, else at the seed of the search.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.cli import add_study_arguments, open_storage
from orchestrator.cluster.machine import start
from orchestrator.reporting.commands import sweep_command
from orchestrator.study.errors import StudyError, nearest
from orchestrator.study.load import load_study
from orchestrator.study.schema import Study
from trainables.config.errors import DataError, ModelError
from trainables.storage.files import Storage


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.export", description="Writes a model as a Hugging Face folder."
    )
    add_study_arguments(parser)
    folder = "a new or empty folder"
    parser.add_argument("--to", required=True, type=lambda to: Path(to).expanduser(), metavar="DIR", help=folder)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--arm", metavar="A", help="an arm, at its first seed")
    which.add_argument("--trial", metavar="ID", help="a trial by its id")
    parser.add_argument("--model", metavar="M", help="by default the objective's model")
    parser.add_argument(
        "--phase", metavar="P", help="as trained by this phase, e.g. finetune[rte]; by default the last that trains it"
    )
    given = parser.parse_args(argv)
    try:
        study = load_study(given.study, given.profile, given.set)
        export(study, given.storage, given.to, arm=given.arm, trial=given.trial, model=given.model, phase=given.phase)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def export(
    study: Study, uri: str, to: Path, *, arm: str | None, trial: str | None, model: str | None, phase: str | None
) -> None:
    """Writes weights (safetensors), config and tokenizer. A layer that runs twice is written twice, so that transformers
    loads the folder without our code.

    Raises StudyError where no such model was trained, and where the folder cannot be written.
    """
    from trainables.data.prepared import open_data  # here, as below, so that `--help` and a wrong argument are quick
    from trainables.models import build, shared_bert
    from trainables.storage.phase_store import Corrupt, PhaseStore

    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise StudyError(f"--to {to}: exists and is not empty; give a new or empty folder")
    storage = open_storage(uri)
    store = PhaseStore(storage)
    row = _trial(study, storage, arm, trial)
    model = model or study.objective.model
    rebuild = f"to rebuild it, run {sweep_command(study, uri)}"
    try:
        found = {name: store.find(done["key"]) for name, done in row["phases"].items()}
        if lost := [row["phases"][name]["key"] for name, stored in found.items() if stored is None]:
            raise StudyError(f"phase {lost[0]} is not in the store; {rebuild}")
        trained = {name: stored for name, stored in found.items() if stored is not None and model in stored.configs}
        if not trained:
            models = row["spec"]["models"]
            expected = f"{nearest(model, models)}; expected {', '.join(models)}"
            raise StudyError(f"trial {row['trial']} trains no model {model!r}{expected}")
        phase = phase or list(trained)[-1]
        if phase not in trained:
            expected = f"{nearest(phase, trained)}; expected {', '.join(trained)}"
            raise StudyError(f"--phase {phase}: does not train {model!r}{expected}")
        net = build.restore(trained[phase].configs[model], store.weights(trained[phase].key, model))
        if net.config.model_type == shared_bert.FAMILY:
            net = shared_bert.unrolled(net)
        tokenizer = open_data(storage.sub("data").uri, row["data"]).tokenizer
    except (Corrupt, ModelError, DataError, OSError) as error:
        raise StudyError(f"{error}; {rebuild}") from None
    try:
        if net.can_generate():
            set_generation_tokens(net, tokenizer)
        net.save_pretrained(str(to))
        tokenizer.save_pretrained(str(to))
        _name_inputs(to, net)
    except OSError as error:
        raise StudyError(f"--to {to}: cannot be written ({error.strerror}); give a folder that can") from None
    print(f"{model} of {row['kind']} {row['point']}, seed {row['seed']} ({row['trial']}, phase {phase}) -> {to}")


def set_generation_tokens(net: Any, tokenizer: Any) -> None:
    """Sets a decoder's special tokens as in training: a start token before the prompt, none after it, an end token that
    ends a reply."""
    from tokenizers import processors

    from trainables.data.tokenizer import encode, ends

    start, end = ends(tokenizer)
    for config in (net.config, net.generation_config):
        config.bos_token_id, config.eos_token_id = start, end
        config.pad_token_id = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for name, token in (("bos_token", start), ("eos_token", end)):
        if getattr(tokenizer, name) is None and token is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token))
    before = [] if start is None else [start]
    if tokenizer("a", "b")["input_ids"] == [*before, *encode(tokenizer, ["a"])[0], *encode(tokenizer, ["b"])[0]]:
        return
    names = tokenizer.convert_ids_to_tokens(before)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*names, "$A"], pair=[*names, "$A", "$B:1"], special_tokens=list(zip(names, before, strict=True))
    )


def _name_inputs(to: Path, net: Any) -> None:
    """Makes the tokenizer return token types to a model that has them, as in training; save_pretrained drops this."""
    path = to / "tokenizer_config.json"
    about = json.loads(path.read_text())
    if getattr(net.config, "type_vocab_size", 0) > 1 and "model_input_names" not in about:
        about["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
        path.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")


def _trial(study: Study, storage: Storage, arm: str | None, trial: str | None) -> dict[str, Any]:
    """The end of the chosen trial, with its spec and the fingerprint of its data."""
    from orchestrator.scheduling.scheduler import Scheduler
    from orchestrator.scheduling.trials import Fingerprints

    if arm is not None and arm not in study.arms:
        raise StudyError(f"no arm {arm!r}{nearest(arm, study.arms)}; expected {', '.join(study.arms)}")
    scheduler = Scheduler(study, Fingerprints(None), storage)
    ledger = scheduler.ledger
    ended = {i: row for i, row in ledger.rows.items() if row["status"] == "ended"}
    if trial is None:
        winner = scheduler.search.winner() if scheduler.search else None
        name = arm or (winner.name if winner else None)
        if name is None:
            arms = f"--arm A, of {', '.join(study.arms)}, or " if study.arms else ""
            raise StudyError(f"{study.file}: no winner of a search to export (yet); give {arms}--trial ID")
        of_point = [
            row
            for row in ended.values()
            if row["point"] == name and row["kind"] in ("trial", "confirm") and ledger.is_planned(row["trial"])
        ]
        if not of_point:
            raise StudyError(f"{study.file}: no trial of {name} has ended in {storage.uri}; run the sweep first")
        first = "confirm" if arm is None else "trial"
        trial = min(of_point, key=lambda row: (row["kind"] != first, row["seed"]))["trial"]
    if trial not in ended:
        some = ", ".join([*list(ended)[:5], "…"][: len(ended)]) or "none"
        where = f"in {storage.uri}/{study.folder}"
        raise StudyError(f"no ended trial {trial!r}{nearest(str(trial), ended)} {where}; expected {some}")
    start = json.loads(storage.read(f"{study.folder}/trials/{trial}/trial.json") or b"{}")
    data = next(value for name, value in start["fingerprints"].items() if name.startswith("data:"))
    return {**ended[trial], "spec": start["spec"], "data": data}


if __name__ == "__main__":
    start(main)
