"""Multi-scale deformable attention as one operator."""

from deform_attn.op import ms_deform_attn

__all__ = ["ms_deform_attn"]
