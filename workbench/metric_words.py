"""What metrics mean: a line for each, and where it was measured.

A run of the bench measures up to three times, and names tell which: without a prefix it is the *quality measurement*,
in the notebook's own process; ``fresh_`` is the same configuration alone in a new process, ``stock_`` transformers with
every expert resident in another. The last two have a data type of their own, so that their bytes are not those of the
first. What holds the two against each other (`COMPARED`) is of neither.
"""

from __future__ import annotations

from collections.abc import Collection

OWN, FRESH, STOCK, BOTH = "own", "fresh", "stock", "both"
PLACES = (OWN, FRESH, STOCK, BOTH)

# A metric that compares the two fresh processes, and the one whose two values it compares.
COMPARED = {
    "memory_ratio": "serving_bytes",
    "tpot_ratio": "tpot_s",
    "ttft_ratio": "ttft_s",
    "others_cpu_share": "others_cpu_share",
}
GROUP_MEANINGS = {
    "memory": "Slots, experts and dense weights are computed, peaks are the operating system's.",
    "quality": "Against the same model with every expert resident.",
    "time": "Of a clock, on the machine named below.",
    "other": "How expert requests were served, and counts. A request is one expert that a layer wants in one pass.",
}
MEANINGS = {
    "slot_bytes": "memory of the expert slots: the budget as allocated",
    "slot_share": "slot bytes per expert bytes",
    "expert_bytes": "all experts of the model, resident or not",
    "dense_bytes": "all weights that are no experts; always resident",
    "model_bytes": "peak of the process's life, less that of one without a model",
    "serving_bytes": "serving peak, less that of a process without a model and mapped bytes",
    "peak_bytes": "peak of the process, libraries included",
    "load_peak_bytes": "peak until the model was ready",
    "serving_peak_bytes": "peak from when the model was ready",
    "control_bytes": "peak of a process without a model",
    "serving_control_bytes": "peak of a process without a model, once it is ready",
    "mapped_bytes": "pages of the checkpoint that the system may drop at no cost",
    "device_peak_bytes": "peak of the GPU's allocator; 0 on the CPU",
    "memory_ratio": "serving bytes, emoe per stock",
    "limit_bytes": "memory that each process was allowed",
    "perplexity_ratio": "1 is equal, above 1 is worse",
    "perplexity_ratio_low": "lower end of the 95% interval over prompts",
    "perplexity_ratio_high": "upper end of the 95% interval over prompts",
    "kl_nats": "Kullback-Leibler divergence per token; 0 is equal",
    "top1_agreement": "tokens whose most likely successor is the same",
    "similarity": "cosine of the answers' sentence embeddings",
    "similarity_prompts": "prompts that were answered for the similarity",
    "ttft_s": "time to the first token, median over prompts",
    "ttft_spread_s": "distance of the quartiles over prompts",
    "tpot_s": "time per further token, median over prompts",
    "tpot_spread_s": "distance of the quartiles over prompts",
    "ttft_ratio": "time to the first token, emoe per stock",
    "tpot_ratio": "time per further token, emoe per stock",
    "load_s": "time to load the model, its pack already written",
    "stall_s": "time that passes waited for experts",
    "stall_share": "waiting for experts, share of the timed seconds",
    "swap_s": "time spent on exchanging residents",
    "prediction_s": "time spent on predicting who is wanted",
    "others_cpu_share": "processor time that other processes took meanwhile",
    "requests": "hits, loads and reroutes",
    "hits": "the expert was in a slot, or on its way",
    "loads": "the expert was fetched because a layer needed it",
    "reroutes": "the expert stayed absent, residents took its tokens",
    "hit_rate": "hits per request",
    "token_hit_rate": "hits per token and chosen expert",
    "prefetches": "experts that the planner brought in",
    "evictions": "experts that had to leave their slot",
    "bytes_loaded": "expert bytes read",
    "wasted_bytes": "of the bytes loaded, experts that served no request",
    "predictions": "times that residents were predicted",
    "swaps": "times that residents were exchanged",
    "replayed_lru_hit_rate": "what LRU would hit in as many slots",
    "replayed_random_hit_rate": "what random eviction would hit in as many slots",
    "replayed_belady_hit_rate": "the best possible with hindsight, in as many slots",
    "scored_tokens": "tokens that quality is measured over",
    "prompts": "prompts that quality is measured over",
    "tokens": "tokens in and out of the timed prompts",
    "longest_tokens": "longest prompt that survived",
    "largest_batch": "largest batch that survived",
    "tokens_ratio": "longest prompt, per stock's",
    "batch_ratio": "largest batch, per stock's",
    "decode_tokens_per_s": "at the largest batch",
}


def place_of(metric: str, metrics: Collection[str]) -> tuple[str, str]:
    """Return where a metric was measured (one of `PLACES`) and the name of what was measured there.

    Parameters
    ----------
    metric : str
    metrics : collection of str
        All metrics of its run: what compares two fresh processes needs them.
    """
    for place in (FRESH, STOCK):
        measured = metric.removeprefix(f"{place}_")
        if measured != metric and measured in MEANINGS and not measured.endswith("_ratio"):
            return place, measured
    compared = COMPARED.get(metric)
    if compared is not None and {f"{FRESH}_{compared}", f"{STOCK}_{compared}"} <= set(metrics):
        return BOTH, compared
    return OWN, metric


def meaning_of(metric: str) -> str:
    """Return what a metric is, an empty text when that is not known.

    A name that notebooks made, ``every_prompt_kl_nats``, means what its end does.
    """
    parts = metric.split("_")
    ends = ("_".join(parts[start:]) for start in range(len(parts)))
    # One word may be the end of anything.
    return next((MEANINGS[end] for end in ends if end in MEANINGS and (end == metric or "_" in end)), "")
