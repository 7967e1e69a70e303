"""Models: shapes by family, keyed initial weights, the head at supervised positions only, round trips, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors.torch import load, save
from torch import nn

from tests.support.trials import FAMILIES
from trainables.config.errors import ModelError
from trainables.config.models import Model, Random
from trainables.config.phase import Masking
from trainables.data.tokenizer import train_wordpiece
from trainables.models import build as build_
from trainables.models import initialise, output_head, tokenizer_check
from trainables.storage import hub

SPECIAL = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "mask_token_id": 4}
VOCABULARY, LENGTH = 60, 16


def shape(family: str = "bert", **more: Any) -> Model:
    return Model(
        **{"family": family, "layers": 2, "width": 32, "heads": 2, "intermediate_size": 48, "dropout": 0, **more}
    )


def build(model: Model, *, name: str = "m", seed: int = 0, vocab_size: int = VOCABULARY) -> Any:
    return build_.build(model, name=name, seed=seed, vocab_size=vocab_size, special_ids=SPECIAL, length=LENGTH)


def some_ids(num: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (num, LENGTH), generator=torch.Generator().manual_seed(seed))


def equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shape_becomes_a_model_of_that_shape(family: str) -> None:
    net = build(shape(family))
    config = net.config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == (family, 2, 32)
    assert (config.num_attention_heads, config.vocab_size) == (2, VOCABULARY)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert any(p.shape in {(48, 32), (32, 48), (96, 32)} for p in net.parameters())  # the inner width, gated or not
    assert build_.num_parameters(net) == sum(p.numel() for p in set(net.parameters()))
    assert net(input_ids=some_ids()).logits.shape == (3, LENGTH, VOCABULARY)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_set_everywhere_and_zero_means_none(family: str) -> None:
    for dropout in (0.0, 0.5):
        net = build(shape(family, dropout=dropout)).train()
        rates = {module.p for module in net.modules() if isinstance(module, nn.Dropout)}
        assert rates <= {dropout}
        torch.manual_seed(0)
        first, second = (net(input_ids=some_ids()).logits for _ in range(2))
        assert torch.equal(first, second) == (dropout == 0)


def test_dropout_is_the_architectures_own_unless_a_number_is_given() -> None:
    assert build(shape("bert", dropout=None)).config.hidden_dropout_prob == 0.1


def test_further_fields_of_the_config_are_set_and_unknown_ones_are_refused() -> None:
    assert build(shape("bert", config={"hidden_act": "relu"})).config.hidden_act == "relu"
    with pytest.raises(ModelError, match="a bert config has no field 'hidden_akt'"):
        build(shape("bert", config={"hidden_akt": "relu"}))


@pytest.mark.parametrize("family", ["no_such", "vit"])
def test_a_family_without_a_language_model_is_refused(family: str) -> None:
    with pytest.raises(ModelError, match=f"no language model of family '{family}'"):
        build(shape(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stream_that_a_model_cannot_read_is_refused_with_the_way_out(family: str) -> None:
    config = build(shape(family)).config
    right, wrong = (Masking(), None) if build_.is_masked_lm(family) else (None, Masking())
    build_.check_stream(config, right, "m")
    with pytest.raises(ModelError, match=r"model 'm' \(\w+\) is (an encoder|a decoder): .*corruption"):
        build_.check_stream(config, wrong, "m")


# ------------------------------------------------------------------------------------------------------ initial weights


@pytest.mark.parametrize("init", [Random(), Random(std="width"), Random(std=0.5)], ids=["family", "width", "number"])
@pytest.mark.parametrize("family", FAMILIES)
def test_initial_weights_depend_on_seed_and_name_and_on_nothing_else(family: str, init: Random) -> None:
    model = shape(family, init=init)
    torch.manual_seed(1)
    first = build(model)
    torch.manual_seed(2)
    build(shape("bert", layers=3), name="other")
    again = build(model)
    assert equal(first, again)
    state = torch.get_rng_state()
    initialise.initialise(again, init, name="m", seed=0)
    assert equal(first, again) and torch.equal(torch.get_rng_state(), state)  # no one else's draws are touched
    assert not equal(first, build(model, seed=1))
    assert not equal(first, build(model, name="n"))


@pytest.mark.parametrize("std", ["family", "width"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_different_depth_start_equal_layer_by_layer(family: str, std: Any) -> None:
    """Up to the size that the family's own rule gives a projection by the number of layers (GPT-2, ModernBERT)."""
    shallow, deep = (build(shape(family, layers=layers, init=Random(std=std))) for layers in (2, 3))
    theirs = deep.state_dict()
    for name, tensor in shallow.state_dict().items():
        if std == "width" or tensor.ndim < 2:
            assert torch.equal(tensor, theirs[name]), name
        else:
            torch.testing.assert_close(tensor / tensor.std(), theirs[name] / theirs[name].std(), msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_familys_rule_is_that_of_transformers(family: str) -> None:
    """Every tensor has the spread that transformers' own construction gives it, scaled projections included."""
    model = shape(family, width=64, heads=2, intermediate_size=128)
    config = build_.make_config(model, vocab_size=400, special_ids=SPECIAL, length=64)
    ours, theirs = build_.from_config(config), build_.from_config(config)
    initialise.initialise(ours, Random(), name="m", seed=0)
    reference = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        if tensor.ndim >= 2:
            assert tensor.std().item() == pytest.approx(reference[name].std().item(), rel=4 / tensor.numel() ** 0.5), (
                name
            )
        else:
            assert torch.equal(tensor, reference[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_width_and_number_set_the_spread_of_every_matrix(family: str) -> None:
    for std, expected in (("width", 64**-0.5), (0.3, 0.3)):
        net = build(shape(family, width=64, init=Random(std=std)), vocab_size=400)
        for name, parameter in net.named_parameters():
            if parameter.ndim >= 2:
                assert parameter.std().item() == pytest.approx(expected, rel=0.1), name


def test_sinusoids_replace_drawn_positions_and_are_refused_without_a_table() -> None:
    drawn = build(shape("bert")).bert.embeddings.position_embeddings.weight
    table = build(shape("bert", init=Random(positions="sinusoid"))).bert.embeddings.position_embeddings.weight
    assert table.std().item() == pytest.approx(drawn.std().item(), rel=0.01)
    scale = drawn.std().item() / initialise.sinusoids(LENGTH, 32).std().item()
    torch.testing.assert_close(table.detach(), initialise.sinusoids(LENGTH, 32) * scale)
    build(shape("gpt2", init=Random(positions="sinusoid")))
    with pytest.raises(ModelError, match=r"modernbert.*no learned positions"):
        build(shape("modernbert", init=Random(positions="sinusoid")))


def test_sinusoids_are_those_of_the_transformer() -> None:
    table = initialise.sinusoids(20, 6)
    for t, k in ((0, 0), (3, 1), (19, 2)):
        angle = torch.tensor(t / 10_000 ** (2 * k / 6))
        expected = torch.stack((angle.sin(), angle.cos()))
        torch.testing.assert_close(table[t, 2 * k : 2 * k + 2] / table[0, 1], expected)


# -------------------------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_at_supervised_positions_is_the_full_head_there_values_and_gradients(family: str) -> None:
    ids_BT, positions_N = some_ids(), torch.tensor([0, 5, LENGTH - 1, LENGTH, 2 * LENGTH + 3])
    net = build(shape(family)).double()
    weights = torch.randn(len(positions_N), VOCABULARY, generator=torch.Generator().manual_seed(0)).double()

    def gradients(logits_NV: torch.Tensor) -> dict[str, torch.Tensor]:
        net.zero_grad(set_to_none=True)
        (logits_NV.log_softmax(-1) * weights).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}

    sparse = output_head.logits_at(net, ids_BT, positions_N)
    ours = gradients(sparse)
    full = net(input_ids=ids_BT).logits.flatten(0, 1)[positions_N]
    theirs = gradients(full)
    assert sparse.shape == (len(positions_N), VOCABULARY)
    torch.testing.assert_close(sparse, full, rtol=0, atol=1e-12)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-12, msg=name)
    assert net(input_ids=ids_BT).logits.shape == (3, LENGTH, VOCABULARY)  # the hook is gone


@pytest.mark.parametrize("family", FAMILIES)
def test_no_full_logits_are_made(family: str) -> None:
    net = build(shape(family))
    shapes = []
    for module in net.modules():
        module.register_forward_hook(lambda _m, _a, out: shapes.append(getattr(out, "logits", out)))
    output_head.logits_at(net, some_ids(), torch.tensor([1, 20]))
    sizes = [s.shape for s in shapes if isinstance(s, torch.Tensor) and s.shape[-1:] == (VOCABULARY,)]
    assert sizes and all(size.numel() == 2 * VOCABULARY for size in sizes)


def test_the_hook_goes_also_when_the_forward_fails() -> None:
    net = build(shape())
    with pytest.raises(IndexError):
        output_head.logits_at(net, some_ids(), torch.tensor([10_000]))
    assert not net.base_model._forward_hooks


# ----------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_stored_is_restored_bit_by_bit(family: str) -> None:
    net = build(shape(family, dropout=0.25)).eval()
    config = json.loads(json.dumps(build_.plain_config(net.config)))
    weights = load(save({name: tensor.contiguous() for name, tensor in build_.weights_of(net).items()}))
    again = build_.restore(config, weights).eval()
    assert equal(net, again)
    assert torch.equal(net(input_ids=some_ids()).logits, again(input_ids=some_ids()).logits)
    assert json.loads(json.dumps(build_.plain_config(again.config))) == config
    assert [p.shape for p in again.parameters()] == [p.shape for p in net.parameters()]  # what was tied is tied


def test_weights_that_do_not_fit_are_refused_by_name() -> None:
    net = build(shape())
    config, weights = build_.plain_config(net.config), build_.weights_of(net)
    name = next(iter(weights))
    with pytest.raises(ModelError, match=name):
        build_.restore(config, {key: tensor for key, tensor in weights.items() if key != name})
    with pytest.raises(ModelError, match="no_such"):
        build_.restore(config, {**weights, "no_such": torch.zeros(1)})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pretrained_folder_gives_its_own_weights(family: str, tmp_path: Path) -> None:
    net = build(shape(family), seed=3).eval()
    net.save_pretrained(tmp_path)
    again = build(Model(pretrained=str(tmp_path))).eval()
    assert torch.equal(net(input_ids=some_ids()).logits, again(input_ids=some_ids()).logits)
    assert build(Model(pretrained=str(tmp_path)), seed=9, name="x").training is False  # as transformers loads


def test_weights_that_were_cut_off_are_refused_by_name(tmp_path: Path) -> None:
    build(shape("bert")).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"no weights at '{tmp_path}'.*Error while deserializing header"):
        build(Model(pretrained=str(tmp_path)))


def test_dropout_of_a_pretrained_model_is_set_where_asked_for(tmp_path: Path) -> None:
    build(shape("bert", dropout=None)).save_pretrained(tmp_path)
    rates = {m.p for m in build(Model(pretrained=str(tmp_path), dropout=0)).modules() if isinstance(m, nn.Dropout)}
    assert rates == {0}


def test_a_folder_that_is_not_there_is_not_looked_for_at_the_hub(tmp_path: Path) -> None:
    for ask in (lambda name: build(Model(pretrained=name)), lambda name: build_.weights_fingerprint(name, None)):
        with pytest.raises(ModelError, match=r"no weights at '.*/nowhere' .*: there is no such folder"):
            ask(str(tmp_path / "nowhere"))


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    net = build(shape())
    net.config.save_pretrained(tmp_path)
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no weights at"):
        build(Model(pretrained=str(tmp_path)))
    with pytest.raises(ModelError, match=r"no \*.safetensors; pickled weights are refused"):
        build_.weights_fingerprint(str(tmp_path), None)


def test_a_pretrained_model_with_too_few_rows_for_the_tokenizer_is_refused(tmp_path: Path) -> None:
    build(shape()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"has {VOCABULARY} rows for a tokenizer of 61 tokens"):
        build(Model(pretrained=str(tmp_path)), vocab_size=61)


def test_weights_are_fingerprinted_by_content_not_by_place(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build(shape(), seed=seed).save_pretrained(tmp_path / name)
    a, b, c = (build_.weights_fingerprint(str(tmp_path / name), None) for name in "abc")
    assert a == b != c
    config = tmp_path / "b" / "config.json"
    config.write_text(config.read_text().replace('"gelu"', '"relu"'))
    assert build_.weights_fingerprint(str(tmp_path / "b"), None) != a


# --------------------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_bf16_are_those_in_fp32_rounded_and_stay_so_when_stored(family: str, tmp_path: Path) -> None:
    full, half = build(shape(family)), build(shape(family, dtype="bf16")).eval()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for (name, a), b in zip(full.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(a.to(torch.bfloat16), b), name
    assert build_.num_parameters(full) == build_.num_parameters(half)  # what is tied is tied
    assert {n: b.dtype for n, b in half.named_buffers()} == {n: b.dtype for n, b in full.named_buffers()}
    config = json.loads(json.dumps(build_.plain_config(half.config)))
    weights = load(save({name: tensor.contiguous() for name, tensor in build_.weights_of(half).items()}))
    again = build_.restore(config, weights).eval()
    assert equal(half, again) and {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(half(input_ids=some_ids()).logits, again(input_ids=some_ids()).logits)
    how: dict[str, Any] = {"name": "m", "seed": 0}
    headed = build_.with_head(config, weights, 3 if family != "llama" else None, Random(), **how)
    assert {p.dtype for p in headed.parameters()} == {torch.bfloat16}
    half.save_pretrained(tmp_path)
    for dtype, expected in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        loaded = build(Model(pretrained=str(tmp_path), dtype=dtype))
        assert {p.dtype for p in loaded.parameters()} == {expected}
        assert all(
            torch.equal(a.float(), b.float()) for a, b in zip(loaded.parameters(), half.parameters(), strict=True)
        )


def test_a_type_that_a_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in ("fp32", "bf16"):
        build_.check_dtype(dtype, "cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    build_.check_dtype("fp32", "cuda:1")
    with pytest.raises(ModelError, match=r"^device cuda:1 \(Tesla T4\) does not compute in bf16; expected fp32$"):
        build_.check_dtype("bf16", "cuda:1")
    asked = {"m": Model(pretrained="some/m"), "n": Model(pretrained="some/n", dtype="bf16")}
    build_.check_types("fp32", {"m": asked["m"]}, "cuda:1")
    for precision, where in (("bf16", "precision"), ("fp32", r"models\.n\.dtype")):
        with pytest.raises(
            ModelError, match=rf"^{where}: device cuda:1 \(Tesla T4\) does not compute in bf16; expected fp32$"
        ):
            build_.check_types(precision, asked, "cuda:1")


# ---------------------------------------------------------------------------------------------------------- tokenizers


def tokenizer_of(*texts: str) -> Any:
    return train_wordpiece(texts, 200)


def test_a_tokenizer_is_compared_by_what_its_ids_mean(tmp_path: Path) -> None:
    ours, other = tokenizer_of("one two three"), tokenizer_of("four five six")
    tokenizer_check.check_tokenizer(shape(), ours, "corpus")  # a shape takes the data's
    build(shape(), vocab_size=len(ours) + 28).save_pretrained(tmp_path)  # rows beyond the tokenizer's are padding
    mine = Model(pretrained=str(tmp_path))
    tokenizer_check.check_tokenizer(mine, ours, "corpus")  # a folder without a tokenizer
    ours.save_pretrained(tmp_path)
    tokenizer_check.check_tokenizer(mine, tokenizer_of("one two three"), "corpus")
    with pytest.raises(ModelError) as error:
        tokenizer_check.check_tokenizer(mine, other, "dolly")
    said = str(error.value)
    assert repr(str(tmp_path)) in said and "data 'dolly'" in said
    assert f"({len(ours)} tokens)" in said and f"({len(other)})" in said and "tokenizer: {kind: pretrained" in said
    theirs, mine_ids = other.get_vocab(), ours.get_vocab()
    token = said.partition("tokens: '")[2].partition("'")[0]
    assert theirs.get(token) != mine_ids.get(token)


def test_a_token_that_only_one_side_has_is_told(tmp_path: Path) -> None:
    ours = tokenizer_of("one two three")
    ours.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    ours.add_tokens(["<user>"])
    with pytest.raises(
        ModelError, match=r"differ in 1 tokens: '<user>' is not in that of .* and \d+ in that of data c"
    ):
        tokenizer_check.check_tokenizer(Model(pretrained=str(tmp_path)), ours, "c")


# --------------------------------------------------------------------------------------------------------------- the hub


def answer(error: BaseException) -> Any:
    """A hub that says this: as it does itself, and in transformers' wrapping."""

    def bare(*_args: Any, **_more: Any) -> Any:
        raise error

    def wrapped(*_args: Any, **_more: Any) -> Any:
        raise OSError("There was an error when loading x:\nlong story") from error

    return bare, wrapped


def refused(kind: type[Exception]) -> BaseException:
    response = httpx.Response(401, request=httpx.Request("GET", "https://huggingface.co/x"))
    return (
        kind("401 Client Error.\nlong story", response=response)
        if issubclass(kind, HfHubHTTPError)
        else kind("offline\nlong story")
    )  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("kind", "offline", "words"),
    [
        (GatedRepoError, None, "gated; accept its terms at https://huggingface.co/some/model and set HF_TOKEN"),
        (RepositoryNotFoundError, None, "the hub shows no such model; if it is private, set HF_TOKEN"),
        (OfflineModeIsEnabled, "1", "cache does not hold it and HF_HUB_OFFLINE=1 forbids the download; unset it"),
        (
            LocalEntryNotFoundError,
            None,
            "co does not answer; set HTTPS_PROXY if there is a proxy, HF_ENDPOINT to a mirror, or",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_model_that_the_hub_does_not_give_is_one_message_with_the_variable(
    kind: Any, offline: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    if offline:
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    model = Model(pretrained="some/model")
    for how in answer(refused(kind)):
        monkeypatch.setattr(hub, "snapshot_download", how)
        asks = (
            lambda: build(model),
            lambda: build_.weights_fingerprint("some/model", None),
            lambda: tokenizer_check.check_tokenizer(model, tokenizer_of("one two"), "corpus"),
        )
        for ask in asks:
            with pytest.raises(ModelError) as error:
                ask()
            said = str(error.value)
            assert said.startswith("no weights at 'some/model' (expected a folder") and words in said
            assert "\n" not in said and "long story" not in said
