"""The comparison of fine-tuning methods: `python -m experiments run TASK`, and its report."""
