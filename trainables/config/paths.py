"""Paths in a trial: the types of the fields that hold one.

Who validates a trial gives, as `locate` in pydantic's context, what turns a path as written into one that every process finds;
without `locate` paths stay as they are.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, ValidationInfo


def _located(*, may_be_id: bool) -> AfterValidator:
    def located(text: str, info: ValidationInfo) -> str:
        locate = (info.context or {}).get("locate")
        return text if locate is None else str(locate(text, may_be_id=may_be_id))

    return AfterValidator(located)


DataPath = Annotated[str, _located(may_be_id=False)]  # or a glob, or a URI
FolderOrId = Annotated[str, _located(may_be_id=True)]  # an id of the hub
