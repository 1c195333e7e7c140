"""The rule `lean`: whether Lean 4 accepts an answer as the proof of its row's theorem (DeepSeek-Prover-V1.5, arXiv
2408.08152), in a sandbox, since Lean runs what a proof tells it to.

The answer's proof is put behind the theorem as the row states it. `#print axioms` after it shows what Lean's kernel was
told to believe: nothing but Lean's own three axioms may stand there.
"""

import json
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from conversations.answers.verdict import Verdict, shown
from conversations.errors import ToolkitError
from conversations.sandbox import box
from conversations.sandbox.tools import run_tool

FLAGS = ("--stdin", "--json")  # Lean reads the source from stdin, and writes its messages as lines of JSON
OWN_AXIOMS = {"propext", "Classical.choice", "Quot.sound"}
_STATED = re.compile(r"\b(?:theorem|lemma)\s+([^\s:({\[]+)")
_OPEN = re.compile(r":=(\s*by)?(\s+sorry)?\s*\Z")
_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*$", re.MULTILINE)
_COMMENT = re.compile(r"/-.*?-/|--[^\n]*", re.DOTALL)
# What proves nothing, runs code while Lean reads the proof, or changes how the rest of the file is read.
_FORBIDDEN = re.compile(
    r"(?<![\w.'])(?:sorry|admit|axiom|native_decide|run_tac|run_cmd|run_elab|run_meta|by_elab|macro|macro_rules|elab|"
    r"elab_rules|syntax|notation3?|infix[lr]?|prefix|postfix|unsafe|implemented_by|extern|export|initialize|import|"
    r"opaque|debug)(?![\w'])|#\w+"
)
_SORRY = re.compile(r"declaration uses\W+sorry")
_AXIOMS = re.compile(r"depends on axioms: \[(.*)\]", re.DOTALL)
_TRIAL = "theorem dsv2_trial : True := by"


class Theorem(NamedTuple):
    """A statement to prove. head: what stands before it. stated: from `theorem` to `:=`. by: whether tactics follow."""

    head: str
    stated: str
    name: str
    by: bool


def lean(
    completion: str,
    reference: str,
    *,
    command: tuple,
    folders: tuple,
    lean_path: tuple = (),
    header: str = "",
    timeout: float = 60.0,
    memory: int = 16384,
    allow_unsandboxed: bool = False,
) -> Verdict:
    """Whether Lean 4 accepts the answer as a proof of the reference.

    Args:
        reference: a theorem up to `:=` or `:= by`, perhaps with what stands before it.
        command: the absolute path of the toolchain's `lean`, and perhaps arguments; `--stdin --json` is added.
        folders: what the checker may read: the toolchain's folder, and Mathlib's.
        lean_path: LEAN_PATH, where compiled libraries are.
        header: stands before every reference.
        timeout: seconds of wall-clock time.
        memory: MiB of address space, compiled libraries included.
        allow_unsandboxed: runs Lean without isolation.

    Raises:
        ToolkitError: this machine has no sandbox or no such checker, or the reference is not an open theorem.
    """
    asked = {"folders": folders, "lean_path": lean_path, "allow_unsandboxed": allow_unsandboxed}
    _check_places(command, **asked)
    theorem = lean_reference(f"{header}{reference}")
    proof = proof_of(completion, theorem)
    if isinstance(proof, Verdict):
        return proof
    source = f"{theorem.head}{theorem.stated}{proof.rstrip()}\n\n#print axioms {theorem.name}\n"
    ran = run_tool(
        [*command, *FLAGS],
        source,
        box.Limits(seconds=timeout, memory=memory),
        shows=folders,
        environment={"LEAN_PATH": ":".join(lean_path)} if lean_path else {},
        isolated=not allow_unsandboxed,
    )
    return read_messages(ran.output, ran.fault, source.count("\n"))


def need_lean(settings: Mapping[str, Any]) -> None:
    """Raises ToolkitError unless this machine has a sandbox and, in it, a checker that accepts a trivial proof."""
    places = ("command", "folders", "lean_path", "allow_unsandboxed")
    _check_places(**{name: settings[name] for name in places if name in settings})
    _try({name: value for name, value in settings.items() if name != "header"})


def _try(settings: Mapping[str, Any]) -> None:
    if why := _failed_trial(json.dumps(settings, sort_keys=True)):
        raise ToolkitError(f"the rule lean: {settings['command'][0]} does not accept a trivial proof here: {why}")


@cache
def _failed_trial(settings: str) -> str | None:
    verdict = lean("trivial", _TRIAL, **json.loads(settings))
    return None if verdict.score else verdict.reason


def _check_places(
    command: Sequence[Any], folders: Sequence[Any], lean_path: Sequence[Any] = (), allow_unsandboxed: bool = False
) -> None:
    """Raises ToolkitError for a checker or folders that are not there, or that a sandbox would not show."""
    for name, listed in (("command", command), ("folders", folders), ("lean_path", lean_path)):
        if not all(isinstance(word, str) and word for word in listed) or (name != "lean_path" and not listed):
            raise ToolkitError(f"the rule lean: {name} must be a list of words, not {list(listed)!r:.80}")
    program, shown_folders = Path(command[0]), [Path(folder) for folder in folders]
    if absent := [
        str(path) for path in (*shown_folders, *map(Path, lean_path)) if not (path.is_absolute() and path.is_dir())
    ]:
        raise ToolkitError(f"the rule lean: {absent[0]} is not the absolute path of a folder on this machine")
    if not (program.is_absolute() and program.is_file() and os.access(program, os.X_OK)):
        raise ToolkitError(
            f"the rule lean: {program} is not the absolute path of a program on this machine; name the `lean` of an "
            "installed toolchain, such as ~/.elan/toolchains/NAME/bin/lean written out"
        )
    for path in (program, *map(Path, lean_path)):
        if not any(path.is_relative_to(folder) for folder in shown_folders):
            raise ToolkitError(
                f"the rule lean: {path} is in none of the folders that the checker may read; add its own"
            )
    box.require(allow_unsandboxed)


def lean_reference(text: str) -> Theorem:
    """The last theorem of a text, which is open. Raises ToolkitError if there is none."""
    stated, opened = list(_STATED.finditer(text)), _OPEN.search(text)
    if not stated or opened is None or opened.start() < stated[-1].start():
        raise ToolkitError(
            f"a reference for the rule lean must be a Lean theorem that ends in := or := by, not {shown(text)}"
        )
    start = stated[-1].start()
    return Theorem(text[:start], text[start : opened.start() + 2], stated[-1][1], bool(opened[1]))


def proof_of(completion: str, theorem: Theorem) -> str | Verdict:
    """What the answer writes behind the theorem's `:=`: it may continue it, or repeat it. A verdict if it cannot be
    checked."""
    code = _code(completion)
    repeated = re.compile(r"\s+".join(map(re.escape, theorem.stated.split())))
    if found := repeated.search(code):
        proof = code[found.end() :]
    elif re.search(rf"\b(?:theorem|lemma)\s+{re.escape(theorem.name)}(?![\w'])", code):
        return Verdict(0.0, f"the answer states another theorem under the name {theorem.name}")
    else:
        proof = f" by\n{_indented(code)}" if theorem.by else f" {code}"
    if not proof.removeprefix(" by").strip():
        return Verdict(0.0, "no proof in the answer")
    is_plain = not set(proof) & set('"«')  # otherwise what looks like a comment may stand in a text or a name
    if forbidden := _FORBIDDEN.search(_COMMENT.sub(" ", proof) if is_plain else proof):
        return Verdict(0.0, f"the proof uses {forbidden[0]}")
    return proof


def _code(completion: str) -> str:
    """The last block fenced as Lean, or the only kind of block, or the text before a fence that only closes."""
    fences = list(_FENCE.finditer(completion))
    blocks = [
        completion[first.end() + 1 : last.start()]
        for first, last in zip(fences[::2], fences[1::2], strict=False)
        if first[1].lower() in ("", "lean", "lean4")
    ]
    if blocks:
        return blocks[-1]
    if len(fences) == 1 and fences[0][1]:
        return completion[fences[0].end() + 1 :]  # cut off before it closes
    return completion[: fences[0].start()] if fences else completion


def _indented(body: str) -> str:
    """Tactics with the indentation that they lost: of the first line, or of all."""
    body = body.strip("\n")
    first, _, rest = body.partition("\n")
    if first[:1].isspace():
        return body
    return f"  {body}" if rest and textwrap.dedent(rest) != rest else textwrap.indent(body, "  ")


def read_messages(output: str, fault: str | None, last_line: int) -> Verdict:
    """Lean's messages as a verdict. last_line: the number of the line with `#print axioms`."""
    messages = list(filter(None, map(_message, output.splitlines())))
    if errors := [message["data"] for message in messages if message.get("severity") == "error"]:
        return Verdict(0.0, f"Lean says {shown(errors[0], 120)}")
    if fault:
        return Verdict(0.0, f"Lean did not finish: {fault}{_said(output, messages)}")
    if any(_SORRY.search(message["data"]) for message in messages):
        return Verdict(0.0, "the proof uses sorry")
    ends = [message["data"] for message in messages if message.get("pos", {}).get("line") == last_line]
    if not ends:
        return Verdict(0.0, f"Lean did not reach the end of the proof{_said(output, messages)}")
    listed = _AXIOMS.search(ends[-1])
    others = sorted({name.strip() for name in listed[1].split(",")} - OWN_AXIOMS) if listed else []
    if others:
        return Verdict(0.0, f"the proof assumes {', '.join(others)}")
    return Verdict(1.0, "Lean accepts the proof")


def _said(output: str, messages: Sequence[Any]) -> str:
    return f"; it wrote {shown(output)}" if output.strip() and not messages else ""


def _message(line: str) -> dict[str, Any] | None:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    fits = isinstance(message, dict) and isinstance(message.get("data"), str)
    return message if fits and isinstance(message.get("pos", {}), dict) else None
