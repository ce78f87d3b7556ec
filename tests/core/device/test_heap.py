"""Free memory goes back to the system after the pass over a prompt, and only then."""

import pytest
import torch

from emoe_core.device import cpu_memory as heap


@pytest.fixture
def trims(monkeypatch):
    counted = []
    monkeypatch.setattr(heap, "_malloc_trim", lambda: counted.append)
    return counted


def test_every_fifth_layer_counted_from_the_last_trims_after_a_prompt(trims):
    layers = [torch.nn.Identity() for _ in range(12)]
    heap.trim_during_prompts(layers)
    trimmed = []
    for number, layer in enumerate(layers):
        before = len(trims)
        layer(torch.zeros(heap.PROMPT_TOKENS, 2))
        trimmed += [number] * (len(trims) - before)
    assert trimmed == [1, 6, 11]


def test_decoding_steps_do_not_trim(trims):
    layer = torch.nn.Identity()
    heap.trim_during_prompts([layer])
    layer(torch.zeros(1, 2))
    assert trims == []


def test_a_c_library_without_trimming_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap, "_malloc_trim", lambda: None)
    layer = torch.nn.Identity()
    heap.trim_during_prompts([layer])
    assert not layer._forward_hooks
    assert heap.return_free_memory() is False
