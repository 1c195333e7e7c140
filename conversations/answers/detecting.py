"""In which natural language a text is: by py3langid, a naive Bayes model over byte n-grams that comes with the package
(4.6 MB, numpy arrays, nothing fetched or unpickled). It tells apart languages of one script, which `language_of` does
not. langdetect, which IFEval's own check uses, draws at random and is no longer kept up."""

from functools import cache
from typing import Any

# Those that IFEval asks for, and the most common others; among all 140 of the model short texts come out odd.
LANGUAGES = tuple(
    "ar bg bn cs da de el en es fa fi fr gu he hi hu id it ja kn ko ml mr ne nl no pa pl pt ro ru sv sw ta te th tr "  # noqa: SIM905
    "uk ur vi zh".split()
)
_SURE = 0.5  # a probability above which no other language comes into question
_NEAR = 0.25  # below that: those that are this much as likely as the likeliest


def may_be(text: str, language: str) -> bool:
    """Whether a text is in one of LANGUAGES, or is too short to say ("OK")."""
    likely = dict(_model().rank(text))
    best = max(likely.values())
    return likely[language] == best or (best < _SURE and likely[language] >= _NEAR * best)


@cache
def _model() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    model.set_languages(LANGUAGES)
    return model
