"""What a study varies: choices and ranges, with the labels that a report prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, PositiveInt, Tag, model_validator

from trainables.config.value import Value, by_key


def labelled(value: Any) -> Any:
    """Turns a list of choices into label -> value; reports print the label."""
    if isinstance(value, list):
        return {label_of(v): v for v in value}
    if isinstance(value, Mapping):
        return {str(k): v for k, v in value.items()}
    return value


def label_of(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


Label = Annotated[str, BeforeValidator(label_of, json_schema_input_type=Any)]


def _labels(value: Any) -> list[str]:
    return [label_of(label) for label in (value if isinstance(value, list) else [value])]


class _Axis(Value):
    # other axis -> the labels under which this axis varies
    when: dict[str, Annotated[tuple[str, ...], BeforeValidator(_labels, json_schema_input_type=Any)]] = {}


class Choice(_Axis):
    """One of several labelled values. Where the axis is not a path of the trial, each value maps paths to values."""

    choice: Annotated[
        dict[str, Any],
        BeforeValidator(labelled, json_schema_input_type=dict[str, Any] | list[Any]),
        Field(min_length=1),
    ]  # values, or label -> value

    def ends(self) -> tuple[Any, ...]:
        return tuple(self.choice)


class _Range(_Axis):
    log: bool = False  # whether the range is searched on a logarithmic scale

    @model_validator(mode="after")
    def _the_range_rises(self) -> Self:
        low, high = self.ends()
        if not low < high:
            raise ValueError(f"the range must rise; got [{low}, {high}]")
        if self.log and low <= 0:
            raise ValueError(f"a logarithmic range must lie above 0; got [{low}, {high}]")
        return self

    def ends(self) -> tuple[Any, ...]:
        raise NotImplementedError


class FloatRange(_Range):
    """Any number of a range."""

    float_: tuple[float, float] = Field(alias="float")  # the lowest and the highest value

    def ends(self) -> tuple[Any, ...]:
        return self.float_


class IntRange(_Range):
    """A whole number of a range."""

    int_: tuple[int, int] = Field(alias="int")  # the lowest and the highest value
    step: PositiveInt = 1  # distance of two values

    @model_validator(mode="after")
    def _equal_steps_are_not_logarithmic(self) -> Self:
        if self.log and self.step > 1:
            raise ValueError("log and step exclude each other; remove one of them, or list the values as a choice")
        return self

    def ends(self) -> tuple[Any, ...]:
        return self.int_


Axis = Annotated[
    Annotated[Choice, Tag("choice")] | Annotated[FloatRange, Tag("float")] | Annotated[IntRange, Tag("int")],
    by_key("choice", "float", "int"),
]
