"""What is typed after ``key=`` is what is used, whatever characters it has, or it is refused in one line."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxft.config import load_config, to_yaml
from jaxft.errors import UserError


def _value(assignment: str) -> Any:
    value: Any = load_config(None, [assignment])
    for part in assignment.partition("=")[0].split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


def _fails(*assignments: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(None, assignments)
    message = str(caught.value)
    return message


def _reload(text: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(str(path))


_AWKWARD = (
    "a #b.csv", "a: b", "*", "&a", "!x", "%x", "@x", "`x`", "[x", "x]", "{x}", "'tis", 'say "x"', " x ", "a=b", "C:\\data\\new.csv",
    "2024-01-01", "1_000", "0x10", "010", "1e5", ".5", "~", "Null", "yes", "true", "<<", "=", "- a", "? a", "|", "> a", "---", "...",
    "\U0001f600", "a\nb", "a\tb", "\r", "\x85", "\u2028", "\ufeff", "a,b", "[a]b", "1:30", "12:30:45", ".inf", "+1", "a" * 300, "x y " * 90,
)  # fmt: skip


@pytest.mark.parametrize("text", _AWKWARD)
@pytest.mark.parametrize("key", ["data.train", "model.init", "train.out", "data.text", "data.label"])
def test_text_is_taken_as_typed(key: str, text: str) -> None:
    assert _value(f"{key}={text}") == text


_REFUSED = object()
_strings = (
    st.text(min_size=0, max_size=20) | st.text("'\"[]{}#:*&!,\\ \n\tn0~-.e", max_size=8) | st.sampled_from(_AWKWARD)
)


@settings(deadline=None, database=None, max_examples=120)
@example(text="")
@example(text="null")
@example(text='"a\\u00e9"')
@given(text=_strings)
def test_any_text_is_used_as_typed_or_refused_and_survives_its_file(text: str) -> None:
    taken = []
    for key in ("data.train", "model.init", "train.out"):
        found: Any = _REFUSED
        with contextlib.suppress(UserError):
            found = _value(f"{key}={text}")
        if found is _REFUSED:  # only what has a meaning of its own
            assert text in ("", "null", "''", '""') or text[0] in "\"'[" or not _is_unicode(text)
            continue
        taken.append(f"{key}={text}")
        if text == "null":
            assert found is None
        elif len(text) < 2 or (text[0], text[-1]) not in {('"', '"'), ("'", "'"), ("[", "]")}:  # quoted, a list: below
            assert found == text
    config = load_config(None, taken)
    assert _reload(to_yaml(config)) == config


@settings(deadline=None, database=None, max_examples=100)
@given(text=_strings.filter(lambda text: _is_unicode(text)), keys=st.sampled_from(["data.train", "optim.freeze"]))
def test_single_quotes_keep_any_text(text: str, keys: str) -> None:
    quoted = "'" + text.replace("'", "''") + "'"
    assert _value(f"{keys}=[{quoted}]") == (text,)
    assert _value(f"data.train={quoted}") == text


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("data.train='a b'", "a b"),
        ("data.train='it''s'", "it's"),
        ('data.train="a\\tb"', "a\tb"),
        ('data.train="null"', "null"),
        ("data.eval=null", None),
        ("data.train=[a.csv,b.csv]", ("a.csv", "b.csv")),
        ("data.train=[ a b.csv , 'c, d.csv', x[0-9].csv]", ("a b.csv", "c, d.csv", "x[0-9].csv")),
        ("data.train=[tfds:x:train[:80%], tfds:x:test]", ("tfds:x:train[:80%]", "tfds:x:test")),
        ("data.labels=[5,1]", ("5", "1")),
        ("data.labels=[yes, no, true, 010, 2024-01-01, a: b, #c]", ("yes", "no", "true", "010", "2024-01-01", "a: b", "#c")),
        ("optim.freeze=[*]", ("*",)),
        ("optim.freeze=[embed/*,layers/0-3/*]", ("embed/*", "layers/0-3/*")),
        ("optim.freeze=[]", ()),
        ("data.labels=null", None),
        ("data.text=0", "0"),
        ("data.label=yes", "yes"),
        ("log.progress=off", "off"),
        ("train.profile=10:13", "10:13"),
        ("train.steps=1_000", 1000),
        ("train.steps=0x10", 16),
        ("optim.learning_rate=1e-4", 1e-4),
        ("optim.learning_rate=.5", 0.5),
        ("optim.learning_rate=1", 1.0),
        ("train.seeds=[0, 1]", (0, 1)),
        ("task.class_weights={5: 1, 010: 2, yes: 3, 2024-01-01: 4}", {"5": 1.0, "010": 2.0, "yes": 3.0, "2024-01-01": 4.0}),
        ("task.class_weights=balanced", "balanced"),
        ("model.arch={hidden_act: gelu_new, n: 3}", {"hidden_act": "gelu_new", "n": 3}),
        ("model.arch.hidden_act=relu", "relu"),
        ("model.arch.n=3", 3),
        ("mesh.rules={vocab: []}", {"vocab": ()}),
    ],
)  # fmt: skip
def test_values(assignment: str, value: Any) -> None:
    found: Any = load_config(None, [assignment])
    for part in assignment.partition("=")[0].split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.steps=3 # three", "train.steps=3 # three: '# three' would be lost"),
        ("train.steps=&a 3", "'&a' would be lost"),
        ("train.steps=!!int 3", "'!!int' would be lost"),
        ("model.arch={a: b\n c}", "would be lost or changed"),
        ("train.steps=010", 'train.steps="010": input should be a valid integer'),
        ("train.steps=2024-01-01", "input should be a valid integer"),
        ("train.steps=1e5", "input should be a valid integer"),
        ("train.steps=", "train.steps= is empty: write null for none, a value"),
        ("train.out=", "train.out= is empty: write '\"\"' for an empty text"),
        ("data.train=", "data.train= is empty: write null for none"),
        ("train.steps=" + "9" * 5000, "not a number"),
        ("data.text=null", 'data.text=null: null means "none", and this key needs a value; for the word itself'),
        ("data.label=null", "tasks without labels ignore it"),
        ("data.labels=[null]", "null means"),
        ("optim.freeze=*", "optim.freeze=*: takes a list; write optim.freeze=[*]"),
        ("data.labels=[a,,b]", "an item is empty"),
        ("data.labels=[a]b]", "brackets do not match"),
        ('data.train="a\nb"', "a line break in double quotes"),
        ('data.train="C:\\data\\x.csv"', "not valid YAML: found unknown escape character"),
        ("data.train=\udcff.csv", "is not valid UTF-8"),
        ("data.train.x=3", "data.train"),
        ("model=some/folder", "model is a section; write model.KEY=...; did you mean 'model.init'?"),
        ("mesh=8", "mesh is a section"),
    ],
)
def test_what_cannot_be_taken_is_refused(assignment: str, message: str) -> None:
    assert message in _fails(assignment)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", "0"),
        ("2024-01-01", "2024-01-01"),
        ("1_0", "1_0"),
        ("yes", "yes"),
        ("true", "true"),
        ("1:30.5", "1:30.5"),
        ("=", "="),
    ],
)
def test_a_text_key_in_a_file_takes_the_scalar_as_it_stands(text: str, value: str) -> None:
    config = _reload(f"data:\n  text: {text}\n  labels: [{text}, b]\n  train: {text}\n")
    assert (config.data.text, config.data.labels, config.data.train) == (value, (value, "b"), value)


def test_null_in_a_file() -> None:
    assert _reload("data: {train: ~, labels: null}\n").data.train is None
    for text in ("null", "~", ""):
        with pytest.raises(UserError, match="null means"):
            _reload(f"data:\n  text: {text}\n")


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("optim.lr", "optim.learning_rate"),
        ("lr", "optim.learning_rate"),
        ("learning_rate", "optim.learning_rate"),
        ("batch_size", "'train.batch_size' or 'eval.batch_size'"),
        ("bs", "train.batch_size"),
        ("per_device_train_batch_size", "train.batch_size"),
        ("num_epochs", "train.epochs"),
        ("epochs", "train.epochs"),
        ("train.num_epochs", "train.epochs"),
        ("max_len", "data.max_length"),
        ("max_seq_length", "data.max_length"),
        ("model.max_length", "data.max_length"),
        ("output_dir", "train.out"),
        ("model_name_or_path", "model.init"),
        ("warmup_ratio", "optim.warmup_fraction"),
        ("weight_decay", "optim.weight_decay"),
        ("optim.warmup-ratio", "optim.warmup_fraction"),
        ("seed", "train.seed"),
    ],
)
def test_names_of_other_libraries(key: str, ours: str) -> None:
    shown = ours if ours.startswith("'") else f"'{ours}'"
    assert _fails(f"{key}=3") == f"unknown config key {key!r}: did you mean {shown}?"
    section, _, name = key.rpartition(".")
    file = f"{section}:\n  {name}: 3\n" if section else f"{key}: 3\n"
    with pytest.raises(UserError, match=r"did you mean '[a-z]+\.[a-z_]+'"):
        _reload(file)


def test_dotted_keys_in_a_file() -> None:
    with pytest.raises(UserError, match=r"unknown config key 'train\.steps': write train: \{steps: \.\.\.\}"):
        _reload("train.steps: 3\n")


def test_every_known_name_means_a_key_that_there_is() -> None:
    from jaxft.config import RunConfig
    from jaxft.config.names import _OURS, keys_of

    assert set(_OURS) <= set(keys_of(RunConfig))
    names = [name for names in _OURS.values() for name in names.split()]
    assert len(names) == len(set(names))
