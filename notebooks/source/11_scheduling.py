# %% [markdown]
# # Whom to serve next, and where
#
# Latency and kept objectives over the request rate (Fig. 12 of the paper), for order of arrival (FCFS), due first
# (EDF), eMoE's Algorithm 1, and Algorithm 1 told the true output lengths. Simulated: one engine with a batch limit and
# KV memory, by costs that were measured on the real one; all schedulers get the same requests. Objectives: first token
# within 5x, each further one within 2x of a task's unloaded median. The reference load is where FCFS still meets 90% of
# them. Then several such engines behind a router, if wanted.
#
# What is simulated is waiting, loading and computing, not quality; `held_mass` is the share of routed choices that
# residents cover.

# %% tags=["parameters"]
measure: bool = True  # False draws the result that ships with the project, where there is one
model: str = (
    "reference"  # whose measured costs: "reference", "tiny" (measured here), or a model after `emoe model costs MODEL`
)
variants: str = "fcfs,edf,emoe,emoe_oracle"  # also shortest, affine, emoe_no_loading, shortest_oracle
loads: str = "0.2,0.5,0.8"  # request rates, as shares of what full batches could serve
arrivals: str = "poisson"  # poisson, gamma (bursty), azure, azure_conv, azure_code, mooncake, or the path of a trace
burstiness: float = 3.0  # coefficient of variation of the gaps, for gamma
n_requests: int = 200  # requests of each run
max_batch: int = 8  # requests that run at once
kv_tokens: int = 16384  # tokens of KV cache
interval: int = 40  # p: predict before every p-th admitted request
replan: str = "admission"  # when to plan: admission or interval
routers: str = "round_robin,least_loaded,affinity"  # that spread requests over replicas; "": leave this out
replicas: int = 4  # engines behind a router; each keeps its own experts
replica_scheduler: str = "fcfs"  # of each replica
affinity_slack: float = 0.0  # how much busier, as a share of a full batch, a better fitting replica may be
searched: int = 0  # random settings tried, to see where Algorithm 1 helps and where it hurts; 0: none
throughput_requests: int = 0  # requests that every system serves for real, at once (minutes); 0: not at all
throughput_repeats: int = 1  # how often
throughput_systems: str = "emoe,on demand"  # also emoe exact, all resident
throughput_source: str = "fixture"  # prompts: "fixture" (20 of ours), "embedded" or "hub"
trace_folder: str = ""  # where the request traces lie; empty is the cache
seed: int = 0

# %%
# %matplotlib inline
from dataclasses import replace

import numpy as np
import pandas as pd
from IPython.display import display

from workbench.machine.busy import busy_warning
from workbench.models.names import resolve_model
from workbench.paper import figures
from workbench.paper import scheduling as report
from workbench.paper.tables import closing_table, shown
from workbench.serving.checks.throughput import ThroughputConfig
from workbench.serving.comparison import compare_services
from workbench.serving.costs.measure import costs_of
from workbench.serving.simulation.experiment import ServingConfig, known_trace_folder
from workbench.tracking.findings import findings
from workbench.tracking.parameters import config_from, listed, parameters_of

parameters = parameters_of(globals())
figures.set_style()
costs = costs_of(model)
one = config_from(ServingConfig, parameters, replicas=1, trace_folder=known_trace_folder(trace_folder))
several = replace(one, replicas=replicas, scheduler=replica_scheduler)
real = throughput_requests and ThroughputConfig(
    str(resolve_model(model)),
    costs.settings.get("budget", "60%"),
    tuple(listed(throughput_systems)),
    throughput_requests,
    max_batch,
    repeats=throughput_repeats,
    source=throughput_source,
    seed=seed,
)
rates = [float(load) for load in listed(loads)]
compared = {"cluster": several, "routers": listed(routers), "searched": searched, "throughput": real or None}
found = findings(
    "11_scheduling",
    measure,
    lambda progress: compare_services(one, costs, listed(variants), rates, **compared, progress=progress),
)
print("drawn from the record" if found.recorded else report.caveat(costs))
services, reference = found["services"], found["reference"].iloc[0]
shown(services, report.FIRST)

# %%
# NBVAL_CHECK_OUTPUT
routed, placed = found.get("routed"), found.get("placed")
print("every scheduler served every request:", services["requests"].nunique() == 1)
turns = None if placed is None else placed[placed["router"] == "round_robin"].groupby(["load", "replica"])["requests"]
print(
    "round robin gives all replicas as many:",
    turns is None or bool((turns.sum().groupby("load").agg(np.ptp) <= 1).all()),
)

# %%
drawn = {"rates": report.service_figure(services, reference_load=reference["load"])}
drawn["rates"]

# %% [markdown]
# ## Gained on FCFS
#
# At each rate: change of mean latency and of mean TTFT, goodput over that of FCFS. No scheduler can do better than the
# bound: every request alone, all objectives met. Then the last variant at the reference load, by task.

# %%
display(shown(found["gains"]), shown(found["reference"]), shown(found["tasks"]))

# %% [markdown]
# ## Which replica gets which request
#
# Several engines behind a router: in turn (round robin), to the least loaded, or to the replica whose resident experts
# fit the task (affinity), as long as it is not much busier than the others. A router that keeps tasks together saves
# swaps and covers more of what the router networks ask for.

# %%
if routed is not None:
    drawn["routers"] = report.service_figure(routed, by="router")
    last = placed[(placed["router"] == listed(routers)[-1]) & (placed["load"] == placed["load"].max())]
    print(f"requests by task and replica at the highest rate, under {listed(routers)[-1]}")
    display(last.pivot_table(index="task", columns="replica", values="requests", fill_value=0), drawn["routers"])

# %% [markdown]
# ## Where Algorithm 1 helps, and where it hurts
#
# Random settings (load, largest batch, tokens at which prompts and answers are cut), each under FCFS and Algorithm 1:
# the five that it helps most in mean latency, and the five that it hurts most. Notebook 12 serves such a setting for
# real. Only where `searched` is set.

# %%
tried = found.get("searched")
if tried is not None:
    drawn["searched"] = report.search_figure(tried)
    display(shown(pd.concat([tried.head(), tried.tail()]).drop_duplicates()), drawn["searched"])

# %% [markdown]
# ## Throughput at equal memory
#
# Served by the real loop, not simulated: the same requests, all waiting from the start, by the engine as it serves
# (tolerance 1), and by LRU on demand with the same expert memory. `ratio` is against on demand within the same round.
# What replacing experts costs in quality is notebook 08's question. Only where `throughput_requests` is set.

# %%
throughput = found.get("throughput")
if throughput is not None:
    print(busy_warning(found["rounds"]["others_cpu_share"].max()) or "the machine was quiet")
    display(shown(throughput))

# %%
closing = report.beside_paper(found)
closing_table(closing, found.prompts, "requests")

# %%
found.log(
    "scheduling",
    f"{model} {arrivals}",
    parameters,
    report.scheduling_metrics(found),
    tables={"beside_paper": closing},
    figures=drawn,
)

# %% [markdown]
# ## Measured
#
# 25 November 2026 on a quiet machine (2 cores of an AMD EPYC with AVX-512 and native bfloat16; costs of `reference`,
# 60% of experts, bfloat16, tolerance 1: a prompt of 200 tokens 0.46 s, a step 63 ms alone and 165 ms for eight).
# Simulated, 500 requests, Poisson, batch of 8, plans at admission, p = 40, seed 0. At load 0.15 FCFS meets 90% of
# objectives.
#
# | load | scheduler | mean latency | P99 | objectives met | goodput against FCFS |
# |---|---|---|---|---|---|
# | 0.15 | FCFS | 4.88 s | 13.4 s | 90.6% | 1.00 |
# | 0.15 | eMoE | 4.89 s | 12.6 s | 96.6% | 1.07 (no scheduler: above 1.10) |
# | 0.15 | eMoE, oracle lengths | 4.89 s | 12.5 s | 98.0% | 1.08 |
# | 0.4 | FCFS | 7.07 s | 17.6 s | 47.8% | 1.00 |
# | 0.4 | eMoE | 9.53 s | 38.0 s | 61.8% | 1.29 |
# | 0.4 | eMoE, dE = 0 | 8.67 s | 28.1 s | 56.6% | 1.18 |
# | 0.8 | FCFS | 13.5 s | 33.1 s | 8.8% | 1.00 |
# | 0.8 | eMoE | 160 s | 470 s | 12.4% | 1.02 |
#
# * **Goodput, as the rate up to which 90% of objectives are met: 1.56x of FCFS** (EDF 1.00x, eMoE without loading
#   latency 1.39x, with the true output lengths 1.81x). At one rate, where FCFS meets 90% already, nobody can gain more
#   than a tenth.
# * **No lower mean latency, unlike Fig. 12**: at the reference load it is 0.2% higher. What Algorithm 1 gains is kept
#   objectives: 6 points more.
# * Beyond saturation it holds requests back to protect those who run, batches stay small, throughput falls, and latency
#   grows twelvefold at load 0.8. The paper does not say what happens there.
# * EDF, shortest first and task-affine batching differ from FCFS by less than 1% until a queue forms: they choose among
#   those who wait, and nobody does. What breaks objectives here is a whole prompt that runs while others decode.
# * **Throughput at equal memory** (16 requests of 32 + 24 tokens, batch of 8, 764 MB of experts, three rounds, real
#   loop): the engine as it serves 35.0 tokens/s (32.4 to 35.2), LRU on demand 17.3 (17.1 to 19.7), all resident 32.1
#   (31.1 to 37.4): **1.87x of on demand** (1.78 to 2.05). On demand, 15.7 GB were read for 384 tokens; the engine read
#   85 MB. Its perplexity is 1.00 to 1.01 times all-resident's at this memory (notebook 08, 50 and 62.5%).
#
# ### Routers
#
# 25 November 2026, 4 replicas, FCFS, 400 requests, Poisson, seed 0. The costs were taken on a busy machine (see
# notebook 11), so read the comparison, not the times.
#
# | load | router | mean latency | objectives met | choices covered by residents | experts loaded |
# |---|---|---|---|---|---|
# | 0.3 | round robin | 33.6 s | 98.5% | 92.7% | 1 |
# | 0.3 | least loaded | 31.5 s | 98.8% | 93.3% | x1.10 |
# | 0.3 | affinity, slack 0 | 31.4 s | 97.0% | 94.0% | |
# | 0.3 | affinity, slack 0.5 | 50.9 s | 45.8% | 93.9% | x0.27 |
# | 0.6 | round robin | 60.0 s | 34.3% | 90.1% | 1 |
# | 0.6 | least loaded | 57.6 s | 37.2% | 90.4% | x0.98 |
# | 0.6 | affinity, slack 0 | 57.5 s | 37.0% | 91.7% | |
# | 0.6 | affinity, slack 0.5 | 66.9 s | 21.7% | 93.8% | x0.32 |
#
# * As a tie-break between the least loaded, affinity is as fast as least loaded and covers more of what is asked for.
# * **Letting a better fitting replica be half a batch busier is not faster here**: it loads a third of the experts, but
#   by these costs a fuller batch costs more time than swaps save. It would pay where experts load slowly.
