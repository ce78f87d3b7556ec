# %% [markdown]
# # Read the results in pandas
#
# Every run is a row: its parameters, its metrics, and tables of its own. This notebook reads the runs of a sweep,
# compares them prompt by prompt, and draws one plot. Where the store has no such sweep, it makes four small runs of a
# random model, whose figures mean nothing. Copy it for questions that the report does not answer.

# %% tags=["parameters"]
sweep: str = "quick"  # name of a sweep in the store; `make run` makes "quick"
model: str = "tiny"  # of the four runs that are made where there is no such sweep

# %%
# %matplotlib inline
import pandas as pd
import seaborn as sns

from emoe_core.errors import ExperimentError
from workbench.paper.figures import set_style
from workbench.paper.tables import shown
from workbench.quality.configuration import ExperimentConfig, as_params
from workbench.quality.experiment import run_experiment
from workbench.tracking import run as tracking
from workbench.tracking.results import artifact_frame, experiment_frame, runs_frame

set_style()


def four_runs() -> pd.DataFrame:
    for budget in ("50%", "75%"):
        for tolerance in (0.0, 1.0):
            config = ExperimentConfig(model, budget, tolerance, source="fixture", n_prompts=8, max_new_tokens=8)
            result = run_experiment(config)
            name = f"{budget} t={tolerance:g}"
            with tracking.run("read results", name, params=as_params(config), **result.identity) as run:
                result.log(run)
    return experiment_frame("read results").head(4)


try:
    runs = runs_frame(sweep)
except ExperimentError:
    print(f"The store has no sweep {sweep!r}: four small runs are made in its place.")
    runs = four_runs()

# %% [markdown]
# ## Runs
#
# One row a run, one column a parameter or metric. What follows takes the runs that measured quality.

# %%
judged = runs.dropna(subset=["perplexity_ratio"]).sort_values(["tolerance", "budget"])
told = ["run_name", "budget", "tolerance", "perplexity_ratio", "kl_nats", "hit_rate", "loads", "prompts"]
shown(judged, told)

# %% [markdown]
# ## Prompts
#
# What a run logged as a table is read by the run's id. Here a row is a prompt of a run, so that hard prompts do not
# hide what a setting does.

# %%
settings = judged.set_index("run_id")[["budget", "tolerance"]]
prompts = pd.concat([artifact_frame(run_id, "requests").assign(run_id=run_id) for run_id in settings.index])
prompts = prompts.join(settings, on="run_id")
by_task = prompts.pivot_table(index="task", columns=["tolerance", "budget"], values="kl_nats")
by_task.style.format("{:.4f}")

# %%
# NBVAL_CHECK_OUTPUT
logged = prompts.groupby("run_id").apply(lambda rows: (rows["kl_nats"] * rows["output_tokens"]).sum())
mean = logged / prompts.groupby("run_id")["output_tokens"].sum()
same = (mean - judged.set_index("run_id")["kl_nats"]).abs().max() < 1e-9
print("a run's metric is the mean over the tokens of its prompts:", bool(same))
print("exact runs lose nothing:", bool((prompts.loc[prompts["tolerance"] == 0, "kl_nats"] == 0).all()))

# %% [markdown]
# ## One plot

# %%
lossy = prompts[prompts["tolerance"] > 0]
axis = sns.stripplot(
    data=lossy, x="budget", y="kl_nats", hue="task", dodge=True, order=sorted(lossy["budget"].unique())
)
axis.set(xlabel="expert memory", ylabel="KL to all-resident\n(nats per token; tolerance above 0)")
axis.set_title(f"n = {lossy.groupby('run_id').size().max()} prompts a run", loc="right", fontsize=9)
sns.move_legend(axis, "upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
