# %% [markdown]
# # What is it worth to know the task, and what do wrong labels cost?
#
# *Task-aware*: the predictor keeps a history for each task and plans for the tasks that run. *Task-agnostic*: every
# prompt is of unknown task, one history serves all (Fig. 13). Then labels are made wrong on purpose, as a classifier
# that errs would (Fig. 19; a share of prompts gets another task's label).
#
# The defaults check that everything runs; their figures mean nothing. What was measured is at the end.

# %% tags=["parameters"]
measure: bool = True  # False draws the result that ships with the project, where there is one
model: str = "tiny"  # "tiny" (random), "reference", "carved", "native", a checkpoint directory, or a hub id
budget: str = "50%"  # expert memory: share, bytes ("300MB") or slots per layer ("3 slots")
strategy: str = "frequency"  # who predicts
interval: int = 1  # p: predict before every p-th prompt
skipping: bool = False  # use the task profile in the task-aware runs: insensitive (task, layer) pairs claim no memory
errors: str = "0.5"  # shares of wrong labels to try beside none, comma-separated
mixes: str = "uniform"  # orders of tasks, comma-separated; the first is shown task by task
n_prompts: int = 4  # prompts in each stream
source: str = "fixture"  # prompts: fixture (20 of our own), embedded (prepared data sets), hub
warm_prompts: int = 4  # profile prompts that the predictor learns from first
max_new_tokens: int = 8  # tokens of the all-resident continuation that are scored
dtype: str = "float32"  # of the quality measurement; "auto" is the checkpoint's own
device: str = "auto"
seed: int = 0

# %%
# %matplotlib inline
from functools import partial

from IPython.display import display

from workbench.paper import figures
from workbench.paper import tasks as report
from workbench.paper.tables import closing_table, shown
from workbench.paper.tasks import AGNOSTIC, AWARE
from workbench.quality.configuration import ExperimentConfig
from workbench.quality.variants import measure_variants, variant_metrics
from workbench.tracking.findings import findings
from workbench.tracking.parameters import config_from, listed, parameters_of

parameters = parameters_of(globals())
told = {AWARE: {}, AGNOSTIC: {"labels": "none", "skipping": False}, "keywords": {"labels": "keywords"}}
told |= {f"{float(error):.0%} wrong": {"label_error": float(error)} for error in listed(errors)}
shown_mix, *more_mixes = listed(mixes)
variants = {
    f"{label}{'' if mix == shown_mix else f', {mix}'}": config_from(
        ExperimentConfig, parameters | options, tolerance=1.0, mix=mix
    )
    for mix in (shown_mix, *more_mixes)
    for label, options in told.items()
}
figures.set_style()
found = findings("09_task_awareness", measure, partial(measure_variants, variants))
summary, requests = found["summary"], found["requests"]
quality = ["label", "perplexity_ratio", "perplexity_ratio_low", "perplexity_ratio_high", "kl_nats", "token_hit_rate"]
shown(summary, [*quality, "bytes_loaded"])

# %%
# NBVAL_CHECK_OUTPUT
right = (requests["task"] == requests["told_task"]).groupby(requests["label"]).mean()
asked = summary[summary["labels"] == "given"].set_index("label")["label_error"]
print("task-aware runs are told the truth:", right[AWARE] == 1.0)
print(
    "wrong labels are as many as asked for:",
    bool(((1 - right[asked.index] - asked).abs() <= 0.5 / found.prompts).all()),
)

# %% [markdown]
# ## Task-aware against task-agnostic (Fig. 13)

# %%
tasks = report.task_table(requests, AWARE, AGNOSTIC)
display(shown(tasks))
awareness = report.awareness_figure(tasks)
awareness

# %% [markdown]
# ## Wrong labels (Fig. 19)

# %%
errors_seen = summary[summary["labels"] == "given"]
wrong = report.error_figure(errors_seen)
wrong

# %%
closing = report.beside_paper(tasks, errors_seen[errors_seen["mix"] == summary["mix"].iloc[0]])
closing_table(closing, found.prompts)

# %%
found.log(
    "task awareness",
    f"{model} {budget}{' skipping' if skipping else ''}",
    parameters,
    variant_metrics(summary, ("perplexity_ratio", "kl_nats", "bytes_loaded")),
    tables={"tasks": tasks, "beside_paper": closing},
    figures={"awareness": awareness, "wrong_labels": wrong},
)

# %% [markdown]
# ## Measured
#
# 25 November 2026, 24 uniform test prompts, 24 tokens each, float32, one thread, tolerance 1, p = 1, predictors warmed
# with 60 prompts. Perplexity ratio to all resident. Not yet the full settings of `sweeps/paper/`.
#
# | model, kept | seed | task-aware | task-agnostic | keywords | 10% / 20% / 50% wrong | oracle (notebook 08) |
# |---|---|---|---|---|---|---|
# | `reference`, 50% | 0 | 1.0055 | 1.0073 | 1.0055 | 1.0059 / 1.0054 / 1.0159 | 1.006 |
# | `carved`, 60% | 0 | 2.040 | 2.070 | 2.040 | - / 2.090 / - | 1.976 |
# | | 1 | 2.130 | 2.450 | 2.130 | - / 2.125 / - | 2.009 |
# | | 2 | 2.048 | 2.280 | 2.048 | - / 1.964 / - | 2.087 |
#
# * On `carved` task labels recover 86% of the gap between one global frequency and the oracle by the medians (2.280,
#   2.048, 2.009), but a third only with seed 0, and with seed 2 the oracle is the worse one: 24 prompts are few.
# * On `reference` labels are worth little, and wrong ones cost little until half of them are wrong.
