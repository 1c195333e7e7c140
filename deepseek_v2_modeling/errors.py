"""Errors of the model package that a user can fix."""


class ModelError(ValueError):
    """A checkpoint, config or adapter cannot be used. The message names it and the remedy."""


class ShapeError(ModelError, RuntimeError):
    """Tensors have shapes that differ from the model's. Also a RuntimeError, which transformers raises in this case."""
