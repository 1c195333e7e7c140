"""Run directories as stages write them, without the training."""

import json
from pathlib import Path


def lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_stage(path: Path, stage: str, metrics: list[dict], samples: list[dict] | None = None) -> Path:
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(f"stage: {stage}\nseed: 3\n")
    (path / "manifest.json").write_text(json.dumps({"status": "finished", "versions": {"torch": "9.8.7"}}))
    (path / "final").mkdir()
    lines(path / "metrics.jsonl", metrics)
    lines(path / "samples.jsonl", samples or [])
    return path


def sample(prompt: str, completion: str, **more: object) -> dict:
    return {"prompt": prompt, "completion": completion, **more}
