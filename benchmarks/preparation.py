"""Data preparation before the first step: seconds, rows per second and memory, without and with the cache.

    python -m benchmarks.preparation TOKENIZER [--rows 100000]      results/preparation.json

Creates seeded four-turn conversations from the words of docs/ in a temporary directory, and reads and encodes them as
`dsv2 sft` does, each time in a separate process. For comparison, the tokenizer's own time for the same texts, in
batches and on all cores: a lower bound without encoding each word only once. TOKENIZER is a directory with the released
tokenizer; `by_words` records whether it splits at words.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import memory_gb, write

WORDS_OF_TURNS = (28, 28, 24, 28)
DOCS = Path(__file__).resolve().parents[1] / "docs"
BATCH = 5000  # texts


def make(file: Path, rows: int) -> None:
    """Writes conversations of about 200 tokens as JSON lines."""
    rng = random.Random(0)
    words = [word for page in sorted(DOCS.glob("*.md")) for word in page.read_text(encoding="utf-8").split()]
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(rows):
            starts = [rng.randrange(len(words) - count) for count in WORDS_OF_TURNS]
            texts = [" ".join(words[at : at + count]) for at, count in zip(starts, WORDS_OF_TURNS, strict=True)]
            turns = zip(("user", "assistant") * 2, texts, strict=True)
            lines.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")


def prepare(file: str, tokenizer_directory: str) -> dict[str, Any]:
    """As `dsv2 sft` does; the cache of rows is under DSV2_CACHE."""
    from transformers import AutoTokenizer

    from conversations.answers.usable_rows import no_answer
    from conversations.rendering.words import cuts_at_words
    from conversations.sections import DataSource
    from recipes.data.sources import read_sources
    from recipes.runs.caching import row_cache
    from sft.data import encode_rows

    cache = row_cache(True)
    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_directory)
    before, began = memory_gb("VmRSS"), time.perf_counter()
    mixture = read_sources([DataSource(path=file)], 0, refuse=no_answer, cache=cache, refuses_by="sft")
    read = time.perf_counter()
    encoded = encode_rows(
        mixture.rows, tokenizer, train_on="all_assistant", max_length=2048, too_long="truncate", cache=cache
    )
    ended = time.perf_counter()
    return {
        "read_s": round(read - began, 2),
        "encode_s": round(ended - read, 2),
        "rows_per_s": round(len(mixture.rows) / (ended - began)),
        "tokens_a_row": round(sum(encoded.report.lengths) / len(encoded.report.lengths)),
        "peak_gb": round(memory_gb("VmHWM"), 3),
        "above_start_gb": round(memory_gb("VmHWM") - before, 3),
        "from_cache": encoded.entry.hit,
        "by_words": cuts_at_words(tokenizer),
    }


def tokenizer_alone(file: str, tokenizer_directory: str) -> dict[str, Any]:
    """Encodes the texts of the same turns, each as a whole, on the tokenizer's own threads."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_directory)
    began = time.perf_counter()
    for texts in _batches(file):
        tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
    return {"seconds": round(time.perf_counter() - began, 2)}


def _batches(file: str) -> Iterator[list[str]]:
    texts: list[str] = []
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            texts += (message["content"] for message in json.loads(line)["messages"])
            if len(texts) >= BATCH:
                yield texts
                texts = []
    if texts:
        yield texts


PARTS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "first": prepare, "second": prepare, "tokenizer_alone": tokenizer_alone,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", metavar="TOKENIZER")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--one", nargs=2, metavar=("PART", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(PARTS[args.one[0]](args.one[1], args.tokenizer)))
        return
    figures: dict[str, Any] = {"rows": args.rows}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        make(file, args.rows)
        figures["file_mb"] = round(file.stat().st_size / 1e6, 1)
        for part in PARTS:
            command = [sys.executable, "-m", "benchmarks.preparation", args.tokenizer, "--one", part, str(file)]
            environment = {**os.environ, "DSV2_CACHE": folder, "TOKENIZERS_PARALLELISM": "true"}
            process = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            figures[part] = json.loads(process.stdout.splitlines()[-1])
            print(part, figures[part], flush=True)
    write("preparation", figures)


if __name__ == "__main__":
    main()
