"""Checkpoints of a phase in progress: one per attempt, under the attempt's folder.

`checkpoint.json` names the file with its checksum and is replaced after the file is written, so that an attempt that dies
while it saves leaves the state before.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from trainables.storage.files import Storage, as_json, log


def save_checkpoint(storage: Storage, folder: str, state: Mapping[str, Any], *, room: int | None = None) -> bool:
    """Saves the state of a phase under `folder`, replaces the pointer, then deletes older states.

    Two states exist for a moment. Where two do not fit into `room` bytes no state is saved; returns whether it was.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getvalue()
    if room is not None and 2 * len(content) > room:
        log.warning("no checkpoint at step %d: two of %d bytes do not fit into %d", state["step"], len(content), room)
        return False
    file = f"checkpoint-{state['key'][:8]}-{state['step']:09d}.pt"
    storage.write(f"{folder}/{file}", content)
    pointer = {"file": file, "sha256": hashlib.sha256(content).hexdigest(), "key": state["key"], "step": state["step"]}
    storage.write(f"{folder}/checkpoint.json", as_json(pointer))
    drop_checkpoints(storage, folder, keep=file)
    return True


def load_checkpoint(storage: Storage, folders: Iterable[str], key: str) -> dict[str, Any] | None:
    """Loads the furthest whole checkpoint of phase `key` in these folders; skips a damaged one with a warning."""
    best: dict[str, Any] | None = None
    for folder in folders:
        text = storage.read(f"{folder}/checkpoint.json")
        if text is None:
            continue
        try:
            pointer = json.loads(text)
            if pointer["key"] != key or (best is not None and pointer["step"] <= best["step"]):
                continue
            content = storage.read(f"{folder}/{pointer['file']}")
            if content is None or hashlib.sha256(content).hexdigest() != pointer["sha256"]:
                raise ValueError("checksum differs")
            best = torch.load(io.BytesIO(content), weights_only=True)
        except Exception as error:  # whatever is wrong, the phase begins anew
            log.warning("checkpoint in %s skipped: %s", folder, error)
    return best


def drop_checkpoints(storage: Storage, folder: str, keep: str | None = None) -> None:
    """Deletes the checkpoints in `folder`, except the file `keep` and the pointer to it."""
    for name in storage.list(folder):
        if name.startswith("checkpoint") and name not in (keep, "checkpoint.json" if keep else None):
            storage.delete(f"{folder}/{name}")
