from benchmarks.optimizer.aims import aims


def test_aims_compare_with_the_same_case_only():
    def row(optimizer, pairs, temp_bytes, **more):
        shape = {"in": 1024, "out": 1024, "pairs": pairs, "rank": 16}
        return {"group": "update", "optimizer": optimizer, "temp_bytes": temp_bytes} | shape | more

    rows = [
        row("loft", 8, 5, quick=False, to_dense=0.25),
        row("dense", 1, 1000, quick=False),
        row("dense", 8, 40, quick=False),
        row("loft", 1, 5, quick=False, to_dense=9.0),
    ]
    speed, memory = aims(rows)
    assert (speed.measured, speed.met) == (4.0, True)
    assert (memory.measured, memory.met) == (0.125, False)
