"""What benchmarks/tpu_programs.py reads from a compiled program's text."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.tpu_programs import waste, written

TEXT = """\
HloModule step, is_scheduled=true

%fused (p: bf16[3,100]) -> bf16[3,100] {
  %p = bf16[3,100]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %hidden = bf16[3,100]{1,0:T(8,128)(2,1)} add(%p, %p)
}

%body (s: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %s = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%s), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%s), index=1
  %y = f32[8,128]{0,1:T(8,128)} copy(%x), metadata={op_name="jit(step)/copy"}
  ROOT %t = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%n, %y)
}

%condition (s: (s32[], f32[8,128])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  ROOT %less = pred[]{:T(1024)S(6)} constant(false)
}

ENTRY %main (a: bf16[3,100]) -> (bf16[3,100], f32[100]) {
  %a = bf16[3,100]{1,0:T(8,128)(2,1)} parameter(0)
  %here = bf16[3,100]{1,0:T(8,128)(2,1)} fusion(%a), kind=kLoop, calls=%fused
  %near = bf16[3,100]{1,0:T(8,128)(2,1)S(1)} fusion(%a), kind=kLoop, calls=%fused
  %two = (f32[100]{0:T(128)}, pred[3]{0:T(512)}) fusion(%a), kind=kLoop, calls=%fused
  %w = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%init), condition=%condition, body=%body
  ROOT %all = (bf16[3,100]{1,0:T(8,128)(2,1)}, f32[100]{0:T(128)}) tuple(%here, %one)
}
"""


def test_padding_of_what_is_written_to_main_memory():
    """Arguments and results, those of loops too; nothing inside a fusion, nothing in fast memory, nothing twice."""
    found = sorted((one.shape, one.kind, one.bytes, one.padded) for one in written(TEXT))
    assert found == [
        ("bf16[3,100]", "fusion", 600, 2 * 8 * 128),
        ("bf16[3,100]", "parameter", 600, 2 * 8 * 128),
        ("f32[100]", "fusion", 400, 512),
        ("f32[8,128]", "copy", 4096, 4 * 8 * 128 * 16),  # 128 rows of 8 numbers, each in a tile 128 wide
        ("pred[3]", "fusion", 3, 512),
    ]
    assert waste(TEXT) == pytest.approx(sum(one[3] for one in found) / sum(one[2] for one in found) - 1)


def test_text_of_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        waste("nothing")


@pytest.mark.tpu
def test_padding_of_a_program_for_v5e():
    """As much memory as the real compiler gives to 101 x 200 numbers: columns of 101, widened to 128."""
    pytest.importorskip("libtpu")
    from jaxdiff.tasks.targets import choose_target, open_target

    choose_target("v5e:2x2")
    where = jax.sharding.SingleDeviceSharding(open_target("v5e:2x2").devices[0])
    x = jax.ShapeDtypeStruct((101, 200), jnp.float32, sharding=where)
    compiled = jax.jit(lambda x: x + 1, out_shardings=where).lower(x).compile()
    argument, result = written(compiled.as_text())
    assert argument.bytes == result.bytes == 4 * 101 * 200
    assert argument.padded == compiled.memory_analysis().argument_size_in_bytes == 4 * 200 * 128
    assert result.padded == compiled.memory_analysis().output_size_in_bytes
    assert waste(compiled.as_text()) == pytest.approx(128 / 101 - 1)
