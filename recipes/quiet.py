"""Keeps the libraries' own bars and notices out of the user's sight. Imports transformers."""

import warnings


def quiet_libraries() -> None:
    """No bars for the loading and writing of weights; no notices of settings that transformers 6 will rename, or of
    embeddings that PEFT writes into checkpoints beside their adapters."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`", category=UserWarning)
    warnings.filterwarnings("ignore", message=".*is deprecated and will be removed in v6", category=FutureWarning)
