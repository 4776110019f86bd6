"""What LoFT costs beside AdamW and beside dense LoFT: update time, memory and compile time.

Three groups of cases:

- `update`: the jitted optimizer update (state donated) on factors of one shape, for `optax.adamw`
  (what LoRA pays), each `loft`, and the paper's formulas as written (`dense_loft.py`).
- `compile`: the same update for all adapters of Llama-2-7B at rank 16, as 224 separate pairs and
  as 7 stacks of 32, and for one 4096x11008 pair: traced and compiled from shapes alone, nothing
  allocated. Dense LoFT, which is written for separate pairs, is left out of the stacked one.
- `train`: the whole training step of SmolLM2-135M (rank 16 on all linear layers), by batch.
  Dense LoFT is left out here too, since the layers are stacked.

All optimizers clip by the global norm as `loft-jax finetune` does. Times are compared within one
process: the contestants take turns, many short ones, in an order that rotates, and a ratio is the
median over rounds of the ratio within a round, so that what a shared machine does to all of them
cancels. One process for all cases, because taking turns needs it and an accelerator belongs to one
process; memory is therefore not what the process holds but what the compiler planned
(`memory_analysis`), and every compilation starts from cleared caches.

Adds one JSON line a measured row to `optimizer.jsonl` in the folder of results, and writes the
latest run of each group as `optimizer.md` and `optimizer.png` beside it.

    python -m benchmarks.optimizer  # everything
    python -m benchmarks.optimizer --cases update --shapes 1024x1024x8 --ranks 16
    python -m benchmarks.optimizer --quick --results runs/quick
"""
