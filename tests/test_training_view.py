import io

import numpy as np
from PIL import Image

from moe_lab import data
from moe_lab.view import theme
from moe_lab.view.training import curves, read_log


def test_curves_show_what_the_log_says():
    log = read_log(data.root() / "lm" / "log.jsonl")
    twin = read_log(data.root() / "twin" / "log.jsonl")
    drawn = curves({"balanced": log, "no balancing": twin})
    loss, imbalance = drawn.axes
    np.testing.assert_allclose(loss.lines[0].get_ydata(), [line["bits_per_byte"] for line in log])
    assert len(loss.lines[1].get_ydata()) == sum("heldout_bits_per_byte" in line for line in log) == 5
    assert max(twin[-1]["max_over_mean"]) == imbalance.lines[1].get_ydata()[-1]
    assert [text.get_text() for text in imbalance.texts if "balanc" in text.get_text()] == ["balanced", "no balancing"]
    assert Image.open(io.BytesIO(theme.png(drawn))).size == (theme.SCALE * theme.WIDTH, theme.SCALE * 300)
