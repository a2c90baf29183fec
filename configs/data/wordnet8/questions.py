"""Makes questions with and without an answer of WordNet-8: which of five definitions is one of a kind of thing?

python configs/data/wordnet8/questions.py FOLDER      (writes FOLDER/train.jsonl and FOLDER/dev.jsonl, 1,500 and 300 rows)
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
CHOICES, WORDS = 5, 18  # definitions in a context, and words that each has at most


def questions(source: Path, count: int, seed: int) -> Iterator[dict[str, object]]:
    """Rows as SQuAD v2 has them; every third has no answer."""
    rng = random.Random(seed)
    by_kind: dict[str, list[str]] = {}
    with gzip.open(source, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if len(row["text"].split()) <= WORDS:
                by_kind.setdefault(row["label"], []).append(row["text"])
    kinds = sorted(by_kind)
    for number in range(count):
        chosen = rng.sample(kinds, CHOICES)
        texts = [rng.choice(by_kind[kind]) for kind in chosen]
        if number % 3:
            place = rng.randrange(CHOICES)
            kind, answers = chosen[place], [texts[place]]
            starts = [sum(len(text) + 2 for text in texts[:place])]
        else:
            kind, answers, starts = rng.choice([kind for kind in kinds if kind not in chosen]), [], []
        yield {
            "id": number,
            "question": f"Which is a kind of {kind}?",
            "context": ". ".join(texts) + ".",
            "answers": {"text": answers, "answer_start": starts},
        }


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for name, source, count, seed in (("train", "train.csv.gz", 1500, 2), ("dev", "test.csv.gz", 300, 3)):
        rows = questions(HERE / source, count, seed)
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
