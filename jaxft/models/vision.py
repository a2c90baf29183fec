"""Vision Transformers (Dosovitskiy et al. 2020): patches of an image as tokens, pre-norm layers, the first token's vector for the image.

A family adds what differs: its Config's defaults, its special tokens, its heads, and the names of its weights.

Dims: B batch, P patches, S tokens (special ones, then patches), D model width, N heads, H head size, F MLP width, L layers, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Integer, PRNGKeyArray, PyTree

from jaxft.attention import MaskSpec
from jaxft.attention.probabilities import attention_probabilities
from jaxft.data.batch import Field
from jaxft.errors import UserError
from jaxft.layers import (
    ACTIVATIONS,
    Compute,
    LayerNorm,
    Linear,
    affine,
    apply_stack,
    checked_call,
    declare,
    dropout,
    layer_norm,
    project_exactly,
    stacked_params,
    subkey,
    usual_promotion,
)
from jaxft.layers.functions import drop_rows
from jaxft.models.blocks import GatedMlp, RotaryAttention
from jaxft.models.contract import Facts, Features, Head, Output, Stack, head_named
from jaxft.models.heads import answered, exact, normal
from jaxft.models.vision_config import VisionConfig
from jaxft.parallel.sharding import run_mesh, ways

Array = jax.Array


class LayerScale(nn.Module):
    """A factor for each channel."""

    initial: float
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        start = nn.initializers.constant(self.initial)
        scale = declare(self, "scale", start, ("norm",), x.shape[-1:], self.compute.param_dtype)
        return x * scale.astype(x.dtype)


class Mlp(nn.Module):
    """Two affine maps with an activation between."""

    config: VisionConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        c, (d, f) = self.config, (self.config.hidden_size, self.config.mlp_width)
        up = Linear((d, f), ("embed", "mlp"), self.compute, normal(c), name="up")(x)
        up = self.compute.rules.constrain(up, "batch", "length", "act_mlp")
        return Linear((f, d), ("mlp", "embed"), self.compute, normal(c), act=ACTIVATIONS[c.hidden_act], name="down")(up)


class Layer(nn.Module):
    """One encoder layer: pre-norm attention, then pre-norm MLP; whole images may skip either."""

    config: VisionConfig
    compute: Compute

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        key: PRNGKeyArray | None,
        mask: MaskSpec,
        state: Integer[Array, ""] | None = None,
    ) -> Float[Array, "B S D"] | tuple[Float[Array, "B S D"], None]:
        """The next layer's input; as pairs with None where ``state`` says how often the layer is there, in parts of ALWAYS."""
        c, how, (b, s, _) = self.config, self.compute, x.shape

        def added(name: str, y: Array, number: int) -> Array:
            y = y if c.layer_scale is None else LayerScale(c.layer_scale, how, name=f"{name}_scale")(y)
            y = dropout(y, c.residual_dropout, subkey(key, number), how.dropout_bits)
            return y if key is None or state is None else drop_rows(y, state, jax.random.fold_in(key, number + 1))

        sizes, starts = (c.num_attention_heads, c.num_attention_heads, c.head_size), (normal(c), normal(c))
        attention = RotaryAttention(
            *sizes,
            how,
            *starts,
            c.attention_probs_dropout_prob,
            c.qkv_bias,
            together=True,
            out_biased=True,
            name="attention",
        )
        positions = jnp.broadcast_to(jnp.arange(s), (b, s))
        seen = LayerNorm(c.layer_norm_eps, how, name="norm")(x)
        mixed, _ = attention(seen, mask, positions, subkey(key, 0), None)
        x = x + added("attention", mixed, 1)
        seen = LayerNorm(c.layer_norm_eps, how, name="mlp_norm")(x)
        gated = GatedMlp(c.mlp_width, "silu", how, *starts, biased=True, name="mlp") if c.gated else None
        x = x + added("mlp", Mlp(c, how, name="mlp")(seen) if gated is None else gated(seen), 3)
        x = how.rules.constrain(x, "batch", "length", "act_embed")
        return x if state is None else (x, None)


class Patches(nn.Module):
    """Each patch through one affine map, [B, height, width, channels] to [B, P, D]: a convolution whose windows do not overlap."""

    config: VisionConfig
    compute: Compute

    @nn.compact
    def __call__(self, pixels: Float[Array, "B Y X Z"]) -> Float[Array, "B P D"]:
        c, how = self.config, self.compute
        (tall, wide), (rows, columns), channels = c.patch, c.grid, c.num_channels
        shape, names = (tall, wide, channels, c.hidden_size), (None, None, "channels", "embed")
        kernel = declare(self, "kernel", normal(c), names, shape, how.param_dtype)
        bias = declare(self, "bias", nn.initializers.zeros, names[3:], shape[3:], how.param_dtype)
        matrix = how.rules.place_gradient(kernel.reshape(-1, c.hidden_size), None, "embed")
        whole = pixels[:, : rows * tall, : columns * wide]
        apart = whole.reshape(-1, rows, tall, columns, wide, channels).transpose(0, 1, 3, 2, 4, 5)
        apart = apart.reshape(len(pixels), rows * columns, -1)
        return affine("bpd,de->bpe", apart, matrix, bias, how, weight=(None, "embed"))


class Embeddings(nn.Module):
    """Special tokens and patches with their positions."""

    config: VisionConfig
    compute: Compute

    @nn.compact
    def __call__(self, pixels: Float[Array, "B Y X Z"], key: PRNGKeyArray | None) -> Float[Array, "B S D"]:
        c, how, d = self.config, self.compute, self.config.hidden_size

        def vectors(name: str, count: int = 1, axis: str | None = None) -> Array:
            return declare(self, name, normal(c), (None, axis, "embed"), (1, count, d), how.param_dtype)

        patches = Patches(c, how, name="patch")(pixels)
        specials = [vectors(name) for name in c.specials]
        table = vectors("position_table", c.places, "positions")
        if c.masks:
            declare(self, "mask_token", nn.initializers.zeros, (None, "embed"), (1, d), how.param_dtype)
        rows = (len(pixels), 1, 1)
        first, count = [jnp.tile(one.astype(patches.dtype), rows) for one in specials], len(specials)
        x = jnp.concatenate([*first, patches], axis=1) + table.astype(patches.dtype)
        if c.registers:
            between = jnp.tile(vectors("register_tokens", c.registers).astype(x.dtype), rows)
            x = jnp.concatenate([x[:, :count], between, x[:, count:]], axis=1)
        return dropout(x, c.hidden_dropout_prob, key, how.dropout_bits)


class ImageClasses(nn.Module):
    """One affine map of the first token's vector, or of that and the mean of the patches' beside it: logits [B, C]."""

    config: VisionConfig
    compute: Compute
    mean: bool = False

    @nn.compact
    def __call__(self, seen: Features, key: PRNGKeyArray | None) -> Float32[Array, "B C"]:
        del key
        c, x = self.config, seen.hidden[:, 0]
        if self.mean:
            x = jnp.concatenate([x, seen.hidden[:, len(c.specials) + c.registers :].mean(1)], axis=1)
        shape = (x.shape[-1], c.num_labels)
        return Linear(shape, ("embed", "classes"), exact(self.compute), normal(c), name="linear")(x)


class VisionModel(nn.Module):
    """The encoder, with a head as asked."""

    config: VisionConfig
    head: str | None = None
    compute: Compute = Compute()

    HEADS: ClassVar[Mapping[str | None, Head]]

    @property
    def facts(self) -> Facts:
        return facts(self.config)

    @nn.compact
    @usual_promotion
    def __call__(
        self,
        pixels: Float[Array | np.ndarray, "B Y X Z"],
        key: PRNGKeyArray | None = None,
        hidden_states: bool = False,
        attentions: bool = False,
        **unknown: object,
    ) -> Output:
        """Runs the model.

        Args:
          pixels: normalised images, channels last.
          key: dropout key; so is ``rngs={"dropout": key}`` of ``apply``. None: deterministic.
          hidden_states: whether to give what went into the first layer and came out of each, too.
          attentions: whether to give the probabilities of attention, before dropout, computed apart from the backend.

        Raises:
          UserError: images of another size; an argument that there is not, two keys, or a mesh of explicit axes.
        """
        c = self.config
        key = checked_call(self, pixels, key, unknown, (*self.facts.inputs, "key", "hidden_states", "attentions"))
        head = head_named(type(self).__module__.rpartition(".")[2], self.head, self.HEADS)
        _check_pixels(c, pixels)
        x = Embeddings(c, self.compute, name="embed")(jnp.asarray(pixels), subkey(key, 0))
        x, spec = _filled_up(x, self.compute)
        x = self.compute.rules.constrain(x, "batch", "length", "act_embed")
        layer = Layer(c, self.compute, parent=None)
        layers = stacked_params(self, "layers", layer, c.num_hidden_layers, x[:1], None, MaskSpec())
        kept = jnp.asarray(c.kept()) if key is not None and c.drop_path_rate > 0.0 else None
        stack = (layer, layers, c.num_hidden_layers, x, subkey(key, 1), spec)
        x, states, _ = apply_stack(*stack, keep=hidden_states or attentions, state=kept)
        x, states = x[:, : c.tokens], None if states is None else states[:, :, : c.tokens]
        hidden = LayerNorm(c.layer_norm_eps, self.compute, name="norm")(x)
        pooled = hidden[:, 0] if head.make is None and c.pools else None
        if pooled is not None and c.pool_width is not None:
            shape = (c.hidden_size, c.pool_width)
            dense = Linear(shape, ("embed", "pooled"), self.compute, normal(c), name="pooler")
            pooled = ACTIVATIONS[c.pool_act](dense(pooled))
        looked = _attentions(c, layers, states) if attentions and states is not None else None
        of_head = None if head.make is None else head.make(c, self.compute, "head")
        kept_states = states if hidden_states else None
        return answered(of_head, Features(hidden, pooled), subkey(key, 2), None, kept_states, looked)


def _check_pixels(c: VisionConfig, pixels: Array | np.ndarray) -> None:
    wanted = (*c.image, c.num_channels)
    if pixels.ndim != 4 or pixels.shape[1:] != wanted:
        raise UserError(
            f"pixels are {_by(pixels.shape)}, this model reads B x {_by(wanted)} (batch, height, width, channels): resize the "
            "images, or load the model with another image_size"
        )
    if not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise UserError(
            f"pixels are {pixels.dtype}: floating-point numbers are wanted, normalised as the model was trained"
        )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _filled_up(x: Float[Array, "B S D"], compute: Compute) -> tuple[Float[Array, "B _ D"], MaskSpec]:
    """Tokens with as many of padding behind them as a mesh wants that splits rows in equal parts, and which are none."""
    mesh, count = run_mesh(), x.shape[1]
    lacking = 0 if mesh is None else -count % ways(mesh, compute.rules, "length")
    if not lacking:
        return x, MaskSpec()
    there = jnp.broadcast_to(jnp.arange(count + lacking) < count, (len(x), count + lacking))
    return jnp.pad(x, ((0, 0), (0, lacking), (0, 0))), MaskSpec(there)


def _attentions(
    c: VisionConfig, layers: PyTree[Array], states: Float[Array, "states B S D"]
) -> Float32[Array, "L B N S S"]:
    """How much each token looks at each other one, from the layers' stacked parameters and what went into each."""

    def looked(number: int) -> Array:
        norm = (layers["norm"][part][number] for part in ("scale", "bias"))
        x = layer_norm(states[number].astype(jnp.float32), *norm, c.layer_norm_eps)
        q, k = (project_exactly(x, layers["attention"][name], number) for name in ("query", "key"))
        return attention_probabilities(q, k, MaskSpec())

    return jnp.stack([looked(number) for number in range(c.num_hidden_layers)])


def facts(config: VisionConfig) -> Facts:
    """What the rest of jaxft may know of a model of images."""
    heads = config.num_attention_heads
    sizes = (config.num_hidden_layers, config.hidden_size, heads, heads, config.head_size)
    stack = Stack("layers", *sizes, tokens=config.tokens)
    pixels = Field(("batch", *config.image, config.num_channels), "float32")
    return Facts({"pixels": pixels}, (stack,), processor="image")
