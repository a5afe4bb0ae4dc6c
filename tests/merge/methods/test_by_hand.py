"""One 3 x 4 example for each method, worked out by hand (base 0 but for the averages)."""

import math

import pytest
import torch

from merge.methods.blocks import change, merged


def matrix(*rows):
    return torch.tensor(rows, dtype=torch.float64)


ONE = matrix([8, -1, 0, 4], [1, 2, -3, 0], [0, 5, 1, -1])
TWO = matrix([-2, -3, 6, 4], [1, -2, -1, 0], [2, 7, -1, 0])


def diagonal(*values):
    return torch.diag(torch.tensor(values, dtype=torch.float64)) @ torch.eye(3, 4, dtype=torch.float64)


P, Q = diagonal(3, 1, 0), diagonal(0, 2, 4)  # singular directions that can be read off


def test_linear():
    expected = matrix([6, -1.4, 1.2, 4], [1, 1.2, -2.6, 0], [0.4, 5.4, 0.6, -0.8])  # (4 one + two) / 5
    torch.testing.assert_close(merged("linear", None, [ONE, TWO], weight=(4, 1)), expected)
    torch.testing.assert_close(merged("linear", None, [ONE, TWO], weight=(4, 1), normalize=False), 5 * expected)


def test_task_arithmetic():
    expected = matrix([3, -2, 3, 4], [1, 0, -2, 0], [1, 6, 0, -0.5])  # .5 (one + two)
    torch.testing.assert_close(change("task_arithmetic", [ONE, TWO], scale=0.5), expected)


def test_slerp():
    """sum of squares 122 and 125, product -16 + 3 + 0 + 16 + 1 - 4 + 3 + 0 + 0 + 35 - 1 + 0 = 37."""
    angle = math.acos(37 / math.sqrt(122 * 125))
    expected = (math.sin(0.7 * angle) * ONE + math.sin(0.3 * angle) * TWO) / math.sin(angle)
    torch.testing.assert_close(merged("slerp", None, [ONE, TWO], t=0.3), expected)


def test_ties():
    """density .5 keeps six of twelve. One: 8 5 4 -3 2 and of -1 1 1 -1 the first. Two: 7 6 4 -3 -2 and of the twos
    the next at the lower index (1, 1), so that (2, 0) goes."""
    one = matrix([8, -1, 0, 4], [0, 2, -3, 0], [0, 5, 0, 0])
    two = matrix([-2, -3, 6, 4], [0, -2, 0, 0], [0, 7, 0, 0])
    assert torch.equal(change("ties", [one, two], density=1.0), change("ties", [ONE, TWO], density=0.5))
    # 2 - 2 cancels at (1, 1): five entries elect +, two elect -, so + it is
    expected = matrix([8, -2, 6, 4], [0, 2, -3, 0], [0, 6, 0, 0])
    torch.testing.assert_close(change("ties", [ONE, TWO], density=0.5), expected)


def test_breadcrumbs():
    """Of four in a row, gamma .25 removes the largest and beta .5 keeps the next two."""
    one = matrix([0, -1, 0, 4], [1, 2, 0, 0], [0, 0, 1, -1])
    two = matrix([0, -3, 0, 4], [1, 0, -1, 0], [2, 0, -1, 0])
    expected = one + two
    torch.testing.assert_close(change("breadcrumbs", [ONE, TWO], beta=0.5, gamma=0.25, scale=1), expected)


def test_model_stock():
    cosine = 37 / math.sqrt(122 * 125)
    expected = 2 * cosine / (1 + cosine) * (ONE + TWO) / 2
    torch.testing.assert_close(change("model_stock", [ONE, TWO]), expected)


def test_consensus():
    """Claims at lambda_m .6: one at (0,0) 8 > 1.2, two at (0,0) 2 < 4.8; both must claim (k 2)."""
    expected = matrix([0, 0, 0, 8], [2, 0, 0, 0], [0, 12, 0, 0])  # (0,1): 1 < 1.8; (1,1): 2 > 1.2 twice, but sums to 0
    torch.testing.assert_close(change("consensus_ta", [ONE, TWO], scale=1), expected)


def test_pcb():
    """One expert of rho .5: a = (|x| / 8)^2, b = e^a tanh x^2, the sixth largest b is that of 1 (place 12 - 6)."""
    found = change("pcb", [ONE], density=0.5, scale=1)
    torch.testing.assert_close(found, torch.where(ONE.abs() > 1, ONE, 0))  # at the quantile itself s is 0


def test_dare_and_della_without_chance():
    for method in ("dare_linear", "dare_ties", "della"):
        plain = (
            change("task_arithmetic", [ONE, TWO], scale=1)
            if method == "dare_linear"
            else change("ties", [ONE, TWO], density=1.0)
        )
        torch.testing.assert_close(change(method, [ONE, TWO], density=1.0, scale=1), plain)


def test_tsv_m():
    """r 3, T 2: one direction each (3 and 4), and the one that is over to the second, whose next value 2 beats 1."""
    torch.testing.assert_close(change("tsv_m", [P, Q]), diagonal(3, 2, 4))


def test_r_tsvm():
    """Nothing is an outlier. Energies .9 .1 and .8 .2: effective ranks 1.384 and 1.649, so 1.37 and 1.63 directions."""
    torch.testing.assert_close(change("r_tsvm", [P, Q]), diagonal(3, 2, 4))


def test_iso_c():
    torch.testing.assert_close(change("iso_c", [P, Q]), diagonal(10 / 3, 10 / 3, 10 / 3))  # of 3, 3, 4


def test_iso_cts():
    """common .34: one common direction (4 of the sum), then 3 of the first and, without the common row, 2 of the second."""
    torch.testing.assert_close(change("iso_cts", [P, Q], common=0.34), diagonal(3, 3, 3))


def test_wudi():
    """Diagonal, so each input for itself: sum of x^3 / n over sum of x^2 / n, with squared norms n of 10 and 20."""
    torch.testing.assert_close(change("wudi", [P, Q]), diagonal(3, (1 / 10 + 8 / 20) / (1 / 10 + 4 / 20), 4))


@pytest.mark.parametrize("method", ["tsv_m", "r_tsvm", "iso_c", "iso_cts", "wudi"])
def test_what_is_no_matrix_takes_the_mean_of_the_differences(method):
    vector = [ONE[0], TWO[0]]
    torch.testing.assert_close(change(method, vector), (ONE[0] + TWO[0]) / 2)
