# %% [markdown]
# # Quickstart: a Mixture-of-Experts model under a memory budget
#
# An MoE model keeps many experts in memory and uses a few per token. Here a budget decides how many experts are resident.
# What is absent is loaded (tolerance 0: exactly the model's own output) or replaced by resident experts (tolerance
# above 0: less memory traffic, some loss). This notebook loads a model, lets it answer, shows whether the cache worked,
# and holds quality against the same model with every expert resident.

# %% tags=["parameters"]
model: str = "reference"  # "reference", a checkpoint directory, or a hub id
budget: str = "60%"  # expert memory: share, bytes ("300MB") or slots per layer ("3 slots")
tolerance: float = 1.0  # miss tolerance: 0 is exact, 1 replaces every absent expert
strategy: str = "frequency"  # who chooses residents: frequency, random, lru (on demand)
n_prompts: int = 3  # prompts in the stream
mix: str = "uniform"  # order of tasks: uniform or sticky
source: str = "fixture"  # prompts: fixture (20 of our own), embedded (prepared data sets), hub
warm_prompts: int = 3  # profile prompts that the predictor learns from first
max_new_tokens: int = 8  # tokens of the all-resident continuation that are scored
answers: int = 1  # prompts also answered freely, for text similarity
dtype: str = "float32"  # of the quality measurement; "auto" is the checkpoint's own
device: str = "auto"
seed: int = 0

# %%
# %matplotlib inline
import numpy as np
from IPython.display import Markdown, display

import emoe_core
from workbench.paper import figures
from workbench.tracking import run as tracking
from workbench.quality.configuration import ExperimentConfig, as_params
from workbench.quality.experiment import run_experiment
from workbench.models.names import resolve_model
from workbench.progress import stage_bars
from workbench.metrics.show import metric_table
from workbench.systems.option_names import resolve_options
from workbench.tracking.traces import request_spans
from workbench.workloads import prompt_stream

figures.set_style()

config = ExperimentConfig(
    model=model, budget=budget, tolerance=tolerance, strategy=strategy, n_prompts=n_prompts, mix=mix, source=source,
    warm_prompts=warm_prompts, max_new_tokens=max_new_tokens, answers=answers, dtype=dtype, device=device, seed=seed,
)

# %% [markdown]
# ## Load and ask
#
# The budget is bytes that the slots really take. The plan says how many slots each MoE layer gets. What the engine does
# while it answers (predict, load, compute) is logged below as one trace a request: the tab Traces of the run in MLflow.

# %%
engine = emoe_core.load(resolve_model(model), **{**resolve_options(config.engine_options()), "interval": 1, "record": True})
print(engine.plan)
print(engine.memory(max_tokens=1024))

# %%
prompts = prompt_stream(config.stream())
asked, answered = {}, {}
with engine.timeline() as happened:
    for prompt in prompts[:3]:
        answer = engine.generate([prompt.text], [prompt.task], max_new_tokens=max_new_tokens)[0]
        asked[answer.request], answered[answer.request] = {"task": prompt.task, "prompt": prompt.text}, answer.text
        display(Markdown(f"**{prompt.task}**: {prompt.text[:160]} ...\n\n> {answer.text or '(no text)'}"))

# %% [markdown]
# ## Did the cache work?
#
# A *request* is one expert that one layer needs in one forward pass. It is a hit, a load on demand, or a reroute.

# %%
# NBVAL_CHECK_OUTPUT
counters = engine.stats().counters
print("hits + loads + reroutes == requests:", counters.hits + counters.loads + counters.reroutes == counters.requests)
print("slots within the budget:", engine.loader.slot_bytes <= engine.plan.budget_bytes)

# %%
shares = np.mean(list(engine.trace().shares().values()), axis=0)
resident = np.zeros(shares.shape, dtype=bool)
for layer in range(shares.shape[0]):
    resident[layer, sorted(engine.loader.table.resident(layer))] = True
residency = figures.residency_heatmap(shares, resident)
engine.close()
residency

# %% [markdown]
# ## What did it cost?
#
# Every prompt is scored by teacher forcing on the all-resident model's own continuation. A perplexity ratio of 1 is
# equal, above 1 is worse.

# %%
with stage_bars() as progress:
    result = run_experiment(config, progress=progress)
metric_table(result.metrics, [
    "hit_rate", "token_hit_rate", "loads", "reroutes", "slot_bytes", "expert_bytes", "perplexity_ratio",
    "kl_nats", "top1_agreement",
])

# %%
timeline = figures.request_timeline(result.requests)
timeline

# %%
result.answers[["task", "all_resident", "answer", "similarity"]] if len(result.answers) else "no free answers asked for"

# %%
name = f"{budget} {strategy} t={tolerance:g}"
with tracking.run("quickstart", name, params=as_params(config), **result.identity) as run:
    run.log_metrics(result.metrics)
    run.log_frame("requests", result.requests)
    run.log_frame("residency", result.residency)
    run.log_frame("answers", result.answers)
    run.log_figure("residency", residency)
    run.log_traces(request_spans(happened, asked, answered))
    run.log_figure("timeline", timeline)
print("logged")
