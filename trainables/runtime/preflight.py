"""Checks that a machine can run trials as the driver would: storage, code, versions, devices, data and models. No Ray.

The driver writes what a process must find; each process checks once, before its first trial.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import secrets
import socket
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from trainables.config.extension import Extension, ExtensionError, installed
from trainables.config.own import install_file
from trainables.config.trial import TrialSpec
from trainables.storage.files import Storage, check_writable
from trainables.storage.prepared_folders import ABOUT, read_about

MARKER = "driver"  # below a study's folder, while its sweep runs: says that a slot sees the driver's storage
PACKAGES = ("torch", "transformers", "tokenizers", "peft", "numpy")  # of which a number may depend on the version
SECONDS = 60.0  # for a check: storage that is gone may never answer
SHARED = "a URI, or a folder that all machines share under the same path"


@dataclass(frozen=True)
class Expected:
    """What a slot must find as the driver has it; travels as JSON."""

    storage: str
    folder: str  # the study's, below the storage
    token: str  # in the marker
    versions: Mapping[str, str]
    code: str
    device: str  # "cpu" or "cuda"
    bf16: bool
    data: tuple[str, ...]  # fingerprints of what the driver prepared
    models: tuple[str, ...]  # folders
    extension: tuple[str, str] | None = None  # the user's own file: its name and its text


def expect(
    storage: Storage, folder: str, *, device: str, specs: Iterable[TrialSpec], fingerprints: Iterable[Mapping[str, str]]
) -> Expected:
    """Writes the marker, and collects what trials of these specs need."""
    specs, token = list(specs), secrets.token_hex(16)
    storage.write(f"{folder}/{MARKER}", token.encode())
    models = [model for spec in specs for model in spec.models.values()]
    found = {value for by_name in fingerprints for name, value in by_name.items() if name.startswith("data:")}
    return Expected(
        storage=storage.uri,
        folder=folder,
        token=token,
        versions=versions(),
        code=code(),
        device=device,
        bf16=any(spec.precision == "bf16" for spec in specs) or any(model.dtype == "bf16" for model in models),
        data=tuple(sorted(found)),
        models=tuple(sorted({m.folder[0] for m in models if m.folder and Path(m.folder[0]).is_dir()})),
        extension=None if (own := installed()) is None else (own.file, own.text),
    )


def versions() -> dict[str, str]:
    """Versions of Python and the packages, without the build (`+cpu`)."""
    public = {package: importlib.metadata.version(package).partition("+")[0] for package in PACKAGES}
    return {"python": ".".join(platform.python_version_tuple()[:2]), **public}


def code() -> str:
    """Returns a hash of the source files of this package."""
    root, total = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()


def fault(expected: Expected, device: str | None = None) -> str | None:
    """Returns the first fault of this machine, in one line with the machine's name and what is expected; None: there is
    none.

    `device` is this process's own, where that is not the first that the process sees.
    """
    answer: list[str | None] = []
    thread = threading.Thread(target=lambda: answer.append(_first(expected, device)), daemon=True)
    thread.start()
    thread.join(SECONDS)
    why = answer[0] if answer else f"its storage or device did not answer within {SECONDS:g} s"
    return None if why is None else f"{socket.gethostname()}: {why}"


def _first(expected: Expected, device: str | None) -> str | None:
    try:
        return (
            _versions(expected)
            or _code(expected)
            or _extension(expected)
            or _storage(expected)
            or _device(expected, device)
            or _data(expected)
            or _models(expected)
        )
    except Exception as error:  # trials would raise the same
        return _short(error)


def _short(error: Exception) -> str:
    detail = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {detail}"


def _versions(expected: Expected) -> str | None:
    here = versions()
    theirs = expected.versions
    differ = [f"{name} {here[name]} (the driver has {theirs[name]})" for name in theirs if here[name] != theirs[name]]
    return f"{', '.join(differ)}; expected the driver's versions" if differ else None


def _code(expected: Expected) -> str | None:
    if code() == expected.code:
        return None
    return f"the files of {Path(__file__).parent.parent} are not the driver's; expected a copy of them"


def _extension(expected: Expected) -> str | None:
    """Installs the user's own file, which the driver sends; a process has one at most."""
    try:
        if expected.extension is not None:
            install_file(Extension(*expected.extension))
    except ExtensionError as error:
        return f"{error}; expected an extension that runs on each machine"
    return None


def _storage(expected: Expected) -> str | None:
    storage = Storage(expected.storage)
    name = f"{expected.folder}/{MARKER}"
    try:
        if storage.read(name) != expected.token.encode():
            return f"{storage.uri} is not the driver's storage ({name} is not as it wrote it); expected {SHARED}"
        check_writable(storage.sub(expected.folder).uri)
    except Exception as error:  # each kind of storage has its own
        return f"{storage.uri} cannot be read and written ({_short(error)}); expected {SHARED}"
    return None


def _device(expected: Expected, device: str | None) -> str | None:
    """Computes a product of which every sum is exact, also in bf16."""
    if expected.device == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device; expected a driver that fits torch's CUDA, and a device that Ray gives to the slot"
    where = device or expected.device
    try:
        for dtype in (torch.float32, torch.bfloat16)[: 1 + expected.bf16]:
            ones = torch.ones(64, 64, dtype=dtype, device=where)
            if not bool((ones @ ones == 64).all()):
                return f"{where} computes a product in {dtype} wrongly; expected a device that works"
    except RuntimeError as error:
        return f"{where} does not compute ({_short(error)}); expected a device that works"
    return None


def _data(expected: Expected) -> str | None:
    """Opens local files; of remote data reads only the description, since trials fetch the rest."""
    folder = Storage(expected.storage).sub("data")
    for fingerprint in expected.data:
        try:
            if not folder.is_local:
                json.loads(folder.read(f"{fingerprint}/{ABOUT}") or b"")
                continue
            home = folder.path(fingerprint)
            for name in read_about(home)["files"]:
                with (home / name).open("rb") as file:
                    file.read(1)
        except (OSError, ValueError) as error:
            return (
                f"prepared data {fingerprint[:12]} cannot be read in {folder.uri} ({_short(error)}); expected {SHARED}"
            )
    return None


def _models(expected: Expected) -> str | None:
    missing = [name for name in expected.models if not (Path(name) / "config.json").is_file()]
    if not missing:
        return None
    return f"no model in {', '.join(missing)}; expected a folder that every machine has under this path, or a hub id"
