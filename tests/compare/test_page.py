"""The page of a comparison."""

import base64
from html.parser import HTMLParser

import pytest
from compared import invented, normal, save_lora

import merge_engine
from merge_engine.compare.figures import CAVEAT


class Page(HTMLParser):
    """The tags of a page, checked to be closed in order, with its text and what it refers to."""

    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.images, self.refers = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))
        self.refers += [value for key, value in attributes if key in ("src", "href", "srcset", "action", "data")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def render(result):
    pytest.importorskip("matplotlib")
    from merge_engine.compare.page import render

    return render(result)


def test_page_is_self_contained_and_tells_the_figures(three):
    result = merge_engine.interference(three)
    text = render(result)
    page = Page(text)
    assert "://" not in text and "url(" not in text and not {"script", "link", "iframe"} & set(page.tags)
    assert len(page.images) == 7  # three heat maps, and four plots by layer
    for image in page.images:
        assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))[:4] == b"\x89PNG"
    assert page.refers == [image["src"] for image in page.images]
    alts = [image["alt"] for image in page.images]
    assert "from -0." in alts[0] and "(sql and chat)" in alts[0] and "(ads and" not in alts[1].split(" to ")[1]
    for name, figures in result.modules.items():
        assert f"{name} {'{} x {}'.format(*result.shapes[name])}" in page.text
        assert f"{100 * figures.conflict_rate:.1f} %" in page.text
    assert "1 module without a layer's number in the name" in page.text
    assert CAVEAT in page.text and 'name="viewport"' in text and "@media print" in text


@pytest.fixture
def rough(monkeypatch):
    """Plots of few pixels, where only the page around them is looked at."""
    from merge_engine.compare import plots

    monkeypatch.setattr(plots, "DPI", 32)


def test_page_escapes_names(rough):
    nasty = [
        "<script>alert(1)</script>",
        'a"b&c',
        "$x$",
        "_under",
        "日本",
        r"$\bad{$",
        "new\nline",
        "\udcff",
        "x" * 200,
    ]
    modules = ["layers.0.<b>q</b>", "layers.1.<b>q</b>", "layers.0._v", r"layers.0.$\bad{$"]
    text = render(invented(len(nasty), modules, nasty))
    page = Page(text)
    assert not {"script", "b"} & set(page.tags)
    for name in [*nasty[:6], nasty[-1], *modules]:
        assert name in page.text
    text.encode()


@pytest.mark.parametrize(("count", "modules"), [(2, 1), (100, 30)])
def test_page_of_any_size(rough, count, modules):
    names = [f"model.layers.{i // 15}.block.{i % 15}_proj" for i in range(modules)]
    page = Page(render(invented(count, names)))
    assert len(page.images) == 7
    rows = page.tags.count("tr") - 3  # heads
    assert rows == count + min(count * (count - 1) // 2, 20) + modules


@pytest.mark.quick
def test_page_without_layers_or_pairs(tmp_path):
    folders = [save_lora(tmp_path / n, {n: normal(0, 2, 8, 9)}) for n in ("a", "b")]
    page = Page(render(merge_engine.interference(folders)))
    assert page.images == []
    assert "No pair shares a module." in page.text and "No module's name has a layer's number." in page.text
