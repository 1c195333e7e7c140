"""vLLM: loads an adapter, and writes the factors that it holds then: module -> its tensors, as a safetensors file."""

import json
import sys

from safetensors.torch import save_file
from vllm import LLM
from vllm.lora.request import LoRARequest


def factors(worker):
    """{"module.a.0": tensor, ...}: a module that vLLM stacks has several pairs."""
    loras = worker.model_runner.lora_manager._adapter_manager.list_adapters()[1].loras
    found = {}
    for module, weights in loras.items():
        for side in ("a", "b"):
            held = getattr(weights, f"lora_{side}")
            for number, tensor in enumerate(held if isinstance(held, list) else [held]):
                found[f"{module}.{side}.{number}"] = tensor.contiguous().clone()
    return found


def main() -> None:
    request = json.loads(sys.argv[1])
    llm = LLM(
        model=request["folder"], dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4,
        **request["engine"],
    )  # fmt: skip
    llm.llm_engine.add_lora(LoRARequest("adapter", 1, request["adapter"], **request["adapter_settings"]))
    (found,) = llm.collective_rpc(factors)
    save_file(found, request["out"])
    print(json.dumps({name: list(tensor.shape) for name, tensor in found.items()}))


if __name__ == "__main__":
    main()
