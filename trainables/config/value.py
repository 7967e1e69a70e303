"""Frozen values with strict fields, and their canonical hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class Value(BaseModel):
    """A frozen value; unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True, allow_inf_nan=False
    )


def by_key(*keys: str) -> Discriminator:
    """Tells members of a union apart by the key that each must have, so that an error names one member only."""

    def find(value: Any) -> str | None:
        if isinstance(value, Mapping):
            return next((key for key in keys if key in value), None)
        return next((key for key in keys if hasattr(value, key) or hasattr(value, f"{key}_")), None)

    return Discriminator(
        find, custom_error_type="which", custom_error_message=f"must have one of the keys: {', '.join(keys)}"
    )


def single(key: str, name: str, kind: Any) -> BeforeValidator:
    """Reads one value of this type as a mapping: `{key: …}` as `{name: {key: …}}`."""
    return BeforeValidator(
        lambda v: {name: v} if isinstance(v, Mapping) and key in v else v,
        json_schema_input_type=dict[Name, kind] | kind,
    )


def digest(value: Any, num_hex: int = 64) -> str:
    """Returns hex digits of the SHA-256 of the canonical JSON of a value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:num_hex]


def random_stream(*purpose: str | int | float) -> int:
    """Returns a 63-bit seed for one purpose, e.g. (seed, "mask", phase, stream, step), whatever was drawn before."""
    return int(digest(list(purpose), 16), 16) >> 1
