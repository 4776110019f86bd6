"""A run of a toy task, made up."""

from experiments.log import Cell, Result


def result(rate=0.1, seed=0, loss=1.0, test=None, **cell):
    where = {"task": "toy", "method": "loft", "rank": 4, **cell}
    measured = {} if test is None else {"loss": test, "accuracy": 1 - test}
    return Result(
        Cell(**where, learning_rate=rate, seed=seed),
        train=(3.0, 2.0, loss),
        validation={"loss": loss},
        test=measured,
        cost={"step_seconds": 0.1},
        made_with={"jax": "1", "steps": 30},
    )
