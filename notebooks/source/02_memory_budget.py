# %% [markdown]
# # Memory budget: what is saved, what it costs in time and in quality
#
# One configuration: a budget, a tolerance, and a strategy that chooses the resident experts. Quality is measured by
# teacher forcing against the all-resident model. Memory and time come from fresh processes: the peak that the operating
# system reports, minus the peak of a control process with the same imports and a tiny model, and stock transformers
# with all experts resident measured the same way in the same run.
#
# The defaults check that everything runs; their figures mean nothing. `model = "reference"` gives some that do.

# %% tags=["parameters"]
model: str = "tiny"  # "tiny" (random, only shows that everything runs), "reference", "carved", a checkpoint directory, or a hub id
budget: str = "60%"  # expert memory: share, bytes ("300MB") or slots per layer ("3 slots")
tolerance: float = 1.0  # miss tolerance: 0 is exact, 1 replaces every absent expert
strategy: str = "frequency"  # who chooses residents: frequency, random, lru (on demand)
measure_memory: bool = False  # also measure memory and time, in fresh processes (about a minute)
timing_prompts: int = 2  # prompts timed there, after one to warm up
timing_tokens: int = 24  # tokens generated for each
timing_dtype: str = "auto"  # dtype there; "auto" is the checkpoint's own
n_prompts: int = 6  # prompts in the stream
mix: str = "uniform"  # order of tasks: uniform or sticky
source: str = "fixture"  # prompts: fixture (20 of our own), embedded (prepared data sets), hub
warm_prompts: int = 6  # profile prompts that the predictor learns from first
max_new_tokens: int = 8  # tokens of the all-resident continuation that are scored
answers: int = 0  # prompts also answered freely, for text similarity
dtype: str = "float32"  # of the quality measurement; "auto" is the checkpoint's own
device: str = "auto"
seed: int = 0

# %%
# %matplotlib inline
import pandas as pd
from IPython.display import display

from workbench.paper import figures
from workbench.tracking import run as tracking
from workbench.quality.configuration import ExperimentConfig, as_params
from workbench.quality.experiment import run_experiment
from workbench.progress import stage_bars
from workbench.metrics.show import metric_table

figures.set_style()

config = ExperimentConfig(
    model=model, budget=budget, tolerance=tolerance, strategy=strategy, n_prompts=n_prompts, mix=mix, source=source,
    warm_prompts=warm_prompts, max_new_tokens=max_new_tokens, answers=answers, dtype=dtype, device=device, seed=seed,
)
with stage_bars() as progress:
    result = run_experiment(
        config, measure_memory=measure_memory, timing_prompts=timing_prompts, timing_tokens=timing_tokens,
        timing_dtype=timing_dtype, progress=progress,
    )
metric_table(result.metrics, [
    "perplexity_ratio", "perplexity_ratio_low", "perplexity_ratio_high", "kl_nats", "top1_agreement",
    "hit_rate", "loads", "reroutes",
])

# %%
# NBVAL_CHECK_OUTPUT
print("slots within the budget:", result.metrics["slot_share"] <= 1.0)
print("exact means equal:", tolerance > 0 or (result.metrics["kl_nats"] == 0.0 and result.metrics["perplexity_ratio"] == 1.0))

# %%
terms = None
if result.memory is not None:
    rows = [("stock, all resident", result.stock), (f"emoe {budget}, t={tolerance:g}", result.memory)]
    table = pd.DataFrame(
        {
            "name": [name for name, _ in rows],
            "dense_bytes": [m.dense_bytes for _, m in rows],
            "slot_bytes": [m.slot_bytes for _, m in rows],
            "measured_bytes": [m.model_bytes for _, m in rows],
            "load_s": [m.load_s for _, m in rows],
            "ttft_s": [m.ttft_s for _, m in rows],
            "tpot_s": [m.tpot_s for _, m in rows],
            "stall_share": [m.stall_share for _, m in rows],
            "page_cache": [m.page_cache for _, m in rows],
        }
    )
    display(table)
    terms = figures.memory_terms(table)
terms

# %%
by_task = figures.task_quality(result.requests)
by_task

# %%
name = f"{budget} {strategy} t={tolerance:g}"
with tracking.run("memory budget", name, params=as_params(config) | {"timing_dtype": timing_dtype, "timing_tokens": timing_tokens}, **result.identity) as run:
    run.log_metrics(result.metrics)
    run.log_frame("requests", result.requests)
    run.log_frame("residency", result.residency)
    if len(result.answers):
        run.log_frame("answers", result.answers)
    if terms is not None:
        run.log_figure("memory", terms)
        run.log_tags({"emoe.page_cache": result.memory.page_cache})
    run.log_figure("tasks", by_task)
print("logged")
