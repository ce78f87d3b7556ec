"""Write traces of requests to MLflow, where they stand beside the run that they belong to (its tab Traces).

MLflow keeps spans where its global tracking address points, through a tracer that it makes once: both are set to the
store while traces are written, and put back afterwards.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from workbench.tracking.place import SERVER_VARIABLE, store_uri
from workbench.tracking.store_errors import store_errors
from workbench.tracking.traces import Span

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

RUN_OF_TRACE = "mlflow.sourceRun"
BILLION = 1e9


def log_traces(client: MlflowClient, run_id: str, roots: Sequence[Span]) -> list[str]:
    """Write one trace for every root span and return their ids."""
    import mlflow

    experiment = client.get_run(run_id).info.experiment_id
    ids = []
    with _tracing_into_store(), store_errors():
        for root in roots:
            span = mlflow.start_span_no_context(
                root.name,
                span_type=root.kind,
                inputs=root.inputs,
                attributes=root.attributes,
                metadata={RUN_OF_TRACE: run_id},
                experiment_id=experiment,
                start_time_ns=_ns(root.started_s),
            )
            for child in root.children:
                _write(child, span)
            span.end(outputs=root.outputs, end_time_ns=_ns(root.ended_s))
            ids.append(str(span.trace_id))
    return ids


def _write(span: Span, parent: Any) -> None:
    import mlflow

    written = mlflow.start_span_no_context(
        span.name,
        span_type=span.kind,
        parent_span=parent,
        inputs=span.inputs,
        attributes=span.attributes,
        start_time_ns=_ns(span.started_s),
    )
    for child in span.children:
        _write(child, written)
    written.end(outputs=span.outputs, end_time_ns=_ns(span.ended_s))


@contextlib.contextmanager
def _tracing_into_store() -> Iterator[None]:
    import mlflow

    before = mlflow.get_tracking_uri()
    # The address is also set in the environment, where it would outlive this.
    kept = {name: os.environ.get(name) for name in (SERVER_VARIABLE, "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING")}
    # Written when they are logged: a notebook's kernel may end right afterwards.
    os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"
    mlflow.set_tracking_uri(store_uri())
    mlflow.tracing.reset()
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
        mlflow.tracing.reset()
        for name, value in kept.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _ns(moment_s: float) -> int:
    return int(moment_s * BILLION)
