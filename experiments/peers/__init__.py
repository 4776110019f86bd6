"""Published optimizers of low-rank factors, written from their papers to be compared with."""

from experiments.peers.adapre_lora import adapre_lora
from experiments.peers.lora_pro import lora_pro
from experiments.peers.lora_rite import lora_rite
from experiments.peers.riemannion import riemannion

__all__ = ["adapre_lora", "lora_pro", "lora_rite", "riemannion"]
