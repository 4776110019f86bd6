"""Teaches SmolLM2-135M the sentiment of film reviews with LoFT, before your eyes.

Fetches the model and the sentences (`prepare_demo.py`), fine-tunes with `loft-jax finetune`, shows
held-out accuracy before and after, and leaves a PEFT adapter, the metrics and a plot of the loss.
Interrupted, it goes on where it was. Everything it runs is a command you can run yourself.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--assets", default="assets", help="folder of model and data")
    parser.add_argument("--output", default="runs/demo", help="folder of the run")
    parser.add_argument("--method", default="loft", choices=["loft", "lora"])
    arguments = parser.parse_args()
    assets, output = Path(arguments.assets), Path(arguments.output)

    run([sys.executable, str(ROOT / "scripts" / "prepare_demo.py"), "--folder", str(assets)])
    model = str(assets / "SmolLM2-135M-Instruct.Q4_1.gguf")
    if not (output / "adapter" / "adapter_config.json").exists():  # it is written last
        resume = ["--resume"] if any(output.glob("checkpoints/[0-9]*")) else []
        run(
            [
                *("loft-jax", "finetune", "--method", arguments.method),
                *("--model", model, "--output", str(output)),
                *("--data.path", str(assets / "reviews" / "train.jsonl")),
                *("--eval-path", str(assets / "reviews" / "test.jsonl")),
                *("--choices", " negative", " positive"),
                *("--rank", "8", "--learning-rate", "3e-4", "--schedule", "linear"),
                *("--steps", "60", "--warmup-steps", "5", "--batch-size", "16"),
                *("--save-every", "20", "--log-every", "1"),
                *resume,
            ]
        )
    show(output, model, str(assets / "reviews" / "test.jsonl"))
    return 0


def run(command: list[str]) -> None:
    """Runs a command as typed, showing it; ends the demo with its exit code if it fails."""
    print("$", " ".join(f'"{word}"' if " " in word else word for word in command), flush=True)
    code = subprocess.run([_located(command[0]), *command[1:]], check=False).returncode
    if code != 0:
        sys.exit(code)


def show(output: Path, model: str, test: str) -> None:
    """Prints what the run came to, and what to do next."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").open(encoding="utf-8")]
    measured = [row for row in rows if "eval_accuracy" in row]
    print("\n400 held-out sentences     accuracy      NLL")
    for name, row in (("before", measured[0]), ("after", measured[-1])):
        print(f"  {name:24}{row['eval_accuracy']:9.4f}{row['eval_loss']:9.4f}")
    adapter = output / "adapter"
    print(
        f"""
loss plot:    {output / "loss.png"}
metrics:      {output / "metrics.jsonl"}, tensorboard --logdir {output / "tensorboard"}
PEFT adapter: {adapter}

Try next (in this environment: source .venv/bin/activate):
  loft-jax generate --adapter {adapter} \\
      --prompt "Review: A gem of a film.\\nSentiment:" --max-new-tokens 2
  loft-jax evaluate --adapter {adapter} --data.path {test} --choices " negative" " positive"
  loft-jax merge --adapter {adapter} --output {output / "merged"}
  python scripts/demo.py --method lora --output runs/demo-lora   # the same with plain LoRA"""
    )


def _located(program: str) -> str:
    """A console script of this environment, activated or not."""
    beside = Path(sys.executable).parent / program
    return str(beside) if beside.exists() else program


if __name__ == "__main__":
    sys.exit(main())
