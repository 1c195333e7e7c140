"""The rule `code` in its sandbox: right answers pass, wrong ones fail, and what a hostile answer tries is in vain: no
verdict is forged, nothing outlives its check, and the next check runs.

Skipped where nothing can be isolated, but with DSV2_TEST_SANDBOX=1 (as CI has it), where that is a failure.
"""

import errno
import json
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversations import load_conversations, verify
from conversations.answers.code import code_reference, written_code
from conversations.answers.many import Asked, verify_all
from conversations.errors import ToolkitError
from conversations.sandbox import box
from conversations.sandbox.guest.wire import Reference, decode, encode
from recipes.cli import main as dsv2

SHARED = Path(__file__).parents[3] / "shared" / "data" / "humaneval.jsonl"
WHY = box.why_unavailable()

isolated = pytest.mark.skipif(WHY is not None and os.environ.get("DSV2_TEST_SANDBOX") != "1", reason=str(WHY))

PROMPT = '''import math


def half(x):
    return x / 2


def rounded(numbers: list) -> list:
    """Half of each number, rounded down.

    >>> rounded([3, 4])
    [1, 2]
    """
'''
ROW = {
    "prompt": PROMPT,
    "entry_point": "rounded",
    "test": "def check(candidate):\n"
    "    assert candidate([]) == []\n"
    "    assert candidate([3, 4]) == [1, 2]\n"
    "    assert candidate([7]) == [math.floor(half(7))]\n"
    "    assert True\n",
}
BODY = "    return [math.floor(half(x)) for x in numbers]\n"
WHOLE = "def rounded(numbers):\n" + BODY
MBPP = {"test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"], "test_setup_code": ""}
PROGRAM = {"tests": [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "2 2\n", "stdout": "4"}]}


def judge(answer: str, row: Any = ROW, **more: Any) -> tuple[float | None, str]:
    verdict = verify("code", answer, reference=row, **{"timeout": 5, **more})
    return verdict.score, verdict.reason


# --- the code of an answer


@pytest.mark.parametrize(
    "answer",
    [
        BODY,
        BODY.strip(),
        WHOLE,
        PROMPT + BODY,
        f"Sure, here it is:\n```python\n{WHOLE}```\nIt halves each number.",
        f"```\n{BODY.strip()}\n```",
        f"```py\n{PROMPT}{BODY}```\nUse it so:\n```python\nprint(rounded([1]))\n```",
        f"  ```python\n  {WHOLE.replace(chr(10), chr(10) + '  ').strip()}\n  ```",
        f"Here it is:\n\n{WHOLE}\nIt halves, and that's all.",
        "```python\nhalves = map(half, numbers)\nreturn [math.floor(x) for x in halves]\n```",
        "return [floor(x) for x in numbers]\n\n\ndef floor(x):\n    return x // 2\n",
        f"```python\n{WHOLE}",  # cut before the fence closes
        "rounded = lambda numbers: [math.floor(half(x)) for x in numbers]",
        f"```python\n{WHOLE}```\n```bash\npython it.py\n```",
        f"First try:\n```python\ndef rounded(numbers):\n    return 1\n```\nBetter:\n```python\n{WHOLE}```",
    ],
)
@isolated
def test_a_chat_answer_is_read_with_the_signature_or_without(answer: str) -> None:
    assert judge(answer) == (1.0, "passes 3 of 3 tests")


@pytest.mark.parametrize("answer", ["", "I cannot do that.", "```python\ndef rounded(\n```", "\0", "()" * 100_000])
@isolated
def test_an_answer_without_code_fails(answer: str) -> None:
    assert judge(answer)[0] == 0


@given(st.text(max_size=300), st.sampled_from(["", "```python\n", "def rounded(x):\n    "]))
def test_no_text_is_an_error(text: str, before: str) -> None:
    source = written_code(before + text, code_reference(ROW))
    assert source is None or isinstance(source, str)


# --- tests


@isolated
def test_the_score_is_all_or_nothing_or_the_share() -> None:
    answer = "def rounded(numbers):\n    return [] if not numbers else [1, 2]\n"
    assert judge(answer)[0] == 0
    score, reason = judge(answer, partial=True)
    assert score == pytest.approx(2 / 3)
    assert reason == "passes 2 of 3 tests; candidate([7]) == [math.floor(half(7))] does not hold"
    assert judge("    pass\n", partial=True)[0] == 0


@pytest.mark.parametrize(
    ("answer", "row", "score"),
    [
        ("def add(a, b): return a + b", MBPP, 1),
        ("def add(a, b): return 3", MBPP, 0),
        ("def sum_of(a, b): return a + b", MBPP, 0),
        ("```python\na, b = map(int, input().split())\nprint(a + b)\n```", PROGRAM, 1),
        ("print(3)", PROGRAM, 0),
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())))\nsys.exit(1)", PROGRAM, 0),
        (f"print(3) # {'long ' * 3_400_000}", PROGRAM, 0),
        ("if __name__ == '__main__':\n    print(sum(map(int, input().split())), ' ')", PROGRAM, 1),
        ("import math\nfrom collections import Counter\ndef add(a, b): return Counter(x=a + b)['x']", MBPP, 1),
        # A class of the answer's, made and filled by the tests; what changes in place; a tuple, a set, an iterator.
        (
            "class Node:\n    def __init__(self, v): self.left = None\n"
            "def deep(n): return 0 if n is None else 1 + deep(n.left)",
            {"test_list": ["assert deep(root) == 2"], "test_setup_code": "root = Node(1)\nroot.left = Node(2)"},
            1,
        ),
        ("def order(a): a.sort()", {"test_list": ["a = [3, 1, 2]\norder(a)\nassert a == [1, 2, 3]"]}, 1),
        (
            "def both(a): return (a, {a}, b'x', 1.5, None)",
            {"test_list": ["assert both(1) == (1, {1}, b'x', 1.5, None)"]},
            1,
        ),
        ("def each(a): return map(str, a)", {"test_list": ["assert list(each([1, 2])) == ['1', '2']"]}, 1),
        (
            "def part(a): raise ValueError('no')",
            {"test_list": ["try:\n    part(1)\nexcept ValueError:\n    assert part"]},
            1,
        ),
    ],
)
@isolated
def test_rows_of_mbpp_and_of_programs(answer: str, row: Any, score: float) -> None:
    assert judge(answer, row)[0] == score
    assert judge(answer, json.dumps(row))[0] == score


@pytest.mark.skipif(not SHARED.is_file(), reason="needs ../shared")
@isolated
def test_all_of_humaneval_passes_with_its_solution_and_fails_without() -> None:
    rows = [json.loads(line) for line in SHARED.read_text().splitlines()]
    for write, score in ((lambda row: row["canonical_solution"], 1.0), (lambda row: "    pass\n", 0.0)):
        asked = [Asked(write(row), reference=row, settings={"timeout": 60}) for row in rows]
        assert [verdict.score for verdict in verify_all("code", asked)] == [score] * 164


@isolated
def test_tests_that_reach_no_assert_are_not_passed() -> None:
    row = {"test_list": ["for number in numbers():\n    assert number > 0"]}
    assert judge("def numbers(): return [1, 2]", row) == (1.0, "passes 2 of 2 tests")
    assert judge("def numbers(): return []", row) == (0.0, "passes 0 of 1 tests; no assert of the tests was reached")
    raises = {"test_list": ["if numbers() != [1]:\n    raise ValueError"]}
    assert [judge(f"def numbers(): return {value}", raises)[0] for value in ([1], [])] == [1, 0]


# --- hostile answers

FORGERIES = {
    "a printed verdict": "print('passes 3 of 3 tests')\nimport sys\nsys.exit(0)",
    "exit": "import os\nos._exit(0)",
    "exit when called": "def rounded(n):\n    import os\n    os._exit(0)",
    "SystemExit when called": "def rounded(n):\n    raise SystemExit(0)",
    "equals everything": "class E:\n    def __eq__(self, other): return True\n    __hash__ = None\n"
    "def rounded(n): return E()",
    "a list that equals everything": "class E(list):\n    def __eq__(self, other): return True\n"
    "def rounded(n): return E()",
    "asserts that hold": "import builtins\nbuiltins.AssertionError = type('A', (Exception,), {})\n"
    "builtins.bool = lambda x: True\ndef rounded(n): return 0",
    "the tests on the stack": "import sys\ndef rounded(n):\n    frame = sys._getframe()\n    while frame:\n"
    "        frame.f_globals['check'] = lambda c: None\n        frame.f_globals['_count'] = print\n"
    "        frame = frame.f_back\n    return 0",
    "the tests in memory": "import gc\ndef rounded(n):\n    for o in gc.get_objects():\n"
    "        if isinstance(o, dict) and '_count' in o: o['_count'] = print\n    return 0",
    "another module": "import sys, types\nm = types.ModuleType('candidate')\nm.rounded = lambda n: []\n"
    "sys.modules['candidate'] = sys.modules['__main__'] = m\ndef rounded(n): return 0",
    "bytes on every channel": "import os\nfor fd in range(3, 64):\n    for word in (b'\\0\\0\\0\\1N', b'U' * 99):\n"
    "        try: os.write(fd, word)\n        except OSError: pass\ndef rounded(n): return 0",
    "changed arguments": "def rounded(n):\n    n.clear()\n    return n",
    "a debugger": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\n"
    "def rounded(n): return 0",
    "a debugger that answers": "import sys\ndef trace(frame, event, arg):\n"
    "    if 'result' in frame.f_locals: frame.f_locals['result'] = []\n    return trace\n"
    "sys.settrace(trace)\nfor f in sys._current_frames().values():\n    while f: f.f_trace = trace; f = f.f_back\n"
    "def rounded(n): return 0",
    "an audit hook": "import sys\ndef hook(event, args):\n    if event in ('compile', 'exec'): raise SystemExit(0)\n"
    "sys.addaudithook(hook)\ndef rounded(n): return 0",
    "a verdict in the host's own format": "import os, sys\nfrom wire import Channel\n"
    "for fd in range(3, 64):\n    for value in ((3, 0, None), ([], None, None), None):\n"
    "        try: Channel(fd, None, None).send(value)\n        except BaseException: pass\n"
    "def rounded(n): return 0",
    "a thread that answers ahead": "import threading\nfrom wire import Channel\ndef ahead():\n    while True:\n"
    "        for fd in range(3, 16):\n            try: Channel(fd, None, None).send(([], None, None))\n"
    "            except BaseException: pass\n"
    "threading.Thread(target=ahead, daemon=True).start()\ndef rounded(n): return 0",
    "a patched guest": "import sys, wire\nm = sys.modules['__main__']\nm.outcome = lambda *a: (True, None)\n"
    "wire.encode = lambda *a: [b'T']\nwire.Channel.send = lambda *a: None\ndef rounded(n): return 0",
    "ctypes": "import ctypes\nlibc = ctypes.CDLL(None)\nfor fd in range(3, 64): libc.write(fd, b'\\0\\0\\0\\1T', 5)\n"
    "libc.prctl(1, 0)\ndef rounded(n):\n    libc._exit(0)",
    "built-in types that equal everything": "import ctypes, gc\n"
    "for kind in (int, list, tuple, str):\n    names = gc.get_referents(kind.__dict__)[0]\n"
    "    names['__eq__'] = lambda a, b: True\n    ctypes.pythonapi.PyType_Modified(ctypes.py_object(kind))\n"
    "def rounded(n): return 0",
    "numbers that equal everything": "class E(int):\n    def __eq__(self, other): return True\n"
    "    __ne__ = __index__ = __hash__ = lambda *a: 0\ndef rounded(n): return [E(7)]",
    "an object that claims to be a list": "class E:\n    __class__ = list\n    __len__ = lambda s: 0\n"
    "    __iter__ = lambda s: iter(())\n    __eq__ = lambda s, o: True\n"
    "    __reduce__ = lambda s: (print, ('passed',))\ndef rounded(n): return E()",
    "an end that is a success": "import atexit, os, sys\natexit.register(os._exit, 0)\n"
    "def rounded(n): return 0\nsys.exit(0)",
    "handlers of what ends it": "import signal, sys, threading\nfor s in set(signal.Signals) - {9, 19}:\n"
    "    try: signal.signal(s, lambda *a: None)\n    except (OSError, ValueError): pass\n"
    "sys.excepthook = threading.excepthook = sys.unraisablehook = print\n"
    "def rounded(n):\n    while True: pass",
    "its whole process group": "import os, signal\ndef rounded(n): return 0\nos.killpg(0, signal.SIGKILL)",
    "the kernel's files": "import os\ndef rounded(n):\n    for pid in ('self', '1', str(os.getppid())):\n"
    "        for name in ('mem', 'environ', 'cmdline', 'fd/3', 'maps'):\n"
    "            try: open(f'/proc/{pid}/{name}', 'rb')\n            except OSError: continue\n"
    "            return [x // 2 for x in n]\n    return 0",
    "frames of other threads": "import inspect, sys\ndef rounded(n):\n"
    "    frames = [*sys._current_frames().values(), *(one.frame for one in inspect.stack())]\n"
    "    seen = {name for frame in frames for names in (frame.f_globals, frame.f_locals) for name in names}\n"
    "    return [x // 2 for x in n] if seen & {'tally', '_count', 'check', 'tests', 'task'} else 0",
}
ATTACKS = {
    "a fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "threads": "import threading, time\nfor i in range(10**6):\n"
    "    try: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n    except Exception: break",
    "a daemon": "import os\ndef rounded(n):\n    if os.fork() == 0:\n        os.setsid()\n        while True: pass",
    "memory": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "memory files": "import os\nfor i in range(60): os.write(os.memfd_create('x'), bytes(1 << 28))",
    "endless output": "while True: print('a' * 100_000)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef rounded(n): return rounded(n)",
    "huge files": "for i in range(10**6): open(f'/tmp/{i}', 'wb').write(bytes(1 << 23))",
    "sleep": "import time\ntime.sleep(60)",
    "an endless loop": "def rounded(n):\n    while True: pass",
    "kill": "import os, signal\nfor pid in (1, os.getppid(), -1):\n    try: os.kill(pid, signal.SIGKILL)\n"
    "    except OSError: pass",
    "files outside": "open({outside!r}, 'w').write('x')",
    "its own runtime": "import os\nopen(os.__file__, 'a').write('x')",
    "a network": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2).send(b'x')",
    "another program": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'touch {outside}'])",
}


@pytest.mark.parametrize("answer", FORGERIES.values(), ids=FORGERIES)
@isolated
def test_a_verdict_cannot_be_forged(answer: str) -> None:
    compile(answer, "answer", "exec")
    assert judge(f"```python\n{answer}\n```")[0] == 0


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@isolated
def test_what_is_tried_stays_inside_and_ends_with_the_check(attack: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        attack = attack.replace("{outside!r}", repr(str(outside))).replace("{outside}", str(outside))
        answer = attack.replace("{port}", str(server.getsockname()[1]))
        for row in (ROW, PROGRAM):
            assert judge(f"```python\n{answer}\n```", row, timeout=2)[0] == 0
        with pytest.raises(TimeoutError):
            server.accept()
    assert not outside.exists()
    assert still_running() == []
    assert judge(BODY)[0] == 1


def still_running() -> list[str]:
    """The guests' processes on this machine, a moment after."""
    for _ in range(50):
        listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        alive = [line for line in listed.splitlines() if f"{box.INSIDE}/" in line or str(box.GUEST) in line]
        if not alive:
            return []
        time.sleep(0.1)
    return alive


@isolated
def test_nothing_of_the_machine_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    look = (
        "import os, sys\ndef add(a, b):\n"
        "    seen = {name for folder in ('/', '/tmp', '/home', '/etc', '/proc', '/dev') if os.path.isdir(folder)\n"
        "            for name in os.listdir(folder)}\n"
        "    places = sorted(seen & {'etc', 'home', 'proc', 'dev', 'passwd', 'var'})\n"
        "    return sorted(os.environ), [m for m in sys.path if 'site-packages' in m], places, os.listdir('/tmp')\n"
    )
    # PWD is bubblewrap's
    assert judge(look, {"test_list": ["assert add(1, 2) == (['PWD'], [], [], [])"]}) == (1.0, "passes 1 of 1 tests")


@isolated
def test_what_the_kernel_keeps_outside_a_process_is_refused() -> None:
    """Attributes of files, memory files and watches count towards no limit of a process."""
    take = (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nopen('/tmp/file', 'w').close()\n"
        "takes = {'attribute': lambda: libc.setxattr(b'/tmp/file', b'user.a', b'x', 1, 0),\n"
        "    'attribute of a link': lambda: libc.lsetxattr(b'/tmp/file', b'user.a', b'x', 1, 0),\n"
        "    'memory file': lambda: libc.memfd_create(b'x', 0), 'watches': lambda: libc.inotify_init1(0)}\n"
        "def add(a, b): return {name: take() for name, take in takes.items()}, ctypes.get_errno()\n"
    )
    names = ["attribute", "attribute of a link", "memory file", "watches"]
    row = {"test_list": [f"assert add(1, 2) == ({dict.fromkeys(names, -1)}, {errno.EPERM})"]}
    assert judge(take, row) == (1.0, "passes 1 of 1 tests")


# --- machines without a sandbox, bad settings and references


def test_without_a_sandbox_it_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(box.shutil, "which", lambda name: None)
    with pytest.raises(ToolkitError, match=r"needs bubblewrap: install it .* allow_unsandboxed: true"):
        judge(BODY)
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps(ROW) + "\n")
    recipe = {
        "stage": "rl",
        "model": {"path": "m", "preset": "tiny"},
        "data": [{"path": "rows.jsonl"}],
        "output_dir": "run",
    }
    Path("rl.yaml").write_text(json.dumps(recipe | {"rewards": [{"rule": "code"}]}))
    assert dsv2(["check", "rl.yaml"]) == 2
    assert "needs bubblewrap" in capsys.readouterr().err


@pytest.fixture
def bubblewrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A script in its place, in a folder of PATH that is not the system's."""
    program = tmp_path / "bwrap"
    program.touch(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    box._failed_trial.cache_clear()
    yield program
    box._failed_trial.cache_clear()


def test_bubblewrap_is_run_where_it_is_found(bubblewrap: Path) -> None:
    bubblewrap.write_text("#!/bin/sh\necho ready\n")
    assert box.why_unavailable() is None


@pytest.mark.parametrize("script", ["#!/no/such/shell\n", "not a program"])
def test_a_bubblewrap_that_does_not_start_is_one_message(bubblewrap: Path, script: str) -> None:
    bubblewrap.write_text(script)
    with pytest.raises(ToolkitError, match=r"not available on this machine: bubblewrap does not start: .*bwrap"):
        judge(BODY)


@pytest.mark.skipif(os.name != "posix", reason="limits are POSIX's")
def test_without_isolation_it_is_loud(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(box.shutil, "which", lambda name: None)
    box._print_once.cache_clear()
    assert judge(BODY, allow_unsandboxed=True)[0] == 1
    assert judge("    while True: pass\n", allow_unsandboxed=True, timeout=1)[0] == 0
    assert capsys.readouterr().err == box.UNSANDBOXED + "\n"
    assert still_running() == []


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        ("42", "must be one of"),
        ({"prompt": "x"}, "must be one of"),
        ({"test_list": "assert 1"}, "test_list of a reference must be a list of strings"),
        ({"test_list": ["assert ("]}, "test 1 of a reference is not Python"),
        ({"test_list": ["assert 1 == 1"]}, "calls no function that an answer could define"),
        ({"tests": [{"stdin": "1"}]}, "stdout of a reference must be a string"),
        (
            {"tests": [{"stdin": "1\ud800", "stdout": ""}]},
            r"stdin of a reference holds '.ud800', which is no character",
        ),
        ({"tests": ["1"]}, "must be a list of {stdin, stdout}"),
        (ROW | {"prompt": None}, "prompt of a reference must be a string"),
        (ROW | {"entry_point": "a b"}, "must be a name"),
        (ROW | {"test": "def check("}, "is not Python"),
        ({"test_list": {1, 2}}, "must be one of"),
    ],
)
def test_a_reference_that_cannot_be_read_is_one_message(reference: Any, why: str) -> None:
    with pytest.raises(ToolkitError, match=why):
        code_reference(reference)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"time": 3}, "has no setting 'time'"),
        ({"timeout": 0}, "must be a number above 0"),
        ({"timeout": "3"}, "must be a number above 0"),
        ({"timeout": True}, "must be a number above 0"),
        ({"timeout": float("nan")}, "must be a number above 0"),
        ({"memory": 1.5}, "must be a whole number"),
        ({"memory": True}, "must be a whole number"),
        ({"partial": 1}, "must be true or false"),
    ],
)
def test_a_bad_setting_is_one_message(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ToolkitError, match=why):
        verify("code", BODY, reference=ROW, **settings)


def test_rows_of_code_data_become_prompts_with_their_tests(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    mbpp = {"task_id": 2, "text": "Add two numbers.", "code": "def add(a, b): return a + b", **MBPP}
    rows = [ROW, ROW | {"canonical_solution": BODY}, mbpp, {"prompt": "Add.", "reference": PROGRAM}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = list(load_conversations(path))
    assert [json.loads(row["reference"]) for row in read[:2]] == [ROW, ROW]
    assert read[1]["messages"][-1] == {"role": "assistant", "content": BODY}
    assert "assert add(1, 2) == 3" in read[2]["messages"][0]["content"]
    assert json.loads(read[2]["reference"])["test_list"] == MBPP["test_list"]
    assert json.loads(read[3]["reference"]) == PROGRAM


# --- the wire

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inside: st.lists(inside) | st.tuples(inside, inside) | st.dictionaries(st.text() | st.integers(), inside),
    max_leaves=20,
)  # fmt: skip


@given(plain)
def test_plain_values_travel(value: Any) -> None:
    content = b"".join(encode(value, lambda other: Reference(0)))
    assert decode(content, 0, lambda place: None) == (value, len(content))


@settings(max_examples=300)
@given(st.binary(max_size=60))
def test_bytes_of_another_kind_are_an_error_and_nothing_else(content: bytes) -> None:
    """Whatever the model's code writes."""
    with suppress(ValueError, TypeError, LookupError, ArithmeticError, struct.error):
        decode(content, 0, lambda place: None)
