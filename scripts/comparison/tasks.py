"""The tasks that methods are compared on: data, model, length of a run, and the sweep."""

from dataclasses import dataclass, replace
from pathlib import Path

from loft_jax.data import DataConfig
from loft_jax.training.config import FinetuneConfig

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


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
    eps: float = 1e-8
    seeds: tuple[int, ...] = (0,)
    final_seeds: tuple[int, ...] = (0, 1, 2)
    measure: str = "loss"
    always_tests: bool = False


@dataclass(frozen=True, kw_only=True)
class LanguageTask(Task):
    """A language model, and what it is taught.

    Args:
        model: File or folder below the assets.
        data: Folder of the files below, under the assets.
        max_length: Tokens of a row at most.
        batch_size: Rows of a step.
        packing: Whether texts are put into rows of the full length.
        choices: Answers to compare; empty where rows bring their own, or have none.
        train: File to train on, and its split: with slices, as `datasets` writes them.
        validation: The same to choose learning rates by.
        test: The same to report.
    """

    model: str
    data: str
    max_length: int
    batch_size: int
    packing: bool = False
    choices: tuple[str, ...] = ()
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
            model=str(assets / self.model),
            data=DataConfig(
                str(assets / self.data / train),
                split=split,
                max_length=self.max_length,
                packing=self.packing,
            ),
            output="",
            eval_path=str(assets / self.data / validation),
            eval_split=eval_split,
            choices=self.choices,
            schedule="linear",
            warmup_steps=max(1, self.steps // 12),
            steps=self.steps,
            batch_size=self.batch_size,
            eval_batch_size=32,
        )

    def tested(self, config: FinetuneConfig) -> FinetuneConfig:
        """The same run, its held-out rows those of the test."""
        name, split = self.test
        return replace(
            config, eval_path=str(Path(config.eval_path).with_name(name)), eval_split=split
        )


FIVE_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
ON_SMOLLM2 = (
    "lora", "loft", "loft-factored", "full", "reflora", "reflora-s", "lora-plus", "dora",
)  # fmt: skip
ALL_METHODS = (
    "lora", "rslora", "lora-plus", "lora-fa", "pissa", "dora", "riemannian",
    "reflora", "reflora-balanced", "reflora-s",
    "loft", "loft-factored", "loft-diagonal", "loft-muon", "full",
)  # fmt: skip

LANGUAGE_TASKS = {
    task.name: task
    for task in (
        LanguageTask(
            name="stories",
            title="A model of children's stories moved to Shakespeare",
            model="experiments/stories260k",
            data="experiments/tinyshakespeare",
            max_length=128,
            packing=True,
            steps=100,
            batch_size=4,
            methods=ALL_METHODS,
            ranks=(1, 2, 4, 8, 16),
            rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
            seeds=(0, 1, 2),
            always_tests=True,
        ),
        LanguageTask(
            name="sentiment",
            title="Sentiment of film reviews",
            model=SMOLLM2,
            data="reviews",
            max_length=96,
            steps=60,
            batch_size=8,
            choices=(" negative", " positive"),
            methods=ON_SMOLLM2,
            ranks=(8,),
            rates=FIVE_RATES,
            train=("train.jsonl", "train[200:]"),
            validation=("train.jsonl", "train[:200]"),
            measure="accuracy",
        ),
        LanguageTask(
            name="arc-easy",
            title="ARC-Easy",
            model=SMOLLM2,
            data="experiments/arc_easy",
            max_length=128,
            steps=60,
            batch_size=8,
            methods=("lora", "loft", "loft-factored", "full", "reflora"),
            ranks=(8,),
            rates=FIVE_RATES,
            validation=("validation.jsonl", "train[:100]"),
            test=("test.jsonl", "train[:500]"),
            measure="accuracy_norm",
        ),
        LanguageTask(
            name="openbookqa",
            title="OpenBookQA",
            model=SMOLLM2,
            data="experiments/openbookqa",
            max_length=128,
            steps=60,
            batch_size=8,
            methods=("lora", "loft", "loft-factored", "full", "reflora"),
            ranks=(8,),
            rates=FIVE_RATES,
            validation=("validation.jsonl", "train[:100]"),
            test=("test.jsonl", "train[:500]"),
            measure="accuracy_norm",
        ),
        LanguageTask(
            name="shakespeare",
            title="SmolLM2 on tinyshakespeare",
            model=SMOLLM2,
            data="experiments/tinyshakespeare",
            max_length=128,
            packing=True,
            steps=60,
            batch_size=2,
            methods=("lora", "loft", "loft-factored", "full", "reflora"),
            ranks=(8,),
            rates=FIVE_RATES,
            validation=("validation.jsonl", "train[:20]"),
            test=("test.jsonl", "train[:20]"),
        ),
        LanguageTask(
            name="wikitext",
            title="SmolLM2 on WikiText-2",
            model=SMOLLM2,
            data="experiments/wikitext2",
            max_length=128,
            packing=True,
            steps=60,
            batch_size=2,
            methods=("lora", "loft", "loft-factored", "full", "reflora"),
            ranks=(8,),
            rates=FIVE_RATES,
            validation=("validation.jsonl", "train[:20]"),
            test=("test.jsonl", "train[:20]"),
        ),
    )
}
"""Tasks by name."""
