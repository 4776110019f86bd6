"""LoFT in float64 NumPy, dense and slow on purpose: the judge of the optimizer.

Written from the equations of the method on the full weight, and sharing nothing with the package:
moments are whole matrices, the second moment of a row a whole (n, n) one, projections are
pseudo-inverses.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass
class DenseLoFT:
    """One pair `W = s A B`, moved by dense equations."""

    a: np.ndarray  # (m, r)
    b: np.ndarray  # (r, n)
    lr: float | np.ndarray  # a number, or one for each step
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    scaling: float = 1.0
    first: str = "b"
    alternate: bool = True

    def __post_init__(self):
        self.count = 0
        m, n = len(self.a), self.b.shape[1]
        self.first_moment = {"a": np.zeros((m, n)), "b": np.zeros((n, m))}
        self.second_moment = {"a": np.zeros((m, n, n)), "b": np.zeros((n, m, m))}

    @property
    def w(self):
        return self.scaling * self.a @ self.b

    def step(self, grad):
        """One update from the gradient (m, n) of the full weight."""
        turn = self.first if self.count % 2 == 0 else {"a": "b", "b": "a"}[self.first]
        movers = [turn] if self.alternate else ["a", "b"]
        lr = self.lr if np.ndim(self.lr) == 0 else self.lr[self.count]
        self.count += 1

        partner = {"a": self.scaling * self.b.T, "b": self.scaling * self.a}
        inverse = {k: np.linalg.pinv(p, rcond=1e-13) for k, p in partner.items()}
        proj = {k: partner[k] @ inverse[k] for k in "ab"}
        projected = {"a": grad @ proj["a"], "b": grad.T @ proj["b"]}
        if self.max_grad_norm is not None:
            norm = np.sqrt(sum(np.sum(projected[k] ** 2) for k in movers))
            if norm >= self.max_grad_norm:
                projected = {k: g * (self.max_grad_norm / norm) for k, g in projected.items()}

        directions = {}
        for k, g in projected.items():
            mu = self.b1 * self.first_moment[k] @ proj[k] + (1 - self.b1) * g
            nu = self.b2 * proj[k] @ self.second_moment[k] @ proj[k]
            nu += (1 - self.b2) * g[:, :, None] * g[:, None, :]
            self.first_moment[k], self.second_moment[k] = mu, nu
            v = np.maximum(np.einsum("ijj->ij", nu), 0) / (1 - self.b2**self.count)
            directions[k] = mu / (1 - self.b1**self.count) / (np.sqrt(v) + self.eps)

        keep = 1 - lr * self.weight_decay / len(movers)
        moves = {k: -lr * directions[k] @ inverse[k].T for k in "ab"}
        if "a" in movers:
            self.a = keep * self.a + moves["a"]
        if "b" in movers:
            self.b = keep * self.b + moves["b"].T
