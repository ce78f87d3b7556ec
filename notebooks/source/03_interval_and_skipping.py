# %% [markdown]
# # Prediction interval and task skipping
#
# How long may a set of experts be kept? With `replan="interval"` the experts chosen before a prompt serve it and the
# next p - 1 prompts (Fig. 10 of the paper); with `replan="admission"` the frequencies are that old, but every admitted
# prompt gets a plan for its own task. Task skipping takes the task profile into account: layers that a task is not
# sensitive to claim no memory and use whatever is resident.
#
# The defaults check that everything runs; their figures mean nothing. `model = "reference"` gives some that do.

# %% tags=["parameters"]
model: str = "tiny"  # "tiny" (random, only shows that everything runs), "reference", "carved", a checkpoint directory, or a hub id
budget: str = "60%"  # expert memory: share, bytes ("300MB") or slots per layer ("3 slots")
tolerance: float = 1.0  # miss tolerance: 0 is exact, 1 replaces every absent expert
strategy: str = "frequency"  # who chooses residents: frequency, random, lru (on demand)
interval: int = 4  # p: predict before every p-th prompt
replan: str = "interval"  # when to plan: interval or admission
skipping: bool = False  # use the task profile
n_prompts: int = 8  # prompts in the stream
mix: str = "sticky"  # order of tasks: uniform or sticky
source: str = "fixture"  # prompts: fixture (20 of our own), embedded (prepared data sets), hub
warm_prompts: int = 6  # profile prompts that the predictor learns from first
max_new_tokens: int = 8  # tokens of the all-resident continuation that are scored
answers: int = 0  # prompts also answered freely, for text similarity
dtype: str = "float32"  # of the quality measurement; "auto" is the checkpoint's own
device: str = "auto"
seed: int = 0

# %%
# %matplotlib inline
from workbench.paper import figures
from workbench.tracking import run as tracking
from workbench.quality.configuration import ExperimentConfig, as_params
from workbench.quality.experiment import run_experiment
from workbench.progress import stage_bars
from workbench.metrics.show import metric_table

figures.set_style()

config = ExperimentConfig(
    model=model, budget=budget, tolerance=tolerance, strategy=strategy, interval=interval, replan=replan,
    skipping=skipping, n_prompts=n_prompts, mix=mix, source=source, warm_prompts=warm_prompts,
    max_new_tokens=max_new_tokens, answers=answers, dtype=dtype, device=device, seed=seed,
)
with stage_bars() as progress:
    result = run_experiment(config, progress=progress)
metric_table(result.metrics, [
    "perplexity_ratio", "perplexity_ratio_low", "perplexity_ratio_high", "kl_nats", "top1_agreement",
    "hit_rate", "bytes_loaded", "wasted_bytes", "predictions", "swaps", "prediction_s", "swap_s",
])

# %%
# NBVAL_CHECK_OUTPUT
print("predicted every p-th prompt:", strategy == "lru" or result.metrics["predictions"] == -(-n_prompts // interval))

# %%
timeline = figures.request_timeline(result.requests)
timeline

# %%
name = f"p={interval} {replan}{' skipping' if skipping else ''} {budget}"
with tracking.run("interval and skipping", name, params=as_params(config), **result.identity) as run:
    run.log_metrics(result.metrics)
    run.log_frame("requests", result.requests)
    run.log_frame("residency", result.residency)
    if len(result.answers):
        run.log_frame("answers", result.answers)
    run.log_figure("timeline", timeline)
print("logged")
