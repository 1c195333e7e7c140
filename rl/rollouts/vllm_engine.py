"""Rollouts by vLLM, through TRL's client: what must be there before a run, and the weights that go over.

TRL sends parameters under the names that they have in memory, in which the experts of a layer are one tensor, and
merges adapters in place. vLLM's deepseek_v2 loads the hub's names, a tensor for each projection of each expert.
"""

from functools import partial
from typing import Any

import httpx2
import torch
from trl.generation.vllm_generation import VLLMGeneration
from trl.import_utils import is_vllm_available
from trl.trainer.grpo_config import GRPOConfig

from conversations.errors import ToolkitError
from deepseek_v2_modeling.adapters import check_mergeable, hub_weights

PATIENCE = 5.0  # seconds for an answer of the server
SERVE = 'VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend": "nccl"}\''


def server_of(args: GRPOConfig) -> str:
    """The server's URL, as TRL makes it."""
    return args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"


def check_vllm(args: GRPOConfig) -> None:
    """Raises ToolkitError if the recipe asks for vLLM and it is not installed, or its server does not answer or cannot
    be given weights."""
    if not args.use_vllm:
        return
    if not is_vllm_available():
        raise ToolkitError(
            "training.use_vllm: vLLM is not installed; install it (pip install 'trl[vllm]'), or leave the field out: "
            "rollouts then use the toolkit's own loop"
        )
    if args.vllm_mode == "server":
        _check_server(server_of(args))


def send_hub_weights(generation: VLLMGeneration) -> None:
    """Make TRL's engine send the weights as vLLM's deepseek_v2 loads them.

    Raises:
        ModelError: an adapter cannot be merged.
    """
    model: Any = generation.model
    check_mergeable(model)
    generation._iter_named_params = partial(hub_weights, model)  # pyright: ignore[reportAttributeAccessIssue]
    if generation.mode == "colocate":
        generation.sync_weights = partial(_reload, generation, model)


def _reload(generation: VLLMGeneration, model: Any) -> None:
    """As TRL's `sync_weights` does in one process, but all weights in one reload: TRL loads each into a parameter that
    vLLM has packed or, with latent attention, absorbed since, and the engine goes on with what it made of the old
    ones."""
    engine: Any = generation.llm
    if generation.enable_sleep_mode:
        torch.cuda.empty_cache()
        engine.wake_up(tags=["weights"])
        generation._llm_weights_sleeping = False
    engine.llm_engine.model_executor.driver_worker.reload_weights(weights_iterator=hub_weights(model))
    engine.reset_prefix_cache()


def _check_server(url: str) -> None:
    try:
        _get(f"{url}/health")
        info = _get(f"{url}/server_info?config_format=json")
    except httpx2.HTTPError as error:
        raise ToolkitError(
            f"training.use_vllm: no vLLM server answers at {url} ({type(error).__name__}); start it with: {SERVE}"
        ) from error
    if info.status_code == 404:
        raise ToolkitError(
            f"training.use_vllm: the vLLM server at {url} takes no weights, because it runs without "
            f"VLLM_SERVER_DEV_MODE=1; start it with: {SERVE}"
        )
    if info.json().get("vllm_config", {}).get("weight_transfer_config") is None:
        raise ToolkitError(f"training.use_vllm: the vLLM server at {url} takes no weights; start it with: {SERVE}")


def _get(url: str) -> httpx2.Response:
    response = httpx2.get(url, timeout=PATIENCE)
    if response.status_code != 404:
        response.raise_for_status()
    return response
