"""What is written as a number, a switch or a date in a sweep file is what a reader takes it for."""

from __future__ import annotations

import json
import math
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from emoe_core.errors import ExperimentError
from workbench.sweep.file import read_sweep
from workbench.sweep.points import Point, plan_stages
from workbench.sweep.yaml_file import read_yaml
from workbench.tracking.place import HOME_VARIABLE

PARAMETERS = "rate: float = 0.1\ncount: int = 1\nname: str = 'a'\nswitch: bool = False\nboth: int | str = 'x'\n"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": PARAMETERS, "outputs": []}
    content = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "n.ipynb").write_text(json.dumps(content))
    return tmp_path


def points(project: Path, entries: str) -> list[Point]:
    path = project / "sweep.yaml"
    path.write_text(f"name: s\nnotebook: n.ipynb\nkind: quality\n{entries}\n")
    return [point for plan in plan_stages(read_sweep(path)) for point in plan.points]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-3", 0.001), ("1E-3", 0.001), ("1e3", 1000.0), ("1.e2", 100.0), (".5", 0.5), ("-.5e+1", -5.0)),
        *(("5.", 5.0), ("+1.5", 1.5), ("1_000", 1000), ("1_000.5", 1000.5), ("08", 8), ("010", 10), ("-7", -7)),
        *(
            ("0x1F", 31),
            ("0o17", 15),
            (".inf", math.inf),
            ("-.inf", -math.inf),
            ("~", None),
            ("null", None),
            ("", None),
        ),
        *(("true", True), ("False", False), ("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("y", "y")),
        *(("2024-01-31", "2024-01-31"), ("1:30", "1:30"), ("12:30:45", "12:30:45"), ("e3", "e3"), ("1e", "1e")),
        *(("_1", "_1"), ("1-3", "1-3"), ("0b1", "0b1"), ("inf", "inf"), (".", "."), ("'1e-3'", "1e-3"), ('"08"', "08")),
    ],
)
def test_plain_scalars_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: Any) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"x: {text}\n")
    found = read_yaml(path)["x"]
    assert found == value and type(found) is type(value)


def test_not_a_number_is_a_number_and_keys_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("on: .nan\nbase: &base {a: 1}\nmore: {<<: *base, b: 2}\n")
    content = read_yaml(path)
    assert math.isnan(content["on"]) and content["more"] == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        *(("rate: 1e-3", 0.001), ("rate: 1e3", 1000.0), ("rate: 08", 8)),
        *(("count: 1e3", 1000), ("count: 1_000", 1000), ("count: 08", 8), ("count: 4.0", 4)),
        *(("switch: yes", True), ("switch: off", False), ("switch: On", True), ("switch: true", True)),
        *(("name: no", "no"), ("name: off", "off"), ("name: 2024-01-31", "2024-01-31"), ("both: no", "no")),
    ],
)
def test_a_value_is_what_its_parameter_takes(project: Path, entry: str, value: Any) -> None:
    name = entry.split(":")[0]
    (point,) = points(project, f"fixed: {{{entry}}}")
    assert point.parameters == {name: value} and type(point.parameters[name]) is type(value)


def test_every_place_that_names_a_value_reads_it_alike(project: Path) -> None:
    found = points(
        project,
        "grid: {switch: [yes, no], rate: [1e-3, 1e-2], count: [1e1]}\n"
        "exclude: [{switch: no, rate: 1e-2}]\n"
        "needs_where: [{where: {switch: yes, count: 1e1}, cores: 3}]",
    )
    assert [(point.parameters["switch"], point.parameters["rate"]) for point in found] == [
        (True, 0.001),
        (True, 0.01),
        (False, 0.001),
    ]
    assert [point.needs.cores for point in found] == [3, 3, 1]


@pytest.mark.parametrize(
    ("entry", "hint"),
    [
        ("rate: '1e-3'", "write it without quotes"),
        ("count: '08'", "write it without quotes"),
        ("switch: 'true'", "write it without quotes"),
        ("name: 1e-3", "write it in quotes"),
        ("name: 08", "write it in quotes"),
        ("name: true", "write it in quotes"),
    ],
)
def test_a_value_of_the_other_kind_is_refused_with_the_way_to_write_it(project: Path, entry: str, hint: str) -> None:
    with pytest.raises(ExperimentError, match=rf"sweep\.yaml:4: .*{hint}"):
        points(project, f"fixed: {{{entry}}}")


@pytest.mark.parametrize("entry", ["count: 4.5", "rate: fast", "switch: 3", "count: .inf", "count: .nan", "rate: yes"])
def test_what_cannot_be_meant_is_refused(project: Path, entry: str) -> None:
    with pytest.raises(ExperimentError, match="but takes"):
        points(project, f"fixed: {{{entry}}}")


def test_the_same_value_in_two_spellings_is_one_run_twice(project: Path) -> None:
    with pytest.raises(ExperimentError, match="same run twice"):
        points(project, "grid: {count: [10, 1e1]}")


def test_no_date_is_made_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"x: {date(2024, 1, 31)} 10:00:00\n")
    assert read_yaml(path)["x"] == "2024-01-31 10:00:00"
