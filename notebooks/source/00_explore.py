# %% [markdown]
# # Explore: what a budget buys, and what happens to each token
#
# Move a slider: one engine answers anew, and memory, speed and quality stand beside those of the points before.
# *Budget* is the share of experts in memory, *tolerance* says whether an absent expert is loaded (0, exact) or replaced
# by resident ones (up to 1), *interval* how many prompts a choice of experts is kept for, *task* which prompts are
# asked. These few prompts show how things work; what a setting costs is for notebook 01 and the sweeps to say.

# %% tags=["parameters"]
model: str = "reference"  # "reference", a checkpoint directory, or a hub id
budget: str = "40%"  # expert memory: share, bytes ("300MB") or slots per layer ("3 slots")
tolerance: float = 0.5  # miss tolerance: 0 is exact, 1 replaces every absent expert
on_miss: str = "reroute"  # what becomes of experts that the tolerance lets go: reroute, or drop
strategy: str = "frequency"  # who chooses residents: frequency, random, lru (on demand)
interval: int = 1  # p: predict before every p-th prompt
replan: str = "interval"  # when to plan: interval or admission
n_prompts: int = 3  # prompts that are scored at every point; the first of them is also answered
stepwise: bool = True  # score token by token, so that experts are asked for as while generating
source: str = "fixture"  # prompts: fixture (20 of our own), embedded (prepared data sets), hub
warm_prompts: int = 3  # profile prompts that the predictor learns from first
max_new_tokens: int = 8  # tokens of the all-resident continuation that are scored, and of the answer
dtype: str = "float32"  # "auto" is the checkpoint's own
device: str = "auto"
seed: int = 0

# %%
# %matplotlib inline
from IPython.display import HTML, display

from workbench.explore.panel import Panel
from workbench.explore.readout import points_frame, readout
from workbench.explore.token_view import count_steps, step_grid, step_table, steps_table
from workbench.quality.configuration import ExperimentConfig, as_params
from workbench.tracking import run as tracking
from workbench.tracking.parameters import config_from, parameters_of

config = config_from(ExperimentConfig, parameters_of(globals()))

# %% [markdown]
# ## The panel
#
# The same point twice gives the same figures, times apart: residents, counters and history start anew each time, and
# the model is only read again when the budget changes. A budget that cannot work says so in one line. In the picture, a
# column is a token of the answer and a row a layer; a cell shows how the experts that the token wanted there were
# served. The first column is the pass over the whole prompt. Measured memory is the peak of this kernel while it
# serves, minus what it held before the model was loaded; libraries that the first model brings along count for it.

# %%
panel = Panel(config)
display(panel.widget)
panel.update()

# %% [markdown]
# ## The same without widgets
#
# What the panel shows comes from plain functions, so it can be kept, exported and read where no kernel runs.

# %%
seen = panel.latest
display(HTML(readout(seen)))

# %%
display(HTML(step_grid(seen.trace, seen.pieces)))

# %%
steps_table(count_steps(seen.trace), seen.pieces)

# %% [markdown]
# One step in detail: the experts that the token wanted in each layer, with their router weights, and what became of it.

# %%
step_table(seen.trace, step=1).head(8)

# %% [markdown]
# ## What the objects say of themselves
#
# Engine, plan, routing trace and statistics show themselves wherever a cell ends with them.

# %%
panel.explorer.engine

# %%
panel.explorer.engine.control.plan

# %%
seen.trace

# %%
# NBVAL_CHECK_OUTPUT
counters = seen.stats.counters
print("hits + loads + reroutes == lookups:", counters.hits + counters.loads + counters.reroutes == counters.lookups)
print("every choice is told:", count_steps(seen.trace).sum() == seen.trace.chosen.size)
print("exact means equal:", tolerance > 0 or seen.metrics["kl_nats"] == 0.0)

# %% [markdown]
# Run the next cell when you have moved the sliders: it logs every point tried, and the metrics of the latest.

# %%
seen = panel.latest
name = f"{seen.config.budget} t={seen.config.tolerance:g}"
with tracking.run("explore", name, params=as_params(seen.config), **seen.identity) as run:
    run.log_metrics(seen.metrics)
    run.log_frame("points", points_frame(panel.observations))
    run.log_frame("requests", seen.requests)
print("logged")
