"""What the reference's files call the parts of a layer of :mod:`jaxft.models.blocks`."""

from __future__ import annotations

from dataclasses import dataclass

from jaxft.models.layout import Rule

_HEADS = ("query", "key", "value")


@dataclass(frozen=True)
class BlockNames:
    """What the reference calls attention and MLP, by layer."""

    layer: str
    """Name of one layer, for instance ``model.layers.{layer}``."""
    heads: tuple[str, ...]
    """Names of queries, keys and values; one name: a tensor that holds them all, as rows."""
    out: str
    wide: tuple[str, ...]
    """Names of the MLP's maps before the last one; one name for two: a tensor that holds both, as rows."""
    down: str
    order: tuple[str, ...] = ("gate", "up")
    """Which of these two comes first; ``("up",)``: the MLP is not gated."""
    heads_apart: tuple[str, ...] = ()
    """What some files call queries, keys and values where they do not hold them together."""
    wide_apart: tuple[str, ...] = ()
    """The same of the MLP's first two maps."""

    def rules(
        self, biased: bool, mlp_biased: bool, down_biased: bool | None = None, out_biased: bool | None = None
    ) -> tuple[Rule, ...]:
        """The rows of the weight table.

        Args:
          biased: maps of attention have biases.
          mlp_biased: those of the MLP have.
          down_biased: its last one has; None: as the others.
          out_biased: the map from heads back to the width has; None: as the others of attention.
        """
        heads = (tuple(f"attention/{name}" for name in _HEADS), self.heads, self.heads_apart)
        wide = (tuple(f"mlp/{name}" for name in self.order), self.wide, self.wide_apart)
        down = mlp_biased if down_biased is None else down_biased
        out = biased if out_biased is None else out_biased
        return (
            *self._maps(*heads, "(n h) d -> d n h", "(n h) -> n h", biased),
            *self._maps(("attention/out",), (self.out,), (), "d (n h) -> n h d", None, out),
            *self._maps(*wide, "o i -> i o", None, mlp_biased),
            *self._maps(("mlp/down",), (self.down,), (), "o i -> i o", None, down),
        )

    def _maps(
        self,
        ours: tuple[str, ...],
        theirs: tuple[str, ...],
        apart: tuple[str, ...],
        kernel: str,
        bias: str | None,
        biased: bool,
    ) -> list[Rule]:
        rows = (("kernel", "weight", kernel), ("bias", "bias", bias))[: 1 + biased]
        made = []
        for part, tensor, pattern in rows:
            paths = tuple(f"layers/{one}/{part}" for one in ours)
            names, others = (tuple(f"{self.layer}.{one}.{tensor}" for one in some) for some in (theirs, apart))
            if len(names) == len(paths):
                made += [Rule(path, name, pattern) for path, name in zip(paths, names, strict=True)]
            else:
                made.append(Rule(paths, names[0], pattern, apart=others))
        return made


LLAMAS = BlockNames(
    "model.layers.{layer}",
    heads=tuple(f"self_attn.{name}_proj" for name in "qkv"),
    out="self_attn.o_proj",
    wide=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
)
"""The names of Llama, which others took over."""
