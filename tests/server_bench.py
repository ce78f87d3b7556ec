"""A server of a tiny model for tests: in a thread of this process, asked over real sockets on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

import emoe_core
from emoe_core.scheduler import BatchLimits, make_scheduler
from workbench.serving.server.limits import ServerLimits
from workbench.serving.server.listen import EmoeServer

PATIENCE_S = 120.0
LONG = 400
HELLO: list[Any] = [{"role": "user", "content": "Is the sky blue?"}]


class Service:
    """A server in a thread of this process, and a client of it."""

    def __init__(self, engine: emoe_core.Engine, limits: ServerLimits, api_key: str | None) -> None:
        self.engine = engine
        self._listening = threading.Event()
        self.server = EmoeServer(
            engine,
            make_scheduler("fcfs", None),
            limits,
            BatchLimits(limits.max_batch, 8192),
            "tiny",
            port=0,
            api_key=api_key,
            on_listening=self._listen,
        )
        self.thread = threading.Thread(target=self.server.run_until_stopped)
        self.thread.start()
        assert self._listening.wait(PATIENCE_S)
        key = api_key or "none"
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_S, headers={"authorization": f"Bearer {key}"})
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S)

    def _listen(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._listening.set()

    def metric(self, name: str, **labels: str) -> float:
        for family in text_string_to_metric_families(self.http.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return sample.value
        raise AssertionError(f"no sample {name} {labels}")

    def complete(self, prompt: str = "Why?", **options: object) -> openai.types.Completion:
        return self.client.completions.create(model="tiny", prompt=prompt, **({"max_tokens": 8} | options))

    def wait_until_free(self) -> None:
        changed = self.server.worker._changed
        with changed:
            assert changed.wait_for(lambda: not self.server.worker._accepted, PATIENCE_S)

    def close(self) -> None:
        self.client.close()
        self.http.close()
        self.server.should_exit = True
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()


@contextmanager
def serving(
    model: Path, limits: ServerLimits | None = None, api_key: str | None = None, **options: object
) -> Iterator[Service]:
    with emoe_core.load(model, pack_dir=model.parent / "packs", **({"budget": "3 slots"} | options)) as engine:
        # Answers of any wanted length: nothing ends them but the limit.
        service = Service(engine, limits or ServerLimits(), api_key)
        try:
            yield service
        finally:
            service.close()


def post(service: Service, **fields: Any) -> Any:
    """Send a completion, or a chat where there are messages."""
    path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
    prompt = {} if "messages" in fields else {"prompt": "x"}
    return service.http.post(path, json={"model": "tiny", "max_tokens": 4} | prompt | fields)


def said(service: Service, text: str, tokens: int = 4, **options: Any) -> str:
    """Return the answer to a text as it stands."""
    return str(service.complete(text, max_tokens=tokens, **options).choices[0].text)
