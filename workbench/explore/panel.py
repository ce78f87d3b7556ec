"""The panel of the explore notebook: sliders, what they come to, and an answer token by token.

    panel = Panel(ExperimentConfig(budget="40%", source="fixture", n_prompts=3))
    display(panel.widget)
    panel.update()

A moved slider is one observation of the kept engine (`explorer.py`); the sliders rest meanwhile and a bar shows
progress. A configuration that is refused leaves the figures as they are and is told in one line. Widgets only: no
figures are computed here.
"""

from __future__ import annotations

from dataclasses import replace
from html import escape
from typing import Any

import ipywidgets as widgets

from emoe_core.budget import Budget, plan_slots
from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.errors import EmoeError, ExperimentError
from emoe_core.planning.tasks import TASK_TYPES
from workbench.explore.displays import show_in_notebooks
from workbench.explore.explorer import Explorer, Observation
from workbench.explore.html_view import heading
from workbench.explore.readout import ALL_TASKS, name_of, points_table, readout
from workbench.explore.token_view import count_steps, step_grid, step_table, steps_table
from workbench.models.names import resolve_model
from workbench.quality.configuration import ExperimentConfig

LEAST_PERCENT, MOST_INTERVAL = 5, 16
_STYLE = {"description_width": "80px"}


class Panel:
    """Sliders over one model.

    Parameters
    ----------
    start : ExperimentConfig
        The first point; what no slider moves stays as it is here.
    explorer : Explorer, optional
        Measures; made here when missing.

    Attributes
    ----------
    widget : ipywidgets.Widget
        To be displayed.
    observations : list of Observation
        Every point tried, in order.
    """

    def __init__(self, start: ExperimentConfig, explorer: Explorer | None = None) -> None:
        show_in_notebooks()
        self.start = start
        self.explorer = explorer or Explorer()
        self.observations: list[Observation] = []
        self._refused = "no point was tried: call update()"
        if start.budget is None:
            raise ExperimentError("the panel slides over budgets: give one")
        tasks = (ALL_TASKS, *TASK_TYPES)
        begun = name_of(start.tasks)
        self.budget = _slider(widgets.IntSlider, "budget (%)", _percent(start), min=LEAST_PERCENT, max=100)
        self.tolerance = _slider(widgets.FloatSlider, "tolerance", float(start.tolerance), min=0.0, max=1.0, step=0.05)
        most = max(MOST_INTERVAL, start.interval)
        self.interval = _slider(widgets.IntSlider, "interval", start.interval, min=1, max=most)
        options = tasks if begun in tasks else (begun, *tasks)
        self.task = _slider(widgets.SelectionSlider, "task", begun, options=options)
        self.sliders = (self.budget, self.tolerance, self.interval, self.task)
        # Never from 0 to 0: a slider that was made so does not move later.
        self.step = _slider(widgets.IntSlider, "token", 0, min=0, max=max(1, start.max_new_tokens - 1))
        self._bar = widgets.IntProgress(layout=widgets.Layout(width="160px"))
        self._stage = widgets.Label()
        self.message = widgets.HTML()
        self.figures, self.points, self.answer, self.tokens, self.detail = (widgets.HTML() for _ in range(5))
        self._first_percent = self.budget.value
        self.widget = widgets.VBox(
            [
                widgets.Box(self.sliders, layout=widgets.Layout(display="flex", flex_flow="row wrap")),
                widgets.HBox([self._bar, self._stage]),
                self.message,
                self.figures,
                self.points,
                self.answer,
                self.tokens,
                self.step,
                self.detail,
            ]
        )
        for slider in self.sliders:
            slider.observe(self._moved, names="value")
        self.step.observe(self._show_step, names="value")

    @property
    def config(self) -> ExperimentConfig:
        """The configuration that the sliders stand for."""
        # Untouched, the budget is what it was given as: bytes and slots have no exact percentage.
        untouched = self.budget.value == self._first_percent
        tasks = {ALL_TASKS: TASK_TYPES, name_of(self.start.tasks): self.start.tasks}
        return replace(
            self.start,
            budget=self.start.budget if untouched else f"{self.budget.value}%",
            tolerance=round(self.tolerance.value, 2),
            interval=self.interval.value,
            tasks=tasks.get(self.task.value, (self.task.value,)),
        )

    @property
    def latest(self) -> Observation:
        """The latest observation; ExperimentError when there is none, with the reason."""
        if not self.observations:
            raise ExperimentError(self._refused)
        return self.observations[-1]

    def update(self) -> None:
        """Observe what the sliders stand for, and show it; what is refused is told in one line."""
        self._rest(True)
        self.message.value = ""
        try:
            seen = self.explorer.observe(self.config, self._progress)
        except (EmoeError, OSError, MemoryError) as error:
            self._refused = str(error) or type(error).__name__
            told = " ".join(self._refused.split())
            told += " The figures below are still those of the point before." if self.observations else ""
            self.message.value = (
                f"<p role='alert' style='border-left:4px solid #d55e00;padding-left:8px'><b>Not possible.</b> "
                f"{escape(told)}</p>"
            )
        else:
            self.observations.append(seen)
            self._show(seen)
        finally:
            self._rest(False)

    def close(self) -> None:
        """Free the engine; what is shown stays."""
        self.explorer.close()

    def _moved(self, change: Any) -> None:
        self.update()

    def _rest(self, resting: bool) -> None:
        for slider in self.sliders:
            slider.disabled = resting
        self._stage.value = "starting" if resting else ""
        self._bar.layout.visibility = "visible" if resting else "hidden"

    def _progress(self, stage: str, done: int, total: int) -> None:
        self._bar.max, self._bar.value = max(1, total), done
        self._stage.value = f"{stage} {done}/{total}"

    def _show(self, seen: Observation) -> None:
        self.figures.value = readout(seen)
        self.points.value = points_table(self.observations)
        told = f"to the {seen.answer.task} prompt: {' '.join(seen.prompt.split())[:160]}"
        self.answer.value = (
            heading("Answer", told) + f"<blockquote>{escape(seen.answer.text) or '(no text)'}</blockquote>"
        )
        self.tokens.value = heading("Token by token", "hover a cell, or slide") + step_grid(seen.trace, seen.pieces)
        self.step.max = max(1, len(seen.pieces) - 1)
        self._show_step(None)

    def _show_step(self, change: Any) -> None:
        seen = self.latest
        step = min(self.step.value, len(seen.pieces) - 1)
        row = steps_table(count_steps(seen.trace), seen.pieces).iloc[step]
        told = f"{row['token']!r}: " + ", ".join(f"{count} {name}" for name, count in row.drop("token").items())
        table = step_table(seen.trace, step).to_html(index=False, border=0)
        self.detail.value = (
            heading(f"Token {step}", told) + f"<div style='max-height:320px;overflow:auto'>{table}</div>"
        )


def _slider(kind: type[widgets.Widget], name: str, value: object, **options: object) -> widgets.Widget:
    layout = widgets.Layout(width="380px", max_width="100%")
    return kind(value=value, description=name, continuous_update=False, style=_STYLE, layout=layout, **options)


def _percent(config: ExperimentConfig) -> int:
    """Return a configuration's budget as whole percents of expert bytes, within the slider."""
    assert config.budget is not None
    budget = Budget.parse(config.budget)
    if budget.kind == "share":
        share = budget.value
    else:
        plan = plan_slots(open_checkpoint(resolve_model(config.model), config.dtype), budget)
        share = plan.slot_bytes / plan.expert_bytes
    return min(100, max(LEAST_PERCENT, round(100 * share)))
