"""Multi-scale deformable attention as an operator, plain and fused."""

from deform_attn.op import Backend, fused_ms_deform_attn, ms_deform_attn

__all__ = ["Backend", "fused_ms_deform_attn", "ms_deform_attn"]
