"""How the weights of an expert are stored in a slot: in their own dtype, or as codes of 8 or 4 bits with scales.

Values only: `quantization.py` makes codes of weights and weights of codes, and each kernel widens codes on its own. The
invariant that they share: a weight is its code, a small number that every 16-bit float holds exactly, times its scale
in float32. Rows and sums are never quantized.

A weight of N rows and K columns is stored as codes [N, stored columns] and scales [G, N]: the columns of a row are cut
into G groups with a scale each, or share one (G = 1). Codes of 4 bits lie two in a byte, biased by 8: byte j of a group
has its column j below and its column j + half a group above, so that neither needs to be moved to its neighbour.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """One way to store weights."""

    code: str
    """What a weight is stored as: "dense" for the spec's dtype, "int8", "int4", or "fp8", which is float8 e4m3."""
    group: int = 0
    """Columns that share a scale; 0 when all of a row do."""
    scale_rows: int = 1
    """Rows that get the same scale when weights are quantized. Each has its own copy, so no kernel knows of it."""
    scale_dtype: str = "float32"

    @property
    def is_dense(self) -> bool:
        return self.code == "dense"

    @property
    def codes_per_byte(self) -> int:
        return 2 if self.code == "int4" else 1

    @property
    def code_dtype(self) -> str:
        """Of what is stored, by torch's name: the bits of a float8 are stored as plain bytes."""
        return "int8" if self.code == "int8" else "uint8"

    def num_groups(self, columns: int) -> int:
        """G: the last group may be short."""
        return -(-columns // self.group) if self.group else 1

    def stored_columns(self, columns: int) -> int:
        """Elements that a row takes. Where two share one, whole groups of them."""
        return self.num_groups(columns) * self.group // 2 if self.codes_per_byte == 2 else columns


FORMATS = {
    "dense": WeightFormat(code="dense"),
    "int8": WeightFormat(code="int8"),
    "int4_g32": WeightFormat(code="int4", group=32, scale_dtype="bfloat16"),
    "int4_g64": WeightFormat(code="int4", group=64, scale_dtype="bfloat16"),
    "int4_g128": WeightFormat(code="int4", group=128, scale_dtype="bfloat16"),
    "fp8": WeightFormat(code="fp8"),
    "fp8_block": WeightFormat(code="fp8", group=128, scale_rows=128),
}
"""By the name that configs use. "fp8_block" is what DeepSeek-V3's checkpoints store (DeepSeek-AI 2024, section 3.3)."""
