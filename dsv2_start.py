"""Where `dsv2` starts: before anything else, Python must find the toolkit's own packages under their names.

The names are plain ones (`eval`, `recipes`, `reward`, ...). A file of that name in a directory of PYTHONPATH or, under
`python -m`, in the working directory, or the package of another distribution, would be imported in the place of ours.
Importing this module puts the toolkit's own directory before all others, if something is in the way.
"""

import gc
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

HOME = Path(__file__).resolve().parent
PACKAGES = ("conversations", "deepseek_v2_modeling", "eval", "pairs", "recipes", "reward", "rl", "sft")


def in_the_way() -> str | None:
    """A message about the first package that is not our own; None when all of them are."""
    for name in PACKAGES:
        spec = find_spec(name)
        places = list(spec.submodule_search_locations or [spec.origin]) if spec else []
        if places and places[0] and Path(places[0]).resolve() == HOME / name:
            continue
        if not places or not places[0]:
            return f"{HOME / name} is missing; install the toolkit again"
        origin = spec.origin if spec and spec.origin else places[0]
        return (
            f'{origin} shadows the toolkit\'s own package "{name}" ({HOME / name}); rename it, take its '
            "directory off PYTHONPATH, uninstall the package that brought it, or start from another directory"
        )
    return None


if in_the_way():
    sys.path.insert(0, str(HOME))


def main() -> int:
    """The command line, if its packages are there."""
    message = in_the_way()
    try:
        if not message:
            from recipes.cli import main as run

            return run()
    except ImportError as error:
        name = (error.name or "").partition(".")[0]
        if name not in PACKAGES:
            raise
        message = (
            f"{HOME / name} is no longer the toolkit's own: {error}; install the toolkit in an environment of its own"
        )
    except KeyboardInterrupt:  # while modules are imported; afterwards the command line sees to it
        print("interrupted; nothing was finished", file=sys.stderr)
        return 130
    finally:
        gc.freeze()  # else Python looks through all that torch and others have made once more, for over a second
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # else one that comes while Python ends is a traceback
    print("error:", message.encode("unicode_escape").decode(), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
