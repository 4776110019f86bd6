"""A model with unusual layers, in Flax and with the same weights in torch."""

import numpy as np
import torch
from flax import nnx


class Twin(nnx.Module):
    """Has a stack without numbers in its path, a weight of three axes, and names that clash."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(64, 8, rngs=rngs)

        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.blocks = stack(rngs)
        self.heads = nnx.LinearGeneral(8, (2, 3), use_bias=False, rngs=rngs)
        self.out = nnx.Einsum("...hd,hde->...e", (2, 3, 8), rngs=rngs)
        self.side = nnx.Dict(out=nnx.Linear(8, 5, rngs=rngs))

    def __call__(self, tokens):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return nnx.tanh(block(x))

        x = run(self.embed(tokens), self.blocks)
        return self.side.out(nnx.tanh(self.out(self.heads(x))))

    def hf_name(self, path: str, layer: int | None) -> str:
        return path if layer is None else f"{path}.{layer}.fc"


class Fc(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.fc(x))


class TorchTwin(torch.nn.Module):
    def __init__(self, model: Twin):
        super().__init__()
        self.embed = torch.nn.Embedding(64, 8)
        self.blocks = torch.nn.ModuleList([Fc(), Fc()])
        self.heads = torch.nn.Linear(8, 6, bias=False)
        self.out = torch.nn.Linear(6, 8, bias=False)
        self.side = torch.nn.ModuleDict({"out": torch.nn.Linear(8, 5)})
        kernels = np.asarray(model.blocks.kernel[...]), np.asarray(model.blocks.bias[...])
        state = {
            "embed.weight": model.embed.embedding[...],
            **{f"blocks.{i}.fc.weight": kernels[0][i].T for i in range(2)},
            **{f"blocks.{i}.fc.bias": kernels[1][i] for i in range(2)},
            "heads.weight": model.heads.kernel[...].reshape(8, 6).T,
            "out.weight": model.out.kernel[...].reshape(6, 8).T,
            "side.out.weight": model.side.out.kernel[...].T,
            "side.out.bias": model.side.out.bias[...],
        }
        self.load_state_dict({name: torch.tensor(np.array(v)) for name, v in state.items()})

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.side["out"](torch.tanh(self.out(self.heads(x))))
