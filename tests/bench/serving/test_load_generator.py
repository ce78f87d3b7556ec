"""Promise of `emoe serve`: a public load generator, guidellm, measures it as it is (`make load` brings it along).

guidellm wants other versions of libraries than this project pins, so it lives in an environment of its own and is
started as a command. It asks for `/health`, streams with usage, and sends ``ignore_eos``. What it measures on a model
of 2 MB is no figure worth keeping; that it measures it, and counts as the server does, is the point.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from server_bench import PATIENCE_S, serving

from workbench.models.reference.tiny import tiny_moe

COMMAND = shutil.which("guidellm")
REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 6, 24, 8


@pytest.mark.skipif(COMMAND is None, reason="guidellm is not on the PATH (`make load` installs it apart)")
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm_measures_the_server_and_counts_as_it_does(tmp_path: Path, route: str) -> None:
    model = tiny_moe(tmp_path / "model", "mixtral", seed=3)
    report = tmp_path / "report.json"
    assert COMMAND is not None
    with serving(model) as service:
        options = {
            # The model's name is asked from /v1/models.
            "backend": f"kind=openai_http,target={service.url},request_format={route}",
            "profile": "kind=concurrent,streams=2",
            "constraint": f"kind=max_requests,count={REQUESTS}",
            "tokenizer": f"kind=hf_auto,model={model}",
            "data": f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}",
            "output": f"kind=json,path={report}",
        }
        command = [COMMAND, "run", "--disable-console", *(f"--{name}={value}" for name, value in options.items())]
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=offline, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        (found,) = json.loads(report.read_text())["benchmarks"]
        assert found["metrics"]["request_totals"] == {
            "successful": REQUESTS,
            "errored": 0,
            "incomplete": 0,
            "total": REQUESTS,
        }
        answers = found["requests"]["successful"]
        assert [answer["output_metrics"]["text_tokens"] for answer in answers] == [OUTPUT_TOKENS] * REQUESTS
        assert all(answer["input_metrics"]["text_tokens"] >= PROMPT_TOKENS - 1 for answer in answers)
        assert all(answer["info"]["timings"]["first_token_iteration"] for answer in answers)
        assert service.metric("emoe_requests_total", result="finished") == REQUESTS
        assert service.metric("emoe_output_tokens_total") == REQUESTS * OUTPUT_TOKENS
