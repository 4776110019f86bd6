"""The tasks that methods are compared on: data, model, length of a run, and the sweep."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments.ablations import ABLATIONS
from experiments.log import Cell, grid
from loft_jax.data import DataConfig
from loft_jax.training.config import (
    EvaluationConfig,
    FinetuneConfig,
    ModelConfig,
    ScheduleConfig,
)

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


UNCLIPPED = ("lora", "reflora", "loft")
"""Methods that run without a clip too, as `lora-unclipped`."""

WHOLE = {**dict.fromkeys(ABLATIONS, "loft"), **{f"{name}-unclipped": name for name in UNCLIPPED}}
"""What is left of a method without a part, and that method."""

BEFORE = "before"
"""The model as it was before training, in the place of a method."""

WITHOUT_RANK = ("full", "full-linear")
"""Methods that train no adapters."""


class Sweep(NamedTuple):
    """Methods at every seed of a task, with something else than usual.

    Attributes:
        methods: That run.
        ranks: That each runs at.
        eps: Adam's epsilon; None is that of the task.
        alpha: LoRA's alpha; None is the rank.
        rates: Learning rates; None is those of the task.
    """

    methods: tuple[str, ...]
    ranks: tuple[int, ...]
    eps: float | None = None
    alpha: float | None = None
    rates: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """What methods are compared on, and how they are swept.

    Args:
        name: On the command line and in the log.
        title: In the report.
        steps: Optimizer steps of a run.
        methods: That are compared.
        ranks: That each runs at.
        rates: Learning rates that each runs at.
        more: What is swept besides: ablations, other values of eps and alpha, and one more rate
            where the best was the first or the last.
        note: What the report says of the task.
        eps: Adam's epsilon.
        seeds: Seeds of the sweep.
        final_seeds: Seeds at the best rate.
        measure: What a method is judged by.
        always_tests: Whether runs of the sweep are tested too.
    """

    name: str
    title: str
    steps: int
    methods: tuple[str, ...]
    ranks: tuple[int, ...]
    rates: tuple[float, ...]
    more: tuple[Sweep, ...] = ()
    note: str = ""
    eps: float = 1e-8
    seeds: tuple[int, ...] = (0,)
    final_seeds: tuple[int, ...] = (0, 1, 2)
    measure: str = "loss"
    always_tests: bool = False

    def cells(self, sweep: Sweep | None = None) -> list[Cell]:
        """The runs of one sweep, or of all that are planned."""
        planned = (sweep,) if sweep else (Sweep(self.methods, self.ranks), *self.more)
        found = []
        for one in planned:
            if BEFORE in one.methods:
                found.append(Cell(self.name, BEFORE, 0, 0.0, eps=self.eps))
            found += grid(
                self.name,
                [method for method in one.methods if method != BEFORE],
                one.ranks,
                self.rates if one.rates is None else one.rates,
                self.seeds,
                without_rank=WITHOUT_RANK,
                eps=self.eps if one.eps is None else one.eps,
                alpha=one.alpha,
            )
        return list(dict.fromkeys(found))

    @property
    def digest(self) -> str:
        """Of what the task says of a run; what methods are set to, and the code, are not in it."""
        left_out = {"title", "note", "methods", "ranks", "rates", "more", "measure"}
        left_out |= {"seeds", "final_seeds", "always_tests"}
        values = dataclasses.asdict(self)
        if values.get("dtype") == "float32":
            left_out.add("dtype")
        what = {k: v for k, v in values.items() if k not in left_out and v is not None}
        return hashlib.blake2b(json.dumps(what).encode(), digest_size=4).hexdigest()


@dataclass(frozen=True, kw_only=True)
class PretrainedTask(Task):
    """A pretrained model, and what it is taught.

    Args:
        model: File or folder below the assets.
        data: Folder of the files below, under the assets.
        max_length: Tokens of a row at most; of images it says nothing.
        batch_size: Rows of a step.
        packing: Whether texts are put into rows of the full length.
        choices: Answers to compare; empty where rows bring their own, or have none.
        preset: The published data set that the files are of; None for plain rows.
        dtype: Of the model's computation and of its frozen weights.
        train: File to train on, and its split: with slices, as `datasets` writes them.
        validation: The same to choose learning rates by.
        test: The same to report.
    """

    model: str
    data: str
    max_length: int = DataConfig.max_length
    batch_size: int
    packing: bool = False
    choices: tuple[str, ...] = ()
    preset: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    train: tuple[str, str] = ("train.jsonl", "train")
    validation: tuple[str, str] = ("validation.jsonl", "train")
    test: tuple[str, str] = ("test.jsonl", "train")

    def config(self, assets: Path) -> FinetuneConfig:
        """A run of this task, but for its method, rank, learning rate and seed.

        Args:
            assets: Where models and data lie.

        Returns:
            Its configuration; held-out rows are those of validation.
        """
        (train, split), (validation, eval_split) = self.train, self.validation
        return FinetuneConfig(
            model=ModelConfig(str(assets / self.model), self.dtype),
            data=DataConfig(
                str(assets / self.data / train),
                split=split,
                preset=self.preset,
                max_length=self.max_length,
                packing=self.packing,
            ),
            output="",
            schedule=ScheduleConfig(
                shape="linear",
                warmup_steps=max(1, self.steps // 12),
                steps=self.steps,
                batch_size=self.batch_size,
            ),
            evaluation=EvaluationConfig(
                path=str(assets / self.data / validation),
                split=eval_split,
                choices=self.choices,
                batch_size=32,
            ),
        )

    def tested(self, config: FinetuneConfig) -> FinetuneConfig:
        """The same run, its held-out rows those of the test."""
        name, split = self.test
        path = str(Path(config.evaluation.path).with_name(name))
        return replace(config, evaluation=replace(config.evaluation, path=path, split=split))


FIVE_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
ON_SMOLLM2 = ("lora", "loft", "loft-factored", "loft-alternate", "full", "reflora")
EPSILONS = (1e-6, 1e-4)
ALPHAS = (1.0, 10.0, 16.0, 64.0)
ALL_METHODS = (
    "lora", "rslora", "lora-plus", "lora-fa", "pissa", "dora", "riemannian",
    "reflora", "reflora-balanced", "reflora-s",
    "loft", "loft-factored", "loft-diagonal", "loft-muon",
    "loft-alternate", "loft-alternate-factored", "full",
)  # fmt: skip
LONG_METHODS = (
    "lora", "rslora", "dora", "reflora",
    "loft", "loft-factored", "loft-alternate", "full-linear",
)  # fmt: skip


PEERS = ("lora-pro", "riemannion", "adapre-lora", "lora-rite")


def _in_bfloat16(task: PretrainedTask, ranks: Mapping[int, tuple[str, ...]]) -> PretrainedTask:
    """A task on a model in bfloat16, as it is trained on accelerators; losses are other ones.

    Args:
        task: The same in float32.
        ranks: Methods by rank.
    """
    first, *more = ranks
    return replace(
        task,
        name=f"{task.name}-bfloat16",
        title=f"{task.title}, in bfloat16",
        note=f"As `{task.name}`, with the frozen weights and the computation in bfloat16.",
        dtype="bfloat16",
        methods=ranks[first],
        ranks=(first,),
        more=tuple(Sweep(ranks[rank], (rank,)) for rank in more),
    )


def _on_minilm(**task: Any) -> PretrainedTask:
    """A task of GLUE: methods at three rates each, those of full fine-tuning lower."""
    return PretrainedTask(
        model="experiments/minilm",
        dtype="bfloat16",
        steps=150,
        batch_size=32,
        methods=("loft-factored", "lora", "reflora"),
        ranks=(8,),
        rates=(3e-4, 1e-3, 3e-3),
        more=(Sweep(("full",), (8,), rates=(5e-5, 1e-4, 2e-4)),),
        always_tests=True,
        **task,
    )


PRETRAINED_TASKS = {
    task.name: task
    for task in (
        PretrainedTask(
            name="stories",
            title="A model of children's stories moved to Shakespeare",
            note=(
                "stories260K, a Llama of 260 thousand parameters, learns the language of "
                "Shakespeare's plays: packed rows of 128 tokens; 29 texts of 2000 characters for "
                "validation, 30 for the test."
            ),
            model="experiments/stories260k",
            data="experiments/tinyshakespeare",
            max_length=128,
            packing=True,
            steps=100,
            batch_size=4,
            methods=ALL_METHODS,
            ranks=(1, 2, 4, 8, 16),
            rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
            more=(
                Sweep((BEFORE, "full-linear"), (1,)),
                Sweep(("lora", "loft", "loft-factored", "loft-alternate"), (32,)),
                Sweep(("loft-balanced",), (4,)),
                Sweep(tuple(WHOLE), (4,)),
                *(Sweep(("lora", "loft", "loft-factored", "full"), (4,), eps) for eps in EPSILONS),
                *(Sweep(("lora", "loft", "loft-diagonal"), (4,), alpha=a) for a in ALPHAS),
                Sweep(("lora-fa",), (1, 2), rates=(3e-1,)),
                Sweep(("lora-plus",), (8, 16), rates=(3e-4,)),
            ),
            seeds=(0, 1, 2),
            always_tests=True,
        ),
        PretrainedTask(
            name="stories-long",
            title="Stories to Shakespeare, five times the steps",
            note="As `stories`, with 500 steps: how much of a lead is speed, and how much stays.",
            model="experiments/stories260k",
            data="experiments/tinyshakespeare",
            max_length=128,
            packing=True,
            steps=500,
            batch_size=4,
            methods=LONG_METHODS,
            ranks=(4, 16),
            rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
            seeds=(0, 1, 2),
            always_tests=True,
        ),
        PretrainedTask(
            name="sentiment",
            title="Sentiment of film reviews",
            note=(
                "SmolLM2-135M-Instruct, its 4-bit weights dequantized, tells whether a sentence "
                "of a film review is for or against: the more likely of two words; 200 sentences "
                "for validation, 400 for the test."
            ),
            model=SMOLLM2,
            data="reviews",
            max_length=96,
            steps=60,
            batch_size=8,
            choices=(" negative", " positive"),
            methods=ON_SMOLLM2,
            ranks=(8,),
            rates=FIVE_RATES,
            more=(Sweep((BEFORE,), (8,)),),
            train=("train.jsonl", "train[200:]"),
            validation=("train.jsonl", "train[:200]"),
            measure="accuracy",
        ),
        PretrainedTask(
            name="arc-easy",
            title="ARC-Easy",
            note=(
                "SmolLM2-135M-Instruct answers questions of science: the likeliest of the "
                "answers, by character; 100 questions for validation, 500 for the test. Losses of "
                "validation and test, by which rates are chosen, are of a whole right answer; the "
                "training loss is of a token."
            ),
            model=SMOLLM2,
            data="experiments/arc_easy",
            max_length=128,
            steps=60,
            batch_size=8,
            methods=ON_SMOLLM2,
            ranks=(8,),
            rates=FIVE_RATES,
            more=(Sweep((BEFORE,), (8,)), Sweep(("lora",), (8,), rates=(1e-2,))),
            validation=("validation.jsonl", "train[:100]"),
            test=("test.jsonl", "train[:500]"),
            measure="accuracy_norm",
        ),
        PretrainedTask(
            name="openbookqa",
            title="OpenBookQA",
            note=("As ARC-Easy, with the questions of OpenBookQA."),
            model=SMOLLM2,
            data="experiments/openbookqa",
            max_length=128,
            steps=60,
            batch_size=8,
            methods=ON_SMOLLM2,
            ranks=(8,),
            rates=FIVE_RATES,
            more=(Sweep((BEFORE,), (8,)), Sweep(("lora",), (8,), rates=(1e-2,))),
            validation=("validation.jsonl", "train[:100]"),
            test=("test.jsonl", "train[:500]"),
            measure="accuracy_norm",
        ),
        PretrainedTask(
            name="shakespeare",
            title="SmolLM2 on tinyshakespeare",
            note=(
                "SmolLM2-135M-Instruct learns the language of Shakespeare's plays: packed rows of "
                "128 tokens; 8 texts of 2000 characters for validation, 24 for the test."
            ),
            model=SMOLLM2,
            data="experiments/tinyshakespeare",
            max_length=128,
            packing=True,
            steps=60,
            batch_size=2,
            methods=ON_SMOLLM2,
            ranks=(8,),
            rates=FIVE_RATES,
            more=(
                Sweep((BEFORE,), (8,)),
                Sweep(("lora", "loft"), (4, 16)),
                Sweep(("lora",), (4, 8, 16), rates=(1e-2,)),
                Sweep(("reflora",), (8,), rates=(1e-2,)),
                Sweep(("loft",), (8,), 1e-4),
                Sweep(("adapre-lora",), (8,)),
            ),
            validation=("validation.jsonl", "train[:8]"),
            test=("test.jsonl", "train[:24]"),
        ),
        PretrainedTask(
            name="wikitext",
            title="SmolLM2 on WikiText-2",
            note=(
                "SmolLM2-135M-Instruct learns the language of WikiText-2: packed rows of 128 "
                "tokens; 8 texts for validation, 24 for the test."
            ),
            model=SMOLLM2,
            data="experiments/wikitext2",
            max_length=128,
            packing=True,
            steps=60,
            batch_size=2,
            methods=ON_SMOLLM2,
            ranks=(8,),
            rates=FIVE_RATES,
            more=(
                Sweep((BEFORE,), (8,)),
                Sweep(("loft",), (4,)),
                Sweep(("lora",), (16,)),
                Sweep(("lora",), (8, 16), rates=(1e-2,)),
                Sweep(("reflora",), (8,), rates=(1e-2,)),
                Sweep(("adapre-lora", "lora-pro", "riemannion"), (8,)),
                Sweep(("lora-pro",), (8,), rates=(1e-2,)),
            ),
            validation=("validation.jsonl", "train[:8]"),
            test=("test.jsonl", "train[:24]"),
        ),
        PretrainedTask(
            name="wikitext-long",
            title="SmolLM2 on WikiText-2, almost seven times the steps",
            note=(
                "As `wikitext`, with 400 steps, one seed and the model in bfloat16; each method at "
                "the three rates that stand around its best of 60 steps."
            ),
            model=SMOLLM2,
            data="experiments/wikitext2",
            dtype="bfloat16",
            max_length=128,
            packing=True,
            steps=400,
            batch_size=2,
            methods=("loft-factored",),
            ranks=(8,),
            rates=(1e-4, 3e-4, 1e-3),
            more=(
                Sweep(("lora",), (8,), rates=(1e-3, 3e-3, 1e-2)),
                Sweep(("full",), (8,), rates=(3e-5, 1e-4, 3e-4)),
            ),
            final_seeds=(0,),
            always_tests=True,
            validation=("validation.jsonl", "train[:8]"),
            test=("test.jsonl", "train[:24]"),
        ),
        _on_minilm(
            name="sst2",
            title="MiniLM on SST-2",
            note=(
                "all-MiniLM-L6-v2, a BERT of 22.7 million parameters, tells whether a phrase of a "
                "film review is for or against, computed in bfloat16; 872 of the training phrases "
                "for validation, for the test the 872 sentences that GLUE publishes for "
                "validation, of which 0.509 have the more frequent label. Three rates a method, "
                "those of `full` lower."
            ),
            data="experiments/sst2",
            preset="sst2",
            max_length=64,
            train=("train.tsv", "train"),
            validation=("dev.tsv", "train[:872]"),
            test=("test.tsv", "train"),
            measure="accuracy",
        ),
        _on_minilm(
            name="cola",
            title="MiniLM on CoLA",
            note=(
                "As `sst2`: whether a sentence is grammatical; 1,301 of the training sentences for "
                "validation, for the test the 1,043 that GLUE publishes for validation, of which "
                "0.691 have the more frequent label. A model that gives that label to all has this "
                "accuracy, and a Matthews correlation of 0."
            ),
            data="experiments/cola",
            preset="cola",
            max_length=64,
            train=("train.tsv", "train"),
            validation=("val.tsv", "train"),
            test=("dev.tsv", "train"),
            measure="matthews",
        ),
        _on_minilm(
            name="rte",
            title="MiniLM on RTE",
            note=(
                "As `sst2`: whether a text entails a sentence; 277 of the training pairs for "
                "validation, for the test the 277 that GLUE publishes for validation, of which "
                "0.527 have the more frequent label."
            ),
            data="experiments/rte",
            preset="rte",
            max_length=128,
            train=("train.tsv", "train[:2213]"),
            validation=("train.tsv", "train[2213:]"),
            test=("dev.tsv", "train"),
            measure="accuracy",
        ),
        PretrainedTask(
            name="vit-digits",
            title="A small vision transformer on handwritten digits",
            note=(
                "A ViT-S/14 of 22 million parameters in DINOv2's layout, whose weights were "
                "trained further for saliency maps, reads scikit-learn's digits at 28 by 28 "
                "pixels: 1,200 images to train on, 200 for validation, 397 for the test. The "
                "model is in float32. Three rates a method, those of `full` lower; those of LoFT "
                "lower too, and one more, as the least of three was its best."
            ),
            model="experiments/vit_digits/model",
            data="experiments/vit_digits",
            steps=50,
            batch_size=32,
            methods=("lora", "reflora"),
            ranks=(8,),
            rates=(3e-4, 1e-3, 3e-3),
            more=(
                Sweep(("loft-factored",), (8,), rates=(3e-5, 1e-4, 3e-4, 1e-3)),
                Sweep(("full",), (8,), rates=(1e-5, 3e-5, 1e-4)),
            ),
            always_tests=True,
            train=("train.npz", "train[200:]"),
            validation=("train.npz", "train[:200]"),
            test=("test.npz", "train"),
            measure="accuracy",
        ),
    )
}
PRETRAINED_TASKS |= {
    task.name: task
    for task in (
        _in_bfloat16(
            PRETRAINED_TASKS["sentiment"],
            {4: ("lora", "loft-factored"), 8: ("loft-factored", "loft", "reflora")},
        ),
        _in_bfloat16(
            PRETRAINED_TASKS["arc-easy"], {4: ("lora", "loft-factored"), 8: ("loft-factored",)}
        ),
        _in_bfloat16(
            PRETRAINED_TASKS["openbookqa"],
            {4: ("lora", "loft-factored", "full"), 8: ("loft-factored",)},
        ),
        _in_bfloat16(PRETRAINED_TASKS["shakespeare"], {8: ("loft", *PEERS), 4: ("loft-factored",)}),
        _in_bfloat16(
            PRETRAINED_TASKS["wikitext"], {8: ("loft", *PEERS), 4: ("lora", "loft-factored")}
        ),
    )
}
"""Tasks by name."""
