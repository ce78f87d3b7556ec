"""Promises of routing traces: a round trip, figures by hand, and damaged files refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from emoe_core.errors import DataError
from emoe_core.experts.step import StepContext
from emoe_core.experts.trace import RoutingTrace, TraceRecorder
from emoe_core.scheduler import Request


def numbered(number: int, task: str) -> Request:
    request = Request(task, 1)
    request.engine_number = number
    return request


def recorded() -> RoutingTrace:
    """Record a padded prefill of two requests and one decode step: 2 layers, 4 experts, top-2."""
    recorder = TraceRecorder(2, 4)
    real = torch.tensor([False, True, True, True])
    requests = (numbered(5, "qa"), numbered(9, "code"))
    prefill = StepContext(0, requests, 2, True, real)
    chosen = torch.tensor([[3, 3], [0, 1], [0, 2], [0, 1]])
    weight = torch.tensor([[0.5, 0.5], [0.75, 0.25], [0.5, 0.5], [0.5, 0.5]])
    for layer in range(2):
        recorder.layer(layer, chosen, weight, chosen.flip(1) if layer else chosen)
    recorder.end_of_pass(prefill)
    decode = StepContext(1, requests, 1, False)
    for layer in range(2):
        recorder.layer(layer, torch.tensor([[1, 2], [2, 3]]), torch.full((2, 2), 0.5), torch.tensor([[1, 2], [2, 3]]))
    recorder.end_of_pass(decode)
    return recorder.trace()


def test_padding_is_left_out_and_positions_go_on() -> None:
    trace = recorded()
    assert len(trace) == 5
    assert trace.request.tolist() == [5, 9, 9, 5, 9]
    assert trace.position.tolist() == [0, 0, 1, 1, 2]
    assert trace.prefill.tolist() == [True, True, True, False, False]
    assert trace.tasks == {5: "qa", 9: "code"}
    assert trace.chosen[0].tolist() == [[0, 1], [0, 1]]
    assert trace.served[0].tolist() == [[0, 1], [1, 0]]


def test_counts_and_shares_by_hand() -> None:
    trace = recorded()
    assert trace.counts(9).tolist() == [[2, 1, 2, 1]] * 2
    np.testing.assert_allclose(trace.shares()[5], [[0.25, 0.5, 0.25, 0]] * 2)


def test_a_pass_that_not_every_layer_reported_is_forgotten() -> None:
    recorder = TraceRecorder(2, 4)
    step = StepContext(0, (numbered(0, "qa"),), 1, True)
    recorder.layer(0, torch.tensor([[0, 1]]), torch.ones(1, 2), torch.tensor([[0, 1]]))
    recorder.end_of_pass(step)
    recorder.layer(1, torch.tensor([[0, 1]]), torch.ones(1, 2), torch.tensor([[0, 1]]))
    recorder.end_of_pass(step)
    with pytest.raises(DataError, match="run a prompt first"):
        recorder.trace()


def test_a_trace_survives_the_disk(tmp_path: Path) -> None:
    trace = recorded()
    again = RoutingTrace.load(trace.save(tmp_path / "routing.npz"))
    for name in ("request", "position", "prefill", "chosen", "served", "weight"):
        mine, theirs = getattr(trace, name), getattr(again, name)
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    assert (again.tasks, again.experts) == (trace.tasks, trace.experts)


@pytest.mark.parametrize("place", range(0, 1500, 50))
def test_a_damaged_file_is_refused_or_reads_the_same(tmp_path: Path, place: int) -> None:
    path = recorded().save(tmp_path / "routing.npz")
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 0x55
    path.write_bytes(content)
    try:
        again = RoutingTrace.load(path)
    except DataError as error:
        assert "routing.npz" in str(error)
    else:  # The flipped bits lay in a part of the archive that nobody reads, such as a date.
        np.testing.assert_array_equal(again.chosen, recorded().chosen)
        np.testing.assert_array_equal(again.weight, recorded().weight)


def test_truncated_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = recorded().save(tmp_path / "routing.npz")
    path.write_bytes(path.read_bytes()[:-200])
    foreign = tmp_path / "foreign.npz"
    np.savez(foreign, numbers=np.arange(3))
    text = tmp_path / "text.npz"
    text.write_text("not a trace")
    for bad in (path, foreign, text, tmp_path / "absent.npz"):
        with pytest.raises(DataError, match="record it again"):
            RoutingTrace.load(bad)


def test_columns_that_disagree_are_refused(tmp_path: Path) -> None:
    path = recorded().save(tmp_path / "routing.npz")
    with np.load(path) as data:
        columns = dict(data)
    np.savez(path, **(columns | {"position": columns["position"][:-1]}))
    with pytest.raises(DataError, match="disagree"):
        RoutingTrace.load(path)
    np.savez(path, **(columns | {"experts": np.array(2)}))
    with pytest.raises(DataError, match="beyond its 2"):
        RoutingTrace.load(path)
    np.savez(path, **(columns | {"format": np.array(99)}))
    with pytest.raises(DataError, match="format 99"):
        RoutingTrace.load(path)
