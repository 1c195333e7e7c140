"""Silences the libraries' own progress bars and notices."""

import warnings

from transformers.utils import logging


def quiet_libraries() -> None:
    """Disable progress bars for loading and saving weights, and warnings about names that the libraries use internally
    or that transformers 6 will rename, or about embeddings that PEFT saves with their adapters."""
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate)\.")
    warnings.filterwarnings("ignore", message=".*is deprecated and will be removed in v6", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`", category=UserWarning)
