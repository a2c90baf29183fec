"""The questions of lm-evaluation-harness, answered as the reference computes them; the harness itself need not be installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import tiny
from decoders import reference_folder

from jaxft.errors import UserError
from jaxft.inference.harness import Harness, language_model, main, register
from jaxft.models.families import gpt2

LENGTH = 24
TEXT = "the red cat sleeps on a big old house and"


class Asked(NamedTuple):
    """As the harness's ``Instance``, as far as models look at it."""

    args: tuple[object, ...]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Harness, Any, Path]:
    home = tmp_path_factory.mktemp("harness")
    tiny.write_decoder_tokenizer(home / "tokenizer")
    model = reference_folder(home / "model", gpt2, home / "tokenizer", max_position_embeddings=LENGTH)
    return Harness(str(home / "model"), batch_size=4), model, home / "model"


def ids(text: str) -> list[int]:
    return [tiny.WORDS.index(word) for word in text.split()]


def logs(model: Any, tokens: list[int]) -> Any:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)


def test_continuations_are_scored_as_the_reference_scores_them(made: tuple[Harness, Any, Path]) -> None:
    harness, model, _ = made
    end = len(tiny.WORDS)
    pairs = [(TEXT, " fast dog"), (TEXT + " ", "fast dog"), ("", "the cat"), (" ".join([TEXT] * 4), " bird")]
    best = int(logs(model, ids(TEXT))[-1].argmax())
    pairs.append((TEXT, f" {tiny.WORDS[best] if best < end else 'cat'}"))
    found = harness.loglikelihood([Asked(pair) for pair in pairs])
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        before, after = ids(context) or [end], ids(continuation)
        tokens = [*before, *after][-LENGTH - 1 :]
        rows = logs(model, tokens[:-1])[-len(after) :]
        assert value == pytest.approx(sum(float(row[token]) for row, token in zip(rows, after, strict=True)), rel=2e-5)
        assert greedy == all(int(row.argmax()) == token for row, token in zip(rows, after, strict=True))
    assert found[0] == pytest.approx(found[1])
    if best < end:
        assert found[-1][1]


def test_whole_texts_are_scored_in_windows_of_which_the_last_is_full(made: tuple[Harness, Any, Path]) -> None:
    harness, model, _ = made
    texts = ["cat", TEXT, " ".join([TEXT] * 6)]
    found = harness.loglikelihood_rolling([Asked((text,)) for text in texts])
    for text, value in zip(texts, found, strict=True):
        tokens, wanted = [len(tiny.WORDS), *ids(text)], 0.0
        for done in range(0, len(tokens) - 1, LENGTH):
            end = min(done + LENGTH, len(tokens) - 1)
            begin = max(0, end - LENGTH)
            rows = logs(model, tokens[begin:end])
            wanted += sum(float(rows[place - begin, tokens[place + 1]]) for place in range(done, end))
        assert value == pytest.approx(wanted, rel=2e-5)


def test_texts_go_on_until_a_string(made: tuple[Harness, Any, Path]) -> None:
    torch = pytest.importorskip("torch")
    harness, model, _ = made
    contexts = ["the cat", TEXT, " ".join([TEXT] * 4)]  # the last one loses its beginning
    found = harness.generate_until(
        [
            Asked((text, {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False, "temperature": 0.0}))
            for text in contexts
        ]
    )
    for text, made_text in zip(contexts, found, strict=True):
        prompt = torch.tensor([ids(text)[-(LENGTH - 6) :]])
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False,
                             eos_token_id=len(tiny.WORDS), pad_token_id=0)[0, prompt.shape[1]:].tolist()  # fmt: skip
        special = {*range(5), len(tiny.WORDS)}
        assert made_text.split() == [tiny.WORDS[token] for token in out if token not in special]
    words = next(text for text in found if len(text.split()) > 1).split()
    number = [len(text.split()) > 1 for text in found].index(True)
    (cut,) = harness.generate_until([Asked((contexts[number], {"until": words[1], "max_gen_toks": 6}))])
    assert cut.split() == words[:1]


def test_what_cannot_be_asked_is_refused_in_one_line(made: tuple[Harness, Any, Path], tmp_path: Path) -> None:
    harness, _, folder = made
    with pytest.raises(UserError, match="typical_p cannot be followed"):
        harness.generate_until([Asked(("cat", {"until": [], "typical_p": 0.5}))])
    with pytest.raises(UserError, match="continuation has 40 tokens"):
        harness.loglikelihood([Asked(("cat", " dog" * 40))])
    with pytest.raises(UserError, match="batch_size=auto"):
        Harness(str(folder), batch_size="auto")
    with pytest.raises(UserError, match="the model's limit is 24"):
        Harness(str(folder), max_length=25)
    with pytest.raises(UserError, match="the harness asks decoders"):
        Harness(str(tiny.make_folder(tmp_path / "bert", "masked_lm")))


def test_the_harness_is_asked_for_where_it_is_missing(
    made: tuple[Harness, Any, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        assert main() == 2
        assert (
            capsys.readouterr().err
            == "jaxft harness: error: lm-evaluation-harness is not installed: pip install lm-eval\n"
        )
    # As far as its interface is used here.
    library: dict[str, Any] = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.models")}
    base, kinds = type("LM", (), {}), dict[str, type]()
    library["lm_eval.api.model"] = ModuleType("lm_eval.api.model")
    library["lm_eval.api.model"].__dict__["LM"] = base
    library["lm_eval.api.registry"] = ModuleType("lm_eval.api.registry")
    library["lm_eval.api.registry"].__dict__["register_model"] = lambda name: lambda kind: kinds.update({name: kind})
    for name, module in library.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert issubclass(register(), Harness)
    assert issubclass(kinds["jaxft"], base)
    assert isinstance(language_model(str(made[2]), batch_size=2), base)
