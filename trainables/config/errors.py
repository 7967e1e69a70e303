"""Errors whose message is for the author of a study: what is wrong, where, and what is expected."""


class DataError(ValueError):
    """The data cannot be used; the message is one sentence."""


class ModelError(ValueError):
    """The model cannot be built or loaded; the message is one sentence."""


class RemapError(ModelError):
    """Shapes between which a remap is impossible; the message says why and what is expected."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether memory of a device or of this machine ran out, without importing PyTorch.

    PyTorch raises its OutOfMemoryError for a device, and a RuntimeError of its CPU allocator.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"OutOfMemoryError", "MemoryError"}) or "DefaultCPUAllocator" in str(error)
