"""Promises of `emoe serve` when something breaks: one request fails at most, says why, and the server goes on."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import torch
from server_bench import LONG, PATIENCE_S, Service, serving

from workbench.models.reference.tiny import tiny_moe
from workbench.serving.server.limits import ServerLimits

OTHER = "A heron waits at the water, and nobody knows why it does"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("faults") / "model", "mixtral", seed=3)


def test_a_truncated_pack_fails_one_request_and_the_server_goes_on(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", "mixtral", seed=3)
    with serving(path, predictor=None) as service:
        (pack,) = (tmp_path / "packs").iterdir()
        whole = pack.read_bytes()
        expected = service.complete().choices[0].text
        os.truncate(pack, 4096)
        with pytest.raises(openai.InternalServerError, match="this request failed"):
            service.complete("A heron waits at the water, and nobody knows why it does")
        pack.write_bytes(whole)
        assert service.complete().choices[0].text == expected
        assert service.metric("emoe_requests_total", result="failed") == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a file whose reads fail is Linux's /proc/self/mem")
def test_a_disk_that_cannot_be_read_fails_one_request_and_the_server_goes_on(model: Path) -> None:
    with serving(model, predictor=None) as service:
        expected = service.complete().choices[0].text
        with unreadable(service.engine.loader.storage._file.fileno()):
            with pytest.raises(openai.InternalServerError, match="this request failed"):
                service.complete(OTHER)
            # Who needs nothing from the disk is served meanwhile.
            assert service.http.get("/readyz").status_code == 200
        assert service.complete().choices[0].text == expected
        assert service.metric("emoe_requests_total", result="failed") == 1


@contextmanager
def unreadable(descriptor: int) -> Iterator[None]:
    """Put a file in an open one's place that the kernel refuses to read: memory that nobody has mapped."""
    kept, broken = os.dup(descriptor), os.open("/proc/self/mem", os.O_RDONLY)
    try:
        with pytest.raises(OSError):
            os.pread(broken, 4096, 4096)
        os.dup2(broken, descriptor)
        yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
        os.close(broken)


def test_memory_that_runs_out_in_one_request_ends_it_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The victim's passes ask the allocator for more than there is; it runs beside another request, which finishes."""
    with serving(model, predictor=None) as service:
        service.server.worker._loop._stops = frozenset()
        passes, lease = service.engine.passes, service.engine.loader.lease
        stream = iter(service.complete(stream=True, max_tokens=LONG))
        next(stream)
        victim = service.engine.control.admitted

        def greedy(layer: int, experts: list[int]) -> object:
            assert passes.step is not None
            if victim in passes.step.numbers and not passes.step.is_prefill:
                torch.empty(2**50, dtype=torch.uint8)
            return lease(layer, experts)

        monkeypatch.setattr(service.engine.loader, "lease", greedy)
        with pytest.raises(openai.InternalServerError, match="ran out of memory") as failed:
            service.complete(OTHER)
        assert failed.value.code == "out_of_memory"
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        assert service.complete().choices


def test_a_client_that_does_not_read_holds_up_nobody(model: Path) -> None:
    with serving(model) as service, connected(service) as slow:
        service.server.worker._loop._stops = frozenset()
        slow.sendall(post({"model": "tiny", "prompt": "x", "max_tokens": LONG, "stream": True}))
        whole = [service.complete(max_tokens=8).choices[0].text for _ in range(3)]
        service.wait_until_free()
        assert len(set(whole)) == 1 and service.metric("emoe_requests_total", result="finished") == 4
        # What was made for it waits for it.
        received = b""
        while b"data: [DONE]" not in received:
            received += slow.recv(65536)
        assert received.count(b"data: {") >= 1 and b'"finish_reason": "length"' in received


def test_a_client_that_does_not_send_its_request_is_given_up(model: Path) -> None:
    with serving(model, ServerLimits(body_timeout_s=2.0)) as service, connected(service) as slow:
        slow.sendall(post({"model": "tiny", "prompt": "x"})[:-4])
        assert service.complete().choices
        received = b""
        while part := slow.recv(65536):
            received += part
        assert b" 408 " in received.splitlines()[0] and b"nothing came for" in received


@contextmanager
def connected(service: Service) -> Iterator[socket.socket]:
    """Connect with a receive buffer as small as the system allows."""
    with socket.socket() as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        plain.settimeout(PATIENCE_S)
        plain.connect(("127.0.0.1", int(service.url.rpartition(":")[2])))
        yield plain


def post(body: dict[str, object]) -> bytes:
    content = json.dumps(body).encode()
    return f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
