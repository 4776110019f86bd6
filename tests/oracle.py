"""LoFT in float64 NumPy, dense and slow on purpose: the judge of the optimizer.

Written from the equations of the method on the full weight, and sharing nothing with the package:
moments are whole matrices, the second moment of a row a whole (n, n) one, projections are
pseudo-inverses.
"""

import dataclasses

import numpy as np
import scipy.optimize


@dataclasses.dataclass
class DenseLoFT:
    """One pair `W = s A B`, moved by dense equations.

    After a step, `first_order` (m, n) is what W moved by but for the product of both moves.
    """

    a: np.ndarray  # (m, r)
    b: np.ndarray  # (r, n)
    lr: float | np.ndarray  # a number, or one for each step
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    scaling: float = 1.0
    move: str = "tangent"
    first: str = "b"

    def __post_init__(self):
        self.count = 0
        m, n = len(self.a), self.b.shape[1]
        self.first_moment = {"a": np.zeros((m, n)), "b": np.zeros((n, m))}
        self.second_moment = {"a": np.zeros((m, n, n)), "b": np.zeros((n, m, m))}

    @property
    def w(self):
        return self.scaling * self.a @ self.b

    @property
    def keeper(self):
        """The factor that moves with "alternate", and that keeps the overlap with "tangent"."""
        m, n, r = *self.w.shape, self.a.shape[1]
        if self.move == "tangent" and r == min(m, n):
            return self.first if m == n else "a" if r == n else "b"
        return self.first if self.count % 2 == 0 else {"a": "b", "b": "a"}[self.first]

    def increment(self, matrix):
        """What is left of two matrices (m, n) and (n, m), of A and of B, in a move of W (m, n).

        They are projected already, by the columns of the partners. With "tangent" this is the sum
        less the overlap as the factor that does not keep it has it; of one matrix G it is the
        projection of G on the tangent space.
        """
        of_a, of_b = matrix["a"], matrix["b"].T
        if self.move == "alternate":
            return {"a": of_a, "b": of_b}[self.keeper]
        rows, columns = projector(self.a), projector(self.b.T)
        return of_a + of_b - (rows @ of_a if self.keeper == "b" else of_b @ columns)

    def step(self, grad):
        """One update from the gradient (m, n) of the full weight."""
        lr = self.lr if np.ndim(self.lr) == 0 else self.lr[self.count]
        keeper, partner = self.keeper, {"a": self.scaling * self.b.T, "b": self.scaling * self.a}
        proj = {k: projector(p) for k, p in partner.items()}
        projected = {"a": grad @ proj["a"], "b": grad.T @ proj["b"]}
        if self.max_grad_norm is not None:
            norm = np.linalg.norm(self.increment(projected))
            if norm >= self.max_grad_norm:
                projected = {k: g * (self.max_grad_norm / norm) for k, g in projected.items()}

        directions = {}
        for k, g in projected.items():
            mu = self.b1 * self.first_moment[k] @ proj[k] + (1 - self.b1) * g
            nu = self.b2 * proj[k] @ self.second_moment[k] @ proj[k]
            nu += (1 - self.b2) * g[:, :, None] * g[:, None, :]
            self.first_moment[k], self.second_moment[k] = mu, nu
            v = np.maximum(np.einsum("ijj->ij", nu), 0) / (1 - self.b2 ** (self.count + 1))
            root = np.sqrt(v) + self.eps
            directions[k] = mu / (1 - self.b1 ** (self.count + 1)) / root @ proj[k]

        moves = {
            k: -lr * d @ np.linalg.pinv(partner[k], rcond=1e-13).T for k, d in directions.items()
        }
        self.first_order = -lr * (self.increment(directions) + self.weight_decay * self.w)
        own, other = {"a": self.a, "b": self.b.T}, {"a": "b", "b": "a"}[keeper]
        moves[keeper] = moves[keeper] - lr * self.weight_decay * own[keeper]
        if self.move == "alternate":
            moves[other] = 0 * moves[other]
        else:
            moves[other] = moves[other] - projector(own[other]) @ moves[other]
            # The product of both moves is held to the size of the rest.
            product = np.linalg.norm(self.scaling * moves["a"] @ moves["b"].T)
            of_w = {"a": moves["a"] @ self.b, "b": self.a @ moves["b"].T}

            def excess(share):
                rest = self.scaling * (of_w[keeper] + share * of_w[other])
                return share * product - np.linalg.norm(rest)

            if excess(1.0) > 0:
                moves[other] = moves[other] * scipy.optimize.brentq(excess, 0, 1, xtol=1e-300)
        self.count += 1
        self.a, self.b = self.a + moves["a"], self.b + moves["b"].T


def projector(x):
    """The orthogonal projector on the columns of x (n, r)."""
    return x @ np.linalg.pinv(x, rcond=1e-13)
