"""`make clients`: other programs open what we write, in environments of their own, and give the same tokens.

Outside CI: they download gigabytes. docs/clients.md has the versions and figures of the last run.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import sft.stage

from ..helpers.client_checks import BASES, PROGRAMS, TALKS, TOKENS, compare, train_runs
from ..helpers.client_environments import LLAMA_CPP, STOCK_4, STOCK_5, VLLM_CPU, Client

pytestmark = pytest.mark.clients

FOLDERS = {"full/final": "merged", "merged": "full/final"}  # what is read -> another model, which must not pass for it


@dataclass(frozen=True)
class Case:
    """within: how far log-probabilities may be off. In float32 all tokens are our greedy ones as well; with rounded
    weights a choice may cost twice that."""

    client: Client
    program: str
    base: str
    dtype: str
    within: float
    environment: dict[str, str] = field(default_factory=dict)


WITHOUT_MLA = {"VLLM_MLA_DISABLE": "1"}
CASES = {
    "transformers-5": Case(STOCK_5, "transformers_answers.py", "tiny", "float32", 1e-4),
    "transformers-5-yarn": Case(STOCK_5, "transformers_answers.py", "v2-lite-heads", "float32", 1e-4),
    # Not with YaRN, whose scale is its own.
    "transformers-4": Case(STOCK_4, "transformers_answers.py", "tiny", "float32", 1e-4),
    # Not with tiny's heads, for which it has no kernels.
    "vllm": Case(VLLM_CPU, "vllm_answers.py", "v2-lite-heads", "float32", 1e-4, WITHOUT_MLA),
    "vllm-mla": Case(VLLM_CPU, "vllm_answers.py", "v2-lite-heads", "bfloat16", 0.02),
    "llama-cpp-f16": Case(LLAMA_CPP, "llama_cpp_answers.py", "27 narrow layers", "f16", 0.002),
    "llama-cpp-q8": Case(LLAMA_CPP, "llama_cpp_answers.py", "27 narrow layers", "q8_0", 0.02),
}


@pytest.fixture(scope="module", params=BASES)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A full run on a base, and the merge of an adapter run on it."""
    home = tmp_path_factory.mktemp("handed_on")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(sft.stage, "SAMPLE_TOKENS", 1)
        train_runs(request.param)
        yield home


@pytest.mark.parametrize(("case", "runs"), [(case, case.base) for case in CASES.values()], ids=CASES, indirect=["runs"])
def test_the_same_prompts_and_tokens(case: Case, runs: Path):
    for folder, other in FOLDERS.items():
        request = {"folder": folder, "talks": TALKS, "tokens": TOKENS, "dtype": case.dtype}
        told = case.client.run(PROGRAMS / case.program, request, runs, **case.environment)
        found = compare(runs / folder, told)
        print(f"\n{case.client.versions()}, {case.base}, {case.dtype}, {folder}: {found}")
        assert found.wrong <= case.within and found.lost <= 2 * case.within
        assert found.same == found.tokens or case.dtype != "float32"
        assert compare(runs / other, told).wrong > 5 * case.within
