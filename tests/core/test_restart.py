"""Promises of restarting an engine: it begins as a fresh load would, and refuses what needs one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import emoe_core
from emoe_core.errors import IntegrationError, OptionError
from workbench.models.reference.tiny import tiny_moe

PROMPTS = ["What is a heron?", "Name three rivers.", "Count to five."]
TASKS = ["qa", "qa", "summary"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("restart"), family="mixtral", seed=9)


def served(engine: emoe_core.Engine) -> tuple[list[tuple[int, ...]], dict[str, object]]:
    """Answer the prompts; return the tokens and every figure that is not a time."""
    answers = engine.generate(PROMPTS, TASKS, max_new_tokens=6)
    figures = {name: value for name, value in engine.stats().to_dict().items() if not name.endswith("_s")}
    return [answer.token_ids for answer in answers], figures


@pytest.mark.parametrize("policy", ["lru", "decayed_demand"])
def test_a_restarted_engine_serves_as_a_freshly_loaded_one(model: Path, tmp_path: Path, policy: str) -> None:
    options = {"budget": "3 slots", "pack_dir": tmp_path, "policy": policy, "record": True}
    changed = {"tolerance": 1.0, "interval": 2, "replan": "interval"}
    with emoe_core.load(model, **options, **changed) as fresh:
        expected, routing = served(fresh), fresh.trace()
    with emoe_core.load(model, **options) as engine:
        served(engine)
        with torch.no_grad():
            engine.model(input_ids=torch.tensor([[5, 80, 9]]))
        engine.restart(**changed)
        assert engine.stats().resident_experts == 0
        assert served(engine) == expected
        assert (engine.trace().served == routing.served).all()
        assert (engine.trace().outcome == routing.outcome).all()


def test_what_needs_a_new_load_or_is_out_of_range_is_refused_and_changes_nothing(model: Path, tmp_path: Path) -> None:
    with emoe_core.load(model, budget="3 slots", pack_dir=tmp_path) as engine:
        served(engine)
        before = engine.stats()
        with pytest.raises(OptionError, match="budget needs a new load; restart changes tolerance"):
            engine.restart(budget="100%")
        with pytest.raises(OptionError, match=r"must lie in \[0, 1\]"):
            engine.restart(tolerance=2.0)
        requests = engine.admit(["qa"], [3])
        with pytest.raises(IntegrationError, match="finish them first"):
            engine.restart(tolerance=1.0)
        engine.finish(requests)
        assert engine.stats().counters == before.counters
        assert engine.tolerance == 0.0
