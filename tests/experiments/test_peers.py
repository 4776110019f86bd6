"""Published optimizers against their equations in NumPy, on whole matrices in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

from experiments.log import Cell
from experiments.methods import METHODS, configured, optimizer_of
from experiments.peers import adapre_lora, lora_pro, lora_rite, riemannion
from experiments.peers.lora_pro import adjust_gradients
from loft_jax.data import DataConfig
from loft_jax.methods import LoRA
from loft_jax.training.config import FinetuneConfig, ModelConfig, OptimizerConfig

M, N, R, STEPS = 7, 6, 3, 5
LR, B1, B2, EPS, DECAY, S = 0.02, 0.8, 0.9, 1e-3, 0.1, 2.0
ADAM = {"b1": B1, "b2": B2, "eps": EPS, "scaling": S}
# Each is compiled once for a shape.
PRO = lora_pro(LR, **ADAM, weight_decay=DECAY)
RITE = lora_rite(LR, **ADAM, weight_decay=DECAY)
RIEMANNION = riemannion(
    LR, B1, DECAY, consistent_rms=0.2, adam_b1=B1, adam_b2=B2, eps=EPS, scaling=S
)
ADAPRE = adapre_lora(LR, **ADAM, weight_decay=DECAY)
WITHOUT_MOMENTUM = adapre_lora(LR, **{**ADAM, "b1": 0.0})
PEERS = {"lora-pro": PRO, "lora-rite": RITE, "riemannion": RIEMANNION, "adapre-lora": ADAPRE}
EACH = pytest.mark.parametrize(
    "tx",
    [
        pytest.param(tx, id=name, marks=() if name == "lora-pro" else pytest.mark.slow)
        for name, tx in PEERS.items()
    ],
)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def start(seed=0, m=M, n=N, r=R, *stack, b=1.0):
    rng = np.random.default_rng(seed)
    return {
        "lora_a": rng.normal(size=(*stack, m, r)),
        "lora_b": b * rng.normal(size=(*stack, r, n)),
    }


def full_gradient(w):
    """Of a loss that depends on the product alone; of full rank at zero."""
    phase = np.random.default_rng(9).normal(size=w.shape[-2:])
    return np.sin(3 * w + 3 * phase) + 0.3 * w


def gradients(params, s=S):
    a, b = params["lora_a"], params["lora_b"]
    full = full_gradient(s * (a @ b)).astype(a.dtype)
    at, bt = (np.swapaxes(x, -1, -2) for x in (a, b))
    return {"lora_a": s * full @ bt, "lora_b": s * at @ full}


def path_of(tx, params, gradients=gradients, steps=STEPS):
    """Parameters after each step."""
    state = tx.init(jax.tree.map(jnp.asarray, params))
    update = jax.jit(tx.update)
    path = []
    for _ in range(steps):
        updates, state = update(gradients(params), state, params)
        params = jax.tree.map(lambda p, u: np.asarray(p + u), params, updates)
        path.append(params)
    return path


def products(path, s=S):
    return [s * params["lora_a"] @ params["lora_b"] for params in path]


def assert_close(found, expected):
    assert len(found) == len(expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-10), found, expected
    )


def projector(x):
    """On the columns of x."""
    return x @ np.linalg.pinv(x, rcond=1e-12)


def tangent(x, a, b):
    """The projection of x on the tangent space at a b."""
    left, right = projector(a), projector(b.T)
    return left @ x + x @ right - left @ x @ right


def root_inverse(matrix, rho, eps):
    values, vectors = np.linalg.eigh(matrix)
    return vectors / (np.sqrt(np.maximum(values, 0) + rho) + eps) @ vectors.T


# LoRA-Pro


def pro_gradients(a, b, full, s):
    """The paper's closed form, with SciPy's solution of its Sylvester equation."""
    inverse_a, inverse_b = np.linalg.inv(a.T @ a), np.linalg.pinv(b @ b.T)
    grad_a, grad_b = s * full @ b.T, s * a.T @ full
    scaled_b = inverse_a @ grad_b / s**2
    x = scipy.linalg.solve_sylvester(a.T @ a, b @ b.T, -scaled_b @ b.T)
    rest = np.eye(len(a)) - projector(a)
    return rest @ grad_a @ inverse_b / s**2 - a @ x, scaled_b + x @ b


@pytest.mark.parametrize("b", [1.0, 0.0])
def test_lora_pro(b):
    params = start(b=b)
    found = path_of(PRO, params)
    mu, nu, expected = [0.0, 0.0], [0.0, 0.0], []
    for k in range(1, STEPS + 1):
        factors = list(params.values())
        full = full_gradient(S * factors[0] @ factors[1])
        for i, grad in enumerate(pro_gradients(*params.values(), full, S)):
            mu[i] = B1 * mu[i] + (1 - B1) * grad
            nu[i] = B2 * nu[i] + (1 - B2) * grad**2
            direction = mu[i] / (1 - B1**k) / (np.sqrt(nu[i] / (1 - B2**k)) + EPS)
            factors[i] = factors[i] - LR * (direction + DECAY * factors[i])
        params = dict(zip(params, factors, strict=True))
        expected.append(params)
    assert_close(found, expected)


def test_lora_pro_moves_w_along_the_projected_gradient_by_the_nearest_gradients():
    params = start()
    a, b = params.values()
    tx = adjust_gradients(scaling=S)
    raw = gradients(params)
    (grad_a, grad_b) = tx.update(raw, tx.init(params), params)[0].values()
    full = full_gradient(S * a @ b)
    assert_close([S * (grad_a @ b + a @ grad_b)], [tangent(full, a, b)])
    # Of gradients that do so, `g_A - A X` and `g_B + X B`, none is nearer to the raw ones.
    left = a.T @ (grad_a - raw["lora_a"]) - (grad_b - raw["lora_b"]) @ b.T
    np.testing.assert_allclose(left, 0, atol=1e-10)


# LoRA-RITE


class DenseRite:
    """One factor with moments as matrices of the full weight's size: no basis, no coordinates."""

    def __init__(self, m, n):
        self.momentum, self.v, self.rho, self.count = np.zeros((m, n)), np.zeros((n, n)), 0.0, 0

    def step(self, full, partner):
        """The change of `X partnerᵀ`, and X."""
        self.count += 1
        decay1, decay2 = (
            beta * (1 - beta ** (self.count - 1)) / (1 - beta**self.count) for beta in (B1, B2)
        )
        onto = projector(partner)
        seen, kept = full @ onto, onto @ self.v @ onto
        falls = np.linalg.eigvalsh(self.v) - np.linalg.eigvalsh(kept)
        self.rho = decay2 * (self.rho + max(0.0, min(falls.max(), falls.sum())))
        self.v = decay2 * kept + (1 - decay2) * seen.T @ seen / len(full)
        direction = seen @ root_inverse(self.v, self.rho, EPS)
        self.momentum = decay1 * self.momentum @ onto + (1 - decay1) * direction
        return self.momentum @ np.linalg.pinv(partner, rcond=1e-12).T


@pytest.mark.parametrize("b", [1.0, 0.0])
def test_lora_rite(b):
    params = start(b=b)
    found = path_of(RITE, params)
    of_a, of_b, expected = DenseRite(M, N), DenseRite(N, M), []
    for _ in range(STEPS):
        a, b = params.values()
        full = full_gradient(S * a @ b)
        moves = {"lora_a": of_a.step(full, S * b.T), "lora_b": of_b.step(full.T, S * a).T}
        params = {key: x - LR * (moves[key] + DECAY * x) for key, x in params.items()}
        expected.append(params)
    assert_close(found, expected)
    assert of_a.rho > 0


def test_lora_rite_does_not_depend_on_the_factorization():
    """Neither on T nor on s."""
    params = start()
    t = np.random.default_rng(1).normal(size=(R, R))
    other = {"lora_a": params["lora_a"] @ t, "lora_b": np.linalg.solve(t, params["lora_b"])}
    expected = products(path_of(RITE, params))
    assert_close(products(path_of(RITE, other)), expected)
    small = {key: x * f for (key, x), f in zip(params.items(), (5.0, 0.1), strict=True)}
    tx = lora_rite(LR, **{**ADAM, "scaling": 2 * S}, weight_decay=DECAY)
    assert_close(products(path_of(tx, small, lambda p: gradients(p, 2 * S)), 2 * S), expected)


# Riemannion


@pytest.mark.parametrize("shape", [(M, N, R), pytest.param((5, 6, 4), marks=pytest.mark.slow)])
@pytest.mark.parametrize("b", [1.0, 0.0])
def test_riemannion(b, shape):
    """The second shape has no room for a core of twice the rank."""
    params = start(0, *shape, b=b)
    m, n, r = shape
    found = products(path_of(RIEMANNION, params))
    a, b = params.values()
    w, momentum, expected = S * a @ b, np.zeros((m, n)), []
    for _ in range(STEPS):
        momentum = B1 * tangent(momentum, a, b) + tangent(full_gradient(w), a, b)
        x, values, y = np.linalg.svd(momentum, full_matrices=False)
        rank = np.sum(values > 1e-10 * values[0])
        direction = tangent(x[:, :rank] @ y[:rank], a, b)
        w = (1 - LR * DECAY) * w - LR * 0.2 * max(m, n) ** 0.5 * direction
        x, values, y = np.linalg.svd(w)
        a, b = x[:, :r], values[:r, None] * y[:r]  # the best approximation of rank r
        w = a @ b
        expected.append(w)
    assert_close(found, expected)


def test_riemannion_depends_on_no_factorization_and_keeps_its_form():
    params = start()
    t = np.random.default_rng(1).normal(size=(R, R))
    other = {"lora_a": params["lora_a"] @ t, "lora_b": np.linalg.solve(t, params["lora_b"])}
    path = path_of(RIEMANNION, params)
    assert_close(products(path), products(path_of(RIEMANNION, other)))
    a, b = path[-1].values()
    np.testing.assert_allclose(a.T @ a, np.eye(R), atol=1e-12)
    gram = b @ b.T
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-12)


def test_riemannion_of_the_papers_scale_follows_a_schedule():
    params = start()
    tx = riemannion(optax.piecewise_constant_schedule(1e-6, {1: 0.5}), scaling=S)
    before, *path = products([params, *path_of(tx, params, steps=2)])
    norms = [np.linalg.norm(x, 2) for x in np.diff([before, *path], axis=0)]
    assert 0.5e-6 < norms[0] < 1.5e-6  # of an orthogonal matrix, projected
    np.testing.assert_allclose(norms[1] / norms[0], 0.5, rtol=1e-2)


# AdaPreLoRA


def adafactor_roots(full, a, b, rows, columns, k):
    """D and E of the metric after the k-th step, and the averages they are made of."""
    squares = tangent(full, a, b) ** 2
    rows = B2 * rows + (1 - B2) * squares.mean(axis=1)
    columns = B2 * columns + (1 - B2) * squares.mean(axis=0)
    left, right = (x / (1 - B2**k) + EPS**2 for x in (rows, columns))
    return np.sqrt(left / left.mean()), np.sqrt(right), rows, columns


@pytest.mark.parametrize("b", [1.0, 0.0])
def test_adapre_lora(b):
    params = start(b=b)
    found = path_of(ADAPRE, params)
    mu = {"lora_a": 0.0, "lora_b": 0.0}
    rows, columns, expected = np.zeros(M), np.zeros(N), []
    for k in range(1, STEPS + 1):
        a, b = params.values()
        full = full_gradient(S * a @ b)
        left, right, rows, columns = adafactor_roots(full, a, b, rows, columns, k)
        grads = gradients(params)
        mu = {key: B1 * mu[key] + (1 - B1) * g for key, g in grads.items()}
        m_a, m_b = (x / (1 - B1**k) for x in mu.values())
        p, q = S * a, S * b
        inverse_p = np.linalg.pinv(p.T * left @ p)
        inverse_q = np.linalg.pinv(q * right @ q.T)
        half_a = np.eye(M) - p @ inverse_p @ p.T * left / 2
        half_b = np.eye(N) - right[:, None] * q.T @ inverse_q @ q / 2
        moves = {
            "lora_a": half_a @ (m_a / left[:, None]) @ inverse_q,
            "lora_b": inverse_p @ (m_b / right) @ half_b,
        }
        params = {key: x - LR * (moves[key] + DECAY * x) for key, x in params.items()}
        expected.append(params)
    assert_close(found, expected)


def test_adapre_lora_is_the_nearest_move_in_its_metric_and_balanced():
    params = start()
    a, b = params.values()
    full = full_gradient(S * a @ b)
    [moved] = path_of(WITHOUT_MOMENTUM, params, steps=1)
    d_a, d_b = ((params[key] - x) / LR for key, x in moved.items())
    left, right, *_ = adafactor_roots(full, a, b, np.zeros(M), np.zeros(N), 1)

    # Least squares over all moves of both factors, weighted by the square root of the metric.
    weights = np.sqrt(left[:, None] * right)
    jacobian = [S * np.kron(np.eye(M), b.T), S * np.kron(a, np.eye(N))]
    jacobian = weights.reshape(-1, 1) * np.hstack(jacobian)
    target = weights * (full / left[:, None] / right)
    solution = np.linalg.lstsq(jacobian, target.ravel(), rcond=1e-12)[0]
    nearest = (jacobian @ solution).reshape(M, N) / weights
    assert_close([S * (d_a @ b + a @ d_b)], [nearest])

    # (A X, -X B) moves W by nothing: the parts' difference is orthogonal to what it changes.
    difference = left[:, None] * (d_a @ b - a @ d_b) * right
    np.testing.assert_allclose(a.T @ difference @ b.T, 0, atol=1e-10)


def test_adapre_lora_does_not_depend_on_the_factorization_without_momentum():
    params = start()
    t = np.random.default_rng(1).normal(size=(R, R))
    other = {"lora_a": params["lora_a"] @ t, "lora_b": np.linalg.solve(t, params["lora_b"])}
    found, expected = (products(path_of(WITHOUT_MOMENTUM, x)) for x in (other, params))
    assert_close(found, expected)


# All of them


def lost(params):
    """Two equal columns of A, and a row of zeros of B."""
    params["lora_a"][:, 1] = params["lora_a"][:, 0]
    params["lora_b"][2] = 0
    return params


@EACH
@pytest.mark.parametrize("params", [start(b=0.0), lost(start())], ids=["b of zero", "lost"])
def test_where_rank_is_missing_all_is_finite_and_moves_in_float32(tx, params):
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    path = path_of(tx, params, steps=8)
    for moved in path:
        assert all(np.isfinite(x).all() and np.abs(x).max() < 50 for x in moved.values())
    assert np.abs(path[0]["lora_b"] - params["lora_b"]).max() > 1e-3
    assert np.linalg.matrix_rank(path[-1]["lora_b"]) == R


@EACH
@pytest.mark.parametrize("b", [1.0, 0.0])
def test_gradients_of_zero(tx, b):
    """W shrinks by its decay alone, and A keeps all its columns."""
    params = jax.tree.map(lambda x: x.astype(np.float32), start(b=b))
    zeros = jax.tree.map(np.zeros_like, params)
    found = path_of(tx, params, lambda params: zeros, steps=3)[-1]
    kept = (1 - LR * DECAY) ** (3 if tx is RIEMANNION else 6)
    before, after = products([params, found])
    np.testing.assert_allclose(after, kept * before, rtol=1e-5, atol=1e-5)
    assert np.linalg.matrix_rank(found["lora_a"], tol=1e-3) == R


@EACH
def test_types_are_kept(tx):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), {**start(), "bias": np.ones(3)})
    state = tx.init(params)
    updates, new_state = jax.eval_shape(tx.update, params, state, params)
    for before, after in ((params, updates), (state, new_state)):
        types = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (before, after)]
        assert types[0] == types[1]


def forest():
    """Two stacks of one shape, a pair of another rank, and a leaf that is in no pair."""
    stacks = [start(1, M, N, R, 2), start(2, M, N, R, 2)]
    return {"stacks": stacks, "other": start(3, M, N, 2), "bias": np.arange(3.0)}


def gradients_of_forest(params):
    first, second, other = map(gradients, [*params["stacks"], params["other"]])
    return {"stacks": [first, second], "other": other, "bias": np.cos(params["bias"])}


@EACH
def test_stacks_and_batches_are_separate_layers(tx):
    params = forest()
    found = path_of(tx, params, gradients_of_forest)[-1]
    for stacked, moved in zip(params["stacks"], found["stacks"], strict=True):
        for k in range(2):
            layer, own = ({key: x[k] for key, x in tree.items()} for tree in (stacked, moved))
            assert_close(products([own]), products(path_of(tx, layer)[-1:]))
    assert_close(products([found["other"]]), products(path_of(tx, params["other"])[-1:]))
    adamw = optax.adamw(LR, B1, B2, EPS, weight_decay=DECAY)
    assert_close([found["bias"]], path_of(adamw, params["bias"], np.cos)[-1:])


@EACH
def test_a_nan_in_one_pair_spoils_no_other(tx):
    def with_nan(params):
        grads = gradients_of_forest(params)
        grads["stacks"][0] = jax.tree.map(lambda x: np.nan * x, grads["stacks"][0])
        return grads

    found, expected = (path_of(tx, forest(), of)[-1] for of in (with_nan, gradients_of_forest))
    bad = found["stacks"].pop(0)
    assert np.isnan(bad["lora_b"]).any()
    expected["stacks"].pop(0)
    assert_close([found], [expected])


@EACH
def test_neither_state_nor_program_holds_a_full_matrix(tx):
    m, n, r = 410, 330, 2
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), start(0, m, n, r))
    state = jax.eval_shape(tx.init, params)
    assert sum(x.size for x in jax.tree.leaves(state)) < 2.1 * (m + n) * r
    text = jax.jit(tx.update).lower(params, state, params).as_text()
    for x, y in ((m, n), (n, m), (m, m), (n, n)):
        assert f"{x}x{y}x" not in text


@EACH
def test_linear_algebra_is_called_for_all_pairs_at_once(tx, monkeypatch):
    """Two calls at one time can wait for each other for good; these need one another's results."""
    calls = []
    for name in ("eigh", "svd"):
        function = getattr(jnp.linalg, name)

        def counted(x, function=function, name=name):
            calls.append(name)
            return function(x)

        monkeypatch.setattr(jnp.linalg, name, counted)
    params = forest()
    state = tx.init(jax.tree.map(jnp.asarray, params))
    jax.eval_shape(lambda *args: tx.update(*args), params, state, params)
    expected = {PRO: ["eigh"], RITE: ["eigh"], RIEMANNION: ["svd", "svd"], ADAPRE: []}
    assert calls == expected[tx]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lora_pro(LR, b1=1.0), r"b1 is 1\.0"),
        (lambda: lora_pro(LR, scaling=0.0), r"scaling is 0\.0"),
        (lambda: lora_rite(LR, weight_decay=-1.0), r"weight_decay is -1\.0"),
        (lambda: lora_rite(LR, scaling=0.0), r"scaling is 0\.0"),
        (lambda: riemannion(LR, beta=1.0), r"beta is 1\.0"),
        (lambda: riemannion(LR, consistent_rms=0.0), r"consistent_rms is 0\.0"),
        (lambda: adapre_lora(LR, eps=-1.0), r"eps is -1\.0"),
        (lambda: adapre_lora(LR, scaling=0.0), r"scaling is 0\.0"),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def run_with(optimizer):
    return FinetuneConfig(
        ModelConfig("model"), DataConfig("rows.jsonl"), "run", optimizer=optimizer
    )


@pytest.mark.parametrize("name", PEERS)
def test_they_are_methods_of_the_comparison(name):
    assert name in METHODS
    config = run_with(OptimizerConfig(max_grad_norm=0.5))
    config = configured(config, Cell("", name, R, LR))
    assert config.method == LoRA()
    params = {**start(), "bias": np.ones(3)}
    make, schedule = optimizer_of(name), optax.constant_schedule(LR)
    clipped, free = (
        make(run_with(OptimizerConfig(max_grad_norm=norm)), schedule, S) for norm in (0.5, 0.0)
    )
    states = [tx.init(jax.tree.map(jnp.asarray, params)) for tx in (clipped, free)]
    assert jax.tree.structure(states[0][1]) == jax.tree.structure(states[1])
    shapes, _ = jax.eval_shape(clipped.update, params, states[0], params)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)


def test_the_comparison_clips_what_the_factors_see():
    """Beside an epsilon of one, the size of gradients matters, but not above the norm."""
    params = start()
    config = run_with(OptimizerConfig(eps=1.0, max_grad_norm=0.5))
    tx = optimizer_of("lora-pro")(config, optax.constant_schedule(LR), S)

    def moved(factor):
        grads = jax.tree.map(lambda g: factor * g / optax.global_norm(g), gradients(params))
        return path_of(tx, params, lambda params: grads, steps=1)

    assert_close(moved(2.0), moved(1.0))
    assert not np.allclose(moved(0.1)[0]["lora_b"], moved(1.0)[0]["lora_b"], rtol=1e-6)
