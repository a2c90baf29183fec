"""Words with labels: through training, evaluation, answers and export, against `transformers` and seqeval."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest
import seqeval.metrics
from tiny import WORDS, make_folder, refusal, run, write_tokenizer

from jaxft.config import DataConfig, RunConfig
from jaxft.config.tasks.token_classification import Config
from jaxft.data.examples import make_split
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.data.sources.rows import Row
from jaxft.data.tagging import Scheme
from jaxft.errors import UserError
from jaxft.models.contract import Output
from jaxft.tasks import Targets, token_classification

Capture = pytest.CaptureFixture[str]
TAGS = ("O", "B-COL", "I-COL", "B-PLACE")
KIND = {"red": "B-COL", "green": "B-COL", "house": "B-PLACE", "tree": "B-PLACE"}


def sentence(rng: np.random.Generator, words: int) -> tuple[list[str], list[str]]:
    chosen = [str(word) for word in rng.choice(WORDS[5:], words)]
    tags = [KIND.get(word, "O") for word in chosen]
    for i in range(1, words):  # two colours in a row are one
        if tags[i] == "B-COL" and tags[i - 1].endswith("COL"):
            tags[i] = "I-COL"
    return chosen, tags


def row(*values: Any) -> Row:
    return Row(values, "row 0")


def write_rows(path: Path, count: int, seed: int = 0) -> list[tuple[list[str], list[str]]]:
    rng = np.random.default_rng(seed)
    made = [sentence(rng, int(rng.integers(1, 30))) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": words, "label": tags}) + "\n" for words, tags in made))
    return made


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained for a few steps on rows of up to 30 words, in windows of 16 tokens; and other rows."""
    folder = tmp_path_factory.mktemp("home")
    make_folder(folder / "encoder", num_hidden_layers=1)
    write_rows(folder / "train.jsonl", 60)
    write_rows(folder / "rows.jsonl", 25, seed=1)
    from jaxft import __main__

    code = __main__.main([
        "train", f"model.init={folder / 'encoder'}", "task.name=token_classification", "data.max_length=16",
        f"data.train={folder / 'train.jsonl'}", f"data.eval={folder / 'rows.jsonl'}", "data.buckets=[16]",
        f"data.labels=[{','.join(TAGS)}]", "train.steps=60", "eval.every=30", "optim.learning_rate=1e-2", f"train.out={folder / 'run'}",
        "optim.schedule=constant",
    ])  # fmt: skip
    assert code == 0
    return folder


def encoded(
    folder: Path, rows: list[tuple[Any, Any]], targets: Targets | None, length: int = 8, **options: Any
) -> list[Any]:
    long_texts = options.pop("long_texts", "windows")
    config = RunConfig(task=Config(**options), data=DataConfig(long_texts=long_texts))
    made = [Row(row, f"row {i}") for i, row in enumerate(rows)]
    return list(token_classification.encode(made, Tokenizer(folder, length), targets, config))


# -------------------------------------------------------------------------------------------------------- rows to examples


def test_each_word_counts_once_and_is_learnt_where_it_counts(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, extra=("un", "##known"))
    words = ["red", "unknown", "cat", "house", "the", "dog", "sings", "over", "a", "tree", "unknown"]
    tags = ["B-COL", "B-COL", "O", "B-PLACE", "O", "O", "O", "O", "O", "B-PLACE", "B-COL"]
    parts = encoded(tmp_path, [(words, tags)], Targets(TAGS))
    assert len(parts) > 1
    seen = []
    for one in parts:
        counts = one.example["counts"].astype(bool)
        seen += one.example["word"][counts].tolist()
        assert ((one.example["labels"] >= 0) == counts).all()
        assert [TAGS[i] for i in one.example["labels"][counts]] == [tags[i] for i in one.example["word"][counts]]
    assert sorted(seen) == list(range(len(words)))
    # All pieces: the second of a word goes on with the entity, and only where the word counts.
    every = encoded(tmp_path, [(words, tags)], Targets(TAGS), label_pieces="all")
    pieces = [
        (int(w), TAGS[label])
        for one in every
        for w, label, first in zip(one.example["word"], one.example["labels"], one.example["counts"], strict=True)
        if label >= 0 and not first
    ]
    assert pieces == [(1, "I-COL"), (10, "I-COL")]


def test_stretches_of_characters_become_labels_of_words(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    text = "the red green cat in a house"
    spans = [{"start": 4, "end": 13, "label": "COL"}, {"start": 23, "end": 28, "label": "PLACE"}]
    wanted = ["O", "B-COL", "I-COL", "O", "O", "O", "B-PLACE"]
    config = RunConfig(task=Config())
    targets = token_classification.study([row(text, spans)], config, None, lambda _: None)
    assert targets.labels == ("O", "B-COL", "B-PLACE", "I-COL", "I-PLACE")
    (one,) = encoded(tmp_path, [(text, spans)], targets, 32)
    counts = one.example["counts"].astype(bool)
    assert [targets.labels[i] for i in one.example["labels"][counts]] == wanted
    bioes = token_classification.study([row(text, spans)], RunConfig(task=Config(scheme="BIOES")), None, lambda _: None)
    (one,) = encoded(tmp_path, [(text, spans)], bioes, 32, scheme="BIOES")
    assert [bioes.labels[i] for i in one.example["labels"][counts]] == [
        *("O", "B-COL", "E-COL", "O", "O", "O", "S-PLACE")
    ]


def test_what_is_cut_off_is_counted(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    words = ["the"] * 20
    (one,) = encoded(tmp_path, [(words, ["O"] * 20)], Targets(TAGS), long_texts="truncate")
    assert (len(one.example["tokens"]), one.dropped) == (8, 14)
    assert [part.dropped for part in encoded(tmp_path, [(words, ["O"] * 20)], Targets(TAGS))] == [0] * 5


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ((["a", "cat"], ["O"]), "row 0: 2 words and 1 labels"),
        (("a cat", "O"), "row 0: 2 words and 1 labels"),
        ((["a", "cat"], ["O", None]), r"row 0: word 1 \('cat'\) has no label"),
        ((["a"], ["B-DOG"]), "row 0: unknown label 'B-DOG'"),
        (("a cat", [{"start": 2, "end": 9, "label": "COL"}]), "row 0: span 2 to 9 .COL. is outside of the text"),
        (("a cat", 3), "row 0: expected a list of labels"),
    ],
)
def test_rows_that_cannot_be_meant_so_are_refused(tmp_path: Path, row: Any, problem: str) -> None:
    write_tokenizer(tmp_path)
    with pytest.raises(UserError, match=problem):
        encoded(tmp_path, [row], Targets(TAGS))


# ---------------------------------------------------------------------------------------------------------------- scores


def test_scores_over_windows_equal_those_of_seqeval_over_rows(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    rng = np.random.default_rng(3)
    rows = [sentence(rng, int(n)) for n in rng.integers(1, 40, 30)]
    config = RunConfig(task=Config(), data=DataConfig(long_texts="windows"))
    tokenizer = Tokenizer(tmp_path, 12)
    made = token_classification.encode([row(*values) for values in rows], tokenizer, Targets(TAGS), config)
    split = make_split("eval", made, token_classification.fields(config, 0))
    task = token_classification.Task(TAGS)
    answers = [rng.integers(0, len(TAGS), len(words)) for words, _ in rows]
    sums: dict[str, Any] = {"loss": 0.0, "weight": 0.0}
    collected: dict[str, list[np.ndarray]] = {}
    for i in rng.permutation(len(split)):
        example = {name: value[None] for name, value in split[int(i)].items()} | {"weights": np.ones(1, np.float32)}
        said = np.array([answers[int(example["row"][0])][w] if w >= 0 else 0 for w in example["word"][0]])
        logits = jax.nn.one_hot(said, len(TAGS))[None] * 5.0

        def forward(batch: Any, key: Any, logits: jax.Array = logits) -> Output:
            return Output(logits, logits=logits)

        batch: Any = example
        added = task.sums(forward, batch, None)
        sums = {name: sums[name] + float(value) for name, value in added.items()}
        outputs = jax.device_get(task.outputs(forward, batch))
        for name, value in outputs.items():
            collected.setdefault(name, []).append(value[outputs["weights"] > 0])
    scores = task.score(sums, {name: np.concatenate(parts) for name, parts in collected.items()})
    true = [tags for _, tags in rows]
    predicted = [[TAGS[i] for i in row] for row in answers]
    assert (scores["rows"], scores["words"]) == (len(rows), sum(map(len, true)))
    assert sums["weight"] == scores["words"]
    for name, theirs in (("f1", "f1_score"), ("precision", "precision_score"), ("recall", "recall_score")):
        assert scores[name] == pytest.approx(getattr(seqeval.metrics, theirs)(true, predicted), abs=1e-12)
    assert scores["accuracy"] == pytest.approx(seqeval.metrics.accuracy_score(true, predicted), abs=1e-12)
    report: Any = seqeval.metrics.classification_report(true, predicted, output_dict=True, zero_division=0)
    assert scores["classes"]["COL"]["f1"] == pytest.approx(report["COL"]["f1-score"], abs=1e-12)
    assert scores["classes"]["PLACE"]["rows"] == report["PLACE"]["support"]


# --------------------------------------------------------------------------------------------------- through the commands


def test_a_trained_model_is_scored_alike_everywhere(home: Path, tmp_path: Path, capsys: Capture) -> None:
    trained = json.loads((home / "run/metrics.json").read_text())
    assert trained["f1"] > 0.5
    arguments = (
        "eval",
        home / "run",
        f"data.eval={home / 'rows.jsonl'}",
        "--out",
        tmp_path,
        "--rows",
        tmp_path / "r.csv",
    )
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    again = json.loads((tmp_path / "metrics.json").read_text())
    assert again["f1"] == trained["f1"]
    # A folder that no run goes with is scored by the usual options.
    bare = (
        "eval",
        home / "run/export",
        f"data.eval={home / 'rows.jsonl'}",
        "data.max_length=16",
        "--out",
        tmp_path / "b",
    )
    assert run(capsys, *bare)[0] == 0
    assert json.loads((tmp_path / "b/metrics.json").read_text())["f1"] == trained["f1"]
    assert f"entity F1 {trained['f1']:.4f}" in out
    with open(tmp_path / "r.csv", newline="") as file:
        table = list(csv.DictReader(file))
    rows = [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()]
    assert [row["true"].split() for row in table] == [row["label"] for row in rows]
    predicted = [row["predicted"].split() for row in table]
    assert again["f1"] == pytest.approx(seqeval.metrics.f1_score([row["label"] for row in rows], predicted), abs=1e-12)
    assert [row["right"] == "true" for row in table] == [
        p == row["label"] for p, row in zip(predicted, rows, strict=True)
    ]


def test_answers_have_their_places_in_the_text(home: Path, tmp_path: Path, capsys: Capture) -> None:
    text = "the big house in a tree, or " + "the cat runs over " * 6 + "House."
    code, out, err = run(capsys, "predict", home / "run", "--text", text)
    assert (code, err) == (0, "")
    found = json.loads(out)["entities"]
    assert found
    for one in found:
        assert text[one["start"] : one["end"]] == one["text"]
        assert 0 < one["score"] <= 1
    assert {one["start"] for one in found} >= {8, 19, len(text) - 6}
    # The same words as a list, and as a table.
    lists = tmp_path / "rows.jsonl"
    lists.write_text(json.dumps({"id": 7, "text": ["a", "tree", "house"], "label": ["O", "B-PLACE", "B-PLACE"]}) + "\n")
    code, out, _ = run(capsys, "predict", home / "run", lists)
    record = json.loads(out)
    assert code == 0
    assert [(one["words"], one["first"], one["last"]) for one in record["entities"]] == [
        (["tree"], 1, 1),
        (["house"], 2, 2),
    ]
    assert (record["id"], record["true"]) == (7, ["O", "B-PLACE", "B-PLACE"])
    assert run(capsys, "predict", home / "run", lists, "--out", tmp_path / "a.csv")[0] == 0
    with open(tmp_path / "a.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert json.loads(row["text"]) == ["a", "tree", "house"]
    assert json.loads(row["entities"]) == record["entities"]
    assert "--threshold" in refusal(capsys, "predict", home / "run", "--text", "a", "--threshold", "0.5")


def test_the_export_answers_alike_in_the_reference(home: Path, capsys: Capture) -> None:
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    theirs = transformers.BertForTokenClassification.from_pretrained(home / "run/export").eval()
    assert [theirs.config.id2label[i] for i in range(len(TAGS))] == list(TAGS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "run/export")
    words = ["the", "red", "house", "in", "a", "tree"]
    inputs = tokenizer([words], is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        logits = theirs(**inputs).logits[0].numpy()
    from jaxft import load

    loaded = load(home / "run/export", note=lambda _: None)
    ours = loaded.model.apply({"params": loaded.params}, inputs["input_ids"].numpy().astype(np.int32)).logits[0]
    np.testing.assert_allclose(ours, logits, atol=2e-5 * max(1.0, float(np.abs(logits).max())))
    assert loaded.labels == TAGS


def test_a_head_for_words_is_trained_further_and_others_are_said_to_be_fresh(
    home: Path, tmp_path: Path, capsys: Capture
) -> None:
    common = (
        *("train", f"data.train={home / 'rows.jsonl'}", "train.steps=1", "data.max_length=16", "data.buckets=[16]"),
        *("task.name=token_classification", "train.export=false"),
    )
    code, out, _ = run(capsys, *common, f"model.init={home / 'run/export'}", f"train.out={tmp_path / 'a'}")
    assert code == 0
    assert "the checkpoint's head is kept" in out
    assert "unknown config key 'task.mask_rate'" in refusal(capsys, *common, "task.mask_rate=0.2")
    assert "data.stride=4" in refusal(capsys, *common, "data.long_texts=truncate", "data.stride=4")


# ------------------------------------------------------------------------------------------------ other names for entities


def learnt(rows: list[Row], label_map: dict[str, str | None], scheme: str = "BIO") -> tuple[tuple[str, ...], list[str]]:
    """The tags that there are to learn, and what was said."""
    notes: list[str] = []
    config = RunConfig(
        Config(name="token_classification", scheme=cast("Scheme", scheme)),
        data=DataConfig(train="a", label_map=label_map),
    )
    return token_classification.study(rows, config, None, notes.append).labels, notes


def test_entities_get_other_names_and_keep_their_marks() -> None:
    rows = [
        row(["Ada", "Byron", "of", "London"], ["B-PER", "I-PER", "O", "S-LOC"]),
        row(["Acme", "Ltd", "by", "Bob"], "B-ORG E-ORG O I-PER"),
    ]
    names, notes = learnt(rows, {"PER": "PERSON", "LOC": "PLACE", "ORG": None})
    assert names == ("O", "B-PERSON", "I-PERSON", "S-PLACE")
    assert notes == [
        "a: data.label_map: 'PER' is 'PERSON' 3 times", "a: data.label_map: 'LOC' is 'PLACE' 1 times",
        "a: data.label_map: 'ORG' is taken off (O) 2 times",
    ]  # fmt: skip
    # Several may become one, two may be swapped, and a tag as it is written comes before the entity in it.
    assert learnt(rows, {"PER": "X", "LOC": "X", "ORG": "X"})[0] == ("O", "B-X", "E-X", "I-X", "S-X")
    assert learnt(rows, {"PER": "LOC", "LOC": "PER"})[0] == ("O", "B-LOC", "B-ORG", "E-ORG", "I-LOC", "S-PER")
    assert learnt(rows, {"S-LOC": "B-LOC", "PER": "O"})[0] == ("O", "B-LOC", "B-ORG", "E-ORG")


def test_tags_without_marks_get_other_names() -> None:
    rows = [row(["a", "cat", "sat"], ["DT", "NN", "VBD"]), row(["1"], [1.0])]
    assert learnt(rows, {"NN": "NOUN", "VBD": "VERB", "1": "CD"})[0] == ("CD", "DT", "NOUN", "VERB")
    assert learnt(rows, {"DT": None, "NN": None})[0] == ("O", "1", "VBD")


@pytest.mark.parametrize("scheme", ["BIO", "BIOES"])
def test_stretches_get_other_names_or_are_left_out(scheme: str) -> None:
    spans = [{"start": 0, "end": 3, "label": "COL"}, {"start": 4, "end": 9, "label": "PLACE"}]
    names, notes = learnt([row("red house", spans)], {"COL": "COLOUR", "PLACE": None}, scheme)
    assert names == ("O", *(f"{mark}-COLOUR" for mark in ("BI" if scheme == "BIO" else "BEIS")))
    assert notes[1] == "a: data.label_map: 'PLACE' is taken off (O) 1 times"


def test_rows_are_encoded_under_the_new_names(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    data = DataConfig(train="a", label_map={"COL": "COLOUR", "PLACE": None})
    config = RunConfig(Config(name="token_classification"), data=data)
    targets = Targets(("O", "B-COLOUR", "I-COLOUR"))
    spans = [{"start": 0, "end": 3, "label": "COL"}, {"start": 4, "end": 9, "label": "PLACE"}]
    rows = [row(["red", "house"], ["B-COL", "B-PLACE"]), row("red house", spans)]
    for made in token_classification.encode(rows, Tokenizer(tmp_path, 8), targets, config):
        assert made.example["labels"].tolist() == [-1, 1, 0, -1]


@pytest.mark.parametrize(
    ("label_map", "said"),
    [
        ({"PRE": "PERSON"}, "data.label_map.PRE: no training row has this label: did you mean 'PER'?"),
        ({"PER": "B-PERSON"}, "row 0: data.label_map: 'PER' is an entity, whose words keep what stands before it ('B-PER'); "
         "call it 'PERSON', not 'B-PERSON'"),
        ({"PER": " "}, "data.label_map: the name of 'PER' is empty"),
    ],
)  # fmt: skip
def test_names_that_cannot_be_meant_are_refused(label_map: dict[str, str | None], said: str) -> None:
    with pytest.raises(UserError) as error:
        learnt([row(["Ada"], ["B-PER"]), row(["in"], ["O"])], label_map)
    assert str(error.value) == said
