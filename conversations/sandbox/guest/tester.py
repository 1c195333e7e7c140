"""Runs tests on a candidate in another sandbox. No code of the candidate runs in this process: its functions are called
in that sandbox, and plain values come back.

Arguments: the limits, and the file descriptors of the candidate's channel and the host's. The host sends (the model's
code; the prompt, whose functions the tests may use; setup; tests; names that the candidate defines), as prepared by
`sandbox/tests.py`, and receives (passed, failed, reason of the first failure).
"""

import builtins
import sys

sys.path.insert(0, __file__.rpartition("/")[0])

from limits import limit
from wire import Channel, Gone, Reference

MUTABLE = (list, dict, set, bytearray)


class Remote:
    """A proxy for a name or an object of the candidate."""

    def __init__(self, asks, name, place):
        object.__setattr__(self, "remote_at", (asks, name, place))

    def __call__(self, *arguments, **keywords):
        return self.remote_at[0](self, "call", arguments, keywords)

    def __getattr__(self, name):
        return self.remote_at[0](self, "get", (name,))

    def __setattr__(self, name, value):
        self.remote_at[0](self, "set", (name, value))

    def __getitem__(self, key):
        return self.remote_at[0](self, "item", (key,))

    def __len__(self):
        return self.remote_at[0](self, "length")

    def __bool__(self):
        return True

    def __iter__(self):
        return iter(self.remote_at[0](self, "items"))

    def __str__(self):
        return str(self.remote_at[0](self, "text"))


class Requests:
    """Requests to the candidate, one at a time."""

    def __init__(self, fd):
        self.channel = Channel(fd, refuse, lambda place: Remote(self, None, place))

    def __call__(self, remote, operation, arguments=(), keywords=None):
        _, name, place = remote.remote_at
        target = None if place is None else Reference(place)
        sent = tuple(map(reference, arguments)), {key: reference(value) for key, value in (keywords or {}).items()}
        self.channel.send((name, target, operation, *sent))
        result, error, after = receive_tuple(self.channel, 3)
        if error is not None:
            raise raised(error)
        if operation == "call" and result is None:
            update_arguments(arguments, after)
        return result


def receive_tuple(channel, number):
    answer = channel.receive()
    if type(answer) is not tuple or len(answer) != number:
        channel.gone = True
        raise Gone
    return answer


def reference(value):
    return Reference(value.remote_at[2]) if type(value) is Remote and value.remote_at[2] is not None else value


def refuse(value):
    if type(value) is Remote and value.remote_at[2] is not None:
        return Reference(value.remote_at[2])
    raise TypeError(f"the tests pass a {type(value).__name__}, which cannot leave their sandbox")


def raised(error):
    """An error of the candidate, as the built-in exception of its name if there is one."""
    name, text = map(str, error)
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:  # Unicode errors need more arguments than a message
            pass
    return RuntimeError(f"{name}: {text}")


def update_arguments(arguments, after):
    """Copies to the arguments in this process what a function that returned None changed in place. After a function
    with a result they are left unchanged: a test may compare that result with what it passed."""
    if type(after) is not tuple or len(after) != len(arguments):
        return
    for local, remote in zip(arguments, after, strict=True):
        if type(local) is type(remote) and isinstance(local, MUTABLE) and local != remote:
            local.clear()
            (local.extend if isinstance(local, (list, bytearray)) else local.update)(remote)


class Tally:
    def __init__(self):
        self.passed, self.failed, self.why = 0, 0, None

    def count(self, passed, source, error):
        """Called by each assert of the tests."""
        if passed:
            self.passed += 1
        else:
            self.fail(f"{source}: {described(error)}" if error else f"{source} does not hold")

    def fail(self, why):
        self.failed += 1
        self.why = self.why or why

    def run(self, code, namespace):
        """Runs code whose asserts are counted; an exception that ends it is one more failure."""
        try:
            exec(compile(code, "<tests>", "exec"), namespace)
        except (Exception, SystemExit) as error:
            self.fail(described(error))


def described(error):
    return f"{type(error).__name__}: {error}"[:200]


def run(task, candidate):
    code, prompt, setup, tests, names = task
    asks, tally = Requests(candidate), Tally()
    channel = asks.channel
    try:
        channel.send(code)
        if (error := channel.receive()) is not None:
            return 0, 1, described(raised(error))
        namespace = {"__name__": "tests", "_count": tally.count}
        exec(compile(prompt, "<prompt>", "exec"), namespace)
        for name in names:
            namespace[name] = Remote(asks, name, None)
        tally.run(setup, namespace)
        for test in tests:
            tally.run(test, namespace)
    except Gone:
        pass
    if channel.gone:  # a test may have caught Gone as well
        tally.fail("the code ended its process")
    return tally.passed, tally.failed, tally.why


def main():
    limit(*map(int, sys.argv[1:4]))
    host = Channel(int(sys.argv[5]), refuse, refuse)
    host.send(run(host.receive(), int(sys.argv[4])))


if __name__ == "__main__":
    main()
