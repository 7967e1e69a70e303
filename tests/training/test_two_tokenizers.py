"""Models with different tokenizers: each reads its own encoding of the same examples; texts and classes pass, tokens do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from orchestrator import sweep
from tests.support.trials import Lab, answering, distillation, flow, hard, inner, interleaved, model, sampled
from trainables.config.data import Data
from trainables.config.phase_run import PhaseRun
from trainables.config.trial import TrialSpec
from trainables.data.encode.instructions import encode_replies
from trainables.data.prepare import prepare
from trainables.data.prepared import open_data
from trainables.generation.context import Generation
from trainables.training import on_policy, readings
from trainables.training.forward import TermError

ADAPTER: TypeAdapter[Any] = TypeAdapter(Data)
Build = Callable[..., tuple[Lab, TrialSpec]]


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A byte-level BPE beside the WordPieces of the other data: other tokens, other ends, case and spaces kept."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        ["say red blue, write a response that appropriately completes the request"] * 3,
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>", "<pad>"], initial_alphabet=alphabet, show_progress=False),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("bpe")
    PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<end>", pad_token="<pad>").save_pretrained(folder)
    return {"kind": "pretrained", "name": str(folder)}


@pytest.fixture
def build(new_task_lab: Callable[[], Lab], instructed: Any, byte_level: dict[str, Any]) -> Build:
    """Prepares the data of a trial as its models read them: by a WordPiece, and by one of `tokenizers`."""

    def make(trial: dict[str, Any], changes: dict[str, Any] | None = None) -> tuple[Lab, TrialSpec]:
        base = new_task_lab()
        if '"ask"' in json.dumps(trial["phases"]):
            data = {"ask": {**instructed[1]["ask"], "prompt_length": 180, "length": 200}}
        else:
            data = {name: dict(base.data[name]) for name in ("corpus", "single")}
        owner = data[next(iter(data))]
        own = owner["tokenizer"]
        owner["tokenizers"] = {"bpe": byte_level, "more": {"kind": "wordpiece", "size": 100}, "again": own}
        used = {each.get("tokenizer") for each in trial["models"].values()}
        owner["tokenizers"] = {name: one for name, one in owner["tokenizers"].items() if name in used}
        lab = replace(base, data=data, fingerprints={})
        spec = lab.spec(trial, changes)
        prints = {
            f"data:{name}": prepare(spec.data[item], str(lab.root / "data"), spec.data, by=tokenizer).fingerprint
            for name, (item, tokenizer) in spec.readings().items()
        }
        return replace(lab, fingerprints=prints), spec

    return make


def opened(lab: Lab, name: str) -> Any:
    return open_data(str(lab.root / "data"), lab.fingerprints[f"data:{name}"])


def text_only(tokenizer: str | None = "bpe", **distil: Any) -> dict[str, Any]:
    """A teacher with another tokenizer answers; the student learns its texts."""
    trial = answering(streams=sampled("teacher", once=True))
    trial["phases"]["distil"] |= {"terms": {"learnt": hard("student")}, **distil}
    trial["models"]["teacher"] |= {"tokenizer": tokenizer} if tokenizer else {}
    return trial


def classified(tokenizer: str | None = "bpe", **models: Any) -> dict[str, Any]:
    trial = distillation(**models)
    for each in trial["phases"].values():
        each |= {"streams": {"main": {"data": "single"}}, "budget": {"steps": 4}, "evaluate": [1]}
    trial["models"]["teacher"] |= {"tokenizer": tokenizer} if tokenizer else {}
    return trial


# --------------------------------------------------------------------------------------------------------------- data


def test_two_encodings_have_the_same_exchanges_in_the_same_order(build: Build) -> None:
    lab, _ = build(text_only())
    ours, theirs = opened(lab, "ask"), opened(lab, "ask/bpe")
    assert ours.tokenizer_identity != theirs.tokenizer_identity
    for split in ("train", "dev", "test"):
        one, other = getattr(ours, split), getattr(theirs, split)
        assert len(one) == len(other) > 0 and any(one.lengths != other.lengths)
        for i in range(len(one)):
            assert one.references(i) == other.references(i)
            for data, part in ((ours, one), (theirs, other)):  # what is supervised, by the ids of each
                reply = part.reply(i).tolist()
                assert data.text(reply) == one.references(i)[0] and reply[-1] == data.end_id


def test_two_encodings_have_the_same_labelled_examples_in_the_same_order(build: Build) -> None:
    lab, _ = build(classified())
    ours, theirs = opened(lab, "single"), opened(lab, "single/bpe")
    for split in ("train", "dev", "test"):
        one, other = getattr(ours, split), getattr(theirs, split)
        assert one.labels.equal(other.labels) and len(one) > 0
        for i in range(len(one)):
            texts = [
                data.tokenizer.decode(part.ids(i), skip_special_tokens=True)
                for data, part in ((ours, one), (theirs, other))
            ]
            assert texts[0].startswith(texts[1]) and texts[1]  # the BPE's are cut at `length` earlier
    assert "% cut)" in theirs.summary() or " cut," in theirs.summary()


def test_a_row_too_long_for_one_tokenizer_is_left_out_for_all_and_it_is_said(build: Build) -> None:
    whole, _ = build(text_only())
    most = int(
        max(len(opened(whole, "ask").train.prompt(i)) for i in range(40))
    )  # nothing is left out by our tokenizer
    most_of_theirs = sorted(len(opened(whole, "ask/bpe").train.prompt(i)) for i in range(40))
    limit = most_of_theirs[20]
    assert most <= limit, "the BPE's prompts are the longer ones"
    lab, _ = build(text_only(), {"data.ask.prompt_length": limit})
    ours, theirs = opened(lab, "ask"), opened(lab, "ask/bpe")
    kept = [ours.train.references(i) for i in range(len(ours.train))]
    assert kept == [theirs.train.references(i) for i in range(len(theirs.train))]
    assert len(kept) < len(opened(whole, "ask").train)
    assert f"with a prompt over {limit} tokens of another tokenizer" in ours.summary()
    assert f"with a prompt over {limit} tokens" in theirs.summary() and "another" not in theirs.summary()


def test_a_reply_that_comes_as_text_is_encoded_as_if_it_stood_in_the_data(build: Build) -> None:
    lab, _ = build(text_only())
    for name in ("ask", "ask/bpe"):
        data, indices = opened(lab, name), [5, 0, 3]
        stored, texts = data.train.rows(indices), [data.train.references(i)[0] for i in indices]
        again = encode_replies(data, indices, texts, [True] * 3)
        for ours, theirs in ((again.prompts, stored.prompts), (again.replies, stored.replies)):
            assert [ids.tolist() for ids in ours] == [ids.tolist() for ids in theirs]
        cut = encode_replies(data, indices, texts, [False] * 3)
        assert [ids.tolist() for ids in cut.replies] == [ids.tolist()[:-1] for ids in stored.replies]
        (long,) = encode_replies(data, [0], ["red " * 500], [True]).replies
        assert len(long) + len(stored.prompts[1]) == data.length
        assert [len(ids) for ids in encode_replies(data, [0], [""], [False]).replies] == [1]  # nothing was said


# ------------------------------------------------------------------------------------------------------------- trials


@pytest.mark.parametrize("tokenizer", ["bpe", "more"])
def test_a_student_learns_the_texts_of_a_teacher_with_another_tokenizer(build: Build, tokenizer: str) -> None:
    lab, spec = build(text_only(tokenizer))
    ran = lab.run(spec)
    assert ran.of("distil", "student", "rougeL") and ran.of("distil", "teacher", "reply_tokens", "train")
    for phase, name, read in (("teach", "teacher", f"ask/{tokenizer}"), ("distil", "student", "ask")):
        assert len(ran.weights(phase, name)["transformer.wte.weight"]) == opened(lab, read).vocab_size


def test_a_teacher_that_says_what_the_data_say_changes_nothing(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, spec = build(text_only())
    theirs = opened(lab, "ask/bpe").train
    known = {theirs.prompt(i).tobytes(): theirs.reply(i) for i in range(len(theirs))}

    def quote(_net: Any, prompts: Any, *_: Any, **_more: Any) -> Generation:
        return Generation(tuple(known[prompt.tobytes()] for prompt in prompts), 1)

    monkeypatch.setattr(on_policy, "sample", quote)
    quoted = lab.run(spec)
    other_lab, other = build(text_only(streams={"main": {"data": "ask"}}))
    plain = other_lab.run(other)
    for metric, split in (("learnt", "train"), ("lm_loss", "dev"), ("rougeL", "test")):
        ours, expected = (ran.of("distil", "student", metric, split) for ran in (quoted, plain))
        assert ours == expected and len(ours) == 2
    ours, expected = (ran.weights("distil", "student") for ran in (quoted, plain))
    assert all(ours[name].equal(tensor) for name, tensor in expected.items())


def test_classes_are_compared_by_example(build: Build) -> None:
    """Both learn, each from its own encoding; what is recorded of an example is recorded of the same one."""
    trial = classified()
    rule = {"evaluate": [0.5, 1], "early_stopping": {"term": "teacher_to_student"}}
    trial["phases"]["distil"] |= {"train": {"student": "full", "teacher": "full"}, **rule}
    trial["phases"]["distil"]["terms"]["teacher_hard"] = hard("teacher")
    lab, spec = build(trial)
    ran = lab.run(spec)
    for split in ("train", "dev"):
        half, whole = ran.of("distil", "student", "teacher_to_student", split)
        assert 0 < half < 3 and 0 < whole < 3
    table = lab.store.examples(lab.key(spec, "distil"))
    assert table is not None
    student, teacher = (table[table["model"] == name] for name in ("student", "teacher"))
    for column in ("example", "label", "cluster"):
        assert student[column].tolist() == teacher[column].tolist() and len(student) > 0
    assert student["loss"].tolist() != teacher["loss"].tolist()


def test_labels_pass_between_tokenizers(build: Build) -> None:
    trial = classified()
    stream = {"data": "single", "labels": {"kind": "prediction_quality", "of": "teacher"}}
    trial["phases"]["distil"] |= {"streams": {"main": stream}, "terms": {"hard": hard("student")}}
    lab, spec = build(trial)
    ran = lab.run(spec)
    assert ran.of("distil", "teacher", "labeller_accuracy", "train") and ran.of("distil", "student", "accuracy")


@pytest.mark.parametrize("trial", [text_only, classified])
def test_one_tokenizer_given_as_two_is_one(build: Build, trial: Any) -> None:
    """Ids, keys and numbers: what a study stored before it named a second tokenizer is found again."""
    lab, spec = build(trial(None))
    other_lab, other = build(trial("again"))
    assert lab.fingerprints.items() <= other_lab.fingerprints.items()
    for name in spec.phases:
        assert lab.key(spec, name) == other_lab.key(other, name)
    one, two = lab.run(spec), other_lab.run(other)
    assert one.values == two.values and one.values


def test_a_phase_has_the_fingerprints_of_what_it_reads_in_its_key(build: Build) -> None:
    lab, spec = build(text_only())
    keys = {name: lab.key(spec, name) for name in spec.phases}
    for changed, phases in (("ask", {"distil"}), ("ask/bpe", {"teach", "distil"})):
        other = replace(lab, fingerprints={**lab.fingerprints, f"data:{changed}": "0" * 16})
        assert {name for name, key in keys.items() if other.key(spec, name) != key} == phases, changed


@pytest.mark.slow
def test_two_ranks_compute_what_one_does(build: Build) -> None:
    from tests.support.ranks import run_on_ranks
    from tests.support.trials import close_numbers

    lab, spec = build(classified())
    expected = lab.run(spec)
    other, same = build(classified())
    close_numbers(expected, run_on_ranks(other, same, 2), rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------- refusals

SOFT = {"soft": flow("teacher", "student")}
HELPER = interleaved(draft="helper")


@pytest.mark.parametrize(
    ("distil", "said"),
    [
        ({"terms": SOFT}, "term 'soft': forward_kl compares the tokens of teacher (bpe's tokenizer of 300 tokens) and student"),
        ({"streams": HELPER}, "stream 'main': each reply has tokens of helper (the data's tokenizer of "),
        ({"streams": sampled("teacher", replay={"size": 10})}, "stream 'main': replay keeps the tokens of replies, for student"),
    ],
)  # fmt: skip
def test_what_shares_tokens_is_refused(build: Build, distil: dict[str, Any], said: str) -> None:
    trial = text_only(**distil)
    trial["models"]["helper"] = model("gpt2")
    lab, spec = build(trial)
    with pytest.raises(TermError) as error:  # also where nobody looked at the plan
        lab.run(spec)
    assert str(error.value).startswith(f"phase distil, {said}") and "\n" not in str(error.value)
    assert "which differ; expected one tokenizer, or " in str(error.value)


def test_positions_and_sequences_are_not_shared(build: Build) -> None:
    deep = {"hard": hard("student"), "deep": inner("teacher", "student", "hidden_mse")}
    inside = classified()
    inside["phases"]["distil"]["terms"] = deep
    packed = distillation()
    packed["models"]["teacher"] |= {"tokenizer": "more"}
    packed["phases"]["distil"]["train"]["teacher"] = "full"
    packed["phases"]["distil"]["terms"] = {"one": hard("student"), "two": hard("teacher")}
    for trial, said in ((inside, "hidden_mse compares the positions of"), (packed, "corpus has no examples that are the same for student")):  # fmt: skip
        lab, spec = build(trial)
        with pytest.raises(TermError, match=said):
            readings.check_readings(
                spec, PhaseRun("distil", None), {name: opened(lab, name) for name in spec.readings()}
            )


# --------------------------------------------------------------------------------------------------------------- plan


@pytest.fixture
def planned(build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def make(trial: dict[str, Any], metric: str, mode: str = "max", **more: Any) -> tuple[int, str]:
        lab, spec = build(trial)
        value = spec.model_dump(mode="json", by_alias=True, exclude={"seed"})
        aim = {"phase": "distil", "model": "student", "metric": metric, "mode": mode}
        raw = {"question": "?", "trial": value, "objective": aim, "arms": {"only": {}}, "seeds": 1, **more}
        (tmp_path / "mine.yaml").write_text(json.dumps(raw))
        code = sweep.main([str(tmp_path / "mine.yaml"), "--dry-run", "--storage", lab.storage.uri])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.err if code else said.out

    return make


def test_the_plan_shows_each_tokenizer(planned: Any) -> None:
    code, said = planned(text_only(), "rougeL")
    assert code == 0, said
    assert "  tokenizer of " in said and "tokenizer bpe of 300 tokens, identity " in said
    assert said.count("ask, an example: ") == 2 and said.count("ask/bpe, an example: ") == 2


def test_the_plan_refuses_in_one_line(planned: Any) -> None:
    code, said = planned(text_only(terms=SOFT), "rougeL")
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1
    assert "phases: phase distil, term 'soft': forward_kl compares the tokens of teacher (bpe's" in lines[0]
    assert "replies, which pass as text (replies: {kind: sampled, by: teacher})" in lines[0]
    copied = classified(student=model(init={"kind": "remap", "from": "teacher", "depth": "first"}))
    code, said = planned(copied, "score")
    assert code == 2 and "models: student: a remap copies rows of embeddings, and the tokenizers of student (" in said
    copied["models"]["teacher"]["tokenizer"] = "tpyo"
    with pytest.raises(ValueError, match=r"models.teacher.tokenizer: there is no 'tpyo' in data.corpus.tokenizers"):
        planned(copied, "score")
    arms = {"one": {}, "two": {"models.student.tokenizer": "bpe"}}
    claims = {"c": {"arm": "one", "against": "two", "model": "student", "metric": "lm_loss"}}
    code, said = planned(text_only(), "rougeL", arms=arms, claims=claims)
    assert (
        code == 2
        and "claims.c: lm_loss is a mean over tokens, and what is compared has the data's tokenizer and bpe's" in said
    )
    search = {
        "vary": {"models.student.tokenizer": {"choice": ["bpe"]}},
        "search": {"sampler": "grid", "points": 1},
        "arms": {},
    }
    code, said = planned(text_only(), "lm_loss", "min", **search)
    assert code == 2 and "objective: lm_loss is a mean over tokens, and models.student.tokenizer varies" in said
