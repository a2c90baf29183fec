"""Tokens and passwords: refused in configurations, which are stored, and blotted out in what is said."""

from __future__ import annotations

import pytest

from jaxft.config import load_config
from jaxft.errors import UserError, one_line, redacted

SECRETS = (
    ("s3://AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMIK7MDENGbPxRfiCY@bucket/x", "s3://***@bucket/x"),
    ("https://host/rows.csv?X-Amz-Signature=0123456789abcdef0123&part=1", "https://host/rows.csv?X-Amz-Signature=***&part=1"),
    ("HF_TOKEN=hf_abcdefghijklmnopqrstuvwx", "HF_TOKEN=***"),
    ("Authorization: Bearer abcdefghijklmnopqrstuv", "Authorization: Bearer ***"),
    ("aws_secret_access_key = 'wJalrXUtnFEMIK7MDENG/bPxRfiCY'", "aws_secret_access_key = '***'"),
    ("no access for ghp_abcdefghijklmnopqrst", "no access for ***"),
)  # fmt: skip
PLAIN = (
    "data.tokenizer=/some/long/path/of/a/tokenizer",
    "s3://bucket/user@host/rows.csv",
    "unknown token: [UNUSED_LONG_TOKEN_ABCDEFGH]",
    "checkpoint damaged: this file does not match its sha256 in jaxft.json",
    "pad_token=null",
)


@pytest.mark.parametrize(("text", "shown"), SECRETS)
def test_secrets_are_blotted_out(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert one_line(f"what failed: {text}") == f"what failed: {shown}"


@pytest.mark.parametrize("text", PLAIN)
def test_other_texts_stay(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize("part", ["x", "a:", "://a:", "secret", "token=", "-_", "bearer ", "hf_", "sk-"])
def test_long_texts_are_looked_through_once(part: str) -> None:
    """Each was minutes with an expression that looks ahead from every letter; the suite would not come to its end."""
    text = part * (1_000_000 // len(part))
    assert len(redacted(text)) <= len(text)


def test_configurations_hold_no_secrets() -> None:
    with pytest.raises(UserError, match=r"^data.train=s3://\*\*\*@bucket/rows.csv: holds what looks like a password"):
        load_config(None, ["data.train=s3://KEY:VERYSECRET@bucket/rows.csv"])
