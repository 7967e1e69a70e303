"""The best model as an ordinary Hugging Face folder.

    python -m orchestrator.export search_spaces/dwt.yaml --to best-student

Without `--arm` or `--trial` it is the search's winner at its first confirmed seed (or at the search's own).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import processors

from orchestrator.analysis.tables import open_storage
from orchestrator.cli import add_study_arguments
from orchestrator.study.errors import StudyError
from orchestrator.study.load import load_study
from orchestrator.study.schema import Study
from trainables.config import errors
from trainables.config.errors import DataError
from trainables.data.prepared import open_data
from trainables.data.tokenizer import encode, ends
from trainables.models import build, shared_bert
from trainables.storage.files import Storage
from trainables.storage.phase_store import Corrupt, PhaseStore


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.export", description="Writes a model as a Hugging Face folder."
    )
    add_study_arguments(parser)
    parser.add_argument("--to", required=True, metavar="DIR", help="a folder that is not there yet, or empty")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--arm", metavar="A", help="an arm, at its first seed")
    which.add_argument("--trial", metavar="ID", help="a trial by its id")
    parser.add_argument("--model", metavar="M", help="by default the objective's")
    parser.add_argument(
        "--phase", metavar="P", help="as it ends there, e.g. finetune[rte]; by default the last that trains it"
    )
    arguments = parser.parse_args(argv)
    try:
        study = load_study(arguments.study, arguments.profile, arguments.set)
        export(
            study,
            arguments.storage,
            Path(arguments.to),
            arm=arguments.arm,
            trial=arguments.trial,
            model=arguments.model,
            phase=arguments.phase,
        )
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def export(
    study: Study,
    uri: str,
    to: Path,
    *,
    arm: str | None = None,
    trial: str | None = None,
    model: str | None = None,
    phase: str | None = None,
) -> None:
    """Weights (safetensors), config and tokenizer. Raises StudyError where there is nothing to write, or no place.

    Layers that run more than once are written as often as they run, so that anyone can load the folder.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise StudyError(f"--to {to}: is there already and not empty")
    storage = open_storage(uri)
    store = PhaseStore(storage)
    row = _trial(study, storage, arm, trial)
    model = model or study.objective.model
    spec = row["spec"]
    trained = [name for name, done in row["phases"].items() if model in _published(store, done["key"]).configs]
    if not trained:
        raise StudyError(f"trial {row['trial']} trains no model {model!r}; expected {', '.join(spec['models'])}")
    if phase is not None and phase not in trained:
        raise StudyError(f"--phase {phase}: does not train {model!r}; expected {', '.join(trained)}")
    phase = phase or trained[-1]
    last = _published(store, row["phases"][phase]["key"])
    try:
        net = build.restore(last.configs[model], store.weights(last.key, model))
    except (Corrupt, errors.ModelError) as error:
        raise StudyError(f"{error}; run the sweep again to rebuild it") from None
    if net.config.model_type == shared_bert.FAMILY:
        net = shared_bert.unrolled(net)
    try:
        tokenizer = open_data(storage.sub("data").uri, row["data"]).tokenizer
        if net.can_generate():
            _let_it_answer(net, tokenizer)
        net.save_pretrained(str(to))
        tokenizer.save_pretrained(str(to))
        _name_inputs(to, net)
    except DataError as error:
        raise StudyError(f"{error}; run the sweep again to rebuild it") from None
    except OSError as error:
        raise StudyError(f"--to {to}: cannot be written ({error.strerror}); give a folder that can") from None
    print(f"{model} of {row['kind']} {row['point']}, seed {row['seed']} ({row['trial']}, phase {phase}) -> {to}")


def _let_it_answer(net: Any, tokenizer: Any) -> None:
    """A decoder reads and writes as it was trained: after a start token, with no end token behind the prompt, up to one."""
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
    """A model that tells the halves of a pair apart gets told, as in training; transformers keeps no such wish."""
    path = to / "tokenizer_config.json"
    about = json.loads(path.read_text())
    if getattr(net.config, "type_vocab_size", 0) > 1 and "model_input_names" not in about:
        about["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
        path.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")


def _published(store: PhaseStore, key: str) -> Any:
    phase = store.find(key)
    if phase is None:
        raise StudyError(f"phase {key} is not in the store; run the sweep again to rebuild it")
    return phase


def _trial(study: Study, storage: Storage, arm: str | None, trial: str | None) -> dict[str, Any]:
    """The end of the trial that is wanted, with its spec and the fingerprint of its data."""
    from orchestrator.scheduling.scheduler import Agenda
    from orchestrator.scheduling.trials import Fingerprints

    agenda = Agenda(study, Fingerprints(None), storage)
    ended = {i: row for i, row in agenda.rows.items() if row["status"] == "ended"}
    if trial is None:
        agenda.known()
        winner = agenda.winner()
        name = arm or (winner.name if winner else None)
        if arm is not None and arm not in study.arms:
            raise StudyError(f"no arm {arm!r}; expected {', '.join(study.arms)}")
        if name is None:
            raise StudyError(f"{study.file}: the search has no winner (yet); give --arm or --trial")
        of_point = [
            row
            for row in ended.values()
            if row["point"] == name and row["kind"] in ("trial", "confirm") and agenda.is_planned(row["trial"])
        ]
        of_point.sort(
            key=lambda row: (
                (row["kind"] != "confirm", row["seed"]) if arm is None else (row["kind"] != "trial", row["seed"])
            )
        )
        if not of_point:
            raise StudyError(f"{study.file}: nothing of {name} has ended in {storage.uri}; run the sweep first")
        trial = of_point[0]["trial"]
    if trial not in ended:
        raise StudyError(f"no ended trial {trial!r} in {storage.uri}/{study.folder}")
    start = json.loads(storage.read(f"{study.folder}/trials/{trial}/trial.json") or b"{}")
    data = next(value for name, value in start["fingerprints"].items() if name.startswith("data:"))
    return {**ended[trial], "spec": start["spec"], "data": data}


if __name__ == "__main__":
    sys.exit(main())
