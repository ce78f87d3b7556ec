"""The prompt stream: deterministic, fair, and sticky when asked."""

from collections import Counter
from dataclasses import replace
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_core.errors import OptionError
from emoe_core.planning.tasks import TASK_TYPES
from workbench.workloads import StreamConfig, load_fixture, prompt_stream, topic_order
from workbench.workloads import stream as stream_module
from workbench.workloads.stream import MIXES, topics

configs = st.builds(
    StreamConfig,
    tasks=st.lists(st.sampled_from(TASK_TYPES), min_size=1, unique=True).map(tuple),
    n_prompts=st.integers(1, 60),
    mix=st.sampled_from(MIXES),
    session_length=st.floats(1, 20),
    seed=st.integers(0, 2**31),
    source=st.just("fixture"),
)


@settings(max_examples=60)
@given(configs)
def test_a_stream_is_decided_by_its_config_alone(config):
    stream = prompt_stream(config)
    assert stream == prompt_stream(config)
    assert [prompt.request_id for prompt in stream] == list(range(config.n_prompts))
    assert [prompt.task for prompt in stream] == topic_order(config)
    assert {prompt.task for prompt in stream} <= set(config.tasks)


@settings(max_examples=60)
@given(configs)
def test_no_prompt_repeats_before_its_task_is_used_up(config):
    per_task = Counter(load_fixture()["task"])
    used: dict[str, list[str]] = {}
    for prompt in prompt_stream(config):
        used.setdefault(prompt.task, []).append(prompt.text)
    for task, texts in used.items():
        for start in range(0, len(texts), per_task[task]):
            dealt = texts[start : start + per_task[task]]
            assert len(set(dealt)) == len(dealt)


def test_prompts_carry_the_items_reference_and_choices():
    items = {item["prompt"]: item for item in load_fixture()}
    for prompt in prompt_stream(StreamConfig(source="fixture", n_prompts=40)):
        item = items[prompt.text]
        assert (prompt.task, prompt.reference, list(prompt.choices)) == (
            item["task"],
            item["reference"],
            item["choices"],
        )


def test_another_seed_gives_another_order():
    streams = [prompt_stream(StreamConfig(source="fixture", seed=seed)) for seed in (1, 2)]
    assert [prompt.text for prompt in streams[0]] != [prompt.text for prompt in streams[1]]


def test_a_tasks_prompts_come_in_the_same_order_whatever_is_mixed_in():
    alone = prompt_stream(StreamConfig(tasks=("qa",), n_prompts=4, source="fixture"))
    mixed = prompt_stream(StreamConfig(tasks=("code", "qa"), n_prompts=60, source="fixture"))
    assert [p.text for p in mixed if p.task == "qa"][:4] == [p.text for p in alone]


def test_the_uniform_mix_gives_every_task_its_share():
    counts = Counter(topic_order(StreamConfig(n_prompts=6000, source="fixture")))
    assert all(abs(counts[task] - 1000) < 150 for task in TASK_TYPES)


@pytest.mark.parametrize("session_length", [1.0, 4.0, 16.0])
def test_sticky_sessions_have_the_mean_length_asked_for_and_change_task(session_length):
    config = StreamConfig(n_prompts=20_000, mix="sticky", session_length=session_length, source="fixture")
    runs = [len(list(run)) for _, run in groupby(topic_order(config))]
    assert sum(runs) / len(runs) == pytest.approx(session_length, rel=0.1)
    assert session_length == 1.0 or max(runs) > 2 * session_length


def test_a_stream_drifts_between_languages_under_one_label_where_the_source_has_them(monkeypatch):
    drift = StreamConfig(n_prompts=2_000, mix="drift")
    assert topics(drift) == (*TASK_TYPES, "classification_de", "classification_es", "classification_pl")
    assert topics(StreamConfig(tasks=("qa", "code"), mix="drift")) == ("qa", "code")
    runs = [len(list(run)) for _, run in groupby(topic_order(drift))]
    assert sum(runs) / len(runs) == pytest.approx(drift.session_length, rel=0.2)
    for plain in (replace(drift, source="fixture"), replace(drift, mix="sticky")):
        assert topics(plain) == TASK_TYPES
        assert topic_order(plain) == topic_order(replace(plain, mix="sticky"))
    row = {"reference": "", "choices": []}
    monkeypatch.setattr(stream_module, "load_task", lambda topic, split, source: [{"prompt": topic, **row}])
    prompts = prompt_stream(replace(drift, n_prompts=1_000))
    assert {prompt.task for prompt in prompts} <= set(TASK_TYPES)
    assert {p.text for p in prompts if p.task == "classification"} > {"classification_de", "classification_pl"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"tasks": ()},
        {"tasks": ("qa", "qa")},
        {"tasks": ("poetry",)},
        {"n_prompts": 0},
        {"mix": "bursty"},
        {"session_length": 0.5},
        {"session_length": float("nan")},
        {"seed": -1},
        {"split": "dev"},
        {"source": "ftp"},
    ],
)
def test_a_config_outside_its_range_is_refused(wrong):
    with pytest.raises(OptionError):
        StreamConfig(**wrong)
