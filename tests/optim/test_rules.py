"""Each optimizer against torch, transformers, optax on separate matrices, or its formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest

from jaxft.training.optim import decay_mask
from jaxft.trees import paths_of

from .tiny_network import AXES, LAYOUT, L, make, random_tree, train

MATRICES = {"layers/attention/query/kernel": 1, "layers/attention/out/kernel": 2, "layers/mlp/up/kernel": 1}


def train_torch(
    make_torch: Callable[[list[dict[str, Any]]], Any], decay: float, steps: int, clip: float | None
) -> dict:
    torch = pytest.importorskip("torch")
    flat = {path: torch.nn.Parameter(torch.tensor(np.array(leaf))) for path, leaf in paths_of(random_tree(0)).items()}
    decays = paths_of(decay_mask(random_tree(0), AXES))
    groups = [
        {"params": [p for path, p in flat.items() if decays[path] is on], "weight_decay": decay * on}
        for on in (True, False)
    ]
    optimizer = make_torch(groups)
    for step in range(steps):
        for path, grad in paths_of(random_tree(1 + step)).items():
            flat[path].grad = torch.tensor(np.array(grad))
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(list(flat.values()), clip)
        optimizer.step()
    return {path: p.detach().numpy() for path, p in flat.items()}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_allclose(np.asarray(leaf), theirs[path], rtol=rtol, atol=atol, err_msg=path)


@pytest.mark.parametrize("clip", [None, 1.0, 1000.0])
def test_adamw_equals_torch(clip: float | None) -> None:
    torch = pytest.importorskip("torch")
    ours, _ = train(make(weight_decay=0.1, clip_norm=clip), 6)
    assert_same(ours, train_torch(lambda groups: torch.optim.AdamW(groups, lr=0.01), 0.1, 6, clip))


def test_adam_never_decays() -> None:
    torch = pytest.importorskip("torch")
    ours, _ = train(make(name="adam", weight_decay=0.1, beta1=0.8, beta2=0.95, eps=1e-6))
    assert_same(
        ours, train_torch(lambda groups: torch.optim.Adam(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-6), 0.0, 4, None)
    )


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov"])
def test_sgd_equals_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    settings = {"momentum": 0.0 if name == "sgd" else 0.8, "nesterov": name == "nesterov"}
    ours, _ = train(make(name=name, momentum=0.8), 6)
    assert_same(ours, train_torch(lambda groups: torch.optim.SGD(groups, lr=0.01, **settings), 0.0, 6, None))


def test_lion_by_formula() -> None:
    """Chen et al. 2023, algorithm 2."""
    ours, _ = train(make(name="lion", beta1=0.9, beta2=0.99, weight_decay=0.1), 4)
    expected = {}
    for path, (_, axes) in LAYOUT.items():
        p, m = (np.asarray(paths_of(random_tree(0))[path], np.float64), 0.0)
        decay = 0.1 * (sum(a not in (None, "layers") for a in axes) >= 2)
        for step in range(4):
            g = np.asarray(paths_of(random_tree(1 + step))[path], np.float64)
            p = p - 0.01 * (np.sign(0.9 * m + 0.1 * g) + decay * p)
            m = 0.99 * m + 0.01 * g
        expected[path] = p
    assert_same(ours, expected)


def test_adafactor_equals_transformers_layer_by_layer() -> None:
    torch = pytest.importorskip("torch")
    adafactor = pytest.importorskip("transformers.optimization").Adafactor
    ours, _ = train(make(name="adafactor", weight_decay=0.1), 5)
    decays = paths_of(decay_mask(random_tree(0), AXES))

    def apart(path: str, leaf: Any) -> list[np.ndarray]:
        """The matrices and vectors that a model without stacking would have."""
        leaf, axes = np.asarray(leaf), LAYOUT[path][1]
        layers = list(leaf) if axes[0] == "layers" else [leaf]
        if path in MATRICES:
            return [x.reshape(int(np.prod(x.shape[: MATRICES[path]])), -1) for x in layers]
        return [x if decays[path] else x.reshape(-1) for x in layers]

    for path, leaf in paths_of(random_tree(0)).items():
        theirs = [torch.nn.Parameter(torch.tensor(x.copy())) for x in apart(path, leaf)]
        optimizer = adafactor(
            theirs,
            lr=0.01,
            scale_parameter=False,
            relative_step=False,
            weight_decay=0.1 * decays[path],
            eps=(1e-30, 1e-3),
        )
        for step in range(5):
            for p, grad in zip(theirs, apart(path, paths_of(random_tree(1 + step))[path]), strict=True):
                p.grad = torch.tensor(grad.copy())
            optimizer.step()
        for got, p in zip(apart(path, ours[path]), theirs, strict=True):
            np.testing.assert_allclose(got, p.detach().numpy(), rtol=1e-4, atol=1e-5, err_msg=path)


def test_muon_equals_optax_on_separate_matrices() -> None:
    ours, _ = train(make(name="muon", momentum=0.9), 3)
    reference = optax.contrib.muon(0.01, beta=0.9, consistent_rms=0.2)
    update = jax.jit(reference.update)
    for path, inputs in MATRICES.items():
        for layer in range(L):
            view = lambda seed: paths_of(random_tree(seed))[path][layer]
            shape = view(0).shape
            flat = lambda x: x.reshape(int(np.prod(shape[:inputs])), -1)
            p: Any = flat(view(0))
            state = reference.init(p)
            for step in range(3):
                updates, state = update(flat(view(1 + step)), state, p)
                p = optax.apply_updates(p, updates)
            np.testing.assert_allclose(flat(ours[path][layer]), np.asarray(p), rtol=1e-4, atol=1e-5, err_msg=path)


def test_muon_takes_hidden_matrices_only_and_orthogonalises_each() -> None:
    muon, _ = train(make(1.0, name="muon"), 1)
    adamw, _ = train(make(1.0, name="adamw"), 1)
    before = paths_of(random_tree(0))
    for path in LAYOUT:
        if path not in MATRICES:
            np.testing.assert_allclose(muon[path], adamw[path], rtol=1e-6, err_msg=path)
            continue
        for step in before[path] - muon[path]:
            matrix = step.reshape(int(np.prod(step.shape[: MATRICES[path]])), -1)
            singular = np.linalg.svd(matrix / (0.2 * max(matrix.shape) ** 0.5), compute_uv=False)
            assert singular.min() > 0.3, path
            assert singular.max() < 1.4, path
