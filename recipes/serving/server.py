"""`dsv2 serve`: loads a model and answers requests until it is stopped."""

import argparse
import os
import secrets
import sys
from importlib.util import find_spec
from pathlib import Path
from socket import socket
from typing import Any

from conversations.errors import ToolkitError
from conversations.run_files import FINAL
from recipes.listening import HOME, listen

KEY = "DSV2_API_KEY"
NEEDED = ("fastapi", "openai", "uvicorn")
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")
GRACE = 3  # seconds that running answers get when the server stops


def serve(arguments: argparse.Namespace) -> int:
    """Serve a model, a run or an adapter (merged in memory) until Ctrl-C.

    Raises:
        ToolkitError, ModelError: something is not installed, the model or the key does not exist, or the address is
            taken.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ToolkitError(
            f"dsv2 serve needs {', '.join(missing)}: pip install -c constraints.txt -e '.[serve]', or on an installed "
            "wheel: pip install 'deepseek-v2-toolkit[serve]'"
        )
    key = _key(arguments)
    with listen(arguments.host, arguments.port) as listener:
        app = _app(arguments, key)
        host, port = listener.getsockname()[:2]
        if arguments.host != HOME:
            who = "whoever has the key" if key else "ANYONE who reaches it: there is no key, see --key"
            print(f"note: listening on {host}, not only on this machine, for {who}", file=sys.stderr)
        if key:
            print(f"note: requests need the key in {KEY}", file=sys.stderr)
        print(f"serving {model_name(arguments.model)} on http://{host}:{port}/v1; Ctrl-C stops", flush=True)
        _run(app, listener)
    return 0


def model_name(path: str) -> str:
    """The name that requests give for the model: that of its directory, or of its run."""
    directory = Path(path).resolve() if Path(path).exists() else Path(path)
    return directory.parent.name if directory.name == FINAL else directory.name


def _key(arguments: argparse.Namespace) -> str | None:
    if not arguments.key:
        return None
    if not (key := os.environ.get(KEY)):
        raise ToolkitError(f"--key needs the key in the environment variable {KEY}")
    return key


def _app(arguments: argparse.Namespace, key: str | None) -> Any:
    """transformers' application with our model, reduced to the endpoints that are tested."""
    from transformers.cli.serving.server import build_server

    from recipes.serving.handlers import Chat, OneModelState, ServedModel, Text

    state, nothing = OneModelState(), None
    manager = ServedModel(model_name(arguments.model), *_load(arguments))
    chat, text = Chat(manager, state), Text(manager, state)
    others: Any = (nothing, nothing, nothing)  # responses, transcription, systemone: their routes are removed
    app = build_server(manager, chat, text, *others, generation_state=state)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ENDPOINTS]
    _explain_errors(app)
    if key is not None:
        app.middleware("http")(_with_key(key))
    return app


def _explain_errors(app: Any) -> None:
    """Give refusals the form in which OpenAI's clients look for a message."""
    from fastapi import HTTPException
    from fastapi.exceptions import RequestValidationError

    async def refused(request: Any, error: Any) -> Any:
        return _refusal(str(error.detail), error.status_code)

    async def not_json(request: Any, error: Any) -> Any:
        return _refusal("the body is not a JSON object", 422)

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, not_json)


def _refusal(message: str, status: int) -> Any:
    from fastapi.responses import JSONResponse

    kind = "authentication_error" if status == 401 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status_code=status)


def _with_key(key: str) -> Any:
    """Middleware that refuses requests without the key; it is compared in constant time."""
    wanted = f"Bearer {key}".encode()

    async def check(request: Any, call_next: Any) -> Any:
        given = request.headers.get("authorization", "").encode()
        if not secrets.compare_digest(given, wanted):
            return _refusal("wrong or missing API key", 401)
        return await call_next(request)

    return check


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer); adapters are merged into the weights in memory."""
    import torch

    from conversations.rendering.template import has_other_template, install_template
    from conversations.sections import ModelSection
    from deepseek_v2_modeling.loading import check_vocabulary, load_tokenizer, resolve_source
    from deepseek_v2_modeling.training import quiet_libraries
    from recipes.runs.models import load_frozen

    quiet_libraries()
    source = resolve_source(arguments.model)
    tokenizer: Any = load_tokenizer(source)
    model = load_frozen(ModelSection(path=arguments.model, dtype=arguments.dtype), source, "causal_lm")
    check_vocabulary(tokenizer, model.config, source.tokenizer_dir)
    if not has_other_template(tokenizer):
        install_template(tokenizer, model.config.model_type)
    if source.adapter is not None:
        model = model.merge_and_unload()
    return (model.to("cuda") if torch.cuda.is_available() else model).eval(), tokenizer


def _run(app: Any, listener: socket) -> None:
    """Answer requests until SIGINT or SIGTERM, which end the command as intended."""
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
