"""Figures: fixed axes, titles and labels, valid PNG, colours that hold for everybody, and text beside each."""

import io
import re
import struct
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moe_lab.config import RouterConfig
from moe_lab.study import choice as choices
from moe_lab.study.choice import Choice, rerouted
from moe_lab.study.domains import classify, domain_histograms
from moe_lab.study.load import imbalance
from moe_lab.study.windows import ratio, window_loads
from moe_lab.view import pictures, plots, theme
from moe_lab.view.choices import compare_choices
from moe_lab.view.loads import window_sweep
from moe_lab.view.pages import read_document, tint
from moe_lab.view.pictures import HeatPicture, LoadPicture
from moe_lab.view.theme import LESS, MORE, TINTS, WITHIN
from moe_lab.view.tokens import MAX_TOKENS, TintedText, byte_pieces, characters
from synthetic import synthetic_trace


@pytest.fixture(scope="module")
def trace():
    return synthetic_trace()


@pytest.fixture(scope="module")
def measured(trace):
    return imbalance(trace)


@pytest.fixture(scope="module")
def comparison(trace):
    recorded = Choice.recorded(trace)
    return compare_choices(trace, 1, {"as recorded": recorded, "K 1": Choice(top_k=1, router=recorded.router)})


def image(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def rgb(colour):
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


# every figure


def drawings(trace, measured, comparison):
    text = TintedText("page", 0, byte_pieces(b"a b"), np.array([[0], [1], [2]]))
    return {
        "load": plots.load(window_loads(trace).loads[0]),
        "layers": plots.layers(measured, 1),
        "domains": plots.domains(measured),
        "fingerprints": plots.fingerprints(measured, 1),
        "windows": plots.windows(window_sweep(trace, 1)),
        "choices": plots.choices(comparison),
        "confusion": plots.confusion(classify(domain_histograms(trace, 125)), "Domain by experts"),
        "tokens": plots.tokens(text),
    }


@pytest.mark.slow
def test_every_figure_has_a_title_fits_a_notebook_and_is_valid_png(trace, measured, comparison):
    for name, drawn in drawings(trace, measured, comparison).items():
        png = theme.png(drawn)
        width, height = struct.unpack(">II", png[16:24])
        assert png.startswith(b"\x89PNG\r\n\x1a\n"), name
        assert width == round(drawn.get_figwidth() * theme.DPI * theme.SCALE), name
        assert theme.css_width(drawn) <= theme.WIDTH, name
        assert height < 1.2 * width, name
        assert theme.title(drawn) != "figure", name
        assert len(Image.open(io.BytesIO(png)).getcolors(2**24)) > 3, name


def test_axes_are_labelled_with_what_they_measure(trace, measured, comparison):
    labels = {
        name: " / ".join(text for axes in drawn.axes for text in (axes.get_xlabel(), axes.get_ylabel()))
        for name, drawn in drawings(trace, measured, comparison).items()
    }
    assert "load / mean" in labels["load"]
    assert "expert" in labels["load"]
    assert "layer" in labels["layers"]
    assert "tokens per window" in labels["windows"]
    assert "max / mean" in labels["windows"]
    assert "%" in labels["choices"]
    assert "% of windows" in labels["confusion"]


def test_figures_need_no_pyplot_and_show_displays_one_picture(trace, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    assert theme.show(plots.load(window_loads(trace).loads[0])) is None
    (picture,) = shown
    assert picture.width == theme.WIDTH
    assert picture.alt == "Load by expert"
    assert capsys.readouterr().out == ""


# colours


def test_colours_say_more_or_less_than_chance():
    assert pictures.colours(np.array([0.5, 1.0, 1.5]), 0.9, 1.1) == [LESS, WITHIN, MORE]


@pytest.mark.parametrize("matrix", ["protan", "deutan"])
def test_more_and_less_stay_apart_for_colour_blind_readers(matrix):
    # Machado, Oliveira and Fernandes (2009), severity 1
    seen = {
        "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    }[matrix]
    more, less, within = (np.array(seen) @ np.array(rgb(colour)) for colour in (MORE, LESS, WITHIN))
    assert np.abs(more - less).max() > 80
    assert np.abs(more - within).max() > 60
    assert np.abs(less - within).max() > 60


def test_the_ratio_map_is_centred_at_one_and_light_there():
    low, middle, high = (theme.RATIO_MAP((theme.log_ratio(r) + 2) / 4)[:3] for r in (0.5, 1.0, 2.0))
    assert min(middle) > 0.95
    assert low[2] > low[0]
    assert high[0] > high[2]
    assert theme.log_ratio(0.0) == -2
    assert theme.log_ratio(99.0) == 2


# pictures that move


def test_a_moved_picture_equals_one_made_anew(trace):
    first, second = window_loads(trace, window=500), window_loads(trace, window=500, domain="prose")
    moved, fresh = LoadPicture(16), LoadPicture(16)
    moved.update(first.loads[0]).png()
    spread = (second.low_LE[2], second.high_LE[2])
    assert (
        moved.update(second.loads[2], spread=spread, baseline=first.loads[0]).png()
        == fresh.update(second.loads[2], spread=spread, baseline=first.loads[0]).png()
    )
    heat, fresh_heat = HeatPicture((0, 1, 2), 16), HeatPicture((0, 1, 2), 16)
    heat.update(first.loads, 0).png()
    assert heat.update(second.loads, 2).png() == fresh_heat.update(second.loads, 2).png()


def test_axes_stay_put_whatever_is_shown(trace):
    picture = LoadPicture(16, 4)
    pngs = [image(picture.update(load).png()) for load in window_loads(trace).loads]
    height, width = pngs[0].shape[:2]
    left, below = slice(0, int(0.09 * width)), slice(int(0.88 * height), height)
    for png in pngs[1:]:
        np.testing.assert_array_equal(png[below], pngs[0][below])
        np.testing.assert_array_equal(png[:, left][height // 5 :], pngs[0][:, left][height // 5 :])
        assert (png != pngs[0]).any()


def test_bars_have_the_heights_of_the_loads(trace):
    load = window_loads(trace).loads[1]
    picture = LoadPicture(16, 4).update(load)
    heights = [path.vertices[:, 1].max() for path in picture._bars.get_paths()]
    np.testing.assert_allclose(heights, ratio(load))


def test_what_is_over_the_ceiling_is_marked_with_its_value(trace):
    load = window_loads(trace).loads[0]
    shares_E = torch.zeros(16, dtype=torch.float64)
    shares_E[3], shares_E[4:] = 0.7, 0.025
    picture = LoadPicture(16, 4).update(load._replace(shares_E=shares_E))
    assert picture._over.get_xdata().tolist() == [3]
    assert picture._top.get_text() == "3: 11.20"
    assert picture._top.get_position()[1] < 4


def test_an_expert_without_load_is_crossed(trace):
    loads = window_loads(trace).loads
    shares_E = loads[0].shares_E.clone()
    shares_E[5] = 0
    heat = HeatPicture((0, 1, 2), 16).update([loads[0]._replace(shares_E=shares_E), *loads[1:]], 0)
    assert (heat._dead.get_xdata().tolist(), heat._dead.get_ydata().tolist()) == ([5], [0])


@pytest.mark.parametrize(("highest", "ceiling"), [(1.0, 4), (4.1, 4), (4.5, 5), (9.0, 12), (1e6, 256)])
def test_ceilings_are_round_numbers(highest, ceiling):
    assert plots.ceiling_for(highest) == ceiling


# loads and choices


def test_window_loads_are_those_of_imbalance(trace, measured):
    for domain in (None, "prose"):
        for load in window_loads(trace, domain=domain).loads:
            expected = measured.load(load.layer, domain)
            assert load.metrics == expected.metrics
            assert load.null == expected.null
            assert torch.equal(load.shares_E, expected.shares_E)
    assert [load.tokens for load in window_loads(trace, window=300).loads] == [300] * 3
    assert window_loads(trace, window=10**6).loads[0].windows == 1


def test_window_loads_refuses_what_is_not_there(trace):
    with pytest.raises(ValueError, match=r"domain='poetry' is not in this trace: choose one of python"):
        window_loads(trace, domain="poetry")
    with pytest.raises(ValueError, match=r"tokens per window=0 must be an integer >= 1"):
        window_loads(trace, window=0)


def test_mixed_tokens_are_more_even_than_packed_documents(trace):
    sweep = window_sweep(trace, 0)
    assert sweep.sizes == (64, 128, 256)
    assert (sweep.mixed_S < sweep.packed_S).all()
    assert (sweep.low_S <= sweep.packed_S).all()
    assert (sweep.packed_S <= sweep.high_S).all()
    assert re.search(r"^256 +7 +\d\.\d\d +\d\.\d\d - \d\.\d\d", repr(sweep), re.MULTILINE)


@pytest.mark.parametrize(
    "router",
    [
        RouterConfig(),
        RouterConfig(score_func="sigmoid"),
        RouterConfig(num_expert_groups=4, num_limited_groups=2),
        RouterConfig(num_expert_groups=4, num_limited_groups=2, group_score="topk_share"),
        RouterConfig(force_load_balance="round_robin"),
        RouterConfig(force_load_balance="random"),
    ],
)
@pytest.mark.parametrize("top_k", [2, 5])
@pytest.mark.parametrize("many", [choices.MANY, 0])
def test_rerouted_ids_are_those_of_the_router(trace, router, top_k, many, monkeypatch):
    monkeypatch.setattr(choices, "MANY", many)  # 0: even this trace is long
    choices.rerouted.cache_clear()
    choices._ranking.cache_clear()
    choice = Choice(top_k=top_k, router=router, use_bias=False)
    other = rerouted(trace, choice)
    for i, layer in enumerate(trace.info.layers):
        expected = trace.reroute(layer, router, top_k, use_bias=False).expert_ids_TK
        assert torch.equal(other.expert_ids_LTK[i].long(), expected)


def test_the_recorded_choice_is_the_trace_itself(trace, comparison):
    assert rerouted(trace, Choice.recorded(trace)) is trace
    assert comparison.kept_C[0] == 1
    assert comparison.kept_C[1] == pytest.approx(1 / trace.top_k)
    assert comparison.top_gate_C[1] == 1
    assert "open-loop · layer 1 · 2,000 tokens" in repr(comparison)


def test_a_choice_that_cannot_be_made_says_why(trace):
    narrow = RouterConfig(num_expert_groups=8, num_limited_groups=1)
    with pytest.raises(ValueError, match=r"top_k=4 cannot be chosen from num_limited_groups=1 groups of 2"):
        rerouted(trace, Choice(top_k=4, router=narrow))
    with pytest.raises(ValueError, match=r"no logits_LTE"):
        rerouted(synthetic_trace(tokens=100, logits=False), Choice(top_k=1, router=RouterConfig()))


# tinted text


class Reader(HTMLParser):
    """What a browser would show and offer on hovering."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.shown, self.titles, self.inside, self.tags = "", [], False, set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        assert not {name for name, _ in attributes} - {"style", "title"}
        self.inside |= tag == "pre"
        if title := dict(attributes).get("title"):
            self.titles.append(title)

    def handle_endtag(self, tag):
        self.inside &= tag != "pre"

    def handle_data(self, data):
        self.shown += data if self.inside else ""


def read(html):
    reader = Reader()
    reader.feed(html)
    reader.close()
    return reader


def tinted(text, experts=40, top_k=2):
    draw = np.random.default_rng(len(text))
    ids_TK = draw.integers(0, experts, (len(text), top_k))
    return TintedText("page", 0, byte_pieces(text), ids_TK, draw.random((len(text), top_k)))


@given(st.binary(min_size=1, max_size=60))
@settings(max_examples=200)
def test_any_bytes_come_back_out_of_the_html_and_nothing_else_gets_in(text):
    result = tinted(text)
    reader = read(result.html())
    assert reader.tags <= {"div", "pre", "span"}
    expected = "".join(shown for *_, shown in characters(result.pieces))
    assert reader.shown == expected.replace("⏎", "⏎\n")
    assert "\n".join(reader.titles).count(" → ") >= len(text)


@given(st.binary(max_size=40))
@settings(max_examples=200)
def test_characters_cover_every_byte_once_and_cut_none(text):
    groups = characters(byte_pieces(text))
    assert [i for begin, stop, _ in groups for i in range(begin, stop)] == list(range(len(text)))
    for begin, stop, shown in groups:
        if stop - begin > 1:
            character = text[begin:stop].decode()
            assert shown == character if character.isprintable() else shown.startswith("\\x")


@given(st.text(min_size=1, max_size=30))
def test_proper_text_is_shown_character_by_character(text):
    groups = characters(byte_pieces(text.encode()))
    assert len(groups) == len(text)
    for character, (*_, shown) in zip(text, groups, strict=True):
        assert (shown == character) == (character.isprintable())


@pytest.mark.parametrize(
    ("text", "shown"), [(b"\xe2\x82\xac", "€"), (b"\xe2\x82", "\\xe2\\x82"), (b"\t\n", "→⏎"), (b"\x00", "\\x00")]
)
def test_known_characters(text, shown):
    assert "".join(part for *_, part in characters(byte_pieces(text))) == shown


def test_hovering_names_place_byte_experts_and_gates():
    result = TintedText(
        "page",
        0,
        (b"<", b"\xc3", b"\xa9"),
        np.array([[7, 3], [1, -1], [2, 0]]),
        np.array([[0.625, 0.25], [0.5, 0.0], [0.5, 0.25]]),
    )
    assert read(result.html()).titles == [
        "0: < → 7 0.62, 3 0.25",
        "1: \\xc3 → 1 0.50, dropped\n2: \\xa9 → 2 0.50, 0 0.25",
    ]


def test_the_most_used_experts_have_the_tints_and_the_table():
    ids_TK = np.array([[5], [5], [5], [2], [2], [9]])
    result = TintedText("page", 0, byte_pieces(b"aab  c"), ids_TK)
    assert list(result.tints.items())[:3] == [(5, TINTS[0]), (2, TINTS[1]), (9, TINTS[2])]
    assert repr(result).splitlines() == [
        "page · layer 0 · 6 tokens",
        "expert  first for  most often",
        "     5       50 %  a 2  b 1",
        "     2       33 %  ␣ 2",
        "     9       17 %  c 1",
    ]


def test_text_is_bounded_and_its_lengths_must_match():
    with pytest.raises(ValueError, match=r"text of 4,097 tokens: show 1 to 4,096 at a time"):
        tinted(b"x" * (MAX_TOKENS + 1))
    with pytest.raises(ValueError, match=r"text of 0 tokens"):
        tinted(b"")
    with pytest.raises(ValueError, match=r"expert_ids_TK has 1 tokens, the text has 2"):
        TintedText("page", 0, (b"a", b"b"), np.array([[0]]))
    assert len(tinted(bytes(range(256)) * 16, top_k=4).html()) < 250 * MAX_TOKENS


def test_a_page_is_drawn_with_a_part_of_each_domain(trace):
    texts = {d.name: [b"%d" % (i % 10)] * d.length for i, d in enumerate(trace.info.documents)}
    result = tint(trace, 2, tokens=100, read=lambda document: texts[document.name])
    assert [heading for _, heading in result.headings] == [
        "python: synthetic:0", "cpp: synthetic:1", "javascript: synthetic:2", "prose: synthetic:3", "data: synthetic:4"
    ]  # fmt: skip
    assert b"".join(result.pieces) == b"".join(b"%d" % i * 20 for i in range(5))
    assert result.expert_ids_TK[:20].tolist() == trace.expert_ids_LTK[2, :20].tolist()
    assert result.where == "synthetic · layer 2"
    one = tint(trace, 2, domain="prose", read=lambda document: texts[document.name])
    assert one.headings == ((0, "prose: synthetic:3"),)
    chosen = tint(trace, 2, choice=Choice(top_k=2, router=RouterConfig()), read=lambda d: texts[d.name])
    assert chosen.expert_ids_TK.shape[1] == 2


def test_text_that_is_not_here_or_does_not_match_is_not_shown(trace):
    assert tint(trace, 0, read=lambda document: None) is None
    assert tint(trace, 0, read=lambda document: [b"x"]) is None
    assert read_document(trace.info.documents[0]) is None
