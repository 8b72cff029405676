"""pytest tests/test_comm.py: the adapter on the wire."""

import pytest
import torch

from methods import wire

STATE = {
    "matrix": torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [1e-4, 0.0, -1e-4]]),
    "vector": torch.tensor([3.0, -1.5]),
}


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("float16", 2**-11)])
def test_floats_round_and_leave_nothing_behind(dtype, error):
    packed, left = wire.pack(STATE, dtype)
    assert left is None
    assert {tensor.dtype for tensor in packed.values()} == {getattr(torch, dtype)}
    for name, tensor in wire.unpack(packed).items():
        assert tensor.dtype == torch.float32
        assert ((tensor - STATE[name]).abs() <= error * STATE[name].abs() + 1e-12).all()


def test_int8_has_a_scale_for_each_row():
    packed, left = wire.pack(STATE, "int8")
    # 127 steps reach the row's largest value; a row of zeros needs none.
    expected = torch.tensor([2.0, 0.0, 1e-4]) / 127
    assert torch.allclose(packed["matrix:scale"], expected)
    assert torch.allclose(packed["vector:scale"], torch.tensor([3.0 / 127]))
    assert packed["matrix"].tolist() == [[64, -127, 32], [0, 0, 0], [127, 0, -127]]
    assert packed["vector"].tolist() == [127, -64]
    opened = wire.unpack(packed)
    for name in STATE:
        assert torch.allclose(opened[name] + left[name], STATE[name], atol=1e-7)
        assert opened[name].shape == STATE[name].shape


def test_int8_has_a_scale_for_each_column_where_these_are_fewer():
    tall = STATE["matrix"].T[:, :2].contiguous()  # of three rows and two columns
    packed, left = wire.pack({"w": tall}, "int8")
    assert torch.allclose(packed["w:scale"], torch.tensor([2.0, 0.0]) / 127)
    assert packed["w"].tolist() == [[64, 0], [-127, 0], [32, 0]]
    assert torch.allclose(wire.unpack(packed)["w"] + left["w"], tall, atol=1e-7)
    for name, (kind, shape) in wire.layout({"w": tall}, "int8").items():
        assert (str(packed[name].dtype), packed[name].shape) == (f"torch.{kind}", shape)


def test_error_feedback_delivers_in_time_what_rounding_takes():
    # 0.001 is a quarter of a step beside 0.5: alone it would never arrive.
    update = {"w": torch.tensor([[0.5, 0.001]])}
    delivered, residual = torch.zeros(1, 2), None
    for _ in range(100):
        packed, residual = wire.pack(update, "int8", residual)
        delivered += wire.unpack(packed)["w"]
    step = 0.51 / 127
    assert (delivered - 100 * update["w"]).abs().max() < step
    without = wire.unpack(wire.pack(update, "int8")[0])["w"]
    assert without[0, 1] == 0


def test_integers_without_fitting_scales_are_refused():
    packed, _ = wire.pack(STATE, "int8")
    for broken in (None, torch.ones(2), torch.ones(3, 1)):
        spoiled = {k: v for k, v in packed.items() if k != "matrix:scale"}
        if broken is not None:
            spoiled["matrix:scale"] = broken
        with pytest.raises(ValueError, match="matrix has no scale"):
            wire.unpack(spoiled)
