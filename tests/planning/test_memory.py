"""Memory by part, what a slot has, and the cheapest change where the largest trial does not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from orchestrator.planning import memory
from orchestrator.planning.memory import FP32, PROCESS, WASTE, estimate_memory, largest, memory_lines, room
from orchestrator.planning.meta_models import At, ReachableTrial, Rows, Shapes, reachable
from orchestrator.study.errors import StudyError
from orchestrator.study.schema import Limits, Search, Slot, StopEarly, Study
from tests.support.shapes import LENGTH, SPECIAL, shapes, study
from tests.support.trials import distillation, flow, hard, model, phase
from trainables.config.models import Model
from trainables.config.phase import Phase
from trainables.models import build, lora, output_head
from trainables.training.optimizers import make_optimizer
from trainables.training.phase_graph import PhaseRun, phase_runs

SOFT = "phases.distil.terms.teacher_to_student"


def reached(value: Study) -> ReachableTrial:
    return ReachableTrial(value.spec(seed=0).pruned(), "the trial", {})


def need_of(value: Study, name: str = "distil", rows: int | None = None) -> memory.MemoryEstimate:
    return estimate_memory(reached(value), PhaseRun(name), value.slot, shapes(), rows)


def lines(value: Study) -> list[str]:
    return memory_lines(value, shapes(), list(reachable(value)))


def wide(**changes: Any) -> dict[str, Any]:
    """A trial whose steps need more than its evaluations and its checkpoints."""
    trial = distillation(
        teacher=model(layers=2, width=32, intermediate_size=128),
        student=model(layers=4, width=32, intermediate_size=128),
    )
    data = {"kind": "python_docs", "tokenizer": {"kind": "wordpiece", "size": 160}, "length": 128, "evaluate": 1}
    trial = {"data": data, **trial}
    for name in trial["phases"]:
        trial["phases"][name] |= {"batch": 64, **changes}
    return trial


# ---------------------------------------------------------------------------------------------------------------- parts


def test_each_part_is_what_it_is_called() -> None:
    value, one = study(trial=wide()), shapes()
    spec, found = value.spec(seed=0), need_of(value)
    student, teacher = (FP32 * one.num_parameters(spec.models[name], 128) for name in ("student", "teacher"))
    parts = found.parts
    assert (parts["weights"], parts["optimizer"], parts["teacher"]) == (student, 2 * student, teacher)
    assert parts["gradients"] == student + 2 * FP32 * 160 * 32  # the embeddings are the head's weights, too
    assert parts["process"] == PROCESS["cpu"]
    rows = Rows(64, 128, 19)
    forwards = {
        n: one.forward(spec.models[n], 128, rows, trained=n == "student", at=At()) for n in ("student", "teacher")
    }
    given = 64 * 19 * 32 * 4  # hidden states at supervised positions: what the terms start from
    assert parts["activations"] == forwards["student"].kept + forwards["teacher"].peak - given
    assert parts["logits"] > 4 * 64 * 19 * 160 * 4  # in one chunk: logits of both, log-probabilities, a gradient
    assert parts["allocator"] == WASTE["cpu"] * sum(parts[p] for p in ("gradients", "activations", "logits"))
    assert found.total == sum(parts.values()) and (found.rows, found.share, found.when) == (64, 64, "")


def test_both_sides_of_mutual_learning_are_trained_and_no_one_is_a_teacher() -> None:
    terms = {
        "a": hard("teacher"),
        "b": hard("student"),
        "c": flow("teacher", "student"),
        "d": flow("student", "teacher"),
    }
    both = distillation()
    both["phases"] = {"distil": phase(("teacher", "student"), terms, batch=64)}
    found = need_of(study(trial={**wide(), **both})).parts
    assert found["teacher"] == 0 and found["weights"] == 2 * FP32 * shapes().num_parameters(reached(study(trial={**wide(), **both})).spec.models["student"], 128)  # fmt: skip


def test_a_worker_of_several_has_its_share_and_gradients_twice() -> None:
    alone, shared = need_of(study(trial=wide())), need_of(study(trial=wide(), slot={"workers": 4}))
    assert shared.share == 16 and shared.parts["weights"] == alone.parts["weights"]
    assert shared.parts["gradients"] == alone.parts["gradients"] + alone.parts["weights"]
    assert shared.parts["activations"] < 0.3 * alone.parts["activations"]
    assert need_of(study(trial=wide()), rows=1).parts["activations"] < shared.parts["activations"]


def test_a_term_that_is_off_takes_no_teacher() -> None:
    parts = need_of(study(trial=wide(), fixed={f"{SOFT}.weight": 0})).parts
    assert parts["teacher"] == 0 and parts["logits"] < need_of(study(trial=wide())).parts["logits"]


def test_an_evaluation_and_a_restart_can_need_more_than_a_step() -> None:
    long = study(trial={**wide(batch=1), "data": {**wide()["data"], "evaluate": 500}})
    evaluated = need_of(long)
    assert evaluated.when == " while it is evaluated" and "phase distil of the trial while" in evaluated.where
    rows, spec = Rows(32, 128, 19), long.spec(seed=0)
    assert evaluated.parts["evaluation"] == shapes().scoring(spec.models["student"], 128, rows, at=At())
    heavy = study(trial={**wide(batch=1), "data": {**wide()["data"], "length": 8}})
    again = need_of(heavy)
    assert (
        again.when == " while it goes on from a checkpoint" and again.parts["checkpoint"] == 6 * again.parts["weights"]
    )
    on_gpu = heavy.model_copy(update={"slot": Slot(gpus=1)})
    assert "checkpoint" not in need_of(on_gpu).parts  # there it lies in the machine's memory


def test_a_teacher_that_may_be_switched_off_is_evaluated_too() -> None:
    trial = wide(batch=1) | {"data": {**wide()["data"], "evaluate": 500}}
    trial["models"]["teacher"] |= {"width": 128, "intermediate_size": 512}
    plain = need_of(study(trial=trial))
    trial["phases"]["distil"]["terms"]["teacher_to_student"]["weight"] = {"kind": "off_when_better", "weight": 1}
    assert need_of(study(trial=trial)).parts["evaluation"] > 2 * plain.parts["evaluation"]


# ------------------------------------------------------------------------------------------------------ what a slot has


def test_room_is_what_is_stated_or_a_share_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_physical", lambda: memory.DRIVER + 24e9)
    monkeypatch.setattr(memory, "_cores", lambda: 8)
    assert room(Slot()) == 3e9 and room(Slot(cpus=4)) == 12e9 and room(Slot(workers=4)) == 3e9
    assert room(Slot(workers=2, cpus=3)) == 12e9 and room(Slot(cpus=99)) == 24e9
    assert room(Slot(memory_gb=7)) == 7e9 == room(Slot(memory_gb=7, gpus=1))


def test_room_on_a_gpu_is_the_part_of_it_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert room(Slot(gpus=1)) is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    properties = type("Properties", (), {"total_memory": 80 * 10**9})
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: properties)
    assert (room(Slot(gpus=1)), room(Slot(gpus=0.25))) == (80e9, 20e9)


def test_what_is_unknown_here_is_said_with_what_would_make_it_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = lines(study(trial=wide(), slot={"gpus": 1}))
    assert found[0].startswith("up to ") and "slot.memory_gb: N lets the plan check it" in found[1]
    assert "with one sequence at a time" in found[1] and found[2].startswith("a checkpoint in phase distil is ")


def test_on_a_gpu_the_micro_batch_that_fits_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = need_of(study(trial=wide(), slot={"gpus": 1}), rows=16)
    value = study(trial=wide(), slot={"gpus": 1, "memory_gb": fits.total / 1e9})
    assert need_of(value).rows == 16 and need_of(value).total <= fits.total
    assert "in micro-batches of 16 of 64 sequences" in lines(value)[0]
    one = need_of(value, rows=1)
    with pytest.raises(StudyError, match="phase distil of the trial needs "):
        lines(value.model_copy(update={"slot": Slot(gpus=1, memory_gb=0.999 * one.total / 1e9)}))


# -------------------------------------------------------------------------------------------------------- largest trial


def test_the_worst_ends_of_several_ranges_are_taken_together() -> None:
    value = study(
        trial=wide(),
        vary={
            "phases.distil.batch": {"int": [16, 128]},
            "data.length": {"choice": [32, 256]},
            "phases.distil.optimizer.lr": {"float": [1e-3, 1e-2]},
            "sizes": {"choice": {"small": {"models.student.layers": 1}, "large": {"models.student.layers": 5}}},
        },
    )
    worst = largest(value, shapes(), list(reachable(value)))
    spec = worst.reached.spec
    got = spec.phases["distil"].batch, spec.data["corpus"].length, spec.models["student"].layers, worst.share
    assert got == (128, 256, 5, 128)
    assert worst.reached.name == "point batch 128, length 256, sizes large"


def test_the_largest_is_named_by_its_arm() -> None:
    value = study(
        trial=wide(), arms={"taught": {}, "alone": {f"{SOFT}.weight": 0}, "big": {"models.student.layers": 6}}
    )
    assert "phase distil of arm big" in lines(value)[0]


def test_every_branch_of_a_phase_is_looked_at() -> None:
    trial = wide()
    trial["data"] = {"short": {**trial["data"], "length": LENGTH}, "long": trial["data"]}
    for name in trial["phases"]:
        trial["phases"][name]["for_each_dataset"] = ["short", "long"]
        trial["phases"][name]["streams"] = {"main": {"data": "short"}}
    trial["phases"]["distil"]["start"] = {"teacher": "teach[long]"}
    value = study(trial=trial)
    assert {str(i) for i in phase_runs(value.spec(seed=0))} >= {"distil[short]", "distil[long]"}
    assert "phase distil[long] of the trial" in largest(value, shapes(), reachable(value)).where


# ---------------------------------------------------------------------------------------------------- cheapest change


def changed(value: Study, slot: Mapping[str, Any] | None = None, **trial: Any) -> float:
    after = value.model_copy(
        update={
            "slot": value.slot.model_copy(update=dict(slot or {})),
            "fixed": {path.replace("__", "."): part for path, part in trial.items()},
        }
    )
    return largest(after, shapes(), reachable(after)).total


ODD = {"batch": 63}  # no two workers can share it
LEAN = {"gradient_checkpointing": True, "optimizer": {"lr": 1e-3, "kind": "adafactor"}}


def one_over() -> dict[str, Any]:
    """Nothing but its batch makes a phase large, and the other phase is none."""
    trial = {**wide(**ODD, **LEAN), "precision": "bf16"}
    trial["phases"]["teach"]["batch"] = 9
    return trial


@pytest.mark.parametrize(
    ("trial", "slot", "change", "says"),
    [
        (wide(), {}, {"slot": {"workers": 4}}, "slot.workers: 4"),
        (wide(**ODD, gradient_checkpointing=True), {}, {"precision": "bf16"}, "trial.precision: bf16"),
        (one_over(), {}, {"phases__distil__batch": 31, "phases__teach__batch": 9}, "trial.phases.distil.batch: 31"),
        ({**wide(**ODD, **LEAN), "precision": "bf16"}, {}, {"phases__distil__batch": 7, "phases__teach__batch": 7}, "trial.phases.teach.batch: 7, trial.phases.distil.batch: 7"),
        (wide(batch=1, **LEAN), {}, {"data__length": 32}, "trial.data.length: 32"),
        ({**wide(**LEAN), "precision": "bf16"}, {"gpus": 1}, {"data__length": 32}, "trial.data.length: 32"),
    ],
)  # fmt: skip
def test_the_first_change_that_makes_it_fit_is_named(
    trial: dict[str, Any], slot: dict[str, Any], change: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot that has just what the changed study needs; whatever comes before in the order needs more."""
    if trial["phases"]["distil"]["batch"] == 1:  # a step must count, not a restart
        monkeypatch.setattr(memory._Phase, "restart", lambda self: {})
    value = study(trial=trial, slot=slot)
    options = {key: part for key, part in change.items() if key != "slot"}
    rows = 1 if slot.get("gpus") else None
    after = value.model_copy(
        update={
            "slot": value.slot.model_copy(update=change.get("slot", {})),
            "fixed": {path.replace("__", "."): part for path, part in options.items()},
        }
    )
    enough = largest(after, shapes(), reachable(after), rows).total
    tight = value.model_copy(update={"slot": Slot(**slot, memory_gb=enough / 1e9)})
    with pytest.raises(StudyError) as error:
        lines(tight)
    text = str(error.value)
    assert text.startswith("mine.yaml: phase distil of the trial needs ") and "\n" not in text
    assert f"(process {'600' if slot else '650'} MB, weights " in text and ", activations " in text
    assert text.endswith(f"the cheapest change that makes it fit: {says}")
    fitting = after.model_copy(update={"slot": after.slot.model_copy(update={"memory_gb": enough / 1e9})})
    assert lines(fitting)[0].startswith("up to ")


def test_fewer_trials_at_a_time_come_first_where_they_share_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    value = study(trial=wide())
    monkeypatch.setattr(memory, "_cores", lambda: 4)
    monkeypatch.setattr(memory, "_physical", lambda: memory.DRIVER + 2 * 1.01 * changed(value))
    with pytest.raises(StudyError, match=re.escape("makes it fit: slot.cpus: 2 (2 at a time)")):
        lines(value)
    assert lines(value.model_copy(update={"slot": Slot(cpus=2)}))


def test_a_larger_part_of_a_gpu_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    value = study(trial=wide(), slot={"gpus": 0.2})
    total = 2.01 * need_of(value, rows=1).total
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: type("P", (), {"total_memory": total}))
    with pytest.raises(StudyError, match=re.escape("makes it fit: slot.gpus: 0.5")):
        lines(value)


def test_fewer_layers_come_last_and_then_there_is_nothing() -> None:
    trial = wide(batch=1) | {"data": {**wide()["data"], "length": 16}}
    trial["models"]["student"] |= {"layers": 12}
    value = study(trial=trial)
    enough = changed(value, models__student__layers=3)
    with pytest.raises(StudyError, match=r"makes it fit: trial\.models\.student\.layers: 3$"):
        lines(value.model_copy(update={"slot": Slot(memory_gb=enough / 1e9)}))
    with pytest.raises(
        StudyError, match=r"nothing that was tried makes it fit; the largest model is student with [0-9,]+ parameters$"
    ):
        lines(value.model_copy(update={"slot": Slot(memory_gb=0.1)}))


def billions(terms: dict[str, Any], train: Any = "student") -> dict[str, Any]:
    return {
        "data": {"kind": "python_docs", "tokenizer": {"kind": "wordpiece", "size": 160}, "length": 512},
        "models": {
            "teacher": {"family": "llama", "layers": 28, "width": 3072, "intermediate_size": 8192, "heads": 24},
            "student": {"family": "llama", "layers": 16, "width": 2048, "intermediate_size": 8192, "heads": 32},
        },
        "phases": {"distil": phase(train, terms, streams={"main": {"corruption": None}})},
    }


def test_a_billion_parameters_are_counted_without_a_byte() -> None:
    """A student of more than a billion parameters with a teacher of 3 billion has no place on 24 GB as it is."""
    trial = billions({"f": flow("teacher", "student")})
    value = study(trial=trial, slot={"gpus": 1, "memory_gb": 24})
    parts = need_of(value, rows=1).parts
    # by hand: embeddings and head, attention's four matrices, three of the inner layer, two norms each and a last one
    student = 2 * 160 * 2048 + 16 * (4 * 2048**2 + 3 * 2048 * 8192 + 2 * 2048) + 2048
    teacher = 2 * 160 * 3072 + 28 * (4 * 3072**2 + 3 * 3072 * 8192 + 2 * 3072) + 3072
    assert (student, teacher) == (1_074_464_768, 3_172_051_968)
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (4 * student, 4 * student, 8 * student)
    assert parts["teacher"] == 4 * teacher
    with pytest.raises(StudyError, match=r"needs 3\d(\.\d)? GB .* a slot has 24 GB .*fit: (.*)$") as error:
        lines(value)
    text = str(error.value)
    assert all(f"{part} " in text for part in ("weights", "gradients", "optimizer", "activations", "logits", "teacher"))
    assert text.endswith("trial.models.teacher.dtype: bf16, trial.phases.distil.optimizer.kind: adamw_8bit")
    lean = {
        "models.teacher.dtype": "bf16",
        "phases.distil.gradient_checkpointing": True,
        "phases.distil.optimizer.kind": "adamw_8bit",
    }
    fits = value.model_copy(update={"fixed": lean})
    parts = need_of(fits, rows=1).parts
    small = 4 * 2 * 33 * 2048  # moments of 33 norms, in fp32: fewer than 4,096 numbers each
    large = student - 33 * 2048
    assert parts["teacher"] == 2 * teacher and parts["weights"] == parts["gradients"] == 4 * student
    assert parts["optimizer"] == 2 * large + 2 * 4 * large // 256 + small
    assert lines(fits)[0].startswith("up to ") and " of 24 GB in phase distil" in lines(fits)[0]
    assert lines(value.model_copy(update={"slot": Slot(gpus=1, memory_gb=48)}))[0].startswith("up to ")


def test_a_vocabulary_of_128_thousand_is_counted_too() -> None:
    """Llama 3.2's shapes: heads that share keys and values, one matrix for embeddings and head."""
    trial, num, shared = billions({"f": flow("teacher", "student")}), 128_256, {"tie_word_embeddings": True}
    for one in trial["models"].values():
        one["config"] = {**shared, "num_key_value_heads": 8}
    value, big = study(trial=trial, slot={"gpus": 1, "memory_gb": 24}), Shapes(vocab_size=num, special_ids=SPECIAL)
    found = estimate_memory(reached(value), PhaseRun("distil"), value.slot, big, 1)
    # by hand: keys and values are 8 of the student's 32 heads, 8 of the teacher's 24
    student = num * 2048 + 16 * (2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048) + 2048
    teacher = num * 3072 + 28 * (2 * 3072**2 + 2 * 3072 * 1024 + 3 * 3072 * 8192 + 2 * 3072) + 3072
    assert (student, teacher) == (1_235_814_400, 3_212_749_824)  # as on their cards
    parts = found.parts
    assert (parts["weights"], parts["optimizer"], parts["teacher"]) == (4 * student, 8 * student, 4 * teacher)
    assert (
        found.when == " while it is evaluated" and parts["evaluation"] > 2 * 32 * 512 * num * 4
    )  # logits of 32 sequences
    assert found.total > room(value.slot) == 24e9


def test_a_teacher_that_learns_too_fits_by_lora() -> None:
    """Both learn: only the pairs of the teacher have gradients and moments, beside its weights in bf16."""
    trial = billions(
        {"a": flow("teacher", "student"), "b": flow("student", "teacher", "reverse_kl")}, train=("teacher", "student")
    )
    value = study(trial=trial, slot={"gpus": 1, "memory_gb": 24})
    with pytest.raises(StudyError, match=r"fit: .*train\.teacher: \{kind: lora\}") as error:
        lines(value)
    assert "trial.models.teacher.dtype: bf16" in str(error.value)
    lora = {"kind": "lora", "rank": 32}
    kinds = {"student": {"lr": 1e-3, "kind": "adamw_8bit"}, "teacher": {"lr": 1e-3}}
    trial["phases"]["distil"] |= {
        "train": {"teacher": lora, "student": "full"},
        "gradient_checkpointing": True,
        "optimizer": kinds,
    }
    trial["models"]["teacher"]["dtype"] = "bf16"
    fits = study(trial=trial, slot={"gpus": 1, "memory_gb": 24})
    parts = need_of(fits, rows=1).parts
    pairs = 28 * 2 * (32 * 3072 + 3072 * 32)  # query and value of each layer, in fp32
    student, teacher = 1_074_464_768, 3_172_051_968
    assert parts["weights"] == 4 * student + 2 * teacher + 4 * pairs and parts["teacher"] == 0
    assert parts["gradients"] == 4 * student + 4 * pairs
    large = student - 33 * 2048
    assert parts["optimizer"] == 2 * large + 8 * large // 256 + 8 * 33 * 2048 + 8 * pairs
    assert " of 24 GB in phase distil" in lines(fits)[0]


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "adamw_8bit"])
@pytest.mark.parametrize("how", ["full", {"kind": "lora", "rank": 4}])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_held_is_what_a_real_optimizer_holds(kind: str, how: Any, dtype: str) -> None:
    if kind == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    raw = phase("student", {"h": hard("student")}, optimizer={"lr": 1e-3, "kind": kind})
    spec = Phase.model_validate({**raw, "train": {"student": how}})
    value = Model.model_validate(model("llama", layers=2, width=64, intermediate_size=128, dtype=dtype))
    net = build.build(value, name="student", seed=0, vocab_size=160, special_ids=SPECIAL, length=LENGTH)
    if how != "full":
        lora.attach(net, spec.train["student"], name="student", seed=0)  # type: ignore[arg-type]
    learning = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(spec, {"student": learning})
    for parameter in learning:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tables = ("qmap1", "qmap2")
    state = [t for one in optimizer.state.values() for key, t in one.items() if isinstance(t, torch.Tensor) and t.ndim and key not in tables]  # fmt: skip
    found = memory.model_memory(shapes(), value, LENGTH, spec, "student")
    assert found.weights == sum(parameter.nbytes for parameter in net.parameters())
    assert found.gradients == sum(parameter.grad.nbytes for parameter in learning)
    assert found.optimizer == sum(tensor.nbytes for tensor in state)


def instructed(**stream: Any) -> dict[str, Any]:
    trial = billions({"f": flow("teacher", "student")})
    trial["models"] = {name: model("llama", layers=layers) for name, layers in (("teacher", 3), ("student", 2))}
    scoring = {"max_tokens": 8, "seeds": [1]}
    trial["data"] = {"kind": "python_instructions", "length": 64, "prompt_length": 40, "scoring": scoring, "evaluate": 2}  # fmt: skip
    trial["data"]["tokenizer"] = {"kind": "wordpiece", "size": 160}
    trial["phases"]["distil"]["streams"] = {"main": stream}
    return trial


def test_replies_take_a_cache_of_keys_and_values() -> None:
    by = {"kind": "sampled", "by": "student", "max_tokens": 20}
    value = study(trial=instructed(replies=by))
    one, spec = reached(value), value.spec(seed=0)
    counted = memory._Phase(one.spec, PhaseRun("distil"), value.slot, shapes())
    (name,) = found = counted.replying(8)
    of_token = 2 * spec.models["student"].layers * 16 * 4  # type: ignore[operator]
    assert name == "student" and found[name]["cache"] == of_token * 8 * (60 + 60 // 4 + 32)
    assert found[name]["weights"] == FP32 * shapes().num_parameters(spec.models["student"], 64)
    assert "gradients" not in found[name] and found[name]["teacher"] > found[name]["weights"]
    both = {"kind": "interleaved", "draft": "student", "teacher": "teacher", "max_tokens": 20}
    value = study(trial=instructed(replies=both))
    counted = memory._Phase(reached(value).spec, PhaseRun("distil"), value.slot, shapes())
    assert counted.replying(8)["student and teacher"]["cache"] == 2.5 * found[name]["cache"]
    assert not memory._Phase(
        reached(study(trial=instructed())).spec, PhaseRun("distil"), value.slot, shapes()
    ).replying(8)


def test_rows_of_instructions_are_supervised_where_replies_are() -> None:
    few, rows = Shapes(160, SPECIAL, reply_share=0.25), []
    for stream in ({}, {"replies": {"kind": "sampled", "by": "student"}}):
        counted = memory._Phase(reached(study(trial=instructed(**stream))).spec, PhaseRun("distil"), Slot(), few)
        rows += [found for name, _, _, found in counted._forwards() if name == "student"]
    assert rows == [Rows(2, 64, 16, packed=True), Rows(2, 64, 63, packed=True)]


# ----------------------------------------------------------------------------------------------------------- the rest


def test_checkpoints_are_counted_by_slot_twice_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_cores", lambda: 4)
    monkeypatch.setattr(memory, "_physical", lambda: 64e9)
    value = study(trial=wide(), slot={"cpus": 2})
    size = 3 * FP32 * shapes().num_parameters(value.spec(seed=0).models["student"], 128)
    text = lines(value)[-1]
    assert text.startswith(f"a checkpoint in phase distil is {memory.bytes_text(size)}; 2 slots keep up to {memory.bytes_text(4 * size)}")  # fmt: skip


@pytest.mark.parametrize(("room", "search", "is_too_little"), [(4.1, None, False), (3.9, None, True), (7.9, "asha", True), (8.1, "asha", False)])  # fmt: skip
def test_a_room_that_is_too_small_for_the_checkpoints_is_told(
    monkeypatch: pytest.MonkeyPatch, room: float, search: str | None, is_too_little: bool
) -> None:
    monkeypatch.setattr(memory, "_cores", lambda: 4)
    monkeypatch.setattr(memory, "_physical", lambda: 64e9)
    value = study(trial=wide(), slot={"cpus": 2})
    size = 3 * FP32 * shapes().num_parameters(value.spec(seed=0).models["student"], 128)
    early = Search(points=4, stop_early=StopEarly(kind="asha")) if search else None
    value = value.model_copy(update={"limits": Limits(checkpoint_gb=room * size / 1e9), "search": early})
    assert ("is too little for that" in lines(value)[-1]) == is_too_little


def test_a_model_that_cannot_run_without_content_leaves_memory_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no meta kernel\nfor this")

    monkeypatch.setattr(output_head, "head_inputs", fails)
    value = study(trial=wide())
    assert (
        memory_lines(value, Shapes(160, SPECIAL), list(reachable(value)))[0]
        == "unknown: a model cannot be run without content (bert: no meta kernel)"
    )


def test_slots_are_as_many_as_cores_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_cores", lambda: 4)
    asked = [Slot(), Slot(cpus=0.5), Slot(cpus=3), Slot(workers=2), Slot(workers=3), Slot(cpus=8)]
    assert [memory.num_slots(slot) for slot in asked] == [4, 8, 1, 2, 1, 1]
