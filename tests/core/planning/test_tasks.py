"""Task profiles: file format, refusals."""

import json
import math
import subprocess
import sys

import pytest

from emoe_core.planning.tasks import Profile, ProfileError, TaskProfile


def make_profile() -> Profile:
    qa = TaskProfile(
        "qa",
        (False, False, True, True),
        12.5,
        length_quantiles_tokens=(1.0, 4.0, 9.0, 16.0, 32.0),
        depths=(1, 2, 4),
        similarities=(0.99, 0.9, 0.4),
        similarity_intervals=((0.98, 1.0), (0.8, 0.95), (0.3, 0.5)),
        layer_kl_nats=(0.01, 0.02, 0.3, 0.1),
        n_prompts=30,
    )
    code = TaskProfile("code", (True, True, True, False), expected_output_tokens=80)
    return Profile("model-hash", "data-hash", 4, {"qa": qa, "code": code})


def test_a_saved_profile_is_read_back_equal(tmp_path):
    path = make_profile().save(tmp_path / "sub" / "profile.json")
    assert Profile.load(path, model_hash="model-hash") == make_profile()
    assert [entry.name for entry in path.parent.iterdir()] == ["profile.json"]


@pytest.mark.parametrize("task", ["unknown", "summarization", "no such task"])
def test_a_task_without_evidence_is_sensitive_in_every_layer(task):
    assert all(make_profile().sensitive(task, layer) for layer in range(4))


def test_sensitivity_and_output_length_follow_the_profile():
    profile = make_profile()
    assert [profile.sensitive("qa", layer) for layer in range(4)] == [False, False, True, True]
    assert profile.expected_output_tokens("qa", default=1.0) == 12.5
    assert profile.expected_output_tokens("unknown", default=64.0) == 64.0


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_outside_the_model_is_refused(layer):
    with pytest.raises(ProfileError, match="layer"):
        make_profile().sensitive("qa", layer)


def test_a_profile_of_another_model_is_refused(tmp_path):
    path = make_profile().save(tmp_path / "profile.json")
    with pytest.raises(ProfileError, match="measured on model"):
        Profile.load(path, model_hash="another")


def test_damaged_profile_files_are_refused(tmp_path):
    path = tmp_path / "profile.json"
    with pytest.raises(ProfileError, match="no task profile"):
        Profile.load(path)
    make_profile().save(path)
    intact = path.read_text(encoding="utf-8")
    content = json.loads(intact)
    without_tasks = {key: value for key, value in content.items() if key != "tasks"}
    extra = {**content, "surprise": 1}
    for text in (
        intact[:-20],
        "[]",
        "{}",
        json.dumps({**content, "format": 99}),
        *map(json.dumps, (without_tasks, extra)),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ProfileError):
            Profile.load(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TaskProfile("poetry", (True,), 1.0),
        lambda: TaskProfile("qa", (), 1.0),
        lambda: TaskProfile("qa", (True,), math.nan),
        lambda: TaskProfile("qa", (True,), -1.0),
        lambda: TaskProfile("qa", (True, True), 1.0, similarities=(0.5,)),
        lambda: Profile("m", "d", 3, {"qa": TaskProfile("qa", (True,), 1.0)}),
        lambda: Profile("m", "d", 1, {"code": TaskProfile("qa", (True,), 1.0)}),
    ],
)
def test_an_inconsistent_profile_cannot_be_made(make):
    with pytest.raises(ProfileError):
        make()


def test_task_types_do_not_pull_in_the_bench():
    bench = ("workbench", "mlflow", "matplotlib")
    code = f"import sys, emoe_core.planning.tasks; print([name for name in {bench} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
