"""How the benchmark of the kernel reads a compiled program."""

from benchmarks.fused import tile_bytes

PROGRAM = """HloModule jit
%fused_computation.1 (x: f32[8]) -> f32[4096,64] {
  ROOT %a = f32[4096,64]{1,0:T(8,128)} convolution(%x, %y)
}
%region.2 (t: s32[]) -> f32[16,4096] {
  %root = f32[4096,64]{0,1:T(8,128)S(1)} fusion(%p, %q), kind=kOutput, calls=%fused_computation.1
  %numerator = f32[4096,64]{1,0:T(8,128)} fusion(%m, %q), kind=kOutput
  %squares = f32[136,64]{1,0:T(8,128)} fusion(%q), kind=kLoop
  ROOT %sum = f32[16,4096]{1,0:T(8,128)} fusion(%root, %numerator), kind=kOutput
}
"""


def test_tiles_are_counted_where_they_are():
    assert tile_bytes(PROGRAM, 4096, 11008) == (8, 8)
