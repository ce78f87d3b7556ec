# %% [markdown]
# # Decoding on a device
#
# One configuration, one process: tokens a second, times to the first token of a short and of a long prompt, the peak of
# the device's memory, how fast experts come in against one plain copy, and what a decode step consists of.
# `sweeps/gpu.yaml` runs this over a grid; `make gpu` runs the same grid where there is no MLflow.
#
# The defaults check that everything runs. On a CPU, figures say nothing of a GPU.

# %% tags=["parameters"]
model: str = "tiny"  # "tiny" (random), "reference", "carved", "native", a checkpoint directory, or a hub id
shape: str = ""  # instead: random weights of a published shape, "bench" (3.3 GB) or "olmoe-1b-7b" (14 GB)
scale: float = 1.0  # share of the shape's bytes
routing: str = "reference"  # recorded routing that the shape's weights follow
system: str = "emoe"  # or "stock-eager", "stock-grouped_mm", which hold every expert
budget: str = "100%"
tier: str = "host"  # where absent experts rest: "host" or "disk"
tolerance: float = 0.0
on_miss: str = "reroute"  # what becomes of experts that the tolerance lets go: "reroute" or "drop"
device: str = "auto"
tokens: int = 16  # decoded and timed
prompt_tokens: int = 16
warm_tokens: int = 4  # decoded before, untimed
long_prompt_tokens: int = 64
profiled_tokens: int = 2  # decoded under the profiler
seed: int = 0

# %%
# %matplotlib inline
from functools import partial

from workbench.bench.device_point import DevicePoint, measure_point
from workbench.metrics.show import metric_table
from workbench.paper.tables import shown
from workbench.tracking.findings import findings
from workbench.tracking.parameters import config_from, parameters_of

parameters = parameters_of(globals())
point = config_from(DevicePoint, parameters)
found = findings("13_decoding_on_a_device", True, partial(measure_point, point))
metrics = found["speed"].iloc[0].to_dict()
metric_table(metrics, list(metrics))

# %% [markdown]
# ## A decode step

# %%
shown(found["profile"].head(12))

# %%
# NBVAL_CHECK_OUTPUT
print("every token was decoded:", len(found["token_times"]) == tokens)

# %%
found.log("decoding on a device", f"{shape or model} {system} {budget} {tier}", parameters, metrics)
