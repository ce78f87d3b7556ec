"""Traces of requests: from an engine's timeline, a tree of spans for each request.

    with engine.timeline() as timeline:
        answer = engine.generate([prompt])[0]
    run.log_traces(request_spans(timeline, {answer.request: {"prompt": prompt}}, {answer.request: answer.text}))

A request has the spans *prediction* (and planning), *swap* (of residents), *prefill* and *decode*, the latter with one
span a token. Loads of experts are spans under what asked for them, one a layer and, within a token, one in all; their
readers work in the background, so they may last longer than what is above them. ``compute_s`` of a pass is its time
less what it waited for experts. A batch runs as one: each of its requests gets the same spans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from emoe_core.timeline import Event, Timeline


@dataclass
class Span:
    """A piece of a request's time, moments in seconds since 1970. ``kind`` is MLflow's type of the span."""

    name: str
    kind: str
    started_s: float
    ended_s: float
    attributes: dict[str, Any] = field(default_factory=dict)
    children: list[Span] = field(default_factory=list)
    inputs: Any = None
    outputs: Any = None

    def walk(self) -> Iterable[Span]:
        """Yield this span and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()


def request_spans(
    timeline: Timeline, inputs: Mapping[int, Any] | None = None, outputs: Mapping[int, Any] | None = None
) -> list[Span]:
    """Return the root span of every request that ended while a timeline was recorded.

    Parameters
    ----------
    timeline : Timeline
        Of `Engine.timeline`.
    inputs, outputs : mapping, optional
        What to show of a request, by its number: for example its prompt and its answer.
    """
    return [
        _request(timeline, event, (inputs or {}).get(number), (outputs or {}).get(number))
        for event in timeline.of("request")
        for number in (event.details["request"],)
    ]


def _request(timeline: Timeline, request: Event, inputs: Any, outputs: Any) -> Span:
    number, early = request.details["request"], timeline.epoch_s
    inside = [event for event in timeline.events if _within(event, request)]
    passes = [event for event in inside if event.kind == "pass" and number in event.details["requests"]]
    stalls = [event for event in inside if event.kind == "stall"]
    loads = [event for event in timeline.of("load") if request.started_s <= event.details["asked_s"] <= request.ended_s]
    root = Span("request", "CHAIN", request.started_s + early, request.ended_s + early, inputs=inputs, outputs=outputs)
    for event in inside:
        if event.kind == "prediction":
            root.children.append(_plain("prediction", "RETRIEVER", event, early, event.details))
        elif event.kind == "swap":
            span = _plain("swap", "TASK", event, early, event.details)
            span.children = _by_layer(_asked_in(loads, event), early)
            root.children.append(span)
    prefills = [event for event in passes if event.details["prefill"]]
    tokens = [event for event in passes if not event.details["prefill"]]
    for event in prefills:
        root.children.append(_pass("prefill", event, stalls, loads, early, _by_layer))
    if tokens:
        decode = Span("decode", "CHAIN", tokens[0].started_s + early, tokens[-1].ended_s + early)
        for place, event in enumerate(tokens, start=2):
            decode.children.append(_pass(f"token {place}", event, stalls, loads, early, _together))
        decode.attributes = _sums(decode.children) | {"tokens": len(tokens)}
        root.children.append(decode)
    root.children.sort(key=lambda span: span.started_s)
    stages = [span for span in root.children if span.name in ("prefill", "decode")]
    root.attributes = {
        **request.details,
        **_sums(stages),
        "prediction_s": sum(event.seconds for event in inside if event.kind == "prediction"),
        "loads": len(loads),
        "bytes_loaded": sum(event.details["bytes"] for event in loads),
    }
    return root


def _within(event: Event, request: Event) -> bool:
    return request.started_s <= event.started_s and event.ended_s <= request.ended_s


def _asked_in(loads: list[Event], event: Event) -> list[Event]:
    return [load for load in loads if event.started_s <= load.details["asked_s"] <= event.ended_s]


def _plain(name: str, kind: str, event: Event, early: float, attributes: Mapping[str, Any]) -> Span:
    return Span(name, kind, event.started_s + early, event.ended_s + early, dict(attributes))


def _pass(
    name: str,
    event: Event,
    stalls: list[Event],
    loads: list[Event],
    early: float,
    below: Callable[[list[Event], float], list[Span]],
) -> Span:
    asked = _asked_in(loads, event)
    waited_s = sum(stall.seconds for stall in stalls if _within(stall, event))
    told = {
        "tokens": event.details["tokens"],
        "compute_s": event.seconds - waited_s,
        "stall_s": waited_s,
        "loads": len(asked),
        "bytes_loaded": sum(load.details["bytes"] for load in asked),
    }
    span = _plain(name, "LLM", event, early, told)
    span.children = below(asked, early)
    return span


def _by_layer(loads: list[Event], early: float) -> list[Span]:
    layers = sorted({load.details["layer"] for load in loads})
    return [
        _load(f"load, layer {layer}", [load for load in loads if load.details["layer"] == layer], early)
        for layer in layers
    ]


def _together(loads: list[Event], early: float) -> list[Span]:
    return [_load("load", loads, early)] if loads else []


def _load(name: str, loads: list[Event], early: float) -> Span:
    ordered = sorted(loads, key=lambda load: (load.details["layer"], load.details["expert"]))
    told = {
        "experts": [f"{load.details['layer']}:{load.details['expert']}" for load in ordered],
        "bytes_loaded": sum(load.details["bytes"] for load in loads),
        "reading_s": sum(load.seconds for load in loads),
    }
    started, ended = min(load.started_s for load in loads), max(load.ended_s for load in loads)
    return Span(name, "TOOL", started + early, ended + early, told)


def _sums(spans: list[Span]) -> dict[str, float]:
    return {name: sum(span.attributes[name] for span in spans) for name in ("compute_s", "stall_s")}
