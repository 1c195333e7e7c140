"""Runs what a model wrote, and what the tests ask of it. From its first line on, whatever is in this process belongs to
the model's code: what comes out is values, and no verdict.

Arguments: the limits, the channel's number, and "program" or "functions". The first message is the code. A program
reads and writes as programs do, and nothing is asked of it; its exit code is the program's.
"""

import os
import sys

sys.path.insert(0, __file__.rpartition("/")[0])

from limits import limit
from wire import Channel, Gone, Reference


def main():
    limit(*map(int, sys.argv[1:4]))
    kept = []

    def keep(value):
        kept.append(value)
        return Reference(len(kept) - 1)

    channel = Channel(int(sys.argv[4]), keep, kept.__getitem__)
    code = channel.receive()
    if sys.argv[5] == "program":
        os.close(channel.fd)
        exec(compile(code, "<answer>", "exec"), {"__name__": "__main__"})
        return
    namespace = {"__name__": "candidate"}
    channel.send(outcome(lambda: exec(compile(code, "<answer>", "exec"), namespace), (), {})[1])
    while True:
        name, target, what, arguments, named = channel.receive()
        if name is not None:
            target = namespace.get(name, missing)
        result, error = outcome(DOES[what], (target, *arguments), named)
        try:
            channel.send((result, error, arguments))
        except Exception as unsendable:
            channel.send((None, ("ValueError", str(unsendable)[:200]), None))


def outcome(call, arguments, named):
    """(what it returns, None) or (None, (the name of what it raised, its message))."""
    try:
        return call(*arguments, **named), None
    except BaseException as error:
        return None, (type(error).__name__, str(error)[:200])


def missing(*arguments, **named):
    raise NameError("the code defines no function of this name")


DOES = {
    "call": lambda target, *arguments, **named: target(*arguments, **named),
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
