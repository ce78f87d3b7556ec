# %% [markdown]
# # Quickstart: a Mixture-of-Experts model under a memory budget
#
# An MoE model keeps many experts in memory and uses a few per token. Here a budget decides how many experts are
# resident. What is absent is loaded (tolerance 0: exactly the model's own output) or replaced by resident experts
# (tolerance above 0: less memory traffic, some loss). This notebook lets a model answer under a budget, and measures
# one configuration: quality against the same model with every expert resident, and, if wanted, memory and time in fresh
# processes. Sweeps run it over budgets, intervals and strategies; notebooks 04 to 12 compare them.

# %% tags=["parameters"]
model: str = "reference"  # "reference", "carved", "native", "tiny" (random), a checkpoint directory, or a hub id
budget: str = "60%"  # expert memory: share, bytes ("300MB") or slots per layer ("3 slots")
tolerance: float = 1.0  # miss tolerance: 0 is exact, 1 replaces every absent expert
on_miss: str = "reroute"  # what becomes of experts that the tolerance lets go: reroute, or drop
strategy: str = "frequency"  # who chooses residents: frequency, random, lru (on demand)
interval: int = 40  # p: predict before every p-th prompt
replan: str = "admission"  # when to plan: interval or admission
skipping: bool = False  # use the task profile: insensitive (task, layer) pairs claim no memory
shown_prompts: int = 2  # prompts that the model answers first, for people to read; 0: none
measure_memory: bool = False  # also measure memory and time, in fresh processes (about a minute)
timing_prompts: int = 2  # prompts timed there, after one to warm up
timing_tokens: int = 24  # tokens generated for each
timing_dtype: str = "auto"  # dtype there; "auto" is the checkpoint's own
n_prompts: int = 3  # prompts in the stream that is scored
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
from IPython.display import Markdown, display

import emoe_core
from workbench.metrics.show import metric_table
from workbench.models.names import resolve_model
from workbench.paper import figures
from workbench.paper.memory import memory_table
from workbench.paper.tables import shown
from workbench.progress import stage_bars
from workbench.quality.configuration import ExperimentConfig, as_params
from workbench.quality.experiment import run_experiment
from workbench.systems.option_names import resolve_options
from workbench.tracking import run as tracking
from workbench.tracking.parameters import config_from, parameters_of
from workbench.tracking.traces import request_spans
from workbench.workloads import prompt_stream

parameters = parameters_of(globals())
config = config_from(ExperimentConfig, parameters)
figures.set_style()

# %% [markdown]
# ## Load and ask
#
# The budget is bytes that the slots really take. The plan says how many slots each MoE layer gets. What the engine does
# while it answers (predict, load, compute) is logged below as one trace a request: the tab Traces of the run in MLflow.

# %%
spans = []
if shown_prompts:
    options = {**resolve_options(config.engine_options()), "interval": 1}
    with emoe_core.load(resolve_model(model), **options) as engine, engine.timeline() as happened:
        print(engine.plan)
        print(engine.memory(max_tokens=1024))
        asked, answered = {}, {}
        for prompt in prompt_stream(config.stream())[:shown_prompts]:
            answer = engine.generate([prompt.text], [prompt.task], max_new_tokens=max_new_tokens)[0]
            asked[answer.request] = {"task": prompt.task, "prompt": prompt.text}
            answered[answer.request] = answer.text
            display(Markdown(f"**{prompt.task}**: {prompt.text[:160]} ...\n\n> {answer.text or '(no text)'}"))
    spans = request_spans(happened, asked, answered)

# %% [markdown]
# ## What does it cost?
#
# Every prompt is scored by teacher forcing on the all-resident model's own continuation. A perplexity ratio of 1 is
# equal, above 1 is worse; its 95% interval over prompts takes 8 of them. An expert *lookup* is one expert that one
# layer needs in one forward pass: a hit, a load on demand, or a reroute.

# %%
with stage_bars() as progress:
    result = run_experiment(
        config,
        measure_memory=measure_memory,
        timing_prompts=timing_prompts,
        timing_tokens=timing_tokens,
        timing_dtype=timing_dtype,
        progress=progress,
    )
quality = ["perplexity_ratio", "perplexity_ratio_low", "perplexity_ratio_high", "kl_nats", "top1_agreement"]
routing = ["lookups", "hit_rate", "token_hit_rate", "loads", "reroutes", "bytes_loaded", "predictions", "swaps"]
metric_table(result.metrics, [*quality, *routing, "slot_bytes", "expert_bytes"])

# %%
# NBVAL_CHECK_OUTPUT
found = result.metrics
print("hits + loads + reroutes == lookups:", found["hits"] + found["loads"] + found["reroutes"] == found["lookups"])
print("slots within the budget:", found["slot_share"] <= 1.0)
print("predicted every p-th prompt:", strategy == "lru" or found["predictions"] == -(-n_prompts // interval))
print("exact means equal:", tolerance > 0 or (found["kl_nats"] == 0.0 and found["perplexity_ratio"] == 1.0))

# %%
drawn = {
    "residency": figures.residency_heatmap(result.residency, n_prompts),
    "timeline": figures.request_timeline(result.requests),
}
drawn["residency"]

# %%
drawn["timeline"]

# %%
shown(result.answers, ["task", "all_resident", "answer", "similarity"])

# %% [markdown]
# ## Memory and time
#
# Peaks that the operating system reports, minus that of a control process with the same imports and a tiny model; stock
# transformers with every expert resident are measured the same way. Only where `measure_memory` is set.

# %%
if result.memory is not None:
    measured = memory_table({"stock, all resident": result.stock, f"emoe {budget}, t={tolerance:g}": result.memory})
    drawn["memory"] = figures.memory_terms(measured, timing_prompts)
    display(shown(measured), drawn["memory"])

# %%
name = f"{budget} {strategy} t={tolerance:g} p={interval}{' skipping' if skipping else ''}"
with tracking.run("quickstart", name, params=parameters | as_params(config), **result.identity) as run:
    result.log(run)
    for title, figure in drawn.items():
        run.log_figure(title, figure)
    run.log_traces(spans)
print("logged")
