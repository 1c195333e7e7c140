"""Errors of the model's floor that a user can mend."""


class ModelError(ValueError):
    """A checkpoint, config or adapter is wrong. The message names the thing and the remedy."""
