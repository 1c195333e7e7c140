"""The error that users see, for everything above the model's floor."""


class ToolkitError(ValueError):
    """The recipe, the data or the command is wrong: one message that names the thing and the remedy.

    The command line prints it as ``error: MESSAGE`` and exits with code 2. Anything else that is raised
    is a fault of the toolkit's own.
    """
