"""What TRL's client sees of a vLLM server, over HTTP: it takes weights only under the names and shapes of a hub
checkpoint, and samples from what it was given. Tensors travel beside HTTP, as they do over NCCL."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from deepseek_v2_modeling.checkpoints.hub_layout import hub_layout
from deepseek_v2_modeling.inference import generate_answers, record_answers


class StandIn:
    """model: of the served checkpoint's shape. received: the tensors of the last update. updates: how many there were.
    faults: names or shapes that do not belong to the checkpoint."""

    def __init__(self, model: Any, ends: list[int], weight_transfer: bool = True, developer: bool = True):
        self.model, self.ends = model, ends
        self.weight_transfer, self.developer = weight_transfer, developer
        self.layout = hub_layout({name: tuple(p.shape) for name, p in model.named_parameters()})
        self.received: dict[str, torch.Tensor] = {}
        self.faults: list[str] = []
        self.updates, self.seed = 0, 0
        self.sent: list[tuple[str, torch.Tensor]] = []

    def get(self, path: str) -> dict[str, Any] | None:
        transfer = {"backend": "nccl"} if self.weight_transfer else None
        config = {"weight_transfer_config": transfer, "model_config": {"logprobs_mode": "processed_logprobs"}}
        pages: dict[str, Any] = {"/health": {}, "/v1/models": {"data": [{"id": "served"}]}}
        if self.developer:
            pages |= {"/server_info": {"vllm_config": config}, "/get_world_size": {"world_size": 1}}
        return pages.get(path.partition("?")[0])

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/update_weights":
            self._update(body["update_info"])
        if path == "/v1/completions":
            return self._complete(body)
        return {"success": True}

    def _update(self, info: dict[str, Any]) -> None:
        announced = dict(zip(info["names"], info["shapes"], strict=True))
        expected = {name: list(piece.shape) for name, piece in self.layout.items()}
        self.faults += [name for name in announced.keys() ^ expected.keys()]
        self.faults += [name for name in announced.keys() & expected.keys() if announced[name] != expected[name]]
        self.updates += 1

    def transfer(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """What NCCL does."""
        self.received = {name: tensor.clone() for name, tensor in tensors}
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in self.received.items():
                piece = self.layout[name]
                target = parameters[piece.parameter]
                (target if piece.place is None else target[piece.place]).copy_(tensor)

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        prompts = [prompt for prompt in body["prompt"] for _ in range(body["n"])]
        self.seed += 1
        with record_answers() as record:
            answers = generate_answers(
                self.model, prompts, pad_token_id=2, eos_token_id=self.ends, max_new_tokens=body["max_tokens"],
                temperature=body["temperature"], seeds=[1000 * self.seed + i for i in range(len(prompts))],
            )  # fmt: skip
        choices = []
        for prompt, answer, logps in zip(prompts, answers, record.logps, strict=True):
            names = [f"token_id:{token}" for token in answer]
            tops = [{name: logp} for name, logp in zip(names, logps, strict=True)]
            found = {"tokens": names, "token_logprobs": logps, "top_logprobs": tops}
            choices.append({"prompt_token_ids": prompt, "token_ids": answer, "logprobs": found})
        return {"choices": choices}


@contextmanager
def serving(stand_in: StandIn) -> Iterator[str]:
    """Serve it on a free port of this machine; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(stand_in.get(self.path))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            self._answer(stand_in.post(self.path, json.loads(body or b"{}")))

        def _answer(self, page: dict[str, Any] | None) -> None:
            self.send_response(404 if page is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(page).encode())

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
