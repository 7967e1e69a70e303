"""The trial as a value: JSON there and back for every member of every list, refusals, pruning, identity."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, get_args

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from tests.support.specs import BUDGETS, DATA, INITS, SCHEDULES, TERMS, WORDPIECE
from tests.support.trials import distillation, flow, hard, model, phase
from trainables.config.data import Data, Tokenizer
from trainables.config.models import Init
from trainables.config.phase import Budget, Epochs, Phase, ReplySource, Steps, Stream, Tokens
from trainables.config.phase_run import PhaseRun, Start
from trainables.config.schedules import Constant, Schedule
from trainables.config.terms import Term
from trainables.config.trial import TrialSpec, trial_id
from trainables.config.value import digest, random_stream

TOKENIZERS: dict[str, dict[str, Any]] = {
    "wordpiece": WORDPIECE,
    "pretrained": {"kind": "pretrained", "name": "gpt2", "revision": "abc"},
}
REPLIES: dict[str, dict[str, Any]] = {
    "sampled": {
        "kind": "sampled", "by": "student", "share": {"kind": "rises_with_loss", "step": 0.2},
        "replay": {"size": 10, "fresh": "constant"}, "temperature": 0.9,
    },
    "interleaved": {"kind": "interleaved", "draft": "student", "teacher": "teacher", "top": 3, "share": 0.5},
}  # fmt: skip
LISTS: dict[str, tuple[Any, dict[str, dict[str, Any]]]] = {
    "data": (Data, DATA),
    "tokenizer": (Tokenizer, TOKENIZERS),
    "init": (Init, INITS),
    "term": (Term, TERMS),
    "schedule": (Schedule, SCHEDULES),
    "replies": (ReplySource, REPLIES),
    "budget": (Budget, BUDGETS),
}


def members(union: Any) -> list[type[BaseModel]]:
    """The classes of a discriminated union, through the tags."""
    found = []
    for member in get_args(get_args(union)[0]):
        found.append(get_args(member)[0] if get_args(member) else member)
    return found


def name_of(member: type[BaseModel]) -> str:
    kind = member.model_fields.get("kind")
    return str(get_args(kind.annotation)[0]) if kind else next(iter(member.model_fields))


def trial(changes: Callable[[dict[str, Any]], None] = lambda value: None, **more: Any) -> TrialSpec:
    value = {"data": DATA["python_docs"], **distillation(), **more}
    changes(value)
    return TrialSpec.model_validate(value)


# ----------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("which", LISTS)
def test_every_member_of_a_closed_list_has_an_example_here(which: str) -> None:
    union, examples = LISTS[which]
    assert [name_of(member) for member in members(union)] == list(examples)


@pytest.mark.parametrize(("which", "name"), [(which, name) for which in LISTS for name in LISTS[which][1]])
def test_every_member_of_a_closed_list_travels_as_json_and_comes_back_as_itself(which: str, name: str) -> None:
    union, examples = LISTS[which]
    adapter: TypeAdapter[Any] = TypeAdapter(union)
    value = adapter.validate_python(examples[name])
    assert name_of(type(value)) == name
    assert adapter.validate_json(adapter.dump_json(value)) == value
    assert hash(adapter.validate_json(adapter.dump_json(value))) == hash(value)


@pytest.mark.parametrize(("which", "name"), [(which, name) for which in LISTS for name in LISTS[which][1]])
def test_every_member_of_a_closed_list_refuses_unknown_keys_and_assignment(which: str, name: str) -> None:
    union, examples = LISTS[which]
    adapter: TypeAdapter[Any] = TypeAdapter(union)
    with pytest.raises(ValidationError, match="wieght"):
        adapter.validate_python({**examples[name], "wieght": 1})
    with pytest.raises(ValidationError, match="frozen"):
        adapter.validate_python(examples[name]).kind = "other"


@pytest.mark.parametrize("schedule", [2, *SCHEDULES.values()], ids=["number", *SCHEDULES])
@pytest.mark.parametrize("term", TERMS)
def test_a_trial_travels_as_json_and_comes_back_as_itself(term: str, schedule: Any) -> None:
    if term == "cross_entropy" and schedule == SCHEDULES["off_when_better"]:
        pytest.skip("an off-switch compares two models")
    terms = {"student_hard": hard("student"), "x": {**TERMS[term], "weight": schedule}}
    spec = trial(
        lambda value: value["phases"]["distil"].update(terms=terms, save_at=[0.5], for_each_dataset=["corpus"])
    )
    assert TrialSpec.model_validate_json(spec.model_dump_json()) == spec
    assert TrialSpec.model_validate(spec.model_dump(mode="json")) == spec


def test_short_forms_are_read_as_the_long_ones() -> None:
    spec = trial()
    assert list(spec.data) == ["corpus"]
    assert spec.phases["teach"].optimizer_of("teacher").lr == 5e-3
    long = spec.model_dump(mode="json")
    assert TrialSpec.model_validate(long) == spec and "kind" not in long["data"]


def test_every_term_names_what_it_reads_and_the_one_it_teaches() -> None:
    for value in TERMS.values():
        term = TypeAdapter(Term).validate_python(value)
        assert term.target == "student"
        assert set(term.reads) == ({"student"} if value["kind"] == "cross_entropy" else {"teacher", "student"})


# ------------------------------------------------------------------------------------------------------------- refusals


def refused(message: str, change: Callable[[dict[str, Any]], Any]) -> Any:
    return pytest.param(change, message, id=message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        refused("no model 'techer'", lambda v: v["phases"]["distil"]["terms"].update(x=flow("techer", "student"))),
        refused("no data set 'corpse'", lambda v: v["phases"]["distil"].update(streams={"main": {"data": "corpse"}})),
        refused("no data set 'cola'", lambda v: v["phases"]["distil"].update(for_each_dataset=["cola"])),
        refused("no phase 'tech'", lambda v: v["phases"]["distil"].update(start={"student": "tech"})),
        refused("'teach' does not train 'student'", lambda v: v["phases"]["distil"].update(start={"student": "teach"})),
        refused("keeps no weights at 0.5", lambda v: v["phases"]["distil"].update(start={"teacher": "teach@0.5"})),
        refused("'teach@x' is not the start of a phase", lambda v: v["phases"]["distil"].update(start={"teacher": "teach@x"})),
        refused(
            r"'teach\[corpus\]' is not there; expected teach",
            lambda v: v["phases"]["distil"].update(start={"teacher": "teach[corpus]"}),
        ),
        refused("trained but no term teaches it", lambda v: v["phases"]["distil"]["train"].update(teacher="full")),
        refused(
            "teaches 'teacher', which this phase does not train",
            lambda v: v["phases"]["distil"]["terms"].update(x=flow("student", "teacher")),
        ),
        refused("no optimizer for model 'student'", lambda v: v["phases"]["distil"].update(optimizer={})),
        refused(
            "optimizer for 'teacher', which",
            lambda v: v["phases"]["distil"].update(optimizer={"all": {"lr": 1}, "teacher": {"lr": 1}}),
        ),
        refused("every term has weight 0", lambda v: [term.update(weight=0) for part in v["phases"].values() for term in part["terms"].values()]),
        refused("reads stream 'side'", lambda v: v["phases"]["teach"]["terms"]["teacher_hard"].update(on="side")),
        refused("evaluate must rise and end in 1", lambda v: v["phases"]["teach"].update(evaluate=[0.5])),
        refused("evaluate must rise and end in 1", lambda v: v["phases"]["teach"].update(evaluate=[0.5, 0.25, 1])),
        refused("flows from 'student' to itself", lambda v: v["phases"]["distil"]["terms"].update(x=flow("student", "student"))),
        refused("tau_squared", lambda v: v["phases"]["distil"]["terms"]["teacher_to_student"].pop("tau_squared")),
        refused(
            "it is for flows, not for a hard loss",
            lambda v: v["phases"]["teach"]["terms"]["teacher_hard"].update(weight=SCHEDULES["off_when_better"]),
        ),
        refused("must have one of the keys: steps, tokens, epochs", lambda v: v["phases"]["teach"].update(budget={})),
        refused("remaps form a cycle", lambda v: [v["models"][a].update(init={"kind": "remap", "from": b, "depth": "stack"})
                                                  for a, b in (("teacher", "student"), ("student", "teacher"))]),
        refused("no model 'none'", lambda v: v["models"]["student"].update(init={**INITS["remap"], "from": "none"})),
        refused("width 16 is not a multiple of heads 3", lambda v: v["models"]["student"].update(heads=3)),
        refused("needs layers", lambda v: v["models"]["student"].pop("layers")),
        refused("bring their own shape: remove layers", lambda v: v["models"].update(student={"pretrained": "x", "layers": 2})),
        refused("remove init", lambda v: v["models"].update(student={"pretrained": "x", "init": INITS["remap"]})),
        refused("add up to more than 1", lambda v: v["phases"]["teach"].update(
            streams={"main": {"corruption": {"mask": 0.8, "random": 0.3}}})),
        refused("greater than 0", lambda v: v["phases"]["teach"]["optimizer"].update(lr=0)),
        refused("greater than or equal to 0", lambda v: v["phases"]["teach"]["terms"]["teacher_hard"].update(weight=-1)),
        refused("pattern", lambda v: v["models"].update({"a b": model()})),
    ],
)  # fmt: skip
def test_a_trial_that_makes_no_sense_is_refused_with_the_reason(
    change: Callable[[dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        trial(change)


ASKED = {"kind": "python_instructions", "tokenizer": WORDPIECE}
SCORED = {"kind": "instruction_files", "test": "a.jsonl", "tokenizer": WORDPIECE}
BY = {name: {"kind": "sampled", "by": name} for name in ("teacher", "student", "nobody")}


def answering_trial(change: Callable[[dict[str, Any], dict[str, Any]], Any] = lambda value, main: None) -> TrialSpec:
    """`change` is given the trial and the stream `main` of its phase `distil`."""
    data = {"ask": ASKED, "scored": SCORED, "corpus": DATA["python_docs"], "single": DATA["labelled_files"]}
    value = copy.deepcopy({"data": data, **distillation(teacher=model("gpt2"), student=model("gpt2"))})
    for part in value["phases"].values():
        part["streams"] = {"main": {"data": "ask"}}
    change(value, value["phases"]["distil"]["streams"]["main"])
    return TrialSpec.model_validate(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        refused("distil.eval_only: there is no data set 'more'", lambda v, main: v["phases"]["distil"].update(eval_only=["more"])),
        refused("distil.eval_only: corpus has no replies to score; expected instructions", lambda v, main: v["phases"]["distil"].update(eval_only=["corpus"])),
        refused("distil.eval_only: ask is scored anyway", lambda v, main: v["phases"]["distil"].update(eval_only=["ask"])),
        refused("replies.replay.size: 7 is less than a batch of 8", lambda v, main: main.update(replies={**BY["teacher"], "replay": {"size": 7}})),
        refused("distil.for_each_dataset: ask is a set of instructions, corpus is a corpus; expected data sets of one format", lambda v, main: v["phases"]["distil"].update(for_each_dataset=["ask", "corpus"])),
        refused("distil.streams.main.replies: replies are for instructions, and corpus is a corpus", lambda v, main: main.update(data="corpus", replies=BY["teacher"])),
        refused("distil.streams.main: scored has no train", lambda v, main: main.update(data="scored")),
        refused("distil.streams.main.corruption: corruption is for corpora, and ask is a set of instructions", lambda v, main: main.update(corruption={"probability": 0.3})),
        refused("distil.budget: a budget of tokens is for corpora", lambda v, main: v["phases"]["distil"].update(budget={"tokens": 99})),
        refused("distil.terms.student_hard: replies of 'student', which learns here, are no labels", lambda v, main: main.update(replies=BY["student"])),
        refused("distil.terms.student_hard: replies of 'student', which learns here", lambda v, main: main.update(replies=REPLIES["interleaved"])),
        refused("distil.streams.main.replies: there is no model 'nobody'", lambda v, main: main.update(replies=BY["nobody"])),
        refused("once keeps every reply: remove replay", lambda v, main: main.update(replies={**BY["teacher"], "once": True, "replay": {}})),
        refused("share 2: expected a fraction of the steps", lambda v, main: main.update(replies={**BY["teacher"], "share": {"kind": "linear", "start": 0, "end": 2}})),
        refused("share 1.5: expected a fraction of the steps", lambda v, main: main.update(replies={**BY["teacher"], "share": 1.5})),
        refused("prompt_length 256 leaves no room for a reply in length 128", lambda v, main: v["data"]["ask"].update(length=128)),
        refused("needs train, or test", lambda v, main: v["data"]["scored"].pop("test")),
    ],
)  # fmt: skip
def test_instructions_and_replies_that_make_no_sense_are_refused_with_the_reason(
    change: Callable[[dict[str, Any], dict[str, Any]], None], message: str
) -> None:
    answering_trial()
    with pytest.raises(ValidationError, match=message):
        answering_trial(change)


def test_what_answers_may_be_learnt_from_in_these_ways() -> None:
    def second_stream(value: dict[str, Any], main: dict[str, Any]) -> None:
        main.update(replies=REPLIES["sampled"])
        value["phases"]["distil"]["streams"]["data"] = {"data": "ask"}
        value["phases"]["distil"]["terms"]["student_hard"]["on"] = "data"

    answering_trial(second_stream)
    answering_trial(lambda _, main: main.update(replies=BY["teacher"]))  # frozen here: its replies are labels
    spec = answering_trial(lambda _, main: main.update(replies=BY["teacher"], corruption=None))
    assert spec.models_of("distil") == ("teacher", "student")

    def sequence(value: dict[str, Any], main: dict[str, Any]) -> None:
        main.update(replies=BY["teacher"])
        del value["phases"]["distil"]["terms"]["teacher_to_student"]

    spec = answering_trial(sequence).pruned()  # who only answers is needed, and so is the phase that taught it
    assert list(spec.phases) == ["teach", "distil"] and spec.models_of("distil") == ("teacher", "student")


def test_phases_that_start_from_each_other_are_refused() -> None:
    phases = {
        name: phase(of, {"h": hard(of), "f": flow(other, of)}, start={other: start})
        for name, of, other, start in (("one", "a", "b", "two"), ("two", "b", "a", "one"))
    }
    with pytest.raises(ValidationError, match="phases form a cycle: one -> two -> one"):
        TrialSpec.model_validate(
            {"data": DATA["python_docs"], "models": {"a": model(), "b": model()}, "phases": phases}
        )


def test_a_place_to_start_has_a_phase_a_data_set_and_a_fraction() -> None:
    assert Start.parse("teach") == Start(PhaseRun("teach"))
    assert Start.parse("teach@0.5") == Start(PhaseRun("teach"), 0.5)
    assert Start.parse("teach[cola]@0.5") == Start(PhaseRun("teach", "cola"), 0.5)


# -------------------------------------------------------------------------------------------------------------- pruning


def alone(weight: Any = 0) -> TrialSpec:
    return trial(lambda v: v["phases"]["distil"]["terms"]["teacher_to_student"].update(weight=weight))


@pytest.mark.parametrize(
    "off", [0, 0.0, *({**SCHEDULES[k], "start": 0, "end": 0} for k in ("linear", "cosine", "step"))]
)
def test_a_term_of_weight_zero_is_pruned_with_its_teacher_and_the_teachers_phase(off: Any) -> None:
    lean = alone(off).pruned()
    assert list(lean.phases) == ["distil"] and list(lean.models) == ["student"]
    assert list(lean.phases["distil"].terms) == ["student_hard"]


def test_a_weight_that_is_zero_only_now_and_then_stays() -> None:
    assert not any(
        p.is_off for p in (Constant(1), *(TypeAdapter(Schedule).validate_python(v) for v in SCHEDULES.values()))
    )
    assert list(alone({"kind": "linear", "start": 0, "end": 1}).pruned().models) == ["teacher", "student"]


def test_pruning_twice_is_pruning_once() -> None:
    for spec in (trial(), alone(), remapped()):
        assert spec.pruned().pruned() == spec.pruned()
        assert TrialSpec.model_validate(spec.pruned().model_dump(mode="json")) == spec.pruned()


def remapped() -> TrialSpec:
    def change(value: dict[str, Any]) -> None:
        value["models"]["student"]["init"] = {"kind": "remap", "from": "teacher", "depth": "stack"}
        value["phases"]["distil"]["terms"]["teacher_to_student"]["weight"] = 0

    return trial(change)


def test_the_source_of_a_remap_stays_though_no_term_reads_it() -> None:
    lean = remapped().pruned()
    assert list(lean.phases) == ["teach", "distil"] and list(lean.models) == ["teacher", "student"]
    assert lean.models_of("distil") == ("student",)


def test_a_phase_that_no_other_reads_is_a_result_and_stays() -> None:
    def change(value: dict[str, Any]) -> None:
        value["phases"]["extra"] = phase("teacher", {"h": hard("teacher")})
        value["phases"]["distil"]["terms"]["teacher_to_student"]["weight"] = 0

    assert list(trial(change).pruned().phases) == ["teach", "distil", "extra"]


def test_an_ablation_is_the_trial_in_which_the_term_never_stood() -> None:
    def without(value: dict[str, Any]) -> None:
        del value["models"]["teacher"], value["phases"]["teach"]
        del value["phases"]["distil"]["terms"]["teacher_to_student"]

    found = {"data:corpus": "x"}
    assert trial_id(alone(), found) == trial_id(trial(without), found) != trial_id(trial(), found)


def test_a_trial_up_to_a_phase_has_what_that_phase_needs_and_prunes_to_itself() -> None:
    data = {"corpus": DATA["python_docs"], "long": {**DATA["files"], "length": 512}}
    spec = trial(data=data).pruned()
    assert list(spec.upto("teach").phases) == ["teach"] and list(spec.upto("teach").models) == ["teacher"]
    assert spec.upto("distil") == spec
    assert spec.upto("teach").pruned() == spec.upto("teach")
    assert spec.upto("teach").data == spec.data  # models are made for the longest sequence of the trial


def test_a_later_start_skips_a_phase_in_which_an_ablation_trains_no_model() -> None:
    def change(value: dict[str, Any]) -> None:
        both = {"t": hard("teacher", weight=0), "s": hard("student"), "f": flow("teacher", "student")}
        value["phases"]["together"] = phase(("teacher", "student"), both)
        value["phases"]["after"] = phase(
            "teacher", {"h": hard("teacher"), "f": flow("student", "teacher")}, start={"teacher": "together"}
        )

    lean = trial(change).pruned()
    assert lean.phases["together"].train == {"student": "full"}
    assert lean.origin("after", "teacher") == "teach"
    assert TrialSpec.model_validate(lean.model_dump(mode="json")) == lean


def test_a_model_starts_where_the_latest_earlier_phase_left_it() -> None:
    def change(value: dict[str, Any]) -> None:
        value["phases"]["more"] = phase("teacher", {"h": hard("teacher")}, for_each_dataset=["corpus"])
        value["phases"]["last"] = phase("teacher", {"h": hard("teacher")})

    spec = trial(change)
    assert spec.origin("teach", "teacher") is None and spec.origin("distil", "teacher") == "teach"
    assert spec.origin("last", "teacher") == "teach"  # what fans out is never chained
    assert spec.order() == ("teach", "distil", "more", "last")


def test_phases_run_after_those_that_they_start_from_whatever_the_order_of_the_file() -> None:
    spec = trial(lambda v: v.update(phases=dict(reversed(v["phases"].items()))) or
                 v["phases"]["distil"].update(start={"teacher": "teach"}))  # fmt: skip
    assert list(spec.phases) == ["distil", "teach"] and spec.order() == ("teach", "distil")


# ------------------------------------------------------------------------------------------------------------- identity


def test_a_trials_id_counts_content_and_seed_and_not_where_data_or_weights_lie() -> None:
    found = {"data:corpus": "x", "model:teacher": "w"}

    def at(place: str, **more: Any) -> TrialSpec:
        return trial(
            lambda v: v["models"].update(teacher={"pretrained": place, "revision": place}),
            data={**DATA["files"], "train": place},
            **more,
        )

    one = trial_id(at("a"), found)
    assert len(one) == 12 and int(one, 16) >= 0
    assert trial_id(at("b"), found) == one
    assert trial_id(at("a", seed=1), found) != one
    assert trial_id(at("a", precision="bf16"), found) != one
    assert trial_id(at("a"), {**found, "data:corpus": "y"}) != one
    assert trial_id(at("a"), {**found, "model:teacher": "v"}) != one


def test_a_digest_ignores_the_order_of_keys_and_refuses_what_json_has_not() -> None:
    assert digest({"a": 1, "b": [1.5, "é"]}) == digest({"b": [1.5, "é"], "a": 1}) != digest({"a": 1, "b": ["é", 1.5]})
    with pytest.raises(ValueError, match="JSON"):
        digest(float("nan"))


def test_random_streams_differ_by_every_part_of_their_purpose_and_fit_a_generator() -> None:
    streams = {
        random_stream(*purpose) for purpose in ((0, "a"), (1, "a"), (0, "b"), (0, "a", 0), ("0", "a"), (0, "a", 1))
    }
    assert len(streams) == 6 and all(0 <= stream < 2**63 for stream in streams)
    assert random_stream(0, "mask", "teach", "main", 3) == 3136358484447418089


def test_a_phase_states_its_defaults_in_one_place() -> None:
    """Defaults that a study leaves out are in its key: a default that changes must change keys, so none hides in code.

    Early stopping and `mix` are absent where they are not used: they came when phases had been stored without them.
    """
    value = Phase.model_validate(phase("m", {"h": hard("m")})).model_dump(mode="json")
    assert set(value) == Phase.model_fields.keys() - {"early_stopping"}
    assert value["streams"]["main"] == Stream().model_dump(mode="json")
    assert set(value["streams"]["main"]) == Stream.model_fields.keys() - {"mix"}


def test_a_budget_is_scaled_in_its_own_unit() -> None:
    assert Steps(steps=96).scaled(2.39) == Steps(steps=229) and Steps(steps=1).scaled(0.1) == Steps(steps=1)
    assert Tokens(tokens=1000).scaled(1.5) == Tokens(tokens=1500)
    assert Epochs(epochs=3).scaled(1.0 / 3) == Epochs(epochs=1)
