"""Transcripts of tiny random models beside those of the reference's ``generate``, token by token."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from speech import CONFIG, SETTINGS, TOKENS, as_theirs, frames_of, pair

from jaxft.config.speech import SpeechGeneration, SpeechTokens
from jaxft.data.processors.log_mel import LogMel
from jaxft.errors import UserError
from jaxft.inference.generation.chunks import chunks_of, merged
from jaxft.inference.generation.speech import Listener, Listening
from jaxft.models.decoding.speech import hear, transcripts, write
from jaxft.models.decoding.timestamps import timed

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

ROWS = 3
MEL = LogMel(feature_size=8, chunk_length=1)


def settings(timed: bool, beams: int = 1, **more: Any) -> SpeechGeneration:
    return SpeechGeneration(
        max_new_tokens=16, num_beams=beams, eos_token_id=(50,), suppress_tokens=tuple(SETTINGS["suppress_tokens"]),
        begin_suppress_tokens=tuple(SETTINGS["begin_suppress_tokens"]), timestamps=TOKENS.timestamps if timed else None, **more,
    )  # fmt: skip


def ended(row: list[int]) -> list[int]:
    """The tokens before the end."""
    return row[: row.index(50)] if 50 in row else row


def check(seed: int, with_times: bool, beams: int) -> int:
    """Holds transcripts of one stretch each against the reference's; how many tokens they have."""
    theirs, model, params = pair(seed)
    frames, config = frames_of(ROWS, seed), settings(with_times, beams)
    made = theirs.generate(
        input_features=as_theirs(frames), language="de", task="translate", return_timestamps=with_times, num_beams=beams,
        max_new_tokens=16, force_unique_generate_call=True, do_sample=False,
    )  # fmt: skip
    prompt = TOKENS.prompt("de", "translate", timestamps=with_times)
    found = write(model, config, params, hear(model, params, frames, [prompt] * ROWS, config, own=len(prompt)))
    wanted = [ended(row[len(prompt) :]) if row[0] == 51 else ended(row) for row in made.tolist()]
    assert found.tokens == wanted
    real = jnp.ones(ROWS, bool)
    within = np.asarray(jax.jit(transcripts, static_argnums=(0, 2, 5))(model, params, config, frames, real, prompt))
    assert [ended([one for one in row if one >= 0]) for row in within.tolist()] == wanted
    return sum(map(len, wanted))


@pytest.mark.parametrize(("with_times", "beams"), [(True, 5)])
def test_transcripts_equal_the_reference(with_times: bool, beams: int) -> None:
    assert check(1, with_times, beams) > 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("with_times", [False, True])
@pytest.mark.parametrize("beams", [1, 5])
def test_transcripts_of_random_models_equal_the_reference(seed: int, with_times: bool, beams: int) -> None:
    check(seed, with_times, beams)


def test_rules_of_times_equal_the_reference_on_random_scores() -> None:
    from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor

    theirs, _, _ = pair()
    rng, begin = np.random.default_rng(0), 3
    ours = jax.jit(timed, static_argnums=4)
    for made in (0, 1, 2, 3, 6):
        told = WhisperTimeStampLogitsProcessor(theirs.generation_config, begin_index=begin)
        tokens = rng.integers(5, 50, (400, begin + 8)).astype(np.int32)
        times = np.sort(rng.integers(62, 120, tokens.shape), 1)
        tokens = np.where(rng.random(tokens.shape) < 0.5, times, tokens)
        scores = (rng.normal(size=(400, 120)) * 3).astype(np.float32)
        scores[:, 62:] += rng.normal(size=(400, 1)).astype(np.float32) * 3
        at = begin + made
        found = np.asarray(ours(scores, tokens, jnp.int32(made), jnp.int32(at), TOKENS.timestamps))
        wanted = told(torch.tensor(tokens[:, :at].astype(np.int64)), torch.tensor(scores)).numpy()
        np.testing.assert_array_equal(found, wanted)
        assert 0 < np.isinf(wanted[:, :62]).mean() <= 1


def listener(seed: int = 0, how: Listening | None = None, beams: int = 1, config: Any = CONFIG) -> tuple[Any, Listener]:
    """(the reference's model, one of ours with the same parameters that transcribes recordings)."""
    theirs, model, params = pair(seed, config)
    return theirs, Listener(model, params, MEL, TOKENS, settings(False, beams), how or Listening())


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise whose loudness and colour change all the time."""
    rng, count = np.random.default_rng(seed), int(seconds * MEL.sampling_rate)
    white = rng.normal(size=count) * np.repeat(rng.uniform(0.01, 1, count // 400 + 1), 400)[:count]
    tones = np.sin(np.cumsum(np.repeat(rng.uniform(0.05, 2.5, count // 800 + 1), 800)[:count]))
    return (white * 0.3 + tones * np.repeat(rng.uniform(0, 1, count // 600 + 1), 600)[:count]).astype(np.float32)


def check_long(seed: int, seconds: float, how: Listening, beams: int = 1) -> int:
    """Holds a recording's segments against the reference's; how many there are."""
    theirs, ours = listener(seed, how, beams)
    recording = sound(seconds, seed)
    frames = MEL(recording) if len(recording) <= MEL.samples else MEL.whole(recording)
    made = theirs.generate(
        input_features=as_theirs(frames[None]), language=how.language, task=how.task, return_timestamps=True, num_beams=beams,
        max_new_tokens=ours._config.max_new_tokens, do_sample=False, return_segments=True, temperature=how.temperatures,
        condition_on_prev_tokens=how.condition_on_previous, logprob_threshold=how.logprob_threshold,
        compression_ratio_threshold=how.compression_ratio_threshold, no_speech_threshold=how.no_speech_threshold,
    )  # fmt: skip
    (found,) = ours.transcribe([recording])
    wanted = made["segments"][0]
    assert [list(one.tokens) for one in found.segments] == [one["tokens"].tolist() for one in wanted]
    for one, other in zip(found.segments, wanted, strict=True):
        assert (one.start, one.end) == pytest.approx((float(other["start"]), float(other["end"])), abs=1e-6)
    return len(wanted)


HOWS = {
    "plain": Listening(language="en", task="transcribe"),
    "heard": Listening(),
    "conditioned": Listening(language="fr", condition_on_previous=True),
    "silent": Listening(language="en", logprob_threshold=-2.0, no_speech_threshold=1e-3),
    "judged": Listening(
        language="de", temperatures=(0.0, 0.0), compression_ratio_threshold=0.7, logprob_threshold=-1.5
    ),
}


@pytest.mark.parametrize("which", ["heard"])
def test_long_recordings_are_transcribed_as_the_reference_does(which: str) -> None:
    assert check_long(3, 3.4, HOWS[which]) > 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("seconds", [0.3, 1.0, 4.21])
@pytest.mark.parametrize("which", HOWS)
def test_recordings_of_random_models_are_transcribed_as_the_reference_does(
    seed: int, seconds: float, which: str
) -> None:
    check_long(seed, seconds, HOWS[which])
    if seed < 2:
        check_long(seed, seconds, HOWS[which], beams=3)


@pytest.mark.slow
def test_what_is_not_to_be_believed_is_drawn_again_and_told() -> None:
    never = Listening(language="en", temperatures=(0.0, 0.4, 0.8), logprob_threshold=0.0, seed=3)
    recordings = [sound(1, 1), sound(2.5, 2)]
    _, ours = listener(2, never)
    made = ours.transcribe(recordings)
    assert {segment.temperature for one in made for segment in one.segments} == {0.8}
    assert made == ours.transcribe(recordings)  # draws follow from the seed and what is heard
    _, other = listener(2, dataclasses.replace(never, seed=4))
    assert made != other.transcribe(recordings)
    _, plain = listener(2, dataclasses.replace(never, logprob_threshold=-1000.0))
    believed = plain.transcribe(recordings)
    assert {segment.temperature for one in believed for segment in one.segments} == {0.0}
    alone = [plain.transcribe([one])[0] for one in recordings]
    assert [one.tokens for one in believed] == [one.tokens for one in alone]  # what is heard beside changes nothing
    assert all(segment.score < 0 and 0 < (segment.no_speech or 0) < 1 for segment in believed[0].segments)


def test_stretches_without_speech_have_no_transcript() -> None:
    silent = Listening(language="en", logprob_threshold=0.0, no_speech_threshold=0.0)
    _, ours = listener(0, silent)
    assert ours.transcribe([sound(2.2)])[0].segments == ()


@pytest.mark.slow
def test_scores_are_means_of_log_probabilities() -> None:
    _, model, params = pair(1)
    frames, config, prompt = frames_of(2, 1), settings(True), TOKENS.prompt("en", "transcribe", timestamps=True)
    heard = hear(model, params, frames, [prompt] * 2, config, own=len(prompt))
    made = write(model, config, params, heard)
    again = write(model, config, params, heard, [False, True])
    assert again.tokens == [made.tokens[0], []]
    theirs = pair(1)[0]
    told = theirs.generate(
        input_features=as_theirs(frames), language="en", task="transcribe", return_timestamps=True, max_new_tokens=16, do_sample=False,
        force_unique_generate_call=True, return_dict_in_generate=True, logprob_threshold=-100.0, temperature=0.0,
    )  # fmt: skip
    for row in range(2):
        whole = made.tokens[row] + [50] * made.ended[row]
        scores = torch.stack(list(told.scores))[: len(whole), row]
        chosen = torch.log_softmax(scores.float(), -1)[torch.arange(len(whole)), torch.tensor(whole)]
        assert made.scores[row] == pytest.approx(float(chosen.mean()), abs=1e-4)


@pytest.mark.parametrize("language", [None, "de", "german"])
@pytest.mark.parametrize("task", [None, "translate"])
@pytest.mark.parametrize("with_times", [False, True])
@pytest.mark.parametrize("forced", [None, [[1, None], [2, 57]], [[1, 52], [2, 57], [3, 61]]])
def test_prompts_equal_the_reference(language: str | None, task: str | None, with_times: bool, forced: Any) -> None:
    theirs, _, _ = pair()
    stated = copy.deepcopy(theirs.generation_config)
    asked = {"forced_decoder_ids": forced, "language": language, "task": task, "return_timestamps": with_times}
    for name, value in asked.items():  # ``update`` sets what is there alone
        setattr(stated, name, value)
    frames = as_theirs(frames_of(1))
    (wanted,) = theirs._retrieve_init_tokens(frames, 1, stated, theirs.config, 100, {}).tolist()
    tokens = SpeechTokens.from_json(SETTINGS | {"forced_decoder_ids": forced}, 51, "here")
    heard = int(theirs.detect_language(frames)[0]) if tokens.hears_languages(language, task) else None
    assert list(tokens.prompt(language if heard is None else heard, task, timestamps=with_times)) == wanted


@pytest.mark.slow
def test_models_of_one_language_begin_with_no_language() -> None:
    one = SpeechTokens.from_json(
        {"eos_token_id": 50, "no_timestamps_token_id": 61, "is_multilingual": False}, 51, "here"
    )
    assert one.prompt() == (51, 61)
    assert one.prompt(timestamps=True) == (51,)
    assert not one.hears_languages(None, None)
    _, model, params = pair(1)  # a prompt of one token
    frames, config = frames_of(2, 1), settings(True)
    found = write(model, config, params, hear(model, params, frames, [(51,)] * 2, config))
    theirs = pair(1)[0]
    rows = []
    for row in range(2):
        ids = [51]
        for step in range(16):
            with torch.no_grad():
                logits = theirs(
                    input_features=as_theirs(frames[row : row + 1]), decoder_input_ids=torch.tensor([ids])
                ).logits[:, -1]
            place = jnp.int32(len(ids))
            scores = jnp.asarray(logits.numpy()).at[:, jnp.array(config.suppress_tokens)].set(-jnp.inf)
            if step == 0:
                scores = scores.at[:, jnp.array(config.begin_suppress_tokens)].set(-jnp.inf)
            padded = jnp.zeros((1, 20), jnp.int32).at[0, : len(ids)].set(jnp.array(ids))
            ids.append(int(timed(scores, padded, jnp.int32(step), place, TOKENS.timestamps).argmax()))
            if ids[-1] == 50:
                break
        rows.append(ended(ids[1:]))
    assert found.tokens == rows


def test_chunks_are_put_together_as_the_reference_does() -> None:
    from transformers.models.whisper.tokenization_whisper import _find_longest_common_sequence

    rng = np.random.default_rng(0)
    for _ in range(60):
        whole = rng.integers(0, 6, 40).tolist()
        cuts = [(0, 14), (9, 25), (20, 33), (30, 40)]
        parts = [[t if rng.random() > 0.15 else int(rng.integers(0, 6)) for t in whole[a:b]] for a, b in cuts]
        assert merged(parts) == _find_longest_common_sequence(parts)
    whole = list(range(40))
    assert merged([whole[:20], whole[12:30], whole[24:]]) == whole
    assert merged([]) == []


def test_chunks_are_cut_as_the_reference_does() -> None:
    from transformers.pipelines.automatic_speech_recognition import chunk_iter

    class Extractor:
        sampling_rate = 100

        def __call__(self, chunk: np.ndarray, **_: Any) -> dict[str, Any]:
            return {}

    for samples in (1, 95, 100, 250, 333, 1000):
        told = chunk_iter(np.arange(samples), Extractor(), 100, 17, 17)
        wanted = [one["stride"][0] for one in told]
        found = chunks_of(samples, 100, 1.0, 0.17, 30)
        assert [stop - start for start, stop in found] == wanted


@pytest.mark.slow
def test_chunks_are_heard_by_themselves() -> None:
    whole = Listening(language="en", timestamps=False)
    _, ours = listener(1, whole)
    found = ours.in_chunks(sound(3.3, 1), seconds=1.0, overlap=0.1, rows=2)
    parts = [ours.transcribe([sound(3.3, 1)[a:b]])[0].tokens for a, b in chunks_of(52800, 16000, 1.0, 0.1, 1)]
    assert found.tokens == merged([[t for t in part if t < 50] for part in parts])
    assert (found.language, found.segments[0].end) == ("en", 3.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: Listening(no_speech_threshold=0.6), "no_speech_threshold needs logprob_threshold"),
        (lambda: Listening(temperatures=()), "one at least"),
        (lambda: listener(how=Listening(language="klingon")), "language 'klingon' is not one of the model's"),
        (lambda: listener(how=Listening(task="sing")), "task 'sing' is not one of the model's"),
        (lambda: listener(how=Listening(timestamps=False))[1].transcribe([sound(1.5)]), "recording 1 has 2 s"),
        (lambda: listener()[1].in_chunks(sound(2)), "ask for no times"),
        (lambda: listener(how=Listening(timestamps=False))[1].in_chunks(sound(2)), "chunks of 30 s"),
        (lambda: chunks_of(100, 10, 1, 0.5, 30), "less than half"),
        (lambda: Listener(*pair()[1:], LogMel(), TOKENS, settings(False), Listening()), "makes 3000 frames of 80 bins"),
        (lambda: SpeechTokens.from_json({"lang_to_id": [1]}, 5, "here"), "here: eos_token_id=None"),
        (lambda: SpeechTokens.from_json({"eos_token_id": 1, "lang_to_id": [1]}, 5, "here"), "here: lang_to_id must be"),
        (lambda: SpeechTokens.from_json({"eos_token_id": 1, "forced_decoder_ids": [[2, 3]]}, 5, "h"), "h: forced_decoder_ids"),
        (lambda: SpeechTokens.from_json({"eos_token_id": 1, "is_multilingual": False}, 5, "h").prompt("en"), "English alone"),
        (lambda: SpeechTokens.from_json({"eos_token_id": 1}, 5, "h").prompt(timestamps=True), "no no_timestamps_token_id"),
        (lambda: hear(*pair()[1:], frames_of(1), [(51,) * 30], settings(False)), "set max_new_tokens to 10 or less"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_in_one_line(change: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        change()
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) <= 300
