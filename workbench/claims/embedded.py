"""Tables of the models that come along, from the figures that their evaluation stored beside each recipe."""

from __future__ import annotations

import json
from typing import Any

from emoe_core.errors import ExperimentError, require_known
from workbench.metrics.show import markdown_table
from workbench.models.reference import EMBEDDED, RECIPES
from workbench.models.reference.recipe import FIGURES

# The kind whose evaluation measured the routing of all of them on the same text.
ROUTING_OF = "native"
# A reading's title, its values' names, and how they are shown; shares of an expert are times the even one.
_READINGS = (
    ("smallest / largest share of choices of an expert, times even", ("least_share", "most_share"), ".2f"),
    ("domain and expert, normalised mutual information", ("nmi",), ".3f"),
    ("a token's experts that the token before it needed / any other token", ("reuse", "chance"), ".0%"),
    ("correlation of two texts' use of experts, same / other domain", ("same_domain", "other_domain"), ".2f"),
)


def losses_table(model: str) -> str:
    """Return a model's held-out loss by domain as Markdown: beside its dense parent, or in bits a byte."""
    domains = _figures(model)["domains"]
    if "dense_perplexity" in next(iter(domains.values())):
        columns = {"dense_perplexity": ("dense parent", ".1f"), "perplexity": (model, ".1f"), "ratio": ("ratio", ".2f")}
    else:
        columns = {"perplexity": ("perplexity a token", ".1f"), "bits_per_byte": ("bits a byte", ".2f")}
    rows = [
        [domain, *(format(row[name], shown) for name, (_, shown) in columns.items())] for domain, row in domains.items()
    ]
    return markdown_table(["domain", *(title for title, _ in columns.values())], rows)


def routing_table() -> str:
    """Return how the routers of all models choose on the same held-out text, as Markdown, a column a model."""
    figures = _figures(ROUTING_OF)
    models = {ROUTING_OF: figures["routing"], **figures["beside"]}
    rows = [
        [title, *(_joined(_evened(row), names, shown) for row in models.values())] for title, names, shown in _READINGS
    ]
    for place, half in enumerate(figures["routing"]["hit_rates"]):
        found = [row["hit_rates"][place] for row in models.values()]
        rows.append(
            [
                f"hits with {half['share']:.0%} of the experts: LRU / hot list / Belady",
                *(_joined(row, ("lru", "hot_list", "belady"), ".0%") for row in found),
            ]
        )
    heads = [f"`{name}`, top-{row['top_k']} of {row['experts']}" for name, row in models.items()]
    return markdown_table(["", *heads], rows)


def _figures(model: str) -> dict[str, Any]:
    require_known(model, EMBEDDED, "model that comes along")
    path = RECIPES / EMBEDDED[model] / FIGURES
    if not path.is_file():
        raise ExperimentError(f"no figures of the model {model!r}: scripts/evaluate_reference.py measures them.")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _evened(row: dict[str, Any]) -> dict[str, Any]:
    return row | {name: row[name] * row["experts"] for name in ("least_share", "most_share")}


def _joined(row: dict[str, Any], names: tuple[str, ...], shown: str) -> str:
    return " / ".join(format(row[name], shown) for name in names)
