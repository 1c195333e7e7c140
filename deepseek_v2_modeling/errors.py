"""Errors of the model's floor that a user can fix."""


class ModelError(ValueError):
    """A checkpoint, config or adapter is wrong. The message names the thing and the remedy."""


class ShapeError(ModelError, RuntimeError):
    """Tensors have other shapes than the model: transformers raises a RuntimeError there."""
