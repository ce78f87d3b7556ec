# %% [markdown]
# # Is the simulation right, and how far does it go?
#
# Notebooks 11 and 13 compare schedulers and routers by simulation. Here the same requests are served twice: by the real loop, in real time, and by the
# simulation, under order of arrival (FCFS) and eMoE's Algorithm 1. Times that the simulation goes by are measured first, on the same engine; "refitted" is
# the simulation by times of the real loop's own passes: what it still misses is the simulation's fault and not the machine's. Then the simulation alone: thousands of requests a second on as many replicas as that takes, beside the bounds that queueing cannot beat.

# %% tags=["parameters"]
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

from workbench.paper import figures
from workbench.tracking import run as tracking
from workbench.machine.busy import busy_warning
from workbench.quality.variants import listed
from workbench.models.names import resolve_model
from workbench.progress import stage_bars
from workbench.paper import validation as report
from workbench.serving.simulation.experiment import ServingConfig
from workbench.serving.costs.measure import costs_of
from workbench.serving.simulation.scale import scale_up
from workbench.serving.checks.validation import ValidationConfig, validate

figures.set_style()
config = ValidationConfig(
    model=str(resolve_model(model)), budget=budget, schedulers=tuple(listed(schedulers)), load=load, n_requests=n_requests, max_batch=max_batch,
    max_input_tokens=max_input_tokens, max_output_tokens=max_output_tokens, source=source, device=device, seed=seed,
)
with stage_bars() as progress:
    found = validate(config, costs_of(model, progress), progress)
print(busy_warning(found.others_cpu_share) or "the machine was quiet")
display(found.table.style.format({"ratio": "{:.2f}", "refitted_ratio": "{:.2f}"}, precision=3).hide())
found.parts.style.format({"ratio": "{:.2f}"}, precision=3).hide()

# %%
# NBVAL_CHECK_OUTPUT
counts = found.requests.groupby(["scheduler", "driver"])["number"].nunique()
print("every request was served once by each:", set(counts) == {n_requests} and len(found.requests) == 3 * n_requests * len(config.schedulers))
tokens = found.requests.groupby(["scheduler", "driver"])["output_tokens"].sum()
print("all put out the same tokens:", tokens.nunique() == 1)

# %% [markdown]
# ## One request at a time
#
# Each point is a request: what it really took, and what the simulation says. On the line they agree.

# %%
agreement = report.agreement_figure(found.requests)
agreement

# %% [markdown]
# ## Scale
#
# The same service on many replicas behind the least-loaded router. Bounds: a request alone on an engine (no latency is lower), and capacity with full batches (no
# throughput is higher). Times to simulate are of one core.

# %%
with stage_bars() as progress:
    scaled = scale_up(ServingConfig(scheduler=config.schedulers[0], max_batch=max_batch, seed=seed), found.costs, [int(count) for count in listed(scale_replicas)], scale_load, scale_requests, progress)
scaled.style.format(precision=3).hide()

# %%
# NBVAL_CHECK_OUTPUT
print("no mean latency below that of a request alone:", bool((scaled["latency_mean_s"] >= scaled["alone_s"] * (1 - 1e-9)).all()))
print("no throughput above full batches:", bool((scaled["throughput_per_s"] <= scaled["capacity_per_s"] * (1 + 1e-9)).all()))

# %%
closing = report.beside_paper(found.table, scaled)
display(closing.style.hide())

# %%
params = {name: value for name, value in vars(config).items() if name != "model"} | {"model": model, "scale_replicas": scale_replicas, "scale_load": scale_load}
with tracking.run("simulation validation", f"{model} {schedulers}", params=params, model_hash=found.costs.model_hash) as run:
    for row in found.table.to_dict("records"):
        run.log_metrics({f"{row['scheduler']}_{row['metric']}_{kind}": row[kind] for kind in ("real", "simulated", "ratio", "refitted_ratio")})
    run.log_metrics({"others_cpu_share": found.others_cpu_share, "scale_arrivals_per_s": scaled["rate_per_s"].max()})
    run.log_metrics({"scale_simulated_per_s": scaled["simulated_per_wall_s"].iloc[-1]})
    for name, frame in {"requests": found.requests, "validation": found.table, "parts": found.parts, "scale": scaled, "beside_paper": closing}.items():
        run.log_frame(name, frame)
    run.log_figure("agreement", agreement)
print("logged")

# %% [markdown]
# ## Measured
#
# 25 November 2026, quiet machine (2 cores of an AMD EPYC with AVX-512 and native bfloat16): `reference`, 60% of experts, bfloat16, tolerance 1, batch of 8, 30 requests of up to 48 + 24 tokens at load 0.6, seed 0. Simulated over
# real, by times measured just before: FCFS mean latency 0.96, P99 0.99, mean TTFT 0.98; eMoE 0.95, 0.89, 0.97. So within the aim of 15%. On a machine that does
# something else meanwhile it has been off by a third: the measured times no longer hold.
