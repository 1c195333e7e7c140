"""The error for user mistakes, for everything above the model package."""


class ToolkitError(ValueError):
    """The recipe, the data or the command is wrong: one message that names the thing and the remedy.

    The command line prints it as ``error: MESSAGE`` and exits with code 2. Any other exception is a bug in the
    toolkit.
    """
