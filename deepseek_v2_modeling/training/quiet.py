"""Silences the libraries' own progress bars and notices."""

import warnings

from transformers.utils import logging


def quiet_libraries() -> None:
    """No bars for the loading and writing of weights; no notices of names that the libraries use among themselves or
    that transformers 6 will rename, or of embeddings that PEFT writes into checkpoints beside their adapters."""
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate)\.")
    warnings.filterwarnings("ignore", message=".*is deprecated and will be removed in v6", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`", category=UserWarning)
