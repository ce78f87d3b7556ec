# %% [markdown]
# # Routing patterns: what the past says about the next experts, and what a cache can make of it
#
# The observations behind eMoE (Figs 3, 7, 8, 9 of the paper) on recorded all-resident routing, and the use of them that
# costs no quality: eviction policies, replayed between LRU and the best possible (Belady's MIN). No model runs but for the recording.
# Expert numbers are labels, so the statistics are ones that renumbering does not change (`workbench/replay/patterns.py`).
#
# The defaults check that everything runs; the fixture's 20 prompts say little. Figures that count are at the end.

# %% tags=["parameters"]
model: str = "tiny"  # "tiny" (random, only shows that everything runs), "reference", "carved", a checkpoint directory, or a hub id
n_prompts: int = 6  # prompts in each stream (sticky and uniform)
source: str = "fixture"  # prompts: fixture (20 of our own), embedded (prepared data sets), hub
warm_prompts: int = 6  # earlier prompts, whose experts the pinned policy holds
max_new_tokens: int = 8  # tokens of each recorded answer
slot_shares: str = "0.25,0.5,0.75"  # cache sizes, as shares of a layer's experts, comma-separated
batch_size: int = 1  # prompts served together in the cache simulation
dtype: str = "float32"  # of the recording; "auto" is the checkpoint's own
device: str = "auto"
seed: int = 0

# %%
# %matplotlib inline
import numpy as np
import pandas as pd
from IPython.display import display

from workbench.paper import figures, routing as figures_patterns
from workbench.replay import patterns
from workbench.tracking import run as tracking
from workbench.replay.prediction import prompt_uses
from workbench.progress import stage_bars
from workbench.replay.recording import RecordingConfig
from workbench.replay.cache import simulate
from workbench.replay.accesses import record_accesses
from workbench.workloads import prompt_stream

figures.set_style()
config = RecordingConfig(
    model, warm_prompts=warm_prompts, n_prompts=n_prompts, source=source, max_new_tokens=max_new_tokens, dtype=dtype,
    device=device, seed=seed,
)
with stage_bars() as progress:
    recorded = record_accesses(config, batch_size=batch_size, progress=progress)
uniform = recorded.references["uniform"].trace
uses = {mix: prompt_uses(reference.trace) for mix, reference in recorded.references.items()}
experts = uniform.experts
print({mix: f"{len(accesses)} passes, {accesses.layers} layers of {experts} experts, top-{recorded.top_k}" for mix, accesses in recorded.streams.items()})

# %% [markdown]
# ## Which task uses which expert, and how skewed that is

# %%
shares = patterns.task_shares(uses["uniform"])
maps = figures_patterns.share_maps(shares)
maps

# %%
mass = patterns.mass_of_best(uses["uniform"])
covered = figures_patterns.mass_figure(mass)
covered

# %% [markdown]
# ## From layer to layer (Figs 3 and 7)
#
# Where a token goes from each expert of a middle layer, for the two tasks with most prompts; and Cramer's V between the first
# choices of neighbouring layers, over all tokens and within a task (0: independent, 1: the layer decides the next one).

# %%
middle = uniform.chosen.shape[1] // 2
names = [use.task for use in uses["uniform"]]
common = sorted(set(names), key=lambda task: (-names.count(task), task))[:2]
transitions = figures_patterns.transition_map({task: patterns.layer_transitions(uniform, task)[middle] for task in common}, middle)
association = {"all tokens": [patterns.cramers_v(table) for table in patterns.layer_transitions(uniform)]}
association |= {task: [patterns.cramers_v(table) for table in patterns.layer_transitions(uniform, task)] for task in sorted(set(names))}
display(pd.DataFrame(association).describe().loc[["mean", "min", "max"]].T.style.format(precision=2))
transitions

# %% [markdown]
# ## From prompt to prompt and from token to token (Figs 8 and 9)
#
# Correlation of the shares of prompts that lie i apart (1 / E taken out), beside the cosine of their word counts; and how many of a
# decoded token's experts an earlier token of the same answer used.

# %%
lags = [lag for lag in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20) if lag < n_prompts]
text = {mix: patterns.text_similarity([prompt.text for prompt in prompt_stream(config.stream(mix))], [use.task for use in uses[mix]], lags) for mix in uses}
by_lag = pd.DataFrame(
    {f"routing, {mix}": patterns.prompt_correlation(uses[mix], lags) for mix in uses} | {f"words, {mix}": text[mix] for mix in uses}
)
pairs = pd.Series({
    "same task": patterns.prompt_correlation(uses["uniform"], range(1, n_prompts), same_task=True).mean(),
    "different tasks": patterns.prompt_correlation(uses["uniform"], range(1, n_prompts), same_task=False).mean(),
}, name="routing correlation")
single = recorded.streams["uniform"] if batch_size == 1 else record_accesses(config).streams["uniform"]
reuse, chance = patterns.token_reuse(single, [lag for lag in (1, 2, 4, 8, 12, 16, 20) if lag < max_new_tokens - 1], seed=seed)
distance = figures_patterns.lag_figure(by_lag, reuse, chance)
display(pairs.to_frame().style.format(precision=2))
display(reuse.to_frame(f"reuse (chance {chance:.1%})").T.style.format("{:.1%}"))
distance

# %% [markdown]
# ## What a cache can make of it
#
# Every policy on the engine's own residency table, from empty slots, exact mode. `lru`, `lfu`, `least_stale` and `static` are the
# engine's; `pinned` holds the warm-up's most used experts; `decayed_demand` is new (`workbench/replay/policies.py`). The *gap* is
# from LRU's loads to MIN's; aim: close at least 30% of it.

# %%
sizes = sorted({max(1, round(float(share) * experts)) for share in slot_shares.split(",")})
capacities = {f"{slots} slots": [slots] * recorded.streams["uniform"].layers for slots in sizes}
with stage_bars() as progress:
    found = simulate(
        recorded.streams, capacities, warm=recorded.warm, expert_bytes=recorded.expert_bytes, seed=seed,
        progress=lambda done, total: progress("replays", done, total),
    )
display(found.pivot_table(index=["stream", "policy"], columns="slots", values="gap_closed").style.format("{:.0%}"))
online = found[~found["policy"].isin(["lru", "min", "random"])]
best = online.groupby("policy")["gap_closed"].mean().idxmax()
curves = figures_patterns.miss_curves(found, ["lru", best, "min", "random"])
curves

# %%
# NBVAL_CHECK_OUTPUT
bound = found[found["policy"] == "min"].set_index(["stream", "size"])["loads"]
keyed = found.set_index(["stream", "size"])
print("nothing beats the bound:", bool((keyed["loads"] >= bound.reindex(keyed.index)).all()))
everything = simulate(recorded.streams, {"all": [experts] * recorded.streams["uniform"].layers}, ["lru", "lfu"])
print("all slots: only first uses are loaded:", bool((everything["loads"] == everything["compulsory"]).all()))
print("who knows more covers more:", bool((mass["own"] >= mass["task"] - 1e-9).all() and (mass["task"] >= mass["stream"] - 1e-9).all()))


# %%
def span(values):
    return f"{np.nanmin(values):.2f} to {np.nanmax(values):.2f}"

half = str(experts // 2)
closing = pd.DataFrame(
    [
        ("Fig 3: transitions between layers", "strong pattern, no number", f"Cramer's V {span(association['all tokens'])}", "a measure that renumbering experts does not change"),
        ("Fig 7: consecutive layers", "about 0.50", f"V {np.mean(association['all tokens']):.2f} (mean)", "the paper correlates expert numbers, which are labels"),
        ("Fig 8: consecutive prompts", "0.40 to 0.60 (OpenMoE), 0.75 to 0.95 (Mixtral)", f"sticky {by_lag.loc[1, 'routing, sticky']:.2f}, uniform {by_lag.loc[1, 'routing, uniform']:.2f}", "sticky and uniform differ by how often the next prompt has the same task"),
        ("Fig 9: content, 1 to 20 prompts on", "0.48 to 0.55", f"words: sticky {span(by_lag['words, sticky'])}, uniform {span(by_lag['words, uniform'])}", "cosine of word counts; the paper names no measure"),
        (f"mass of the prompt's best {half} of {experts}", "not given", f"{mass.loc[experts // 2, 'own']:.1%}", f"best of the task {mass.loc[experts // 2, 'task']:.1%}, of the stream {mass.loc[experts // 2, 'stream']:.1%}"),
        ("gap LRU to MIN closed online", "not given", f"{best}: {online[online['policy'] == best]['gap_closed'].min():.0%} to {online[online['policy'] == best]['gap_closed'].max():.0%}", "the paper has no eviction policy: residents change between prompts only"),
    ],
    columns=["what", "paper", "here", "why they differ"],
)
with pd.option_context("display.max_colwidth", None):
    display(closing)

# %%
params = {"model": model, "n_prompts": n_prompts, "source": source, "warm_prompts": warm_prompts, "max_new_tokens": max_new_tokens,
          "slot_shares": slot_shares, "batch_size": batch_size}
with tracking.run("routing patterns", f"{model}, {n_prompts} prompts", params=params, seed=seed, dtype=dtype,
                  model_hash=recorded.model_hash, data_hash=recorded.data_hash) as run:
    run.log_metrics({f"{row.stream}_{row.slots:g}_slots_{row.policy}_loads": row.loads for row in found.itertuples()})
    run.log_metrics({f"{row.stream}_{row.slots:g}_slots_{row.policy}_gap_closed": row.gap_closed for row in found.itertuples() if row.gap_closed == row.gap_closed})
    run.log_metrics({"layer_association": np.mean(association["all tokens"]), "token_reuse_lag_1": reuse[1], "token_reuse_chance": chance,
                     "prompt_correlation_sticky": by_lag.loc[1, "routing, sticky"], "prompt_correlation_uniform": by_lag.loc[1, "routing, uniform"],
                     "mass_own_half": mass.loc[experts // 2, "own"]})
    run.log_tags({"emoe.best_policy": best})
    for name, frame in (("simulation", found), ("mass", mass.reset_index()), ("by_lag", by_lag.reset_index()), ("beside_paper", closing)):
        run.log_frame(name, frame)
    for name, figure in (("shares", maps), ("mass", covered), ("transitions", transitions), ("distance", distance), ("misses", curves)):
        run.log_figure(name, figure)
print("logged")

# %% [markdown]
# ## Measured with the full settings
#
# 24 November 2026, float32 routing, `source=embedded`, test split, streams of seed 0 only, 24 output tokens, one prompt at a time.
# `reference`: 120 prompts a stream, 240 to warm up; `carved`: 48 and 96.
#
# | what | paper | reference (8 experts, top-2) | carved (24 experts, top-12) |
# |---|---|---|---|
# | Figs 3, 7: first choices of neighbouring layers, Cramer's V, mean (range) | about 0.50 (another measure) | 0.75 (0.44 to 0.87) | 0.31 (0.21 to 0.44) |
# | Fig 8: consecutive prompts, sticky / uniform | 0.40 to 0.60; 0.75 to 0.95 | 0.85 / 0.46 | 0.72 / 0.53 |
# | two prompts of the same task / of different tasks | not given | 0.91 / 0.38 | 0.74 / 0.43 |
# | Fig 9: words of prompts 1 to 20 apart, sticky / uniform | 0.48 to 0.55 | 0.43 to 0.50 / 0.38 to 0.40 | 0.34 to 0.45 / 0.39 to 0.43 |
# | experts of a token that the one before it used (chance) | not given | 78% (45%) | 63% (54%) |
# | mass of half the experts: prompt's own / task's / stream's best | not given | 91.1 / 90.4 / 80.5% | 62.2 / 60.9 / 58.5% |
#
# What is common to two prompts is mostly their task: likeness falls with distance in the sticky stream and not in the uniform one. Knowing
# the task is nearly as good as knowing the prompt on both models. `carved` contradicts the paper's premise: half its experts cover little
# more than half of the choices.
#
# Misses in thousands; share of the gap from LRU to MIN that `decayed_demand` closes (aim: 30%):
#
# | model, slots (share of experts) | LRU, sticky / uniform | decayed_demand | MIN | gap closed |
# |---|---|---|---|---|
# | reference, 2 of 8 (25%) | 46.7 / 51.0 | 45.6 / 48.9 | 36.9 / 39.8 | 12 / 18% |
# | reference, 4 of 8 (50%) | 23.6 / 24.7 | 19.7 / 20.5 | 16.0 / 16.4 | 51 / 51% |
# | reference, 6 of 8 (75%) | 11.0 / 10.9 | 8.3 / 8.4 | 7.1 / 7.2 | 68 / 66% |
# | carved, 6 of 24 (25%) | 275.6 / 281.6 | 255.9 / 262.1 | 209.8 / 213.9 | 30 / 29% |
# | carved, 12 of 24 (50%) | 152.2 / 157.1 | 145.7 / 149.5 | 92.9 / 95.7 | 11 / 12% |
# | carved, 18 of 24 (75%) | 65.6 / 68.1 | 60.3 / 61.7 | 31.9 / 32.7 | 16 / 18% |
#
# **The aim is met on `reference` at 50% and 75%, and missed at 25% and on `carved`** (25% there is at the aim, within a point). None of the
# engine's present policies meets it but LFU at 75% of `reference`, sticky (49%). Prompt passes cost every policy nearly the same,
# MIN included; all that is won is won in decoding. There LRU suffers from the pass before: it needs nearly every expert and leaves behind
# whatever came last. At 25% of `reference` slots are as many as a token's experts, so a token's own experts fill the layer. On `carved` a
# token's experts are too little like the last token's.
#
# The half-life (2 passes) and the square root were chosen on these `reference` streams, not on `carved`. Also tried on both models' streams, with
# residents chosen freely: half-lives from 4 to 128 passes, without bypass, linear and logarithmic token counts, and the task's
# shares added as a prior; on `reference` also half-lives from 0.7 and router weights. At 50% and 75% none was better by more than
# a few points; at 25% of `reference` the best read 19%, and at 25% of `carved` 31%. No time was simulated: refusing newcomers leaves fewer reads to overlap, so fewer loads need not be faster.
#
