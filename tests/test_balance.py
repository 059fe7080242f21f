import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.layer.balance import bias_delta

counts = st.lists(st.integers(0, 2**40), min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("counts_E", "coeff", "centred", "expected"),
    [
        ([10, 0], 0.1, True, [-0.1, 0.1]),
        ([10, 0], 0.1, False, [-0.1, 0.1]),
        ([9, 0, 0], 0.3, True, [-0.4, 0.2, 0.2]),
        ([9, 0, 0], 0.3, False, [-0.3, 0.3, 0.3]),
        ([1, 2, 3], 0.5, False, [0.5, 0.0, -0.5]),
        ([7], 0.5, True, [0.0]),
        ([0, 0, 0], 0.5, True, [0.0, 0.0, 0.0]),
    ],
)
def test_known_steps(counts_E, coeff, centred, expected):
    delta_E = bias_delta(torch.tensor(counts_E), coeff, centred=centred)
    assert delta_E.dtype == torch.float32
    torch.testing.assert_close(delta_E, torch.tensor(expected))


def test_steps_are_centred_unless_told():
    torch.testing.assert_close(bias_delta(torch.tensor([9, 0, 0]), 0.3), torch.tensor([-0.4, 0.2, 0.2]))


@given(counts)
def test_a_step_raises_the_experts_below_the_mean(counts_E):
    delta_E = bias_delta(torch.tensor(counts_E), 0.25, centred=False).tolist()
    total, num_experts = sum(counts_E), len(counts_E)
    assert delta_E == [0.25 * ((total > c * num_experts) - (total < c * num_experts)) for c in counts_E]


@given(counts)
def test_a_centred_step_keeps_the_sum(counts_E):
    delta_E = bias_delta(torch.tensor(counts_E), 0.25)
    assert abs(float(delta_E.sum())) <= len(counts_E) * 0.5 * torch.finfo(torch.float32).eps
    plain_E = bias_delta(torch.tensor(counts_E), 0.25, centred=False)
    torch.testing.assert_close(delta_E - delta_E[0], plain_E - plain_E[0], rtol=0, atol=1e-7)
