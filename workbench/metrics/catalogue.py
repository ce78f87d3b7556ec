"""Every metric of the bench: its unit, what it is about, which way is better, and what it means.

A row is exact; nothing is read out of the letters of a name. A logged name is one of

* a row's name: ``hit_rate``;
* a pattern, with ``*`` for what varies: ``predicted_loss_*`` stands for one metric a task;
* ``LABEL_NAME`` or ``LABEL/NAME`` of a row that is ``labelled``: what notebooks and benches that compare several
  configurations log of each (``every_prompt_kl_nats``);
* ``fresh_NAME`` or ``stock_NAME``: measured in a process of its own;
* one of these with ``_low`` or ``_high``: the ends of its interval or range.

Tables use the same names for their columns. What the catalogue does not know (a user's own metric) has the unit that
its name ends with, no direction and no meaning; it is about time where that unit is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache

MEMORY, QUALITY, TIME, OTHER = "memory", "quality", "time", "other"
LOWER, NEITHER, HIGHER = -1, 0, 1
FRESH, STOCK = "fresh", "stock"
GROUPS = (MEMORY, QUALITY, TIME, OTHER)  # in the order in which tables show them
ENDS = {"_low": "lower end", "_high": "upper end"}
INTERVAL = "of the 95% interval over prompts"
GROUP_MEANINGS = {
    MEMORY: "Slots, experts and dense weights are computed, peaks are the operating system's.",
    QUALITY: "Against the same model with every expert resident.",
    TIME: "Of a clock, on the machine named below.",
    OTHER: "How expert lookups were served, and counts. A lookup is one expert that a layer wants in one pass.",
}
# How names end, and the unit that this says; the longer first. Shares keep the word.
ENDINGS = {
    "_tokens_per_s": "tokens/s",
    "_bytes_per_s": "bytes/s",
    "_per_s": "1/s",
    "_bytes": "bytes",
    "_nats": "nats",
    "_s": "s",
}
_SHARES = ("_share", "_rate", "_agreement", "_mass")
_TIME_UNITS = ("s", "tokens/s", "bytes/s", "1/s")


@dataclass(frozen=True)
class Metric:
    """A row.

    Attributes
    ----------
    name : str
        A name, or a pattern.
    unit : str
        "bytes", "s", "%" (a share, shown in percent), "nats", "tokens/s", "bytes/s", "1/s", or empty for plain numbers.
    group : str
        `MEMORY`, `QUALITY`, `TIME` (whatever a clock or the load of the machine decides: a second run of the same code
        cannot be expected to repeat it) or `OTHER`.
    better : int
        `LOWER`, `HIGHER`, or `NEITHER` where no direction is better: settings, sizes of the model, counts.
    meaning : str
        For people.
    labelled : bool
        Whether names with a label before it are this metric too.
    measured : bool
        Memory as the operating system reports it: it repeats within a few percent, where computed memory is equal.
    """

    name: str
    unit: str
    group: str
    better: int
    meaning: str
    labelled: bool = False
    measured: bool = False

    @property
    def rank(self) -> int:
        """The place of its group in tables."""
        return GROUPS.index(self.group)


CATALOGUE = (
    # Memory.
    Metric("slot_bytes", "bytes", MEMORY, LOWER, "memory of the expert slots: the budget as allocated"),
    Metric("slot_share", "%", MEMORY, LOWER, "slot bytes per expert bytes"),
    Metric("expert_bytes", "bytes", MEMORY, NEITHER, "all experts of the model, resident or not"),
    Metric("dense_bytes", "bytes", MEMORY, NEITHER, "all weights that are no experts; always resident"),
    Metric("computed_bytes", "bytes", MEMORY, LOWER, "what the engine computes that it needs"),
    Metric("all_resident_bytes", "bytes", MEMORY, NEITHER, "computed bytes if every expert were resident"),
    Metric("measured_bytes", "bytes", MEMORY, LOWER, "peak over what the process held without a model", measured=True),
    Metric(
        "model_bytes", "bytes", MEMORY, LOWER,
        "peak of the process's life, less that of one without a model", measured=True,
    ),
    Metric(
        "serving_bytes", "bytes", MEMORY, LOWER,
        "serving peak, less that of a process without a model and mapped bytes", measured=True,
    ),
    Metric(
        "peak_bytes", "bytes", MEMORY, LOWER, "peak of the process, libraries included", labelled=True, measured=True,
    ),
    Metric("load_peak_bytes", "bytes", MEMORY, LOWER, "peak until the model was ready", measured=True),
    Metric("serving_peak_bytes", "bytes", MEMORY, LOWER, "peak from when the model was ready", measured=True),
    Metric("control_bytes", "bytes", MEMORY, NEITHER, "peak of a process without a model", measured=True),
    Metric(
        "serving_control_bytes", "bytes", MEMORY, NEITHER,
        "peak of a process without a model, once it is ready", measured=True,
    ),
    Metric(
        "mapped_bytes", "bytes", MEMORY, NEITHER,
        "pages of the checkpoint that the system may drop at no cost", measured=True,
    ),
    Metric("device_peak_bytes", "bytes", MEMORY, LOWER, "peak of the GPU's allocator; 0 on the CPU", measured=True),
    Metric(
        "decode_peak_bytes", "bytes", MEMORY, LOWER,
        "peak of the GPU's allocator before the long prompt; 0 on the CPU", measured=True,
    ),
    Metric("memory_ratio", "", MEMORY, LOWER, "serving bytes, emoe per stock", measured=True),
    Metric("serving_ratio", "", MEMORY, LOWER, "serving bytes, per the first variant's", measured=True),
    Metric("limit_bytes", "bytes", MEMORY, NEITHER, "memory that each process was allowed"),
    # Quality.
    Metric("perplexity_ratio", "", QUALITY, LOWER, "1 is equal, above 1 is worse", labelled=True),
    Metric("kl_nats", "nats", QUALITY, LOWER, "Kullback-Leibler divergence per token; 0 is equal", labelled=True),
    Metric("log_ratio_nats", "nats", QUALITY, LOWER, "log of the perplexity ratio, per token"),
    Metric("top1_agreement", "%", QUALITY, HIGHER, "tokens whose most likely successor is the same"),
    Metric("similarity", "", QUALITY, HIGHER, "cosine of the answers' sentence embeddings", labelled=True),
    Metric("identical", "", QUALITY, HIGHER, "share of the answers that are letter by letter the same"),
    Metric(
        "*_similarity_all_random", "", QUALITY, NEITHER,
        "similarity of a task's answers when every layer is routed at random: what the task depends on routing",
    ),
    # Time.
    Metric("ttft_s", "s", TIME, LOWER, "time to the first token, median over prompts", labelled=True),
    Metric("ttft_spread_s", "s", TIME, NEITHER, "distance of the quartiles over prompts"),
    Metric("long_ttft_s", "s", TIME, LOWER, "time to the first token of the long prompt, the second time it is read"),
    Metric("tpot_s", "s", TIME, LOWER, "time per further token, median over prompts", labelled=True),
    Metric("tpot_spread_s", "s", TIME, NEITHER, "distance of the quartiles over prompts"),
    Metric("ttft_ratio", "", TIME, LOWER, "time to the first token, emoe per stock"),
    Metric("tpot_ratio", "", TIME, LOWER, "time per further token, emoe per stock"),
    Metric("load_s", "s", TIME, LOWER, "time to load the model, its pack already written", labelled=True),
    Metric("score_s", "s", TIME, LOWER, "time to score a prompt"),
    Metric("stall_s", "s", TIME, LOWER, "time that passes waited for experts"),
    Metric("stall_share", "%", TIME, LOWER, "waiting for experts, share of the timed seconds"),
    Metric("swap_s", "s", TIME, LOWER, "time spent on exchanging residents"),
    Metric("prediction_s", "s", TIME, LOWER, "time spent on predicting who is wanted"),
    Metric("overhead_share", "%", TIME, LOWER, "predicting and exchanging residents, share of the time of requests"),
    Metric("others_cpu_share", "%", TIME, NEITHER, "processor time that other processes took meanwhile"),
    Metric("tokens_per_s", "tokens/s", TIME, HIGHER, "tokens put out a second", labelled=True),
    Metric("answer_tokens_per_s", "tokens/s", TIME, HIGHER, "tokens of the answer a second, after the first"),
    Metric("decode_tokens_per_s", "tokens/s", TIME, HIGHER, "at the largest batch", labelled=True),
    Metric("speed_ratio", "", TIME, HIGHER, "tokens a second, per the reference's", labelled=True),
    Metric("ideal_tokens_per_s", "tokens/s", TIME, NEITHER, "what disk, memory and Belady's loads allow at most"),
    Metric("share_of_bound", "", TIME, HIGHER, "tokens a second, per what the bound of the system's reads allows",
           labelled=True),
    Metric("memcpy_bytes_per_s", "bytes/s", TIME, NEITHER, "one large copy from host memory to the device"),
    Metric("fill_bytes_per_s", "bytes/s", TIME, HIGHER, "loading every expert into its slot"),
    Metric("fill_share", "%", TIME, HIGHER, "loading every expert, per one large copy"),
    # Serving: objectives and latencies of requests, measured or simulated by measured costs.
    Metric("latency_mean_s", "s", TIME, LOWER, "time from arrival to the last token, mean over requests",
           labelled=True),
    Metric("ttft_mean_s", "s", TIME, LOWER, "time from arrival to the first token, mean over requests", labelled=True),
    Metric("tpot_mean_s", "s", TIME, LOWER, "time per further token, mean over requests"),
    *(
        Metric(f"{stem}_p{q}_s", "s", TIME, LOWER, f"{words}: {q} of 100 requests took no longer")
        for stem, words in (
            ("latency", "time to the last token"),
            ("ttft", "time to the first token"),
            ("tpot", "time per further token"),
        )
        for q in (50, 90, 99)
    ),
    Metric("span_s", "s", TIME, LOWER, "from the first arrival to the last token"),
    Metric("throughput_per_s", "1/s", TIME, HIGHER, "requests finished a second"),
    Metric("output_tokens_per_s", "tokens/s", TIME, HIGHER, "tokens put out a second"),
    Metric("goodput_per_s", "1/s", TIME, HIGHER, "requests a second that met their objectives", labelled=True),
    Metric("rate_per_s", "1/s", TIME, NEITHER, "requests that arrived a second"),
    Metric("capacity_per_s", "1/s", TIME, HIGHER, "requests a second that full batches could serve"),
    Metric("loading_s", "s", TIME, LOWER, "time in which engines exchanged residents"),
    Metric("busy_share", "%", TIME, NEITHER, "time in which engines had something to do"),
    Metric("attainment_share", "%", OTHER, HIGHER, "requests that met their objectives", labelled=True),
    Metric("ttft_attainment_share", "%", OTHER, HIGHER, "requests whose first token came in time"),
    Metric("tpot_attainment_share", "%", OTHER, HIGHER, "requests whose further tokens came in time"),
    Metric("held_mass", "%", OTHER, HIGHER, "router choices of requests that fell on residents", labelled=True),
    Metric("expert_loads", "", OTHER, LOWER, "experts that exchanges of residents brought in", labelled=True),
    Metric("steps", "", OTHER, NEITHER, "decode steps of all engines"),
    Metric("reference_load", "", OTHER, NEITHER, "rate at which 90% of objectives are met in order of arrival"),
    Metric("*_reachable_load", "", OTHER, HIGHER, "rate at which 90% of objectives are met, as a share of capacity"),
    Metric("bound_*", "", OTHER, NEITHER, "more than this no scheduler can gain at the reference load"),
    Metric("*_s_real", "s", TIME, LOWER, "of the real loop"),
    Metric("*_s_simulated", "s", TIME, NEITHER, "of the simulation of the same requests"),
    Metric("*_s_ratio", "", TIME, NEITHER, "simulated over real; 1 is right"),
    Metric("*_s_refitted_ratio", "", TIME, NEITHER, "simulated by the real loop's own times, over real; 1 is right"),
    Metric("requests", "", OTHER, NEITHER, "requests that a service answered"),
    Metric("scale_arrivals_per_s", "1/s", TIME, NEITHER, "requests a second of the largest simulated cluster"),
    Metric("scale_simulated_per_s", "1/s", TIME, HIGHER, "requests that a second of computing simulates"),
    # How expert lookups were served. A lookup is one expert that a layer wants in one pass.
    Metric("lookups", "", OTHER, NEITHER, "hits, loads, reroutes and drops"),
    Metric("hits", "", OTHER, NEITHER, "the expert was in a slot, or on its way"),
    Metric("loads", "", OTHER, LOWER, "the expert was fetched because a layer needed it"),
    Metric("reroutes", "", OTHER, LOWER, "the expert stayed absent, residents took its tokens"),
    Metric("drops", "", OTHER, LOWER, "the expert stayed absent, nobody took its tokens"),
    Metric("hit_rate", "%", OTHER, HIGHER, "hits per lookup"),
    Metric("token_hit_rate", "%", OTHER, HIGHER, "hits per token and chosen expert"),
    Metric("prefetches", "", OTHER, NEITHER, "experts that the planner brought in"),
    Metric("evictions", "", OTHER, LOWER, "experts that had to leave their slot"),
    Metric("bytes_loaded", "bytes", OTHER, LOWER, "expert bytes read", labelled=True),
    Metric("wasted_bytes", "bytes", OTHER, LOWER, "of the bytes loaded, experts that served no request"),
    Metric("predictions", "", OTHER, NEITHER, "times that residents were predicted"),
    Metric("swaps", "", OTHER, NEITHER, "times that residents were exchanged"),
    Metric("replayed_lru_hit_rate", "%", OTHER, NEITHER, "what LRU would hit in as many slots"),
    Metric("replayed_random_hit_rate", "%", OTHER, NEITHER, "what random eviction would hit in as many slots"),
    Metric("replayed_belady_hit_rate", "%", OTHER, NEITHER, "the best possible with hindsight, in as many slots"),
    Metric("predicted_loss_*", "", OTHER, LOWER, "loss that the task's profile predicts for what was chosen"),
    Metric("exact_layers_*", "", OTHER, NEITHER, "layers that may not reroute the task"),
    # Replayed routing.
    Metric("*_loads", "", OTHER, LOWER, "experts that the policy would fetch"),
    Metric("*_gap_closed", "", OTHER, HIGHER, "share of the loads between LRU's and the least possible that it avoids"),
    Metric("*_mass", "%", OTHER, HIGHER, "router choices that fall on the residents it would choose"),
    Metric("*_of_oracle", "", OTHER, HIGHER, "mass, as a share of hindsight's"),
    Metric("*_skill", "", OTHER, HIGHER, "mass between random residents (0) and hindsight (1)"),
    Metric("*_moved_bytes", "bytes", OTHER, LOWER, "bytes that exchanges of residents would read a prompt"),
    Metric("layer_association", "", OTHER, NEITHER, "how much a layer's choice tells of the next layer's"),
    Metric("token_reuse_lag_1", "", OTHER, NEITHER, "experts of a token that the token before it chose"),
    Metric("token_reuse_chance", "", OTHER, NEITHER, "the same of two tokens drawn at random"),
    Metric("prompt_correlation_*", "", OTHER, NEITHER, "correlation of the experts of prompts that follow each other"),
    Metric("mass_own_half", "", OTHER, NEITHER, "a prompt's choices that fall on its own most used half of experts"),
    # What a decoded token asks of a device, counted by a profiler.
    Metric("host_waits_per_token", "", OTHER, LOWER, "times that any thread of the host waits for the device"),
    Metric("engine_waits_per_token", "", OTHER, LOWER, "times that the engine has its own thread wait for the device"),
    Metric("launches_per_token", "", OTHER, LOWER, "kernels that the host launches"),
    # Counts and lengths.
    Metric("similarity_prompts", "", OTHER, NEITHER, "prompts that were answered for the similarity"),
    Metric("scored_tokens", "", OTHER, NEITHER, "tokens that quality is measured over"),
    Metric("prompts", "", OTHER, NEITHER, "prompts that quality is measured over"),
    Metric("tokens", "", OTHER, NEITHER, "tokens in and out of the timed prompts"),
    Metric("*_output_tokens", "", OTHER, NEITHER, "tokens that a task's answers have in the mean"),
    Metric("*_free_layers_*", "", OTHER, NEITHER, "layers that a mask lets reroute a task"),
    Metric("longest_tokens", "", OTHER, HIGHER, "longest prompt that survived", labelled=True),
    Metric("largest_batch", "", OTHER, HIGHER, "largest batch that survived", labelled=True),
    Metric("tokens_ratio", "", OTHER, HIGHER, "longest prompt, per stock's", labelled=True),
    Metric("batch_ratio", "", OTHER, HIGHER, "largest batch, per stock's", labelled=True),
)  # fmt: skip

_EXACT = {row.name: row for row in CATALOGUE if "*" not in row.name}
_PATTERNS = tuple(row for row in CATALOGUE if "*" in row.name)
_LABELLED = sorted((row for row in CATALOGUE if row.labelled), key=lambda row: -len(row.name))


@lru_cache(maxsize=4096)
def metric_of(name: str) -> Metric:
    """Return the row that a logged name or a column belongs to; for what the catalogue does not know one like it."""
    return _row(name) or _unknown(name)


def _row(name: str) -> Metric | None:
    if name in _EXACT:
        return _EXACT[name]
    for place in (FRESH, STOCK):
        plain = name.removeprefix(f"{place}_")
        if plain != name and (found := _row(plain)) is not None:
            return found
    for row in _LABELLED:
        if name.endswith((f"_{row.name}", f"/{row.name}")):
            return row
    for row in _PATTERNS:
        if fnmatchcase(name, row.name):
            return row
    for end, words in ENDS.items():
        plain = name.removesuffix(end)
        if plain != name and (found := _row(plain)) is not None:
            return replace(found, meaning=f"{words} {INTERVAL if found.group == QUALITY else 'of its range'}")
    return None


def _unknown(name: str) -> Metric:
    unit = next((unit for ending, unit in ENDINGS.items() if name.endswith(ending)), "")
    unit = "%" if name.endswith(_SHARES) else unit
    return Metric(name, unit, TIME if unit in _TIME_UNITS else OTHER, NEITHER, "")
