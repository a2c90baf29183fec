"""Published models that are other sizes of a family: Ettin's encoders and mmBERT are ModernBERT; their decoders are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from published import ETTIN, MMBERT, SMALL, as_v5, write_gemma_tokenizer
from reference import close, torch_inputs
from safetensors.torch import load_file
from tiny import WORDS, refusal, write_tokenizer

from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.data.processors.tokenizer_classes import GENERIC, class_of
from jaxft.inference.load import load
from jaxft.layers import Rotary
from jaxft.models.example import example_batch
from jaxft.models.families import modernbert

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY: dict[str, dict[str, Any]] = {
    "ettin": ETTIN | SMALL | {"vocab_size": 64, "pad_token_id": 0},
    "mmbert": MMBERT | SMALL | {"vocab_size": 700},
}
PLAIN = [word for word in WORDS if not word.startswith("[")]


def written(folder: Path, name: str, version: int) -> Any:
    """A random model of the reference, stored as the hub has it."""
    stated = TINY[name] if version == 4 else as_v5(TINY[name])
    config = transformers.ModernBertConfig.from_dict(json.loads(json.dumps(stated)), attn_implementation="eager")
    theirs = transformers.ModernBertForMaskedLM(config).eval()
    theirs.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(stated))
    write_gemma_tokenizer(folder, PLAIN) if name == "mmbert" else write_tokenizer(folder)
    return theirs


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("mmbert", 4),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("ettin", 4), ("ettin", 5), ("mmbert", 5))),
    ],
)
def test_ettin_and_mmbert_are_read_and_written_as_modernbert(name: str, version: int, tmp_path: Path) -> None:
    theirs = written(tmp_path / "theirs", name, version)
    notes: list[str] = []
    loaded = load(tmp_path / "theirs", note=notes.append)
    config = loaded.model.config
    assert (loaded.model.head, notes) == ("masked_lm", [])
    assert (config.global_rope, config.local_rope) == (Rotary(160_000.0), Rotary(160_000.0))
    assert (config.max_position_embeddings, config.classifier_pooling) == (
        theirs.config.max_position_embeddings,
        "mean",
    )
    assert list(config.types) == theirs.config.layer_types
    batch = example_batch(modernbert.facts(config), 2, length=20)
    seen = batch["mask"].astype(bool)
    out = jax.jit(loaded.model.apply)({"params": loaded.params}, **batch)
    with torch.no_grad():
        close(out.logits[seen], theirs(**torch_inputs(batch)).logits[torch.tensor(seen)], "logits")
    loaded.save(tmp_path / "ours")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "ours"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "ours").config
    same = ("rope_parameters", "layer_types", "sep_token_id", "cls_token_id", "bos_token_id", "pad_token_id")
    assert all(getattr(again, key) == getattr(theirs.config, key) for key in same)


@pytest.mark.parametrize("name", TINY)
def test_their_tokenizers_are_taken_as_they_are(name: str, tmp_path: Path) -> None:
    written(tmp_path, name, 4)
    hf_config, settings = (
        json.loads((tmp_path / file).read_text()) for file in ("config.json", "tokenizer_config.json")
    )
    assert class_of(tmp_path, settings, hf_config) == GENERIC[0]  # without transformers, which takes seconds to import
    texts = ["the small cat sleeps", "a  big house\té!", "", "<mask> red"]
    wanted = transformers.AutoTokenizer.from_pretrained(tmp_path)(texts)["input_ids"]
    ours = Tokenizer(tmp_path)
    assert [ids for ids, _, _ in ours.encode(texts)] == wanted
    assert ours.special.pad == 0
    found = ours(texts)["tokens"]
    np.testing.assert_array_equal(found, [[*ids, *[0] * (found.shape[1] - len(ids))] for ids in wanted])


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"model_type": "modernbert-decoder"}, "model family 'modernbert-decoder' is not supported; there are: albert, "),
        ({"model_type": "blenderbot"}, "model family 'blenderbot' is not supported; there are: albert, "),
        ({"model_type": "nomic-bert"}, "; did you mean 'nomic_bert'?"),
        ({"model_type": "bert", "position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is not"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_said_in_one_line(
    stated: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(stated))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert message in refusal(capsys, "convert", tmp_path, tmp_path / "out")
