"""Tokenizers that treat what a model reads and what it writes differently, against those of `transformers`: Marian's two SentencePiece
models, and the languages that mBART's and NLLB's mark texts with."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path

import pytest
from multilingual import multilingual

from jaxft.config import load_config
from jaxft.config.generation import GenerationConfig
from jaxft.data.processors.contract import Languages
from jaxft.data.processors.languages import check_language, written_in_its_language
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.models.contract import Facts
from jaxft.tasks.contract import Targets
from jaxft.tasks.seq2seq import Config, encode, make_task

transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")

PROSE = Path(__file__).parents[2] / "docs"
ODD = (
    "", "  >>deu<< Hello,  Gauß Москва\tworld", ">>deu<< hi there", ">>xx<< hi", ">>fra<<hi", "a</s> b<unk>c <pad>d", "ßß ß", "▁x ▁▁y",
    " lead", "trail ", "x\n\ny", "ﬁne №5 …", ">>deu<<", "</s>>>deu<< hi", ">> no code", "e\u0301",
)  # fmt: skip


def pieces_of(lines: list[str]) -> bytes:
    made = io.BytesIO()
    how = {"vocab_size": 350, "character_coverage": 0.9995, "num_threads": 1, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=made, **how)
    return made.getvalue()


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as OPUS-MT's are, of two small models."""
    folder = tmp_path_factory.mktemp("marian")
    sides = ("seq2seq.md", "generation.md")
    lines = {page: (PROSE / page).read_text().splitlines() for page in sides}
    vocabulary = {"</s>": 0, "<unk>": 1}
    for name, page in zip(("source", "target"), sides, strict=True):
        path = folder / f"{name}.spm"
        path.write_bytes(pieces_of(lines[page]))
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        for number in range(3, model.get_piece_size(), 1 if name == "source" else 2):  # some have no id
            vocabulary.setdefault(model.id_to_piece(number), len(vocabulary))
    for code in (">>deu<<", ">>fra<<", "<pad>"):
        vocabulary[code] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer_config.json").write_text(json.dumps({"source_lang": "en", "target_lang": "de"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "marian"}))
    return folder


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
def test_marians_ids_are_the_references(marian: Path, tmp_path: Path) -> None:
    ours, theirs = Tokenizer(marian, 32), transformers.AutoTokenizer.from_pretrained(str(marian))
    drawn, letters = random.Random(0), list("abc ZÄß▁.,  \tДж中🙂>><<\n")
    texts = [*ODD, *(PROSE / "seq2seq.md").read_text().splitlines()]
    texts += ["".join(drawn.choices(letters, k=drawn.randint(1, 12))) for _ in range(300)]
    how = {"truncation": True, "max_length": 32}
    wanted = {"source": theirs(texts, **how)["input_ids"], "target": theirs(text_target=texts, **how)["input_ids"]}
    found = {
        "source": [ids for ids, _, _ in ours.encode(texts)],
        "target": [ids for ids, _, _ in ours.target.encode(texts)],
    }
    assert found == wanted
    assert found["source"] != found["target"]
    assert ours.around == ours.target.around == ((), (0,))
    # A token that stands for an unknown word is kept here.
    known = [ids for ids in wanted["target"] if 1 not in ids]
    assert [ours.decode(ids) for ids in known] == theirs.batch_decode(known, skip_special_tokens=True)
    ours.save(tmp_path)
    again = Tokenizer(tmp_path)
    assert again.digest() == ours.digest() == Tokenizer(marian).digest()
    assert type(transformers.AutoTokenizer.from_pretrained(str(tmp_path))).__name__ == "MarianTokenizer"


def test_pieces_know_their_places_in_a_text(marian: Path) -> None:
    text = "The  model ﬁnds a target"
    ((ids, places),) = Tokenizer(marian).plain([text])
    told = "".join(text[first:last] for first, last in places)
    assert len(ids) == len(places)
    assert told.replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("target.spm", None, r"no target\.spm: a tokenizer of class MarianTokenizer needs source\.spm, target\.spm, vocab\.json"),
        ("source.spm", b"\x0f\xff\xff", r"source\.spm: not a SentencePiece model"),
        ("source.spm", b"", r"source\.spm: a SentencePiece model without pieces"),
        ("vocab.json", b'{"<unk>": 0}', r"vocab\.json: has no token '</s>', the eos_token of tokenizer_config\.json"),
        ("vocab.json", b'{"<unk>": "x"}', r"vocab\.json: '<unk>' has 'x' for its id"),
        ("tokenizer_config.json", b'{"separate_vocabs": true}', "separate_vocabs=true is not supported"),
    ],
)  # fmt: skip
def test_files_of_marians_that_cannot_be_are_one_line(
    marian: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    shutil.copytree(marian, tmp_path / "m")
    path = tmp_path / "m" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer(tmp_path / "m")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["MBartTokenizer", "MBart50Tokenizer", "NllbTokenizer"])
def test_texts_are_marked_as_the_reference_marks_them(kind: str, tmp_path: Path) -> None:
    folder, source, target = multilingual(kind, tmp_path / "tok")
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder), src_lang=source, tgt_lang=target)
    assert type(theirs).__name__ == kind
    ours, texts = Tokenizer(folder, 6, languages=Languages(source, target)), ["red cat", "rot Katze", "", "red " * 9]
    for made, wanted in (
        (ours.encode(texts), theirs(texts, truncation=True, max_length=6)),
        (ours.target.encode(texts), theirs(text_target=texts, truncation=True, max_length=6)),
    ):
        assert [ids for ids, _, _ in made] == wanted["input_ids"]
    code = theirs.convert_tokens_to_ids(target)
    assert ours.language == ours.target.language == code
    said = written_in_its_language(GenerationConfig(), ours)
    last = kind == "MBartTokenizer"
    assert (said.decoder_start_token_id, said.forced_bos_token_id) == ((code, None) if last else (None, code))
    kept = GenerationConfig(forced_bos_token_id=0, decoder_start_token_id=0)
    assert written_in_its_language(kept, ours) == kept != written_in_its_language(kept, ours, anew=True)
    # Its languages are in its files from then on, for transformers too.
    (tmp_path / "out").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "out")
    ours.save(tmp_path / "out")
    again = Tokenizer(tmp_path / "out", 6)
    assert again.digest() == ours.digest()
    loaded = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert (type(loaded).__name__, loaded.src_lang, loaded.tgt_lang) == (kind, source, target)


@pytest.mark.parametrize("kind", ["MBartTokenizer", "MBart50Tokenizer"])
def test_targets_end_as_their_language_asks_and_are_cut_before(kind: str, tmp_path: Path) -> None:
    folder, source, target = multilingual(kind, tmp_path / "tok")
    config = load_config(None, ["task.name=seq2seq", "task.max_target_length=4"])
    tokenizer = Tokenizer(folder, 20, languages=Languages(source, target))
    (one,) = encode([Row(("red cat", "rot " * 9), "row 1")], tokenizer, None, config)
    assert tokenizer.special.end == 2
    options = config.task
    assert isinstance(options, Config)
    task = make_task(options, Targets(), Facts({}, ()), tokenizer)
    first = "decoder_start_token_id" if kind == "MBartTokenizer" else "forced_bos_token_id"
    assert json.loads(task.files(8, None)["generation_config.json"])[first] == tokenizer.language
    short = Facts({}, (), limit=128)
    with pytest.raises(UserError, match="max_new_tokens=128 is beyond the model's limit; set it to 127 or less"):
        make_task(options, Targets(), short, tokenizer)
    rot, code = tokenizer.plain(["rot"])[0][0][0], tokenizer.language
    assert one.example["target"].tolist() == ([rot, rot, 2, code] if kind == "MBartTokenizer" else [code, rot, rot, 2])
    assert one.example["tokens"].tolist() == tokenizer.ids(["red cat"])[0]
    least = load_config(None, ["task.name=seq2seq", "task.max_target_length=1"])
    (one,) = encode([Row(("red cat", "rot"), "row 1")], tokenizer, None, least)
    assert one.example["target"].tolist() == [2]


def test_languages_that_are_missing_or_unknown_are_one_line(tmp_path: Path, marian: Path) -> None:
    folder, source, _ = multilingual("MBart50Tokenizer", tmp_path / "tok")
    with pytest.raises(UserError, match=r"names none for targets; set task\.target_language"):
        check_language(Tokenizer(folder, languages=Languages(source)))
    with pytest.raises(
        UserError, match=r"target language 'de_De' is none of the tokenizer in .*; did you mean 'de_DE'\?"
    ):
        Tokenizer(folder, languages=Languages(source, "de_De"))
    with pytest.raises(UserError, match="MarianTokenizer does not mark texts with languages: name none"):
        Tokenizer(marian, languages=Languages("en"))
