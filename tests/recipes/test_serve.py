"""`dsv2 serve`, by the official client: a real process on a free port."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v2_modeling import lora_config
from deepseek_v2_modeling.loading import load_base, load_tokenizer, resolve_source, save_directory
from recipes.cli import main
from recipes.serving.generating import StopText

from ..helpers.models import random_adapter

TALK: Any = [{"role": "user", "content": "17 + 25?"}]
KEY = "kept-in-the-environment"


@contextmanager
def served(*words: str, cwd: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(the process, its address); it must end with exit code 0."""
    process = subprocess.Popen(
        [sys.executable, "-m", "recipes.cli", "serve", *words, "--port", "0"],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"on (http://\S+/v1); Ctrl-C stops", line)
        assert found, line + (process.stderr.read() if process.stderr and process.poll() is not None else "")
        yield process, found[1]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base: random weights with a strong adapter on it in run/final, so that every answer is another."""
    home = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert main(["init", "base", "--preset", "tiny"]) == 0
        model = random_adapter(load_base("base"), lora_config(("attention", "experts"), r=2, alpha=16))
        save_directory(model, load_tokenizer(resolve_source("base")), Path("run/final"))
    return home


@pytest.fixture(scope="module")
def url(home: Path) -> Iterator[str]:
    with served("run", cwd=home) as (_, address):
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none needed", max_retries=0, timeout=120)


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": "run", "messages": TALK, "max_tokens": 12, **more})


def test_the_answer_of_the_adapter_is_that_of_chat(
    client: openai.OpenAI, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(home)
    (choice,), usage = (answer := ask(client)).choices, answer.usage
    assert main(["chat", "run", "--prompt", "17 + 25?", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out.strip() == choice.message.content.strip() != ""
    assert choice.finish_reason == "length" and usage.completion_tokens == 12
    assert [model.id for model in client.models.list()] == ["run"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "17 + "}, {"type": "text", "text": "25?"}]}]
    assert ask(client, messages=parts).choices[0].message.content == choice.message.content


def test_streaming(client: openai.OpenAI):
    whole = ask(client).choices[0].message.content
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == whole and sum(map(bool, pieces)) > 2
    assert chunks[-1].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == 12


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_is_not_in_it(client: openai.OpenAI, stream: bool):
    whole = ask(client).choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]  # of several characters, within or across tokens
    wanted = whole[: whole.index(stop)]
    answer = ask(client, stop=["never said", stop], stream=stream)
    if stream:
        chunks = list(answer)
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        usage, reason = chunks[-1].usage, chunks[-1].choices[0].finish_reason
    else:
        said, usage, reason = answer.choices[0].message.content, answer.usage, answer.choices[0].finish_reason
    assert said == wanted and reason == "stop" and usage.completion_tokens < 12


def test_sampling_follows_temperature_and_seed(client: openai.OpenAI):
    def sample(**more: Any) -> str:
        return ask(client, **more).choices[0].message.content

    assert sample(temperature=1.0, seed=1) == sample(temperature=1.0, seed=1)
    assert len({sample(temperature=2.0, seed=seed) for seed in range(4)}) > 1
    assert sample(temperature=0) == sample() != sample(temperature=5.0, seed=3)


def test_a_seed_is_that_of_its_own_answer_whatever_comes_beside_it(client: openai.OpenAI):
    def sample(seed: int) -> str:
        answer = client.chat.completions.create(model="run", messages=TALK, max_tokens=16, temperature=2.0, seed=seed)
        return answer.choices[0].message.content or ""

    alone = [sample(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(sample, range(6))) == alone


def test_plain_text(client: openai.OpenAI, home: Path):
    bos = load_tokenizer(resolve_source(home / "base")).bos_token  # the template, written out
    prompt = f"{bos}User: 17 + 25?\n\nAssistant:"
    (choice,) = client.completions.create(model="run", prompt=prompt, max_tokens=12).choices
    assert choice.text == ask(client).choices[0].message.content
    pieces = client.completions.create(model="run", prompt=prompt, max_tokens=12, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == choice.text


def test_two_at_once_and_a_client_that_leaves(client: openai.OpenAI):
    alone = [ask(client, messages=[{"role": "user", "content": text}]).choices[0].message.content for text in "ab"]
    stream = ask(client, stream=True, max_tokens=400)
    next(iter(stream))
    stream.close()  # its answer ends there, or those below would wait for 400 tokens
    answers: dict[str, str] = {}

    def work(text: str) -> None:
        answers[text] = ask(client, messages=[{"role": "user", "content": text}]).choices[0].message.content

    threads = [threading.Thread(target=work, args=(text,)) for text in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers["a"], answers["b"]] == alone


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "content"),
        ({"messages": [{"role": "user", "content": "17 " * 5000}]}, "this model takes at most"),
        ({"model": "gpt-4"}, "gpt-4"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 2}, "n: "),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"stop": [""]}, "stop"),
        ({"extra_body": {"generation_config": "{}"}}, "generation_config"),
    ],
)
def test_a_bad_request_is_refused_by_name(client: openai.OpenAI, change: dict[str, Any], named: str):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **change)
    assert caught.value.status_code == 400 and named in str(caught.value)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", rb'{"messages": [{"role": "user", "content": "a\ud83d"}]}'),
        ("chat/completions", rb'{"model": "\ud83d", "messages": [{"role": "user", "content": "a"}]}'),
        ("completions", rb'{"prompt": "a", "stop": ["\ude42"]}'),
    ],
)
def test_half_a_character_is_refused(url: str, path: str, body: bytes):
    """As sent by a client that cuts an emoji in two."""
    reply = httpx.post(f"{url}/{path}", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400 and "half of a character" in reply.text


def test_what_is_not_served(url: str):
    assert (
        httpx.post(f"{url}/chat/completions", content=b"{", headers={"content-type": "application/json"}).status_code
        == 422
    )
    root = url.removesuffix("/v1")
    for path in ("/load_model", "/reset", "/v1/responses", "/v1/systemone", "/v1/audio/transcriptions"):
        assert httpx.post(f"{root}{path}", json={"model": "some/other"}).status_code == 404
    assert httpx.get(f"{root}/docs").status_code == 404 and httpx.get(f"{root}/health").status_code == 200


def test_a_key_and_another_address_are_said(home: Path):
    with served("base", "--key", "--host", "0.0.0.0", cwd=home, DSV2_API_KEY=KEY) as (process, address):
        port = address.rpartition(":")[2]
        mine = f"http://127.0.0.1:{port}"
        with pytest.raises(openai.AuthenticationError, match="wrong or missing API key"):
            ask(openai.OpenAI(base_url=mine, api_key="wrong", max_retries=0), model="base")
        assert ask(openai.OpenAI(base_url=mine, api_key=KEY, max_retries=0), model="base").choices
    assert process.stderr is not None
    said = process.stderr.read()
    assert "listening on 0.0.0.0" in said and "need the key in DSV2_API_KEY" in said and KEY not in said


def test_what_is_wrong_with_the_command(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(home)
    monkeypatch.delenv("DSV2_API_KEY", raising=False)
    monkeypatch.setattr("recipes.serving.server._run", lambda app, listener: pytest.fail("it serves"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        faults = {
            ("base", "--port", port): "choose another",
            ("base", "--port", "70000"): "--port is 70000; it must be from 0 to 65535",
            ("base", "--key"): "--key needs the key in the environment variable DSV2_API_KEY",
            ("nowhere", "--port", "0"): "nowhere: no such directory",
        }
        for words, message in faults.items():
            assert main(["serve", *words]) == 2
            assert message in capsys.readouterr().err
    monkeypatch.setattr("recipes.serving.server.find_spec", lambda name: None if name == "uvicorn" else object())
    assert main(["serve", "base"]) == 2
    assert "dsv2 serve needs uvicorn: pip install -c constraints.txt -e '.[serve]'" in capsys.readouterr().err


@given(st.lists(st.text("ab ", max_size=4), max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_text_is_cut_at_the_first_stop_however_it_arrives(pieces: list[str], stops: list[str]):
    text = StopText(stops)
    shown = "".join([*map(text.feed, pieces), text.finish()])
    whole = "".join(pieces).lstrip()
    ends = [whole.index(stop) for stop in stops if stop in whole]
    assert text.stopped == bool(ends)
    assert whole.startswith(shown) and not any(stop in shown for stop in stops)
    assert ends or shown == whole
    one = StopText(stops[:1])
    assert "".join([*map(one.feed, pieces), one.finish()]) == (whole.partition(stops[0])[0] if stops else whole)
