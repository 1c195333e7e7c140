"""File names in a run directory, for the stages and the code that runs them. No torch.

The model package defines the names that it uses itself (training/run_files.py, checkpoints/sources.py): it may not
import this module, and importing it loads torch. A test compares the two.
"""

RECIPE = "recipe.yaml"  # as resolved
MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
JUDGED_LINES = "judge.jsonl"  # what a language model was asked that judges answers, and its verdicts
REJECTED = "rejected.jsonl"  # rows left out, with reasons
RESULTS = "results.json"  # the figures of an evaluation or a chain
CHAIN_STATE = "chain.json"  # which stages of a chain are done
REPORT = "report.html"
FINAL = "final"  # the model that the run trained
REWARD_STATS = "reward_stats.json"  # in a reward model's final/
CHECKPOINT = "checkpoint-"  # and the step
