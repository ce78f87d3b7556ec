# %% [markdown]
# # Output lengths and task sensitivity
#
# How long are the answers of a task (Fig. 4 of the paper), and which layers may be routed wrongly before its answers
# change (Fig. 5)? Routing is made random in the first j layers, answers are compared with the undisturbed ones by
# sentence similarity; a finer reading makes each layer random alone and takes the KL divergence. Two rules turn this
# into a mask of (task, layer) pairs that need not hold their own experts.
#
# What is drawn is the profile that comes with the model; `measure = True` measures one now (hours at full settings).

# %% tags=["parameters"]
measure: bool = (
    False  # False draws the profile that comes with the model, or that `emoe model profile MODEL` has measured
)
model: str = "reference"  # "tiny" (random), "reference", "carved", "native", a checkpoint directory, or a hub id
profile_path: str = ""  # a profile file to draw in place of the model's own
tasks: str = "all"  # measure now: tasks, comma-separated, or "all"
prompts: int = 20  # measure now: prompts of each task, for lengths and similarities
kl_prompts: int = 4  # measure now: how many of these for the divergence of single layers
depths: int = 6  # measure now: numbers of disturbed leading layers to try
max_new_tokens: int = 32  # measure now: tokens of the answers that are compared
length_cap_tokens: int = 96  # measure now: tokens at which an answer is cut
source: str = "embedded"  # prompts: embedded (prepared data sets), fixture (20 of our own), hub
threshold: float = 0.85  # similarity below which a layer is sensitive (the paper's rule)
allowance_nats: float = 0.02  # summed divergence that freed layers may cost, nats per token (our rule)
mask_budget: str = ""  # also run the model with both masks under this budget, such as "50%"; "": do not
mask_prompts: int = 24  # prompts of that run
dtype: str = "float32"
seed: int = 0

# %%
# %matplotlib inline
from dataclasses import replace

from IPython.display import display

from emoe_core.planning.tasks import TASK_TYPES, Profile
from workbench.paper import figures
from workbench.paper import profile as report
from workbench.paper.tables import closing_table, shown
from workbench.progress import stage_bars
from workbench.quality.configuration import ExperimentConfig
from workbench.quality.profile.profiling import ProfileConfig, measure_profile, stored_profile
from workbench.tracking.findings import Findings
from workbench.tracking.parameters import config_from, listed, parameters_of

parameters = parameters_of(globals())
chosen = TASK_TYPES if tasks == "all" else tuple(listed(tasks))
figures.set_style()
if measure:
    with stage_bars() as progress:
        profile = measure_profile(config_from(ProfileConfig, parameters, tasks=chosen), progress)
else:
    profile = Profile.load(profile_path) if profile_path else stored_profile(model)
profile = replace(profile, threshold=threshold)
print(f"{len(profile.tasks)} tasks, {profile.n_layers} MoE layers; measured with {dict(profile.settings)}")

# %%
# NBVAL_CHECK_OUTPUT
masks, lengths = report.mask_table(profile, allowance_nats), report.length_table(profile)
ours = masks[masks["rule"] == report.OUR_RULE]
print(
    "a mask frees no layer that costs more than the allowance:", bool((ours["kl_nats"] <= allowance_nats + 1e-9).all())
)
found = profile.tasks.values()
print("divergences are not negative:", all(min(task.layer_kl_nats) > -1e-6 for task in found))
capped = all(task.length_quantiles_tokens[-1] <= task.length_cap_tokens for task in found)
print("no output is longer than the cap:", capped)

# %% [markdown]
# ## Output lengths (Fig. 4)

# %%
drawn = {
    "lengths": report.lengths_figure(profile),
    "similarity": report.curves_figure(profile),
    "divergences": report.divergence_figure(profile),
    "masks": report.masks_figure(profile, allowance_nats),
}
display(lengths.style.format(precision=1).format("{:.0%}", subset=["at_cap"]).hide())
drawn["lengths"]

# %% [markdown]
# ## Random routing from the first layer on (Fig. 5)

# %%
drawn["similarity"]

# %% [markdown]
# ## One layer at a time

# %%
drawn["divergences"]

# %% [markdown]
# ## Two masks
#
# The paper frees leading layers until the similarity first falls below the threshold. Ours frees the layers that cost
# least, wherever they lie, while their divergences add up to no more than the allowance. `kl_nats` is that sum for
# both: an estimate that takes layers for independent, for routing at random; a resident next-best expert is milder.

# %%
display(shown(masks))
drawn["masks"]

# %%
tables = {"lengths": lengths, "masks": masks, "beside_paper": report.beside_paper(profile)}
if mask_budget:
    settings = {"budget": mask_budget, "tolerance": 0.0, "n_prompts": mask_prompts, "warm_prompts": mask_prompts}
    under = config_from(ExperimentConfig, parameters, tasks=tuple(profile.tasks), **settings)
    with stage_bars() as progress:
        tables["measured_masks"] = report.measure_masks(profile, under, allowance_nats, progress)
    display(shown(tables["measured_masks"]))

# %%
closing_table(tables["beside_paper"], max(task.n_prompts for task in found), "prompts a task")

# %%
identity = {"model_hash": profile.model_hash, "data_hash": profile.data_hash, "dtype": dtype, "seed": seed}
Findings(tables, identity).log(
    "output lengths and sensitivity",
    f"{model}, {'measured now' if measure else profile_path or 'its own profile'}",
    parameters,
    report.profile_metrics(profile, masks),
    figures=drawn,
)

# %% [markdown]
# ## The committed profiles of both models
#
# Six tasks, float32, seed 0, as their models bring them; answers are cut at 96 (`reference`) and 64 (`carved`) tokens.
# `reference` / `carved`; similarity is that of answers with every layer routed at random, layers are of 30.
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
# The paper's finding holds on `reference` (experts grown from one parent stay alike) and not on `carved`, whose experts
# are parts of it: there no task is insensitive, and nothing can be skipped. Run with the masks (24 prompts, 50% of
# experts, on demand and otherwise exact):
#
# | mask | `reference`: perplexity ratio | loads | `carved`: perplexity ratio | loads |
# |---|---|---|---|---|
# | no skipping | 1.000 | 2,803 | 1.000 | 8,664 |
# | leading layers by similarity (paper) | 1.012 (1.003 to 1.023) | 2,216 | 1.000, nothing is freed | 8,664 |
# | cheapest layers by divergence (ours) | 1.019 (1.005 to 1.035) | 855 | 1.005 (1.001 to 1.009) | 8,424 |
