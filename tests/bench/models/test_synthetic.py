"""Synthetic checkpoints: stock-loadable, of the promised shape, resumable, and routed as was recorded."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from made_traces import trace_of
from transformers import AutoModelForCausalLM

from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.errors import DataError, OptionError
from emoe_core.files import SCRATCH
from workbench.models.synthetic import writer
from workbench.models.synthetic.composed_trace import compose, locality
from workbench.models.synthetic.shapes import SHAPES, Shape, find_shape, overridden, scaled
from workbench.models.synthetic.writer import INDEX_FILE, label_of, tensors_of, write_synthetic
from workbench.models.synthetic.written_routing import WrittenRouting
from workbench.replay.recorded_routing import recorded_trace

SMALL = {"layers": 2, "experts": 8, "top_k": 2, "hidden": 64, "intermediate": 32, "vocab": 320}


def small(name: str = "bench") -> Shape:
    return overridden(SHAPES[name], **SMALL)


@pytest.mark.parametrize("name", ["bench", "mixtral-8x7b", "qwen1.5-moe-a2.7b", "qwen3-30b-a3b", "gpt-oss-20b"])
def test_a_synthetic_checkpoint_loads_with_stock_transformers_and_with_emoe(name: str, tmp_path: Path) -> None:
    path = write_synthetic(tmp_path / "made", small(name), name, dtype="float32")
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype="float32", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()
    index = open_checkpoint(path)
    assert (index.layers[0].num_experts, index.top_k) == (8, 2)


def test_every_published_shape_makes_a_model_of_its_size() -> None:
    billions = {"bench": 1.66, "olmoe-1b-7b": 6.9, "mixtral-8x7b": 46.7, "qwen1.5-moe-a2.7b": 14.3}
    billions |= {"qwen2-57b-a14b": 57.4, "deepseek-v2-lite": 15.7, "gpt-oss-20b": 20.9}
    for name, expected in billions.items():
        values = sum(tensor.values for tensor in tensors_of(SHAPES[name]))
        assert values / 1e9 == pytest.approx(expected, rel=0.02), name


def test_scale_is_the_share_of_the_bytes_and_leaves_routing_as_published() -> None:
    whole, quarter = SHAPES["olmoe-1b-7b"], scaled(SHAPES["olmoe-1b-7b"], 0.25)
    values = [sum(tensor.values for tensor in tensors_of(shape)) for shape in (whole, quarter)]
    assert values[1] / values[0] == pytest.approx(0.25, rel=0.03)
    assert (quarter.layers, quarter.experts, quarter.top_k) == (16, 64, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: find_shape("olmo"), "unknown shape 'olmo': choose one of bench"),
        (lambda: scaled(SHAPES["bench"], 0), "scale is 0"),
        (lambda: scaled(SHAPES["bench"], 1.5), "at most 1"),
        (lambda: overridden(SHAPES["bench"], layers=0), "--layers 0"),
        (lambda: overridden(SHAPES["bench"], top_k=65), "top-k 65 is more than 64 experts"),
        (lambda: overridden(SHAPES["bench"], vocab=100), "--vocab 259"),
        (lambda: overridden(SHAPES["bench"], hidden=7), "cannot be cut into heads"),
    ],
)
def test_impossible_shapes_are_refused(make: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()  # type: ignore[operator]


def test_an_interrupted_write_cannot_be_loaded_and_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_synthetic(tmp_path / "whole", small(), "x", shard_bytes=50_000)
    names = sorted(file.name for file in whole.glob("*.safetensors"))
    assert len(names) > 3

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        write_synthetic(cut, small(), "x", shard_bytes=50_000, progress=stop)
    assert not (cut / INDEX_FILE).exists() and not (cut / "config.json").exists()
    kept = {file.name: file.stat().st_mtime_ns for file in cut.glob("*.safetensors")}
    assert 0 < len(kept) < len(names)
    (cut / f"{SCRATCH}of-a-killed-process").mkdir()
    write_synthetic(cut, small(), "x", shard_bytes=50_000)
    assert [(cut / name).read_bytes() for name in names] == [(whole / name).read_bytes() for name in names]
    assert all((cut / name).stat().st_mtime_ns == moment for name, moment in kept.items())
    assert {file.name for file in cut.iterdir()} == {file.name for file in whole.iterdir()}
    together = write_synthetic(tmp_path / "together", small(), "x", shard_bytes=50_000, jobs=4)
    assert [(together / name).read_bytes() for name in names] == [(whole / name).read_bytes() for name in names]


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    path = write_synthetic(tmp_path / "made", small(), "x")
    with pytest.raises(OptionError, match="another synthetic checkpoint"):
        write_synthetic(path, small(), "x", seed=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    with pytest.raises(OptionError, match="not empty"):
        write_synthetic(tmp_path / "full", small(), "x")


def test_a_full_disk_is_named_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(DataError, match=r"needs [\d,]+ more bytes.* short.*--scale"):
        write_synthetic(tmp_path / "made", small(), "x")
    assert list((tmp_path / "made").glob("*.safetensors*")) == []


def test_the_card_says_that_weights_are_random(tmp_path: Path) -> None:
    path = write_synthetic(tmp_path / "made", small(), "bench, cut")
    assert (path / "README.md").read_text().startswith("# RANDOM WEIGHTS: bench, cut")
    label = label_of(path)
    assert label is not None and label["random_weights"] and label["routing"] == {"kind": "random routers"}
    assert label_of(tmp_path) is None


@pytest.mark.parametrize("name", ["bench", "mixtral-8x7b", "qwen1.5-moe-a2.7b"])
def test_stock_transformers_follows_the_routing_that_was_written(name: str, tmp_path: Path) -> None:
    trace = trace_of(300, 2, 8, 2)
    path = write_synthetic(tmp_path / "made", small(name), name, trace=trace, trace_source="a test")
    model = AutoModelForCausalLM.from_pretrained(path, dtype="bfloat16").eval()
    with torch.no_grad():
        output = model(input_ids=torch.arange(100, 200)[None], output_router_logits=True)
    for layer, logits in enumerate(output.router_logits):
        found = logits.float().topk(2).indices.sort().values.numpy()
        assert (found == np.sort(trace.chosen[100:200, layer].astype(int), axis=1)).all(), layer
    label = json.loads((path / "synthetic.json").read_text())
    assert label["routing"]["agreement"] == 1.0 and label["routing"]["source"] == "a test"


def test_more_experts_than_axes_follow_the_routing_far_above_chance_and_say_how_far() -> None:
    written = WrittenRouting(trace_of(64, 24, 64, 4), hidden=1024, vocab=64)
    assert not written.exact_directions
    assert 10 * 4 / 64 < written.agreement() < 1.0


def test_a_trace_that_does_not_fit_the_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="compose it first"):
        write_synthetic(tmp_path / "made", small(), "x", trace=trace_of(40, 3, 8, 2))


def test_composing_for_the_same_experts_replays_the_recording() -> None:
    trace = trace_of(80, 4, 8, 2)
    composed = compose(trace, 3, 8, 2)
    assert (np.sort(composed.chosen, axis=2) == np.sort(trace.chosen[:, :3], axis=2)).all()


def test_composing_for_more_experts_keeps_locality() -> None:
    trace = trace_of(2000, 6, 8, 2, stay=0.6)
    composed = compose(trace, 4, 64, 8)
    assert composed.chosen.shape == (2000, 4, 8) and composed.experts == 64
    assert all(len(set(row)) == 8 for row in composed.chosen[:, 0].tolist())
    before, after = locality(trace), locality(composed)
    assert after.even_rate == 0.125
    # What is above chance stays above chance, by a similar share of what is left.
    kept = [(found.repeat_rate - found.even_rate) / (1 - found.even_rate) for found in (before, after)]
    assert kept[1] == pytest.approx(kept[0], abs=0.15)


def test_a_recording_that_chooses_too_few_is_refused() -> None:
    with pytest.raises(OptionError, match="too few to fill top-4 of 8"):
        compose(trace_of(10, 2, 8, 2), 2, 8, 4)


def test_an_unknown_source_of_routing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no routing named 'nowhere'"):
        recorded_trace("nowhere")
    trace, name = recorded_trace(str(trace_of(12, 2, 8, 2).save(tmp_path / "mine.npz")))
    assert len(trace) == 12 and name == "the trace mine.npz"


def test_shapes_of_all_families_are_distinct_models() -> None:
    assert len({json.dumps(shape.config().to_dict(), default=str, sort_keys=True) for shape in SHAPES.values()}) == len(
        SHAPES
    )
