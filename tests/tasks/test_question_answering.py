"""Questions whose answers are stretches of a context: through training, evaluation, answers and export, against `transformers` and a
restatement of SQuAD's official scores."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import string
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import WORDS, make_folder, refusal, run, write_tokenizer
from zoo import tokenizer_folders

from jaxft.config import DataConfig, MeshConfig, RunConfig
from jaxft.config.tasks.question_answering import Config
from jaxft.data.batch import collate, text_shape
from jaxft.data.examples import make_split
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.data.sources.read import iter_rows
from jaxft.data.sources.rows import Listed, Row
from jaxft.errors import UserError
from jaxft.models.contract import Output
from jaxft.parallel.sharding import DEFAULT_RULES, batch_sharding, jitted, make_mesh, replicated
from jaxft.tasks import Targets, collected, question_answering
from jaxft.tasks._squad import Scored, after_threshold, answer_f1, averages, best_threshold, exact_match, gold_answers
from jaxft.tasks._squad import normalised as normalised_text
from jaxft.tasks.question_answering import Task

Capture = pytest.CaptureFixture[str]
COLOURS = ("red", "green", "blue", "yellow")
OTHERS = [word for word in WORDS[5:] if word not in COLOURS]
EN = ("task.name=question_answering", "data.text=question", "data.text_pair=context", "data.label=answers")


def made_row(rng: np.random.Generator, words: int, answered: bool = True) -> dict[str, Any]:
    """A context with one colour, which is what is asked for, or with none."""
    chosen = [str(word) for word in rng.choice(OTHERS, words)]
    place = int(rng.integers(words))
    if answered:
        chosen[place] = str(rng.choice(COLOURS))
    start = len(" ".join([*chosen[:place], ""]))
    answers = {"text": [chosen[place]] if answered else [], "answer_start": [start] if answered else []}
    return {"id": words, "question": "the cat is", "context": " ".join(chosen), "answers": answers}


def write_rows(path: Path, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of which every third has no answer."""
    rng = np.random.default_rng(seed)
    made = [made_row(rng, int(rng.integers(3, 30)), i % 3 > 0) for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return made


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained for a few steps on contexts of up to 30 words, in windows of 16 tokens; and other rows."""
    folder = tmp_path_factory.mktemp("home")
    make_folder(folder / "encoder", num_hidden_layers=1)
    write_rows(folder / "train.jsonl", 60)
    write_rows(folder / "rows.jsonl", 25, seed=1)
    from jaxft import __main__

    code = __main__.main([
        "train", f"model.init={folder / 'encoder'}", *EN, "task.no_answer=true", "data.max_length=16", "data.buckets=[16]",
        f"data.train={folder / 'train.jsonl'}", f"data.eval={folder / 'rows.jsonl'}", "data.stride=4", "train.steps=40",
        "optim.learning_rate=1e-2", f"train.out={folder / 'run'}", "optim.schedule=constant", "eval.every=40",
    ])  # fmt: skip
    assert code == 0
    return folder


def row(*values: Any) -> Row:
    return Row(values, "row 0")


def encoded(folder: Path, rows: list[tuple[Any, ...]], length: int | None = 16, **options: Any) -> list[Any]:
    data = DataConfig(long_texts=options.pop("long_texts", "windows"), stride=options.pop("stride", None))
    made = [Row(values, f"row {i}") for i, values in enumerate(rows)]
    return list(
        question_answering.encode(
            made, Tokenizer(folder, length), Targets(), RunConfig(task=Config(**options), data=data)
        )
    )


# -------------------------------------------------------------------------------------------------------- rows to examples


def test_windows_are_those_of_the_reference(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path, extra=("un", "##known", "##er"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ours, rng = Tokenizer(tmp_path, 12), np.random.default_rng(0)
    contexts = ["", "unknown  cat,dog. ", *(" ".join(rng.choice([*OTHERS, "unknowner"], n)) for n in (4, 9, 10, 31))]
    for stride in (0, 3, 5):
        said = theirs(
            ["is red"] * len(contexts), contexts, truncation="only_second", max_length=12, stride=stride,
            return_overflowing_tokens=True, return_offsets_mapping=True, return_token_type_ids=True,
        )  # fmt: skip
        found = list(ours.pair_windows(["is red"] * len(contexts), contexts, [""] * len(contexts), stride=stride))
        assert [window.ids for window in found] == said["input_ids"]
        assert [window.types for window in found] == said["token_type_ids"]
        assert [window.row for window in found] == said["overflow_to_sample_mapping"]
        for i, window in enumerate(found):
            of_context = [place if side == 1 else (-1, -1) for place, side in zip(
                said["offset_mapping"][i], said.sequence_ids(i), strict=True)]  # fmt: skip
            assert window.offsets == of_context
            assert window.dropped == 0
    cut = list(ours.pair_windows(["is red"], [contexts[-1]], [""]))
    whole = next(Tokenizer(tmp_path).pair_windows(["is red"], [contexts[-1]], [""]))
    assert (len(cut), cut[0].ids) == (1, [*whole.ids[:11], whole.ids[-1]])
    assert cut[0].dropped == len(whole.ids) - 12


def test_a_window_is_learnt_to_point_at_the_whole_answer_or_at_its_first_token(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, extra=("un", "##known"))
    context = "the cat sings over a red unknown house and a tree in the old road"
    start = context.index("red")
    parts = encoded(tmp_path, [("is", context, [{"text": "red unknown", "answer_start": start}])], length=12, stride=2)
    held, texts = 0, []
    for one in parts:
        first, last = one.example["span"].tolist()
        begin, finish = one.example["begin"], one.example["finish"]
        texts.append(context[begin[begin >= 0].min() : finish.max()])
        if first:
            held += 1
            assert context[begin[first] : finish[last]] == "red unknown"
        else:
            assert last == 0
            assert "red unknown" not in texts[-1]
        assert (one.example["learnt"], one.example["answered"]) == (1, 1)
    assert len(parts) > 2
    assert held >= 1
    # Words that a tokenizer makes one token of are pointed at as a whole.
    (one,) = encoded(tmp_path, [("is", "a cat-house in", [{"text": "ous", "start": 7}])], length=None)
    first, last = one.example["span"].tolist()
    assert (one.example["begin"][first], one.example["finish"][last]) == (6, 11)


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlmr", "words"])
def test_any_stretch_can_be_an_answer_whatever_the_tokenizer(tmp_path: Path, kind: str) -> None:
    getattr(tokenizer_folders, kind)(tmp_path)
    context = (
        "  The cat's Stra\u00dfe,  (don't) \u7535\u5f71\u5f88\u597d in on \U0001f642 caf\u00e9 e\u0301. "
        "3.14a na\u00efve\u00a0house   "
    )
    rng, rows = np.random.default_rng(0), []
    while len(rows) < 40:
        start, end = sorted(rng.integers(0, len(context), 2).tolist())
        if context[start:end].strip():
            rows.append(("The house", context, [{"text": context[start:end], "start": start}]))
    for long_texts, length in (("windows", None), ("windows", 30)):
        made = encoded(tmp_path, rows, length=length, stride=8, long_texts=long_texts)
        held = {one.row for one in made if one.example["span"][0]}
        assert len(held) >= (39 if length is None else 5)  # one may be of letters alone that the tokenizer leaves out
        for one in made:
            begin, finish = one.example["begin"], one.example["finish"]
            first, last = one.example["span"].tolist()
            assert (begin >= 0).sum() == (finish > 0).sum() > 0
            if first:
                text, start = rows[one.row][2][0].values()
                said = range(begin[first], finish[last])
                left_out = [i for i in range(start, start + len(text)) if i not in said and not context[i].isspace()]
                assert not any(((begin <= i) & (i < finish)).any() for i in left_out)
                assert context[said.start : said.stop] == context[said.start : said.stop].strip()
                assert said.start < start + len(text)
                assert said.stop > start


@pytest.mark.parametrize(
    "answers",
    [
        "red cat",
        ["red cat", "no such"],
        [{"text": "red cat", "start": 6}],
        [{"text": "red cat", "answer_start": 6.0}],
        [{"text": " red cat", "start": 5}],
        [{"text": "red cat"}],
    ],
)
def test_answers_may_be_given_in_several_forms(tmp_path: Path, answers: Any) -> None:
    write_tokenizer(tmp_path)
    (one,) = encoded(tmp_path, [("is", "cat a red cat", answers)], length=None)
    assert one.example["span"].tolist() == [5, 6]
    assert one.example["learnt"] == 1


REFUSED = [
    ("a cat", [], {}, "row 0: the question has no answer; where that may be .* task.no_answer=true"),
    (
        "a cat",
        "dog",
        {},
        "row 0: the answer 'dog' does not occur in the context; correct the row, or see task.unplaced",
    ),
    ("cat a cat", "cat", {}, "row 0: the answer 'cat' occurs 2 times in the context, and no start says which"),
    ("", "cat", {}, "row 0: the answer 'cat' does not occur"),
    ("a cat", [{"text": "cat", "start": 1}], {}, "row 0: the answer 'cat' is not at character 1 .*, where ' ca' is"),
    ("a cat", [{"text": "cat", "start": -1}], {}, "row 0: the answer 'cat' is not at character -1"),
    ("a cat", [{"text": "cat", "start": 2}, {"text": "a", "start": 1}], {}, "'a' is not at character 1"),
    ("a cat", [{"text": "cat", "start": 0.5}], {}, "row 0: the start of the answer 'cat' is 0.5"),
    ("a cat", [{"text": "cat", "start": True}], {"unplaced_answers": "skip"}, "the start of the answer 'cat' is True"),
    ("a cat", [{"text": "", "start": 0}], {}, "row 0: an answer has no text; give texts"),
    ("a cat", [{"start": 2, "label": "cat"}], {"no_answer": True}, "row 0: an answer has no text"),
    ("a cat", 2.5, {}, "row 0: an answer has no text"),
    ("a cat", " ", {}, "row 0: an answer has no text"),
]


@pytest.mark.parametrize(("context", "answers", "options", "problem"), REFUSED)
def test_answers_that_cannot_be_meant_so_are_refused(
    tmp_path: Path, context: str, answers: Any, options: dict[str, Any], problem: str
) -> None:
    write_tokenizer(tmp_path)
    with pytest.raises(UserError, match=problem):
        encoded(tmp_path, [("is", context, answers)], **options)


def test_what_is_not_learnt_is_counted_and_said(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    rows = [
        ("is", "a cat", "dog"),
        ("is", "cat a cat", "cat"),
        ("is", "a cat", []),
        ("is", " ".join(["the"] * 15 + ["cat"]), "cat"),
    ]

    def split(**options: Any) -> Any:
        made = encoded(tmp_path, rows, no_answer=True, **options)
        return make_split("train", made, question_answering.fields(RunConfig(), 0))

    skipped = split(unplaced_answers="skip", long_texts="truncate", length=10)
    assert skipped.columns["learnt"].tolist() == [0, 0, 1, 1]
    assert list(Task(True).remarks(skipped)) == [
        "train: 2 of 4 rows have no answer that has a place in the context: they are not learnt",
        "train: the answers of 1 of 4 rows are in no window as a whole (cut off, or longer than what windows have in common): "
        "these are learnt as having none",
    ]
    assert (Task(True).learnable(skipped), skipped.truncated) == (2, 1)
    placed = split(unplaced_answers="first", length=10, stride=2)
    assert placed.columns["learnt"][:3].tolist() == [0, 1, 1]
    assert placed.columns["span"][1].tolist() == [3, 3]
    assert [line.split(" rows")[0] for line in Task(True).remarks(placed)] == ["train: 1 of 4"]


def test_a_question_without_room_for_its_context_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    long = " ".join(["cat"] * 13)
    with pytest.raises(
        UserError, match="row 0: the first text and special tokens take 16 tokens, which leaves no room"
    ):
        encoded(tmp_path, [(long, "a red tree", "red")])
    with pytest.raises(
        UserError, match=r"row 0: windows .* cannot have 5 tokens in common .* leaves room for 3 in rows of 16"
    ):
        encoded(tmp_path, [(long[:-12], "a red tree and", "red")])
    (one,) = encoded(tmp_path, [(long[:-12], "a red tree", "red")])  # it fits whole
    assert one.dropped == 0


def test_rows_of_squads_own_file(tmp_path: Path, capsys: Capture) -> None:
    qas = [
        {"id": "a", "question": "is", "answers": [{"text": "cat", "answer_start": 2}], "is_impossible": False},
        {"id": "b", "question": "in", "answers": [], "plausible_answers": [], "is_impossible": True},
    ]
    file = tmp_path / "dev.json"
    file.write_text(
        json.dumps({"version": "v2.0", "data": [{"title": "T", "paragraphs": [{"context": "a cat", "qas": qas}]}]})
    )
    rows = list(iter_rows(str(file), ("question", "context", Listed("answers"), "id")))
    assert [one.values for one in rows] == [
        ("is", "a cat", [{"text": "cat", "answer_start": 2}], "a"),
        ("in", "a cat", [], "b"),
    ]
    assert rows[1].where == f"{file}: article 0, paragraph 0, question 1"
    for content, problem in (
        ('{"data": [{"paragraphs": [{"qas": {}}]}]}', "article 0, paragraph 0: has no list 'qas'"),
        (
            '{"data": [{"paragraphs": []}, {"title": "T"}]}',
            "article 1: has no list 'paragraphs'; articles of SQuAD's form",
        ),
        ('{"data": [{"paragraphs": [{"qas": [3]}]}]}', "question 0: is a int, not an object"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=re.escape(problem)):
            list(iter_rows(str(file), ("question",)))
    file.write_text('{"data": [{"paragraphs": []}]}')
    with pytest.raises(UserError, match="no column 'text'"):
        list(iter_rows(str(file), ("text",)))


# ------------------------------------------------------------------------------------------------------------------ loss


def batch_of(examples: list[Any], length: int, weights: Any = None) -> dict[str, Any]:
    fields = question_answering.fields(RunConfig(), 0)
    batch: dict[str, Any] = collate([one.example for one in examples], fields, text_shape(len(examples), length))
    return batch | ({} if weights is None else {"weights": np.asarray(weights, np.float32)})


def forward_of(logits: Any) -> Any:
    return lambda batch, key: Output(logits, logits=logits)


def test_the_loss_is_that_of_the_reference(home: Path) -> None:
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    theirs = transformers.BertForQuestionAnswering.from_pretrained(home / "run/export").eval()
    from jaxft import load

    loaded = load(home / "run/export", note=lambda _: None)
    rng = np.random.default_rng(0)
    rows = [made_row(rng, n) for n in (4, 9, 9, 9)]
    made = encoded(home / "run/export", [(one["question"], one["context"], one["answers"]["text"]) for one in rows])
    task = Task()

    def ours(examples: list[Any], length: int) -> Any:
        batch = batch_of(examples, length)
        out = loaded.model.apply({"params": loaded.params}, batch["tokens"], mask=batch["mask"], types=batch["types"])
        return out.logits, task.sums(lambda *_: out, batch, None)

    def reference(example: Any) -> Any:
        inputs = {
            ours: torch.tensor(example[name][None].astype(np.int64))
            for ours, name in (("input_ids", "tokens"), ("token_type_ids", "types"))
        }
        first, last = (torch.tensor([int(place)]) for place in example["span"])
        with torch.no_grad():
            return theirs(**inputs, start_positions=first, end_positions=last)

    answers = [reference(one.example) for one in made]
    logits, sums = ours(made, 16)
    for i, (one, said) in enumerate(zip(made, answers, strict=True)):
        length = len(one.example["tokens"])
        both = np.stack([said.start_logits[0].numpy(), said.end_logits[0].numpy()], -1)
        np.testing.assert_allclose(logits[i, :length], both, atol=2e-5 * max(1.0, float(np.abs(both).max())))
    # Padding is no place that an answer could be at, so the mean over rows is that of each row by itself.
    mean = float(np.mean([float(said.loss) for said in answers]))
    assert float(sums["loss"]) / float(sums["weight"]) == pytest.approx(mean, rel=2e-5)


def test_rows_without_weight_and_rows_that_are_not_learnt_add_nothing(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    rows = [
        ("is", "a red cat", "red"),
        ("is", "a cat", "dog"),
        ("is", "the blue tree", "tree"),
        ("is", "the old tree", "old"),
    ]
    made = encoded(tmp_path, rows, length=None, unplaced_answers="skip")
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(4, 12, 2)), jnp.float32)
    whole = Task().sums(forward_of(logits), batch_of(made, 12, [1, 1, 0, 1]), None)
    part = Task().sums(forward_of(logits[jnp.array([0, 3])]), batch_of([made[0], made[3]], 12), None)
    assert float(whole["weight"]) == 2.0 == float(Task().weight(batch_of(made, 12, [1, 1, 0, 1])))
    np.testing.assert_allclose(float(whole["loss"]), float(part["loss"]), rtol=1e-6)
    halves = [Task().sums(forward_of(logits[i : i + 1]), batch_of([made[i]], 12), None) for i in (0, 3)]
    np.testing.assert_allclose(float(whole["loss"]), sum(float(half["loss"]) for half in halves), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------ the n best


def evaluated(task: Task, made: list[Any], logits: np.ndarray, length: int) -> tuple[Any, Any]:
    """Sums and outputs of examples in batches of three, the last one filled up."""
    fields, parts = question_answering.fields(RunConfig(), 0), []
    for i in range(0, len(made), 3):
        batch: Any = collate([one.example for one in made[i : i + 3]], fields, text_shape(3, length))
        said = jnp.asarray(np.concatenate([logits[i : i + 3], np.zeros((3, length, 2))])[:3], jnp.float32)
        parts.append((task.sums(forward_of(said), batch, None), task.outputs(forward_of(said), batch)))
    return collected(parts)


@pytest.mark.parametrize(("n_best", "longest"), [(1, 30), (5, 3), (40, 4), (200, 1)])
def test_the_n_best_answers_are_exactly_those_of_all_spans_of_all_windows(
    tmp_path: Path, n_best: int, longest: int
) -> None:
    write_tokenizer(tmp_path, extra=("un", "##known"))
    rng = np.random.default_rng(n_best)
    contexts = ["cat", *(" ".join(rng.choice([*OTHERS, "unknown"], n)) for n in (7, 12, 25))]
    made = encoded(tmp_path, [("is", context, []) for context in contexts], stride=4, no_answer=True)
    task = Task(True, n_best=n_best, max_answer_length=longest)
    logits = rng.normal(size=(len(made), 16, 2)).astype(np.float32)
    wanted: list[dict[tuple[int, int], float]] = [{} for _ in contexts]
    nulls = [math.inf] * len(contexts)
    for one, said in zip(made, logits, strict=True):
        begin, finish, tokens = one.example["begin"], one.example["finish"], len(one.example["tokens"])
        nulls[one.row] = min(nulls[one.row], float(said[0, 0] + said[0, 1]))
        for s, e in itertools.combinations_with_replacement(range(tokens), 2):
            if begin[s] >= 0 and begin[e] >= 0 and e - s < longest:
                span, score = (int(begin[s]), int(finish[e])), float(said[s, 0] + said[e, 1])
                wanted[one.row][span] = max(score, wanted[one.row].get(span, score))
    _, outputs = evaluated(task, made, logits, 16)
    assert outputs["score"].shape == (len(made), n_best)
    for number, found in task._found(outputs):
        best = sorted(wanted[number].items(), key=lambda item: -item[1])[:n_best]
        assert [(one.begin, one.finish) for one in found.best] == [span for span, _ in best]
        np.testing.assert_allclose([one.score for one in found.best], [score for _, score in best], rtol=1e-6)
        assert found.null == pytest.approx(nulls[number], rel=1e-6)


@pytest.mark.parametrize("mesh", [MeshConfig(2, 2, 1, context=2), MeshConfig(2, 2, 1, context=2, axes="explicit")])
def test_outputs_and_loss_are_the_same_on_a_mesh(tmp_path: Path, mesh: MeshConfig) -> None:
    write_tokenizer(tmp_path)
    rng = np.random.default_rng(5)
    rows = [made_row(rng, int(n)) for n in rng.integers(3, 11, 8)]
    made = encoded(tmp_path, [(one["question"], one["context"], one["answers"]["text"]) for one in rows])
    batch = batch_of(made, 16, [1] * 7 + [0]) | {"said": rng.normal(size=(8, 16, 2)).astype(np.float32)}
    task = Task(n_best=6, max_answer_length=5)

    def step(batch: Any) -> Any:
        forward = forward_of(batch["said"])
        return task.sums(forward, batch, None), task.outputs(forward, batch)

    alone = jax.device_get(jax.jit(step)(batch))
    places = make_mesh(mesh)
    axes = {name: field.axes for name, field in question_answering.fields(RunConfig(), 0).items()}
    axes["said"] = ("batch", "length", 2)
    with jax.set_mesh(places):
        placed = {
            name: jax.device_put(value, batch_sharding(places, DEFAULT_RULES, axes[name]))
            for name, value in batch.items()
        }
        spread = jax.device_get(jitted(step, places, replicated(places))(placed))
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- scores


def plain(text: str) -> list[str]:
    """The words that count of an answer, letter by letter: SQuAD's normalisation said in another way."""
    kept = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    words, word = [], ""
    for letter in kept + " ":
        if letter.isalnum() or letter == "_":
            word += letter
            continue
        words.append("" if word in ("a", "an", "the") else word)
        words.append(" " if letter.isspace() else letter)
        word = ""
    return "".join(word or " " for word in words).split()


def v1_scores(predicted: str, golds: list[str]) -> tuple[float, float]:
    exact = float(any(plain(predicted) == plain(gold) for gold in golds))
    best = 0.0
    for gold in golds:
        left, shared = plain(gold), 0
        for word in plain(predicted):
            if word in left:
                left.remove(word)
                shared += 1
        if shared:
            precision, recall = shared / len(plain(predicted)), shared / len(plain(gold))
            best = max(best, 2 * precision * recall / (precision + recall))
    return exact, best


def v2_scores(predicted: str, golds: list[str]) -> tuple[float, float]:
    kept = [gold for gold in golds if plain(gold)] or [""]
    if kept == [""] or not plain(predicted):
        same = float(any(plain(predicted) == plain(gold) for gold in kept))
        return same, same
    return v1_scores(predicted, kept)


TEXTS = [
    *(
        "the cat",
        "Cat",
        "a  cat.",
        "cat's",
        "an old-fashioned house",
        "old fashioned",
        "The",
        "",
        "%",
        "$1,000",
        "1000",
    ),
    *("in the theatre", "theatre", "the\u2013end", "end", "cat cat dog", "dog cat", "É à", "an", "a_the b"),
]


@pytest.mark.parametrize("no_answer", [False, True])
def test_scores_of_an_answer_are_those_of_the_official_scripts(no_answer: bool) -> None:
    theirs = v2_scores if no_answer else v1_scores
    for predicted in TEXTS:
        assert normalised_text(predicted).split() == plain(predicted)
        for golds in [[text] for text in TEXTS] + [["the cat", "dog cat"], ["The", "1000"], ["dog", "an old"]]:
            ours = gold_answers(golds, no_answer)
            said = normalised_text(predicted)
            found = exact_match(said, ours), answer_f1(said, ours, no_answer)
            assert found == pytest.approx(theirs(predicted, golds), abs=1e-12), (predicted, golds)
    if no_answer:
        assert (exact_match("", gold_answers([], True)), answer_f1("cat", gold_answers([], True), True)) == (1.0, 0.0)


def official_v2(questions: list[tuple[list[str], str, float]], threshold: float) -> dict[str, float]:
    """Overall scores of (right answers, best answer, score of none less that of the answer), as v2's script finds them."""
    raw = [v2_scores(said, golds) for golds, said, _ in questions]
    after = [
        ((float(not golds),) * 2 if margin > threshold else pair)
        for (golds, _, margin), pair in zip(questions, raw, strict=True)
    ]
    found = {
        "exact_match": float(np.mean([pair[0] for pair in after])),
        "f1": float(np.mean([pair[1] for pair in after])),
    }
    for kind, has in (("HasAns", True), ("NoAns", False)):
        chosen = [pair for pair, (golds, _, _) in zip(after, questions, strict=True) if bool(golds) == has]
        found |= {
            f"{kind}_exact": float(np.mean([pair[0] for pair in chosen])),
            f"{kind}_f1": float(np.mean([pair[1] for pair in chosen])),
        }
    for place, name in enumerate(("exact", "f1")):
        current = best = sum(not golds for golds, _, _ in questions)
        cut = math.nan
        for i in sorted(range(len(questions)), key=lambda i: questions[i][2]):
            golds, said, margin = questions[i]
            current = current + (raw[i][place] if golds else -bool(said))
            if current > best:
                best, cut = current, margin
        found |= {f"best_{name}": best / len(questions), f"best_{name}_threshold": cut}
    return found


def test_scores_over_windows_are_those_of_the_official_script(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    rng = np.random.default_rng(8)
    rows = []
    for i in range(40):
        one = made_row(rng, int(rng.integers(2, 30)), i % 4 > 0)
        more = ["the " + text for text in one["answers"]["text"]]
        given = [*({"text": t, "start": s} for t, s in zip(*one["answers"].values(), strict=True)), *more]
        rows.append((one["question"], one["context"], given if i % 2 else list(one["answers"]["text"])))
    made = encoded(tmp_path, rows, stride=3, no_answer=True, unplaced_answers="first")
    task = Task(True, null_threshold=0.25)
    logits = rng.normal(size=(len(made), 16, 2)).astype(np.float32)
    for i, one in enumerate(made):  # half of them know
        if i % 2:
            for side, place in enumerate(one.example["span"].tolist()):
                logits[i, place, side] += 4
    order = rng.permutation(len(made))
    sums, outputs = evaluated(task, [made[i] for i in order], logits[order], 16)
    scores = task.score_rows(sums, outputs, rows)
    questions = []
    for number, found in task._found(outputs):
        texts = [one["text"] if isinstance(one, dict) else one for one in rows[number][2]]
        questions.append((texts, rows[number][1][found.best[0].begin : found.best[0].finish], found.margin))
    wanted = official_v2(questions, 0.25)
    for name, value in wanted.items():
        assert scores[name] == pytest.approx(value, abs=1e-12), name
    assert (scores["rows"], scores["HasAns_rows"], scores["NoAns_rows"]) == (40, 30, 10)
    assert 0 < scores["f1"] < scores["best_f1"] < 1
    # With the threshold that it names, the best score is reached.
    at_best = Task(True, null_threshold=scores["best_f1_threshold"]).score_rows(sums, outputs, rows)
    assert at_best["f1"] == pytest.approx(scores["best_f1"], abs=1e-12)
    for one in task.judged(outputs, rows, order):
        assert one["right"] == (one["predicted"] == "" if one["true"] == "[]" else bool(one["f1"] == 1.0))


def test_thresholds_do_not_part_questions_of_one_margin() -> None:
    def of(*margins: float, exact: float = 1.0, answerable: bool = True) -> list[Scored]:
        return [Scored(answerable, exact, exact, margin) for margin in margins]

    assert best_threshold(of(0.0, 1.0, 2.0), "exact") == (1.0, 2.0)
    assert best_threshold(of(0.0) + of(0.0, answerable=False), "exact") == (0.5, -1.0)
    assert best_threshold(of(0.0, 2.0) + of(1.0, answerable=False), "f1") == (2 / 3, 0.0)
    assert averages([after_threshold(one, 0.5) for one in of(0.0, 2.0) + of(1.0, answerable=False)]) == (2 / 3, 2 / 3)
    assert all(map(math.isnan, averages([])))


def test_a_model_whose_numbers_are_nan_is_never_right(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    rows = [("is", "a red cat", "red"), ("is", "a cat", []), ("is", "", [])]
    made = encoded(tmp_path, rows, no_answer=True)
    for task in (Task(True), Task()):
        scores = task.score_rows(*evaluated(task, made, np.full((3, 16, 2), np.nan), 16), rows)
        assert (scores["exact_match"], scores["f1"], math.isnan(scores["loss"])) == (0.0, 0.0, True)
    json.dumps(Task(True).score_rows(*evaluated(Task(True), made, np.zeros((3, 16, 2)), 16), rows), allow_nan=False)
    found = jax.device_get(Task(True).predictions(forward_of(jnp.full((3, 16, 2), jnp.nan)), batch_of(made, 16)))
    answer = Task(True).answer(rows[0][:2], [(made[0], {name: value[0] for name, value in found.items()})])
    assert (answer.unsaid, answer.record["answer"]) == (True, None)


# --------------------------------------------------------------------------------------------------- through the commands


@pytest.mark.slow
def test_a_trained_model_is_scored_alike_everywhere(home: Path, tmp_path: Path, capsys: Capture) -> None:
    trained = json.loads((home / "run/metrics.json").read_text())
    assert trained["f1"] > 0.6
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
    assert {name: again[name] for name in ("f1", "exact_match", "best_f1")} == {
        name: trained[name] for name in ("f1", "exact_match", "best_f1")
    }
    assert f"exact match {trained['exact_match']:.4f}   F1 {trained['f1']:.4f}" in out
    assert "25 rows in" in out
    with open(tmp_path / "r.csv", newline="") as file:
        table = list(csv.DictReader(file))
    rows = [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()]
    assert [json.loads(one["true"]) for one in table] == [one["answers"]["text"] for one in rows]
    assert np.mean([one["right"] == "true" for one in table]) == pytest.approx(again["exact_match"])
    assert np.mean([float(one["f1"]) for one in table]) == pytest.approx(again["f1"], abs=1e-6)
    # A token cache has no texts to compare answers with.
    build = ("cache", "build", home / "run/config.yaml", "--out", tmp_path / "cache")
    assert "scores of question_answering compare texts" in refusal(capsys, *build, "data.eval=null")
    code, out, _ = run(capsys, *build)
    assert (code, out.split()[-1]) == (0, f"data.eval={home / 'rows.jsonl'}")
    said = refusal(capsys, "eval", home / "run", f"data.eval={tmp_path / 'cache/eval'}")
    assert "is a token cache, which holds no texts" in said
    code, out, _ = run(
        capsys, "train", home / "run/config.yaml", f"data.train={tmp_path / 'cache/train'}", "train.steps=1",
        f"train.out={tmp_path / 'of_cache'}", "train.export=false",
    )  # fmt: skip
    assert code == 0


def test_answers_have_their_places_in_the_context(home: Path, tmp_path: Path, capsys: Capture) -> None:
    context = "a tree in " + "the old cat runs over " * 5 + "red house."
    asked = ("predict", home / "run", "--text", "the cat is", "--pair", context)
    code, out, err = run(capsys, *asked, "--top", 3)
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert said["answer"] is None or context[said["start"] : said["end"]] == said["answer"]
    assert len(said["candidates"]) == 3
    shares = [one["probability"] for one in said["candidates"]]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) + said["no_answer"] <= 1 + 1e-5
    for one in said["candidates"]:
        assert context[one["start"] : one["end"]] == one["answer"]
    # Always an answer, or never one, by the threshold; a folder that no run goes with always answers.
    _, out, _ = run(capsys, *asked, "task.null_threshold=1e6")
    assert json.loads(out)["answer"] == said["candidates"][0]["answer"]
    _, out, _ = run(capsys, *asked, "task.null_threshold=-1e6")
    assert (json.loads(out)["answer"], json.loads(out)["probability"]) == (None, said["no_answer"])
    _, out, _ = run(capsys, "predict", home / "run/export", "data.max_length=16", *asked[2:])
    assert "no_answer" not in json.loads(out)
    assert json.loads(out)["answer"] == said["candidates"][0]["answer"]
    _, out, _ = run(capsys, "predict", home / "run/export", "--text", "is", "--pair", "")
    assert json.loads(out)["answer"] is None
    # As a table, beside the columns of the input.
    assert run(capsys, "predict", home / "run", home / "rows.jsonl", "--out", tmp_path / "a.csv")[0] == 0
    with open(tmp_path / "a.csv", newline="") as file:
        table = list(csv.DictReader(file))
    for one in table:
        assert one["answer"] == (one["context"][int(one["start"]) : int(one["end"])] if one["start"] else "")
    message = refusal(capsys, "predict", home / "run", "--text", "a cat")
    assert message.startswith("--text: question_answering needs a question and its context")
    message = refusal(capsys, "predict", home / "run/export", home / "rows.jsonl")
    assert message.startswith("question_answering reads a question and its context: name the columns")
    assert "--threshold" in refusal(capsys, *asked, "--threshold", "0.5")


def test_runs_that_cannot_work_are_refused(home: Path, tmp_path: Path, capsys: Capture) -> None:
    rows = f"data.train={home / 'train.jsonl'}"
    common = ("train", f"model.init={home / 'encoder'}", f"train.out={tmp_path / 'no'}", rows)
    assert "name the columns" in refusal(capsys, *common, "task.name=question_answering")
    for setting, problem in (
        ("task.n_best=0", "task.n_best=0: must be at least 1"),
        ("task.max_answer_length=0", "task.max_answer_length=0: must be at least 1"),
        ("data.packing=best_fit", "rows of the task question_answering cannot share a row yet"),
        ("data.long_texts=split", "data.long_texts=split: is for single texts"),
        ("task.no_answer=false", "the question has no answer; where that may be (SQuAD v2), set task.no_answer=true"),
        ("task.unplaced_answers=last", "task.unplaced_answers"),
        ("data.label=answer", "no column 'answer': did you mean 'answers'?"),
        ("data.max_length=5", "which leaves no room for the second one in rows of 5"),
    ):
        assert problem in refusal(capsys, *common, *EN, "data.max_length=16", "task.no_answer=true", setting)


def test_the_export_answers_alike_in_the_reference(home: Path) -> None:
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    theirs = transformers.AutoModelForQuestionAnswering.from_pretrained(home / "run/export").eval()
    assert type(theirs).__name__ == "BertForQuestionAnswering"
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "run/export")
    inputs = tokenizer(["the cat is"], ["a big red house"], return_tensors="pt")
    with torch.no_grad():
        said = theirs(**inputs)
    from jaxft import load

    loaded = load(home / "run/export", note=lambda _: None)
    given = {
        ours: inputs[name].numpy().astype(np.int32)
        for ours, name in (("tokens", "input_ids"), ("types", "token_type_ids"))
    }
    logits = loaded.model.apply({"params": loaded.params}, **given).logits
    for side, name in enumerate(("start_logits", "end_logits")):
        wanted = said[name].numpy()
        np.testing.assert_allclose(logits[..., side], wanted, atol=2e-5 * max(1.0, float(np.abs(wanted).max())))
