"""``jaxft generate``: a tiny decoder with a tokenizer, through the command line."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest
from tiny import WORDS, refusal, run, write_tokenizer

from jaxft.errors import UserError
from jaxft.hub.pretrained import export_folder
from jaxft.hub.sums import NAME as SUMS
from jaxft.inference.generation import GenerationConfig, Writer, stored_generation
from jaxft.inference.predict import open_model
from jaxft.layers import Compute
from jaxft.models.families import llama
from jaxft.models.initial import init_params

Capture = pytest.CaptureFixture[str]
PROMPTS = ["the red cat", "a", "old house is not very big and", "fish sings"]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    config = dataclasses.replace(llama.TINY, vocab_size=len(WORDS), max_position_embeddings=40)
    model = llama.Model(config, "causal_lm", Compute())
    params = jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim > 1 else leaf, init_params(model, 1))
    write_tokenizer(folder / "tokenizer")
    export_folder(folder / "model", {}, llama, model, params, tokenizer_folder=folder / "tokenizer")
    (folder / "model" / SUMS).unlink()
    (folder / "model" / "generation_config.json").write_text(json.dumps({"max_new_tokens": 9, "eos_token_id": 3}))
    return folder / "model"


def writer(folder: Path, *, stop: tuple[str, ...] = (), **settings: Any) -> Writer:
    served = open_model(str(folder), [], lambda text: None)
    return Writer(served, GenerationConfig(**settings), stop=stop)


def test_prompts_of_a_file_are_answered_in_their_order(decoder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PROMPTS))
    code, out, err = run(capsys, "generate", decoder, tmp_path / "prompts.jsonl", "--batch-size", 2)
    assert code == 0, err
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["prompt"] for record in records] == PROMPTS
    for record in records:
        assert record["finish"] == ("length" if record["tokens"] == 9 else "stop")
        code, alone, err = run(capsys, "generate", decoder, "--prompt", record["prompt"])
        assert code == 0, err
        assert alone.removesuffix("\n") == record["text"]
    assert any(record["text"] for record in records)
    code, _, err = run(
        capsys, "generate", decoder, tmp_path / "prompts.jsonl", "--out", tmp_path / "out.jsonl", "--batch-size", 3
    )
    assert code == 0, err
    assert (tmp_path / "out.jsonl").read_text() == out


def test_prompts_of_standard_input_are_lines(decoder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the red cat\nfish\n")))
    code, out, err = run(capsys, "generate", decoder, "-", "--max-new-tokens", 3, "--temperature", 2, "--seed", 5)
    assert code == 0, err
    first = [json.loads(line)["text"] for line in out.splitlines()]
    assert len(first) == 2
    for seed, same in ((5, True), (6, False)):
        code, out, _ = run(
            capsys,
            "generate",
            decoder,
            "--prompt",
            "fish",
            "--prompt",
            "the red cat",
            "--max-new-tokens",
            3,
            "--temperature",
            2,
            "--seed",
            seed,
        )
        assert ([json.loads(line)["text"] for line in out.splitlines()][::-1] == first) is same


def test_pieces_make_the_whole_and_strings_end_it(decoder: Path) -> None:
    whole = next(writer(decoder, max_new_tokens=25).write(PROMPTS[:1], 1))
    *pieces, last = writer(decoder, max_new_tokens=25).stream(PROMPTS[0])
    assert last == whole
    assert len(pieces) > 1
    assert "".join(str(piece) for piece in pieces) == whole.text
    words = whole.text.split()
    end = " ".join(words[5:7])
    expected = whole.text[: whole.text.index(end)]
    for found in (next(writer(decoder, stop=("no such", end), max_new_tokens=25).write(PROMPTS[:1], 4)),):
        assert (found.text, found.finish) == (expected, "stop")
    *pieces, last = writer(decoder, stop=(end,), max_new_tokens=25).stream(PROMPTS[0])
    assert "".join(str(piece) for piece in pieces) == expected


def test_the_same_model_the_reference_generates_the_same_text(decoder: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(decoder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(decoder)
    ids = tokenizer(PROMPTS[2], return_tensors="pt").input_ids[:, :-1]  # without the separator at the end
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, eos_token_id=3, pad_token_id=0
    )
    found = next(writer(decoder, max_new_tokens=9, eos_token_id=(3,)).write([PROMPTS[2]], 1))
    assert found.text.strip() == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "a", "--top-p", "1.5"], "top_p=1.5: must be above 0 and at most 1"),
        (
            ["--prompt", "a", "--max-new-tokens", "60"],
            "prompt 1 has 2 tokens, and 60 more are beyond the model's limit of 40",
        ),
        ([], "give one INPUT"),
        (["--prompt", "a", "--stop", ""], "must not be empty"),
        (["--prompt", "a", "--batch-size", "0"], "--batch-size must be at least 1"),
    ],
)
def test_what_cannot_be_is_one_line(decoder: Path, arguments: list[str], said: str, capsys: Capture) -> None:
    assert said in refusal(capsys, "generate", decoder, *arguments)


@pytest.fixture(scope="module")
def draft(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first of the decoder's layers."""
    from jaxft.inference.load import load

    folder = tmp_path_factory.mktemp("draft")
    model, params, _ = load(str(decoder))
    small = llama.Model(dataclasses.replace(model.config, num_hidden_layers=1), "causal_lm", Compute())
    first = {**params, "layers": jax.tree.map(lambda leaf: leaf[:1], params["layers"])}
    export_folder(folder / "model", {}, llama, small, first, tokenizer_folder=decoder)
    return folder / "model"


def test_a_draft_changes_no_text(decoder: Path, draft: Path, capsys: Capture) -> None:
    prompts = [word for text in PROMPTS for word in ("--prompt", text)]
    code, alone, err = run(capsys, "generate", decoder, *prompts)
    assert code == 0, err
    code, out, err = run(capsys, "generate", decoder, *prompts, "--draft", draft, "--draft-tokens", 3)
    assert (code, out) == (0, alone), err
    assert re.search(r"draft: \d\.\d\d tokens were kept each time that the model read 3 proposals", err)
    code, out, err = run(capsys, "generate", decoder, *prompts[:2], "--draft", draft)
    assert (code, out) == (0, json.loads(alone.splitlines()[0])["text"] + "\n"), err


def test_drafts_that_cannot_be_are_one_line(decoder: Path, draft: Path, tmp_path: Path, capsys: Capture) -> None:
    def told(*arguments: object) -> str:
        return refusal(capsys, "generate", decoder, "--prompt", "a", *arguments)

    assert "give --draft too" in told("--draft-tokens", 3)
    assert "draft tokens 0: must be from 1 to 64" in told("--draft", draft, "--draft-tokens", 0)
    assert "num_beams=2: beams are searched without a draft" in told("--draft", draft, "--num-beams", 2)
    assert "and 36 more are beyond what model and draft can read of 35" in told(
        "--draft", draft, "--max-new-tokens", 36
    )
    other = shutil.copytree(draft, tmp_path / "other")
    tree = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tree["model"]["vocab"]
    vocabulary["cat"], vocabulary["red"] = vocabulary["red"], vocabulary["cat"]
    (other / "tokenizer.json").write_text(json.dumps(tree))
    (other / SUMS).unlink()
    assert "the same ids would be other texts" in told("--draft", other)


def test_settings_of_a_folder_are_followed_or_said(tmp_path: Path) -> None:
    path, notes = tmp_path / "generation_config.json", list[str]()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert stored_generation(tmp_path, notes.append) == {"eos_token_id": (5,)}
    path.write_text(
        json.dumps(
            {
                "do_sample": True,
                "temperature": 1,
                "eos_token_id": [2, 7],
                "num_beam_groups": 4,
                "top_p": None,
                "_from": 1,
            }
        )
    )
    assert stored_generation(tmp_path, notes.append) == {
        "do_sample": True,
        "temperature": 1,
        "top_k": 50,
        "eos_token_id": (2, 7),
    }
    assert notes == [f"{path}: not followed: num_beam_groups=4"]
    path.write_text(json.dumps({"num_beams": 4, "early_stopping": "never", "length_penalty": 2, "eos_token_id": 3}))
    found = stored_generation(tmp_path, notes.append)
    assert found == {"num_beams": 4, "early_stopping": "never", "length_penalty": 2, "eos_token_id": (3,)}
    for tree, said in (
        ({"early_stopping": "soon"}, "must be of the kind of False"),
        ({"eos_token_id": "x"}, "must be a token's id"),
        ({"max_new_tokens": 3.5}, "must be of the kind of 128"),
    ):
        path.write_text(json.dumps(tree))
        with pytest.raises(UserError, match=said):
            stored_generation(tmp_path, notes.append)


def test_beams_give_one_text_however_they_are_asked_for(decoder: Path, capsys: Capture) -> None:
    wide = ("--num-beams", 3, "--length-penalty", 2, "--early-stopping", "never", "--max-new-tokens", 6)
    code, several, err = run(capsys, "generate", decoder, "--prompt", PROMPTS[0], "--prompt", PROMPTS[2], *wide)
    assert code == 0, err
    code, alone, err = run(capsys, "generate", decoder, "--prompt", PROMPTS[2], *wide)
    assert code == 0, err
    assert json.loads(several.splitlines()[1])["text"] + "\n" == alone
    assert "not drawn" in refusal(capsys, "generate", decoder, "--prompt", "a", *wide, "--temperature", 1)


def test_encoders_make_no_texts(tmp_path: Path, capsys: Capture) -> None:
    from tiny import make_folder

    folder = make_folder(tmp_path / "m", "masked_lm")
    assert "the head masked_lm, which makes no texts" in refusal(capsys, "generate", folder, "--prompt", "a")


def test_the_example_of_the_page_runs(
    decoder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "generation.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    shutil.copytree(decoder, tmp_path / "runs/my_llama/export")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert len(names["found"].tokens) == 2
    assert capsys.readouterr().out.strip()
