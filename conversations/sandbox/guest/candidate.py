"""Runs model-written code and the operations that its tests request. Once that code starts, everything in this process
is under its control; so only values leave it, never a verdict.

Arguments: the limits, the channel's file descriptor, and "program" or "functions". The first message is the code. A
program uses stdin and stdout and gets no requests; its exit code becomes this script's.
"""

import os
import sys

sys.path.insert(0, __file__.rpartition("/")[0])

from limits import limit
from wire import Channel, Gone, Reference


def main():
    limit(*map(int, sys.argv[1:4]))
    objects = []

    def keep(value):
        objects.append(value)
        return Reference(len(objects) - 1)

    channel = Channel(int(sys.argv[4]), keep, objects.__getitem__)
    code = channel.receive()
    if sys.argv[5] == "program":
        os.close(channel.fd)
        exec(compile(code, "<answer>", "exec"), {"__name__": "__main__"})
        return
    namespace = {"__name__": "candidate"}
    channel.send(outcome(lambda: exec(compile(code, "<answer>", "exec"), namespace), (), {})[1])
    while True:
        name, target, operation, arguments, keywords = channel.receive()
        if name is not None:
            target = namespace.get(name, missing)
        result, error = outcome(OPERATIONS[operation], (target, *arguments), keywords)
        try:
            channel.send((result, error, arguments))
        except Exception as unsendable:
            channel.send((None, ("ValueError", str(unsendable)[:200]), None))


def outcome(call, arguments, keywords):
    """(return value, None), or (None, (name of the exception, its message))."""
    try:
        return call(*arguments, **keywords), None
    except BaseException as error:
        return None, (type(error).__name__, str(error)[:200])


def missing(*arguments, **keywords):
    raise NameError("the code defines no function of this name")


OPERATIONS = {
    "call": lambda target, *arguments, **keywords: target(*arguments, **keywords),
    "get": getattr,
    "set": setattr,
    "item": lambda target, key: target[key],
    "length": len,
    "items": list,
    "text": str,
}

if __name__ == "__main__":
    try:
        main()
    except Gone:  # the tests are done
        sys.exit()
