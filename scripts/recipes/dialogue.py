"""Dialogue to fit on: questions written here, answered by the dense parent itself (self-instruction).

No package ships chat text that may be used for fitting, so the parent writes it: every topic is paired with templates
in a seeded order, answers are sampled at temperature 0.7. The result is stored with the recipe, because sampling is
not bit-reproducible between machines. Such text lies on the parent's own distribution, sharpened: an expert fitted to
it keeps the chat manner of the parent, it does not learn new facts.
"""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

TOPICS = (
    "photosynthesis",
    "the water cycle",
    "learning the guitar",
    "baking sourdough bread",
    "volcanoes",
    "saving money",
    "the solar system",
    "train journeys",
    "gardening on a balcony",
    "the Roman Empire",
    "running a marathon",
    "black holes",
    "writing a short story",
    "healthy breakfasts",
    "chess openings",
    "recycling at home",
    "job interviews",
    "the human heart",
    "coffee",
    "electric cars",
    "penguins",
    "Renaissance painting",
    "public speaking",
    "good sleep",
    "vaccines",
    "mountain hiking",
    "databases",
    "the stock market",
    "bees",
    "moving to a new city",
    "learning a language",
    "earthquakes",
    "time management",
    "the printing press",
    "houseplants",
    "swimming",
    "music theory",
    "renewable energy",
    "meditation",
    "whales",
    "wooden furniture",
    "the French Revolution",
    "computer networks",
    "a birthday party",
    "soil",
    "ancient Egypt",
    "photography",
    "cheese",
    "bridges",
    "team meetings",
)
TEMPLATES = (
    "Explain {topic} to a ten-year-old.",
    "Give me three tips about {topic}.",
    "Write a short email to a friend about {topic}.",
    "I want to know more about {topic}. Where should I start?",
    "What do people often get wrong about {topic}?",
    "Write a short poem about {topic}.",
    "Summarise the most important facts about {topic} in two sentences.",
    "Ask me a question about {topic} and then answer it yourself.",
)


def questions(count: int, seed: int) -> list[str]:
    """Return `count` different questions, in an order decided by the seed."""
    pairs = [template.format(topic=topic) for topic in TOPICS for template in TEMPLATES]
    random.Random(seed).shuffle(pairs)
    return pairs[:count]


@torch.no_grad()
def answer(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    asked: list[str],
    seed: int,
    batch: int = 40,
    max_new_tokens: int = 150,
) -> list[dict[str, str]]:
    """Return one dictionary (question, answer) for each question, sampled from the model."""
    torch.manual_seed(seed)
    records = []
    for start in tqdm(range(0, len(asked), batch), desc="dialogue", unit="batch"):
        group = asked[start : start + batch]
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            for question in group
        ]
        inputs = tokenizer(chats, return_tensors="pt", padding=True)
        output = model.generate(  # type: ignore[misc]
            **inputs, do_sample=True, temperature=0.7, top_p=0.95, max_new_tokens=max_new_tokens
        )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        records += [{"question": q, "answer": t.strip()} for q, t in zip(group, texts, strict=True)]
    return records


def save(records: list[dict[str, str]], path: Path) -> None:
    """Write the records as gzipped JSON lines, the same bytes for the same records."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_bytes(gzip.compress(lines.encode(), mtime=0))


def load(path: Path) -> list[dict[str, str]]:
    """Read what `save` wrote."""
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
