"""Loading a checkpoint into processes that share its weights (`parallel: {fsdp: N}`): the memory of the host, of all
processes together, over the size of the files.

Every process counts its own peak of anonymous memory (without mapped files, which the system can reclaim); their sum
is an upper bound of the peak of all. Also what they hold afterwards: on a CPU that is the model itself, which on GPUs
would not be in the host's memory.

    python -m benchmarks.sharded_loading            creates a 1.5 GB bf16 checkpoint in a temporary directory
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import loading
from benchmarks.common import memory_gb, peak_of_memory, write

LAYERS = 8
PROCESSES = (1, 2, 4)
KINDS: dict[str, Any] = {
    "LoRA, bf16": {"lora": ("attention", "experts"), "ep": False},
    "LoRA, bf16, experts divided": {"lora": ("attention", "experts"), "ep": True},
    "all weights, float32": {"lora": None, "ep": False},
}


def load(kind: str, directory: Path) -> dict[str, float]:
    """Load on this process and those beside it; the sums over all of them, in GB."""
    import torch.distributed as dist

    from deepseek_v2_modeling.loading import LoraSettings, prepare_trainable, resolve_source
    from deepseek_v2_modeling.training import Parallel, shard

    dist.init_process_group("gloo")
    processes, asked = dist.get_world_size(), KINDS[kind]
    lora = LoraSettings(asked["lora"], r=8) if asked["lora"] else None
    source = resolve_source(directory)

    def one(weights: Any) -> Any:
        return prepare_trainable(source, lora=lora, merge_dir=directory / "no", dtype="bfloat16", weights=weights)

    dist.barrier()
    before = memory_gb("RssAnon")
    with peak_of_memory() as peaks:
        parallel = Parallel(processes, processes if asked["ep"] else 1)
        model = one("read") if processes == 1 else shard(one, parallel)
    held = memory_gb("RssAnon") - before
    sums = torch.tensor([peaks[0], held])
    dist.all_reduce(sums)
    del model
    dist.destroy_process_group()
    return dict(zip(("peak_gb", "held_gb"), sums.tolist(), strict=True))


def run(kind: str, directory: Path, processes: int) -> dict[str, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["-m", "benchmarks.sharded_loading", "--one", kind, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "DIRECTORY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(load(args.one[0], Path(args.one[1]))))
        return
    loading.SHAPE["num_hidden_layers"] = LAYERS
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        loading.make(directory)
        size = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors")) / 1e9
        for kind, asked in KINDS.items():
            for processes in PROCESSES[1 if asked["ep"] else 0 :]:
                found = run(kind, Path(directory), processes)
                ratio = {key.replace("_gb", "_over_files"): round(value / size, 3) for key, value in found.items()}
                figures[f"{kind}, {processes} processes"] = ratio
                print(f"{kind:<28} {processes} processes: peak {ratio['peak_over_files']:.2f} x the files, "
                      f"then {ratio['held_over_files']:.2f} x")  # fmt: skip
    write("sharded_loading", {"files_gb": round(size, 2), "loaded": figures})


if __name__ == "__main__":
    main()
