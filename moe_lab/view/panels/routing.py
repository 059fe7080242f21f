"""The routing panel: whose tokens, which layer, how they would choose, and who gets the load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import ipywidgets as widgets

from moe_lab import data
from moe_lab.config import check_choice
from moe_lab.study.choice import Choice, is_long, rerouted
from moe_lab.study.load import ALL_DOMAINS, Load
from moe_lab.study.trace import Document, RoutingTrace
from moe_lab.view import plots, theme
from moe_lab.view.pages import read_document
from moe_lab.view.panels import routing_forms as forms
from moe_lab.view.panels.base import Panel, control
from moe_lab.view.panels.choosing import ChoiceControls
from moe_lab.view.panels.routing_compute import Params, ceiling, compute, shipped_names, with_text
from moe_lab.view.panels.sources import bound, fit_layers, read_trace
from moe_lab.view.pictures import HeatPicture, LoadPicture
from moe_lab.view.tokens import byte_pieces


@dataclass(frozen=True, eq=False)
class Pinned:
    """A load to compare with, and what it is of."""

    load: Load
    words: str


class RoutingPanel(Panel):
    """Steer the routing of a recorded trace.

    `source` is the name of a shipped trace or of one in `sources`, or a trace itself. `texts` gives the text of
    documents that are neither pages of ours nor files of this environment, by name: bytes for a model that reads
    bytes, else a sequence with the bytes of each token.
    """

    def __init__(
        self,
        source: str | RoutingTrace = "balanced",
        *,
        sources: Mapping[str, RoutingTrace] | None = None,
        texts: Mapping[str, bytes | Sequence[bytes]] | None = None,
    ) -> None:
        self._traces: dict[str, RoutingTrace | None] = dict(sources or {})  # None: shipped, opened when chosen
        self._traces |= {name: None for name in shipped_names() if name not in self._traces}
        if isinstance(source, RoutingTrace):
            name = source.info.model or "trace"
            self._traces, source = {name: source, **self._traces}, name
        check_choice("source", source, tuple(self._traces))
        self._texts = {
            name: byte_pieces(text) if isinstance(text, bytes) else tuple(text) for name, text in (texts or {}).items()
        }
        self._make_controls(source)
        self.load_image, self.heat_image = (widgets.Image(format="png") for _ in range(2))
        self.tokens = widgets.HTML()
        self.tokens.add_class("moe-text")
        where = (self.source, self.file, self.layer, self.domain, self.window, self.window_slider)
        super().__init__([where, self.choosing.widgets], [self.load_image, self.heat_image, self.tokens])
        self._pinned: Pinned | None = None
        self.button("pin baseline", "outline this load and compare what follows with it", self.pin)
        self.button("unpin", "forget the baseline", self.unpin)
        self.button("copy as MoEConfig", "Python for a layer that chooses like this", self._offer_config)
        self.offer_files("routing")
        self._open()
        self._connect()
        self.refresh()

    # controls

    def _make_controls(self, source: str) -> None:
        names = list(self._traces)
        self.source = control(widgets.Dropdown, "source", "146px", options=names, value=source)
        self.file = control(widgets.Text, "your trace", "172px", continuous_update=False)
        self.file.placeholder = "path of a trace or dump"
        self.layer = control(widgets.IntSlider, "layer", "180px", min=0, max=1)
        self.domain = control(widgets.Dropdown, "domain", "155px", options=[ALL_DOMAINS])
        bounds = {"min": 1, "max": 2**31 - 1}
        self.window = control(widgets.BoundedIntText, "tokens per window", "198px", value=4096, **bounds)
        self.window_slider = control(widgets.IntSlider, "", "84px", min=0, max=1, readout=False)
        self.choosing = ChoiceControls()
        self.preset, self.top_k, self.score, self.groups, self.bias, self.forced = self.choosing.widgets

    def _connect(self) -> None:
        self.watch([self.source], self._reopen)
        self.watch([self.file], self._open_file)
        self.watch([self.window_slider], self._slide_window)
        self.watch([self.preset], self._take_preset)
        self.watch(self.choosing.widgets[1:], self._name_choice)
        self.watch([self.layer, self.domain, self.window], self.refresh)

    def _open(self) -> None:
        """Fit every control to the chosen source, as recorded, and make pictures of its size."""
        name = self.source.value
        trace = self._traces[name] = self._traces[name] or data.open(name)
        layers, tokens = trace.info.layers, trace.num_tokens
        if not tokens:
            raise ValueError(f"{name} holds no tokens: there is nothing to show")
        self._sizes = [size for size in (1 << n for n in range(4, 31)) if size < tokens] + [tokens]
        with self.hold():
            fit_layers(self.layer, trace)
            self.domain.options = [ALL_DOMAINS, *trace.domains]
            bound(self.window_slider, 0, len(self._sizes) - 1)
            self.window.max = tokens
            self.window.value = min(4096, tokens)
            self.choosing.fit(trace)
        self.trace, self._pages = trace, with_text(trace)
        self._load_picture = LoadPicture(trace.num_experts, ceiling(trace))
        self._heat_picture = HeatPicture(layers, trace.num_experts)
        self._drawn: dict[str, object] = {}
        if trace.logits_LTE is not None and not is_long(trace):  # now, so that the first move of a slider does not wait
            rerouted(trace, replace(Choice.recorded(trace), top_k=trace.top_k % trace.num_experts + 1))

    def _reopen(self) -> None:
        with self.busy():
            try:
                self._open()
            except ValueError as error:
                self.fail(error)
            else:
                self.refresh()

    def _open_file(self) -> None:
        path = Path(self.file.value.strip()).expanduser()
        if not self.file.value.strip():
            return
        with self.busy():
            try:
                self._traces[path.name] = read_trace(path)
            except ValueError as error:
                self.fail(error)
                return
        with self.hold():
            self.source.options = list(self._traces)
            self.source.value = path.name
        self._reopen()

    def _slide_window(self) -> None:
        self.window.value = self._sizes[self.window_slider.value]

    def _take_preset(self) -> None:
        with self.hold():
            self.choosing.take_preset()
        self.refresh()

    def _name_choice(self) -> None:
        with self.hold():
            self.choosing.name()
        self.refresh()

    # compute and draw

    def params(self) -> Params:
        """What the controls say."""
        return Params(
            trace=self.trace,
            layer=self.layer.value,
            domain=None if self.domain.value == ALL_DOMAINS else self.domain.value,
            window=self.window.value,
            choice=self.choosing.value(),
            pages=self._pages,
            read=self._read,
        )

    def _read(self, document: Document) -> Sequence[bytes] | None:
        return self._texts.get(document.name) or read_document(document)

    def _update(self) -> None:
        params = self.params()
        view = compute(params)
        recorded = str(Choice.recorded(self.trace))
        choice = recorded if params.choice is None else str(params.choice)
        pinned = self._pinned
        baseline = (pinned.load, pinned.words) if pinned else (None, "")
        self.shown = forms.Shown(self.source.value, choice, recorded, params.choice is not None, *view, *baseline)
        with self.hold():
            nearest = [abs(size - view.load.tokens) for size in self._sizes]
            self.window_slider.value = nearest.index(min(nearest))
        self._draw()
        self.numbers.value = forms.line(self.shown)

    def _draw(self) -> None:
        """Redraw the pictures whose input changed."""
        shown, layer = self.shown, self.layer.value
        row = shown.loads.layers.index(layer)
        if self._changed("load", (shown.loads, layer, self._pinned)):
            spread = (shown.loads.low_LE[row], shown.loads.high_LE[row])
            self.load_image.value = self._load_picture.update(shown.load, spread=spread, baseline=shown.baseline).png()
        if self._changed("heat", (shown.loads, layer)):
            self.heat_image.value = self._heat_picture.update(shown.loads.loads, layer).png()
        if self._changed("tokens", (shown.tinted, layer)):
            self.tokens.value = NO_TEXT if shown.tinted is None else shown.tinted.html()

    def _changed(self, picture: str, key: object) -> bool:
        before, self._drawn[picture] = self._drawn.get(picture), key
        return before != key

    # what the buttons do

    def pin(self) -> None:
        """Make what is shown the baseline."""
        self._pinned = Pinned(self.shown.load, self.shown.words)
        self.refresh()

    def unpin(self) -> None:
        """Forget the baseline."""
        self._pinned = None
        self.refresh()

    def config(self) -> str:
        """Python that makes a layer which chooses as the panel does. `ValueError` for a choice that cannot be."""
        choice = self.params().choice or Choice.recorded(self.trace)
        choice.router.check(self.trace.num_experts, choice.top_k)
        return forms.config_code(choice, self.trace.num_experts)

    def _offer_config(self) -> None:
        try:
            code = escape(self.config())
        except ValueError as error:
            self.fail(error)
            return
        self.shelf.value = f'<textarea readonly rows="11" onclick="this.select()">{code}</textarea>'

    def text(self) -> str:
        return forms.text(self.shown)

    def csv(self) -> str:
        return forms.csv_text(self.shown)

    def png(self) -> bytes:
        pictures = [bytes(self.load_image.value), bytes(self.heat_image.value)]
        if self.shown.tinted is not None:
            pictures.append(theme.png(plots.tokens(self.shown.tinted)))
        return forms.picture(self.shown, pictures)


NO_TEXT = "No text to show: it is neither in this environment nor among the pages that come with moe_lab."
