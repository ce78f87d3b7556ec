# %% [markdown]
# # Is the simulation right, and how far does it go?
#
# Notebook 11 compares schedulers and routers by simulation. Here the same requests are served twice: by the real loop,
# in real time, and by the simulation, under order of arrival (FCFS) and eMoE's Algorithm 1. Times that the simulation
# goes by are measured first, on the same engine; "refitted" is the simulation by times of the real loop's own passes:
# what it still misses is the simulation's fault and not the machine's. Then the simulation alone: thousands of requests
# a second on as many replicas as that takes, beside the bounds that queueing cannot beat.

# %% tags=["parameters"]
measure: bool = True  # False draws the result that ships with the project, where there is one
model: str = "tiny"  # "reference", "tiny" (a random model of the tests), or a model after `emoe model costs MODEL`
device: str = "auto"
schedulers: str = "fcfs,emoe"  # also edf, shortest, affine, emoe_no_loading
budget: str = "60%"  # of the engine; the costs of "reference" were measured under it
load: float = 0.6  # request rate, as a share of what full batches could serve
n_requests: int = 60  # served in real time: the reference model takes about 2 s for each
max_batch: int = 8  # requests that run at once
max_input_tokens: int = 64  # longer prompts are cut
max_output_tokens: int = 32  # longer answers are cut
source: str = "fixture"  # prompts: "fixture" (20 of ours), "embedded" or "hub"
scale_replicas: str = "10,100,1000"  # engines of the simulated clusters
scale_load: float = 0.6
scale_requests: int = 8  # requests for each replica
seed: int = 0

# %%
# %matplotlib inline
from IPython.display import display

from workbench.machine.busy import busy_warning
from workbench.models.names import resolve_model
from workbench.paper import figures
from workbench.paper import validation as report
from workbench.paper.tables import closing_table, shown
from workbench.serving.checks.validation import ValidationConfig
from workbench.serving.checks.validation_tables import measure_validation
from workbench.tracking.findings import findings
from workbench.tracking.parameters import config_from, listed, parameters_of

parameters = parameters_of(globals())
checkpoint, compared = str(resolve_model(model)), tuple(listed(schedulers))
config = config_from(ValidationConfig, parameters, model=checkpoint, schedulers=compared)
sizes = [int(count) for count in listed(scale_replicas)]
figures.set_style()
found = findings(
    "12_simulation_validation",
    measure,
    lambda progress: measure_validation(model, config, sizes, scale_load, scale_requests, progress),
)
print(busy_warning(found["machine"]["others_cpu_share"].iloc[0]) or "the machine was quiet")
display(found["validation"].style.format({"ratio": "{:.2f}", "refitted_ratio": "{:.2f}"}, precision=3).hide())
shown(found["parts"])

# %%
# NBVAL_CHECK_OUTPUT
requests = found["requests"]
served = requests.groupby(["scheduler", "driver"])
print("every request was served once by each:", bool((served["number"].nunique() == served.size()).all()))
print("all put out the same tokens:", served["output_tokens"].sum().nunique() == 1)

# %% [markdown]
# ## One request at a time
#
# Each point is a request: what it really took, and what the simulation says. On the line they agree.

# %%
agreement = report.agreement_figure(requests)
agreement

# %% [markdown]
# ## Scale
#
# The same service on many replicas behind the least-loaded router. Bounds: a request alone on an engine (no latency is
# lower), and capacity with full batches (no throughput is higher). Times to simulate are of one core.

# %%
scaled = found["scale"]
shown(scaled)

# %%
# NBVAL_CHECK_OUTPUT
slow_enough = bool((scaled["latency_mean_s"] >= scaled["alone_s"] * (1 - 1e-9)).all())
print("no mean latency below that of a request alone:", slow_enough)
print(
    "no throughput above full batches:",
    bool((scaled["throughput_per_s"] <= scaled["capacity_per_s"] * (1 + 1e-9)).all()),
)

# %%
closing = report.beside_paper(found["validation"], scaled)
closing_table(closing, found.prompts, "requests")

# %%
found.log(
    "simulation validation",
    f"{model} {schedulers}",
    parameters,
    report.validation_metrics(found),
    tables={"beside_paper": closing},
    figures={"agreement": agreement},
)

# %% [markdown]
# ## Measured
#
# 25 November 2026, quiet machine (2 cores of an AMD EPYC with AVX-512 and native bfloat16): `reference`, 60% of
# experts, bfloat16, tolerance 1, batch of 8, 30 requests of up to 48 + 24 tokens at load 0.6, seed 0. Simulated over
# real, by times measured just before: FCFS mean latency 0.96, P99 0.99, mean TTFT 0.98; eMoE 0.95, 0.89, 0.97. So
# within the aim of 15%. On a machine that does something else meanwhile it has been off by a third: the measured times
# no longer hold.
