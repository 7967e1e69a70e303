"""The parts of a phase's memory, held to hand-computed counts, to real optimizers and to each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orchestrator.planning.memory import (
    FP32,
    PROCESS,
    SCORED_LOGITS,
    WASTE,
    ModelMemory,
    PhaseMemory,
)
from orchestrator.planning.meta_models import RowShape, Shapes
from tests.support.shapes import LENGTH, SPECIAL, shapes, study, wide
from tests.support.trials import distillation, flow, hard, model, phase
from trainables.config.models import Model
from trainables.config.phase import Phase
from trainables.config.phase_run import PhaseRun
from trainables.models import build, lora
from trainables.storage.files import bytes_text
from trainables.training.optimizers import make_optimizer

SOFT = "phases.distil.terms.teacher_to_student"
EVALUATED, RESTARTED = " while it is evaluated", " while it restarts from a checkpoint"


def memory_of(trial: dict[str, Any], workers: int = 1, one: Shapes | None = None, **fixed: Any) -> PhaseMemory:
    spec = study(trial=trial, fixed=fixed).spec(seed=0).pruned()
    return PhaseMemory(spec, PhaseRun("distil"), one or shapes(), workers=workers)


def test_each_part_is_what_it_is_called() -> None:
    found, one = memory_of(wide()), shapes()
    student, teacher = (FP32 * one.num_parameters(found.spec.models[name], 128) for name in ("student", "teacher"))
    parts = found.step(64)
    assert (parts["weights"], parts["optimizer"], parts["teacher"]) == (student, 2 * student, teacher)
    assert parts["gradients"] == student and parts["process"] == PROCESS["cpu"]
    row = RowShape(128, 19)
    kept = {
        n: one.activations(found.spec.models[n], 128, row, how="full", precision="fp32", drops=True)
        for n in ("student", "teacher")
    }
    assert parts["activations"] == kept["student"].kept(64) + kept["teacher"].one_layer(64)
    assert parts["logits"] > 4 * 64 * 19 * 160 * 4  # in one chunk: logits of both, log-probabilities, a gradient
    assert parts["allocator"] == WASTE["cpu"] * sum(parts[p] for p in ("gradients", "activations", "logits"))


def test_both_sides_of_mutual_learning_are_trained_and_no_one_is_a_teacher() -> None:
    terms = {
        "a": hard("teacher"),
        "b": hard("student"),
        "c": flow("teacher", "student"),
        "d": flow("student", "teacher"),
    }
    both = distillation()
    both["phases"] = {"distil": phase(("teacher", "student"), terms, batch=64)}
    found = memory_of({**wide(), **both})
    parts = found.step(64)
    assert parts["teacher"] == 0
    assert parts["weights"] == 2 * FP32 * shapes().num_parameters(found.spec.models["student"], 128)


def test_a_worker_of_several_has_its_share_and_gradients_twice() -> None:
    alone, shared = memory_of(wide()), memory_of(wide(), workers=4)
    assert (alone.share, shared.share) == (64, 16)
    whole, part = alone.step(64), shared.step(16)
    assert part["weights"] == whole["weights"] and part["gradients"] == 2 * whole["gradients"]
    assert alone.step(1)["activations"] < part["activations"] < 0.3 * whole["activations"]


def test_gradient_checkpointing_takes_less_than_half_of_the_activations() -> None:
    parts = memory_of(wide(gradient_checkpointing=True)).step(64)
    assert parts["activations"] < 0.6 * memory_of(wide()).step(64)["activations"]


def test_a_term_that_is_off_takes_no_teacher() -> None:
    parts = memory_of(wide(), **{f"{SOFT}.weight": 0}).step(64)
    assert parts["teacher"] == 0 and parts["logits"] < memory_of(wide()).step(64)["logits"]


def test_an_evaluation_holds_whole_logits_and_a_restart_the_checkpoint() -> None:
    long = memory_of({**wide(batch=1), "data": {**wide()["data"], "evaluate": 500}})
    row, student = RowShape(128, 19), long.spec.models["student"]
    layer = shapes().activations(student, 128, row, how="full", precision="fp32", drops=True).one_layer(32)
    assert long.moments(1)[EVALUATED]["evaluation"] == FP32 * SCORED_LOGITS * 32 * 19 * 160 + layer
    again = long.moments(1)[RESTARTED]
    assert again["checkpoint"] == 6 * again["weights"]
    on_gpu = PhaseMemory(long.spec, long.run, shapes(), "cuda")
    assert RESTARTED not in on_gpu.moments(1)  # there the checkpoint is read into the machine's memory


def test_a_teacher_that_may_be_switched_off_is_evaluated_too() -> None:
    trial = wide(batch=1) | {"data": {**wide()["data"], "evaluate": 500}}
    trial["models"]["teacher"] |= {"width": 128, "intermediate_size": 512}
    plain = memory_of(trial).evaluation()["evaluation"]
    trial["phases"]["distil"]["terms"]["teacher_to_student"]["weight"] = {"kind": "off_when_better", "weight": 1}
    assert memory_of(trial).evaluation()["evaluation"] > 1.5 * plain


# ------------------------------------------------------------------------------------------------------- large models


def billions(terms: dict[str, Any], train: Any = "student", **changes: Any) -> dict[str, Any]:
    return {
        "data": {"kind": "python_docs", "tokenizer": {"kind": "wordpiece", "size": 160}, "length": 512},
        "models": {
            "teacher": {"family": "llama", "layers": 28, "width": 3072, "intermediate_size": 8192, "heads": 24},
            "student": {"family": "llama", "layers": 16, "width": 2048, "intermediate_size": 8192, "heads": 32},
        },
        "phases": {"distil": phase(train, terms, streams={"main": {"corruption": None}}) | changes},
    }


# by hand: embeddings and head, attention's four matrices, three of the inner layer, two norms each and a last one
STUDENT = 2 * 160 * 2048 + 16 * (4 * 2048**2 + 3 * 2048 * 8192 + 2 * 2048) + 2048
TEACHER = 2 * 160 * 3072 + 28 * (4 * 3072**2 + 3 * 3072 * 8192 + 2 * 3072) + 3072
SMALL = 33 * 2048  # numbers of the student's norms, whose moments adamw_8bit keeps in fp32: fewer than 4,096 in each


def test_billions_of_parameters_are_counted_without_a_byte() -> None:
    assert (STUDENT, TEACHER) == (1_074_464_768, 3_172_051_968)
    trial = billions({"f": flow("teacher", "student")})
    parts = memory_of(trial).step(1)
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (4 * STUDENT, 4 * STUDENT, 8 * STUDENT)
    assert parts["teacher"] == 4 * TEACHER
    lean = {"models.teacher.dtype": "bf16", "phases.distil.optimizer.kind": "adamw_8bit"}
    parts = memory_of(trial, **lean).step(1)
    assert parts["teacher"] == 2 * TEACHER and parts["weights"] == parts["gradients"] == 4 * STUDENT
    assert parts["optimizer"] == 2 * (STUDENT - SMALL) + 2 * 4 * (STUDENT - SMALL) // 256 + 4 * 2 * SMALL


def test_a_vocabulary_of_128_thousand_is_counted_too() -> None:
    """Llama 3.2's shapes: heads that share keys and values, one matrix for embeddings and head."""
    trial, num = billions({"f": flow("teacher", "student")}), 128_256
    for one in trial["models"].values():
        one["config"] = {"tie_word_embeddings": True, "num_key_value_heads": 8}
    found = memory_of(trial, one=Shapes(vocab_size=num, special_ids=SPECIAL))
    # by hand: keys and values are 8 of the student's 32 heads, 8 of the teacher's 24
    student = num * 2048 + 16 * (2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048) + 2048
    teacher = num * 3072 + 28 * (2 * 3072**2 + 2 * 3072 * 1024 + 3 * 3072 * 8192 + 2 * 3072) + 3072
    assert (student, teacher) == (1_235_814_400, 3_212_749_824)  # as on their cards
    parts = found.step(1)
    assert (parts["weights"], parts["optimizer"], parts["teacher"]) == (4 * student, 8 * student, 4 * teacher)
    evaluation = found.evaluation()
    assert evaluation["evaluation"] > 2 * 32 * 511 * num * 4  # logits of two batches of 32 sequences
    assert sum(evaluation.values()) > 24e9


def test_only_the_pairs_of_a_model_that_learns_by_lora_have_gradients() -> None:
    terms = {"a": flow("teacher", "student"), "b": flow("student", "teacher", "reverse_kl")}
    kinds = {"student": {"lr": 1e-3, "kind": "adamw_8bit"}, "teacher": {"lr": 1e-3}}
    train = {"teacher": {"kind": "lora", "rank": 32}, "student": "full"}
    trial = billions(terms, ("teacher", "student"), optimizer=kinds)
    trial["phases"]["distil"]["train"] = train
    trial["models"]["teacher"]["dtype"] = "bf16"
    parts = memory_of(trial).step(1)
    pairs = 28 * 2 * (32 * 3072 + 3072 * 32)  # query and value of each layer, in fp32
    assert parts["weights"] == 4 * STUDENT + 2 * TEACHER + 4 * pairs and parts["teacher"] == 0
    assert parts["gradients"] == 4 * STUDENT + 4 * pairs
    assert parts["optimizer"] == 2 * (STUDENT - SMALL) + 8 * (STUDENT - SMALL) // 256 + 8 * SMALL + 8 * pairs


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
    found = ModelMemory.of(shapes().net(value, LENGTH, how=spec.train["student"]), kind)
    assert found.weights == sum(parameter.nbytes for parameter in net.parameters())
    assert found.gradients == sum(parameter.grad.nbytes for parameter in learning)
    assert found.optimizer == sum(tensor.nbytes for tensor in state)


# ------------------------------------------------------------------------------------------------------- instructions


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
    found = memory_of(instructed(replies=by))
    ((name, parts),) = found.replies().items()
    token = 2 * found.spec.models["student"].layers * 16 * 4  # type: ignore[operator]
    assert name == "student" and parts["cache"] == token * found.share * (60 + 60 // 4 + 32)
    assert parts["weights"] == FP32 * shapes().num_parameters(found.spec.models["student"], 64)
    assert "gradients" not in parts and parts["teacher"] > parts["weights"]
    both = {"kind": "interleaved", "draft": "student", "teacher": "teacher", "max_tokens": 20}
    assert memory_of(instructed(replies=both)).replies()["student and teacher"]["cache"] == 2.5 * parts["cache"]
    assert not memory_of(instructed()).replies()


def test_rows_of_instructions_are_supervised_where_replies_are() -> None:
    few = Shapes(160, SPECIAL, reply_share=0.25)
    whole = memory_of(instructed(replies={"kind": "sampled", "by": "student"}), one=few)
    ratio = whole.step(8)["logits"] / memory_of(instructed(), one=few).step(8)["logits"]
    assert ratio == pytest.approx(63 / 16, rel=0.1)  # positions of a row
    assert whole.evaluation()["evaluation"] == memory_of(instructed(), one=few).evaluation()["evaluation"]


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 KB"), (2.5e9, "2.5 GB"), (3e12, "3 TB")]
)
def test_sizes_are_readable(size: float, text: str) -> None:
    assert bytes_text(size) == text
