"""Writes a trained model as an ordinary Hugging Face folder: weights, config, tokenizer, generation config, model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from safetensors.torch import save_file
from tokenizers import processors
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from orchestrator.analysis.tables import tables
from orchestrator.cli import open_storage
from orchestrator.reporting.commands import sweep_command
from orchestrator.reporting.model_card import Exported, model_card
from orchestrator.scheduling.scheduler import Scheduler
from orchestrator.scheduling.trials import Fingerprints
from orchestrator.study.errors import StudyError, nearest
from orchestrator.study.schema import Study
from trainables.config.errors import DataError, ModelError
from trainables.config.models import Model
from trainables.config.phase import Lora
from trainables.config.phase_run import PhaseRun
from trainables.config.trial import TrialSpec
from trainables.data.prepared import Prepared, open_data
from trainables.data.tokenizer import encode, ends, generation_config, listed, reads_alike
from trainables.models import build, lora, shared_bert
from trainables.models.configs import one_line
from trainables.models.pretrained import stored_dtype
from trainables.storage.phase_store import Corrupt, PhaseStore, adapter_name
from trainables.training.phase_graph import origin_of, streams_of

# keys of tokenizer_config.json that say how we loaded it, or that make a loader put special tokens elsewhere
OURS = ("backend", "is_local", "local_files_only", "add_bos_token", "add_eos_token")

# Bases of rotary positions, by kind of layer, as the configs of Gemma 3 and of ModernBERT called them.
OLDER_BASES = {
    "full_attention": ("rope_theta", "global_rope_theta"),
    "sliding_attention": ("rope_local_base_freq", "local_rope_theta"),
}


class Wanted(NamedTuple):
    """Which model is exported, as the command's arguments say; None: the default that `--help` names."""

    arm: str | None = None
    trial: str | None = None
    model: str | None = None
    phase: str | None = None
    is_adapter: bool = False  # LoRA's pairs instead of the merged weights


class Adapter(NamedTuple):
    """LoRA's pairs as peft keeps them."""

    config: Any  # peft's
    tensors: dict[str, Tensor]


def export(study: Study, uri: str, to: Path, wanted: Wanted) -> None:
    """Writes weights (safetensors), config and tokenizer. A layer that runs twice is written twice, so that transformers
    loads the folder without our code.

    Raises StudyError where no such model was trained, and where the folder cannot be written.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise StudyError(f"--to {to}: exists and is not empty; give a new or empty folder")
    storage = open_storage(uri)
    store = PhaseStore(storage)
    scheduler = Scheduler(study, Fingerprints(None), storage)
    row = _trial(scheduler, wanted.arm, wanted.trial)
    model, phase = wanted.model or study.objective.model, wanted.phase
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
        data = open_data(storage.sub("data").uri, row["fingerprints"][f"data:{spec.reading(stream.data, model)}"])
        named, key = spec.models[model], trained[phase].key
        adapter = _adapter(net, store, key=key, spec=spec, run=run, model=model) if wanted.is_adapter else None
    except ValidationError:  # of the spec
        raise StudyError(f"trial {row['trial']} was run by another version of codistill; {rebuild}") from None
    except (Corrupt, ModelError, DataError, OSError) as error:
        raise StudyError(f"{error}; {rebuild}") from None
    with _whole(to):
        loader = _write_adapter(to, adapter, data.tokenizer) if adapter else write_folder(to, net, data, named)
        made = tables(study.folder, scheduler.ledger.all_rows(), scheduler.ledger.records)
        card = model_card(
            study,
            made,
            Exported(row, model, phase, _task(net), loader, named.pretrained if adapter else None),
            storage=uri,
        )
        (to / "README.md").write_text(card, encoding="utf-8")
    print(f"{model} of {row['kind']} {row['point']}, seed {row['seed']} ({row['trial']}, phase {phase}) -> {to}")
    if loader != "AutoTokenizer":
        print(
            f"load its tokenizer with {loader}: AutoTokenizer gives a {net.config.model_type} rules that this one was not made by"
        )


@contextmanager
def _whole(to: Path) -> Iterator[None]:
    """Leaves a folder as it was, new or empty, where writing it fails. Raises StudyError for what transformers, safetensors or the
    disk raise, of any kind."""
    is_there = to.exists()
    try:
        yield
    except BaseException as error:
        shutil.rmtree(to, ignore_errors=True)
        if is_there:
            to.mkdir(exist_ok=True)
        if not isinstance(error, Exception):
            raise
        why = (isinstance(error, OSError) and error.strerror) or one_line(error)
        raise StudyError(f"--to {to}: cannot be written ({why})") from error


def _adapter(net: Any, store: PhaseStore, *, key: str, spec: TrialSpec, run: PhaseRun, model: str) -> Adapter:
    """Reads LoRA's pairs. Raises StudyError where the run trained none, or peft could not apply them to the folder that the
    model started from."""
    how, started, merged = (
        spec.phases[run.phase].train[model],
        spec.models[model],
        "leave --adapter out, for merged weights",
    )
    if not isinstance(how, Lora):
        raise StudyError(f"--adapter: phase {run} trains all weights of {model!r}; leave --adapter out")
    origin = origin_of(spec, run, model)
    if started.pretrained is None or origin is not None:
        base = f"started from what phase {origin.instance} trained" if origin is not None else "is no folder's"
        raise StudyError(f"--adapter: {model!r} {base}, and an adapter needs a folder as its base; {merged}")
    try:
        config, tensors = lora.as_peft(net, how, store.weights(key, adapter_name(model)))
    except ModelError as error:
        raise StudyError(f"--adapter: {error}; {merged}") from None
    config.base_model_name_or_path, config.revision = started.pretrained, started.revision
    return Adapter(config, tensors)


def _write_adapter(to: Path, adapter: Adapter, tokenizer: Any) -> str:
    """Writes an adapter as peft does, with the tokenizer. Returns the class that reads texts, as `write_folder`."""
    to.mkdir(parents=True, exist_ok=True)
    adapter.config.save_pretrained(str(to))
    save_file({name: tensor.contiguous() for name, tensor in adapter.tensors.items()}, to / "adapter_model.safetensors")
    tokenizer.save_pretrained(str(to))
    return _tokenizer_class(to, tokenizer)


def write_folder(to: Path, net: Any, data: Prepared, source: Model) -> str:
    """Writes weights, config, tokenizer and, of a decoder, generation config, in the type of the weights that the model started
    from, if any (`source`). Returns the class of transformers that reads texts from the folder as the model was trained."""
    tokenizer = data.tokenizer
    logging.disable_progress_bar()
    if source.pretrained is not None and (dtype := stored_dtype(source.pretrained, source.revision)) is not None:
        build.cast(net, dtype)
    if net.can_generate():
        set_generation_tokens(net, tokenizer, data.end_ids, is_chat=data.is_chat)
    else:
        set_special_tokens(tokenizer, *ends(tokenizer))
    net.save_pretrained(str(to))
    name_for_older_loaders(to)
    tokenizer.save_pretrained(str(to))
    if source.pretrained is not None:
        _keep_generation_config(to, generation_config(source.pretrained, source.revision))
    _describe_tokenizer(to, net)
    return _tokenizer_class(to, tokenizer)


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


def name_for_older_loaders(to: Path) -> None:
    """Adds the fields of config.json that older loaders read: the type of the weights, and rotary positions, for which they take the
    family's default otherwise; these unless the loaders of today would then read others (Gemma 4, which has no older ones)."""
    path = to / "config.json"
    about = json.loads(path.read_text())
    rotary = {key: value for key, value in (about.get("rope_parameters") or {}).items() if value is not None}
    older: dict[str, Any] = {}
    for kind, names in OLDER_BASES.items():
        if (base := rotary.get(kind, {}).get("rope_theta")) is not None:
            older |= dict.fromkeys(names, base)
    whole = rotary.get("full_attention", rotary)
    older |= {key: whole[key] for key in ("rope_theta", "partial_rotary_factor") if key in whole}
    if "rope_theta" in older:
        scaling = {key: value for key, value in whole.items() if key not in older}
        older["rope_scaling"] = None if whole.get("rope_type", "default") == "default" else scaling
    about["torch_dtype"] = about["dtype"]
    write_json(path, {**about, **older})
    try:
        is_read_alike = AutoConfig.from_pretrained(to).to_dict().get("rope_parameters") == about.get("rope_parameters")
    except Exception:  # each family checks its config in its own way
        is_read_alike = False
    if not is_read_alike:
        write_json(path, about)


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


def _tokenizer_class(to: Path, tokenizer: Any) -> str:
    """Names the class of transformers that reads texts from the folder as the model was trained."""
    return "AutoTokenizer" if reads_alike(AutoTokenizer.from_pretrained(to), tokenizer) else "PreTrainedTokenizerFast"


def _task(net: Any) -> str:
    """Names what a pipeline of transformers does with the model."""
    if type(net).__name__.endswith("ForSequenceClassification"):
        return "text-classification"
    return "text-generation" if net.can_generate() else "fill-mask"


def _trial(scheduler: Scheduler, arm: str | None, trial: str | None) -> dict[str, Any]:
    """Returns the end of the chosen trial, with its spec and the fingerprints of its data."""
    study, storage, ledger = scheduler.study, scheduler.storage, scheduler.ledger
    if arm is not None and arm not in study.arms:
        raise StudyError(f"no arm {arm!r}{nearest(arm, study.arms)}; expected {', '.join(study.arms)}")
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
    return {**ended[trial], "spec": start["spec"], "fingerprints": start["fingerprints"]}
