"""Commonsense reasoning: eight sets of questions in the form of LLM-Adapters.

A row has an `instruction` that names its answers, an `input` (empty in all published files), the
`output` to learn and the right `answer`: `Please choose the correct answer to the question: ...
Answer1: ... Answer2: ...`, `the correct answer is answer2`, `answer2`. The instruction is put into
the template of Alpaca, as LLM-Adapters does it, but without the indentation that its lines have
there.

Source: Hu et al., "LLM-Adapters", arXiv 2304.01933, section 4 and AGI-Edgerunners/LLM-Adapters.
"""

from typing import Any

from loft_jax.data.alpaca import alpaca_prompt
from loft_jax.data.presets.preset import Preset, Row
from loft_jax.errors import InputError, shown

_COLUMNS = ("instruction", "output", "answer")

_TRUTH = ("true", "false")
_SOLUTIONS = ("solution1", "solution2")
_ANSWERS = ("answer1", "answer2", "answer3", "answer4", "answer5")
_ENDINGS = ("ending1", "ending2", "ending3", "ending4")
_OPTIONS = ("option1", "option2")


def _example(row: Row, where: str) -> dict[str, Any]:
    """Makes a prompt, its completion and the completions to compare.

    Args:
        row: Of a file.
        where: Its place, for messages.

    Returns:
        `prompt`, `completion`, `choices` and the index `answer` of the right one.

    Raises:
        InputError: A column is missing or has no text, or the answer is none of the answers that
            the instruction names.
    """
    for name in _COLUMNS:
        if not isinstance(row.get(name), str):
            raise InputError(
                f"{where} has {name!r} {shown(row.get(name))}; expected texts in the columns "
                f"{', '.join(_COLUMNS)}"
            )
    answer = row["answer"].strip()
    answers = _answers(row["instruction"], answer)
    if answer not in answers:
        raise InputError(
            f"{where} has the answer {shown(answer)}, and its instruction names "
            f"{shown(answers)}; expected one of them"
        )
    return {
        "prompt": alpaca_prompt(row["instruction"], row.get("input") or ""),
        "completion": row["output"],
        "choices": [f"the correct answer is {one}" for one in answers],
        "answer": answers.index(answer),
    }


def _answers(instruction: str, answer: str) -> list[str]:
    """Gives the answers of the kind of the right one that an instruction names."""
    kinds = (_TRUTH, _SOLUTIONS, _ANSWERS, _ENDINGS, _OPTIONS)
    kind = next((kind for kind in kinds if answer in kind), ())
    if kind == _TRUTH:
        return [*kind]
    return [one for one in kind if one in instruction.lower()]


def _preset(name: str, folder: str, answers: tuple[str, ...]) -> Preset:
    return Preset(
        name,
        "choice",
        _example,
        held_out="test",
        folder=folder,
        answer_pattern="|".join(answers),
    )


_TASKS = (
    _preset("boolq", "boolq", _TRUTH),
    _preset("piqa", "piqa", _SOLUTIONS),
    _preset("siqa", "social_i_qa", _ANSWERS),
    _preset("hellaswag", "hellaswag", _ENDINGS),
    _preset("winogrande", "winogrande", _OPTIONS),
    _preset("arc-easy", "ARC-Easy", _ANSWERS),
    _preset("arc-challenge", "ARC-Challenge", _ANSWERS),
    _preset("openbookqa", "openbookqa", _ANSWERS),
)

COMMONSENSE = (
    *_TASKS,
    Preset("commonsense", "choice", _example, held_out="test", parts=_TASKS),
)
"""The eight tasks, and their union: of those in a folder, or of `commonsense_170k.json`."""
