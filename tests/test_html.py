"""Tables for notebooks, and sentences on pages and cards."""

from html.parser import HTMLParser

from jcrosslora.utils.texts import html_prose, html_table, markdown_prose


class _Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.rows, self.caption, self.tags = [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.tags.pop() == tag

    def handle_data(self, data):
        if self.tags[-1] == "caption":
            self.caption += data
        else:
            self.rows[-1][-1] += data


def _read(html):
    parser = _Cells()
    parser.feed(html)
    parser.close()
    assert not parser.tags
    return parser


def test_columns_are_the_union_of_all_rows_and_missing_cells_are_empty():
    table = _read(html_table([{"layer": "0", "rank": "8"}, {"layer": "1", "kept": "99 %"}], "modules"))
    assert table.caption == "modules"
    assert table.rows == [["layer", "rank", "kept"], ["0", "8", ""], ["1", "", "99 %"]]


def test_every_text_is_escaped():
    hostile = "<script>alert('&')</script>"
    html = html_table([{hostile: hostile}], hostile)
    assert "<script" not in html
    table = _read(html)
    assert table.caption == hostile
    assert table.rows == [[hostile], [hostile]]


def test_code_in_a_sentence_is_code_and_the_rest_is_escaped():
    text = "see `a <b> c` and * or ` alone"
    assert html_prose(text) == "see <code>a &lt;b&gt; c</code> and * or ` alone"
    assert markdown_prose(text) == r"see `a <b> c` and \* or \` alone"


def test_a_table_without_titles_and_caption_has_no_heading():
    assert _read(html_table([{"": "a"}])).rows == [["a"]]
    assert "caption" not in html_table([{"": "a"}])
    assert _read(html_table([])).rows == []
