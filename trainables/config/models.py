"""Models of a trial: a shape or pretrained weights, and the initialisation of fresh weights."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, JsonValue, model_validator

from trainables.config.paths import FolderOrId
from trainables.config.value import Name, Positive, Value


class Random(Value):
    """Fresh weights. `std`: the family's own rule, or N(0, 1/sqrt(width)) for every matrix, or a number.

    `positions`: with sinusoids a small encoder leaves the unigram level hundreds of steps earlier than with random
    ones.
    """

    kind: Literal["random"] = "random"
    std: Literal["family", "width"] | Positive = "family"  # standard deviation of fresh matrices
    positions: Literal["random", "sinusoid"] = "random"  # of learnt position embeddings


Depth = Literal["copy_last", "stack", "interpolate", "spread", "every_other", "first", "identity", "random"]
# how hidden size, heads and inner layer change; exact: all outputs stay the same; replicate averages on the way down
Width = Literal[
    "replicate",  # copies, whose outgoing weights are divided. Exact: inner layer, heads; hidden size by a whole factor
    "replicate_noise",  # the same, with noise in the outgoing weights that cancels over copies, so that copies diverge
    "aki",  # as replicate, but copies come from the next layer; never exact
    "zero_pad",  # new parts are fresh, with zero outgoing weights. Exact: inner layer, heads; hidden size under RMSNorm
    "mean_pad",  # the same, but new hidden channels hold the mean. Exact under LayerNorm before each block (GPT-2)
    "prefix",  # copies the overlap, per head, and adds zeros; nothing is rescaled, and added parts may never learn
    "select",  # down: evenly spaced channels, heads, neurons. Up: padded
    "importance",  # down: the most important on random inputs (the least damage). Up: padded
]


class Remap(Value):
    """Weights from another model of the trial, as they are when this model is first used.

    Without `width` the shapes may differ in depth only. With `width` heads may change in number and in size (exactly
    where they only grow, rotary ones to a multiple of their size); for exactness the norms take the source's epsilon,
    times the ratio of the hidden sizes where these are padded.
    """

    kind: Literal["remap"]
    from_: Name = Field(alias="from", validation_alias=AliasChoices("from", "from_"))  # the model that is copied
    depth: Depth  # which layer of the source each layer copies
    width: Width | None = None  # how the width changes; by default not at all
    rest: Random = Random()  # of parameters that the remap does not set


Init = Annotated[Random | Remap, Field(discriminator="kind")]


class Sharing(Value):
    """Layers that run more than once, for depth without parameters (Cho & Kang 2022, shuffled parameter sharing).

    `order`: all n once more (`twice`), each twice in a row (`each_twice`), back from n to 1 (`mirror`), or the upper or
    the lower half once more. `swap`: in each further run of a layer its query and key projections are swapped.
    """

    order: Literal["twice", "each_twice", "mirror", "upper_twice", "lower_twice"] = "twice"  # in which the n layers run
    swap: bool  # whether further runs swap query and key


Quantization = Literal["nf4", "int8"]  # NormalFloat-4 with a scale for 64 numbers; 8 bits with a scale for each output


class Model(Value):
    """A model by shape (`family`, `layers`, `width`), by `pretrained` weights (hub id or local folder), or `like` another
    one: with its config, but for what is given here."""

    # the name of the model that this one is like; a validated trial has that model's value instead
    like: Name | Model | None = Field(None, exclude_if=lambda value: value is None)
    family: str | None = None  # as transformers calls the architecture
    layers: int | None = Field(None, ge=1)  # number of layers
    width: int | None = Field(None, ge=4)  # hidden size
    heads: int | None = Field(None, ge=1)  # by default one head for each 64 channels
    intermediate_size: int | None = Field(None, ge=1)  # by default 4 x width
    dropout: float | None = Field(None, ge=0, lt=1)  # by default as the architecture has it
    config: dict[str, JsonValue] = {}  # further fields of the transformers config; nested ones are merged
    pretrained: FolderOrId | None = None  # folder or hub id of the weights
    revision: str | None = None  # commit, tag or branch on the hub
    # one of the data's `tokenizers`, with which this model reads them; by default the data's own `tokenizer`
    tokenizer: Name | None = Field(None, exclude_if=lambda value: value is None)
    init: Init = Random()  # of fresh weights
    sharing: Sharing | None = None  # by default each layer runs once
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the weights
    # how phases that do not train the model keep the weights of its linear layers below the head; by default in `dtype`
    quantize: Quantization | None = Field(None, exclude_if=lambda value: value is None)

    @model_validator(mode="after")
    def _one_source_of_the_shape(self) -> Model:
        if self.like is not None and (self.family or self.pretrained):
            raise ValueError(
                f"like brings the family and the shape: remove {'family' if self.family else 'pretrained'}"
            )
        if self.pretrained is not None:
            given = [
                key
                for key in ("family", "layers", "width", "heads", "intermediate_size")
                if getattr(self, key) is not None
            ]
            if given or self.config:
                raise ValueError(
                    f"pretrained weights bring their own shape: remove {', '.join(given) or 'config'}; for another shape "
                    "expected a model `like` this one"
                )
            if self.init != Random():
                raise ValueError("pretrained weights are the initialisation: remove init")
            if self.sharing is not None:
                raise ValueError("pretrained weights are not shared: give a shape, and `init: {kind: remap, from: …}`")
            return self
        if self.like is not None:
            return self
        missing = [key for key in ("family", "layers", "width") if getattr(self, key) is None]
        if missing:
            raise ValueError(
                f"needs {', '.join(missing)} (or pretrained: a hub id or a folder; or like: another model)"
            )
        assert self.width is not None
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.num_heads}")
        if self.sharing is not None and self.family != "bert":
            raise ValueError(
                f"sharing is for family bert, whose query and key projections can be swapped; not for {self.family}"
            )
        return self

    @property
    def num_heads(self) -> int:
        """The heads of a model by shape."""
        return self.heads or max(1, (self.width or 64) // 64)

    @property
    def folder(self) -> tuple[str, str | None] | None:
        """The hub id or folder, and its revision, from which the weights or, with `like`, the shape are read."""
        if isinstance(self.like, Model):
            return self.like.folder
        return None if self.pretrained is None else (self.pretrained, self.revision)

    def by_content(self, fingerprint: str | None, **dump: Any) -> dict[str, Any]:
        """Returns the fields as JSON, with the fingerprint of a folder that gives the shape in place of its path;
        without the name of a tokenizer."""
        value = self.model_dump(mode="json", **dump)
        value.pop("tokenizer", None)
        if isinstance(self.like, Model) and fingerprint is not None:
            value["like"] = self.like.by_content(fingerprint) | {"revision": None}
            if self.like.pretrained is not None:
                value["like"]["pretrained"] = fingerprint
        return value
