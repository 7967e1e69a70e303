"""Paths in a trial: the types of the fields that hold one.

Who validates a trial gives, as `locate` in pydantic's context, what turns a path as written into one that every process finds;
without `locate` paths stay as they are.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, ValidationInfo


class Located(str):
    """A path as every process finds it, which messages show (`!r`) as the user wrote it."""

    written: str

    def __repr__(self) -> str:
        return repr(self.written)


def _located(*, may_be_id: bool) -> AfterValidator:
    def located(text: str, info: ValidationInfo) -> str:
        locate = (info.context or {}).get("locate")
        if locate is None:
            return text
        found = Located(locate(text, may_be_id=may_be_id))
        found.written = getattr(text, "written", text)
        return found

    return AfterValidator(located)


DataPath = Annotated[str, _located(may_be_id=False)]  # or a glob, or a URI
FolderOrId = Annotated[str, _located(may_be_id=True)]  # an id of the hub
