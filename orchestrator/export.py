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

from tokenizers import processors
from transformers import GenerationConfig

from orchestrator.cli import add_study_arguments, open_storage
from orchestrator.reporting.commands import sweep_command
from orchestrator.study.errors import StudyError, nearest
from orchestrator.study.load import load_study
from orchestrator.study.schema import Study
from trainables.config.errors import DataError, ModelError
from trainables.config.phase_run import PhaseRun
from trainables.config.trial import TrialSpec
from trainables.data.prepared import open_data
from trainables.data.tokenizer import encode, ends, generation_config, listed
from trainables.models import build, shared_bert
from trainables.storage.files import Storage
from trainables.storage.phase_store import Corrupt, PhaseStore
from trainables.training.phase_graph import streams_of

# keys of tokenizer_config.json that say how we loaded it, or that make a loader put special tokens elsewhere
OURS = ("backend", "is_local", "local_files_only", "add_bos_token", "add_eos_token")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.export", description="Writes a model as a Hugging Face folder."
    )
    add_study_arguments(parser)
    parser.add_argument("--to", required=True, type=Path, metavar="DIR", help="a new or empty folder")
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
        spec, run = TrialSpec.model_validate(row["spec"]), PhaseRun.parse(phase)
        stream = streams_of(spec, run)[spec.phases[run.phase].pace]
        data = open_data(storage.sub("data").uri, row["fingerprints"][f"data:{stream.data}"])
        tokenizer, named = data.tokenizer, spec.models[model]
    except (Corrupt, ModelError, DataError, OSError) as error:
        raise StudyError(f"{error}; {rebuild}") from None
    try:
        if net.can_generate():
            set_generation_tokens(net, tokenizer, data.end_ids, is_chat=data.is_chat)
        else:
            set_special_tokens(tokenizer, *ends(tokenizer))
        net.save_pretrained(str(to))
        tokenizer.save_pretrained(str(to))
        if named.pretrained is not None:
            _keep_generation_config(to, generation_config(named.pretrained, named.revision))
        _describe_tokenizer(to, net)
    except OSError as error:
        raise StudyError(f"--to {to}: cannot be written ({error.strerror}); give a folder that can") from None
    print(f"{model} of {row['kind']} {row['point']}, seed {row['seed']} ({row['trial']}, phase {phase}) -> {to}")


def set_generation_tokens(net: Any, tokenizer: Any, end_ids: Sequence[int] = (), *, is_chat: bool = False) -> None:
    """Sets a decoder's special tokens as in training: a start token before the prompt, none after it, and `end_ids`, by default
    the tokenizer's end token, of which any ends a reply. A chat template writes all tokens itself."""
    start, end = ends(tokenizer)
    stops = list(end_ids) or listed(end)
    for config in (net.config, net.generation_config):
        config.bos_token_id = config.bos_token_id if start is None else start
        config.eos_token_id = stops if len(stops) > 1 else stops[0] if stops else None
        config.pad_token_id = stops[0] if tokenizer.pad_token_id is None and stops else tokenizer.pad_token_id
    for name, token in (("bos_token", start), ("eos_token", end)):
        if getattr(tokenizer, name) is None and token is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token))
    set_special_tokens(tokenizer, None if is_chat else start, None)


def set_special_tokens(tokenizer: Any, start: int | None, end: int | None) -> None:
    """Makes the tokenizer put `start` before a text or a pair of texts, and `end` after each text, unless it does so."""
    before, after = listed(start), listed(end)
    first, second = (encode(tokenizer, [text])[0] for text in "ab")
    as_trained = ([*before, *first, *after], [*before, *first, *after, *second, *after])
    if (tokenizer("a")["input_ids"], tokenizer("a", "b")["input_ids"]) == as_trained:
        return
    (head, tail) = (tokenizer.convert_ids_to_tokens(ids) for ids in (before, after))
    single = [*head, "$A", *tail]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=[*single, "$B:1", *(f"{token}:1" for token in tail)],
        special_tokens=list(zip([*head, *tail], [*before, *after], strict=True)),
    )


def _keep_generation_config(to: Path, own: GenerationConfig | None) -> None:
    """Adds what a pretrained model's own `generation_config` says of sampling and ends; our tokens count where both do."""
    path = to / "generation_config.json"
    if own is None or not path.exists():
        return
    ours = json.loads(path.read_text())
    stops = list(dict.fromkeys([*listed(ours.get("eos_token_id")), *listed(own.eos_token_id)]))
    both = {**own.to_diff_dict(), **ours, "eos_token_id": stops if len(stops) > 1 else stops[0]}
    both.pop("_from_model_config", None)  # older loaders would make it anew from the config
    write_json(path, both)


def _describe_tokenizer(to: Path, net: Any) -> None:
    """Describes the tokenizer as older loaders know it, and so that all read tokenizer.json as it is. It returns token types to a
    model that has them, as in training; save_pretrained drops this."""
    path = to / "tokenizer_config.json"
    about = {key: value for key, value in json.loads(path.read_text()).items() if key not in OURS}
    types = ["token_type_ids"] if getattr(net.config, "type_vocab_size", 0) > 1 else []
    if isinstance(about.get("extra_special_tokens"), list):
        about["additional_special_tokens"] = about.pop("extra_special_tokens")
    about |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", *types, "attention_mask"],
    }
    write_json(path, about)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _trial(study: Study, storage: Storage, arm: str | None, trial: str | None) -> dict[str, Any]:
    """The end of the chosen trial, with its spec and the fingerprints of its data."""
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
            raise StudyError(f"{study.file}: the search has no winner (yet); give --arm or --trial")
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
        raise StudyError(f"no ended trial {trial!r}{nearest(str(trial), ended)} in {storage.uri}/{study.folder}")
    start = json.loads(storage.read(f"{study.folder}/trials/{trial}/trial.json") or b"{}")
    return {**ended[trial], "spec": start["spec"], "fingerprints": start["fingerprints"]}


if __name__ == "__main__":
    sys.exit(main())
