"""Promises of `emoe serve`, asked by OpenAI's own client over real sockets on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from server_bench import LONG, PATIENCE_S, Service, serving

from emoe_core.errors import OptionError
from workbench.commands.serve import KEY_VARIABLE, read_key
from workbench.models.reference.tiny import tiny_moe
from workbench.serving.server.limits import ServerLimits, require_safe_host
from workbench.serving.server.stop_strings import StopStrings, _Stop


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("server") / "model", "mixtral", seed=3)


@pytest.fixture(scope="module")
def service(model: Path) -> Iterator[Service]:
    with serving(model, ServerLimits(max_prompt_tokens=200, max_body_bytes=5000)) as running:
        yield running


def test_a_chat_is_answered_as_generate_does(service: Service) -> None:
    messages = [{"role": "user", "content": "Is the sky blue?"}]
    answer = service.client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=20)
    chunks = service.client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    pieces = list(chunks)
    service.wait_until_free()
    (expected,) = service.engine.generate(["Is the sky blue?"], max_new_tokens=20)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage is not None and answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces if chunk.choices) == expected.text
    assert pieces[-1].usage == answer.usage and pieces[-2].choices[0].finish_reason == answer.choices[0].finish_reason


def test_a_completion_streams_the_text_it_returns_whole(service: Service) -> None:
    whole = service.complete(temperature=0, max_tokens=12)
    streamed = "".join(chunk.choices[0].text for chunk in service.complete(stream=True, max_tokens=12))
    service.wait_until_free()
    (expected,) = service.engine.generate(["Why?"], max_new_tokens=12, chat=False)
    assert whole.choices[0].text == streamed == expected.text
    ids = service.engine.tokenizer("Why?")["input_ids"]  # type: ignore[misc]
    assert service.complete(ids, max_tokens=12).choices[0].text == expected.text


def test_a_drawn_answer_is_that_of_generate_with_the_same_seed(service: Service) -> None:
    drawn = [service.complete(temperature=1.3, top_p=0.9, seed=seed, max_tokens=12) for seed in (5, 5, 6)]
    streamed = service.complete(temperature=1.3, top_p=0.9, seed=5, max_tokens=12, stream=True)
    text = "".join(chunk.choices[0].text for chunk in streamed)
    unseeded = {service.complete(temperature=2, max_tokens=12).choices[0].text for _ in range(3)}
    service.wait_until_free()
    expected = sampled(service, "Why?", 12, temperature=1.3, top_p=0.9, seed=5)
    found = [answer.choices[0].text for answer in drawn]
    assert found[0] == found[1] == text == expected != found[2] and len(unseeded) > 1


def sampled(service: Service, prompt: str, tokens: int, *, temperature: float, top_p: float, seed: int) -> str:
    """Answer by transformers' own sampling."""
    tokenizer, model = service.engine.tokenizer, service.engine.model
    assert tokenizer is not None
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    torch.manual_seed(seed)
    output = model.generate(  # type: ignore[operator]
        ids, do_sample=True, temperature=temperature, top_p=top_p, top_k=0, max_new_tokens=tokens,
        eos_token_id=sorted(service.server.worker.served.ends), pad_token_id=0,
    )  # fmt: skip
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def test_an_answer_goes_on_past_its_end_where_a_load_generator_asks_for_it(service: Service) -> None:
    service.wait_until_free()
    (whole,) = service.engine.generate(["Why?"], max_new_tokens=40, chat=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service.server.worker._loop, "_stops", frozenset({whole.token_ids[5]}))
        ended = service.complete(max_tokens=40)
        on = service.complete(max_tokens=40, extra_body={"ignore_eos": True})
    assert ended.usage is not None and ended.usage.completion_tokens <= 6 and ended.choices[0].finish_reason == "stop"
    assert on.usage is not None and on.usage.completion_tokens == 40 and on.choices[0].finish_reason == "length"
    assert on.choices[0].text == whole.text


def test_a_stop_string_ends_an_answer_before_it_and_frees_the_place(service: Service) -> None:
    whole = service.complete(max_tokens=40).choices[0].text
    # Across tokens: characters of this tokenizer are tokens of their own or parts of one.
    stop = whole[11:14]
    expected = whole[: whole.index(stop)]
    answer = service.complete(max_tokens=40, stop=["never said", stop])
    chunks = list(service.complete(max_tokens=40, stop=stop, stream=True))
    assert answer.choices[0].text == expected == "".join(chunk.choices[0].text for chunk in chunks)
    assert answer.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.completion_tokens < 40
    assert service.complete(max_tokens=40, stop="never said").choices[0].text == whole


@given(st.lists(st.text("ab", max_size=5)), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4))
def test_a_text_in_pieces_is_stopped_where_it_would_be_whole(pieces: list[str], stops: list[str]) -> None:
    filtered = StopStrings(stops)
    passed = ""
    for count, piece in enumerate(pieces, 1):
        passed += filtered.push(piece)
        held = "".join(pieces[:count])[len(passed) :]
        assert filtered.found or not held or any(stop.startswith(held) for stop in stops)
    passed += filtered.finish()
    text = "".join(pieces)
    # The first to be complete decides, of two at once the one that began first.
    ends = [(text.index(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    end, length = min(ends, default=(len(text), 0))
    assert filtered.found == bool(ends) and passed == text[: end + length]


def test_a_long_stop_string_costs_no_more_than_a_short_one() -> None:
    """Characters are compared with a stop string about once each, also where nearly all of it keeps coming."""

    class Counted(str):
        compared = 0

        def __getitem__(self, place: Any) -> str:
            Counted.compared += 1
            return super().__getitem__(place)

    filtered = StopStrings([])
    filtered._stops = [_Stop(Counted("a" * 255 + "b"))]
    text = ("a" * 254 + "c") * 40
    assert "".join(filtered.push(character) for character in text) + filtered.finish() == text
    assert Counted.compared < 5 * (len(text) + 256)


def test_the_model_is_listed(service: Service) -> None:
    assert [item.id for item in service.client.models.list()] == ["tiny"]
    assert all(service.http.get(path).status_code == 200 for path in ("/healthz", "/health", "/readyz"))


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("{", 400, "JSON"),
        ({"prompt": "x"}, 400, "model"),
        ({"model": "other", "prompt": "x"}, 404, "no model 'other'"),
        ({"model": "tiny", "prompt": ""}, 400, "empty"),
        ({"model": "tiny", "prompt": [99999]}, 400, "token id 99999 is not one of the model's"),
        ({"model": "tiny", "prompt": "x", "temperature": -0.1}, 400, "temperature"),
        ({"model": "tiny", "prompt": "x", "temperature": 1e-9}, 400, "temperature"),
        ({"model": "tiny", "prompt": "x", "top_p": 0}, 400, "top_p"),
        ({"model": "tiny", "prompt": "x", "seed": -1}, 400, "seed"),
        ({"model": "tiny", "prompt": "x", "stop": list("abcdefghijklmnopq")}, 400, "at most 16"),
        ({"model": "tiny", "prompt": "x", "stop": {}}, 400, "stop: "),
        ({"model": "tiny", "prompt": "x", "stream": 5}, 400, "stream: "),
        ({"model": "tiny", "prompt": "x", "n": 2}, 400, "n is not served with the value 2"),
        ({"model": "tiny", "prompt": "x", "best_of": 3}, 400, "best_of is not served"),
        ({"model": "tiny", "prompt": "x", "top_k": 40}, 400, "top_k"),
        ({"model": "tiny", "prompt": "x", "tolerance": 1.5}, 400, "tolerance"),
        ({"model": "tiny", "prompt": "x", "task": "poetry"}, 400, "task types"),
        ({"model": "tiny", "prompt": "x", "slo": {"ttft": 0}}, 400, "slo.ttft"),
        ({"model": "tiny", "prompt": "x", "max_tokens": 9999}, 400, "limit is 511"),
        ({"model": "tiny", "prompt": "x" * 100, "max_tokens": 500}, 400, "exceed the model's 512"),
        ({"model": "tiny", "prompt": "x", "max_tokens": 4, "min_tokens": 5}, 400, "min_tokens is 5"),
        ({"model": "tiny", "prompt": "x" * 300}, 400, "limit is 200"),
        ({"model": "tiny", "prompt": "x" * 6000}, 413, "5,000 bytes"),
    ],
)
def test_what_cannot_be_served_is_refused_in_openais_format(
    service: Service, body: object, status: int, message: str
) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    answer = service.http.post("/v1/completions", content=content)
    error = answer.json()["error"]
    assert answer.status_code == status and message in error["message"] and error["type"] == "invalid_request_error"


def test_a_body_of_unknown_length_is_cut_off_at_the_limit(service: Service) -> None:
    answer = service.http.post("/v1/completions", content=(b" " * 1000 for _ in range(7)))
    assert answer.status_code == 413


def test_metrics_count_what_was_served(service: Service) -> None:
    names: list[tuple[str, dict[str, str]]] = [
        ("emoe_requests_total", {"result": "finished"}),
        ("emoe_ttft_seconds_count", {}),
        ("emoe_expert_lookups_total", {}),
    ]
    before = [service.metric(name, **labels) for name, labels in names]
    service.complete(extra_body={"slo": {"ttft": 1000, "tpot": 1000}, "task": "qa"}, max_tokens=3)
    service.complete(extra_body={"slo": {"ttft": 1e-9}}, max_tokens=3)
    service.wait_until_free()
    after = [service.metric(name, **labels) for name, labels in names]
    assert after[0] - before[0] == after[1] - before[1] == 2 and after[2] > before[2]
    assert service.metric("emoe_slo_requests_total", met="true") == 1
    assert service.metric("emoe_slo_requests_total", met="false") == 1
    assert 0 < service.metric("emoe_expert_hit_rate") <= 1 and service.metric("emoe_queue_length") == 0


def test_a_request_that_does_not_fit_the_queue_is_told_to_come_back(model: Path) -> None:
    with serving(model, ServerLimits(max_batch=1, max_waiting=0)) as service:
        service.server.worker._loop._stops = frozenset()
        stream = service.complete(stream=True, max_tokens=LONG)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="try again"):
            service.complete()
        stream.close()
        service.wait_until_free()
        assert service.complete().choices and service.metric("emoe_requests_total", result="cancelled") == 1


def test_a_client_that_waits_for_a_whole_answer_and_goes_frees_its_place(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(model) as service:
        held, entered = threading.Event(), threading.Event()
        step = service.server.worker._loop._step

        def hold() -> object:
            entered.set()
            assert held.wait(PATIENCE_S)
            return step()

        monkeypatch.setattr(service.server.worker._loop, "_step", hold)
        cancelled = threading.Event()
        cancel = service.server.worker.cancel
        monkeypatch.setattr(service.server.worker, "cancel", lambda job: (cancel(job), cancelled.set()))
        body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": LONG}).encode()
        import socket

        with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as plain:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            plain.sendall(head.encode() + body)
            assert entered.wait(PATIENCE_S)
        assert cancelled.wait(PATIENCE_S)
        held.set()
        service.wait_until_free()
        assert service.metric("emoe_requests_total", result="cancelled") == 1


def test_a_key_is_required_once_given(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(model, api_key="secret") as service:
        assert service.complete().choices
        for headers in ({}, {"authorization": "Bearer wrong"}):
            answer = httpx.get(f"{service.url}/v1/models", headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{service.url}/metrics").status_code == 401
        assert httpx.get(f"{service.url}/healthz").status_code == 200
    with pytest.raises(OptionError, match="api-key-file"):
        require_safe_host("0.0.0.0", None)
    require_safe_host("0.0.0.0", "secret")
    require_safe_host("127.0.0.1", None)
    monkeypatch.setenv(KEY_VARIABLE, "from the environment")
    (tmp_path / "key").write_text("from a file\n")
    (tmp_path / "empty").write_text("\n")
    assert (read_key(None), read_key(tmp_path / "key")) == ("from the environment", "from a file")
    for bad in ("empty", "missing"):
        with pytest.raises(OptionError, match=bad):
            read_key(tmp_path / bad)


def test_sigterm_lets_the_running_request_finish_and_says_so(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "workbench.cli", "serve", str(model), "--port", "0", "--budget", "3 slots"]
    environment = os.environ | {"EMOE_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        url = next(line for line in process.stderr if "Serving" in line).split(" at ")[1].strip()
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE_S)
        stream = client.completions.create(model="model", prompt="Why?", max_tokens=LONG, stream=True)
        chunks = iter(stream)
        next(chunks)
        process.send_signal(signal.SIGTERM)
        reasons = [chunk.choices[0].finish_reason for chunk in chunks]
        assert reasons[-1] in ("stop", "length")
        assert process.wait(PATIENCE_S) == 0
        said = process.stderr.read().splitlines()
        assert said[0].startswith("Stopping: running requests may take 30 s more") and said[-1] == "Stopped."
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_draining_server_refuses_new_requests(model: Path) -> None:
    with serving(model) as service:
        assert service.server.worker.drain(PATIENCE_S)
        with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
            service.complete()
        assert refused.value.status_code == 503 and service.http.get("/readyz").status_code == 503


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral with a sliding window"])
def test_four_requests_at_once_are_answered_as_alone_where_a_batch_cannot_be_shared(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny_moe(tmp_path / "model", family.split()[0], seed=3)
    if "window" in family:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"sliding_window": 16}))
    prompts = ["Why?", "A heron waits at the water", "Two and two make four, they say", "Once"]
    with serving(path) as service:
        alone = [service.complete(prompt, max_tokens=24).choices[0].text for prompt in prompts]
        with ThreadPoolExecutor(4) as clients:
            together = list(clients.map(lambda prompt: service.complete(prompt, max_tokens=24), prompts))
    assert [answer.choices[0].text for answer in together] == alone
    told = [record.getMessage() for record in caplog.records if "one at a time" in record.getMessage()]
    assert len(told) == 1 and "DynamicSlidingWindowLayer" in told[0]
