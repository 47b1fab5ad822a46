import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from swin_dense.datasets.check_findings import Finding, Report
from swin_dense.tools.check_page import examples, write_page

VOID = {"meta", "br", "img"}


class Balanced(HTMLParser):
    """Fails where a tag is not closed."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def report():
    name = "<script>alert('\ud800')</script>"
    findings = [Finding("box-outside", "train", "a.json", name, number % 3, number) for number in range(20)]
    findings.append(Finding("category-unused", "train", "a.json", "never used", count=5))
    statistics = {"train": {"images": 7, "classes": {name: 3, "dog": 0}, "sizes": {"small": 1, "large": 0}}}
    statistics["train"]["crowd"] = {"share_of_annotations": 0.125}
    return Report(findings, statistics, ["a remark"])


def test_page_is_whole_escaped_and_needs_no_other_file(tmp_path):
    path = tmp_path / "new" / "page.html"
    write_page(path, "the <data>", report(), lambda finding: np.full((13, 17, 3), finding.count, np.uint8))
    text = path.read_text("utf-8")
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert "<script" not in text and "http" not in text and "the &lt;data&gt;" in text
    assert "20 errors, 5 notes" in text and "a remark" in text and "crowd: 12.5% of the annotations" in text
    sources = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    assert len(sources) == 7
    assert Image.open(io.BytesIO(base64.b64decode(sources[0]))).size == (17, 13)


def test_finding_without_picture_keeps_its_words(tmp_path):
    write_page(tmp_path / "page.html", "data", report(), lambda finding: None)
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "<img" not in text and "never used" in text and text.count("<figure>") == 7


def test_clean_data_is_said_to_be(tmp_path):
    write_page(tmp_path / "page.html", "data", Report(), lambda finding: None)
    assert "Nothing was found." in (tmp_path / "page.html").read_text("utf-8")


def test_examples_are_of_different_pictures_first():
    shown = examples(report(), "box-outside")
    assert len(shown) == 6 and [finding.image_id for finding in shown[:3]] == [0, 1, 2]
    assert len({finding.annotation_id for finding in shown}) == 6
