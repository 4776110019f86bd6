"""What LoFT costs: speed, memory and rounding, measured."""
