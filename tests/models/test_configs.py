"""Configs of shapes: like another model's, with nested fields, and read back; what cannot be made is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.support.trials import Lab, distillation, model
from trainables.config.errors import ModelError
from trainables.config.models import Model
from trainables.config.trial import TrialSpec, trial_id
from trainables.models import build, configs, pretrained, remap

IDS = {"pad_token_id": 0, "eos_token_id": 3}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip


def config_of(value: dict[str, Any], vocab_size: int = 160) -> Any:
    return configs.config_of(Model.model_validate(value), vocab_size=vocab_size, special_ids=IDS, length=32)


def saved(folder: Path, **more: Any) -> str:
    value = Model.model_validate(
        {"family": "llama", "layers": 6, "width": 32, "heads": 4, "intermediate_size": 40, **more}
    )
    net = build.build(value, name="m", seed=0, vocab_size=160, special_ids=IDS, length=32)
    net.save_pretrained(folder)
    return str(folder)


def test_a_model_like_another_has_its_config_but_for_what_is_given(tmp_path: Path) -> None:
    own = {"rope_parameters": LLAMA3, "num_key_value_heads": 2, "rms_norm_eps": 1e-3, "attention_bias": True}
    teacher = {"pretrained": saved(tmp_path, config=own)}
    ours, theirs = config_of(teacher).to_dict(), config_of({"like": teacher, "layers": 3}).to_dict()
    changed = {key for key in ours if ours[key] != theirs[key]} - {"_name_or_path", "dtype", "transformers_version"}
    assert changed == {"num_hidden_layers"} and theirs["num_hidden_layers"] == 3
    assert theirs["rope_parameters"] == LLAMA3 and theirs["num_key_value_heads"] == 2
    slower = config_of({"like": teacher, "config": {"rope_parameters": {"rope_theta": 1e4}}})
    assert slower.rope_parameters == {**LLAMA3, "rope_theta": 1e4}  # nested fields are merged
    with pytest.raises(ModelError, match="like: a model with 160 rows of embeddings, and the data's tokenizer has 170"):
        config_of({"like": teacher, "layers": 3}, vocab_size=170)


def test_sizes_that_follow_from_others_follow_and_those_that_do_not_stay() -> None:
    teacher = {"family": "llama", "layers": 2, "width": 64, "heads": 4}
    wider = config_of({"like": teacher, "width": 96, "heads": 8})
    assert (wider.head_dim, wider.num_key_value_heads, wider.intermediate_size) == (12, 8, 256)
    fixed = config_of({"like": {**teacher, "config": {"head_dim": 24, "num_key_value_heads": 2}}, "width": 96})
    assert (fixed.head_dim, fixed.num_key_value_heads, fixed.num_attention_heads) == (24, 2, 4)
    gpt2 = config_of(
        {"like": {"family": "gpt2", "layers": 3, "width": 32, "heads": 2}, "layers": 2, "intermediate_size": 40}
    )
    assert (gpt2.n_layer, gpt2.n_embd, gpt2.n_head, gpt2.n_inner) == (2, 32, 2, 40)


def test_settings_of_single_layers_come_with_the_layers_that_are_copied() -> None:
    teacher = {"family": "gemma3", "layers": 12, "width": 32, "heads": 2}
    kinds = config_of(teacher).layer_types
    assert [i for i, kind in enumerate(kinds) if kind == "full_attention"] == [5, 11]
    init = {"kind": "remap", "from": "teacher", "depth": "spread"}
    student = config_of({"like": teacher, "layers": 4, "init": init})
    assert student.layer_types == [kinds[layer] for layer in (0, 4, 7, 11)]
    assert config_of({"like": teacher, "layers": 14}).layer_types == [*kinds, *kinds[:2]]
    plain = config_of({"family": "gemma3", "layers": 4, "width": 32, "heads": 2})
    nets = [build.from_config(config) for config in (config_of(teacher), plain, student)]
    said = list(remap.notes(nets[0], nets[1], (0, 4, 7, 11)))
    assert said == ["layer 3 has layer_types sliding_attention and weights of layer 11, which has full_attention"]
    assert not list(remap.notes(nets[0], nets[2], (0, 4, 7, 11)))
    assert next(remap.notes(nets[0], nets[2], (0, 1, 2, 3))) == "the last 8 layers of the source are not copied"


def test_tensors_that_the_copied_layers_lack_are_named() -> None:
    shape = {"family": "llama4_text", "layers": 2, "width": 32, "heads": 2, "config": {"num_local_experts": 2}}
    source, target = (
        build.from_config(config_of({**shape, "config": {**shape["config"], "moe_layers": layers}}))  # type: ignore[dict-item]
        for layers in ([], [0, 1])
    )
    said = list(remap.notes(source, target, (0, 1)))
    assert any(
        "tensors that the source's layers lack keep their own weights: model.layers.0.feed_forward" in s for s in said
    )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"family": "blt"}, "a blt config has no num_hidden_layers, hidden_size"),
        ({"family": "perceiver"}, "a perceiver config has no num_hidden_layers, hidden_size"),
        ({"family": "hrm_text"}, "num_hidden_layers 2 was asked for, and a hrm_text makes that 16"),
        ({"family": "bart"}, "a bart is an encoder-decoder; expected an encoder or a decoder"),
        ({"family": "mllama"}, "the text part of a mllama .* is no language model of its own"),
        ({"family": "git"}, "a git also reads images or sound .*, and has no text part of its own"),
        ({"family": "bloom", "intermediate_size": 48}, "a bloom config has no field for intermediate_size"),
        ({"family": "mamba", "heads": 4}, "num_attention_heads 4 was asked for, and a mamba has no such field"),
        ({"family": "llama", "config": {"num_hidden_layers": 5}}, "num_hidden_layers 2 was asked for, and a llama makes that 5"),
        ({"family": "llama", "config": {"wdith": 5}}, "a llama config has no field 'wdith'"),
        ({"family": "llama", "config": {"num_attention_heads": 5}}, r"\(32\) is not a multiple of the number of attention heads"),
        ({"family": "llama", "config": {"rms_norm_eps": "small"}}, "Field 'rms_norm_eps' expected float, got str"),
        ({"family": "llama", "config": {"hidden_act": "guelu"}}, "transformers cannot make a llama of this config: .*guelu"),
        ({"family": "gemma4_assistant"}, "transformers cannot make a gemma4_assistant: hidden_size_per_layer_input"),
    ],
)  # fmt: skip
def test_what_a_family_lacks_or_transformers_rejects_is_one_line(shape: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        build.from_config(config_of({"layers": 2, "width": 32, **shape}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["gemma3", "llama4", "qwen3_5", "fuyu"])
def test_of_a_family_with_several_kinds_of_input_the_text_part_has_the_shape(family: str) -> None:
    config = config_of({"family": family, "layers": 1, "width": 16, "heads": 2})
    assert pretrained.text_part(config) is config and config.hidden_size == 16
    assert build.num_parameters(build.from_config(config)) < 1_000_000


def test_likeness_is_checked_and_part_of_the_trials_identity(lab: Lab, tmp_path: Path) -> None:
    trial = distillation(student={"like": "teacher", "layers": 2})
    spec = lab.spec(trial)
    assert (
        spec == TrialSpec.model_validate_json(spec.model_dump_json())
        and "like" not in spec.model_dump()["models"]["teacher"]
    )
    inside = spec.models["student"].like
    assert isinstance(inside, Model) and inside.width == 16
    for bad, message in (
        ({"like": "nobody"}, "models.student.like: there is no model 'nobody'"),
        ({"like": "student"}, "form a cycle: student -> student"),
        ({"like": "teacher", "family": "bert"}, "like brings the family and the shape: remove family"),
    ):
        with pytest.raises(ValidationError, match=message):
            lab.spec(distillation(student=bad))
    of_folder = distillation(teacher={"pretrained": saved(tmp_path / "a")}, student={"like": "teacher", "layers": 2})
    of_copy = distillation(teacher={"pretrained": saved(tmp_path / "b")}, student={"like": "teacher", "layers": 2})
    prints = {**lab.fingerprints, "model:teacher": "f", "model:student": "f"}
    ids = [trial_id(lab.spec(each), prints) for each in (of_folder, of_copy)]
    assert ids[0] == ids[1] != trial_id(lab.spec(of_copy), prints | {"model:student": "g"})


def test_a_student_cut_from_its_teacher_trains_and_starts_with_its_layers(lab: Lab) -> None:
    init = {"kind": "remap", "from": "teacher", "depth": "every_other"}
    own = {"rope_parameters": {"rope_theta": 500.0}}
    trial = distillation(
        teacher=model("llama", layers=4, config=own), student={"like": "teacher", "layers": 2, "init": init}
    )
    for part in trial["phases"].values():
        part |= {"streams": {"main": {"corruption": None}}, "budget": {"steps": 2}, "evaluate": [1]}
    trial["phases"]["distil"]["optimizer"]["lr"] = 1e-9
    run = lab.run(lab.spec(trial))
    ours, theirs = run.weights("teach", "teacher"), run.weights("distil", "student")
    for layer, source in ((0, 0), (1, 2)):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert (theirs[name] - ours[name.replace(f".{layer}.", f".{source}.")]).abs().max() < 1e-6
    stored = lab.store.find(run.phases["distil"]["key"])
    assert stored is not None and stored.configs["student"]["rope_parameters"]["rope_theta"] == 500.0
