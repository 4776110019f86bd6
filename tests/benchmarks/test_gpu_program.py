"""Kernels that a program starts, by a small text of HLO."""

from benchmarks.gpu_program import kernel_counts

PROGRAM = """HloModule jit_f, is_scheduled=true

%fused_add (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %a = f32[4]{0} add(%p, %p)
}

%inner (arg.1: (s32[], f32[4])) -> (s32[], f32[4]) {
  %arg.1 = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%arg.1), index=1
  %copy.1 = f32[4]{0} copy(%x)
  ROOT %tuple.1 = (s32[], f32[4]{0}) tuple(%x, %copy.1)
}

%body (arg: (s32[], f32[4])) -> (s32[], f32[4]) {
  %arg = (s32[], f32[4]{0}) parameter(0)
  %y = f32[4]{0} get-tuple-element(%arg), index=1
  %fusion.2 = f32[4]{0} fusion(%y), kind=kLoop, calls=%fused_add
  %while.2 = (s32[], f32[4]{0}) while(%arg), condition=%c, body=%inner, \
backend_config={"known_trip_count":{"n":"2"}}
  ROOT %tuple.2 = (s32[], f32[4]{0}) tuple(%y, %fusion.2)
}

ENTRY %main (x.1: f32[4]) -> f32[4] {
  %x.1 = f32[4]{0} parameter(0)
  %fusion.1 = (f32[4]{0}, f32[4]{0}) fusion(%x.1), kind=kLoop, calls=%fused_add
  %while.1 = (s32[], f32[4]{0}) while(%t), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %while.3 = (s32[], f32[4]{0}) while(%t), condition=%c, body=%inner
  %call.1 = f32[4]{0} call(%x.1), to_apply=%two
  %start = ((f32[4]{0}), f32[4]{0}) async-start(%x.1), calls=%two
  %done = f32[4]{0} async-done(%start)
  %choice = f32[4]{0} conditional(%i, %x.1, %x.1), branch_computations={%two, %fused_add}
  ROOT %cc = f32[4]{0} custom-call(%x.1), custom_call_target="kernel"
}

%two (x.2: f32[4]) -> f32[4] {
  %x.2 = f32[4]{0} parameter(0)
  %dot.1 = f32[4]{0} dot(%x.2, %x.2)
  ROOT %dot.2 = f32[4]{0} dot(%dot.1, %x.2)
}
"""


def test_steps_of_loops_count_as_often_as_they_are_made():
    found = kernel_counts(PROGRAM)
    assert found == {"fusion": 1 + 3, "copy": 3 * 2 + 1, "custom-call": 1, "dot": 3 * 2}
