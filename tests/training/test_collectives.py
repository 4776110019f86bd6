from loft_jax.training.collectives import Collective, find_collectives

PROGRAM = """
%body (p: f32[8]) -> f32[8] {
  %gather.1 = bf16[1,64,32]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, dimensions={1}
  %again = bf16[1,64,32]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=1, dimensions={1}
  %sums = (f32[4]{0}, pred[16]{0}) all-reduce(%a, %b), channel_id=2, to_apply=%add
  %start = (bf16[8,2]{1,0}, bf16[64,2]{1,0}) all-gather-start(%c), channel_id=3, dimensions={0}
  %done = bf16[64,2]{1,0} all-gather-done(%start)
  %copy = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%d), channel_id=4
  %total = f32[] all-reduce-start(%e), channel_id=5, to_apply=%add
  ROOT %x = f32[8]{0} add(%f, %all-gather.7)
}
"""


def test_each_channel_counts_once_with_its_result():
    assert find_collectives(PROGRAM) == [
        Collective("all-gather", 2, 64 * 32 * 2 + 64 * 2 * 2),
        Collective("all-reduce", 2, 4 * 4 + 16 + 4),
        Collective("collective-permute", 1, 32),
    ]


def test_a_program_of_one_device_has_none():
    assert find_collectives("ROOT %add.1 = f32[8]{0} add(%a, %b)") == []
