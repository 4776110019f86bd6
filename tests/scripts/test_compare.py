"""The comparison of methods: its runs, its chains without a part, what it resumes and reports."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loft_jax import loft
from loft_jax.data import DataConfig
from loft_jax.evaluation.comparison import Cell, Result, ResultLog, summarize
from tests.flat_config import flat_config
from tests.tiny import save_tiny_llama, tiny_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as it is for a script

import compare
from comparison import registry
from comparison.ablations import ABLATIONS, loft_with
from comparison.claims import Claim, findings
from comparison.matrix import MATRIX_TASKS, MatrixRuns
from comparison.methods import METHODS, configured, optimizer_of
from comparison.registry import TASKS
from comparison.tasks import BEFORE, WITHOUT_RANK, LanguageTask, Sweep

STEPS, M, N, R = 6, 7, 5, 2


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """A model and texts in the places where the task looks for its own."""
    folder = tmp_path_factory.mktemp("assets")
    save_tiny_llama(folder / "model", initializer_range=0.05)
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "texts").mkdir()
    rng = np.random.default_rng(0)
    for name, rows in (("train", 40), ("validation", 6), ("test", 6)):
        texts = [" ".join(rng.choice(["joy", "plot", "film", "dull"], 12)) for _ in range(rows)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "texts" / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture
def tiny(monkeypatch):
    """A small task among the others, and a matrix that is done at once."""
    task = LanguageTask(
        name="tiny",
        title="Tiny",
        model="model",
        data="texts",
        max_length=32,
        packing=True,
        steps=20,
        batch_size=4,
        methods=("lora", "full"),
        ranks=(2,),
        rates=(1e-3, 1e-2),
        seeds=(0,),
        final_seeds=(0, 1),
    )
    matrix = dataclasses.replace(
        MATRIX_TASKS["matrix"], shape=(24, 16), target_rank=4, ranks=(4,), steps=40
    )
    monkeypatch.setitem(TASKS, "tiny", task)
    monkeypatch.setitem(TASKS, "matrix", matrix)
    return task


def gradients():
    """Full gradients and a start, the same for NumPy and for JAX."""
    rng = np.random.default_rng(3)
    full = rng.normal(size=(STEPS, M, N))
    return full, rng.normal(size=(M, R)), rng.normal(size=(R, N))


def run(tx, lr=0.1):
    """The product of the factors behind each step, their gradients being those of fixed G."""
    full, a, b = gradients()
    params = {"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}

    @jax.jit
    def step(carry, g):
        params, state = carry
        grads = {"lora_a": g @ params["lora_b"].T, "lora_b": params["lora_a"].T @ g}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params["lora_a"] @ params["lora_b"]

    return np.asarray(jax.lax.scan(step, (params, tx.init(params)), jnp.asarray(full))[1])


def config(**changes):
    flags = {"model": "", "data": DataConfig(""), "output": "", "max_grad_norm": 0, "eps": 1e-3}
    return flat_config(**{**flags, **changes})


def dense_loft(part, lr=0.1, b1=0.9, b2=0.999, eps=1e-3):
    """LoFT in dense matrices, in coordinates of the factors, as the paper writes it."""
    full, a, b = gradients()
    factors, products = {"a": a, "b": b.T}, []
    m = {k: np.zeros((x.shape[0], R)) for k, x in factors.items()}
    p = {k: np.zeros((x.shape[0], R, R)) for k, x in factors.items()}
    old = {k: np.zeros_like(x) for k, x in factors.items()}  # partners at the last step
    for t, g in enumerate(full, 1):
        direction = {}
        for k, other, grad in (("a", "b", g), ("b", "a", g.T)):
            partner = factors[other]
            inverse = np.linalg.inv(partner.T @ partner)
            x = grad @ partner @ (np.eye(R) if part == "scaling" else inverse)
            c = old[other].T @ partner @ inverse
            first, second = (np.eye(R) if part == kept else c for kept in ("first", "second"))
            m[k] = b1 * m[k] @ first + (1 - b1) * x
            p[k] = b2 * second.T @ p[k] @ second + (1 - b2) * x[:, :, None] * x[:, None, :]
            v = np.einsum("jr,irs,js->ij", partner, p[k], partner)
            d = (m[k] @ partner.T / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
            direction[k] = d @ partner @ inverse
        old = {k: x.copy() for k, x in factors.items()}
        keeper = "a" if part == "longer" or t % 2 == 0 else "b"  # M is the longer side
        kept = {"twice": (1, 1), "halved": (0.5, 0.5)}.get(part, (keeper == "a", keeper == "b"))
        for k, share in zip("ab", kept, strict=True):
            overlap = old[k] @ np.linalg.pinv(old[k]) @ direction[k]
            direction[k] = direction[k] - (1 - share) * overlap
        factors = {k: x - lr * direction[k] for k, x in factors.items()}
        if part == "retraction":
            linear = old["a"] @ factors["b"].T - lr * direction["a"] @ old["b"].T
            u, sigma, v = np.linalg.svd(linear)
            roots = np.sqrt(sigma[:R])
            factors = {"a": u[:, :R] * roots, "b": v[:R].T * roots}
        products.append(factors["a"] @ factors["b"].T)
    return np.stack(products)


OVERLAPS = ("twice", "halved", "longer")


@pytest.mark.parametrize(
    "part", ["none", "scaling", "first", "second", "bound", "retraction", *OVERLAPS]
)
def test_a_chain_without_a_part_is_the_paper_without_it(part, float64):
    if part == "none":
        tx = loft(0.1, eps=1e-3, second_moment="full")
    else:
        tx = loft_with(part, config(), optax.constant_schedule(0.1), 1.0)
    np.testing.assert_allclose(run(tx), dense_loft(part), rtol=1e-9)


def test_every_part_matters(float64):
    whole = dense_loft("none")
    for part in ("scaling", "first", "second", "retraction", *OVERLAPS):
        assert np.abs(dense_loft(part) - whole)[-1].max() > 1e-3, part


def test_the_plain_clip_is_of_the_factors_own_gradients(float64):
    # Behind a clip to a norm, Adam with an epsilon above it makes steps in proportion to that norm.
    schedule = optax.constant_schedule(0.1)
    small, smaller, projected = (
        run(loft_with(part, config(max_grad_norm=norm, eps=1e3), schedule, 1.0))[0]
        for part, norm in (("clip", 1e-2), ("clip", 1e-3), ("none", 1e-2))
    )
    _, a, b = gradients()
    np.testing.assert_allclose(small - a @ b, 10 * (smaller - a @ b), rtol=1e-4)
    assert not np.allclose(small - a @ b, projected - a @ b, rtol=0.1)


def test_every_method_has_a_run_of_its_own():
    cell = Cell("tiny", "lora", 4, 1e-3, 1, 1e-6, 8.0)
    task = config(steps=60, max_grad_norm=1.0, eps=1e-8)
    runs = {m: configured(task, dataclasses.replace(cell, method=m)) for m in METHODS}
    for name, one in runs.items():
        assert (one.schedule.learning_rate, one.seed, one.optimizer.eps) == (1e-3, 1, 1e-6)
        assert one.optimizer.max_grad_norm == (not name.endswith("-unclipped"))
        assert name in WITHOUT_RANK or (one.lora.rank, one.lora.alpha) == (4, 8.0), name
    assert runs["reflora"].method.warmup("kaiming_uniform") == 10
    assert runs["reflora-balanced"].method.warmup("balanced") == 0
    kinds = {
        (c.method, c.lora.init, c.optimizer.max_grad_norm, optimizer_of(name))
        for name, c in runs.items()
    }
    assert len(kinds) == len(METHODS)


def test_rates_of_one_method_share_a_step_and_are_what_they_say(assets, tiny, tmp_path):
    make = registry.runs_of(tiny, assets)
    low, high = (make(Cell("tiny", "lora", 2, rate), test=False) for rate in (1e-3, 1e-2))
    again = registry.runs_of(tiny, assets)(Cell("tiny", "lora", 2, 1e-2), test=True)
    assert high.validation == again.validation  # alone or behind another, the same run
    assert high.train == again.train
    assert low.train[0] == pytest.approx(high.train[0], abs=1e-4)  # the same batch and start
    assert high.train[-1] < low.train[-1] < low.train[0]
    assert again.test["loss"] != again.validation["loss"]
    assert low.cost["trained_parameters"] < 20_000


def test_a_run_that_diverges_is_one_of_infinite_loss(assets, tiny):
    fell = registry.runs_of(tiny, assets)(Cell("tiny", "full", 0, 1e30), test=True)
    assert fell.validation == fell.test == {"loss": np.inf}
    assert fell.diverged


def test_the_comparison_resumes_and_reports(assets, tiny, tmp_path, capsys):
    results, page = tmp_path / "results", tmp_path / "results.md"
    cache = jax.config.jax_compilation_cache_dir
    folders = ["--results", str(results), "--assets", str(assets), "--cache", cache]
    run = ["run", "tiny", *folders]
    assert compare.main([*run, "--share", "1/2"]) == 0
    log = ResultLog(results / "tiny.jsonl")
    assert {r.cell.method for r in log.read()} == {"lora"}
    assert compare.main(run) == 0
    found = log.read()
    assert [(r.cell.method, r.cell.learning_rate) for r in found] == [
        ("lora", 1e-3),
        ("lora", 1e-2),
        ("full", 1e-3),
        ("full", 1e-2),
    ]
    assert not any(r.test for r in found)
    before = log.path.read_bytes()
    assert compare.main(run) == 0  # nothing is left to run
    assert log.path.read_bytes() == before
    assert compare.main([*run, "--methods", "before"]) == 0
    assert log.read()[-1].test["loss"] > 2
    assert compare.main([*run, "--best"]) == 0
    best = registry.summaries_of(tiny, log.read())
    assert [len(s.results) for s in best.values()] == [2, 2]
    assert all(r.test for s in best.values() for r in s.results)
    matrix = ["run", "matrix", *folders, "--rates", "1", "3", "--methods"]
    # Each leaves a log that can be reported on: parts without the whole, one method alone.
    for methods in (["full"], ["loft-without-scaling"], ["loft-factored", "loft", "lora"]):
        assert compare.main([*matrix, *methods]) == 0
        assert compare.main(["report", "--results", str(results), "--page", str(page)]) == 0
    assert compare.main([*matrix, "lora", "loft", "--alpha", "1"]) == 0
    assert compare.main(["report", "--results", str(results), "--page", str(page)]) == 0
    text = page.read_text()
    for expected in (
        "## Tiny",
        "All that was planned of the sweep has run.",
        "Before training, test loss ",
        "| LoFT is better than LoRA at equal rank |",
        "loft-without-scaling",
        "| full | ",
        "By alpha (a scaling that",
        "- RefLoRA is better than LoRA at equal rank: not tested",
    ):
        assert expected in " ".join(text.split("\n"))
    of_matrix = summarize(ResultLog(results / "matrix.jsonl").read())
    apart = {}
    for method in ("lora", "loft"):
        usual, other = (s.mean("loss") for x, s in of_matrix.items() if x.method == method)
        apart[method] = abs(np.log(usual / other))
    # LoFT knows no alpha; here another one is another start, since the product is not zero there.
    assert apart["loft"] < apart["lora"] / 5
    assert {p.name for p in results.glob("*.png")} == {"tiny.png", "matrix.png"}
    assert (
        compare.main(["report", "--results", str(results), "--page", str(tmp_path / "b.md")]) == 0
    )
    assert (tmp_path / "b.md").read_text() == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "task is 'nothing'"),
        (["tiny", "--methods", "lorra"], "tiny has no method 'lorra'"),
        (["matrix", "--methods", "dora"], "matrix has no method 'dora'"),
        (["tiny", "--share", "3/2"], "share is '3/2'"),
        (["tiny", "--ranks", "0"], "rank is 0"),
        (["tiny", "--rates", "0.1", "-1"], "rate is -1, expected a positive number"),
        (["tiny", "--best", "--rates", "0.1"], "rates are given with best"),
        (["tiny", "--best"], "4 runs of the sweep are not there yet, as lora r 2, lr 0.001"),
    ],
)
def test_mistakes_are_named(arguments, message, tiny, tmp_path, capsys):
    assert compare.main(["run", *arguments, "--results", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_all_methods_of_a_task_have_the_same_sweep():
    for task in TASKS.values():
        if task.name == "wikitext-long":
            continue
        swept = {}
        for cell in task.cells():
            if cell.method == BEFORE:
                assert (cell.learning_rate, cell.seed) == (0.0, 0)
                continue
            swept.setdefault(cell.setting, set()).add((cell.learning_rate, cell.seed))
        assert len(task.rates) >= 5, task.name
        assert (np.diff(np.log(task.rates)) < np.log(4)).all(), task.name
        sweep = {(rate, seed) for rate in task.rates for seed in task.seeds}
        for setting, cells in swept.items():
            assert sweep <= cells, setting
            # One more at most, outside.
            for rate in {rate for rate, _ in cells - sweep}:
                assert min(abs(np.log(rate / end)) for end in task.rates) > np.log(2.5), setting
                assert len(cells - sweep) == len(task.seeds), setting
        assert {s.method for s in swept} <= set(registry.methods_of(task))
        assert set(task.methods) <= {s.method for s in swept}


def test_the_longer_run_has_three_rates_of_each_method_around_its_best():
    task = TASKS["wikitext"]
    log = ResultLog(Path(__file__).parents[2] / "docs" / "results" / "wikitext.jsonl")
    best = {
        setting.method: summary.learning_rate
        for setting, summary in registry.summaries_of(
            task, registry.read_results(log, task)
        ).items()
        if setting.rank in (0, 8)
    }
    rates = {}
    for cell in TASKS["wikitext-long"].cells():
        rates.setdefault(cell.method, []).append(cell.learning_rate)
    assert {method: sorted(found)[1] for method, found in rates.items()} == {
        method: best[method] for method in ("loft-factored", "lora", "full")
    }


def test_full_linear_moves_what_adapters_stand_on():
    leaf = jnp.linspace(1, 2, 6).reshape(2, 3)
    params = {"q_proj": {"kernel": leaf}, "embed": {"embedding": leaf}, "norm": {"scale": leaf}}
    make = optimizer_of("full-linear")
    tx = make(config(method="full", max_grad_norm=1.0), optax.constant_schedule(0.1), 1.0)
    updates, _ = tx.update(params, tx.init(params), params)
    alone = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1, eps=1e-3))
    expected, _ = alone.update(leaf, alone.init(leaf), leaf)
    np.testing.assert_allclose(updates.pop("q_proj")["kernel"], expected, rtol=1e-6)
    assert not any(np.any(x) for x in jax.tree.leaves(updates))


def test_loft_at_full_rank_is_full_fine_tuning():
    task = dataclasses.replace(MATRIX_TASKS["square"], steps=60)
    run_of = MatrixRuns(task)
    distance = {
        method: run_of(Cell("square", method, 13, 1e-2), test=True).validation["distance"]
        for method in ("loft", "lora")
    }
    assert distance["loft"] < 1e-3 < 0.05 < distance["lora"]


def made(method, losses, **measures):
    """A summary of runs at one rate, with a loss for each seed."""
    results = []
    for seed, loss in enumerate(losses):
        values = {"loss": loss} | {name: found[seed] for name, found in measures.items()}
        cell = Cell("toy", method, 4, 0.1, seed)
        test = values if np.isfinite(loss) else {"loss": loss}
        results.append(Result(cell, (loss,), values, test, {}, {"test_rows": 400}))
    return summarize(results)


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([1.0, 1.1, 1.2], "better"),
        ([1.0, 3.0, 2.0], "within the noise"),
        ([3.0, 3.1, 3.2], "worse"),
        ([1.0, np.inf, 1.0], "worse"),
    ],
)
def test_a_claim_needs_more_than_the_noise(losses, verdict):
    claim = (Claim("it is better", "loft", "lora"),)
    lora = made("lora", [2.0, 2.1, 2.2])
    (finding,) = findings({**made("loft", losses), **lora}, "loss", claim)
    assert finding.verdict == verdict
    assert findings({**made("loft", losses[:1]), **lora}, "loss", claim) == []


@pytest.mark.parametrize(
    ("behind", "verdict"),
    [
        ((-0.1, -0.101), "better"),
        ((0.0003, -0.0003), "as good"),
        ((0.3, -0.3), "within the noise"),
        ((0.0101, 0.0099), "worse by less than 1 %"),
        ((0.1, 0.101), "worse"),
    ],
)
def test_as_good_is_less_than_a_hundredth_behind(behind, verdict):
    claim = (Claim("it does as well", "loft", "lora", at_least_equal=True),)
    mine = made("loft", [2.0 + more for more in behind])
    (finding,) = findings({**mine, **made("lora", [2.0, 2.0])}, "loss", claim)
    assert finding.verdict == verdict


def test_a_log_that_has_only_begun_can_be_reported_on(tmp_path):
    """Ranks beside the task's, rates that others have not run, a seed of no sweep."""
    task = TASKS["sentiment"]
    cells = [
        *(Cell("sentiment", "full", 0, rate, 0) for rate in (1e-3, 3e-3)),
        *(Cell("sentiment", "lora", 8, rate, 0) for rate in (3e-5, 1e-4)),
        Cell("sentiment", "lora", 8, 1e-2, 7),
        Cell("sentiment", "loft", 4, 1e-4, 0),
        Cell("sentiment", "lora", 16, 1e-4, 0),
    ]
    log = ResultLog(tmp_path / "sentiment.jsonl")
    costs = ("step_seconds", "trained_parameters", "state_bytes", "temporary_bytes")
    packages = dict.fromkeys(("loft-jax", "jax", "flax", "optax"), "1")
    for cell in cells:
        made_with = {**packages, "task": task.digest}
        values = {"loss": 1.0 + cell.learning_rate}
        log.append(Result(cell, (1.0,) * 20, values, {}, dict.fromkeys(costs, 1.0), made_with))
    page = tmp_path / "page.md"
    assert compare.main(["report", "--results", str(tmp_path), "--page", str(page)]) == 0
    text = page.read_text()
    assert "At rank 8:" in text
    assert "| lora | 3e-05* |" in text
    assert "| sentiment | r 8 | 0.001 |  |  |  |" in text


def test_one_question_more_is_not_better_however_alike_the_seeds():
    claim = (Claim("it is better", "loft", "lora"),)
    for right, verdict in ((0.8025, "within the noise"), (0.9, "better")):
        mine = made("loft", [1.0] * 3, accuracy=[right] * 3)
        theirs = made("lora", [1.0] * 3, accuracy=[0.8] * 3)
        (finding,) = findings({**mine, **theirs}, "accuracy", claim)
        assert finding.verdict == verdict


def test_questions_are_compared_one_by_one_where_they_are_known():
    """Two that differ in few questions differ in them alone, however many all get wrong."""
    rng = np.random.default_rng(0)
    base = rng.random(400) < 0.6
    better = base | (np.arange(400) < 20)

    def answered(method, right, known):
        text = "".join("01"[int(x)] for x in right)
        of_method = made(method, [1.0] * 3, accuracy=[right.mean()] * 3)
        return {
            setting: dataclasses.replace(
                summary,
                results=tuple(
                    dataclasses.replace(r, right={"accuracy": text} if known else {})
                    for r in summary.results
                ),
            )
            for setting, summary in of_method.items()
        }

    claim = (Claim("it is better", "loft", "lora"),)
    found = {}
    for known in (True, False):
        runs = {**answered("loft", better, known), **answered("lora", base, known)}
        (finding,) = findings(runs, "accuracy", claim)
        found[known] = finding
    gained = better.sum() - base.sum()
    assert found[True].gain == found[False].gain == pytest.approx(gained / 400)
    share = gained / 400
    assert found[True].error == pytest.approx(1.96 * (share * (1 - share) / 400) ** 0.5, rel=1e-2)
    assert found[True].verdict == "better"
    assert found[False].verdict == "within the noise"


@pytest.mark.parametrize(
    ("mine", "theirs", "verdict"),
    [
        ((120.0, 121.0, 119.0), (np.inf, np.inf, np.inf), "better"),
        ((120.0, 121.0, 119.0), (np.inf, 130.0, np.inf), "within the noise"),
        ((np.inf, np.inf, np.inf), (120.0, 121.0, 119.0), "worse"),
        ((120.0, 120.0, 120.0), (121.0, 121.0, 121.0), "within the noise"),  # it counts in steps
    ],
)
def test_runs_that_never_arrive_have_no_number_of_steps(mine, theirs, verdict):
    claim = (Claim("it is better", "loft", "lora"),)
    runs = {**made("loft", [1.0] * 3, steps=mine), **made("lora", [1.0] * 3, steps=theirs)}
    (finding,) = findings(runs, "steps", claim)
    assert finding.verdict == verdict


def test_a_rate_beyond_the_plan_does_not_count(tiny):
    task = dataclasses.replace(tiny, more=(Sweep(("lora",), (2,), rates=(3e-2,)),))
    losses = {1e-3: 3.0, 1e-2: 2.0, 3e-2: 1.0}

    def chosen(task, alpha=None):
        runs = [
            Result(Cell("tiny", "lora", 2, rate, 0, alpha=alpha), (), {"loss": x}, {}, {}, {})
            for rate, x in losses.items()
        ]
        return [s.learning_rate for s in registry.summaries_of(task, runs).values()]

    assert chosen(tiny) == [1e-2]
    assert chosen(task) == [3e-2]
    assert chosen(tiny, alpha=8.0) == [3e-2]  # no part of the plan


def test_ablations_have_the_optimizer_of_their_name():
    assert {optimizer_of(name) for name in ABLATIONS} == set(ABLATIONS.values())


def test_runs_of_another_form_of_the_task_are_not_mixed(
    assets, tiny, tmp_path, monkeypatch, capsys
):
    run = ["run", "tiny", "--results", str(tmp_path), "--assets", str(assets), "--methods", "full"]
    run += ["--cache", jax.config.jax_compilation_cache_dir, "--rates", "1e-3"]
    assert compare.main(run) == 0
    monkeypatch.setitem(TASKS, "tiny", dataclasses.replace(tiny, batch_size=2))
    for command in (run, ["report", "--results", str(tmp_path), "--page", str(tmp_path / "p.md")]):
        assert compare.main(command) == 2
        assert "runs of another form of the task" in capsys.readouterr().err
