"""Finds folders of models, here or at the Hugging Face hub, and explains errors of the hub: the cause, and what helps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from trainables.config.errors import ModelError

Kind = Literal["model", "data set", "tokenizer"]


def model_folder(name: str, revision: str | None, patterns: list[str]) -> Path:
    """Returns the folder of a model: a local one, or the hub's files of these patterns, downloaded. Raises ModelError."""
    if (folder := Path(name).expanduser()).is_dir():
        return folder
    try:
        return Path(snapshot_download(name, revision=revision or "main", allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise no_weights(name, why_not(name, "model", error), "a folder, or a hub id that can be reached") from None


def no_weights(
    name: str, why: str, expected: str = "a folder with config.json and model.safetensors, or a hub id"
) -> ModelError:
    return ModelError(f"no weights at {name!r} (expected {expected}): {why}")


def why_not(name: str, kind: Kind, error: BaseException) -> str:
    """Explains in one line an error that was raised while a folder or a hub id was loaded."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    why, causes = lines[0], list(_causes(error))
    offline = f"HF_HUB_OFFLINE={value}" if (value := os.environ.get("HF_HUB_OFFLINE")) else ""
    if Path(name).is_dir():
        return " ".join(" ".join(lines).split())[:300]  # the message names the fault of the folder
    if name.startswith(("/", ".", "~")):
        return f"there is no such folder: {looked_in(name)}"
    if any(isinstance(cause, GatedRepoError) for cause in causes) or "is a gated dataset" in why:
        page = f"https://huggingface.co/{'datasets/' if kind == 'data set' else ''}{name}"
        return f"it is gated; accept its terms at {page} and set HF_TOKEN to a token of that account"
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes) or (offline and constants.is_offline_mode()):
        return f"the hub's cache does not hold it and {offline or 'HF_HUB_OFFLINE'} forbids the download; unset it once"
    if any(isinstance(c, RepositoryNotFoundError) or type(c).__name__ == "DatasetNotFoundError" for c in causes):
        return f"the hub shows no such {kind}; if it is private, set HF_TOKEN to a token that may read it"
    if any(isinstance(cause, LocalEntryNotFoundError | ConnectionError) for cause in causes):
        return (
            f"{constants.ENDPOINT} does not answer; set HTTPS_PROXY if there is a proxy, HF_ENDPOINT to a mirror, or name a "
            "local folder"
        )
    return why


def looked_in(path: str) -> str:
    """Says where a path that was not found was looked for: as a study's `locate` made it absolute, or below the working directory."""
    return (
        f"looked for at {path}; a relative path starts at the study's file, or at the working directory, {os.getcwd()}"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and its causes: transformers wraps the hub's; datasets, which takes long to import, has its own."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
