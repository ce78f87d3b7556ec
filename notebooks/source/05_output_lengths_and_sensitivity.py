# %% [markdown] tags=[]
# # Output lengths and task sensitivity
#
# How long are the answers of a task (Fig. 4 of the paper), and which layers may be routed wrongly before its answers change
# (Fig. 5)? Routing is made random in the first j layers, answers are compared with the undisturbed ones by sentence
# similarity; a finer reading makes each layer random alone and takes the KL divergence. Two rules turn this into a mask of
# (task, layer) pairs that need not hold their own experts.
#
# The defaults measure a prompt each of two tasks, which checks that everything runs; `profile_path = "committed"` shows the
# profile that comes with the model, whose figures count.

# %% tags=["parameters"]
model: str = "tiny"  # "tiny" (random, only shows that everything runs), "reference", "carved", a checkpoint directory, or a hub id
profile_path: str = ""  # "": measure now; "committed": the model's own; else the path of a profile file
tasks: str = "qa,classification"  # measure now: tasks, comma-separated, or "all"
prompts: int = 1  # measure now: prompts of each task, for lengths and similarities
kl_prompts: int = 1  # measure now: how many of these for the divergence of single layers
depths: int = 2  # measure now: numbers of disturbed leading layers to try
max_new_tokens: int = 4  # measure now: tokens of the answers that are compared
length_cap_tokens: int = 8  # measure now: tokens at which an answer is cut
source: str = "fixture"  # prompts: fixture (20 of our own), embedded (prepared data sets), hub
threshold: float = 0.85  # similarity below which a layer is sensitive (the paper's rule)
allowance_nats: float = 0.02  # summed divergence that freed layers may cost, nats per token (our rule)
mask_budget: str = ""  # also run the model with both masks under this budget, such as "50%"; "": do not
mask_prompts: int = 24  # prompts of that run
dtype: str = "float32"
seed: int = 0

# %% tags=[]
# %matplotlib inline
from dataclasses import replace

import pandas as pd
from IPython.display import display

from emoe_core.planning.tasks import TASK_TYPES, Profile
from workbench.paper import figures, profile as profile_report
from workbench.tracking import run as tracking
from workbench.quality.configuration import ExperimentConfig
from workbench.models.names import resolve_model
from workbench.quality.profile.profiling import ProfileConfig, measure_profile, stored_profile
from workbench.progress import stage_bars

figures.set_style()
if profile_path == "":
    chosen = TASK_TYPES if tasks == "all" else tuple(tasks.split(","))
    config = ProfileConfig(
        model, prompts=prompts, kl_prompts=kl_prompts, depths=depths, threshold=threshold, tasks=chosen,
        max_new_tokens=max_new_tokens, length_cap_tokens=length_cap_tokens, source=source, dtype=dtype, seed=seed,
    )
    with stage_bars() as progress:
        profile = measure_profile(config, progress)
else:
    profile = stored_profile(resolve_model(model)) if profile_path == "committed" else Profile.load(profile_path)
    profile = replace(profile, threshold=threshold)
print(f"{len(profile.tasks)} tasks, {profile.n_layers} MoE layers; measured with {dict(profile.settings)}")

# %% tags=[]
# NBVAL_CHECK_OUTPUT
found = profile.tasks.values()
print("a mask frees no layer that costs more than the allowance:",
      all(row.kl_nats <= allowance_nats + 1e-9 for row in profile_report.mask_table(profile, allowance_nats).itertuples()
          if row.rule == profile_report.OUR_RULE))
print("divergences are not negative:", all(min(task.layer_kl_nats) > -1e-6 for task in found))
print("no output is longer than the cap:", all(task.length_quantiles_tokens[-1] <= task.length_cap_tokens for task in found))

# %% [markdown] tags=[]
# ## Output lengths (Fig. 4)

# %% tags=[]
lengths = profile_report.length_table(profile)
display(lengths.style.format(precision=1).format("{:.0%}", subset=["at_cap"]).hide())
length_figure = profile_report.lengths_figure(profile)
length_figure

# %% [markdown] tags=[]
# ## Random routing from the first layer on (Fig. 5)

# %% tags=[]
curves = profile_report.curves_figure(profile)
curves

# %% [markdown] tags=[]
# ## One layer at a time

# %% tags=[]
divergences = profile_report.divergence_figure(profile)
divergences

# %% [markdown] tags=[]
# ## Two masks
#
# The paper frees leading layers until the similarity first falls below the threshold. Ours frees the layers that cost least,
# wherever they lie, while their divergences add up to no more than the allowance. `kl_nats` is that sum for both: an estimate
# that takes layers for independent, for routing at random; a resident next-best expert is milder.

# %% tags=[]
masks = profile_report.mask_table(profile, allowance_nats)
display(masks.style.format({"free_share": "{:.0%}", "kl_nats": "{:.4f}"}).hide())
mask_figure = profile_report.masks_figure(profile, allowance_nats)
mask_figure

# %% tags=[]
measured = pd.DataFrame()
if mask_budget:
    under = ExperimentConfig(model, budget=mask_budget, tolerance=0.0, tasks=tuple(profile.tasks), n_prompts=mask_prompts,
                             source=source, warm_prompts=mask_prompts, dtype=dtype, seed=seed)
    with stage_bars() as progress:
        measured = profile_report.measure_masks(profile, under, allowance_nats, progress)
    display(measured.style.format(precision=4).hide())

# %% tags=[]
closing = profile_report.beside_paper(profile)
closing.style.hide()

# %% tags=[]
params = {"model": model, "profile_path": profile_path, "tasks": tasks, "prompts": prompts, "kl_prompts": kl_prompts, "depths": depths,
          "max_new_tokens": max_new_tokens, "length_cap_tokens": length_cap_tokens, "source": source, "threshold": threshold,
          "allowance_nats": allowance_nats, "mask_budget": mask_budget, "mask_prompts": mask_prompts}
with tracking.run("output lengths and sensitivity", profile_path or f"{prompts} prompts a task", params=params, seed=seed, dtype=dtype,
                  model_hash=profile.model_hash, data_hash=profile.data_hash) as run:
    for name, task in profile.tasks.items():
        run.log_metrics({f"{name}_output_tokens": task.expected_output_tokens, f"{name}_similarity_all_random": task.similarities[-1]})
    for row in masks.itertuples():
        run.log_metrics({f"{row.task}_free_layers_{'paper' if row.rule == profile_report.PAPER_RULE else 'ours'}": row.free_layers})
    for name, frame in (("lengths", lengths), ("masks", masks), ("measured_masks", measured), ("beside_paper", closing)):
        if len(frame):
            run.log_frame(name, frame)
    for name, figure in (("lengths", length_figure), ("similarity", curves), ("divergences", divergences), ("masks", mask_figure)):
        run.log_figure(name, figure)
print("logged")

# %% [markdown]
# ## The committed profiles of both models
#
# Six tasks, float32, seed 0, `profile_path="committed"`; answers are cut at 96 (`reference`) and 64 (`carved`) tokens. `reference` / `carved`; similarity is that of answers with every
# layer routed at random, layers are of 30.
#
# | task | mean output tokens | similarity | freed by the paper's rule (85%) | freed by ours (0.02 nats) |
# |---|---|---|---|---|
# | classification | 11 / 18 | 58% / 43% | 0 / 0 | 13 / 1 |
# | code | 94 / 64 | 94% / 18% | 15 / 0 | 25 / 3 |
# | comparison | 12 / 47 | 57% / 26% | 0 / 0 | 16 / 1 |
# | conversation | 84 / 64 | 59% / 16% | 0 / 0 | 20 / 0 |
# | qa | 39 / 48 | 83% / 37% | 15 / 0 | 25 / 1 |
# | summarization | 69 / 49 | 75% / 16% | 10 / 0 | 26 / 0 |
#
# The paper's finding holds on `reference` (experts grown from one parent stay alike) and not on `carved`, whose experts are parts of it: there no task is insensitive, and nothing can be
# skipped. Run with the masks (24 prompts, 50% of experts, on demand and otherwise exact):
#
# | mask | `reference`: perplexity ratio | loads | `carved`: perplexity ratio | loads |
# |---|---|---|---|---|
# | no skipping | 1.000 | 2,803 | 1.000 | 8,664 |
# | leading layers by similarity (paper) | 1.012 (1.003 to 1.023) | 2,216 | 1.000, nothing is freed | 8,664 |
# | cheapest layers by divergence (ours) | 1.019 (1.005 to 1.035) | 855 | 1.005 (1.001 to 1.009) | 8,424 |
#
