r"""How the cost of an update grows: with the rank, the width, the layers and the devices.

For LoFT with the exact second moment, along the tangent space and alternating, for LoFT with the
factored one, and for AdamW on the factors (LoRA): the time of a jitted update, and the bytes of the
optimizer's state on a device, over sizes of which one grows (`loft` is the exact one here, and
`loft-factored` what `loft` is by default):

- `rank`: one pair of a square weight.
- `width`: one pair of a square weight, at rank 16.
- `layers`: as one stack of pairs, and as separate pairs.
- `devices`: a stack of layers whose number grows with that of the devices, the rows of A and the
  columns of B split over these: the same work for each of them.

**The floor.** Let W be (m, n), and `q = r (r + 1) / 2` the numbers of a symmetric matrix. The
exact direction has an inner product of q numbers and one of r for each element of W, and adds each
element to r sums: `2 (q + 2 r) m n` operations, for each factor that moves, both or one. Its state
moves to another basis by two products of (r, r) matrices for each of the m + n rows, `4 r³`
operations. So the time is quadratic in the width, as W is, and quadratic in the rank, cubic where
the width is not much larger than the rank. Factored, all is products of (rows, r) by (r, r), `2 r²`
operations a row each, and AdamW has 2 r numbers a row to move: linear in the width, quadratic and
linear in the rank. All are linear in the layers. The states are `q + 2 r`, `1 + 2 r` and `2 r`
numbers a row, linear in the width; the factored one has two (r, r) matrices a pair besides, which
are whole on each device.

A slope is that of the straight line through the logarithms, by least squares: 2 means quadratic.
The floor's is that of the same line through its operations or numbers at the same sizes. "Last" are
the slopes between the two largest sizes: small updates grow less than the floor does, since what
takes time there is to start the program and its loops. Figures have the floors dashed, from the
largest size down; both moves of the exact second moment have the same state.

**Devices.** They are threads on the cores of one machine, which all devices share, so that an
update takes the time of the work of all of them. Its time is therefore divided by their number: it
stays the same as long as the work of each device does, which is the floor. "Sent" are the results
of collectives on a device.

Contestants take turns, as in `benchmarks.optimizer`. A point is left out where its program would
hold more memory, or an update would take longer, than the options say. Adds a JSON line a row to
`growth.jsonl` in the folder of results, and writes the latest run of each size as a page with a
figure each.

    python -m benchmarks.growth
    python -m benchmarks.growth --against rank devices
    python -m benchmarks.growth --quick --results runs/quick
"""
