"""What the tests of encoder-decoders share: values, gradients and texts beside the reference's, and folders that come back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import close, compare_head, make_reference, ours_of

from jaxft import models
from jaxft.config.generation import GenerationConfig
from jaxft.hub.convert import export_tensors
from jaxft.hub.source import open_source
from jaxft.inference.load import load
from jaxft.models.contract import model_type_of
from jaxft.models.decoding.beams import search
from jaxft.models.decoding.decode import begin, generate
from jaxft.models.example import example_batch
from jaxft.tasks.seq2seq import Task

HEAD = "seq2seq_lm"


def without_dropout(family: str) -> Any:
    """The family's tiny config, which computes the same each time."""
    tiny = models.family(family).TINY
    return dataclasses.replace(tiny, **{f.name: 0.0 for f in dataclasses.fields(tiny) if "dropout" in f.name})


def reference_of(family: str, config: Any, head: str | None, seed: int = 0) -> Any:
    """A model of the reference with random parameters; its vocabulary is a matrix of its own where ours is."""
    torch, module = pytest.importorskip("torch"), models.family(family)
    theirs = make_reference(module, config, head, model_type_of(module, config), seed)
    if head == HEAD and not config.tie_word_embeddings:
        matrix = theirs.lm_head.weight.detach().clone()
        theirs.lm_head.weight = torch.nn.Parameter(matrix + torch.randn_like(matrix) * 0.1)
    if hasattr(theirs, "final_logits_bias"):  # no parameter, and 0 at first
        theirs.final_logits_bias.copy_(torch.randn_like(theirs.final_logits_bias))
    return theirs


def torch_ids(x: np.ndarray) -> Any:
    return pytest.importorskip("torch").tensor(np.asarray(x).astype(np.int64))


def check_parity(family: str, config: Any, head: str | None, folder: Path, smoothing: float = 0.0) -> None:
    """Holds values, loss and gradients against the reference's, at all places that are no padding."""
    torch, module = pytest.importorskip("torch"), models.family(family)
    theirs = reference_of(family, config, head)
    model, params = ours_of(module, theirs, config, head, folder)
    batch = example_batch(module.facts(config), 4, length=20)
    seen = batch["decoder_mask"].astype(bool)
    names = {
        "tokens": "input_ids",
        "mask": "attention_mask",
        "decoder_tokens": "decoder_input_ids",
        "decoder_mask": "decoder_attention_mask",
    }
    out = theirs(**{names[name]: torch_ids(value) for name, value in batch.items()})
    ours = jax.jit(model.apply)({"params": params}, **batch)
    source = batch["mask"].astype(bool)
    if head is None:
        close(np.asarray(ours.hidden)[seen], out.last_hidden_state[seen], "hidden")
        close(np.asarray(ours.memory)[source], out.encoder_last_hidden_state[source], "memory")
        return
    close(np.asarray(ours.logits)[seen], out.logits[seen], "logits")

    task = Task(start=model.facts.start, smoothing=smoothing)
    rows = {
        "target": batch["decoder_tokens"],
        "target_mask": batch["decoder_mask"],
        "row": np.arange(4),
        "weights": np.ones(4, np.float32),
    }
    given = {**{name: batch[name] for name in ("tokens", "mask")}, **rows}
    prepared = task.prepare({name: jnp.asarray(value) for name, value in given.items()}, jax.random.key(0))
    wanted = torch.where(torch_ids(seen) > 0, torch_ids(batch["decoder_tokens"]), torch.tensor(-100))
    start = torch.full((4, 1), model.facts.start)
    shifted = torch.cat([start, torch_ids(batch["decoder_tokens"])[:, :-1]], 1)
    found = theirs(
        input_ids=torch_ids(batch["tokens"]), attention_mask=torch_ids(batch["mask"]), decoder_input_ids=shifted
    )
    loss = torch.nn.functional.cross_entropy(
        found.logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, label_smoothing=smoothing
    )
    loss.backward()

    def mean(params: Any) -> jax.Array:
        inputs = {name: prepared[name] for name in model.facts.inputs if name in prepared}
        sums = task.sums(lambda batch, key: model.apply({"params": params}, **inputs), prepared, None)
        return sums["loss"] / sums["weight"]

    value, gradient = jax.jit(jax.value_and_grad(mean))(params)
    close(value, loss, "loss")
    named, fixed = dict(theirs.named_parameters(remove_duplicate=False)), dict(theirs.named_buffers())
    for tensor in export_tensors(gradient, module.hf_layout(config, head), bare=False):
        wanted = torch.zeros_like(fixed[tensor.name]) if tensor.name in fixed else named[tensor.name].grad
        close(tensor.read(), wanted, tensor.name)


def check_texts(family: str, config: Any, settings: dict[str, Any], folder: Path, seed: int = 0) -> None:
    """Holds what is written of sources of several lengths against the reference's ``generate``, token by token, and how probable beams find
    it. Texts may differ where they are equally probable, to 1e-5."""
    torch, module = pytest.importorskip("torch"), models.family(family)
    theirs = reference_of(family, config, HEAD, seed)
    model, params = ours_of(module, theirs, config, HEAD, folder)
    rng = np.random.default_rng(seed)
    sources = [rng.integers(5, config.vocab_size, n).tolist() for n in (3, 9, 14, 1)]
    width, ends = max(map(len, sources)), (3, 4, 5, 6, 7, 8)
    ids, mask = (
        torch.full((len(sources), width), config.pad_token_id or 0),
        torch.zeros((len(sources), width), dtype=torch.long),
    )
    for row, source in enumerate(sources):
        ids[row, : len(source)], mask[row, : len(source)] = torch.tensor(source), 1
    same = config.num_hidden_layers == config.num_decoder_layers  # else the reference's cache has too few layers
    made = theirs.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=list(ends),
        pad_token_id=config.pad_token_id or 0, decoder_start_token_id=config.decoder_start_token_id, use_cache=same,
        return_dict_in_generate=True, output_scores=True,
        **{"forced_bos_token_id": None, "forced_eos_token_id": None, "num_beams": 1, **settings},
    )  # fmt: skip
    ours: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    settled = GenerationConfig(max_new_tokens=12, eos_token_id=ends, **ours)
    if settled.num_beams > 1:
        state = begin(model, params, sources, settled)
        searched = search(model, params, settled, state.tokens, state.there, state.cache)
        texts, scores = searched.tokens, searched.scores
        close(np.array(scores), made.sequences_scores, "scores", 1e-5)
    else:
        texts, scores = generate(model, params, sources, settled).tokens, [0.0] * len(sources)
    for row, text in enumerate(made.sequences[:, 1:].tolist()):
        end = next((place for place, token in enumerate(text) if token in ends), len(text))
        same = texts[row] == text[:end]
        if not same and settled.num_beams > 1:  # two texts, one score: which is first follows from rounding
            print(
                f"tie of row {row}: {texts[row]}, {text[:end]}, {scores[row] - float(made.sequences_scores[row]):.1e}"
            )
            continue
        assert same, (row, settings)


def _with_tables(theirs: Any) -> None:
    """Gives each side the table as a parameter of its own, where nothing is tied: the file has all three then."""
    if theirs.config.tie_word_embeddings:
        return
    for side in (theirs.model.encoder, theirs.model.decoder):
        parameter = pytest.importorskip("torch").nn.Parameter
        side.embed_tokens.weight = parameter(theirs.model.shared.weight.detach().clone())


def check_folder(family: str, config: Any, folder: Path) -> None:
    """A folder of the reference comes back bit for bit, with a config.json that means the same to us and to it."""
    from safetensors.torch import load_file

    torch, notes = pytest.importorskip("torch"), list[str]()
    theirs = reference_of(family, config, HEAD)
    _with_tables(theirs)
    theirs.save_pretrained(folder / "theirs")
    source = open_source(str(folder / "theirs"), notes.append)
    # Of T5, the reference says that all vocabularies are tied, and takes those that are not from the weights.
    assert len(notes) == (theirs.config.tie_word_embeddings and not config.tie_word_embeddings)
    assert (source.head, source.config) == (HEAD, config)
    load(folder / "theirs", note=lambda text: None).save(folder / "ours")
    stored, written = (load_file(folder / which / "model.safetensors") for which in ("theirs", "ours"))
    assert stored.keys() == written.keys()
    assert all(torch.equal(stored[name], written[name]) for name in stored)
    again = type(theirs).from_pretrained(folder / "ours", attn_implementation="eager").eval()
    ids = torch_ids(np.array([[7, 8, 9]]))
    with torch.no_grad():
        ours, wanted = (one(input_ids=ids, decoder_input_ids=ids).logits for one in (again, theirs))
    assert torch.equal(ours, wanted)


def check_head(family: str, config: Any, head: str, folder: Path) -> None:
    """Values, loss and gradients of a head are the reference's; a folder of it comes back bit for bit, and a folder of the head that
    writes becomes one of it."""
    from safetensors.torch import load_file

    torch, module, said = pytest.importorskip("torch"), models.family(family), list[str]()
    kind = model_type_of(module, config)
    compare_head(module, config, head, kind, folder)
    theirs = make_reference(module, config, head, kind)
    _with_tables(theirs)
    theirs.save_pretrained(folder / "theirs")
    ours = load(folder / "theirs", note=said.append)
    assert ours.model.head == head
    assert ours.model.config == config
    ours.save(folder / "ours")
    stored, written = (load_file(folder / which / "model.safetensors") for which in ("theirs", "ours"))
    assert stored.keys() == written.keys()
    assert all(torch.equal(stored[name], written[name]) for name in stored)
    again, report = type(theirs).from_pretrained(folder / "ours", attn_implementation="eager", output_loading_info=True)
    assert not any(report.values())
    ids = torch_ids(np.array([[7, 8, 9, config.eos_token_id]]))
    with torch.no_grad():
        found, wanted = (one.eval()(input_ids=ids)[0] for one in (again, theirs))
    assert torch.equal(found, wanted)
    writer = reference_of(family, config, HEAD)
    writer.save_pretrained(folder / "writer")
    begun = load(folder / "writer", head=head, note=said.append)
    np.testing.assert_array_equal(
        begun.params["encoder"]["attention"]["query"]["kernel"].reshape(-1),
        np.stack([_query_of(writer, layer) for layer in range(config.num_hidden_layers)]).reshape(-1),
    )


def _query_of(writer: Any, layer: int) -> np.ndarray:
    encoder = getattr(writer, "model", writer).encoder
    attention = (
        encoder.layers[layer].self_attn.q_proj
        if hasattr(encoder, "layers")
        else encoder.block[layer].layer[0].SelfAttention.q
    )
    return attention.weight.detach().numpy().T


def check_packed(family: str, config: Any, folder: Path) -> None:
    """Two pairs in one row give the logits that each gives alone."""
    module = models.family(family)
    model, params = ours_of(module, reference_of(family, config, HEAD), config, HEAD, folder)
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(5, 90, s), rng.integers(5, 90, t)) for s, t in ((5, 4), (7, 3))]
    apply = jax.jit(model.apply)
    alone = [np.asarray(apply({"params": params}, a[None], decoder_tokens=b[None]).logits[0]) for a, b in pairs]

    def side(number: int, length: int) -> dict[str, np.ndarray]:
        tokens, segments, positions = (np.zeros((1, length), np.int32) for _ in range(3))
        first = 0
        for which, pair in enumerate(pairs):
            count = len(pair[number])
            places = slice(first, first + count)
            tokens[0, places], segments[0, places], positions[0, places] = pair[number], which + 1, np.arange(count)
            first += count
        return {"tokens": tokens, "segments": segments, "positions": positions}

    packed = side(0, 14) | {f"decoder_{name}": value for name, value in side(1, 9).items()}
    together = np.asarray(apply({"params": params}, **packed).logits[0])
    np.testing.assert_allclose(together[:7], np.concatenate(alone), rtol=1e-5, atol=1e-5)


def check_cache(family: str, config: Any, folder: Path) -> None:
    """Targets read with a cache, a few tokens at a time, give what they give at once; the source is read once."""
    from jaxft.models.caches import init_cache

    module = models.family(family)
    model, params = ours_of(module, reference_of(family, config, HEAD), config, HEAD, folder)
    batch = example_batch(module.facts(config), 3, length=16)
    batch["decoder_mask"] = np.ones_like(batch["decoder_mask"])
    apply = jax.jit(model.apply)
    whole = np.asarray(apply({"params": params}, **batch).logits)
    cache, parts = init_cache(model, 3, 10), []
    for first, last in ((0, 3), (3, 4), (4, 8)):
        source = {name: batch[name] for name in ("tokens", "mask")} if first == 0 else {"tokens": None}
        out = apply({"params": params}, **source, decoder_tokens=batch["decoder_tokens"][:, first:last], cache=cache)
        cache = out.cache
        parts.append(np.asarray(out.logits))
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-5)
    assert cache.memory is not None
    assert cache.memory.keys.shape[:2] == (config.num_decoder_layers, 3)
    assert jnp.asarray(cache.filled) == 8
