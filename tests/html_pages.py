"""Reads HTML pages, for tests of what stands in them."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Tags, attributes and texts of a page; every tag is closed by its own."""

    VOID = ("meta", "!doctype")

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.attributes, self.texts = set(), [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
