"""The demo chain stopped in every stage, started again, and compared with an uninterrupted one.

    python -m tests.helpers.chain_launch DIR              one stop in each stage, as test_chain_resume.py does
    python -m tests.helpers.chain_launch DIR --every      SIGINT, SIGTERM, SIGKILL and a full disk in each stage
    python -m tests.helpers.chain_launch DIR --kills 5    the demo itself, killed at random moments
    python -m tests.helpers.chain_launch DIR --kills 5 stages.sft.training.max_steps=70    a shorter one

Every run is a separate process, forked from this one after the libraries are imported, and does everything that
`dsv2 run recipes/tiny/chain.yaml` does.
"""

import argparse
import errno
import gc
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import eval.stage
import recipes.runs.stage
import reward.stage  # noqa: F401 (before the forks, so that none of them has to)
import rl.stage  # noqa: F401
import sft.stage
from deepseek_v2_modeling.training.mixin import RunTrainerMixin
from recipes.cli import main as dsv2
from recipes.files import read_json
from recipes.recipe.yaml_text import read_mapping

CHAIN = Path(__file__).parents[2] / "recipes" / "tiny" / "chain.yaml"
ENTRIES = read_mapping(CHAIN)["stages"]
STAGES = [entry["name"] for entry in ENTRIES]
EVALUATIONS = [entry["name"] for entry in ENTRIES if "results" in entry]
TRAINED = [name for name in STAGES if name not in EVALUATIONS]
ROWS = 8  # of each source: what is not used need not be made and read
TOKENS = 3  # of an answer
WAYS = {"SIGINT": 130, "SIGTERM": 130, "SIGKILL": -signal.SIGKILL, "full disk": 2}  # and how the run ends


def smoke() -> list[str]:
    """The chain at smoke size, with a checkpoint after each of its two steps."""
    words = ["--smoke"]
    for entry in ENTRIES:
        recipe = {**read_mapping(CHAIN.parent / entry["recipe"]), **entry}
        lists = {f"tasks.{n}.data": task["data"] for n, task in enumerate(recipe.get("tasks", ()))}
        for key, sources in (lists or {"data": recipe["data"]}).items():
            few = [{**source, "path": f"{source['path'].split('?')[0]}?n={ROWS}"} for source in sources]
            words.append(f"stages.{entry['name']}.{key}={json.dumps(few)}")
        for n, _ in enumerate(recipe.get("tasks", ())):
            words.append(f"stages.{entry['name']}.tasks.{n}.max_new_tokens={TOKENS}")
        if entry["name"] in TRAINED:
            words.append(f"stages.{entry['name']}.training.save_steps=1")
        if recipe["stage"] == "rl":
            words.append(f"stages.{entry['name']}.training.max_completion_length={TOKENS}")
    return words


def stop(way: str) -> None:
    """What happens to the process at the moment it is stopped."""
    if way == "full disk":
        raise OSError(errno.ENOSPC, "No space left on device")
    os.kill(os.getpid(), getattr(signal, way))


def stopped_in(stage: str, way: str) -> Callable[[], None]:
    """Stops a chain in a stage: a training one in its first step, by SIGTERM in its last, or by SIGKILL and a full disk
    in its second, when there is a checkpoint; an evaluation when it writes what the model said."""

    def patch() -> None:
        work, where = recipes.runs.stage._work, [""]

        def watched(recipe: Any, *args: Any) -> Any:  # the stage itself, not what is tried out before it
            where[0] = Path(recipe.output_dir).name
            return work(recipe, *args)

        def deadly(function: Callable[..., Any], call: int) -> Callable[..., Any]:
            calls = [0]

            def called(*args: Any, **kwargs: Any) -> Any:
                calls[0] += where[0] == stage
                if where[0] == stage and calls[0] == call:
                    stop(way)
                return function(*args, **kwargs)

            return called

        recipes.runs.stage._work = watched
        if stage in EVALUATIONS:
            eval.stage.append_lines = deadly(eval.stage.append_lines, 1)
        elif way == "full disk":
            RunTrainerMixin._publish = deadly(RunTrainerMixin._publish, 2)
        else:
            step = deadly(RunTrainerMixin.compute_loss, 1 if way == "SIGINT" else 2)
            RunTrainerMixin.compute_loss = step

    return patch


def start(folder: Path, run: str, overrides: Sequence[str], patch: Callable[[], None] | None = None) -> int:
    """The process id of a chain in `folder`/`run`; what it says goes to `run`.log."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(folder)
        log = os.open(f"{run}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        sft.stage.SAMPLE_TOKENS = 2
        if patch:
            patch()
        code = dsv2(["run", str(CHAIN), f"output_dir={run}", *overrides])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """How a run ended: its exit code, or -9 where it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finish(folder: Path, run: str, overrides: Sequence[str]) -> None:
    code = ended(start(folder, run, overrides))
    assert code == 0, f"{run} ended with {code}:\n{(folder / f'{run}.log').read_text()[-4000:]}"


def result(run: Path) -> dict[str, Any]:
    """All that must be the same: the figures, and the weights of every stage."""
    figures = {k: v for k, v in read_json(run / "results.json").items() if k not in ("seconds", "peak_memory_gb")}
    weights = {path.relative_to(run): path.read_bytes() for path in sorted(run.glob("*/final/*.safetensors"))}
    assert len(weights) == len(TRAINED)
    return {"figures": figures, "weights": weights}


def compare(unbroken: Path, broken: Path) -> None:
    one, other = result(unbroken), result(broken)
    for what in one:
        assert one[what] == other[what], f"{broken}: other {what} than {unbroken}"
    left = [path for path in broken.rglob(".*") if path.name != ".superseded"]
    assert not left, f"{broken}: {left} left over"
    statuses = {path.parent.name: read_json(path)["status"] for path in broken.rglob("manifest.json")}
    assert set(statuses.values()) == {"finished"}, statuses


def stop_in_stages(folder: Path, stops: Sequence[tuple[str, str]]) -> None:
    """A chain that is stopped at each of `stops` (stage, way), one after the other."""
    words = smoke()
    finish(folder, "unbroken", words)
    for stage, way in stops:
        code = ended(start(folder, "broken", words, stopped_in(stage, way)))
        said = (folder / "broken.log").read_text()
        assert code == WAYS[way], f"{stage}, {way}: ended with {code}:\n{said[-4000:]}"
        manifest = json.loads((folder / "broken" / stage / "manifest.json").read_text())
        assert (manifest["status"] == "running") == (way == "SIGKILL"), (stage, way, manifest["status"])
        print(f"{stage}: stopped by {way}", flush=True)
    finish(folder, "broken", words)
    compare(folder / "unbroken", folder / "broken")
    print("the same", flush=True)


def moments(unbroken: Path, kills: int, rng: random.Random) -> list[tuple[str, float]]:
    """Random moments of a chain's whole length, in order: a stage, and how many seconds after its start."""
    found, lengths = (
        [],
        {name: stage["seconds"] for name, stage in read_json(unbroken / "chain.json")["stages"].items()},
    )
    for at in sorted(rng.uniform(0, sum(lengths.values())) for _ in range(kills)):
        for name, length in lengths.items():
            if at < length:
                found.append((name, at))
                break
            at -= length
    return found


def kill(pid: int, stage: Path, after: float, way: signal.Signals) -> None:
    """Stop a chain some seconds after a stage has begun, be it anew or again."""
    while not (stage / "manifest.json").exists():
        time.sleep(0.01)
        assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, f"ended before {stage.name}"
    time.sleep(after)
    os.kill(pid, way)


def kill_at_random(folder: Path, kills: int, seed: int, overrides: Sequence[str]) -> None:
    """The demo, killed at random moments of its whole length, against one that was not."""
    rng = random.Random(seed)
    finish(folder, "unbroken", overrides)
    for stage, after in moments(folder / "unbroken", kills, rng):
        pid, way = start(folder, "broken", overrides), rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
        kill(pid, folder / "broken" / stage, after, way)
        print(f"{stage}: {way.name} after {after:.1f} s: ended with {ended(pid)}", flush=True)
    finish(folder, "broken", overrides)
    compare(folder / "unbroken", folder / "broken")
    print("the same", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="with --kills: of the chain")
    args = parser.parse_intermixed_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    gc.freeze()  # what is imported is not looked through again at the end of each stage
    if args.kills:
        kill_at_random(folder, args.kills, args.seed, args.overrides)
        return
    ways = list(WAYS)
    one = [(stage, ways[number % len(ways)]) for number, stage in enumerate(STAGES)]
    stop_in_stages(folder, [(stage, way) for stage in STAGES for way in ways] if args.every else one)


if __name__ == "__main__":
    main()
