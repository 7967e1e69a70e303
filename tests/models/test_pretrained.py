"""Folders of pretrained weights: what each one is, what does not fit, heads, classes, positions, padding."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from tests.support.families import MULTIMODAL, multimodal_folder
from trainables.config.errors import ModelError
from trainables.config.models import Model, Random
from trainables.models import build as build_
from trainables.models import initialise, output_head
from trainables.models.pretrained import Folder

ENCODERS = [
    "bert",
    "roberta",
    "xlm-roberta",
    "deberta",
    "deberta-v2",
    "electra",
    "albert",
    "distilbert",
    "modernbert",
    "mpnet",
    "camembert",
    "convbert",
]
DECODERS = ["gpt2", "llama", "qwen2", "opt", "gpt_neox"]
SPECIAL = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
NUM_TOKENS, LENGTH = 60, 16
NAMES = ("ham", "spam")


def saved(path: Path, family: str = "llama", *, seed: int = 0, num_labels: int | None = None, **more: Any) -> Path:
    """A folder of a small model, as `save_pretrained` leaves it."""
    shape = {"family": family, "layers": 2, "width": 32, "heads": 2, "intermediate_size": 48, "dropout": 0}
    how: dict[str, Any] = {"vocab_size": NUM_TOKENS, "special_ids": SPECIAL, "length": LENGTH, "num_labels": num_labels}
    build_.build(Model(**shape), name="m", seed=seed, **how, **more).save_pretrained(path)
    return path


def loaded(path: Path, num_labels: int | None = None, class_names: tuple[str, ...] = (), **special: Any) -> Any:
    how: dict[str, Any] = {"vocab_size": NUM_TOKENS, "special_ids": {**SPECIAL, **special}, "length": LENGTH}
    model = Model(pretrained=str(path))
    return build_.build(model, name="m", seed=0, **how, num_labels=num_labels, class_names=class_names).eval()


def renamed(path: Path, rename: Callable[[str, Any], Mapping[str, Any]]) -> None:
    """Changes the tensors of a folder, one by one."""
    file = path / "model.safetensors"
    save_file({k: v for name, tensor in load_file(file).items() for k, v in rename(name, tensor).items()}, file)


def configured(path: Path, **fields: Any) -> Path:
    about = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**about, **fields}))
    return path


def texts(num: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids with their mask, each row longer than the last, padded on the right."""
    ids_BT = torch.randint(5, NUM_TOKENS, (num, 12), generator=torch.Generator().manual_seed(0))
    mask_BT = (torch.arange(12) < torch.tensor([[4 + 3 * row] for row in range(num)])).long()
    return ids_BT.masked_fill(mask_BT == 0, SPECIAL["pad_token_id"]), mask_BT


# --------------------------------------------------------------------------------- what a phase stores is what it is


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
def test_a_classifier_made_of_a_language_model_is_stored_and_exported_as_one(family: str, tmp_path: Path) -> None:
    net = loaded(saved(tmp_path / "lm", family), 2, NAMES)
    assert net.config.architectures == [type(net).__name__] and type(net).__name__.endswith("ForSequenceClassification")
    config = json.loads(json.dumps(build_.plain_config(net.config)))
    weights = {name: tensor.clone() for name, tensor in build_.weights_of(net).items()}
    again = build_.restore(config, weights).eval()
    ids_BT, mask_BT = texts()
    logits_BC = output_head.class_logits(net, ids_BT, mask_BT, None)
    assert torch.equal(output_head.class_logits(again, ids_BT, mask_BT, None), logits_BC)
    again.save_pretrained(tmp_path / "out")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert theirs.config.id2label == dict(enumerate(NAMES)) and theirs.config.label2id == {"ham": 0, "spam": 1}
    torch.testing.assert_close(theirs(input_ids=ids_BT, attention_mask=mask_BT).logits, logits_BC)
    third = loaded(tmp_path / "out", 2, NAMES)  # and is a folder to start from again
    torch.testing.assert_close(output_head.class_logits(third, ids_BT, mask_BT, None), logits_BC)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "llama", "gpt2"])
def test_a_language_model_keeps_its_head(family: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "lm", family)
    net = loaded(path)
    auto = type(net)
    ids_BT, _ = texts()
    torch.testing.assert_close(net(input_ids=ids_BT).logits, auto.from_pretrained(path)(input_ids=ids_BT).logits)
    weights = {name: tensor.clone() for name, tensor in build_.weights_of(net).items()}
    assert type(build_.restore(build_.plain_config(net.config), weights)) is auto


# ------------------------------------------------------------------------------------------- tensors that do not fit


def prefixed(prefix: str) -> Callable[[Path], Any]:
    return lambda path: renamed(saved(path), lambda name, tensor: {prefix + name: tensor})


def in_fp8(path: Path) -> None:
    """As DeepSeek's: a scale beside each matrix of a layer, and nothing in the config."""
    renamed(
        saved(path),
        lambda name, t: (
            {name: t.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1)} if "proj" in name else {name: t}
        ),
    )


def as_trunk(path: Path, family: str) -> None:
    AutoModel.from_pretrained(saved(path / "whole", family)).save_pretrained(path)


MISFITS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "compiled": (
        prefixed("_orig_mod."),
        ["missing, as lm_head.weight", "unexpected, as _orig_mod.lm_head", "remove the prefix _orig_mod. "],
    ),
    "parallel": (prefixed("module."), ["missing, as lm_head.weight", "remove the prefix module. from"]),
    "fewer stored": (lambda p: configured(saved(p), num_hidden_layers=3), ["9 missing, as model.layers.2.input_lay"]),
    "more stored": (lambda p: configured(saved(p), num_hidden_layers=1), ["9 unexpected, as model.layers.1.input_lay"]),
    "width": (
        lambda p: configured(saved(p), intermediate_size=64),
        ["down_proj.weight has shape [32, 48], expected ["],
    ),
    "rows": (lambda p: configured(saved(p), vocab_size=64), ["lm_head.weight has shape [60, 32], expected [64, 32]"]),
    "fp8": (in_fp8, ["is quantised: model.layers.0.mlp.down_proj.weight is float8_e4m3fn"]),
    "int8": (
        lambda p: renamed(saved(p), lambda name, t: {name: t.to(torch.int8) if "proj" in name else t}),
        ["is quantised", "proj.weight is int8"],
    ),
    "decoder's trunk": (lambda p: as_trunk(p, "llama"), ["(LlamaModel)", "1 missing, as lm_head.weight"]),
    "encoder's trunk": (lambda p: as_trunk(p, "roberta"), ["(RobertaModel)", "missing, as lm_head.bias"]),
    "classifier": (lambda p: saved(p, num_labels=2), ["missing, as lm_head.weight", "unexpected, as score.weight"]),
    "classifier with tied embeddings": (lambda p: saved(p, "gpt2", num_labels=2), ["1 unexpected, as score.weight"]),
    "another family": (lambda p: configured(saved(p, "gpt2"), model_type="llama"), ["missing, as ", "unexpected, as "]),
}


@pytest.mark.parametrize("what", MISFITS)
def test_tensors_that_do_not_fit_are_refused_by_their_names(what: str, tmp_path: Path) -> None:
    make, words = MISFITS[what]
    make(tmp_path / "m")
    with pytest.raises(ModelError) as error:
        loaded(tmp_path / "m")
    said = str(error.value)
    assert all(word in said for word in words) and "\n" not in said and repr(str(tmp_path / "m")) in said, said


def test_a_trunk_is_a_classifiers_start_and_a_broken_one_is_not(tmp_path: Path) -> None:
    for family in ("llama", "roberta", "bert", "gpt2"):
        as_trunk(tmp_path / family, family)
        net = loaded(tmp_path / family, 2)
        trunk = load_file(tmp_path / family / "model.safetensors")
        assert all(torch.equal(net.base_model.state_dict()[name], tensor) for name, tensor in trunk.items()
                   if "pooler" not in name)  # fmt: skip
        configured(tmp_path / family, num_hidden_layers=1)
        with pytest.raises(ModelError, match="unexpected, as "):
            loaded(tmp_path / family, 2)
        configured(tmp_path / family, num_hidden_layers=3)
        with pytest.raises(ModelError, match="missing, as "):
            loaded(tmp_path / family, 2)


def test_heads_of_pretraining_beside_the_language_models_are_passed_over(tmp_path: Path) -> None:
    """As in bert-base: a pooler and the head of next-sentence prediction."""
    from transformers import BertConfig, BertForPreTraining

    config = BertConfig(vocab_size=NUM_TOKENS, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertForPreTraining(config).save_pretrained(tmp_path / "m")
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path / "m").eval()
    ids_BT, _ = texts()
    torch.testing.assert_close(loaded(tmp_path / "m")(input_ids=ids_BT).logits, theirs(input_ids=ids_BT).logits)
    pooled = loaded(tmp_path / "m", 2).bert.pooler.dense.weight
    assert torch.equal(pooled, load_file(tmp_path / "m" / "model.safetensors")["bert.pooler.dense.weight"])


def test_a_classifier_of_another_kind_or_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    for family in ("llama", "bert"):
        path = saved(tmp_path / family, family, num_labels=3)
        with pytest.raises(ModelError, match="is a classifier of 3 classes, and the data have 2; expected as many"):
            loaded(path, 2)
        tokens = AutoModelForTokenClassification.from_pretrained(saved(tmp_path / f"{family}-lm", family), num_labels=2)
        tokens.save_pretrained(tmp_path / f"{family}-tokens")
        with pytest.raises(
            ModelError, match=r"is a \w+ForTokenClassification; expected a language model or a \w+ForSeq"
        ):
            loaded(tmp_path / f"{family}-tokens", 2)
        with pytest.raises(ModelError, match=r"has other tensors than .*missing, as "):
            loaded(configured(path, num_hidden_layers=3), 3)


def test_weights_in_several_files_are_read_by_their_index(tmp_path: Path) -> None:
    whole = loaded(saved(tmp_path / "m"))
    whole.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    ids_BT, _ = texts()
    assert torch.equal(loaded(tmp_path / "shards")(input_ids=ids_BT).logits, whole(input_ids=ids_BT).logits)
    lost = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelError, match=f"{lost.name}, which its index names, is not there"):
        loaded(tmp_path / "shards")


# ------------------------------------------------------------------------------------------------- what a folder is


@pytest.mark.parametrize("has_index", [False, True])
def test_weights_are_those_of_the_file_that_the_config_names(has_index: bool, tmp_path: Path) -> None:
    """As transformers reads them, though `model.safetensors` lies beside them."""
    net = loaded(saved(tmp_path / "other", seed=1))
    saved(tmp_path / "m")
    weights, name = load_file(tmp_path / "other" / "model.safetensors"), "best.safetensors"
    save_file(weights, tmp_path / "m" / name)
    if has_index:
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
        (tmp_path / "m" / "best.safetensors.index.json").write_text(json.dumps(index))
        name = "best.safetensors.index.json"
    configured(tmp_path / "m", transformers_weights=name)
    found = loaded(tmp_path / "m")
    for wanted, tensor in net.state_dict().items():
        torch.testing.assert_close(found.state_dict()[wanted], tensor, rtol=0, atol=0)
    for bad, says in ((7, "transformers_weights: 7; expected"), ("../other/model.safetensors", "expected a .*of the folder"),
                      ("no.safetensors", "it has no no.safetensors, which config.json names"), ("a.gguf", "expected a")):  # fmt: skip
        configured(tmp_path / "m", transformers_weights=bad)
        with pytest.raises(ModelError, match=says):
            loaded(tmp_path / "m")


def quantised(method: str) -> Callable[[Path], Any]:
    return lambda path: configured(saved(path), quantization_config={"quant_method": method, "bits": 4})


def adapter(path: Path) -> None:
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
    save_file({"a": torch.ones(2)}, path / "adapter_model.safetensors")


def pointer(file: str) -> Callable[[Path], Any]:
    def make(path: Path) -> None:
        saved(path)
        (path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")

    return make


T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": NUM_TOKENS}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": NUM_TOKENS, "encoder_ffn_dim": 16}
VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
ARE: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{f"quantised by {m}": (quantised(m), rf"is quantised \({m}\)") for m in ("bitsandbytes", "gptq", "awq", "fp8")},
    "an adapter": (adapter, r"is a LoRA adapter without its base model .*expected the merged model"),
    "an adapter beside weights": (lambda p: adapter(saved(p)), "holds a LoRA adapter beside weights"),
    "a pointer to weights": (pointer("model.safetensors"), r"model.safetensors is a Git LFS pointer.*git lfs pull"),
    "a pointer to a config": (pointer("config.json"), r"config.json is a Git LFS pointer"),
    "t5": (
        lambda p: T5ForConditionalGeneration(T5Config(**T5)).save_pretrained(p),
        r"is an encoder-decoder \(t5\).*expected plain weights of an encoder \(bert",
    ),
    "bart": (
        lambda p: BartForConditionalGeneration(BartConfig(**BART)).save_pretrained(p),
        r"is an encoder-decoder \(bart\)",
    ),
    "vit": (lambda p: ViTModel(ViTConfig(**VIT)).save_pretrained(p), r"is no language model \(vit\); expected plain"),
    "a list": (lambda p: (saved(p) / "config.json").write_text("[]"), "config.json holds a list, expected an object"),
    "cut off": (lambda p: (saved(p) / "config.json").write_text('{"a'), "config.json cannot be read: "),
    "no config": (lambda p: (saved(p) / "config.json").unlink(), "no weights at .* it has no config.json"),
    **{
        f"a config with {field}": (
            lambda p, f=field, v=value: configured(saved(p), **{f: v}),
            f"config.json: .*{field}",
        )
        for field, value in {
            "rms_norm_eps": "1e-05",
            "num_attention_heads": "2",
            "num_key_value_heads": 3.5,
            "hidden_act": "swishy",
            "dtype": "float99",
            "attn_implementation": "nonsense",
            "rope_parameters": {"rope_type": "new", "rope_theta": 1e4},
        }.items()
    },
}


@pytest.mark.parametrize("what", ARE)
def test_what_is_no_plain_language_model_is_refused_by_what_it_is(what: str, tmp_path: Path) -> None:
    make, words = ARE[what]
    make(tmp_path / "m")
    for door in (lambda: build_.weights_fingerprint(str(tmp_path / "m"), None), lambda: loaded(tmp_path / "m")):
        with pytest.raises(ModelError, match=words) as error:
            door()
        assert "\n" not in str(error.value) and repr(str(tmp_path / "m")) in str(error.value)


@pytest.mark.parametrize(
    ("family", "text", "says"),
    [
        (
            "mllama",
            {"cross_attention_layers": [1]},
            r"also reads images or sound \(mllama: vision_config\), and has no text part",
        ),
        (
            "llava",
            {},
            r"also reads images or sound \(llava: vision_config\), and has no text part of its own; expected plain",
        ),
        ("mistral3", {}, r"also reads images or sound \(mistral3: vision_config\)"),
        ("paligemma", {}, r"also reads images or sound \(paligemma: vision_config\)"),
    ],
)
def test_a_model_of_text_and_images_without_a_text_part_is_named(
    family: str, text: dict[str, Any], says: str, tmp_path: Path
) -> None:
    multimodal_folder(family, tmp_path / "m", text)
    with pytest.raises(ModelError, match=says) as caught:
        Folder.read(str(tmp_path / "m"), None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", MULTIMODAL)
def test_the_text_part_of_a_model_of_text_and_images_is_loaded_alone(family: str, tmp_path: Path, capsys: Any) -> None:
    multimodal_folder(family, tmp_path / "m")
    net = build_.build(
        Model(pretrained=str(tmp_path / "m")), name="m", seed=0, vocab_size=300, special_ids={}, length=16
    )
    stored = load_file(tmp_path / "m" / "model.safetensors")
    state, kept = net.state_dict(), 0
    for name, tensor in state.items():
        same = [own for own in stored if own.replace("language_model.", "").endswith(name)]
        kept += any(stored[own].shape == tensor.shape and torch.equal(stored[own], tensor) for own in same)
    assert kept > 0.8 * len(state) and not any("vision" in name for name in state)
    again = build_.restore(build_.plain_config(net.config), build_.weights_of(net)).eval()
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(
            again(input_ids=ids, use_cache=False).logits, net.eval()(input_ids=ids, use_cache=False).logits
        )
    assert "UNEXPECTED" not in "".join(capsys.readouterr())


def test_only_headers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder whose numbers are damaged, and whose headers are whole, is found out as before."""
    path = saved(tmp_path / "m", "bert")
    file = path / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:header] + b"\xff" * (len(content) - header))
    folder = Folder.read(str(path), None)
    assert {tensor.device.type for tensor in folder.tensors.values()} == {"meta"}
    state = torch.get_rng_state()
    start = build_.start_of(folder, 2, NAMES)
    assert start.fresh == {f"{p}.{w}" for p in ("bert.pooler.dense", "classifier") for w in ("weight", "bias")}
    assert torch.equal(torch.get_rng_state(), state)


# --------------------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_classes_are_matched_by_name(family: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "m", family, num_labels=3, class_names=("entailment", "neutral", "contradiction"))
    ids_BT, mask_BT = texts()

    def logits_of(*names: str) -> torch.Tensor:
        net = loaded(path, 3, names)
        assert list(net.config.id2label.values()) == list(expected[names])
        return output_head.class_logits(net, ids_BT, mask_BT, None)

    own, other = ("entailment", "neutral", "contradiction"), ("CONTRADICTION", "Entailment", "neutral")
    numbers, turned = ("0", "1", "2"), ("2", "0", "1")
    expected = {own: own, other: other, (): own, numbers: own, turned: ("contradiction", "entailment", "neutral")}
    first = logits_of(*own)
    assert not torch.allclose(first[:, 0], first[:, 1])
    for names in (other, turned):
        assert torch.equal(logits_of(*names), first[:, [2, 0, 1]])
    for names in ((), numbers):
        assert torch.equal(logits_of(*names), first)
    with pytest.raises(
        ModelError, match="has the classes entailment, neutral, contradiction, and the data have a, b, c"
    ):
        loaded(path, 3, ("a", "b", "c"))


def test_classes_without_names_are_taken_in_their_order_and_get_the_datas(tmp_path: Path) -> None:
    net = loaded(saved(tmp_path / "m", "bert", num_labels=2), 2, NAMES)
    assert net.config.id2label == {0: "ham", 1: "spam"}
    weights = {name: tensor.clone() for name, tensor in build_.weights_of(net).items()}
    how: dict[str, Any] = {"name": "m", "seed": 0, "class_names": ("down", "up")}
    other = build_.with_head(build_.plain_config(net.config), weights, 2, Random(), **how)
    assert other.config.id2label == {0: "down", 1: "up"}  # of the task that the head is for, not of the one before


# ------------------------------------------------------------------------------------------- special tokens, positions


@pytest.mark.parametrize("pad", [None, 7, 1])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_decoders_scores_do_not_depend_on_the_batch(family: str, pad: int | None, tmp_path: Path) -> None:
    """Whatever its config says of padding: the tokenizer's token counts."""
    path = configured(saved(tmp_path / "m", family), pad_token_id=pad)
    net = loaded(path, 2)
    assert net.config.pad_token_id == SPECIAL["pad_token_id"]
    ids_BT, mask_BT = texts()
    together_BC = output_head.class_logits(net, ids_BT, mask_BT, None)
    for row, length in enumerate(mask_BT.sum(1).tolist()):
        alone_C = output_head.class_logits(net, ids_BT[row, None, :length], mask_BT[row, None, :length], None)[0]
        torch.testing.assert_close(alone_C, together_BC[row])


def test_where_the_tokenizer_has_no_padding_token_that_of_the_config_counts(tmp_path: Path) -> None:
    path = configured(saved(tmp_path / "m"), pad_token_id=7)
    how: dict[str, Any] = {"vocab_size": NUM_TOKENS, "special_ids": {"eos_token_id": 2}, "length": LENGTH}
    net = build_.build(Model(pretrained=str(path)), name="m", seed=0, num_labels=2, **how).eval()
    ids_BT, mask_BT = texts()
    ids_BT = ids_BT.masked_fill(mask_BT == 0, 0)  # as data are padded whose tokenizer has no token for it
    together_BC = output_head.class_logits(net, ids_BT, mask_BT, None)
    alone_C = output_head.class_logits(net, ids_BT[:1, :4], mask_BT[:1, :4], None)[0]
    torch.testing.assert_close(alone_C, together_BC[0])


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "camembert", "mpnet", "bert", "gpt2", "opt", "llama"])
def test_as_many_positions_can_be_read_as_are_said(family: str, tmp_path: Path) -> None:
    net = loaded(saved(tmp_path / "m", family))
    most = initialise.num_positions(net)
    assert most == LENGTH
    net(input_ids=torch.full((1, LENGTH), 5))
    if family not in ("llama", "opt"):
        with pytest.raises((IndexError, RuntimeError)):
            net(input_ids=torch.full((1, LENGTH + 1), 5))
