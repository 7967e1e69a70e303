"""Tasks in trials: heads, branches that match, labels that models make, terms inside models, shared layers."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from tests.support.trials import Lab, Stopped, break_at, flow, hard, inner, model, phase
from trainables.config.phase import PredictionQuality
from trainables.config.phase_run import PhaseRun
from trainables.config.trial import TrialSpec
from trainables.data.classification.tasks import TaskBatch
from trainables.data.order import folds
from trainables.models import build
from trainables.training import forward, gradients, loop
from trainables.training.phase_graph import carried_projectors, head_of, origin_of, streams_of
from trainables.training.pseudo_labels import out_of_fold, prediction_quality
from trainables.training.streams import StreamLoader

QUALITY = {"kind": "prediction_quality", "of": "teacher"}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """Weights at the start, by phase and model."""
    found: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    begin = loop.begin

    def watch(run: Any, instance: Any) -> Any:
        at = begin(run, instance)
        for name, net in at.nets.items():
            found[str(instance), name] = {key: tensor.clone() for key, tensor in net.state_dict().items()}
        return at

    monkeypatch.setattr(loop, "begin", watch)
    return found


def fine_tuning(**more: Any) -> dict[str, Any]:
    """One pretraining, then a branch a task: the teacher alone, and a student from it."""
    each = ["single", "pair", "number"]
    terms = {"h": hard("student"), "soft": flow("teacher", "student", temperature=2)}
    return {
        "models": {"teacher": model(layers=2), "student": model()},
        "phases": {
            "pretrain": phase(("teacher", "student"), {"t": hard("teacher"), "s": hard("student")}),
            "teach": phase("teacher", {"h": hard("teacher")}, for_each_dataset=each),
            "distil": phase("student", terms, for_each_dataset=each),
        },
        **more,
    }


def test_each_task_fans_out_from_one_pretraining_and_meets_its_own_teacher(new_task_lab: Any, seen: Any) -> None:
    lab = new_task_lab()
    spec = lab.spec(fine_tuning()).pruned()
    ran = lab.run(spec)
    assert list(ran.phases) == [
        "pretrain",
        *(f"{p}[{t}]" for p in ("teach", "distil") for t in ("single", "pair", "number")),
    ]
    start = ran.weights("pretrain", "student")
    for task in ("single", "pair", "number"):
        origin = origin_of(spec, PhaseRun("distil", task), "teacher")
        assert origin is not None and origin.instance == PhaseRun("teach", task)
        begun, taught = seen[f"distil[{task}]", "student"], ran.weights("teach", "teacher", task)
        trunk = [name for name in start if name.startswith("bert.")]
        assert trunk and all(torch.equal(begun[name], start[name]) for name in trunk)
        assert all(torch.equal(seen[f"distil[{task}]", "teacher"][name], tensor) for name, tensor in taught.items())
        assert begun["classifier.weight"].shape[0] == (1 if task == "number" else 2)
    scores = {
        (r["phase"], r["task"], r["metric"]) for r in ran.records if r["split"] == "test" and r["model"] == "student"
    }
    assert {("distil", "number", m) for m in ("task_loss", "score", "pearson", "spearman")} <= scores
    assert {("distil", "single", m) for m in ("task_loss", "score", "accuracy")} <= scores


def test_a_branch_by_itself_gives_the_numbers_that_it_gives_among_others(new_task_lab: Any) -> None:
    whole, alone = new_task_lab(), new_task_lab()
    trial = fine_tuning()
    expected = whole.run(whole.spec(trial))
    trial["phases"]["teach"]["for_each_dataset"] = trial["phases"]["distil"]["for_each_dataset"] = ["pair"]
    ran = alone.run(alone.spec(trial))
    ours = ran.weights("distil", "student", "pair")
    assert all(
        torch.equal(tensor, ours[name]) for name, tensor in expected.weights("distil", "student", "pair").items()
    )


def test_scores_by_example_add_up_to_what_is_recorded(new_task_lab: Any) -> None:
    lab = new_task_lab()
    ran = lab.run(lab.spec(fine_tuning()))
    for task, metric in (("single", "accuracy"), ("number", "task_loss")):
        frame = lab.store.examples(ran.phases[f"distil[{task}]"]["key"])
        assert set(frame["task"]) == {task} and set(frame["model"]) == {"student"} and frame["example"].is_unique
        recorded = [
            r
            for r in ran.records
            if (r["phase"], r["task"], r["split"], r["metric"]) == ("distil", task, "test", metric)
        ]
        ours = 100 * (frame["label"] == frame["prediction"]).mean() if metric == "accuracy" else frame["loss"].mean()
        assert recorded[-1]["value"] == pytest.approx(ours)
    frame = lab.store.examples(ran.phases["pretrain"]["key"])
    value = [
        r["value"]
        for r in ran.records
        if (r["phase"], r["model"], r["split"], r["metric"]) == ("pretrain", "student", "test", "mlm_loss")
    ]
    own = frame[frame["model"] == "student"]
    assert own["prediction"].isna().all() and value[-1] == pytest.approx(own["loss"].sum() / own["count"].sum())


@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2", "llama"])
def test_every_family_learns_a_task(new_task_lab: Any, family: str) -> None:
    lab = new_task_lab()
    tune = phase(
        "student", {"h": hard("student")}, for_each_dataset=["pair"], budget={"epochs": 4}, optimizer={"lr": 5e-3}
    )
    pretrain = phase("student", {"h": hard("student")}, streams={"main": {} if build.is_masked_lm(family) else {"corruption": None}})  # fmt: skip
    ran = lab.run(lab.spec({"models": {"student": model(family)}, "phases": {"pretrain": pretrain, "tune": tune}}))
    losses = ran.of("tune", "student", "h", "train")
    assert losses[-1] < losses[0]
    steps = [r["step"] for r in ran.records if r["phase"] == "tune"]
    assert max(steps) == -(-4 * len(open_train(lab, "pair")) // 8)


def open_train(lab: Lab, name: str) -> Any:
    from trainables.data.prepared import open_data

    return open_data(str(lab.root / "data"), lab.fingerprints[f"data:{name}"]).train


def test_a_pretrained_folder_gets_a_head_that_depends_on_the_seed_alone(
    new_task_lab: Any, tmp_path: Path, seen: Any
) -> None:
    lab = new_task_lab()
    donor = lab.run(lab.spec(fine_tuning()))
    published = lab.store.find(donor.phases["pretrain"]["key"])
    net = build.restore(published.configs["teacher"], donor.weights("pretrain", "teacher"))
    trunk = donor.weights("pretrain", "teacher")
    net.save_pretrained(tmp_path / "m")
    lab = replace(
        lab, fingerprints={**lab.fingerprints, "model:teacher": build.weights_fingerprint(str(tmp_path / "m"), None)}
    )
    trial = {
        "models": {"teacher": {"pretrained": str(tmp_path / "m")}},
        "phases": {"teach": phase("teacher", {"h": hard("teacher")}, for_each_dataset=["pair"])},
    }
    lab.run(lab.spec(trial), trial="a")
    first = seen.pop(("teach[pair]", "teacher"))
    torch.randn(7)
    lab.storage.delete("phases")
    lab.run(lab.spec(trial), trial="b")
    again = seen[("teach[pair]", "teacher")]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(first["bert.embeddings.word_embeddings.weight"], trunk["bert.embeddings.word_embeddings.weight"])
    assert first["classifier.weight"].abs().sum() > 0


def test_a_fresh_head_learns_beside_loras_pairs(new_task_lab: Any, seen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default where it is drawn anew; one that an earlier phase trained stays as it is, unless it is asked to learn."""
    lab, trial = new_task_lab(), fine_tuning()
    steps = {"for_each_dataset": ["pair"], "optimizer": {"lr": 1e-2}}
    pairs = {"kind": "lora", "rank": 2}
    trial["phases"] = {
        "pretrain": phase("student", {"h": hard("student")}),
        "tune": phase("student", {"h": hard("student")}, **steps) | {"train": {"student": pairs}},
        "again": phase("student", {"h": hard("student")}, **steps) | {"train": {"student": pairs}},
        "whole": phase("student", {"h": hard("student")}, **steps) | {"train": {"student": {**pairs, "head": True}}},
    }
    spec = lab.spec({**trial, "models": {"student": model()}})
    ran = lab.run(spec)
    weights = {name: ran.weights(name, "student", "pair") for name in ("tune", "again", "whole")}
    head = [name for name in weights["tune"] if "pooler" in name or name.startswith("classifier")]
    assert len(head) == 4
    for name in head:
        assert not torch.equal(weights["tune"][name], seen["tune[pair]", "student"][name]), name
        assert torch.equal(weights["again"][name], weights["tune"][name]), name
        assert not torch.equal(weights["whole"][name], weights["again"][name]), name
    table = "bert.embeddings.word_embeddings.weight"  # learns in no phase after the first
    assert torch.equal(weights["whole"][table], ran.weights("pretrain", "student")[table])

    broken = new_task_lab()
    with monkeypatch.context() as patched:
        break_at(patched, "tune", 5)
        with pytest.raises(Stopped):
            broken.run(spec, checkpoint_seconds=0)
    resumed = broken.run(spec, attempt=2)
    found = resumed.weights("tune", "student", "pair")
    assert all(torch.equal(found[name], weights["tune"][name]) for name in found)


# ----------------------------------------------------------------------------------------------------- labels by models


def with_quality(**labels: Any) -> dict[str, Any]:
    trial = fine_tuning()
    trial["phases"]["teach"]["for_each_dataset"] = trial["phases"]["distil"]["for_each_dataset"] = ["single"]
    stream = {"labels": {**QUALITY, **labels}}
    order = trial["phases"]
    trial["phases"] = {
        "pretrain": order["pretrain"],
        "teach": order["teach"],
        "guess": phase("student", {"h": hard("student")}, for_each_dataset=["single"], streams={"main": stream}),
        "distil": order["distil"],
    }
    return trial


def test_labels_are_right_or_wrong_and_above_the_median_or_not(new_task_lab: Any, seen: Any) -> None:
    lab = new_task_lab()
    ran = lab.run(lab.spec(with_quality()))
    counts = {
        r["metric"]: r["value"]
        for r in ran.records
        if (r["phase"], r["split"]) == ("guess", "train") and r["model"] == "teacher"
    }
    right = [counts[f"label_{i}_count"] for i in (0, 1)]
    wrong = [counts[f"label_{i}_count"] for i in (2, 3)]
    num = len(open_train(lab, "single"))
    assert sum(right) + sum(wrong) == num and 100 * sum(right) / num == pytest.approx(counts["labeller_accuracy"])
    assert abs(right[0] - right[1]) <= 1 + num % 2 or right[0] < right[1]  # ties are not above the median
    guessed, begun = ran.weights("guess", "student", "single"), seen["distil[single]", "student"]
    assert guessed["classifier.weight"].shape[0] == 4 and begun["classifier.weight"].shape[0] == 2
    trunk = [name for name in guessed if name.startswith("bert.")]
    assert "bert.pooler.dense.weight" in trunk and all(torch.equal(guessed[name], begun[name]) for name in trunk)


def test_prediction_quality_is_the_papers_rule() -> None:
    logits_EC = torch.tensor([[4.0, 0], [1, 0], [0.1, 0], [3, 0], [0.2, 0]])  # confidence .98 .73 .52 .95 .55
    classes_E = torch.tensor([0, 0, 0, 1, 1])
    rule = PredictionQuality.model_validate({**QUALITY, "thresholds": [0.7, 0.6]})
    assert prediction_quality(rule, logits_EC, classes_E, seed=0).labels_E.tolist() == [0, 0, 1, 2, 3]
    median = PredictionQuality.model_validate(QUALITY)
    found = prediction_quality(median, logits_EC, classes_E, seed=0)
    assert found.labels_E.tolist() == [0, 1, 1, 2, 3] and found.accuracy == 60
    none_wrong = prediction_quality(median, logits_EC, torch.zeros(5, dtype=torch.long), seed=0)
    assert none_wrong.thresholds[0] == none_wrong.thresholds[1]
    permuted = PredictionQuality.model_validate({**QUALITY, "permuted": True})
    dealt = prediction_quality(permuted, logits_EC.repeat(20, 1), classes_E.repeat(20), seed=3)
    plain = prediction_quality(median, logits_EC.repeat(20, 1), classes_E.repeat(20), seed=3)
    assert dealt.labels_E.bincount().tolist() == plain.labels_E.bincount().tolist()
    assert dealt.labels_E.tolist() != plain.labels_E.tolist()


def test_thresholds_may_be_each_tasks_own(new_task_lab: Any) -> None:
    """Each branch depends on its own alone, and is the one that it would be if all had these."""
    lab = new_task_lab()

    def with_thresholds(thresholds: Any) -> TrialSpec:
        trial = with_quality(thresholds=thresholds)
        for name in ("teach", "guess", "distil"):
            trial["phases"][name]["for_each_dataset"] = ["single", "pair"]
        return lab.spec(trial).pruned()  # type: ignore[no-any-return]

    own = {"single": [0.8, 0.6], "pair": [0.95, 0.75]}
    spec, other, same = (with_thresholds(t) for t in (own, {**own, "pair": [0.9, 0.7]}, own["single"]))
    assert TrialSpec.model_validate_json(spec.model_dump_json()) == spec
    labels = streams_of(spec, PhaseRun("guess", "pair"))["main"].labels
    assert labels is not None and labels.thresholds == (0.95, 0.75)
    keys = [[lab.key(s, "guess", task) for s in (spec, other, same)] for task in ("single", "pair")]
    assert keys[0][0] == keys[0][1] == keys[0][2] and len(set(keys[1])) == 3
    for wrong in ({"single": [0.8, 0.6]}, {**own, "number": [0.5, 0.5]}):
        with pytest.raises(
            ValidationError, match="expected thresholds for the data sets that the stream reads: single, pair"
        ):
            with_thresholds(wrong)


def test_out_of_fold_labels_come_from_the_model_that_did_not_see_the_example(new_task_lab: Any) -> None:
    logits = [torch.full((6, 2), float(i)) for i in range(3)]
    folds_E = torch.tensor([0, 1, 2, 0, 1, 2])
    assert out_of_fold(logits, folds_E)[:, 0].tolist() == [0, 1, 2, 0, 1, 2]
    assert out_of_fold(logits, None)[:, 0].tolist() == [1] * 6
    lab = new_task_lab()
    trial = with_quality(of=["teacher", "second"])
    trial["models"]["second"] = model(layers=2)
    trial["phases"]["pretrain"]["train"]["second"] = "full"
    trial["phases"]["pretrain"]["terms"]["u"] = hard("second")
    teach = trial["phases"].pop("teach")
    both = {name: {**teach, "train": {name: "full"}, "terms": {"h": hard(name)}, "streams": {"main": {"fold": {"num": 2, "held_out": i}}}} for i, name in enumerate(("teacher", "second"))}  # fmt: skip
    phases = trial["phases"]
    trial["phases"] = {"pretrain": phases["pretrain"], "teach": both["teacher"], "teach_2": both["second"], **phases}
    read: dict[str, set[int]] = {"teach[single]": set(), "teach_2[single]": set()}
    real = StreamLoader.batch

    def watch(self: Any, step: int, size: int, seed: int, at: str) -> Any:
        found = real(self, step, size, seed, at)
        if at in read:
            examples = self.data.train
            ids = {tuple(examples.ids(i).tolist()): i for i in range(len(examples))}
            read[at] |= {
                ids[tuple(row[mask.bool()].tolist())] for row, mask in zip(found.ids_BT, found.mask_BT, strict=True)
            }
        return found

    crossed = copy.deepcopy(trial)
    crossed["phases"]["guess"]["streams"]["main"]["labels"]["of"].reverse()
    with pytest.raises(
        ValidationError, match=r"'second' labels fold 0 of 2, which it must not have seen; train it with"
    ):
        lab.spec(crossed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamLoader, "batch", watch)
        ran = lab.run(lab.spec(trial))
    fold_of = folds(len(open_train(lab, "single")), 2)
    assert read["teach[single]"] == set((fold_of != 0).nonzero().flatten().tolist())
    assert read["teach_2[single]"] == set((fold_of != 1).nonzero().flatten().tolist())
    assert ran.of("guess", "student", "accuracy")


# ------------------------------------------------------------------------------------------------- terms inside models


INNER = {
    "patient": inner(
        "teacher", "student", "hidden_mse", layers=[[1, 1]], positions="first", normalise=True, weight=100
    ),
    "hidden": inner("teacher", "student", "hidden_mse", layers="uniform", projector=True),
    "cosine": inner("teacher", "student", "hidden_cosine", projector=True),
    "attention": inner("teacher", "student", "attention_mse"),
    "relation": inner("teacher", "student", "relation_kl", heads=4, from_layer=1),
}


@pytest.mark.parametrize("on", ["corpus", "pair"])
@pytest.mark.parametrize("name", INNER)
def test_a_term_inside_teaches_only_its_target(new_task_lab: Any, seen: Any, name: str, on: str) -> None:
    lab = new_task_lab()
    wide = {} if name in ("patient", "attention") else {"width": 32, "intermediate_size": 48}
    trial = {
        "models": {"teacher": model(layers=2, **wide), "student": model()},
        "phases": {
            "teach": phase("teacher", {"h": hard("teacher")}, streams={"main": {"data": on}}),
            "distil": phase("student", {"x": INNER[name]}, streams={"main": {"data": on}}, budget={"steps": 12}),
        },
    }
    ran = lab.run(lab.spec(trial))
    values = ran.of("distil", "student", "x", "train")
    assert values[-1] < values[0]
    before, after = seen["distil", "student"], ran.weights("distil", "student")
    layer = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(before[layer], after[layer])
    head = [key for key in after if key.startswith(("cls.", "classifier"))]
    assert head and all(
        torch.equal(before[key], after[key]) for key in head if after[key].ndim < 2
    )  # nothing at the logits


def test_a_student_of_one_layer_has_no_hints_to_be_patient_about(new_task_lab: Any) -> None:
    """The published maps leave out the last layer: with one layer Patient-KD is distillation from logits."""
    ran = {}
    for with_hints in (False, True):
        lab, trial = new_task_lab(), fine_tuning()
        for name in ("teach", "distil"):
            trial["phases"][name]["for_each_dataset"] = ["single"]
        if with_hints:
            trial["phases"]["distil"]["terms"]["patient"] = {**INNER["patient"], "layers": "even"}
        ran[with_hints] = lab.run(lab.spec(trial))
    plain, patient = (ran[which].weights("distil", "student", "single") for which in (False, True))
    assert plain.keys() == patient.keys() and all(torch.equal(plain[name], patient[name]) for name in plain)
    assert set(ran[True].of("distil", "student", "patient", "train")) == {0.0}


def test_patience_is_the_mean_of_normalised_first_positions(new_task_lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, caught = new_task_lab(), {}
    real = forward.run_terms

    def watch(on: Any, active: Any, parts: Any, scale: Any, **how: Any) -> Any:
        found = real(on, active, parts, scale, **how)
        caught.update(on=on, parts=parts, sums=found[1])
        return found

    monkeypatch.setattr(gradients, "run_terms", watch)
    trial = fine_tuning()
    trial["phases"]["distil"] |= {"for_each_dataset": ["pair"], "budget": {"steps": 1}}
    trial["phases"]["teach"] |= {"for_each_dataset": ["pair"], "budget": {"steps": 2}}
    trial["phases"]["distil"]["terms"]["p"] = {**INNER["patient"], "layers": [[1, 1]]}
    trial["models"]["student"]["dropout"] = 0
    nets = {}
    step = loop.step

    def before(at: Any) -> None:
        if at.instance.phase == "distil":
            nets.update({n: {k: t.clone() for k, t in net.state_dict().items()} for n, net in at.nets.items()})
        step(at)

    monkeypatch.setattr(loop, "step", before)
    lab.run(lab.spec(trial))
    batch: TaskBatch = caught["parts"]["main"]
    first = {}
    for name, net in caught["on"].nets.items():
        net.load_state_dict(nets[name])
        out = net.eval()(
            batch.ids_BT, attention_mask=batch.mask_BT, token_type_ids=batch.types_BT, output_hidden_states=True
        )
        first[name] = F.normalize(out.hidden_states[1][:, 0], dim=-1)
    expected = F.mse_loss(first["student"], first["teacher"]) * len(batch.ids_BT)
    assert caught["sums"]["p"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_projector_is_in_the_checkpoint_and_learns(new_task_lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = {
        "models": {"teacher": model(layers=2, width=32), "student": model()},
        "phases": {
            "teach": phase("teacher", {"h": hard("teacher")}),
            "distil": phase("student", {"h": hard("student"), "x": INNER["hidden"]}),
        },
    }
    whole, broken = new_task_lab(), new_task_lab()
    expected = whole.run(whole.spec(trial))
    step, drawn, learnt = loop.step, {}, {}

    def watch(at: Any) -> None:
        if at.instance.phase == "distil":
            weights = next(iter(at.models.projectors.values())).weights_LED[0]
            drawn.setdefault("w", weights.detach().clone())
            if at.progress.step == 5 and not learnt:
                learnt["w"] = weights.detach().clone()
                raise KeyboardInterrupt
        step(at)

    monkeypatch.setattr(loop, "step", watch)
    with pytest.raises(KeyboardInterrupt):
        broken.run(broken.spec(trial), checkpoint_seconds=0)
    ran = broken.run(broken.spec(trial), attempt=2)
    assert not torch.equal(drawn["w"], learnt["w"])
    ours, theirs = ran.weights("distil", "student"), expected.weights("distil", "student")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_projector_goes_on_from_stage_to_stage(new_task_lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in TinyBERT: the same term over several phases. Under another name, or between other models, it is drawn anew."""
    lab, step, drawn = new_task_lab(), loop.step, {}

    def watch(at: Any) -> None:
        if at.progress.step == 0:
            for name, projector in at.models.projectors.items():
                drawn[at.instance.phase, name] = projector.weights_LED[0].detach().clone()
        step(at)

    monkeypatch.setattr(loop, "step", watch)
    spec = lab.spec(
        {
            "models": {"teacher": model(layers=2, width=32), "student": model()},
            "phases": {
                "teach": phase("teacher", {"h": hard("teacher")}),
                "first": phase("student", {"x": INNER["hidden"]}),
                "second": phase("student", {"x": INNER["hidden"], "y": INNER["hidden"]}),
            },
        }
    )
    ran = lab.run(spec)
    learnt = lab.store.weights(ran.phases["first"]["key"], "project x")["weights_LED.0"]
    assert torch.equal(drawn["second", "x"], learnt) and not torch.equal(drawn["first", "x"], learnt)
    assert drawn["second", "y"].std() > 0.5 * 16**-0.5 and not torch.equal(drawn["second", "y"], learnt)
    run = PhaseRun("second", None)
    assert carried_projectors(spec, run) == {"x": PhaseRun("first", None)} and not carried_projectors(spec, PhaseRun("first", None))  # fmt: skip


# ------------------------------------------------------------------------------------------------------- shared layers


def test_a_student_with_shared_layers_trains_is_stored_and_goes_on(new_task_lab: Any) -> None:
    lab = new_task_lab()
    trial = fine_tuning()
    shared = model(
        sharing={"order": "twice", "swap": True}, layers=2, init={"kind": "remap", "from": "base", "depth": "first"}
    )
    trial["models"] = {"base": model(layers=4), "teacher": model(layers=4), "student": shared}
    trial["phases"] = {
        "pretrain": phase("base", {"h": hard("base")}),
        "teach": phase("teacher", {"h": hard("teacher")}, for_each_dataset=["pair"]),
        "distil": phase(
            "student", {"h": hard("student"), "p": {**INNER["patient"], "layers": "even"}}, for_each_dataset=["pair"]
        ),
        "more": phase("student", {"h": hard("student")}, for_each_dataset=["pair"]),
    }
    trial["phases"]["distil"]["terms"]["a"] = {**INNER["attention"], "layers": "uniform"}  # all four runs
    ran = lab.run(lab.spec(trial))
    base, student = ran.weights("pretrain", "base"), ran.weights("distil", "student", "pair")
    assert not any(".layer.2." in name for name in student) and any(".layer.2." in name for name in base)
    assert ran.of("more", "student", "task_loss")


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["phases"]["distil"]["streams"].update(main={"labels": QUALITY, "data": "number"}), "is a regression, where no answer is right or wrong"),
        (lambda t: t["phases"]["distil"]["streams"].update(main={"data": "single", "labels": {**QUALITY, "thresholds": [0.5, 1]}}), "'median', or two numbers above 0 and below 1"),
        (lambda t: t["phases"]["distil"]["streams"].update(main={"data": "single", "labels": {**QUALITY, "thresholds": "mean"}}), "'median', or two numbers"),
        (lambda t: t["phases"]["distil"]["streams"].update(main={"data": "single", "labels": {**QUALITY, "thresholds": {"single": 0.5}}}), "or such a pair by data set"),
        (lambda t: t["phases"]["distil"]["streams"].update(main={"data": "single", "labels": {**QUALITY, "of": "student"}}), "must have been trained by an earlier phase"),
        (lambda t: t["phases"]["pretrain"]["streams"].update(main={"labels": QUALITY}), "labels are for tasks, and corpus is a corpus"),
        (lambda t: t["phases"]["distil"]["streams"].update(main={"data": "single", "corruption": {"probability": 0.3}}), "corruption is for corpora, and single is a task"),
        (lambda t: t["phases"]["distil"].update(for_each_dataset=["single", "corpus"]), "expected data sets of one format"),
        (lambda t: t["phases"]["distil"].update(budget={"tokens": 99}), "budget of tokens is for corpora"),
        (lambda t: t["models"]["student"].update(family="gpt2", sharing={"swap": True}), "sharing is for family bert"),
        (lambda t: t["models"]["student"].update(width=32) or t["phases"]["distil"]["terms"].update(x={**INNER["patient"]}), "set projector: true"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_a_reason(lab: Lab, tasks: Any, change: Any, message: str) -> None:
    trial = fine_tuning()
    trial["phases"]["distil"]["for_each_dataset"] = []
    for part in trial["phases"].values():
        part["streams"] = {"main": {"data": "single"}}
    trial["phases"]["pretrain"]["streams"] = {"main": {}}
    change(trial)
    with pytest.raises(ValueError, match=message):
        TrialSpec.model_validate({"data": tasks[1], **trial})


def test_heads_are_equal_only_for_the_same_labels(tasks: Any) -> None:
    spec = TrialSpec.model_validate({"data": tasks[1], **with_quality()})
    heads = {p: head_of(spec, PhaseRun(p, "single"), "student") for p in ("guess", "distil")}
    assert heads["guess"] != heads["distil"] and heads["guess"].num_labels == 4 and heads["distil"].num_labels == 2  # type: ignore[union-attr]
    assert head_of(spec, PhaseRun("pretrain"), "student") is None
    assert head_of(spec, PhaseRun("guess", "single"), "teacher") == head_of(
        spec, PhaseRun("teach", "single"), "teacher"
    )


def test_attention_counts_in_flops_on_this_machine_too() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from trainables.evaluation.model_size import FLOPS

    q = torch.randn(2, 3, 16, 8, requires_grad=True)
    k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(2))
    counts = []
    for backend in (torch.nn.attention.SDPBackend.FLASH_ATTENTION, torch.nn.attention.SDPBackend.MATH):
        with torch.nn.attention.sdpa_kernel(backend), FlopCounterMode(display=False, custom_mapping=FLOPS) as forward:
            out = F.scaled_dot_product_attention(q, k, v)
        with torch.nn.attention.sdpa_kernel(backend), FlopCounterMode(display=False, custom_mapping=FLOPS) as backward:
            out.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    product = 2 * 2 * 3 * 16 * 16 * 8
    assert counts[1] == (2 * product, 4 * product)  # by matrix products that PyTorch knows
    assert counts[0] == (2 * product, 5 * product)  # the kernel makes the scores once more


def test_a_phase_in_the_middle_is_skipped_where_all_of_it_is_off(new_task_lab: Any) -> None:
    lab, plain = new_task_lab(), new_task_lab()
    off = with_quality()
    off["phases"]["guess"]["terms"]["h"]["weight"] = 0
    without = with_quality()
    del without["phases"]["guess"]
    ran, expected = lab.run(lab.spec(off)), plain.run(plain.spec(without))
    assert "guess[single]" not in ran.phases and ran.phases.keys() == expected.phases.keys()
    assert [done["key"] for done in ran.phases.values()] == [done["key"] for done in expected.phases.values()]
