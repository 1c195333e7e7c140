"""Becomes another program, under the limits: one that reads model-written text, such as a proof checker.

Arguments: the limits, NAME=VALUE words of its environment, "--" and its command.
"""

import os
import sys

sys.path.insert(0, __file__.rpartition("/")[0])

from limits import limit

if __name__ == "__main__":
    limit(*map(int, sys.argv[1:4]))
    end = sys.argv.index("--")
    environment = dict(word.split("=", 1) for word in sys.argv[4:end])
    os.execve(sys.argv[end + 1], sys.argv[end + 1 :], environment)
