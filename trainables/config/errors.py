"""Errors whose message is for the author of a study: what is wrong, where, and what is expected."""


class DataError(ValueError):
    """The data cannot be used; the message is one sentence."""


class ModelError(ValueError):
    """The model cannot be built or loaded; the message is one sentence."""


class RemapError(ModelError):
    """Shapes between which a remap is impossible; the message says why and what is expected."""
