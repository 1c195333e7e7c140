"""Detects the natural language of a text with py3langid, a naive Bayes model over byte n-grams that is part of the
package (4.6 MB of numpy arrays; nothing is downloaded or unpickled). Unlike `language_of`, it distinguishes languages
that share a script. langdetect, which IFEval's own check uses, is not deterministic and no longer maintained."""

from functools import cache
from typing import Any

# Those that IFEval asks for, and the most common others; with all 140 of the model, short texts are misclassified.
LANGUAGES = tuple(
    "ar bg bn cs da de el en es fa fi fr gu he hi hu id it ja kn ko ml mr ne nl no pa pl pt ro ru sv sw ta te th tr "  # noqa: SIM905
    "uk ur vi zh".split()
)
_SURE = 0.5  # probability above which no other language is considered
_NEAR = 0.25  # otherwise: languages with at least this fraction of the highest probability


def may_be(text: str, language: str) -> bool:
    """Whether a text may be in this one of LANGUAGES; a text too short to tell ("OK") may be in several."""
    likely = dict(_model().rank(text))
    best = max(likely.values())
    return likely[language] == best or (best < _SURE and likely[language] >= _NEAR * best)


@cache
def _model() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    model.set_languages(LANGUAGES)
    return model
