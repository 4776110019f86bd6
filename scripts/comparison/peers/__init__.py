"""Published optimizers of low-rank factors, written from their papers to be compared with."""

from comparison.peers.adapre_lora import adapre_lora
from comparison.peers.lora_pro import lora_pro
from comparison.peers.lora_rite import lora_rite
from comparison.peers.riemannion import riemannion

__all__ = ["adapre_lora", "lora_pro", "lora_rite", "riemannion"]
