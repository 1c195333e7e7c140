"""The arguments of each `dsv2` command: a function that declares them on its parser."""

import argparse
import re
from pathlib import Path


def recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file, or a name that `dsv2 recipes` lists")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help="values to replace, as YAML")
    parser.add_argument("--smoke", action="store_true", help="run at toy size: 2 steps, batch 1")
    parser.add_argument("--no-cache", action="store_true", help="do not use the cache of prepared rows")


def init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="directory for the model; new or empty")
    presets = "tiny, v2-lite-mini, v2-lite-heads, v2-mini, deepseek-moe-mini, v3-mini, glm4-moe-lite-mini or youtu-mini"
    parser.add_argument("--preset", required=True, help=presets)
    parser.add_argument("--seed", type=_seed, default=0, help="seed of the weights (0)")


def chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL_OR_RUN", help="a model directory, a run, or a hub name")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="show the answers of two models side by side")
    parser.add_argument("--prompt", help="answer this prompt and exit; without it, start a conversation")
    parser.add_argument("--system", help="the system message")
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="maximum length of an answer in tokens (512)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="sampling temperature; 0 is greedy (0)"
    )
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="dtype of the model (float32)"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="seed of sampling (0)")


def adapter_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER_OR_RUN", help="an adapter directory, or a run with one in final/")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="directory to write; new or empty")


def _seed(text: str) -> int:
    """A seed as recipes have it; raises what argparse expects for another text."""
    if not re.fullmatch(r"\d{1,10}", text, re.ASCII) or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1:,}")
    return int(text)


def _license(text: str) -> str:
    """A licence as the hub names it; raises what argparse expects for another text."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,63}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a licence as the hub names them, such as apache-2.0 or other"
        )
    return text


def _size(text: str) -> int:
    """A number of bytes, such as 5GB or 500MiB; raises what argparse expects for another text."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except (ValidationError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, such as 5GB or 500MiB")
    return size


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_OR_RUN", help="a model directory, a run, or a hub name")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (8000)")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (127.0.0.1)")
    parser.add_argument("--key", action="store_true", help="require the API key that is in DSV2_API_KEY")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="dtype of the model (float32)"
    )


def card_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--license", type=_license, metavar="NAME", help="licence for the model card, as the hub names it (none)"
    )


def merge_arguments(parser: argparse.ArgumentParser) -> None:
    adapter_arguments(parser)
    card_arguments(parser)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of all weights; by default, the base's"
    )
    parser.add_argument(
        "--shard-size",
        type=_size,
        metavar="SIZE",
        help="largest weight file, such as 5GB; by default, the base's files",
    )


def export_arguments(parser: argparse.ArgumentParser) -> None:
    adapter_arguments(parser)
    card_arguments(parser)
    parser.add_argument(
        "--layout", default="per_expert", help="layout to write: per_expert, which vLLM and SGLang read (per_expert)"
    )
    parser.add_argument(
        "--kv-b",
        action="store_true",
        help="write adapters on kv_b_proj too, for vLLM with VLLM_MLA_DISABLE=1 or SGLang",
    )


def import_arguments(parser: argparse.ArgumentParser) -> None:
    adapter_arguments(parser)
    parser.add_argument("--base", metavar="MODEL", help="base model, if not the one that the adapter's config names")


def experts_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)
    parser.add_argument(
        "--score",
        choices=("gate", "token"),
        default="gate",
        help="score experts by gate weights or by token counts (gate)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help="share of the scores that the chosen experts must reach (0.1; with token 0.2)",
    )
    parser.add_argument(
        "--tokens", type=int, default=131072, metavar="N", help="score rows with about N tokens in total (131072)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.json",
        help="file to write (the recipe's experts_file, or one next to output_dir)",
    )


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)
    parser.add_argument("--gpu-gb", type=float, default=80.0, metavar="GB", help="memory of a GPU in 10^9 bytes (80)")
    parser.add_argument(
        "--gpu-tflops", type=float, default=989.0, metavar="N", help="its peak in bf16, in TFLOP/s (989: H100)"
    )
    parser.add_argument(
        "--mfu", type=float, default=0.3, metavar="P", help="share of the peak that training uses (0.3)"
    )


def recipes_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "copy", nargs="*", metavar="copy NAME FILE", help="copy a shipped recipe to FILE, for you to edit"
    )


def report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories of stages or chains")
    parser.add_argument("--output", type=Path, help="HTML file to write (report.html in the first run)")
    parser.add_argument(
        "--watch", action="store_true", help="serve the page on 127.0.0.1 and renew it while runs go on"
    )
    parser.add_argument("--port", type=int, help="port of --watch; 0 takes a free one (8001)")
