"""Errors whose message is for the person who wrote the study: what is wrong, where, and what is expected."""


class DataError(ValueError):
    """The data cannot be used; the message is one sentence."""


class ModelError(ValueError):
    """The model cannot be made or loaded; the message is one sentence."""
