"""Records, templates, splits and the readers of the embedded sources."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe_core.errors import DataError
from emoe_core.planning.tasks import TASK_TYPES
from workbench.workloads import load_fixture
from workbench.workloads.embedded import LANGUAGES, MEMBERS, READERS
from workbench.workloads.records import MAX_WORDS, TEMPLATES, Record, cut_lines, cut_words, render, task_of
from workbench.workloads.split import SPLITS, choose, item_id, split_of


def make_records(n: int, group_size: int = 1) -> list[tuple[Record, str]]:
    records = []
    for number in range(n):
        fields = {"passage": f"Passage {number}.", "question": "Why?"}
        record = Record(fields, f"answer {number}", group=f"group {number // group_size}", unit=f"unit {number}")
        records.append((record, render("qa", record)))
    return records


def test_every_task_type_has_a_template_and_a_source():
    assert set(TEMPLATES) == set(READERS) == set(TASK_TYPES) == set(MEMBERS) - set(LANGUAGES)
    assert {task_of(topic) for topic in MEMBERS} == set(TASK_TYPES) and LANGUAGES


@given(st.text(max_size=400), st.integers(1, 40))
def test_a_cut_text_is_a_prefix_of_at_most_the_limit_in_words(text, limit):
    cut = cut_words(text, limit).split()
    assert cut == text.split()[:limit]


@given(st.lists(st.text("ab ", max_size=30), min_size=1, max_size=12), st.integers(1, 30), st.booleans())
def test_cut_lines_keeps_whole_lines_within_the_limit(lines, limit, keep_end):
    text = "\n".join(lines).strip("\n")
    kept = cut_lines(text, limit, keep_end)
    assert text.endswith(kept) if keep_end else text.startswith(kept)
    assert "\n" not in kept or len(kept.split()) <= limit
    assert set(kept.split("\n")) <= set(text.split("\n"))


def test_a_dialogue_is_cut_from_its_start_and_a_function_from_its_end():
    turns = "\n".join(f"A: turn {number} " + "word " * 30 for number in range(12))
    prompt = render("conversation", Record({"turns": turns}, "r", "g", "u"))
    assert "turn 11" in prompt and "turn 0 " not in prompt
    function = "\n".join(f"line {number} " + "word " * 30 for number in range(20))
    prompt = render("code", Record({"function": function}, "r", "g", "u"))
    assert "line 0" in prompt and "line 19" not in prompt


def test_curly_braces_in_the_data_survive_the_template():
    record = Record({"function": 'def f():\n    """{x} {0}"""'}, "r", "g", "u")
    assert '"""{x} {0}"""' in render("code", record)


def test_a_record_that_lacks_a_field_is_refused():
    with pytest.raises(DataError, match="question"):
        render("qa", Record({"passage": "p"}, "r", "g", "u"))
    with pytest.raises(DataError, match="unknown task"):
        render("poetry", Record({}, "r", "g", "u"))


def test_splits_do_not_depend_on_the_order_of_reading():
    items = make_records(300)
    assert choose("qa", items) == choose("qa", list(reversed(items)))


def test_another_seed_gives_other_splits():
    items = make_records(300)
    assert choose("qa", items, seed=1) != choose("qa", items, seed=2)


@given(st.integers(1, 30), st.integers(0, 2**32))
def test_no_group_is_in_two_splits(group_size, seed):
    chosen = choose("qa", make_records(120, group_size), seed=seed)
    groups = [{record.group for record, _ in chosen[name]} for name in SPLITS]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert sum(len(chosen[name]) for name in SPLITS) == 120


def test_splits_are_capped_and_hold_one_item_a_unit():
    record, prompt = make_records(1)[0]
    same_unit = [(Record(record.fields, f"answer {n}", "g", "unit"), f"{prompt} {n}") for n in range(20)]
    assert sum(map(len, choose("qa", same_unit).values())) == 1
    same_prompt = [(Record(record.fields, "answer", f"g{n}", f"u{n}"), prompt) for n in range(20)]
    assert sum(map(len, choose("qa", same_prompt).values())) == 1
    assert max(map(len, choose("qa", make_records(300), max_items=50).values())) == 50


def test_split_and_identifier_are_the_same_in_every_process():
    # Fixed values: a change here silently moves items between profile, train and test.
    assert [split_of("qa", group) for group in ("a", "b", "c", "d")] == ["profile", "train", "train", "train"]
    assert item_id("qa", "prompt", "reference") == "qa-5a3c6c4b24d86f27"


def test_questions_whose_answer_is_cut_away_are_left_out():
    context = " ".join(f"w{number}" for number in range(MAX_WORDS["passage"] + 40))
    near, far = "w3 w4", f"w{MAX_WORDS['passage'] + 10}"
    qas = [{"question": f"Where is {a}? ", "answers": [{"text": a}]} for a in (near, far)]
    rows = [{"title": "T", "paragraphs": [{"context": context, "qas": qas}]}]
    (record,) = READERS["qa"](rows)
    assert (record.reference, record.fields["question"], record.group) == (near, f"Where is {near}?", "T")


def test_dialogues_make_the_replying_speaker_b():
    said = 'agent_B: "Hi" agent_A: "Hello: "you" there"  agent_B: "Do you ski? "'
    (record,) = READERS["conversation"]([{"input": said, "target": '"I do. "', "comment": "c1"}])
    assert record.fields["turns"] == 'A: Hi\nB: Hello: "you" there\nA: Do you ski?'
    assert (record.reference, record.group) == ("I do.", "c1")
    assert list(READERS["conversation"]([{"input": 'agent_A: "Hi"', "target": '"x"', "comment": "c"}])) == []


def test_claims_are_split_from_their_passage_and_cleaned():
    text = "Film -LRB- 2016 -RRB- : It ran in 9.8\ufffdmillion homes , and critics did n't mind it at all ."
    scores = {"True": 0, "False": 1, "Neither": 0}
    (record,) = READERS["comparison"](
        [{"input": f"{text}\nClaim: The film 's run was short .", "target_scores": scores}]
    )
    assert record.fields["passage"].startswith("Film (2016): It ran in 9.8 million homes, and critics didn't mind")
    assert record.fields["claim"] == "The film's run was short."
    assert (record.reference, record.choices) == ("False", ("True", "False", "Neither"))


def test_sentiment_labels_are_the_highest_score_and_extreme_lengths_are_left_out():
    def row(n_words: int) -> dict:
        return {
            "input": "word " * n_words,
            "target_scores": {"ambivalent": 0, "positive": 0, "negative": 1, "neutral": 0},
        }

    (record,) = READERS["classification"]([row(3), row(60), row(900)])
    assert record.reference == "negative"
    assert "positive, negative, neutral or ambivalent" in render("classification", record)


def test_the_fixture_holds_twenty_different_items_made_by_the_templates():
    items = list(load_fixture())
    assert len(items) == 20 and len({item["id"] for item in items}) == 20
    for item in items:
        assert item["id"] == item_id(item["task"], item["prompt"], item["reference"])
        instruction = TEMPLATES[item["task"]].split("\n")[0].split("{")[0]
        assert item["prompt"].startswith(instruction)
        assert bool(item["choices"]) == (item["task"] in ("classification", "comparison"))
        assert not item["choices"] or item["reference"] in item["choices"]
        assert item["task"] != "qa" or item["reference"] in item["prompt"]


def test_the_code_of_the_fixture_does_what_its_examples_say():
    import doctest

    for item in load_fixture():
        if item["task"] == "code":
            function = item["prompt"].split("```python\n")[1].removesuffix("\n```")
            names: dict = {}
            exec(f"{function}\n{item['reference']}\n", names)
            (test,) = [
                t for t in doctest.DocTestFinder().find(names[function.split("(")[0][4:]], globs=names) if t.examples
            ]
            assert doctest.DocTestRunner().run(test).failed == 0
