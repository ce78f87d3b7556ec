"""Promises of the trained predictor: it starts as frequency, learns what can be learned, and serves one model only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import emoe_core
from emoe_core.errors import DataError, OptionError, PredictorError
from emoe_core.predictor import make_predictor
from emoe_core.predictor.frequency import FrequencyPredictor
from emoe_core.predictor.network import SMOOTHING, NetworkShape, ShareNetwork
from emoe_core.predictor.transformer import PredictorHeader, TransformerPredictor
from workbench.models.reference.tiny import EXPERTS, LAYERS, tiny_moe
from workbench.predictors.training import Example, TrainingOptions, train
from workbench.replay.scoring import score

SMALL = {"width": 16, "depth": 1, "heads": 2, "epochs": 12, "streams": 8, "longest": 24}


def make_prompts(count: int = 24, layers: int = 3, experts: int = 4, seed: int = 0) -> list[Example]:
    """Two tasks, each with experts of its own, and noise."""
    generator = np.random.default_rng(seed)
    liking = {"qa": np.eye(experts)[[0] * layers], "code": np.eye(experts)[[experts - 1] * layers]}
    return [
        (task, liking[task] * 20 + generator.integers(0, 4, size=(layers, experts)))
        for task in [("qa", "code")[place % 2] for place in range(count)]
    ]


def untrained(variant: str, correction: float = 0.0) -> TransformerPredictor:
    torch.manual_seed(0)
    shape = NetworkShape(variant, 3, 4, ("code", "qa"), 16, 1, 2)
    network = ShareNetwork(shape)
    torch.nn.init.normal_(network.output.weight, std=correction)
    return TransformerPredictor(network, PredictorHeader("model", "data", shape))


@pytest.fixture(scope="module", params=["A", "L"])
def trained(request: pytest.FixtureRequest) -> TransformerPredictor:
    return train(make_prompts(), "model", TrainingOptions(variant=request.param, **SMALL))


@pytest.mark.parametrize("variant", ["A", "L"])
def test_untrained_it_is_the_frequency_predictor(variant: str) -> None:
    mine, frequency = untrained(variant), FrequencyPredictor(3, 4)
    for task, counts in make_prompts(7):
        mine.observe(task, counts)
        frequency.observe(task, counts)
    for task in ("qa", "code", "comparison"):
        np.testing.assert_allclose(mine.predict(task), frequency.predict(task), atol=2 * SMOOTHING)


def test_training_lowers_held_out_loss_below_frequency(trained: TransformerPredictor) -> None:
    metrics = trained.header.metrics
    assert metrics["entropy_nats"] < metrics["held_out_loss_nats"] < metrics["base_loss_nats"]


def test_trained_it_knows_the_tasks_before_the_first_prompt(trained: TransformerPredictor) -> None:
    fresh = trained.fresh()
    np.testing.assert_array_equal(fresh.predict("qa").argmax(axis=1), 0)
    np.testing.assert_array_equal(fresh.predict("code").argmax(axis=1), 3)
    np.testing.assert_allclose(fresh.predict("qa").sum(axis=1), 1)


def test_fresh_forgets_what_was_observed(trained: TransformerPredictor) -> None:
    before = trained.fresh().predict("qa")
    used = trained.fresh()
    for prompt in make_prompts(6, seed=5):
        used.observe(*prompt)
    assert not np.allclose(used.predict("qa"), before)
    np.testing.assert_array_equal(used.fresh().predict("qa"), before)


def test_training_follows_its_seed_and_leaves_the_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    options = {**SMALL, "epochs": 2}
    first, second, other = (
        train(make_prompts(), "model", TrainingOptions(seed=seed, **options)).network.state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_training_stops_when_held_out_loss_no_longer_falls() -> None:
    seen: list[tuple[int, int, float]] = []
    options = TrainingOptions(**{**SMALL, "epochs": 40, "patience": 2, "learning_rate": 0.1})
    made = train(make_prompts(), "model", options, lambda *step: seen.append(step))
    assert len(seen) == made.header.metrics["epochs"] < 40
    losses = [loss for _, _, loss in seen]
    assert made.header.metrics["held_out_loss_nats"] == min([made.header.metrics["base_loss_nats"], *losses])


def test_layer_by_layer_sees_only_the_layers_before() -> None:
    network = untrained("L", correction=0.2).network
    features = torch.rand(1, 3, 2 * 3 * 4 + 2)
    features[..., -2:] = 0.5
    base = torch.rand(1, 3, 4).softmax(-1)
    found = network.predict(features, torch.tensor([0]), base)
    changed = base.clone()
    changed[:, 1] = torch.tensor([0.7, 0.1, 0.1, 0.1])
    other = network.predict(features, torch.tensor([0]), changed)
    torch.testing.assert_close(found[:, 0], other[:, 0])
    assert not torch.allclose(found[:, 2], other[:, 2]), "what layer 1 is expected to do reaches layer 2"


def test_as_many_passes_as_layers_are_a_fixed_point() -> None:
    network = untrained("L", correction=0.2).network
    inputs = (torch.rand(2, 3, 2 * 3 * 4 + 2), torch.tensor([0, 1]), torch.rand(2, 3, 4).softmax(-1))
    torch.testing.assert_close(network.predict(*inputs), network.predict(*inputs, passes=6))


def test_a_saved_predictor_reads_back_with_its_header(trained: TransformerPredictor, tmp_path: Path) -> None:
    path = trained.save(tmp_path / "predictors" / "mine.safetensors")
    read = TransformerPredictor.load(path, "model")
    assert read.header == trained.header
    np.testing.assert_array_equal(read.predict("qa"), trained.fresh().predict("qa"))
    assert [item.name for item in path.parent.iterdir()] == [path.name], "nothing unfinished is left"


def test_another_models_predictor_and_damaged_files_are_refused(trained: TransformerPredictor, tmp_path: Path) -> None:
    path = trained.save(tmp_path / "mine.safetensors")
    with pytest.raises(PredictorError, match=r"was trained for model model, this model is other.*emoe predictor train"):
        TransformerPredictor.load(path, "other")
    with pytest.raises(PredictorError, match="no trained predictor at"):
        TransformerPredictor.load(tmp_path / "missing.safetensors")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(PredictorError, match="not a readable predictor"):
        TransformerPredictor.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(PredictorError, match="holds no trained predictor"):
        TransformerPredictor.load(path)


def test_too_little_data_and_bad_options_are_refused() -> None:
    with pytest.raises(DataError, match="code 3"):
        train(make_prompts(7), "model")
    with pytest.raises(OptionError, match="variant"):
        train(make_prompts(), "model", TrainingOptions(variant="E"))
    with pytest.raises(OptionError, match="heads must divide width"):
        train(make_prompts(), "model", TrainingOptions(width=10, heads=4))
    with pytest.raises(OptionError, match="held_out"):
        TrainingOptions(held_out=0)


def test_an_engine_takes_a_trained_predictor_of_its_own_model(tmp_path: Path) -> None:
    folder = tiny_moe(tmp_path / "model", seed=4)
    prompts = make_prompts(16, LAYERS, EXPERTS)
    options = {"budget": "3 slots", "predictor": "transformer", "pack_dir": tmp_path}
    with pytest.raises(PredictorError, match="needs predictor_path"):
        emoe_core.load(folder, **options)
    model_hash = emoe_core.load(folder, pack_dir=tmp_path).index.source_hash
    path = train(prompts, model_hash, TrainingOptions(**{**SMALL, "epochs": 1})).save(tmp_path / "mine.safetensors")
    with emoe_core.load(folder, predictor_path=path, interval=2, **options) as engine:
        assert engine.stats().predictor == "transformer"
        score(engine, [([1, 2, 3], [4])], ["qa"])
        assert not engine.stats().cold_start, "what it knows of the tasks is in its weights"
        assert engine.stats().counters.swaps == 1
    other = train(prompts, "another", TrainingOptions(**{**SMALL, "epochs": 1})).save(tmp_path / "other.safetensors")
    with pytest.raises(PredictorError, match="was trained for model another"):
        emoe_core.load(folder, predictor_path=other, **options)


def test_predictors_are_made_by_name_and_path(trained: TransformerPredictor, tmp_path: Path) -> None:
    path = trained.save(tmp_path / "mine.safetensors")
    assert make_predictor("transformer", 3, 4, path=path, model_hash="model").name == "transformer"
